"""``pagedtq inspect``: what is in a snapshot, and whether it is whole."""

from __future__ import annotations

import argparse
import sys

import msgspec

from ..config import CacheConfig, Codec
from ..sim.table import format_table
from ..sizing import format_bytes
from ..wire import SnapshotReport, inspect_file
from .arguments import Commands, add_command, operating_system_errors

_SHOWN = 20


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        run,
        "what is in a snapshot, and whether it is whole",
        "Reads every byte and checks every checksum. Exit code 1 if the file is broken.",
    )
    parser.add_argument("file", metavar="FILE", help="what save_cache or export_sequence wrote")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; exit code 1 if the file is broken."""
    with operating_system_errors():
        report = inspect_file(arguments.file)
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    else:
        print(text(arguments.file, report))
    return 0 if report.whole else 1


def text(name: str, report: SnapshotReport) -> str:
    """Lay a report out for people."""
    lines = [("file", f"{name}, {format_bytes(report.file_bytes)}")]
    if report.whole:
        lines.append(("whole", "yes, every checksum matches"))
    else:
        lines.append(("whole", f"NO: {report.problem}"))
    if report.kind is not None:
        pages = f"{report.num_pages} of {format_bytes(report.page_bytes or 0)}"
        shared = "" if report.pages_shared is None else f", {report.pages_shared} shared"
        lines += [
            ("holds", report.kind),
            ("pages", f"{pages}, {report.num_filled} with bytes{shared}"),
            ("windows", f"{report.num_rings} rings, {report.num_sink_records} sink records"),
        ]
    if report.config is not None:
        lines += _config_lines(report.config)
        lines.append(("key means", "yes" if report.has_key_means else "none"))
    if report.kind is not None:
        lines += [
            ("config", f"{report.config_digest}"[:16]),
            ("codec", f"{report.codec_digest}"[:16]),
        ]
    width = max(len(label) for label, _ in lines)
    parts = [f"{label:<{width}}  {value}" for label, value in lines]
    if report.sequences:
        parts += ["", _sequence_table(report)]
    return "\n".join(parts)


def _config_lines(config: CacheConfig) -> list[tuple[str, str]]:
    codecs: dict[tuple[Codec, Codec], int] = {}
    for layer in range(config.num_layers):
        pair = config.layer_codecs(layer)
        codecs[pair] = codecs.get(pair, 0) + 1
    return [
        (
            "shape",
            f"{config.num_layers} layers, {config.num_kv_heads} KV heads, head_dim "
            f"{config.head_dim}, pages of {config.page_size} tokens",
        ),
        *(
            ("codecs", f"keys {keys}, values {values} ({count} layers)")
            for (keys, values), count in codecs.items()
        ),
        ("window", f"{config.window_tokens} tokens, {config.num_sinks} sinks, {config.kv_dtype}"),
        ("pool", f"{config.num_pages} pages, {config.pool_order}, seed {config.seed}"),
    ]


def _sequence_table(report: SnapshotReport) -> str:
    sequences = report.sequences or []
    rows = [
        tuple(
            str(n)
            for n in (
                *(index, s.length, s.coded, s.ring_start, s.num_sinks),
                *(s.keep, s.start, s.blocks, s.evicted),
            )
        )
        for index, s in enumerate(sequences[:_SHOWN])
    ]
    header = (
        *("sequence", "tokens", "coded", "ring from", "sinks"),
        *("keep", "start", "blocks", "evicted"),
    )
    table = format_table(header, rows)
    if len(sequences) > _SHOWN:
        table += f"\n... and {len(sequences) - _SHOWN} more (--json shows all)"
    return table
