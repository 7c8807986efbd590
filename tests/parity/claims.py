"""What holds for the CUDA backend on any device, the harness included.

Test modules import these functions and provide two fixtures: ``device``, and ``case``, a point of
the matrix in `cases`.
"""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import Exact, LayerOverride, PagedKVCache, Polar, TurboQuant
from pagedtq.backends.cuda import CudaBackend
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    PagedTQError,
    SlotError,
    StepError,
    UnsupportedError,
)
from pagedtq.paging import SharingOptions
from pagedtq.paging.table_views import Reads
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


def test_a_captured_graph_replays_after_lengths_grew(device):
    config = make_config("k4v4", 64, 16, window=16)
    twins = Twins(config, device)
    members = [twins.open(), twins.open()]
    twins.append(members, (30, 9))
    cache, backend = twins.cuda, twins.cuda.backend
    ids = twins.members(members, 1)
    plan = backend.plan(2, max_blocks=16)
    queries = device.upload(twins.queries(2, 4))
    out = device.zeros((2, 2, 8, 64), np.float32)
    lse = device.zeros((2, 2, 8), np.float32)

    def bring(new_queries) -> None:
        tables = cache.tables
        window = tables.window_slots(ids), tables.sink_records(ids)
        plan.update(tables.block_table(ids), tables.reads(ids, True), window=window)
        device.copy_in(queries, new_queries)

    def model() -> None:
        for layer in (0, 1):
            plan.attend(layer, queries, 0.125, out=out[layer], lse=lse[layer])

    bring(twins.queries(2, 4))
    model()
    with device.capture() as graph:
        model()
    for counts in ((0, 0), (1, 1), (90, 1), (3, 140)):
        if sum(counts):
            twins.append(members, counts)
        fresh = twins.queries(2, 4)
        bring(fresh)
        graph.launch()
        for layer in (0, 1):
            want = twins.host.attend(layer, fresh, twins.members(members, 0), sm_scale=0.125)
            twins.check_state(twins.fetch(out)[layer], twins.fetch(lse)[layer], *want)


