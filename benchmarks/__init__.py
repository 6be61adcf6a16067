"""Speed and memory against the published procedure, plain PyTorch and the floor: ``python -m benchmarks --help``."""
