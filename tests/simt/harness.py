"""Run the CUDA kernels' own source on the CPU: compile one file with a C++ compiler, launch it.

``fibers.h`` explains the execution model and ``simt.h`` stands in for the device. Arrays passed to
a launch are copied between guard pages for its duration, so that a kernel which reads or writes
outside of them faults, and copied back afterwards. Arrays of a `HarnessDevice` stay there.

Without a compiler the tests that need one are skipped, loudly. ``PAGEDTQ_REQUIRE_SIMT=1``, which
CI sets, makes that a failure.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pagedtq.backends import kernel_source

HERE = Path(__file__).parent
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
_FLAGS = (
    "-std=c++17 -O2 -shared -fPIC -ffp-contract=off -fno-strict-aliasing -fno-gnu-unique "
    "-U_FORTIFY_SOURCE "
    "-fsanitize=alignment,bounds,shift -fsanitize-undefined-trap-on-error "
    "-Wall -Wno-unknown-pragmas -Wno-unused-function -Wno-psabi -Werror"
)
#: Before and after every array, addresses that fault: a wrong index of thousands lands there, too.
_GUARD_BYTES = 64 * mmap.PAGESIZE
#: Stacks of a block's threads, shared by all kernels: `kMaxThreads` of ``fibers.h``.
_STACKS = (ctypes.c_void_p * 1024)()
_POISON = 0xFF
_lock = threading.Lock()
_libc = ctypes.CDLL(None, use_errno=True)


class KernelFault(RuntimeError):
    """A kernel did what it must not: the message says which thread, and what."""


def require_compiler() -> str:
    """Return the C++ compiler; skip the test, or fail it where CI forbids that, without one."""
    found = shutil.which("g++") or shutil.which("c++")
    if found is not None:
        return found
    reason = "no g++ on PATH: the kernel sources were NOT run"
    if os.environ.get("PAGEDTQ_REQUIRE_SIMT") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def compile_kernels(source: str | Path, macros: Mapping[str, object] | None = None) -> Kernels:
    """Compile a kernel file and return its launchers.

    Parameters
    ----------
    source : str or Path
        A file name in ``kernels/``, or the path of any file.
    macros : mapping, optional
        ``-D`` definitions of the specialisation.
    """
    path = kernel_source.kernel_folder() / source if isinstance(source, str) else source
    defined = tuple(sorted((name, str(value)) for name, value in (macros or {}).items()))
    return _compile(path, defined, require_compiler())


class Kernels:
    """The kernels of one compiled file.

    Parameters
    ----------
    library : ctypes.CDLL
        The shared object.
    names : sequence of str
        Its kernels.
    """

    def __init__(self, library: ctypes.CDLL, names: Sequence[str]) -> None:
        self._library = library
        self.names = tuple(names)
        library.simt_use_stacks(_STACKS)

    def launch(
        self,
        name: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: object,
        shared_bytes: int = 0,
        seed: int = 0,
    ) -> None:
        """Run a kernel over a grid.

        Parameters
        ----------
        name : str
            The kernel.
        grid, block : int or tuple of int
            As on a device.
        *arguments
            In the kernel's order: NumPy arrays (by address; read-only ones are checked to be left
            alone), NumPy scalars and ctypes structures (by value), None (a null pointer).
        shared_bytes : int
            Dynamic shared memory.
        seed : int
            0 runs threads in a fixed order, anything else in a random one.

        Raises
        ------
        KernelFault
            If the kernel misbehaves; what it wrote until then is lost.
        """
        sizes = self._param_sizes(name)
        assert len(sizes) == len(arguments), f"{name} takes {len(sizes)} arguments"
        copies: list[tuple[np.ndarray, _Guarded]] = []
        values = []
        for position, (argument, size) in enumerate(zip(arguments, sizes)):
            value = self._value(argument, copies)
            wanted = f"argument {position} of {name} has {size} bytes, got {argument!r:.80}"
            assert ctypes.sizeof(value) == size, wanted
            values.append(value)
        params = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        message = ctypes.create_string_buffer(512)
        run = self._library[f"simt_launch_{name}"]
        run.argtypes = [
            *[ctypes.c_void_p] * 2,
            ctypes.c_size_t,
            ctypes.c_uint64,
            *[ctypes.c_void_p] * 2,
            ctypes.c_size_t,
        ]
        with _lock:
            failed = run(_dim3(grid), _dim3(block), shared_bytes, seed, params, message, 512)
        if failed:
            raise KernelFault(f"{name}: {message.value.decode()}{_describe(message.value, copies)}")
        for array, memory in copies:
            memory.check(f"{name}: wrote before or after an array {array.dtype}{list(array.shape)}")
            if array.flags.writeable:
                array[...] = memory.array
            else:
                same = np.array_equal(_bytes(array), _bytes(memory.array))
                assert same, f"{name} wrote into an input {array.dtype}{list(array.shape)}"

    def _param_sizes(self, name: str) -> list[int]:
        count = self._library[f"simt_params_{name}"]
        sizes = (ctypes.c_uint * 64)()
        return list(sizes[: count(sizes)])

    @staticmethod
    def _value(argument: object, copies: list[tuple[np.ndarray, _Guarded]]) -> ctypes._CData:
        if argument is None:
            return ctypes.c_void_p(0)
        if isinstance(argument, np.ndarray):
            if isinstance(argument, _GuardedBase) or isinstance(argument.base, _GuardedBase):
                return ctypes.c_void_p(argument.ctypes.data)
            memory = _Guarded(argument.shape, argument.dtype)
            memory.array[...] = argument
            copies.append((argument, memory))
            return ctypes.c_void_p(memory.array.ctypes.data)
        if isinstance(argument, np.generic):
            return (ctypes.c_char * argument.itemsize).from_buffer_copy(argument.tobytes())
        assert isinstance(argument, ctypes.Structure), f"pass NumPy scalars, got {argument!r}"
        return argument


class _GuardedBase(np.ndarray):
    """Marks arrays that lie between guard pages, and keeps their mapping alive."""

    mapping: mmap.mmap


class _Guarded:
    """An array that ends (but for less than 16 bytes) at pages no access may touch.

    ``sparse`` ones are zero and take memory where they are written: they may be larger than it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sparse: bool = False) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        padded = -(-size // 16) * 16
        pages = -(-padded // mmap.PAGESIZE) * mmap.PAGESIZE
        mapping = _map_sparse(pages) if sparse else mmap.mmap(-1, pages + 2 * _GUARD_BYTES)
        whole = np.frombuffer(mapping, np.uint8)
        self.begin = whole.ctypes.data
        self.end = self.begin + whole.size
        if not sparse:
            whole[_GUARD_BYTES:-_GUARD_BYTES] = _POISON
        for address in (self.begin, self.end - _GUARD_BYTES):
            assert _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_GUARD_BYTES), 0) == 0
        start = _GUARD_BYTES + pages - padded
        self._before = whole[_GUARD_BYTES:start]
        self._after = whole[start + size : start + padded]
        base = whole[start : start + size].view(_GuardedBase)
        base.mapping = mapping
        self.array = np.ndarray(shape, dtype, base)

    def check(self, complaint: str) -> None:
        """Refuse a run that wrote into the slack around the array."""
        intact = (self._before == _POISON).all() and (self._after == _POISON).all()
        if not intact:
            raise KernelFault(complaint)


