"""The Triton kernels as machine code, for absent GPUs: some compiled anew, and the recorded table of all."""

import os
import subprocess
import sys

import pytest

from benchmarks.__main__ import main
from benchmarks.kernels import table
from benchmarks.results import ROOT

MATRIX = ("convolution.conv_forward", "convolution.conv_input_grad", "convolution.conv_weight_grad")
MASKED = MATRIX[:2]
WITHOUT_WGMMA = ("80", "86", "89")


def compile_first_cases(folder, *arguments):
    """Rows of the first case, which is in bfloat16 where there is one, of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "kernels", "--first", "--out", str(folder), *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode == 2 and run.stderr.startswith("benchmarks kernels: "):
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stderr
    return table.read(folder / "kernels.csv")


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    return compile_first_cases(tmp_path_factory.mktemp("hopper"), "--capability", "90")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    return compile_first_cases(folder, "--capability", *WITHOUT_WGMMA, "--kernel", *MATRIX)


@pytest.fixture(scope="module")
def recorded():
    return table.read()


def beyond(rows):
    """What spills a register or needs more shared memory than there is; a kernel may use every register."""
    return [row for row in rows if {"spills", "shared memory"} & set(row.limits.split(", "))]


def test_every_kernel_compiles_for_hopper_within_its_limits(hopper):
    assert [row.kernel for row in hopper] == table.kernel_names()
    assert beyond(hopper) == []


def test_masked_weights_go_from_registers_into_wgmma(hopper):
    """The effective weight is the left operand and comes from registers: ``HGMMA.… R24, R88, gdesc[…]``.

    Nor does it take a way round: between two steps of the sum nothing is stored to shared memory. There θ, m and the
    activations arrive by copies of global memory (LDGSTS), so any STS inside the loop around the matrix instructions
    would be a product that was written down to be read again. Counting them inside the loop leaves out those after it,
    which transpose the result. No second compilation without a mask is needed: its loop has none either.
    """
    for name in MASKED:
        (row,) = (row for row in hopper if row.kernel == name)
        assert (row.dtype, row.matrix, row.loop_stores) == ("bfloat16", "HGMMA register A", "0"), row


def test_matrix_kernels_compile_for_smaller_gpus_within_their_limits(others):
    assert {(row.kernel, row.capability) for row in others} == {(k, c) for k in MATRIX for c in WITHOUT_WGMMA}
    assert {row.matrix for row in others} == {"HMMA"}
    assert beyond(others) == []


def test_recorded_table_has_every_kernel_on_every_architecture(recorded):
    expected = {(name, str(capability)) for name in table.kernel_names() for capability in table.SHARED_MEMORY}
    assert {(row.kernel, row.capability) for row in recorded} == expected


def test_recorded_table_is_of_these_sources(recorded):
    # the text of every module counts, also where it has no kernel: a launch decides how a kernel is compiled
    assert {row.sources for row in recorded} == {table.sources_hash()}, "run: python -m benchmarks kernels"
    assert (table.FOLDER / "kernels.md").read_text() == table.markdown(recorded), "run: python -m benchmarks kernels"


def test_recorded_table_stays_within_every_limit(recorded):
    assert beyond(recorded) == []
    for row in recorded:
        assert int(row.shared) <= table.SHARED_MEMORY[int(row.capability)]
        assert (row.stack, row.local) == ("0", "0") and int(row.registers) <= 255


def test_recorded_masked_weights_go_from_registers_into_wgmma(recorded):
    # a group's 32 channels are fewer than the 64 rows that wgmma takes; float32 is multiplied without it unless as TF32
    rows = [
        row
        for row in recorded
        if (row.capability, row.kernel in MASKED) == ("90", True)
        and row.dtype != "float32"
        and row.case.startswith("3x3")
        and "groups" not in row.case
    ]
    assert {row.dtype for row in rows} == {"bfloat16", "float16", "float32 tf32"}
    assert [row for row in rows if row.matrix != "HGMMA register A"] == []


def test_machine_code_is_read():
    sass = pytest.importorskip("benchmarks.kernels.sass", reason="triton is not installed")
    lines = (
        *("LDGSTS.E.BYPASS.128 [R5], desc[UR14][R26.64], P5", "STS.128 [R1], R4"),
        *("LDG.E R2, desc[UR4][R2.64]", "STS [R1], R4", "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR20], R24, gsb0"),
        *("@P1 BRA 0x20", "STSM.16.M88.4 [R1], R4", "STL [R1], R3", "BRA 0x80"),
    )
    code = "\n".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x00 */" for i, line in enumerate(lines))
    found = sass.parse(f"Function f:\n  REG:77 STACK:8 SHARED:0 LOCAL:0\n{code}\n")
    assert found == (77, 8, 1, "HGMMA register A", 1, 2, 1)
    assert (
        sass.parse(f"REG:8 STACK:0 LOCAL:0\n{code.replace('R24, R88,', 'R24, gdesc[UR8],')}").matrix == "HGMMA shared A"
    )


def test_kernels_are_the_functions_that_no_other_calls():
    names = table.kernel_names()
    assert {*MATRIX, "weights._effective_weight", "images._prepare_images"} <= set(names)
    assert not {"weights.place", "weights.load_factor", "images.sum_over_batch"} & set(names)


def test_what_can_not_be_compiled_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--out", str(tmp_path)]) == 2
    assert main(["kernels", "--kernel", "weights.place", "--out", str(tmp_path)]) == 2
    interpreted, unknown = capsys.readouterr().err.splitlines()
    assert interpreted.startswith("benchmarks kernels: ")
    assert "convolution.conv_forward" in unknown
    assert unknown.startswith("benchmarks kernels: there is no weights.place; the kernels are ")
    assert not list(tmp_path.iterdir())
