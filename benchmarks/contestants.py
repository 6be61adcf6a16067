"""The contestants: who computes a purification's steps, and how.

Each is made from a :class:`benchmarks.problem.Problem` and has

    reset()       go back to the problem's masks and trigger
    begin()       what a phase of ``STEPS`` inner steps does once, or None
    inner(index)  AWM: one ascent step of the trigger on a batch
    outer(index)  AWM: one descent step of the masks on a batch
    step(index)   ANP, NFT: one step of the masks on a batch
    result()      the trigger and the masks as they now are, by name
    constants()   the tensors that are there anyway: what autograd saves of them costs nothing

and may have

    needs_cuda    whether it is one for CUDA devices alone
    compiles      what making it and its first steps is to be called, where that takes long
    counts_as     the contestant whose arithmetic it does, where its own can't be seen
    needs_memory  whether it can't be counted on tensors without memory: what it does depends on numbers, or on theirs
    inject        ANP, NFT: whether the random draws are the problem's; true while it is compared
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.floor import Floor
from benchmarks.neurons import (
    CarefulANP,
    CarefulNFT,
    CompiledANP,
    CompiledNFT,
    LeanANP,
    LeanNFT,
    OfficialANP,
    OfficialNFT,
)
from benchmarks.ours import Maskops, MaskopsANP, MaskopsNFT
from benchmarks.problem import Problem
from benchmarks.published import TF32, Careful, Lean, Official
from benchmarks.variants import (
    Compiled,
    CompiledGraphs,
    FloorGraphed,
    Functional,
    Graphed,
    Naive,
    NaiveAutotune,
    NaiveGraphs,
    Parametrized,
    ParametrizedCached,
)

Make = Callable[[Problem], Any]


CONTESTANTS: dict[str, dict[str, Make]] = {
    "awm": {
        "official": Official,
        "lean": Lean,
        "tf32": TF32,
        "careful": Careful,
        "naive": Naive,
        "naive-graphs": NaiveGraphs,
        "naive-autotune": NaiveAutotune,
        "compile": Compiled,
        "compile-graphs": CompiledGraphs,
        "parametrize": Parametrized,
        "parametrize-cached": ParametrizedCached,
        "functional": Functional,
        "graph": Graphed,
        "maskops": Maskops,
        "floor": Floor,
        "floor-graph": FloorGraphed,
    },
    "anp": {
        "official": OfficialANP,
        "lean": LeanANP,
        "careful": CarefulANP,
        "compile": CompiledANP,
        "maskops": MaskopsANP,
    },
    "nft": {
        "official": OfficialNFT,
        "lean": LeanNFT,
        "careful": CarefulNFT,
        "compile": CompiledNFT,
        "maskops": MaskopsNFT,
    },
}
"""By method and name, in the order of the tables."""
