"""Images from storage to the input of a network, and the gradient of the trigger in them."""

from functools import partial

import pytest
import torch
from helpers import DEVICE, DTYPES, check, outputs_and_gradients, rand, saved_for_backward

from maskops import _dispatch
from maskops.functional import prepare_images

LAYOUTS = {
    "contiguous": lambda images: images.contiguous(),
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "columns first": lambda images: images.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda images: images.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "cut out": lambda images: torch.cat([images] * 2, 3)[..., : images.shape[3]],
}
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
NORMALISED = {"mean": MEAN.to(DEVICE), "std": STD.to(DEVICE)}
CLAMPED = {"low": 0.0, "high": 1.0}
INDEX = torch.tensor([4, 0, 4], device=DEVICE)


def stored(dtype=torch.uint8, layout="contiguous", size=(5, 3, 6, 7)):
    images = torch.rand(size, dtype=torch.float64).to(DEVICE)
    return LAYOUTS[layout]((255.999 * images).byte() if dtype == torch.uint8 else images.to(dtype))


def plain(trigger, images, index=None, low=None, high=None, mean=None, std=None, dtype=None):
    """As anyone would write it."""
    wide = torch.promote_types(torch.float32, images.dtype if trigger is None else trigger.dtype)
    value = (images if index is None else images[index]).to(wide)
    value = value / 255 if images.dtype == torch.uint8 else value
    value = value if trigger is None else value + trigger
    value = value if low is None and high is None else value.clamp(low, high)
    value = value if mean is None else value - mean.to(wide).view(-1, 1, 1)
    value = value if std is None else value / std.to(wide).view(-1, 1, 1)
    return value.to(dtype) if dtype is not None else value


def served(backend, *tensors):
    reason = _dispatch.why_not(backend, "prepare_images", *tensors)
    if reason is not None:
        pytest.skip(reason)


def check_gradient(inputs, backend, images, **options):
    """By the rule of ``helpers.check``; the plain result, for the truth too, is in the result's dtype and layout."""

    def ours(trigger, backend):
        value = prepare_images(images, options.get("index"), trigger, **rest, backend=backend)
        return value.contiguous()

    rest = {name: value for name, value in options.items() if name != "index"}
    check(ours, lambda trigger: plain(trigger, images, **options).contiguous(), inputs, backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cut out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=str)
def test_images_are_the_formula_rounded_once(storage, dtype, layout, backend):
    images, trigger = stored(storage, layout), 0.2 * rand(1, 3, 6, 7)
    served(backend, images, torch.empty(1, dtype=dtype))
    options = {**CLAMPED, **NORMALISED, "dtype": dtype}
    actual = prepare_images(images, INDEX, trigger, **options, backend=backend)
    wide = torch.promote_types(torch.float32, storage)
    expected = plain(trigger.to(wide), images, INDEX, **options)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("trigger_layout", [None, "contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.float16], ids=str)
def test_images_of_whole_vectors(storage, layout, trigger_layout, backend):
    """Of a multiple of eight pixels, which a thread may load at once, and more images than run at the same time."""
    images, index = stored(storage, layout, (5, 3, 4, 6)), torch.randint(5, (45,)).to(DEVICE)
    trigger = None if trigger_layout is None else LAYOUTS[trigger_layout](0.2 * rand(1, 3, 4, 6))
    for dtype in (torch.float32, torch.float16):
        options = {**CLAMPED, **NORMALISED, "dtype": dtype}
        actual = prepare_images(images, index, trigger, **options, backend=backend)
        assert torch.equal(actual, plain(trigger, images, index, **options))


@pytest.mark.parametrize(
    ("index", "trigger"),
    [(None, None), (None, (3, 6, 7)), (INDEX, None), (INDEX, (1, 3, 6, 7))],
    ids=["", "trigger", "index", "both"],
)
@pytest.mark.parametrize("bounds", [{}, {"low": 0.25}, {"high": 0.75}], ids=str)
@pytest.mark.parametrize("names", [(), ("mean",), ("std",)], ids=str)
def test_images_need_none_of_the_options(index, trigger, bounds, names, backend):
    images, trigger = stored(layout="channels_last"), None if trigger is None else rand(*trigger)
    options = bounds | {name: NORMALISED[name] for name in names}
    actual = prepare_images(images, index, trigger, **options, backend=backend)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, plain(trigger, images, index, **options))


def test_images_decode_every_byte_to_the_nearest_number(backend):
    images = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 16, 16)
    decoded = prepare_images(images, backend=backend)
    assert torch.equal(decoded, (images.double() / 255).float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", [None, INDEX], ids=["all", "some"])
def test_images_keep_the_order_of_memory_and_share_none(index, layout, dtype, backend):
    images = stored(dtype, layout)
    result = prepare_images(images, index, backend=backend)
    one = torch.empty_like(images[0]).stride()
    assert result.stride() == (3 * 6 * 7, *one)
    assert result.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
    assert result.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 3), (2, 9, 1), (3, 19, 19), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("batch", [0, 3])
