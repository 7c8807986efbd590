"""Reading a whole text at once equals decoding it token by token."""

from typing import Any

import numpy as np
import pytest
import torch

from pagedtq import PagedKVCache, preset
from pagedtq.fidelity.attention import Reading, Streams, attend, reading
from pagedtq.fidelity.formats import CacheFormat, Uncompressed
from tests.fidelity.tiny_models import llama, mistral

CAUSAL = torch.ones(90, 90, dtype=torch.bool).tril()


@pytest.mark.parametrize("window", [0, 16, 32])
@pytest.mark.parametrize("name", ["k4v4", "k2v3"])
def test_every_position_equals_a_cache_that_decoded_up_to_it(name: str, window: int) -> None:
    if name == "k2v3":
        keys, values = preset("k2v2", **tiny(0)).keys, preset("k3v3", **tiny(0)).values
        config = preset("k4v4", **tiny(window)).replace(keys=keys, values=values)
    else:
        config = preset(name, **tiny(window))
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 90, 2, 32)).astype(np.float32) + np.float32(0.5)
    q = rng.standard_normal((90, 4, 32)).astype(np.float32)
    means = np.full((1, 2, 32), 0.5, np.float32)
    cache = PagedKVCache(config, key_means=means)
    seq = cache.open()
    wanted = np.empty((90, 4, 32))
    for t in range(90):
        cache.append(seq, k[None, t : t + 1], v[None, t : t + 1])
        wanted[t] = cache.attend(0, q[t : t + 1], seq)[0][0]
    form = CacheFormat(name, config, means)
    coded = [torch.from_numpy(x).transpose(0, 1) for x in form.roundtrip(0, k, v)]
    exact = [torch.from_numpy(x.astype(np.float16).astype(np.float32)) for x in (k, v)]
    got = attend(
        torch.from_numpy(q).transpose(0, 1),
        Streams(*(x.transpose(0, 1) for x in exact)),
        Streams(*coded),
        form.spans(0, np.arange(1, 91)),
        CAUSAL,
        32**-0.5,
    )
    assert got.transpose(0, 1).numpy() == pytest.approx(wanted, abs=1e-5)


def tiny(window: int) -> dict[str, Any]:
    shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32}
    return {**shape, "num_pages": 8, "page_size": 16, "window": window}


@pytest.mark.parametrize("build", [llama, mistral])
def test_a_model_that_reads_everything_exactly_is_unchanged(build: Any) -> None:
    model = build()
    ids = torch.randint(64, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with reading(model, Reading(Uncompressed(2, 2, 32))):
            got = model(ids, use_cache=False).logits
        again = model(ids, use_cache=False).logits
    assert got.numpy() == pytest.approx(wanted.numpy(), abs=2e-5)
    assert torch.equal(again, wanted), "the model's own attention must be back"


def test_a_stream_or_a_layer_left_out_stays_exact() -> None:
    model = llama()
    ids = torch.randint(64, (1, 60), generator=torch.Generator().manual_seed(0))
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "num_pages": 2}
    form = CacheFormat("k2v2", preset("k2v2", **shape, window=0))
    seen: dict[int, float] = {}

    def observe(layer: int, q: Any, k: Any, v: Any, out: Any, wanted: Any) -> None:
        seen[layer] = float((out - wanted).norm())

    with torch.no_grad(), reading(model, Reading({1: form}, observe=observe)):
        model(ids, use_cache=False)
    assert seen[0] == 0.0
    assert seen[1] > 1e-3
    errors = {}
    for streams in ("keys", "values", "both"):
        with torch.no_grad(), reading(model, Reading({1: form}, streams, observe)):
            model(ids, use_cache=False)
        errors[streams] = seen[1]
    assert len({round(e, 6) for e in errors.values()}) == 3
