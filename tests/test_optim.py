"""Mask optimisers against torch's own, and the arena against separate tensors."""

import copy

import pytest
import torch
from torch import nn

from maskops.arena import MaskArena
from maskops.functional import clip_mask_
from maskops.optim import MaskAdam, MaskSGD

SHAPES = {"conv": (5, 3, 3, 3), "pointwise": (2, 5, 1, 1), "linear": (3, 7), "norm": (9,), "volume": (2, 3, 1, 2, 2)}


def random_masks(dtype=torch.float64):
    return [nn.Parameter(torch.rand(shape, dtype=dtype)) for shape in SHAPES.values()]


def make(kind, masks, **options):
    return MaskAdam(masks, lr=0.05, **options) if kind == "adam" else MaskSGD(masks, lr=0.05, momentum=0.9, **options)


def make_torch(kind, masks):
    return torch.optim.Adam(masks, lr=0.05) if kind == "adam" else torch.optim.SGD(masks, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("l1", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_equal_torch_then_clip(kind, l1, dtype):
    ours, theirs = random_masks(dtype), None
    theirs = [nn.Parameter(mask.detach().clone()) for mask in ours]
    optimizer, plain = make(kind, ours, l1=l1), make_torch(kind, theirs)
    for _ in range(7):
        for mask, other in zip(ours, theirs, strict=True):
            mask.grad = torch.randn_like(mask)
            other.grad = mask.grad + l1 * other.detach().sign()
        optimizer.step()
        plain.step()
        for mask, other in zip(ours, theirs, strict=True):
            clip_mask_(other)
            torch.testing.assert_close(mask, other, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-7)
    assert any((mask == 0).any() for mask in ours) and any((mask == 1).any() for mask in ours)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_l1_term_may_pull_toward_one(kind):
    ours = [nn.Parameter(torch.tensor([0.2, 0.7, 1.0]))]
    theirs = [nn.Parameter(ours[0].detach().clone())]
    optimizer, plain = make(kind, ours, l1=0.1, toward=1.0), make_torch(kind, theirs)
    for _ in range(5):
        gradient = torch.randn(3)
        ours[0].grad = gradient.clone()
        plain.zero_grad()
        ((gradient * theirs[0]).sum() + 0.1 * (1 - theirs[0]).abs().sum()).backward()
        optimizer.step()
        plain.step()
        clip_mask_(theirs[0])
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shapes", ["weight", "neuron"])
def test_noise_in_the_arena_climbs_by_its_gradients_sign(shapes):
    weights = {"conv": torch.randn(4, 3, 3, 3), "linear": torch.randn(2, 5)}
    sizes = {"conv": (4, 1, 1, 1), "linear": (2, 1)}
    masks = {name: torch.rand(sizes[name] if shapes == "neuron" else weight.shape) for name, weight in weights.items()}
    arena = MaskArena(weights, masks)
    arena.draw_noise(0.3, torch.Generator().manual_seed(0))
    arena.draw_noise(0.3, torch.Generator().manual_seed(1))
    start = arena.noise.clone()
    assert start.abs().max() <= 0.3 and start.unique().numel() > 5
    arena.perturb()
    factors = {name: torch.randn_like(weight) for name, weight in weights.items()}
    noises = {}
    for name, weight in weights.items():
        noise = (arena.effective_weights[name].detach() / weight - masks[name]).sum_to_size(masks[name].shape)
        noises[name] = noise / (weight.numel() / masks[name].numel())
    sum((factors[name] * weight).sum() for name, weight in arena.effective_weights.items()).backward()
    arena.ascend_noise(0.4, 0.5)
    assert arena.noise.abs().max() == 0.5 and not arena.grad.any()
    arena.perturb()
    for name, weight in weights.items():
        gradient = (factors[name] * weight).sum_to_size(masks[name].shape)
        noise = (noises[name] + 0.4 * gradient.sign()).clamp(-0.5, 0.5)
        expected = weight * (masks[name] + noise)
        torch.testing.assert_close(arena.effective_weights[name].detach(), expected, rtol=1e-4, atol=1e-4)
    arena.refresh()
    for name, weight in weights.items():
        assert torch.equal(arena.effective_weights[name].detach(), weight * masks[name])
    arena.draw_noise(0.3, torch.Generator().manual_seed(1))
    assert torch.equal(arena.noise, start)
    arena.ascend_noise(0.4, None)  # no gradient, no step
    assert torch.equal(arena.noise, start)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_step_over_the_arena_equals_separate_masks(kind):
    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    masks = dict(zip(SHAPES, random_masks(), strict=True))
    arena = MaskArena(weights, masks)
    separate = [nn.Parameter(mask.detach().clone()) for mask in masks.values()]
    flat, plain = make(kind, arena, l1=0.1), make(kind, separate, l1=0.1)
    for _ in range(4):
        factors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        sum((factors[name] * weight).sum() for name, weight in arena.effective_weights.items()).backward()
        for mask, (name, weight) in zip(separate, weights.items(), strict=True):
            mask.grad = factors[name] * weight
        flat.step()
        plain.step()
        for mask, name in zip(separate, weights, strict=True):
            torch.testing.assert_close(arena.masks[name], mask.detach(), rtol=1e-13, atol=1e-15)
            expected = weights[name] * arena.masks[name]
            torch.testing.assert_close(arena.effective_weights[name].detach(), expected, rtol=0, atol=0)
            assert not arena.effective_weights[name].grad.any()


def test_coarse_masks_get_the_sum_of_their_weights_gradients():
    weights = {"conv": torch.randn(4, 3, 3, 3), "linear": torch.randn(2, 5)}
    masks = {"conv": torch.rand(4, 1, 1, 1), "linear": torch.rand(2, 1)}
    arena = MaskArena(weights, masks)
    factors = {name: torch.randn_like(weight) for name, weight in weights.items()}
    sum((factors[name] * weight).sum() for name, weight in arena.effective_weights.items()).backward()
    MaskSGD(arena, lr=0.01, lower=-10.0, upper=10.0).step()
    for name, mask in masks.items():
        gradient = (factors[name] * weights[name]).sum_to_size(mask.shape)
        torch.testing.assert_close(arena.masks[name], mask - 0.01 * gradient)
        torch.testing.assert_close(arena.effective_weights[name].detach(), weights[name] * arena.masks[name])


def test_the_arena_is_flat_aligned_and_channels_last():
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    arena = MaskArena(weights, {name: torch.rand(shape) for name, shape in SHAPES.items()}, torch.bfloat16)
    for flat, views in (
        (arena.weight, arena.weights),
        (arena.mask, arena.masks),
        (arena.effective, arena.effective_weights),
        (arena.grad, {name: weight.grad for name, weight in arena.effective_weights.items()}),
    ):
        assert flat.dim() == 1
        for name, view in views.items():
            assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            assert view.storage_offset() * view.element_size() % 16 == 0
            assert view.shape == SHAPES[name]
    assert arena.weights["conv"].is_contiguous(memory_format=torch.channels_last)
    assert arena.weights["volume"].is_contiguous(memory_format=torch.channels_last_3d)
    assert arena.effective.dtype == arena.grad.dtype == torch.bfloat16
    assert arena.mask.dtype == arena.weight.dtype == torch.float32


def test_each_layer_can_have_its_own_lower_bound():
    weights = {"a": torch.ones(3), "b": torch.ones(20)}
    arena = MaskArena(weights, {name: torch.ones_like(weight) for name, weight in weights.items()})
    optimizer = MaskSGD(arena, lr=100.0, lower=arena.per_mask({"a": 0.25, "b": 0.5}))
    sum(weight.sum() for weight in arena.effective_weights.values()).backward()
    optimizer.step()
    assert torch.equal(arena.masks["a"], torch.full((3,), 0.25)) and torch.equal(
        arena.masks["b"], torch.full((20,), 0.5)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["adam", "sgd", "capturable", "eight bits"])
def test_state_dict_resumes_to_the_same_masks(kind, dtype):
    options = {"capturable": {"capturable": True}, "eight bits": {"state_bits": 8}}

    def make(kind, masks):
        return MaskAdam(masks, lr=0.05, **options[kind]) if kind in options else globals()["make"](kind, masks)

    masks = random_masks(dtype)
    optimizer = make(kind, masks)

    def steps(optimizer, masks, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            for mask in masks:
                mask.grad = torch.randn_like(mask)
            optimizer.step()

    steps(optimizer, masks, 1)
    copies = [nn.Parameter(mask.detach().clone()) for mask in masks]
    resumed = make(kind, copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, masks, 2)
    steps(resumed, copies, 2)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, copies, strict=True))


def test_a_learning_rate_schedule_and_groups_work():
    masks = random_masks(torch.float32)
    optimizer = MaskAdam([{"params": masks[:2], "lower": 0.5}, {"params": masks[2:]}], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for mask in masks:
        mask.grad = torch.ones_like(mask)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    assert min(mask.min() for mask in masks[:2]) >= 0.5 > min(mask.min() for mask in masks[2:])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**20)


def test_capturable_takes_the_same_steps_with_everything_in_tensors():
    masks = random_masks()
    copies = [nn.Parameter(mask.detach().clone()) for mask in masks]
    plain, capturable = MaskAdam(masks, lr=0.05), MaskAdam(copies, lr=torch.tensor(0.05), capturable=True)
    for _ in range(3):
        for mask, other in zip(masks, copies, strict=True):
            mask.grad = torch.randn_like(mask)
            other.grad = mask.grad.clone()
        plain.step()
        capturable.step()
    for mask, other in zip(masks, copies, strict=True):
        torch.testing.assert_close(mask, other, rtol=1e-7, atol=1e-9)


def bowl(state_bits, steps=300):
    """Masks after descending a noisy bowl whose curvature differs by entry, and where its bottom is."""
    torch.manual_seed(0)
    curvature, bottom = torch.randn(2000).exp(), torch.rand(2000) * 0.6 + 0.2
    mask = nn.Parameter(torch.ones(2000))
    optimizer = MaskAdam([mask], lr=0.01, state_bits=state_bits)
    for _ in range(steps):
        mask.grad = curvature * (mask.detach() - bottom + 0.1 * torch.randn(2000)) * (torch.rand(2000) < 0.7)
        optimizer.step()
    return mask.detach(), bottom


def test_eight_bits_of_state_descend_as_far_as_thirty_two():
    full, bottom = bowl(32)
    found, _ = bowl(8)
    assert (full - bottom).abs().mean() < 0.05
    assert (found - bottom).abs().mean() < 1.1 * (full - bottom).abs().mean()
    # no mask is thrown away: where a second moment was lost, a step would be as large as the bounds allow
    assert (found - bottom).abs().max() < 2 * (full - bottom).abs().max()


def test_eight_bits_of_state_are_two_bytes_an_entry():
    for masks in (
        [nn.Parameter(torch.ones(64, 32, 3, 3))],
        MaskArena({"a": torch.ones(70000)}, {"a": torch.ones(70000)}),
    ):
        optimizer = MaskAdam(masks, state_bits=8)
        if isinstance(masks, list):
            masks[0].grad = torch.ones_like(masks[0])
        optimizer.step()
        (state,) = optimizer.state.values()
        entries = optimizer.param_groups[0]["params"][0].numel()
        assert {name: tensor.dtype for name, tensor in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.uint8,
            "exp_avg_scale": torch.float32,
            "exp_avg_sq": torch.uint8,
            "exp_avg_sq_scale": torch.float32,
        }
        assert sum(tensor.nbytes for tensor in state.values()) == 4 + 2 * entries + 8 * -(-entries // 256)


def test_eight_bits_of_state_for_masks_in_any_order_of_memory():
    ordinary = nn.Parameter(torch.rand(5, 16, 4, 4))
    last = nn.Parameter(ordinary.detach().to(memory_format=torch.channels_last))
    lower = torch.rand(5, 1, 1, 1) / 2
    optimizers = [MaskAdam([mask], lr=0.05, l1=0.1, lower=lower, state_bits=8) for mask in (ordinary, last)]
    full = nn.Parameter(ordinary.detach().clone())
    optimizers.append(MaskAdam([full], lr=0.05, l1=0.1, lower=lower))
    for _ in range(3):
        gradient = torch.randn(5, 16, 4, 4)
        for mask, optimizer in zip((ordinary, last, full), optimizers, strict=True):
            mask.grad = gradient.clone()
            optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    for mask in (ordinary, last):
        assert (mask >= lower).all()
        torch.testing.assert_close(mask, full, rtol=0, atol=0.02)


def test_eight_bits_of_state_over_an_arena():
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    masks = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    arenas = [MaskArena(weights, masks) for _ in range(2)]
    eight, full = MaskAdam(arenas[0], lr=0.05, state_bits=8), MaskAdam(arenas[1], lr=0.05)
    for _ in range(3):
        gradient = torch.randn_like(arenas[0].grad)
        for arena, optimizer in zip(arenas, (eight, full), strict=True):
            arena.grad.copy_(gradient)
            optimizer.step()
    for name, mask in arenas[0].masks.items():
        torch.testing.assert_close(mask, arenas[1].masks[name], rtol=0, atol=0.02)
        assert torch.equal(arenas[0].effective_weights[name].detach(), weights[name] * mask)


def test_eight_bits_of_state_for_a_lone_number():
    mask = nn.Parameter(torch.ones(()))
    mask.grad = torch.ones(())
    MaskAdam([mask], lr=0.1, state_bits=8).step()
    torch.testing.assert_close(mask.detach(), torch.tensor(0.9))


def test_eight_bits_of_state_need_masks_that_fill_their_memory():
    mask = nn.Parameter(torch.ones(6, 4)[:, ::2])
    mask.grad = torch.ones(6, 2)
    with pytest.raises(ValueError) as error:
        MaskAdam([mask], state_bits=8).step()
    expected = "a mask of bfloat16, or with state_bits=8, must fill its memory; got shape (6, 2) and strides (4, 2)"
    assert str(error.value) == f"MaskAdam: {expected}"


def test_masks_without_a_gradient_stay_and_closures_run():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MaskSGD([first, second], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = first.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert torch.equal(first.data, torch.full((2,), 0.9)) and torch.equal(second.data, torch.ones(2))


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda masks: MaskAdam(masks, lr=-1.0), "MaskAdam: lr must be a number >= 0; got -1.0"),
        (lambda masks: MaskSGD(masks, l1=-1.0), "MaskSGD: l1 must be a number >= 0; got -1.0"),
        (
            lambda masks: MaskAdam(masks, lower=2.0),
            "MaskAdam: lower must not be above upper; got lower 2.0 and upper 1.0",
        ),
        (lambda masks: MaskAdam([{"params": masks, "lr": -1.0}]), "MaskAdam: lr must be a number >= 0; got -1.0"),
        (
            lambda masks: MaskArena({"a": masks[0], "b": masks[0].double()}, {"a": masks[0], "b": masks[0]}),
            "MaskArena: the weights must have one dtype and device; got torch.float32 on cpu, torch.float64 on cpu",
        ),
        (lambda masks: MaskAdam(masks, betas=(0.9, 1.0)), "MaskAdam: betas must be in [0, 1); got (0.9, 1.0)"),
        (lambda masks: MaskAdam(masks, state_bits=4), "MaskAdam: state_bits must be 8 or 32; got 4"),
        (lambda masks: MaskSGD(masks, momentum=1.0), "MaskSGD: momentum must be in [0, 1); got 1.0"),
        (lambda masks: MaskArena({}, {}), "MaskArena: expected one mask per weight; got weights [] and masks []"),
        (
            lambda masks: MaskArena({"a": masks[0]}, {"b": masks[0]}),
            "MaskArena: expected one mask per weight; got weights ['a'] and masks ['b']",
        ),
    ],
)
def test_bad_arguments_are_one_line(construct, message):
    with pytest.raises(ValueError) as error:
        construct([nn.Parameter(torch.ones(2))])
    assert str(error.value) == message


