"""Swaps in simulations: what they move, what that takes, and what steps wait for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.errors import ConfigError
from pagedtq.models import MODELS
from pagedtq.paging import PageTables
from pagedtq.serving import SchedulerOptions, choose_preemption
from pagedtq.sim.comparison import simulate_formats
from pagedtq.sim.cost_model import CostModel, Hardware
from pagedtq.sim.generator import azure_conversation
from pagedtq.sim.host_link import HostLink
from pagedtq.sim.report import SimulationReport
from pagedtq.sim.simulator import Simulator
from pagedtq.sim.table import report_table
from pagedtq.sizing import Capacity, Format
from tests.sim.test_simulator import PAGE, TINY, assert_same, requests, workloads

LLAMA = MODELS["llama-3.1-8b"]
PAGE_BYTES, SLOT_BYTES = 1000, 300


def simulate(
    workload,
    pages,
    *,
    slots=0,
    host=1000,
    overlap=True,
    link=1e9,
    fast_forward=True,
    preemption="swap",
    **options,
):
    """Run a simulation over a small pool; return it, its outcome and its cost model."""
    config = Format.parse("k4v4" if slots else "k4v4-w0").config(TINY, PAGE)
    capacity = Capacity(
        num_pages=pages + 1,
        num_window_slots=slots,
        page_size=PAGE,
        page_bytes=PAGE_BYTES,
        window_slot_bytes=SLOT_BYTES if slots else 0,
    )
    cost = CostModel(TINY, config, Hardware(step_overhead=1e-6, link_bandwidth=link))
    simulator = Simulator(
        workload,
        config,
        capacity,
        cost,
        SchedulerOptions(preemption=preemption, **({"watermark": 0.0} | options)),
        num_host_pages=host,
        overlap_swaps=overlap,
        fast_forward=fast_forward,
    )
    outcome = simulator.run()
    tables = simulator.tables
    tables.check_integrity()
    assert (tables.num_sequences, tables.pool.num_used, tables.host.num_used) == (0, 0, 0)
    return simulator, outcome, cost


#: Eight requests of five pages each at their end, in a pool of eleven.
CROWD = requests(*[(30, 40)] * 8)


@given(
    workloads,
    st.integers(1, 30),
    st.sampled_from([0, 2, 9]),
    st.sampled_from([0, 6, 1000]),
    st.sampled_from([1e6, 1e9, 1e13]),
    st.sampled_from(["swap", "auto"]),
    st.booleans(),
)
@settings(max_examples=80)
def test_everything_is_served_and_taking_steps_at_once_changes_nothing(
    workload, pages, slots, host, link, preemption, overlap
):
    fast, slow = (
        simulate(
            workload,
            pages,
            slots=slots,
            host=host,
            link=link,
            preemption=preemption,
            overlap=overlap,
            fast_forward=forward,
        )
        for forward in (True, False)
    )
    outcome, swaps = fast[1], fast[1].swaps
    assert_same(outcome, slow[1])
    served = np.ones(len(workload), bool)
    served[outcome.rejected] = False
    np.testing.assert_array_equal(outcome.generated[served], workload.output_tokens[served])
    assert swaps.bytes_out == swaps.bytes_in
    assert swaps.link_seconds == pytest.approx((swaps.bytes_out + swaps.bytes_in) / link)
    assert swaps.sequences <= outcome.preemptions.sum()
    if not overlap:
        assert swaps.wait_seconds == pytest.approx(swaps.link_seconds)


@pytest.mark.parametrize("slots", [0, 8])
def test_a_swap_costs_its_pages_and_windows_over_the_link_and_computes_nothing_twice(slots):
    simulator, outcome, _ = simulate(CROWD, 11, slots=slots, overlap=False)
    swaps, stats = outcome.swaps, simulator.scheduler.stats
    assert swaps.sequences == outcome.preemptions.sum() == stats.swapped > 0
    windows = swaps.sequences * SLOT_BYTES if slots else 0
    assert swaps.bytes_out == stats.swapped_out_pages * PAGE_BYTES + windows
    assert swaps.bytes_in == stats.swapped_in_pages * PAGE_BYTES + windows
    assert swaps.link_seconds == pytest.approx((swaps.bytes_out + swaps.bytes_in) / 1e9)
    assert outcome.log.prefilled.sum() == CROWD.prompt_tokens.sum()


def test_steps_that_wait_take_as_much_longer_as_the_link_is_slower():
    runs = {link: simulate(CROWD, 11, overlap=False, link=link)[1] for link in (1e6, 1e9)}
    slow, fast = runs[1e6], runs[1e9]
    np.testing.assert_array_equal(slow.log.decoded, fast.log.decoded)
    moved = slow.swaps.bytes_out + slow.swaps.bytes_in
    assert moved == fast.swaps.bytes_out + fast.swaps.bytes_in
    longer = slow.log.end[-1] - fast.log.end[-1]
    assert longer == pytest.approx(moved / 1e6 - moved / 1e9)


def test_copies_that_overlap_steps_take_nothing_from_them_while_the_link_keeps_up():
    alone = simulate(CROWD, 11, overlap=False, link=1e15)[1]
    waiting = simulate(CROWD, 11, overlap=False, link=1e9)[1]
    overlapping = simulate(CROWD, 11, overlap=True, link=1e9)[1]
    assert overlapping.swaps.wait_seconds < waiting.swaps.wait_seconds
    assert overlapping.log.end[-1] < waiting.log.end[-1]
    assert overlapping.log.end[-1] > alone.log.end[-1]


def test_tokens_of_sequences_under_way_count_as_stored():
    _, outcome, _ = simulate(CROWD, 11, overlap=True, link=1e7)
    log = outcome.log
    assert outcome.swaps.sequences
    assert (log.tokens <= log.pages * PAGE).all()
    assert (log.tokens > (log.pages - 2 * log.running) * PAGE).all()


def test_the_rule_decides_by_the_link_and_the_host_that_is_full_computes_again():
    _, _, cost = simulate(requests((1, 1)), 3)
    # Break-even: link / (2 * bytes per token) tokens per second.
    even = 2 * (PAGE_BYTES / PAGE) / cost.linear_seconds(1)
    for factor, swaps in ((0.5, False), (4.0, True)):
        outcome = simulate(CROWD, 11, preemption="auto", link=factor * even)[1]
        assert outcome.preemptions.sum()
        assert bool(outcome.swaps.sequences) == swaps
        costs = CostModel(
            TINY,
            Format.parse("k4v4-w0").config(TINY, PAGE),
            Hardware(link_bandwidth=factor * even),
        ).preemption_costs()
        assert (choose_preemption(costs, 480, 30 * PAGE_BYTES) == "swap") == swaps
    full = simulate(CROWD, 11, host=2)[1]
    assert full.swaps.sequences < full.preemptions.sum()
    assert full.log.prefilled.sum() > CROWD.prompt_tokens.sum()


def plan_of(direction, pages=1):
    tables = PageTables(4, 20, num_host_pages=9)
    seq_id = tables.open()
    tables.commit(tables.reserve([seq_id], 4 * pages))
    plan = tables.begin_swap_out([seq_id])
    if direction == "out":
        return plan
    tables.commit_swap(plan)
    return tables.begin_swap_in([seq_id])


def test_the_link_makes_one_copy_after_the_other_in_each_direction_at_the_same_time():
    link = HostLink(100.0)
    first, second, back = plan_of("out"), plan_of("out"), plan_of("in")
    link.begin(first, 200, 1.0)
    link.begin(second, 300, 2.0)
    link.begin(back, 100, 2.0)
    assert link.next_done() == 3.0
    assert link.take_done(2.9) == []
    assert link.take_done(3.0) == [first, back]
    assert link.next_done() == 6.0
    assert link.take_done(9.0) == [second]
    assert link.next_done() == float("inf")
    assert link.copy(first, 50) == 0.5
    assert link.totals(3) == (3, 550, 100, 6.5, 0.5)


def report(**more):
    return simulate_formats(
        azure_conversation(120, seed=1).at_rate(200.0),
        [Format.parse("fp16")],
        LLAMA,
        budget_bytes=1 << 30,
        **more,
    )


def test_a_report_says_what_was_swapped_and_under_which_conditions():
    told = report(options=SchedulerOptions(preemption="swap", watermark=0.0), host_bytes=2 << 30)
    (fp16,) = told.formats
    assert (told.host_bytes, told.overlap_swaps) == (2 << 30, True)
    assert told.hardware.link_bandwidth == 50e9
    assert fp16.swaps.host_pages == (2 << 30) // fp16.capacity.page_bytes
    assert 0 < fp16.swaps.sequences <= fp16.preemptions
    assert fp16.swaps.bytes_out % fp16.capacity.page_bytes == 0
    assert fp16.swaps.wait_seconds <= fp16.simulated_seconds
    assert SimulationReport.from_json(told.to_json()) == told
    (line,) = [line for line in report_table(told).splitlines() if "on the link" in line]
    assert line.startswith(f"fp16: {fp16.swaps.sequences} of {fp16.preemptions} preempted")
    assert line.endswith(f"{fp16.tokens_recomputed} tokens computed again")


def test_the_host_is_as_large_as_the_device_unless_said_and_nothing_without_swaps():
    swapping = SchedulerOptions(preemption="auto")
    assert report(options=swapping).host_bytes == 1 << 30
    told = report()
    assert (told.host_bytes, told.formats[0].swaps.host_pages) == (0, 0)
    assert "on the link" not in report_table(told)


@pytest.mark.parametrize("link", [0.0, -1.0, float("inf"), float("nan")])
def test_a_link_that_cannot_be_is_refused(link):
    with pytest.raises(ConfigError, match="link_bandwidth must be positive"):
        Hardware(link_bandwidth=link)
