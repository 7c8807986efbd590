"""The CUDA header of the random streams, compiled as C++ here, against its host twin."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

import numpy as np
import pytest

from pagedtq.backends import kernel_source
from pagedtq.codec.random_streams import STREAMS, random_signs, random_words, stream_key

SHIM = """
#define __device__
#define __forceinline__ inline
#include "splitmix.cuh"
extern "C" unsigned long long key_of(unsigned long long s, unsigned l, unsigned t, unsigned h) {
    return stream_key(s, l, t, h);
}
extern "C" void draw(unsigned long long key, unsigned n, unsigned long long* word, unsigned* sign) {
    for (unsigned i = 0; i < n; ++i) {
        word[i] = random_word(key, i);
        sign[i] = random_sign_bit(key, i);
    }
}
extern "C" unsigned streams(unsigned i) {
    return i == 0 ? STREAM_KEY : i == 1 ? STREAM_VALUE : STREAM_KEY_QJL;
}
"""


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        reason = "no C++ compiler on PATH: the CUDA header was NOT run"
        if os.environ.get("PAGEDTQ_REQUIRE_SIMT") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("splitmix")
    (folder / "shim.cpp").write_text(SHIM)
    flags = ["-shared", "-fPIC", "-Wall", "-Werror", f"-I{kernel_source.kernel_folder()}"]
    command = [compiler, *flags, "-o", str(folder / "shim.so"), str(folder / "shim.cpp")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    library.key_of.restype = ctypes.c_uint64
    library.key_of.argtypes = [ctypes.c_uint64, *[ctypes.c_uint32] * 3]
    library.draw.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p]
    return library


def test_stream_numbers_agree(twin):
    assert [twin.streams(i) for i in range(3)] == [STREAMS[s] for s in ("key", "value", "key_qjl")]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stream", STREAMS)
def test_stream_keys_agree_for_every_seed_layer_and_head(twin, seed, stream):
    for layer, head in ((0, 0), (31, 7), (0, 1), (1, 0), (65535, 1 << 20)):
        expected = stream_key(seed, layer, stream, head)
        assert twin.key_of(seed, layer, STREAMS[stream], head) == expected


def test_words_and_signs_agree_entry_by_entry(twin):
    key = stream_key(7, 3, "key", 5)
    words, signs = np.empty(1000, np.uint64), np.empty(1000, np.uint32)
    twin.draw(key, 1000, words.ctypes.data, signs.ctypes.data)
    assert np.array_equal(words, random_words(key, 1000))
    assert np.array_equal(1 - 2 * signs.astype(np.float32), random_signs(key, 1000))
