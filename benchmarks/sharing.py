"""Memory that several outputs of a request save by sharing pages: parallel sampling, beam search.

Reported as in the PagedAttention paper (Kwon and others, SOSP 2023, figure 15): blocks saved by
sharing over blocks without sharing, mean over the steps of a run. Requests go through the real
scheduler and page tables; a pool is large enough to preempt nobody.

* sampling: every output is independent and shares the prompt
* beam search: a real search (the best of all continuations, over summed log-probabilities) on a
  synthetic language model, whose next-token logits are normal with the given spread over 256
  tokens: 3 gives a perplexity of about 13, 1 of about 156

Lengths: those of the Azure conversation trace, and log-normal ones with the mean lengths that the
paper gives for its ShareGPT and Alpaca requests (its figure 11).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.paging import PageTables
from pagedtq.serving import GenerationRequest, Scheduler, SchedulerOptions
from pagedtq.sim.generator import azure_conversation

#: Mean prompt and output tokens of the paper's requests, and what it reports for them.
PAPER = {
    "ShareGPT-like": (161.31, 337.99, {"sampling": "16.2-30.5", "beam": "44.3-66.3"}),
    "Alpaca-like": (19.31, 58.45, {"sampling": "6.1-9.8", "beam": "37.6-55.2"}),
}
VOCABULARY = 256
WIDTHS = (2, 4, 6)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("sharing", __doc__, argv)
    count = 12 if options.quick else 60
    rows = []
    for name in ("Azure", *PAPER):
        lengths = lengths_of(name, count, options.seed)
        for page_size in (16, 64):
            for mode, spread in (("sampling", None), ("beam", 3.0), ("beam", 1.0)):
                if page_size == 64 and spread == 1.0:
                    continue
                saved = [
                    100 * savings(lengths, mode, width, spread, page_size, options.seed)
                    for width in WIDTHS
                ]
                rows.append(
                    {
                        "lengths": name,
                        "page size": page_size,
                        "outputs": mode if spread is None else f"{mode}, spread {spread:g}",
                        **{f"{w} outputs, % saved": s for w, s in zip(WIDTHS, saved, strict=True)},
                        "paper % (2-6, page 16)": PAPER[name][2][mode] if name in PAPER else "",
                    }
                )
    publish(
        "sharing",
        rows,
        notes=(
            f"{count} requests of each kind, up to 24 at a time; blocks saved / blocks without "
            "sharing, mean over steps",
            "the Azure prompts are long beside their outputs (1155 and 211 tokens in the mean), "
            "the paper's are not",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def lengths_of(name: str, count: int, seed: int) -> list[tuple[int, int]]:
    """Return prompt and output tokens of requests."""
    if name == "Azure":
        workload = azure_conversation(count, seed)
        return list(
            zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
        )
    rng = np.random.default_rng(seed)
    columns = []
    for mean in PAPER[name][:2]:
        # A log-normal of this mean whose standard deviation is its mean.
        sigma = np.sqrt(np.log(2))
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
        columns.append(np.maximum(1, drawn.round()).astype(int).tolist())
    return list(zip(*columns, strict=True))


def savings(
    lengths: list[tuple[int, int]],
    mode: str,
    width: int,
    spread: float | None,
    page_size: int,
    seed: int,
) -> float:
    """Serve requests; return blocks saved over blocks without sharing, mean over steps."""
    most = max(-(-(prompt + output) // page_size) for prompt, output in lengths)
    tables = PageTables(page_size, 24 * width * most + 2)
    scheduler = Scheduler(tables, SchedulerOptions(max_running=24 * width, step_tokens=8192))
    for at, (prompt, output) in enumerate(lengths):
        kind = {"beam_width": width} if mode == "beam" else {"num_samples": width}
        scheduler.add(
            GenerationRequest(request_id=str(at), prompt=prompt, max_tokens=output, **kind)
        )
    search = None if spread is None else BeamSearch(scheduler, width, spread, seed)
    shares = []
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step is not None and not step.preempted
        alone = tables.num_resident_blocks
        shares.append(1 - tables.pool.num_used / alone)
        if search is None:
            scheduler.update(np.zeros(step.sample_members.size, np.int32))
        else:
            scheduler.update(*search.choose(step))
    assert tables.pool.num_used == 0
    return float(np.mean(shares))


class BeamSearch:
    """Chooses the best continuations under a synthetic language model."""

    def __init__(self, scheduler: Scheduler, width: int, spread: float, seed: int) -> None:
        self.scheduler, self.width, self.spread = scheduler, width, spread
        self.rng = np.random.default_rng(seed)
        self.scores: dict[str, np.ndarray] = {}

    def choose(self, step) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and parents for a step."""
        width = self.width
        parents = step.sample_members.copy()
        tokens = np.zeros(parents.size, np.int32)
        members = self.scheduler.members(step)
        for at in range(0, parents.size, width):
            # A request's hypotheses come together: one member each, or all of one prompt.
            own = np.unique(parents[at : at + width])
            name = members[own[0]]
            scores = self.scores.get(name, np.zeros(1))[:, None] + self.log_probabilities(own.size)
            best = np.argpartition(scores.ravel(), -width)[-width:]
            self.scores[name] = scores.ravel()[best]
            tokens[at : at + width] = best % VOCABULARY
            parents[at : at + width] = own[best // VOCABULARY]
        return tokens, parents

    def log_probabilities(self, count: int) -> np.ndarray:
        """Return those of the next token, ``float64[count, VOCABULARY]``."""
        logits = self.spread * self.rng.standard_normal((count, VOCABULARY))
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main()