def _map_sparse(size: int) -> mmap.mmap:
    """Map a file of holes, which no limit on committed memory counts, with room for the guards."""
    with tempfile.TemporaryFile() as file:
        file.truncate(size + 2 * _GUARD_BYTES)
        return mmap.mmap(file.fileno(), size + 2 * _GUARD_BYTES)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _describe(message: bytes, copies: list[tuple[np.ndarray, _Guarded]]) -> str:
    """Say which array a faulting address belongs to."""
    found = re.search(rb"fault at address 0x([0-9a-f]+)", message)
    if found is None:
        return ""
    address = int(found[1], 16)
    for array, memory in copies:
        if memory.begin <= address < memory.end:
            first = memory.array.ctypes.data
            place = f"byte {address - first} of array {array.dtype}{list(array.shape)}"
            return f" ({place}, {array.nbytes} bytes)"
    return " (in no array of the launch)"


def _dim3(size: int | tuple[int, ...]) -> ctypes.Array[ctypes.c_uint]:
    given = (size,) if isinstance(size, int) else size
    return (ctypes.c_uint * 3)(*given, *(1,) * (3 - len(given)))


@cache
def _compile(path: Path, macros: tuple[tuple[str, str], ...], compiler: str) -> Kernels:
    text = path.read_text(encoding="utf-8")
    names = _KERNEL.findall(text)
    unit = f'#include "device.cuh"\n#include "{path}"\n'
    unit += "".join(f"SIMT_EXPORT({name})\n" for name in names)
    folders = (f"-I{kernel_source.kernel_folder()}", f"-I{HERE}", f"-I{path.parent}")
    flags = [*_FLAGS.split(), *_processor_flags(), *(f"-D{n}={v}" for n, v in macros)]
    runtime = [
        (HERE / name).read_text(encoding="utf-8") for name in ("fibers.h", "launch.h", "simt.h")
    ]
    stamp = "\0".join((unit, text, *runtime, *flags, compiler, kernel_source.source_digest()))
    folder = Path(tempfile.gettempdir()) / f"pagedtq-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{path.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        # Built aside and renamed, so that two test runs never load half a file.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            main, built = Path(scratch) / "main.cpp", Path(scratch) / "built.so"
            main.write_text(unit)
            command = [compiler, *flags, *folders, "-o", str(built), str(main)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                spec = " ".join(f"{n}={v}" for n, v in macros)
                raise RuntimeError(f"{path.name} [{spec}] does not compile:\n{done.stderr}")
            built.replace(target)
    return Kernels(ctypes.CDLL(str(target)), names)


@cache
def _processor_flags() -> tuple[str, ...]:
    """Half conversions in hardware where the processor has them; the results are the same."""
    if os.uname().machine != "x86_64":
        return ()
    info = Path("/proc/cpuinfo")
    fast = info.exists() and " f16c" in info.read_text()
    return ("-fcf-protection=none", *(("-mf16c",) if fast else ()))
