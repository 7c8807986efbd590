"""Random operations on a small pool under pressure, for a million of them; see `test_soak`.

One integer per token stands for its bytes, in every page of the device and of the host. It is a
hash of all that precedes the token, as its keys and values are functions of that; so a page that is
shared, reused, swapped or fenced wrongly shows as a wrong integer. Preemption is heavy: whatever
does not fit sends a random sequence to the host, or closes it and begins it again. With `Faults`
allocations fail now and then; the call has then changed nothing, and is repeated.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from pagedtq.errors import CapacityError
from pagedtq.paging import KeepFirstLast, PageTables, SharingOptions, eviction
from pagedtq.serving import BlockRemoved, BlockStored, EventLog
from tests.paging.faults import Fault, Faults
from tests.table_snapshot import logical

SIZE = 4
#: Prompts of one family begin alike.
FAMILIES, LONGEST, MOST = 12, 160, 90
FREE, MODULUS = -1, (1 << 61) - 1


class Member:
    """One sequence of the model: token ids, what stands for its bytes, and its prompt."""

    def __init__(self, prompt: list[int]) -> None:
        self.ids: list[int] = []
        self.values: list[int] = []
        self.prompt = prompt

    def fork(self) -> Member:
        child = Member(self.prompt)
        child.ids, child.values = self.ids[:], self.values[:]
        return child

    def cut(self, length: int) -> None:
        del self.ids[length:], self.values[length:]
        self.prompt = self.prompt[:length]


class Soak:
    """Tables, their bytes, and the model.

    Parameters
    ----------
    seed : int
        Decides every operation.
    num_pages, num_host_pages, num_slots : int
        Small pools.
    faults : Faults, optional
        Armed already.
    """

    #: No call makes more allocations, but for those that let arrays grow.
    MOST_ALLOCATIONS = 4

    def __init__(
        self,
        seed: int,
        num_pages: int = 1000,
        num_host_pages: int = 500,
        num_slots: int = 64,
        faults: Faults | None = None,
    ) -> None:
        self.rng, self.faults = random.Random(seed), faults
        self.tables = PageTables(
            SIZE, num_pages, SIZE, 2, num_slots, SharingOptions(), num_host_pages
        )
        self.log = self.tables.prefix.observer = EventLog(SIZE)
        self.holders: Counter[bytes] = Counter()
        self.pages = np.full((num_pages, SIZE), FREE, np.int64)
        self.host = np.full((num_host_pages + 1, SIZE), FREE, np.int64)
        self.members: dict[int, Member] = {}
        self.live: list[int] = []
        self.away: list[int] = []
        self.swaps: list = []
        self.fences: list[int] = []
        self.serial = 0
        self.done: Counter[str] = Counter()

    def run(self, operations: int, check_every: int) -> None:
        """Do so many operations, end everything, and check that nothing is left."""
        self.work(operations, check_every)
        self.drain()

    def work(self, operations: int, check_every: int) -> None:
        kinds = {
            self.decode: 34,
            self.append: 12,
            self.open: 14,
            self.fork: 5,
            self.truncate: 6,
            self.evict: 4,
            self.preempt: 6,
            self.resume: 8,
            self.end_swap: 5,
            self.fence: 3,
            self.close: 3,
        }
        actions, weights = list(kinds), list(kinds.values())
        for number in range(operations):
            action = self.rng.choices(actions, weights)[0]
            action()
            self.done[action.__name__] += 1
            if self.live and number % 20 == 0:
                self.read(self.rng.choice(self.live))
            if number % check_every == 0:
                self.check()

    def call(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Call; if an allocation fails, nothing has changed, and the call is repeated."""
        due = self.faults and self.faults.fails_at - self.faults.count <= self.MOST_ALLOCATIONS
        before = logical(self.tables) if due else None
        try:
            return operation(*arguments)
        except Fault:
            self.done["faults"] += 1
            if before is not None:
                self.done["faults compared"] += 1
                assert logical(self.tables) == before
            return operation(*arguments)

    # -- writing -------------------------------------------------------------------------------

    def decode(self) -> None:
        """Append a token to each of a batch."""
        self.grow(dict.fromkeys(self.rng.sample(self.live, min(len(self.live), 12)), 1))

    def append(self) -> None:
        if self.live:
            self.grow({self.rng.choice(self.live): self.rng.randint(0, 3 * SIZE)})

    def open(self) -> None:
        if len(self.members) >= MOST:
            self.close()
            return
        length, family = self.rng.randint(1, LONGEST), self.rng.randrange(FAMILIES)
        prompt = [1000 * family + at for at in range(length)]
        if self.rng.random() < 0.5:
            at = self.rng.randrange(length)
            prompt[at:] = [token + 100_000 for token in prompt[at:]]
        self.begin(prompt)

    def begin(self, prompt: list[int]) -> None:
        seq_id = self.call(self.tables.open, prompt)
        member = self.members[seq_id] = Member(prompt)
        member.ids = prompt[: self.tables.length_of(seq_id)]
        member.values = self.values(seq_id, [], member.ids)
        self.live.append(seq_id)
        self.done["tokens found"] += len(member.ids)
        self.read(seq_id)
        self.grow({seq_id: len(prompt) - len(member.ids)})

    def values(self, seq_id: int, before: list[int], ids: list[int]) -> list[int]:
        """Return what stands for the bytes of tokens behind others."""
        values, context = [], before[-1] if before else 7
        row = self.tables._row_of(seq_id)
        if self.tables._evicted[row] or self.tables._keep[row] < self.tables._start[row]:
            # They depend on what is missing: nobody else has the same.
            self.serial += 1
            context = (context + 31 * self.serial) % MODULUS
        for token in ids:
            context = (context * 1_000_003 + token + 1) % MODULUS
            values.append(context)
        return values

    def grow(self, counts: dict[int, int]) -> None:
        tables, ids, values = self.tables, [], []
        for seq_id, count in counts.items():
            member = self.members[seq_id]
            new = member.prompt[len(member.ids) : len(member.ids) + count]
            new = new + [self.rng.randrange(2) for _ in range(count - len(new))]
            ids.append(new)
            values.append(self.values(seq_id, member.values, new))
        try:
            plan = self.call(tables.reserve, list(counts), list(counts.values()), list(chain(*ids)))
        except CapacityError as error:
            assert error.need > error.free
            self.done["did not fit"] += 1
            self.preempt()
            return
        self.pages[plan.new_pages] = FREE
        self.pages[plan.cow_dst] = self.pages[plan.cow_src]
        self.pages.ravel()[plan.slot_mapping] = list(chain(*values))
        if self.rng.random() < 0.05:
            self.freed(tables.abort(plan))
            self.done["aborted"] += 1
            return
        tables.commit(plan)
        for seq_id, new, value in zip(counts, ids, values, strict=True):
            self.members[seq_id].ids += new
            self.members[seq_id].values += value

    def fork(self) -> None:
        if self.live and len(self.members) < MOST:
            seq_id = self.rng.choice(self.live)
            child = self.call(self.tables.fork, seq_id)
            self.members[child] = self.members[seq_id].fork()
            self.live.append(child)

    def truncate(self) -> None:
        if not self.live:
            return
        seq_id = self.rng.choice(self.live)
        member = self.members[seq_id]
        length = self.rng.randint(max(0, len(member.ids) - 4 * SIZE), len(member.ids))
        block, inside = divmod(length, SIZE)
        if inside and not self.tables.block_table([seq_id])[0, block]:
            length = block * SIZE
        self.freed(self.tables.truncate(seq_id, length))
        if length < len(member.ids):
            member.cut(length)

    def evict(self) -> None:
        """Drop single blocks, or all but the first and last tokens."""
        if not self.live:
            return
        seq_id = self.rng.choice(self.live)
        tables = self.tables
        if self.rng.random() < 0.5:
            plan = KeepFirstLast(self.rng.randint(0, 8), self.rng.randint(8, 60)).plan(
                tables, seq_id
            )
            self.freed(eviction.apply(tables, plan))
        else:
            last = tables.state(seq_id).ring_start // SIZE
            blocks = np.flatnonzero(tables.block_table([seq_id])[0, :last])
            chosen = self.rng.sample(blocks.tolist(), min(2, blocks.size))
            self.freed(tables.evict(seq_id, chosen))

    def close(self) -> None:
        if self.live:
            self.remove(self.live, self.rng.randrange(len(self.live)))
        if self.away and self.rng.random() < 0.2:
            self.remove(self.away, self.rng.randrange(len(self.away)))

    def remove(self, place: list[int], index: int) -> Member:
        seq_id = place.pop(index)
        self.freed(self.tables.close(seq_id))
        return self.members.pop(seq_id)

    # -- preemption ----------------------------------------------------------------------------

    def preempt(self) -> None:
        """Send a sequence to the host, or close it and begin it again later with its tokens."""
        if not self.live:
            return
        index = self.rng.randrange(len(self.live))
        if self.rng.random() < 0.7:
            chosen = [self.live[index]]
            if self.rng.random() < 0.3:
                chosen = self.rng.sample(self.live, min(3, len(self.live)))
            try:
                plan = self.call(self.tables.begin_swap_out, chosen)
            except CapacityError:
                self.done["host full"] += 1
            else:
                self.live = [seq_id for seq_id in self.live if seq_id not in chosen]
                self.start(plan)
                return
        member = self.remove(self.live, index)
        self.done["recomputed"] += 1
        if len(self.members) < MOST // 2:
            self.begin(member.ids or [1])

    def resume(self) -> None:
        if not self.away:
            return
        chosen = self.rng.sample(self.away, min(self.rng.randint(1, 3), len(self.away)))
        try:
            plan = self.call(self.tables.begin_swap_in, chosen)
        except CapacityError:
            self.done["device full"] += 1
            return
        self.done["pages reused"] += plan.num_reused
        self.done["pages copied back"] += plan.pages.size
        self.away = [seq_id for seq_id in self.away if seq_id not in chosen]
        self.start(plan)

    def start(self, plan) -> None:
        early = self.rng.random() < 0.5
        if early:
            self.copy(plan)
        self.swaps.append((plan, early))
        if len(self.swaps) > 3:
            self.end_swap()

    def end_swap(self) -> None:
        if not self.swaps:
            return
        plan, copied = self.swaps.pop(self.rng.randrange(len(self.swaps)))
        out = plan.direction == "out"
        commit = self.rng.random() < 0.9
        if commit:
            if not copied:
                self.copy(plan)
            self.freed(self.tables.commit_swap(plan))
            self.done["swapped " + plan.direction] += plan.seq_ids.size
        else:
            self.freed(self.tables.abort_swap(plan))
            self.host[1:][self.tables.host.ref_counts[1:] == 0] = FREE
        # Out and committed, or in and given up: on the host.
        (self.away if out == commit else self.live).extend(plan.seq_ids.tolist())

    def copy(self, plan) -> None:
        if plan.direction == "out":
            self.host[plan.host_pages] = self.pages[plan.pages]
        else:
            self.pages[plan.pages] = self.host[plan.host_pages]

    def fence(self) -> None:
        if self.fences and (len(self.fences) > 2 or self.rng.random() < 0.6):
            index = self.rng.randrange(len(self.fences))
            self.freed(self.tables.fences.close(self.fences.pop(index)))
        else:
            self.fences.append(self.tables.fences.open())

    def digest(self) -> str:
        """Name what all operations led to: books, bytes, model, events, and counts."""
        values = {seq_id: member.values for seq_id, member in self.members.items()}
        books = repr(
            (logical(self.tables, elsewhere=True), list(self.done.items()), values)
        ).encode()
        events = msgspec.msgpack.encode(self.log.take())
        return sha256(
            b"".join((books, events, self.pages.tobytes(), self.host.tobytes()))
        ).hexdigest()

    # -- claims --------------------------------------------------------------------------------

    def freed(self, pages: np.ndarray) -> None:
        """Overwrite what nobody may read any more."""
        gone = pages[~self.tables.prefix.held[pages]]
        if self.fences:
            gone = np.setdiff1d(gone, self.tables.pool.parked_ids())
        self.pages[gone] = FREE

    def read(self, seq_id: int) -> None:
        """Every resident position holds its own value."""
        values = np.array(self.members[seq_id].values, np.int64)
        slots = self.tables.slots_of(seq_id, np.arange(values.size))
        here = slots >= 0
        assert np.array_equal(self.pages.ravel()[slots[here]], values[here])

    def check(self) -> None:
        tables = self.tables
        tables.check_integrity()
        ids = list(self.members)
        assert sorted(tables.sequence_ids().tolist()) == sorted(ids)
        assert tables.lengths(ids).tolist() == [len(self.members[i].ids) for i in ids]
        for seq_id in self.live:
            self.read(seq_id)
        for seq_id in self.away:
            left = tables._swapped[tables._row_of(seq_id)]
            values = np.array(self.members[seq_id].values, np.int64)
            at = np.arange(values.size)
            pages = left.host_pages[at // SIZE]
            found = self.host[pages, at % SIZE]
            assert np.array_equal(found[pages > 0], values[pages > 0])
        self.replay()

    def replay(self) -> None:
        """Events add up to the prefix map."""
        for event in self.log.take():
            if isinstance(event, BlockStored):
                self.holders.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.holders.subtract(event.block_hashes)
            else:
                self.holders.clear()
        prefix = self.tables.prefix
        held = Counter(prefix.key_of(page) for page in np.flatnonzero(prefix.held).tolist())
        assert held == +self.holders
        self.holders = held

    def drain(self) -> None:
        """End everything; nothing is left."""
        while self.swaps:
            self.end_swap()
        while self.live:
            self.remove(self.live, 0)
        while self.away:
            self.remove(self.away, 0)
        while self.fences:
            self.freed(self.tables.fences.close(self.fences.pop()))
        self.check()
        tables = self.tables
        assert tables.pool.num_used == tables.windows.num_used == 0
        assert tables.host.num_used == tables.host.rings.num_used == 0
        assert tables.pool.num_free == tables.pool.num_pages - 1
        assert tables.reset_prefix_cache()
        assert tables.windows.num_records_used == 0
        self.replay()
        assert not self.holders
