"""`PagedTQCache`: a transformers cache whose keys and values lie in compressed pages."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache

from ...cache import PagedKVCache
from ...config import CacheConfig, Codec
from ...errors import ArgumentError, ArgumentTypeError, StepError, UnsupportedError
from ...paging.arguments import integer
from ...wire.settings import CacheSettings
from .attention import own_tokens as mark_own_tokens
from .forward_calls import watch
from .layer import PagedTQLayer
from .model_shape import cache_config, decoder_of, decoder_shape, model_digest
from .padded_batch import PaddedBatch
from .padding import Arrival
from .tensors import DTYPES, by_token, dtype_of


class PagedTQCache(Cache):  # type: ignore[misc]
    """A transformers cache in compressed pages: pass it as ``past_key_values``.

    Make it with `from_model`. With a model's usual attention, `update` decodes what a layer holds;
    after ``model.set_attn_implementation("pagedtq")`` queries read the pages and nothing is
    decoded. Beams share pages; left padding is not stored.

    Parameters
    ----------
    config : CacheConfig
        Shape and codecs. ``num_pages`` and ``num_window_slots`` follow the batch.
    sliding_windows : tuple of int or None
        Per layer, how many tokens a query reads, itself included; None for all.
    max_tokens : int, optional
        Most tokens of a row, pads not counted: the pool is allocated for them at the first call.
        Without it the pool grows, doubling.
    own_tokens : {"exact", "stored"}
        How the tokens of a forward call read each other: as they came, which is what prefill does
        in serving engines, or as they are stored, which measures what later calls will read.
    **options
        Of `PagedKVCache`: ``key_means``, ``accumulate``, ``num_threads``, ``debug``.

    Notes
    -----
    A forward call that fails, in a layer or by what the cache refuses, leaves no token behind; as
    after a truncation, the exact window may cover fewer tokens until it fills again. Calls are seen
    by hooks on the decoder module, so a model is called (``model(...)``), never its ``forward``.
    """

    def __init__(
        self,
        config: CacheConfig,
        sliding_windows: tuple[int | None, ...] | None = None,
        *,
        max_tokens: int | None = None,
        own_tokens: Literal["exact", "stored"] = "exact",
        **options: Any,
    ) -> None:
        if own_tokens not in ("exact", "stored"):
            raise ArgumentError(f"own_tokens must be exact or stored, got {own_tokens!r}")
        if max_tokens is not None:
            max_tokens = integer("max_tokens", max_tokens, 1)
        windows = sliding_windows or (None,) * config.num_layers
        if len(windows) != config.num_layers:
            raise ArgumentError(
                f"sliding_windows must name {config.num_layers} layers, got {len(windows)}"
            )
        self.config = config
        self.batch = PaddedBatch(config, max_tokens, own_tokens, **options)
        #: An empty tensor of the model's type and device, once it is known.
        self.like: torch.Tensor | None = None
        self._coming: Arrival | None = None
        self._in_pages = False
        layers = [PagedTQLayer(self, index, window) for index, window in enumerate(windows)]
        super().__init__(layers=layers)

    @classmethod
    def from_model(
        cls,
        model: Any,
        settings: str | tuple[Codec, Codec] | CacheConfig | CacheSettings = "k4v4",
        *,
        max_tokens: int | None = None,
        own_tokens: Literal["exact", "stored"] = "exact",
        key_means: npt.NDArray[np.float32] | None = None,
        accumulate: Literal["float32", "float64"] = "float32",
        num_threads: int | None = None,
        debug: bool = False,
        **fields: Any,
    ) -> PagedTQCache:
        """Make a cache for a model.

        Parameters
        ----------
        model : PreTrainedModel
            A decoder-only model; hooks are put on its decoder module.
        settings : str, pair of Codec, CacheConfig or CacheSettings
            A preset such as ``"k4v4"``, a pair of codecs, a configuration, or what
            `calibrate_key_means` returned for this model. ``"exact"`` stores the model's own type,
            bit for bit.
        max_tokens, own_tokens
            As `PagedTQCache`.
        key_means, accumulate, num_threads, debug
            As `PagedKVCache`.
        **fields
            Other fields of `CacheConfig`: ``window``, ``sinks``, ``overrides``, ``page_size``,
            ``seed``, ``kv_dtype`` (default: the model's), ``first_kv_head``, ...

        Raises
        ------
        UnsupportedError
            A model without an attention cache, or with attention the pages cannot hold.
        WireMismatch
            Settings that were calibrated on another model.
        ConfigError, ArgumentError, ArgumentTypeError
            For bad settings.
        """
        decoder = decoder_of(model)
        shape = decoder_shape(model.config)
        if isinstance(settings, CacheSettings):
            settings.refuse_other_model(model_digest(model))
            key_means = settings.key_means if key_means is None else key_means
            settings = settings.config
        config = cache_config(shape, settings, dtype_of(model.dtype), fields)
        cache = cls(
            config,
            shape.sliding_windows,
            max_tokens=max_tokens,
            own_tokens=own_tokens,
            key_means=key_means,
            accumulate=accumulate,
            num_threads=num_threads,
            debug=debug,
        )
        watch(decoder)
        return cache

    # -- forward calls -----------------------------------------------------------------------

    def begin_forward(
        self,
        rows: int,
        num_tokens: int,
        mask: npt.NDArray[np.bool_] | None = None,
        in_pages: bool = False,
    ) -> None:
        """Announce a forward call; the hooks do that.

        Parameters
        ----------
        rows, num_tokens : int
            Shape of its input.
        mask : ndarray of bool ``[rows, length + num_tokens]``, optional
            False at pads.
        in_pages : bool
            Whether its attention reads the pages.

        Raises
        ------
        ArgumentError, OutOfTokens
            See `PaddedBatch.check`; nothing changed.
        """
        self.end_forward(failed=True)
        self._coming = self.batch.check(rows, num_tokens, mask)
        self._in_pages = in_pages

    def end_forward(self, failed: bool = False) -> None:
        """End a forward call; without its tokens if it failed.

        Raises
        ------
        UnsupportedError
            If the model stored some layers only; the call is undone.
        """
        self._coming = None
        missing = self.batch.missing_layers if self.batch.arrival is not None else []
        if self.batch.arrival is not None and not (failed or missing):
            self.batch.commit()
        elif self.batch.arrival is not None:
            self.batch.abort()
        if not self.batch.ids:
            self.like = None
        if missing and not failed:
            raise UnsupportedError(
                f"the model stored no keys and values in layers {missing}; models whose layers "
                f"share a cache are not supported"
            )

    # What a compiler would trace here is NumPy: calls of a compiled model break out of the graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of a call's tokens, and return what its queries read.

        Parameters
        ----------
        key_states, value_states : tensor ``[rows, num_kv_heads, n, head_dim]``
            float32, float16 or bfloat16.
        layer_idx : int
            The layer.

        Returns
        -------
        keys, values : tensor ``[rows, num_kv_heads, kv_length, head_dim]``
            ``kv_length`` as `get_mask_sizes` said. With attention on pages, the call's own tokens.

        Raises
        ------
        StepError
            Outside a call of a model that `from_model` has seen.
        ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError
            Tensors of another shape, type or device than before, or bad values.
        """
        arrival = self._coming
        if arrival is None:
            raise StepError(
                "keys came outside a forward call that the cache knows of: make it with "
                "PagedTQCache.from_model(model) and call model(...), not model.forward(...)"
            )
        if not 0 <= layer_idx < len(self.layers):
            raise ArgumentError(f"the cache has {len(self.layers)} layers, got layer {layer_idx}")
        layer = self.layers[layer_idx]
        layer.lazy_initialization(key_states, value_states)
        wanted = (arrival.rows, arrival.num_tokens)
        if (key_states.shape[0], key_states.shape[2]) != wanted:
            raise ArgumentError(
                f"layer {layer_idx}: keys must have {wanted[0]} rows of {wanted[1]} tokens as the "
                f"input, got {list(key_states.shape)}"
            )
        if self.batch.arrival is None:
            self.batch.begin(arrival)
        keys, values = by_token(key_states, arrival.places), by_token(value_states, arrival.places)
        self.batch.store(layer_idx, keys, values, DTYPES[key_states.dtype])
        if self._in_pages:
            return mark_own_tokens(
                self.batch, layer_idx, layer.sliding_window, key_states, value_states
            )
        read: tuple[torch.Tensor, torch.Tensor] = layer.readable(key_states, value_states)
        return read

    # -- the batch ---------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row ``i`` what row ``beam_idx[i]`` is: page tables are re-pointed, no bytes move."""
        self.end_forward(failed=True)
        self.batch.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows, by index or by a mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.end_forward(failed=True)
        self.batch.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row: forks, which share all pages until they differ."""
        repeats = integer("repeats", repeats, 1)
        self.end_forward(failed=True)
        self.batch.select(np.repeat(np.arange(len(self.batch.ids)), repeats).tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Cut tokens off the end of every row.

        Parameters
        ----------
        tokens_to_remove : int
            Their number, negative as in transformers.
        """
        if tokens_to_remove > 0:
            raise ArgumentError(
                f"tokens_to_remove is negative or 0, got {tokens_to_remove}: -n removes n tokens"
            )
        self.end_forward(failed=True)
        self.batch.crop(-tokens_to_remove)

    def reset(self) -> None:
        """Drop all rows; the pool stays allocated, for a batch of any size."""
        self.end_forward(failed=True)
        self.batch.reset()
        self.like = None

    @property
    def batch_size(self) -> int:
        """Rows held, -1 if none."""
        return len(self.batch.ids) or -1

    # -- what it holds -----------------------------------------------------------------------

    @property
    def pages(self) -> PagedKVCache:
        """The paged cache below, one sequence per row (``sequence_ids`` in the rows' order).

        Raises
        ------
        StepError
            If nothing is stored yet.
        """
        if self.batch.cache is None:
            raise StepError("the cache is empty: no forward call has stored anything yet")
        return self.batch.cache

    @property
    def sequence_ids(self) -> list[int]:
        """Sequence of each row in `pages`."""
        return list(self.batch.ids)

    def __repr__(self) -> str:
        config = self.config
        return (
            f"PagedTQCache({config.num_layers} layers, keys {config.keys}, values "
            f"{config.values}, {len(self.batch.ids)} rows of {self.batch.length} tokens)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedTQCache:
        self.end_forward(failed=True)
        windows = tuple(layer.sliding_window for layer in self.layers)
        twin = PagedTQCache(self.config, windows)
        twin.batch = self.batch.copy()
        twin.like = self.like
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentTypeError(
            "PagedTQCache cannot be pickled: save its pages with pagedtq.wire.save_cache"
        )
