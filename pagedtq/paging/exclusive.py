"""One caller at a time: what keeps threads from meeting inside the tables, or what works on them.

A call that changes the tables takes the turn, and returns it when it ends. Whoever finds the turn
taken, another thread or an observer that calls back, gets a ``ConcurrentCallError``, and nothing
has changed. The turn is the one element of a list: taking it is atomic, and costs a fraction of a
lock. A caller that makes several changes as one takes the turn itself, see `unguarded`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

from ..errors import ConcurrentCallError

Turn: TypeAlias = list[None]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Any)


def take_turn(turn: Turn, operation: str) -> None:
    """Take the turn; who takes it gives it back with ``turn.append(None)``.

    Raises
    ------
    ConcurrentCallError
        If another call has it.
    """
    try:
        turn.pop()
    except IndexError:
        raise calls_met(operation) from None


def calls_met(operation: str) -> ConcurrentCallError:
    """Return what is raised when a call finds the turn taken."""
    return ConcurrentCallError(
        f"cannot {operation}: another call is at work in the same tables or scheduler; let one "
        f"thread call at a time, or take a lock around the calls"
    )


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let a method run only while no other one of the same ``_turn`` does."""
    operation = method.__name__

    @wraps(method)
    def alone(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        take_turn(self._turn, operation)
        try:
            return method(self, *args, **kwargs)
        finally:
            self._turn.append(None)

    return cast(Callable[Concatenate[S, P], R], alone)


def unguarded(method: Callable[P, R]) -> Callable[P, R]:
    """Return a bound exclusive method without its guard, for callers that have taken the turn."""
    bound = cast(Any, method)
    return cast(Callable[P, R], MethodType(bound.__wrapped__, bound.__self__))
