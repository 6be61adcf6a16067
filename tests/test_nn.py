import copy
import io
import pickle

import pytest
import torch
from helpers import DEVICE, rand
from torch import nn
from torch.nn.parameter import Parameter

import maskops
from maskops.nn import CONVOLUTIONS, LINEAR, MASKED, NORMS

# positional and keyword arguments of the constructor, shape of an input
LAYERS = {
    "Conv1d": (nn.Conv1d, (4, 6, 3), {"padding": 1, "groups": 2}, (2, 4, 7)),
    "Conv2d": (nn.Conv2d, (4, 6, 3, 2), {"padding": (1, 0)}, (2, 4, 7, 7)),
    "Conv2d without bias": (nn.Conv2d, (4, 6, (1, 3)), {"bias": False, "dilation": (1, 2)}, (2, 4, 5, 7)),
    "Conv2d same": (nn.Conv2d, (4, 6, 4), {"padding": "same"}, (2, 4, 5, 7)),
    "Conv3d": (nn.Conv3d, (2, 4, 2), {"stride": 2}, (2, 2, 4, 4, 4)),
    "ConvTranspose2d": (nn.ConvTranspose2d, (4, 6, 3, 2, 1), {"output_padding": 1}, (2, 4, 4, 4)),
    "Linear": (nn.Linear, (4, 6), {}, (2, 3, 4)),
    "Linear without bias": (nn.Linear, (4, 6), {"bias": False}, (5, 4)),
    "BatchNorm1d": (nn.BatchNorm1d, (4,), {"eps": 1e-3}, (6, 4)),
    "BatchNorm2d": (nn.BatchNorm2d, (4,), {"momentum": None}, (3, 4, 2, 2)),
    "LayerNorm": (nn.LayerNorm, ([3, 4],), {"eps": 1e-3}, (2, 3, 4)),
    "LayerNorm without bias": (nn.LayerNorm, (4,), {"bias": False}, (2, 3, 4)),
}
EVERY = pytest.mark.parametrize("case", LAYERS)


def pair(case):
    """A plain layer with weights that tell, and a masked one with masks of ones, from their constructors."""
    plain_class, args, kwargs, _ = LAYERS[case]
    plain, masked = plain_class(*args, **kwargs).to(DEVICE), MASKED[plain_class](*args, **kwargs).to(DEVICE)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    masked.load_state_dict(plain.state_dict())
    return plain, masked


def image(case, dtype=torch.float32):
    return rand(*LAYERS[case][3], dtype=dtype)


def mask_of(layer):
    return getattr(layer, layer.mask_name)


def randomize(layer):
    """A mask that tells, and noise."""
    with torch.no_grad():
        mask_of(layer).uniform_()
    for name in layer.noise_names:
        if name != "neuron_noise_bias" or layer.bias is not None:
            setattr(layer, name, Parameter(torch.randn_like(mask_of(layer))))
    return layer


def test_masked_classes_are_those_of_the_package_and_of_torch():
    assert set(MASKED.values()) == {*CONVOLUTIONS, *LINEAR, *NORMS}
    for plain, masked in MASKED.items():
        assert issubclass(masked, plain)
        assert masked.__name__ == f"Masked{plain.__name__}"
        assert getattr(maskops, masked.__name__) is masked
    assert {case.split()[0] for case in LAYERS} == {plain.__name__ for plain in MASKED}


@EVERY
def test_masked_layer_has_torch_s_constructor_and_keys_and_a_mask(case):
    plain, masked = pair(case)
    assert set(masked.state_dict()) == {*plain.state_dict(), masked.mask_name}
    assert isinstance(masked, type(plain))
    assert repr(plain)[:-1] in repr(masked).removeprefix("Masked")


