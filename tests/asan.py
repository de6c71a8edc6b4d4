"""The tests of the ops with CPU kernels that AddressSanitizer watches.

    python -m tests.asan [words for pytest]

Compiles the kernels into a copy of the package in build/asan, so that the ordinary one stays as it is, and runs
tests/test_ops.py on it. A read or write out of bounds ends the command with AddressSanitizer's report and a status that
is not 0. Linux and GCC only; of the instruction sets, the one that this processor takes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from torch.utils import cpp_extension

from setup import SINCE_TORCH_2_11

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "asan"
# Checks are calls: written out, they keep the compiler busy with the kernels' registers for half an hour.
FLAGS = ["-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0", "-g", "-O1", "-fPIC"]
FLAGS += ["-std=c++20", "-Wno-psabi", SINCE_TORCH_2_11, "-DTORCH_EXTENSION_NAME=_C"]
FLAGS += [f"-I{folder}" for folder in [*cpp_extension.include_paths(), pybind11.get_include()]]
FLAGS += [f"-I{sysconfig.get_path('include')}"]
# That the tests would have this build, and that it is watched.
CHECK = """
from pathlib import Path
import torch
from flywheel_fast import _C
assert "asan" in _C.__file__ and b"__asan_init" in Path(_C.__file__).read_bytes(), _C.__file__
"""


def compile_into(package: Path) -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(ROOT / "flywheel_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    objects = []
    for source in [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")]:
        objects.append(str(BUILD / f"{source.stem}.o"))
        subprocess.run(["g++", *FLAGS, "-c", str(source), "-o", objects[-1]], check=True)
    library = str(package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    torch = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu"]
    subprocess.run(["g++", "-fsanitize=address", "-shared", *objects, *torch, "-o", library], check=True)


def main() -> None:
    compile_into(BUILD / "flywheel_fast")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second, so that exceptions are caught
    ]
    watched = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python and torch
        "PYTHONPATH": str(BUILD),
    }
    python = [sys.executable, "-P"]
    subprocess.run([*python, "-c", CHECK], cwd=BUILD, env=watched, check=True)
    pytest = ["-m", "pytest", "-n", "0", "-o", f"pythonpath={BUILD}", "tests/test_ops.py", *sys.argv[1:]]
    pytest.append("--capture=sys")  # AddressSanitizer's report goes past pytest
    sys.exit(subprocess.run([*python, *pytest], cwd=ROOT, env=watched, check=False).returncode)


if __name__ == "__main__":
    main()
