"""Reference-counted ids with a FIFO queue of the free ones, and the page pool made of them.

Order is that of vLLM's block pool: ids are taken at the head of the queue, freed ids join the tail
in the order given, so that the page that was freed longest ago is reused first. A page without an
owner may still be wanted for what it holds: `PagePool.touch` takes it from the middle of the queue.
"""

from __future__ import annotations

import numpy as np

from ..errors import ArgumentError, CapacityError, IntegrityError, OutOfPages
from .arguments import MAX_PAGES, Bools, Int32, Int64, Integers, instance, integer, integers
from .free_queue import FreeQueue

#: Up to so many ids a loop is faster than NumPy's calls.
FEW = 16
#: The dtype of every array of ids made here; NumPy keeps one object for it.
INT32 = np.dtype(np.int32)
ARRAY = np.ndarray


class CountedPool:
    """Ids ``first .. first + count - 1``, each free or held by a number of owners.

    ``first - 1`` stands for "none" in rows of tables. It has no owners, so it is refused like any
    other id that is not there; rows of tables are given to `_retain_row` and `_release_row`.

    Parameters
    ----------
    first : int
        The lowest id: 1 where 0 is the null id, 0 where -1 is.
    count : int
        How many ids there are.
    """

    exhausted: type[CapacityError] = CapacityError
    noun = "id"

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count
        self._refs = np.zeros(first + count, np.int32)
        self._queue = FreeQueue(first, count)
        self._owners = self._refs.data
        self._shared = 0
        self._scratch = np.zeros(first + count, np.int64)
        view = self._refs.view()
        view.flags.writeable = False
        self._refs_view = view

    @property
    def ref_counts(self) -> Int32:
        """Owners of each id: a read-only view, ``int32[first + count]``."""
        return self._refs_view

    @property
    def nbytes(self) -> int:
        """Bytes of reference counts and free queue."""
        return self._refs.nbytes + self._scratch.nbytes + self._queue.nbytes

    @property
    def num_free(self) -> int:
        """Ids without an owner that can be taken now."""
        return len(self._queue)

    @property
    def num_parked(self) -> int:
        """Ids without an owner that wait for a fence; see `Fences`."""
        return self._queue.num_parked

    @property
    def num_used(self) -> int:
        """Ids with at least one owner."""
        return self._count - self._queue.num_waiting

    @property
    def num_shared(self) -> int:
        """Ids with more than one owner."""
        return self._shared

    def acquire(self, count: int) -> Int32:
        """Take ``count`` ids from the head of the free queue, each with one owner.

        Returns
        -------
        int32[count]

        Raises
        ------
        OutOfPages, OutOfWindowSlots
            If fewer are free.
        """
        if type(count) is not int or count < 0:
            count = integer("count", count, 0)
        if count > len(self._queue):
            raise self.exhausted(count, len(self._queue), self._count)
        if count == 0:
            return np.empty(0, np.int32)
        ids = self._queue.pop(count)
        # Indices of NumPy's own width are used as they are, others are converted at every use.
        self._refs[ids.astype(np.intp)] = 1
        return ids

    def put_back(self, ids: Int32) -> None:
        """Undo the `acquire` that returned these ids, if nothing else was done since."""
        self._refs[ids] = 0
        self._queue.put_back(ids)

    def peek(self, count: int) -> Int32:
        """Return the ids that `acquire` would take now, without taking them.

        Returns
        -------
        int32[count]

        Raises
        ------
        OutOfPages, OutOfWindowSlots
            If fewer are free.
        """
        count = integer("count", count, 0)
        if count > len(self._queue):
            raise self.exhausted(count, len(self._queue), self._count)
        return self._queue.ids()[:count]

    def retain(self, ids: Integers) -> None:
        """Add one owner to each id; one that is given twice gets two.

        Raises
        ------
        ArgumentError
            If an id is out of range or free.
        """
        owned = self._owned(ids, "retain")
        if owned.size:
            self._add_owners(owned)

    def _retain_row(self, row: Int32) -> None:
        """Do what `retain` does, of what a row of a table holds: ids, and "none"."""
        self.retain(self._present(row))

    def _release_row(self, row: Int32) -> Int32:
        """Do what `release` does, of what a row of a table holds: ids, and "none"."""
        return self.release(self._present(row))

    def _present(self, row: Int32) -> Int32:
        """Return the ids of a row without "none"."""
        present = row >= self._first
        return row if np.count_nonzero(present) == row.size else row[present]

    def release(self, ids: Integers) -> Int32:
        """Take one owner from each id; one that is given twice loses two.

        Ids that lose their last owner join the tail of the free queue in the order given (the
        last occurrence counts).

        Returns
        -------
        int32[freed]
            Ids that became free, in that order; the array given if that is all of it.

        Raises
        ------
        ArgumentError
            If an id is out of range or has fewer owners than it would lose.
        """
        if type(ids) is ARRAY and ids.dtype is INT32 and ids.ndim == 1:
            if ids.size <= FEW:
                done = self._queue.push_sole(ids, self._owners, self._first)  # type: ignore[arg-type]
            else:
                done = self._release_unshared(ids)  # type: ignore[arg-type]
            if done:
                return ids  # type: ignore[return-value]
        owned = self._owned(ids, "release")
        if owned.size == 0:
            return np.empty(0, np.int32)
        last = self._last_occurrence(owned)
        before = self._refs.take(owned)
        if last.all():
            after = before - 1
        else:
            _, inverse, times = np.unique(owned, return_inverse=True, return_counts=True)
            after = before - times[inverse].astype(np.int32)
            if int(after.min()) < 0:
                worst = int(np.argmin(after))
                raise ArgumentError(
                    f"release gives {self.noun} {int(owned[worst])} {int(times[inverse[worst]])} "
                    f"times, but it has {int(before[worst])} owners"
                )
        self._refs[owned] = after
        self._shared -= int(np.count_nonzero(last & (before > 1) & (after <= 1)))
        freed: Int32 = owned[last & (after == 0)].astype(np.int32)
        self._queue.push(freed)
        return freed

    def _release_unshared(self, ids: Int32) -> bool:
        """Release ids if no id has two owners; tell whether it was done, else nothing changed."""
        if self._shared:
            return False
        # As unsigned numbers the negative ones are too large; the null page has no owner.
        at = ids.view(np.uint32).astype(np.intp)
        try:
            owned = np.count_nonzero(self._refs.take(at))
        except IndexError:
            return False
        if owned != ids.size or not self._queue.push_if_distinct(ids, at):
            return False
        self._refs[at] = 0
        return True

    def copied_on_write(self, ids: Int32) -> Bools:
        """Tell which of several writers must copy, where each owns one reference to its id.

        The writers come in order: one that finds other owners copies and leaves, which lowers the
        count for the next; the last owner left writes in place.

        Returns
        -------
        bool[n]
            True for the writers that copy.
        """
        refs = self._refs[ids]
        copies: Bools = refs > 1
        if copies.any():
            _, inverse, writers = np.unique(ids, return_inverse=True, return_counts=True)
            copies &= ~(self._last_occurrence(ids) & (writers[inverse] == refs))
        return copies

    def use_queue(self, queue: FreeQueue) -> None:
        """Let another queue, which holds the same ids, decide what is taken next."""
        instance("queue", queue, FreeQueue)
        if self.num_parked or not np.array_equal(np.sort(queue.ids()), np.sort(self._queue.ids())):
            raise ArgumentError(f"the queue must hold the {len(self._queue)} free {self.noun}s")
        self._queue = queue

    def free_ids(self) -> Int32:
        """Return the free queue from head to tail, ``int32[num_free]``."""
        return self._queue.ids()

    def parked_ids(self) -> Int32:
        """Return what waits for a fence, in the order of release, ``int32[num_parked]``."""
        return self._queue.parked_ids()

    def fence(self, epoch: int) -> None:
        """Park what is released from now on; for `Fences`."""
        self._queue.fence(epoch)

    def unfence(self, oldest: int | None) -> Int32:
        """Let ids rejoin that were parked before the epoch ``oldest``; for `Fences`."""
        return self._queue.unfence(oldest)

    def check_integrity(self, expected_refs: Int64 | None = None) -> None:
        """Prove that queue, counts and (where given) the owners' own count agree.

        Raises
        ------
        IntegrityError
            Naming what is broken and for which id.
        """
        waiting = np.zeros(self._refs.size, np.int64)
        np.add.at(waiting, self.free_ids(), 1)
        np.add.at(waiting, self.parked_ids(), 1)
        expected = (self._refs == 0).astype(np.int64)
        expected[: self._first] = 0
        for broken, problem in (
            (waiting > 1, "is in the free queue twice"),
            (waiting != expected, "must be in the free queue exactly if it has no owner"),
            (self._refs < 0, "has a negative number of owners"),
        ):
            if broken.any():
                raise IntegrityError(f"{self.noun} {int(np.flatnonzero(broken)[0])} {problem}")
        self._queue.check_integrity()
        if self._refs[: self._first].any():
            raise IntegrityError(f"the null {self.noun} has an owner")
        if int(np.count_nonzero(self._refs > 1)) != self._shared:
            raise IntegrityError(f"the number of shared {self.noun}s is wrong: {self._shared}")
        if expected_refs is not None and not np.array_equal(expected_refs, self._refs):
            worst = int(np.flatnonzero(expected_refs != self._refs)[0])
            raise IntegrityError(
                f"{self.noun} {worst} counts {int(self._refs[worst])} owners, "
                f"but {int(expected_refs[worst])} hold it"
            )

    def _add_owners(self, ids: Int64) -> None:
        last = self._last_occurrence(ids)
        before = self._refs.take(ids)
        if last.all():
            self._refs[ids] = before + 1
        else:
            np.add.at(self._refs, ids, 1)
        self._shared += int(np.count_nonzero(last & (before <= 1) & (self._refs.take(ids) > 1)))

    def _owned(self, ids: Integers, operation: str) -> Int64:
        """Return the ids, checked to be in range and owned."""
        array = self._in_range(ids, operation)
        refs = self._refs.take(array)
        if not refs.all():
            worst = int(array[refs == 0][0])
            raise ArgumentError(f"{operation}: {self.noun} {worst} has no owner")
        return array

    def _in_range(self, ids: Integers, operation: str) -> Int64:
        array = integers(self.noun, ids)
        if array.size == 0:
            return array
        if int(array.min()) < self._first or int(array.max()) >= self._refs.size:
            worst = int(array[(array < self._first) | (array >= self._refs.size)][0])
            null = f", the null {self.noun}, which nobody owns" if worst == 0 else ""
            raise ArgumentError(
                f"{operation}: {self.noun} must be in [{self._first}, {self._refs.size - 1}], "
                f"got {worst}{null}"
            )
        return array

    def _last_occurrence(self, ids: Int32 | Int64) -> Bools:
        # NumPy keeps the last of several values assigned to one place.
        order = np.arange(ids.size)
        self._scratch[ids] = order
        last: Bools = self._scratch.take(ids) == order
        return last


