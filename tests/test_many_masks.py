"""Many masks over one weight: every mask's layer is the one of a loop over the masks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import Calls, check, largest, plain_layer, poisoned, rand, saved_for_backward

from maskops import _dispatch
from maskops.functional import many_masked_conv2d, many_masked_linear, masked_conv2d

# images of one mask, weight, options
CONV = {
    "3x3": ((1, 4, 4, 5), (6, 4, 3, 3), {"padding": 1}),
    "1x1": ((2, 4, 3, 3), (3, 4, 1, 1), {}),
    "stride and groups": ((2, 4, 5, 4), (6, 2, 3, 3), {"stride": (2, 1), "padding": (1, 0), "groups": 2}),
    "stride and dilation": ((1, 18, 6, 5), (4, 18, 3, 2), {"stride": (3, 1), "dilation": (2, 3), "padding": 2}),
    "depthwise": ((1, 2, 3, 3), (2, 1, 3, 3), {"groups": 2, "padding": 1}),
    "same even": ((2, 3, 4, 5), (4, 3, 2, 4), {"padding": "same"}),
    "no image": ((0, 3, 4, 4), (4, 3, 3, 3), {}),
}
GRANULARITIES = {
    "weight": (6, 4, 3, 3),
    "kernel": (6, 4, 1, 1),
    "neuron": (6, 1, 1, 1),
    "number": (1, 1, 1, 1),
    "row": (6, 1, 3, 1),
}
OWN = pytest.mark.parametrize("own", [True, False], ids=["own inputs", "one input"])


def tensors(images, weight, count, own, mask=None, noise=None, dtype=torch.float32):
    """Random tensors for ``count`` masks of the weight's shape, unless told otherwise."""
    made = {"input": rand(*((count,) if own else ()), *images, dtype=dtype), "weight": rand(*weight, dtype=dtype)}
    made |= {"masks": rand(count, *(mask or weight), dtype=dtype), "bias": rand(weight[0], dtype=dtype)}
    return made | ({} if noise is None else {"noise": rand(count, *noise, dtype=dtype)})


def plain_many(layer, input, weight, masks, noise=None, bias=None, **options):
    """A loop over the masks, in the layout that the images have."""
    own = input.dim() > weight.dim()
    every = [
        plain_layer(
            layer, input[j] if own else input, weight, mask, None if noise is None else noise[j], bias, **options
        )
        for j, mask in enumerate(masks)
    ]
    if every[0].dim() == 4 and every[0].is_contiguous(memory_format=torch.channels_last):
        return torch.stack([output.permute(0, 2, 3, 1) for output in every]).permute(0, 1, 4, 2, 3)
    return torch.stack(every)


def check_conv(inputs, options, backend):
    check(partial(many_masked_conv2d, **options), partial(plain_many, F.conv2d, **options), inputs, backend)


