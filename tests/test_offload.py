"""θ, masks and Adam's state in the host's memory: the same masks, from copies of a layer at a time."""

import copy

import pytest
import torch
from graph_emulator import record
from helpers_resume import images, network
from test_memory_options import TwoHeads, run
from test_working import with_statistics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskops.purify import _checkpoint, _graphs, swm
from maskops.purify.awm import AWM

LEAN = {"step_in_backward": True, "remake_weights": True}
OFFLOAD = {**LEAN, "offload": True}


def assert_equal(result, expected):
    assert result.history == expected.history
    for name, mask in expected.masks.items():
        assert torch.equal(result.masks[name], mask), name
    assert torch.equal(result.trigger, expected.trigger)
    assert all(map(torch.equal, result.model.state_dict().values(), expected.model.state_dict().values()))


@pytest.mark.parametrize("build", [network, TwoHeads], ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    "more", [{"state_bits": 8, "recompute": True}, {"dtype": torch.bfloat16, "gamma": 1e-3}], ids=str
)
def test_masks_are_the_same(build, more):
    torch.manual_seed(0)
    model = with_statistics(build()).float()
    more = {"epochs": 1, **more}
    assert_equal(run(model, **OFFLOAD, **more), run(model, **LEAN, **more))


class Touched(TorchDispatchMode):
    """The ops that read or write some storages, without views."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        views = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if not views and any(leaf.untyped_storage()._cdata in self.storages for leaf in leaves):
            self.names.add(func._schema.name)
        return result


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_only_copies_what_is_in_the_host_s_memory(bits):
    algorithm = AWM(
        network(), images(), "official", None, {**OFFLOAD, "state_bits": bits, "layers": ("conv", "linear")}
    )
    batch = next(algorithm.run.batches(1, 8))
    algorithm.outer(batch)
    arena, state = algorithm.run.arena, algorithm.masks.state[algorithm.run.arena.mask]
    on_host = [arena.weight, arena.mask, *(value for value in state.values() if value.dim())]
    assert len(on_host) > 4
    with Touched(on_host) as touched:
        algorithm.outer(batch)
        with algorithm.run.frozen_masks():
            algorithm.inner(batch)
        algorithm.run.model(algorithm.run.images.at(batch.index))
        algorithm.run.model.plain(algorithm.run.images.at(batch.index))
    assert touched.names == {"aten::_to_copy", "aten::copy_"}


def test_it_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_PAUSE", 0)
    file = tmp_path / "run.safetensors"
    expected = run(network(), **OFFLOAD)

    def stop(epoch, model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(network(), **OFFLOAD, checkpoint=file, on_epoch=stop)
    assert_equal(run(network(), **OFFLOAD, checkpoint=file, resume=True), expected)


def test_who_measures_can_call_copy_and_save():
    seen = []

    def measure(epoch, model):
        pixels = images()[0][:3]
        twin = copy.deepcopy(model)
        seen.extend(each(pixels).detach() for each in (model, twin))
        seen.extend(value.clone() for value in (*model.state_dict().values(), *twin.state_dict().values()))

    found = []
    for options in (LEAN, OFFLOAD):
        run(network(), on_epoch=measure, **options)
        found.append(list(seen))
        seen.clear()
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def test_recorded_steps_copy(monkeypatch):
    how = {**OFFLOAD, "epochs": 1, "inner_steps": 5, "outer_steps": 5, "state_bits": 8}
    model = TwoHeads()
    eager = run(model, **how)
    monkeypatch.setattr(_graphs, "why_not", lambda device: None)
    monkeypatch.setattr(_graphs, "record", record)
    recorded = run(model, **how)
    assert set(recorded.execution.values()) == {"CUDA graph"}
    assert_equal(recorded, eager)


def test_what_it_takes_is_said():
    for name in ("offload", "shard"):
        for options in ({}, {"step_in_backward": True}, {"remake_weights": True}):
            expected = rf"^awm: {name}=True takes step_in_backward=True and remake_weights=True$"
            with pytest.raises(ValueError, match=expected):
                run(network(), **{name: True}, **options)
    with pytest.raises(ValueError, match=r"^awm: offload=True and shard=True exclude each other$"):
        run(network(), shard=True, **OFFLOAD)
    with pytest.raises(ValueError, match=r"^awm: shard=True is for several processes, and this is one$"):
        run(network(), shard=True, **LEAN)
    with pytest.raises(TypeError, match="swm: no option offload"):
        swm(network(), images(), offload=True)
