"""Hook of the site: files of the repository that pages link to become pages of the site too."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^()\s#]+)")
CODE = re.compile(r"(^(`{3,}).*?^\2$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
ASIDE = "---\nsearch:\n  exclude: true\n---\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what that links to."""
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        home = _home(file.src_uri)
        for link in _links((ROOT / home).read_text(encoding="utf-8")) if home.endswith(".md") else []:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(home), link))
            if path.startswith("docs/") or files.get_file_from_path(_place(path)):
                continue
            if not (ROOT / path).is_file():
                raise PluginError(f"{home}: {link} names no file of the repository")
            files.append(_file(path, config))
            waiting.append(files.get_file_from_path(_place(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    source = page.file.src_uri
    home = _home(source)
    if not home.endswith(".md"):
        return markdown

    def turned(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(home), link[0]))
        return posixpath.relpath(_place(path), posixpath.dirname(source) or ".")

    parts = CODE.split(markdown)
    # of each piece of code there are two: the code, and the fence that it begins with
    return "".join(LINK.sub(turned, part) if at % 3 == 0 else part for at, part in enumerate(parts) if at % 3 < 2)


def _links(text: str) -> list[str]:
    return LINK.findall(CODE.sub("", text))


def _place(path: str) -> str:
    """Where a file of the repository is among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    is_data = Path(path).suffix in (".csv", ".png", ".svg")
    return f"repository/{path}" + ("" if is_data else ".md")


def _home(source: str) -> str:
    """The file of the repository that one of the site's sources is."""
    if not source.startswith("repository/"):
        return f"docs/{source}"
    return source.removeprefix("repository/").removesuffix(".md")


def _file(path: str, config: MkDocsConfig) -> File:
    place = _place(path)
    if not place.endswith(".md"):
        return File.generated(config, place, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".md"):
        language = {".py": "python", ".cu": "cuda"}.get(Path(path).suffix, "cpp")
        text = f"# {path}\n\n`````{language}\n{text}`````\n"
    return File.generated(config, place, content=ASIDE + text)
