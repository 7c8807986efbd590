"""What counts as room: reserved pages, whole sequences, the longest length; also for who runs."""

from __future__ import annotations

import pytest
from served import SIZE, admit, decode, manager_of, request_of

from pagedtq.serving import Blocks


def test_reserved_blocks_count_as_taken_for_a_request_that_runs():
    manager = manager_of()
    request = request_of("0", [1] * SIZE)
    admit(manager, request)
    request.append([2])
    before = manager.num_free_blocks
    assert manager.allocate_slots(request, 1, reserved_blocks=before) is None
    assert (manager.num_free_blocks, manager.get_block_ids("0")) == (before, ([1],))
    assert manager.allocate_slots(request, 1, reserved_blocks=before - 1) == Blocks([2])


def test_a_request_that_runs_can_be_refused_until_all_of_it_fits():
    manager = manager_of(11, 4)
    request = request_of("0", [1] * 60, 4)
    assert manager.allocate_slots(request, 8) == Blocks([1, 2])
    request.num_computed_tokens = 8
    # Eight pages are free; thirteen would be needed to the last token.
    assert manager.allocate_slots(request, 4, full_sequence_must_fit=True) is None
    assert (manager.num_free_blocks, manager.get_block_ids("0")) == (8, ([1, 2],))
    assert manager.allocate_slots(request, 4) == Blocks([3])


@pytest.mark.parametrize("runs", [False, True])
def test_reserved_blocks_are_left_by_the_step_and_not_by_what_comes_later(runs):
    """As in vLLM: the sequence must fit into what is free, the step into what is not reserved."""
    manager = manager_of(11, 4)
    request = request_of("0", [1] * 40, 4)
    if runs:
        manager.allocate_slots(request, 8)
        request.num_computed_tokens = 8
    free = manager.num_free_blocks
    options = {"full_sequence_must_fit": True}
    assert manager.allocate_slots(request, 4, reserved_blocks=free, **options) is None
    assert len(manager.allocate_slots(request, 4, reserved_blocks=free - 1, **options)) == 1


def test_no_request_steps_while_more_is_reserved_than_free():
    manager = manager_of(11, 4)
    request = request_of("0", [1] * 5, 4)
    admit(manager, request)
    request.append([1])
    assert manager.allocate_slots(request, 1, reserved_blocks=9) is None
    assert manager.allocate_slots(request, 1, reserved_blocks=8) == Blocks([])


def test_room_ends_with_the_longest_length():
    manager = manager_of(block_size=4, max_model_len=10)
    request = request_of("0", [1] * 8, 4)
    # Drafts behind position 10 get none: three blocks, not four.
    assert manager.allocate_slots(request, 8, num_lookahead_tokens=8) == Blocks([1, 2, 3])
    request.num_computed_tokens = 8
    assert decode(manager, request, [1, 1, 1, 1, 1, 1]) == []
    assert manager.tables.length_of(manager.sequence_of("0")) == 10
