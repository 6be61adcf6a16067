"""Options from a file: JSON or YAML, by the names they have on the command line, which wins.

Such a file is as hostile as any: of bounded size, without YAML's aliases, nothing in it but plain values, and no
architecture that would be imported and called.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from maskops._text import one_line, printable
from maskops.cli import transformers_folder
from maskops.cli.options import arch_options

_MOST = {".json": 1 << 24, ".yaml": 1 << 16, ".yml": 1 << 16}
"""How many bytes a file may have: reading YAML takes a thousand times as long."""

_DEEPEST = 16

_LEFT_OUT = ("options", "help")
_OF_A_RESULT = ("options", "inputs", "versions")
_NOT_GIVEN = ("clean_images", "folded", "taken_from", "device")
"""What a result.json says beside what can be given; and where that run was, which need not be here."""


class OptionFile(NamedTuple):
    """A file's name, and option -> value, as they are in it; empty without a file."""

    path: Path | None = None
    values: Mapping[str, Any] = {}


def add_argument(parser: argparse.ArgumentParser) -> None:
    text = "JSON or YAML of options by name (a result.json repeats its run); what the command line says wins"
    parser.add_argument("--options", type=Path, metavar="FILE", help=text)


def given(argv: Sequence[str]) -> OptionFile:
    """The file that a command line names, read.

    errors: ValueError, ImportError: one line that begins with the file's name
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--options", nargs="?", type=Path)
    path = parser.parse_known_args(list(argv))[0].options
    return OptionFile() if path is None else OptionFile(path, _plain_names(path, _read(path)))


def apply(parser: argparse.ArgumentParser, file: OptionFile, argv: Sequence[str]) -> None:
    """Have the parser's options begin at the file's values; those without which it can't do are no longer asked for.

    errors: ValueError, one line that names the file, for unknown names and for values of another kind
    """
    known = {action.dest: action for action in parser._actions if action.dest not in _LEFT_OUT}
    values = dict(file.values)
    unknown = [name for name in values if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]}?" if near else f" (see {parser.prog} --help)"
        raise ValueError(f"{file.path}: there is no option {one_line(', '.join(unknown))}{hint}")
    if _would_run_code(values.get("arch")) and not _is_in(argv, known["arch"]):
        reason = "would be imported and called, which a file can't ask for: give --arch too"
        raise ValueError(f"{file.path}: arch: {one_line(values['arch'])} {reason}")
    for group in parser._mutually_exclusive_groups:
        here = [action.dest for action in group._group_actions if _is_given(values, action.dest)]
        if any(_is_in(argv, action) for action in group._group_actions):
            values = {name: value for name, value in values.items() if name not in here}
        elif len(here) > 1:
            raise ValueError(f"{file.path}: {' and '.join(here)} can't be given together")
    defaults = {}
    for name, value in values.items():
        if value is None and not getattr(known[name], "nullable", False):
            continue  # as if it weren't there
        try:
            defaults[name] = None if value is None else _value(known[name], value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            found = one_line(repr(value))
            reason = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"it can't be {found}"
            raise ValueError(f"{file.path}: {name}: {printable(reason)}") from None
        known[name].required = False
    parser.set_defaults(**defaults)


def _would_run_code(arch: Any) -> bool:
    return isinstance(arch, str) and ":" in arch and transformers_folder.named(arch) is None


def _is_given(values: Mapping[str, Any], name: str) -> bool:
    return values.get(name) is not None and values[name] is not False


def _is_in(argv: Sequence[str], action: argparse.Action) -> bool:
    return any(text.split("=")[0] in action.option_strings for text in argv)


def _value(action: argparse.Action, value: Any) -> Any:
    """The value as the command line would read it."""
    several = "," in (action.metavar or "")
    parts = value if several and isinstance(value, list) else [value]
    if action.nargs == 0:
        found = value if isinstance(value, bool) else _refuse("true or false", value)
    elif action.type is arch_options and isinstance(value, dict):
        found = value
    elif not (several or getattr(action.type, "__name__", None) in ("int", "float")) and not isinstance(value, str):
        _refuse("text", value)
    elif not all(isinstance(part, (str, int, float)) and not isinstance(part, bool) for part in parts):
        _refuse("numbers or text" if several else "a number", value)
    elif several and not parts:
        found = []
    else:
        text = ",".join(map(str, parts))
        found = text if action.type is None else action.type(text)
    if action.choices is not None and found not in action.choices:
        _refuse(f"one of {', '.join(action.choices)}", value)
    return found


def _refuse(expected: str, value: Any) -> NoReturn:
    raise argparse.ArgumentTypeError(f"it must be {expected}; got {one_line(repr(value))}")


def _plain_names(path: Path, content: Any) -> dict[str, Any]:
    """The options with the names of their fields, out of a result.json too."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it must hold options by name; got {type(content).__name__}")
    if all(isinstance(content.get(name), dict) for name in _OF_A_RESULT):
        found = {**content["inputs"], **content["options"]}
        content = {name: value for name, value in found.items() if name not in _NOT_GIVEN}
    plain: dict[str, Any] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: names must be text; got {one_line(repr(name))}")
        field = name.removeprefix("--").replace("-", "_")
        if field in plain:
            raise ValueError(f"{path}: {one_line(name)} is there twice")
        plain[field] = value
    return plain


def _read(path: Path) -> Any:
    most = _MOST.get(path.suffix)
    if most is None:
        raise ValueError(f"{path}: a file of options must end in {', '.join(_MOST)}")
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it has more than {most} bytes")
        text = content.decode("utf-8")
        return _from_json(text) if path.suffix == ".json" else _from_yaml(text)
    except ImportError as error:
        raise ImportError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({one_line(error)})") from None


def _from_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON's")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


def _from_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("YAML needs PyYAML: pip install maskops[yaml], or write JSON") from error

    class Loader(yaml.SafeLoader):
        """Without aliases, which can make gigabytes of a few lines, and with every name once."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias (*name), which is refused")
            return super().compose_node(parent, index)

        def fetch_flow_collection_start(self, kind: type) -> None:
            if self.flow_level == _DEEPEST:  # each level makes the reader slower
                raise ValueError("it has brackets in brackets, too deep")
            super().fetch_flow_collection_start(kind)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            if len({key.value for key, _ in node.value if isinstance(key.value, str)}) < len(node.value):
                raise ValueError("a name is there twice, or is no text")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(str(error))) from None
