"""The queue of free ids: first in, first out, with removal from the middle.

Order is that of a linked list. The list is an array that is read at its head and written at its
tail; an id taken from the middle leaves a hole (-1) that later pops step over. When the tail meets
the end of the array, what is left is moved to its front, without the holes: as the array is twice
as long as the list can be, a push pays for two moved entries at most.

Ids that are pushed behind a fence are parked: they lie in the same array, in the order in which
they came, but are not taken until the fence passes. A fence is a mark at the tail of that moment,
so it costs nothing while there is none, and parked ids can be removed like any other.
"""

from __future__ import annotations

import numpy as np

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
        # Where each id lies in the ring; of absent ids, where it was last.
        self._place = np.zeros(first + count, np.int64)
        self._place[first:] = np.arange(count)
        # Reading and writing one entry through these costs a third of NumPy's own indexing.
        self._ring_entries, self._places = self._ring.data, self._place.data
        self._head, self._tail = 0, count
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
            self._head = int(self._place[ids[0]])
            self._size += ids.size

    def push(self, ids: Int32) -> None:
        """Append distinct ids at the tail, in the order given."""
        count = ids.size
        if self._tail + count > self._ring.size:
            self._compact()
        tail = self._tail
        self._ring[tail : tail + count] = ids
        self._place[ids] = np.arange(tail, tail + count)
        self._tail = tail + count
        self._size += count
        if self._marks:
            self._parked += count

    def push_if_distinct(self, ids: Int32) -> bool:
        """Append ids at the tail unless one is given twice; return whether it was done."""
        count = ids.size
        if self._tail + count > self._ring.size:
            self._compact()
        tail = self._tail
        places = np.arange(tail, tail + count)
        # NumPy keeps the last of several values assigned to one place. The places of absent ids
        # mean nothing, so that nothing has changed if this finds one given twice.
        self._place[ids] = places
        if not (self._place.take(ids) == places).all():
            return False
        self._ring[tail : tail + count] = ids
        self._tail = tail + count
        self._size += count
        if self._marks:
            self._parked += count
        return True

    def push_few(self, ids: list[int]) -> None:
        """Do what `push` does, faster for a few ids."""
        if self._tail + len(ids) > self._ring.size:
            self._compact()
        ring, places, tail = self._ring_entries, self._places, self._tail
        for entry in ids:
            ring[tail] = entry
            places[entry] = tail
            tail += 1
        self._tail = tail
        self._size += len(ids)
        if self._marks:
            self._parked += len(ids)

    def remove(self, ids: Int32) -> None:
        """Take distinct ids from wherever they are, parked or not."""
        self._parked -= int(np.count_nonzero(self.are_parked(ids)))
        self._ring[self._place[ids]] = -1
        self._size -= ids.size

    def restore(self, ids: Int32) -> None:
        """Undo the `remove` of these ids, if nothing was pushed since."""
        if ids.size:
            places = self._place[ids]
            self._ring[places] = ids
            self._head = min(self._head, int(places.min()))
            self._parked += int(np.count_nonzero(self.are_parked(ids)))
            self._size += ids.size

    def are_parked(self, ids: Int32) -> Bools:
        """Tell which of some ids that wait are parked, ``bool[n]``."""
        if not self._marks:
            return np.zeros(ids.size, np.bool_)
        parked: Bools = self._place[ids] >= self._marks[0][1]
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
        if not np.array_equal(self._ring[self._place[waiting]], waiting):
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


NO_IDS: Int32 = np.empty(0, np.int32)
