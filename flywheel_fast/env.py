"""What a run was made with: versions, processor, GPU, native build; and whether the ops compute what they should."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from flywheel_fast import __version__, ops, reference

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "timm", "omegaconf")


def describe() -> dict[str, str]:
    """For env.json and `flywheel-fast doctor`."""
    found = {"flywheel-fast": f"{__version__}{_commit()}", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    found["processor"] = f"{_processor()}, {torch.get_num_threads()} threads"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["GPU"] = ", ".join(gpus) or "none"
    found["native ops"] = ops.why_not_native() or _build()
    if not ops.why_not_native():
        found["native CUDA ops"] = ops.why_not_native("cuda") or "built"
    return found


def self_test() -> dict[str, tuple[bool, str]]:
    """Each native op against the float64 reference on each device: passed, and the largest error."""
    results = {}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        if why_not := ops.why_not_native(device):
            results[f"ops on {device}"] = (True, f"on the reference; native ops {why_not}")
            continue
        for op, arguments in _operands().items():
            exact = _values(getattr(reference, op)(*arguments))
            native = [_as_native(a, device) for a in arguments]
            found = _values(getattr(ops, op)(*native))
            error = max((f.cpu() - e).abs().max().item() for f, e in zip(found, exact, strict=True))
            results[f"{op} {device}"] = (error < 1e-4, f"largest error {error:.1e}")
    return results


def _operands() -> dict[str, tuple]:
    """Arguments of every op, in float64."""
    generator = torch.Generator().manual_seed(0)
    n, c = 257, 10

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    main, aux = (torch.randn(n, c, generator=generator).double() for _ in range(2))
    labels = torch.randint(c, (n,), generator=generator)
    corruption = uniform(c, c).fill_diagonal_(0)
    corruption /= corruption.sum(dim=1, keepdim=True)
    gamma, eps, clean_prob, align = uniform(()), uniform(n), uniform(n), uniform(c) + 0.5
    return {
        "main_estep": (main, labels, gamma, eps),
        "aux_estep": (aux, labels, clean_prob, corruption, align, "joint"),
        "em_step": (main, aux, labels, gamma, eps, corruption, align, "mixture"),
        "posterior": (aux, labels, clean_prob, corruption, "joint"),
        "posterior_loss": (main, aux, labels, clean_prob, corruption, "mixture", 0.1),
    }


def _as_native(value, device: str):
    """float32 on the device, but gamma stays float64."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, torch.float32 if value.is_floating_point() and value.dim() else value.dtype)


def _values(found) -> list[torch.Tensor]:
    if isinstance(found, tuple):
        return [value for part in found for value in _values(part)]
    return [found.double()]


def _build() -> str:
    from flywheel_fast import _C

    info = _C.build_info()
    return f"built by {info['compiler']}, CUDA {info['cuda'] or 'left out'}; CPU kernels: {info['cpu_kernels']}"


def _commit() -> str:
    """The checkout's commit, where the package runs from one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return f" ({subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()})"
    except (OSError, subprocess.CalledProcessError):  # no git, or not ours to ask
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
