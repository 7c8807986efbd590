"""Writing: steps that reserve, store layer by layer, and commit or are given up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from ..backends import Backend
from ..backends.dtypes import check_shape
from ..config import CacheConfig, Dtype
from ..errors import ArgumentError, StepError
from ..paging.arguments import token_counts
from ..paging.page_tables import PageTables
from ..paging.step_plan import StepPlan
from .reads import SeqIds
from .swapping import POISON, CacheSwaps

Array = npt.NDArray[Any]


class CacheWrites(CacheSwaps):
    """The part of `PagedKVCache` that stores tokens."""

    def __init__(
        self, config: CacheConfig, backend: Backend, tables: PageTables, debug: bool
    ) -> None:
        super().__init__(config, backend, tables, debug)
        layers = range(config.num_layers)
        self._overlay_layers = [layer for layer in layers if config.has_overlay(layer)]

    def append(
        self,
        seq_ids: SeqIds,
        keys: Array,
        values: Array,
        num_new_tokens: int | Sequence[int] | Array | None = None,
        dtype: Dtype | None = None,
        token_ids: Sequence[int] | Array | None = None,
    ) -> None:
        """Append tokens of all layers at once: everything or nothing, to the byte.

        Parameters
        ----------
        seq_ids : int or sequence of int
            One sequence, or a batch.
        keys, values : ndarray ``[num_layers, n, num_kv_heads, head_dim]``
            float16, bfloat16 or float32; a batch's tokens one sequence after the other.
        num_new_tokens : sequence of int, optional
            Tokens of each sequence; for one sequence it is ``n``.
        dtype : {"f16", "bf16", "f32"}, optional
            Declares the type (needed for bfloat16 bits in uint16).
        token_ids : sequence of int ``[n]``, optional
            The tokens, so that their blocks can be shared; not needed for tokens that the
            sequences were opened with.

        Raises
        ------
        OutOfPages, OutOfWindowSlots
            The pool cannot hold them.
        ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError, NotUnitNormError
            Bad input; found before anything is written.
        """
        ids = self._ids(seq_ids)
        layers = self.config.num_layers
        for name, array in (("keys", keys), ("values", values)):
            shape = (layers, None, None, None)
            check_shape(array, name, shape, "layers, tokens, KV heads, head_dim")
        if num_new_tokens is None:
            if len(ids) != 1:
                raise ArgumentError("a batch needs num_new_tokens, one count per sequence")
            num_new_tokens = [keys.shape[1]]
        counts = token_counts("num_new_tokens", num_new_tokens, len(ids))
        if counts.sum() != keys.shape[1]:
            raise ArgumentError(
                f"num_new_tokens must add up to {keys.shape[1]} tokens, got {counts.sum()}"
            )
        self._refuse_open_step("append")
        for layer in range(layers):
            self.backend.check(layer, keys[layer], values[layer], dtype)
        self.begin_step(ids, counts, token_ids)
        for layer in range(layers):
            self.store(layer, keys[layer], values[layer], dtype)
        self.commit()

    def begin_step(
        self,
        seq_ids: SeqIds,
        num_new_tokens: int | Sequence[int] | Array = 1,
        token_ids: Sequence[int] | Array | None = None,
    ) -> StepPlan:
        """Reserve room for new tokens of a batch, all or nothing, and open a step.

        Parameters
        ----------
        seq_ids : int or sequence of int
            The members.
        num_new_tokens : int or sequence of int
            Tokens of each.
        token_ids : sequence of int, optional
            The tokens, members one after the other, as in `append`.

        Returns
        -------
        StepPlan
            Where every token goes.

        Raises
        ------
        OutOfPages, OutOfWindowSlots, StepError, UnknownSequence, ArgumentError
        """
        ids = self._ids(seq_ids)
        plan = self.tables.reserve(ids, num_new_tokens, token_ids)
        if self.debug:
            self.backend.fill_pages(plan.new_pages, POISON)
        self.backend.clear_norms(plan.new_pages)
        # Layers without an overlay have codes of every token: their open page always has bytes.
        if len(self._overlay_layers) == self.config.num_layers:
            self.backend.copy_pages(plan.copy_src, plan.copy_dst)
        else:
            self.backend.copy_pages(plan.cow_src, plan.cow_dst)
        for layer in self._overlay_layers:
            window = self.backend.window(layer)
            window.copy_slots(plan.window_copy_src, plan.window_copy_dst)
            window.copy_records(plan.sink_copy_src, plan.sink_copy_dst)
        self._step, self._stored = plan, set()
        return plan

    def store(self, layer: int, keys: Array, values: Array, dtype: Dtype | None = None) -> None:
        """Store one layer of the open step.

        Parameters
        ----------
        layer : int
            The layer; each is stored once.
        keys, values : ndarray ``[tokens, num_kv_heads, head_dim]``
            The step's tokens, members one after the other.
        dtype : {"f16", "bf16", "f32"}, optional
            Declares the type (needed for bfloat16 bits in uint16).

        Raises
        ------
        StepError
            No step is open, or the layer is stored already.
        ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError, NotUnitNormError
            Bad input; nothing was written and the step stays open.
        """
        plan = self._open_step("store")
        self._check_layer(layer)
        if layer in self._stored:
            raise StepError(f"layer {layer} is already stored in this step")
        batch = self.backend.check(layer, keys, values, dtype)
        if len(batch) != plan.num_tokens:
            raise ArgumentError(f"the step has {plan.num_tokens} tokens, got {len(batch)}")
        if self.config.has_overlay(layer):
            self.backend.seal(layer, plan.seal_rows, plan.seal_mapping)
            self.backend.write(layer, batch, plan.store_mapping)
            self.backend.window(layer).write(batch, plan.ring_mapping, plan.sink_mapping)
        else:
            self.backend.write(layer, batch, plan.slot_mapping)
        self.backend.write_bounds(layer, plan.filled_pages)
        self._stored.add(layer)

    def mark_stored(self, layers: Sequence[int] | None = None) -> None:
        """Say that layers of the open step were stored by other means: a captured graph.

        Whoever replays a graph has brought the step's mappings to where the graph reads them; the
        cache believes it.

        Parameters
        ----------
        layers : sequence of int, optional
            Which; all by default.

        Raises
        ------
        StepError
            No step is open, or one of the layers is stored already.
        ArgumentError
            There is no such layer.
        """
        self._open_step("mark_stored")
        chosen = range(self.config.num_layers) if layers is None else layers
        for layer in chosen:
            self._check_layer(layer)
            if layer in self._stored:
                raise StepError(f"layer {layer} is already stored in this step")
        self._stored |= set(chosen)

    def commit(self, publish_to: Sequence[int] | Array | None = None) -> None:
        """Close the open step; every layer must be stored. Complete blocks can now be found.

        Parameters
        ----------
        publish_to : sequence of int, optional
            Positions of each member from there on are drafts: their blocks are published by a
            later commit, unless they are cut away.

        Raises
        ------
        StepError
            No step is open, or layers are missing (the step stays open).
        """
        plan = self._open_step("commit")
        missing = sorted(set(range(self.config.num_layers)) - self._stored)
        if missing and plan.num_tokens:
            raise StepError(f"layers {missing} are not stored in this step")
        # Before the tables' own step ends: another thread may begin one right after that.
        self._step = None
        try:
            self.tables.commit(plan, publish_to)
        except BaseException:
            self._step = plan
            raise
        self._after_change()

    def abort_step(self) -> None:
        """Give the open step up: as if its tokens were appended and then truncated away.

        What the window covers may have shrunk; no token is lost.
        """
        plan = self._open_step("abort_step")
        # Stored layers have sealed what this step seals, and overwritten the rows it came from;
        # all layers must agree on the coded watermark afterwards.
        rows, mapping = plan.abort_seal()
        for layer in self._overlay_layers:
            if layer not in self._stored:
                self.backend.seal(layer, rows, mapping)
        self._step = None
        try:
            freed = self.tables.abort(plan)
        except BaseException:
            self._step = plan
            raise
        self._freed(freed)

    # -- parts -------------------------------------------------------------------------------

    def _open_step(self, verb: str) -> StepPlan:
        if self._step is None:
            raise StepError(f"{verb} needs an open step; call begin_step first")
        return self._step

    def _refuse_open_step(self, verb: str) -> None:
        if self._step is not None:
            raise StepError(f"{verb} cannot run inside an open step; commit or abort it first")
