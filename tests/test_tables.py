"""The papers' tables: their figures, the choice of a part, what is refused, and one small part from end to end."""

import csv

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.tables import FOLDER, cells, record, work
from maskops.backdoor.attacks import ATTACKS

QUICK = ["--set", "awm.epochs=1", "awm.inner_steps=1", "awm.outer_steps=1", "anp.epochs=1", "anp.steps=1"]


@pytest.fixture
def images(tmp_path):
    """Files with a few random images, enough to train a network badly."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 48), ("eval", 60)):
        x = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(count) % 10)
    return ["--train", f"{tmp_path}/train.npz", "--eval", f"{tmp_path}/eval.npz", "--train-epochs", "1"]


def run(tmp_path, *extra):
    return main(["tables", "--device", "cpu", "--out", str(tmp_path / "out"), *extra])


@pytest.mark.parametrize("table", [table for table in cells.TABLES if table not in ("digits", "precision")])
def test_every_table_has_figures_of_methods_and_attacks_that_exist(table):
    paper = cells.figures(table)
    assert paper
    for (_, attack, n, method), (acc, asr) in paper.items():
        assert attack.partition(":")[0] in ATTACKS and (n == "one-shot" or n == "" or int(n) > 0)
        assert 0 <= acc <= 100 and 0 <= asr <= 100
        if method == "none":
            assert n == ""
        else:
            algorithm, preset, changes = cells.settings(method)
            assert cells.METHODS[algorithm].presets[preset].options
            assert work.passes(cells.Cell(table, "small_vgg", attack, n, method, 0, preset, changes, "")) > 0


def test_figures_are_the_papers():
    assert cells.figures("awm1")["small_vgg", "badnets", "500", "awm"] == (78.20, 11.93)
    assert cells.figures("awm1")["resnet18", "l2_inv", "50", "ibau"] == (63.21, 93.46)
    assert cells.figures("awm4")["small_vgg", "l2_inv", "one-shot", "swm"] == (70.82, 19.17)
    assert cells.figures("awm5")["resnet18", "l0_inv", "200", "awm:no_clip"] == (80.17, 46.85)
    assert cells.figures("awm9")["small_vgg", "trojan_sq_all", "100", "awm:layer_6"] == (97.37, 60.19)
    assert cells.figures("anp1")["resnet18", "iab_all", "500", "mcr"] == (84.53, 35.17)
    assert cells.figures("anp3")["resnet18", "blend", "500", "anp:epsilon_0.4_steps_10"] == (94.28, 31.34)
    assert cells.figures("nft7")["resnet18", "sig", "500", "nft:adversarial"] == (71.22, 4.15)
    assert cells.figures("nft15")["vit_s", "lira", "500", "nft"] == (93.26, 1.98)


def test_a_part_runs_trains_resumes_and_is_written(tmp_path, images, capsys):
    part = ["--table", "awm4", "--net", "small_vgg", "--attack", "badnets", "--n", "12", *QUICK, *images]
    assert run(tmp_path, *part, "--method", "awm", "anp", "--seed", "0", "1", "--hours", "100") == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "out" / "awm4.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [("awm", "0"), ("awm", "1"), ("anp", "0"), ("anp", "1")]
    assert all(0 <= float(row["acc"]) <= 100 and row["changes"] for row in rows)
    assert list(rows[0]) == list(record.COLUMNS)
    assert printed.strip() == (tmp_path / "out" / "awm4.md").read_text().strip()
    assert printed.count("±") >= 2 and "| small_vgg | badnets |" in printed
    # what is there isn't run again, so no estimate either
    assert run(tmp_path, *part, "--method", "awm", "anp", "--seed", "0", "1", "--hours", "0") == 0
    assert (tmp_path / "out" / "awm4.csv").read_text().count("\n") == 5
    # a network that was trained otherwise is another
    assert run(tmp_path, *part[:-1], "2", "--method", "awm", "--hours", "100") == 0
    assert (tmp_path / "out" / "awm4.csv").read_text().count("\n") == 6


def test_figures_of_another_network_carry_its_name():
    paper = cells.figures("awm2")
    assert cells.figure(paper, "resnet18", "badnets", "one-shot", "awm") == "76.46 / 8.98"
    assert cells.figure(paper, "small_vgg", "badnets", "one-shot", "awm") == "76.46 / 8.98 (resnet18)"
    assert cells.figure(paper, "small_vgg", "badnets", "17", "awm") == ""


def test_what_takes_too_long_is_refused_with_the_estimate(tmp_path, images, capsys):
    assert run(tmp_path, "--table", "awm1", "--net", "small_vgg", "--attack", "badnets", *images) == 2
    error = capsys.readouterr().err
    assert "runs, about" in error and "more than --hours 1" in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--table", "awm1"], "isn't published: give --train and --eval"),
        (["--table", "nft15"], "no architecture vgg16 here; there are small_vgg"),
        (["--table", "awm1", "--method", "foo"], "unknown methods: foo"),
        (["--table", "awm1", "--set", "awm=3"], "expected METHOD.OPTION=VALUE; got 'awm'"),
        (["--table", "awm1", "--set", "anpp.epochs=3"], "unknown method anpp"),
        (["--table", "awm1", "--set", "anp.epoch=3"], "anp: no option epoch; there are alpha"),
        (["--table", "awm1", "--set", "awm.tau='big'"], "awm: tau must be a number"),
        (["--table", "awm1", "--preset", "anp=best"], "anp: preset must be one of paper, official; got 'best'"),
        (["--table", "awm1", "--n", "0"], "--n takes whole numbers above 0 and one-shot; got 0"),
        (["--table", "awm4", "--net", "small_vgg", "--attack", "badnets"], "awm4 has no such part"),
        (["--table", "awm10", "--attack", "several:any"], "no attack several:any"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, capsys, extra, words):
    assert run(tmp_path, *extra) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks tables: ") and error.count("\n") == 1 and words in error


def test_recorded_tables_are_those_of_their_rows(tmp_path):
    for path in sorted(FOLDER.glob("*.csv")):
        (tmp_path / path.name).write_text(path.read_text())
        assert record.markdown(tmp_path, path.stem) == path.with_suffix(".md").read_text()


def test_passes_follow_the_options():
    def cell(method, n, **changes):
        return cells.Cell("awm1", "small_vgg", "badnets", n, method, 0, "paper", changes, "published")

    assert work.passes(cell("awm", "500", epochs=2)) == 2 * 30
    assert work.passes(cell("anp", "500", epochs=2, steps=5, noise_steps=2)) == 2 * 5 * 4
    assert work.passes(cell("nft", "64", epochs=3)) == 3 * 64 / 128
    assert work.passes(cell("awm", "one-shot", batch_size=16, epochs=1)) == 30 * 16 / 128
