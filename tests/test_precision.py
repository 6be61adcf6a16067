"""What a run sets in torch for its steps is as it was afterwards."""

import subprocess
import sys

import pytest
import torch

from maskops.purify._precision import precision

CUDNN, PRODUCTS = torch.backends.cudnn, torch.backends.cuda.matmul


def state():
    fp32 = CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision, PRODUCTS.fp32_precision
    return *fp32, CUDNN.allow_tf32, PRODUCTS.allow_tf32, torch.get_float32_matmul_precision(), CUDNN.benchmark


@pytest.fixture(params=["as it is", "products", "medium", "no convolutions", "benchmark"])
def setting(request):
    before = torch.get_float32_matmul_precision()
    if request.param == "products":
        PRODUCTS.allow_tf32 = True
    elif request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    convolutions = {"allow_tf32": request.param != "no convolutions"}
    with CUDNN.flags(CUDNN.enabled, request.param == "benchmark", **convolutions):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tf32", [None, True, False])
def test_everything_is_put_back(setting, tf32):
    before = state()
    for _ in range(2):
        with precision(tf32):
            if tf32 is not None:
                assert CUDNN.allow_tf32 is tf32 and PRODUCTS.allow_tf32 is tf32
            with precision(None):
                assert CUDNN.allow_tf32 is (before[3] if tf32 is None else tf32)
        assert state() == before


def test_algorithms_are_tried_unless_torch_is_deterministic():
    with precision(None):
        assert CUDNN.benchmark
    with CUDNN.flags(CUDNN.enabled, deterministic=True), precision(None):
        assert not CUDNN.benchmark


def test_it_works_after_torch_was_told_to_set_flags_in_contexts_alone():
    program = """
import torch
from maskops.purify._precision import precision
torch.backends.disable_global_flags()
for tf32 in (None, True, False):
    with precision(tf32):
        pass
"""
    subprocess.run([sys.executable, "-c", program], check=True)
