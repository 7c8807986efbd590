"""Watching a cache at work: exact shadows, error quantiles, and receipts of what was measured."""

from .quantiles import ErrorQuantiles, LogHistogram
from .receipts import BenchmarkReceipt, Machine, benchmark_receipt
from .shadow import LayerErrors, ShadowedCache, ShadowReport

__all__ = [
    "BenchmarkReceipt",
    "ErrorQuantiles",
    "LayerErrors",
    "LogHistogram",
    "Machine",
    "ShadowReport",
    "ShadowedCache",
    "benchmark_receipt",
]
