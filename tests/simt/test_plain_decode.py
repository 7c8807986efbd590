"""The plain decode kernels that compressed pages are compared with are right themselves."""

from __future__ import annotations

import numpy as np
import pytest
from harness_device import HarnessDevice

from benchmarks.gpu.plain_decode import (
    PlainDecode,
    bfloat16_bits,
    cut_sequences,
    e4m3_codes,
    e4m3_table,
)

HEADS = 2


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def attention(keys, values, queries, group):
    """Float64 attention of ``queries [heads * group, d]`` over ``keys [heads, n, d]``."""
    grouped = queries.astype(np.float64).reshape(len(keys), group, -1)
    logits = np.einsum("hgd,htd->hgt", grouped, keys.astype(np.float64)) / keys.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return np.einsum("hgt,htd->hgd", weights, values.astype(np.float64)).reshape(queries.shape)


def run(fp8, head_dim, page_size, group, lengths, seed=0, blocks=4, order=0):
    """Return what the kernels say and what is right, ``[batch, heads * group, d]`` each."""
    rng = np.random.default_rng(seed)
    device = HarnessDevice(seed=order)
    device.multiprocessors = 2
    blocks_of = [-(-length // page_size) for length in lengths]
    table = np.zeros((len(lengths), max(blocks_of)), np.int32)
    pages = 1 + rng.permutation(sum(blocks_of)).astype(np.int32)
    for row, count in enumerate(blocks_of):
        table[row, :count], pages = pages[:count], pages[count:]
    plain = PlainDecode(device, head_dim, page_size, HEADS, group, sum(blocks_of) + 1, fp8)
    shape = plain.keys.shape
    keys, values = (3 * rng.standard_normal((2, *shape))).astype(np.float32)
    # Keys that outdo those before them make the reference grow in every pass.
    keys *= np.linspace(0.2, 2, shape[0])[:, None, None, None].astype(np.float32)
    if fp8:
        plain.key_scale, plain.value_scale = 0.5, 0.25
        bits = [e4m3_codes(keys / 0.5), e4m3_codes(values / 0.25)]
        real = [e4m3_table()[bits[0]] * 0.5, e4m3_table()[bits[1]] * 0.25]
    else:
        bits = [bfloat16_bits(keys), bfloat16_bits(values)]
        real = [from_bfloat16(part) for part in bits]
    nan = 0x7F if fp8 else 0x7FC0
    for row, length in enumerate(lengths):
        if length % page_size:  # what nobody wrote
            for part in bits:
                part[table[row, blocks_of[row] - 1], :, length % page_size :] = nan
    plain.fill(*bits)
    query_bits = bfloat16_bits(rng.standard_normal((len(lengths), HEADS * group, head_dim)))
    launches = plain.plan(table, np.array(lengths), device.upload(query_bits), blocks)
    for launch in launches:
        device.launch(launch)
    queries = from_bfloat16(query_bits)
    want = []
    for row, length in enumerate(lengths):
        dense = [
            part[table[row, : blocks_of[row]]].transpose(1, 0, 2, 3).reshape(HEADS, -1, head_dim)
            for part in real
        ]
        want.append(attention(*(part[:, :length] for part in dense), queries[row], group))
    return device.download(launches[-1].arguments[-1]), np.array(want), launches


@pytest.mark.parametrize(
    ("fp8", "head_dim", "page_size", "group", "lengths"),
    [
        (False, 128, 64, 4, (700, 1, 64)),
        (False, 64, 16, 8, (333, 17)),
        (True, 128, 64, 4, (700, 1, 96)),
        (True, 64, 16, 1, (333, 48)),
        (True, 128, 16, 8, (65,)),
    ],
)
def test_plain_decode_is_attention_to_the_precision_of_its_weights(
    fp8, head_dim, page_size, group, lengths
):
    got, want, launches = run(fp8, head_dim, page_size, group, lengths)
    # Long sequences are cut, so both kernels ran where one is.
    assert (len(launches) == 2) == (max(lengths) > 256)
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < (1e-3 if fp8 else 5e-3), error.max()


def test_the_order_of_threads_does_not_matter():
    states = [run(False, 64, 16, 4, (300, 20), order=order)[0] for order in (0, 1, 2)]
    assert all(np.array_equal(states[0], state) for state in states[1:])


def test_e4m3_codes_are_the_nearest_and_a_value_is_its_own():
    table = e4m3_table()
    finite = np.array([code for code in range(256) if code & 127 != 127])
    assert np.array_equal(e4m3_codes(table[finite]), finite)
    values = np.random.default_rng(0).standard_normal(1000) * 10
    nearest = np.abs(table[finite][None] - values[:, None]).min(axis=1)
    assert np.allclose(np.abs(table[e4m3_codes(values)] - values), nearest)
    assert table.max(initial=0, where=np.isfinite(table)) == 448
    assert e4m3_codes(np.array([1e6]))[0] == 126


@pytest.mark.parametrize("wanted", [1, 4, 40, 10_000])
def test_units_cover_every_token_once_and_parts_are_numbered_in_order(wanted):
    lengths = np.array([1, 32, 33, 5000, 256, 257, 9999])
    units, cuts = cut_sequences(lengths, wanted)
    for sequence, length in enumerate(lengths):
        own = units[units[:, 0] == sequence]
        assert own[0, 1] == 0 and own[-1, 2] == length
        assert (own[1:, 1] == own[:-1, 2]).all() and (own[:, 1] % 32 == 0).all()
        assert (own[:, 2] > own[:, 1]).all()
        cut = cuts[cuts[:, 0] == sequence]
        assert len(cut) == (len(own) > 1)
        if len(own) > 1:
            assert own[:, 3].tolist() == list(range(cut[0, 1], cut[0, 2]))
        else:
            assert own[0, 3] == -1
