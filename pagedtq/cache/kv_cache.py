"""`PagedKVCache`: the one object that joins page tables and page bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt

from ..backends import BackendFactory, BackendName, select_backend
from ..backends.dtypes import check_shape
from ..config import CacheConfig, Dtype
from ..errors import ArgumentError, ArgumentTypeError, StepError
from ..paging.arguments import token_counts
from ..paging.evict_lowest import EvictLowest, plan_free
from ..paging.eviction import EvictionPlan, EvictionPolicy, apply, apply_all
from ..paging.page_scores import PageRanking
from ..paging.page_tables import PageTables
from ..paging.shared_prefixes import BlockChain, SharingOptions
from ..paging.step_plan import StepPlan
from .reads import SeqIds
from .swapping import POISON, CacheSwaps

Array = npt.NDArray[Any]


class PagedKVCache(CacheSwaps):
    """A KV cache in fixed-size pages of TurboQuant codes.

    Parameters
    ----------
    config : CacheConfig
        Shape, codecs, pool size, exact window.
    backend : {"auto", "host", "cuda"} or callable
        Where bytes live and who computes. ``"auto"`` picks CUDA where there is a device and kernels
        for this configuration; ``repr`` says what was picked. A callable makes the backend, see
        `select_backend`.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]``, optional
        Subtracted from keys before coding; softmax is unchanged by it, scores and lse add it back.
        Fixed for the life of the cache.
    accumulate : {"float32", "float64"}
        Type of host arithmetic after decoding.
    num_threads : int, optional
        Host threads; one per available CPU by default.
    sharing : SharingOptions, optional
        Share pages between sequences that begin with the same tokens; without it only forks share.
    debug : bool
        Poison pages that are free or fresh, check all invariants after every change, and look at
        the content of arrays on a device (which waits for it).

    Notes
    -----
    A failed call leaves the cache exactly as it was. One step can be open at a time: `begin_step`
    reserves, `store` is called once per layer, `commit` or `abort_step` ends it. While it is open,
    its members have their new lengths and can be attended in layers already stored.
    """

    def __init__(
        self,
        config: CacheConfig,
        backend: BackendName | BackendFactory = "auto",
        *,
        key_means: Array | None = None,
        accumulate: Literal["float32", "float64"] = "float32",
        num_threads: int | None = None,
        sharing: SharingOptions | None = None,
        debug: bool = False,
    ) -> None:
        if not isinstance(config, CacheConfig):
            raise ArgumentTypeError(f"config must be a CacheConfig, got {type(config).__name__}")
        tables = PageTables(
            config.page_size,
            config.num_pages,
            config.window_tokens,
            config.num_sinks,
            config.num_window_slots if config.window_tokens else 0,
            sharing,
            config.num_host_pages,
        )
        chosen = select_backend(
            backend,
            config,
            key_means=key_means,
            accumulate=accumulate,
            num_threads=num_threads,
            validate=debug,
        )
        super().__init__(config, chosen, tables, debug)
        self.backend.page_owners = self.tables.pool.ref_counts
        layers = range(config.num_layers)
        self._overlay_layers = [layer for layer in layers if config.has_overlay(layer)]

    def __repr__(self) -> str:
        pool = self.tables.pool
        used = pool.num_used / max(1, pool.num_used + pool.num_free)
        config = self.config
        return (
            f"PagedKVCache({config.num_pages} pages x {config.page_size} tokens, "
            f"keys {config.keys}, values {config.values}, {used:.0%} used, "
            f"{self.backend.description})"
        )

    # -- sequences ---------------------------------------------------------------------------

    def open(
        self,
        token_ids: Sequence[int] | Array | BlockChain | None = None,
        *,
        salt: bytes = b"",
        extra_keys: Mapping[int, bytes] | None = None,
        block_keys: Sequence[bytes] | None = None,
    ) -> int:
        """Open a sequence and return its id.

        With ``sharing`` and tokens it begins with the pages that hold its first blocks already,
        sinks included: `length` tells how many of its tokens need not be computed. Without tokens
        it begins empty and is never shared.

        Parameters
        ----------
        token_ids : sequence of int or BlockChain, optional
            Its first tokens, or what ``tables.prepare`` made of them.
        salt : bytes
            Sequences with different salts never share a page.
        extra_keys : mapping of block to bytes, optional
            What else decides the keys and values of a block (an adapter, an image), opaque.
        block_keys : sequence of bytes, optional
            Instead of tokens: keys of its leading blocks, made by the caller.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            For bad tokens, salts or keys.
        """
        seq_id = self.tables.open(
            token_ids, salt=salt, extra_keys=extra_keys, block_keys=block_keys
        )
        self._after_change()
        return seq_id

    def reset_prefix_cache(self) -> bool:
        """Forget every block that can be found, if no page is held; return whether that was so."""
        self._refuse_open_step("reset_prefix_cache")
        return self.tables.reset_prefix_cache()

    def close(self, seq_ids: SeqIds) -> None:
        """Close sequences; pages that nobody else holds become free, on the host too."""
        self._freed(self.tables.close(self._ids(seq_ids)))

    def fork(self, seq_id: int) -> int:
        """Open a sequence that shares all pages of another; the first to write copies."""
        child = self.tables.fork(seq_id)
        self._after_change()
        return child

    def truncate(self, seq_id: int, length: int) -> None:
        """Cut a sequence to its first ``length`` tokens; nothing is re-encoded.

        Raises
        ------
        ArgumentError
            ``length`` is negative or beyond the sequence.
        EvictedError
            ``length`` lies inside an evicted block.
        """
        self._freed(self.tables.truncate(seq_id, length))

    def evict(self, seq_id: int, what: EvictionPolicy | Sequence[int] | Array) -> None:
        """Drop whole pages of a live sequence; the others keep their positions.

        Parameters
        ----------
        seq_id : int
            The sequence.
        what : EvictionPolicy or sequence of int
            A policy such as `KeepFirstLast` or `EvictLowest`, or the block indices themselves.
        """
        if isinstance(what, EvictionPolicy):
            self._freed(apply(self.tables, what.plan(self.tables, seq_id)))
        else:
            self._freed(self.tables.evict(seq_id, what))

    def evict_many(self, seq_ids: SeqIds, policy: EvictLowest) -> list[EvictionPlan]:
        """Bring sequences back to their budgets, all at once or not at all.

        Parameters
        ----------
        seq_ids : int or sequence of int
            The sequences; each has the whole budget.
        policy : EvictLowest
            Ranking and budget.

        Returns
        -------
        list of EvictionPlan
            What went, one per sequence that lost blocks.
        """
        self._refuse_open_step("evict_many")
        plans = policy.plan_many(self.tables, self._ids(seq_ids))
        self._freed(apply_all(self.tables, plans))
        return plans

    def free_pages(
        self,
        num_pages: int,
        ranking: PageRanking,
        seq_ids: SeqIds | None = None,
        first_tokens: int = 0,
        last_tokens: int = 0,
    ) -> list[EvictionPlan]:
        """Free pages by evicting the blocks with the lowest scores over several sequences.

        Parameters
        ----------
        num_pages : int
            Pages to free.
        ranking : PageRanking
            Says what blocks are worth.
        seq_ids : int or sequence of int, optional
            Sequences to take from, all by default.
        first_tokens, last_tokens : int
            Blocks that hold one of so many first or last tokens of a sequence stay.

        Returns
        -------
        list of EvictionPlan
            What went, one per sequence that lost blocks.

        Raises
        ------
        OutOfEvictablePages
            If fewer pages can be freed; nothing was evicted. See `plan_free` for what can.
        """
        self._refuse_open_step("free_pages")
        ids = None if seq_ids is None else self._ids(seq_ids)
        plans = plan_free(self.tables, num_pages, ranking, ids, first_tokens, last_tokens)
        self._freed(apply_all(self.tables, plans))
        return plans

    # -- writing -----------------------------------------------------------------------------

    def append(
        self,
        seq_ids: SeqIds,
        keys: Array,
        values: Array,
        num_new_tokens: int | Sequence[int] | Array | None = None,
        dtype: Dtype | None = None,
        token_ids: Sequence[int] | Array | None = None,
    ) -> None:
        """Append tokens of all layers at once: everything or nothing, to the byte.

        Parameters
        ----------
        seq_ids : int or sequence of int
            One sequence, or a batch.
        keys, values : ndarray ``[num_layers, n, num_kv_heads, head_dim]``
            float16, bfloat16 or float32; a batch's tokens one sequence after the other.
        num_new_tokens : sequence of int, optional
            Tokens of each sequence; for one sequence it is ``n``.
        dtype : {"f16", "bf16", "f32"}, optional
            Declares the type (needed for bfloat16 bits in uint16).
        token_ids : sequence of int ``[n]``, optional
            The tokens, so that their blocks can be shared; not needed for tokens that the
            sequences were opened with.

        Raises
        ------
        OutOfPages, OutOfWindowSlots
            The pool cannot hold them.
        ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError, NotUnitNormError
            Bad input; found before anything is written.
        """
        ids = self._ids(seq_ids)
        layers = self.config.num_layers
        for name, array in (("keys", keys), ("values", values)):
            shape = (layers, None, None, None)
            check_shape(array, name, shape, "layers, tokens, KV heads, head_dim")
        if num_new_tokens is None:
            if len(ids) != 1:
                raise ArgumentError("a batch needs num_new_tokens, one count per sequence")
            num_new_tokens = [keys.shape[1]]
        counts = token_counts("num_new_tokens", num_new_tokens, len(ids))
        if counts.sum() != keys.shape[1]:
            raise ArgumentError(
                f"num_new_tokens must add up to {keys.shape[1]} tokens, got {counts.sum()}"
            )
        self._refuse_open_step("append")
        for layer in range(layers):
            self.backend.check(layer, keys[layer], values[layer], dtype)
        self.begin_step(ids, counts, token_ids)
        for layer in range(layers):
            self.store(layer, keys[layer], values[layer], dtype)
        self.commit()

    def begin_step(
        self,
        seq_ids: SeqIds,
        num_new_tokens: int | Sequence[int] | Array = 1,
        token_ids: Sequence[int] | Array | None = None,
    ) -> StepPlan:
        """Reserve room for new tokens of a batch, all or nothing, and open a step.

        Parameters
        ----------
        seq_ids : int or sequence of int
            The members.
        num_new_tokens : int or sequence of int
            Tokens of each.
        token_ids : sequence of int, optional
            The tokens, members one after the other, as in `append`.

        Returns
        -------
        StepPlan
            Where every token goes.

        Raises
        ------
        OutOfPages, OutOfWindowSlots, StepError, UnknownSequence, ArgumentError
        """
        ids = self._ids(seq_ids)
        plan = self.tables.reserve(ids, num_new_tokens, token_ids)
        if self.debug:
            self.backend.fill_pages(plan.new_pages, POISON)
        self.backend.clear_norms(plan.new_pages)
        # Layers without an overlay have codes of every token: their open page always has bytes.
        if len(self._overlay_layers) == self.config.num_layers:
            self.backend.copy_pages(plan.copy_src, plan.copy_dst)
        else:
            self.backend.copy_pages(plan.cow_src, plan.cow_dst)
        for layer in self._overlay_layers:
            window = self.backend.window(layer)
            window.copy_slots(plan.window_copy_src, plan.window_copy_dst)
            window.copy_records(plan.sink_copy_src, plan.sink_copy_dst)
        self._step, self._stored = plan, set()
        return plan

    def store(self, layer: int, keys: Array, values: Array, dtype: Dtype | None = None) -> None:
        """Store one layer of the open step.

        Parameters
        ----------
        layer : int
            The layer; each is stored once.
        keys, values : ndarray ``[tokens, num_kv_heads, head_dim]``
            The step's tokens, members one after the other.
        dtype : {"f16", "bf16", "f32"}, optional
            Declares the type (needed for bfloat16 bits in uint16).

        Raises
        ------
        StepError
            No step is open, or the layer is stored already.
        ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError, NotUnitNormError
            Bad input; nothing was written and the step stays open.
        """
        plan = self._open_step("store")
        self._check_layer(layer)
        if layer in self._stored:
            raise StepError(f"layer {layer} is already stored in this step")
        batch = self.backend.check(layer, keys, values, dtype)
        if len(batch) != plan.num_tokens:
            raise ArgumentError(f"the step has {plan.num_tokens} tokens, got {len(batch)}")
        if self.config.has_overlay(layer):
            self.backend.seal(layer, plan.seal_rows, plan.seal_mapping)
            self.backend.write(layer, batch, plan.store_mapping)
            self.backend.window(layer).write(batch, plan.ring_mapping, plan.sink_mapping)
        else:
            self.backend.write(layer, batch, plan.slot_mapping)
        self.backend.write_bounds(layer, plan.filled_pages)
        self._stored.add(layer)

    def mark_stored(self, layers: Sequence[int] | None = None) -> None:
        """Say that layers of the open step were stored by other means: a captured graph.

        Whoever replays a graph has brought the step's mappings to where the graph reads them; the
        cache believes it.

        Parameters
        ----------
        layers : sequence of int, optional
            Which; all by default.

        Raises
        ------
        StepError
            No step is open, or one of the layers is stored already.
        ArgumentError
            There is no such layer.
        """
        self._open_step("mark_stored")
        chosen = range(self.config.num_layers) if layers is None else layers
        for layer in chosen:
            self._check_layer(layer)
            if layer in self._stored:
                raise StepError(f"layer {layer} is already stored in this step")
        self._stored |= set(chosen)

    def commit(self, publish_to: Sequence[int] | Array | None = None) -> None:
        """Close the open step; every layer must be stored. Complete blocks can now be found.

        Parameters
        ----------
        publish_to : sequence of int, optional
            Positions of each member from there on are drafts: their blocks are published by a
            later commit, unless they are cut away.

        Raises
        ------
        StepError
            No step is open, or layers are missing (the step stays open).
        """
        plan = self._open_step("commit")
        missing = sorted(set(range(self.config.num_layers)) - self._stored)
        if missing and plan.num_tokens:
            raise StepError(f"layers {missing} are not stored in this step")
        # Before the tables' own step ends: another thread may begin one right after that.
        self._step = None
        try:
            self.tables.commit(plan, publish_to)
        except BaseException:
            self._step = plan
            raise
        self._after_change()

    def abort_step(self) -> None:
        """Give the open step up: as if its tokens were appended and then truncated away.

        What the window covers may have shrunk; no token is lost.
        """
        plan = self._open_step("abort_step")
        # Stored layers have sealed what this step seals, and overwritten the rows it came from;
        # all layers must agree on the coded watermark afterwards.
        rows, mapping = plan.abort_seal()
        for layer in self._overlay_layers:
            if layer not in self._stored:
                self.backend.seal(layer, rows, mapping)
        self._step = None
        try:
            freed = self.tables.abort(plan)
        except BaseException:
            self._step = plan
            raise
        self._freed(freed)

    # -- parts -------------------------------------------------------------------------------

    def _open_step(self, verb: str) -> StepPlan:
        if self._step is None:
            raise StepError(f"{verb} needs an open step; call begin_step first")
        return self._step

    def _refuse_open_step(self, verb: str) -> None:
        if self._step is not None:
            raise StepError(f"{verb} cannot run inside an open step; commit or abort it first")
