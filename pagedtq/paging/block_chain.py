"""What is known of a sequence's blocks: their keys, and how prefixes are shared by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from .arguments import Int32, instance
from .block_keys import HashName, key_list, unknown_hash

Tokens = Sequence[int] | npt.NDArray[Any]
NO_TOKENS: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class SharingOptions:
    """How prefixes are shared.

    Parameters
    ----------
    algorithm : {"sha256", "blake2b"}
        Hash of the blocks' tokens.
    leave_last : bool
        Never find the whole of a prompt: at least its last token is computed again, so that there
        is a query to begin with.
    verify_tokens : bool
        Compare the tokens of every block that is found with those wanted.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If there is no such hash, or a choice is not True or False.
    """

    algorithm: HashName = "sha256"
    leave_last: bool = True
    verify_tokens: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.algorithm, str) or self.algorithm not in get_args(HashName):
            raise unknown_hash(self.algorithm)
        for name in ("leave_last", "verify_tokens"):
            instance(name, getattr(self, name), bool)


@dataclass(slots=True)
class BlockChain:
    """What is known of one sequence's blocks.

    Attributes
    ----------
    keys : list of bytes
        Keys of the leading blocks, possibly of more than there are yet.
    extras : dict of block to bytes
        What salt and extra keys add to the hashes.
    prompt : int32[n]
        Tokens announced when the sequence was opened.
    opaque : bool
        Whether the caller makes the keys.
    num_tokens : int
        Tokens that were announced, known or not; what is found stays below.
    """

    keys: list[bytes]
    extras: dict[int, bytes] = field(default_factory=dict)
    prompt: Int32 = field(default_factory=lambda: NO_TOKENS)
    opaque: bool = False
    num_tokens: int = 0

    def copy(self) -> BlockChain:
        """Return a chain that grows on its own."""
        return BlockChain(list(self.keys), self.extras, self.prompt, self.opaque, self.num_tokens)


def opaque_keys(block_keys: Sequence[bytes] | bytes | str) -> list[bytes]:
    """Return keys made by the caller as a list; see `key_list`."""
    return key_list("block_keys", block_keys)
