"""``python -m benchmarks.shard 3/16``: a share of the tests that need the GPU, for runs side by side.

Those are the tests marked gpu, the tests that take the ``backend`` fixture, and those of tests/test_ops.py. They are
dealt in small hands of neighbours, which compile the same kernels. A test that breaks the CUDA context, so that nothing
can run in this process any more, fails; the process then starts anew with the test after it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import pytest
import torch

HAND = 5
"""Neighbouring tests that go to one share."""


class Share:
    """A pytest plugin: runs the tests of one share, from one of them on, until the time is up."""

    def __init__(self, share: int, shares: int, first: int, deadline: float) -> None:
        self.share, self.shares, self.deadline = share, shares, deadline
        self.next = first
        self.broken = False

    # after the marks that conftest.py adds
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items) -> None:
        on_gpu = [item for item in items if needs_gpu(item)]
        dealt = [item for index, item in enumerate(on_gpu) if index // HAND % self.shares == self.share]
        kept = dealt[self.next :]
        left = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = kept

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:  # now, because a process that is ended at its limit reports nothing
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item, nextitem) -> None:
        self.next += 1
        if time.time() > self.deadline and nextitem is not None:
            item.session.shouldstop = "the time is up"
        if not self.broken and not context_is_sound():
            self.broken = True
            item.session.shouldstop = "the CUDA context is broken"


def needs_gpu(item: pytest.Item) -> bool:
    """Whether a test shows on a GPU what it doesn't show without one."""
    takes_backend = "backend" in getattr(item, "fixturenames", ())
    return takes_backend or item.get_closest_marker("gpu") is not None or item.path.name == "test_ops.py"


def context_is_sound() -> bool:
    """Whether the GPU still answers; after an illegal access nothing does."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """0 when every test of the share passed or was skipped, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shard", description=__doc__)
    parser.add_argument("share", help="I/N: the share I, from 0, of N")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or folders")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no test after that")
    again = parser.add_argument_group("for a process that starts anew")
    again.add_argument("--first", type=int, default=0)
    again.add_argument("--failed", action="store_true")
    again.add_argument("--until", type=float, help="instead of --seconds, on the clock")
    options = parser.parse_args(arguments)
    until = time.time() + options.seconds if options.until is None else options.until
    share, shares = map(int, options.share.split("/"))
    plugin = Share(share, shares, options.first, until)
    code = pytest.main(["-p", "no:cacheprovider", "--durations=3", "--tb=short", *options.tests], plugins=[plugin])
    nothing_left = code == pytest.ExitCode.NO_TESTS_COLLECTED and options.first > 0
    failed = options.failed or not (code == pytest.ExitCode.OK or nothing_left)
    if plugin.broken:
        print(f"the CUDA context broke in test {plugin.next} of the share; a new process goes on", flush=True)
        rest = ["--first", str(plugin.next), "--until", str(until), "--failed"]
        command = [sys.executable, "-m", "benchmarks.shard", options.share, *options.tests, *rest]
        os.chdir(Path(__file__).parent.parent)
        os.execv(sys.executable, command)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
