"""Requests and managers of the serving tests, what a scheduler does with them, and what it sees."""

from __future__ import annotations

from pagedtq.paging import BlockHasher
from pagedtq.serving import BlockManager, ServedRequest

SIZE = 16
COMMON = [token for block in range(3) for token in [block] * SIZE]


def manager_of(num_blocks=11, block_size=SIZE, **options) -> BlockManager:
    return BlockManager(num_blocks, block_size, **options)


def request_of(name, tokens, block_size=SIZE, **options) -> ServedRequest:
    return ServedRequest(name, tokens, BlockHasher(block_size), **options)


def admit(manager, request, **options):
    """Look a request up and allocate all its tokens; return what was found and what is new."""
    found, num_found = manager.get_computed_blocks(request)
    assert num_found == len(found) * manager.block_size
    new = manager.allocate_slots(
        request, request.num_tokens - num_found, num_found, found, **options
    )
    if new is not None:
        request.num_computed_tokens = request.num_tokens
        manager.tables.check_integrity()
    return list(found.page_ids), None if new is None else list(new.page_ids)


def decode(manager, request, tokens):
    """Compute further tokens of a running request; return its new pages."""
    request.append(tokens)
    new = manager.allocate_slots(request, len(tokens))
    request.num_computed_tokens = request.num_tokens
    manager.tables.check_integrity()
    return list(new.page_ids)


def free_order(manager) -> list[int]:
    """Return the free pages in the order in which they will be taken."""
    return manager.tables.pool.free_ids().tolist()


def refs(manager) -> list[int]:
    """Return the owners of every page."""
    return manager.tables.pool.ref_counts.tolist()


def state(manager):
    """Return what a refused call must leave alone."""
    tables = manager.tables
    return refs(manager), free_order(manager), tables._table.tolist(), len(tables.prefix)
