"""What a command says, and where: results on stdout, and all else on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout


def add_arguments(parser: argparse.ArgumentParser, verbose: str | None = None) -> None:
    """``--json`` and ``--quiet``, and ``--verbose`` for a command that has more to tell.

    verbose: what that is
    """
    said = parser.add_argument_group("what is said")
    said.add_argument("--json", action="store_true", help="the results on stdout as one JSON object, and nothing else")
    loudness = said.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="say nothing but errors")
    if verbose is not None:
        loudness.add_argument("--verbose", action="store_true", help=f"say more: {verbose}")


@contextmanager
def directed(arguments: argparse.Namespace) -> Iterator[None]:
    """Within, what is printed goes where the arguments say; at the end, come what may, ``arguments.result`` as JSON."""
    try:
        with ExitStack() as stack, open(os.devnull, "w") as nowhere:
            if arguments.json or arguments.quiet:
                stack.enter_context(redirect_stdout(nowhere))
            if arguments.quiet:
                stack.enter_context(redirect_stderr(nowhere))
            yield
    finally:
        if arguments.json and arguments.result is not None:
            print(json.dumps(arguments.result, indent=1, allow_nan=False))


def note(text: str) -> None:
    """Say what isn't a result."""
    print(text, file=sys.stderr)
