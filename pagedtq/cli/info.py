"""``pagedtq info``: versions, machine and backends, for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import msgspec

from .. import __version__
from ..backends import BACKEND_VARIABLE, kernel_source
from ..backends.cupy_device import CupyDevice, missing_cuda
from ..config import FORMAT_VERSION
from ..errors import BackendUnavailable
from .arguments import Commands, add_command

_PACKAGES = ("numpy", "msgspec", "matplotlib", "tqdm", "cupy-cuda13x", "cupy-cuda12x")


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``pagedtq info --json``.

    Parameters
    ----------
    schema : int
    pagedtq : str
        Version.
    page_format : int
        Version of the page format.
    python, system, cpu : str
    cores : int
        CPUs this process may use.
    packages : dict of str to str or None
        Installed versions; None if absent.
    backends : dict of str to str
        ``"available"``, or why not; and which one ``"auto"`` picks.
    kernels : str
        How many CUDA sources there are and their digest, or what is wrong.
    """

    schema: int
    pagedtq: str
    page_format: int
    python: str
    system: str
    cpu: str
    cores: int
    packages: dict[str, str | None]
    backends: dict[str, str]
    kernels: str


def add_parser(commands: Commands) -> None:
    """Add the command."""
    add_command(commands, "info", run, "versions, machine and backends")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    info = collect_info()
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(info), indent=2).decode() + "\n")
        return 0
    lines = [
        ("pagedtq", f"{info.pagedtq}, page format {info.page_format}"),
        ("python", info.python),
        ("system", info.system),
        ("cpu", f"{info.cpu}, {info.cores} usable"),
        *((name, version or "not installed") for name, version in info.packages.items()),
        *((f"backend {name}", state) for name, state in info.backends.items()),
        ("kernels", info.kernels),
    ]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
    return 0


def collect_info() -> Info:
    """Look at this process and machine. Imports nothing optional but CuPy, if it is installed."""
    affinity = getattr(os, "sched_getaffinity", None)
    return Info(
        schema=1,
        pagedtq=__version__,
        page_format=FORMAT_VERSION,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=platform.platform(),
        cpu=_cpu(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        packages={name: _version(name) for name in _PACKAGES},
        backends=_backends(),
        kernels=_kernels(),
    )


def _backends() -> dict[str, str]:
    missing = missing_cuda()
    picked = os.environ.get(BACKEND_VARIABLE) or ("cuda" if missing is None else "host")
    return {
        "host": "available",
        "cuda": f"available, {CupyDevice().name}" if missing is None else missing,
        "auto": picked,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text(encoding="utf-8").splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _kernels() -> str:
    try:
        return f"{len(kernel_source.read_kernels())} files, {kernel_source.source_digest()[:12]}"
    except BackendUnavailable as error:
        return str(error)
