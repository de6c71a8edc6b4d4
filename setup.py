"""Builds flywheel_fast/_C from csrc/ against libtorch's stable ABI, so that one build serves every torch from 2.11 on.

FLYWHEEL_BUILD=auto (default): CUDA kernels too where torch has CUDA and a toolkit is found; cuda: insist; cpu: without.
Without a C++ compiler the package installs all the same and runs on its PyTorch reference.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

SINCE_TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ROOT = Path(__file__).parent
ARCHS = ("8.0", "9.0", "10.0")  # where there is no GPU to ask; later ones run the last one's PTX


def say(text: str) -> None:
    print(f"flywheel-fast: {text}", file=sys.stderr, flush=True)


def cuda_home() -> str | None:
    """The toolkit's folder; an nvcc on PATH may be a wrapper script far from it, so it is asked."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        ran = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
        candidates += re.findall(r"^#\$ TOP=(.+)$", ran.stderr, re.MULTILINE)
    candidates.append("/usr/local/cuda")
    return next((str(Path(c).resolve()) for c in candidates if c and Path(c, "bin", "nvcc").exists()), None)


def extension():
    """The extension and its build command, or nothing without a compiler."""
    wanted = os.environ.get("FLYWHEEL_BUILD", "auto")
    if wanted not in ("auto", "cuda", "cpu"):
        sys.exit(f"FLYWHEEL_BUILD must be auto, cuda or cpu, not {wanted!r}")
    compiler = os.environ.setdefault("CXX", "c++" if shutil.which("c++") else "g++")
    if not shutil.which(compiler.split()[0]):
        say(f"no C++ compiler ({compiler}): installing without native ops; everything runs on the PyTorch reference")
        return {}
    home = cuda_home() if wanted != "cpu" else None
    if home:
        os.environ["CUDA_HOME"] = home  # read when torch.utils.cpp_extension is imported

    import pybind11
    import torch
    from torch.utils import cpp_extension

    why_not_cuda = "FLYWHEEL_BUILD=cpu" if wanted == "cpu" else cuda_obstacle(home, torch.version.cuda)
    with_cuda = not why_not_cuda
    if wanted == "cuda" and why_not_cuda:
        sys.exit(f"FLYWHEEL_BUILD=cuda: {why_not_cuda}")
    if wanted == "auto" and why_not_cuda and torch.version.cuda:
        say(f"building the CPU ops only: {why_not_cuda}")
    if with_cuda and "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        known = [arch for arch in ARCHS if arch.replace(".", "") in toolkit_archs(home)]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join([*known[:-1], f"{known[-1]}+PTX"])

    folders = ("", "cpu", "cuda") if with_cuda else ("", "cpu")
    sources = [
        str(p.relative_to(ROOT))
        for f in folders
        for p in sorted((ROOT / "csrc" / f).glob("*.c*"))
        if p.suffix in (".cpp", ".cu")
    ]
    headers = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".cuh")]
    flags = ["-O3", "-std=c++20", "-Wall", "-fvisibility=hidden", SINCE_TORCH_2_11]
    if with_cuda:
        flags += [f"-DFLYWHEEL_CUDA={torch.version.cuda}", "-DUSE_CUDA"]
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    module = make(
        "flywheel_fast._C",
        sources,
        include_dirs=[pybind11.get_include()],
        depends=headers,
        extra_compile_args={"cxx": [*flags, "-Wno-psabi"], "nvcc": ["-O3", "-std=c++20", SINCE_TORCH_2_11]},
    )
    module.libraries = [name for name in module.libraries if name in ("torch", "torch_cpu", "cudart")]
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


def cuda_obstacle(home: str | None, torch_cuda: str | None) -> str:
    """Why the CUDA ops cannot be built; empty where they can."""
    if torch_cuda is None:
        return "this torch has no CUDA"
    if home is None:
        return "no CUDA toolkit found (set CUDA_HOME to its folder)"
    ran = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.", ran.stdout)
    if not found or found[1] != torch_cuda.split(".")[0]:
        return f"the toolkit in {home} is CUDA {found[1] if found else '?'}, torch is built with CUDA {torch_cuda}"
    return ""


def toolkit_archs(home: str) -> set[str]:
    ran = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False)
    return set(re.findall(r"compute_(\d+)\b", ran.stdout))


if __name__ == "__main__":
    setup(**extension())
