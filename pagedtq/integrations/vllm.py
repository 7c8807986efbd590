"""vLLM's own scheduler over a `BlockManager`: the signatures of vLLM 0.33's ``KVCacheManager``.

vLLM need not be installed to import this: nothing here calls it. A scheduler of vLLM keeps its
manager in one attribute, so that `attach` can take its place before the first request::

    scheduler = Scheduler(vllm_config, kv_cache_config, ...)
    manager = attach(scheduler)

Served are models with one group of full-attention layers, with chunked prefill, prefix caching,
lookahead and preemption. What needs vLLM's block objects (connectors that load or hold blocks,
several cache groups, dropping of draft blocks) is refused when the scheduler is attached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from ..errors import UnsupportedError
from ..serving import AllBlocksCleared, BlockManager, BlockRemoved, Blocks, BlockStored, Request

NO_BLOCKS = Blocks()


class LookupStats(msgspec.Struct):
    """Prefix lookups of admitted requests, with the fields of vLLM's ``PrefixCacheStats``.

    A request that was preempted before counts among the last three only.
    """

    reset: bool = False
    requests: int = 0
    queries: int = 0
    hits: int = 0
    preempted_requests: int = 0
    preempted_queries: int = 0
    preempted_hits: int = 0
    hits_by_source: dict[str, int] = {}


class SchedulerBlockManager:
    """A `BlockManager` in the place of vLLM's ``KVCacheManager``.

    Parameters
    ----------
    manager : BlockManager
        Gives the pages. Requests need what vLLM's have.
    log_stats : bool
        Count lookups for `make_prefix_cache_stats`.
    """

    empty_kv_cache_blocks = NO_BLOCKS

    def __init__(self, manager: BlockManager, log_stats: bool = False) -> None:
        self.manager = manager
        self.enable_caching = manager.enable_caching
        self._stats = LookupStats() if log_stats else None

    # -- looking -----------------------------------------------------------------------------

    @property
    def usage(self) -> float:
        """Part of the pages that have an owner, 0 to 1."""
        return self.manager.usage

    def prefix_cache_lookup_enabled(self, request: Request) -> bool:
        """Tell whether a request may begin with blocks of others."""
        skips: bool = getattr(request, "skip_reading_prefix_cache", False)
        return self.enable_caching and not skips

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[Blocks, int, int]:
        """Return the blocks of a request that are here, their tokens, and 0.

        The last is the boundary that vLLM pins for layers without full attention.
        """
        found, num_found = self.manager.get_computed_blocks(request)
        if max_cache_hit_length is not None and num_found > max_cache_hit_length:
            size = self.manager.block_size
            found = Blocks(found.page_ids[: max_cache_hit_length // size])
            num_found = len(found) * size
        return found, num_found, 0

    def get_blocks(self, request_id: str) -> Blocks:
        """Return the blocks of a request."""
        return self.manager.get_blocks(request_id)

    def get_block_ids(self, request_id: str) -> tuple[list[int]]:
        """Return the pages of a request by cache group."""
        return self.manager.get_block_ids(request_id)

    def get_block_ids_for_computed_tokens(
        self, request_id: str, num_computed_tokens: int
    ) -> tuple[list[int]]:
        """Return the pages that hold the first so many tokens of a request."""
        (pages,) = self.manager.get_block_ids(request_id)
        return (pages[: -(-num_computed_tokens // self.manager.block_size)],)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> list[int]:
        """Return how many leading pages of a request every request holds."""
        return self.manager.get_num_common_prefix_blocks(running_request_id)

    def estimate_cached_tokens(self, request: Request) -> int:
        """Return how many leading tokens of a request others can find."""
        seq_id = self.manager.sequence_of(request.request_id)
        if seq_id is None:
            return 0
        return self.manager.tables.num_published(seq_id) * self.manager.block_size

    def record_prefix_cache_stats(self, request: Any, num_hits: int) -> None:
        """Count the lookup of a request that was admitted."""
        stats = self._stats
        if stats is None or not self.prefix_cache_lookup_enabled(request):
            return
        if request.num_preemptions:
            stats.preempted_requests += 1
            stats.preempted_queries += request.num_tokens
            stats.preempted_hits += num_hits
        else:
            stats.requests += 1
            stats.queries += request.num_tokens
            stats.hits += num_hits

    def make_prefix_cache_stats(self) -> LookupStats | None:
        """Return the lookups since the last call; None if they are not counted."""
        stats = self._stats
        if stats is not None:
            self._stats = LookupStats()
        return stats

    def take_events(self) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """Return the events since the last call."""
        return self.manager.take_events()

    # -- taking and giving back --------------------------------------------------------------

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Blocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        num_encoder_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> Blocks | None:
        """Make room for a request's next tokens, as `BlockManager.allocate_slots`.

        Raises
        ------
        UnsupportedError
            For encoder tokens: there is no cross-attention cache.
        """
        if num_encoder_tokens:
            raise UnsupportedError(
                f"request {request.request_id}: no cache of encoder tokens, "
                f"got {num_encoder_tokens}; only decoder layers are served"
            )
        return self.manager.allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            num_external_computed_tokens,
            delay_cache_blocks,
            full_sequence_must_fit=full_sequence_must_fit,
            reserved_blocks=reserved_blocks,
            has_scheduled_reqs=has_scheduled_reqs,
        )

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish the whole blocks among the first so many tokens of a request."""
        self.manager.cache_blocks(request, num_computed_tokens)

    def free(self, request: Request) -> None:
        """Take all pages from a request."""
        self.manager.free(request)

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Let pages be found no longer."""
        self.manager.evict_blocks(block_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget every block unless a request holds pages; return whether it was done."""
        done = self.manager.reset_prefix_cache()
        if done and self._stats is not None:
            self._stats.reset = True
        return done

    # -- what a cache with one full-attention group has nothing of ------------------------------

    def new_step_starts(self) -> None:
        """Do nothing: no block is kept for the length of a step."""

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Do nothing: full attention reads every block."""

    def take_new_block_ids(self) -> list[int]:
        """Return no page: none must be cleared by the engine."""
        return []

    def take_kv_cache_block_copies(self) -> tuple[list[Any], list[Any]]:
        """Return no copy: vLLM's scheduler forks no request."""
        return [], []

    def take_boundary_state_offloads(self) -> dict[str, list[Any]]:
        """Return no state: there are no recurrent layers."""
        return {}


