"""The page pool: order of the free queue, owners, and refusals."""

from __future__ import annotations

import random
from collections import OrderedDict, deque

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, ArgumentTypeError, IntegrityError, OutOfPages
from pagedtq.paging import PagePool, WindowPool


def test_pages_come_in_ascending_order_from_1_and_page_0_never():
    pool = PagePool(6)
    assert pool.acquire(5).tolist() == [1, 2, 3, 4, 5]
    assert pool.num_free == 0
    assert pool.num_used == 5
    with pytest.raises(OutOfPages):
        pool.acquire(1)


def test_freed_pages_join_the_tail_in_the_order_given():
    pool = PagePool(8)
    pool.acquire(4)
    assert pool.release([4, 2]).tolist() == [4, 2]
    assert pool.free_ids().tolist() == [5, 6, 7, 4, 2]
    assert pool.acquire(4).tolist() == [5, 6, 7, 4]


def test_the_queue_wraps_around_at_its_end():
    pool = PagePool(5)
    for _ in range(7):
        pages = pool.acquire(3)
        assert pool.release(pages[::-1]).tolist() == pages[::-1].tolist()
        pool.check_integrity()
    assert sorted(pool.free_ids()) == [1, 2, 3, 4]


def test_a_page_is_free_when_its_last_owner_leaves():
    pool = PagePool(4)
    page = int(pool.acquire(1)[0])
    pool.retain([page, page])
    assert pool.ref_counts[page] == 3
    assert pool.num_shared == 1
    assert pool.release([page]).size == 0
    assert pool.release([page, page]).tolist() == [page]
    assert pool.num_shared == 0
    pool.check_integrity(np.zeros(4, np.int64))


def test_a_page_given_twice_joins_the_queue_at_its_last_occurrence():
    pool = PagePool(6)
    pool.acquire(3)
    pool.retain([1])
    assert pool.release([1, 2, 1, 3]).tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    "pages", [[0], [0, 0], [0, 1, 2, 0], np.zeros(1, np.int32), np.zeros(20, np.int32)]
)
@pytest.mark.parametrize("verb", ["release", "retain", "touch", "untouch", "num_leaving"])
def test_nobody_owns_the_null_page(verb, pages):
    pool = PagePool(4)
    pool.acquire(2)
    before = pool.ref_counts.tolist(), pool.free_ids().tolist()
    with pytest.raises(ArgumentError, match=r"page must be in \[1, 3\], got 0, the null page"):
        getattr(pool, verb)(pages)
    assert before == (pool.ref_counts.tolist(), pool.free_ids().tolist())
    pool.check_integrity()


def test_rows_of_tables_may_hold_null_pages():
    pool = PagePool(4)
    pool.acquire(2)
    pool._retain_row(np.array([0, 1, 0], np.int32))
    assert pool._release_row(np.array([0, 1, 2, 0], np.int32)).tolist() == [2]
    assert pool.ref_counts.tolist() == [0, 1, 0, 0]
    assert pool._release_row(np.zeros(3, np.int32)).size == 0
    pool.check_integrity()


def test_writers_that_share_an_id_copy_except_the_last_owner():
    pool = PagePool(8)
    pages = pool.acquire(3)
    pool.retain([pages[0], pages[0], pages[1]])
    # Page 1 has three owners, page 2 two, page 3 one.
    copies = lambda ids: pool.copied_on_write(np.array(ids, np.int32)).tolist()  # noqa: E731
    assert copies([1, 2, 1, 3, 1, 2]) == [True, True, True, False, False, False]
    assert copies([1, 1, 2]) == [True, True, True]
    assert copies([3]) == [False]
    assert copies([]) == []


def test_ref_counts_cannot_be_written_from_outside():
    pool = PagePool(4)
    with pytest.raises(ValueError, match="read-only"):
        pool.ref_counts[1] = 3


