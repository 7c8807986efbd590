"""``pagedtq plan``: what fits in a memory budget, per storage format."""

from __future__ import annotations

import argparse
import sys

import msgspec

from ..config import PRESETS
from ..models import ModelShape
from ..sim.table import format_table
from ..sizing import Capacity, Format, format_bytes, plan_capacity
from .arguments import Commands, add_command, add_memory_options, positive_int

FORMATS = ("fp16", "fp8", *(name for name in PRESETS if not name.startswith("exact")))


class PlanRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one format makes of the budget.

    Parameters
    ----------
    format : str
    bytes_per_token : float
        Page bytes of a token, alignment included.
    window_bytes_per_sequence : int
        Bytes of one exact window, sinks included.
    capacity : Capacity
        Pages and window slots.
    tokens : int
        Tokens in the pages.
    sequences : int
        Sequences of the asked length at a time.
    sequences_vs_fp16 : float or None
        Over those of fp16; None if fp16 holds none.
    """

    format: str
    bytes_per_token: float
    window_bytes_per_sequence: int
    capacity: Capacity
    tokens: int
    sequences: int
    sequences_vs_fp16: float | None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``pagedtq plan --json``."""

    schema: int
    model: ModelShape
    budget_bytes: int
    page_size: int
    tokens_per_sequence: int
    formats: list[PlanRow]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "plan", run, "what fits in a memory budget, per storage format")
    add_memory_options(parser, ",".join(FORMATS))
    parser.add_argument(
        "--tokens", type=positive_int, default=4096, metavar="N", help="length of a sequence"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    plan = make_plan(
        arguments.model,
        arguments.formats,
        arguments.budget,
        arguments.page_size,
        arguments.tokens,
    )
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() + "\n")
        return 0
    print(
        f"{plan.model.name}, {format_bytes(plan.budget_bytes)}, pages of {plan.page_size} tokens, "
        f"sequences of {plan.tokens_per_sequence} tokens\n"
    )
    header = ("format", "B/token", "window", "pages", "slots", "tokens", "sequences", "vs fp16")
    rows = [
        (
            row.format,
            f"{row.bytes_per_token:.0f}",
            format_bytes(row.window_bytes_per_sequence) if row.window_bytes_per_sequence else "-",
            str(row.capacity.num_pages),
            str(row.capacity.num_window_slots or "-"),
            str(row.tokens),
            str(row.sequences),
            "-" if row.sequences_vs_fp16 is None else f"{row.sequences_vs_fp16:.2f}x",
        )
        for row in plan.formats
    ]
    print(format_table(header, rows))
    return 0


def make_plan(
    model: ModelShape, formats: list[Format], budget: int, page_size: int, tokens: int
) -> Plan:
    """Size every format for a budget and a length of sequence."""

    def size(storage: Format) -> Capacity:
        return plan_capacity(
            storage.config(model, page_size),
            budget,
            tokens_per_sequence=tokens,
            byte_share=storage.byte_share,
        )

    base = size(Format.parse("fp16")).sequences(tokens)
    rows = []
    for storage in formats:
        capacity = size(storage)
        sequences = capacity.sequences(tokens)
        rows.append(
            PlanRow(
                format=storage.name,
                bytes_per_token=capacity.page_bytes / page_size,
                window_bytes_per_sequence=capacity.window_slot_bytes,
                capacity=capacity,
                tokens=capacity.tokens,
                sequences=sequences,
                sequences_vs_fp16=sequences / base if base else None,
            )
        )
    return Plan(
        schema=1,
        model=model,
        budget_bytes=budget,
        page_size=page_size,
        tokens_per_sequence=tokens,
        formats=rows,
    )
