"""Requests as a block manager sees them, and the blocks it gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError
from ..paging.arguments import NO_SEQUENCES, Int32, instance, integer
from ..paging.block_keys import BlockHasher, extras_of, token_array

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1


class Request(Protocol):
    """What the manager reads of a request; the names are vLLM's, so that its requests do.

    ``all_token_ids`` is read only when events are on, ``skip_reading_prefix_cache`` only if the
    request has it.
    """

    @property
    def request_id(self) -> str:
        """The request's name."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt and what was generated and accepted."""
        ...

    @property
    def num_computed_tokens(self) -> int:
        """Leading tokens whose keys and values are in the cache."""
        ...

    @property
    def block_hashes(self) -> Sequence[bytes]:
        """Keys of the whole blocks of the tokens known."""
        ...

    @property
    def all_token_ids(self) -> Sequence[int] | npt.NDArray[Any]:
        """The tokens known."""
        ...


class ServedRequest:
    """A request that hashes its own blocks, each once.

    Parameters
    ----------
    request_id : str
        Its name.
    token_ids : sequence of int
        The prompt.
    hasher : BlockHasher
        Makes the keys; its page size must be the manager's.
    salt, extra_keys
        As in `PageTables.open`.
    skip_reading_prefix_cache : bool
        Compute everything, but publish it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For a bad name, tokens, hasher, salt or keys.
    """

    def __init__(
        self,
        request_id: str,
        token_ids: Sequence[int] | npt.NDArray[Any],
        hasher: BlockHasher,
        *,
        salt: bytes = b"",
        extra_keys: Mapping[int, bytes] | None = None,
        skip_reading_prefix_cache: bool = False,
    ) -> None:
        if not isinstance(request_id, str):
            raise ArgumentTypeError(f"request_id must be a name, got {type(request_id).__name__}")
        self.request_id = request_id
        self.num_computed_tokens = 0
        self.skip_reading_prefix_cache = skip_reading_prefix_cache
        try:
            self._hasher = instance("hasher", hasher, BlockHasher)
            self._extras = extras_of(salt, extra_keys)
        except (ArgumentError, ArgumentTypeError) as error:
            raise type(error)(f"request {request_id}: {error}") from error
        tokens = token_array(f"request {request_id}: token_ids", token_ids)
        # A copy: what was hashed must not change with the caller's array.
        self._tokens = tokens.copy()
        self.num_tokens = tokens.size
        self.block_hashes: list[bytes] = []
        self._hash_blocks()

    @property
    def all_token_ids(self) -> Int32:
        """The tokens known, ``int32[num_tokens]``."""
        return self._tokens[: self.num_tokens]

    def append(self, token_ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Add tokens; hash the blocks that they complete.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If they are no tokens.
        """
        new = token_array(f"request {self.request_id}: token_ids", token_ids)
        total = self.num_tokens + new.size
        self._grow(total)
        self._tokens[self.num_tokens : total] = new
        self.num_tokens = total
        self._hash_blocks()

    def append_token(self, token_id: int) -> None:
        """Add one token, as a decode step does; see `append`."""
        if type(token_id) is not int or not INT32_MIN <= token_id <= INT32_MAX:
            name = f"request {self.request_id}: token_id"
            token_id = integer(name, token_id, INT32_MIN, INT32_MAX)
        at = self.num_tokens
        if at == self._tokens.size:
            self._grow(at + 1)
        self._tokens[at] = token_id
        self.num_tokens = at + 1
        if not (at + 1) % self._hasher.page_size:
            self._hash_blocks()

    def _grow(self, size: int) -> None:
        if size > self._tokens.size:
            grown = np.empty(max(2 * self._tokens.size, size), np.int32)
            grown[: self.num_tokens] = self.all_token_ids
            self._tokens = grown

    def _hash_blocks(self) -> None:
        """Hash the blocks that are whole and were not before."""
        keys, size = self.block_hashes, self._hasher.page_size
        done, total = len(keys), self.num_tokens
        if total // size > done:
            tokens = self._tokens[done * size : total]
            keys += self._hasher.chain(tokens, keys[-1] if keys else None, self._extras, done)


class Blocks:
    """Page ids of consecutive blocks, with the verbs of vLLM's block lists (one cache group).

    Raises
    ------
    ArgumentTypeError
        If they are no sequence.
    """

    __slots__ = ("page_ids",)

    def __init__(self, page_ids: Sequence[int] = ()) -> None:
        if type(page_ids) is not list and (
            not hasattr(page_ids, "__len__") or isinstance(page_ids, NO_SEQUENCES)
        ):
            raise ArgumentTypeError(
                f"page_ids must be a sequence of page ids, got {type(page_ids).__name__}"
            )
        self.page_ids = page_ids

    @property
    def blocks(self) -> tuple[list[int]]:
        """The page ids by cache group."""
        return (list(self.page_ids),)

    def get_block_ids(self, allow_none: bool = False) -> tuple[list[int]] | None:
        """Return the page ids by cache group; None without any, if that is allowed."""
        return None if allow_none and not self.page_ids else (list(self.page_ids),)

    def __len__(self) -> int:
        return len(self.page_ids)

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks([*self.page_ids, *other.page_ids])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and list(self.page_ids) == list(other.page_ids)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Blocks({list(self.page_ids)})"


class Holding:
    """What a manager knows of a request that holds pages: which object it is, its id and row."""

    __slots__ = ("request", "row", "seq_id")

    def __init__(self, request: Request, seq_id: int, row: int) -> None:
        self.request, self.seq_id, self.row = request, seq_id, row
