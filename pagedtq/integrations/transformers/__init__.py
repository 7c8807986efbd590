"""Hugging Face transformers on compressed pages (extra ``transformers``).

`PagedTQCache` is passed as ``past_key_values``; importing this package also registers the attention
implementation ``"pagedtq"``, which reads the pages without decompressing them.
"""

from ...errors import BackendUnavailable

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise BackendUnavailable(
        f'{error.name} is not installed: pip install "pagedtq[transformers]"'
    ) from error

from .attention import ATTENTION, paged_attention_forward
from .cache import PagedTQCache
from .calibration import calibrate_key_means
from .layer import PagedTQLayer
from .model_shape import model_digest

__all__ = [
    "ATTENTION",
    "PagedTQCache",
    "PagedTQLayer",
    "calibrate_key_means",
    "model_digest",
    "paged_attention_forward",
]
