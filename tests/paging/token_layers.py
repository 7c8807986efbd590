"""The bytes of one layer, one integer per token, moved as the plans of PageTables say."""

from __future__ import annotations

import numpy as np

from pagedtq.paging import PageTables, StepPlan

POISON = -7
CLEARED = -1


class Layer:
    """Pages, rings and sinks of one layer, one integer per token."""

    def __init__(self, tables: PageTables, overlay: bool) -> None:
        self.overlay = overlay
        self.pages = np.full(tables.pool.num_pages * tables.page_size, POISON)
        self.rings = np.full(max(tables.windows.num_slots * tables.window_tokens, 1), POISON)
        self.sinks = np.full(max(tables.windows.num_slots * tables.num_sinks, 1), POISON)

    def begin(self, tables: PageTables, plan: StepPlan) -> None:
        rows = self.pages.reshape(-1, tables.page_size)
        rows[plan.new_pages] = CLEARED
        if not self.overlay:
            rows[plan.cow_dst] = rows[plan.cow_src]
            return
        rows[plan.copy_dst] = rows[plan.copy_src]
        if tables.window_tokens:
            rings = self.rings.reshape(-1, tables.window_tokens)
            rings[plan.window_copy_dst] = rings[plan.window_copy_src]
        if tables.num_sinks:
            sinks = self.sinks.reshape(-1, tables.num_sinks)
            sinks[plan.sink_copy_dst] = sinks[plan.sink_copy_src]

    def store(self, plan: StepPlan, tokens: np.ndarray) -> None:
        if not self.overlay:
            self._write(self.pages, plan.slot_mapping, tokens)
            return
        self._write(self.pages, plan.seal_mapping, self.rings[plan.seal_rows])
        self._write(self.pages, plan.store_mapping, tokens)
        self._write(self.sinks, plan.sink_mapping, tokens)
        self._write(self.rings, plan.ring_mapping, tokens)

    def abort(self, plan: StepPlan) -> None:
        if self.overlay:
            rows, mapping = plan.abort_seal()
            self._write(self.pages, mapping, self.rings[rows])

    @staticmethod
    def _write(target: np.ndarray, mapping: np.ndarray, tokens: np.ndarray) -> None:
        used = mapping >= 0
        places = mapping[used]
        assert np.unique(places).size == places.size, "a place is written twice"
        target[places] = tokens[used]


class HostLayer:
    """What one layer has on the host, one integer per token, and the copies between the tiers."""

    def __init__(self, layer: Layer, tables: PageTables) -> None:
        self.layer, self.tables = layer, tables
        self.pages = np.full((tables.host.num_pages + 1) * tables.page_size, POISON)
        self.rings: dict[int, np.ndarray] = {}
        self.sinks: dict[int, np.ndarray] = {}

    def copy(self, plan) -> None:
        out, size = plan.direction == "out", self.tables.page_size
        device, host = self.layer.pages.reshape(-1, size), self.pages.reshape(-1, size)
        if out:
            host[plan.host_pages] = device[plan.pages]
        else:
            device[plan.pages] = host[plan.host_pages]
        if not self.layer.overlay:
            return
        window, num_sinks = self.tables.window_tokens, self.tables.num_sinks
        for slot, ring, (begin, end) in zip(
            plan.window_slots.tolist(), plan.rings.tolist(), plan.ring_spans.tolist()
        ):
            rows = np.arange(begin, end) % window
            if out:
                self.rings[ring] = np.full(window, POISON)
                self.rings[ring][rows] = self.layer.rings[slot * window + rows]
            else:
                self.layer.rings[slot * window : (slot + 1) * window] = POISON
                self.layer.rings[slot * window + rows] = self.rings[ring][rows]
        for record, page, count in zip(
            plan.sink_records.tolist(), plan.sink_host_pages.tolist(), plan.num_sinks.tolist()
        ):
            rows = slice(record * num_sinks, record * num_sinks + count)
            if out:
                # A page that is there already may have more of them.
                kept = self.sinks.setdefault(page, np.full(num_sinks, POISON))
                kept[:count] = self.layer.sinks[rows]
            else:
                self.layer.sinks[rows] = self.sinks[page][:count]

    def poison(self, pages: np.ndarray, rings: set[int]) -> None:
        """Overwrite what is free."""
        self.pages.reshape(-1, self.tables.page_size)[pages] = POISON
        # The null page is never read.
        self.pages[: self.tables.page_size] = POISON
        self.rings = {ring: rows for ring, rows in self.rings.items() if ring not in rings}
        free = set(pages.tolist())
        self.sinks = {page: rows for page, rows in self.sinks.items() if page not in free}