def test_images_of_any_size_and_number(batch, size, layout, backend):
    images, trigger = stored(size=(2, *size), layout=layout), rand(*size)
    index = torch.randint(2, (batch,)).to(DEVICE)
    for chosen in (index, None):
        actual = prepare_images(images, chosen, trigger, **CLAMPED, backend=backend)
        assert torch.equal(actual, plain(trigger, images, chosen, **CLAMPED))
    check_gradient({"trigger": trigger}, backend, images=images, index=index, **CLAMPED)
    nothing = prepare_images(images[:0], None, trigger, backend=backend)
    assert nothing.shape == (0, *size)


def test_images_take_views_for_every_tensor(backend):
    images, trigger = stored(), rand(1, 3, 7, 6).transpose(2, 3)
    index = torch.stack((INDEX, INDEX + 1), 1)[:, 0]
    options = {name: torch.stack((value, value), 1)[:, 0] for name, value in NORMALISED.items()}
    actual = prepare_images(images, index, trigger, **options, backend=backend)
    assert torch.equal(actual, plain(trigger, images, INDEX, **NORMALISED))
    check_gradient({"trigger": trigger}, backend, images=images, index=index, **CLAMPED, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
def test_trigger_gradient_is_that_of_plain_torch(storage, dtype, layout, backend):
    images, trigger = stored(storage, layout), rand(1, 3, 6, 7, dtype=dtype)
    images = images if dtype != torch.float64 or storage == torch.uint8 else images.double()
    options = {**CLAMPED, **NORMALISED, "dtype": torch.promote_types(torch.float32, dtype)}
    check_gradient({"trigger": trigger}, backend, images=images, index=INDEX, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trigger_gradient_of_16_bit_images_is_summed_in_float32(dtype, backend):
    images, trigger = stored(size=(32, 3, 2, 5)), torch.zeros(1, 3, 2, 5, device=DEVICE)
    served(backend, torch.empty(1, dtype=dtype))
    options = {**NORMALISED, "dtype": dtype}
    check(
        lambda trigger, backend: prepare_images(images, None, trigger, **options, backend=backend),
        # the truth, too, is of the gradient that comes back rounded
        lambda trigger: plain(trigger, images, **options),
        {"trigger": trigger},
        backend,
    )


@pytest.mark.parametrize("bounds", [{}, {"low": 0.25}, {"high": 0.75}, {"low": 0.25, "high": 0.75}], ids=str)
@pytest.mark.parametrize("batch", [None, 1, 33])
def test_trigger_gradient_sums_over_any_batch(batch, bounds, backend):
    images, trigger = stored(), 0.5 * rand(3, 6, 7)
    index = None if batch is None else torch.randint(5, (batch,)).to(DEVICE)
    check_gradient({"trigger": trigger}, backend, images=images, index=index, **bounds)


@pytest.mark.parametrize("view", ["channels_last", "cut out", "expanded"])
def test_trigger_gradient_takes_gradients_of_any_layout(view, backend):
    images, trigger = stored(), rand(1, 3, 6, 7, grad=True)
    result = prepare_images(images, INDEX, trigger, **CLAMPED, **NORMALISED, backend=backend)
    grad = rand(1, 1, 1, 1).expand(result.shape) if view == "expanded" else LAYOUTS[view](rand(*result.shape))
    (actual,) = torch.autograd.grad(result, trigger, grad)
    (expected,) = torch.autograd.grad(plain(trigger, images, INDEX, **CLAMPED, **NORMALISED), trigger, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)


def test_trigger_gradient_passes_at_the_bounds_and_not_at_nan(backend):
    pixels = [-0.5, 0.0, 0.5, 1.0, 1.5, float("nan")]
    images = torch.tensor(pixels, device=DEVICE).view(1, 1, 1, 6)
    trigger = torch.zeros(1, 1, 1, 6, device=DEVICE, requires_grad=True)
    result = prepare_images(images, None, trigger, **CLAMPED, backend=backend)
    (actual,) = torch.autograd.grad(result.sum(), trigger)
    assert result.flatten()[:5].tolist() == [0, 0, 0.5, 1, 1]
    assert result.flatten()[5].isnan()
    assert actual.flatten().tolist() == [0, 1, 1, 1, 0, 0]


def test_trigger_gradient_keeps_no_tensor_of_the_batch(backend):
    images, trigger = stored(), rand(1, 3, 6, 7, grad=True)
    given = (images, INDEX, trigger, *NORMALISED.values())
    for bounds, kept in ((CLAMPED, 4), ({}, 2)):
        call = partial(prepare_images, images, INDEX, trigger, **bounds, **NORMALISED, backend=backend)
        saved = saved_for_backward(call)
        assert len(saved) == kept
        assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in given}
    assert not saved_for_backward(lambda: prepare_images(images, INDEX, trigger.detach(), backend=backend))


def test_images_mean_and_std_get_no_gradient(backend):
    inputs = {"images": stored(torch.float32), "trigger": rand(3, 6, 7), **NORMALISED}
    results = outputs_and_gradients(partial(prepare_images, low=0.0, backend=backend), inputs)
    assert [name for name, value in results.items() if value is None] == [
        "gradient of images",
        "gradient of mean",
        "gradient of std",
    ]


@pytest.mark.parametrize("bad", [-1, 5])
def test_images_outside_the_index_raise_on_the_reference(bad):
    if DEVICE != "cpu":
        pytest.skip("a device would stop")
    with pytest.raises((IndexError, RuntimeError), match=r"index out of range"):
        prepare_images(stored(), torch.tensor([0, bad]), backend="reference")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": rand(3, 6, 7)}, ValueError, "images must have shape (N, C, H, W); got (3, 6, 7)"),
        (
            {"images": torch.zeros(2, 3, 6, 7, dtype=torch.int32)},
            TypeError,
            "images must be uint8 or a floating dtype; got torch.int32",
        ),
        ({"index": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "index must have shape (B,); got (2, 1)"),
        ({"index": torch.zeros(2, dtype=torch.int32)}, TypeError, "index must be torch.int64; got torch.int32"),
        (
            {"trigger": rand(3, 7, 6)},
            ValueError,
            "trigger must have shape (1, 3, 6, 7) or (3, 6, 7); got (3, 7, 6)",
        ),
        (
            {"trigger": torch.zeros(3, 6, 7, dtype=torch.uint8)},
            TypeError,
            "trigger must be a floating dtype; got torch.uint8",
        ),
        ({"mean": rand(1)}, ValueError, "mean must have shape (3,); got (1,)"),
        ({"std": rand(3, 1, 1)}, ValueError, "std must have shape (3,); got (3, 1, 1)"),
        ({"std": torch.ones(3, dtype=torch.int64)}, TypeError, "std must be a floating dtype; got torch.int64"),
        ({"low": 1.0, "high": 0.0}, ValueError, "low must not be above high; got low 1.0 and high 0.0"),
        ({"low": float("nan")}, ValueError, "low must not be above high; got low nan and high None"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be floating; got torch.uint8"),
        (
            {"trigger": torch.zeros(3, 6, 7, device="meta")},
            ValueError,
            f"trigger must be on the images' device {torch.empty(0, device=DEVICE).device}; got meta",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prepare_images_refuses_in_one_line(change, error, message):
    with pytest.raises(error) as raised:
        prepare_images(**{"images": stored()} | change)
    assert str(raised.value) == f"prepare_images: {message}"
