"""The recommended setting is a good one for its budget."""

from itertools import product

import pytest

from pagedtq import CacheConfig
from pagedtq.errors import ArgumentError
from pagedtq.fidelity.formats import CacheFormat
from pagedtq.fidelity.sensitivity import Sensitivity, recommend
from pagedtq.models import ModelShape

WIDTHS = (2, 3, 4)
SHAPE = ModelShape(
    name="m", num_layers=2, num_kv_heads=1, num_q_heads=1, head_dim=64, weight_bytes=0
)


def table(weights: dict[tuple[int, str], float]) -> list[Sensitivity]:
    return [
        Sensitivity(layer=layer, stream=stream, bits=bits, kl=weight * 4.0**-bits)
        for (layer, stream), weight in weights.items()
        for bits in WIDTHS
    ]


UNEVEN = table({(0, "keys"): 90.0, (0, "values"): 1.0, (1, "keys"): 7.0, (1, "values"): 2.0})


@pytest.mark.parametrize("budget", [72.0, 80.0, 96.0, 104.0, 120.0, 136.0])
def test_no_setting_within_the_budget_predicts_less_when_gains_diminish(budget: float) -> None:
    found = recommend(UNEVEN, SHAPE, budget, 1024)
    assert found.bytes_per_token <= budget
    streams = [(0, "keys"), (0, "values"), (1, "keys"), (1, "values")]
    kl = {(s.layer, s.stream, s.bits): s.kl for s in UNEVEN}
    affordable = [
        sum(kl[(*s, b)] for s, b in zip(streams, bits))
        for bits in product(WIDTHS, repeat=4)
        # Every bit of a vector of 64 is 8 bytes; a norm is 2.
        if 8 * sum(bits) + 8 <= budget
    ]
    assert found.predicted_kl == pytest.approx(min(affordable))


def test_the_configuration_is_what_was_chosen_and_takes_the_bytes_said() -> None:
    found = recommend(UNEVEN, SHAPE, 140.0, 1000, window=64, page_size=64, seed=5)
    pairs = list(zip(found.key_bits, found.value_bits))
    codecs = [found.config.layer_codecs(layer) for layer in range(2)]
    assert [(k.bits, v.bits) for k, v in codecs] == pairs  # type: ignore[union-attr]
    assert CacheFormat("", found.config).sequence_bytes(1000) / 1000 == found.bytes_per_token
    assert (found.config.window, found.config.seed) == (64, 5)
    assert CacheConfig.from_json(found.config.to_json()) == found.config


def test_bits_go_where_they_help_most() -> None:
    found = recommend(UNEVEN, SHAPE, 96.0, 1024)
    assert found.key_bits[0] == 4
    assert found.value_bits[0] == 2


def test_a_budget_below_the_fewest_bits_is_refused_with_both_numbers() -> None:
    with pytest.raises(ArgumentError, match=r"2 bits everywhere take 72.0 .* budget of 40.0"):
        recommend(UNEVEN, SHAPE, 40.0, 1024)


def test_missing_sensitivities_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"\(1, 'values', 4\)"):
        recommend(UNEVEN[:-1], SHAPE, 96.0, 1024)
    with pytest.raises(ArgumentError, match="all streams"):
        recommend([], SHAPE, 96.0, 1024)
