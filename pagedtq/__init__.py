"""Paged KV cache with TurboQuant-compressed pages."""

__version__ = "0.1.0"