class PagePool(CountedPool):
    """All pages of one memory tier: who owns them, and which are free.

    Page 0 is the null page: never handed out, refused where it is given.

    Parameters
    ----------
    num_pages : int
        Pages, the null page included; at least 2.
    """

    exhausted = OutOfPages
    noun = "page"

    def __init__(self, num_pages: int) -> None:
        super().__init__(1, integer("num_pages", num_pages, 2, MAX_PAGES) - 1)
        self.num_pages = self._count + 1

    def num_leaving(self, pages: Integers) -> int:
        """Return by how much `touch` of these pages would lower ``num_free``."""
        wanted = self._in_range(pages, "touch")
        waiting = np.unique(wanted[self._refs.take(wanted) == 0]).astype(np.int32)
        return waiting.size - int(np.count_nonzero(self._queue.are_parked(waiting)))

    def touch(self, pages: Integers) -> None:
        """Add one owner to each page, free or not; one that is given twice gets two.

        Free pages leave the queue, wherever they are in it; the order of the others stays. That
        includes pages that wait for a fence: an owner reads, so it need not wait for readers.

        Raises
        ------
        ArgumentError
            If a page is out of range.
        """
        wanted = self._in_range(pages, "touch")
        if wanted.size == 0:
            return
        waiting = wanted[self._refs.take(wanted) == 0]
        if waiting.size:
            self._queue.remove(waiting[self._last_occurrence(waiting)].astype(np.int32))
        self._add_owners(wanted)

    def untouch(self, pages: Integers) -> None:
        """Undo the `touch` of these pages, if nothing was released since."""
        wanted, times = np.unique(self._owned(pages, "untouch"), return_counts=True)
        before = self._refs[wanted]
        after = before - times.astype(np.int32)
        self._refs[wanted] = after
        self._shared -= int(np.count_nonzero((before > 1) & (after <= 1)))
        self._queue.restore(wanted[after == 0].astype(np.int32))
