"""What holds for the CUDA backend on any device, the harness included: caches equal the host's.

Test modules import these functions, and those of `captures` and `operands`, and provide two
fixtures: ``device``, and ``case``, a point of the matrix in `cases`.
"""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import Exact, LayerOverride, PagedKVCache
from pagedtq.backends.cuda import CudaBackend
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
)
from pagedtq.paging import SharingOptions
from pagedtq.telemetry import ShadowedCache
from pagedtq.wire import load_cache, save_cache
from tests.parity.cases import HEADS, make_config
from tests.parity.twins import Twins


def test_pages_windows_and_results_equal_the_hosts(device, case):
    size = case.page_size
    backend = {"split_tokens": case.split_tokens}
    twins = Twins(case.config(), device, backend=backend, seed=case.head_dim)
    lengths = (1, size - 1, size + 1, 3 * size + 5)
    members = [twins.open() for _ in lengths]
    twins.append(members, lengths)
    twins.append(members, (4, 1, size, 2))
    twins.check_pages()
    # A fork that leaves its parent inside a page, a cut one, and one with a hole.
    members[1] = twins.fork(members[3])
    twins.append([members[1], members[3]], (3, 1))
    members[2] = twins.fork(members[1])
    twins.each("truncate", members[2], 2 * size + 3)
    twins.append([members[2]], (5,))
    if case.window_pages < 2:
        twins.each("evict", members[3], [1])
    twins.check_pages()
    q_lens = None if set(case.q_lens) == {1} else list(case.q_lens)
    for layer in range(twins.config.num_layers):
        twins.check_attend(layer, members, case.group, q_lens)
    twins.check_attend(1, members, case.group, q_lens, chunk=True)
    twins.check_scores(1, members, case.group)
    twins.check_load(0, members[3])


