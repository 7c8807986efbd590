"""What two caches must agree on before bytes may move between them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec.codebook import codebook
from ..config import CacheConfig, TurboQuant
from ..paging.layout import PageLayout


def codec_digest(config: CacheConfig, key_means: npt.NDArray[Any] | None) -> bytes:
    """Return the SHA-256 of everything that decides the bytes of a page, 32 bytes.

    Beyond `CacheConfig.format_digest` that is what the configuration only implies: the codebooks'
    tables and decision levels, the place of every plane, and the key means. A change of the
    library that would read old pages differently so becomes a mismatch and not noise.

    Parameters
    ----------
    config : CacheConfig
        The configuration.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]`` or None
        Key means.
    """
    digest = hashlib.sha256(config.format_digest())
    layout = PageLayout(config)
    widths = set()
    for layer, extent in enumerate(layout.extents):
        digest.update(f"layer {layer} {extent.nbytes}\n".encode())
        for name, plane in extent.planes.items():
            line = f"{name} {plane.offset} {plane.shape} {plane.dtype.str} {plane.interleaved}\n"
            digest.update(line.encode())
        for codec in config.layer_codecs(layer):
            if isinstance(codec, TurboQuant):
                widths.add(codec.code_bits)
    for width in sorted(widths):
        book = codebook(config.head_dim, width)
        digest.update(f"width {width}\n".encode())
        digest.update(np.asarray(book.table, "<f4").tobytes())
        digest.update(np.asarray(book.midpoints, "<f4").tobytes())
    if key_means is not None:
        digest.update(b"means\n")
        digest.update(np.ascontiguousarray(key_means, "<f4").tobytes())
    return digest.digest()


def sealed_only(config: CacheConfig) -> bool:
    """Whether pages hold bytes of coded positions only: all layers keep the exact window."""
    return all(config.has_overlay(layer) for layer in range(config.num_layers))


def changed_fields(mine: CacheConfig, theirs: CacheConfig) -> list[str]:
    """Name the fields of the format in which two configurations differ."""
    ours, other = mine.format_fields(), theirs.format_fields()
    return [name for name in ours if ours[name] != other[name]]
