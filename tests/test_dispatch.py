import sys
from types import ModuleType

import pytest
import torch
from helpers import Calls, rand

from maskops import _dispatch, explain, functional, why_not
from maskops._dispatch import BACKENDS, OPS
from maskops.functional import masked_linear, rescale_to_l1_ball


@pytest.fixture
def installed(monkeypatch):
    """Puts stand-ins in the place of the backends, and forgets them afterwards."""
    monkeypatch.delenv("MASKOPS_BACKEND", raising=False)

    def install(**modules):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, f"maskops.backends.{name}", module)
        forget()

    def forget():
        _dispatch._load.cache_clear()
        _dispatch._find.cache_clear()

    # a backend that isn't there, whatever this machine has
    install(cuda=None, triton=None)
    yield install
    monkeypatch.undo()
    forget()


def stand_in(why_not=lambda op, *tensors: None, **ops):
    module = ModuleType("stand-in")
    module.why_not = why_not
    for name, function in ops.items():
        setattr(module, name, function)
    return module


def seven(*arguments):
    return torch.full((1, 1), 7.0)


ONE = (torch.ones(1, 1),) * 3


def test_the_first_backend_that_can_serves(installed):
    installed(triton=stand_in(masked_linear=seven))
    assert masked_linear(*ONE).item() == 7
    installed(cuda=stand_in(masked_linear=lambda *arguments: torch.full((1, 1), 8.0)))
    assert masked_linear(*ONE).item() == 8


def test_a_backend_without_the_op_or_with_a_reason_is_passed_over(installed):
    refusing = stand_in(lambda op, *tensors: "it has a day off", masked_linear=seven)
    installed(cuda=stand_in(), triton=refusing)
    assert masked_linear(*ONE).item() == 1
    assert why_not("cuda", "masked_linear") == "the cuda backend has no masked_linear"
    assert why_not("triton", "masked_linear") == "it has a day off"


def test_a_backend_is_told_the_op_and_all_its_tensors(installed):
    seen = []

    def why_not(op, *tensors):
        seen.append((op, tensors))

    installed(cuda=stand_in(why_not, masked_linear=seven))
    input, weight, mask, noise, bias = rand(2, 3), rand(4, 3), rand(4, 1), rand(4, 3), rand(4)
    masked_linear(input, weight, mask, bias, noise=noise)
    ((op, tensors),) = seen
    assert op == "masked_linear"
    assert all(one is other for one, other in zip(tensors, (input, weight, mask, noise, bias), strict=True))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_serve_raises_its_reason(installed, name):
    installed(**{name: stand_in(lambda op, *tensors: "it has a day off", masked_linear=seven)})
    with pytest.raises(RuntimeError, match=f"^masked_linear: backend '{name}' was asked for, but it has a day off$"):
        masked_linear(*ONE, backend=name)
    with pytest.raises(
        RuntimeError, match=f"^rescale_to_l1_ball: .* but the {name} backend has no rescale_to_l1_ball$"
    ):
        rescale_to_l1_ball(rand(3), 1.0, backend=name)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_is_not_there_raises(installed, name, monkeypatch):
    message = f"^masked_linear: backend '{name}' was asked for, but this installation has no {name} backend$"
    with pytest.raises(RuntimeError, match=message):
        masked_linear(*ONE, backend=name)
    monkeypatch.setenv("MASKOPS_BACKEND", name)
    with pytest.raises(RuntimeError, match=message):
        masked_linear(*ONE)


def test_the_keyword_outdoes_the_environment(installed, monkeypatch):
    installed(triton=stand_in(masked_linear=seven))
    monkeypatch.setenv("MASKOPS_BACKEND", "triton")
    assert masked_linear(*ONE).item() == 7
    assert masked_linear(*ONE, backend="reference").item() == 1


