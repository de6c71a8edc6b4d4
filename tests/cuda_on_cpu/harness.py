"""Builds the CUDA kernels as plain C++ against the emulation, and the tables that are counted and compiled from them.

python tests/cuda_on_cpu/harness.py counts > benchmarks/results/cuda_counts.csv
python tests/cuda_on_cpu/harness.py ptxas > benchmarks/results/cuda_ptxas.csv
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
FLAGS = (
    "-std=c++20 -O1 -g -Wall -Werror -Wno-unknown-pragmas -Wno-dangling-pointer -fno-strict-aliasing "
    "-fno-omit-frame-pointer"
)
SANITIZERS = {  # name -> flags of kernels and driver, flags of the scheduler
    "plain": ("", ""),
    "address": ("-fsanitize=address,undefined -fno-sanitize-recover=undefined", "-DTELL_ASAN"),
    "thread": ("-fsanitize=thread", "-DTELL_TSAN"),
}
ARCHITECTURES = ("80", "90", "100")
WARPS_OF_A_PROCESSOR, REGISTERS_OF_A_PROCESSOR, WARPS_OF_A_BLOCK = 64, 65536, 4


def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = next((f"{home}/bin/nvcc" for home in homes if home and Path(home, "bin", "nvcc").exists()), None)
    return found or shutil.which("nvcc")


def cuda_headers() -> Path | None:
    """The folder of cuda_bf16.h and what it includes: of the packages that torch brings, or of the toolkit."""
    packages = find_spec("nvidia")
    folders = [Path(p) for p in packages.submodule_search_locations] if packages else []
    candidates = [header.parent for folder in folders for header in folder.glob("*/include/cuda_bf16.h")]
    if compiler := nvcc():
        ran = subprocess.run([compiler, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
        candidates += [Path(top, "include") for top in re.findall(r"^#\$ TOP=(.+)$", ran.stderr, re.MULTILINE)]
    return next(
        (c for c in candidates if (c / "cuda_bf16.h").exists() and (c / "crt" / "host_defines.h").exists()), None
    )


def build(sanitizer: str = "plain", fault: tuple[str, str, str, int] | None = None) -> Path:
    """The driver's path; built once for each content. A fault is (file, old text, new text, which occurrence)."""
    flags, scheduler_flags = SANITIZERS[sanitizer]
    sources = {path: path.read_text() for path in [*KERNELS.glob("*"), ROOT / "csrc" / "math.h", *HERE.glob("*.*")]}
    sources = {path: text for path, text in sources.items() if path.suffix in (".cu", ".cuh", ".h", ".cpp")}
    common = [FLAGS, "-isystem", str(cuda_headers())]
    folder = ROOT / "build" / "cuda_on_cpu"

    def key(*parts: str) -> str:
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]

    if fault:
        name, old, new, which = fault
        path = KERNELS / name
        pieces = sources[path].split(old)
        assert which < len(pieces) - 1, f"{name} has no {old!r} number {which}"
        sources[path] = old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :])
    headers = "".join(text for path, text in sorted(sources.items()) if path.suffix in (".h", ".cuh"))
    tree = folder / "sources" / key(*sources.values())
    for path, text in sources.items():
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            copy.write_text(text)
    units = [
        (p, scheduler_flags if p.name == "emulation.cpp" else flags) for p in sources if p.suffix in (".cu", ".cpp")
    ]
    units = [(p, own) for p, own in units if not p.name.endswith("_torch.cpp")]

    def compile_one(unit: tuple[Path, str]) -> Path:
        path, own = unit
        compiled = folder / "objects" / f"{path.stem}-{key(headers, sources[path], own, *common)}.o"
        if not compiled.exists():
            compiled.parent.mkdir(parents=True, exist_ok=True)
            copy = tree / path.relative_to(ROOT)
            includes = ["-I", str(tree / "csrc" / "cuda"), "-I", str(tree / HERE.relative_to(ROOT))]
            part = compiled.with_suffix(f".{os.getpid()}")
            command = [
                "g++",
                *" ".join(common).split(),
                *own.split(),
                *includes,
                "-x",
                "c++",
                "-c",
                str(copy),
                "-o",
                str(part),
            ]
            run(command)
            part.rename(compiled)
        return compiled

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, units)]
    driver = folder / f"driver-{sanitizer}-{key(*objects)}"
    if not driver.exists():
        run(["g++", *flags.split(), *objects, "-o", str(driver)])
    return driver


def run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
    return ran.stdout + ran.stderr


def drive(driver: Path, mode: str, order: str = "forward") -> subprocess.CompletedProcess:
    """Runs the driver; ThreadSanitizer wants addresses that are not randomised."""
    command = [str(driver), mode]
    if "-thread-" in driver.name and (setarch := shutil.which("setarch")):
        command = [setarch, "-R", *command]
    environment = os.environ | {
        "EMULATION_ORDER": order,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    }
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)


def counts() -> str:
    """Bytes, widths, exps, barriers and shuffles of every op, as the emulation counts them."""
    return run([str(build()), "count"])


def ptxas() -> str:
    """Registers, spills and the occupancy that registers allow, of every kernel on every architecture, as CSV."""
    rows = ["kernel,architecture,registers,spill_bytes,stack_bytes,static_shared_bytes,occupancy_by_registers"]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES] + [
        "-gencode=arch=compute_100,code=compute_100"
    ]
    for source in sorted(KERNELS.glob("*.cu")):
        said = run([nvcc(), "-std=c++20", "-O3", *targets, "-Xptxas", "-v", "-c", str(source), "-o", os.devnull])
        pattern = (
            r"Compiling entry function '([^']+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
        )
        for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, said, re.DOTALL):
            shared = re.search(r"(\d+) bytes smem", rest)
            granted = (int(registers) + 7) // 8 * 8  # registers come in eights, for a warp at a time
            blocks = REGISTERS_OF_A_PROCESSOR // (granted * 32 * WARPS_OF_A_BLOCK)
            occupancy = min(1.0, blocks * WARPS_OF_A_BLOCK / WARPS_OF_A_PROCESSOR)
            plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False).stdout.strip()
            plain = re.sub(r"^void |flywheel::|\(anonymous namespace\)::|\(.*\)$", "", plain).replace(", ", " ")
            numbers = (registers, int(stores) + int(loads), stack, shared[1] if shared else 0, f"{occupancy:.2f}")
            rows.append(",".join(map(str, (plain, f"sm_{arch}", *numbers))))
    return "\n".join([rows[0], *sorted(rows[1:])]) + "\n"


if __name__ == "__main__":
    print({"counts": counts, "ptxas": ptxas}[sys.argv[1]](), end="")
