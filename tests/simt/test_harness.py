"""The harness itself: instructions compute what a device computes, and defects are found."""

from __future__ import annotations

from pathlib import Path

import harness
import numpy as np
import pytest

HERE = Path(__file__).parent
RNG = np.random.default_rng(8)


@pytest.fixture(scope="module")
def faulty():
    return harness.compile_kernels(HERE / "faulty.cu")


@pytest.fixture(scope="module")
def instructions():
    return harness.compile_kernels(HERE / "instructions.cu")


# -- instructions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lanes_exchange_values_as_on_a_device(instructions, seed):
    y = np.zeros((32, 8), np.int32)
    instructions.launch("lanes", 1, 32, y, seed=seed)
    lane = np.arange(32)
    assert np.array_equal(y[:, 0], lane ^ 5)
    assert np.array_equal(y[:, 1], (lane + 1) % 32 * 3)
    assert np.array_equal(y[:, 2], np.where(lane < 2, lane, lane - 2))
    assert np.array_equal(y[:, 3], np.where(lane > 28, lane, lane + 3))
    assert (y[:, 4] == sum(1 << i for i in range(0, 31, 3))).all()
    assert (y[:, 5] == 1).all() and (y[:, 6] == 0).all()
    assert np.array_equal(y[:, 7], np.where(lane < 8, lane ^ 1, -1))


def test_byte_permutes_and_logic_follow_the_isa(instructions):
    a, b, c = RNG.integers(0, 2**32, (3, 32), np.uint32)
    y = np.zeros((32, 4), np.uint32)
    instructions.launch("bits", 1, 32, a, b, c, y)
    for i in range(32):
        pool = a[i].tobytes() + b[i].tobytes()
        picked = []
        for nibble in (int(c[i]) >> shift & 15 for shift in range(0, 16, 4)):
            byte = pool[nibble & 7]
            picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        assert y[i, 0] == int.from_bytes(bytes(picked), "little")
    assert np.array_equal(y[:, 1], a | (b & c))
    assert np.array_equal(y[:, 2], a ^ b ^ c)
    assert np.array_equal(y[:, 3], [int(x).bit_count() for x in a])


def test_half_matrices_multiply(instructions):
    a = RNG.standard_normal((16, 16)).astype(np.float16)
    b = RNG.standard_normal((16, 8)).astype(np.float16)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    expected = c + a.astype(np.float64) @ b.astype(np.float64)
    instructions.launch("matrix_f16", 1, 32, a.view(np.uint16), b.view(np.uint16), c, seed=3)
    assert np.abs(c - expected).max() < 1e-6


@pytest.mark.parametrize("name", ["matrix_u8s8", "matrix_s8u8"])
def test_byte_matrices_multiply_exactly(instructions, name):
    bounds = {np.uint8: (0, 256), np.int8: (-128, 128)}
    left, right = (np.uint8, np.int8) if name == "matrix_u8s8" else (np.int8, np.uint8)
    a, b = RNG.integers(*bounds[left], (16, 32), left), RNG.integers(*bounds[right], (32, 8), right)
    c = np.zeros((16, 8), np.int32)
    instructions.launch(name, 1, 32, a, b, c, seed=3)
    assert np.array_equal(c, a.astype(int) @ b.astype(int))


def test_words_cross_shared_memory(instructions):
    x, y = RNG.integers(0, 2**32, 192, np.uint32), np.zeros(192, np.uint32)
    instructions.launch("through_shared", 1, 32, x, y)
    assert np.array_equal(y[:128].reshape(32, 4), x[:128].reshape(32, 4)[::-1])
    assert np.array_equal(y[128:].reshape(32, 2), x[128:].reshape(32, 2)[::-1])


def test_movmatrix_transposes(instructions):
    x = np.arange(64, dtype=np.uint16).reshape(8, 8)
    y = np.zeros((8, 8), np.uint16)
    instructions.launch("transpose", 1, 32, x.view(np.uint32), y.view(np.uint32))
    assert np.array_equal(y, x.T)


