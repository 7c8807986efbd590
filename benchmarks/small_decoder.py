"""A small decoder trained here, on text that every machine with Python has.

Fidelity can only be measured on a model that has learned something, and the benchmarks download
nothing: this one learns the bytes of the standard library's sources (code, comments and
documentation strings). Llama's architecture, RoPE, grouped-query attention (4 query heads to a KV
head), ``head_dim`` 64, 6 layers, 2048 tokens of context: first most of the steps on short
windows, which teach the bytes, then the last ones on whole contexts, which teach to look back.

Files are split by a digest of their names into three parts that never meet: training, calibration
(of key means and of settings) and evaluation. Weights depend on the seed, the Python version (its
sources are the text) and the machine's arithmetic; results say which model they were measured on.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.report import arguments

Part = Literal["training", "calibration", "evaluation"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pagedtq"
CONTEXT = 2048
#: Share of the files in calibration and in evaluation, in 256ths.
CALIBRATION, EVALUATION = 8, 16
#: Steps between saved states, from which an interrupted training goes on.
SAVE_EVERY = 25

ARCHITECTURE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Phase(NamedTuple):
    """Some steps of training: windows of ``context`` bytes, ``batch`` of them a step."""

    context: int
    batch: int
    steps: int


PHASES = (Phase(256, 32, 700), Phase(CONTEXT, 4, 160))


def text(part: Part) -> bytes:
    """Return the bytes of one part of the standard library's sources, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or path.stat().st_size < 1024:
            continue
        # Files of one package share idioms and licences; they stay on one side.
        bucket = hashlib.sha256(name.split("/")[0].encode()).digest()[0]
        if part_of(bucket) == part:
            pieces.append(path.read_bytes())
    return b"\n".join(pieces)


def part_of(bucket: int) -> Part:
    """Say which part a digest's first byte belongs to."""
    if bucket < CALIBRATION:
        return "calibration"
    return "evaluation" if bucket < CALIBRATION + EVALUATION else "training"


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the bytes of the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # GPT-2's printable stand-ins of the bytes: printable Latin-1 stands for itself, the rest
    # follows from 256 on, in order.
    kept = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if b not in kept]
    vocabulary = {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=CONTEXT)


def model_directory(seed: int) -> Path:
    """Return where the trained model of a seed lies, or will lie."""
    what = repr((ARCHITECTURE, PHASES, seed)).encode() + text("training")
    return CACHE / f"small-decoder-{hashlib.sha256(what).hexdigest()[:12]}"


def train(seed: int = 0, phases: tuple[Phase, ...] = PHASES) -> LlamaForCausalLM:
    """Train from the seed, going on from the last saved state if there is one."""
    directory = model_directory(seed)
    directory.mkdir(parents=True, exist_ok=True)
    data = torch.from_numpy(np.frombuffer(text("training"), np.uint8).copy())
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    total = sum(phase.steps for phase in phases)
    state_file = directory / "training.pt"
    first, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    schedule = [phase for phase in phases for _ in range(phase.steps)]
    started = time.monotonic() - spent
    bar = tqdm(range(first, total), initial=first, total=total, unit="step", disable=None)
    for step in bar:
        phase = schedule[step]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total)
        # Its own generator for every step: an interrupted training sees the same batches.
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(data) - phase.context - 1, (phase.batch,), generator=draw)
        batch = torch.stack([data[i : i + phase.context + 1] for i in starts.tolist()]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(nats=f"{loss.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": time.monotonic() - started,
                "nats": loss.item(),
            }
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    model.eval().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model


def learning_rate(step: int, total: int, peak: float = 2e-3, warm_up: int = 40) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    part = (step - warm_up) / max(1, total - warm_up)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * part)))


def trained(seed: int = 0) -> Path:
    """Return the directory of the trained model, training it first if it is not there."""
    directory = model_directory(seed)
    if not (directory / "model.safetensors").exists():
        train(seed)
    return directory


def windows(part: Part, count: int, context: int = CONTEXT, seed: int = 0) -> Any:
    """Return ``count`` disjoint windows of a part as token ids ``int64[count, context]``."""
    data = np.frombuffer(text(part), np.uint8)
    places = np.random.default_rng(seed).permutation(len(data) // context)[:count]
    if len(places) < count:
        raise ValueError(f"{part} has {len(data) // context} windows of {context}, not {count}")
    return np.stack([data[i * context : (i + 1) * context] for i in sorted(places)]).astype(
        np.int64
    )


def main() -> None:
    options = arguments("small_decoder", __doc__)
    directory = trained(options.seed)
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    ids = torch.from_numpy(windows("evaluation", 2 if options.quick else 16))
    with torch.no_grad():
        loss = model(ids, labels=ids, use_cache=False).loss
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{directory}: {size:,} parameters, {loss.item():.4f} nats per byte on evaluation text")


if __name__ == "__main__":
    main()
