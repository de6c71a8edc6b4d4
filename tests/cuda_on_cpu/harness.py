"""Builds the CUDA kernels as plain C++ against the emulation, and the tables that are counted and compiled from them.

python tests/cuda_on_cpu/harness.py counts > benchmarks/results/cuda_counts.csv
python tests/cuda_on_cpu/harness.py ptxas > benchmarks/results/cuda_ptxas.csv
"""

import hashlib
import itertools
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
WARPS_OF_A_BLOCK = 4
WARPS_OF_A_PROCESSOR, BLOCKS_OF_A_PROCESSOR, REGISTERS_OF_A_PROCESSOR = 64, 32, 65536
SHARED_OF_A_PROCESSOR = {"80": 164 << 10, "90": 228 << 10, "100": 228 << 10}
SHARED_OF_THE_SYSTEM = 1024  # for each block
LAUNCHES = (  # kernels by name, the op that launches them, as its which launch, and the classes to look at
    (r"thread_per_row", "em_step", 0, (10, 32)),
    (r"add_blocks", "em_step", 1, (32,)),
    (r"team_per_row<\w+ 8 false", "em_step", 0, (100, 256)),
    (r"team_per_row<\w+ 8 true", "em_step", 0, (1000,)),
    (r"team_per_row<\w+ 16 true", "em_step", 0, (2000,)),
    (r"block_per_row", "em_step", 0, (4000,)),
    (r"add_edges", "em_step", 1, (100,)),
    (r"loss_of_samples<\w+ false", "posterior_loss", 0, (10, 256)),
    (r"loss_of_samples<\w+ true", "posterior_loss", 0, (1000,)),
    (r"mean_loss", "posterior_loss", 1, (10,)),
)


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


BOUND, BARRIER = " < ", "__syncthreads();"


def faults() -> list[tuple[str, int, str, str]]:
    """Every barrier and every bound of the kernels: (file, line, BARRIER or BOUND, the line's text).

    Its place in the list is what EMULATION_FAULT takes, in a driver of `build(sanitizer, plant=True)`.
    """
    found = []
    for path in kernel_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for what in re.findall(f"{BOUND}|{re.escape(BARRIER)}", line.split("//")[0]):
                found.append((path.name, number, what, line.strip()))
    return found


def kernel_files() -> list[Path]:
    return [path for path in sorted(KERNELS.glob("*.cu*")) if path.suffix in (".cu", ".cuh")]


def planted() -> dict[Path, str]:
    """The kernels' sources with each barrier and bound of `faults` under a number's rule: left out, or one too far."""
    which = itertools.count()

    def plant(match: re.Match) -> str:
        if match[0] == BARRIER:
            return f"if (emulation::kept({next(which)})) {BARRIER}"
        return f"{BOUND}emulation::one_more({next(which)}) + "

    def plant_line(line: str) -> str:
        code, *comment = line.split("//", 1)
        return "//".join([re.sub(f"{BOUND}|{re.escape(BARRIER)}", plant, code), *comment])

    return {path: "\n".join(map(plant_line, path.read_text().split("\n"))) for path in kernel_files()}


def build(
    sanitizer: str = "plain", fault: tuple[str, str, str, int] | None = None, *, plant: bool = False, flags: str = ""
) -> Path:
    """The driver's path; built once for each content. A fault is (file, old text, new text, which occurrence)."""
    own_flags, scheduler_flags = SANITIZERS[sanitizer]
    own_flags = f"{own_flags} {flags}"
    sources = {path: path.read_text() for path in [*KERNELS.glob("*"), ROOT / "csrc" / "math.h", *HERE.glob("*.*")]}
    sources = {path: text for path, text in sources.items() if path.suffix in (".cu", ".cuh", ".h", ".cpp")}
    if plant:
        sources |= planted()
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
        (p, scheduler_flags if p.name == "emulation.cpp" else own_flags) for p in sources if p.suffix in (".cu", ".cpp")
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
        part = driver.with_suffix(f".{os.getpid()}")  # another process may build the same
        run(["g++", *own_flags.split(), *objects, "-o", str(part)])
        part.rename(driver)
    return driver


