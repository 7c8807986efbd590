"""Find the CUDA sources, read them, digest them. Compiles nothing and needs no GPU.

``kernels/`` is a top-level folder of the repository and becomes ``pagedtq/kernels`` in a wheel, so
there are two places to look. A real path is needed either way: NVRTC takes it as ``-I``.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from ..errors import BackendUnavailable

_SUFFIXES = (".cu", ".cuh")


def kernel_folder() -> Path:
    """Return the folder of the CUDA sources, in an installed wheel or in a checkout.

    Raises
    ------
    BackendUnavailable
        If neither place has one: the installation is incomplete.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if folder.is_dir() and any(path.suffix in _SUFFIXES for path in folder.iterdir()):
            return folder
    raise BackendUnavailable(
        f"expected CUDA sources in {package / 'kernels'}, found none; reinstall pagedtq"
    )


def read_kernels() -> dict[str, str]:
    """Return the sources by file name, in name order."""
    paths = sorted(path for path in kernel_folder().iterdir() if path.suffix in _SUFFIXES)
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def digest_sources(sources: dict[str, str]) -> str:
    """Return the SHA-256 of files as hexadecimal text; names and boundaries count.

    Parameters
    ----------
    sources : dict of str to str
        Text by file name; the order of insertion does not matter.
    """
    digest = hashlib.sha256()
    for name in sorted(sources):
        body = sources[name].encode()
        digest.update(f"{name}\0{len(body)}\0".encode())
        digest.update(body)
    return digest.hexdigest()


@cache
def source_digest() -> str:
    """Return the digest of all kernel files.

    It belongs in every compile command: a compiler cache keyed on the main source alone would not
    notice that an included header changed.
    """
    return digest_sources(read_kernels())
