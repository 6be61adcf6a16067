"""Which modules can be imported for their doctests."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["maskops/backends/triton/*"]
