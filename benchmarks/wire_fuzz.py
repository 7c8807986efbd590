"""Fuzzing the reader of the wire format with atheris, guided by coverage.

Inputs are streams and files that began as valid ones. They are mutated by libFuzzer; half of the
time their checksums are made right again, so that what lies behind these is reached too. Each must
give a typed error and an untouched cache, or a sound sequence that can be closed again. Anything
else ends the run with the input that caused it, and nothing is written.

Needs ``pip install atheris``. The inputs are decoded in a child process, which libFuzzer owns.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Nothing of pagedtq is imported up here: the child instruments it while it imports it.

RUNS, QUICK_RUNS = 200_000, 2_000
_HEADER, _FOOTER, _TRAILER = 172, 8, 40


def resealed(data: bytes) -> bytes:
    """Make the checksums of a stream right again as far as its own header leads to them.

    Written from the description of the format, without the library.
    """
    if len(data) < _HEADER:
        return data
    changed = bytearray(data)
    changed[168:_HEADER] = _crc(changed[:168])
    filled, page_bytes, metadata_bytes = (
        struct.unpack_from("<Q", changed, at)[0] for at in (120, 144, 152)
    )
    at = _HEADER + metadata_bytes
    if not 4 <= metadata_bytes <= len(changed) - _HEADER:
        return bytes(changed)
    changed[at - 4 : at] = _crc(changed[_HEADER : at - 4])
    digest = hashlib.sha256(changed[:at])
    for number in range(min(filled, 64)):
        end = at + page_bytes + _FOOTER
        if end > len(changed):
            return bytes(changed)
        index = number.to_bytes(4, "little")
        crc = _crc(index + changed[at : end - _FOOTER])
        changed[end - _FOOTER : end] = index + crc
        digest.update(index + crc)
        at = end
    # Rings and sinks are left as they are; without any the trailer follows.
    if at == len(changed) - _TRAILER:
        changed[-32:] = digest.digest()
    return bytes(changed)


def _crc(data: bytes | bytearray) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def child(folder: Path, runs: int, seed: int) -> None:
    """Decode ``runs`` inputs and write what came of them; never returns."""
    import atheris

    with atheris.instrument_imports(include=["pagedtq"]):
        import pagedtq.wire  # noqa: F401
        from pagedtq.errors import CapacityError, WireError
    decoders, seeds = decoders_and_seeds(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for which, valid in enumerate(seeds):
        (corpus / str(which)).write_bytes(bytes([which]) + valid)
    counts: dict[str, int] = {}
    distinct = set()
    begin = time.monotonic()

    def decode(data: bytes) -> None:
        if len(data) < 2:
            return
        try:
            decoders[data[0] % len(decoders)](data[1:])
            outcome = "accepted"
        except (WireError, CapacityError) as error:
            outcome = type(error).__name__
        counts[outcome] = counts.get(outcome, 0) + 1
        distinct.add(hash(data))
        if sum(counts.values()) >= runs:
            report = {
                "outcomes": counts,
                "distinct": len(distinct),
                "seconds": time.monotonic() - begin,
            }
            (folder / "report.json").write_text(json.dumps(report))
            # libFuzzer would end the process in its own way.
            os._exit(0)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        mutated = bytes(atheris.Mutate(data, max_size))
        if random.Random(seed).random() < 0.5:
            return mutated
        return mutated[:1] + resealed(mutated[1:])

    # A seed of 0 would be one of its own choice.
    options = ["-max_len=4096", "-verbosity=0", f"-seed={seed + 1}", str(corpus)]
    atheris.Setup([sys.argv[0], *options], decode, custom_mutator=mutate)
    atheris.Fuzz()


def decoders_and_seeds(folder: Path) -> tuple[list[Callable[[bytes], None]], list[bytes]]:
    """Return what decodes an input, and a valid input for each."""
    import numpy as np

    from pagedtq import CacheConfig, PagedKVCache, TurboQuant
    from pagedtq.wire import (
        export_pages,
        export_sequence,
        import_pages,
        import_sequence,
        load_cache,
        save_cache,
    )

    windowed = CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        num_pages=24,
        page_size=16,
        keys=TurboQuant(bits=2),
        values=TurboQuant(bits=2),
        window=16,
        sinks=2,
        num_window_slots=6,
    )
    plain = windowed.replace(window=0, sinks=0, values=TurboQuant(bits=3))

    def filled(config: CacheConfig, tokens: int) -> tuple[PagedKVCache, int]:
        cache = PagedKVCache(config, num_threads=1)
        seq = cache.open()
        rows = np.random.default_rng(tokens).standard_normal((2, 1, tokens, 1, 8))
        cache.append(seq, *rows.astype(np.float32))
        return cache, seq

    def sequence(cache: PagedKVCache, data: bytes) -> None:
        version, used = cache.tables.version, cache.tables.pool.num_used
        try:
            seq = import_sequence(cache, [data])
        except BaseException:
            assert (cache.tables.version, cache.tables.pool.num_used) == (version, used)
            raise
        cache.check_integrity()
        cache.load(0, seq)
        cache.close(seq)
        cache.check_integrity()

    def pages(cache: PagedKVCache, data: bytes) -> None:
        assert import_pages(cache, [data]).shape[1] == cache.backend.layout.page_bytes

    def whole(config: CacheConfig, data: bytes) -> None:
        path = folder / "input"
        path.write_bytes(data)
        load_cache(path, config=config, num_threads=1).check_integrity()

    decoders: list[Callable[[bytes], None]] = []
    seeds = []
    for config, tokens in ((windowed, 5), (windowed, 53), (plain, 20)):
        cache, seq = filled(config, tokens)
        decoders.append(functools.partial(sequence, cache))
        seeds.append(b"".join(export_sequence(cache, seq)))
    cache, seq = filled(plain, 40)
    decoders.append(functools.partial(pages, cache))
    seeds.append(b"".join(export_pages(cache, cache.tables.block_table([seq])[0])))
    cache, seq = filled(windowed, 40)
    cache.truncate(cache.fork(seq), 20)
    save_cache(cache, folder / "cache.ptq")
    decoders.append(functools.partial(whole, windowed))
    seeds.append((folder / "cache.ptq").read_bytes())
    return decoders, seeds


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    from benchmarks.report import arguments, publish

    options: argparse.Namespace = arguments("wire_fuzz", __doc__)
    runs = QUICK_RUNS if options.quick else RUNS
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.wire_fuzz", "--child", folder]
        command += [str(runs), str(options.seed)]
        done = subprocess.run(
            command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False
        )
        report = Path(folder, "report.json")
        if done.returncode or not report.exists():
            crash = next(Path(folder).glob("crash-*"), None)
            data = crash.read_bytes().hex() if crash else "unknown"
            log = done.stderr[-4000:]
            sys.exit(f"{log}\nthe child ended with {done.returncode}; its input was {data}")
        found: dict[str, Any] = json.loads(report.read_text())
    total = sum(found["outcomes"].values())
    rows = [
        {"outcome": name, "inputs": count, "share": count / total}
        for name, count in sorted(found["outcomes"].items(), key=lambda item: -item[1])
    ]
    notes = (
        f"{total} inputs, {found['distinct']} of them distinct, in {found['seconds']:.0f} s; "
        "untyped exceptions: 0",
        f"atheris {version('atheris')}, guided by the coverage of pagedtq; sequences, bare pages "
        "and whole files",
    )
    publish(
        "wire_fuzz",
        rows,
        notes=notes,
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


if __name__ == "__main__":
    main()
