"""The native part is what it should be here: built, with CUDA where there is a compiler for it, and honest about it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from flywheel_fast import ops


def test_native_ops_are_built():
    if os.environ.get("FLYWHEEL_NATIVE") == "0" or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler here, or native ops switched off")
    assert ops.why_not_native() == ""


def test_cuda_kernels_are_compiled_where_there_is_a_compiler():
    required = os.environ.get("FLYWHEEL_REQUIRE_CUDA") == "1"
    if not (required or (shutil.which("nvcc") and torch.version.cuda)):
        pytest.skip("no CUDA compiler, or a torch without CUDA: kernels were not built")
    assert ops.why_not_native("cuda") == ""


def test_only_the_stable_abi_is_used():
    """No symbol of torch's C++ interface: one build serves every torch from 2.11 on."""
    from flywheel_fast import _C

    if not shutil.which("nm"):
        pytest.skip("no nm here")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", "-C", _C.__file__], capture_output=True, text=True)
    taken = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines()]
    assert any("aoti_torch" in name or "torch_call_dispatcher" in name for name in taken)
    assert not [name for name in taken if name.startswith(("at::", "c10::", "torch::"))]


def test_ops_can_be_switched_off():
    code = "from flywheel_fast import ops; print(ops.why_not_native())"
    off = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FLYWHEEL_NATIVE": "0"}, capture_output=True, text=True
    )
    assert "FLYWHEEL_NATIVE=0" in off.stdout
