"""Write the tables of the README and of pages in docs from benchmarks/results.

``python -m benchmarks.tables`` rewrites what stands between the marker comments of these files, and
draws the plots of device results; ``--check`` only says whether the text is up to date. No figure
on these pages is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.pages import NOT_MEASURED, device_page
from benchmarks.report import RESULTS

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "docs/_static"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
Row = dict[str, Any]

#: Per result, in page order: what it answers, columns (all if empty), and which rows to show.
SECTIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Row], bool]]] = {
    "distortion": (
        "How far are decoded vectors from the originals?",
        (),
        lambda row: row.get("d") in (None, 128),
    ),
    "accuracy": (
        "How exact is the arithmetic, given the codes?",
        (),
        lambda row: row["window"] in (0, 64) and row["logit std"] == 10,
    ),
    "kernel_accuracy": (
        "How exact are the CUDA kernels, run on the CPU?",
        (),
        lambda row: True,
    ),
    "formats": ("How many bytes does a token take?", (), lambda row: True),
    "exact_window": (
        "What does the exact window buy when recent keys matter?",
        (),
        lambda row: row["tokens"] in (1, 64, 65, 128, 129, 256),
    ),
    "host_attend": ("How fast is attention on the host?", (), lambda row: True),
    "host_store": ("How fast is encoding on the host?", (), lambda row: True),
    "transformers_cache": (
        "What does a step of a transformers model cost on pages?",
        (),
        lambda row: True,
    ),
    "paging": ("What does a step of the control plane cost?", (), lambda row: True),
    "fidelity_minilm": (
        "What does each format do to the attention of a real encoder?",
        (),
        lambda row: True,
    ),
    "fidelity_search": (
        "What do searched codes buy, and cost?",
        (),
        lambda row: True,
    ),
    "polar": (
        "What does a polar code cost beside the others?",
        (),
        lambda row: row["codec"].split()[-1] in ("1", "4", "8"),
    ),
    "compat_append": (
        "Does a long single-sequence cache append as fast as a short one?",
        (),
        lambda row: row["tokens"] in (1024, 8192, 32768, 131072),
    ),
    "snapshot": ("How fast are snapshots, beside a plain copy?", (), lambda row: True),
    "wire_fuzz": ("What becomes of broken files?", (), lambda row: True),
    "step_cost": (
        "What does the scheduler add to it?",
        ("sequences", "pages", "caller", "min us", "median us", "ns per sequence", "x tables"),
        lambda row: row["sequences"] in (64, 1024, 4096) and row["axis"] == "sequences",
    ),
    "manager": ("What do the block manager's operations cost?", (), lambda row: True),
    "manager_vs_vllm": (
        "How does the block manager compare with vLLM's?",
        ("what", "vllm us", "pagedtq us", "times faster", "worst turn"),
        lambda row: True,
    ),
    "prefix": ("How much of a trace is found again, by pool size?", (), lambda row: True),
    "vllm_scheduler": (
        "Does vLLM's own scheduler run on it?",
        (
            "caching",
            "policy",
            "pages",
            "requests served",
            "right tokens",
            "steps",
            "steps equal, ids too, in turn",
            "preemptions",
            "steps equal to vllm",
            "tokens found",
            "vllm tokens found",
            "pages leaked",
            "s",
            "vllm s",
        ),
        lambda row: True,
    ),
    "table_export": (
        "What must a device be sent of the page tables each step?",
        (),
        lambda row: row["blocks"] == 2048,
    ),
    "simulate": ("How long does the whole Azure hour take to simulate?", (), lambda row: True),
    "hit_rate": (
        "How much of a prompt is found, by memory and format?",
        ("format", "GiB", "pages", "found %", "first token p50 s", "first token p99 s"),
        lambda row: True,
    ),
    "sharing": ("How much memory do several outputs of a request save?", (), lambda row: True),
    "utilisation": ("How full are the pages?", (), lambda row: True),
}

#: The README's table: result, row to pick, what to say, which columns.
SUMMARY: tuple[tuple[str, str, Callable[[Row], bool], Callable[[Row], str]], ...] = (
    (
        "host_attend",
        "attention, one query token over 8 192, 8 KV heads, group 4, k4v4, 2 cores",
        lambda row: row["what"] == "pagedtq k4v4, window off" and row["tokens"] == 8192,
        lambda row: (
            f"{row['M token-heads/s']:.1f} M token-heads/s, "
            f"{row['speed vs torch bf16 gqa']:.1f}x PyTorch bf16 with `enable_gqa`"
        ),
    ),
    (
        "host_attend",
        "the same PyTorch attention, given the group as query rows",
        lambda row: row["what"] == "torch bfloat16, group as query rows",
        lambda row: (
            f"{row['M token-heads/s']:.1f} M token-heads/s: "
            f"{row['speed vs torch bf16 gqa']:.1f}x the `enable_gqa` call"
        ),
    ),
    (
        "host_store",
        "encoding, 4 bits, head_dim 128, float32 in, 2 cores",
        lambda row: row["what"] == "pagedtq k4v4, float32 in, 2 thread(s)",
        lambda row: (
            f"{row['k vectors/s'] / 1e3:.2f} M vectors/s, "
            f"{row['speed vs turboquant']:.0f}x the `turboquant` 0.2.0 package"
        ),
    ),
    (
        "formats",
        "a token and KV head at k4v4, head_dim 128",
        lambda row: row["preset"] == "k4v4",
        lambda row: (
            f"{row['bytes per token and head']:.0f} bytes, {row['x below fp16']:.2f}x below fp16"
        ),
    ),
    (
        "fidelity_search",
        "divergence of next-token distributions, k4v4, centred keys, window of 64, 2 048 tokens",
        lambda row: row["setting"] == "k4v4-w64-centred",
        lambda row: (
            f"{row['x vLLM preset']:.2f} of what vLLM's 4-bit preset has, with "
            f"{row['B/token/head']:.1f} instead of 70 bytes (head_dim 64)"
        ),
    ),
    (
        "manager_vs_vllm",
        "decode step of 1 024 requests that go on, block manager, prefix caching on",
        lambda row: row["what"] == "step, 1024 requests, caching on: batched",
        lambda row: (
            f"{row['pagedtq us']:.0f} us, {row['times faster']:.0f}x vLLM 0.33's block manager"
        ),
    ),
)


def load(name: str) -> dict[str, Any]:
    """Return one committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def markdown(rows: list[Row], columns: tuple[str, ...]) -> str:
    """Return a Markdown table."""
    names = columns or tuple(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def figures() -> str:
    """Return the body of docs/performance.md."""
    parts = []
    for name, (question, columns, chosen) in SECTIONS.items():
        parts += [f"### {question}", section(name, columns, chosen)]
    parts += ["### What does a device reach?", device_sections(RESULTS)]
    return "\n\n".join(parts)


def section(name: str, columns: tuple[str, ...], chosen: Callable[[Row], bool]) -> str:
    """Return conditions, table and notes of one result."""
    result = load(name)
    rows = [row for row in result["rows"] if chosen(row)]
    parts = [
        conditions(result),
        markdown(rows, columns),
        *(f"- {note}" for note in result["notes"]),
    ]
    return "\n\n".join(parts)


def conditions(result: dict[str, Any]) -> str:
    """Say how, when and on what a result was measured."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    machine = result["machine"]
    return (
        f"`{result['command']}` on {result['date'][:10]}, {machine['cpu']}, "
        f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'}; {versions}."
    )


def eviction() -> str:
    """Return the body of docs/eviction.md."""
    columns = ("case", "budget", "policy", "relative error", "standard error", "attention kept")
    return section("eviction", columns, lambda row: True)


def fidelity() -> str:
    """Return the body of docs/fidelity.md."""
    columns = ("context", "setting", "B/token/head", "compression", "KL mnat", "+-")
    columns += ("perplexity %", "top-1 %")
    questions = {
        "settings": "What does each format do to a trained decoder?",
        "bits by layer": "Do bits chosen layer by layer beat the same bits everywhere?",
        "composition": "What do at most 80 bytes per token and head buy?",
        "window": "How long a window, for which context?",
    }
    parts = [conditions(load("fidelity"))]
    for part, question in questions.items():
        rows = [row for row in load("fidelity")["rows"] if row["part"] == part]
        parts += [f"### {question}", markdown(rows, columns)]
    return "\n\n".join([*parts, *(f"- {note}" for note in load("fidelity")["notes"])])


def device_sections(results: Path) -> str:
    """Return what every device with a result reached; there may be none."""
    parts = []
    for path in sorted(results.glob("gpu-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts.append(device_page(result, markdown))
        plots = (f"{result['name']}-{name}.svg" for name in ("attend", "crossover"))
        parts += [f"![{plot}](_static/{plot})" for plot in plots if (STATIC / plot).exists()]
    return "\n\n".join(parts) or NOT_MEASURED


def draw_devices(results: Path, folder: Path) -> list[Path]:
    """Draw the plots of every device with a result."""
    paths = []
    for path in sorted(results.glob("gpu-*.json")):
        from benchmarks.gpu.plots import draw

        paths += draw(json.loads(path.read_text(encoding="utf-8")), folder)
    return paths


def summary() -> str:
    """Return the body of the README's table."""
    lines = ["| what | measured |", "|---|---|"]
    for name, what, chosen, say in SUMMARY:
        row = next(row for row in load(name)["rows"] if chosen(row))
        lines.append(f"| {what} | {say(row)} |")
    return "\n".join(lines)


def rewritten(path: Path, body: str) -> str:
    """Return the file's text with a new body between the markers."""
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise SystemExit(f"{path.name} lacks the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e6:
            return f"{value:.2e}"
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    options = parser.parse_args()
    stale = []
    if not options.check:
        draw_devices(RESULTS, STATIC)
    for path, body in (
        (ROOT / "docs/performance.md", figures()),
        (ROOT / "docs/eviction.md", eviction()),
        (ROOT / "docs/fidelity.md", fidelity()),
        (ROOT / "README.md", summary()),
    ):
        text = rewritten(path, body)
        if text != path.read_text(encoding="utf-8"):
            stale.append(path.name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
