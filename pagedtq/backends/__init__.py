"""Where page bytes live and who computes on them."""

from __future__ import annotations

from typing import Any, Literal

import numpy.typing as npt

from ..config import CacheConfig
from ..errors import ArgumentError
from .host import HostBackend

#: Every backend there is; the CUDA one joins when its kernels exist.
Backend = HostBackend


def select_backend(
    name: str,
    config: CacheConfig,
    *,
    key_means: npt.NDArray[Any] | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    num_threads: int | None = None,
) -> Backend:
    """Build a backend by name.

    Parameters
    ----------
    name : {"auto", "host"}
        ``"auto"`` picks what this machine has.
    config : CacheConfig
        What the backend holds.
    key_means, accumulate, num_threads
        As `HostBackend`.

    Raises
    ------
    ArgumentError
        If there is no backend of that name.
    """
    if name not in ("auto", "host"):
        raise ArgumentError(f"backend must be auto or host, got {name!r}")
    return HostBackend(config, key_means, accumulate, num_threads)


__all__ = ["Backend", "HostBackend", "select_backend"]
