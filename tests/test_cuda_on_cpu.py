"""The CUDA kernels, executed on the CPU under emulation: against the oracle, under sanitizers, counted, and compiled.

FLYWHEEL_REQUIRE_CUDA=1 turns what would be skipped for want of a compiler into failures. Every barrier of the kernels
is left out, one at a time, in one build for the thread sanitizer; of other faults one for each sanitizer is planted.
FLYWHEEL_ALL_FAULTS=1 is for changes of the kernels, ten minutes of one core: every bound moved one too far, every kind
of fault in a build of its own, all shapes under the sanitizers, counts and spills.
"""

import csv
import io
import os
import re
import shutil

import pytest
from cuda_on_cpu import harness

ALL_FAULTS = os.environ.get("FLYWHEEL_ALL_FAULTS") == "1"
slow = pytest.mark.skipif(not ALL_FAULTS, reason="half a minute or more; after a change of csrc: FLYWHEEL_ALL_FAULTS=1")
REQUIRED = os.environ.get("FLYWHEEL_REQUIRE_CUDA") == "1"
RESULTS = harness.ROOT / "benchmarks" / "results"

if not (shutil.which("g++") and harness.cuda_headers()) and not REQUIRED:
    pytest.skip("no g++, or no CUDA headers (of a toolkit, or of torch's CUDA packages)", allow_module_level=True)


def passes(ran) -> bool:
    return ran.returncode == 0 and re.search(r"^\d+ passed, 0 failed$", ran.stdout, re.MULTILINE) is not None


@pytest.mark.parametrize(("mode", "order", "memory"), [("all", "reverse", "nan"), ("few", "7", "huge")])
def test_kernels_are_the_oracle(mode, order, memory):
    ran = harness.drive(harness.build(), mode, order, memory=memory)
    assert passes(ran), ran.stdout[-3000:] + ran.stderr[-3000:]


@slow
def test_kernels_touch_no_memory_but_theirs():
    ran = harness.drive(harness.build("address"), "all", "3")
    assert passes(ran), ran.stdout[-3000:] + ran.stderr[-3000:]


@slow
@pytest.mark.parametrize("order", ["forward"])
def test_kernels_have_no_race(order):
    ran = harness.drive(harness.build("thread"), "few", order)
    assert passes(ran), ran.stdout[-3000:] + ran.stderr[-3000:]


def unseen(sanitizer: str, mode: str, what: str, memories: tuple[str, ...]) -> list:
    driver = harness.build(sanitizer, plant=True)
    assert passes(harness.drive(driver, mode)), "without a fault"
    return [
        place
        for number, place in enumerate(harness.faults())
        if place[2] == what
        and all(passes(harness.drive(driver, mode, fault=str(number), memory=memory)) for memory in memories)
    ]


def test_any_barrier_left_out_is_seen():
    for path in harness.kernel_files():  # __syncthreads is all that orders anything
        assert not re.search(r"\batomic[A-Z]|__syncwarp|__threadfence", path.read_text())
    assert not unseen("thread", "few", harness.BARRIER, ("nan",))


@slow
def test_any_bound_one_too_far_is_seen():
    assert not unseen("address", "edges", harness.BOUND, ("huge", "nan"))


KINDS = [  # at least one of each kind: (sanitizer that sees it, fault)
    ("plain", ("em_step.cu", "m.r * p", "m.q * p", 0)),  # a wrong formula
    ("plain", ("team.cuh", "a.value + b.value", "a.value", 0)),  # a reduction that leaves warps out
    (
        "plain",
        (
            "em_step.cu",
            "const int64_t from = load_same(a.starts + label)",
            "const int64_t from = 1 + load_same(a.starts + label)",
            0,
        ),
    ),
    ("plain", ("simt.cuh", "int step = kWarp / 2; step > 0", "int step = kWarp / 2; step > 1", 0)),  # half a shuffle
    ("plain", ("em_step.cu", "if (!partial) return;", "if (threadIdx.x >= 64) return;", 0)),  # a divergent barrier
    ("plain", ("simt.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu", 0)),  # lanes out of their mask
    ("plain", ("em_step.cu", "stat_r[k] = 0;", "", 0)),  # shared memory before it is written
    (
        "address",
        (
            "em_step.cu",
            "const int body = (total - head) / kVector * kVector",
            "const int body = (total - head + kVector - 1) / kVector * kVector",
            0,
        ),
    ),
    ("address", ("em_step.cu", "k % c] = to_float(load(x + k))", "k % c] = to_float(load(x + k + 1))", 1)),
    (
        "address",
        ("em_step.cu", "16 - reinterpret_cast<uintptr_t>(x) % 16", "16 + 0 * reinterpret_cast<uintptr_t>(x) % 16", 0),
    ),  # misaligned
    (
        "thread",
        ("em_step.cu", "copy = int(threadIdx.x) / c", "copy = int(threadIdx.x) / c / 2 * 2", 0),
    ),  # two threads, one sum
    (
        "thread",
        ("em_step.cu", "partial + int64_t(blockIdx.x) * (sums", "partial + 0 * (sums", 0),
    ),  # two blocks, one number
]
FAULTS = KINDS
if not ALL_FAULTS:
    FAULTS = [next(fault for fault in KINDS if fault[0] == name) for name in harness.SANITIZERS]


@pytest.mark.parametrize(("sanitizer", "fault"), FAULTS, ids=str)
def test_a_planted_fault_is_caught(sanitizer, fault):
    ran = harness.drive(harness.build(sanitizer, fault), "few" if sanitizer != "address" else "edges")
    assert not passes(ran), f"{fault} went unseen"


# Four warps share a row of 2000 bytes, and each reads its label, place and clean probability: 48 bytes more, which a
# processor's cache answers. The rest is what a team of 512 rows leaves for the sums.
OVER_FLOOR = {("aux_estep", "bfloat16", 1000): 1.08}


@slow
def test_bytes_exps_and_widths_are_those_of_the_committed_table():
    found = harness.counts()
    assert found == (RESULTS / "cuda_counts.csv").read_text(), "python tests/cuda_on_cpu/harness.py counts"
    for row in csv.DictReader(io.StringIO(found)):
        assert float(row["exps_an_element"]) == 1
        cell = row["op"], row["dtype"], int(row["classes"])
        assert float(row["bytes_over_floor"]) <= OVER_FLOOR.get(cell, 1.05), cell


@slow
@pytest.mark.skipif(not (harness.nvcc() or REQUIRED), reason="no nvcc")
def test_no_kernel_spills():
    rows = list(csv.DictReader(io.StringIO(harness.ptxas())))
    assert {row["architecture"] for row in rows} == {f"sm_{a}" for a in harness.ARCHITECTURES}
    assert not [row for row in rows if int(row["spill_bytes"]) or int(row["stack_bytes"])]
