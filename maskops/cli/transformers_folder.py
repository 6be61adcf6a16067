"""Image classifiers of transformers from a folder that somebody else made: nothing is fetched, and no code in it runs.

Only ``config.json`` and ``preprocessor_config.json`` are read, as plain JSON, and ``model.safetensors``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from maskops._text import one_line
from maskops.checkpoint import load_state_dict

_PREFIX = "transformers:"
WEIGHTS = "model.safetensors"
_MOST = 1 << 24
_NAMED = 4
_PROBLEMS = {"missing_keys": "lacks", "unexpected_keys": "has besides"}
_REFUSED = ("quantization_config", "backbone", "backbone_config", "use_timm_backbone", "use_pretrained_backbone")
"""What would make transformers fetch something, or compute otherwise than its layers say."""
_IGNORED = (
    *("auto_map", "attn_implementation", "experts_implementation", "per_layer_config", "name_or_path"),
    *("dtype", "torch_dtype", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
)
"""What names code, chooses among implementations, or changes what comes out; and all that begins with ``_``."""


def named(arch: str) -> Path | None:
    """The folder in ``transformers:FOLDER``; None for other architectures, also for ``transformers:callable``."""
    if not arch.startswith(_PREFIX):
        return None
    text = arch.removeprefix(_PREFIX)
    return None if text.isidentifier() and not Path(text).is_dir() else Path(text)


class Limits(NamedTuple):
    """What a config may ask for, as transformers makes dicts and modules of it without looking at any weights."""

    tensors: int
    numbers: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Limits:
        """More than such weights need, and more than small ones do, where it costs nothing."""
        numbers = sum(tensor.numel() for tensor in weights.values())
        return cls(max(len(weights), _FEW.tensors), max(numbers, _FEW.numbers))

    @property
    def modules(self) -> int:
        return 16 * self.tensors + 1000

    def check(self, file: Path, content: Any, name: str = "") -> None:
        """errors: ValueError, one line that names the file and the entry"""
        if isinstance(content, Mapping):
            for each, value in content.items():
                self.check(file, value, each)
        elif isinstance(content, list):
            most = max(self.tensors, _LONGEST)
            if len(content) > most:
                raise ValueError(f"{file}: {one_line(name)} must have at most {most} values; got {len(content)}")
            for value in content:
                self.check(file, value, name)
        elif isinstance(content, int):
            most = self.tensors if _LAYERS & set(name.split("_")) else self.numbers
            if abs(content) > most:
                raise ValueError(f"{file}: {one_line(name)} must be at most {most}; got {one_line(str(content))}")


_FEW = Limits(64, 1 << 16)
_WITHOUT_WEIGHTS = Limits(4096, 10**6)
_LONGEST = 1024
_LAYERS = frozenset(("layer", "layers", "depth", "depths", "blocks", "stages", "repeats"))
"""Words in the names of entries that say how many layers there are."""


def build(folder: Path) -> nn.Module:
    """The image classifier that config.json describes, in transformers' own code, with random weights.

    errors: ValueError, one line that names the file; ImportError without transformers
    """
    file = folder / "config.json"
    return make(file, _config(file), _WITHOUT_WEIGHTS)


def _config(file: Path) -> dict[str, Any]:
    content = read_json(file)
    refused = sorted({name for name, value in _entries(content) if name in _REFUSED and value})
    if refused:
        raise ValueError(f"{file}: models with {', '.join(refused)} are not read")
    return content


def make(file: Path, content: Mapping[str, Any], limits: Limits) -> nn.Module:
    """The image classifier that the content of a config.json describes."""
    try:
        from transformers import CONFIG_MAPPING, AutoModelForImageClassification
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    except ImportError as error:
        raise ImportError(f"{_PREFIX}{file.parent} needs transformers: pip install maskops[models]") from error
    kind = content.get("model_type")
    known = isinstance(kind, str) and kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if not known or kind == "timm_wrapper":
        raise ValueError(f"{file}: model_type must be an image classifier of transformers; got {one_line(repr(kind))}")
    wanted = _without_ignored(content)
    limits.check(file, wanted)
    try:
        with _at_most(limits.modules):
            config = CONFIG_MAPPING[kind](**wanted)
            return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # of values that make no sense anything may come
        raise ValueError(f"{file}: transformers can't make this model ({one_line(error)})") from None


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Within, making more modules than that is a ValueError, whatever the config calls their number."""
    made = itertools.count(1)

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if next(made) > modules:
            raise ValueError(f"it has more than {modules} modules")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def load(folder: Path, weights: str) -> nn.Module:
    """The image classifier with weights, by the names they have in files or in a state dict.

    errors: as build, and CheckpointError; ValueError, one line, for weights that aren't the model's
    """
    file = folder / "config.json"
    content = _config(file)
    found = load_state_dict(weights)
    with torch.device("meta"):  # what a config asks for is allocated only where the weights are as large
        described = make(file, content, Limits.of(found))
    needed = sum(parameter.numel() for parameter in described.parameters())
    held = sum(tensor.numel() for tensor in found.values())
    if needed > held:
        raise ValueError(f"{weights} holds {held} numbers, fewer than the {needed} of the model in {folder}")
    with _silent():
        try:
            model, told = type(described).from_pretrained(
                None, config=described.config, state_dict=found, output_loading_info=True, local_files_only=True
            )
        except Exception as error:  # of weights that don't fit anything may come
            raise ValueError(f"{weights} doesn't fit the model in {folder} ({one_line(error)})") from None
    missing = [
        f"it {how} {', '.join(sorted(told[kind])[:_NAMED])}" for kind, how in _PROBLEMS.items() if told.get(kind)
    ]
    if missing:
        raise ValueError(f"{weights} doesn't fit the model in {folder}: {one_line('; '.join(missing))}")
    return model.float()


@contextmanager
def _silent() -> Iterator[None]:
    """Within, transformers shows no progress and no tables of its own."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size."""
    try:
        with open(file, "rb") as opened:
            text = opened.read(_MOST + 1)
        if len(text) > _MOST:
            raise ValueError(f"it has more than {_MOST} bytes")
        content = json.loads(text)
        _entries(content)  # what is nested too deeply for this is refused here
        if not isinstance(content, dict):
            raise ValueError(f"it must hold an object; got {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} can't be read ({one_line(error)})") from None
    return content


def _entries(content: Any) -> list[tuple[str, Any]]:
    """All names in an object, and in those within, with their values."""
    if isinstance(content, list):
        return [entry for each in content for entry in _entries(each)]
    if not isinstance(content, dict):
        return []
    return [*content.items(), *(entry for value in content.values() for entry in _entries(value))]


def _without_ignored(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    kept = {name: value for name, value in content.items() if name not in _IGNORED and not name.startswith("_")}
    return {name: _without_ignored(value) for name, value in kept.items()}
