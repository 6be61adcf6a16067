"""Models that say how they want their images, and pictures of every size."""

import io
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_cli import ARCH, line, network, refused, write_inputs

from maskops.checkpoint import save_state_dict
from maskops.cli import main, preprocessing, transformers_folder
from maskops.cli.preprocessing import Preprocessing
from maskops.data import load_images

image_module = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
VIT = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16, "patch_size": 8,
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "id2label": {"0": "a", "1": "b", "2": "c"}, "auto_map": {"AutoConfig": "evil.Config"},
}  # fmt: skip
PREPROCESSOR = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": 16}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as transformers writes one, with code beside it that nobody may run."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = {name: value for name, value in VIT.items() if name not in ("model_type", "auto_map")}
    transformers.ViTForImageClassification(transformers.ViTConfig(**config)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(VIT))
    (folder / "evil.py").write_text("open('ran', 'w')")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def write_pictures(folder, count, start=0, size=None):
    for index in range(count):
        shape = (5 + index, 9, 3) if size is None else (size, size, 3)
        array = np.random.default_rng(index + start).integers(0, 256, shape, dtype=np.uint8)
        file = folder / "abc"[index % 3] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(array).save(file)


def dry(tmp_path, *extra, **options):
    options = {"method": "ft", "out": tmp_path / "out", "device": "cpu", **options}
    return ["purify", *line(options), "--dry-run", *extra]


def test_a_folder_of_transformers_says_how_it_wants_its_images(vit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(vit)
    write_pictures(tmp_path / "clean", 6)
    write_pictures(tmp_path / "eval", 3, start=10)
    given = {"arch": f"transformers:{vit}", "clean": tmp_path / "clean", "eval": tmp_path / "eval"}
    assert main(dry(tmp_path, "--json", **given)) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["images"] == {"clean": [6, 3, 16, 16], "eval": [3, 3, 16, 16], "classes": 3}
    assert said["options"]["mean"] == [0.5, 0.4, 0.3] and said["options"]["std"] == [0.2, 0.3, 0.4]
    assert said["inputs"]["weights"] == f"{vit}/model.safetensors" and said["inputs"]["size"] == 16
    source = f"{vit}/preprocessor_config.json"
    assert said["inputs"]["taken_from"] == source and printed.err.count("\n") == 1
    assert printed.err.startswith(f"mean 0.5,0.4,0.3, std 0.2,0.3,0.4, images of 16 x 16: from {source}")
    assert not (vit / "ran").exists()


def test_it_is_said_that_pictures_are_resized_whole_and_not_cropped(vit, tmp_path, capsys):
    for file in ("model.safetensors", "config.json"):
        os.link(vit / file, tmp_path / file)
    cropping = {**PREPROCESSOR, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(cropping))
    write_pictures(tmp_path / "clean", 3)
    write_pictures(tmp_path / "eval", 3, start=10)
    given = {"arch": f"transformers:{tmp_path}", "clean": tmp_path / "clean", "eval": tmp_path / "eval"}
    options = {"method": "ft", "out": tmp_path / "out", "epochs": 1, "device": "cpu", **given}
    assert main(["purify", *line(options), "--no-progress"]) == 0
    said = "images of 16 x 16 (resized whole, not cropped): from"
    assert said in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert said in found["warnings"][0] and "resized whole" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_given_wins_over_the_model_s_own(vit, tmp_path, capsys):
    write_pictures(tmp_path / "clean", 3, size=16)
    write_pictures(tmp_path / "eval", 3, start=10, size=16)
    given = {"arch": f"transformers:{vit}", "clean": tmp_path / "clean", "eval": tmp_path / "eval", "size": 16}
    assert main(dry(tmp_path, "--json", "--mean", "0,0,0", "--std", "1,1,1", **given)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["options"]["mean"] == [0, 0, 0] and printed.err == ""


def test_a_folder_s_model_is_transformers_own(vit, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model = transformers_folder.load(vit, str(vit / "model.safetensors"))
    expected = transformers.ViTForImageClassification.from_pretrained(vit)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.eval()(images).logits, expected.eval()(images).logits)
        save_state_dict(tmp_path / "model.pth", model.state_dict())  # by names as purify writes them
        again = transformers_folder.load(vit, str(tmp_path / "model.pth"))
        assert torch.equal(again.eval()(images).logits, expected(images).logits)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("not json", "config.json can't be read (JSONDecodeError"),
        ("[1]", "it must hold an object; got list"),
        ('{"x":' * 600 + "1" + "}" * 600, "can't be read (RecursionError"),
        ("[" * 100000, "can't be read (RecursionError"),
        ({**VIT, "model_type": "evil"}, "model_type must be an image classifier of transformers; got 'evil'"),
        ({**VIT, "model_type": "timm_wrapper"}, "must be an image classifier of transformers; got 'timm_wrapper'"),
        ({**VIT, "model_type": ["vit"]}, "must be an image classifier of transformers; got ['vit']"),
        ({**VIT, "backbone": "somebody/model"}, "models with backbone are not read"),
        ({**VIT, "x": [{"quantization_config": {"quant_method": "evil"}}]}, "with quantization_config are not read"),
        ({**VIT, "hidden_act": "evil"}, "transformers can't make this model ("),
        ({**VIT, "hidden_size": 60_000, "intermediate_size": 60_000}, "numbers, fewer than the"),
        ({**VIT, "num_hidden_layers": 2}, "numbers, fewer than the"),
        (
            {**VIT, "num_labels": 10**9, "id2label": None},
            "num_labels must be at most 65536; got",
        ),
        ({**VIT, "num_hidden_layers": 10**9}, "num_hidden_layers must be at most 64; got"),
        ({**VIT, "x": [{"depths": [1, 65]}]}, "depths must be at most 64; got 65"),
        ({**VIT, "x": [1] * 1025}, "x must have at most 1024 values; got 1025"),
        ({**VIT, "hidden_size": 4}, "model.safetensors doesn't fit the model in"),
        ({**VIT, "model_type": "resnet"}, "model.safetensors"),
    ],
    ids=lambda value: str(value)[-25:],
)
def test_folders_of_no_use_are_one_line(vit, tmp_path, capsys, config, words):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    os.link(vit / "model.safetensors", tmp_path / "model.safetensors")
    given = {"arch": f"transformers:{tmp_path}", "clean": "c.npz", "eval": "e.npz"}
    assert words in refused(capsys, dry(tmp_path, **given))


