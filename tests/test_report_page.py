"""report.html: one file for people, about any result, in which nothing from outside becomes markup."""

import base64
import io
import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers_report import Page, made_up, masks, metrics

from maskops import report
from maskops.checkpoint import load_masks
from maskops.demo import TRIGGER
from maskops.report import _write
from maskops.report._page import page
from maskops.report._style import STYLE

TAGS = set(
    re.findall(
        r"\w+",
        """
    html head meta title style body main header footer section h1 h2 h3 p dl dt dd div small span details summary
    table caption thead tbody tr th td figure figcaption ul li img svg g path rect circle text""",
    )
)
HOSTILE = "</td></text></title></style><script>alert(1)</script><img src=x onerror='alert(1)'>\"'&\u202e\x00"


@pytest.fixture(autouse=True)
def _without_the_picture(monkeypatch):
    """It has tests of its own, and takes a second."""
    monkeypatch.setattr(_write, "picture", lambda *arguments: None)


def read(folder, result, before=None, after=None, images=None, **given):
    """Write a result; what the page and result.json say."""
    images = torch.rand(3, 3, 8, 8) if images is None else images
    before, after = before or metrics(0.9, 1.0), after or metrics(0.85, 0.02)
    assert report.write(folder, result, before, after, images, **given) is None
    return Page((folder / "report.html").read_text(encoding="utf-8")), strict(folder / "result.json")


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def pruning(limit):
    scores = masks(per_weight=False)
    cut = {name: (score > limit).float() for name, score in scores.items()}
    options = {"method": "anp", "device": "cpu", "threshold": limit}
    return made_up(masks=cut, scores=scores, trigger=None, options=options, history={"clean loss": [0.5]})


