"""Vectors to codes and back. Knows no pages.

`TurboQuantCodec` encodes and decodes; it is built from `Rotation` (random rotations), `codebook`
(Lloyd-Max tables), `bitpack` (rows as they lie in pages) and `Projection` (QJL, for Prod).
"""

from .codebook import Codebook, codebook
from .encoder import EncodedVectors
from .qjl import Projection
from .rotation import DenseRotationWarning, Rotation
from .turboquant import TurboQuantCodec

__all__ = [
    "Codebook",
    "DenseRotationWarning",
    "EncodedVectors",
    "Projection",
    "Rotation",
    "TurboQuantCodec",
    "codebook",
]
