"""Readers of published request traces; a malformed row is reported with its line.

========  =====  ==========================================================================
kind      file   columns
========  =====  ==========================================================================
azure     CSV    ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Azure/AzurePublicDataset)
mooncake  JSONL  ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``
                 (kvcache-ai/Mooncake), one id per started block of 512 prompt tokens
vidur     CSV    ``arrived_at,num_prefill_tokens,num_decode_tokens`` (microsoft/vidur), seconds
========  =====  ==========================================================================

Other columns are ignored, blank lines skipped. Rows may come in any order of time: requests are
sorted by arrival, equal times keeping the order of the file, and time counts from the first one.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from ..errors import ArgumentError, WorkloadError
from .workload import HASH_BLOCK_TOKENS, Workload

#: Longer prompts or outputs are taken for a damaged row.
MAX_TOKENS = (1 << 31) - 1


class _Row(NamedTuple):
    seconds: float
    prompt: int
    output: int
    hash_ids: list[int] | None = None


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


class _BadRow(Exception):
    """A row's problem, before its place is known."""


def read_trace(spec: str) -> Workload:
    """Read a trace named as ``kind:path``.

    Raises
    ------
    ArgumentError
        If the kind is unknown or the file cannot be read.
    WorkloadError
        If a row is malformed; ``line`` is its 1-based line.
    """
    kind, colon, path = spec.partition(":")
    if not colon or kind not in READERS or not path:
        raise ArgumentError(
            f"expected a trace as kind:path with kind {', '.join(READERS)}; got {spec!r}"
        )
    return READERS[kind](path)


def read_azure(path: str | Path) -> Workload:
    """Read an Azure LLM inference trace (CC-BY-4.0; cite Splitwise, ISCA 2024)."""

    def parse(stamp: str, prompt: str, output: str) -> _Row:
        return _Row(
            _utc_seconds(stamp),
            _tokens("ContextTokens", prompt),
            _tokens("GeneratedTokens", output),
        )

    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    return _read("azure", path, lambda: _csv_rows(path, columns, parse))


def read_vidur(path: str | Path) -> Workload:
    """Read a Vidur-style trace with arrival times in seconds."""

    def parse(arrived_at: str, prompt: str, output: str) -> _Row:
        return _Row(
            _seconds("arrived_at", arrived_at),
            _tokens("num_prefill_tokens", prompt),
            _tokens("num_decode_tokens", output),
        )

    columns = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
    return _read("vidur", path, lambda: _csv_rows(path, columns, parse))


def read_mooncake(path: str | Path) -> Workload:
    """Read a Mooncake trace (Apache-2.0; cite Mooncake, FAST 2025), content ids included."""
    return _read("mooncake", path, lambda: _mooncake_rows(path))


#: Reader of each kind of trace.
READERS: dict[str, Callable[[str | Path], Workload]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "vidur": read_vidur,
}


def _read(kind: str, path: str | Path, rows: Callable[[], Iterator[_Row]]) -> Workload:
    try:
        read = list(rows())
    except OSError as error:
        raise ArgumentError(f"cannot read trace {path}: {error.strerror or error}") from error
    if not read:
        raise WorkloadError(str(path), 1, "expected at least one request, got none")
    seconds = np.array([row.seconds for row in read])
    order = np.argsort(seconds, kind="stable")
    # Subtract before sorting out precision: epoch seconds keep microseconds in float64.
    arrival = seconds[order] - seconds[order[0]]
    prompt = np.array([row.prompt for row in read], np.int64)[order]
    output = np.array([row.output for row in read], np.int64)[order]
    hash_ids = hash_offsets = None
    if read[0].hash_ids is not None:
        lists = [read[i].hash_ids or [] for i in order]
        hash_offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        hash_ids = np.array([i for ids in lists for i in ids], np.int64)
    return Workload(f"{kind}:{Path(path).name}", arrival, prompt, output, hash_ids, hash_offsets)


def _csv_rows(
    path: str | Path, columns: tuple[str, str, str], parse: Callable[[str, str, str], _Row]
) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise _BadRow(f"missing column {', '.join(missing)} in header {','.join(header)!r}")
            where = [header.index(name) for name in columns]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise _BadRow(f"expected {len(header)} fields, got {len(row)}")
                yield parse(*(row[i] for i in where))
        except (_BadRow, csv.Error) as error:
            raise WorkloadError(str(path), max(1, reader.line_num), str(error)) from None


def _mooncake_rows(path: str | Path) -> Iterator[_Row]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _mooncake_row(decoder.decode(line))
            except (_BadRow, msgspec.DecodeError, UnicodeDecodeError) as error:
                raise WorkloadError(str(path), number, str(error)) from None


def _mooncake_row(row: _MooncakeRow) -> _Row:
    if not math.isfinite(row.timestamp) or row.timestamp < 0:
        raise _BadRow(f"timestamp must be finite and not negative, got {row.timestamp}")
    for name in ("input_length", "output_length"):
        _check_tokens(name, getattr(row, name))
    expected = -(-row.input_length // HASH_BLOCK_TOKENS)
    if len(row.hash_ids) != expected:
        raise _BadRow(
            f"expected {expected} hash_ids for {row.input_length} prompt tokens, "
            f"got {len(row.hash_ids)}"
        )
    if not all(0 <= i < 1 << 63 for i in row.hash_ids):
        raise _BadRow("hash_ids must be in [0, 2**63)")
    return _Row(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids)


def _utc_seconds(text: str) -> float:
    # Seven fractional digits, which datetime.fromisoformat refuses: take the fraction apart.
    match = re.fullmatch(
        r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|\+00:00)?", text.strip(), re.ASCII
    )
    try:
        if match is None:
            raise ValueError
        moment = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc)  # noqa: UP017
    except ValueError:
        raise _BadRow(
            f"TIMESTAMP must look like 2023-11-16 18:15:46.6805900 (UTC), got {text!r}"
        ) from None
    return moment.timestamp() + float(match[2] or 0)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _BadRow(f"{name} must be a number, got {text!r}") from None
    if not math.isfinite(value) or value < 0:
        raise _BadRow(f"{name} must be finite and not negative, got {text!r}")
    return value


def _tokens(name: str, text: str) -> int:
    # Tables that passed through pandas write counts as 374.0.
    match = re.fullmatch(r"\s*([+-]?\d+)(\.0*)?\s*", text, re.ASCII)
    if match is None:
        raise _BadRow(f"{name} must be a whole number, got {text!r}")
    return _check_tokens(name, int(match[1]))


def _check_tokens(name: str, count: int) -> int:
    if not 1 <= count <= MAX_TOKENS:
        raise _BadRow(f"{name} must be in [1, {MAX_TOKENS}], got {count}")
    return count
