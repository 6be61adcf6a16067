"""What the README and the docs say is so: their code runs, and prints what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
on_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@on_each_document
def test_the_code_blocks_run_one_after_the_other(document, capsys):
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(document), "exec"), names)
    promised = [line.rpartition("# ")[2] for line in "\n".join(blocks).splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == promised


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@on_each_document
def test_linked_files_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (document.parent / target).exists(), target