@EVERY
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_masked_layer_with_a_mask_of_ones_is_the_plain_layer(case, train):
    plain, masked = pair(case)
    plain.train(train), masked.train(train)
    x = image(case)
    for _ in range(3):
        assert torch.equal(masked(x), plain(x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(getattr(masked, name), buffer)


@EVERY
def test_masked_layer_computes_with_mask_and_noise(case):
    plain, masked = pair(case)
    x = image(case)
    randomize(masked)
    noise, *noise_bias = (getattr(masked, name) for name in masked.noise_names)
    with torch.no_grad():
        plain.weight.mul_(mask_of(masked) + noise)
        if noise_bias and noise_bias[0] is not None:
            plain.bias.mul_(1 + noise_bias[0])
    assert torch.allclose(masked(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(masked.effective_weight(), plain.weight)


@EVERY
def test_masked_layer_learns_the_mask_alone_when_all_else_is_frozen(case):
    _, masked = pair(case)
    masked.requires_grad_(False)
    mask_of(masked).requires_grad_()
    masked(image(case)).square().sum().backward()
    assert [name for name, p in masked.named_parameters() if p.grad is not None] == [masked.mask_name]
    assert mask_of(masked).grad.abs().sum() > 0


@EVERY
def test_masked_layer_takes_a_plain_checkpoint_and_sets_its_mask_to_ones(case):
    plain, masked = pair(case)
    with torch.no_grad():
        mask_of(masked).zero_()
    assert str(masked.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    assert mask_of(masked).eq(1).all()


@EVERY
def test_masked_layer_keeps_its_mask_when_a_checkpoint_is_of_other_layers(case):
    _, masked = pair(case)
    with torch.no_grad():
        mask_of(masked).fill_(0.5)
    result = masked.load_state_dict({}, strict=False)
    assert mask_of(masked).eq(0.5).all()
    assert masked.mask_name in result.missing_keys


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_masked_layer_brings_noise_along_with_a_checkpoint(case, assign):
    _, source = pair(case)
    state = randomize(source).state_dict()
    assert set(state) >= {source.mask_name, source.noise_names[0]}
    _, target = pair(case)
    assert str(target.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    x = image(case)
    assert torch.equal(target(x), source(x))
    for name in target.noise_names:
        noise = getattr(target, name)
        assert noise is None or (isinstance(noise, Parameter) and noise.requires_grad)
        assert noise is None or noise.data_ptr() != getattr(source, name).data_ptr() or assign


def test_masked_layer_with_noise_refuses_a_checkpoint_without():
    plain, masked = pair("Conv2d")
    randomize(masked)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "noise"'):
        masked.load_state_dict(plain.state_dict())


def test_masked_layer_refuses_unknown_keys_and_wrong_shapes():
    plain, masked = pair("Conv2d")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "neuron_mask"'):
        masked.load_state_dict(plain.state_dict() | {"neuron_mask": torch.ones(6)})
    with pytest.raises(RuntimeError, match="size mismatch for mask"):
        masked.load_state_dict(plain.state_dict() | {"mask": torch.ones(6, 1, 1, 1)})


def published(names):
    """A state dict as the published code writes it: a small network with these tensors beside each weight."""
    state = {}
    for index, suffixes in names.items():
        size = (4, 3, 3, 3) if index == 0 else (4,)
        state |= {f"{index}.{suffix}": torch.rand(size) for suffix in suffixes}
    return state | {
        "1.running_mean": torch.rand(4),
        "1.running_var": torch.rand(4) + 0.5,
        "1.num_batches_tracked": torch.tensor(7),
    }


@pytest.mark.parametrize(
    ("method", "layers", "names"),
    [
        ("AWM", "conv", {0: ("weight", "mask", "noise"), 1: ("weight", "bias")}),
        ("ANP", "norm", {0: ("weight",), 1: ("weight", "bias", "neuron_mask", "neuron_noise", "neuron_noise_bias")}),
        ("NFT", "norm", {0: ("weight",), 1: ("weight", "bias", "neuron_mask")}),
    ],
)  # fmt: skip
def test_published_checkpoint_loads_strictly(method, layers, names):
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()

    state = published(names)
    model = maskops.mask_(network(), layers=layers)
    model.load_state_dict(state)
    assert set(model.state_dict()) == set(state)
    x = torch.rand(2, 3, 6, 6)
    factor = state.get("0.mask", torch.ones(1)) + state.get("0.noise", 0)
    scale = state.get("1.neuron_mask", torch.ones(1)) + state.get("1.neuron_noise", 0)
    plain = network()
    plain.load_state_dict({name: value for name, value in state.items() if name in plain.state_dict()})
    with torch.no_grad():
        plain[0].weight.mul_(factor)
        plain[1].weight.mul_(scale)
        plain[1].bias.mul_(1 + state.get("1.neuron_noise_bias", 0))
    assert torch.allclose(model(x), plain(x), rtol=1e-5, atol=1e-6)


@EVERY
@pytest.mark.parametrize("with_noise", [False, True], ids=["mask", "noise"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_masked_layer_survives_copies(case, with_noise, how):
    _, masked = pair(case)
    if with_noise:
        randomize(masked)
    if how == "deepcopy":
        twin = copy.deepcopy(masked)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(masked))
    else:
        file = io.BytesIO()
        torch.save(masked, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = image(case)
    assert torch.equal(twin(x), masked(x))
    with torch.no_grad():
        mask_of(twin).zero_()
    assert mask_of(masked).any()
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in masked.named_parameters()]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_masked_layer_changes_its_dtype(case, dtype):
    plain, masked = pair(case)
    randomize(masked).to(dtype)
    assert {parameter.dtype for parameter in masked.parameters()} == {dtype}
    assert masked(image(case, dtype)).dtype == plain.to(dtype)(image(case, dtype)).dtype == dtype


@EVERY
def test_masked_layer_is_built_in_a_dtype_with_a_mask_wide_enough_to_learn(case):
    plain_class, args, kwargs, _ = LAYERS[case]
    for dtype, mask_dtype in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        masked = MASKED[plain_class](*args, **kwargs, dtype=dtype, device=DEVICE)
        assert (masked.weight.dtype, mask_of(masked).dtype) == (dtype, mask_dtype)
        assert masked(image(case, dtype)).dtype == dtype


@EVERY
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter.*")
def test_masked_layer_on_the_meta_device_has_shapes_and_takes_a_plain_checkpoint(case):
    plain_class, args, kwargs, _ = LAYERS[case]
    plain, expected = pair(case)
    masked, expected = MASKED[plain_class](*args, **kwargs, device="meta").eval(), expected.eval()
    assert masked(image(case).to("meta")).shape == expected(image(case)).shape
    masked.load_state_dict(plain.state_dict(), assign=True)
    assert {tensor.device.type for tensor in masked.state_dict().values()} == {DEVICE}
    assert mask_of(masked).eq(1).all()


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", [1, "same"])
def test_masked_convolution_pads_as_torch_does(padding_mode, dims, padding):
    plain_class = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    plain = plain_class(2, 3, 3, padding=padding, padding_mode=padding_mode).to(DEVICE)
    masked = randomize(MASKED[plain_class].from_module(plain))
    x = rand(2, 2, *[5] * dims)
    with torch.no_grad():
        plain.weight.copy_(masked.effective_weight())
    # from_module shares the weight, so the mask now counts twice unless it is ones
    masked.mask, masked.noise = Parameter(torch.ones_like(masked.mask)), None
    assert torch.equal(masked(x), plain(x))


def test_masked_conv_transpose2d_takes_an_output_size():
    plain, masked = pair("ConvTranspose2d")
    x = image("ConvTranspose2d")
    for size in ([7, 8], [8, 7]):
        assert torch.equal(masked(x, output_size=size), plain(x, output_size=size))


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("tracks", [True, False])
def test_masked_batch_norm_tracks_as_torch_does(momentum, tracks):
    plain = nn.BatchNorm2d(3, momentum=momentum, track_running_stats=tracks).to(DEVICE)
    masked = maskops.MaskedBatchNorm2d.from_module(copy.deepcopy(plain))
    for train in (True, True, False, True, False):
        plain.train(train), masked.train(train)
        x = 3 * rand(4, 3, 2, 2) + 1
        assert torch.equal(masked(x), plain(x))
    for one, other in zip(masked.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


def test_masked_batch_norm_without_a_counter_and_with_tracking_switched_off():
    for change in ({"num_batches_tracked": None}, {"track_running_stats": False}, {"momentum": 0.5}):
        plain = nn.BatchNorm1d(3).to(DEVICE)
        for name, value in change.items():
            setattr(plain, name, value)
        masked = maskops.MaskedBatchNorm1d.from_module(copy.deepcopy(plain))
        for train in (True, False):
            plain.train(train), masked.train(train)
            x = rand(5, 3)
            assert torch.equal(masked(x), plain(x))
        assert all(torch.equal(one, other) for one, other in zip(masked.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize(
    ("granularity", "shapes"),
    [
        ("weight", [(6, 2, 3), (6, 4, 3, 3), (4, 2, 2, 2, 2), (4, 6, 3, 3), (6, 4)]),
        ("kernel", [(6, 2, 1), (6, 4, 1, 1), (4, 2, 1, 1, 1), (4, 6, 1, 1), (6, 4)]),
        ("neuron", [(6, 1, 1), (6, 1, 1, 1), (4, 1, 1, 1, 1), (1, 6, 1, 1), (6, 1)]),
    ],
)
def test_granularity_is_the_mask_s_shape(granularity, shapes):
    for case, shape in zip(("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"), shapes, strict=True):
        plain_class, args, kwargs, _ = LAYERS[case]
        masked = MASKED[plain_class](*args, **kwargs, granularity=granularity).to(DEVICE)
        assert tuple(masked.mask.shape) == shape
        assert masked(image(case)).isfinite().all()


@pytest.mark.parametrize("case", ["BatchNorm1d", "BatchNorm2d", "LayerNorm"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "neuron"])
def test_norms_have_a_value_per_channel_whatever_the_granularity(case, granularity):
    plain_class, args, kwargs, _ = LAYERS[case]
    masked = MASKED[plain_class](*args, **kwargs, granularity=granularity)
    assert masked.neuron_mask.shape == masked.weight.shape


@pytest.mark.parametrize("neuron", [0, 2])
def test_neuron_of_a_transposed_convolution_is_an_output_channel(neuron):
    masked = maskops.MaskedConvTranspose2d(4, 3, 2, bias=False, granularity="neuron").to(DEVICE)
    with torch.no_grad():
        masked.mask[0, neuron] = 0
    silent = masked(rand(1, 4, 3, 3)).abs().amax((0, 2, 3)) == 0
    assert silent.tolist() == [channel == neuron for channel in range(3)]


@pytest.mark.parametrize("case", ["Conv2d", "BatchNorm2d", "LayerNorm", "Linear"])
def test_from_module_shares_the_tensors_and_leaves_the_module_alone(case):
    plain, _ = pair(case)
    calls = []
    plain.register_forward_hook(lambda *_: calls.append("first"))
    before = {**plain.state_dict()}
    masked = MASKED[type(plain)].from_module(plain)
    assert type(plain) is LAYERS[case][0]
    assert set(plain.state_dict()) == set(before)
    assert all(getattr(masked, name) is tensor for name, tensor in plain.named_parameters())
    masked.register_forward_hook(lambda *_: calls.append("second"))
    plain(image(case))
    assert calls == ["first"]
    masked(image(case))
    assert calls == ["first", "first", "second"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: maskops.MaskedConv2d(1, 1, 1, granularity="pixel"), ValueError,
         "MaskedConv2d: granularity must be one of weight, kernel, neuron; got 'pixel'"),
        (lambda: maskops.MaskedConvTranspose2d(2, 2, 1, groups=2, granularity="neuron"), ValueError,
         "MaskedConvTranspose2d: granularity 'neuron' needs groups 1; got groups 2"),
        (lambda: maskops.MaskedBatchNorm2d(3, affine=False), ValueError,
         "MaskedBatchNorm2d: the layer must have a weight to mask; got None"),
        (lambda: maskops.MaskedLayerNorm.from_module(nn.LayerNorm(3, elementwise_affine=False)), ValueError,
         "MaskedLayerNorm: the layer must have a weight to mask; got None"),
        (lambda: maskops.MaskedConv2d.from_module(nn.Conv1d(1, 1, 1)), TypeError,
         "MaskedConv2d.from_module: expected Conv2d; got Conv1d"),
        (lambda: maskops.MaskedConv2d.from_module(nn.LazyConv2d(1, 1)), TypeError,
         "MaskedConv2d.from_module: expected Conv2d; got LazyConv2d"),
        (lambda: maskops.MaskedConv2d.from_module(maskops.MaskedConv2d(1, 1, 1)), TypeError,
         "MaskedConv2d.from_module: expected Conv2d; got MaskedConv2d"),
    ],
)  # fmt: skip
def test_masked_layer_refuses_in_one_line(make, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        make()


def test_functional_call_swaps_the_mask():
    _, masked = pair("Conv2d")
    x = image("Conv2d")
    zero = torch.func.functional_call(masked, {"mask": torch.zeros_like(masked.mask)}, x)
    assert torch.equal(zero, masked.bias.view(1, -1, 1, 1).expand_as(zero))

    def loss(mask):
        return torch.func.functional_call(masked, {"mask": mask}, x).square().sum()

    gradient = torch.func.grad(loss)(masked.mask.detach())
    loss(masked.mask).backward()
    assert torch.allclose(gradient, masked.mask.grad, rtol=1e-4, atol=1e-4)
