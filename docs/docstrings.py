"""Griffe extension of the site: docstrings in the project's style become Markdown."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [f"maskops{name}" for name in ("", ".augment", ".backdoor", ".functional", ".purify", ".purify.baselines")]
FIELD = re.compile(r"(\*{0,2}[a-z]\w*(?:, \*{0,2}[a-z]\w*)*|all else): +(.*)")
MARKS = re.compile(r"[*_\[\]<|]")
ROLE = re.compile(r":(?:class|func|meth|data|attr):`~?([\w.]+)`")


def _public() -> dict[str, str]:
    """The full name of what each public name was imported from."""
    found = {}
    for package in PACKAGES:
        tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                found |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


class Docstrings(griffe.Extension):
    """What an object is described by: paragraphs, lists of ``name: text``, formulas, tables and examples."""

    def __init__(self) -> None:
        self._public = _public()

    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            paragraphs = re.split(r"\n{2,}", obj.docstring.value)
            obj.docstring.value = "\n\n".join(map(self._markdown, self._whole(paragraphs)))

    def _whole(self, paragraphs: list[str]) -> list[str]:
        """Examples in one piece."""
        for at, paragraph in enumerate(paragraphs):
            if paragraph.startswith(">>>"):
                return [*paragraphs[:at], "\n\n".join(paragraphs[at:])]
        return paragraphs

    def _markdown(self, paragraph: str) -> str:
        lines = paragraph.splitlines()
        if paragraph.startswith(">>>"):
            return f"```pycon\n{paragraph}\n```"
        if paragraph.startswith("===="):
            return f"```text\n{paragraph}\n```"
        if paragraph.startswith("    "):
            return paragraph
        if all(line.startswith(" ") or FIELD.fullmatch(line) for line in lines):
            return self._fields(lines)
        return self._inline(paragraph)

    def _fields(self, lines: list[str]) -> str:
        fields: list[list[str]] = []
        for line in lines:
            field = FIELD.fullmatch(line)
            if field:
                fields.append([field[1], field[2]])
            else:
                fields[-1][1] += f" {line.strip()}"
        return "\n\n".join(f"{self._inline(name)}\n:   {self._inline(text)}" for name, text in fields)

    def _inline(self, text: str) -> str:
        """Markdown's own characters have no meaning outside of code."""
        parts = re.split(r"(:\w+:`[^`]+`|``.+?``)", text, flags=re.DOTALL)
        return "".join(self._code(part) if at % 2 else MARKS.sub(r"\\\g<0>", part) for at, part in enumerate(parts))

    def _code(self, code: str) -> str:
        role = ROLE.fullmatch(code)
        if role is None:
            return code
        short = role[1].rpartition(".")[2]
        name = self._public.get(short, role[1])
        return f'<autoref identifier="{name}" optional><code>{short}</code></autoref>'
