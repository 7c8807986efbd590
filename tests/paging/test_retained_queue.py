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
    """The queue against lists: one per priority, with times."""

    @initialize(count=st.integers(1, 40))
    def begin(self, count):
        self.clock = Clock()
        self.count = count
        self.queue = RetainedQueue(1, count, self.clock)
        self.bands = {DEFAULT_PRIORITY: list(range(1, count + 1))}
        self.priority = dict.fromkeys(range(1, count + 1), DEFAULT_PRIORITY)
        self.life = dict.fromkeys(range(1, count + 1), np.inf)
        self.freed, self.serial = {}, 0

    def order(self):
        return [one for priority in sorted(self.bands) for one in self.bands[priority]]

    def wait(self, one):
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
            self.bands[self.priority[one]].remove(one)
            self.plain(one)

    @rule(data=st.data(), how=st.sampled_from(["push", "distinct", "few", "twice"]))
    def push(self, data, how):
        away = sorted(set(range(1, self.count + 1)) - set(self.order()))
        if not away:
            return
        ids = data.draw(st.permutations(away))[: data.draw(st.integers(0, len(away)))]
        array = np.array(ids, np.int32)
        if how == "twice":
            if ids:
                assert not self.queue.push_if_distinct(np.array([*ids, ids[0]], np.int32))
            return
        if how == "few":
            self.queue.push_few(list(ids))
        elif how == "push":
            self.queue.push(array)
        else:
            assert self.queue.push_if_distinct(array)
        for one in ids:
            self.wait(one)

    @rule(data=st.data())
    def remove(self, data):
        waiting = self.order()
        if waiting:
            ids = data.draw(st.lists(st.sampled_from(waiting), unique=True))
            self.queue.remove(np.array(ids, np.int32))
            for one in ids:
                self.bands[self.priority[one]].remove(one)

    @rule(
        data=st.data(),
        priority=st.sampled_from([0, 34, 35, 36, 100]),
        lifetime=st.sampled_from([np.inf, 0.0, 1.0, 5.0]),
    )
    def set_priority(self, data, priority, lifetime):
        ids = data.draw(st.lists(st.integers(1, self.count), unique=True, max_size=6))
        waiting = np.array([one in self.order() for one in ids], bool)
        self.queue.set_priority(np.array(ids, np.int32), waiting, priority, lifetime)
        for one, waits in zip(ids, waiting):
            if waits:
                self.bands[self.priority[one]].remove(one)
            self.priority[one] = priority
            self.life[one] = np.inf if priority == DEFAULT_PRIORITY else lifetime
        for one, waits in zip(ids, waiting):
            if waits:
                self.wait(one)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds):
        self.clock.now += seconds
        due = []
        for one in self.order():
            freed, serial = self.freed.get(one, (0, 0))
            due.append((freed + self.life[one], serial, one))
        self.queue.refresh()
        for _, _, one in sorted(entry for entry in due if entry[0] <= self.clock.now):
            self.bands[self.priority[one]].remove(one)
            self.plain(one)
            self.bands.setdefault(DEFAULT_PRIORITY, []).append(one)

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def agrees(self):
        assert self.queue.ids().tolist() == self.order()
        assert len(self.queue) == len(self.order())
        assert self.queue.priority[1:].tolist() == [self.priority[i + 1] for i in range(self.count)]
        self.queue.check_integrity()


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(
    max_examples=60, stateful_step_count=30, derandomize=True, deadline=None
)