@pytest.mark.parametrize("window_pages", [0, 1, 2])
def test_any_history_of_operations_leaves_equal_caches(device, window_pages):
    config = make_config("k4v4", 64, 16, window=16 * window_pages, num_layers=1)
    twins = Twins(config, device, seed=10 + window_pages)
    live: list[int] = [twins.open()]
    for _ in range(40):
        what = twins.rng.choice(
            ["open", "append", "append", "append", "fork", "truncate", "evict", "close", "abort"]
        )
        index = int(twins.rng.choice(live))
        length = twins.host.length(twins.ids[index][0])
        if what == "open" and len(live) < 5:
            live.append(twins.open())
        elif what == "fork" and len(live) < 5:
            live.append(twins.fork(index))
        elif what == "truncate":
            cut = int(twins.rng.integers(length // 2, length + 1))
            if not _same_refusal(twins, "truncate", index, cut):
                continue
        elif what == "evict" and length > 48:
            _same_refusal(twins, "evict", index, [1])
        elif what == "close" and len(live) > 2:
            twins.each("close", index)
            live.remove(index)
        elif what == "abort":
            _abort(twins, index, int(twins.rng.integers(1, 20)))
        elif what == "append":
            some = [i for i in live if twins.rng.random() < 0.6] or [index]
            counts = [int(twins.rng.integers(1, 24)) for _ in some]
            total = sum(twins.host.length(twins.ids[i][0]) for i in live) + sum(counts)
            if total < 40 * 16:
                twins.append(some, counts)
    twins.check_pages()
    readable = [i for i in live if twins.host.length(twins.ids[i][0])]
    twins.check_attend(0, readable, 4)
    twins.check_scores(0, readable, 4)


def _same_refusal(twins, name, index, argument) -> bool:
    refused = []
    for cache, i in twins.both:
        try:
            getattr(cache, name)(twins.ids[index][i], argument)
        except ArgumentError as error:
            refused.append(type(error))
    assert len(refused) in (0, 2) and len(set(refused)) <= 1
    return not refused


def _abort(twins, index, count) -> None:
    keys, values = twins.draw(count)
    store = twins.rng.random() < 0.5
    for cache, i in twins.both:
        cache.begin_step(twins.ids[index][i], count)
        if store:
            cache.store(0, keys, values)
        cache.abort_step()


def test_prefix_hits_bring_pages_and_sinks(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    twins = Twins(config, device, sharing=SharingOptions())
    tokens = np.arange(50, dtype=np.int32)
    first = twins.open(tokens)
    twins.append([first], [50])
    second = twins.open(tokens)
    assert [cache.length(twins.ids[second][i]) for cache, i in twins.both] == [48, 48]
    twins.append([second], [9])
    twins.check_pages()
    twins.check_attend(0, [first, second], 4)


def test_means_of_twenty_times_the_spread_count_across_the_rings_edge(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    means = 20 * np.random.default_rng(1).standard_normal((1, HEADS, 64)).astype(np.float32)
    twins = Twins(config, device, key_means=means)
    members = [twins.open() for _ in range(3)]
    for counts in ((15, 16, 17), (1, 1, 30)):
        twins.append(members, counts, offset=means[:, None])
    twins.check_pages()
    twins.check_attend(0, members, 4)
    twins.check_attend(0, members, 4, chunk=True)


def test_caps_sinks_and_sliding_windows_mean_what_they_mean_on_the_host(device):
    twins = Twins(make_config("k4v4", 64, 16, window=16, num_layers=1), device)
    members = [twins.open(), twins.open()]
    twins.append(members, (70, 33))
    logits = np.array([0.5, -np.inf, 2, -1, 0, 1, 3, -2], np.float32)
    for options in (
        {"soft_cap": 2.0},
        {"soft_cap": 1000.0},
        {"window_left": 20},
        {"sink_logits": logits},
    ):
        twins.check_attend(0, members, 4, [2, 3], **options)
    twins.check_attend(0, members, 4, [2, 3], chunk=True, sink_logits=logits, window_left=9)
    # Of a chunk this long, caps and windows bend and narrow what it reads of itself.
    for options in ({"soft_cap": 2.0}, {"window_left": 4}):
        twins.check_attend(0, members, 4, [20, 30], chunk=True, **options)


def test_a_prompt_longer_than_the_ring_sees_its_sinks_no_sooner_than_they_come(device):
    config = make_config("k4v4", 64, 16, window=16, sinks=8, num_layers=1)
    twins = Twins(config, device)
    members = [twins.open(), twins.open()]
    lengths = [3, 40]
    twins.append(members, lengths)
    twins.check_attend(0, members, 4, lengths)


def test_one_plan_serves_calls_of_any_group_size(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    members = [twins.open(), twins.open()]
    twins.append(members, (70, 33))
    # Of 16 query rows a unit takes, groups of 4 and 16 have one and three units a sequence.
    for group in (4, 16, 4):
        twins.check_attend(0, members, group, [3, 3])
    assert len(twins.cuda.backend._plans) == 1


def test_a_plan_follows_query_tokens_that_come_to_other_sequences(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    members = [twins.open(), twins.open()]
    twins.append(members, (70, 33))
    # One shape, so one plan: what was shared out for the first call is stale in the second.
    for q_lens in ([1, 5], [5, 1]):
        twins.check_attend(0, members, 4, q_lens)
    assert len(twins.cuda.backend._plans) == 1


def test_layers_of_other_codecs_and_key_bounds_are_written_in_place(device):
    override = LayerOverride(layers=(0,), keys=Exact(), values=Exact())
    for order in ("layer_major", "page_major"):
        config = make_config(
            "k4v4", 64, 16, window=16, overrides=(override,), key_bounds=True, pool_order=order
        )
        twins = Twins(config, device)
        members = [twins.open(), twins.open()]
        twins.append(members, (40, 7))
        twins.check_pages()
        for layer in (0, 1):
            twins.check_attend(layer, members, 4)


def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    twins = Twins(config, device, backend={"split_tokens": 128})
    members = [twins.open() for _ in range(3)]
    twins.append(members, (300, 40, 150))
    queries, cache = twins.queries(3, 4), twins.cuda
    together = [twins.fetch(a) for a in cache.attend(0, queries, twins.members(members, 1))]
    for i in range(3):
        one = cache.attend(0, queries[i : i + 1], twins.members(members[i : i + 1], 1))
        for whole, alone in zip(together, one):
            assert np.array_equal(whole[i], twins.fetch(alone)[0])


def test_two_caches_of_one_device_do_not_meet(device):
    """On streams of their own, too: `tests/gpu/test_device_streams.py`."""
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    pairs = [Twins(config, device, seed=seed) for seed in (1, 2)]
    for step in range(3):
        for twins in pairs:
            if not step:
                twins.open(), twins.open()
            twins.append([0, 1], (37, 20))
        for twins in pairs:
            twins.check_attend(0, [0, 1], 4)
    for twins in pairs:
        twins.check_pages()


def test_by_default_a_sequence_gets_the_same_within_the_bound_alone_and_in_a_batch(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1, num_pages=100)
    twins = Twins(config, device)
    members = [twins.open() for _ in range(3)]
    # Where few blocks run side by side, the first has six parts alone, and four in the batch.
    twins.append(members, (1300, 40, 150))
    queries, cache = twins.queries(3, 4), twins.cuda
    out, lse = map(twins.fetch, cache.attend(0, queries, twins.members(members, 1)))
    for i in range(3):
        alone = cache.attend(0, queries[i : i + 1], twins.members(members[i : i + 1], 1))
        twins.check_state(*map(twins.fetch, alone), out[i : i + 1], lse[i : i + 1])


def test_snapshots_saved_on_one_backend_open_on_the_other(device, tmp_path):
    config = make_config("k4v4", 64, 16, window=32)
    twins = Twins(config, device)
    members = [twins.open(), twins.open()]
    twins.append(members, (75, 9))
    fork = twins.fork(members[0])
    twins.append([fork], [3])
    for cache, i in twins.both:
        save_cache(cache, tmp_path / str(i))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()

    def on_device(config, means):
        return CudaBackend(config, means, device=device)

    opened = load_cache(tmp_path / "0", on_device), load_cache(tmp_path / "1", "host")
    queries = twins.queries(3, 4)
    want = twins.host.attend(1, queries, twins.members([*members, fork], 0))
    for cache in opened:
        state = cache.attend(1, queries, cache.tables.sequence_ids())
        twins.check_state(*map(cache.backend.to_host, state), *want)


def test_pages_swapped_out_come_back_anywhere(device):
    twins = Twins(make_config("k3v4", 64, 16, window=0), device)
    twins.append([twins.open()], [60])
    backend, tables = twins.cuda.backend, twins.cuda.tables
    pages = tables.block_table(twins.members([0], 1))[0].astype(np.int64)
    swapped = backend.swap_out(pages)
    slabs = swapped.wait()
    assert np.array_equal(slabs, twins.host.backend.gather(pages))
    backend.fill_pages(pages, 0xFF)
    elsewhere = pages[::-1] + 20
    for wrong, error in ((slabs[::-1], ArgumentError), (slabs.view(np.int8), ArgumentTypeError)):
        with pytest.raises(error, match="slabs must be"):
            backend.swap_in(swapped._replace(slabs=wrong), elsewhere)
    backend.swap_in(swapped, elsewhere).synchronize()
    assert np.array_equal(twins.fetch(backend.gather(elsewhere)), slabs)
    backend.scatter(backend.gather(elsewhere), pages)
    backend.scatter(slabs, elsewhere)
    assert np.array_equal(backend.pages.gather(pages, np.empty_like(slabs)), slabs)


def test_a_cache_says_what_computes(device):
    twins = Twins(make_config("k4v4", 64, 16, num_layers=1), device)
    assert f"cuda on {device.name}" in repr(twins.cuda)
    assert repr(twins.host).endswith("host)")
    with pytest.raises(ArgumentError, match="another configuration"):
        PagedKVCache(twins.config.replace(seed=9), lambda config, means: twins.cuda.backend)


def test_a_shadowed_cache_compares_on_the_host(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)

    def on_device(config, means):
        return CudaBackend(config, means, device=device)

    reports = []
    for backend in (on_device, "host"):
        rng = np.random.default_rng(3)
        cache = ShadowedCache(config, backend, fraction=1.0)
        seq = cache.open()
        cache.append(seq, *rng.standard_normal((2, 1, 70, HEADS, 64)).astype(np.float32))
        queries = rng.standard_normal((1, 8, 64)).astype(np.float32)
        cache.attend(0, queries, seq)
        cache.score(0, queries, seq)
        reports.append(cache.shadow_report().total)
    for metric in ("output", "lse", "logit"):
        ours, theirs = (getattr(report, metric) for report in reports)
        assert ours.count == theirs.count > 0
        assert abs(ours.mean - theirs.mean) <= 0.05 * theirs.mean + 1e-4


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_numbers_too_small_to_be_normal_decide_codes_as_on_the_host(device, kind):
    """Half of the rotated elements are sums of subnormals alone: their signs are codes."""
    config = make_config("k3v4", 64, 16, window=0, num_layers=1, kv_dtype=kind)
    twins = Twins(config, device)
    count = 40
    drawn = 1e-40 * twins.rng.standard_normal((2, 1, count, HEADS, 64))
    for vector in drawn.reshape(-1, 64):
        # Equal magnitudes cancel in every second row of a transform.
        vector[twins.rng.choice(64, 2, replace=False)] = twins.rng.choice([-1.0, 1.0], 2)
    keys, values = drawn.astype(np.float32)
    if kind == "bf16":
        keys, values = ((part.view(np.uint32) >> 16).astype(np.uint16) for part in (keys, values))
    index = twins.open()
    for cache, i in twins.both:
        cache.append(twins.ids[index][i], keys, values, dtype=kind)
    twins.check_pages(exact=True)
    if not twins.runs:
        return
    # Flushed to zero, they would give other codes in the same pages.
    flushed = [np.where(_magnitude(part) < 1e-30, 0, part).astype(part.dtype)
               for part in (keys, values)]  # fmt: skip
    for tokens, changed in (((keys, values), 0.0), (flushed, 0.001)):
        other = PagedKVCache(config, "host", debug=True)
        other.append(other.open(), *tokens, dtype=kind)
        share = float((other.backend.pool != twins.host.backend.pool).mean())
        assert share >= changed and (share > 0) is (changed > 0)


def _magnitude(part):
    wide = part.astype(np.uint32) << 16 if part.dtype == np.uint16 else part.view(np.uint32)
    return np.abs(wide.view(np.float32))
