"""Find the CUDA sources, read them, digest them, compile them with NVRTC. Needs no GPU.

``kernels/`` is a top-level folder of the repository and becomes ``pagedtq/kernels`` in a wheel, so
there are two places to look. A real path is needed either way: NVRTC takes it as ``-I``.

A *specialisation* is a file and its ``-D`` macros. The sources include no header but their own, so
no CUDA toolkit is needed beside NVRTC, which CuPy binds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BackendUnavailable, KernelCompileError

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


def read_kernels(folder: Path | None = None) -> dict[str, str]:
    """Return the sources of a folder, `kernel_folder` by default, by file name in name order."""
    places = (folder or kernel_folder()).iterdir()
    paths = sorted(path for path in places if path.suffix in _SUFFIXES)
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


@cache
def _digest_of(folder: Path) -> str:
    return digest_sources(read_kernels(folder))


class Specialisation(NamedTuple):
    """A kernel file with the macros that fix its compile-time choices, in name order."""

    file: str
    macros: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.file} [{' '.join(f'{name}={value}' for name, value in self.macros)}]"


def specialise(file: str, macros: Mapping[str, object]) -> Specialisation:
    """Name a specialisation; the order of macros does not matter."""
    return Specialisation(file, tuple(sorted((name, str(value)) for name, value in macros.items())))


def compile_options(special: Specialisation) -> tuple[str, ...]:
    """Return NVRTC options of a specialisation, architecture left out.

    The digest of all sources is among them: compiler caches hash options, not included headers.
    A file elsewhere, named by its path, finds headers beside it too.
    """
    folder = kernel_folder()
    return (
        "-std=c++17",
        *(f"-I{place}" for place in dict.fromkeys((folder, (folder / special.file).parent))),
        f"-DPAGEDTQ_SOURCE_DIGEST=0x{source_digest()[:16]}ull",
        *(f"-D{name}={value}" for name, value in special.macros),
    )


def all_options(special: Specialisation, arch: int) -> tuple[str, ...]:
    """Return every NVRTC option of a specialisation: what devices run and what the gate checks.

    Subnormal numbers are kept and divisions are exact, which NVRTC does where no option says
    otherwise: pages are equal to the host's because of it.
    """
    return (f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v", *compile_options(special))


def folder_digest(special: Specialisation) -> str:
    """Return the digest of the sources beside a specialisation's file.

    Together with `source_digest`, which `compile_options` holds, it names every text that the
    compiler reads.
    """
    return _digest_of((kernel_folder() / special.file).parent)


def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise BackendUnavailable(f"compiling kernels needs CuPy and NVRTC: {error}") from error
    return nvrtc


@cache
def compiler_build() -> str:
    """Return NVRTC's version and build, which it writes above the PTX of an empty program.

    Raises
    ------
    BackendUnavailable
        Without CuPy or NVRTC.
    """
    nvrtc = _nvrtc()
    program = nvrtc.createProgram("", "", (), ())
    try:
        nvrtc.compileProgram(program, ())
        lines = nvrtc.getPTX(program).decode(errors="replace").splitlines()
    finally:
        nvrtc.destroyProgram(program)
    return "\n".join(line for line in lines if line.startswith("//"))


def pick_architecture(arch: int) -> int:
    """Return the architecture to compile for so that a device can run it.

    The device's own where NVRTC knows it, else the newest before it of the same generation: machine
    code runs on later members of its generation.

    Parameters
    ----------
    arch : int
        The device's compute capability without the dot.

    Raises
    ------
    BackendUnavailable
        If NVRTC is older than the device's generation, or without it.
    """
    nvrtc = _nvrtc()
    known: tuple[int, ...] = nvrtc.getSupportedArchs()
    fitting = [one for one in known if one // 10 == arch // 10 and one <= arch]
    if not fitting:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise BackendUnavailable(
            f"NVRTC {version} compiles for {', '.join(f'sm_{one}' for one in known)}; this device "
            f"is sm_{arch}: install a CuPy with another NVRTC"
        )
    return max(fitting)


class Cubin(NamedTuple):
    """A compiled specialisation.

    Attributes
    ----------
    image : bytes
        The ELF file.
    registers, stack_bytes, spill_bytes : int
        Per thread, as the assembler reports them (spills: stores and loads together), largest over
        the kernels of the file.
    """

    image: bytes
    registers: int
    stack_bytes: int
    spill_bytes: int


def compile_cubin(special: Specialisation, arch: int) -> Cubin:
    """Compile a specialisation for an architecture; needs CuPy and NVRTC, no device.

    Parameters
    ----------
    special : Specialisation
        What to compile.
    arch : int
        Compute capability without the dot: 80, 90, 120.

    Raises
    ------
    BackendUnavailable
        Without CuPy or NVRTC.
    KernelCompileError
        With the compiler's log.
    """
    nvrtc = _nvrtc()
    path = kernel_folder() / special.file
    source = path.read_text(encoding="utf-8")
    # The compiler looks for included files beside the named one first, then in the folder given.
    program = nvrtc.createProgram(source, str(path), (), ())
    try:
        try:
            nvrtc.compileProgram(program, all_options(special, arch))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise KernelCompileError(
                f"{special} does not compile for sm_{arch}: {error}\n{log}"
            ) from error
        # The binding takes the size for that of a C string and drops the last byte, a zero.
        image = nvrtc.getCUBIN(program) + b"\0"
        log = nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)

    def largest(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, log)), default=0)

    return Cubin(
        image,
        largest(r"Used (\d+) registers"),
        largest(r"(\d+) bytes stack frame"),
        largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads"),
    )
