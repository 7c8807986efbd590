"""Tables a block manager can work on."""

from __future__ import annotations

from ..errors import ArgumentError, UnsupportedError
from ..paging import PageTables, SharingOptions
from ..paging.arguments import instance


def tables_for(
    num_blocks: int, block_size: int, enable_caching: bool, tables: PageTables | None
) -> PageTables:
    """Return new tables, or those given if they fit.

    Raises
    ------
    ArgumentTypeError
        If they are none.
    ArgumentError
        If they have other pages, a window, or no sharing although caching is on.
    UnsupportedError
        If they promise what a manager does not keep.
    """
    if tables is None:
        sharing = SharingOptions() if enable_caching else None
        return PageTables(block_size, num_blocks, sharing=sharing)
    instance("tables", tables, PageTables)
    if tables.window_tokens or (enable_caching and tables.prefix is None):
        raise ArgumentError(
            "tables of a block manager have no exact window, and sharing if caching is on"
        )
    if enable_caching and tables.sharing is not None:
        refuse_promises(tables.sharing)
    if (tables.page_size, tables.pool.num_pages) != (block_size, num_blocks):
        raise ArgumentError(
            f"tables have {tables.pool.num_pages} pages of {tables.page_size} tokens, "
            f"expected {num_blocks} of {block_size}"
        )
    return tables


def refuse_promises(sharing: SharingOptions) -> None:
    """Refuse options that tables keep for sequences with tokens, and a manager can not.

    It knows requests by the hashes of their blocks, so there is nothing to compare on a hit; and it
    looks up all but the last token, as a request that is admitted must have one to compute.

    Raises
    ------
    UnsupportedError
        If tokens are to be verified, or whole prompts to be found.
    """
    problems = {
        "verify_tokens=True": sharing.verify_tokens,
        "leave_last=False": not sharing.leave_last,
    }
    met = [option for option, there in problems.items() if there]
    if met:
        raise UnsupportedError(
            f"a block manager finds blocks by their hashes and leaves the last token; it does not "
            f"keep {' or '.join(met)} of its tables; leave that out, or turn caching off"
        )