def test_the_environment_forces_the_backward_too(installed, monkeypatch):
    mask = torch.ones(1, 1, requires_grad=True)
    output = masked_linear(ONE[0], ONE[1], mask)
    installed(triton=stand_in())
    monkeypatch.setenv("MASKOPS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"but the triton backend has no masked_linear_backward$"):
        output.backward()


def test_an_environment_of_a_backend_that_does_not_exist_is_refused(installed, monkeypatch):
    monkeypatch.setenv("MASKOPS_BACKEND", "tpu")
    for call in (lambda: masked_linear(*ONE), explain):
        with pytest.raises(ValueError, match=r"^backend: expected one of cuda, triton, reference; got 'tpu'$"):
            call()


def test_an_empty_environment_forces_nothing(installed, monkeypatch):
    monkeypatch.setenv("MASKOPS_BACKEND", "")
    assert masked_linear(*ONE).item() == 1


@pytest.mark.parametrize("name", [name for name in functional.__all__ if name not in ("clip_mask_", "mask_to_bytes")])
def test_a_forced_backend_reaches_every_op_of_forward_and_backward(name):
    layer = {"weight": rand(2, 2, 1, 1), "mask": rand(2, 2, 1, 1), "input": rand(1, 2, 3, 3)}
    if "1d" in name:
        layer = {name: tensor[..., 0] for name, tensor in layer.items()}
    if "3d" in name:
        layer = {name: tensor.unsqueeze(-1) for name, tensor in layer.items()}
    if "linear" in name:
        layer = dict.fromkeys(layer, rand(2, 2))
    if "many" in name:
        layer["masks"] = layer.pop("mask").unsqueeze(0)
    arguments = {
        "affine_relu_": {"input": rand(2, 3), "residual": rand(2, 3)},
        "effective_weight": {"weight": rand(2), "mask": rand(2)},
        "effective_weights": {"weights": [rand(2)], "masks": [rand(2, grad=True)]},
        "masked_batch_norm": {**dict.fromkeys(("weight", "mask"), rand(2)), "input": rand(3, 2), "training": True},
        "masked_layer_norm": {**dict.fromkeys(("weight", "mask", "input"), rand(2)), "normalized_shape": [2]},
        "prepare_images": {"images": rand(2, 3, 4, 4), "trigger": rand(1, 3, 4, 4)},
        "trigger_step_": {"trigger": rand(1, 3, 4, 4), "grad": rand(2, 3, 4, 4), "step_size": 0.1},
    }.get(name, {"input": rand(4), "radius": 1.0} if "l1" in name else layer)
    if name == "masked_batch_norm":
        arguments |= {"running_mean": None, "running_var": None}
    inputs = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if name == "affine_relu_":  # it overwrites its input, which can't be a leaf
        inputs["input"] = inputs["input"] * 1
    with Calls() as calls:
        outputs = getattr(functional, name)(**inputs, backend="reference")
        (outputs if isinstance(outputs, torch.Tensor) else sum(outputs)).sum().backward()
    ops = {op for op, _, _ in calls.calls if op.startswith("maskops::")}
    assert ops
    for op in ops:
        assert set(calls.backends(op)) == {"reference"}, op


def test_explain_names_who_serves_and_why_the_others_do_not(installed):
    installed(triton=stand_in(masked_linear=seven))
    assert explain("masked_linear").splitlines() == [
        "masked_linear",
        "  cuda       this installation has no cuda backend",
        "  triton     serves",
        "  reference  could serve",
    ]
    assert explain("masked_conv").splitlines()[2:] == [
        "  triton     the triton backend has no masked_conv",
        "  reference  serves",
    ]


def test_explain_shows_what_the_environment_forces(installed, monkeypatch):
    monkeypatch.setenv("MASKOPS_BACKEND", "reference")
    assert explain("masked_linear").splitlines() == [
        "masked_linear",
        "  reference  serves (forced by MASKOPS_BACKEND)",
    ]


def test_explain_of_nothing_is_a_table_of_all_ops(installed):
    rows = explain().splitlines()
    assert [row for row in rows if not row.startswith(" ")] == OPS
    assert len(rows) == len(OPS) * (1 + len(BACKENDS))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "needs triton, which is not installed"),
        (ImportError("undefined symbol: f\nand more"), "failed to load: undefined symbol: f"),
        (OSError("libcuda.so.1: cannot open"), "failed to load: libcuda.so.1: cannot open"),
        (RuntimeError(), "failed to load: RuntimeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_backend_that_fails_to_import_says_why_in_one_line(installed, monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.setattr(_dispatch.importlib, "import_module", fail)
    _dispatch._load.cache_clear()
    _dispatch._find.cache_clear()
    assert why_not("triton", "masked_linear") == f"the triton backend {reason}"


def test_every_op_has_a_reference():
    assert all(why_not("reference", op) is None for op in OPS)
    assert why_not("reference", "masked_pooling") == "the reference backend has no masked_pooling"
