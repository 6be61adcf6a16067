from __future__ import annotations

import pytest
import torch
from helpers_distributed import CASES, all_cases, purify, together


@pytest.fixture(scope="module")
def alone():
    return {name: purify(name) for name in CASES}


@pytest.fixture(scope="module", params=[2, 4])
def team(request, tmp_path_factory):
    return together(tmp_path_factory.mktemp("team"), request.param, all_cases)


@pytest.mark.parametrize("name", CASES)
def test_several_processes_come_to_what_one_does(alone, team, name):
    expected = alone[name]
    for found in team:
        assert isinstance(found, dict), found
        assert found[name]["history"].keys() == expected["history"].keys()
        for what, values in expected["history"].items():
            assert found[name]["history"][what] == pytest.approx(values, rel=1e-9)
        assert found[name]["tensors"].keys() == expected["tensors"].keys()
        for what, value in expected["tensors"].items():
            assert torch.allclose(found[name]["tensors"][what], value, rtol=1e-7, atol=1e-9), what
            assert torch.equal(found[name]["tensors"][what], team[0][name]["tensors"][what]), what
