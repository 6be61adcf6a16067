"""What is the Triton backend's own: parts of a sum, coarse masks without a weight gradient, ways, measured choices."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, check, plain_dual, plain_layer, rand

from maskops import explain
from maskops.functional import (
    dual_masked_conv2d,
    dual_masked_linear,
    masked_conv2d,
    masked_conv_transpose2d,
    masked_linear,
)

pytest.importorskip("triton")

from maskops.backends.triton import blocks, dense, tuning, ways


@pytest.fixture
def many_processors(monkeypatch):
    """A device so wide that every sum over pixels is cut into parts, and every row of tiles into narrow ones."""
    for module in (blocks, dense):
        monkeypatch.setattr(module, "processors", lambda device: 8)


def layer_tensors(input, weight, **others):
    made = {"input": rand(*input), "weight": rand(*weight), "mask": rand(*weight), "noise": rand(*weight)}
    return {**made, **others}


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("channels", [2, 17])
def test_sums_in_parts_are_the_sums(many_processors, options, channels):
    made = layer_tensors((2, channels, 7, 6), (5, channels, 3, 3))
    check(partial(masked_conv2d, **options), partial(plain_layer, F.conv2d, **options), made, "triton")
    made["perturbed_input"] = rand(2, channels, 7, 6)
    check(partial(dual_masked_conv2d, **options), partial(plain_dual, F.conv2d, **options), made, "triton")


def test_sums_in_parts_repeat_themselves(many_processors):
    made = {name: value.requires_grad_() for name, value in layer_tensors((2, 4, 7, 6), (5, 4, 3, 3)).items()}

    def gradients():
        output = masked_conv2d(**made, backend="triton")
        return torch.autograd.grad(output.square().sum(), list(made.values()))

    assert all(torch.equal(one, other) for one, other in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("size", [(5, 6), (6, 7)], ids=str)
def test_one_tap_with_a_stride(backend, size):
    options = {"stride": (2, 3)}
    made = layer_tensors((2, 4, *size), (5, 4, 1, 1))
    check(partial(masked_conv2d, **options), partial(plain_layer, F.conv2d, **options), made, backend)
    made["perturbed_input"] = rand(2, 4, *size)
    check(partial(dual_masked_conv2d, **options), partial(plain_dual, F.conv2d, **options), made, backend)
    made, options = layer_tensors((2, 4, *size), (4, 5, 1, 1)), {**options, "output_padding": (1, 2)}
    plain = partial(plain_layer, F.conv_transpose2d, **options)
    check(partial(masked_conv_transpose2d, **options), plain, made, backend)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
def test_masks_per_neuron_over_a_frozen_weight(backend, noise, groups, many_processors):
    weight = rand(6, 4 // groups, 3, 3)
    made = {"input": rand(2, 4, 7, 5), "mask": rand(6, 1, 1, 1)}
    if noise:
        made["noise"] = rand(6, 1, 1, 1)
    options = {"groups": groups, "padding": 1}

    def plain(layer, function, input, **others):
        return layer(function, input, weight.to(input.dtype), **others, **options)

    check(partial(masked_conv2d, weight=weight, **options), partial(plain, plain_layer, F.conv2d), made, backend)
    made["perturbed_input"] = rand(2, 4, 7, 5)
    dual = partial(dual_masked_conv2d, weight=weight, **options)
    check(dual, partial(plain, plain_dual, F.conv2d), made, backend)


def test_masks_per_neuron_of_other_layers_over_a_frozen_weight(backend):
    weight, made = rand(5, 6), {"input": rand(2, 3, 6), "mask": rand(5, 1)}

    def plain(input, mask):
        return plain_layer(F.linear, input, weight.to(input.dtype), mask)

    check(partial(masked_linear, weight=weight), plain, made, backend)
    kernel, made = rand(4, 3, 3, 3), {"input": rand(2, 4, 5, 5), "mask": rand(4, 1, 1, 1)}

    def plain_transposed(input, mask):
        return plain_layer(F.conv_transpose2d, input, kernel.to(input.dtype), mask, stride=2)

    check(partial(masked_conv_transpose2d, weight=kernel, stride=2), plain_transposed, made, backend)


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
def test_masks_of_bytes_count_in_steps_of_1_255(backend, noise):
    weight = rand(6, 4, 3, 3)
    mask = torch.randint(256, (6, 4, 3, 3), dtype=torch.uint8, device=DEVICE)
    made = {"input": rand(2, 4, 6, 6), "weight": weight}
    if noise:
        made["noise"] = rand(6, 1, 1, 1)

    def plain(input, weight, noise=None):
        return plain_layer(F.conv2d, input, weight, mask.to(input.dtype) / 255, noise)

    check(partial(masked_conv2d, mask=mask), plain, made, backend)


@pytest.mark.parametrize("bias", ["strided", "expanded"])
def test_a_bias_of_any_strides_is_added(backend, bias):
    made = layer_tensors((2, 4, 5, 5), (6, 4, 3, 3))
    made["bias"] = rand(6, 2)[:, 0] if bias == "strided" else rand(1).expand(6)
    check(masked_conv2d, partial(plain_layer, F.conv2d), made, backend)


@pytest.mark.parametrize("outside", [True, False], ids=["first within autocast", "first outside"])
def test_gradients_keep_their_dtype_around_autocast(backend, outside):
    size = 7 if outside else 9  # shapes that nothing before has met
    input, weight, mask = rand(4, size).requires_grad_(), rand(5, size), rand(5, size)
    output = masked_linear(input, weight, mask, backend=backend)
    for within in (outside, not outside):
        with torch.autocast(DEVICE, torch.float16, enabled=within):
            (gradient,) = torch.autograd.grad(output.sum(), input, retain_graph=True)
        torch.testing.assert_close(gradient, (weight * mask).sum(0).expand(4, size), rtol=1e-5, atol=1e-5)


def test_what_an_op_overwrites_autograd_knows(backend):
    mask, noise = rand(4), rand(4)
    versions = mask._version, noise._version
    lr, lower = torch.tensor(0.1), torch.tensor(0.0)
    torch.ops.maskops.mask_sgd_step_(mask, rand(4), None, None, None, lr, 0.0, 0.0, 0.0, lower, 1.0, backend=backend)
    torch.ops.maskops.noise_step_(noise, rand(4), None, 0.1, 1.0, backend=backend)
    assert mask._version > versions[0]
    assert noise._version > versions[1]


@pytest.mark.parametrize("layer", ["conv", "dual", "linear"])
def test_layers_compile_in_one_graph(layer):
    masked, shapes = {
        "conv": (partial(masked_conv2d, padding=1), ((2, 4, 5, 5), (6, 4, 3, 3))),
        "dual": (dual_masked_conv2d, ((2, 4, 5, 5), (6, 4, 3, 3))),
        "linear": (masked_linear, ((3, 4), (5, 4))),
    }[layer]

    def gradients(function):
        leaves = {name: value.requires_grad_() for name, value in made.items()}
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), list(leaves.values()))

    made = layer_tensors(*shapes)
    function = partial(masked, backend="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(function), gradients(compiled), strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()


@pytest.fixture
def materialised(monkeypatch):
    monkeypatch.setenv("MASKOPS_LAYERS", "materialised")


@pytest.mark.parametrize("layer", ["conv", "transposed", "linear", "depthwise"])
def test_the_materialised_way_is_the_same_layer(layer, materialised):
    masked, plain, shapes, options = {
        "conv": (masked_conv2d, F.conv2d, ((2, 4, 6, 5), (6, 4, 3, 3)), {"padding": 1}),
        "transposed": (masked_conv_transpose2d, F.conv_transpose2d, ((2, 4, 3, 3), (4, 5, 3, 3)), {"stride": 2}),
        "linear": (masked_linear, F.linear, ((3, 4), (5, 4)), {}),
        "depthwise": (masked_conv2d, F.conv2d, ((2, 4, 5, 5), (4, 1, 3, 3)), {"groups": 4}),
    }[layer]
    check(partial(masked, **options), partial(plain_layer, plain, **options), layer_tensors(*shapes), "triton")


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_the_materialised_way_of_both_branches(layer, materialised):
    dual, plain, shapes = {
        "conv": (dual_masked_conv2d, F.conv2d, ((2, 4, 6, 5), (6, 4, 3, 3))),
        "linear": (dual_masked_linear, F.linear, ((3, 4), (5, 4))),
    }[layer]
    made = layer_tensors(*shapes, perturbed_input=rand(*shapes[0]))
    check(dual, partial(plain_dual, plain), made, "triton")


def conv_arguments(images, channels=16, out=32, groups=1, transposed=False):
    input, weight = torch.empty(images, channels, 8, 8), torch.empty(out, channels // groups, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], groups)
    return (input, weight, torch.empty_like(weight), None, None, *geometry)


@pytest.mark.parametrize(
    ("arguments", "way", "reason"),
    [
        (conv_arguments(2), "fused", "128 pixels are so few"),
        (conv_arguments(128), "materialised", "with 8192 pixels the effective weight is a small part"),
        (conv_arguments(128, 16, 16, 16), "fused", "a depthwise layer has a kernel of its own"),
        (conv_arguments(128, 16, 16, 16, True), "materialised", "with 8192 pixels"),
    ],
    ids=["few pixels", "many pixels", "depthwise", "depthwise, transposed"],
)
def test_the_way_follows_the_work(arguments, way, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(ways, "INTERPRETED", False)
    monkeypatch.setenv("MASKOPS_CACHE", str(tmp_path))
    chosen, why = ways.choose("masked_conv", *arguments)
    assert chosen == way
    assert why.startswith(reason)
    assert f"{chosen}: {why}" in explain("masked_conv", *arguments)


def test_a_way_can_be_pinned(monkeypatch):
    for pinned in ("fused", "materialised"):
        monkeypatch.setenv("MASKOPS_LAYERS", pinned)
        assert ways.choose("masked_conv", *conv_arguments(2)) == (pinned, "MASKOPS_LAYERS pins it")
    monkeypatch.setenv("MASKOPS_LAYERS", "quick")
    with pytest.raises(ValueError, match=r"^MASKOPS_LAYERS: expected fused or materialised; got 'quick'$"):
        ways.choose("masked_conv", *conv_arguments(2))


def test_a_measured_way_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(ways, "INTERPRETED", False)
    monkeypatch.setenv("MASKOPS_CACHE", str(tmp_path))
    monkeypatch.setenv("MASKOPS_MEASURE", "1")
    monkeypatch.setattr(tuning, "_milliseconds", lambda start, way, device: start(way))
    arguments = conv_arguments(128)
    way, reason = ways.choose("masked_conv", *arguments, start={"fused": 1.0, "materialised": 2.0}.get)
    assert (way, reason) == ("fused", "it was measured to be the faster one")
    monkeypatch.delenv("MASKOPS_MEASURE")
    assert ways.choose("masked_conv", *arguments) == (way, reason)
    (file,) = tmp_path.iterdir()
    assert list(json.loads(file.read_text()).values()) == ["fused"]


def test_measured_tiles_give_the_same_layer(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKOPS_CACHE", str(tmp_path))
    monkeypatch.setenv("MASKOPS_MEASURE", "1")
    made = layer_tensors((1, 4, 3, 3), (5, 4, 1, 1))
    check(masked_conv2d, partial(plain_layer, F.conv2d), made, "triton")
    (file,) = tmp_path.iterdir()
    tiles = json.loads(file.read_text())
    assert [key.split(" ")[0] for key in sorted(tiles)] == ["forward", "input", "weight"]
    assert all(len(tile) == len(blocks.Blocks._fields) for tile in tiles.values())
    monkeypatch.delenv("MASKOPS_MEASURE")
    check(masked_conv2d, partial(plain_layer, F.conv2d), made, "triton")


def test_a_measured_tile_is_found_in_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKOPS_CACHE", str(tmp_path))
    device = torch.device("cpu")
    candidates = [blocks.Blocks(64, 64, 32, 4, stages) for stages in (2, 3)]
    tuning._file(device).write_text(json.dumps({"product (3, 5) True": candidates[1], "gone": [1, 2, 3, 4, 5]}))
    assert tuning.best(("product", (3, 5), True), candidates, None, device) is candidates[1]
    for unknown in ("product", "gone"):
        assert tuning.best((unknown,), candidates, None, device) is candidates[0]


def test_a_cache_that_cannot_be_read_or_written_is_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKOPS_CACHE", str(tmp_path))
    device = torch.device("cpu")
    tuning._file(device).write_text("not json")
    assert tuning.best(("key",), ["first", "second"], lambda candidate: None, device) == "first"
    monkeypatch.setenv("MASKOPS_CACHE", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASKOPS_MEASURE", "1")
    assert tuning.best(("key",), ["first"], lambda candidate: None, device) == "first"


@pytest.mark.parametrize("capability", sorted(blocks.TABLE))
def test_tiles_fit_their_shapes(capability, monkeypatch):
    monkeypatch.setattr(blocks, "capability", lambda device: capability)
    for kind in ("half", "tf32", "ieee"):
        for branches in (1, 2, 3, 4):
            tile = blocks.blocks((3, 5, 7), (4, 2), kind, branches, torch.device("meta"))
            assert tile[:3] == (16, 16, 16)
            full = blocks.table_entry(capability, kind, branches)
            tile = blocks.blocks((4096, 4096, 4096), (4, 2), kind, branches, torch.device("meta"))
            assert tile[:2] == full[:2]
            wide = blocks.blocks((4096, 4096, 4096), (12, 8), kind, branches, torch.device("meta"))
            assert wide.inner * wide.stages <= tile.inner * tile.stages
            assert blocks.shared_bytes(wide, (12, 8)) <= {(8, 0): 163, (9, 0): 227}.get(capability, 99) << 10


def test_other_architectures_take_the_next_smaller_table():
    assert blocks.table_entry((10, 0), "half", 1) == blocks.TABLE[9, 0]["half"][1]
    assert blocks.table_entry((8, 7), "tf32", 2) == blocks.TABLE[8, 6]["tf32"][2]
