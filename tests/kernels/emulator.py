"""Runs the text of the CUDA kernels on the CPU: csrc/emulator, built once a set of sources and a sanitizer.

`python -m tests.kernels.emulator` builds all programs. The test-suite starts it first, so that they are there when the
tests of the kernels come.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CACHE = Path(os.environ.get("LORAFORGE_EMULATOR_CACHE", CSRC.parent / "build" / "emulator"))
COMPILER = os.environ.get("CXX", "g++")
BUILDS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DLF_EMULATOR_THREADS"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-DLF_EMULATOR_THREADS"],
}
DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.uint8: "u8", torch.bool: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
FROM_NAME = {name: dtype for dtype, name in DTYPES.items() if dtype != torch.bool}
SECONDS = 120


class EmulatorError(AssertionError):
    """The kernel broke a rule of the device, or a sanitizer found something; the text says what."""


@cache
def build(module: str, kind: str = "plain", source: Path | None = None) -> Path:
    """The program of csrc/emulator/<module>.cpp (or of `source`), compiled; kind "plain", "address" or "thread"."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER}) to build the thread emulator with")
    file = source or CSRC / "emulator" / f"{module}.cpp"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-tsan"]
    flags += ["-ffp-contract=off", *BUILDS[kind]]
    words = hashlib.sha256(" ".join([COMPILER, *flags]).encode())
    parts = [file, *sorted(p for room in ("common", "cuda", "emulator") for p in (CSRC / room).iterdir())]
    for part in parts:
        # Cases of other kernels are not compiled in; their headers and sources may be.
        if part.suffix != ".cpp" or part in (file, CSRC / "emulator" / "run.cpp"):
            words.update(part.name.encode() + b"\0" + part.read_bytes())
    program = CACHE / f"{module}-{kind}-{words.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Whoever comes second waits for the program instead of compiling it as well.
    with open(CACHE / f"{module}-{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _compile([COMPILER, *flags, f"-I{CSRC / 'emulator'}"], file, program)
            for old in CACHE.glob(f"{module}-{kind}-*"):
                if old != program:
                    old.unlink(missing_ok=True)
    return program


def _compile(command: list[str], file: Path, program: Path) -> None:
    fresh = program.with_suffix(".fresh")
    sources = [str(CSRC / "emulator" / "run.cpp"), str(file)]
    done = subprocess.run(
        [*command, "-pthread", "-o", str(fresh), *sources], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    fresh.rename(program)


def emulate(
    case: str, module: str, kind: str = "plain", *, source: Path | None = None, **inputs: Tensor | int | float | None
) -> dict[str, Tensor]:
    """Runs one case.

    Args:
        case: Name in LF_CASE.
        module: File of csrc/emulator.
        kind: Build, see `build`.
        source: Another file than that of the module.
        inputs: Arrays (written contiguous) and numbers by the names that the case asks for; None is not given.

    Returns:
        What the case made, by name.

    Raises:
        EmulatorError: The case failed, with what the program said.
    """
    program = build(module, kind, source)
    folder = CACHE / f"run-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    given = {k: _tensor(v) for k, v in inputs.items() if v is not None}
    try:
        (folder / "in").write_bytes(struct.pack("<q", len(given)) + b"".join(_pack(k, t) for k, t in given.items()))
        command = [str(program), case, str(folder / "in"), str(folder / "out")]
        if kind == "thread" and shutil.which("setarch"):
            # ThreadSanitizer's fixed shadow and a randomised address space do not always fit.
            command = ["setarch", "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        if done.returncode != 0:
            raise EmulatorError(f"{case} ({kind}) ended with {done.returncode}: {done.stderr[-4000:]}")
        return _unpack((folder / "out").read_bytes())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tensor(value: Tensor | int | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().contiguous()
    return torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _text(word: str) -> bytes:
    return struct.pack("<q", len(word)) + word.encode()


def _pack(name: str, t: Tensor) -> bytes:
    raw = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
    return _text(name) + _text(DTYPES[t.dtype]) + struct.pack(f"<{t.dim() + 1}q", t.dim(), *t.shape) + raw


def _unpack(raw: bytes) -> dict[str, Tensor]:
    at = 0

    def number() -> int:
        nonlocal at
        at += 8
        return struct.unpack_from("<q", raw, at - 8)[0]

    def text() -> str:
        nonlocal at
        length = number()
        at += length
        return raw[at - length : at].decode()

    found = {}
    for _ in range(number()):
        name, dtype = text(), FROM_NAME[text()]
        shape = [number() for _ in range(number())]
        size = dtype.itemsize
        for n in shape:
            size *= n
        data = bytearray(raw[at : at + size])
        at += size
        found[name] = torch.frombuffer(data, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return found


def main() -> None:
    """Builds every program; a failure is left to the test that asks for it."""
    for file in sorted((CSRC / "emulator").glob("*.cpp")):
        if file.stem != "run":
            for kind in BUILDS:
                with contextlib.suppress(AssertionError):
                    build(file.stem, kind)


if __name__ == "__main__":
    main()
