"""A block manager with the verbs of vLLM V1's, over the same arrays as the batched calls.

A scheduler that was written against vLLM's manager asks, request by request: which blocks of this
prompt are here (`get_computed_blocks`), and is there room for so many tokens (`allocate_slots`)?
Here a request is a row of `PageTables`, so that a scheduler that can do a whole step at once calls
`tables.reserve` for the same sequences instead. Everything is as in vLLM where its behaviour can be
seen: the order in which pages are taken, freed and reused, when a block can be found, and that a
call that does not fit changes nothing.

Without a data plane there is no later moment at which bytes are known to be written, so blocks are
published inside `allocate_slots`; ``delay_cache_blocks`` and `cache_blocks` part the two.

A call that changes something has the turn of the tables from its beginning to its end, and gets a
``ConcurrentCallError`` if another one has it, of the manager or of the tables; nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import ArgumentError, ArgumentTypeError, OutOfPages, StepError
from ..paging import PageTables
from ..paging.arguments import MAX_TOKENS, integer
from ..paging.exclusive import calls_met, exclusive, unguarded
from .events import EventLog
from .manager_lookups import NO_BLOCKS, ManagerLookups, PrefixCacheStats
from .manager_tables import tables_for
from .request import Blocks, Holding, Request
from .request_checks import (
    NOTHING_DUE,
    Due,
    another_request,
    block_hashes,
    blocks_due,
    checked_count,
    checked_fraction,
    computed_before,
    found_pages,
    known_tokens,
    problem_of,
)


class BlockManager(ManagerLookups):
    """Gives pages to requests; see the module.

    Parameters
    ----------
    num_blocks : int
        Pages, the null page 0 included.
    block_size : int
        Tokens of a page.
    enable_caching : bool
        Let requests begin with blocks of others.
    max_model_len : int, optional
        No request gets room for more tokens.
    watermark : float
        Part of all pages that must stay free when a request that holds nothing is admitted beside
        others.
    enable_events : bool
        Collect events for `take_events`.
    log_stats : bool
        Count lookups for `make_prefix_cache_stats`.
    tables : PageTables, optional
        Tables to work on instead of new ones: without a window, with ``sharing`` if caching is on,
        and then with ``leave_last`` and without ``verify_tokens``, which hashes alone do not allow.

    Attributes
    ----------
    tables : PageTables
        The rows of the requests; `sequence_of` gives their ids.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For bad numbers, or tables that do not fit; if events are to be collected of tables that
        have an observer already.
    UnsupportedError
        For tables that promise what a manager does not keep.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_caching: bool = True,
        max_model_len: int | None = None,
        watermark: float = 0.0,
        enable_events: bool = False,
        log_stats: bool = False,
        tables: PageTables | None = None,
    ) -> None:
        tables = tables_for(num_blocks, block_size, enable_caching, tables)
        super().__init__(tables, block_size, enable_caching)
        self.max_model_len = (
            None if max_model_len is None else integer("max_model_len", max_model_len, 1)
        )
        self._longest = MAX_TOKENS if self.max_model_len is None else self.max_model_len
        self.watermark_blocks = int(checked_fraction("watermark", watermark) * num_blocks)
        if log_stats and enable_caching:
            self._stats = PrefixCacheStats()
        if enable_events and tables.prefix is not None:
            if tables.prefix.observer is not None:
                kind = type(tables.prefix.observer).__name__
                raise ArgumentError(
                    f"these tables have an observer already, {kind}, which would hear of no change "
                    "any more: take the events there, give each manager tables of its own, or set "
                    "tables.prefix.observer to None before"
                )
            self._log = tables.prefix.observer = EventLog(block_size)
        self._open_on, self._close = unguarded(tables.open_on), unguarded(tables.close)
        self._lengthen = unguarded(tables.lengthen)

    # -- taking ------------------------------------------------------------------------------

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Blocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        *,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
    ) -> Blocks | None:
        """Make room for a request's next tokens.

        Parameters
        ----------
        request : Request
            The request: until it is freed, the same object. One that holds nothing yet has no
            computed tokens of its own.
        num_new_tokens : int
            Tokens to compute now.
        num_new_computed_tokens, new_computed_blocks
            What `get_computed_blocks` returned, for a request that holds nothing yet.
        num_lookahead_tokens : int
            Room behind them, for drafts.
        num_external_computed_tokens : int
            Tokens behind those found that come from elsewhere.
        delay_cache_blocks : bool
            Publish nothing yet; `cache_blocks` does.
        full_sequence_must_fit : bool
            Refuse unless all tokens of the request would fit now, into reserved pages too.
        reserved_blocks : int
            Free pages that must be left.
        has_scheduled_reqs : bool
            Whether others run; only then does the watermark hold for a new request.

        Returns
        -------
        Blocks or None
            The new blocks; None, with nothing changed, if they do not fit.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            For bad counts, hashes or blocks; if there is nothing to make room for, blocks are given
            to a request that has some, tokens were computed by one that has none, or another
            request of its name has some.
        ConcurrentCallError
            If another call is at work in the tables.
        """
        # As `exclusive`, without the price of passing arguments on.
        try:
            self._turn.pop()
        except IndexError:
            raise calls_met("allocate_slots") from None
        try:
            name, new, computed = request.request_id, num_new_tokens, request.num_computed_tokens
            if type(new) is not int or new < 0:
                new = checked_count(name, "num_new_tokens", new)
            if type(computed) is not int or computed < 0:
                computed = checked_count(name, "num_computed_tokens", computed)
            found = lookahead = external = reserved = 0
            # A decode step has none of them.
            if (
                num_new_computed_tokens
                or num_lookahead_tokens
                or num_external_computed_tokens
                or reserved_blocks
            ):
                found = checked_count(name, "num_new_computed_tokens", num_new_computed_tokens)
                lookahead = checked_count(name, "num_lookahead_tokens", num_lookahead_tokens)
                external = checked_count(
                    name, "num_external_computed_tokens", num_external_computed_tokens
                )
                reserved = checked_count(name, "reserved_blocks", reserved_blocks)
            if not (new or external):
                raise ArgumentError(
                    f"request {name}: no token to allocate slots for, expected num_new_tokens or "
                    "num_external_computed_tokens >= 1"
                )
            size, tables = self.block_size, self.tables
            pages: Sequence[int] = ()
            if new_computed_blocks is not None:
                pages = found_pages(name, new_computed_blocks, tables.pool.num_pages)
            if (found or pages) and found != len(pages) * size:
                raise ArgumentError(
                    f"request {name}: {found} computed tokens were given with {len(pages)} blocks "
                    f"of {size} tokens; pass what get_computed_blocks returned"
                )
            holding = self._holdings.get(name)
            if holding is None:
                if computed:
                    raise computed_before(name, computed)
            else:
                if holding.request is not request:
                    raise another_request(name)
                if pages:
                    raise ArgumentError(
                        f"request {name} holds blocks already; pass computed blocks with its first "
                        "tokens only, or free it before"
                    )
            reach = computed + found + external + new
            target = whole = reach + lookahead
            if full_sequence_must_fit:
                whole = max(target, known_tokens(request))
            if whole > self._longest:
                target, whole = min(target, self._longest), self._longest
            # Most steps complete no block, so look before anything else is asked of the request.
            # What is wrong with its blocks must be known before anything is taken.
            due = NOTHING_DUE
            if self.enable_caching and not delay_cache_blocks:
                # The tables know: whoever cuts a sequence there cuts what it has published.
                done = len(pages) if holding is None else tables._published.item(holding.row)
                if reach // size > done:
                    # No more than there is room for.
                    due = self._due(request, done, min(reach, target), holding)
            if holding is None:
                beside = self.watermark_blocks if has_scheduled_reqs else 0
                return self._admit(request, pages, whole, target, reserved, beside, due)
            if whole > target:
                need = -(-whole // size) - -(-tables.length_of(holding.seq_id) // size)
                if need > tables.pool.num_free:
                    return None
            if reserved and reserved > tables.pool.num_free:
                return None
            try:
                taken = self._lengthen(holding.seq_id, target, reserved)
            except OutOfPages:
                return None
            except StepError as error:
                raise StepError(f"request {name}: {error}") from error
            if due is not NOTHING_DUE:
                self._publish(holding.seq_id, due)
            return Blocks(taken) if taken else NO_BLOCKS
        except (AttributeError, TypeError):
            # Nothing is read of a request any more once something was taken for it.
            problem = problem_of(request)
            if problem is None:
                raise
            raise problem from None
        finally:
            self._turn.append(None)

    def _admit(
        self,
        request: Request,
        pages: Sequence[int],
        whole: int,
        target: int,
        reserved: int,
        watermark: int,
        due: Due,
    ) -> Blocks | None:
        """Make room for a request that holds nothing: on the pages found, and new ones."""
        name, tables = request.request_id, self.tables
        size, free = self.block_size, tables.pool.num_free
        beside = watermark + (tables.pool.num_leaving(pages) if pages else 0)
        for length, available in ((whole, free), (target, free - reserved)):
            if max(-(-length // size) - len(pages), 0) + beside > available:
                return None
        if tables.has_open_step:
            raise StepError(
                f"request {name}: allocate_slots must wait: a step is open, commit or abort it"
            )
        lookups = tables.prefix_queries, tables.prefix_hits
        keys = block_hashes(request, 0, len(pages)) if pages else []
        try:
            seq_id = self._open_on(keys, pages, request.num_tokens)
        except (ArgumentError, ArgumentTypeError) as error:
            raise type(error)(
                f"request {name}: {error}; look its blocks up again before it is admitted"
            ) from error
        try:
            taken = self._lengthen(seq_id, target, reserved)
        except BaseException:
            self._close(seq_id)
            tables.prefix_queries, tables.prefix_hits = lookups
            raise
        self._holdings[name] = Holding(request, seq_id, tables._row_of(seq_id))
        # The blocks found are published, so those due begin with the pages taken.
        self._publish(seq_id, due, taken)
        return Blocks(taken) if taken else NO_BLOCKS

    @exclusive
    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish the whole blocks among the first so many tokens of a request.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            For a bad count or hashes, more tokens than there is room for, or if another request of
            its name holds blocks.
        """
        holding = self._holding_of(request)
        name = request.request_id
        computed = checked_count(name, "num_computed_tokens", num_computed_tokens)
        if not self.enable_caching or holding is None:
            return
        room = self.tables.length_of(holding.seq_id)
        if computed > room:
            raise ArgumentError(
                f"request {name}: num_computed_tokens is {computed}, but it has room for {room} "
                "tokens; allocate slots for the others before"
            )
        done = self.tables.num_published(holding.seq_id)
        self._publish(holding.seq_id, self._due(request, done, computed, holding))

    # -- giving back -------------------------------------------------------------------------

    @exclusive
    def free(self, request: Request) -> None:
        """Take all pages from a request, the last block's first; fine if it holds nothing.

        Raises
        ------
        ArgumentError
            If it is another request of this name that holds them.
        """
        holding = self._holding_of(request)
        if holding is not None:
            # Refused while a step is open: then the request keeps what it has.
            self._close(holding.seq_id)
            del self._holdings[request.request_id]

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Let pages be found no longer; their owners keep them.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If one is no page.
        """
        try:
            pages = list(block_ids)
        except TypeError:
            raise ArgumentTypeError(
                f"block_ids must be several page ids, got {type(block_ids).__name__}"
            ) from None
        self.tables.forget_blocks(pages)

    def reset_prefix_cache(self) -> bool:
        """Forget every block, unless a request holds pages; return whether it was done."""
        return self.tables.reset_prefix_cache()

    def _due(
        self, request: Request, done: int, num_tokens: int, holding: Holding | None = None
    ) -> Due:
        """Return keys and tokens of a request's whole blocks behind the first ``done``.

        What is wrong with them is found here, before anything is taken.
        """
        due = blocks_due(request, self.block_size, done, num_tokens, self._log is not None)
        if holding is not None and due[0]:
            self.tables.check_names(holding.seq_id, due[0])
        return due

    def _publish(self, seq_id: int, due: Due, taken: Sequence[int] = ()) -> None:
        keys, tokens = due
        if keys:
            self.tables._publish_named(seq_id, keys, tokens, taken)
