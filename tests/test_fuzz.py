"""A few seconds of what ``make fuzz`` does for minutes."""

import warnings

import fuzz
import pytest

KINDS = [kind for kind in fuzz.kinds() if kind.valid]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_valid_files_are_read(kind):
    for content in kind.valid:
        assert fuzz.check(kind, content) == "read"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_mutated_and_made_up_files_are_read_or_refused(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, about the archives that are made here
        assert fuzz.fuzz(kind, 30).total() >= 30
