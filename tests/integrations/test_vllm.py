"""The adapter for vLLM's scheduler, without vLLM; tests/peers runs the real one."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pagedtq.errors import UnsupportedError
from pagedtq.integrations.vllm import SchedulerBlockManager, attach
from pagedtq.paging import BlockHasher
from pagedtq.serving import BlockManager, Blocks, ServedRequest

SIZE = 16


class FullAttentionSpec(SimpleNamespace):
    """Named as vLLM's."""


class MambaSpec(SimpleNamespace):
    """Named as vLLM's."""


def scheduler_of(spec=None, **changes):
    group = SimpleNamespace(kv_cache_spec=spec or FullAttentionSpec(sliding_window=None))
    fields = {
        "kv_cache_config": SimpleNamespace(num_blocks=11, kv_cache_groups=[group]),
        "block_size": SIZE,
        "hash_block_size": SIZE,
        "requests": {},
        "connector": None,
        "use_eagle_block_drop": False,
        "dcp_world_size": 1,
        "pcp_world_size": 1,
        "cache_config": SimpleNamespace(enable_prefix_caching=True),
        "scheduler_config": SimpleNamespace(watermark=0.0),
        "max_model_len": 100,
        "enable_kv_cache_events": True,
        "log_stats": True,
        "kv_cache_manager": None,
    }
    return SimpleNamespace(**fields | changes)


def request_of(name, tokens, **fields):
    request = ServedRequest(name, tokens, BlockHasher(SIZE))
    request.num_preemptions = 0
    for field, value in fields.items():
        setattr(request, field, value)
    return request


def admit(adapter, request):
    found, num_found, boundary = adapter.get_computed_blocks(request)
    assert boundary == 0
    new = adapter.allocate_slots(request, request.num_tokens - num_found, num_found, found)
    adapter.record_prefix_cache_stats(request, num_found)
    request.num_computed_tokens = request.num_tokens
    return found.page_ids, new.page_ids


def test_an_attached_scheduler_asks_a_manager_of_its_size():
    scheduler = scheduler_of()
    adapter = attach(scheduler)
    assert scheduler.kv_cache_manager is adapter
    manager = adapter.manager
    assert (manager.tables.pool.num_pages, manager.block_size, manager.max_model_len) == (
        11,
        SIZE,
        100,
    )
    assert manager.enable_caching
    given = BlockManager(11, SIZE)
    assert attach(scheduler, given).manager is given


def test_requests_share_lookups_are_counted_and_nothing_is_left():
    adapter = attach(scheduler_of())
    first, second = request_of("0", [1] * 40), request_of("1", [1] * 40, num_preemptions=1)
    assert admit(adapter, first) == ([], [1, 2, 3])
    assert admit(adapter, second) == ([1, 2], [4])
    assert adapter.get_block_ids("1") == ([1, 2, 4],)
    assert adapter.get_blocks("1") == Blocks([1, 2, 4])
    assert adapter.get_block_ids_for_computed_tokens("1", 17) == ([1, 2],)
    assert adapter.get_num_common_prefix_blocks("0") == [2]
    assert adapter.estimate_cached_tokens(second) == 32
    assert adapter.estimate_cached_tokens(request_of("2", [1])) == 0
    assert adapter.usage == 0.4
    stats = adapter.make_prefix_cache_stats()
    assert (stats.requests, stats.queries, stats.hits) == (1, 40, 0)
    assert (stats.preempted_requests, stats.preempted_queries, stats.preempted_hits) == (1, 40, 32)
    assert not adapter.reset_prefix_cache()
    adapter.free(first)
    adapter.free(second)
    assert adapter.reset_prefix_cache()
    assert adapter.make_prefix_cache_stats().reset
    assert len(adapter.take_events()) == 2
    assert adapter.usage == 0.0


def test_a_hit_can_be_capped():
    adapter = attach(scheduler_of())
    admit(adapter, request_of("0", [1] * 48))
    other = request_of("1", [1] * 48)
    assert adapter.get_computed_blocks(other, 31) == (Blocks([1]), 16, 0)
    assert adapter.get_computed_blocks(other, 32) == (Blocks([1, 2]), 32, 0)


def test_a_lookup_that_was_skipped_is_not_counted():
    adapter = attach(scheduler_of())
    request = request_of("0", [1] * 40, skip_reading_prefix_cache=True)
    adapter.record_prefix_cache_stats(request, 0)
    assert adapter.make_prefix_cache_stats().requests == 0
    assert SchedulerBlockManager(adapter.manager).make_prefix_cache_stats() is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"requests": {"0": 1}}, "requests"),
        ({"connector": object()}, "connector"),
        ({"use_eagle_block_drop": True}, "draft"),
        ({"dcp_world_size": 2}, "context parallelism"),
        ({"hash_block_size": 8}, "hashes of other blocks"),
        ({"spec": FullAttentionSpec(sliding_window=64)}, "FullAttentionSpec"),
        ({"spec": MambaSpec()}, "MambaSpec"),
        (
            {"kv_cache_config": SimpleNamespace(num_blocks=11, kv_cache_groups=[1, 2])},
            "several cache groups",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes, problem):
    scheduler = scheduler_of(**changes)
    with pytest.raises(UnsupportedError, match=problem):
        attach(scheduler)
    assert scheduler.kv_cache_manager is None


def test_a_manager_of_another_size_is_refused():
    with pytest.raises(UnsupportedError, match="counts 11 pages of 16 tokens"):
        attach(scheduler_of(), BlockManager(12, SIZE))


def test_encoder_tokens_are_refused():
    adapter = attach(scheduler_of())
    with pytest.raises(UnsupportedError, match="request 0: no cache of encoder tokens"):
        adapter.allocate_slots(request_of("0", [1]), 1, num_encoder_tokens=3)


def test_the_module_imports_without_vllm(root):
    code = "import sys, pagedtq.integrations.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
