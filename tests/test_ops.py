"""Every op against its float64 reference: types, shapes, devices, odd values, gradients, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_fast import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 10, 14, 16, 17, 31, 32, 33, 50, 100, 200, 257, 1000, 2049]
OPS = ["main_estep", "aux_estep", "em_step", "posterior", "posterior_loss"]
KINDS = ["mixture", "joint"]
NAMES = {
    "main_estep": ("logits", "labels", "gamma", "eps"),
    "aux_estep": ("logits", "labels", "clean_prob", "corruption", "align", "kind"),
    "em_step": ("main_logits", "aux_logits", "labels", "gamma", "eps", "corruption", "align", "kind"),
    "posterior": ("logits", "labels", "clean_prob", "corruption", "kind"),
    "posterior_loss": ("logits", "teacher_logits", "labels", "clean_prob", "corruption", "kind", "confidence"),
}

if ops.why_not_native():
    pytest.skip(f"native ops {ops.why_not_native()}", allow_module_level=True)


def inputs(n, c, dtype=torch.float32, device="cpu", seed=0, scale=3.0, kind="mixture", views=2):
    """Every operand by name; `of` picks those of an op."""
    generator = torch.Generator().manual_seed(seed)

    def logits(rows):
        return (scale * torch.randn(rows, c, generator=generator)).to(dtype)

    corruption = torch.rand(c, c, generator=generator).fill_diagonal_(0)
    operands = {
        "main_logits": logits(n),
        "aux_logits": logits(n),
        "students": logits(views * n),
        "labels": torch.randint(c, (n,), generator=generator),
        "gamma": torch.rand((), generator=generator, dtype=torch.float64),
        "eps": torch.rand(n, generator=generator),
        "clean_prob": torch.rand(n, generator=generator),
        "corruption": corruption / corruption.sum(dim=1, keepdim=True).clamp_min(1e-9),
        "align": 0.5 + torch.rand(c, generator=generator),
    }
    return {name: t.to(device) for name, t in operands.items()} | {"kind": kind, "confidence": 0.1}


def of(op, operands):
    main = {"main_estep": "main_logits", "posterior_loss": "students"}.get(op, "aux_logits")
    renamed = operands | {"logits": operands[main], "teacher_logits": operands["aux_logits"]}
    return {name: renamed[name] for name in NAMES[op]}


def exact(value):
    return (
        value.cpu().double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else (value.cpu() if isinstance(value, torch.Tensor) else value)
    )


def close(found, wanted, absolute=2e-6, relative=2e-5):
    assert found.shape == wanted.shape
    assert torch.allclose(found.cpu().double(), wanted, atol=absolute, rtol=relative, equal_nan=True)


def check_aux(found, wanted, logits, align, q):
    """Labels are compared by the value they were chosen for: rounding may decide between near equals."""
    assert found.resampled_label.dtype == found.suggested_label.dtype == torch.int64
    assert found.eps.dtype == torch.float32 and found.class_sum.dtype == torch.float64
    n, c = logits.shape
    close(found.suggested_prob, wanted.suggested_prob, 2e-4 if n and c == 2 else 2e-5)
    close(found.eps, wanted.eps)
    for name in ("corrupted_sum", "posterior_sum", "class_sum"):
        close(getattr(found, name), getattr(wanted, name), 2e-5 + 1e-7 * n, 2e-5)
    certain = wanted.suggested_prob.isfinite()
    f = logits.softmax(dim=1) * align  # [N, C]
    for label, of_label in ((found.resampled_label, f), (found.suggested_label, q)):
        label = label.cpu()
        assert ((label >= 0) & (label < c)).all()
        chosen = of_label.gather(1, label[:, None])[certain, 0]
        close(chosen, of_label.amax(dim=1)[certain], 2e-4)


def check(op, operands):
    given_ = of(op, operands)
    wanted_of = {name: exact(value) for name, value in given_.items()}
    if op == "posterior_loss":
        return check_loss(given_, wanted_of)
    found, wanted = getattr(ops, op)(**given_), getattr(reference, op)(**wanted_of)
    if op == "posterior":
        return close(found, wanted, 2e-5)
    if op != "aux_estep":
        clean_prob, clean_sum = found[:2]
        assert clean_prob.dtype == torch.float32 and clean_sum.dtype == torch.float64
        close(clean_prob, wanted[0])
        close(clean_sum, clean_prob.cpu().sum(dtype=torch.float64), 0, 1e-12)
        if op == "main_estep":
            return None
        # the statistics follow from clean_prob as it was rounded
        wanted_of = of("aux_estep", operands) | {"clean_prob": clean_prob}
        wanted_of = {name: exact(value) for name, value in wanted_of.items()}
        found, wanted = found[2], reference.aux_estep(**wanted_of)
    q = reference.posterior(**{name: wanted_of[name] for name in NAMES["posterior"]})
    check_aux(found, wanted, wanted_of["logits"], wanted_of["align"], q)
    return None


def check_loss(given_, wanted_of):
    student, exact_student = given_["logits"].requires_grad_(), wanted_of["logits"].requires_grad_()
    found, wanted = ops.posterior_loss(**given_), reference.posterior_loss(**wanted_of)
    assert found.dtype == torch.float32 and found.shape == ()
    close(found.detach(), wanted.detach())
    if not len(student):
        return
    (gradient,), (exact_gradient,) = torch.autograd.grad(found, student), torch.autograd.grad(wanted, exact_student)
    assert gradient.dtype == student.dtype
    n, rounding = len(student), {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[student.dtype]
    smallest = 6e-8 if student.dtype == torch.float16 else 0  # float16's subnormals
    close(gradient.double() * n, exact_gradient * n, 2e-5 + smallest * n, rounding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("op", OPS)
def test_op_is_the_oracle(op, c, dtype, device):
    for n in (0, 1, 15, 16, 17, 129, 3000) if c <= 257 else (0, 1, 17, 129):
        for kind in KINDS if op != "main_estep" else KINDS[:1]:
            check(op, inputs(min(n, 200_000 // c), c, dtype, device, kind=kind))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("c", [300, 1000])
def test_labels_that_fill_many_parts(c, device):
    """Skewed labels: one label's rows lie in several parts of the sorted rows, and others have none."""
    operands = inputs(5000, c, device=device)
    operands["labels"] = (operands["labels"] % 7) ** 3 % c
    check("em_step", operands)
    operands["labels"].fill_(c - 1)
    check("em_step", operands)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("c", [2, 10, 40])
