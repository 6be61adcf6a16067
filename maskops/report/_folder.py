"""The folder that results are written into: all of them, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STAGING = ".maskops-"


@contextmanager
def results_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A fresh folder to write into; at the end its files move to ``path``, or vanish if the block fails.

    path:   made on entering, so that a folder that can't be written to is refused before the work begins. Files there
            stay; those of the same names are replaced at the end
    errors: OSError
    """
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    staging = None
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=path))
        except OSError as error:
            raise OSError(f"results_folder: can't write to {path} ({error.strerror})") from error
        yield staging
        for file in sorted(staging.iterdir()):
            os.replace(file, path / file.name)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # the results are in it
                folder.rmdir()


def is_empty(path: str | os.PathLike, but_for: Collection[str] = ()) -> bool:
    """Whether there is no such folder, or nothing but what a killed run may have left, and files of these names."""
    path = Path(path)
    return not path.is_dir() or all(
        entry.name.startswith(_STAGING) or entry.name in but_for for entry in path.iterdir()
    )
