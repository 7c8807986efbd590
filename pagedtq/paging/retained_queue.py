"""A free queue with priorities: what is worth less goes first, else least recently freed first."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from .arguments import Bools, Int32
from .free_queue import FreeQueue

#: Priority of every page that was given none, as in TensorRT-LLM.
DEFAULT_PRIORITY = 35
HIGHEST_PRIORITY = 100


class RetainedQueue(FreeQueue):
    """Free ids in bands of priority; within a band in the order in which they were freed.

    Ids of the default priority live in the ring of `FreeQueue`, so a pool whose pages were given no
    priority works as fast and in the same order as without this class. The others are in ordered
    dictionaries, one per priority. A priority stays with an id while it is free and taken back from
    the middle of the queue, and ends when it is popped, that is used for something else. While a
    fence is open, ids that are pushed are parked in the ring, whatever their priority, and join
    their bands when they rejoin. Ids that get the default priority meanwhile wait in a band of it,
    behind the ring's, for the ring takes only what is parked.

    Parameters
    ----------
    first, count : int
        The lowest id, and how many there are.
    clock : callable
        Returns seconds; never runs backwards.
    """

    def __init__(self, first: int, count: int, clock: Callable[[], float]) -> None:
        super().__init__(first, count)
        self._clock = clock
        self.priority = np.full(first + count, DEFAULT_PRIORITY, np.int8)
        # How long an id keeps its priority once it is free.
        self.lifetime = np.full(first + count, np.inf)
        self._bands: dict[int, OrderedDict[int, None]] = {}
        self._num_banded = 0
        self._in_band = np.zeros(first + count, np.bool_)
        # When the priority of a waiting id ends, equal times in the order of freeing; entries of
        # the heap that differ are stale.
        self._due: dict[int, tuple[float, int]] = {}
        self._heap: list[tuple[tuple[float, int], int]] = []
        self._serial = 0
        # What the last pop took out of bands, for `put_back`: id, priority, lifetime, due.
        self._popped: list[tuple[int, int, float, tuple[float, int] | None]] = []

    def __len__(self) -> int:
        return super().__len__() + self._num_banded

    @property
    def num_waiting(self) -> int:
        """Ids in the queue, parked ones included."""
        return super().num_waiting + self._num_banded

    def pop(self, count: int) -> Int32:
        """Take the ``count`` ids that are worth least; the queue holds at least as many."""
        self._popped = []
        if not self._num_banded:
            return super().pop(count)
        parts = []
        low = sorted(priority for priority in self._bands if priority < DEFAULT_PRIORITY)
        high = sorted(priority for priority in self._bands if priority >= DEFAULT_PRIORITY)
        for priority in low:
            parts.append(self._pop_band(priority, count))
            count -= parts[-1].size
        plain = min(count, super().__len__())
        if plain:
            parts.append(super().pop(plain))
            count -= plain
        for priority in high:
            parts.append(self._pop_band(priority, count))
            count -= parts[-1].size
        return np.concatenate([np.empty(0, np.int32), *parts])

    def put_back(self, ids: Int32) -> None:
        """Undo the `pop` that took these ids, priorities included, if nothing was done since."""
        popped, self._popped = self._popped, []
        banded = [one for one, *_ in popped]
        super().put_back(ids[~np.isin(ids, banded)] if banded else ids)
        for one, priority, lifetime, due in reversed(popped):
            self.priority[one], self.lifetime[one] = priority, lifetime
            band = self._bands.setdefault(priority, OrderedDict())
            band[one] = None
            band.move_to_end(one, last=False)
            self._in_band[one] = True
            self._num_banded += 1
            if due is not None:
                self._due[one] = due
                heapq.heappush(self._heap, (due, one))

    def push(self, ids: Int32) -> None:
        """Append distinct ids at the tails of their bands, in the order given."""
        banded = self._banded(ids)
        if not banded.any():
            super().push(ids)
            return
        super().push(ids[~banded])
        self._wait(ids[banded])

    def push_if_distinct(self, ids: Int32, at: npt.NDArray[np.intp]) -> bool:
        """Append ids unless one is given twice; see `FreeQueue.push_if_distinct`."""
        if not self._banded(ids).any():
            return super().push_if_distinct(ids, at)
        if np.unique(ids).size != ids.size:
            return False
        self.push(ids)
        return True

    def push_sole(self, ids: Int32, owners: memoryview, first: int) -> bool:
        """Append a few ids that lose their only owner; see `FreeQueue.push_sole`."""
        # Ids that join a band take the longer way; so do ids that are none.
        if ids.size and not first <= ids.min() <= ids.max() < self.priority.size:
            return False
        if self._banded(ids).any():
            return False
        return super().push_sole(ids, owners, first)

    def remove(self, ids: Int32) -> None:
        """Take distinct ids from wherever they are; they keep their priorities."""
        banded = self._in_band.take(ids)
        if not banded.any():
            super().remove(ids)
            return
        super().remove(ids[~banded])
        for one in ids[banded].tolist():
            self._leave(one)

    def are_parked(self, ids: Int32) -> Bools:
        """Tell which of some ids that wait are parked, ``bool[n]``."""
        # Where an id in a band was in the ring once means nothing.
        return super().are_parked(ids) & ~self._in_band.take(ids)

    def unfence(self, oldest: int | None) -> Int32:
        """Let ids rejoin, those with a priority in their bands; see `FreeQueue.unfence`."""
        back = super().unfence(oldest)
        banded = back[self.priority.take(back) != DEFAULT_PRIORITY]
        if banded.size:
            super().remove(banded)
            self._wait(banded)
        plain = self._bands.get(DEFAULT_PRIORITY)
        if plain and not self._marks:
            ids = np.array(list(plain), np.int32)
            self.remove(ids)
            self.push(ids)
        return back

    def ids(self) -> Int32:
        """Return the ids in the order in which `pop` would take them now."""
        if not self._num_banded:
            return super().ids()
        parts = {priority: [list(band)] for priority, band in self._bands.items()}
        parts.setdefault(DEFAULT_PRIORITY, []).insert(0, super().ids().tolist())
        order = [ids for priority in sorted(parts) for ids in parts[priority]]
        return np.array([one for ids in order for one in ids], np.int32)

    def set_priority(
        self, ids: Int32, waiting: Bools, priority: int, lifetime: float = np.inf
    ) -> None:
        """Give distinct ids a priority; those that wait join the tail of their new band.

        Parameters
        ----------
        ids : int32[n]
            The ids.
        waiting : bool[n]
            Which of them are in the queue.
        priority : int
            0 to 100.
        lifetime : float
            Seconds from when an id is free (now, for those that wait) to its default priority.
        """
        free = ids[waiting]
        # Parked ids stay where they are until their fence has passed.
        free = free[~self.are_parked(free)]
        self.remove(free)
        self.priority[ids] = priority
        self.lifetime[ids] = np.inf if priority == DEFAULT_PRIORITY else lifetime
        self._rejoin(free)

    def refresh(self) -> None:
        """Bring waiting ids whose time is over to the tail of the default band."""
        while self._heap and self._heap[0][0][0] <= self._clock():
            due, one = heapq.heappop(self._heap)
            if self._due.get(one) == due:
                self._leave(one)
                self._reset(one)
                self._rejoin(np.array([one], np.int32))

    def check_integrity(self) -> None:
        """Prove that bands, counts and times are right.

        Raises
        ------
        IntegrityError
        """
        super().check_integrity()
        banded = sorted(one for band in self._bands.values() for one in band)
        if self._num_banded != len(banded) or np.flatnonzero(self._in_band).tolist() != banded:
            raise IntegrityError("the ids in bands of priority are counted or marked wrongly")
        for priority, band in self._bands.items():
            if any(self.priority[one] != priority for one in band):
                raise IntegrityError(f"an id in band {priority} has another priority")
        timed = {one for band in self._bands.values() for one in band}
        timed = {one for one in timed if self.lifetime[one] < np.inf}
        if timed != set(self._due):
            raise IntegrityError("the ids whose priority ends are not those that wait for it")

    def _banded(self, ids: Int32) -> Bools:
        """Tell which of some ids join a band when they are pushed: none while a fence is open."""
        if self._marks:
            return np.zeros(ids.size, np.bool_)
        banded: Bools = self.priority.take(ids) != DEFAULT_PRIORITY
        return banded

    def _rejoin(self, ids: Int32) -> None:
        """Put ids that are not parked behind the others of their priority."""
        if self._marks:
            self._wait(ids)
        else:
            self.push(ids)

    def _wait(self, ids: Int32) -> None:
        """Append ids to their bands."""
        self._in_band[ids] = True
        self._num_banded += ids.size
        for one in ids.tolist():
            self._bands.setdefault(int(self.priority[one]), OrderedDict())[one] = None
            lifetime = float(self.lifetime[one])
            if lifetime < np.inf:
                due = self._due[one] = self._clock() + lifetime, self._serial
                self._serial += 1
                heapq.heappush(self._heap, (due, one))

    def _leave(self, one: int) -> None:
        priority = int(self.priority[one])
        band = self._bands[priority]
        del band[one]
        if not band:
            del self._bands[priority]
        self._num_banded -= 1
        self._in_band[one] = False
        self._due.pop(one, None)
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = [(due, other) for other, due in self._due.items()]
            heapq.heapify(self._heap)

    def _pop_band(self, priority: int, count: int) -> Int32:
        ids = list(self._bands[priority])[:count] if count else []
        for one in ids:
            lifetime, due = float(self.lifetime[one]), self._due.get(one)
            self._popped.append((one, priority, lifetime, due))
            self._leave(one)
            self._reset(one)
        return np.array(ids, np.int32)

    def _reset(self, one: int) -> None:
        self.priority[one] = DEFAULT_PRIORITY
        self.lifetime[one] = np.inf


def queue_over(
    first: int, count: int, free: npt.NDArray[np.int32], clock: Callable[[], float]
) -> RetainedQueue:
    """Return a queue of some ids of ``first .. first + count - 1``, in the order given."""
    queue = RetainedQueue(first, count, clock)
    queue.pop(count)
    queue.push(free)
    return queue
