"""What pages are worth: the one thing in which eviction policies differ.

A *ranking* gives every block of a batch a number; blocks with lower ones go first. Rankings that
look at bytes (norms, bounds, attention) live beside the cache and hand over `PageScores` as well,
so that planning and evicting stay integer work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError
from .arguments import Int64, Integers, integer, integers
from .candidates import BlockList, sealed_blocks

if TYPE_CHECKING:
    from .page_tables import PageTables


class PageScores(NamedTuple):
    """Worth of blocks of a batch; higher is kept longer. Is a `PageRanking` itself.

    Attributes
    ----------
    seq_ids : int64[B]
        The batch.
    blocks : BlockList
        Which blocks are scored; their pages tell whether a score is still about the same bytes.
    values : float64[n]
        Their scores, none of them NaN; with inf a block is never evicted.
    """

    seq_ids: Int64
    blocks: BlockList
    values: npt.NDArray[np.float64]

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Return these scores for some of the sequences, in the order given."""
        self.check()
        ids = integers("seq_ids", seq_ids)
        at = places_in(self.seq_ids, ids)
        number = np.full(self.seq_ids.size, -1, np.int64)
        number[at[at >= 0]] = np.flatnonzero(at >= 0)
        members = number[self.blocks.members]
        chosen = np.flatnonzero(members >= 0)
        chosen = chosen[np.argsort(members[chosen], kind="stable")]
        some = BlockList(members[chosen], self.blocks.blocks[chosen], self.blocks.pages[chosen])
        return PageScores(ids, some, self.values[chosen])

    def check(self) -> None:
        """Refuse scores that do not pair up with blocks, and NaN.

        Raises
        ------
        ArgumentError
        """
        members, blocks, pages = self.blocks
        if not self.values.shape == members.shape == blocks.shape == pages.shape:
            raise ArgumentError(
                f"expected one score per block: {blocks.size} blocks, {self.values.size} scores"
            )
        bad = np.flatnonzero(np.isnan(self.values))
        if bad.size:
            raise ArgumentError(
                f"the score of block {int(blocks[bad[0]])} of sequence "
                f"{int(self.seq_ids[members[bad[0]]])} is NaN"
            )


@runtime_checkable
class PageRanking(Protocol):
    """Anything that can say what the blocks of sequences are worth."""

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Score blocks of a batch; changes nothing. Blocks left out are not evicted."""
        ...


def check_ranking(ranking: PageRanking) -> None:
    """Refuse what cannot score.

    Raises
    ------
    ArgumentTypeError
    """
    # A class has the method too, but of nobody.
    if isinstance(ranking, type) or not isinstance(ranking, PageRanking):
        kind = ranking.__name__ if isinstance(ranking, type) else type(ranking).__name__
        raise ArgumentTypeError(f"ranking must be a PageRanking, with a method score, got {kind}")


@dataclass(frozen=True, slots=True)
class OldestFirst:
    """Blocks go in the order of their positions."""

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Score a block by its index."""
        ids, found = integers("seq_ids", seq_ids), sealed_blocks(tables, seq_ids)
        return PageScores(ids, found, found.blocks.astype(np.float64))


@dataclass(frozen=True, slots=True)
class RandomOrder:
    """Blocks go in a pseudo-random order: the control against which other rankings are judged.

    Parameters
    ----------
    seed : int
        Selects the order. Equal seeds give equal pages and blocks equal scores.
    """

    seed: int

    def __post_init__(self) -> None:
        integer("seed", self.seed, 0, (1 << 64) - 1)

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Score a block by a hash of seed, page and block, uniform in [0, 1)."""
        ids, found = integers("seq_ids", seq_ids), sealed_blocks(tables, seq_ids)
        seed = _mixed(np.array([self.seed], np.uint64))
        place = found.pages.astype(np.uint64) << np.uint64(32) | found.blocks.astype(np.uint64)
        bits = _mixed(_mixed(place) ^ seed) >> np.uint64(11)
        return PageScores(ids, found, bits.astype(np.float64) * 2.0**-53)


def places_in(known: Int64, wanted: Int64) -> Int64:
    """Return where each number stands among distinct known ones, -1 where it does not."""
    if not known.size:
        return np.full(wanted.size, -1, np.int64)
    order = np.argsort(known)
    at = order[np.minimum(np.searchsorted(known, wanted, sorter=order), known.size - 1)]
    return np.where(known[at] == wanted, at, -1)


def matched_values(scores: PageScores, wanted: BlockList) -> npt.NDArray[np.float64]:
    """Return the score of each block, inf where there is none or the page is another by now.

    Parameters
    ----------
    scores : PageScores
        Of the same batch.
    wanted : BlockList
        Blocks of that batch.

    Raises
    ------
    ArgumentError
        If a score is NaN, or the scores do not pair up with blocks.
    """
    scores.check()
    members, blocks, pages = scores.blocks
    result = np.full(wanted.blocks.size, np.inf)
    if not blocks.size or not result.size:
        return result
    width = 1 + max(int(blocks.max()), int(wanted.blocks.max()))
    there = places_in(members * width + blocks, wanted.members * width + wanted.blocks)
    same = (there >= 0) & (pages[there] == wanted.pages)
    result[same] = scores.values[there[same]]
    return result


def _mixed(words: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit words (the output function of SplitMix64)."""
    z: npt.NDArray[np.uint64] = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)