def run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
    return ran.stdout + ran.stderr


def drive(driver: Path, mode: str, order: str = "forward", **emulation: str) -> subprocess.CompletedProcess:
    """Runs the driver; `memory` and `fault` become EMULATION_MEMORY and EMULATION_FAULT.

    ThreadSanitizer wants addresses that are not randomised.
    """
    command = [str(driver), mode]
    if "-thread-" in driver.name and (setarch := shutil.which("setarch")):
        command = [setarch, "-R", *command]
    environment = os.environ | {
        **{f"EMULATION_{name.upper()}": value for name, value in ({"order": order} | emulation).items()},
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    }
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)


def counts() -> str:
    """Bytes, widths, exps, barriers and shuffles of every op, as the emulation counts them.

    A block does what it does where a million rows (2048 * 528) are spread over the full grid of 528: there are 16 of
    its blocks, and their share of the rows and labels.
    Where a row of logits is no multiple of 16 bytes and more than 32 classes wide, its loads are an element wide.
    """
    return run([str(build(flags="-DFLYWHEEL_MAX_BLOCKS=16")), "count"])


def occupancy(architecture: str, registers: int, shared: int) -> float:
    """The share of a processor's warps that can be resident: by registers, by shared memory, by blocks and warps."""
    granted = (registers + 7) // 8 * 8  # registers come in eights, for a warp at a time
    blocks = min(
        REGISTERS_OF_A_PROCESSOR // (granted * 32 * WARPS_OF_A_BLOCK),
        SHARED_OF_A_PROCESSOR[architecture] // ((shared + 127) // 128 * 128 + SHARED_OF_THE_SYSTEM),
        BLOCKS_OF_A_PROCESSOR,
        WARPS_OF_A_PROCESSOR // WARPS_OF_A_BLOCK,
    )
    return blocks * WARPS_OF_A_BLOCK / WARPS_OF_A_PROCESSOR


def ptxas() -> str:
    """Registers, shared memory, spills and theoretical occupancy of every kernel on every architecture, as CSV.

    Shared memory is what the launch asks for at so many classes, with all outputs and the joint posterior, and what
    the kernel declares.
    """
    rows = ["kernel,architecture,classes,registers,shared_bytes,spill_bytes,stack_bytes,occupancy"]
    driver = str(build())
    asked = {
        (pattern, c): int(run([driver, "shared", op, str(c)]).split()[launch])
        for pattern, op, launch, classes in LAUNCHES
        for c in classes
    }
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append("-gencode=arch=compute_100,code=compute_100")
    pattern = (
        r"Compiling entry function '([^']+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for source in sorted(KERNELS.glob("*.cu")):
        said = run([nvcc(), "-std=c++20", "-O3", *targets, "-Xptxas", "-v", "-c", str(source), "-o", os.devnull])
        for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, said, re.DOTALL):
            declared = re.search(r"(\d+) bytes smem", rest)
            kernel = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False).stdout.strip()
            kernel = re.sub(r"^void |flywheel::|\(anonymous namespace\)::|\(.*\)$", "", kernel).replace(", ", " ")
            spilled = int(stores) + int(loads)
            for (launched, c), bytes_asked in asked.items():
                if not re.match(launched, kernel):
                    continue
                shared = bytes_asked + (int(declared[1]) if declared else 0)
                share = occupancy(arch, int(registers), shared)
                rows.append(f"{kernel},sm_{arch},{c},{registers},{shared},{spilled},{stack},{share:.2f}")
    return "\n".join([rows[0], *sorted(rows[1:])]) + "\n"


if __name__ == "__main__":
    print({"counts": counts, "ptxas": ptxas}[sys.argv[1]](), end="")
