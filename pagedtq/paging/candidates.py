"""Which blocks of live sequences may be evicted at all, whatever a policy thinks of them.

A block may go if it is resident, whole, and wholly below the exact window; if nobody outside the
batch owns its page (another sequence, or a pin); and if its page is not in flight. Everything here
is a question: nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .arguments import Bools, Int32, Int64, Integers, integer, integers

if TYPE_CHECKING:
    from .page_tables import PageTables


class BlockList(NamedTuple):
    """Blocks of a batch, sequence by sequence, ascending within each.

    Attributes
    ----------
    members : int64[n]
        The sequence of each: an index into the batch.
    blocks : int64[n]
        Block index.
    pages : int32[n]
        Page that holds it.
    """

    members: Int64
    blocks: Int64
    pages: Int32

    def where(self, chosen: Bools | Int64) -> BlockList:
        """Return some of them."""
        return BlockList(self.members[chosen], self.blocks[chosen], self.pages[chosen])


def sealed_blocks(
    tables: PageTables, seq_ids: Integers, first_tokens: int = 0, last_tokens: int = 0
) -> BlockList:
    """Return the resident blocks of a batch that lie wholly in pages.

    Parameters
    ----------
    tables : PageTables
        The tables.
    seq_ids : integers [B]
        Sequences, each at most once.
    first_tokens, last_tokens : int
        Leave out blocks that hold one of so many first or last tokens.

    Raises
    ------
    UnknownSequence, ArgumentError, ArgumentTypeError
        For bad ids or counts.
    """
    first_tokens = integer("first_tokens", first_tokens, 0)
    last_tokens = integer("last_tokens", last_tokens, 0)
    ids = integers("seq_ids", seq_ids)
    tables.check_distinct(ids)
    table = tables.block_table(ids)
    # With an overlay the codes end where the ring starts; without a window that is the length.
    reads = tables.reads(ids, overlay=True)
    size = tables.page_size
    stop = np.maximum(np.minimum(reads.stop, reads.kv_lens - last_tokens), 0) // size
    block = np.arange(table.shape[1])
    chosen = (block < stop[:, None]) & (block >= -(-first_tokens // size)) & (table > 0)
    members, blocks = np.nonzero(chosen)
    return BlockList(members, blocks, table[members, blocks])


def evictable_blocks(
    tables: PageTables, seq_ids: Integers, first_tokens: int = 0, last_tokens: int = 0
) -> BlockList:
    """Return the blocks of a batch that may be evicted, parameters as for `sealed_blocks`.

    A page that several sequences of the batch share is listed once for each of them; evicting it
    frees it only if all of them let go.
    """
    found = sealed_blocks(tables, seq_ids, first_tokens, last_tokens)
    _, inverse, owners = np.unique(found.pages, return_inverse=True, return_counts=True)
    free_to_go = owners[inverse] == tables.pool.ref_counts[found.pages]
    busy = tables.pages_in_flight()
    if busy.size:
        free_to_go &= ~np.isin(found.pages, busy)
    return found.where(free_to_go)
