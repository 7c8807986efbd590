"""``pagedtq evaluate``: what a model loses under each setting, and which setting to use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, UnsupportedError
from ..figures import require_plots
from ..sim.table import format_table
from ..wire.settings import CacheSettings, save_settings
from .arguments import Commands, add_command, operating_system_errors, positive_int
from .progress import progress

if TYPE_CHECKING:
    from ..fidelity.evaluation import Evaluation
    from ..fidelity.measures import Fidelity


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        "what a model loses under each setting, and the setting for a byte budget",
        "Loads a decoder of transformers, reads a text with an exact cache and with compressed "
        "ones as a token-by-token run would, and compares. The text is used in three parts: key "
        "means, choice of the setting, and the figures reported.",
    )
    parser.add_argument("model", help="a folder, or a name that transformers resolves")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--context", type=positive_int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=positive_int, default=4, help="windows that are scored")
    parser.add_argument(
        "--calibration-tokens",
        type=positive_int,
        help="tokens for key means, from the text's beginning (one window by default)",
    )
    parser.add_argument(
        "--selection-windows", type=positive_int, default=2, help="windows for sensitivities"
    )
    parser.add_argument(
        "--settings",
        metavar="A,B,...",
        help="PRESET[-wN][-centred][-searched]: exact window of N tokens, centred keys, searched "
        "codes",
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out other systems' formats")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="BYTES",
        help="recommend a setting of at most so many bytes per token and KV head",
    )
    parser.add_argument(
        "--window", type=int, default=0, metavar="N", help="exact window of the recommendation"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rotations")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the recommended setting")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw figures")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.save and arguments.budget is None:
        raise ArgumentError("--save writes the recommended setting, which needs --budget")
    if arguments.plots:
        require_plots()
    report, settings = _evaluate(arguments)
    written = []
    if arguments.plots:
        from ..fidelity.plots import draw_plots

        written += draw_plots(report, arguments.plots)
    if settings is not None and arguments.save:
        with operating_system_errors():
            save_settings(settings, arguments.save)
        written.append(arguments.save)
    if arguments.json:
        sys.stdout.write(report.to_json().decode() + "\n")
    else:
        print(_table(report))
        for path in written:
            print(f"written: {path}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> tuple[Evaluation, CacheSettings | None]:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UnsupportedError(
            'evaluate needs torch and transformers: pip install "pagedtq[transformers]"'
        ) from error
    import numpy as np

    from ..fidelity.evaluation import Plan, evaluate
    from ..fidelity.settings import DEFAULT_SETTINGS

    with operating_system_errors():
        text = arguments.text.read_bytes()
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cannot load {arguments.model}: {error}") from error
    ids = np.array(tokenizer(text.decode(errors="replace"), verbose=False)["input_ids"], np.int64)
    names = tuple(arguments.settings.split(",")) if arguments.settings else DEFAULT_SETTINGS
    plan = Plan(
        context=arguments.context,
        calibration_tokens=arguments.calibration_tokens,
        selection_windows=arguments.selection_windows,
        windows=arguments.windows,
    )
    with ExitStack() as bars:

        def begin(total: int) -> Callable[[], object]:
            update = bars.enter_context(progress("evaluate", total))
            done = count(1)
            return lambda: update and update(next(done))

        return evaluate(
            model,
            ids,
            plan,
            name=arguments.model.rstrip("/").rsplit("/", 1)[-1],
            setting_names=names,
            with_peers=not arguments.no_peers,
            budget_bytes_per_token=_budget(arguments, model),
            window=arguments.window,
            seed=arguments.seed,
            begin=begin,
        )


def _budget(arguments: argparse.Namespace, model: Any) -> float | None:
    if arguments.budget is None:
        return None
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return float(arguments.budget * config.num_hidden_layers * heads)


def _table(report: Evaluation) -> str:
    heads = report.shape.num_layers * report.shape.num_kv_heads
    header = ["setting", "B/token/head", "compression", "perplexity", "change", "KL (mnat)"]
    header += ["+-", "top-1", "output error", "worst layer.head"]

    def row(f: Fidelity) -> tuple[str, ...]:
        worst = " ".join(f"{h.layer}.{h.head}" for h in f.worst_heads[:3])
        return (
            f.name,
            f"{f.bytes_per_token / heads:.1f}",
            f"{f.compression:.2f}",
            f"{f.perplexity:.4f}",
            f"{100 * f.perplexity_change:+.2f} %",
            f"{1e3 * f.kl:.3f}",
            f"{1e3 * f.kl_deviation:.3f}",
            f"{100 * f.top1_agreement:.2f} %",
            f"{f.output_error:.4f}",
            worst,
        )

    found = [] if report.recommended is None else [report.recommended]
    lines = [
        f"{report.model}: perplexity {report.perplexity:.4f} with an exact cache, "
        f"{report.plan.windows} windows of {report.plan.context} tokens, second halves scored",
        format_table(header, [row(f) for f in (*report.settings, *report.peers, *found)]),
    ]
    best = report.recommendation
    if best is not None:
        lines += [
            f"\nrecommended for {best.budget_bytes_per_token / heads:.1f} bytes per token and "
            f"head ({best.bytes_per_token / heads:.1f} used), predicted KL "
            f"{1e3 * best.predicted_kl:.3f} mnat:",
            f"  key bits by layer:   {' '.join(map(str, best.key_bits))}",
            f"  value bits by layer: {' '.join(map(str, best.value_bits))}",
        ]
    return "\n".join(lines)
