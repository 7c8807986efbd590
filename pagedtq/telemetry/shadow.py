"""A cache that keeps exact copies of some sequences, and compares what it reads with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import BackendFactory, BackendName
from ..backends.host_score import Scores
from ..cache import MemoryReport, PagedKVCache
from ..config import CacheConfig, Dtype, Exact
from ..errors import ArgumentError, CapacityError, UnsupportedError
from ..paging.block_chain import BlockChain
from ..paging.evict_lowest import EvictLowest
from ..paging.eviction import EvictionPlan, EvictionPolicy
from ..paging.page_scores import PageRanking
from ..paging.step_plan import StepPlan
from .shadow_errors import LayerHistograms, ShadowReport

Array = npt.NDArray[Any]
SeqIds = int | Sequence[int] | Array


class ShadowedCache(PagedKVCache):
    """A `PagedKVCache` that keeps exact copies of some sequences in some layers.

    The copies are pages too, of a second cache whose codecs are `Exact`, so forks, truncation,
    eviction and steps mean the same for them. Results are those of the cache alone; a shadow that
    finds no page is given up, never the step. Sequences that come by ``import_sequence`` have none.

    Parameters
    ----------
    config : CacheConfig
        As `PagedKVCache`.
    backend : {"auto", "host", "cuda"} or callable
        As `PagedKVCache`.
    fraction : float
        Share of the opened sequences that get a shadow; forks of those get one always.
    layers : sequence of int, optional
        Layers with shadows, negative ones from the end; all by default.
    num_shadow_pages : int, optional
        Pages for shadows; by default the same fraction of the cache's.
    shadow_seed : int
        Which sequences are chosen.
    **options
        As `PagedKVCache`: ``key_means``, ``accumulate``, ``num_threads``, ``debug``.
    """

    def __init__(
        self,
        config: CacheConfig,
        backend: BackendName | BackendFactory = "auto",
        *,
        fraction: float = 0.1,
        layers: Sequence[int] | None = None,
        num_shadow_pages: int | None = None,
        shadow_seed: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ArgumentError(f"fraction must be in [0, 1], got {fraction}")
        count = config.num_layers
        chosen = list(range(count)) if layers is None else list(layers)
        if not chosen or any(not -count <= layer < count for layer in chosen):
            raise ArgumentError(f"layers must be some of [0, {count - 1}], got {chosen}")
        if options.get("sharing") is not None:
            # A sequence that begins with shared pages has tokens its shadow never saw.
            raise UnsupportedError("a shadowed cache does not share prefixes; leave sharing out")
        super().__init__(config, backend, **options)
        self.fraction = fraction
        self._places = {layer: i for i, layer in enumerate(sorted({i % count for i in chosen}))}
        share = 2 + int(fraction * (config.num_pages - 2))
        exact = Exact(dtype=config.kv_dtype)
        shadow_config = CacheConfig(
            num_layers=len(self._places),
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_pages=share if num_shadow_pages is None else num_shadow_pages,
            page_size=config.page_size,
            keys=exact,
            values=exact,
            window=0,
            kv_dtype=config.kv_dtype,
        )
        passed = {name: options[name] for name in ("accumulate", "num_threads") if name in options}
        self.shadow = PagedKVCache(shadow_config, backend, **passed)
        self._twins: dict[int, int] = {}
        self._random = np.random.default_rng(shadow_seed)
        self._opened = self._dropped = 0
        self._errors = {layer: LayerHistograms() for layer in self._places}
        self._chosen = np.zeros(0, np.bool_)

    def open(
        self,
        token_ids: Sequence[int] | Array | BlockChain | None = None,
        *,
        salt: bytes = b"",
        extra_keys: Mapping[int, bytes] | None = None,
        block_keys: Sequence[bytes] | None = None,
    ) -> int:
        """Open an empty sequence, with or without a shadow."""
        seq_id = super().open(token_ids, salt=salt, extra_keys=extra_keys, block_keys=block_keys)
        self._opened += 1
        if self._random.random() < self.fraction:
            self._twins[seq_id] = self.shadow.open()
        return seq_id

    def close(self, seq_ids: SeqIds) -> None:
        """Close sequences and their shadows."""
        super().close(seq_ids)
        for seq_id in self._ids(seq_ids).tolist():
            if seq_id in self._twins:
                self.shadow.close(self._twins.pop(seq_id))

    def fork(self, seq_id: int) -> int:
        """Fork a sequence and its shadow."""
        child = super().fork(seq_id)
        self._opened += 1
        if seq_id in self._twins:
            self._twins[child] = self.shadow.fork(self._twins[seq_id])
        return child

    def truncate(self, seq_id: int, length: int) -> None:
        """Cut a sequence and its shadow."""
        super().truncate(seq_id, length)
        if seq_id in self._twins:
            self.shadow.truncate(self._twins[seq_id], length)

    def evict(self, seq_id: int, what: EvictionPolicy | Sequence[int] | Array) -> None:
        """Drop pages of a sequence, and the same blocks of its shadow."""
        super().evict(seq_id, what)
        self._evict_twin(seq_id)

    def evict_many(self, seq_ids: SeqIds, policy: EvictLowest) -> list[EvictionPlan]:
        """Bring sequences back to their budgets, and drop the same blocks of their shadows."""
        plans = super().evict_many(seq_ids, policy)
        for plan in plans:
            self._evict_twin(plan.seq_id)
        return plans

    def free_pages(
        self,
        num_pages: int,
        ranking: PageRanking,
        seq_ids: SeqIds | None = None,
        first_tokens: int = 0,
        last_tokens: int = 0,
    ) -> list[EvictionPlan]:
        """Free pages of several sequences, and drop the same blocks of their shadows."""
        plans = super().free_pages(num_pages, ranking, seq_ids, first_tokens, last_tokens)
        for plan in plans:
            self._evict_twin(plan.seq_id)
        return plans

    def _evict_twin(self, seq_id: int) -> None:
        twin = self._twins.get(seq_id)
        if twin is None:
            return
        gone = self.tables.block_table([seq_id])[0] == 0
        blocks = np.flatnonzero(gone & (self.shadow.tables.block_table([twin])[0] > 0))
        reads = self.tables.reads([seq_id], overlay=False)
        boundary = (int(reads.keep[0]), int(reads.start[0]))
        self.shadow.tables.evict(twin, blocks, boundary)

    def begin_step(
        self,
        seq_ids: SeqIds,
        num_new_tokens: int | Sequence[int] | Array = 1,
        token_ids: Sequence[int] | Array | None = None,
    ) -> StepPlan:
        """Open a step, and one of the shadows of its members."""
        plan = super().begin_step(seq_ids, num_new_tokens, token_ids)
        members = [seq for seq in plan.seq_ids.tolist() if seq in self._twins]
        counts = dict(zip(plan.seq_ids.tolist(), plan.num_new.tolist()))
        while True:
            twins = [self._twins[seq] for seq in members]
            try:
                self.shadow.begin_step(
                    np.array(twins, np.int64), np.array([counts[seq] for seq in members], np.int64)
                )
                break
            except CapacityError:
                # Watching must not get into the way of what is watched.
                self.shadow.close(self._twins.pop(members.pop()))
                self._dropped += 1
        self._chosen = np.repeat(np.isin(plan.seq_ids, members), plan.num_new)
        return plan

    def store(self, layer: int, keys: Array, values: Array, dtype: Dtype | None = None) -> None:
        """Store one layer of the open step, and an exact copy of it."""
        super().store(layer, keys, values, dtype)
        if layer in self._places:
            mine = self._chosen
            self.shadow.store(self._places[layer], keys[mine], values[mine], dtype)

    def commit(self, publish_to: Sequence[int] | Array | None = None) -> None:
        """Close the open step."""
        super().commit(publish_to)
        # A step without tokens may end without a layer stored.
        self.shadow.commit()

    def abort_step(self) -> None:
        """Give the open step up."""
        super().abort_step()
        self.shadow.abort_step()

    def attend(
        self,
        layer: int,
        queries: Array,
        seq_ids: SeqIds,
        q_lens: Sequence[int] | Array | None = None,
        sm_scale: float | None = None,
        keys: Array | None = None,
        values: Array | None = None,
        *,
        soft_cap: float | None = None,
        sink_logits: Array | None = None,
        window_left: int | None = None,
        alibi_slopes: object = None,
    ) -> tuple[Array, Array]:
        """Attend, and compare with exact attention where there are shadows.

        Parameters, results and errors are those of `PagedKVCache.attend`.
        """
        options: dict[str, Any] = {
            "soft_cap": soft_cap,
            "sink_logits": sink_logits,
            "window_left": window_left,
            "alibi_slopes": alibi_slopes,
        }
        out, lse = super().attend(
            layer, queries, seq_ids, q_lens, sm_scale, keys, values, **options
        )
        chosen, twins = self._shadowed(layer, seq_ids)
        if twins.size:
            lens = np.ones(chosen.size, np.int64) if q_lens is None else np.asarray(q_lens)
            mine = np.repeat(chosen, lens)
            exact, exact_lse = self.shadow.attend(
                self._places[layer],
                queries[mine],
                twins,
                lens[chosen],
                sm_scale,
                None if keys is None else keys[mine],
                None if values is None else values[mine],
                **options,
            )
            to_host = self.backend.to_host
            self._errors[layer].add_states(
                (to_host(out)[mine], to_host(lse)[mine]), (to_host(exact), to_host(exact_lse))
            )
        return out, lse

    def score(self, layer: int, queries: Array, seq_ids: SeqIds) -> Scores:
        """Score, and compare with exact scores where there are shadows."""
        scores = super().score(layer, queries, seq_ids)
        chosen, twins = self._shadowed(layer, seq_ids)
        if twins.size:
            exact = self._on_host(self.shadow.score(self._places[layer], queries[chosen], twins))
            mine = self._on_host(scores)
            for index, member in enumerate(np.flatnonzero(chosen).tolist()):
                self._errors[layer].add_scores(
                    mine.of(member)[0], exact.of(index)[0], self.config.head_dim
                )
        return scores

    def shadow_report(self) -> ShadowReport:
        """Return the errors seen so far."""
        total = LayerHistograms()
        for histograms in self._errors.values():
            total.merge(histograms)
        return ShadowReport(
            schema=1,
            fraction=self.fraction,
            opened=self._opened,
            shadowed=len(self._twins),
            dropped=self._dropped,
            shadow_bytes=self.memory_report().shadow_bytes,
            total=total.summary(None),
            layers=[histograms.summary(layer) for layer, histograms in self._errors.items()],
        )

    def memory_report(self) -> MemoryReport:
        """Account for every byte held, the shadows included."""
        return super().memory_report().with_shadows(self.shadow.memory_report())

    def check_integrity(self) -> None:
        """Prove the invariants of cache and shadows."""
        super().check_integrity()
        self.shadow.check_integrity()

    def _on_host(self, scores: Scores) -> Scores:
        return scores._replace(values=self.backend.to_host(scores.values))

    def _shadowed(self, layer: int, seq_ids: SeqIds) -> tuple[Array, Array]:
        """Return which members of a batch have a shadow in a layer, and the shadows' ids."""
        ids = self._ids(seq_ids).tolist()
        if layer % self.config.num_layers not in self._places:
            ids = []
        found = [seq in self._twins for seq in ids]
        twins = [self._twins[seq] for seq in ids if seq in self._twins]
        return np.array(found, np.bool_), np.array(twins, np.int64)
