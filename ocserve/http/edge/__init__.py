"""The guards at the edge: plain ASGI classes, one per file. Each raises an `ApiError`; the outermost renders it."""
