"""Receipts of benchmarks: what ran, on what, from which inputs, with which result."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .. import __version__
from ..config import FORMAT_VERSION

#: Packages whose version is recorded when they are loaded: what a figure may depend on.
_PEERS = ("torch", "cupy", "scipy", "transformers", "turboquant", "threadpoolctl")

Figure = str | int | float | bool | None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine a benchmark ran on.

    Attributes
    ----------
    cpu : str
        Its model.
    cores : int
        CPUs the process may use.
    system : str
        Operating system and architecture.
    """

    cpu: str
    cores: int
    system: str


class BenchmarkReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """Figures with the conditions they were measured under.

    Attributes
    ----------
    schema : int
        Version of this struct.
    name : str
        The benchmark.
    rows : list of dict
        The figures; NaN and infinity as text, because JSON has none.
    notes : list of str
        What a reader must know to judge them.
    versions : dict of str to str
        Of pagedtq, its page format, Python, and the packages that were loaded.
    machine : Machine
        Where it ran.
    date : str
        When, UTC.
    command : str
        What to type to repeat it.
    seed : int
        Seed of all random inputs.
    quick : bool
        Whether it was a trial with small sizes.
    inputs_digest : str
        SHA-256 of what the inputs follow from, in hexadecimal.
    """

    schema: int
    name: str
    rows: list[dict[str, Figure]]
    notes: list[str]
    versions: dict[str, str]
    machine: Machine
    date: str
    command: str
    seed: int
    quick: bool
    inputs_digest: str

    def to_json(self) -> bytes:
        """Encode as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def benchmark_receipt(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    command: str,
    notes: Sequence[str] = (),
    seed: int = 0,
    quick: bool = False,
    inputs: Iterable[bytes] = (),
) -> BenchmarkReceipt:
    """Write a receipt for figures that were just measured.

    Parameters
    ----------
    name : str
        The benchmark.
    rows : sequence of mapping
        The figures; NumPy scalars become Python's.
    command : str
        What to type to repeat it.
    notes : sequence of str
        What a reader must know.
    seed : int
        Seed of all random inputs.
    quick : bool
        Whether it was a trial.
    inputs : iterable of bytes
        What the inputs follow from besides seed and ``quick``: a program's source, a data file.
    """
    digest = hashlib.sha256(f"{name} {seed} {quick}\n".encode())
    for part in inputs:
        digest.update(hashlib.sha256(part).digest())
    return BenchmarkReceipt(
        schema=1,
        name=name,
        rows=[{key: _plain(value) for key, value in row.items()} for row in rows],
        notes=list(notes),
        versions=_versions(),
        machine=_machine(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seed=seed,
        quick=quick,
        inputs_digest=digest.hexdigest(),
    )


def _plain(value: Any) -> Any:
    """Return what JSON can hold: NumPy scalars as Python's, NaN and infinity as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _versions() -> dict[str, str]:
    versions = {
        "pagedtq": __version__,
        "page format": str(FORMAT_VERSION),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "msgspec": metadata.version("msgspec"),
    }
    for peer in _PEERS:
        module = sys.modules.get(peer)
        if module is not None:
            versions[peer] = str(getattr(module, "__version__", "unknown"))
    return versions


def _machine() -> Machine:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text(encoding="utf-8").splitlines():
            if entry.startswith("model name"):
                model = entry.partition(":")[2].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Machine(cpu=model, cores=cores, system=f"{platform.system()} {platform.machine()}")
