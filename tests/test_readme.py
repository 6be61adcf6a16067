"""What the README and the docs say is so: their code runs, and prints what they say."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_CODE = {"choose.md", "reference.md", "reproduce.md"}
"""Pages with no Python to run."""
BLOCK = re.compile(r"(?:^<!-- needs: (\w+) -->\n)?^```(py.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(document):
    """The (code, needed package) of each Python block; a comment before it says which package it needs, if any."""
    for package, info, code in BLOCK.findall(document.read_text(encoding="utf-8")):
        assert info == "python", f"{document.name}: a block of Python begins with ```python; got ```{info}"
        yield code, package or None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_code_blocks_run_one_after_the_other(document, capsys):
    found = list(blocks(document))
    assert bool(found) != (document.name in WITHOUT_CODE), f"{document.name}: either Python blocks, or in WITHOUT_CODE"
    names, promised, missing = {}, [], set()
    for code, package in found:
        if package is not None and find_spec(package) is None:
            missing.add(package)
            continue
        exec(compile(code, str(document), "exec"), names)
        promised += [line.rpartition("# ")[2] for line in code.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == promised
    if missing:
        pytest.skip(f"not installed, and so not run: the blocks that need {', '.join(missing)}")


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
