"""What a parameter is not made for, by name; and which of it a table of calls is tried with."""

from __future__ import annotations

from collections.abc import Mapping

WRONG = {
    "None": None,
    "an integer": 5,
    "text": "a",
    "a fraction": 1.5,
    "an object": object(),
    "a list of None": [None],
    "a huge integer": 10**400,
}
NONE, INT, TEXT, FLOAT, OBJECT, LIST, HUGE = WRONG


def cases(calls: Mapping[str, tuple]) -> list[tuple[str, str]]:
    """Return every call of a table with each value that is wrong for it.

    An entry is the call and the names of the values that it may get.
    """
    return [
        (name, wrong) for name, (_, valid) in calls.items() for wrong in WRONG if wrong not in valid
    ]
