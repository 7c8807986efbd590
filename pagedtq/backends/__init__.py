"""Where page bytes live and who computes on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import numpy.typing as npt

from ..config import CacheConfig
from ..errors import ArgumentError, UnsupportedError
from .host import HostBackend

#: What every backend offers: the host's operations. `CudaBackend` takes and returns arrays on the
#: device besides.
Backend = HostBackend
#: Makes a backend: called with a configuration and key means (or None).
BackendFactory = Callable[[CacheConfig, "npt.NDArray[Any] | None"], Any]
BackendName = Literal["auto", "host", "cuda"]

#: Overrides what ``"auto"`` means.
BACKEND_VARIABLE = "PAGEDTQ_BACKEND"


def select_backend(
    backend: BackendName | BackendFactory,
    config: CacheConfig,
    *,
    key_means: npt.NDArray[Any] | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    num_threads: int | None = None,
    validate: bool = False,
) -> Backend:
    """Build a backend.

    Parameters
    ----------
    backend : {"auto", "host", "cuda"} or callable
        ``"auto"`` is ``"cuda"`` where there is a device and kernels for this configuration, and
        ``"host"`` otherwise, unless the environment variable ``PAGEDTQ_BACKEND`` names one.
        A callable is given configuration and key means and returns a backend, such as
        ``functools.partial(CudaBackend, split_tokens=1024)``.
    config : CacheConfig
        What the backend holds.
    key_means, accumulate, num_threads
        As `HostBackend`; the CUDA backend accumulates in float32 and takes no threads.
    validate : bool
        As `CudaBackend`; the host always validates.

    Raises
    ------
    ArgumentError
        If there is no backend of that name, or a callable's backend is for another configuration.
    BackendUnavailable
        If ``"cuda"`` is asked for where there is none.
    UnsupportedError
        If ``"cuda"`` is asked for what it does not do.
    """
    if callable(backend):
        made: Backend = backend(config, key_means)
        if made.config != config:
            raise ArgumentError("the backend was made for another configuration than the cache's")
        return made
    name = backend
    if name == "auto":
        name = os.environ.get(BACKEND_VARIABLE, "auto")  # type: ignore[assignment]
    if name not in ("auto", "host", "cuda"):
        raise ArgumentError(f"backend must be auto, host or cuda, got {name!r}")
    if name == "auto":
        name = "cuda" if why_not_cuda(config, accumulate) is None else "host"
    if name == "host":
        return HostBackend(config, key_means, accumulate, num_threads)
    if accumulate != "float32":
        raise UnsupportedError(
            f"the CUDA backend accumulates in float32, got {accumulate}: use backend='host'"
        )
    from .cuda import CudaBackend

    cuda: Any = CudaBackend(config, key_means, validate=validate)
    device_backend: Backend = cuda
    return device_backend


def why_not_cuda(config: CacheConfig, accumulate: str = "float32") -> str | None:
    """Say why ``"auto"`` does not pick CUDA for a configuration; None if it does.

    Parameters
    ----------
    config : CacheConfig
        The configuration.
    accumulate : str
        What the host backend would sum in, see `select_backend`.
    """
    from .cupy_device import missing_cuda

    missing = missing_cuda()
    if missing is not None:
        return missing
    if accumulate != "float32":
        return "the CUDA backend accumulates in float32"
    from .cuda_layer import refuse_unsupported

    try:
        refuse_unsupported(config)
    except UnsupportedError as error:
        return str(error)
    return None


__all__ = [
    "BACKEND_VARIABLE",
    "Backend",
    "BackendFactory",
    "BackendName",
    "HostBackend",
    "select_backend",
    "why_not_cuda",
]
