"""Rounding of keys and values to the cache's ``kv_dtype``, exactly as the type itself rounds.

NumPy converts to and from float16 one element at a time (2 to 3 ns each), which would cost more
than encoding. The float32 forms below give the same bits several times faster; a test compares
them with NumPy's own conversion on every float16 value and every tie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Dtype
from ..errors import ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError
from .work_arrays import work_array

Float32 = npt.NDArray[np.float32]

#: NumPy type that holds each kv_dtype in memory; bfloat16 travels as its bits.
STORAGE: dict[str, np.dtype[Any]] = {
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f32": np.dtype("<f4"),
}

# Elements of an array that are looked at together.
_PIECE = 1 << 17

#: First magnitude that rounds to infinity: halfway between the largest finite value and the next
#: power of two.
LIMITS = {"f16": 65520.0, "bf16": 2.0**128 - 2.0**119, "f32": float("inf")}


def kind_of(array: npt.NDArray[Any], name: str, dtype: Dtype | None) -> Dtype:
    """Tell which type the data of an array are.

    Parameters
    ----------
    array : ndarray
        float16, float32, an ``ml_dtypes.bfloat16`` array, or uint16 bits with ``dtype="bf16"``.
    name : str
        What to call the array in an error.
    dtype : {"f16", "bf16", "f32"} or None
        Declares what the data are; needed for uint16 only, and checked otherwise.

    Raises
    ------
    ArgumentTypeError
        If the array is of another type, or not of the declared one. bfloat16 bits are never
        guessed from a uint16 array. Bytes must be in the machine's own order.
    """
    if not isinstance(array, np.ndarray):
        raise ArgumentTypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    return kind_of_dtype(array.dtype, name, dtype)


def kind_of_dtype(given: np.dtype[Any], name: str, dtype: Dtype | None) -> Dtype:
    """Tell what `kind_of` tells from the dtype alone, wherever the array lies."""
    kinds: dict[str, Dtype] = {"float16": "f16", "float32": "f32", "bfloat16": "bf16"}
    kind = kinds.get(given.name)
    if given == np.uint16 and dtype == "bf16":
        kind = "bf16"
    if kind is None or (dtype is not None and kind != dtype):
        wanted = dtype or 'float16, float32, bfloat16, or uint16 with dtype="bf16"'
        raise ArgumentTypeError(f"{name} must be {wanted}, got {given.name}")
    if not given.isnative:
        raise ArgumentTypeError(f"{name} must be in native byte order, got {given.str}")
    return kind


def widen(array: npt.NDArray[Any], kind: Dtype, out: Float32 | None = None) -> Float32:
    """Widen data of a known kind to float32 without loss, into ``out`` where that helps."""
    if kind == "f32":
        return np.ascontiguousarray(array)
    bits = np.ascontiguousarray(array).view(np.uint16)
    out = np.empty(array.shape, np.float32) if out is None else out
    wide = out.view(np.uint32)
    np.copyto(wide, bits)
    return _widen_f16(wide) if kind == "f16" else _widen_bf16(wide)


def largest(array: npt.NDArray[Any], kind: Dtype) -> float:
    """Return the largest magnitude; not finite (NaN or inf) if any element is not.

    One pass over the bits: without its sign, a float's bits order like its magnitude, and those of
    infinity and NaN come last.
    """
    if array.size == 0:
        return 0.0
    bits = np.ascontiguousarray(array).view(np.uint32 if kind == "f32" else np.uint16).reshape(-1)
    sign = 1 << (8 * bits.itemsize - 1)
    top = 0
    # Cache-sized pieces: the masked copy never leaves the cache.
    for begin in range(0, bits.size, _PIECE):
        top = max(top, int(np.bitwise_and(bits[begin : begin + _PIECE], sign - 1).max()))
    return float(widen(np.array([top], bits.dtype).view(array.dtype), kind)[0])


def as_float32(array: npt.NDArray[Any], name: str, dtype: Dtype | None = None) -> Float32:
    """Widen to float32 without loss what `kind_of` accepts."""
    return widen(array, kind_of(array, name, dtype))


def round_to(values: Float32, kv_dtype: Dtype, out: Float32 | None = None) -> Float32:
    """Round float32 data to ``kv_dtype``, to nearest with ties to even, keeping float32.

    Finite input only; magnitudes that overflow must have been refused (`check_range`). ``out``
    receives the result where there is something to round.
    """
    if kv_dtype == "f32":
        return values
    out = np.empty(values.shape, np.float32) if out is None else out
    return _round_f16(values, out) if kv_dtype == "f16" else _round_bf16(values, out)


def check_range(values: Float32, name: str, kv_dtype: Dtype) -> None:
    """Refuse NaN, infinity, and magnitudes that ``kv_dtype`` would round to infinity.

    Raises
    ------
    NonFiniteError, OverflowingError
        Naming the index of the first offending element.
    """
    if values.size == 0:
        return
    limit = LIMITS[kv_dtype]
    # One pass decides: NaN fails every comparison, and minimum/maximum propagate it.
    if float(values.max()) < limit and float(values.min()) > -limit:
        return
    finite = np.isfinite(values)
    if not finite.all():
        raise NonFiniteError(f"{name} must be finite, got {_where(values, ~finite)}")
    bad = np.abs(values) >= np.float32(limit)
    raise OverflowingError(f"{name} must fit {kv_dtype}, got {_where(values, bad)}")


def to_storage(values: Float32, kv_dtype: Dtype) -> npt.NDArray[Any]:
    """Convert data already rounded by `round_to` to the type that lies in memory, without loss."""
    if kv_dtype == "f32":
        return values
    if kv_dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return _narrow_f16(values)


def f16_towards(values: npt.NDArray[Any], limit: float) -> npt.NDArray[np.float16]:
    """Round to float16 towards ``limit`` (-inf or inf), so that a bound stays a bound."""
    nearest = values.astype(np.float16)
    wrong = nearest > values if limit < 0 else nearest < values
    return np.where(wrong, np.nextafter(nearest, np.float16(limit)), nearest)


def check_shape(array: Any, name: str, shape: tuple[int | None, ...], meaning: str) -> None:
    """Refuse an array whose shape differs from ``shape`` (None: any length)."""
    actual = getattr(array, "shape", None)
    if actual is None:
        raise ArgumentTypeError(f"{name} must be an array, got {type(array).__name__}")
    fits = len(actual) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, actual)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ArgumentError(f"{name} must have shape [{wanted}] ({meaning}), got {list(actual)}")


def _where(values: Float32, bad: npt.NDArray[np.bool_]) -> str:
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{values[index]} at index {index}"


def _widen_f16(wide: npt.NDArray[np.uint32]) -> Float32:
    # float16 exponent and fraction moved to float32's place are 2**112 too small, subnormals
    # included; multiplying is exact. Exponent 31 (infinity, NaN) is put right afterwards.
    sign = work_array("sign", wide.shape, np.uint32)
    np.left_shift(wide, 16, out=sign)
    np.bitwise_and(sign, 0x80000000, out=sign)
    np.bitwise_and(wide, 0x7FFF, out=wide)
    np.left_shift(wide, 13, out=wide)
    values = wide.view(np.float32)
    np.multiply(values, np.float32(2.0**112), out=values)
    if values.size and values.max() >= 65536.0:
        wide[values >= 65536.0] |= np.uint32(0x7F800000)
    np.bitwise_or(wide, sign, out=wide)
    return values


def _widen_bf16(wide: npt.NDArray[np.uint32]) -> Float32:
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def _round_f16(values: Float32, out: Float32) -> Float32:
    # Adding and subtracting 1.5 * 2**(e + 13), e the exponent but at least -14, rounds to
    # multiples of 2**(e - 10): float16's spacing, its subnormals included.
    magic = work_array("magic", values.shape, np.uint32)
    np.bitwise_and(values.view(np.uint32), 0x7F800000, out=magic)
    np.maximum(magic, np.uint32((127 - 14) << 23), out=magic)
    np.add(magic, np.uint32((13 << 23) | 0x400000), out=magic)
    np.add(values, magic.view(np.float32), out=out)
    np.subtract(out, magic.view(np.float32), out=out)
    # What rounds to zero keeps its sign (two integer passes: a third of what copysign costs).
    bits = out.view(np.uint32)
    np.bitwise_and(values.view(np.uint32), 0x80000000, out=magic)
    np.bitwise_or(bits, magic, out=bits)
    return out


def _round_bf16(values: Float32, out: Float32) -> Float32:
    bits, rounded = values.view(np.uint32), out.view(np.uint32)
    np.right_shift(bits, 16, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.bitwise_and(rounded, 0xFFFF0000, out=rounded)
    return out


def _narrow_f16(values: Float32) -> npt.NDArray[np.float16]:
    # The reverse of `_widen_f16`; exact because the values are float16 values already. The sign
    # goes through the multiplication unharmed, so both parts come from the same bits.
    bits = np.multiply(values, np.float32(2.0**-112)).view(np.uint32)
    sign = np.right_shift(bits, 16)
    np.bitwise_and(sign, 0x8000, out=sign)
    np.right_shift(bits, 13, out=bits)
    np.bitwise_and(bits, 0x7FFF, out=bits)
    np.bitwise_or(bits, sign, out=bits)
    return bits.astype(np.uint16).view(np.float16)