RESULTS = {
    "weights": made_up(),
    "neurons": made_up(masks=masks(per_weight=False), options={"method": "nft", "device": "cpu"}, trigger=None),
    "pruned": pruning(0.3),
    "nothing pruned": pruning(-1.0),
    "everything pruned": pruning(1.0),
    "no masks": made_up(masks={}, trigger=None, history={"loss": [1.0]}, options={"method": "ft", "device": "cpu"}),
    "unknown": made_up(options={"device": None}, history={}, execution={}, timings={"total": 1.0, "peak_bytes": 0}),
    "many layers": made_up(masks=masks(500, per_weight=False, name="model.encoder.layers.{}.attention.output")),
    "one gray image": made_up(trigger=torch.zeros(1, 1, 300, 200)),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("measured", ["with a trigger", "without", "as nothing is of another class"])
def test_any_result_makes_a_valid_page_of_one_file(tmp_path, name, measured):
    asr = {"with a trigger": (1.0, 0.02), "without": (None, None)}.get(measured, (math.nan, math.nan))
    known = {"trigger": TRIGGER, "curves": [metrics(0.8, asr[0])]} if measured == "with a trigger" else {}
    images = torch.rand(7, 1, 300, 200) if name == "one gray image" else None
    seen, found = read(tmp_path, RESULTS[name], metrics(0.9, asr[0]), metrics(0.85, asr[1]), images, **known)
    assert {tag for tag, *_ in seen.tags} <= TAGS
    assert not re.search(r"https?:|url\(|@import|javascript:", seen.html)
    assert all(image["src"].startswith("data:image/png;base64,") and "alt" in image for image in seen.of("img"))
    assert any("default-src 'none'" in meta.get("content", "") for meta in seen.of("meta"))
    assert len(seen.html) < 600_000
    levels = [int(tag[1]) for tag, *_ in seen.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    drawn = [inside for tag, attributes, inside in seen.tags if tag == "svg" and "aria-hidden" not in attributes]
    titles = [inside for tag, _, inside in seen.tags if tag == "title" and inside[-1] == "svg"]
    assert len(titles) == len(drawn)
    assert found["after"]["acc"] == 0.85 and not re.search(r"\b(nan|inf|None)\b", seen.words)


def test_the_page_is_made_of_result_json(tmp_path):
    seen, found = read(tmp_path, made_up(trigger=None), curves=[metrics(0.8, 0.5)], notes={"warnings": ["w"]})
    learned, _ = load_masks(tmp_path / "masks.safetensors")
    assert page(found, learned, torch.rand(3, 3, 8, 8), {}) == seen.html


def test_the_summary_is_one_plain_sentence(tmp_path):
    seen, _ = read(tmp_path, made_up(), notes={"inputs": {"clean_images": 100, "target": 7}})
    assert (
        "Adversarial Weight Masking (Chai & Chen 2022) learned with 100 clean images how much to keep of each of 432 "
        "weights in 3 layers: the accuracy on clean images fell from 90.0 % to 85.0 %, and the share of images with "
        "the trigger that are taken for class 7 (asr_all) fell from 100.0 % to 2.0 %, which is below the AWM paper's "
        "limit of 15 % for a removed backdoor."
    ) in seen.words


def test_without_a_trigger_it_says_what_was_not_measured(tmp_path):
    seen, found = read(tmp_path, RESULTS["neurons"], metrics(0.9), metrics(0.9))
    assert "each of 24 neurons in 3 layers: the accuracy on clean images stayed at 90.0 %" in seen.words
    assert "what became of a backdoor was not measured, because no trigger was given" in seen.words
    assert found["der"] is None and not {"asr_all", "RA", "DER"} & set(re.findall(r"\w+", seen.words))


def test_pruned_neurons_are_named(tmp_path):
    seen, found = read(tmp_path, RESULTS["pruned"])
    scores = torch.cat(list(RESULTS["pruned"].scores.values()))
    assert found["pruned"]["largest_cut"] == scores[scores <= 0.3].max().item()
    assert found["pruned"]["smallest_kept"] == scores[scores > 0.3].min().item()
    layers = found["pruned"]["layers"]
    first = (RESULTS["pruned"].masks["features.0.neuron_mask"] == 0).nonzero().flatten().tolist()
    assert layers["features.0.neuron_mask"] == {"of": 8, "count": len(first), "neurons": first}
    assert f"cut {sum(layer['count'] for layer in layers.values())} of 24 neurons in 3 layers" in seen.words
    assert f"no. {', '.join(map(str, first))}" in seen.words


def test_text_from_outside_never_becomes_markup(tmp_path, monkeypatch):
    result = made_up(
        masks={f"{HOSTILE}.mask": torch.rand(4, 3)},
        history={HOSTILE: [1.0, 0.5]},
        timings={HOSTILE: 1.0, "total": 2.0, "peak_bytes": 1},
        options={"method": HOSTILE, "device": HOSTILE, HOSTILE: [HOSTILE]},
        execution={HOSTILE: HOSTILE},
    )
    inputs = {"weights": f"/a/{HOSTILE}\udcff", HOSTILE: HOSTILE, "target": HOSTILE, "clean_images": HOSTILE}
    notes = {"inputs": inputs, "warnings": [HOSTILE]}
    monkeypatch.setattr(_write, "save_masks", lambda *arguments: None)  # such a name isn't for safetensors
    seen, _ = read(tmp_path, result, notes=notes, preset=HOSTILE)
    assert {tag for tag, *_ in seen.tags} <= TAGS
    assert not any(name.startswith("on") for _, attributes, _ in seen.tags for name in attributes)
    assert seen.words.count("<script>alert(1)</script>") > 10
    assert "\u202e" not in seen.html and "\x00" not in seen.html


def test_numbers_that_are_none_are_gaps_and_the_json_is_strict(tmp_path):
    history = {"clean loss": [1.0, math.nan, 0.5, 0.25], "perturbed loss": [math.inf] * 4}
    seen, found = read(tmp_path, made_up(history=history), curves=[metrics(math.nan, 0.5)])
    assert found["history"] == {"clean loss": [1.0, None, 0.5, 0.25], "perturbed loss": [None] * 4}
    lines = [attributes["d"] for attributes in seen.of("path") if attributes.get("class") == "line"]
    assert any(line.count("M") == 2 and line.count("L") == 1 for line in lines)
    assert "clean loss: 1 → 0.25" in seen.words and "perturbed loss: no number" in seen.words
    assert not re.search(r"\b(nan|inf)\b", seen.html)


def test_a_history_without_any_number_is_said(tmp_path):
    seen, _ = read(tmp_path, made_up(history={"loss": [math.nan, math.nan]}))
    assert "None of these values is a finite number." in seen.words


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1e20] * 3, [-1e9, 1e-9], [1e-300, 1e300], [3.0, 3.0 + 1e-15], [-2.0, None]]
)
def test_values_of_any_size_have_an_axis(tmp_path, values):
    seen, _ = read(tmp_path, made_up(history={"loss": values}))
    assert not re.search(r"\b(nan|inf)\b", seen.html) and "loss: " in seen.words


def test_very_long_courses_are_thinned(tmp_path):
    seen, found = read(tmp_path, made_up(history={"loss": [1 / (step + 1) for step in range(20_000)]}))
    assert len(found["history"]["loss"]) == 20_000 and len(seen.html) < 200_000
    assert "every 100th, and the last" in seen.words


