"""The public functions on the shapes of real networks, against what anyone would write in plain torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Step, Timed, full_float32, interleaved
from benchmarks.problem import GAMMA, LR, why_not
from benchmarks.results import Outcome, Row, aligned, make_row, say
from maskops.arena import MaskArena
from maskops.functional import (
    dual_masked_conv2d,
    effective_weight,
    masked_conv2d,
    masked_linear,
    project_onto_l1_ball,
    rescale_to_l1_ball,
)
from maskops.models import build
from maskops.optim import MaskAdam

BACKENDS = ("cuda", "triton", "reference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.004}
"""Largest distance from plain torch, relative, as norms: about 4 units in the last place for the 16-bit dtypes."""
FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache: a GPU's is emptied before every timed call."""
RADIUS = 100.0

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    plain:   what anyone would write; its results are right
    ours:    the public function
    floor:   what nobody can avoid; its results are others
    compiles: whether ``torch.compile`` of ``plain`` is a contestant, when it is wished for
    """

    shape: str
    phase: str
    plain: Step
    ours: Step
    floor: Step
    compiled: Callable[[], Step] | None = None


def run(
    nets: Sequence[str],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    warmup: int,
    compiles: bool = False,
) -> Outcome:
    """Compare, then time, every case; a contestant that disagrees gets no number."""
    outcome = Outcome()
    reason = why_not(dtype, device)
    if reason is not None:
        outcome.absent["ops"] = reason
        return outcome
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for case in cases(nets, batch, dtype, device):
        say(f"{case.phase}, {case.shape}")
        steps = contestants(case, compiles, TOLERANCE[dtype], outcome)
        timed = {name: Timed(lambda repetition, step=step: step()) for name, step in steps.items()}
        samples = interleaved(timed, repeats, warmup, device, flush)
        for name, ms in samples.items():
            outcome.rows.append(
                make_row("ops", case.shape, batch, dtype, name, case.phase, ms.percentiles(), device=device)
            )
    return outcome


def contestants(case: Case, compiles: bool, tolerance: float, outcome: Outcome) -> dict[str, Step]:
    """Those that agree with plain torch, by name; the others are noted in the outcome."""
    steps = {"eager": case.plain}
    if compiles and case.compiled is not None:
        steps["compile"] = case.compiled()
    steps |= {backend: partial(_forced, backend, case.ours) for backend in BACKENDS}
    with full_float32():
        expected = case.plain()
        for name, step in list(steps.items()):
            try:
                error = _distance(expected, step())
            except RuntimeError as reason:
                if "was asked for, but" not in str(reason) and name != "compile":
                    raise
                del steps[name]
                continue
            if not error <= tolerance:
                del steps[name]
                outcome.absent[f"{name}, {case.phase}, {case.shape}"] = f"{error:.2g} away from plain torch"
                outcome.failed = True
    return {**steps, "floor": case.floor}


def _forced(backend: str, step: Step) -> Any:
    before = os.environ.get("MASKOPS_BACKEND")
    os.environ["MASKOPS_BACKEND"] = backend
    try:
        return step()
    finally:
        if before is None:
            del os.environ["MASKOPS_BACKEND"]
        else:
            os.environ["MASKOPS_BACKEND"] = before


def _distance(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    errors = [float((a.float() - e.float()).norm() / e.float().norm()) for e, a in zip(expected, actual, strict=True)]
    return max(errors, key=lambda error: (error != error, error))


def cases(nets: Sequence[str], batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every op on every different layer of the networks, the ops on whole networks, and the L1 balls."""
    layers = {}
    for net in nets:
        layers |= {_title(layer, shape): (layer, shape) for layer, shape in layers_of(net, batch)}
    for title, (layer, shape) in layers.items():
        make = _conv_cases if isinstance(layer, nn.Conv2d) else _linear_cases
        yield from make(title, layer, shape, dtype, device)
    for net in nets:
        weights = [layer.weight.shape for layer, _ in layers_of(net, batch) if isinstance(layer, nn.Conv2d)]
        yield from _network_cases(net, [torch.randn(shape, device=device) / 10 for shape in weights])
    for shape in ((1, 3, 32, 32), (batch, 3, 32, 32), (1, 3, 224, 224)):
        yield from _l1_cases(torch.randn(shape, device=device))


