"""``python -m maskops …``: every expected error is one line, and the exit code says whose it was.

0: done. 1: the run failed (a loss became NaN, no memory was left). 2: an input can't be used. 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from maskops._text import printable
from maskops._version import __version__
from maskops.cli import bench, demo, fold, info, output, plan, processes, purify

_COMMANDS = {"purify": purify, "fold": fold, "plan": plan, "info": info, "demo": demo}
_BENCH = "bench"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: {printable(message)} (see {self.prog} --help)\n"
        self.exit(2, None if processes.told_elsewhere(processes.UsageError(message)) else line)


def parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of the whole command line; ``arguments.run(arguments)`` runs what was asked for.

    argv: what will be parsed: it decides which method's options a command has, and a file in it what they begin at
    """
    text = "Remove backdoors from PyTorch models by masks on their weights."
    codes = "Exit code: 0 done, 1 the run failed, 2 an input can't be used, 130 interrupted."
    of_all = _Parser(prog="maskops", description=text, epilog=f"maskops COMMAND --help says more. {codes}")
    of_all.add_argument("--version", action="version", version=f"maskops {__version__}")
    commands = of_all.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        text = module.__doc__.splitlines()[0]
        of_one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        of_one.set_defaults(run=module.run, prog=of_one.prog, json=False, quiet=False, verbose=False, result=None)
        try:
            module.add_arguments(of_one, argv if argv[:1] == [name] else ())
        except (ValueError, ImportError, OSError) as error:
            of_one.error(str(error))
    commands.add_parser(_BENCH, help=bench.__doc__.splitlines()[0], add_help=False)
    return of_all


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [_BENCH]:
        return bench.run(argv[1:])
    arguments = parser(argv).parse_args(argv)
    try:
        with output.directed(arguments):
            arguments.run(arguments)
    except (ValueError, TypeError, ImportError, OSError) as error:
        return _failed(arguments.prog, error, 2)
    except RuntimeError as error:
        return _failed(arguments.prog, error, 1)
    except KeyboardInterrupt as stop:
        return _failed(
            arguments.prog, stop, 130, f"interrupted; {stop.args[0] if stop.args else 'nothing was written'}"
        )
    return 0


def _failed(prog: str, error: BaseException, code: int, message: str | None = None) -> int:
    if not processes.told_elsewhere(error):
        print(f"{prog}: {printable(message or str(error))}", file=sys.stderr)
    return code
