"""``pagedtq selftest``: a few seconds that tell whether this installation computes correctly."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import msgspec
import numpy as np

from ..cache import PagedKVCache
from ..codec.turboquant import TurboQuantCodec
from ..config import TurboQuant, preset
from ..sim.table import format_table
from .arguments import Commands, add_command

_DIM = 128


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One figure and the bar it must stay below."""

    name: str
    value: float
    bar: float

    @property
    def passed(self) -> bool:
        """Whether it does (NaN does not)."""
        return self.value <= self.bar


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "selftest", run, "check codec, pages and attention on this host")
    parser.add_argument("--seed", type=int, default=0, help="of the vectors")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; exit code 1 if a check fails."""
    checks = [*codec_checks(arguments.seed), *cache_checks(arguments.seed)]
    passed = all(check.passed for check in checks)
    if arguments.json:
        answer = {"schema": 1, "passed": passed, "checks": checks}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        rows = [
            (c.name, f"{c.value:.2e}", f"{c.bar:.0e}", "ok" if c.passed else "FAILED")
            for c in checks
        ]
        print(format_table(("check", "value", "bar", ""), rows))
    return 0 if passed else 1


def codec_checks(seed: int) -> Iterator[Check]:
    """Compare the codec's distortion on random unit vectors with its codebook's exact value."""
    rng = np.random.Generator(np.random.PCG64(seed))
    vectors = rng.standard_normal((4096, 2, _DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    for bits in (2, 3, 4, 8):
        codec = TurboQuantCodec(TurboQuant(bits=bits, scale="none"), _DIM, 2, seed=seed)
        error = np.square(codec.decode(codec.encode(vectors)) - vectors).sum(axis=2).mean()
        off = abs(float(error) / codec.book.distortion - 1)
        yield Check(name=f"{bits}-bit distortion, relative deviation", value=off, bar=0.02)


def cache_checks(seed: int) -> Iterator[Check]:
    """Compare attention over pages with float64 on what the pages and windows hold."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for name, window in (("k4v4", None), ("k4v4", 0), ("k3v4", None), ("k2v2", None), ("exact", 0)):
        config = preset(
            name, num_layers=2, num_kv_heads=2, head_dim=_DIM, num_pages=12, window=window
        )
        cache = PagedKVCache(config, backend="host", debug=True)
        ids = [cache.open(), cache.open()]
        for seq_id, length in zip(ids, (3 * config.page_size + 5, 70)):
            keys, values = rng.standard_normal((2, 2, length, 2, _DIM), dtype=np.float32)
            cache.append(seq_id, keys, values)
        queries = rng.standard_normal((2, 8, _DIM), dtype=np.float32)
        out, _ = cache.attend(1, queries, ids)
        worst = 0.0
        for seq_id, query, got in zip(ids, queries, out):
            keys, values, _ = cache.load(1, seq_id)
            exact = _attention(query, keys, values)
            error = np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1)
            worst = max(worst, float(error.max()))
        label = f"{name}{'' if window is None else ', no window'}: attend against float64"
        yield Check(name=label, value=worst, bar=1e-5)
        cache.close(ids)
        yield Check(name=f"{name}: pages held after close", value=cache.stats().pages_used, bar=0)


def _attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    heads = np.repeat(np.arange(keys.shape[1]), len(query) // keys.shape[1])
    k, v = (array.astype(np.float64)[:, heads] for array in (keys, values))
    logits = np.einsum("hd,thd->ht", query.astype(np.float64), k) / query.shape[1] ** 0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: np.ndarray = np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), v)
    return out
