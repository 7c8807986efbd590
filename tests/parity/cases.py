"""The matrix of formats, shapes and windows that device and harness share."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from pagedtq import CacheConfig, Exact, TurboQuant
from pagedtq.codec import DenseRotationWarning
from pagedtq.config import PRESETS

HEADS, LAYERS = 2, 2

CODECS = {
    **PRESETS,
    "k2v3": (TurboQuant(bits=2), TurboQuant(bits=3)),
    "k1v6": (TurboQuant(bits=1), TurboQuant(bits=6)),
    "k5v7": (TurboQuant(bits=5, scale="unbiased"), TurboQuant(bits=7, scale="none")),
    "orthogonal4v4": (
        TurboQuant(bits=4, estimator="prod", projection="orthogonal"),
        TurboQuant(bits=4),
    ),
    "bf16": (Exact(dtype="bf16"), Exact(dtype="bf16")),
    "f32": (Exact(dtype="f32"), Exact(dtype="f32")),
    "k4exact": (TurboQuant(bits=4), Exact(dtype="f16")),
    "exactv4": (Exact(dtype="f16"), TurboQuant(bits=4)),
}

#: Group, query tokens of four sequences, tokens per part (None: the planner's choice).
SHAPES = (
    (4, (1, 1, 1, 1), None),
    (7, (1, 2, 1, 5), 128),
    (1, (1, 1, 1, 1), 256),
    (5, (1, 3, 2, 1), None),
    (8, (1, 1, 1, 1), 256),
    (3, (1, 1, 4, 2), 512),
    (16, (1, 1, 2, 1), None),
)

# Format, head_dim, page size; the other axes go round with the index.
_FORMATS = (
    ("k4v4", 128, 16), ("k4v4", 128, 64), ("k4v4", 128, 128), ("k4v4", 64, 64),
    ("k4v4", 96, 16), ("k4v4", 256, 64), ("k3v3", 128, 16), ("k3v3", 64, 128),
    ("k3v3", 256, 64), ("k2v2", 128, 128), ("k2v2", 64, 64), ("k2v2", 256, 16),
    ("k3v4", 128, 64), ("k4v3", 64, 16), ("k2v3", 96, 16), ("exact", 128, 64),
    ("exact", 64, 16), ("exact", 256, 128), ("k4exact", 128, 64), ("exactv4", 64, 64),
    ("prod4v4", 128, 64), ("orthogonal4v4", 256, 64), ("k8v8", 64, 16), ("k8v4", 128, 64),
    ("k1v6", 64, 16), ("k5v7", 64, 128), ("bf16", 64, 16), ("f32", 96, 16), ("k4v4", 160, 64),
    ("prod4v4", 80, 16), ("k3v3", 20, 16), ("k4v4", 512, 16), ("k4v4", 64, 32), ("k3v3", 128, 256),
)  # fmt: skip


class Case(NamedTuple):
    """One point of the matrix."""

    form: str
    head_dim: int
    page_size: int
    group: int
    q_lens: tuple[int, ...]
    split_tokens: int | None
    window_pages: int
    kv_dtype: str

    def __str__(self) -> str:
        return (
            f"{self.form}-d{self.head_dim}-p{self.page_size}-g{self.group}-w{self.window_pages}"
            f"-{self.kv_dtype}"
        )

    def config(self, **fields) -> CacheConfig:
        return make_config(
            self.form,
            self.head_dim,
            self.page_size,
            window=self.window_pages * self.page_size,
            kv_dtype=self.kv_dtype,
            **fields,
        )


def make_config(form: str, head_dim: int, page_size: int, **fields) -> CacheConfig:
    keys, values = CODECS[form]
    shape = {
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "num_pages": 48,
        "sinks": 3,
        "num_window_slots": 8,
        "seed": 5,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseRotationWarning)
        return CacheConfig(
            keys=keys,
            values=values,
            head_dim=head_dim,
            page_size=page_size,
            **{**shape, **fields},
        )


def all_cases() -> list[Case]:
    """Every format at its dimensions; groups, windows and types in turn."""
    return [
        Case(form, dim, page, *SHAPES[i % 7], (2, 0, 1)[i % 3], ("f16", "bf16", "f32")[i // 3 % 3])
        for i, (form, dim, page) in enumerate(_FORMATS)
    ]


def small_cases() -> list[Case]:
    """What CI runs on the CPU in half a minute; the kernels alone see the whole matrix there."""
    return [
        Case("k4v4", 64, 16, 4, (1, 1, 1, 1), None, 2, "f16"),
        Case("k3v4", 64, 16, 3, (1, 1, 4, 2), 128, 0, "f16"),
        Case("orthogonal4v4", 64, 16, 1, (1, 3, 2, 1), 256, 1, "bf16"),
        Case("exact", 64, 16, 4, (1, 1, 1, 1), None, 0, "f32"),
    ]
