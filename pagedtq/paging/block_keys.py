"""Keys of blocks: chained hashes of their tokens, and of what else decides their keys and values.

The key of a block is ``H(key of the block before | its tokens | extras)``, the parent of block 0
being ``H("pagedtq.prefix.1")``; tokens are raw little-endian int32. Extras are there for block 0 of
a salted sequence and for blocks with an extra key: the salt's length in four little-endian
bytes, the salt (block 0 only), the extra key. Everything before them has a fixed length, so two
different inputs never meet in one message. Nothing depends on the process or on `hash`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError, TokenRangeError
from .arguments import MAX_PAGE_SIZE, ONLY_BYTES, Int32, integer, integer_array, shown

HashName: TypeAlias = Literal["sha256", "blake2b"]
Hasher: TypeAlias = Callable[[bytes], Any]

#: Bytes of a key made here; keys made elsewhere may have any length.
KEY_BYTES = 32
INT32 = np.iinfo(np.int32)
#: How token ids are kept where they will be hashed.
RAW_TOKENS = np.dtype("<i4")


class BlockHasher:
    """Hashes chains of blocks.

    Parameters
    ----------
    page_size : int
        Tokens of a block.
    algorithm : {"sha256", "blake2b"}
        The hash; BLAKE2b with 32 bytes.

    Attributes
    ----------
    root : bytes
        The parent of every block 0.
    """

    def __init__(self, page_size: int, algorithm: HashName = "sha256") -> None:
        self.page_size = integer("page_size", page_size, 1, MAX_PAGE_SIZE)
        self._hash: Hasher
        if algorithm == "sha256":
            self._hash = hashlib.sha256
        elif algorithm == "blake2b":
            self._hash = _blake2b
        else:
            raise unknown_hash(algorithm)
        # A block as one element of an array, which becomes the bytes of its tokens.
        self._block = np.dtype((np.void, 4 * self.page_size))
        self.root: bytes = self._hash(b"pagedtq.prefix.1").digest()

    def chain(
        self,
        tokens: Int32,
        parent: bytes | None = None,
        extras: Mapping[int, bytes] | None = None,
        first_block: int = 0,
    ) -> list[bytes]:
        """Return the keys of the whole blocks of some tokens.

        Parameters
        ----------
        tokens : int32[n]
            Tokens from the start of block ``first_block`` on.
        parent : bytes, optional
            Key of the block before; the root by default.
        extras : mapping of block to bytes, optional
            As `extras_of` returns it.
        first_block : int
            Index of the first block in its sequence, which ``extras`` count by.
        """
        size, hashed = self.page_size, self._hash
        count = len(tokens) // size
        whole = np.ascontiguousarray(tokens[: count * size], RAW_TOKENS)
        blocks = whole.view(self._block).tolist()
        key = self.root if parent is None else parent
        if not extras:
            return [key := hashed(key + block).digest() for block in blocks]
        return [
            key := hashed(key + block + extras.get(at, b"")).digest()
            for at, block in enumerate(blocks, first_block)
        ]

    def extend(self, chains: Sequence[list[bytes]], blocks: Sequence[bytes]) -> list[bytes]:
        """Append to each of several chains the key of its next block; return those keys.

        Parameters
        ----------
        chains : sequence of list of bytes
            Keys of the blocks before, each a list of its own.
        blocks : sequence of bytes
            The tokens of each block, as they are hashed.
        """
        hashed, root = self._hash, self.root
        added = []
        for keys, block in zip(chains, blocks, strict=True):
            key = hashed((keys[-1] if keys else root) + block).digest()
            keys.append(key)
            added.append(key)
        return added


def unknown_hash(algorithm: object) -> ArgumentError:
    """Return what is raised for a hash that is none of ours."""
    got = repr(algorithm) if isinstance(algorithm, str) else type(algorithm).__name__
    return ArgumentError(f"hash must be 'sha256' or 'blake2b', got {got}")


def extras_of(salt: bytes, extra_keys: Mapping[int, bytes] | None) -> dict[int, bytes]:
    """Return what salt and extra keys add to the messages of their blocks.

    Parameters
    ----------
    salt : bytes
        Separates tenants: sequences with different salts never share a page.
    extra_keys : mapping of block to bytes, optional
        What else decides the keys and values of a block (an adapter, an image), opaque.

    Raises
    ------
    ArgumentTypeError
        If one is not bytes, or a block is no integer.
    ArgumentError
        If a block is negative.
    """
    if not isinstance(salt, bytes):
        raise ArgumentTypeError(f"salt must be bytes, got {type(salt).__name__}")
    extras: dict[int, bytes] = {}
    if extra_keys is not None:
        if not isinstance(extra_keys, Mapping):
            raise ArgumentTypeError(
                f"extra_keys must map blocks to bytes, got {type(extra_keys).__name__}"
            )
        for block, key in extra_keys.items():
            if not isinstance(key, bytes):
                raise ArgumentTypeError(
                    f"the extra key of block {block} must be bytes, got {type(key).__name__}"
                )
            extras[integer("the block of an extra key", block, 0)] = bytes(4) + key
    if salt:
        plain = extras.get(0, bytes(4))[4:]
        extras[0] = len(salt).to_bytes(4, "little") + salt + plain
    return extras


def key_list(name: str, keys: Sequence[bytes] | bytes | str) -> list[bytes]:
    """Return keys of blocks as a list.

    Raises
    ------
    ArgumentTypeError
        If they are no sequence, or one is not bytes.
    """
    if isinstance(keys, bytes | str):
        raise ArgumentTypeError(f"{name} must be a sequence of bytes, got one key")
    try:
        listed = list(keys)
    except TypeError:
        raise ArgumentTypeError(
            f"{name} must be a sequence of bytes, got {type(keys).__name__}"
        ) from None
    for key in () if ONLY_BYTES.issuperset(map(type, listed)) else listed:
        if not isinstance(key, bytes):
            raise ArgumentTypeError(f"a block key must be bytes, got {type(key).__name__}")
    return listed


def token_array(name: str, tokens: Sequence[int] | npt.NDArray[Any]) -> Int32:
    """Return token ids as ``int32[n]``.

    Raises
    ------
    ArgumentTypeError
        If one is no integer.
    TokenRangeError
        If one does not fit int32.
    ArgumentError
        If they are not one-dimensional.
    """
    if isinstance(tokens, np.ndarray) and tokens.dtype == RAW_TOKENS and tokens.ndim == 1:
        return tokens
    # Not as int64: there the largest ones would pass for small negative ones.
    wide = integer_array(name, tokens)
    if wide.size and (int(wide.min()) < INT32.min or int(wide.max()) > INT32.max):
        index = int(np.flatnonzero((wide < INT32.min) | (wide > INT32.max))[0])
        token = int(wide[index])
        raise TokenRangeError(f"{name} must fit int32, got {shown(token)} at {index}", token, index)
    return wide.astype(np.int32)


def _blake2b(data: bytes) -> Any:
    return hashlib.blake2b(data, digest_size=KEY_BYTES)
