"""The script that builds, tests and measures on a GPU, without one: what it starts, and what it makes of failures."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import shard

SCRIPT = Path(shard.__file__).parent / "gpu.sh"
TESTS = """
import pytest

@pytest.fixture(params=["a", "b"])
def backend(request):
    return request.param

@pytest.mark.parametrize("number", range(9))
def test_on_backends(number, backend):
    assert (number, backend) != (1, "b")

def test_elsewhere():
    assert False
"""


def run_script(tmp_path, fails="nothing", code=3):
    """The script with a stand-in for Python, which fails where it is asked to."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "called with $*"\ncase "$*" in *"{fails}"*) exit {code};; esac\necho 3 passed in 1s\n'
    )
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHON": str(python), "PROCESSES": "3", "PATH": path}
    command = ["sh", str(SCRIPT), str(tmp_path / "out")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_script_runs_every_part(tmp_path):
    run = run_script(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    log = (tmp_path / "out" / "log.txt").read_text()
    for part in (
        "machine",
        "extension",
        "build",
        "tests-0",
        "tests-2",
        "compile-resnet18-float32",
        "compile-ops",
        "ops",
        "steps",
        "steps-resnet50",
        "steps-anp",
        "epoch",
        "sweep",
    ):
        assert f"== {part}: exit 0" in run.stdout and f"==== {part}\n" in log
    assert "benchmarks.shard 2/3" in log and "tests-3" not in log
    assert "== tests-1: exit 0 after 0 s (limit 230); 3 passed in 1s" in run.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]


def test_a_failing_shard_fails_the_script_and_its_log_is_kept(tmp_path):
    run = run_script(tmp_path, "shard 1/3")
    assert run.returncode == 1 and run.stderr == "gpu.sh: failed: tests-1\n"
    assert "== tests-1: exit 3 after" in run.stdout and "== steps: exit 0" in run.stdout
    assert "==== tests-1\ncalled with -m benchmarks.shard 1/3" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(("says", "code"), [("Device not supported", 0), ("ERROR SUMMARY: 1 error", 1)])
def test_memory_checkers_are_asked_where_there_are_any(tmp_path, says, code):
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(f"#!/bin/sh\necho {says} $*\nexit 9\n")
    checker.chmod(0o755)
    run = run_script(tmp_path)
    assert run.returncode == code
    assert run.stderr.startswith("gpu.sh: failed: memcheck-cuda memcheck-triton racecheck-cuda") == bool(code)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"{says} --tool {tool}" in log for tool in ("memcheck", "racecheck", "initcheck", "synccheck"))


def test_compiling_too_long_beforehand_is_no_failure(tmp_path):
    for name in ("compile-ops", "steps"):
        folder = tmp_path / name
        folder.mkdir()
        asked = "--processes" if name == "compile-ops" else "--compile-limit 30"
        run = run_script(folder, asked, 124)
        assert f"== {name}: exit 124 after" in run.stdout and run.returncode == (name == "steps")


def test_script_needs_a_gpu_and_a_folder(tmp_path):
    run = run_script(tmp_path, "is_available")
    assert run.returncode == 2 and "sees no CUDA device" in run.stderr
    assert subprocess.run(["sh", str(SCRIPT)], capture_output=True).returncode == 2


@pytest.fixture
def tests(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "HAND", 6)
    path = tmp_path / f"test_{tmp_path.name}.py"  # a module of its own
    path.write_text(TESTS)
    return str(path)


def test_shares_are_all_tests_that_need_the_gpu(tests, capfd):
    codes = [shard.main([f"{share}/2", tests]) for share in range(2)]
    out = capfd.readouterr().out
    # hands of 6, of which the first and the third are the first share's
    assert codes == [0, 1]
    assert "12 passed, 7 deselected" in out and "1 failed, 5 passed, 13 deselected" in out
    assert re.search(r"^FAILED \S+::test_on_backends\[b-1\]", out, re.MULTILINE)


def test_a_broken_context_ends_the_process_and_a_new_one_goes_on(tests, monkeypatch, capfd):
    sound = iter([True, True, False])
    monkeypatch.setattr(shard, "context_is_sound", lambda: next(sound))
    started = []
    monkeypatch.setattr(os, "execv", lambda python, command: started.append(command[3:]))
    monkeypatch.chdir(Path.cwd())
    shard.main(["1/2", tests, "--until", "9e9"])
    assert started == [["1/2", tests, "--first", "3", "--until", "9000000000.0", "--failed"]]
    assert "3 passed" in capfd.readouterr().out
    monkeypatch.setattr(shard, "context_is_sound", lambda: True)
    assert shard.main(started[0]) == 1
    assert "1 failed, 2 passed" in capfd.readouterr().out
    assert shard.main(["0/2", tests, "--first", "12"]) == 0
    assert shard.main(["0/2", tests, "--first", "12", "--failed"]) == 1


def test_a_share_ends_with_its_time(tests, capfd):
    assert shard.main(["0/1", tests, "--seconds", "0"]) == 1
    assert "the time is up" in capfd.readouterr().out
