"""Reading models from strangers without running their code, and writing masks and models so that no half file is left.

A model file is hostile until proven otherwise: ``torch.load(weights_only=True)`` or safetensors, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from maskops import _scan
from maskops._text import one_line, printable
from maskops.functional import mask_to_bytes

NESTINGS = ("net", "state_dict", "model", "model_state_dict", "netC")
TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin")
MASK_FORMAT = RUN_FORMAT = 1
_LONGEST_NAME = 1000


class CheckpointError(ValueError):
    """A model or mask file that cannot be read, is refused, or cannot be written."""


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a model file, flat, on the CPU; nothing in the file is executed.

    path:    a safetensors file (by its suffix) or what ``torch.save`` wrote: a dict of tensors, alone or beside other
             things under ``net``, ``state_dict``, ``model``, ``model_state_dict`` or ``netC``, or one in another
    returns: name -> tensor; a prefix that nn.DataParallel or torch.compile put before every name is taken off
    errors:  CheckpointError, one line with the reason and what to do

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"net": {"module.fc.weight": torch.ones(2)}, "epoch": 7}, f"{folder}/model.pth")
    ...     load_state_dict(f"{folder}/model.pth")
    {'fc.weight': tensor([1., 1.])}
    """
    path = _existing_file("load_state_dict", path)
    if path.suffix == ".safetensors":
        state_dict, _ = _read_safetensors("load_state_dict", path)
    else:
        state_dict = _unwrap(path, _read_torch(path))
    if not state_dict:
        raise CheckpointError(f"load_state_dict: {path} holds no tensors")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = f"{one_line(repr(key))}: {type(value).__name__}"
            raise CheckpointError(f"load_state_dict: {path}: the state dict must hold names and tensors; got {found}")
    plain = {key: _plain("load_state_dict", path, key, value) for key, value in state_dict.items()}
    return _without_wrapper_prefix(plain)


def save_state_dict(path: str | os.PathLike, state_dict: Mapping[str, Tensor]) -> None:
    """Write a state dict atomically: safetensors for ``.safetensors``, else ``torch.save`` of a plain dict of tensors.

    path:   ends in .safetensors, .pth, .pt, .th or .bin; an old file stays as it was until the new one is complete
    errors: CheckpointError for the path and what happens while writing, TypeError for entries that are not tensors

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state_dict(f"{folder}/model.safetensors", torch.nn.Linear(2, 1).state_dict())
    ...     sorted(load_state_dict(f"{folder}/model.safetensors"))
    ['bias', 'weight']
    """
    path = _with_suffix("save_state_dict", path, (".safetensors", *TORCH_SUFFIXES))
    tensors = _plain_tensors("save_state_dict", state_dict)
    if path.suffix == ".safetensors":
        _write_safetensors("save_state_dict", path, tensors, metadata={"format": "pt"})
    else:
        _write_atomically("save_state_dict", path, lambda temporary: torch.save(tensors, temporary))


def save_masks(
    path: str | os.PathLike,
    masks: Mapping[str, Tensor],
    options: Mapping[str, object],
    dtype: torch.dtype | None = None,
) -> None:
    """Write masks, and the options of the run that learned them, to one safetensors file, atomically.

    path:    ends in .safetensors
    masks:   name -> tensor of any shape and layout; stored contiguous, each with its own memory
    options: str -> what JSON can represent without change; stored as JSON in the metadata entry "maskops"
    dtype:   None for the masks' own; torch.uint8 for a byte an entry: steps of 1/255, to the nearest of which masks are
             rounded, and which 0 and 1 are
    errors:  CheckpointError for the path and what happens while writing, TypeError for a mask that is no tensor, an
             option that JSON would change or refuse (tuples, NaN, paths, dtypes, …) and another dtype, ValueError for
             masks outside of [0, 1] that are to be bytes

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks(f"{folder}/masks.safetensors", {"conv1.mask": torch.ones(2)}, {"method": "awm", "alpha": 0.9})
    ...     load_masks(f"{folder}/masks.safetensors")
    ({'conv1.mask': tensor([1., 1.])}, {'method': 'awm', 'alpha': 0.9})
    """
    if dtype not in (None, torch.uint8):
        raise TypeError(f"save_masks: dtype must be None or torch.uint8; got {dtype}")
    metadata = {"maskops": _options_json(options), "maskops_format": str(MASK_FORMAT)}
    if dtype is not None:
        masks = {name: mask_to_bytes(mask) if isinstance(mask, Tensor) else mask for name, mask in masks.items()}
    _write_described("save_masks", path, masks, metadata)


