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
        generator = torch.Generator().manual_seed(0)
        logits, labels = torch.randn(257, 10, generator=generator), torch.randint(10, (257,), generator=generator)
        gamma, eps = torch.tensor(0.6, dtype=torch.float64), torch.rand(257, generator=generator)
        exact, _ = reference.main_estep(logits.double(), labels, gamma, eps)
        found, _ = ops.main_estep(*(t.to(device) for t in (logits, labels, gamma, eps)))
        error = (found.cpu() - exact).abs().max().item()
        results[f"main_estep {device}"] = (error < 1e-5, f"largest error {error:.1e}")
    return results


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
