"""Prompts that begin alike share pages in a simulation, and smaller tokens let more be found."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from pagedtq.errors import ArgumentError
from pagedtq.models import MODELS
from pagedtq.serving import SchedulerOptions
from pagedtq.sim.comparison import simulate_format, simulate_formats
from pagedtq.sim.generator import azure_conversation
from pagedtq.sim.plots import draw_sweep
from pagedtq.sim.sweep import SweepReport, ideal_hit_rate, sweep_budgets, write_sweep
from pagedtq.sim.table import report_table, sweep_table
from pagedtq.sim.workload import HASH_BLOCK_TOKENS, Workload
from pagedtq.sizing import Format

LLAMA = MODELS["llama-3.1-8b"]
BLOCK = HASH_BLOCK_TOKENS


def conversations(count=40, turns=4, seed=0, gap=0.3):
    """Conversations whose every turn repeats the prompts before it, one id per block."""
    rng = np.random.default_rng(seed)
    blocks, prompts, outputs, fresh = [], [], [], 0
    talks = [[] for _ in range(count)]
    for _turn in range(turns):
        for talk in talks:
            added = int(rng.integers(1, 4))
            # The last block of a prompt is partial: a longer prompt names it anew.
            talk[-1:] = range(fresh, fresh + added)
            fresh += added
            blocks.append(list(talk))
            prompts.append((len(talk) - 1) * BLOCK + int(rng.integers(1, BLOCK)))
            outputs.append(int(rng.integers(1, 30)))
    offsets = np.cumsum([0, *map(len, blocks)])
    ids = np.concatenate(blocks)
    return Workload("talks", np.arange(len(prompts)) * gap, prompts, outputs, ids, offsets)


def found_by_a_model(workload, page_size):
    """Return the prompt tokens an endless cache finds, by sets of prefixes."""
    known, found = set(), []
    for at, tokens in enumerate(workload.prompt_tokens.tolist()):
        ids = workload.hash_ids[workload.hash_offsets[at] : workload.hash_offsets[at + 1]].tolist()
        content = [(ids[t // BLOCK], t % BLOCK) for t in range(tokens)]
        pages = [
            tuple(content[: end + page_size]) for end in range(0, tokens - page_size + 1, page_size)
        ]
        hits = 0
        while hits < len(pages) and pages[hits] in known and (hits + 1) * page_size < tokens:
            hits += 1
        known.update(pages)
        found.append(hits * page_size)
    return found


@pytest.mark.parametrize("page_size", [64, 256])
def test_a_pool_that_never_fills_finds_what_a_model_with_sets_finds(page_size):
    workload = conversations(6, 3, gap=1e4)
    report = simulate_format(
        workload, Format.parse("k4v4-w0"), LLAMA, budget_bytes=64 << 30, page_size=page_size
    )
    expected = found_by_a_model(workload, page_size)
    assert report.tokens_found == sum(expected) > 0
    assert ideal_hit_rate(workload, page_size) == sum(expected) / workload.prompt_tokens.sum()
    assert report.tokens_recomputed == 0
    assert report.requests_served == len(workload)


def test_what_is_found_is_not_computed_and_time_is_saved():
    workload = conversations(gap=0.01)
    shared, alone = (
        simulate_format(chosen, Format.parse("k4v4"), LLAMA, budget_bytes=16 << 30)
        for chosen in (workload, without_content(workload))
    )
    assert shared.tokens_found > 0 == alone.tokens_found
    assert shared.simulated_seconds < alone.simulated_seconds
    assert shared.output_tokens == alone.output_tokens == workload.output_tokens.sum()


def without_content(workload):
    return Workload(workload.name, workload.arrival, workload.prompt_tokens, workload.output_tokens)


def test_steps_at_once_change_nothing_when_pages_are_shared():
    fast, slow = (
        simulate_format(
            conversations(20, 3, gap=0.02),
            Format.parse("fp16"),
            LLAMA,
            budget_bytes=4 << 30,
            fast_forward=forward,
        )
        for forward in (True, False)
    )
    assert msgspec.structs.replace(fast, wall_seconds=0) == msgspec.structs.replace(
        slow, wall_seconds=0
    )
    assert fast.tokens_found


@pytest.fixture(scope="module")
def report():
    return sweep_budgets(
        conversations(gap=0.05),
        [Format.parse(name) for name in ("fp16", "k4v4")],
        [8 << 30, 2 << 30, 32 << 30],
        LLAMA,
        options=SchedulerOptions(step_tokens=4096),
    )


def test_more_memory_and_smaller_tokens_find_more(report):
    rates = {(p.name, p.budget_bytes >> 30): p.hit_rate for p in report.points}
    assert list(rates) == [(name, gib) for name in ("fp16", "k4v4") for gib in (2, 8, 32)]
    for name in ("fp16", "k4v4"):
        assert rates[name, 2] < rates[name, 8] <= rates[name, 32] <= report.ideal_hit_rate
    assert rates["fp16", 2] < rates["k4v4", 2]
    assert all(point.requests_served == 160 for point in report.points)


def test_a_sweep_is_told_as_table_json_and_figure(report, tmp_path):
    lines = sweep_table(report).splitlines()
    assert lines[0].endswith(f"an endless cache finds {report.ideal_hit_rate:.2%}")
    assert [line.split()[0] for line in lines[4:]] == ["fp16"] * 3 + ["k4v4"] * 3
    path = write_sweep(report, tmp_path / "new")
    assert msgspec.json.decode(path.read_bytes(), type=SweepReport) == report
    assert [path.name for path in draw_sweep(report, tmp_path)] == ["hit_rate.png"]


def test_the_table_of_a_comparison_says_what_was_found():
    shared = simulate_formats(
        conversations(8, 3), [Format.parse("k4v4")], LLAMA, budget_bytes=4 << 30
    )
    assert "of the prompt tokens found in pages" in report_table(shared)


def test_bad_sweeps_are_refused():
    workload, formats = conversations(2, 2), [Format.parse("k4v4")]
    for bad, some, budgets in (
        (azure_conversation(5), formats, [1 << 30]),
        (workload, [], [1 << 30]),
        (workload, formats, []),
    ):
        with pytest.raises(ArgumentError, match="expected"):
            sweep_budgets(bad, some, budgets, LLAMA)
    with pytest.raises(ArgumentError, match="do not divide into pages of 96"):
        workload.block_keys(0, 96)
