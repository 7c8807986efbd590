"""Settings for one model in a file: a cache's configuration and, if calibrated, its key means."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..config import CacheConfig
from ..errors import (
    ArgumentError,
    WireChecksum,
    WireMalformed,
    WireMismatch,
    WireVersion,
)
from .atomic import AnyPath, write_atomically

#: Version of the file.
SETTINGS_VERSION = 1
# Far above any model's: a config and a float32 vector per layer and KV head, in base64.
_MAX_BYTES = 1 << 30

Float32 = npt.NDArray[np.float32]


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """How to store the cache of one model.

    Parameters
    ----------
    config : CacheConfig
        Codecs, window, shape. ``num_pages`` and ``num_window_slots`` are a cache's own choice.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]``, optional
        Means to subtract from keys.
    model_digest : str
        SHA-256 that tells which model the settings are for; empty for any.
    num_tokens : int
        Tokens the means were made from.
    """

    config: CacheConfig
    key_means: Float32 | None = None
    model_digest: str = ""
    num_tokens: int = 0

    def __post_init__(self) -> None:
        config, means = self.config, self.key_means
        shape = (config.num_layers, config.num_kv_heads, config.head_dim)
        if means is not None and (means.dtype != np.float32 or means.shape != shape):
            raise ArgumentError(
                f"key_means must be float32 of shape {list(shape)}, got {means.dtype} "
                f"{list(means.shape)}"
            )
        if means is not None and not np.isfinite(means).all():
            raise ArgumentError("key_means must be finite")

    def refuse_other_model(self, model_digest: str) -> None:
        """Raise ``WireMismatch`` if the settings are for another model.

        Parameters
        ----------
        model_digest : str
            The model at hand.
        """
        if self.model_digest and self.model_digest != model_digest:
            raise WireMismatch(
                "model_digest",
                0,
                f"the settings were made for model {self.model_digest[:12]}, this one is "
                f"{model_digest[:12]}; calibrate this model",
            )


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pagedtq_settings: int
    model_digest: str
    num_tokens: int
    config: CacheConfig
    key_means: bytes | None
    sha256: str


def save_settings(settings: CacheSettings, path: AnyPath) -> None:
    """Write settings as JSON; the file is replaced atomically.

    Parameters
    ----------
    settings : CacheSettings
        What to write. Means are little-endian float32 in base64.
    path : path
        The file.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    means = settings.key_means
    written = {
        "pagedtq_settings": SETTINGS_VERSION,
        "model_digest": settings.model_digest,
        "num_tokens": settings.num_tokens,
        "config": settings.config,
        "key_means": None if means is None else means.astype("<f4").tobytes(),
    }
    fields = msgspec.json.decode(msgspec.json.encode(written))
    fields["sha256"] = _digest(fields)
    text = msgspec.json.format(msgspec.json.encode(fields), indent=2)
    write_atomically(path, [text + b"\n"])


def load_settings(path: AnyPath) -> CacheSettings:
    """Read what `save_settings` wrote.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    WireMalformed, WireVersion
        If it is no settings file, its fields contradict each other, or it is of another version.
    WireChecksum
        If something in it was changed.
    OSError
        If it cannot be read.
    """
    if os.stat(path).st_size > _MAX_BYTES:
        raise WireMalformed("file", 0, f"expected at most {_MAX_BYTES} bytes of settings")
    try:
        fields = msgspec.json.decode(Path(path).read_bytes(), type=dict[str, Any])
        file = msgspec.convert(fields, _File)
    except (ValueError, RecursionError) as error:
        raise WireMalformed("file", 0, f"not a settings file: {error}") from error
    if file.pagedtq_settings != SETTINGS_VERSION:
        raise WireVersion(
            "pagedtq_settings", 0, f"expected {SETTINGS_VERSION}, got {file.pagedtq_settings}"
        )
    if _digest(fields) != file.sha256:
        raise WireChecksum("sha256", 0, "the SHA-256 over the other fields does not match")
    config, means = file.config, None
    if file.key_means is not None:
        shape = (config.num_layers, config.num_kv_heads, config.head_dim)
        if len(file.key_means) != 4 * shape[0] * shape[1] * shape[2]:
            raise WireMalformed(
                "key_means", 0, f"expected float32 of shape {list(shape)}, got other bytes"
            )
        means = np.frombuffer(file.key_means, "<f4").reshape(shape).astype(np.float32)
        if not np.isfinite(means).all():
            raise WireMalformed("key_means", 0, "expected finite means")
    return CacheSettings(
        config=config,
        key_means=means,
        model_digest=file.model_digest,
        num_tokens=file.num_tokens,
    )


def _digest(fields: dict[str, Any]) -> str:
    """Return the SHA-256 of plain fields, whatever their order and spacing in the file."""
    others = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(msgspec.json.encode(others, order="sorted")).hexdigest()
