"""Bytes of every preset: a token in a page, page alignment, and the exact window beside.

Nothing is timed: the figures come from the page layout itself, at head_dim 128 and 64-token pages.
"""

from __future__ import annotations

from benchmarks.report import arguments, publish
from pagedtq import PRESETS, preset
from pagedtq.paging import PageLayout

HEADS, DIM, PAGE = 8, 128, 64


def main() -> None:
    options = arguments("formats", __doc__)
    rows = []
    for name in PRESETS:
        config = preset(
            name, num_layers=1, num_kv_heads=HEADS, head_dim=DIM, num_pages=2, page_size=PAGE
        )
        layout = PageLayout(config)
        extent = layout.extents[0]
        rows.append(
            {
                "preset": name,
                "bytes per token and head": extent.payload_bytes / PAGE,
                "with page alignment": extent.nbytes / PAGE,
                "extent bytes": extent.nbytes,
                "x below fp16": 4 * DIM / (extent.nbytes / PAGE),
                "window slot, bytes per head": layout.window_slot_bytes / HEADS,
                "window slot, in pages": layout.window_slot_bytes / layout.page_bytes,
            }
        )
    publish(
        "formats",
        rows,
        notes=["window: 64 ring rows and 4 sinks of float16 keys and values, one per sequence"],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
