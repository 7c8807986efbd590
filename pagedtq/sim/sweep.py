"""How often prompts find their beginning in the cache, by storage format and memory budget.

Smaller pages mean more of them in the same memory, so that what was computed stays findable for
longer. The requests must name their content (``hash_ids``), as Mooncake's traces do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from .. import __version__
from ..errors import ArgumentError
from ..models import ModelShape
from ..serving.generation import SchedulerOptions
from ..sizing import Format
from .comparison import Progress, silent, simulate_format
from .cost_model import Hardware
from .report import write_json
from .workload import HASH_BLOCK_TOKENS, Workload

#: Version of the JSON report.
SWEEP_SCHEMA = 1


class SweepPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One format at one budget.

    Parameters
    ----------
    name : str
        The format.
    budget_bytes, num_pages : int
        Memory, and the pages that fit into it.
    requests_served, requests_rejected : int
        Rejected: too long for the empty pool.
    prompt_tokens, tokens_found : int
        Tokens of the served prompts, and those that were found in pages at first admission.
    hit_rate : float
        Their quotient.
    preemptions : int
        Sequences that lost their pages.
    first_token_seconds : dict of str to float
        From arrival to the first output token, by the cost model: ``mean``, ``p50``, ``p99``.
    simulated_seconds, wall_seconds : float
        Time by the cost model, and what simulating it took.
    """

    name: str
    budget_bytes: int
    num_pages: int
    requests_served: int
    requests_rejected: int
    prompt_tokens: int
    tokens_found: int
    hit_rate: float
    preemptions: int
    first_token_seconds: dict[str, float]
    simulated_seconds: float
    wall_seconds: float


class SweepReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hit rates of one workload.

    Parameters
    ----------
    schema : int
        Version of this structure.
    pagedtq_version : str
    workload : str
        Where the requests come from.
    num_requests : int
    ideal_hit_rate : float
        If nothing were ever dropped and every prompt computed before the next one came.
    page_size : int
    model : ModelShape
    hardware : Hardware
    options : SchedulerOptions
    points : list of SweepPoint
        Format by format, by growing budget.
    """

    schema: int
    pagedtq_version: str
    workload: str
    num_requests: int
    ideal_hit_rate: float
    page_size: int
    model: ModelShape
    hardware: Hardware
    options: SchedulerOptions
    points: list[SweepPoint]

    def to_json(self) -> bytes:
        """Encode as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def sweep_budgets(
    workload: Workload,
    formats: Sequence[Format],
    budgets: Sequence[int],
    model: ModelShape,
    *,
    page_size: int = 64,
    hardware: Hardware | None = None,
    options: SchedulerOptions | None = None,
    host_bytes: int | None = None,
    overlap_swaps: bool = True,
    progress: Progress = silent,
) -> SweepReport:
    """Serve a workload in several formats at several budgets.

    Parameters
    ----------
    workload : Workload
        The requests, with ``hash_ids``.
    formats : sequence of Format
        How pages are stored.
    budgets : sequence of int
        Bytes for pages and windows.
    model : ModelShape
        Decides bytes and work per token.
    page_size : int
        Tokens in a page.
    hardware, options, host_bytes, overlap_swaps, progress
        As for ``simulate_formats``.

    Returns
    -------
    SweepReport

    Raises
    ------
    ArgumentError
        If the workload does not name its content, or there is no format or budget.
    """
    if workload.hash_ids is None:
        raise ArgumentError(
            f"{workload.name} does not say which prompts begin alike; expected a workload with "
            "hash_ids, such as a Mooncake trace"
        )
    if not formats or not budgets:
        raise ArgumentError("expected at least one format and one budget")
    hardware, options = hardware or Hardware(), options or SchedulerOptions()
    points = []
    for storage in formats:
        for budget in sorted(budgets):
            report = simulate_format(
                workload,
                storage,
                model,
                budget_bytes=budget,
                page_size=page_size,
                hardware=hardware,
                options=options,
                host_bytes=host_bytes,
                overlap_swaps=overlap_swaps,
                progress=progress,
            )
            points.append(
                SweepPoint(
                    name=storage.name,
                    budget_bytes=budget,
                    num_pages=report.capacity.num_pages,
                    requests_served=report.requests_served,
                    requests_rejected=report.requests_rejected,
                    prompt_tokens=report.prompt_tokens,
                    tokens_found=report.tokens_found,
                    hit_rate=report.tokens_found / max(report.prompt_tokens, 1),
                    preemptions=report.preemptions,
                    first_token_seconds=report.first_token_seconds,
                    simulated_seconds=report.simulated_seconds,
                    wall_seconds=report.wall_seconds,
                )
            )
    return SweepReport(
        schema=SWEEP_SCHEMA,
        pagedtq_version=__version__,
        workload=workload.name,
        num_requests=len(workload),
        ideal_hit_rate=ideal_hit_rate(workload, page_size),
        page_size=page_size,
        model=model,
        hardware=hardware,
        options=options,
        points=points,
    )


def ideal_hit_rate(workload: Workload, page_size: int) -> float:
    """Return the share of prompt tokens an endless cache finds, served one after the other.

    At least the last token of every prompt is computed.
    """
    if workload.hash_ids is None or workload.hash_offsets is None:
        return 0.0
    known: set[int] = set()
    parts = HASH_BLOCK_TOKENS // page_size
    found = 0
    offsets = workload.hash_offsets.tolist()
    for first, stop, tokens in zip(offsets, offsets[1:], workload.prompt_tokens.tolist()):
        whole, most = tokens // page_size, (tokens - 1) // page_size
        pages = (workload.hash_ids[first:stop, None] * parts + np.arange(parts)).ravel()
        ids: list[int] = pages[:whole].tolist()
        hits = next((at for at, page in enumerate(ids) if page not in known), len(ids))
        found += min(hits, most)
        known.update(ids)
    return found * page_size / int(workload.prompt_tokens.sum())


def write_sweep(report: SweepReport, folder: str | Path) -> Path:
    """Write ``sweep.json`` into a folder, which is made; return its path.

    Raises
    ------
    ArgumentError
        If it cannot be written.
    """
    return write_json(report.to_json(), Path(folder) / "sweep.json")
