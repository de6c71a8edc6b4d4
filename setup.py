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
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler.split()[0]) or shutil.which("g++")):
        say(f"no C++ compiler ({compiler}): installing without native ops; everything runs on the PyTorch reference")
        return {}
    home = cuda_home() if wanted != "cpu" else None
    if home:
        os.environ["CUDA_HOME"] = home  # read when torch.utils.cpp_extension is imported

    import pybind11
    import torch
    from torch.utils import cpp_extension

    with_cuda = wanted == "cuda" or (wanted == "auto" and torch.version.cuda is not None and home is not None)
    if wanted == "cuda" and (home is None or torch.version.cuda is None):
        sys.exit("FLYWHEEL_BUILD=cuda: needs a torch with CUDA and a toolkit (set CUDA_HOME to its folder)")
    if wanted == "auto" and not with_cuda and torch.version.cuda:
        say("no CUDA toolkit found: building the CPU ops only (set CUDA_HOME to the toolkit's folder for the others)")
    if with_cuda and "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        known = [arch.removeprefix("sm_") for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
        known = known or ["80", "90", "100"]
        archs = [f"{a[:-1]}.{a[-1]}" for a in known if a in toolkit_archs(home)]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join([*archs[:-1], f"{archs[-1]}+PTX"])

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


def toolkit_archs(home: str) -> set[str]:
    ran = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False)
    return set(re.findall(r"compute_(\d+)\b", ran.stdout))


if __name__ == "__main__":
    setup(**extension())
