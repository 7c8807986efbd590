"""One layer of a `PagedTQCache`, as transformers asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ...errors import StepError, UnsupportedError
from .tensors import by_head, check_states, severed

if TYPE_CHECKING:
    from .cache import PagedTQCache


class PagedTQLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `PagedTQCache`, as transformers asks for it.

    Rows, lengths and padding are the cache's, the same in all layers, so what changes them
    (`reorder_cache`, `crop`, `batch_select_indices`, ...) is called on the cache.

    Parameters
    ----------
    cache : PagedTQCache
        The cache.
    index : int
        Which layer.
    sliding_window : int or None
        How many tokens a query reads, itself included; None for all.
    """

    is_croppable = True

    def __init__(self, cache: PagedTQCache, index: int, sliding_window: int | None) -> None:
        # The mixin's own `__init__` makes tensors' places; what lies here are pages.
        self._cache = cache
        self.keys = self.values = None
        self.index = index
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None

    def __repr__(self) -> str:
        keys, values = self._cache.config.layer_codecs(self.index)
        return f"PagedTQLayer(keys {keys}, values {values})"

    @property
    def is_initialized(self) -> bool:
        """Whether type and device of the model's tensors are known."""
        return self._cache.like is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check type, device and shape of keys and values, and remember the first ones'."""
        cache = self._cache
        check_states(cache.config, self.index, key_states, value_states, cache.like)
        if cache.like is None:
            cache.like = key_states[:0].detach()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of new tokens; see `PagedTQCache.update`."""
        states: tuple[torch.Tensor, torch.Tensor]
        states = self._cache.update(key_states, value_states, self.index)
        return states

    def first_visible(self, length: int) -> int:
        """Return the first padded position that tokens behind ``length`` others can read."""
        return 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that `update` will return."""
        length = self.get_seq_length()
        offset = self.first_visible(length)
        return length + query_length - offset, offset

    def get_seq_length(self) -> int:
        """Return the number of tokens of a row, pads included."""
        return self._cache.batch.length

    def get_max_length(self) -> int:
        """Return the most tokens of a row, -1 if the cache grows."""
        return self._cache.batch.max_tokens or -1

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode all tokens, as the model would read them.

        Returns
        -------
        keys, values : tensor ``[rows, num_kv_heads, length, head_dim]``
            In the model's type; zero at pads.
        """
        like = self._cache.like
        if like is None:
            raise StepError("the cache is empty: no forward call has stored anything yet")
        keys, values = self._cache.batch.dense(self.index, 0, self.get_seq_length())
        return by_head(keys, like), by_head(values, like)

    def readable(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the queries of the open call read, whose own keys and values these are.

        That is what was stored before, decoded from `first_visible` on, then the call's own tokens:
        as they came, or decoded too where the cache's ``own_tokens`` are ``"stored"``.
        """
        batch = self._cache.batch
        exact, stop = batch.own_tokens == "exact", batch.length
        start = self.first_visible(stop)
        if not exact:
            stop += batch.open_arrival.num_tokens
        dense = batch.dense(self.index, start, stop) if start < stop else ()
        parts = [[by_head(array, key_states)] for array in dense] or [[], []]
        if exact:
            parts[0].append(key_states)
            parts[1].append(value_states)
        keys, values = (torch.cat(part, dim=2) for part in parts)
        states = key_states, value_states
        return severed(keys, *states), severed(values, *states)

    def offload(self) -> None:
        """Do nothing: pages never lie on the model's device."""

    def prefetch(self) -> None:
        """Do nothing; see `offload`."""

    def reset(self) -> None:
        """Refuse: call it on the cache."""
        self._refuse("reset")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refuse: call it on the cache."""
        self._refuse("reorder_cache")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: call it on the cache."""
        self._refuse("crop")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: call it on the cache."""
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse: call it on the cache."""
        self._refuse("batch_select_indices")

    def _refuse(self, verb: str) -> None:
        raise UnsupportedError(f"all layers change together: call {verb} on the cache")
