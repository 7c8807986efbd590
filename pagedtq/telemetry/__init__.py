"""Watching a cache at work: exact shadows, and error quantiles on line."""

from .quantiles import ErrorQuantiles, LogHistogram
from .shadow import LayerErrors, ShadowedCache, ShadowReport

__all__ = ["ErrorQuantiles", "LayerErrors", "LogHistogram", "ShadowReport", "ShadowedCache"]
