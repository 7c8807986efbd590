"""Every reader gives back what the file says, and names the line of what it cannot read."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, WorkloadError
from pagedtq.sim.traces import read_trace
from pagedtq.sim.workload import length_statistics, page_utilisation

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
STAMP = "2023-11-16 18:15:46.6805900"
HASHED = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'


def mooncake(**changes):
    fields = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    fields |= changes
    return "{" + ", ".join(f'"{k}": {v}' for k, v in fields.items() if v is not None) + "}\n"


@pytest.fixture
def read(tmp_path):
    def read(kind, text):
        path = tmp_path / "trace"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_trace(f"{kind}:{path}")

    return read


def test_azure_rows_become_requests_with_times_from_the_first(read):
    workload = read(
        "azure",
        f"{AZURE}2023-11-16 23:59:59.9000000,374,44\r\n2023-11-17 00:00:01.4000000Z,396,109\r\n",
    )
    np.testing.assert_allclose(workload.arrival, [0, 1.5], atol=1e-6)
    assert workload.prompt_tokens.tolist() == [374, 396]
    assert workload.output_tokens.tolist() == [44, 109]
    assert workload.hash_ids is None


def test_columns_are_found_by_name_whatever_their_order_and_number(read):
    workload = read("vidur", "pd,num_decode_tokens,arrived_at,num_prefill_tokens\n9,2,0.5,3.0\n")
    assert (workload.prompt_tokens[0], workload.output_tokens[0]) == (3, 2)


def test_a_byte_order_mark_and_blank_lines_do_not_matter(read):
    assert len(read("vidur", "\ufeff" + VIDUR + "0,1,1\n\n1,1,1\n\n")) == 2
    assert len(read("mooncake", "\n" + HASHED + "\n")) == 1


def test_rows_out_of_time_order_are_sorted_and_equal_times_keep_the_file_order(read):
    workload = read("vidur", VIDUR + "2,1,1\n0.5,2,1\n0.5,3,1\n0.5,4,1\n")
    assert workload.prompt_tokens.tolist() == [2, 3, 4, 1]
    assert workload.arrival.tolist() == [0, 0, 0, 1.5]


def test_mooncake_content_ids_follow_their_requests_through_sorting(read):
    workload = read(
        "mooncake",
        mooncake(timestamp=2000, hash_ids=[7, 8]) + mooncake(input_length=512, hash_ids=[9]),
    )
    assert workload.arrival.tolist() == [0, 2]
    assert workload.hash_ids.tolist() == [9, 7, 8]
    assert workload.hash_offsets.tolist() == [0, 1, 3]
    assert workload.first(1).hash_ids.tolist() == [9]


@pytest.mark.parametrize(
    ("kind", "text", "line", "problem"),
    [
        ("azure", "", 1, "missing column TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("azure", AZURE, 1, "at least one request"),
        ("azure", "TIMESTAMP,ContextTokens\n", 1, "missing column GeneratedTokens"),
        ("azure", f"{AZURE}{STAMP},10,5\n{STAMP},10\n", 3, "expected 3 fields, got 2"),
        ("azure", f"{AZURE}{STAMP},10,5,6\n", 2, "expected 3 fields, got 4"),
        ("azure", f"{AZURE}{STAMP},ten,5\n", 2, "ContextTokens must be a whole number, got 'ten'"),
        ("azure", f"{AZURE}{STAMP},,5\n", 2, "ContextTokens must be a whole number"),
        ("azure", f"{AZURE}{STAMP},1_0,5\n", 2, "ContextTokens must be a whole number"),
        ("azure", f"{AZURE}{STAMP},10.5,5\n", 2, "ContextTokens must be a whole number"),
        ("azure", f"{AZURE}{STAMP},nan,5\n", 2, "ContextTokens must be a whole number"),
        ("azure", f"{AZURE}{STAMP},10,0\n", 2, "GeneratedTokens must be in"),
        ("azure", f"{AZURE}{STAMP},-1,5\n", 2, "ContextTokens must be in"),
        ("azure", f"{AZURE}{STAMP},99999999999,5\n", 2, "ContextTokens must be in"),
        ("azure", f"{AZURE}yesterday,10,5\n", 2, "TIMESTAMP must look like"),
        ("azure", f"{AZURE}2023-13-16 18:15:46,10,5\n", 2, "TIMESTAMP must look like"),
        ("azure", f"{AZURE}{STAMP}+02:00,10,5\n", 2, "TIMESTAMP must look like"),
        ("azure", f'{AZURE}\n"{STAMP},10,5\n', 3, "unexpected end of data"),
        ("azure", AZURE.encode() + b"\xff\xfe,10,5\n", 2, "TIMESTAMP must look like"),
        ("vidur", VIDUR + "0,1,1\n1,2,3\nx,1,1\n", 4, "arrived_at must be a number, got 'x'"),
        ("vidur", VIDUR + "nan,1,1\n", 2, "arrived_at must be finite"),
        ("vidur", VIDUR + "inf,1,1\n", 2, "arrived_at must be finite"),
        ("vidur", VIDUR + "-0.5,1,1\n", 2, "arrived_at must be finite and not negative"),
        ("vidur", VIDUR + "0,1,1e3\n", 2, "num_decode_tokens must be a whole number"),
        ("mooncake", "", 1, "at least one request"),
        ("mooncake", HASHED + "{not json\n", 2, "JSON is malformed"),
        ("mooncake", HASHED + "[1, 2]\n", 2, "Expected `object`, got `array`"),
        ("mooncake", HASHED + "\n" + mooncake(hash_ids=None), 3, "missing required field `hash_id"),
        ("mooncake", mooncake(input_length=None), 1, "missing required field `input_length`"),
        ("mooncake", mooncake(input_length='"600"'), 1, "Expected `int`, got `str`"),
        ("mooncake", mooncake(input_length="600.5"), 1, "Expected `int`, got `float`"),
        ("mooncake", mooncake(output_length="true"), 1, "Expected `int`, got `bool`"),
        ("mooncake", mooncake(output_length=0), 1, "output_length must be in"),
        ("mooncake", mooncake(input_length=-600), 1, "input_length must be in"),
        ("mooncake", mooncake(timestamp=-1), 1, "timestamp must be finite and not negative"),
        ("mooncake", mooncake(timestamp="NaN"), 1, "JSON is malformed"),
        ("mooncake", mooncake(hash_ids=[0]), 1, "expected 2 hash_ids for 600 prompt tokens, got 1"),
        ("mooncake", mooncake(hash_ids=[0, 1, 2]), 1, "expected 2 hash_ids"),
        ("mooncake", mooncake(hash_ids=[0, -1]), 1, "hash_ids must be in"),
        ("mooncake", mooncake(hash_ids='[0, "1"]'), 1, "Expected `int`, got `str`"),
        ("mooncake", mooncake(hash_ids=[0, 1 << 63]), 1, "hash_ids must be in"),
        ("mooncake", b'{"timestamp": "\xff"}\n', 1, ""),
    ],
)
def test_a_malformed_row_is_reported_with_its_line(read, kind, text, line, problem):
    with pytest.raises(WorkloadError) as caught:
        read(kind, text)
    assert caught.value.line == line
    assert problem in str(caught.value)
    assert f"{caught.value.path}:{line}: " in str(caught.value)


@pytest.mark.parametrize("spec", ["", "azure", "azure:", "sharegpt:x.csv", "/tmp/x.csv", ":x"])
def test_a_trace_is_named_by_kind_and_path(spec):
    with pytest.raises(ArgumentError, match="kind:path"):
        read_trace(spec)


def test_a_file_that_cannot_be_read_is_a_typed_error(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot read trace .*No such file"):
        read_trace(f"azure:{tmp_path / 'missing.csv'}")
    with pytest.raises(ArgumentError, match="cannot read trace"):
        read_trace(f"mooncake:{tmp_path}")


def test_the_azure_conversation_hour_has_its_published_figures(azure_conversation):
    workload = read_trace(f"azure:{azure_conversation}")
    assert len(workload) == 19_366
    assert workload.arrival[-1] == pytest.approx(3501.72, abs=0.01)
    prompt, output = (
        length_statistics(tokens) for tokens in (workload.prompt_tokens, workload.output_tokens)
    )
    assert {k: round(v, 1) for k, v in prompt.items()} == {
        "mean": 1154.7,
        "p50": 1020,
        "p99": 4142,
        "max": 14_050,
    }
    assert {k: round(v, 1) for k, v in output.items()} == {
        "mean": 211.1,
        "p50": 129,
        "p99": 601,
        "max": 1000,
    }
    utilisation = {size: 100 * page_utilisation(workload, size) for size in (16, 32, 64, 128, 256)}
    known = {16: 99.46, 32: 98.88, 64: 97.79, 128: 95.62, 256: 91.98}
    assert {size: round(share, 2) for size, share in utilisation.items()} == known


def test_the_mooncake_conversation_trace_has_its_published_figures(mooncake_conversation):
    workload = read_trace(f"mooncake:{mooncake_conversation}")
    assert len(workload) == 12_031
    assert workload.arrival[-1] == pytest.approx(3537, abs=0.01)
    assert round(float(workload.prompt_tokens.mean())) == 12_035
    assert round(float(workload.output_tokens.mean())) == 343
    assert workload.hash_ids.size == 288_500
    assert np.unique(workload.hash_ids).size == 182_790
    ideal = 1 - np.unique(workload.hash_ids).size / workload.hash_ids.size
    assert round(100 * ideal, 1) == 36.6
