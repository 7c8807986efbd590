"""Options that several commands share, and types of options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ..config import PAGE_SIZES
from ..errors import ArgumentError, PagedTQError
from ..models import MODELS, ModelShape
from ..sizing import Format, parse_bytes

# The name says what argparse is to put into "argument --x: invalid ... value".
Commands = Any


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one and does not explain it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_command(
    commands: Commands, name: str, run: Any, summary: str, detail: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand with ``--json``; ``run(arguments)`` returns the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip(),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)
    return parser


def add_memory_options(parser: Any, formats: str) -> None:
    """Add ``--model``, ``--budget``, ``--page-size`` and ``--formats``."""
    parser.add_argument(
        "--model",
        type=checked(model),
        default="llama-3.1-8b",
        help=f"{', '.join(MODELS)}, or a JSON file with the fields of ModelShape",
    )
    parser.add_argument(
        "--budget",
        type=checked(parse_bytes),
        default="4GiB",
        metavar="SIZE",
        help="memory for pages and exact windows together",
    )
    parser.add_argument(
        "--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page"
    )
    parser.add_argument(
        "--formats",
        type=checked(format_list),
        default=formats,
        metavar="A,B,...",
        help="fp16, fp8 or presets, each preset also with -wN for an exact window of N tokens",
    )


def checked(read: Any) -> Any:
    """Let a reader's typed errors become argparse's usage errors."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except PagedTQError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def model(text: str) -> ModelShape:
    """Read a model's name or the JSON file of a shape."""
    if text in MODELS:
        return MODELS[text]
    if not text.endswith(".json"):
        raise ArgumentError(f"unknown model {text!r}; there are: {', '.join(MODELS)}, or FILE.json")
    try:
        return msgspec.json.decode(Path(text).read_bytes(), type=ModelShape)
    except OSError as error:
        raise ArgumentError(f"cannot read {text}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ArgumentError(f"{text}: {error}") from error


def format_list(text: str) -> list[Format]:
    """Read format names, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ArgumentError("expected at least one format")
    if len(set(names)) != len(names):
        raise ArgumentError(f"a format appears twice in {text!r}")
    return [Format.parse(name) for name in names]


def size_list(text: str) -> list[int]:
    """Read sizes in bytes, each once."""
    sizes = [parse_bytes(part) for part in text.split(",") if part.strip()]
    if not sizes or len(set(sizes)) != len(sizes):
        raise ArgumentError(f"expected sizes such as 64GiB,128GiB, each once; got {text!r}")
    return sizes


@contextmanager
def operating_system_errors() -> Iterator[None]:
    """Turn a file that cannot be read or written into a typed error with its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise ArgumentError(f"cannot use {error.filename}: {error.strerror}") from error


def positive_int(text: str) -> int:
    """Read a whole number of at least 1."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count
