"""Compiles every CUDA source on a machine without a GPU, and checks what came of it: `make cuda-check`.

nvcc compiles the kernels for sm_80, sm_90a and sm_100; the host compiler compiles their callers against the torch that
is installed, a CPU build included; the linker joins all. The check fails where a kernel spills more registers than
`RECORDED` allows, where it does not compile, or where the library asks for a symbol beyond torch's stable interface and
the C, C++ and CUDA runtimes. Objects are kept in build/cuda-check by the hash of what they were made from.

Exit codes: 0 sound, 1 not, 3 no nvcc here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
OUT = CSRC.parent / "build" / "cuda-check"
ARCHS = ("80", "90a", "100")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-Werror=all-warnings",
]
HOST_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-DUSE_CUDA"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Bytes of spilled registers that are allowed, by (source, part of the kernel's name, architecture): none, unless a
# measurement on the device shows that the spill costs less than fewer threads would.
RECORDED: dict[tuple[str, str, str], int] = {}
# What the library may leave to others: torch's stable interface; the C, C++ and CUDA runtimes, by the version that the
# linker notes behind a name; and what every library asks for weakly.
ALLOWED = re.compile(r"^(aoti_torch_|torch_)\w+$|@(GLIBC|GLIBCXX|CXXABI|GCC|libcudart)|^(_ITM_|__gmon_start__)")


# Macros of torch's stable headers that torch 2.11 has as well: those of a newer torch are not hidden by the target.
MACRO = re.compile(r"\b(?:STABLE_TORCH|STD_TORCH|STD_CUDA|AOTI_TORCH|THO|TORCH)_[A-Z_]+\b")
MACROS = {
    "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", "AOTI_TORCH_SUCCESS", "TORCH_TARGET_VERSION"
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel on one architecture."""

    source: str
    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def find_nvcc() -> Path | None:
    """The compiler inside of its toolkit; what is on PATH may be a script elsewhere."""
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin", "nvcc").exists():
        return Path(home, "bin", "nvcc")
    if shutil.which("nvcc") is None:
        return None
    told = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    found = re.search(r"_HERE_=(\S+)", told.stderr + told.stdout)
    return Path(found[1], "nvcc") if found else Path(str(shutil.which("nvcc")))


def torch_includes() -> list[str]:
    """Include folders of the torch that is installed."""
    from torch.utils.cpp_extension import include_paths

    return [f"-I{path}" for path in include_paths()]


def parse(source: str, text: str) -> list[Kernel]:
    """The kernels in the assembler's report."""
    found = []
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Kernel(
                source,
                match["name"],
                match["arch"],
                int(match["registers"]),
                int(shared[1]) if shared else 0,
                int(match["stack"]),
                max(int(match["stores"]), int(match["loads"])),
            )
        )
    return found


def plain_names(kernels: list[Kernel]) -> dict[str, str]:
    """Readable names of the kernels; as they are where there is no c++filt."""
    names = sorted({k.name for k in kernels})
    if shutil.which("c++filt") is None or not names:
        return {name: name for name in names}
    told = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    lines = [line.replace("loraforge::cuda::(anonymous namespace)::", "") for line in told.stdout.splitlines()]
    return {name: line.split("(")[0].removeprefix("void ") for name, line in zip(names, lines, strict=True)}


