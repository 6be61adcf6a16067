"""The README's tables and the pictures, from recorded rows."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import groups, plots, report, results, steps

CPU = torch.device("cpu")


def rows(**changes):
    extent = results.Extent(saved=2e6, peak=3e6)
    what = "steps", "small_vgg", 4, torch.float32, "official", "inner"
    made = results.make_row(*what, (9.0, 10.0, 11.0), CPU, method="awm", extent=extent)
    return [replace(made, **changes)]


def test_report_is_made_from_the_rows(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results.write(
        rows(threads="7")
        + rows(contestant="maskops", ms_p50="4", peak_mb="0.5", threads="2")
        + rows(contestant=steps.AGAIN, ms_p50="4.4", saved_mb="", threads="2")
        + rows(contestant="compile", ms_p50="3", threads="2")
        + rows(contestant="lean", ms_p50="6", threads="2")
        + rows(contestant="floor", ms_p50="2.5", threads="2"),
        tmp_path,
    )
    assert command_line.main(["report", "--readme", str(readme), "--results", str(tmp_path), "--check"]) == 1
    assert command_line.main(["report", "--readme", str(readme), "--results", str(tmp_path)]) == 0
    text = readme.read_text()
    assert "threads 7 and 2," in text and "at revision" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| small_vgg, 4, float32 | AWM inner | 10 | 6 | 3 | **4** | 2.50 | 2.5 | 3 | 0.5 |" in text
    assert "`compile` is faster than maskops, 3 against 4 ms" in text
    assert "differs by up to 10%" in text
    assert command_line.main(["report", "--readme", str(readme), "--results", str(tmp_path), "--check"]) == 0


def test_report_says_on_how_many_ops_we_lose():
    made = []
    for phase, ours in (("a forward", "8"), ("b forward", "15")):
        made += rows(benchmark="ops", method="", phase=phase, contestant="eager")
        made += rows(benchmark="ops", method="", phase=phase, contestant="triton", ms_p50=ours)
        made += rows(benchmark="ops", method="", phase=phase, contestant="reference", ms_p50="1")
    assert "1 of 2 are slower than plain torch, at worst 1.50 times (b forward on" in report.device_report(made)


def test_report_without_results_is_empty(tmp_path):
    text = f"{report.BEGIN}\n{report.END}"
    assert report.between_marks(text, report.report(tmp_path)) == text


def test_report_needs_its_marks():
    with pytest.raises(ValueError, match="expected one <!-- benchmarks:begin -->"):
        report.between_marks("no marks", "content")


def test_readme_agrees_with_the_results():
    readme = results.ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    assert report.main(readme, results.FOLDER, check=True) == 0


def test_the_picture_is_the_same_for_the_same_rows(tmp_path):
    pytest.importorskip("matplotlib")
    made = rows() + rows(contestant="maskops", ms_p50="4", peak_mb="") + rows(contestant="compile", ms_p50="3")
    made += rows(contestant="careful", ms_p50="5") + rows(contestant="lean", ms_p50="7")
    bars = plots.bars_of(groups.measured_steps(made))
    (found,) = bars.values()
    assert [(bar.label, bar.contestant, bar.ms, bar.peak_mb) for bar in found] == [
        ("official", "official", 10.0, 3.0),
        ("best eager", "careful", 5.0, 3.0),
        ("best compiled", "compile", 3.0, 3.0),
        ("maskops", "maskops", 4.0, None),
    ]
    pictures = []
    for name in "ab":
        assert plots.write(tmp_path / f"{name}.svg", "device", bars) is None
        pictures.append((tmp_path / f"{name}.svg").read_text())
    assert pictures[0] == pictures[1] and "best eager: careful" in pictures[0] and "no number" in pictures[0]
    assert "<dc:date>" not in pictures[0]


def test_without_matplotlib_the_table_is_written_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}")
    results.write(rows() + rows(contestant="maskops"), tmp_path)
    assert report.main(readme, tmp_path) == 1
    assert "| AWM inner |" in readme.read_text()
    error = capsys.readouterr().err
    assert "the picture needs matplotlib" in error and error.count("\n") == 1


def test_each_recorded_device_has_its_picture():
    for path in results.FOLDER.glob("*.csv"):
        assert path.with_suffix(".svg").exists(), path
