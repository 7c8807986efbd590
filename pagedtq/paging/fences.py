"""Fences: what is freed while work in flight may still read it comes back when that work is done.

A device runs behind its host: when a sequence closes, a launch that was queued before may not have
read its pages yet. Work that will read pages, window slots or sink records opens a fence; all that
is released while one is open is parked, and can be taken again when every fence that was open at
its release has closed. A parked page that holds a block can still be found: its new owner reads it
too. Without an open fence nothing of this costs anything.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..errors import ArgumentError
from .arguments import Int32, integer
from .exclusive import Turn, exclusive
from .page_pool import PagePool
from .window_pool import WindowPool


class Event(Protocol):
    """What tells when work in flight is done: an event on a CUDA stream, or an object of yours."""

    @property
    def done(self) -> bool:
        """Whether all work before it is done; never waits."""
        ...


class Fences:
    """Fences over the pools of one `PageTables`, numbered by an epoch counter.

    Parameters
    ----------
    pool : PagePool
        Pages.
    windows : WindowPool
        Window slots and sink records.
    turn : Turn
        Whose call it is that changes them.
    """

    def __init__(self, pool: PagePool, windows: WindowPool, turn: Turn) -> None:
        self._pool, self._windows, self._turn = pool, windows, turn
        self._open: dict[int, Event | None] = {}
        self._epoch = 0

    @property
    def num_open(self) -> int:
        """Fences that are open."""
        return len(self._open)

    @property
    def num_parked(self) -> int:
        """Pages that wait for a fence."""
        return self._pool.num_parked

    @exclusive
    def open(self, event: Event | None = None) -> int:
        """Open a fence and return its epoch: work that may read what is owned now begins.

        Parameters
        ----------
        event : Event, optional
            Lets `poll` close the fence; without one `close` has to. ``Device.record()`` and CuPy's
            events are such.

        Raises
        ------
        ArgumentError
            If ``event.done`` is not True or False: a method, as futures have, is always true.
        """
        done = getattr(event, "done", None)
        if event is not None and not isinstance(done, bool | np.bool_):
            raise ArgumentError(
                f"an event has an attribute done that is True or False, got {type(event).__name__} "
                f"with {'none' if done is None else type(done).__name__}"
            )
        self._epoch += 1
        self._pool.fence(self._epoch)
        self._windows.fence(self._epoch)
        self._open[self._epoch] = event
        return self._epoch

    @exclusive
    def close(self, epoch: int) -> Int32:
        """Close a fence: its work is done. Fences may close in any order.

        Returns
        -------
        int32[n]
            Pages that rejoined the tail of the free queue, in the order of their release.

        Raises
        ------
        ArgumentError
            If no fence of that epoch is open.
        """
        number = integer("epoch", epoch, 1)
        if number not in self._open:
            raise ArgumentError(
                f"fence {number} is not open; open are {sorted(self._open) or 'none'}"
            )
        del self._open[number]
        return self._rejoin()

    @exclusive
    def poll(self) -> Int32:
        """Close the fences whose events are done; return the pages that rejoined, as `close`."""
        if not self._open:
            return np.empty(0, np.int32)
        over = [epoch for epoch, event in self._open.items() if event is not None and event.done]
        for epoch in over:
            del self._open[epoch]
        return self._rejoin()

    def _rejoin(self) -> Int32:
        # Epochs are opened in ascending order, and a dict keeps that order.
        oldest = next(iter(self._open), None)
        self._windows.unfence(oldest)
        return self._pool.unfence(oldest)
