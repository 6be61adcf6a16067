"""A few seconds of what ``make fuzz`` does for minutes."""

import warnings

import fuzz
import pytest

NOT_HERE = pytest.mark.skip(reason="pyarrow is not installed")  # all others need nothing to be made
KINDS = [pytest.param(kind, marks=() if kind.valid else NOT_HERE, id=kind.name) for kind in fuzz.kinds()]


@pytest.mark.parametrize("kind", KINDS)
def test_valid_files_are_read(kind):
    for content in kind.valid:
        assert fuzz.check(kind, content) == "read"


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_and_made_up_files_are_read_or_refused(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, about the archives that are made here
        assert fuzz.fuzz(kind, 30).total() >= 30
