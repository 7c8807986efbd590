"""Pages of two tiers that hold the same bytes: what was copied once need not be copied again.

A page of the device and one of the host are *twins* while both hold the same full block. A copy
makes them; whoever writes into the page of the device, or takes it or the host's page for something
else, parts them. A twin's bytes are there only while its page has an owner or holds a block that
can be found: whoever follows one has to look.
"""

from __future__ import annotations

import numpy as np

from ..errors import IntegrityError
from .arguments import Int32


class Twins:
    """One partner at most for each page of either tier.

    Parameters
    ----------
    num_pages, num_host_pages : int
        Ids of each tier are below these.

    Attributes
    ----------
    count : int
        How many pairs there are; callers skip what they need not do at 0.
    """

    def __init__(self, num_pages: int, num_host_pages: int) -> None:
        self._host_of = np.zeros(num_pages, np.int32)
        self._page_of = np.zeros(num_host_pages, np.int32)
        self.count = 0

    def join(self, pages: Int32, host_pages: Int32) -> None:
        """Make pairs of distinct pages; former partners stay alone."""
        self.part(pages)
        self.part_host(host_pages)
        self._host_of[pages], self._page_of[host_pages] = host_pages, pages
        self.count += pages.size

    def part(self, pages: Int32) -> None:
        """Part pages of the device from their partners; those without one are skipped."""
        if self.count:
            alone = self._host_of[pages]
            self._page_of[alone] = self._host_of[pages] = 0
            self.count -= int(np.count_nonzero(alone))

    def part_host(self, host_pages: Int32) -> None:
        """Part pages of the host from their partners; those without one are skipped."""
        if self.count:
            self.part(self._page_of[host_pages][self._page_of[host_pages] > 0])

    def hosts_of(self, pages: Int32) -> Int32:
        """Return the partner of each page of the device, 0 without one, ``int32[n]``."""
        found: Int32 = self._host_of[pages]
        return found

    def pages_of(self, host_pages: Int32) -> Int32:
        """Return the partner of each page of the host, 0 without one, ``int32[n]``."""
        found: Int32 = self._page_of[host_pages]
        return found

    def check_integrity(self, host_refs: Int32) -> None:
        """Prove that partners name each other, and that those of the host have owners.

        Raises
        ------
        IntegrityError
        """
        pages, host_pages = self.pairs()
        back = np.array_equal(self._page_of[host_pages], pages)
        if not back or not pages.size == self.count == np.count_nonzero(self._page_of):
            raise IntegrityError("pages that are twins do not name each other")
        if not host_refs[host_pages].all():
            raise IntegrityError("a page of the host is a twin, but has no owner")

    def pairs(self) -> tuple[Int32, Int32]:
        """Return all pairs: pages of the device, ascending, and their partners."""
        pages = np.flatnonzero(self._host_of).astype(np.int32)
        return pages, self._host_of[pages]
