"""The command ``pagedtq``: simulate, plan, evaluate, inspect, convert, info and selftest.

Data goes to stdout (``--json`` for machines), progress to stderr and only on a terminal.
Exit codes: 0 done, 1 a check failed, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import PagedTQError
from . import convert, evaluate, info, inspect, plan, selftest, simulate


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pagedtq", description="Paged KV cache with TurboQuant-compressed pages."
    )
    parser.add_argument("--version", action="version", version=f"pagedtq {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (simulate, plan, evaluate, inspect, convert, info, selftest):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Instead of the process's arguments.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except PagedTQError as error:
        print(f"pagedtq: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pagedtq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough (`| head`). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
