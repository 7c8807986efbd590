"""The model of a cache with prefix sharing: what is written depends on all that precedes it.

The byte of a position stands for its whole context: the salt, every token up to it, and, where a
part of the sequence was missing or hidden when it was computed, the moment itself. A page that is
shared where it must not be therefore shows as a wrong byte.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from token_model import Sequence, TokenCache

from pagedtq.paging import SharingOptions

SALTS = (b"", b"", b"", b"a")


class Replay:
    """What the changes of a prefix index add up to: how many pages hold each key."""

    def __init__(self) -> None:
        self.holders: Counter[bytes] = Counter()
        self.chains: dict[bytes, tuple[bytes | None, bytes]] = {}

    def stored(self, keys, parent, tokens):
        size = tokens.size // len(keys)
        for at, key in enumerate(keys):
            self.holders[key] += 1
            named = parent, tokens[at * size : (at + 1) * size].tobytes()
            assert self.chains.setdefault(key, named) == named
            parent = key

    def removed(self, key):
        self.holders[key] -= 1
        assert self.holders[key] >= 0

    def cleared(self):
        self.holders.clear()


class SharedSequence(Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] | None = None
        self.salt = b""
        self.prompt: list[int] = []
        # How often it was cut: it goes on differently after each.
        self.turns = 0

    def fork(self) -> SharedSequence:
        child = super().fork()
        child.ids = None if self.ids is None else list(self.ids)
        child.salt, child.prompt = self.salt, list(self.prompt)
        child.turns = self.turns
        return child

    def next_tokens(self, at: int, n: int) -> list[int]:
        """Return the tokens from position ``at`` on: the prompt's, then some that recur."""
        announced = self.prompt[at : at + n]
        return announced + [(at + i + self.turns) % 3 for i in range(len(announced), n)]

    @property
    def pruned(self) -> bool:
        return bool(self.evicted) or self.keep < self.start


class SharingCache(TokenCache):
    """A `TokenCache` whose sequences are opened with tokens."""

    def __init__(
        self, page_size, num_pages, window=0, num_sinks=0, num_slots=0, num_host_pages=0, **options
    ):
        super().__init__(
            page_size,
            num_pages,
            window,
            num_sinks,
            num_slots,
            sharing=SharingOptions(**options),
            num_host_pages=num_host_pages,
        )
        self.contexts: dict[object, int] = {}
        self.hits = 0
        self.replay = self.tables.prefix.observer = Replay()

    def open_with(self, prompt: list[int] | None, salt: bytes = b"") -> int:
        sequence = SharedSequence()
        if prompt is None:
            seq_id = self.tables.open()
        else:
            found = self.tables.num_shared_tokens(prompt, salt=salt)
            seq_id = self.tables.open(prompt, salt=salt)
            length = int(self.tables.lengths([seq_id])[0])
            assert length == found
            assert length < max(len(prompt), 1)
            assert length % self.tables.page_size == 0
            self.hits += length
            sequence.salt, sequence.prompt = salt, list(prompt)
            sequence.ids = prompt[:length]
            sequence.tokens = self.written(sequence, [], sequence.ids, False)
        self.model[seq_id] = sequence
        return seq_id

    def written(self, sequence, before, ids, pruned) -> list[int]:
        """Return the bytes of tokens that follow those whose bytes are ``before``."""
        tokens, context = [], (before[-1] if before else ("salt", sequence.salt))
        for token in ids:
            key = (context, token, len(self.contexts) if pruned else None)
            context = self.contexts.setdefault(key, len(self.contexts))
            tokens.append(context)
        return tokens

    def _tokens_of(self, counts):
        ids, tokens = [], []
        for seq_id, n in counts.items():
            sequence = self.model[seq_id]
            at = len(sequence.tokens)
            new = sequence.next_tokens(at, n)
            ids += new
            if sequence.ids is None:
                tokens += [-100 - self.next_token - i for i in range(n)]
                self.next_token += n
            else:
                tokens += self.written(sequence, sequence.tokens, new, sequence.pruned)
        return np.array(ids, np.int64), np.array(tokens, np.int64)

    def append(self, counts, abort=False, kept=None):
        lengths = {seq_id: len(self.model[seq_id].tokens) for seq_id in counts}
        done = super().append(counts, abort, kept)
        for seq_id, length in lengths.items():
            sequence = self.model[seq_id]
            if sequence.ids is not None:
                sequence.ids += sequence.next_tokens(length, len(sequence.tokens) - length)
        return done

    def truncate(self, seq_id, length):
        sequence = self.model[seq_id]
        before = len(sequence.tokens)
        super().truncate(seq_id, length)
        if len(sequence.tokens) < before:
            sequence.prompt = sequence.prompt[:length]
            sequence.turns += 1
        if sequence.ids is not None:
            del sequence.ids[len(sequence.tokens) :]

    def check(self):
        super().check()
        prefix = self.tables.prefix
        held = Counter(prefix.key_of(page) for page in np.flatnonzero(prefix.held).tolist())
        assert held == +self.replay.holders
        assert len(prefix) == len(held)
