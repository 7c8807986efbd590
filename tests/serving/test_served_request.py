"""Requests hash their blocks once; lists of blocks add up."""

from __future__ import annotations

import pytest

from pagedtq.errors import ArgumentError, ArgumentTypeError
from pagedtq.paging import BlockHasher, PageTables, SharingOptions
from pagedtq.serving import Blocks, ServedRequest


def test_a_request_hashes_each_block_once_and_with_what_decides_its_bytes():
    hasher = BlockHasher(4)
    request = ServedRequest("0", [1, 2, 3], hasher, salt=b"s", extra_keys={1: b"x"})
    assert request.block_hashes == []
    for tokens in ([4], [5, 6, 7, 8, 9], [10, 11, 12]):
        request.append(tokens)
    tables = PageTables(4, 9, sharing=SharingOptions())
    seq_id = tables.open(list(range(1, 13)), salt=b"s", extra_keys={1: b"x"})
    assert tuple(request.block_hashes) == tables.keys_of(seq_id)
    assert request.all_token_ids.tolist() == list(range(1, 13))
    single = ServedRequest("1", [1], hasher, salt=b"s", extra_keys={1: b"x"})
    for token in range(2, 13):
        single.append_token(token)
    assert single.block_hashes == request.block_hashes
    for bad, error in ((2**31, ArgumentError), (1.0, ArgumentTypeError)):
        with pytest.raises(error, match="token_id"):
            single.append_token(bad)
    assert single.num_tokens == 12


def test_blocks_add_up():
    both = Blocks([1, 2]) + Blocks([3])
    assert both.get_block_ids() == both.blocks == ([1, 2, 3],)
    assert Blocks().get_block_ids(allow_none=True) is None
    assert repr(both) == "Blocks([1, 2, 3])"
