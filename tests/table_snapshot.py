"""All state of page tables, comparable: what "nothing has changed" means."""

from __future__ import annotations

import numpy as np

from pagedtq.paging import PageTables

#: What may have grown although nothing has changed.
CAPACITY = ("capacity", "free rows")
#: What differs between two tables to which the same was done.
IDENTITY = ("ids", "step", "swaps")


def snapshot(tables: PageTables) -> dict[str, object]:
    """Return rows, page tables, pools of both tiers, swaps, fences, prefixes and priorities."""
    rows = np.flatnonzero(tables._ids >= 0)
    length = tables._length[rows]
    width = -(-int(length.max(initial=0)) // tables.page_size)
    windows, host = tables.windows, tables.host
    state: dict[str, object] = {
        "capacity": (tables._fields.shape, tables._table.shape),
        "free rows": list(tables._free_rows),
        "ids": tables._ids[rows].tobytes(),
        "step": id(tables._step),
        "swaps": list(tables._swaps),
        "rows": rows.tobytes(),
        # Of those that are there, or of those that will be.
        "next row": tables._free_rows[-1] if tables._free_rows else tables._ids.size,
        "fields": tables._fields[:, rows].tobytes(),
        "slots": tables._slot[rows].tobytes(),
        "table": tables._table[rows, :width].tobytes(),
        "touched": (tables._touched[:, rows].tobytes(), tables._touches),
        "version": tables.version,
        "blocks evicted": tables.num_blocks_evicted,
        "has a step": tables._step is not None,
        "records": windows.sink_record.tobytes(),
        "resting": windows.resting_pages.tolist(),
        "fences": list(tables.fences._open),
        "twins": [part.tolist() for part in tables._twins.pairs()],
        "away": (tables._num_away, len(tables._swaps)),
        "swapped": {
            row: (left.host_pages.tobytes(), left.findable.tobytes(), left.ring)
            for row, left in tables._swapped.items()
        },
    }
    pools = {"pages": tables.pool, "slots": windows, "records": windows._records}
    for name, pool in (*pools.items(), ("host pages", host), ("rings", host.rings)):
        state[f"owners of {name}"] = pool.ref_counts.tobytes(), pool.num_shared
        state[f"free {name}"] = pool.free_ids().tobytes()
        state[f"number of free {name}"] = pool.num_free
        state[f"parked {name}"] = pool.parked_ids().tobytes()
    if tables.prefix is not None:
        state |= _prefixes(tables)
    return state


def logical(tables: PageTables, *, elsewhere: bool = False) -> dict[str, object]:
    """Return a `snapshot` without capacities; to be compared ``elsewhere``, without identities."""
    unlike = CAPACITY + IDENTITY if elsewhere else CAPACITY
    return {name: part for name, part in snapshot(tables).items() if name not in unlike}


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names of the parts of two snapshots that differ."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _prefixes(tables: PageTables) -> dict[str, object]:
    prefix, retention = tables.prefix, tables.retention
    assert prefix is not None
    state: dict[str, object] = {
        "keys of pages": list(prefix._keys),
        "pages of keys": {key: prefix.pages_of(key) for key in prefix._first},
        "held": (prefix.held.tobytes(), prefix.num_pages_held, prefix.num_forgotten),
        "chains": {
            row: (list(chain.keys), dict(chain.extras), chain.prompt.tobytes(), chain.num_tokens)
            for row, chain in tables._chains.items()
        },
        "opaque": ([chain.opaque for chain in tables._chains.values()], tables._num_opaque),
        "tokens": (tables._page_tokens.tobytes(), tables._host_tokens.tobytes()),
        "lookups": (tables.prefix_queries, tables.prefix_hits),
        "retention": None,
    }
    if retention is not None:
        queue = retention._queue
        arrays = retention.pinned, queue.priority, queue.lifetime
        state["retention"] = [array.tobytes() for array in arrays], dict(queue._due)
    return state
