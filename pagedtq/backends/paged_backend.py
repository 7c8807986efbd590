"""What backends have in common wherever their pool lies: its layout, and moving whole pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from ..config import CacheConfig
from ..paging.layout import PageLayout
from .dtypes import Float32
from .tokens import check_means

if TYPE_CHECKING:
    from .cuda_pages import CudaPages
    from .host_pages import PageBytes

Array = npt.NDArray[Any]


class PagedBackend:
    """Base of the backends.

    Parameters
    ----------
    config : CacheConfig
        Shape, codecs and pool size.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]`` or None
        Subtracted from keys before coding.

    Attributes
    ----------
    pages : PageBytes or CudaPages
        Whole pages of the pool.
    """

    pages: PageBytes | CudaPages

    def __init__(self, config: CacheConfig, key_means: Array | None) -> None:
        self.config = config
        self.layout = PageLayout(config)
        self.key_means = check_means(key_means, config)
        self.page_owners: Array | None = None

    def _layer_means(self) -> list[Float32 | None]:
        if self.key_means is None:
            return [None] * self.config.num_layers
        return list(self.key_means)

    def copy_pages(self, src: Array, dst: Array) -> None:
        """Copy whole pages, all layers and heads: ``dst[i]`` becomes ``src[i]``.

        Parameters
        ----------
        src, dst : ndarray of int ``[n]``
            Page ids in ``[1, num_pages)``; no page is both source and destination.

        Raises
        ------
        ArgumentError
            An id outside the pool; nothing was copied.
        """
        self.pages.copy(src, dst)

    def clear_norms(self, pages: Array) -> None:
        """Zero the norm planes and key bounds of pages, so that no stale norm is ever NaN."""
        self.pages.clear_norms(pages)

    def fill_pages(self, pages: Array, byte: int) -> None:
        """Fill whole pages with one byte (poison, in debug mode)."""
        self.pages.fill(pages, byte)

    def gather(self, pages: Array) -> Any:
        """Copy pages as slabs ``uint8[n, page_bytes]`` (see `PageLayout`), where the pool lies."""
        return self.pages.gather(pages)

    def scatter(self, slabs: Any, pages: Array) -> None:
        """Copy slabs ``uint8[n, page_bytes]`` into pages of the pool.

        With a device they may lie in either memory.
        """
        self.pages.scatter(slabs, pages)
