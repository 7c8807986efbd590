"""One cache on the host and one on a device, driven alike and compared."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np

from benchmarks.gpu.listing_device import ListingDevice
from benchmarks.gpu.page_differences import compare_pages
from pagedtq import CacheConfig, PagedKVCache
from pagedtq.backends.cuda import CudaBackend
from pagedtq.codec import DenseRotationWarning

#: Relative error of outputs (L2 per query) and absolute error of lse.
BOUND = 2e-3


def assert_states_agree(out, lse, want, want_lse) -> None:
    """Compare each head, and each half of each head, with the size of the whole."""
    assert out.shape == want.shape and lse.shape == want_lse.shape
    half = out.shape[-1] // 2
    size = np.linalg.norm(want, axis=-1)
    for part in (slice(0, half), slice(half, None)):
        error = np.linalg.norm(out[..., part] - want[..., part], axis=-1)
        assert (error <= BOUND * size).all(), f"worst {np.nanmax(error / size):.2e}"
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=BOUND)


class Twins:
    """Two caches of one configuration that get the same calls.

    Pages are equal to the byte: the harness must show that, and `check_pages` may demand it of a
    device, which else has the little room that `compare_pages` knows. On a device that runs nothing
    the calls are made and nothing is compared; then both caches are of that kind.
    """

    def __init__(
        self, config: CacheConfig, device, *, key_means=None, seed=0, backend=None, **options
    ) -> None:
        factory = partial(CudaBackend, device=device, **(backend or {}))
        common = {"key_means": key_means, "debug": True, **options}
        self.runs = not isinstance(device, ListingDevice)
        self.config, self.device = config, device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DenseRotationWarning)
            if self.runs:
                self.host = PagedKVCache(config, "host", num_threads=1, **common)
            else:
                nothing = partial(CudaBackend, device=ListingDevice())
                self.host = PagedKVCache(config, nothing, **common)
            self.cuda = PagedKVCache(config, factory, **common)
        self.exact = getattr(device, "seed", None) is not None
        self.ids: list[tuple[int, int]] = []
        self.rng = np.random.default_rng(seed)

    @property
    def both(self):
        return (self.host, 0), (self.cuda, 1)

    def open(self, *args, **options) -> int:
        self.ids.append(tuple(cache.open(*args, **options) for cache, _ in self.both))
        return len(self.ids) - 1

    def fork(self, index: int) -> int:
        self.ids.append(tuple(cache.fork(self.ids[index][i]) for cache, i in self.both))
        return len(self.ids) - 1

    def members(self, indices, side: int) -> np.ndarray:
        return np.array([self.ids[index][side] for index in indices], np.int64)

    def each(self, name: str, index: int, *args) -> None:
        """Call a method of both caches on one sequence."""
        for cache, i in self.both:
            getattr(cache, name)(self.ids[index][i], *args)

    def draw(self, count: int, layers: int | None = None, scale: float = 1.0):
        shape = (2, count, self.config.num_kv_heads, self.config.head_dim)
        shape = shape if layers is None else (2, layers, *shape[1:])
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)

    def append(self, indices, counts, offset=0.0, **options) -> None:
        keys, values = self.draw(sum(counts), self.config.num_layers)
        for cache, i in self.both:
            cache.append(self.members(indices, i), keys + offset, values, counts, **options)

    def queries(self, tokens: int, group: int) -> np.ndarray:
        shape = (tokens, group * self.config.num_kv_heads, self.config.head_dim)
        return self.rng.standard_normal(shape).astype(np.float32)

    # -- comparisons -------------------------------------------------------------------------

    def check_pages(self, exact: bool = False) -> None:
        """Compare every byte of the pools, and of the exact windows.

        ``exact``: a device, too, must show equal bytes.
        """
        if not self.runs:
            return
        layout = self.host.backend.layout
        ours, theirs = self.fetch(self.cuda.backend.pool), self.host.backend.pool
        if not np.array_equal(ours, theirs):
            found = compare_pages(layout, ours, theirs)
            assert found.within_bounds, found
            bytes_ = int((ours != theirs).sum())
            assert not (exact or self.exact), f"{bytes_} bytes differ: {found}"
        for layer in range(self.config.num_layers):
            if self.config.has_overlay(layer):
                for name in ("ring", "sink"):
                    rows = getattr(self.host.backend.window(layer), name)
                    got = self.fetch(getattr(self.cuda.backend.window(layer), name))
                    assert np.array_equal(got.view(np.uint8), rows.view(np.uint8)), name

    def check_attend(self, layer, indices, group, q_lens=None, chunk=False, **options) -> None:
        tokens = len(indices) if q_lens is None else sum(q_lens)
        queries = self.queries(tokens, group)
        own = self.draw(tokens) if chunk else (None, None)
        (want, want_lse), (out, lse) = (
            cache.attend(layer, queries, self.members(indices, i), q_lens, None, *own, **options)
            for cache, i in self.both
        )
        self.check_state(self.fetch(out), self.fetch(lse), want, want_lse)

    def check_state(self, out, lse, want, want_lse) -> None:
        """Compare what attention returned, where the kernels run."""
        if self.runs:
            assert_states_agree(out, lse, want, want_lse)

    def check_scores(self, layer, indices, group) -> None:
        queries = self.queries(len(indices), group)
        want, got = (
            cache.score(layer, queries, self.members(indices, i)) for cache, i in self.both
        )
        stats, reference = self.cuda.page_stats(got), self.host.page_stats(want)
        if not self.runs:
            return
        assert np.array_equal(got.indptr, want.indptr)
        assert np.array_equal(got.positions, want.positions)
        values = self.fetch(got.values)
        size = np.linalg.norm(queries, axis=-1).max() * np.sqrt(2 * self.config.head_dim)
        assert values.shape == want.values.shape
        assert (np.abs(values - want.values) <= BOUND * size).all()
        assert np.array_equal(stats.blocks, reference.blocks)
        assert np.array_equal(stats.indptr, reference.indptr)
        assert (np.abs(stats.maximum - reference.maximum) <= BOUND * size).all()
        np.testing.assert_allclose(stats.mass, reference.mass, rtol=0.1, atol=1e-6)

    def check_load(self, layer, index) -> None:
        (want_k, want_v, want_p), (keys, values, positions) = (
            cache.load(layer, self.ids[index][i]) for cache, i in self.both
        )
        if not self.runs:
            return
        assert np.array_equal(positions, want_p)
        for got, want in ((self.fetch(keys), want_k), (self.fetch(values), want_v)):
            size = np.linalg.norm(want, axis=-1)
            assert (np.linalg.norm(got - want, axis=-1) <= 1e-5 * size).all()

    def fetch(self, array) -> np.ndarray:
        return self.cuda.backend.to_host(array)