def test_halves_round_once_to_nearest_even(instructions):
    # Ties, subnormals, the largest half, ordinary numbers.
    special = [0, -0.0, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 3 * 2**-25, 65504, -65519.0]
    x = np.array([*special, *RNG.standard_normal(55)], np.float32)
    z = RNG.standard_normal(64).astype(np.float32)
    y = np.zeros((64, 6), np.uint16)
    instructions.launch("halves", 1, 32, x, z, y, np.int32(64))
    hx, hz = (v.astype(np.float16).astype(np.float64) for v in (x, z))
    bf16 = ((x.view(np.uint32) + 0x7FFF + (x.view(np.uint32) >> 16 & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        columns = [x, None, hx * hz, hz + hx, hx * hz + hx, (hx - hx).astype(np.float32)]
        for i, column in enumerate(columns):
            expected = bf16 if column is None else column.astype(np.float16).view(np.uint16)
            assert np.array_equal(y[:, i], expected), i


# -- defects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_kernel_gives_the_same_result_in_any_order(faulty, seed):
    x, y = np.arange(100, dtype=np.int32), np.zeros(100, np.int32)
    faulty.launch("reverse", 1, 128, x, y, np.int32(100), shared_bytes=400, seed=seed)
    assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize("seed", [0, 7])
def test_the_portable_context_switch_gives_the_same_results(seed):
    kernels = harness.compile_kernels(HERE / "faulty.cu", {"SIMT_UCONTEXT": 1})
    x, y = np.arange(100, dtype=np.int32), np.zeros(100, np.int32)
    kernels.launch("reverse", 2, 128, x, y, np.int32(100), shared_bytes=400, seed=seed)
    assert np.array_equal(y, x[::-1])
    with pytest.raises(harness.KernelFault, match="divergence"):
        kernels.launch("diverge", 1, 32, seed=seed)


def test_a_missing_barrier_shows_under_some_order(faulty):
    x = np.arange(1, 129, dtype=np.int32)
    wrong = 0
    for seed in range(1, 9):
        y = np.zeros(128, np.int32)
        arguments = ("reverse_without_barrier", 1, 128, x, y, np.int32(128))
        faulty.launch(*arguments, shared_bytes=512, seed=seed)
        wrong += not np.array_equal(y, x[::-1])
    assert wrong >= 6


def test_shared_memory_starts_poisoned_in_every_block(faulty):
    y = np.zeros(32, np.uint32)
    faulty.launch("read_static_shared", 3, 32, y)
    assert (y == 0xFFFFFFFF).all()


@pytest.mark.parametrize("index", [25, 26, 4000, 60_000, -1200, -60_000])
def test_writing_outside_an_array_is_found(faulty, index):
    with pytest.raises(harness.KernelFault, match=r"fault|before or after"):
        faulty.launch("write_outside", 1, 32, np.zeros(25, np.int32), np.int32(index))


def test_reading_outside_an_array_names_the_array(faulty):
    x, y = np.zeros(24, np.int32), np.zeros(1, np.int32)
    with pytest.raises(harness.KernelFault, match=r"byte 96 of array int32\[24\], 96 bytes"):
        faulty.launch("read_outside", 1, 1, x, y, np.int32(24))


def test_writing_into_an_input_is_found(faulty):
    x = np.zeros(25, np.int32)
    x.flags.writeable = False
    with pytest.raises(AssertionError, match="wrote into an input"):
        faulty.launch("write_outside", 1, 32, x, np.int32(3))


def test_writing_outside_shared_memory_is_found(faulty):
    with pytest.raises(harness.KernelFault, match="fault at"):
        faulty.launch("write_outside_shared", 1, 1, np.int32(8), shared_bytes=32)


@pytest.mark.parametrize("seed", [0, 5])
def test_lanes_in_different_collectives_are_found(faulty, seed):
    with pytest.raises(harness.KernelFault, match="divergence"):
        faulty.launch("diverge", 1, 32, seed=seed)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_shuffle_with_a_lane_that_left_is_found(faulty, seed):
    with pytest.raises(harness.KernelFault, match="exited"):
        faulty.launch("leave_before_shuffle", 1, 32, np.zeros(32, np.int32), seed=seed)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_barrier_that_some_threads_never_reach_is_found(faulty, seed):
    with pytest.raises(harness.KernelFault, match=r"deadlock|block barrier"):
        faulty.launch("half_a_barrier", 1, 64, seed=seed)


def test_threads_that_wait_for_each_other_in_a_loop_are_found():
    kernels = harness.compile_kernels(HERE / "faulty.cu", {"SIMT_SECONDS": 1})
    with pytest.raises(harness.KernelFault, match="no end after 1 s"):
        kernels.launch("wait_for_lane", 1, 32, np.zeros(1, np.int32))
    x, y = np.arange(9, dtype=np.int32), np.zeros(9, np.int32)
    kernels.launch("reverse", 1, 64, x, y, np.int32(9), shared_bytes=36)
    assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize("index", [8, -1, 1 << 20])
def test_writing_outside_static_shared_memory_is_found(faulty, index):
    y = np.zeros(1, np.int32)
    faulty.launch("write_outside_static", 1, 1, y, np.int32(7))
    assert y[0] == 1
    with pytest.raises(harness.KernelFault, match="index out of range"):
        faulty.launch("write_outside_static", 1, 1, y, np.int32(index))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lanes_do_not_run_in_step(faulty, seed):
    x = np.arange(32, dtype=np.int32)
    for wait in (0, 1):
        y = np.zeros(32, np.int32)
        faulty.launch("shift", 1, 32, x, y, np.int32(wait), shared_bytes=128, seed=seed)
        assert np.array_equal(y, np.roll(x, -1)) is bool(wait)


def test_an_order_of_blocks_that_no_device_promises_shows(faulty):
    def run(seed):
        y = np.zeros(16, np.int32)
        faulty.launch("follow_blocks", 16, 32, y, seed=seed)
        return y.tolist()

    assert run(0) == list(range(1, 17))
    assert all(run(seed) != run(0) for seed in range(1, 9))


@pytest.mark.parametrize("seed", [0, 3])
def test_members_that_do_not_agree_are_found(faulty, seed):
    with pytest.raises(harness.KernelFault, match=r"lack the caller|deadlock"):
        faulty.launch("uneven_barriers", 1, 64, seed=seed)


def test_misaligned_access_is_found(faulty):
    with pytest.raises(harness.KernelFault, match="misaligned"):
        faulty.launch("misaligned", 1, 2, np.zeros(16, np.uint8), np.zeros(1, np.uint32))


def test_asynchronous_copies_arrive_only_after_a_wait(faulty):
    x = RNG.integers(0, 100, (32, 4), np.uint32)
    for wait in (0, 1):
        y = np.zeros_like(x)
        faulty.launch("copy_async", 1, 32, x, y, np.int32(wait), shared_bytes=512)
        assert np.array_equal(y, x) if wait else (y == 0xFFFFFFFF).all()


def test_the_harness_runs_on_after_a_fault(faulty):
    with pytest.raises(harness.KernelFault):
        faulty.launch("diverge", 1, 32)
    x, y = np.arange(9, dtype=np.int32), np.zeros(9, np.int32)
    faulty.launch("reverse", 2, 64, x, y, np.int32(9), shared_bytes=36)
    assert np.array_equal(y, x[::-1])


def test_a_kernel_that_does_not_compile_shows_its_specialisation(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text('#include "device.cuh"\nextern "C" __global__ void f() { WIDTH; }\n')
    with pytest.raises(RuntimeError, match=r"broken.cu \[WIDTH=three\] does not compile"):
        harness.compile_kernels(source, {"WIDTH": "three"})


def test_without_a_compiler_tests_are_skipped_and_ci_may_forbid_that(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("PAGEDTQ_REQUIRE_SIMT", raising=False)
    with pytest.raises(pytest.skip.Exception, match="NOT run"):
        harness.require_compiler()
    monkeypatch.setenv("PAGEDTQ_REQUIRE_SIMT", "1")
    with pytest.raises(pytest.fail.Exception, match="NOT run"):
        harness.require_compiler()