def load_masks(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The masks and the options that ``save_masks`` wrote.

    returns: (name -> tensor on the CPU, of bytes if it was saved so; the run's options). A model that :func:`mask_` has
             masked takes either: ``model.load_state_dict(masks, strict=False)``
    errors:  CheckpointError, one line, also for a safetensors file that is no mask file
    """
    return _read_described("load_masks", path, "mask", "maskops", MASK_FORMAT)


def save_run(path: str | os.PathLike, tensors: Mapping[str, Tensor], notes: Mapping[str, object]) -> None:
    """Write the state of a run under way to one safetensors file, atomically; as ``save_masks``."""
    metadata = {"maskops_run": json.dumps(dict(notes), allow_nan=False), "maskops_run_format": str(RUN_FORMAT)}
    _write_described("save_run", path, tensors, metadata)


def load_run(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the notes that ``save_run`` wrote; as ``load_masks``."""
    return _read_described("load_run", path, "run", "maskops_run", RUN_FORMAT)


def _write_described(
    function: str, path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    path = _with_suffix(function, path, (".safetensors",))
    _write_safetensors(function, path, _plain_tensors(function, tensors), metadata)


def _read_described(
    function: str, path: str | os.PathLike, kind: str, entry: str, number: int
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a file, and the JSON object in an entry of its metadata."""
    path = _existing_file(function, path)
    tensors, metadata = _read_safetensors(function, path)
    if entry not in metadata:
        raise CheckpointError(f"{function}: {path} is no {kind} file: its metadata has no entry '{entry}'")
    found = metadata.get(f"{entry}_format")
    if found != str(number):
        raise CheckpointError(f"{function}: {path} must have {kind} format {number}; it has {one_line(str(found))}")
    try:
        described = json.loads(metadata[entry])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{function}: {path}: the options are not JSON ({one_line(error)})") from None
    if not isinstance(described, dict):
        found = type(described).__name__
        raise CheckpointError(f"{function}: {path}: the options must be a JSON object; got {found}")
    return tensors, described


def _existing_file(function: str, path: str | os.PathLike) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{function}: {path} is a folder; name the file in it")
        if not path.is_file():
            raise CheckpointError(f"{function}: there is no file {path}")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{function}: {path} is empty")
    except OSError as error:
        raise CheckpointError(f"{function}: cannot read {one_line(str(path))} ({one_line(error)})") from None
    return path


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the refusal below says it in one line
            _scan.check(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the reader fail in any way
        # not chained: torch's own text advises to load again with weights_only=False
        raise CheckpointError(f"load_state_dict: {path} {_refusal(path, error)}") from None


def _refusal(path: Path, error: Exception) -> str:
    """Why ``torch.load`` stopped, and what to do."""
    advice = "refused, and nothing in it was run; ask for torch.save(model.state_dict(), …) or a .safetensors file"
    names = re.findall(r"GLOBAL (\S+)", str(error))
    if names:  # otherwise the file may be one that torch's own reader is not to be given
        with contextlib.suppress(Exception):  # not a zip file: the message names the first one only
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or names
    shown = one_line(", ".join(names[:3]))
    if any(name.startswith("torch.nn.modules.") for name in names):
        return f"holds a whole pickled nn.Module, and reading one runs code ({shown}): {advice}"
    if names:
        return f"would run code when read ({shown}): {advice}"
    if "TorchScript" in str(error):
        return f"is a TorchScript archive, which holds code: {advice}"
    if isinstance(error, pickle.UnpicklingError):
        reason = one_line(str(error).rpartition("WeightsUnpickler error: ")[2])
        return f"cannot be read as tensors alone ({reason}): {advice}"
    return f"is truncated, corrupt or no torch checkpoint ({one_line(error)})"


def _read_safetensors(function: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safetensors = _import_safetensors(function)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors, metadata = {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:
        raise CheckpointError(f"{function}: {path} is no valid safetensors file ({one_line(error)})") from None
    for name in tensors:
        _check_name(function, path, name)
    return tensors, metadata


def _check_name(function: str, path: Path, name: str) -> None:
    if name != printable(name) or len(name) > _LONGEST_NAME:
        raise CheckpointError(f"{function}: {path}: a tensor has a name that can't be shown ({one_line(name)})")


def _plain(function: str, path: Path, name: str, value: Tensor) -> Tensor:
    """The tensor without gradient and attributes, if it is one of numbers that are all there."""
    _check_name(function, path, name)
    found = None
    if type(value) not in (Tensor, Parameter):
        found = type(value).__name__
    elif value.layout is not torch.strided or value.is_nested:
        found = "a nested tensor" if value.is_nested else f"layout {value.layout}"
    elif value.is_quantized:
        found = f"quantised numbers, {value.dtype}"
    elif value.device.type != "cpu":
        found = f"device {value.device}, without numbers"
    if found is None:
        value = Tensor.detach(value)  # a parameter's own attributes, by any name, stay behind
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            found = f"shape {tuple(value.shape)} over {value.untyped_storage().nbytes()} bytes"
    if found is not None:
        raise CheckpointError(f"{function}: {path}: {name} must be a plain tensor; got {found}")
    return value


def _unwrap(path: Path, content: object) -> dict:
    """Descend through the usual nestings to the dict of tensors."""
    while True:
        if not isinstance(content, dict):
            found = type(content).__name__
            raise CheckpointError(f"load_state_dict: {path} must hold a dict of names and tensors; it holds {found}")
        # as a plain dict's: an OrderedDict from a file may have attributes of any name
        nested = [key for key in NESTINGS if _may_hold_tensors(dict.get(content, key))]
        if len(nested) > 1:
            raise CheckpointError(f"load_state_dict: {path} holds several models ({', '.join(nested)}); save one alone")
        if not nested:
            break
        content = dict.pop(content, nested[0])  # pop, not get: a dict that contains itself comes to an end
    content = dict(dict.items(content))
    if not any(isinstance(value, Tensor) for value in content.values()):
        found = one_line(", ".join(map(repr, content)) or "nothing")
        expected = f"tensors, or a dict of them under {' or '.join(NESTINGS)}"
        raise CheckpointError(f"load_state_dict: {path} holds no tensors; expected {expected}; got {found}")
    return content


def _may_hold_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, (Tensor, dict)) for entry in dict.values(value))


def _without_wrapper_prefix(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what nn.DataParallel ("module.") and torch.compile ("_orig_mod.") put before every name."""
    while prefix := re.match(r"module\.|_orig_mod\.", next(iter(state_dict))):
        if not all(name.startswith(prefix[0]) for name in state_dict):
            break
        state_dict = {name.removeprefix(prefix[0]): value for name, value in state_dict.items()}
    return state_dict


def _with_suffix(function: str, path: str | os.PathLike, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if path.suffix not in suffixes:
        raise CheckpointError(f"{function}: the file name must end in {' or '.join(suffixes)}; got {path}")
    return path


def _plain_tensors(function: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, each with its own memory: views of a larger buffer would drag it along."""
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"{function}: expected names and tensors; got {key!r}: {type(value).__name__}")
    if not tensors:
        raise ValueError(f"{function}: expected at least one tensor; got none")
    return {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }


def _options_json(options: Mapping[str, object]) -> str:
    for name, value in options.items():
        try:
            # equality finds what json would change without a word: tuples, keys that are no strings
            representable = isinstance(name, str) and json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            representable = False
        if not representable:
            found = one_line(repr(value))
            raise TypeError(f"save_masks: option {name!r} must be what JSON can represent; got {found}")
    return json.dumps(dict(options))


def _write_safetensors(function: str, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file = _import_safetensors(function).torch.save_file
    _write_atomically(function, path, lambda temporary: save_file(tensors, temporary, metadata))


def _write_atomically(function: str, path: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary file beside ``path``, force it to the disk, rename it: the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors leaves its files to their owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{function}: cannot write {path} ({reason}); what was there is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _import_safetensors(function: str):
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{function}: .safetensors files need safetensors: pip install safetensors") from error
    return safetensors
