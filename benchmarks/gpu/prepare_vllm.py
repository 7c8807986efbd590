"""Take vLLM's Triton TurboQuant store and decode out of its wheel, so that they import alone.

``python -m benchmarks.gpu.prepare_vllm SOURCE FOLDER`` writes ``FOLDER/vllm-turboquant`` (less than
100 kB): the files as they are, and stand-ins for the two modules that they ask which device this is
and for Triton. SOURCE is the wheel, or a folder it is installed in. Licence texts come along.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What is taken as it is.
FILES = (
    "vllm/v1/attention/ops/triton_turboquant_decode.py",
    "vllm/v1/attention/ops/triton_turboquant_store.py",
    "vllm/v1/attention/ops/triton_decode_attention.py",
    "vllm/model_executor/layers/quantization/turboquant/centroids.py",
)

STAND_INS = {
    "vllm/platforms.py": '''"""Stands in for vLLM's platform: CUDA, or an interpreter on the CPU."""

import torch


class _Platform:
    def is_rocm(self):
        return False

    def is_cuda(self):
        return torch.cuda.is_available()

    is_cuda_alike = is_cuda

    def is_xpu(self):
        return False


current_platform = _Platform()
''',
    "vllm/triton_utils.py": '''"""Stands in for vLLM's import of Triton."""

import triton
import triton.language as tl

__all__ = ["tl", "triton"]
''',
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.prepare_vllm", description=__doc__
    )
    parser.add_argument("source", type=Path, help="wheel of vLLM 0.33, or where it is installed")
    parser.add_argument("folder", type=Path, help="what --peers of benchmarks.gpu will name")
    options = parser.parse_args(argv)
    target = options.folder / "vllm-turboquant"
    extract(options.source, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e3:.0f} kB")


def extract(source: Path, target: Path) -> None:
    """Write the files, their stand-ins, and packages around them."""
    root: Any = source if source.is_dir() else zipfile.Path(source)
    for name in FILES:
        _write(target / name, (root / name).read_bytes())
    for info in (path for path in root.iterdir() if path.name.startswith("vllm-")):
        for place in (info, info / "licenses"):
            if place.is_dir():
                for path in place.iterdir():
                    if path.name.startswith("LICENSE"):
                        _write(target / path.name, path.read_bytes())
    for name, text in STAND_INS.items():
        _write(target / name, text.encode())
    for path in list(target.rglob("*.py")):
        folder = path.parent
        while folder != target:
            (folder / "__init__.py").touch()
            folder = folder.parent


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    main()
