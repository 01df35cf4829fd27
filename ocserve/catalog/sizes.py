"""Bytes for people."""

from __future__ import annotations


def size_text(size_bytes: int) -> str:
    """`size_bytes` in the decimal units that hubs and disks use."""
    if size_bytes >= 1_000_000_000:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1_000_000 else f"{size_bytes / 1e3:.0f} kB"
