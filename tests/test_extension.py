"""The compiled module ``maskops._C``: how it is asked for, what it registers, and the machine code in it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import maskops  # noqa: F401  it defines the ops
from maskops import _dispatch

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90a"}


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def extension():
    """What ``make build`` has built and installed."""
    built = list(SITE.glob("maskops/_C*.so"))
    if not built:
        pytest.skip("make build compiles the CUDA kernels, where there is an nvcc")
    return built[0]


@pytest.fixture(scope="module")
def machine_code(extension):
    """Registers and bytes of stack by (kernel, architecture)."""
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(extension)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, architecture = {}, None
    for line in text.splitlines():
        if match := re.search(r"\barch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[function, architecture] = int(match[1]), int(match[2]) + int(match[3])
    return found


def in_a_fresh_process(code):
    environment = {**os.environ, "PYTHONPATH": str(SITE)}
    return subprocess.run([sys.executable, "-c", code], cwd=SITE, env=environment, capture_output=True, text=True)


def test_every_kernel_is_there_for_every_architecture(machine_code):
    kernels = {kernel for kernel, _ in machine_code}
    assert {architecture for _, architecture in machine_code} >= ARCHITECTURES
    assert set(machine_code) == {(kernel, a) for kernel in kernels for a in {a for _, a in machine_code}}


def test_no_kernel_spills_a_register(machine_code):
    assert {key: stack for key, (_, stack) in machine_code.items() if stack} == {}


def test_extension_loads_and_says_what_it_is(extension, machine_code):
    run = in_a_fresh_process(
        "import maskops._C as C; print(C.__file__); print(C.build_info()); print(len(C.kernel_names()))"
    )
    assert run.returncode == 0, run.stderr
    path, info, count = run.stdout.splitlines()
    assert Path(path) == extension
    info = ast.literal_eval(info)
    assert set(info) == {"compiler", "architectures", "flags", "revision"} and info["compiler"].startswith("nvcc ")
    assert {f"sm_{number}" for number in info["architectures"].split()} >= ARCHITECTURES
    assert int(count) == len({kernel for kernel, _ in machine_code})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(extension):
    run = in_a_fresh_process(
        "import maskops, torch\n"
        "one = torch.ones(2)\n"
        "print(maskops.explain('noise_step_', one))\n"
        "calls = lambda: torch.ops.maskops.noise_step_(one, one, None, 1.0, 1.0, backend='cuda'), "
        "maskops._C.kernel_attributes\n"
        "for call in calls:\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[1] == "  cuda       the tensors are on cpu"
    assert lines[4] == "noise_step_: backend 'cuda' was asked for, but the tensors are on cpu"
    assert lines[5].startswith("kernel_attributes: ")


def test_schemas_are_those_of_the_ops():
    backend = _dispatch._load("cuda")
    if isinstance(backend, str):
        pytest.skip(backend)
    shared = [name for name in _dispatch.OPS if hasattr(torch.ops.maskops_cuda, name)]
    assert {"effective_weight", "noise_step_"} <= set(shared)
    for name in shared:
        schema = str(getattr(torch.ops.maskops, name).default._schema)
        own = str(getattr(torch.ops.maskops_cuda, name).default._schema)
        # sizes are whole numbers either way; the stable ABI has no symbolic ones
        expected = schema.replace(", *, str? backend=None", "").replace("SymInt", "int")
        assert own.replace("maskops_cuda::", "maskops::").replace("SymInt", "int") == expected


def test_only_the_binding_sees_torch():
    sources = {path.name: path.read_text() for path in (ROOT / "csrc").iterdir()}
    see_torch = {name for name, text in sources.items() if re.search(r"#include <(torch|ATen|c10)/", text)}
    assert see_torch == {"torch_ops.h", "torch_tensors.h"}
    assert len(sources["module.cpp"].splitlines()) <= 60
    assert sum(len((ROOT / name).read_text().splitlines()) for name in ("setup.py", "CMakeLists.txt")) <= 150


def test_an_installation_without_kernels_needs_no_compiler():
    run = setup("--version", MASKOPS_BUILD="none", CUDA_HOME="/nowhere", PATH=os.defpath)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MASKOPS_BUILD": "fast"}, "maskops: MASKOPS_BUILD: expected auto, cuda or none; got 'fast'"),
        (
            {"MASKOPS_BUILD": "cuda", "CUDA_HOME": "/nowhere", "CUDACXX": "", "PATH": "/nowhere"},
            "maskops: MASKOPS_BUILD=cuda needs an nvcc: put it on the path or set CUDA_HOME, or set MASKOPS_BUILD=none",
        ),
    ],
    ids=["unknown", "no nvcc"],
)
def test_a_build_that_can_not_be_says_why_in_one_line(environment, says):
    run = setup("--version", **environment)
    assert run.returncode != 0 and says in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("lacking", ["torch", "pybind11", "cmake", "ninja"])
def test_what_the_build_lacks_is_named(tmp_path, lacking):
    for tool in {"nvcc", "cmake", "ninja"} - {lacking}:
        (tmp_path / tool).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / tool).chmod(0o755)
    hide = "import importlib.util as u, sys; find = u.find_spec; "
    hide += f"u.find_spec = lambda name, *rest: None if name == {lacking!r} else find(name, *rest); "
    hide += "import shutil; which = shutil.which; "
    hide += f"shutil.which = lambda name: None if name == {lacking!r} else which(name); "
    code = hide + "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    environment = {**os.environ, "MASKOPS_BUILD": "cuda", "CUDACXX": str(tmp_path / "nvcc"), "PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"maskops: building the CUDA kernels needs {lacking}: install it and run pip install" in run.stderr
    assert "MASKOPS_BUILD=none" in run.stderr
