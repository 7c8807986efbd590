"""Trim FlashInfer's wheel to its paged decode, and build that ahead, where there is no GPU.

``python -m benchmarks.gpu.prepare_flashinfer WHEEL FOLDER`` writes ``FOLDER/flashinfer-trimmed``:
the Python files that ``flashinfer.decode`` imports, the templates that it reads before it looks for
a library, and the libraries of paged decode for sm_90a, built here (needs PyTorch, ``nvcc``, a C++
compiler, ``ninja``, and what FlashInfer imports). The package's own ``__init__``, which imports
everything, is replaced by its version. The sources of 370 MB that a build reads stay here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

#: Run in a process of its own with the unpacked wheel on the path. Prints the modules imported,
#: then where each library was built and where it belongs in the package.
BUILD = """
import sys
from pathlib import Path
import torch
import flashinfer.decode
from flashinfer.jit.attention import modules
bf16, fp8, index = torch.bfloat16, torch.float8_e4m3fn, torch.int32
common = (bf16, index, 128, 128, 0, False, False)
specs = [
    modules._gen_batch_prefill_primary_module("fa2", bf16, kv, *common, False) for kv in (bf16, fp8)
]
specs.append(modules.gen_batch_decode_module(bf16, bf16, *common))
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "flashinfer" and getattr(module, "__file__", None):
        print("python", module.__file__)
if sys.argv[1] == "build":
    for spec in specs:
        spec.build(verbose=False)
        print("library", spec.jit_library_path, spec.aot_path)
"""
TEMPLATES = "flashinfer/data/csrc/batch_*"
# The driver's library is linked by name only; here there may be none.
_STUB = "int no_driver_here;"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.prepare_flashinfer", description=__doc__
    )
    parser.add_argument("wheel", type=Path, help="of FlashInfer, flashinfer_python-*.whl")
    parser.add_argument("folder", type=Path, help="what --peers of benchmarks.gpu will name")
    parser.add_argument("--work", type=Path, required=True, help="scratch, 1 GB; kept for a rerun")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args(argv)
    unpacked = unpack(options.wheel, options.work)
    lines = run_build(unpacked, options.work, options.jobs)
    target = options.folder / "flashinfer-trimmed"
    collect(lines, unpacked, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


def unpack(wheel: Path, work: Path) -> Path:
    """Unpack the wheel, its ``__init__`` replaced."""
    place = work / "unpacked"
    if not (place / "flashinfer").is_dir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    init = place / "flashinfer/__init__.py"
    init.write_text("from .version import __version__ as __version__\n", encoding="utf-8")
    return place


def run_build(unpacked: Path, work: Path, jobs: int) -> list[list[str]]:
    """Import and build in a process of its own; return what it printed, in words."""
    stub = work / "stub"
    stub.mkdir(parents=True, exist_ok=True)
    source = stub / "stub.c"
    source.write_text(_STUB, encoding="utf-8")
    library = stub / "libcuda.so"
    make = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(make, check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(unpacked), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "LIBRARY_PATH": str(stub),
        "CUDA_HOME": os.environ.get("CUDA_HOME", "/usr/local/cuda"),
        "MAX_JOBS": str(jobs),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_WORKSPACE_BASE": str(work),
    }
    command = [sys.executable, "-c", BUILD, "build"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [line.split() for line in done.stdout.splitlines()]


def collect(lines: list[list[str]], unpacked: Path, target: Path) -> None:
    """Copy what was imported, and put the libraries where the package looks for them first."""
    shutil.rmtree(target, ignore_errors=True)
    for kind, path, *rest in (line for line in lines if line[:1] in (["python"], ["library"])):
        wanted = Path(rest[0] if kind == "library" else path)
        into = target / wanted.relative_to(unpacked.resolve())
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into)
    for template in unpacked.glob(TEMPLATES):
        into = target / template.relative_to(unpacked)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template, into)
    for licence in unpacked.glob("*.dist-info/**/LICENSE*"):
        shutil.copyfile(licence, target / licence.name)


if __name__ == "__main__":
    main()
