"""``pagedtq convert``: a snapshot in another shape, or decoded."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import msgspec

from ..sizing import format_bytes
from ..wire import load_cache, read_config, save_cache, save_tensors
from .arguments import Commands, add_command, operating_system_errors, positive_int


class Conversion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``pagedtq convert --json``."""

    schema: int
    source: str
    target: str
    to: str
    num_sequences: int
    source_bytes: int
    target_bytes: int


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "convert",
        run,
        "write a snapshot in another shape, or decoded",
        "The target is replaced only when all of it is on disk.",
    )
    parser.add_argument("source", metavar="SOURCE", help="what save_cache wrote")
    parser.add_argument("target", metavar="TARGET", help="the file to write")
    parser.add_argument(
        "--to",
        choices=("snapshot", "safetensors"),
        default="snapshot",
        help="a snapshot, or keys and values as float32 tensors",
    )
    parser.add_argument(
        "--pool-order",
        choices=("layer_major", "page_major"),
        help="order of the pool that a loaded snapshot gets (default: as it is)",
    )
    parser.add_argument(
        "--num-pages", type=positive_int, metavar="N", help="pages of that pool, the null page too"
    )
    parser.add_argument(
        "--num-window-slots", type=positive_int, metavar="N", help="window slots of that cache"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    with operating_system_errors():
        changes: dict[str, Any] = {
            name: getattr(arguments, name)
            for name in ("pool_order", "num_pages", "num_window_slots")
            if getattr(arguments, name) is not None
        }
        config = read_config(arguments.source).replace(**changes) if changes else None
        cache = load_cache(arguments.source, config=config)
        if arguments.to == "snapshot":
            save_cache(cache, arguments.target)
        else:
            save_tensors(cache, arguments.target)
        done = Conversion(
            schema=1,
            source=arguments.source,
            target=arguments.target,
            to=arguments.to,
            num_sequences=cache.tables.num_sequences,
            source_bytes=os.stat(arguments.source).st_size,
            target_bytes=os.stat(arguments.target).st_size,
        )
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(done), indent=2).decode() + "\n")
    else:
        print(
            f"{done.source} ({format_bytes(done.source_bytes)}) -> {done.target} "
            f"({done.to}, {format_bytes(done.target_bytes)}), {done.num_sequences} sequences"
        )
    return 0
