"""`PagedKVCache`: the one object that joins page tables and page bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt

from ..backends import BackendFactory, BackendName, select_backend
from ..config import CacheConfig
from ..errors import ArgumentTypeError
from ..paging.block_chain import BlockChain, SharingOptions
from ..paging.evict_lowest import EvictLowest, plan_free
from ..paging.eviction import EvictionPlan, EvictionPolicy, apply, apply_all
from ..paging.page_scores import PageRanking
from ..paging.page_tables import PageTables
from .reads import SeqIds
from .writes import CacheWrites

Array = npt.NDArray[Any]


class PagedKVCache(CacheWrites):
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
        """Close sequences; pages that nobody else holds become free, on the host too.

        Parameters
        ----------
        seq_ids : int or integers
            Open sequences, each at most once, swapped out or not.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids.
        StepError
            If a step is open, or a sequence is being swapped.
        """
        self._freed(self.tables.close(self._ids(seq_ids)))

    def fork(self, seq_id: int) -> int:
        """Open a sequence that shares all pages of another; the first to write copies.

        Parameters
        ----------
        seq_id : int
            The other one.

        Returns
        -------
        int
            The new sequence's id.

        Raises
        ------
        UnknownSequence, ArgumentTypeError
            For a bad id.
        StepError
            If a step is open, or the sequence is being swapped.
        SwappedError
            If it is swapped out.
        """
        child = self.tables.fork(seq_id)
        self._after_change()
        return child

    def truncate(self, seq_id: int, length: int) -> None:
        """Cut a sequence to its first ``length`` tokens; nothing is re-encoded.

        Parameters
        ----------
        seq_id : int
            The sequence.
        length : int
            Tokens that stay, at most as many as there are.

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
