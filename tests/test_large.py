"""The table of what large networks need: predicted, written and read again."""

from importlib.util import find_spec

import pytest

from benchmarks import __main__ as command_line
from benchmarks import large, networks, report

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 32}


def test_what_large_networks_need_is_predicted_and_reported(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    if find_spec("timm"):
        pytest.skip("timm's networks have one size")
    monkeypatch.setitem(networks.CONFIGURATIONS, "vit_l", TINY)
    arguments = ["large", "--dry", "--net", "vit_l", "--batch", "4", "--budget", "0.027", "1", "--out"]
    assert command_line.main([*arguments, str(tmp_path / "large")]) == 0
    official, free, little, enough = rows = large.read(tmp_path / "large" / "predicted.csv")
    assert [row.contestant for row in rows] == ["official", "maskops", "maskops, 0.027 GB", "maskops, 1 GB"]
    assert float(official.predicted) > float(free.outer)  # the images are the larger part of the rest
    assert float(free.predicted) > 0.027 >= float(little.predicted) and little.fits == enough.fits == "yes"
    assert official.bytes == "36" and free.bytes == "24.0"
    assert little.options.startswith("branches=sequential") and enough.options == ""
    assert "maskops, 0.027 GB" in capsys.readouterr().out
    (tmp_path / "docs").mkdir()
    document, readme = tmp_path / "docs" / "large.md", tmp_path / "README.md"
    for path in (document, readme):
        path.write_text(f"{report.BEGIN}\n{report.END}")
    assert report.main(readme, tmp_path) == 0 and report.main(readme, tmp_path, check=True) == 0
    assert f"| vit_l | {free.parameters} | maskops | {free.predicted} | 24.0 |" in document.read_text()
    document.write_text(f"{report.BEGIN}\n{report.END}")
    assert report.main(readme, tmp_path, check=True) == 1