def compile_one(source: Path, command: list[str]) -> tuple[Path, str]:
    """Compiles one source, or takes the object that was made from the same text by the same command."""
    words = hashlib.sha256(" ".join(command).encode())
    headers = (p for room in ("common", "cuda") for p in (CSRC / room).iterdir() if p.suffix in (".h", ".cuh"))
    for part in (source, *sorted(headers)):
        words.update(part.name.encode() + b"\0" + part.read_bytes())
    made = OUT / f"{source.stem}-{words.hexdigest()[:16]}.o"
    log = made.with_suffix(".log")
    if not (made.exists() and log.exists()):
        done = subprocess.run([*command, "-o", str(made), str(source)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            made.unlink(missing_ok=True)
            raise SystemExit(f"cuda-check: {source.name} does not compile\n{done.stdout}{done.stderr}")
        for old in OUT.glob(f"{source.stem}-????????????????.*"):
            if old != made:
                old.unlink(missing_ok=True)
        log.write_text(done.stdout + done.stderr)
    return made, log.read_text()


def foreign_symbols(objects: list[Path], nvcc: Path) -> list[str]:
    """Symbols of the joined library that nobody here may ask for."""
    library = OUT / "operators.so"
    folders = [f"-L{nvcc.parent.parent / name}" for name in ("lib64", "targets/x86_64-linux/lib")]
    joined = subprocess.run(
        ["g++", "-shared", "-o", str(library), *map(str, objects), *folders, "-lcudart"],
        capture_output=True,
        text=True,
        check=False,
    )
    if joined.returncode != 0:
        raise SystemExit(f"cuda-check: the objects do not link\n{joined.stderr}")
    listing = subprocess.run(["nm", "-D", "-u", "-C", str(library)], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines() if line.split()[0] in "Uwv"]
    return [name for name in names if not ALLOWED.search(name)]


def check(jobs: int) -> tuple[list[Kernel], list[str]]:
    """All kernels, and what is wrong."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: no nvcc here (looked at CUDA_HOME and PATH)", file=sys.stderr)
        raise SystemExit(3)
    OUT.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    cuda = [(p, [str(nvcc), *NVCC_FLAGS, *targets, "-c"]) for p in sorted((CSRC / "cuda").glob("*.cu"))]
    host = ["g++", *HOST_FLAGS, TORCH_TARGET, f"-I{CSRC}", *torch_includes(), "-c"]
    callers = [(p, host) for p in sorted((CSRC / "cuda").glob("*_torch.cpp"))]
    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(lambda job: compile_one(*job), [*cuda, *callers]))
    kernels = [k for (source, _), (_, log) in zip(cuda, made, strict=False) for k in parse(source.name, log)]
    faults = []
    names = plain_names(kernels)
    for k in kernels:
        allowed = max(
            (n for (s, part, a), n in RECORDED.items() if (s, a) == (k.source, k.arch) and part in k.name), default=0
        )
        if k.spill_bytes > allowed:
            faults.append(f"{names[k.name]} spills {k.spill_bytes} bytes on sm_{k.arch}, {allowed} are recorded")
    for source, _ in cuda:
        seen = {k.arch for k in kernels if k.source == source.name}
        if "__global__" in source.read_text() and seen != set(ARCHS):
            faults.append(f"{source.name} gave kernels for {sorted(seen)}, expected {sorted(ARCHS)}")
    for source in sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
        unknown = set(MACRO.findall(source.read_text())) - MACROS
        faults += [f"{source.name} uses {name}, which torch 2.11 may not have" for name in sorted(unknown)]
    faults += [f"the library asks for {name}" for name in foreign_symbols([o for o, _ in made], nvcc)]
    return kernels, faults


def main() -> int:
    """Checks, prints a line a kernel, and says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", "2")))
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    wanted = parser.parse_args()
    kernels, faults = check(max(1, wanted.jobs))
    if wanted.json:
        print(json.dumps({"kernels": [asdict(k) for k in kernels], "faults": faults}))
    else:
        names = plain_names(kernels)
        print(f"{'kernel':64s} {'registers by sm_' + ', sm_'.join(ARCHS):32s} shared  spills")
        for name in dict.fromkeys(k.name for k in kernels):
            own = [k for k in kernels if k.name == name]
            registers = ", ".join(str(k.registers) for k in own)
            print(f"{names[name][:64]:64s} {registers:32s} {own[0].shared_bytes:6d}  {max(k.spill_bytes for k in own)}")
        print(f"{len({k.name for k in kernels})} kernels on {len(ARCHS)} architectures, {len(faults)} faults")
    for fault in faults:
        print(f"cuda-check: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