def test_a_config_can_t_ask_for_modules_without_end(vit, monkeypatch):
    monkeypatch.setattr(transformers_folder, "_LAYERS", frozenset())  # as of a model with a name of its own for them
    content = {**VIT, "num_hidden_layers": 60_000}
    limits = transformers_folder.Limits(tensors=20, numbers=10**5)
    with pytest.raises(ValueError, match="it has more than 1320 modules"):
        transformers_folder.make(vit / "config.json", content, limits)


def test_a_plan_needs_no_weights_but_bounds_the_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**VIT, "num_hidden_layers": 2}))
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert transformers_folder.build(tmp_path).config.num_hidden_layers == 2
    (tmp_path / "config.json").write_text(json.dumps({**VIT, "num_labels": 10**9, "id2label": None}))
    with pytest.raises(ValueError, match="num_labels must be at most 1000000"):
        transformers_folder.build(tmp_path)


def test_what_names_no_folder_is_one_line(vit, tmp_path, capsys):
    assert "config.json can't be read" in refused(capsys, dry(tmp_path, arch="transformers:./no", clean="c", eval="e"))
    assert "cannot import 'transformers:Nothing'" in refused(
        capsys, dry(tmp_path, arch="transformers:Nothing", weights="w", clean="c", eval="e")
    )
    given = {"arch": f"transformers:{vit}", "clean": "c", "eval": "e"}
    assert "takes no --arch-options" in refused(capsys, dry(tmp_path, "--arch-options", "a=1", **given))
    assert "--weights must be given" in refused(capsys, dry(tmp_path, arch=ARCH, clean="c", eval="e"))