@pytest.mark.parametrize(
    ("case", "count"),
    [("3x3", 1), ("3x3", 4), ("3x3", 5), *((case, 2 if case == "depthwise" else 3) for case in CONV if case != "3x3")],
)
@OWN
def test_many_masked_conv2d_is_a_loop(case, count, own, backend):
    images, weight, options = CONV[case]
    check_conv(tensors(images, weight, count, own, noise=weight), options, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@OWN
def test_many_masked_conv2d_in_every_dtype(dtype, own, backend):
    images, weight, options = CONV["3x3"]
    check_conv(tensors(images, weight, 4, own, noise=weight, dtype=dtype), options, backend)


@pytest.mark.parametrize(
    ("mask", "noise"), [*((mask, None) for mask in GRANULARITIES), ("weight", "neuron"), ("neuron", "neuron")]
)
def test_many_masked_conv2d_takes_every_granularity(mask, noise, backend):
    inputs = tensors((1, 4, 4, 4), (6, 4, 3, 3), 3, True, GRANULARITIES[mask], GRANULARITIES.get(noise))
    check_conv(inputs, {}, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@OWN
def test_many_masked_linear_is_a_loop(dtype, own, backend):
    for count, mask, noise in ((1, (5, 3), None), (4, (5, 1), (5, 3)), (5, (5, 3), (1, 3))):
        inputs = tensors((4, 3), (5, 3), count, own, mask, noise, dtype)
        check(many_masked_linear, partial(plain_many, F.linear), inputs, backend)


@pytest.mark.parametrize("layout", ["channels_last", "channels_last weight", "strided", "expanded"])
@OWN
def test_many_masked_conv2d_keeps_the_layout_in_each_slice(layout, own, backend):
    inputs = tensors((2, 4, 5, 6), (8, 4, 3, 3), 3, own)
    if layout == "channels_last":
        inputs["input"] = inputs["input"].movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout.startswith("channels_last"):
        inputs["weight"] = inputs["weight"].to(memory_format=torch.channels_last)
        inputs["masks"] = inputs["masks"].movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "strided":
        inputs["input"] = rand(*inputs["input"].shape[:-3], 4, 10, 12)[..., ::2, 1::2]
        inputs["masks"] = rand(6, 3, 3, 4, 8).permute(0, 4, 3, 2, 1)[::2]
    if layout == "expanded":
        inputs["masks"] = rand(3, 8, 1, 1, 1).expand(inputs["masks"].shape)
        inputs["input"] = rand(4, 1, 6).expand(inputs["input"].shape)
    check_conv(inputs, {"padding": 1}, backend)
    output = many_masked_conv2d(**inputs, backend=backend)
    last = output[1].is_contiguous(memory_format=torch.channels_last)
    assert last == layout.startswith("channels_last")


@OWN
def test_masks_may_be_of_bytes_and_of_another_dtype(own, backend):
    inputs = tensors((2, 4, 4, 4), (6, 4, 3, 3), 3, own, dtype=torch.float16)
    inputs["masks"], bytes_ = rand(3, 6, 1, 1, 1), torch.randint(256, (3, 6, 4, 3, 3)).to(inputs["weight"].device)
    check_conv(inputs, {}, backend)
    arguments = [rand(2, 4, 4, 4), rand(6, 4, 3, 3)]
    output = many_masked_conv2d(*arguments, bytes_.byte(), backend=backend)
    assert largest(output - plain_many(F.conv2d, *arguments, bytes_ / 255)) < 1e-5


@OWN
def test_an_expanded_gradient_is_taken(own, backend):
    inputs = tensors((2, 4, 4, 4), (6, 4, 3, 3), 2, own)
    check(
        lambda **tensors: many_masked_conv2d(**tensors).sum(),
        lambda **tensors: plain_many(F.conv2d, **tensors).sum(),
        inputs,
        backend,
    )


def test_many_masked_conv2d_fills_every_output_and_repeats_itself(backend):
    inputs = tensors((2, 4, 5, 5), (6, 4, 3, 3), 3, True, noise=(6, 1, 1, 1))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    if reason := _dispatch.why_not(backend, "many_masked_conv"):
        pytest.skip(reason)

    def run():
        output = many_masked_conv2d(**inputs, padding=1, backend=backend)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    with poisoned():
        first, second = run(), run()
    assert all(one.isfinite().all() and torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", ["input", "weight", "masks", "noise", "bias"])
def test_nothing_is_kept_or_computed_that_was_not_asked_for(wanted):
    inputs = tensors((2, 4, 5, 5), (6, 4, 3, 3), 3, True, noise=(6, 4, 3, 3))
    leaves = {name: tensor.requires_grad_(name == wanted) for name, tensor in inputs.items()}
    kept = [tensor.data_ptr() for tensor in saved_for_backward(lambda: many_masked_conv2d(**leaves))]
    layer = {leaves[name].data_ptr() for name in ("weight", "masks", "noise")}
    assert [pointer for pointer in kept if pointer not in layer] == (
        [leaves["input"].data_ptr()] if wanted in ("weight", "masks", "noise") else []
    )
    output = many_masked_conv2d(**leaves)
    with Calls() as calls:
        output.sum().backward()
    ((*_, needs),) = calls.arguments("maskops::many_masked_conv_backward")
    assert needs == [name == wanted for name in ("input", "weight", "masks", "noise", "bias")]
    assert [name for name, tensor in leaves.items() if tensor.grad is not None] == [wanted]


def test_the_tile_of_the_weight_is_read_once_for_four_masks(monkeypatch):
    """One launch per pass, whose programs are as many for four masks as for one."""
    launch = pytest.importorskip("maskops.backends.triton._launch")
    if not launch.INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter or CUDA")
    grids, start = [], launch.launch

    def count(kernel, grid, *arguments):
        grids.append(grid)
        start(kernel, grid, *arguments)

    monkeypatch.setattr(launch, "launch", count)
    for masks in (1, 4, 5):
        inputs = tensors((2, 4, 4, 4), (6, 4, 3, 3), masks, True)
        output = many_masked_conv2d(inputs["input"].requires_grad_(), *list(inputs.values())[1:3], backend="triton")
        output.sum().backward()
    assert [grid[2] for grid in grids] == [1, 1, 1, 1, 2, 2]


def test_masks_over_one_frozen_model_learn_apart():
    """Each mask's gradient is that of its own layer alone."""
    inputs = tensors((2, 4, 5, 5), (6, 4, 3, 3), 3, False)
    masks = inputs["masks"].requires_grad_()
    outputs = many_masked_conv2d(inputs["input"], inputs["weight"], masks)
    (grad,) = torch.autograd.grad(outputs[1].square().sum(), masks)
    alone = masks[1].detach().requires_grad_()
    (expected,) = torch.autograd.grad(masked_conv2d(inputs["input"], inputs["weight"], alone).square().sum(), alone)
    assert largest(grad[1] - expected) <= 1e-5 * largest(expected)
    assert not grad[[0, 2]].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"masks": torch.ones(6, 4, 3, 3)},
            ValueError,
            r"masks must have shape \(K, \*m\), m of 4 sizes that broadcast",
        ),
        ({"masks": torch.ones(0, 6, 4, 3, 3)}, ValueError, r"masks must have .* got \(0, 6, 4, 3, 3\)$"),
        ({"masks": torch.ones(3, 5, 1, 1, 1)}, ValueError, r"to weight \(6, 4, 3, 3\); got \(3, 5, 1, 1, 1\)$"),
        ({"masks": torch.ones(3, 1, 1, 1, 1).int()}, TypeError, "mask must be a floating dtype; got torch.int32$"),
        ({"noise": torch.ones(2, 6, 1, 1, 1)}, ValueError, r"noise must be that of 3 masks; got \(2, 6, 1, 1, 1\)$"),
        (
            {"input": torch.ones(2, 1, 4, 5, 5)},
            ValueError,
            r"input must have shape \(3, N, C, H, W\) or \(N, C, H, W\)",
        ),
        ({"input": torch.ones(4, 5, 5)}, ValueError, r"input must have shape .*; got \(4, 5, 5\)$"),
        ({"input": torch.ones(3, 1, 5, 5, 5)}, ValueError, "input must have 4 channels"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(6,\); got \(4,\)$"),
        ({"weight": torch.ones(6, 4, 3)}, ValueError, r"weight must have 4 dimensions; got \(6, 4, 3\)$"),
    ],
    ids=str,
)
def test_many_masked_conv2d_refuses_in_one_line(change, error, message):
    arguments = {"input": torch.ones(1, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3), "masks": torch.ones(3, 1, 1, 1, 1)}
    with pytest.raises(error, match=f"^many_masked_conv2d: .*{message}"):
        many_masked_conv2d(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight must have 2 dimensions; got \(5,\)$"),
        ({"input": torch.ones(2, 4)}, r"input must end in 3 features for weight \(5, 3\); got \(2, 4\)$"),
        ({"input": torch.ones(4, 2, 3)}, r"input must have shape \(2, N, I\) or \(N, I\); got \(4, 2, 3\)$"),
        ({"masks": torch.ones(5, 3)}, r"masks must have shape \(K, \*m\), m of 2 sizes"),
    ],
    ids=str,
)
def test_many_masked_linear_refuses_in_one_line(change, message):
    arguments = {"input": torch.ones(2, 3), "weight": torch.ones(5, 3), "masks": torch.ones(2, 5, 1)}
    with pytest.raises(ValueError, match=f"^many_masked_linear: {message}"):
        many_masked_linear(**{**arguments, **change})
