"""torch tensors to NumPy arrays and back: token-major for the cache, head-major for the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...config import CacheConfig, Dtype
from ...errors import ArgumentError, ArgumentTypeError, UnsupportedError

Array = npt.NDArray[Any]

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}


def dtype_of(dtype: torch.dtype) -> Dtype:
    """Return what the cache calls a torch type.

    Raises
    ------
    ArgumentTypeError
        For anything but float32, float16 and bfloat16.
    """
    if dtype not in DTYPES:
        raise ArgumentTypeError(
            f"keys and values must be float32, float16 or bfloat16, got {dtype}; load the model "
            f"with one of these as dtype"
        )
    return DTYPES[dtype]


def check_states(
    config: CacheConfig,
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    like: torch.Tensor | None,
) -> None:
    """Check keys and values ``[rows, num_kv_heads, n, head_dim]`` of a layer.

    Parameters
    ----------
    config : CacheConfig
        Their shape.
    layer : int
        The layer, for errors.
    keys, values : tensor
        What came.
    like : tensor or None
        Type and device of all before.

    Raises
    ------
    ArgumentError
        Another shape than the cache's.
    ArgumentTypeError
        A type that cannot be stored, or another type or device than before.
    """
    like = keys if like is None else like
    dtype_of(keys.dtype)
    heads, dim = config.num_kv_heads, config.head_dim
    for name, states in (("keys", keys), ("values", values)):
        shape = list(states.shape)
        if len(shape) != 4 or (shape[1], shape[3]) != (heads, dim):
            raise ArgumentError(
                f"layer {layer}: {name} must have shape [rows, {heads}, tokens, {dim}], got "
                f"{shape}: the cache was made for another model, or the model's config says "
                f"another shape (pass num_kv_heads= and head_dim= to from_model)"
            )
        if (states.dtype, states.device) != (like.dtype, like.device):
            raise ArgumentTypeError(
                f"layer {layer}: {name} must be {like.dtype} on {like.device} as before, got "
                f"{states.dtype} on {states.device}; put the whole model on one device, or call "
                f"reset() after moving it"
            )


def by_token(states: torch.Tensor, places: npt.NDArray[np.int64] | None) -> Array:
    """Lay ``[rows, heads, n, head_dim]`` out as ``[tokens, heads, head_dim]``, without pads.

    Parameters
    ----------
    states : tensor
        float32, float16 or bfloat16, on any device.
    places : ndarray of int64 or None
        Real tokens among the ``rows * n``; None for all.

    Returns
    -------
    ndarray
        In the tensor's type; bfloat16 as its bits in uint16, for which NumPy has no type.
    """
    rows, heads, count, dim = states.shape
    flat = states.detach().transpose(1, 2).reshape(rows * count, heads, dim)
    if places is not None:
        flat = flat[torch.from_numpy(places).to(flat.device)]
    if flat.dtype == torch.bfloat16:
        bits: Array = flat.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
        return bits
    array: Array = flat.cpu().numpy()
    return array


def by_head(array: Array, like: torch.Tensor) -> torch.Tensor:
    """Bring float32 ``[rows, heads, n, head_dim]`` to the type and device of a tensor."""
    return torch.from_numpy(array).to(device=like.device, dtype=like.dtype)


def from_tokens(
    array: Array, shape: tuple[int, int], places: npt.NDArray[np.int64] | None, like: torch.Tensor
) -> torch.Tensor:
    """Lay ``[tokens, heads, head_dim]`` out as ``[rows, n, heads, head_dim]``, zero at pads."""
    rows, count = shape
    if places is not None:
        padded = np.zeros((rows * count, *array.shape[1:]), array.dtype)
        padded[places] = array
        array = padded
    return by_head(array.reshape(rows, count, *array.shape[1:]), like)


class _Severed(torch.autograd.Function):  # type: ignore[misc]
    """Hands a result on, and refuses to be differentiated: the cache keeps no graph."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise UnsupportedError(
            "gradients do not pass through PagedTQCache: what it stores has no graph; train "
            "without past_key_values (use_cache=False)"
        )


def severed(result: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Return a result whose gradient is an error instead of silently missing."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        joined: torch.Tensor = _Severed.apply(result, *inputs)
        return joined
    return result
