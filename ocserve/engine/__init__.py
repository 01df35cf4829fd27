"""The engine: one process per loaded model, and the front's handle on it."""
