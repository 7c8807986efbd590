"""The queue of free ids: first in, first out, with removal from the middle.

It decides which cached page is reused next: the one that was freed longest ago.

Order is that of a linked list. The list is an array that is read at its head and written at its
tail; an id taken from the middle leaves a hole (-1) that later pops step over. When the tail meets
the end of the array, what is left is moved to its front, without the holes: as the array is twice
as long as the list can be, a push pays for two moved entries at most.

Ids that are pushed behind a fence are parked: they lie in the same array, in the order in which
they came, but are not taken until the fence passes. A fence is a mark at the tail of that moment,
so it costs nothing while there is none, and parked ids can be removed like any other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from .arguments import Bools, Int32

#: How far the first look for live entries among holes reaches.
_FIRST_LOOK = 64


class FreeQueue:
    """Distinct ids ``first .. first + count - 1`` in the order in which they will be taken.

    Callers pass valid ids only: those pushed are absent, those removed are present. All of them
    are present at first, in ascending order.

    Parameters
    ----------
    first, count : int
        The lowest id, and how many there are.
    """

    def __init__(self, first: int, count: int) -> None:
        self._ring = np.full(2 * count + _FIRST_LOOK, -1, np.int32)
        self._ring[:count] = np.arange(first, first + count, dtype=np.int32)
        # Where each id lies in the ring; of absent ids, where it was last. See `_places`.
        # Narrow where possible: freeing random ids is bound by this array's cache misses.
        self._place_type = np.int32 if self._ring.size < 1 << 31 else np.int64
        self._place = np.zeros(first + count, self._place_type)
        self._place[first:] = np.arange(count)
        # Ids from here on in the ring are not in `_place` yet: few are ever taken from the middle.
        self._unplaced = count
        self._head, self._tail, self._end = 0, count, self._ring.size
        # Ids that wait, parked ones included.
        self._size = count
        self._parked = 0
        # (epoch, place in the ring) of each fence: ids from the first place on are parked.
        self._marks: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self._size - self._parked

    @property
    def num_parked(self) -> int:
        """Ids behind a fence."""
        return self._parked

    @property
    def num_waiting(self) -> int:
        """Ids in the queue, parked ones included."""
        return self._size

    @property
    def nbytes(self) -> int:
        """Bytes of the queue's arrays."""
        return self._ring.nbytes + self._place.nbytes

    def pop(self, count: int) -> Int32:
        """Take ``count`` ids from the head; the queue holds at least as many."""
        head = self._head
        if self._size == self._tail - head:
            ids: Int32 = self._ring[head : head + count].copy()
            self._head = head + count
        else:
            ids = self._pop_over_holes(count)
        self._size -= count
        return ids

    def put_back(self, ids: Int32) -> None:
        """Undo the `pop` that took these ids, if nothing else was done since."""
        if ids.size:
            # Neither the ring nor the places have forgotten them.
            self._head = int(self._places()[ids[0]])
            self._size += ids.size

    def push(self, ids: Int32) -> None:
        """Append distinct ids at the tail, in the order given."""
        count = ids.size
        if self._tail + count > self._end:
            self._compact()
        tail = self._tail
        self._ring[tail : tail + count] = ids
        self._tail = tail + count
        self._size += count
        if self._marks:
            self._parked += count

    def push_if_distinct(self, ids: Int32, at: npt.NDArray[np.intp]) -> bool:
        """Append ids at the tail unless one is given twice; return whether it was done.

        ``at`` are the ids as indices.
        """
        count = ids.size
        if self._tail + count > self._end:
            self._compact()
        tail = self._tail
        places = np.arange(tail, tail + count, dtype=self._place_type)
        # NumPy keeps the last of several values assigned to one place. The places of absent ids
        # mean nothing, so that nothing has changed if this finds one given twice.
        self._place[at] = places
        if np.count_nonzero(self._place.take(at) == places) != count:
            return False
        self._ring[tail : tail + count] = ids
        self._tail = tail + count
        if self._unplaced == tail:
            self._unplaced = self._tail
        self._size += count
        if self._marks:
            self._parked += count
        return True

    def push_sole(self, ids: Int32, owners: memoryview, first: int) -> bool:
        """Append a few ids that lose their only owner; tell whether it was done.

        Nothing is done if one is below ``first``, not among ``owners``, has not one owner, or is
        given twice.
        """
        listed = ids.tolist()
        count = len(listed)
        left = iter(listed)
        try:
            for entry in left:
                # One that is given twice has no owner left the second time.
                if entry < first or owners[entry] != 1:
                    raise IndexError
                owners[entry] = 0
        except IndexError:
            for entry in listed[: count - len([*left]) - 1]:
                owners[entry] = 1
            return False
        if self._tail + count > self._end:
            self._compact()
        tail = self._tail
        self._ring[tail : tail + count] = ids
        self._tail = tail + count
        self._size += count
        if self._marks:
            self._parked += count
        return True

    def remove(self, ids: Int32) -> None:
        """Take distinct ids from wherever they are, parked or not."""
        self._parked -= int(np.count_nonzero(self.are_parked(ids)))
        self._ring[self._places()[ids]] = -1
        self._size -= ids.size

    def restore(self, ids: Int32) -> None:
        """Undo the `remove` of these ids, if nothing was pushed since."""
        if ids.size:
            places = self._places()[ids]
            self._ring[places] = ids
            self._head = min(self._head, int(places.min()))
            self._parked += int(np.count_nonzero(self.are_parked(ids)))
            self._size += ids.size

    def are_parked(self, ids: Int32) -> Bools:
        """Tell which of some ids that wait are parked, ``bool[n]``."""
        if not self._marks:
            return np.zeros(ids.size, np.bool_)
        parked: Bools = np.greater_equal(self._places()[ids], self._marks[0][1])
        return parked

    def fence(self, epoch: int) -> None:
        """Park what is pushed from now on; epochs come in ascending order."""
        self._marks.append((epoch, self._tail))

    def unfence(self, oldest: int | None) -> Int32:
        """Let ids rejoin that were parked before the epoch ``oldest``, all of them with None.

        Returns
        -------
        int32[n]
            Those ids, in the order in which they were pushed.
        """
        if not self._marks:
            return np.empty(0, np.int32)
        begin = self._marks[0][1]
        self._marks = [mark for mark in self._marks if oldest is not None and mark[0] >= oldest]
        back = self._live(begin, self._marks[0][1] if self._marks else self._tail)
        self._parked -= back.size
        return back

    def ids(self) -> Int32:
        """Return what can be taken, from head to tail."""
        return self._live(self._head, self._marks[0][1] if self._marks else self._tail)

    def parked_ids(self) -> Int32:
        """Return what is parked, in the order in which it came."""
        return self._live(self._marks[0][1], self._tail) if self._marks else NO_IDS

    def check_integrity(self) -> None:
        """Prove that places and counts are right.

        Raises
        ------
        IntegrityError
        """
        waiting = self._live(self._head, self._tail)
        if waiting.size != self._size:
            raise IntegrityError(f"{waiting.size} ids are in a free queue that counts {self._size}")
        parked = self.parked_ids().size
        if parked != self._parked:
            raise IntegrityError(
                f"{parked} ids are parked in a free queue that counts {self._parked}"
            )
        if not np.array_equal(self._ring[self._places()[waiting]], waiting):
            raise IntegrityError("the free queue does not know where its ids are")

    def _pop_over_holes(self, count: int) -> Int32:
        reach = 2 * count + _FIRST_LOOK
        while True:
            ahead = self._ring[self._head : min(self._head + reach, self._tail)]
            live = np.flatnonzero(ahead >= 0)
            if live.size >= count:
                break
            reach *= 4
        taken: Int32 = ahead[live[:count]]
        # Holes right behind what was taken go too, so that they are never looked at again.
        self._head += int(live[count]) if live.size > count else ahead.size
        return taken

    def _places(self) -> npt.NDArray[Any]:
        """Return where each id lies, of absent ones where it was last."""
        begin, end = self._unplaced, self._tail
        if begin < end:
            # There is no hole, for making one brings this up to date. NumPy keeps the last of
            # several values assigned to one place, so that of an id's places the last one counts.
            self._place[self._ring[begin:end]] = np.arange(begin, end)
            self._unplaced = end
        placed: npt.NDArray[Any] = self._place
        return placed

    def _live(self, begin: int, end: int) -> Int32:
        """Return the ids between two places of the ring."""
        # What was taken leaves its id in the ring behind the head.
        entries = self._ring[max(begin, self._head) : max(end, self._head)]
        return entries[entries >= 0]

    def _compact(self) -> None:
        self._marks = [(epoch, self._live(0, place).size) for epoch, place in self._marks]
        waiting = self._live(self._head, self._tail)
        self._ring[: waiting.size] = waiting
        self._place[waiting] = np.arange(waiting.size)
        self._head, self._tail = 0, waiting.size
        self._unplaced = waiting.size


NO_IDS: Int32 = np.empty(0, np.int32)