def attach(scheduler: Any, manager: BlockManager | None = None) -> SchedulerBlockManager:
    """Let a scheduler of vLLM take its pages from a `BlockManager`.

    Parameters
    ----------
    scheduler : vllm.v1.core.sched.scheduler.Scheduler
        One that has no request yet.
    manager : BlockManager, optional
        With as many pages, of as many tokens, as the scheduler was configured for; made if not
        given.

    Returns
    -------
    SchedulerBlockManager
        What the scheduler now asks.

    Raises
    ------
    UnsupportedError
        If the scheduler has requests, or is configured for what is not served; see the module.
    """
    config, size = scheduler.kv_cache_config, scheduler.block_size
    refuse = {
        "requests": len(scheduler.requests),
        "a KV connector": scheduler.connector is not None,
        "several cache groups": len(config.kv_cache_groups) != 1,
        "dropping of draft blocks": scheduler.use_eagle_block_drop,
        "context parallelism": scheduler.dcp_world_size * scheduler.pcp_world_size > 1,
        "hashes of other blocks than pages": scheduler.hash_block_size != size,
    }
    if not refuse["several cache groups"]:
        spec = config.kv_cache_groups[0].kv_cache_spec
        name = type(spec).__name__
        refuse[f"layers of {name}"] = not name.endswith("AttentionSpec") or any(
            getattr(spec, limit, None) for limit in ("sliding_window", "attention_chunk_size")
        )
    problems = [what for what, is_there in refuse.items() if is_there]
    if problems:
        raise UnsupportedError(f"a scheduler cannot be attached with {', '.join(problems)}")
    if manager is None:
        manager = BlockManager(
            config.num_blocks,
            size,
            enable_caching=scheduler.cache_config.enable_prefix_caching,
            max_model_len=scheduler.max_model_len,
            watermark=scheduler.scheduler_config.watermark,
            enable_events=scheduler.enable_kv_cache_events,
        )
    pages = manager.tables.pool.num_pages
    if (pages, manager.block_size) != (config.num_blocks, size):
        raise UnsupportedError(
            f"the scheduler counts {config.num_blocks} pages of {size} tokens, "
            f"the manager has {pages} of {manager.block_size}"
        )
    adapter = SchedulerBlockManager(manager, log_stats=scheduler.log_stats)
    scheduler.kv_cache_manager = adapter
    return adapter
