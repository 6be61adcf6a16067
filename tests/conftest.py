import os
import sys
from collections import Counter
from importlib.util import find_spec

import cuda_emulator
import pytest
import torch
from hypothesis import settings

if torch.cuda.is_available():
    _no_emulator = None
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    _no_emulator = cuda_emulator.load()
    if find_spec("triton"):
        import triton_interpreter

        triton_interpreter.hasten()

from benchmarks.kernels.table import kernel_names
from maskops import _dispatch, demo

# an error is compared with plain torch's, which must then not be TF32's in one backend and float32's in another
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")

_served: Counter[tuple[str, str]] = Counter()
_launched: Counter[str] = Counter()
"""How often each Triton kernel ran."""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def backdoored_digits():
    """The demo's network with its backdoor, trained once; nobody may change it."""
    return demo.digits_model()


@pytest.fixture
def no_picture(monkeypatch):
    """Results come without the picture, which takes longer than a few steps on a tiny network."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def clean_data():
    """Images and labels for helpers.tiny_network."""
    return torch.rand(20, 2, 8, 8), torch.randint(3, (20,))


@pytest.fixture(params=_dispatch.BACKENDS)
def backend(request):
    """Each backend that is there; the others are skipped with their reason."""
    reason = _dispatch._load(request.param)
    if isinstance(reason, str):
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _served_are_counted():
    """Every choice of a backend is counted, so that a run in which a backend computed nothing can't look green."""
    choose = _dispatch.choose

    def choose_and_count(op, arguments, backend):
        function = choose(op, arguments, backend)
        for name in _dispatch.BACKENDS:
            module = _dispatch._load(name)
            # not the stand-ins of test_dispatch.py
            if getattr(module, op, None) is function and module.__name__ == f"maskops.backends.{name}":
                _served[name, op] += 1
        return function

    _dispatch.choose = choose_and_count
    yield
    _dispatch.choose = choose


@pytest.fixture(autouse=True, scope="session")
def _launches_are_counted():
    if find_spec("triton") is None:
        yield
        return
    from maskops.backends.triton import _launch

    launch = _launch.launch

    def launch_and_count(kernel, *arguments):
        _launched[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"] += 1
        launch(kernel, *arguments)

    _launch.launch = launch_and_count
    yield
    _launch.launch = launch


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["served"] = [(*key, count) for key, count in _served.items()]
        session.config.workeroutput["launched"] = dict(_launched)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What each of several processes has counted, added up."""
    for backend, op, count in getattr(node, "workeroutput", {}).get("served", ()):
        _served[backend, op] += count
    _launched.update(getattr(node, "workeroutput", {}).get("launched", {}))


def pytest_terminal_summary(terminalreporter):
    if _no_emulator:
        terminalreporter.write_line(f"the CUDA kernels were not run: {_no_emulator}", yellow=True)
    for backend in _dispatch.BACKENDS:
        ops = [op for op in _dispatch.OPS if _served[backend, op]]
        line = f"backend {backend}: {len(ops)} of {len(_dispatch.OPS)} ops exercised"
        missing = [op for op in _dispatch.OPS if op not in ops]
        reason = _dispatch._load(backend)
        if isinstance(reason, str):
            line += f" ({reason})"
        elif missing:
            line += f"; not exercised: {', '.join(missing)}"
        terminalreporter.write_line(line, yellow=bool(missing))
    kernels = kernel_names()
    idle = [name for name in kernels if not _launched[name]]
    line = f"triton kernels: {len(kernels) - len(idle)} of {len(kernels)} ran"
    terminalreporter.write_line(line + (f"; not run: {', '.join(idle)}" if idle else ""), yellow=bool(idle))
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}", yellow=True)
