"""What the CUDA backend takes, wherever it lies, and what it refuses as the host does."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import Polar, TurboQuant
from pagedtq.backends.cuda import CudaBackend
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    PagedTQError,
    SlotError,
    UnsupportedError,
)
from pagedtq.paging.table_views import Reads
from tests.parity.cases import make_config
from tests.parity.twins import Twins


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
