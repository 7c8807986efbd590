"""Page utilisation at final length of the public and the generated workloads.

Tokens over the slots of the pages they need, for every page size; beside it, what is published for
the Azure conversation hour. The trace is read from ../shared/traces or the folder PAGEDTQ_TRACES.
"""

from __future__ import annotations

from benchmarks.report import arguments, publish
from benchmarks.simulate import TRACE, load_workload
from pagedtq.sim.generator import azure_conversation
from pagedtq.sim.workload import page_utilisation

PUBLISHED = {16: 99.46, 32: 98.88, 64: 97.79, 128: 95.62, 256: 91.98}


def main() -> None:
    options = arguments("utilisation", __doc__)
    trace, generated = load_workload(options.seed), azure_conversation(seed=options.seed)
    rows = []
    for size, published in PUBLISHED.items():
        measured = 100 * page_utilisation(trace, size)
        rows.append(
            {
                "page size": size,
                "workload %": measured,
                "published %": published,
                "difference": measured - published,
                "generated %": 100 * page_utilisation(generated, size),
            }
        )
    publish(
        "utilisation",
        rows,
        notes=[f"workload: {trace.name}, {len(trace)} requests (the trace is {TRACE})"],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
