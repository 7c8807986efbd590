"""Checks that several configuration structs make of their fields."""

from __future__ import annotations

from ..errors import ConfigError


def check_int(name: str, value: int, low: int, high: int) -> None:
    """Refuse what is not an int in ``[low, high]``."""
    # bool is an int in Python; as a count it is always a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a Python int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be in [{low}, {high}], got {value}")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse what is not one of the allowed values."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Refuse what is not a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be a bool, got {type(value).__name__}")
