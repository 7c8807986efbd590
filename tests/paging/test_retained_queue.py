"""The queue with priorities against plain lists."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedtq.paging.retained_queue import DEFAULT_PRIORITY, RetainedQueue


class Clock:
    """Time that tests set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class QueueMachine(RuleBasedStateMachine):
    """The queue against lists: one per priority, one for what is parked, with times.

    ``behind`` are ids of the default priority that came while a fence was open without being
    parked themselves.
    """

    @initialize(count=st.integers(1, 40))
    def begin(self, count):
        self.clock = Clock()
        self.count = count
        self.queue = RetainedQueue(1, count, self.clock)
        self.bands = {DEFAULT_PRIORITY: list(range(1, count + 1))}
        self.behind, self.parked, self.fences, self.epoch = [], [], [], 0
        self.priority = dict.fromkeys(range(1, count + 1), DEFAULT_PRIORITY)
        self.life = dict.fromkeys(range(1, count + 1), np.inf)
        self.freed, self.serial = {}, 0

    def order(self):
        parts = {priority: list(band) for priority, band in self.bands.items()}
        parts.setdefault(DEFAULT_PRIORITY, []).extend(self.behind)
        return [one for priority in sorted(parts) for one in parts[priority]]

    def waiting(self):
        return self.order() + [one for one, _ in self.parked]

    def drop(self, one):
        for band in (*self.bands.values(), self.behind):
            if one in band:
                band.remove(one)
        self.parked = [pair for pair in self.parked if pair[0] != one]

    def join(self, one):
        if self.fences and self.priority[one] == DEFAULT_PRIORITY:
            self.behind.append(one)
        else:
            self.bands.setdefault(self.priority[one], []).append(one)
        self.serial += 1
        self.freed[one] = self.clock.now, self.serial

    def plain(self, one):
        self.priority[one], self.life[one] = DEFAULT_PRIORITY, np.inf

    @rule(data=st.data())
    def pop(self, data):
        count = data.draw(st.integers(0, len(self.order())))
        taken = self.order()[:count]
        assert self.queue.pop(count).tolist() == taken
        for one in taken:
            self.drop(one)
            self.plain(one)

    @rule(data=st.data())
    def pop_and_put_back(self, data):
        # Order, priorities and times are as before: the model does not change.
        count = data.draw(st.integers(0, len(self.order())))
        self.queue.put_back(self.queue.pop(count))

    @rule(data=st.data(), how=st.sampled_from(["push", "distinct", "few", "twice"]))
    def push(self, data, how):
        away = sorted(set(range(1, self.count + 1)) - set(self.waiting()))
        if not away:
            return
        ids = data.draw(st.permutations(away))[: data.draw(st.integers(0, len(away)))]
        array = np.array(ids, np.int32)
        if how == "twice":
            if ids:
                again = np.array([*ids, ids[0]], np.int32)
                assert not self.queue.push_if_distinct(again, again.astype(np.intp))
            return
        if how == "few":
            # Of ids that join a band it does nothing and says so, as of ids that have no owner.
            owners = np.zeros(self.count + 1, np.int32)
            owners[array] = 1
            banded = not self.fences and any(self.priority[i] != DEFAULT_PRIORITY for i in ids)
            assert not self.queue.push_sole(np.append(array, 0).astype(np.int32), owners.data, 1)
            assert owners.sum() == len(ids)
            assert self.queue.push_sole(array, owners.data, 1) != banded
            assert owners.sum() == (len(ids) if banded else 0)
            if banded:
                self.queue.push(array)
        elif how == "push":
            self.queue.push(array)
        else:
            assert self.queue.push_if_distinct(array, array.astype(np.intp))
        for one in ids:
            if self.fences:
                self.parked.append((one, self.fences[-1]))
            else:
                self.join(one)

    @rule()
    def fence(self):
        self.epoch += 1
        self.queue.fence(self.epoch)
        self.fences.append(self.epoch)

    @rule(data=st.data())
    def unfence(self, data):
        if not self.fences:
            return
        self.fences.remove(data.draw(st.sampled_from(self.fences)))
        oldest = self.fences[0] if self.fences else None
        back = [one for one, epoch in self.parked if oldest is None or epoch < oldest]
        assert self.queue.unfence(oldest).tolist() == back
        for one in back:
            self.drop(one)
            self.bands.setdefault(self.priority[one], []).append(one)
        for one in sorted(
            (one for one in back if self.priority[one] != DEFAULT_PRIORITY), key=back.index
        ):
            self.serial += 1
            self.freed[one] = self.clock.now, self.serial
        if not self.fences:
            self.bands.setdefault(DEFAULT_PRIORITY, []).extend(self.behind)
            self.behind = []

    @rule(data=st.data())
    def remove(self, data):
        waiting = self.waiting()
        if waiting:
            ids = data.draw(st.lists(st.sampled_from(waiting), unique=True))
            self.queue.remove(np.array(ids, np.int32))
            for one in ids:
                self.drop(one)

    @rule(
        data=st.data(),
        priority=st.sampled_from([0, 34, 35, 36, 100]),
        lifetime=st.sampled_from([np.inf, 0.0, 1.0, 5.0]),
    )
    def set_priority(self, data, priority, lifetime):
        ids = data.draw(st.lists(st.integers(1, self.count), unique=True, max_size=6))
        waiting = np.array([one in self.waiting() for one in ids], bool)
        free = [one for one in ids if one in self.order()]
        self.queue.set_priority(np.array(ids, np.int32), waiting, priority, lifetime)
        for one in free:
            self.drop(one)
        for one in ids:
            self.priority[one] = priority
            self.life[one] = np.inf if priority == DEFAULT_PRIORITY else lifetime
        for one in free:
            self.join(one)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds):
        self.clock.now += seconds
        due = []
        for one in self.order():
            freed, serial = self.freed.get(one, (0, 0))
            due.append((freed + self.life[one], serial, one))
        self.queue.refresh()
        for _, _, one in sorted(entry for entry in due if entry[0] <= self.clock.now):
            self.drop(one)
            self.plain(one)
            self.join(one)

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def agrees(self):
        assert self.queue.ids().tolist() == self.order()
        assert self.queue.parked_ids().tolist() == [one for one, _ in self.parked]
        assert len(self.queue) == len(self.order())
        assert (self.queue.num_parked, self.queue.num_waiting) == (
            len(self.parked),
            len(self.waiting()),
        )
        assert self.queue.priority[1:].tolist() == [self.priority[i + 1] for i in range(self.count)]
        waiting = np.array(self.waiting(), np.int32)
        parked = [one in dict(self.parked) for one in waiting.tolist()]
        assert self.queue.are_parked(waiting).tolist() == parked
        self.queue.check_integrity()


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(
    max_examples=100, stateful_step_count=40, derandomize=True, deadline=None
)


def test_an_id_in_a_band_is_never_parked_whatever_its_old_place_in_the_ring():
    queue = RetainedQueue(1, 3, lambda: 0.0)
    ids = np.array([1, 2, 3], np.int32)
    # Far along the ring, so that later marks lie below the place that id 3 had.
    for _ in range(18):
        queue.push(queue.pop(3))
    queue.set_priority(ids[2:], np.array([True]), 50)
    queue.fence(1)
    while queue._tail > 10:
        queue.remove(ids[:1])
        queue.push(ids[:1])
    assert queue.are_parked(ids).tolist() == [True, False, False]
    queue.remove(ids[2:])
    queue.check_integrity()