def test_storing_is_captured_with_mappings_on_the_device(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    twins = Twins(config, device)
    host, backend = twins.host.backend, twins.cuda.backend
    host.page_owners = backend.page_owners = None
    keys, values = (device.zeros((3, HEADS, 64), np.float16) for _ in range(2))
    slots, rows, records = (device.upload(np.full(3, -1)) for _ in range(3))

    def model() -> None:
        backend.store(0, keys, values, slots)
        backend.window(0).write(backend.check(0, keys, values), rows, records)

    model()
    with device.capture() as graph:
        model()
    for step in range(3):
        fresh = [part.astype(np.float16) for part in twins.draw(3)]
        mappings = np.array([[16, 37, -1], [5, 16 + 9, 40], [-1, 4, 0]]) + step
        mappings[[0, 2], [2, 0]] = -1
        for target, source in zip((keys, values, slots, rows, records), (*fresh, *mappings)):
            device.copy_in(target, source)
        graph.launch()
        host.store(0, *fresh, mappings[0])
        host.window(0).write(host.check(0, *fresh), mappings[1], mappings[2])
        twins.check_pages()


def test_a_whole_decode_step_is_one_graph(device):
    config = make_config("k4v4", 64, 16, window=16)
    twins = Twins(config, device)
    members = [twins.open(), twins.open()]
    twins.append(members, (13, 30))
    cache, backend = twins.cuda, twins.cuda.backend
    ids, layers = twins.members(members, 1), range(config.num_layers)
    plan = backend.plan(2, max_blocks=8)
    kv = [device.zeros((2, 2, HEADS, 64), np.float16) for _ in range(2)]
    queries = device.zeros((2, 8, 64), np.float16)
    out, lse = device.zeros((2, 2, 8, 64), np.float32), device.zeros((2, 2, 8), np.float32)
    # A step seals at most a block per sequence; what is left over is skipped.
    sealed = {name: device.upload(np.full(2 * 16, -1)) for name in ("rows", "slots")}
    mappings = {name: device.upload(np.full(2, -1)) for name in ("store", "ring", "sink")}

    def model() -> None:
        for layer in layers:
            batch = backend.check(layer, kv[0][layer], kv[1][layer])
            backend.seal(layer, sealed["rows"], sealed["slots"])
            backend.write(layer, batch, mappings["store"])
            backend.window(layer).write(batch, mappings["ring"], mappings["sink"])
            plan.attend(layer, queries, 0.125, out=out[layer], lse=lse[layer])

    def bring(step) -> None:
        for name, values in (("rows", step.seal_rows), ("slots", step.seal_mapping)):
            padded = np.full(2 * 16, -1)
            padded[: values.size] = values
            device.copy_in(sealed[name], padded)
        for name, values in (
            ("store", step.store_mapping),
            ("ring", step.ring_mapping),
            ("sink", step.sink_mapping),
        ):
            device.copy_in(mappings[name], values)
        tables = cache.tables
        window = tables.window_slots(ids), tables.sink_records(ids)
        plan.update(tables.block_table(ids), tables.reads(ids, True), window=window)

    graph = None
    for _ in range(22):
        fresh = [part.astype(np.float16).reshape(2, 2, HEADS, 64) for part in twins.draw(4)]
        asked = twins.queries(2, 4).astype(np.float16)
        for target, source in zip((*kv, queries), (*fresh, asked)):
            device.copy_in(target, source)
        bring(cache.begin_step(ids, 1))
        if graph is None:
            model()
            with device.capture() as graph:
                model()
        else:
            graph.launch()
        cache.mark_stored()
        cache.commit()
        twins.host.append(twins.members(members, 0), *fresh, [1, 1])
        for layer in layers:
            want = twins.host.attend(layer, asked, twins.members(members, 0), sm_scale=0.125)
            twins.check_state(twins.fetch(out)[layer], twins.fetch(lse)[layer], *want)
    twins.check_pages()
    with pytest.raises(StepError, match="mark_stored needs an open step"):
        cache.mark_stored()


def test_nothing_is_allocated_or_copied_inside_a_capture(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    twins.append([twins.open()], [20])
    backend, ids = twins.cuda.backend, twins.members([0], 1)
    tables = twins.cuda.tables
    reads, table = tables.reads(ids, False), tables.block_table(ids)
    plan, queries = backend.plan(1, 8), device.upload(twins.queries(1, 4))
    out, lse = device.zeros((1, 8, 64), np.float32), device.zeros((1, 8), np.float32)
    plan.update(table, reads)
    with device.capture(), pytest.raises(StepError, match="captured"):
        plan.attend(0, queries, 0.1, out=out, lse=lse)
    plan.attend(0, queries, 0.1)
    with device.capture():
        with pytest.raises(ArgumentError, match="pass out and lse"):
            plan.attend(0, queries, 0.1)
        with pytest.raises(StepError, match="captured"):
            plan.update(table, reads._replace(stop=reads.stop - 1))
        plan.update(table, reads)
        plan.attend(0, queries, 0.1, out=out, lse=lse)


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


def test_arrays_on_the_device_are_taken_as_they_are_and_validated_on_request(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    twins = Twins(config, device, backend={"validate": True})
    seq = twins.open()
    keys, values = (part.astype(np.float16)[None] for part in twins.draw(20))
    twins.host.append(twins.ids[seq][0], keys, values)
    twins.cuda.append(twins.ids[seq][1], device.upload(keys), device.upload(values))
    twins.check_pages()
    queries = twins.queries(1, 4)
    want = twins.host.attend(0, queries, twins.ids[seq][0])
    state = twins.cuda.attend(0, device.upload(queries), twins.ids[seq][1])
    twins.check_state(*map(twins.fetch, state), *want)
    broken = keys.copy()
    broken[0, 3, 1, 7] = np.nan
    before = twins.fetch(twins.cuda.backend.pool)
    with pytest.raises(NonFiniteError):
        twins.cuda.append(twins.ids[seq][1], device.upload(broken), device.upload(values))
    with pytest.raises(NonFiniteError, match="sink_logits must be finite or -inf"):
        twins.cuda.attend(
            0, queries, twins.ids[seq][1], sink_logits=device.upload(np.full(8, np.nan, "f4"))
        )
    queries[0, 0, 0] = np.inf
    with pytest.raises(NonFiniteError):
        twins.cuda.attend(0, device.upload(queries), twins.ids[seq][1])
    assert np.array_equal(twins.fetch(twins.cuda.backend.pool), before)


def test_rows_to_seal_may_lie_anywhere_and_are_looked_at_on_the_host_or_on_request(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    twins = Twins(config, device)
    twins.append([twins.open()], [30])
    backend = twins.cuda.backend
    for cache, _ in twins.both:
        cache.backend.page_owners = None
    rows, slots = np.array([7, -1, 3, 9]), np.array([33, -1, 700, 40])
    upload = device.upload
    places = ((np.array, list), (upload, upload), (np.array, upload), (upload, list))
    for step, (bring_rows, bring_slots) in enumerate(places):
        moved = np.where(slots < 0, -1, slots + step)
        twins.host.backend.seal(0, rows, moved)
        backend.seal(0, bring_rows(rows), bring_slots(moved))
        twins.check_pages()
    before = twins.fetch(backend.pool)
    checked = CudaBackend(config, device=device, validate=True)
    for call, error in (
        (lambda: backend.seal(0, upload(rows), upload(slots[1:])), ArgumentError),
        (lambda: backend.seal(0, rows, upload(slots[1:])), ArgumentError),
        (lambda: backend.seal(0, upload(rows), slots[1:]), ArgumentError),
        (lambda: backend.seal(0, upload(rows.astype(np.int32)), slots), ArgumentTypeError),
        (lambda: backend.seal(0, upload(rows), slots + 16 * 48), SlotError),
        (lambda: backend.seal(0, rows + 16 * 8, upload(slots)), ArgumentError),
        (lambda: checked.seal(0, upload(rows), upload(slots + 16 * 48)), SlotError),
        (lambda: checked.seal(0, upload(rows + 16 * 8), upload(slots)), ArgumentError),
    ):
        with pytest.raises(error):
            call()
    assert np.array_equal(twins.fetch(backend.pool), before)


def test_heads_that_do_not_lie_side_by_side_are_put_together(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    keys, values = twins.draw(9)
    slots = np.arange(16, 25)
    strided = (device.upload(np.ascontiguousarray(a.transpose(1, 0, 2))) for a in (keys, values))
    for cache, _ in twins.both:
        cache.backend.page_owners = None
    twins.cuda.backend.store(0, *(a.transpose(1, 0, 2) for a in strided), slots)
    twins.host.backend.store(0, keys, values, slots)
    twins.check_pages()


def test_strided_arrays_on_the_device_mean_what_contiguous_ones_do(device):
    twins = Twins(make_config("k4v4", 64, 16, window=16, num_layers=1), device)
    members = [twins.open(), twins.open()]
    twins.append(members, (40, 21))
    backend, tables, ids = twins.cuda.backend, twins.cuda.tables, twins.members(members, 1)
    table, reads = tables.block_table(ids), tables.reads(ids, False)
    queries, logits = twins.queries(2, 4), np.linspace(-2, 5, 8).astype(np.float32)
    pages = table[0, :2].astype(np.int64)
    slabs = twins.fetch(backend.gather(pages))

    def strided(array):
        """Return an array between whose elements others lie."""
        wide = np.full((*array.shape, 2), 77, array.dtype)
        wide[..., 0] = array
        return device.upload(wide)[..., 0]

    def results(bring):
        brought = bring(queries)
        attended = backend.attend(0, brought, table, reads, 0.1, sink_logits=bring(logits))
        loaded = backend.load(0, bring(pages * 16))
        scores = backend.score(0, brought, table, reads)
        values = bring(twins.fetch(scores.values))
        stats = backend.page_stats(scores._replace(values=values))
        backend.scatter(bring(slabs), pages)
        return [*map(twins.fetch, (*attended, *loaded, backend.gather(pages))), *stats]

    for want, got in zip(results(device.upload), results(strided)):
        assert np.array_equal(want, got)


def test_the_window_alone_is_attended_as_on_the_host(device):
    twins = Twins(make_config("k4v4", 64, 16, window=16, num_layers=1), device)
    members = [twins.open() for _ in range(3)]
    twins.append(members, (70, 2, 33))
    twins.each("evict", members[2], [0])
    q_lens = np.array([2, 1, 3])
    for options in (
        {},
        {"q_lens": q_lens},
        {"q_lens": q_lens, "chunk_apart": True, "window_left": 9},
        {"q_lens": q_lens, "soft_cap": 2.0},
    ):
        queries = twins.queries(int(options.get("q_lens", np.ones(3)).sum()), 4)
        states = []
        for cache, i in twins.both:
            ids, tables = twins.members(members, i), cache.tables
            owners = tables.window_slots(ids), tables.sink_records(ids)
            reads = tables.reads(ids, True)
            if i:
                queries = device.upload(queries)
            state = cache.backend.attend_window(0, queries, *owners, reads, 0.3, **options)
            states += map(cache.backend.to_host, state)
        twins.check_state(*states[2:], *states[:2])


def test_a_plan_says_what_it_does_not_serve(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    twins.append([twins.open()], [40])
    tables, ids = twins.cuda.tables, twins.members([0], 1)
    table, reads = tables.block_table(ids), tables.reads(ids, False)
    backend, queries, own = twins.cuda.backend, twins.queries(2, 4), twins.draw(2)
    plan = backend.plan(1, 4, tokens=2)
    chunked = backend.plan(1, 4, tokens=2, chunk_tokens=1)
    out, lse = device.zeros((2, 8, 64), np.float32), device.zeros((2, 8), np.float32)
    wide = device.zeros((2, 8, 128), np.float32)[..., ::2]

    def attend(**options):
        return plan.attend(0, queries, 0.1, **options)

    refusals = (
        (attend, "this plan has nothing to read yet; call update first"),
        (lambda: plan.update(table, reads),
         "this plan is for 1 sequences, 2 query tokens and at most 4 blocks, got 1, 1 and 3"),
        (lambda: chunked.update(table, reads, np.array([2])),
         "this plan is for chunks of at most 1 tokens, got 2"),
        (lambda: plan.update(table, reads, np.array([2])), None),
        (lambda: attend(keys=own[0]), "keys and values of the chunk come together, got only one"),
        (lambda: attend(keys=own[0], values=own[1]),
         "this plan was made for steps without keys and values of the chunk"),
        (lambda: attend(out=out[:1]), r"out must have shape \[2, 8, 64\] .*got \[1, 8, 64\]"),
        (lambda: attend(out=wide), "out must be contiguous"),
        (lambda: attend(lse=np.zeros((2, 8), np.float32)), "lse must be float32 on the device"),
        (lambda: attend(soft_cap=2000), "supports soft caps of 1e-06 to 1000, got 2000"),
        (lambda: attend(out=out, lse=lse), None),
    )  # fmt: skip
    for call, message in refusals:
        if message is None:
            call()
            continue
        with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
            call()


def test_what_no_kernel_reads_is_refused_with_what_is_supported(device):
    for changes in (
        {"keys": Polar(), "values": TurboQuant()},
        {"keys": TurboQuant(), "values": TurboQuant(), "head_dim": 1024},
    ):
        config = make_config("k4v4", 64, 16).replace(**changes)
        with pytest.raises(UnsupportedError, match=r"stores TurboQuant .* use backend='host'"):
            CudaBackend(config, device=device)


def test_rankings_that_no_kernel_computes_are_refused_with_those_that_are_supported(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    twins.append([twins.open()], [40])
    backend, tables, ids = twins.cuda.backend, twins.cuda.tables, twins.members([0], 1)
    table, reads = tables.block_table(ids), tables.reads(ids, False)
    with pytest.raises(UnsupportedError, match=r"bounds .* supports score, .*backend='host'"):
        backend.score_bounds(0, twins.queries(1, 4), table, reads)
    with pytest.raises(UnsupportedError, match=r"norms .* supports score, .*backend='host'"):
        backend.norm_ratios(0, table[0])


def test_bad_arguments_are_refused_as_on_the_host(device):
    twins = Twins(make_config("k4v4", 64, 16, window=16, num_layers=1), device)
    twins.append([twins.open()], [40])
    table = twins.host.tables.block_table(twins.members([0], 0))
    reads = twins.host.tables.reads(twins.members([0], 0), True)
    queries, (keys, values) = twins.queries(1, 4), twins.draw(3)
    owned = table[0, 0] * 16
    slots, records = (
        getattr(twins.host.tables, name)(twins.members([0], 0))
        for name in ("window_slots", "sink_records")
    )
    wild = table.copy()
    wild[0, 1] = 4096
    two = Reads(*(np.repeat(field, 2) for field in reads))

    def attend(b, table=table, reads=reads, window=None):
        return b.attend(0, queries, table, reads, 0.1, window=window)

    def attend_window(b, slots=slots, records=records, reads=reads):
        return b.attend_window(0, queries, slots, records, reads, 0.1)

    before = twins.fetch(twins.cuda.backend.pool)
    bad_calls = [
        lambda b: b.store(1, keys, values, np.arange(3)),
        lambda b: b.store(0, keys[:2], values, np.arange(3)),
        lambda b: b.store(0, keys.astype(np.float64), values, np.arange(3)),
        lambda b: b.store(0, keys, values[..., :32], np.arange(3)),
        lambda b: b.store(0, keys, values, np.array([owned, owned, owned + 1])),
        lambda b: b.store(0, keys, values, np.array([owned, owned + 1])),
        lambda b: b.store(0, keys, values, np.array([3, owned, owned + 1])),
        lambda b: b.store(0, keys * np.float32(1e9), values, owned + np.arange(3)),
        lambda b: b.store(0, keys * np.float32(np.nan), values, owned + np.arange(3)),
        lambda b: b.load(0, np.array([16 * 47 + 15])),
        lambda b: b.attend(0, queries[:, :3], table, reads, 0.1),
        lambda b: b.attend(0, queries[..., :32], table, reads, 0.1),
        lambda b: b.attend(0, queries, table, reads, np.nan),
        lambda b: b.attend(0, queries, table, reads, 0.1, soft_cap=-1.0),
        lambda b: b.attend(0, queries, table, reads, 0.1, keys=keys[:1]),
        lambda b: b.attend(0, queries, table, reads, 0.1, alibi_slopes=1),
        lambda b: b.attend(0, queries, table, reads, 0.1, np.array([41])),
        lambda b: b.attend(0, queries * np.float32(np.inf), table, reads, 0.1),
        lambda b: b.attend(0, queries, table, reads, 0.1, sink_logits=np.zeros(3, np.float32)),
        lambda b: b.attend(0, np.repeat(queries, 17, 1), table, reads, 0.1),
        lambda b: b.seal(0, np.array([0]), np.array([16 * 4800])),
        lambda b: b.seal(0, np.array([10**7]), np.array([owned])),
        lambda b: b.seal(0, np.array([-1]), np.array([owned])),
        lambda b: b.seal(0, [0, 1], [16]),
        lambda b: b.seal(0, np.array([0, 1]), np.array([owned, owned])),
        lambda b: b.seal(0, np.array([0.5]), np.array([owned])),
        lambda b: b.seal(1, np.array([0]), np.array([owned])),
        lambda b: b.write_bounds(0, np.array([4800])),
        lambda b: attend(b, window=(slots * 0 + 100000, records)),
        lambda b: attend(b, window=(slots * 0 - 1, records)),
        lambda b: attend(b, window=(slots, records * 0 - 1)),
        lambda b: attend(b, window=(slots, records + 100000)),
        lambda b: attend(b, window=(slots, records[:0])),
        lambda b: attend(b, window=(slots.astype(np.float32), records)),
        lambda b: attend(b, window=slots),
        lambda b: attend(b, window=(slots, records), reads=reads._replace(first=reads.first + 9)),
        lambda b: attend_window(b, slots=slots * 0 - 1),
        lambda b: attend_window(b, slots=slots + 8),
        lambda b: attend_window(b, records=np.array([-2])),
        lambda b: attend_window(b, reads=reads._replace(keep=reads.keep.tolist())),
        lambda b: attend(b, table.tolist()),
        lambda b: attend(b, table[0]),
        lambda b: attend(b, np.repeat(table, 2, 0)),
        lambda b: attend(b, table.astype(np.float64)),
        lambda b: attend(b, table[:, :1]),
        lambda b: attend(b, wild),
        lambda b: attend(b, -table),
        lambda b: attend(b, reads=reads._replace(stop=reads.stop + 0.5)),
        lambda b: attend(b, reads=reads._replace(stop=two.stop)),
        lambda b: b.attend(0, np.repeat(queries, 2, 0), table, two, 0.1),
        lambda b: b.attend(0, queries, table, reads, 0.1, np.array([-1])),
        lambda b: b.attend(0, queries, table, reads, 0.1, np.array([1.0])),
        lambda b: b.score(0, queries, wild, reads),
        lambda b: b.score(0, queries, table, reads, window=(slots - 9, records)),
        lambda b: b.copy_pages(np.array([0]), np.array([1])),
        lambda b: b.clear_norms(np.array([48])),
        lambda b: b.scatter(np.zeros((1, 7), np.uint8), np.array([1])),
    ]
    for number, call in enumerate(bad_calls):
        raised = []
        for cache, _ in twins.both:
            with pytest.raises(Exception, match=r"\w") as caught:
                call(cache.backend)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1], number
        assert issubclass(raised[0][0], PagedTQError), (number, raised[0])
    for kind in ("f8", np.float16, None):
        with pytest.raises(ArgumentError, match=r"dtype must be one of f16, bf16, f32, got"):
            twins.cuda.backend.load(0, np.array([owned]), kind)
    assert np.array_equal(twins.fetch(twins.cuda.backend.pool), before)


def test_a_cache_says_what_computes(device):
    twins = Twins(make_config("k4v4", 64, 16, num_layers=1), device)
    assert f"cuda on {device.name}" in repr(twins.cuda)
    assert repr(twins.host).endswith("host)")
    with pytest.raises(ArgumentError, match="another configuration"):
        PagedKVCache(twins.config.replace(seed=9), lambda config, means: twins.cuda.backend)


def test_entries_outside_the_read_ranges_are_neither_read_nor_refused(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    twins.append([twins.open()], [200])
    cache, backend = twins.cuda, twins.cuda.backend
    cache.tables.set_start(twins.ids[0][1], 20, 120)
    ids, queries = twins.members([0], 1), twins.queries(1, 4)
    table, reads = cache.tables.block_table(ids), cache.tables.reads(ids, False)
    want = [twins.fetch(a) for a in backend.attend(0, queries, table, reads, 0.1)]
    wild = table.copy()
    wild[0, 2:7] = 2**30
    got = [twins.fetch(a) for a in backend.attend(0, queries, wild, reads, 0.1)]
    assert all(np.array_equal(*pair) for pair in zip(got, want))


def test_a_sequence_with_nothing_to_read_is_zero_with_an_lse_of_minus_infinity(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    twins.append([twins.open(), twins.open()], [40, 16])
    tables, ids = twins.cuda.tables, twins.members([0, 1], 1)
    reads = tables.reads(ids, False)
    reads = reads._replace(stop=reads.stop * [0, 1])
    backend = twins.cuda.backend
    state = backend.attend(0, twins.queries(2, 4), tables.block_table(ids), reads, 0.1)
    out, lse = map(twins.fetch, state)
    assert np.isneginf(lse[0]).all() and not out[0].any()
    assert np.isfinite(lse[1]).all() and out[1].any()
    # A sequence without a token has nothing to read either, where nobody counts its queries.
    empty = Reads(*(field * [0, 1] for field in tables.reads(ids, False)))
    state = backend.attend(0, twins.queries(2, 4), tables.block_table(ids), empty, 0.1)
    out, lse = map(twins.fetch, state)
    assert np.isneginf(lse[0]).all() and not out[0].any() and np.isfinite(lse[1]).all()


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