def test_touching_takes_a_free_page_from_the_middle_of_the_queue():
    pool = PagePool(8)
    pool.touch([3, 5, 3])
    assert pool.free_ids().tolist() == [1, 2, 4, 6, 7]
    assert pool.ref_counts.tolist() == [0, 0, 0, 2, 0, 1, 0, 0]
    assert pool.num_shared == 1
    assert pool.acquire(3).tolist() == [1, 2, 4]
    pool.touch([1, 6])
    assert pool.release([6, 1, 1, 5, 3, 3]).tolist() == [6, 1, 5, 3]
    assert pool.free_ids().tolist() == [7, 6, 1, 5, 3]
    pool.check_integrity()
    for page in (8, -1):
        with pytest.raises(ArgumentError, match="touch"):
            pool.touch([1, page])
    assert pool.free_ids().tolist() == [7, 6, 1, 5, 3]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda pool: pool.release([1, 1]), ArgumentError),
        (lambda pool: pool.release([2, 1, 1, 1]), ArgumentError),
        (lambda pool: pool.release([3]), ArgumentError),
        (lambda pool: pool.release([2, 3]), ArgumentError),
        (lambda pool: pool.release([2, 6]), ArgumentError),
        (lambda pool: pool.release([-1]), ArgumentError),
        (lambda pool: pool.release([1.0]), ArgumentTypeError),
        (lambda pool: pool.release([True]), ArgumentTypeError),
        (lambda pool: pool.release(1), ArgumentTypeError),
        (lambda pool: pool.release([[1], [2]]), ArgumentError),
        (lambda pool: pool.release([[1], [2, 1]]), ArgumentTypeError),
        (lambda pool: pool.retain([1, 4]), ArgumentError),
        (lambda pool: pool.retain([6]), ArgumentError),
        (lambda pool: pool.retain(["1"]), ArgumentTypeError),
        (lambda pool: pool.acquire(4), OutOfPages),
        (lambda pool: pool.acquire(-1), ArgumentError),
        (lambda pool: pool.acquire(True), ArgumentTypeError),
        (lambda pool: pool.acquire(1.0), ArgumentTypeError),
    ],
)
def test_a_refused_call_changes_nothing(call, error):
    pool = PagePool(6)
    pool.acquire(2)
    before = pool.ref_counts.tolist(), pool.free_ids().tolist(), pool.num_free, pool.num_shared
    with pytest.raises(error):
        call(pool)
    assert before == (
        pool.ref_counts.tolist(),
        pool.free_ids().tolist(),
        pool.num_free,
        pool.num_shared,
    )
    pool.check_integrity()


