"""A plain dict model of a whole cache, driven beside the real one and compared to the byte.

`CheckedCache` performs every operation on a `PagedKVCache` and on Python lists, and `check` proves
that the cache holds, loads, scores and attends over exactly what the model says. The rules of the
exact window (L, c, r, s) are written out here a second time, position by position.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

from pagedtq import KeepFirstLast, PagedKVCache
from pagedtq.errors import (
    ArgumentError,
    CapacityError,
    EvictedError,
    StepError,
    SwappedError,
)
from tests.cache.bank import HEADS, LAYERS, bank_of, differences, make_config, snapshot, token_bytes
from tests.reference import relative_error, scores, softmax_attention

GROUP = 2
BOUND = 1e-5


class Sequence:
    """One sequence of the model: token numbers of the bank, and what may be read of them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.evicted: set[int] = set()
        self.keep = self.start = 0
        self.coded = self.ring = self.sinks = 0

    def append(self, tokens: list[int], page_size: int, window: int, num_sinks: int) -> None:
        old, new = len(self.tokens), len(self.tokens) + len(tokens)
        self.tokens += tokens
        if not window:
            self.coded = self.ring = new
            return
        self.coded = max(self.coded, page_size * (new // page_size))
        self.ring = max(self.ring, new - window)
        if self.sinks == old:
            self.sinks = min(new, num_sinks)

    def cut(self, length: int, page_size: int) -> None:
        del self.tokens[length:]
        self.coded, self.ring = min(self.coded, length), min(self.ring, length)
        self.sinks = min(self.sinks, length)
        self.evicted = {block for block in self.evicted if block * page_size < length}
        self.start = min(self.start, self.ring)
        self.keep = min(self.keep, self.start)

    @property
    def state(self) -> tuple[int, int, int, int]:
        return len(self.tokens), self.coded, self.ring, self.sinks


class OpenStep:
    """The step that is open: members and tokens, stored layers, and the members as they were."""

    def __init__(self, chunks: dict[int, list[int]], before: dict[int, Sequence]) -> None:
        self.chunks = chunks
        self.stored: set[int] = set()
        self.before = before

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks.values() for token in chunk]


class CheckedCache:
    """A real cache and its model.

    Parameters
    ----------
    name, kv_dtype, head_dim
        Which bank of tokens, see `bank_of`.
    page_size, window : int
        P and W.
    num_pages, num_slots : int
        Small pools, so that they run out.
    """

    def __init__(
        self,
        name: str,
        kv_dtype: str,
        page_size: int,
        window: int,
        num_pages: int = 24,
        num_slots: int = 4,
        head_dim: int = 16,
        seed: int = 0,
        num_host_pages: int = 20,
        **fields,
    ) -> None:
        self.bank = bank_of(name, kv_dtype, head_dim)
        config = make_config(
            name,
            kv_dtype=kv_dtype,
            head_dim=head_dim,
            page_size=page_size,
            window=window,
            num_pages=num_pages,
            num_window_slots=num_slots,
            num_host_pages=num_host_pages,
            **fields,
        )
        self.cache = PagedKVCache(config, num_threads=1, debug=True)
        self.config = config
        self.sequences: dict[int, Sequence] = {}
        self.step: OpenStep | None = None
        # Sequences on the host, and swaps under way: plans, and whether they are copied.
        self.away: set[int] = set()
        self.swaps: list[list] = []
        # Apart, so that checking does not change what happens next.
        self.token_rng, self.check_rng = np.random.default_rng(seed).spawn(2)

    # -- operations --------------------------------------------------------------------------

    def open(self) -> int:
        seq_id = self.cache.open()
        self.sequences[seq_id] = Sequence()
        return seq_id

    def append(self, counts: dict[int, int]) -> bool:
        """Append in one call; False if the pools were too small, and nothing changed."""
        chunks = self._draw(counts)
        tokens = [token for chunk in chunks.values() for token in chunk]
        keys, values = self.bank.keys[:, tokens], self.bank.values[:, tokens]
        single = len(counts) == 1
        ids = next(iter(counts)) if single else list(counts)
        numbers = None if single else list(counts.values())
        if not self._fits(lambda: self.cache.append(ids, keys, values, numbers)):
            return False
        self._extend(chunks)
        return True

    def begin_step(self, counts: dict[int, int]) -> bool:
        chunks = self._draw(counts)
        if not self._fits(lambda: self.cache.begin_step(list(counts), list(counts.values()))):
            return False
        before = {seq_id: copy.deepcopy(self.sequences[seq_id]) for seq_id in chunks}
        self.step = OpenStep(chunks, before)
        self._extend(chunks)
        return True

    def store(self, layer: int) -> None:
        tokens = self.step.tokens
        self.cache.store(layer, self.bank.keys[layer, tokens], self.bank.values[layer, tokens])
        self.step.stored.add(layer)

    def commit(self) -> None:
        for layer in self.missing_layers():
            self.store(layer)
        self.cache.commit()
        self.step = None

    def abort_step(self) -> None:
        self.cache.abort_step()
        for seq_id, old in self.step.before.items():
            self.sequences[seq_id].cut(len(old.tokens), self.config.page_size)
        self.step = None

    def missing_layers(self) -> list[int]:
        layers = [layer for layer in range(LAYERS) if layer not in self.step.stored]
        return self.check_rng.permutation(layers).tolist()

    def fork(self, seq_id: int) -> int:
        child = self.cache.fork(seq_id)
        self.sequences[child] = copy.deepcopy(self.sequences[seq_id])
        return child

    def truncate(self, seq_id: int, length: int) -> None:
        block, offset = divmod(length, self.config.page_size)
        if offset and block in self.sequences[seq_id].evicted:
            self.refuses(EvictedError, lambda: self.cache.truncate(seq_id, length))
            return
        self.cache.truncate(seq_id, length)
        self.sequences[seq_id].cut(length, self.config.page_size)

    def evictable(self, seq_id: int) -> list[int]:
        sequence = self.sequences[seq_id]
        blocks = range(sequence.ring // self.config.page_size)
        return [block for block in blocks if block not in sequence.evicted]

    def evict(self, seq_id: int, blocks: list[int]) -> None:
        self.cache.evict(seq_id, blocks)
        self.sequences[seq_id].evicted |= set(blocks)
        if 0 in blocks:
            self.sequences[seq_id].sinks = 0

    def refuse_eviction(self, seq_id: int) -> None:
        """The first block that the ring holds, or the open one, cannot be evicted."""
        sequence, size = self.sequences[seq_id], self.config.page_size
        block = sequence.ring // size
        if block * size < len(sequence.tokens):
            self.refuses(ArgumentError, lambda: self.cache.evict(seq_id, [block]))

    def keep_first_last(self, seq_id: int, first: int, last: int) -> None:
        sequence, size = self.sequences[seq_id], self.config.page_size
        self.cache.evict(seq_id, KeepFirstLast(first, last))
        start = min(max(len(sequence.tokens) - last, 0), sequence.ring)
        unread = set(range(first, start))
        sequence.keep, sequence.start = (first, start) if unread else (0, 0)
        for block in range(start // size):
            if set(range(block * size, (block + 1) * size)) <= unread:
                sequence.evicted.add(block)
        if 0 in sequence.evicted:
            sequence.sinks = 0

    def close(self, seq_ids: list[int]) -> None:
        self.cache.close(seq_ids)
        for seq_id in seq_ids:
            del self.sequences[seq_id]
        self.away -= set(seq_ids)

    # -- swaps -------------------------------------------------------------------------------

    @property
    def moving(self) -> set[int]:
        return {seq_id for plan, _ in self.swaps for seq_id in plan.seq_ids.tolist()}

    def usable(self) -> list[int]:
        """Sequences that can be changed."""
        hidden = self.away | self.moving
        return [seq_id for seq_id in self.sequences if seq_id not in hidden]

    def on_host(self) -> list[int]:
        return sorted(self.away - self.moving)

    def begin_swap(self, out: bool, seq_ids: list[int]) -> bool:
        begin = self.cache.begin_swap_out if out else self.cache.begin_swap_in
        plans: list = []
        if not self._fits(lambda: plans.append(begin(seq_ids))):
            return False
        self.swaps.append([plans[0], False])
        return True

    def copy_swap(self, index: int) -> None:
        """Copy the bytes; twice is as good as once."""
        self.cache.copy_swap(self.swaps[index][0])
        self.swaps[index][1] = True

    def end_swap(self, index: int, commit: bool) -> None:
        plan, copied = self.swaps[index]
        seq_ids, out = set(plan.seq_ids.tolist()), plan.direction == "out"
        if commit:
            if not copied:
                self.refuses(StepError, lambda: self.cache.commit_swap(plan))
                self.copy_swap(index)
            self.cache.commit_swap(plan)
            self.away = self.away | seq_ids if out else self.away - seq_ids
        else:
            self.cache.abort_swap(plan)
        del self.swaps[index]
        self.refuses(StepError, lambda: self.cache.copy_swap(plan))

    def swap(self, out: bool, seq_ids: list[int]) -> bool:
        """Swap in one call."""
        call = self.cache.swap_out if out else self.cache.swap_in
        if not self._fits(lambda: call(seq_ids)):
            return False
        self.away = self.away | set(seq_ids) if out else self.away - set(seq_ids)
        return True

    def refuses_uses(self, seq_id: int) -> None:
        """A sequence on the host can neither be changed nor read."""
        queries = np.zeros((1, HEADS * GROUP, self.config.head_dim), np.float32)
        for call in (
            lambda: self.cache.fork(seq_id),
            lambda: self.cache.truncate(seq_id, 0),
            lambda: self.cache.evict(seq_id, [0]),
            lambda: self.cache.begin_step(seq_id),
            lambda: self.cache.swap_out(seq_id),
            lambda: self.cache.attend(0, queries, seq_id),
            lambda: self.cache.score(0, queries, seq_id),
            lambda: self.cache.load(0, seq_id),
        ):
            self.refuses((SwappedError, StepError), call)

    def refuses(self, error: type[Exception], call) -> None:
        """The call raises and changes nothing."""
        before = snapshot(self.cache)
        with pytest.raises(error):
            call()
        assert differences(before, snapshot(self.cache)) == []

    def refuses_changes(self, seq_id: int) -> None:
        """Inside an open step, whatever would change a sequence is refused."""
        none = np.zeros((LAYERS, 0, HEADS, self.config.head_dim), np.float32)
        for call in (
            lambda: self.cache.fork(seq_id),
            lambda: self.cache.truncate(seq_id, 0),
            lambda: self.cache.evict(seq_id, [0]),
            lambda: self.cache.evict(seq_id, KeepFirstLast(1, 1)),
            lambda: self.cache.close(seq_id),
            lambda: self.cache.append(seq_id, none, none),
            lambda: self.cache.begin_step(seq_id),
        ):
            self.refuses(StepError, call)

    def _draw(self, counts: dict[int, int]) -> dict[int, list[int]]:
        """Pick tokens of the bank for each member."""
        return {
            seq_id: self.token_rng.integers(0, self.bank.count, count).tolist()
            for seq_id, count in counts.items()
        }

    def _extend(self, chunks: dict[int, list[int]]) -> None:
        config = self.config
        for seq_id, chunk in chunks.items():
            self.sequences[seq_id].append(
                chunk, config.page_size, config.window_tokens, config.num_sinks
            )

    def _fits(self, call) -> bool:
        before = snapshot(self.cache)
        try:
            call()
        except CapacityError as error:
            assert error.need > error.free
            assert differences(before, snapshot(self.cache)) == []
            return False
        return True

    # -- claims ------------------------------------------------------------------------------

    def check(self, seq_ids: list[int] | None = None, layers: list[int] | None = None) -> None:
        """Prove that the cache and the model agree, for some sequences and layers or for all."""
        self.cache.check_integrity()
        seq_ids = list(self.sequences) if seq_ids is None else seq_ids
        stats = self.cache.stats()
        assert stats.num_sequences == len(self.sequences)
        assert stats.logical_tokens == sum(len(s.tokens) for s in self.sequences.values())
        assert stats.num_swapped == len(self.away)
        for seq_id in seq_ids:
            assert self.cache.length(seq_id) == len(self.sequences[seq_id].tokens)
            assert tuple(self.cache.state(seq_id)) == self.sequences[seq_id].state
            assert self.cache.is_swapped(seq_id).tolist() == [seq_id in self.away]
        seq_ids = [seq_id for seq_id in seq_ids if seq_id not in self.away]
        for layer in range(LAYERS) if layers is None else layers:
            self._check_layer(layer, seq_ids)

    def _check_layer(self, layer: int, seq_ids: list[int]) -> None:
        hidden = set()
        if self.step is not None and layer not in self.step.stored:
            hidden = {seq_id for seq_id, chunk in self.step.chunks.items() if chunk}
        for seq_id in hidden & set(seq_ids):
            with pytest.raises(StepError):
                self.cache.load(layer, seq_id)
        shown = [seq_id for seq_id in seq_ids if seq_id not in hidden]
        dense = [self._check_load(layer, seq_id) for seq_id in shown]
        self._check_reads(layer, shown, dense)

    def _check_load(self, layer: int, seq_id: int) -> tuple[np.ndarray, ...]:
        """Compare bytes and `load`; return what was loaded."""
        config, sequence = self.config, self.sequences[seq_id]
        tokens = np.array(sequence.tokens, np.int64)
        length, coded, ring, sinks = sequence.state
        overlay = config.has_overlay(layer)
        if not overlay:
            coded = ring = length
            sinks = 0
        positions = np.arange(length)
        resident = ~np.isin(positions // config.page_size, list(sequence.evicted))
        readable = resident & ((positions < sequence.keep) | (positions >= sequence.start))
        # Bytes: every resident token below c holds what it becomes when it is encoded alone.
        in_pages = np.flatnonzero(resident & (positions < coded))
        slots = self.cache.tables.slots_of(seq_id, in_pages)
        for name, rows in self.bank.expected[layer].items():
            np.testing.assert_array_equal(
                token_bytes(self.cache, layer, name, slots), rows[tokens[in_pages]], err_msg=name
            )
        loaded = self.cache.load(layer, seq_id)
        np.testing.assert_array_equal(loaded[2], positions[readable])
        is_exact = ((positions < min(sinks, ring)) | (positions >= ring))[readable]
        for got, exact, decoded in zip(loaded, self.bank.exact[layer], self.bank.decoded[layer]):
            want = np.where(
                is_exact[:, None, None], exact[tokens[readable]], decoded[tokens[readable]]
            )
            np.testing.assert_array_equal(got[is_exact], want[is_exact])
            assert_close(got, want)
        if overlay and coded < length:
            with pytest.raises(ArgumentError, match="exact window only"):
                self.cache.load(layer, seq_id, exact=False)
        else:
            codes = self.cache.load(layer, seq_id, exact=False)
            np.testing.assert_array_equal(codes[2], positions[readable])
            for got, decoded in zip(codes, self.bank.decoded[layer]):
                assert_close(got, decoded[tokens[readable]])
        return loaded

    def _check_reads(self, layer: int, seq_ids: list[int], dense: list) -> None:
        """Compare `attend` and `score` of one query per sequence with float64."""
        dim = self.config.head_dim
        shape = (len(seq_ids), HEADS * GROUP, dim)
        queries = (2 * self.check_rng.standard_normal(shape)).astype(np.float32)
        out, lse = self.cache.attend(layer, queries, seq_ids)
        found = self.cache.score(layer, queries, seq_ids)
        for index, (keys, values, positions) in enumerate(dense):
            at = np.array([len(self.sequences[seq_ids[index]].tokens) - 1])
            want, want_lse = softmax_attention(
                queries[index : index + 1], keys, values, positions, at, dim**-0.5
            )
            assert relative_error(out[index], want[0]) <= BOUND
            np.testing.assert_allclose(lse[index], want_lse[0], rtol=BOUND, atol=10 * BOUND)
            products, places = found.of(index)
            np.testing.assert_array_equal(places, positions)
            self._check_scores(products, queries[index], keys)

    def _check_scores(self, products: np.ndarray, query: np.ndarray, keys: np.ndarray) -> None:
        want = scores(query, keys)
        error = np.linalg.norm(products - want, axis=-1)
        # Products of one or two tokens may cancel; then only the vectors' own size can bound them.
        size = np.linalg.norm(query, axis=-1) * np.linalg.norm(keys)
        assert (error <= BOUND * np.linalg.norm(want, axis=-1) + 1e-6 * size).all()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    """Vector by vector, up to the order of the inverse rotation's float32 sums."""
    assert got.shape == want.shape
    assert relative_error(got, want) <= BOUND
