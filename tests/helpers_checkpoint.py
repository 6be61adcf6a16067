"""What the tests of checkpoints share."""

from __future__ import annotations

import torch


def weights():
    return {"conv.weight": torch.randn(4, 3, 3, 3), "bn.num_batches_tracked": torch.tensor(7)}


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
