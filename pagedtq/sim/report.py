"""What a simulation found, as structs that are written as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import ArgumentError
from ..models import ModelShape
from ..serving.generation import SchedulerOptions
from ..sizing import Capacity
from .cost_model import Hardware

#: Version of the JSON report.
SCHEMA = 3


class WorkloadSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was asked for.

    Parameters
    ----------
    name : str
        Where the requests come from.
    num_requests : int
        How many.
    requests_per_second : float or None
        Mean arrival rate; None if all arrive at once.
    prompt_tokens, output_tokens : dict of str to float
        ``mean``, ``p50``, ``p99``, ``max``.
    waste_by_page_size : dict of str to float
        Share of allocated slots that stay empty, all requests at their final length.
    """

    name: str
    num_requests: int
    requests_per_second: float | None
    prompt_tokens: dict[str, float]
    output_tokens: dict[str, float]
    waste_by_page_size: dict[str, float]


class Timeline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Means over equal bins of simulated time; a list per quantity, one number per bin.

    Parameters
    ----------
    seconds : list of float
        Centres of the bins.
    running : list of float
        Sequences that hold pages.
    tokens : list of float
        Tokens stored.
    occupancy : list of float
        Taken pages as a share of the pool's.
    utilisation : list of float or None
        Tokens stored as a share of the slots of taken pages; None while no page is taken.
    """

    seconds: list[float]
    running: list[float]
    tokens: list[float]
    occupancy: list[float]
    utilisation: list[float | None]


class ExecutionReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What really storing and attending compressed pages measured (``--execute``).

    Parameters
    ----------
    backend : str
        Where it ran.
    tokens_stored, tokens_attended : int
        Tokens encoded, and cached tokens read, per layer.
    store_tokens_per_second, attend_tokens_per_second, decode_tokens_per_second : float
        Measured: tokens stored, cached tokens read, and output tokens, per second, all layers.
    max_relative_error, mean_relative_error : float
        ``||out - ref||2 / ||ref||2`` over queries, against exact float64 attention on the original
        keys and values.
    """

    backend: str
    tokens_stored: int
    tokens_attended: int
    store_tokens_per_second: float
    attend_tokens_per_second: float
    decode_tokens_per_second: float
    max_relative_error: float
    mean_relative_error: float


class SwapReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What preemption moved to the host and back.

    Parameters
    ----------
    host_pages : int
        Pages of the host.
    sequences : int
        Sequences that went there.
    bytes_out, bytes_in : int
        Bytes copied to the host and back.
    link_seconds : float
        Simulated time that the copies took, both directions added.
    wait_seconds : float
        The part of ``simulated_seconds`` in which nothing was computed until copies had ended.
    """

    host_pages: int
    sequences: int
    bytes_out: int
    bytes_in: int
    link_seconds: float
    wait_seconds: float


class FormatReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one storage format did with the budget.

    Parameters
    ----------
    name : str
        The format.
    window_tokens, num_sinks : int
        Its exact window.
    bytes_per_token : float
        Page bytes of one token, all layers and heads, alignment included.
    capacity : Capacity
        Pages and window slots in the budget.
    requests_served, requests_rejected : int
        Rejected: too long for the empty pool.
    rejection : str or None
        Which was rejected first, and why.
    prompt_tokens, output_tokens : int
        Tokens of the served requests.
    tokens_found : int
        Prompt tokens of served requests that were found in pages, those of the first admission.
    tokens_recomputed : int
        Tokens that preemption made to be processed again, less those it found again.
    preemptions, requests_preempted : int
        Times a sequence was preempted; requests it happened to.
    swaps : SwapReport
        Those that were swapped instead of computed again.
    steps : int
        Steps of the batch.
    simulated_seconds : float
        From the first arrival to the last output token.
    linear_layers_seconds : float
        The part of it that multiplying processed tokens by the weights takes at least: no cache
        format goes below.
    output_tokens_per_second : float
        Throughput.
    relative_throughput : float
        To the first ``fp16`` format of the report, else to its first format.
    running_peak : int
    running_mean : float
        Sequences that hold pages, mean over simulated time.
    utilisation : float
        Tokens stored over slots of taken pages, both integrated over time: 1 less the waste inside
        pages. Tokens in shared pages count once for each sequence, so that it can exceed 1.
    occupancy : float
        Taken pages over all pages, mean over time.
    first_token_seconds : dict of str to float
        From arrival to the first output token: ``mean``, ``p50``, ``p99``.
    timeline : Timeline
        The same over time.
    wall_seconds : float
        What simulating it took; the only field that differs between two runs.
    execution : ExecutionReport or None
        What ``--execute`` measured.
    """

    name: str
    window_tokens: int
    num_sinks: int
    bytes_per_token: float
    capacity: Capacity
    requests_served: int
    requests_rejected: int
    rejection: str | None
    prompt_tokens: int
    output_tokens: int
    tokens_found: int
    tokens_recomputed: int
    preemptions: int
    requests_preempted: int
    swaps: SwapReport
    steps: int
    simulated_seconds: float
    linear_layers_seconds: float
    output_tokens_per_second: float
    relative_throughput: float
    running_peak: int
    running_mean: float
    utilisation: float
    occupancy: float
    first_token_seconds: dict[str, float]
    timeline: Timeline
    wall_seconds: float
    execution: ExecutionReport | None = None


class SimulationReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Formats side by side at one memory budget.

    Parameters
    ----------
    schema : int
        Version of this structure.
    pagedtq_version : str
    budget_bytes : int
        Memory for pages and windows, the same for every format.
    host_bytes : int
        Memory of the host for sequences that are swapped, the same for every format.
    overlap_swaps : bool
        Whether copies of swaps ran while others stepped.
    page_size : int
    workload : WorkloadSummary
    model : ModelShape
    hardware : Hardware
    options : SchedulerOptions
    formats : list of FormatReport
    """

    schema: int
    pagedtq_version: str
    budget_bytes: int
    host_bytes: int
    overlap_swaps: bool
    page_size: int
    workload: WorkloadSummary
    model: ModelShape
    hardware: Hardware
    options: SchedulerOptions
    formats: list[FormatReport]

    def to_json(self) -> bytes:
        """Encode as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    @classmethod
    def from_json(cls, text: bytes | str) -> SimulationReport:
        """Decode JSON.

        Raises
        ------
        ArgumentError
            If it is no report, or of a version this code does not know.
        """
        try:
            report = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ArgumentError(f"not a simulation report: {error}") from error
        if report.schema != SCHEMA:
            raise ArgumentError(f"expected a report of schema {SCHEMA}, got {report.schema}")
        return report


def write_report(report: SimulationReport, folder: str | Path) -> Path:
    """Write ``report.json`` into a folder, which is made; return its path.

    Raises
    ------
    ArgumentError
        If it cannot be written.
    """
    return write_json(report.to_json(), Path(folder) / "report.json")


def write_json(text: bytes, path: Path) -> Path:
    """Write a report to a path whose folder is made; return the path.

    Raises
    ------
    ArgumentError
        If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text + b"\n")
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror or error}") from error
    return path