@pytest.mark.parametrize("op", OPS[:4])
def test_edges(op, c, device):
    inf, nan = float("inf"), float("nan")
    operands = inputs(64, c, device=device)
    for name in ("main_logits", "aux_logits"):
        x = operands[name]
        x[0], x[1], x[2] = 200.0, -200.0, 0.0
        x[3, 0], x[3, 1:] = 300.0, -300.0
        x[4, 1] = -inf
        x[8] = 3e38
    operands["labels"][3:5] = 1
    operands["eps"][10:13] = torch.tensor([0.0, 1e-30, 1.0])
    operands["clean_prob"][10:12] = torch.tensor([0.0, 1.0])
    for gamma in (0.0, 1e-12, 0.5, 1 - 1e-7, 1.0):
        operands["gamma"].fill_(gamma)
        check(op, operands)
    for name in ("main_logits", "aux_logits"):
        x = operands[name]
        x[5, 0], x[6, 1], x[7] = nan, inf, -inf
    found = getattr(ops, op)(**of(op, operands))
    first = found if op == "posterior" else found.eps if op == "aux_estep" else found[0]
    assert first[5:8].isnan().all() and not first[8:].isnan().any() and not first[:5].isnan().any()


def test_a_teacher_at_minus_infinity():
    operands = inputs(20, 10)
    operands["aux_logits"][3, 4] = -float("inf")
    check("posterior_loss", operands)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_non_contiguous_inputs(op, device):
    operands = inputs(60, 40, device=device, views=1)
    given_ = of(op, operands)
    strided = {
        name: value.t().contiguous().t() if isinstance(value, torch.Tensor) and value.dim() == 2 else value
        for name, value in given_.items()
    }
    for a, b in zip(flat(getattr(ops, op)(**strided)), flat(getattr(ops, op)(**given_)), strict=True):
        assert torch.equal(a, b)
    shared = ("gamma", "corruption", "align", "kind", "confidence")
    rows = {name: value if name in shared else value[1:] for name, value in operands.items()}
    check(op, rows)  # rows that start off a 16-byte boundary
    check(op, {name: value if name in shared else value[::2] for name, value in operands.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("c", [10, 40, 300])
@pytest.mark.parametrize("op", ["aux_estep", "em_step"])
def test_out_is_overwritten_and_its_sums_are_added_to(op, c, dtype):
    given_ = of(op, inputs(100, c))
    given_ |= {name: given_[name].to(dtype) for name in given_ if name.endswith("logits")}
    halves = [
        {
            name: t[part]
            if isinstance(t, torch.Tensor) and t.shape[:1] == (100,) and name not in ("align", "corruption")
            else t
            for name, t in given_.items()
        }
        for part in (slice(50), slice(50, 100))
    ]
    whole = getattr(ops, op)(**given_)
    first = getattr(ops, op)(**halves[0])
    aux = first if op == "aux_estep" else first[2]
    out = aux.of_others(50) if op == "aux_estep" else (torch.empty(50), first[1], aux.of_others(50))
    second = getattr(ops, op)(**halves[1], out=out)
    assert all(a is b for a, b in zip(flat(second), flat(out), strict=True))
    for found, wanted in zip(flat(second), flat(whole), strict=True):
        wanted = wanted[50:] if wanted.shape == (100,) else wanted
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-5)


def flat(found):
    return [t for part in found for t in flat(part)] if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("c", [10, 100, 300])
@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_number_of_threads(op, c):
    arguments = of(op, inputs(400_000 // c, c))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(flat(getattr(ops, op)(**arguments)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@settings(max_examples=1000, deadline=None)
@given(
    op=st.sampled_from(OPS),
    n=st.integers(0, 70),
    c=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
    dtype=st.sampled_from(TYPES),
    kind=st.sampled_from(KINDS),
)
def test_anything(op, n, c, seed, scale, dtype, kind):
    check(op, inputs(n, c, dtype, seed=seed, scale=scale, kind=kind))


@pytest.mark.parametrize("c", [10, 40])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, c):
    given_ = of(op, inputs(20, c))
    if op == "posterior_loss":
        order = ("logits", "labels", "teacher_logits", "clean_prob", "corruption")
        arguments = (*(given_[name] for name in order), False, 0.1, 1e-4)
        arguments[0].requires_grad_()
    else:
        arguments = tuple(value == "joint" if name == "kind" else value for name, value in given_.items())
        clean, aux = (torch.empty(20), torch.zeros((), dtype=torch.float64)), ops.AuxEStep.empty(20, c, "cpu")
        aux = (*aux[:4], *(t.contiguous() for t in aux[4:]))
        written = {"main_estep": clean, "aux_estep": (None, None, *aux), "em_step": (None, None, *clean, *aux)}
        arguments += written.get(op, ())
    torch.library.opcheck(getattr(torch.ops.flywheel_fast, op), arguments)


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(op):
    arguments = of(op, inputs(20, 10))
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    for a, b in zip(flat(compiled(**arguments)), flat(getattr(ops, op)(**arguments)), strict=True):
        assert torch.equal(a, b)


def test_the_loss_twice_in_one_graph():
    operands = inputs(30, 10, views=1)
    student = operands["students"].requires_grad_()
    arguments = of("posterior_loss", operands)
    (once,) = torch.autograd.grad(ops.posterior_loss(**arguments), student)
    loss = ops.posterior_loss(**arguments) + 2 * ops.posterior_loss(**arguments)
    (thrice,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.allclose(thrice, 3 * once, rtol=1e-5)
    assert torch.equal(torch.autograd.grad(loss, student)[0], thrice)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_loss_on_labels_alone(views):
    operands = inputs(30, 10, views=views)
    student = operands["students"].requires_grad_()
    found = ops.posterior_loss(student, None, operands["labels"], None, None)
    wanted = torch.nn.functional.cross_entropy(student, operands["labels"].repeat(views))
    assert torch.allclose(found, wanted, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_loss_in_float64_by_gradcheck(kind):
    given_ = {name: exact(value) for name, value in of("posterior_loss", inputs(5, 4, kind=kind)).items()}
    student = given_.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.posterior_loss(x, **given_), (student,))


@pytest.mark.parametrize("value", [80.0, 400.0])
def test_the_loss_at_saturated_logits_has_a_finite_gradient(value):
    operands = inputs(6, 5, views=1)
    x = operands["students"]
    x[:], x[range(6), [0, 1, 2, 3, 4, 0]] = -value, value
    check("posterior_loss", operands)
    (gradient,) = torch.autograd.grad(ops.posterior_loss(**of("posterior_loss", operands)), x)
    assert gradient.isfinite().all()


def test_float64_goes_to_the_reference():
    operands = {name: exact(value) for name, value in inputs(20, 10).items()}
    for op in OPS[:4]:
        first = flat(getattr(ops, op)(**of(op, operands)))[0]
        assert first.dtype in (torch.float64, torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("eps", torch.empty(4), r"eps must have shape \[N\]"),
        ("suggested_label", torch.empty(5), "suggested_label must be int64"),
        ("corrupted_sum", torch.zeros(3, 3), "corrupted_sum must be float64"),
        ("posterior_sum", torch.zeros(3, 3, dtype=torch.float64), "posterior_sum must be contiguous"),
        ("class_sum", torch.zeros(4, dtype=torch.float64), r"class_sum must have shape \[C\]"),
    ],
)
def test_what_is_wrong_of_out_is_named(name, value, said):
    out = ops.AuxEStep.empty(5, 3, torch.device("cpu"))._replace(**{name: value})
    with pytest.raises(RuntimeError, match=f"aux_estep: {said}"):
        ops.aux_estep(**of("aux_estep", inputs(5, 3)), out=out)


WRONG = [
    ("logits", torch.zeros(5), r"logits must have shape \[N, C\]"),
    ("logits", torch.zeros(5, 0), "C > 0"),
    ("labels", torch.zeros(4, dtype=torch.int64), r"labels must have shape \[N\] with N = 5|whole number of rows"),
    ("labels", torch.zeros(5, dtype=torch.int32), "labels must be int64"),
    ("labels", torch.tensor([0, 1, 2, 3, 1]), r"labels\[3\] is 3, outside 0..2"),
    ("labels", torch.tensor([0, -1, 2, 2, 1]), r"labels\[1\] is -1"),
    ("eps", torch.zeros(5, dtype=torch.float64), "eps must be float32, not float64"),
    ("eps", torch.zeros(5, 1), r"eps must have shape \[N\]"),
    ("gamma", torch.tensor(0.5), "gamma must be float64, not float32"),
    ("gamma", torch.tensor([0.5], dtype=torch.float64), "gamma must be a 0-dim tensor"),
    ("clean_prob", torch.zeros(4), r"clean_prob must have shape \[N\]"),
    ("corruption", torch.zeros(3, 2), r"corruption must have shape \[C, C\] with C = 3"),
    ("corruption", torch.zeros(3, 3, dtype=torch.float64), "corruption must be float32"),
    ("align", torch.ones(4), r"align must have shape \[C\] with C = 3"),
    ("teacher_logits", torch.zeros(5, 4), r"teacher_logits must have shape \[5, 3\]"),
    ("aux_logits", torch.zeros(4, 3), r"aux_logits must have shape \[5, 3\]"),
]


@pytest.mark.parametrize(
    ("op", "name", "value", "said"),
    [(op, *wrong) for op in OPS for wrong in WRONG if wrong[0] in NAMES[op]],
)
def test_what_is_wrong_is_named(op, name, value, said):
    with pytest.raises(RuntimeError, match=f"{op}: .*({said})"):
        getattr(ops, op)(**of(op, inputs(5, 3, views=1)) | {name: value})


@pytest.mark.parametrize("op", ["aux_estep", "em_step", "posterior", "posterior_loss"])
def test_an_unknown_kind_is_named(op):
    with pytest.raises(ValueError, match="'mixture' or 'joint', not 'both'"):
        getattr(ops, op)(**of(op, inputs(5, 3)) | {"kind": "both"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("op", OPS)
def test_another_device_is_named(op):
    with pytest.raises(RuntimeError, match="labels must be on the logits' device"):
        getattr(ops, op)(**of(op, inputs(5, 3, device="cuda")) | {"labels": torch.zeros(5, dtype=torch.int64)})
