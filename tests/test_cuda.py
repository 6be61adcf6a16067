"""What holds for the CUDA kernels alone: tensors of more than 2**31 elements, CUDA graphs, what the driver says."""

import math

import pytest
import torch
from helpers import DEVICE
from test_ops import op_arguments

from maskops import _dispatch

HUGE = 2**31 + 64
ops = torch.ops.maskops


@pytest.fixture
def huge():
    """A tensor of which 32 bits can't count the elements; where there is no room for it, the test is skipped."""
    if torch.cuda.mem_get_info()[0] < 6 * 2 * HUGE:
        pytest.skip(f"needs {6 * 2 * HUGE / 2**30:.0f} GiB of GPU memory")
    yield torch.empty(HUGE, dtype=torch.bfloat16, device="cuda")
    torch.cuda.empty_cache()


def ends(tensor):
    """What lies at the beginning, around 2**31, and at the end."""
    return torch.cat([tensor[:32], tensor[2**31 - 32 : 2**31 + 32], tensor[-32:]])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_elements_than_32_bits_count(huge, backend):
    huge.normal_()
    before = ends(huge).clone()
    bits = ops.relu_bits_(huge, math.inf, backend=backend)
    assert torch.equal(ends(huge), before.relu())
    grad = ops.relu_bits_backward(huge, bits, backend=backend)
    assert torch.equal(ends(grad), ends(huge))
    ops.noise_step_(huge, grad, None, 0.5, 2.0, backend=backend)
    assert torch.equal(ends(huge), (before.relu() + 0.5 * before.relu().sign()).clamp(-2, 2))
    del bits
    effective = ops.effective_weight(huge, grad, None, torch.bfloat16, backend=backend)
    assert torch.equal(ends(effective), ends(huge) * ends(grad))


CAPTURABLE = [op for op in _dispatch.OPS if not op.startswith("many_")]


@pytest.mark.gpu
@pytest.mark.parametrize("op", CAPTURABLE)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_op_can_be_captured_in_a_graph(op, backend):
    for arguments in op_arguments()[op]:
        tensors = [a for a in torch.utils._pytree.tree_leaves(arguments) if isinstance(a, torch.Tensor)]
        if reason := _dispatch.why_not(backend, op, *tensors):
            pytest.skip(reason)

        def call(arguments=arguments):
            return getattr(ops, op)(*arguments, backend=backend)

        kept = [tensor.clone() for tensor in tensors]
        expected = call()
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        graph.replay()
        for one, other in zip(*map(torch.utils._pytree.tree_leaves, (expected, found)), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.gpu
def test_kernels_run_as_they_were_compiled():
    cuda = _dispatch._load("cuda")
    if isinstance(cuda, str):
        pytest.skip(cuda)
    attributes = cuda.kernel_attributes()
    assert len(attributes) > 20
    for name, kernel in attributes.items():
        assert kernel["local_bytes"] == 0, name
        assert kernel["blocks_per_processor"] >= 1, name


def test_kernels_have_names_without_their_compilers_words():
    cuda = _dispatch._load("cuda")
    if isinstance(cuda, str):
        pytest.skip(cuda)
    from maskops import _C

    names = _C.kernel_names()
    assert len(set(names)) == len(names) > 20
    assert not [name for name in names if "maskops" in name or "anonymous" in name or "_GLOBAL_" in name]
    assert DEVICE == "cuda" or cuda.EMULATED
