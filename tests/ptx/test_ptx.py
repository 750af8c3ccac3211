"""Emulates kernels as Triton compiles them for sm_80 and sm_90; `python -m tests.ptx` runs many more cases.

A separate process compiles them for all tests of the session, because this one may interpret kernels.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from cotolora.kernels.tiles import TABLES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ARCHITECTURES = ("sm_80", "sm_90")
DROPS = {kernel: 0.0 if kernel in ("project", "row_norm") else 0.3 for kernel in TABLES}


def compiles():
    """Makes this process compile kernels; called before it imports triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def outcome_of(function, *arguments, staggered=False, **options):
    """The errors of a case that the function of this name in `cases` makes."""
    cases = importlib.import_module("tests.ptx.cases")
    return cases.outcome(getattr(cases, function)(*arguments, **options), staggered=staggered)[1]


def barriers_in(function, *arguments):
    """As `outcome_of`, but returns what `cases.barriers` finds."""
    cases = importlib.import_module("tests.ptx.cases")
    return list(cases.barriers(getattr(cases, function)(*arguments)))


@pytest.fixture(scope="module")
def worker():
    """The process that compiles."""
    # spawn, because a forked process would already have imported triton
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=compiles) as one:
        yield one


@pytest.fixture
def wrong(worker):
    """Runs `outcome_of` in the process that compiles."""
    return lambda *arguments, **options: worker.submit(outcome_of, *arguments, **options).result()


@pytest.fixture
def barriers_of(worker):
    """Runs `barriers_in` in the process that compiles."""
    return lambda *arguments: worker.submit(barriers_in, *arguments).result()


SIMPLE = (
    "add bfloat16",
    "sum bfloat16",
    "matmul bfloat16 ieee 64x64x128 stages 3 warps 4",
    "matmul bfloat16 ieee 37x50x33 stages 2 warps 4",
)


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_simple_kernels_are_correct(wrong, arch, name):
    assert wrong("simple_case", name, arch) == []


FAULTS = {
    "a missing barrier of a reduction": ARCHITECTURES,
    "the missing barriers of a product": ARCHITECTURES,
    "the missing barriers of a layer": ARCHITECTURES,
    "a missing barrier between h and its use": ARCHITECTURES,
    "a copy not waited for": ARCHITECTURES,
    "a read outside a tensor": ARCHITECTURES,
    "another swizzle of what is written": ("sm_80",),
    "another swizzle of what is read": ("sm_90",),
    "an unwritten tile": ARCHITECTURES,
    "a product not waited for": ("sm_90",),
    "a missing fence": ("sm_90",),
    "a TMA copy not waited for": ("sm_90",),
}


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, archs in FAULTS.items() for arch in archs])
def test_an_injected_fault_is_detected(wrong, name, arch):
    assert wrong("fault_case", name, arch) == []


@pytest.mark.parametrize(("case", "kernel"), [("kernel_case", "hira"), ("barrier_case", "row_norm")])
def test_removing_any_barrier_is_detected(barriers_of, case, kernel):
    if kernel == "row_norm" and not importlib.metadata.version("triton").startswith("3.9."):
        pytest.skip("holds for Triton 3.9; 3.6 emits redundant barriers in row_norm")
    for name, count, unnoticed, _ in barriers_of(case, kernel, "sm_80"):
        assert count, name
        assert unnoticed == [], name


@pytest.mark.parametrize("kernel", TABLES)
def test_kernels_select_rows_and_drop_entries(wrong, kernel):
    assert wrong("kernel_case", kernel, "sm_80", gate="rows", dropout=DROPS[kernel]) == []


# not those that take long; layers with all rows off are in the default set
@pytest.mark.parametrize(
    "kernel", ["gram", "hira_grads", "low_rank_gemm", "pre_expand", "project", "row_norm", "shrink"]
)
def test_kernels_pass_over_rows_that_are_all_off(wrong, kernel):
    assert wrong("kernel_case", kernel, "sm_80", gate="rows off") == []


@pytest.mark.parametrize("kernel", TABLES)
def test_kernels_scale_columns(wrong, kernel):
    scaled = kernel in ("one_pass", "one_pass_swapped", "low_rank_gemm", "gram", "project")
    assert wrong("kernel_case", kernel, "sm_90", scaled=scaled) == []


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("kernel", ["project", "gram"])
def test_no_copy_overwrites_operands_of_a_running_product(wrong, kernel, rank, scaled):
    assert wrong("kernel_case", kernel, "sm_90", rank=rank, scaled=scaled, staggered=True) == []


@pytest.mark.parametrize("kernel", ["gram", "pre_expand", "hira_grads"])
def test_row_gates_of_8_bits_select_operands_of_tf32(wrong, kernel):
    assert wrong("kernel_case", kernel, "sm_80", "tf32", gate="rows", dropout=0.3) == []


@pytest.mark.parametrize("rank", [16, 144])
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_no_copy_overwrites_operands_before_dropout(wrong, dtype, rank):
    assert wrong("kernel_case", "one_pass", "sm_90", dtype, rows=70, rank=rank, dropout=0.3, staggered=True) == []
