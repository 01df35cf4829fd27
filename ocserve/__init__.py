"""ocserve: a local inference server for GGUF models."""

__version__ = "0.1.0"
