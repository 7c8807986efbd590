"""All of the CUDA backend on a device, over the whole matrix; the harness runs a part of it."""

from __future__ import annotations

import pytest

from tests.parity.captures import *  # noqa: F403
from tests.parity.cases import Case, all_cases, make_config
from tests.parity.claims import *  # noqa: F403
from tests.parity.operands import *  # noqa: F403
from tests.parity.poison import *  # noqa: F403
from tests.parity.twins import Twins


@pytest.fixture(params=all_cases(), ids=str)
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16, 24])
def test_every_group_gets_its_own_columns(device, group):
    twins = Twins(make_config("k4v4", 128, 64, window=0, num_layers=1), device)
    members = [twins.open(), twins.open()]
    twins.append(members, (330, 7))
    twins.check_attend(0, members, group)
    twins.check_attend(0, members, group, [1, 2])
    twins.check_scores(0, members, group)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_every_page_size_meets_every_kind_of_group(device, page_size, group):
    config = make_config("k3v4", 128, page_size, window=page_size, num_layers=1)
    twins = Twins(config, device, backend={"split_tokens": max(128, page_size)})
    members = [twins.open() for _ in range(3)]
    twins.append(members, (1, page_size + 3, 3 * page_size + 40))
    twins.check_pages()
    twins.check_attend(0, members, group)
    twins.check_attend(0, members, group, [1, 3, 2])
    twins.check_scores(0, members, group)


@pytest.mark.parametrize("split_tokens", [None, 64, 256, 4096])
def test_any_number_of_parts_gives_the_same_state(device, split_tokens):
    config = make_config("k4v4", 128, 64, window=64, num_layers=1, num_pages=200)
    twins = Twins(config, device, backend={"split_tokens": split_tokens})
    members = [twins.open() for _ in range(3)]
    twins.append(members, (9000, 65, 1000))
    twins.check_pages()
    twins.check_attend(0, members, 4)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("form", ["k4v4", "k3v3", "k2v2", "prod4v4", "exact"])
def test_every_type_of_input_gives_the_hosts_pages_to_the_byte(device, form, kind):
    config = make_config(form, 128, 64, window=0, num_layers=1, kv_dtype=kind)
    twins = Twins(config, device)
    members = [twins.open(), twins.open()]
    twins.append(members, (150, 90))
    twins.check_pages(exact=True)
    twins.check_attend(0, members, 8)
