"""The lean mode against plain torch: same outputs, same gradients, fewer bytes."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import rand
from helpers_lean import IMAGE_OPS, assert_plain, assert_same, channels_last, frozen, run, state
from torch import nn

from maskops import lean_autograd, models
from maskops.lean import saved_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("name", IMAGE_OPS)
def test_image_op_is_plain_torch_with_fewer_bytes(name, layout, dtype):
    function, expected = IMAGE_OPS[name]
    if isinstance(function, nn.Module):
        function.to(dtype)
    saved, lean_saved = assert_same(function, layout(rand(2, 6, 9, 8) * 3).to(dtype))
    assert lean_saved == expected
    assert saved > 6 * lean_saved


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("name", ["Conv2d", "BatchNorm2d", "MaxPool2d", "AvgPool2d", "ReLU"])
def test_input_that_is_no_dense_memory(name, layout):
    """A gradient that arrives expanded, an input with gaps, an input expanded over the batch."""
    function = IMAGE_OPS[name][0].float() if state(IMAGE_OPS[name][0]) else IMAGE_OPS[name][0]
    assert_same(lambda x: function(x).sum(), layout(rand(2, 6, 9, 8)))
    assert_same(lambda x: function(x[:, 6:, :, ::2]), layout(rand(2, 12, 9, 16)))
    assert_same(lambda x: function(x.expand(3, -1, -1, -1)), layout(rand(1, 6, 9, 8)))


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 11)),
        (nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), groups=2), (2, 4, 3, 6, 5)),
        (nn.ConvTranspose1d(4, 6, 3, 2, dilation=2), (2, 4, 7)),
        (nn.ConvTranspose3d(4, 6, 2, 2, bias=False), (2, 4, 3, 3, 3)),
        (nn.Conv2d(4, 6, 3), (0, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
        (nn.BatchNorm1d(4), (5, 4)),
        (nn.BatchNorm1d(4), (5, 4, 3)),
        (nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    ],
)
def test_layer_of_other_dimensions_saves_nothing(module, size):
    assert assert_same(frozen(module), rand(*size))[1] == 0


def test_functions_called_with_keywords():
    weight, mean, var = rand(4, 3, 3, 3), rand(3), rand(3).abs()
    x = rand(2, 3, 8, 8)
    assert assert_same(lambda x: F.conv2d(weight=weight, input=x, padding=[1], stride=(2,)), x) == (
        x.nbytes + weight.nbytes,
        weight.nbytes,
    )
    assert assert_same(lambda x: F.batch_norm(x, running_var=var, running_mean=mean, eps=0.1), x)[1] == 2 * mean.nbytes
    assert assert_same(lambda x: F.max_pool2d(input=x, kernel_size=2), x)[1] == 2 * 3 * 4 * 4
    assert assert_same(lambda x: torch.relu(input=x), x)[1] == x.numel() // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in IMAGE_OPS if "elu" in name.lower()])
def test_relu_at_special_values(name, dtype):
    values = [math.inf, -math.inf, 0.0, -0.0, 6.0, 1e-40, -1e-40, 1.0, 7.0] + [math.nan] * ("6" not in name)
    x = torch.tensor(values, dtype=dtype).expand(2, 6, 2, -1).clone()
    output, grad, _ = run(IMAGE_OPS[name][0], x)
    lean_output, lean_grad, _ = run(IMAGE_OPS[name][0], x, lean_autograd)
    torch.testing.assert_close(lean_output, output, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(lean_output.signbit(), output.signbit())
    assert torch.equal(lean_grad, grad)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 2, 0.0])
def test_elu_saves_its_output(alpha):
    x = rand(64, 50) * 4
    function = partial(F.elu, alpha=alpha)
    assert assert_same(function, x, rounding=4 * max(alpha, 1) * torch.finfo().eps) == (x.nbytes, x.nbytes)
    weight = rand(7, 50).requires_grad_()
    # the trainable layer saves the same output; plain torch keeps elu's input, too
    assert assert_same(lambda x: F.linear(function(x), weight), x, rounding=1e-5) == (
        2 * x.nbytes + weight.nbytes,
        x.nbytes + weight.nbytes,
    )


def test_elu_that_lean_leaves_alone():
    x = rand(5).requires_grad_()
    assert_plain(partial(F.elu, alpha=-1.0), x)
    assert_plain(lambda x: F.elu(x * 1, inplace=True), x)
    assert_plain(lambda x: F.elu_(x * 1), x)
    with lean_autograd():
        output = F.elu(x)
        output += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_in_place_relu_is_in_place():
    x = rand(4, 5).requires_grad_()
    with lean_autograd():
        before = x * 1
        after = F.relu(before, inplace=True)
        assert after is before
        view = before[1:]
        assert torch.relu_(view) is view
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            x.relu_()
        saved = x.exp()
        saved.relu_()
    assert torch.equal(before, x.relu()) and (x < 0).any(), "the leaf was not changed"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_residual_connection_overwrites_and_reuses():
    def block(x):
        x = F.relu(x + 0.5, inplace=True)
        y = F.relu(x - 0.2, inplace=True) * 2 - 0.3
        y += x
        return F.relu(y, inplace=True)

    assert assert_same(block, rand(8, 8)) == (3 * 8 * 8 * 4, 3 * 8)


class Subclass(torch.Tensor):
    pass


def test_everything_else_is_plain_torch():
    x = rand(2, 3, 8, 8).requires_grad_()
    conv, norm = frozen(nn.Conv2d(3, 4, 3)), frozen(nn.BatchNorm2d(3))
    for frozen_op in (F.relu, conv, norm, partial(F.max_pool2d, kernel_size=2), partial(F.avg_pool2d, kernel_size=2)):
        assert_plain(frozen_op, x.detach())
        assert_plain(torch.no_grad()(frozen_op), x)
        assert_plain(frozen_op, x.detach().as_subclass(Subclass).requires_grad_())
    assert_plain(frozen(nn.Conv2d(3, 4, 3)).to("meta"), x.detach().to("meta").requires_grad_())
    assert_plain(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], x)
    assert_plain(partial(F.max_pool2d, kernel_size=(1, 257)), rand(1, 1, 1, 300).requires_grad_())
    assert_plain(partial(F.hardtanh, min_val=-1, max_val=1), x)
    assert_plain(partial(F.hardtanh, min_val=0, max_val=0.3), x)
    assert_plain(nn.AdaptiveAvgPool2d(1), x)
    assert_plain(frozen(nn.Conv2d(3, 4, 2, padding="same")), x)
    assert_plain(conv, x[0])
    assert_plain(lambda x: F.conv2d(x, torch.ones(4, 3, 1, 1, dtype=x.dtype)), (x + 0j).detach().requires_grad_())
    for plain_op in (
        F.gelu,
        frozen(nn.Linear(8, 8)),
        frozen(nn.LayerNorm(8)),
        torch.sigmoid,
        nn.LeakyReLU(),
        nn.ELU(-1),
    ):
        assert_plain(plain_op, x)
    assert saved_bytes(lambda: frozen(nn.Linear(8, 2))(x)) == 8 * 2 * 4, "a frozen linear layer saves its weight alone"
    with lean_autograd(), pytest.raises(RuntimeError, match=r"expected input\[2, 3, 8, 8\] to have 5 channels"):
        F.conv2d(x, rand(4, 5, 3, 3))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)])
def test_trainable_layer_gets_its_gradients(layer, name):
    layer = frozen(layer)
    parameter = getattr(layer, name).requires_grad_()
    x = rand(2, 3, 8, 8).requires_grad_()
    assert_plain(layer, x)
    with lean_autograd():
        assert torch.autograd.grad(layer(x).sum(), parameter)[0].abs().sum() > 0


def test_batch_norm_in_training_mode_updates_its_statistics():
    norm = frozen(nn.BatchNorm2d(3)).train()
    before = norm.running_mean.clone()
    assert_plain(norm, rand(2, 3, 8, 8).requires_grad_())
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(
    ("name", "plain_megabytes", "megabytes"),
    [("resnet18", 150.3, 2.3), ("small_vgg", 34.9, 15.2), ("mobilenet_v2", 435.0, 6.2), ("shufflenet_v2", 50.0, 1.7)],
)
def test_frozen_network_of_the_papers(name, plain_megabytes, megabytes, layout):
    """Batches of 4, counted as 32."""
    model = frozen(getattr(models, name)())
    saved, lean_saved = assert_same(model, layout(rand(4, 3, 32, 32)))
    assert saved * 8 / 1e6 > plain_megabytes
    assert lean_saved * 8 / 1e6 < megabytes


def test_nesting_and_decorating():
    x = rand(40).requires_grad_()
    assert saved_bytes(lambda: F.relu(x)) == 160
    with lean_autograd(), lean_autograd():
        assert saved_bytes(lambda: F.relu(x)) == 5
    mode = lean_autograd()
    with mode, mode:
        assert saved_bytes(lambda: F.relu(x)) == 5
    assert saved_bytes(lambda: lean_autograd()(F.relu)(x)) == 5
    assert saved_bytes(lambda: F.relu(x)) == 160


def test_saved_bytes_counts_each_storage_once():
    x, w = rand(10).requires_grad_(), rand(10).requires_grad_()
    assert saved_bytes(lambda: (x * w, x[:5] * w[5:])) == 80
    assert saved_bytes(lambda: (x * w, x[:5] * w[5:]), exclude=[w]) == 40
    assert saved_bytes(lambda: x + w) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: x * w) == 0


def test_without_bits_relu_keeps_its_output_alone():
    x = torch.randn(4, 8, requires_grad=True)
    with lean_autograd(relu_bits=False):
        assert saved_bytes(lambda: F.relu(x).relu()) == 2 * x.nbytes
    with lean_autograd():
        assert saved_bytes(lambda: F.relu(x).relu()) == 2 * x.numel() // 8
