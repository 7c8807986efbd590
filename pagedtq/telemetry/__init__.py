"""Watching a cache at work: exact shadows, error quantiles, and receipts of what was measured."""

from .prometheus import METRICS, MetricName, PrometheusCollector
from .quantiles import ErrorQuantiles, LogHistogram
from .receipts import BenchmarkReceipt, Machine, benchmark_receipt
from .shadow import ShadowedCache
from .shadow_errors import LayerErrors, ShadowReport

__all__ = [
    "METRICS",
    "BenchmarkReceipt",
    "ErrorQuantiles",
    "LayerErrors",
    "LogHistogram",
    "Machine",
    "MetricName",
    "PrometheusCollector",
    "ShadowReport",
    "ShadowedCache",
    "benchmark_receipt",
]
