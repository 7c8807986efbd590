"""Sharing of pages between sequences that begin with the same tokens.

A sequence opened with tokens (or with the keys of its blocks) begins with the pages that hold its
first blocks already. What it computes itself is published when a step commits, after the bytes are
written; so nothing is found in the step that writes it. A block is published if

* its tokens are known, and all its codes are in its page;
* none of its positions was computed after a part of its sequence was evicted or hidden: such keys
  and values depend on what was left out (the *taint* rule).

Pages keep their block when their last owner goes and lose it when they are taken again, or when a
sequence that was cut inside them writes on. Token ids are kept by page: forks share them, copies
copy them, truncation finds them again, and no prefix is ever hashed twice.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError
from .arguments import Int32, Int64, instance, integer
from .block_chain import BlockChain, SharingOptions, Tokens, opaque_keys
from .block_keys import RAW_TOKENS, BlockHasher, extras_of, token_array
from .exclusive import exclusive
from .prefix_index import PrefixIndex
from .swap_plan import HostPool, SwappedRow, SwapPlan
from .table_views import TableViews
from .twins import Twins

if TYPE_CHECKING:
    from .retention import Retention


class SharedPrefixes(TableViews):
    """Tables whose sequences find and publish pages; see the module.

    Row fields: positions ``[0, known)`` have their token ids in their pages, -1 for a row that is
    opened without; ``[0, prompt_end)`` were announced; ``[0, keyed)`` have keys made by the caller;
    ``published`` blocks were offered to the index; positions from ``taint`` on are tainted, 0 for
    none.
    """

    def __init__(
        self,
        page_size: int,
        num_pages: int,
        window_tokens: int = 0,
        num_sinks: int = 0,
        num_window_slots: int = 0,
        sharing: SharingOptions | None = None,
        num_host_pages: int = 0,
    ) -> None:
        super().__init__(page_size, num_pages, window_tokens, num_sinks, num_window_slots)
        self.sharing = None if sharing is None else instance("sharing", sharing, SharingOptions)
        self.prefix = None if sharing is None else PrefixIndex(num_pages)
        self._hasher = BlockHasher(page_size, sharing.algorithm if sharing else "sha256")
        # Token ids of each page; only rows of pages whose tokens are known mean anything.
        self._page_tokens = np.zeros((num_pages if sharing else 0, page_size), RAW_TOKENS)
        # The same memory by page slot, and a page at a time: an element's Python object is then the
        # bytes to be hashed.
        self._slot_tokens = self._page_tokens.reshape(-1)
        self._page_blocks = self._slot_tokens.view((np.void, 4 * page_size))
        self.host = HostPool(num_host_pages)
        self._twins = Twins(num_pages, num_host_pages + 1)
        # Token ids of each page of the host, as of those of the device.
        host_rows = num_host_pages + 1 if sharing else 0
        self._host_tokens = np.zeros((host_rows, page_size), np.int32)
        self._swapped: dict[int, SwappedRow] = {}
        #: Swaps under way, by the identity of their plans.
        self._swaps: dict[int, SwapPlan] = {}
        #: Tokens that sequences were opened with, and those of them that were found; only grow.
        self.prefix_queries = self.prefix_hits = 0
        self._chains: dict[int, BlockChain] = {}
        #: Priorities and pins, once there are any.
        self.retention: Retention | None = None
        self._num_opaque = 0

    @property
    def prefix_bytes(self) -> int:
        """Bytes of what prefix sharing keeps: index, token ids of pages, keys of sequences.

        0 without it. A key that sequences and index have in common counts once.
        """
        if self.prefix is None:
            return 0
        chains = self._chains.values()
        pending = {key for chain in chains for key in chain.keys if key not in self.prefix}
        prompts = {id(chain.prompt): chain.prompt.nbytes for chain in chains}
        objects = (self._chains, *(chain.keys for chain in chains), *pending)
        return (
            self.prefix.nbytes
            + self._page_tokens.nbytes
            + sum(prompts.values())
            + sum(map(sys.getsizeof, objects))
        )

    @property
    def num_cached_pages(self) -> int:
        """Pages without an owner that hold a block: free, and found again until they are taken."""
        if self.prefix is None:
            return 0
        return int(np.count_nonzero(self.prefix.held & (self.pool.ref_counts == 0)))

    def keys_of(self, seq_id: int) -> tuple[bytes, ...]:
        """Return the keys known of a sequence's leading blocks; empty if it is never shared."""
        chain = self._chains.get(self._row_of(seq_id))
        return () if chain is None else tuple(chain.keys)

    def num_shared_tokens(
        self,
        token_ids: Tokens,
        *,
        salt: bytes = b"",
        extra_keys: Mapping[int, bytes] | None = None,
    ) -> int:
        """Return how many leading tokens `open` would find now; changes nothing."""
        tokens = token_array("token_ids", token_ids)
        keys = self._hasher.chain(tokens, extras=extras_of(salt, extra_keys))
        return len(self._found(keys, tokens.size, tokens)) * self.page_size

    @exclusive
    def reset_prefix_cache(self) -> bool:
        """Forget every block if no page has an owner; return whether that was so.

        Sequences that are swapped out bring their blocks back, so they count as owners.
        """
        if self.pool.num_used or self._swapped:
            return False
        if self.prefix is not None:
            self.windows.release_records(self.windows.resting_pages)
            self.prefix.clear()
            if self.retention is not None:
                # Pages that wait for a fence held blocks too.
                every = np.concatenate((self.pool.free_ids(), self.pool.parked_ids()))
                self.retention._forget(every)
        return True

    @exclusive
    def forget_blocks(self, pages: Tokens) -> int:
        """Let pages be found no longer, whoever owns them; return how many held a block.

        Raises
        ------
        ArgumentError
            If a page is the null page or out of range.
        """
        array = token_array("pages", pages)
        if array.size and not 0 < int(array.min()) <= int(array.max()) < self.pool.num_pages:
            worst = int(array[(array < 1) | (array >= self.pool.num_pages)][0])
            raise ArgumentError(f"pages must be in [1, {self.pool.num_pages - 1}], got {worst}")
        if self.prefix is None:
            return 0
        before = self.prefix.num_pages_held
        array = np.unique(array)
        self.prefix.forget(array)
        if self.retention is not None:
            self.retention._forget(array.astype(np.int32))
        self.windows.release_records(array[self.pool.ref_counts[array] == 0])
        return before - self.prefix.num_pages_held

    @exclusive
    def extend_keys(self, seq_id: int, block_keys: Sequence[bytes]) -> None:
        """Name further blocks of a sequence that was opened with ``block_keys``.

        Raises
        ------
        ArgumentError
            If the sequence was not opened so.
        """
        row = self._row_of(seq_id)
        chain = self._chains.get(row)
        if chain is None or not chain.opaque:
            raise ArgumentError(f"sequence {seq_id} was not opened with block_keys")
        chain.keys += opaque_keys(block_keys)
        self._keyed[row] = len(chain.keys) * self.page_size

    # -- opening -----------------------------------------------------------------------------

    def prepare(
        self,
        token_ids: Tokens | None = None,
        *,
        salt: bytes = b"",
        extra_keys: Mapping[int, bytes] | None = None,
        block_keys: Sequence[bytes] | None = None,
        num_tokens: int | None = None,
    ) -> BlockChain | None:
        """Check and hash what a sequence will be opened with; changes nothing.

        For callers that look a prompt up several times before they open it: pass the result to
        `find_pages` and `open` instead of the tokens.

        Parameters
        ----------
        token_ids, salt, extra_keys, block_keys
            As in `open`.
        num_tokens : int, optional
            With ``block_keys``, the tokens of the prompt, if it does not end with their last block.

        Returns
        -------
        BlockChain or None
            None for a sequence that is never shared.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            For bad tokens, salts or keys.
        """
        if token_ids is not None and block_keys is not None:
            raise ArgumentError("a sequence is opened with token_ids or block_keys, not with both")
        extras = extras_of(salt, extra_keys)
        if block_keys is not None:
            if extras:
                raise ArgumentError("salt and extra_keys belong to token_ids, not to block_keys")
            opaque = opaque_keys(block_keys)
            named = len(opaque) * self.page_size
            length = named if num_tokens is None else integer("num_tokens", num_tokens, named)
            return BlockChain(opaque, opaque=True, num_tokens=length)
        if token_ids is None:
            if extras:
                raise ArgumentError("salt and extra_keys need token_ids; pass [] without a prompt")
            return None
        tokens = token_array("token_ids", token_ids).copy()
        keys = self._hasher.chain(tokens, extras=extras) if self.prefix is not None else []
        return BlockChain(keys, extras, tokens, num_tokens=tokens.size)

    def lengthened(self, chain: BlockChain, token_ids: Tokens) -> BlockChain:
        """Return what `prepare` would for a prompt and further tokens; hashes only these."""
        instance("chain", chain, BlockChain)
        tokens = np.concatenate((chain.prompt, token_array("token_ids", token_ids)))
        done = len(chain.keys)
        keys = list(chain.keys)
        if self.prefix is not None:
            parent = keys[-1] if keys else None
            behind = tokens[done * self.page_size :]
            keys += self._hasher.chain(behind, parent, chain.extras, done)
        return BlockChain(keys, chain.extras, tokens, num_tokens=tokens.size)

    def find_pages(self, chain: BlockChain) -> list[int]:
        """Return the pages that `open` would begin with now; takes none of them."""
        instance("chain", chain, BlockChain)
        tokens = None if chain.opaque else chain.prompt
        return self._found(chain.keys, chain.num_tokens, tokens)

    def _found(self, keys: list[bytes], num_tokens: int, tokens: Int32 | None) -> list[int]:
        """Return the pages of the leading blocks that can be shared."""
        if self.prefix is None or self.sharing is None:
            return []
        wanted = num_tokens - 1 if self.sharing.leave_last else num_tokens
        pages = self.prefix.longest(keys[: max(wanted, 0) // self.page_size])
        if pages and tokens is not None and self.sharing.verify_tokens:
            expected = tokens[: len(pages) * self.page_size].reshape(len(pages), -1)
            same = (self._page_tokens[pages] == expected).all(axis=1)
            if not same.all():
                pages = pages[: int(np.argmin(same))]
        return pages

    def _adopt(
        self, row: int, chain: BlockChain | None, pages: list[int], num_queried: int | None = None
    ) -> None:
        """Begin an empty row with pages that hold its first blocks; the table is wide enough."""
        if chain is None:
            self._known[row] = -1
            return
        if self.prefix is not None:
            if num_queried is None:
                num_queried = max(chain.prompt.size, len(chain.keys) * self.page_size)
            self.prefix_queries += num_queried
            self.prefix_hits += len(pages) * self.page_size
        self._chains[row] = chain
        self._prompt_end[row] = chain.prompt.size
        if chain.opaque:
            self._num_opaque += 1
            self._known[row] = -1
            self._keyed[row] = len(chain.keys) * self.page_size
        if not pages:
            return
        found = np.array(pages, np.int32)
        self.pool.touch(found)
        self.windows.wake_records(found[:1])
        self._table[row, : found.size] = found
        length = found.size * self.page_size
        self._length[row] = length
        if not chain.opaque:
            self._known[row] = length
        self._published[row] = found.size
        if self.window_tokens:
            self._coded[row] = self._ring_start[row] = length
            if self.windows.sink_record[found[0]] >= 0:
                # A block that is full has all its sinks, if it has any.
                self._sinks[row] = self.num_sinks

    # -- ends --------------------------------------------------------------------------------

    def _share_chain(self, row: int, child: int) -> None:
        """Let a fork's row know the blocks of its parent's."""
        chain = self._chains.get(row)
        if chain is not None:
            self._chains[child] = chain.copy()
            self._num_opaque += chain.opaque

    def _cut_chain(self, row: int, length: int) -> None:
        """Forget what was known of positions behind a truncation."""
        chain = self._chains.get(row)
        if chain is not None:
            del chain.keys[length // self.page_size :]
            self._keyed[row] = min(int(self._keyed[row]), len(chain.keys) * self.page_size)
            self._prompt_end[row] = min(int(self._prompt_end[row]), length)

    def _recycle_rows(self, rows: Int64) -> None:
        super()._recycle_rows(rows)
        if self._chains:
            for row in rows.tolist():
                chain = self._chains.pop(row, None)
                if chain is not None:
                    self._num_opaque -= chain.opaque

    def _release_pages(self, pages: Int32) -> Int32:
        if self.prefix is None or not self.num_sinks:
            return super()._release_pages(pages)
        freed = self.pool.release(pages)
        held = self.prefix.held[freed]
        self.windows.release_records(freed[~held])
        self.windows.rest_records(freed[held])
        return freed