def test_masks_are_summed_up_for_each_layer(tmp_path):
    given = {"a.mask": torch.tensor([[0.0, 1.0], [0.5, 1.0]]), "b.neuron_mask": torch.ones(3)}
    seen, found = read(tmp_path, made_up(masks=given))
    layer = found["masks"]["layers"]["a.mask"]
    assert layer["shape"] == [2, 2] and layer["mean"] == 0.625 and layer["least"] == 0
    assert sum(layer["counts"]) == 4 and layer["counts"][0] == 1 and layer["counts"][-1] == 2
    assert found["masks"]["edges"][0] == 0 and found["masks"]["edges"][-1] == 1
    assert "2 × 2" in seen.words and "Numbers of 2 layers" in seen.words


def test_options_that_differ_from_the_preset_are_marked(tmp_path):
    seen, found = read(tmp_path, made_up())
    assert found["preset"] == "paper" and found["differs_from_preset"] == {"alpha": 0.9, "epochs": 100}
    rows = [inside for tag, attributes, inside in seen.tags if tag == "tr" and attributes.get("class") == "differs"]
    assert len(rows) == 2 and all("details" in inside for inside in rows)
    same, found = read(tmp_path, made_up(options={"method": "awm", "alpha": 0.9, "device": "cpu"}))
    assert found["differs_from_preset"] == {} and "All options are those of the preset “paper”." in same.words


def test_both_triggers_are_shown_and_measured(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    seen, found = read(tmp_path, made_up(), images=images, trigger=TRIGGER)
    assert found["triggers"]["real"] == {"l1": 12.0, "largest": 1.0}
    assert found["triggers"]["recovered"]["largest"] == pytest.approx(0.5)
    assert all(words in seen.words for words in ("Recovered trigger Δ", "Real trigger", "With the real trigger"))
    assert len(seen.of("img")) == 2 + 3 * 2
    alone, found = read(tmp_path, made_up(trigger=None), images=images)
    assert found["triggers"] == {} and not alone.of("img")


def test_images_come_through_as_they_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    images = torch.arange(3 * 8 * 8).view(1, 3, 8, 8) / 255
    seen, _ = read(tmp_path, made_up(trigger=None), images=images, trigger=lambda x: x)
    encoded = seen.of("img")[1]["src"].partition(",")[2]
    pixels = torch.from_numpy(np.array(image.open(io.BytesIO(base64.b64decode(encoded)))))
    assert torch.equal(pixels.permute(2, 0, 1), (images[0] * 255).round().byte())


def test_the_page_comes_without_matplotlib_as_it_does_with_it(tmp_path, monkeypatch):
    monkeypatch.undo()  # the picture is tried
    for module in ("matplotlib", "matplotlib.figure", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    result = made_up()
    said = report.write(tmp_path, result, metrics(0.9), metrics(0.9), torch.rand(2, 3, 8, 8))
    assert "pip install maskops[report]" in said and not (tmp_path / "report.png").exists()
    seen = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert seen.of("svg") and seen.of("img")


def test_warnings_and_how_it_ran_are_shown(tmp_path):
    seen, found = read(tmp_path, made_up(), notes={"warnings": ["memory ran out"]})
    assert "Warning: memory ran out" in seen.words and found["warnings"] == ["memory ran out"]
    assert "eager: CUDA graphs need a GPU" in seen.words and "3 MiB" in seen.words
    assert report.versions()["torch"] in seen.words


def test_the_result_is_left_alone(tmp_path):
    result, images = made_up(), torch.rand(3, 3, 8, 8)
    kept = {name: mask.clone() for name, mask in result.masks.items()}, result.trigger.clone(), images.clone()
    read(tmp_path, replace(result), images=images, trigger=TRIGGER)
    assert all(torch.equal(result.masks[name], mask) for name, mask in kept[0].items())
    assert torch.equal(result.trigger, kept[1]) and torch.equal(images, kept[2])


def luminance(colour):
    colour = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    linear = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in linear]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_can_be_read_in_light_and_dark(scheme):
    themes = [dict(re.findall(r"--(\w+):#(\w+)", theme)) for theme in re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)]
    assert len(themes) == 2 and themes[0].keys() == themes[1].keys()
    theme = themes[scheme]
    for ground in ("paper", "card", "mark"):
        assert contrast(theme["ink"], theme[ground]) >= 7
    assert all(contrast(theme["soft"], theme[ground]) >= 4.5 for ground in ("paper", "card"))
    assert all(contrast(theme[f"k{kind}"], theme["paper"]) >= 4.5 for kind in range(4))
    levels = [contrast(theme[f"s{level}"], theme["paper"]) for level in range(6)]
    assert levels == sorted(levels) and all(after / before > 1.15 for before, after in pairwise(levels))
