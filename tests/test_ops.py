"""Every op against its float64 reference: types, shapes, devices, odd values, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_fast import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 10, 14, 16, 31, 32, 33, 50, 100, 200, 1000, 2049]

if ops.why_not_native():
    pytest.skip(f"native ops {ops.why_not_native()}", allow_module_level=True)


def inputs(n, c, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, c, generator=generator)).to(dtype)
    labels = torch.randint(c, (n,), generator=generator)
    gamma = torch.rand((), generator=generator, dtype=torch.float64)
    eps = torch.rand(n, generator=generator)
    return [t.to(device) for t in (logits, labels, gamma, eps)]


def check_main_estep(logits, labels, gamma, eps, tolerance=2e-6):
    exact, exact_sum = reference.main_estep(logits.cpu().double(), labels.cpu(), gamma.cpu(), eps.cpu().double())
    found, found_sum = ops.main_estep(logits, labels, gamma, eps)
    assert found.dtype == torch.float32 and found_sum.dtype == torch.float64 and found_sum.shape == ()
    assert torch.allclose(found.cpu().double(), exact, atol=tolerance, rtol=2e-5, equal_nan=True)
    assert torch.allclose(found_sum.cpu(), found.cpu().sum(dtype=torch.float64), rtol=1e-12, equal_nan=True)
    if exact.isfinite().all():
        assert abs(found_sum.item() - exact_sum.item()) <= tolerance * len(labels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 129, 3000])
def test_main_estep_is_the_oracle(n, c, dtype, device):
    check_main_estep(*inputs(min(n, 200_000 // c), c, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("c", [2, 10, 40])
def test_main_estep_at_the_edges(c, device):
    inf, nan = float("inf"), float("nan")
    logits, labels, gamma, eps = inputs(64, c, device=device)
    logits[0], logits[1], logits[2] = 200.0, -200.0, 0.0
    logits[3, 0], logits[3, 1:] = 300.0, -300.0
    logits[4, 1] = -inf
    logits[5, 0], logits[6, 1], logits[7] = nan, inf, -inf
    logits[8] = 3e38
    labels[3], labels[4] = 1, 1
    eps[10], eps[11], eps[12] = 0.0, 1e-30, 1.0
    for g in (0.0, 1e-12, 0.5, 1 - 1e-7, 1.0):
        check_main_estep(logits, labels, torch.full_like(gamma, g), eps)
    w, _ = ops.main_estep(logits, labels, gamma, eps)
    assert w[5:8].isnan().all() and not w[8:].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_main_estep_of_non_contiguous_inputs(device):
    logits, labels, gamma, eps = inputs(60, 40, device=device)
    strided = logits.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(ops.main_estep(strided, labels, gamma, eps)[0], ops.main_estep(logits, labels, gamma, eps)[0])
    check_main_estep(logits[1:], labels[1:], gamma, eps[1:])  # rows that start off a 16-byte boundary
    check_main_estep(logits[::2], labels[::2], gamma, eps[::2])
    check_main_estep(logits[:, 3:17], labels % 14, gamma, eps)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_main_estep_does_not_depend_on_the_number_of_threads(dtype):
    arguments = inputs(40_000, 10, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.main_estep(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(0, 70),
    c=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
    dtype=st.sampled_from(TYPES),
)
def test_main_estep_of_anything(n, c, seed, scale, dtype):
    check_main_estep(*inputs(n, c, dtype, seed=seed, scale=scale))


def test_main_estep_passes_opcheck():
    torch.library.opcheck(torch.ops.flywheel_fast.main_estep, tuple(inputs(20, 10)))


def test_main_estep_compiles_without_a_graph_break():
    arguments = inputs(20, 10)
    compiled = torch.compile(ops.main_estep, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments)[0], ops.main_estep(*arguments)[0])


def test_float64_goes_to_the_reference():
    logits, labels, gamma, eps = inputs(20, 10)
    w, _ = ops.main_estep(logits.double(), labels, gamma, eps)
    assert w.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.zeros(5)}, r"logits must have shape \[N, C\]"),
        ({"logits": torch.zeros(5, 0)}, "C > 0"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels must have shape \[N\] with N = 5"),
        ({"labels": torch.zeros(5, dtype=torch.int32)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, 2, 3, 1])}, r"labels\[3\] is 3, outside 0..2"),
        ({"labels": torch.tensor([0, -1, 2, 2, 1])}, r"labels\[1\] is -1"),
        ({"eps": torch.zeros(5, dtype=torch.float64)}, "eps must be float32, not float64"),
        ({"eps": torch.zeros(5, 1)}, r"eps must have shape \[N\]"),
        ({"gamma": torch.tensor(0.5)}, "gamma must be float64, not float32"),
        ({"gamma": torch.tensor([0.5], dtype=torch.float64)}, "gamma must be a 0-dim tensor"),
    ],
)
def test_main_estep_names_what_is_wrong(change, said):
    arguments = dict(zip(("logits", "labels", "gamma", "eps"), inputs(5, 3), strict=True)) | change
    with pytest.raises(RuntimeError, match=f"main_estep: .*{said}|{said}"):
        ops.main_estep(**arguments)
