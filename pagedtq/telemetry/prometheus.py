"""A Prometheus collector of the counts a cache keeps anyway; needs the extra ``metrics``.

Nothing is registered on import and nothing is counted twice: at each scrape the collector reads the
structs that its sources return and turns their fields into metrics by `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from ..errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

#: What returns counts: a struct such as `CacheStats`, or a mapping of names to numbers.
Source = Callable[[], Any]


class MetricName(NamedTuple):
    """How one count is exported, as ``pagedtq_<field>``; counters end in ``_total``.

    Attributes
    ----------
    field : str
        Name of the count.
    kind : {"gauge", "counter"}
        Whether it can fall.
    text : str
        What Prometheus shows as help.
    vllm : str or None
        The metric of vLLM that says the same; None if it has none.
    """

    field: str
    kind: Literal["gauge", "counter"]
    text: str
    vllm: str | None = None


#: Everything that is exported, if a source has it.
METRICS = tuple(
    MetricName(*row)
    for row in (
        ("num_pages", "gauge", "Pages of the pool, the null page included."),
        (
            "pages_used",
            "gauge",
            "Pages with an owner.",
            "vllm:kv_cache_usage_perc, as a part of num_pages - 1",
        ),
        ("pages_free", "gauge", "Pages without an owner that can be taken."),
        ("pages_shared", "gauge", "Pages with more than one owner."),
        ("pages_cached", "gauge", "Free pages that hold a block which can be found."),
        ("pages_parked", "gauge", "Freed pages that wait for work in flight."),
        ("num_swapped", "gauge", "Sequences on the host."),
        ("host_pages", "gauge", "Pages of the host tier."),
        ("host_pages_used", "gauge", "Pages of the host tier with an owner."),
        ("window_slots_used", "gauge", "Exact windows with an owner."),
        ("window_slots_free", "gauge", "Exact windows without one."),
        ("num_sequences", "gauge", "Open sequences."),
        ("logical_tokens", "gauge", "Tokens of all sequences, evicted ones included."),
        ("resident_tokens", "gauge", "Tokens whose page is held, for each sequence."),
        ("resident_slots", "gauge", "Slots of the pages that are held, for each sequence."),
        ("pool_bytes", "gauge", "Bytes of the page pool."),
        ("pages_used_bytes", "gauge", "Bytes of the pages with an owner."),
        ("window_bytes", "gauge", "Bytes of the exact windows."),
        ("window_used_bytes", "gauge", "Bytes of the exact windows with an owner."),
        ("table_bytes", "gauge", "Bytes of the page tables."),
        ("prefix_queries", "counter", "Tokens looked up.", "vllm:prefix_cache_queries"),
        ("prefix_hits", "counter", "Tokens found.", "vllm:prefix_cache_hits"),
        ("blocks_published", "counter", "Pages that began to hold a block."),
        ("blocks_forgotten", "counter", "Pages that lost the block they held."),
        ("blocks_evicted", "counter", "Blocks dropped from live sequences."),
        ("prompt_tokens", "counter", "Prompt tokens of admitted requests.", "vllm:prompt_tokens"),
        (
            "prompt_tokens_found",
            "counter",
            "Those of them that were found when the request was admitted first.",
            "vllm:prompt_tokens_cached",
        ),
        ("preemptions", "counter", "Requests that were preempted.", "vllm:num_preemptions"),
        ("swapped_out_pages", "counter", "Pages copied to the host."),
        ("swapped_in_pages", "counter", "Pages copied back."),
    )
)


class PrometheusCollector:
    """Reads counts at each scrape; register it with a registry of your own.

    Parameters
    ----------
    *sources : callable
        Return structs or mappings with fields named in `METRICS`, such as ``cache.stats``,
        ``cache.counters``, ``cache.memory_report`` or those of a `BlockManager`; other fields are
        passed over.
    labels : mapping of str to str, optional
        Put on every metric, to tell caches apart.

    Raises
    ------
    ArgumentError
        If no source has a known field, or two have the same.
    UnsupportedError
        If prometheus_client is not installed.

    Examples
    --------
    >>> registry = CollectorRegistry()  # doctest: +SKIP
    >>> registry.register(PrometheusCollector(cache.stats, cache.counters))  # doctest: +SKIP
    """

    def __init__(self, *sources: Source, labels: Mapping[str, str] | None = None) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise UnsupportedError(
                'metrics need prometheus_client: pip install "pagedtq[metrics]"'
            ) from error
        self._core = core
        self._sources = sources
        self._labels = dict(labels or {})
        if not self._read():
            raise ArgumentError("no source has a field that is exported; see METRICS")

    def collect(self) -> Iterable[Metric]:
        """Return one metric for every known field, with its value now."""
        values = self._read()
        return [self._family(name, values[name.field]) for name in METRICS if name.field in values]

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without values, so that registering reads nothing."""
        return [self._family(name) for name in METRICS]

    def _read(self) -> dict[str, float]:
        known = {name.field for name in METRICS}
        values: dict[str, float] = {}
        for source in self._sources:
            counts = source()
            fields = counts if isinstance(counts, Mapping) else msgspec.structs.asdict(counts)
            found = {field: fields[field] for field in known & fields.keys()}
            twice = found.keys() & values.keys()
            if twice:
                raise ArgumentError(f"two sources have the field {min(twice)}")
            values |= found
        return values

    def _family(self, name: MetricName, value: float | None = None) -> Metric:
        kinds = {
            "gauge": self._core.GaugeMetricFamily,
            "counter": self._core.CounterMetricFamily,
        }
        family: Metric = kinds[name.kind](
            f"pagedtq_{name.field}", name.text, labels=list(self._labels)
        )
        if value is not None:
            family.add_metric(list(self._labels.values()), value)  # type: ignore[attr-defined]
        return family