@pytest.mark.parametrize(
    ("preprocessor", "config", "expected"),
    [
        (PREPROCESSOR, {}, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16)),
        ({**PREPROCESSOR, "do_normalize": False}, {}, (None, None, 16)),
        ({**PREPROCESSOR, "size": {"height": 8, "width": 8}}, {}, (..., ..., 8)),
        ({**PREPROCESSOR, "size": {"shortest_edge": 9}}, {}, (..., ..., 9)),
        ({**PREPROCESSOR, "size": {"height": 8, "width": 9}}, {}, (..., ..., None)),
        ({**PREPROCESSOR, "do_center_crop": True, "crop_size": {"height": 7, "width": 7}}, {}, (..., ..., 7)),
        ({**PREPROCESSOR, "do_resize": False}, {"image_size": 5}, (..., ..., 5)),
        (None, {"image_size": 6}, (None, None, 6)),
        (None, {"image_size": [6, 6]}, (None, None, 6)),
        (None, {"image_size": "6"}, (None, None, None)),
        ({**PREPROCESSOR, "rescale_factor": 0.00392156862745098}, {}, (..., ..., 16)),
        ({**PREPROCESSOR, "rescale_factor": 1 / 127.5}, {}, "scales pixels in a way of its own"),
        ({**PREPROCESSOR, "do_rescale": False}, {}, "scales pixels in a way of its own"),
        ({**PREPROCESSOR, "image_mean": None}, {}, "image_mean and image_std must be numbers; got"),
        ({**PREPROCESSOR, "image_std": [True]}, {}, "image_mean and image_std must be numbers; got"),
    ],
)
def test_preprocessing_is_read_as_transformers_means_it(tmp_path, preprocessor, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    arch = f"transformers:{tmp_path}"
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            preprocessing.of(arch, network())
        return
    found = preprocessing.of(arch, network())
    for value, wanted in zip(found, expected, strict=False):
        assert wanted is ... or value == wanted


def test_a_model_can_t_ask_for_pictures_that_fill_the_memory(vit, tmp_path, capsys):
    for file in ("model.safetensors", "config.json"):
        os.link(vit / file, tmp_path / file)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "size": 60_000}))
    write_pictures(tmp_path / "clean", 3)
    write_pictures(tmp_path / "eval", 3, start=10)
    given = {"arch": f"transformers:{tmp_path}", "clean": tmp_path / "clean", "eval": tmp_path / "eval"}
    assert "must be of at most 4096 pixels; got 60000: give --size" in refused(capsys, dry(tmp_path, **given))
    assert main(dry(tmp_path, size=16, **given)) == 0


def as_timm(**config):
    """A network that says what timm's say."""
    model = network()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 12, 12), **config}
    return model


def test_models_of_timm_say_how_they_want_their_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=as_timm))
    save_state_dict(tmp_path / "model.pth", network().state_dict())
    write_pictures(tmp_path / "clean", 6)
    write_pictures(tmp_path / "eval", 3, start=10)
    given = {"arch": "timm:create_model", "weights": tmp_path / "model.pth"}
    data = {"clean": tmp_path / "clean", "eval": tmp_path / "eval"}
    assert main(dry(tmp_path, "--json", **given, **data)) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["options"]["std"] == [0.25] * 3 and said["images"]["clean"] == [6, 3, 12, 12]
    assert "from the model's pretrained_cfg" in printed.err
    arrays = {**write_inputs(tmp_path), **given}
    assert main(dry(tmp_path, "--json", **arrays)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"]["clean"] == [12, 3, 8, 8]
    assert "the images are of 8 pixels, and the model's pretrained_cfg says 12: --size 12 would resize" in printed.err
    model = as_timm(mean=None, input_size=(3, 12, 14))
    assert preprocessing.of("timm.models:a", model) == Preprocessing(source="the model's pretrained_cfg")
    assert preprocessing.of("timm:a", network()) == Preprocessing()
    model.default_cfg = as_timm().pretrained_cfg
    assert preprocessing.of(f"{__name__}:as_timm", model) == preprocessing.of("timm_x:a", model) == Preprocessing()
    del model.pretrained_cfg
    assert preprocessing.of("timm:a", model) == Preprocessing()


def test_pictures_take_the_size_of_the_arrays_that_they_are_used_with(tmp_path, capsys):
    inputs = write_inputs(tmp_path)
    write_pictures(tmp_path / "pictures", 6)
    pictures = {**inputs, "clean": tmp_path / "pictures"}
    assert main(dry(tmp_path, "--json", **pictures)) == 0
    assert json.loads(capsys.readouterr().out)["images"]["clean"] == [6, 3, 8, 8]
    assert main(dry(tmp_path, "--json", **pictures, size=6)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"]["eval"] == [18, 3, 6, 6] and said["inputs"]["size"] == 6
    write_pictures(tmp_path / "others", 3, start=10)
    both = {**pictures, "eval": tmp_path / "others"}
    assert "images must have one size, or give size=" in refused(capsys, dry(tmp_path, **both))
    write_pictures(tmp_path / "small", 3, size=5)
    write_pictures(tmp_path / "large", 3, size=7)
    both = {**inputs, "clean": tmp_path / "small", "eval": tmp_path / "large"}
    assert "got (3, 5, 5) and (3, 7, 7); --size resizes them" in refused(capsys, dry(tmp_path, **both))


def test_a_picture_resized_is_what_pillow_makes_of_it(tmp_path):
    write_pictures(tmp_path, 1)
    (file,) = tmp_path.rglob("*.png")
    expected = image_module.open(io.BytesIO(file.read_bytes())).resize((6, 6), image_module.Resampling.BILINEAR)
    found = load_images(tmp_path, size=6)[0][0]
    assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)
