"""What holds for the package as a whole: who imports whom, what an import needs, which names are public."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import maskops

PACKAGE = Path(maskops.__file__).parent
ROOT = PACKAGE.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROOMS = (
    *("_memory", "_flat", "_state", "_text", "backends", "_dispatch", "_ops", "functional", "nn"),
    *("lower", "purify", "report", "demo", "cli", "__main__"),
)
"""From the bottom to the top; a room imports from those below it."""
LOWER = (
    *("augment", "_scan", "cifar", "idx", "npz", "parquet", "pictures", "data", "checkpoint"),
    *("convert", "optim", "lean", "arena", "backdoor", "models"),
)
"""The rooms side by side under purify."""
OPTIONAL = (
    "safetensors",
    "tqdm",
    "triton",
    "matplotlib",
    "sklearn",
    "PIL",
    "transformers",
    "torchvision",
    "timm",
    "yaml",
    "pyarrow",
)


def room(module):
    """The name of the room that a module of the package stands in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def floor(module):
    return ROOMS.index("lower" if room(module) in LOWER else room(module))


def imports(module):
    """The modules of the package that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    # the compiled module is nobody's room
    return {name for name in found if name.split(".")[0] == "maskops"} - {module, "maskops._C"}


# the version, and the package itself, which imports all its rooms, stand outside the order
INSIDE = [module for module in MODULES if room(module) not in ("", "_version")]


def test_every_room_has_its_place():
    assert {room(module) for module in INSIDE} <= {*ROOMS, *LOWER} - {"lower"}


@pytest.mark.parametrize("module", INSIDE)
def test_imports_run_one_way(module):
    for other in imports(module):
        if room(other) == "_version":
            continue
        assert room(other), f"{module} imports the package itself, which imports {module}"
        beside = room(other) == room(module) or (room(module) in LOWER and room(other) in LOWER)
        assert beside or floor(other) < floor(module), f"{module} imports {other}, which stands above it"


def test_imports_make_no_cycle():
    order = TopologicalSorter({module: imports(module) for module in INSIDE})
    assert set(order.static_order()) >= set(INSIDE)


def test_purify_does_not_know_the_attack():
    rooms = {room(other) for module in INSIDE if room(module) == "purify" for other in imports(module)}
    assert "backdoor" not in rooms


def test_backdoor_and_models_stand_beside_the_masked_layers():
    for alone in ("backdoor", "models"):
        others = {room(other) for module in INSIDE if room(module) == alone for other in imports(module)}
        assert others <= {alone, "augment", "data", "_state"}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("maskops.__main__",)])
def test_public_names_are_those_of_all(module):
    imported = importlib.import_module(module)
    names = getattr(imported, "__all__", None)
    if names is None:
        return
    assert len(set(names)) == len(names)
    assert all(hasattr(imported, name) for name in names)
    if MODULES[module].name == "__init__.py":
        hidden = {name for name in vars(imported) if not name.startswith("_")} - set(names)
        rooms = {name.removeprefix(f"{module}.").split(".")[0] for name in sys.modules if name.startswith(f"{module}.")}
        assert hidden <= rooms | {"Tensor"}, f"{module} has names that __all__ lacks: {sorted(hidden - rooms)}"


def test_public_names_are_documented():
    missing = [name for name in maskops.__all__ if not (getattr(maskops, name).__doc__ or "").strip()]
    assert missing == []
    for name in maskops.functional.__all__:
        assert ">>>" in getattr(maskops.functional, name).__doc__, f"{name} has no example"


@pytest.mark.parametrize("path", sorted([*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py")]), ids=str)
def test_a_file_of_more_than_400_lines_is_two_rooms(path):
    assert len(path.read_text().splitlines()) < 400


def test_import_needs_torch_and_numpy_alone():
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"
    use = "import maskops, torch; print(maskops.mask_(torch.nn.Conv2d(1, 1, 1))(torch.ones(1, 1, 1, 1)).shape)"
    run = subprocess.run([sys.executable, "-c", f"{block}; {use}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "torch.Size([1, 1, 1, 1])\n"


def test_typed_package_ships_its_marker():
    assert (PACKAGE / "py.typed").exists()
