"""Vectors to codes and back. Knows no pages.

`TurboQuantCodec` encodes and decodes; it is built from `Rotation` (random rotations), `codebook`
(Lloyd-Max tables), `bitpack` (rows as they lie in pages) and `Projection` (QJL, for Prod).
`PolarCodec` is the other codec: radii and angles of coordinate pairs.
"""

from .codebook import Codebook, codebook
from .encoder import EncodedVectors
from .polar import EncodedPolar, PolarCodec
from .qjl import Projection
from .rotation import DenseRotationWarning, Rotation
from .turboquant import TurboQuantCodec

#: Every codec that turns vectors into codes.
VectorCodec = TurboQuantCodec | PolarCodec

__all__ = [
    "Codebook",
    "DenseRotationWarning",
    "EncodedPolar",
    "EncodedVectors",
    "PolarCodec",
    "Projection",
    "Rotation",
    "TurboQuantCodec",
    "VectorCodec",
    "codebook",
]
