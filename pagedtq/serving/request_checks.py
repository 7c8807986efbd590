"""What a block manager asks of requests and counts before it takes anything for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError
from ..paging.arguments import ONLY_BYTES, ONLY_INT, Int32, integer, shown
from ..paging.block_keys import token_array
from .request import Blocks, Request

#: Keys and, for whoever is told, tokens of blocks that are to be published.
Due: TypeAlias = tuple[list[bytes], Int32 | None]
NOTHING_DUE: Due = [], None
#: What every request has.
REQUIRED = "request_id", "num_tokens", "num_computed_tokens", "block_hashes"


def blocks_due(
    request: Request, block_size: int, done: int, num_tokens: int, with_tokens: bool
) -> Due:
    """Return the whole blocks among a request's first tokens, but the first ``done``.

    Drafts are not among a request's tokens yet, so none is in a block that is returned.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a key is not bytes, or a token does not fit int32.
    """
    count = min(num_tokens, known_tokens(request)) // block_size
    if count <= done:
        return NOTHING_DUE
    keys = block_hashes(request, done, count)
    if not with_tokens:
        return keys, None
    try:
        tokens = request.all_token_ids[done * block_size : (done + len(keys)) * block_size]
    except TypeError:
        raise ArgumentTypeError(
            f"request {request.request_id}: all_token_ids must be a sequence of tokens, "
            f"got {type(request.all_token_ids).__name__}"
        ) from None
    array = token_array(f"request {request.request_id}: all_token_ids", tokens)
    if array.size != len(keys) * block_size:
        raise ArgumentError(
            f"request {request.request_id}: all_token_ids ends before the {len(keys)} blocks that "
            f"are due: expected {len(keys) * block_size} tokens from {done * block_size} on, "
            f"got {array.size}"
        )
    return keys, array


def block_hashes(request: Request, first: int, stop: int) -> list[bytes]:
    """Return the hashes of blocks ``[first, stop)``, fewer if the request has no more.

    Raises
    ------
    ArgumentTypeError
        If one is not bytes, or they are no sequence.
    """
    try:
        keys = request.block_hashes[first:stop]
        if type(keys) is not list:
            keys = list(keys)
    except TypeError:
        raise ArgumentTypeError(
            f"request {request.request_id}: block_hashes must be a sequence of bytes, "
            f"got {type(request.block_hashes).__name__}"
        ) from None
    if not ONLY_BYTES.issuperset(map(type, keys)):
        kinds = sorted({type(key).__name__ for key in keys if not isinstance(key, bytes)})
        if kinds:
            raise ArgumentTypeError(
                f"request {request.request_id}: block hashes must be bytes, got {', '.join(kinds)}"
            )
    return keys


def known_tokens(request: Request) -> int:
    """Return how many tokens of a request are known.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If that is no count.
    """
    return checked_count(request.request_id, "num_tokens", request.num_tokens)


def found_pages(request_id: str, blocks: Blocks, num_pages: int) -> Sequence[int]:
    """Return the page ids of blocks that were found for a request in so many pages.

    Raises
    ------
    ArgumentTypeError
        If they are no blocks of a manager, or an id is no integer.
    ArgumentError
        If an id is the null page's or none.
    """
    if not isinstance(blocks, Blocks):
        raise ArgumentTypeError(
            f"request {request_id}: new_computed_blocks must be the Blocks that "
            f"get_computed_blocks returned, got {type(blocks).__name__}"
        )
    pages = blocks.page_ids
    if not ONLY_INT.issuperset(map(type, pages)):
        kinds = sorted({type(page).__name__ for page in pages if type(page) is not int})
        raise ArgumentTypeError(
            f"request {request_id}: page ids of new_computed_blocks must be int, "
            f"got {', '.join(kinds)}"
        )
    if pages and not 0 < min(pages) <= max(pages) < num_pages:
        worst = next(page for page in pages if not 0 < page < num_pages)
        raise ArgumentError(
            f"request {request_id}: page {worst} does not hold block {pages.index(worst)}, pages "
            f"are 1 to {num_pages - 1}; look its blocks up again before it is admitted"
        )
    return pages


def computed_before(request_id: str, num_computed_tokens: int) -> ArgumentError:
    """Return what is raised for a request that has computed tokens, but no page they lie in."""
    return ArgumentError(
        f"request {request_id} holds no blocks, but has num_computed_tokens {num_computed_tokens}; "
        "set it to 0: tokens that were found are num_new_computed_tokens, with their blocks, those "
        "that come from elsewhere num_external_computed_tokens"
    )


def another_request(request_id: str) -> ArgumentError:
    """Return what is raised for a request that has the name of another one."""
    return ArgumentError(
        f"request {request_id} holds blocks already, as another object of that name; "
        "give each request an id of its own, or free the other one before"
    )


def checked_fraction(name: str, value: float) -> float:
    """Return a fraction in ``[0, 1)``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If it is not.
    """
    number: object = value
    if isinstance(number, bool | np.bool_) or not isinstance(
        number, int | float | np.integer | np.floating
    ):
        raise ArgumentTypeError(f"{name} must be a number in [0, 1), got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        got = shown(value) if isinstance(value, int) else value
        raise ArgumentError(f"{name} must be in [0, 1), got {got}")
    return value


def problem_of(request: object) -> ArgumentTypeError | None:
    """Return why an object is no request, once something about it went wrong; None if it is one.

    A call that reads requests as if they were sound asks this when an attribute was not there, or
    a name was not one. Nothing was taken by then.
    """
    missing = [name for name in REQUIRED if not hasattr(request, name)]
    if missing:
        return ArgumentTypeError(
            f"a request has {', '.join(REQUIRED)}; {type(request).__name__} has no "
            f"{', '.join(missing)}"
        )
    name = request.request_id  # type: ignore[attr-defined]
    try:
        hash(name)
    except TypeError:
        return ArgumentTypeError(f"request_id must be a name, got {type(name).__name__}")
    return None


def checked_count(request_id: str, name: str, value: int) -> int:
    """Return a count of tokens or pages that is not negative.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If it is negative or no integer.
    """
    if type(value) is int and value >= 0:
        return value
    return integer(f"request {request_id}: {name}", value, 0)
