"""The pages hang together: links and anchors point at something, and every page can be found."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

import maskops
from benchmarks import figures, moved
from benchmarks.kernels import table
from maskops import augment, backdoor
from maskops.purify.methods import METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
SITE = ROOT / "mkdocs.yml"
LINK = re.compile(r"\]\(([^()\s]*)\)")


def prose(document):
    """The text without code, in which brackets are no links and # is no heading."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(document):
    """What the headings of a page are called in links, as GitHub and the site's slugify name them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = (LINK.sub("]", heading) for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE))
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_point_at_something(document):
    for link in LINK.findall(prose(document)):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        assert path.is_file() and path.is_relative_to(ROOT), f"{document.name}: {link} names no file of the repository"
        if anchor:
            assert anchor in anchors(path), f"{document.name}: {path.name} has no heading for #{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_two_headings_of_a_page_have_one_anchor(document):
    assert len(set(anchors(document))) == len(anchors(document))


def test_every_page_is_in_the_navigation():
    _, _, navigation = SITE.read_text(encoding="utf-8").partition("\nnav:\n")
    listed = re.findall(r"^ +- .*?(\w+\.md)$", navigation, re.MULTILINE)
    missing = {page.name for page in PAGES} - set(listed)
    assert not missing, f"add to nav: in mkdocs.yml: {', '.join(sorted(missing))}"
    unknown = set(listed) - {page.name for page in PAGES}
    assert not unknown, f"nav: in mkdocs.yml names pages that docs/ lacks: {', '.join(sorted(unknown))}"
    assert len(listed) == len(set(listed))


def test_the_index_leads_to_every_page():
    linked = {link.partition("#")[0] for link in LINK.findall(prose(DOCS / "index.md"))}
    missing = {page.name for page in PAGES} - {"index.md"} - linked
    assert not missing, f"docs/index.md has no link to {', '.join(sorted(missing))}"


def test_the_reference_has_every_public_module_and_method():
    """A method's function has the name of its module, which stands before it where the package is looked through."""
    listed = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    functions = {f"{method.run.__module__}.{name}" for name, method in METHODS.items()}
    packages = {module.__name__ for module in (maskops, maskops.functional, maskops.purify, augment, backdoor)}
    assert functions | packages <= set(listed)
    assert {"maskops.checkpoint", "maskops.data", "maskops.lean", "maskops.models", "maskops.report"} <= set(listed)


def test_what_choose_says_of_recorded_runs_is_recorded():
    """ACC / asr_all by attack, number of images and method, in the order of the page's columns."""
    presets = {"awm": "official", "ibau": "official", "ft": "paper", "nft": "paper", "anp": "paper"}
    attacks = {"BadNets": "badnets", "Trojan square": "trojan_sq", "l2-inv": "l2_inv"}
    recorded = {}
    for name in ("awm1", "awm2"):
        with (ROOT / f"benchmarks/results/tables/{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["preset"] == presets.get(row["method"]) or (name, row["method"]) == ("awm2", "awm"):
                    numbers = f"{float(row['acc']):.1f} / {float(row['asr_all']):.1f}"
                    recorded[row["attack"], row["n"], row["method"]] = numbers
    rows = [line.strip("| \n").split(" | ") for line in (DOCS / "choose.md").read_text(encoding="utf-8").splitlines()]
    said = {
        (attacks[row[0]], row[1], method): cell.strip("*")
        for row in rows
        if row[0] in attacks
        for method, cell in zip(presets, row[2:], strict=True)
    }
    assert len(said) == 75 and said.items() <= recorded.items()


@pytest.mark.parametrize("name", figures.SOURCES)
def test_pictures_are_of_the_recorded_results(name):
    drawn = (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert figures.of(figures.SOURCES[name]) in drawn, "run python -m benchmarks figures"
    assert "prefers-color-scheme: dark" in drawn


def test_pictures_name_what_they_show():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    registers, ops = figures.registers(table.read()).axes[0], figures.bytes_of_ops(moved.read()).axes[0]
    labels = {label.get_text() for label in registers.get_yticklabels()}
    assert labels == {kernel.removeprefix("_") for kernel in table.kernel_names()}
    assert registers.get_xlabel().endswith("none is spilled")
    assert [label.get_text() for label in ops.get_yticklabels()] == [row.op for row in moved.read()]


def test_a_kernel_that_spills_is_called_so():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [replace(row, stack="8") if row.kernel == "mask_step._adam" else row for row in table.read()]
    axis = figures.registers(rows).axes[0]
    assert "mask_step._adam (spills)" in {label.get_text() for label in axis.get_yticklabels()}
    assert axis.get_xlabel().endswith("spilled by 1")