def layers_of(net: str, batch: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """The convolutions and linear layers of a network, each with the shape of its input."""
    found = []
    with torch.device("meta"):
        model, images = build(net), torch.empty(batch, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda layer, inputs, output: found.append((layer, tuple(inputs[0].shape))))
    model.eval()(images)
    return found


def _title(layer: nn.Module, shape: tuple[int, ...]) -> str:
    times = "x".join(map(str, shape))
    if isinstance(layer, nn.Linear):
        return f"linear {times} to {layer.out_features}"
    stride = f" stride {layer.stride[0]}" if layer.stride[0] > 1 else ""
    return f"conv {times} to {layer.out_channels}, {layer.kernel_size[0]}x{layer.kernel_size[1]}{stride}"


def _conv_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)
    dual = {**inputs, "noise": torch.randn_like(inputs["mask"]) / 10}
    e, e_noise = (inputs["weight"] * mask for mask in (inputs["mask"], inputs["mask"] + dual["noise"]))
    floor = {"input": inputs["input"], "mask": e.to(dtype), "noise": e_noise.to(dtype)}

    def plain(input, weight, mask):
        return F.conv2d(input, (weight * mask).to(input.dtype), None, *geometry)

    def ours(input, weight, mask):
        return masked_conv2d(input, weight, mask, None, *geometry)

    def unmasked(input, mask):
        return F.conv2d(input, mask, None, *geometry)

    def plain_dual(input, weight, mask, noise):
        return plain(input, weight, mask), plain(input, weight, mask + noise)

    def our_dual(input, weight, mask, noise):
        return dual_masked_conv2d(input, weight, mask, None, *geometry, noise=noise)

    def unmasked_dual(input, mask, noise):
        return unmasked(input, mask), unmasked(input, noise)

    single = {name: floor[name] for name in ("input", "mask")}
    for wanted in (None, "input", "mask"):
        yield _case(title, "masked_conv2d", wanted, (plain, ours, unmasked), inputs, single)
    for wanted in (None, "noise"):
        yield _case(title, "dual_masked_conv2d", wanted, (plain_dual, our_dual, unmasked_dual), dual, floor)


def _linear_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)

    def plain(input, weight, mask):
        return F.linear(input, (weight * mask).to(input.dtype))

    def unmasked(input, mask):
        return F.linear(input, mask)

    floor = {"input": inputs["input"], "mask": (inputs["weight"] * inputs["mask"]).to(dtype)}
    for wanted in (None, "input", "mask"):
        yield _case(title, "masked_linear", wanted, (plain, masked_linear, unmasked), inputs, floor)


def _layer_inputs(shape, weight_shape, dtype, device) -> dict[str, Tensor]:
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    inputs = {
        "input": torch.randn(shape, device=device, dtype=dtype),
        "weight": torch.randn(weight_shape, device=device) / 10,
        "mask": torch.rand(weight_shape, device=device),
    }
    return {name: tensor.contiguous(memory_format=memory_format) for name, tensor in inputs.items()}


def _case(title: str, op: str, wanted: str | None, functions: tuple[Function, ...], inputs, floor_inputs) -> Case:
    """A layer's forward, or its forward and the gradient of one of its inputs."""
    plain, ours, floor = functions
    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in _as_tuple(plain(**inputs))]
    phase = f"{op} forward" if wanted is None else f"{op} forward, {wanted} gradient"
    step = partial(_differentiated, wanted=wanted, upstream=upstream)
    return Case(
        title,
        phase,
        step(plain, inputs),
        step(ours, inputs),
        step(floor, floor_inputs),
        lambda: step(torch.compile(plain, dynamic=False), inputs),
    )


def _differentiated(function: Function, inputs: dict[str, Tensor], wanted: str | None, upstream: list[Tensor]) -> Step:
    inputs = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in inputs.items()}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _as_tuple(function(**inputs))

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_as_tuple(function(**inputs)), inputs[wanted], upstream, allow_unused=False)

    return forward if wanted is None else forward_and_backward


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
