"""Attention of a whole text as if every token had been decoded on its own from a cache.

A query at position p reads sinks and recent positions exactly and the rest coded, and which ones
depends on p. Over a whole text that is two matrices of logits, from exact and from coded keys, a
band that says which one counts, and one softmax: the result of a token-by-token run, up to
rounding, in one pass of the model. `reading` switches a transformers model over for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .formats import CodedSpans, KVFormat

#: Its name among transformers' attention functions.
NAME = "pagedtq_fidelity"

#: Query rows of one tile, so that logits of long texts fit in memory.
_ROWS = 512

#: What an observer gets: layer, queries, keys, values, output as read and as it would be exactly;
#: heads first, one sequence.
Observer = Callable[[int, Any, Any, Any, Any, Any], None]


class Reading:
    """How the attention of a model reads its keys and values, by layer.

    Parameters
    ----------
    formats : mapping of layer to KVFormat, or KVFormat
        One for all layers, or some layers only; the others stay exact.
    streams : {"both", "keys", "values"}
        Which of the two a format applies to; the other stays exact.
    observe : callable, optional
        Called after every layer with what it saw; the exact output is computed only for it.
    """

    def __init__(
        self,
        formats: KVFormat | dict[int, KVFormat],
        streams: str = "both",
        observe: Observer | None = None,
    ) -> None:
        self.formats, self.streams, self.observe = formats, streams, observe

    def format_of(self, layer: int) -> KVFormat | None:
        """Return what a layer's keys and values go through; None for nothing."""
        if isinstance(self.formats, dict):
            return self.formats.get(layer)
        return self.formats


_CURRENT: ContextVar[Reading | None] = ContextVar("pagedtq_fidelity", default=None)


@contextmanager
def reading(model: Any, how: Reading) -> Iterator[None]:
    """Let a model's attention read as ``how`` says, until the end of the block."""
    before = model.config._attn_implementation
    token = _CURRENT.set(how)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _CURRENT.reset(token)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention of whole texts (no cache before them); see `reading`.

    Parameters
    ----------
    module : Module
        The attention layer; its ``layer_idx`` says which.
    query : Tensor ``[batch, num_q_heads, n, head_dim]``
    key, value : Tensor ``[batch, num_kv_heads, n, head_dim]``
    attention_mask : bool Tensor ``[batch, 1, n, n]`` or None
        True where a query reads a key; None: causal, unless the module says otherwise.
    scaling : float, optional
        Of the logits; ``head_dim ** -0.5`` by default.
    softcap : float, optional
        Bends logits ``l`` to ``softcap * tanh(l / softcap)``.
    """
    how = _CURRENT.get()
    layer: int = module.layer_idx
    form = None if how is None else how.format_of(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    visible = attention_mask
    if visible is None:
        visible = torch.ones(1, 1, length, length, dtype=torch.bool)
        # Encoders say that they look both ways; no mask means a causal one elsewhere.
        if getattr(module, "is_causal", True):
            visible = visible.tril()
    outs = []
    for b in range(len(query)):
        q, k, v = query[b].float(), key[b].float(), value[b].float()
        mask = visible[min(b, len(visible) - 1), 0]
        exact = coded = Streams(k, v)
        spans = None
        if form is not None:
            exact, coded = _read_back(form, layer, k, v, how.streams if how else "both")
            spans = form.spans(layer, np.arange(1, length + 1))
        out = attend(q, exact, coded, spans, mask, scale, softcap)
        if how is not None and how.observe is not None:
            plain = Streams(k, v)
            wanted = attend(q, plain, plain, None, mask, scale, softcap)
            how.observe(layer, q, k, v, out, wanted)
        outs.append(out.transpose(0, 1))
    return torch.stack(outs).to(query.dtype), None


class Streams:
    """Keys and values of a sequence, ``[num_kv_heads, n, head_dim]`` each."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values


def attend(
    queries: torch.Tensor,
    exact: Streams,
    coded: Streams,
    spans: CodedSpans | None,
    visible: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attend with every query at its own position, reading coded where ``spans`` says so.

    Parameters
    ----------
    queries : Tensor ``[num_q_heads, n, head_dim]``
    exact, coded : Streams
        The same tokens, twice.
    spans : CodedSpans, optional
        By query; None: everything is exact.
    visible : bool Tensor ``[n, n]``
        What each query reads at all.
    scale, soft_cap : float
        Of the logits.

    Returns
    -------
    Tensor ``[num_q_heads, n, head_dim]``
    """
    heads, length, dim = queries.shape
    kv_heads = len(exact.keys)
    grouped = queries.reshape(kv_heads, heads // kv_heads, length, dim)
    out = torch.empty_like(grouped)
    for begin in range(0, length, _ROWS):
        rows = slice(begin, min(begin + _ROWS, length))
        # Keys that no row of the tile reads are half of all, in a causal mask.
        width = int(visible[rows].any(dim=0).nonzero().max()) + 1 if visible[rows].any() else 1
        read = exact if spans is None else coded
        q = grouped[:, :, rows] * scale
        logits = q @ read.keys[:, None, :width].transpose(2, 3)
        edges = [] if spans is None else list(_exact_columns(spans, rows, width))
        for columns, keys_exact, _ in edges:
            other = q @ exact.keys[:, None, columns].transpose(2, 3)
            logits[..., columns] = torch.where(keys_exact, other, logits[..., columns])
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits = logits.masked_fill(~visible[rows, :width], -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        out[:, :, rows] = weights @ read.values[:, None, :width]
        for columns, _, values_exact in edges:
            change = exact.values[:, None, columns] - coded.values[:, None, columns]
            out[:, :, rows] += (weights[..., columns] * values_exact) @ change
    return out.reshape(heads, length, dim)


def _exact_columns(
    spans: CodedSpans, rows: slice, width: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield column ranges in which some of these rows read exactly, and where: keys, values."""
    first, *stops = (torch.from_numpy(x[rows])[:, None] for x in spans)
    low = min(int(first.max()), width)
    high = max(min(int(stop.min()) for stop in stops), low)
    for columns in (slice(0, low), slice(high, width)):
        position = torch.arange(columns.start, columns.stop)
        if position.numel():
            keys, values = ((position < first) | (position >= stop) for stop in stops)
            yield columns, keys, values


def _read_back(
    form: KVFormat, layer: int, keys: torch.Tensor, values: torch.Tensor, streams: str
) -> tuple[Streams, Streams]:
    """Return exact and coded keys and values, the stream left out exact in both."""
    tokens = [x.transpose(0, 1).contiguous().numpy() for x in (keys, values)]
    back = form.roundtrip(layer, tokens[0], tokens[1])
    coded = [torch.from_numpy(x).transpose(0, 1) for x in back]
    rounded = form.exact_dtype(layer)
    exact = [keys, values]
    if rounded is not None:
        exact = [torch.from_numpy(x.astype(rounded).astype(np.float32)) for x in tokens]
        exact = [x.transpose(0, 1) for x in exact]
    for i, stream in enumerate(("keys", "values")):
        if streams not in ("both", stream):
            exact[i] = coded[i] = (keys, values)[i]
    return Streams(*exact), Streams(*coded)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