@pytest.mark.parametrize("count", [1, 16, 17, 300])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bad", [0, -1, -(1 << 31), 400, (1 << 31) - 1, 399, "first"])
def test_an_array_with_one_bad_page_is_refused_wherever_it_stands(count, shared, bad):
    pool = PagePool(400)
    pages = pool.acquire(398)
    if shared:
        pool.retain(pages[350:351])
    for place in {0, count // 2, count}:
        ids = np.insert(pages[:count], place, pages[0] if bad == "first" else bad)
        before = pool.ref_counts.tolist(), pool.free_ids().tolist()
        with pytest.raises(ArgumentError, match="release"):
            pool.release(ids)
        assert before == (pool.ref_counts.tolist(), pool.free_ids().tolist())
        pool.check_integrity()
    assert pool.release(pages[:count]).tolist() == pages[:count].tolist()
    pool.check_integrity()


def test_the_error_for_too_many_pages_has_the_numbers():
    pool = PagePool(6)
    pool.acquire(2)
    with pytest.raises(OutOfPages, match="need 4 pages, 3 free of 5") as caught:
        pool.acquire(4)
    assert (caught.value.need, caught.value.free, caught.value.total) == (4, 3, 5)


@pytest.mark.parametrize("num_pages", [1, 0, -1, 1 << 31])
def test_a_pool_needs_the_null_page_and_another(num_pages):
    with pytest.raises(ArgumentError):
        PagePool(num_pages)


@pytest.mark.parametrize("num_pages", [True, 4.0, "4", None])
def test_the_size_of_a_pool_is_an_integer(num_pages):
    with pytest.raises(ArgumentTypeError):
        PagePool(num_pages)


def test_twenty_thousand_random_operations_equal_a_deque():
    rng = random.Random(0)
    pool, queue = PagePool(200), deque(range(1, 200))
    owners: dict[int, int] = {}
    for step in range(20_000):
        kind = rng.random()
        if kind < 0.45:
            count = rng.randint(0, min(7, len(queue)))
            pages = pool.acquire(count).tolist()
            assert pages == [queue.popleft() for _ in range(count)]
            owners.update(dict.fromkeys(pages, 1))
        elif kind < 0.6 and owners:
            pages = rng.choices(list(owners), k=rng.randint(0, 4))
            pool.retain(pages)
            for page in pages:
                owners[page] += 1
        elif owners:
            pages, left = [], dict(owners)
            for page in rng.choices(list(owners), k=rng.randint(0, 9)):
                if left[page]:
                    left[page] -= 1
                    pages.append(page)
            freed = pool.release(pages).tolist()
            expected = [p for i, p in enumerate(pages) if not left[p] and p not in pages[i + 1 :]]
            assert freed == expected
            queue.extend(freed)
            owners = {page: count for page, count in left.items() if count}
        if step % 500 == 0:
            expected_refs = np.zeros(200, np.int64)
            expected_refs[list(owners)] = list(owners.values())
            pool.check_integrity(expected_refs)
            assert pool.free_ids().tolist() == list(queue)


def test_integrity_finds_a_page_that_was_lost_or_queued_twice():
    for damage, message in (
        (lambda pool: pool._refs.__setitem__(3, 1), "page 3"),
        (lambda pool: pool._queue._ring.__setitem__(1, 4), "twice"),
        (lambda pool: pool._refs.__setitem__(0, 1), "null"),
        (lambda pool: pool._queue._ring.__setitem__(1, -1), "page 2"),
        (lambda pool: setattr(pool._queue, "_size", 3), "counts 3"),
        (lambda pool: pool._queue._place.__setitem__(4, 0), "where"),
        (lambda pool: pool._refs.__setitem__(1, 2), "shared"),
        (lambda pool: pool._refs.__setitem__(1, -1), "negative"),
    ):
        pool = PagePool(6)
        pool.acquire(1)
        pool.check_integrity()
        damage(pool)
        with pytest.raises(IntegrityError, match=message):
            pool.check_integrity()
    pool = PagePool(6)
    pool.acquire(1)
    with pytest.raises(IntegrityError, match="page 1 counts 1 owners, but 2 hold it"):
        pool.check_integrity(np.array([0, 2, 0, 0, 0, 0]))


def test_window_slots_start_at_0_and_records_follow_pages():
    windows = WindowPool(2, 8)
    assert windows.acquire(2).tolist() == [0, 1]
    assert windows.acquire_records([5, 3]).tolist() == [0, 1]
    assert windows.sink_record.tolist() == [-1, -1, -1, 1, -1, 0, -1, -1]
    windows.check_integrity(np.array([1, 1]))
    windows.release_records([3, 4])
    assert windows.num_records_used == 1
    with pytest.raises(ArgumentError, match=r"window slot must be in \[0, 1\], got -1$"):
        windows.release([-1, 1])
    assert windows._release_row(np.array([-1, 1], np.int32)).tolist() == [1]
    windows.check_integrity(np.array([1, 0]))
    for pages in ([5], [6, 6], [0], [8]):
        with pytest.raises(ArgumentError):
            windows.acquire_records(pages)
    windows.check_integrity(np.array([1, 0]))
    windows._record_of[2] = 1
    with pytest.raises(IntegrityError, match="sink record 1"):
        windows.check_integrity()


@pytest.mark.parametrize("count", [1, 7, 300])
def test_any_takes_frees_and_touches_keep_the_order_of_a_linked_list(count):
    pool, order = PagePool(count + 1), OrderedDict.fromkeys(range(1, count + 1))
    rng, held = random.Random(count), []
    for _ in range(3000):
        what = rng.random()
        if what < 0.4:
            wanted = rng.randint(0, min(len(order), rng.choice([1, 4, 40])))
            expected = [order.popitem(last=False)[0] for _ in range(wanted)]
            assert pool.acquire(wanted).tolist() == expected
            held += expected
        elif what < 0.75:
            rng.shuffle(held)
            gone = [held.pop() for _ in range(rng.randint(0, min(len(held), 30)))]
            last = {page: at for at, page in enumerate(gone)}
            freed = [p for at, p in enumerate(gone) if last[p] == at and p not in held]
            assert pool.release(gone).tolist() == freed
            order.update(dict.fromkeys(freed))
        else:
            pages = [rng.randint(1, count) for _ in range(rng.randint(0, 12))]
            pool.touch(pages)
            held += pages
            for page in pages:
                order.pop(page, None)
        assert pool.num_free == len(order)
        assert pool.free_ids().tolist() == list(order)
    pool.check_integrity(np.bincount(held, minlength=count + 1))
