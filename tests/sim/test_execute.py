"""Execution stores and attends for real, and its error is that of the codec."""

from __future__ import annotations

import pytest

from pagedtq.errors import ArgumentError
from pagedtq.models import MODELS
from pagedtq.sim.execute import execute_format
from pagedtq.sim.generator import azure_conversation
from pagedtq.sizing import Format

WORKLOAD = azure_conversation(20, seed=3)


def execute(name, **more):
    options = {"num_requests": 2, "max_steps": 3} | more
    return execute_format(WORKLOAD, Format.parse(name), MODELS["tiny"], **options)


def test_more_bits_and_a_window_mean_less_error_and_exact_storage_almost_none():
    errors = {
        name: execute(name).mean_relative_error
        for name in ("fp16", "k8v8", "k4v4", "k4v4-w0", "k2v2-w0")
    }
    assert errors["fp16"] < 1e-5 < errors["k8v8"] < errors["k4v4"]
    assert errors["k4v4"] < errors["k4v4-w0"] < errors["k2v2-w0"] < 1


def test_counts_are_those_of_the_requests():
    run = execute("k4v4", chunk_tokens=100)
    prompts = WORKLOAD.prompt_tokens[:2]
    assert run.tokens_stored == prompts.sum()
    assert run.tokens_attended == sum(prompts.sum() + 2 * step for step in (1, 2, 3))
    assert run.backend == "host"
    assert min(run.store_tokens_per_second, run.decode_tokens_per_second) > 0
    assert 0 < run.mean_relative_error <= run.max_relative_error


def test_one_seed_gives_one_error_whatever_the_chunks():
    first, again, other = (
        execute("k3v3", seed=seed, chunk_tokens=chunk).max_relative_error
        for seed, chunk in ((1, 2048), (1, 77), (2, 2048))
    )
    assert first == again != other


def test_what_has_no_codec_is_not_executed():
    assert execute("fp8") is None
    for bad in ({"num_requests": 0}, {"max_steps": 0}):
        with pytest.raises(ArgumentError):
            execute("k4v4", **bad)