def test_gradients_of_sixteen_bits_are_multiplied_in_the_masks_precision():
    arena = MaskArena({"a": torch.full((4,), 1e-3, dtype=torch.float16)}, {"a": torch.ones(4)})
    arena.grad.fill_(1e-5)
    MaskSGD(arena, lr=1e6, lower=-1.0).step()
    assert (arena.masks["a"] < 1).all()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_large_arena_takes_the_steps_of_a_small_one(kind):
    """Flat arenas are stepped in pieces on the CPU; masks of other shapes are stepped at once."""
    weights = {name: torch.randn(500, 700) for name in "ab"}
    masks = {name: torch.rand(500, 700) for name in "ab"}
    lower = {"a": 0.25, "b": 0.5}
    arena = MaskArena(weights, masks)
    separate = {name: nn.Parameter(mask.clone()) for name, mask in masks.items()}
    flat = make(kind, arena, l1=0.1, lower=arena.per_mask(lower))
    plain = make(kind, [{"params": [separate[name]], "lower": lower[name]} for name in "ab"], l1=0.1)
    for _ in range(2):
        gradients = {name: torch.randn(500, 700) for name in "ab"}
        for name, weight in arena.effective_weights.items():
            weight.grad.copy_(gradients[name])
            separate[name].grad = gradients[name] * weights[name]
        flat.step()
        plain.step()
    for name, mask in separate.items():
        assert torch.equal(arena.masks[name], mask.detach())
        assert torch.equal(arena.effective_weights[name].detach(), weights[name] * mask.detach())
