"""Compiled kernels on disk, so that a second process does not compile them again.

An entry is named by a digest of everything that decides its bytes: all sources, options,
architecture, and the compiler's build. It starts with a digest of its image, so a damaged one is
compiled again, and appears whole or not at all.

Entries are machine code: they lie in a folder of the user's own. ``PAGEDTQ_CACHE_DIR`` names
another; empty, nothing is kept. Nothing is ever removed: deleting the folder is safe at any time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from . import kernel_source
from .kernel_source import Specialisation

#: Environment variable that names the folder; empty: no cache.
FOLDER = "PAGEDTQ_CACHE_DIR"

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Return where compiled kernels are kept; None if nowhere."""
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named) if named else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "pagedtq" / "kernels"


def load_image(special: Specialisation, arch: int) -> bytes:
    """Return the machine code of a specialisation, from the cache or from `compile_cubin`.

    Parameters
    ----------
    special : Specialisation
        What to compile.
    arch : int
        Compute capability without the dot: 80, 90, 120.

    Raises
    ------
    BackendUnavailable, KernelCompileError
        As `compile_cubin` does. That a cache cannot be read or written is no error.
    """
    folder = cache_folder()
    if folder is None:
        return kernel_source.compile_cubin(special, arch).image
    path = folder / f"{entry_name(special, arch)}.cubin"
    image = _read(path)
    if image is None:
        image = kernel_source.compile_cubin(special, arch).image
        _write(path, image)
    return image


def entry_name(special: Specialisation, arch: int) -> str:
    """Return the digest that names an entry, as hexadecimal text."""
    parts = (
        kernel_source.folder_digest(special),
        kernel_source.compiler_build(),
        special.file,
        *kernel_source.all_options(special, arch),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    image = entry[_DIGEST_BYTES:]
    return image if entry[:_DIGEST_BYTES] == hashlib.sha256(image).digest() else None


def _write(path: Path, image: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError:
        # A full disk or a folder that cannot be written costs the next process time, no more.
        if temporary is not None:
            temporary.unlink(missing_ok=True)
