"""What the tests of other block managers expect, as far as the other files do not say it already.

Numbers are theirs: vLLM V1's pools and prompts, V0's admission, forks and tables, and the cases
that proposals for evicting blocks of live requests came with.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
from served import COMMON, SIZE, admit, decode, manager_of, request_of

from pagedtq.errors import ArgumentError, OutOfPages
from pagedtq.paging import BlockHasher, KeepFirstLast, PageTables, SharingOptions, eviction


def tables_with(*lengths, size=16, pages=40, **options):
    tables = PageTables(size, pages, **options)
    ids = tables.open_many(len(lengths))
    tables.commit(tables.reserve(ids, list(lengths)))
    return tables, ids.tolist()


# -- vLLM V1: hashes ---------------------------------------------------------------------------


def test_the_root_of_all_chains_is_the_same_in_every_process():
    # Hosts agree on keys without agreeing on a seed.
    assert BlockHasher(16).root.hex() == (
        "e35d3a1f16ce7310eb75523c556ec1847eaf5f998bbfef3b3289e30cdf056d24"
    )
    assert BlockHasher(64).root == BlockHasher(16).root == sha256(b"pagedtq.prefix.1").digest()


def test_only_whole_blocks_are_hashed_and_later_tokens_do_not_change_them():
    request = request_of("0", list(range(37)))
    assert len(request.block_hashes) == 2
    first = list(request.block_hashes)
    request.append(range(37, 49))
    assert request.block_hashes[:2] == first
    assert len(request.block_hashes) == 3
    assert request.block_hashes == request_of("1", list(range(49))).block_hashes


def test_a_salt_changes_the_first_key_alone_and_all_that_follow_through_it():
    plain, salted = request_of("0", COMMON), request_of("1", COMMON, salt=b"a")
    assert not set(plain.block_hashes) & set(salted.block_hashes)
    hasher = BlockHasher(SIZE)
    tokens = np.array(COMMON, np.int32)
    assert hasher.chain(tokens[SIZE:], salted.block_hashes[0]) == salted.block_hashes[1:]


def test_an_image_or_an_adapter_changes_keys_from_its_block_on():
    plain = request_of("0", COMMON).block_hashes
    image = request_of("1", COMMON, extra_keys={1: b"image"}).block_hashes
    assert [one == other for one, other in zip(plain, image, strict=True)] == [True, False, False]


# -- vLLM V1: caching --------------------------------------------------------------------------


def test_publishing_two_blocks_and_then_one_makes_three():
    manager = manager_of()
    request = request_of("0", COMMON + [3] * 7)
    manager.allocate_slots(request, 55, delay_cache_blocks=True)
    for tokens, blocks in ((32, 2), (33, 2), (48, 3), (48, 3), (16, 3)):
        manager.cache_blocks(request, tokens)
        assert len(manager.tables.prefix) == blocks


def test_a_part_that_is_missing_ends_the_hit():
    manager = manager_of(21)
    first = request_of("0", COMMON + [3] * 7)
    admit(manager, first)
    for evicted, hit in (({3}, [1, 2]), ({1}, [])):
        manager.evict_blocks(evicted)
        assert manager.get_computed_blocks(request_of("1", [*COMMON, 7]))[0].page_ids == hit


def test_a_long_run_of_requests_leaves_nothing_behind():
    manager = manager_of(enable_events=True)
    requests = [request_of(str(i), [i % 3] * (i % 40 + 1)) for i in range(60)]
    for request in requests:
        assert admit(manager, request)[1] is not None
        decode(manager, request, [1] * 20)
        manager.free(request)
    assert manager.usage == 0.0
    assert manager.tables.num_sequences == 0
    assert not manager.tables.pool.ref_counts.any()
    assert sorted(manager.tables.pool.free_ids().tolist()) == list(range(1, 11))


# -- vLLM V0: admission, tables, the allocator -------------------------------------------------


@pytest.mark.parametrize("num_blocks", [16, 80, 160])
@pytest.mark.parametrize("watermark", [0.0, 0.5])
def test_a_request_is_admitted_now_later_or_never(num_blocks, watermark):
    pages = num_blocks + 1
    kept = int(watermark * pages)
    room = num_blocks - kept
    # Never: it would not fit above the watermark if it were alone.
    empty = manager_of(pages, watermark=watermark)
    assert empty.allocate_slots(request_of("0", [1]), (room + 1) * SIZE) is None
    assert empty.allocate_slots(request_of("0", [1]), room * SIZE) is not None
    # Later: another one holds what it needs.
    busy = manager_of(pages, watermark=watermark)
    holder = request_of("0", [1] * SIZE)
    admit(busy, holder)
    waiting = request_of("1", [2])
    assert busy.allocate_slots(waiting, room * SIZE) is None
    busy.free(holder)
    assert busy.allocate_slots(waiting, room * SIZE) is not None


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 129])
@pytest.mark.parametrize("appended", [1, 16, 17, 129])
@pytest.mark.parametrize("lookahead", [0, 1, 16, 33])
def test_room_is_taken_for_exactly_the_blocks_that_begin(prompt, appended, lookahead):
    manager = manager_of(100)
    request = request_of("0", [1] * prompt)
    manager.allocate_slots(request, prompt)
    request.num_computed_tokens = prompt
    request.append([1] * appended)
    new = manager.allocate_slots(request, appended, num_lookahead_tokens=lookahead)
    assert len(new) == -(-(prompt + appended + lookahead) // SIZE) - -(-prompt // SIZE)


@pytest.mark.parametrize("length", [1, 8, 15, 16, 17, 129, 160])
def test_two_tables_with_the_same_tokens_share_whole_blocks_and_not_the_tail(length):
    tables = PageTables(16, 40, sharing=SharingOptions(leave_last=False))
    tokens = list(range(length))
    first = tables.open(tokens)
    tables.commit(tables.reserve([first], length))
    second = tables.open(tokens)
    tables.commit(tables.reserve([second], length - int(tables.lengths([second])[0])))
    one, other = tables.block_table([first, second])
    whole = length // 16
    assert np.array_equal(one[:whole], other[:whole])
    assert not set(one[whole:].tolist()) & set(other[whole:].tolist())
    assert tables.pool.num_used == whole + 2 * (length % 16 > 0)


def test_running_out_of_pages_is_an_error_and_freeing_prevents_it():
    tables, (first, second) = tables_with(16 * 3, 0, pages=4)
    with pytest.raises(OutOfPages, match="need 1 pages, 0 free of 3"):
        tables.reserve([second], 1)
    tables.close(first)
    tables.commit(tables.reserve([second], 48))
    with pytest.raises(OutOfPages):
        tables.reserve([second], 1)


def test_the_same_tokens_never_run_out_of_pages():
    tables = PageTables(16, 4, sharing=SharingOptions(leave_last=False))
    tokens = list(range(48))
    tables.commit(tables.reserve([tables.open(tokens)], 48))
    others = [tables.open(tokens) for _ in range(30)]
    assert tables.lengths(others).tolist() == [48] * 30
    assert tables.pool.ref_counts[1:].tolist() == [31, 31, 31]
    for seq_id in others:
        tables.close(seq_id)
    assert tables.pool.ref_counts[1:].tolist() == [1, 1, 1]


def test_of_blocks_freed_together_the_longer_prefix_goes_first():
    tables = PageTables(16, 7, sharing=SharingOptions())
    first, second = tables.open([1] * 48), tables.open([2] * 48)
    tables.commit(tables.reserve([first], 48))
    tables.commit(tables.reserve([second], 48))
    tables.close(second)
    tables.close(first)
    # Least recently freed first; within a sequence its end before its beginning.
    assert tables.pool.free_ids().tolist() == [6, 5, 4, 3, 2, 1]


# -- evicting blocks of live requests ----------------------------------------------------------


def test_discarded_tokens_stop_counting_towards_pages_but_not_towards_positions():
    tables, (seq_id,) = tables_with(100)
    assert tables.pool.num_used == 7
    # 50 tokens to discard are three whole blocks.
    eviction.apply(tables, KeepFirstLast(0, 50).plan(tables, seq_id))
    assert (tables.pool.num_used, tables.resident_tokens, tables.logical_tokens) == (4, 52, 100)
    tables.commit(tables.reserve([seq_id], 40))
    assert (tables.lengths([seq_id])[0], tables.pool.num_used) == (140, 6)
    tables.commit(tables.reserve([seq_id], 70))
    # 14 blocks would be held without the eviction.
    assert (tables.lengths([seq_id])[0], tables.pool.num_used) == (210, 11)
    tables.close(seq_id)
    again = tables.open()
    tables.commit(tables.reserve([again], 100))
    assert tables.resident_tokens == tables.logical_tokens == 100


def test_survivors_of_an_eviction_keep_order_and_places_and_nothing_is_nothing():
    tables, (seq_id,) = tables_with(16 * 6)
    assert tables.evict(seq_id, []).size == 0
    assert tables.evict(seq_id, [1, 3]).tolist() == [4, 2]
    assert tables.block_table([seq_id])[0].tolist() == [1, 0, 3, 0, 5, 6]
    assert tables.csr([seq_id]).kv_indices.tolist() == [1, 3, 5, 6]
    assert tables.csr([seq_id]).positions.tolist() == [0, 32, 64, 80]


def test_out_of_a_window_the_null_page_takes_over_from_the_left():
    tables, (seq_id,) = tables_with(16 * 5 + 3)
    for last, expected in ((48, [0, 0, 3, 4, 5, 6]), (20, [0, 0, 0, 4, 5, 6]), (1, [0] * 5 + [6])):
        eviction.apply(tables, KeepFirstLast(0, last).plan(tables, seq_id))
        assert tables.block_table([seq_id])[0].tolist() == expected


def test_an_evicted_block_of_two_owners_leaves_one_and_stays_findable():
    tables = PageTables(16, 20, sharing=SharingOptions())
    prompt = list(range(40))
    first = tables.open(prompt)
    tables.commit(tables.reserve([first], 40))
    second = tables.open(prompt)
    assert tables.evict(second, [0]).size == 0
    assert tables.pool.ref_counts[1:4].tolist() == [1, 2, 1]
    assert tables.num_shared_tokens(prompt) == 32
    # The last owner's eviction frees the page; until it is taken again its block is still there.
    assert tables.evict(first, [0]).tolist() == [1]
    assert tables.num_shared_tokens(prompt) == 32


def test_a_page_given_back_twice_or_never_given_is_refused_and_counted_once():
    tables, _ = tables_with(48)
    pool = tables.pool
    for pages in ([1, 1], [5], [1, 5], [40]):
        before = pool.free_ids().tolist()
        with pytest.raises(ArgumentError):
            pool.release(np.array(pages, np.int32))
        assert pool.free_ids().tolist() == before
    assert pool.num_free == pool.free_ids().size
