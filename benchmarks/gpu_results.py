"""The parts of `gpu_check.sh` that are no shell: what the machine is, what the build holds, the results in one file.

Only `environment` and `built` load torch; the results are joined by the standard library alone, so that they appear
whatever is broken.

    {"what": "gpu-check", "ok", "gpu", "commit", "date", "seconds", "budget_s", "environment": {...},
     "steps": [{"name", "status", "rc", "seconds", "limit_s", "reason", "end": [last lines, unless it passed]}],
     "tests": {"passed", "failed", "skipped", "failures": [...], "skips": [...]},
     "sanitizer": {"memcheck": [summary lines], "racecheck": [...]},
     "bench_kernels", "bench_merge": as `loraforge bench --json` prints them,
     "iteris_two_layers", "iteris_8b": as benchmarks/iteris_at_size.py writes them}
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "triton",
    "ninja",
    "pybind11",
    "pytest",
    "greenlet",
)
END = 25  # lines of a failed step in the results
LOG_BYTES = 1_500_000  # of each stream of each step in the log


def environment(path: Path) -> int:
    """Writes what the machine is; 1 where it has no GPU that torch can use."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {"python": sys.version.split()[0], "cuda": torch.version.cuda, "versions": versions}
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU (built for CUDA: {torch.version.cuda})", file=sys.stderr)
        path.write_text(json.dumps(found), encoding="utf-8")
        return 1
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "driver": _line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "nvcc": _line(["nvcc", "--version"], "release"),
    }
    path.write_text(json.dumps(found), encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


def _line(command: list[str], holding: str = "") -> str | None:
    """The first line of a program's output that holds a word."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if holding in line), None)


def architecture(path: Path) -> int:
    """Prints what TORCH_CUDA_ARCH_LIST should be: the GPU's own, with its particular instructions from Hopper on."""
    major, minor = json.loads(path.read_text(encoding="utf-8"))["capability"]
    print(f"{major}.{minor}{'a' if major >= 9 else ''}")
    return 0


def built() -> int:
    """1 unless the extension is there and holds the operators of the GPU."""
    from loraforge.kernels.backend import kernel_report

    report = kernel_report()
    print(json.dumps(report, indent=1))
    if "cuda" in report["build_info"].get("devices", ()):
        return 0
    print(f"the build holds no CUDA operators: {report['why']}, {report['build_info']}", file=sys.stderr)
    return 1


def read_tests(path: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and what failed or was skipped."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [], "skips": []}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found["seconds"] += float(case.get("time") or 0.0)
        problem = next((p for p in case if p.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if problem is not None:
            found["failed"] += 1
            found["failures"].append(f"{name}: {(problem.get('message') or '').splitlines()[0:1]}"[:400])
        elif skip is not None:
            found["skipped"] += 1
            found["skips"].append(f"{name}: {skip.get('message')}"[:200])
        else:
            found["passed"] += 1
    return found


def ran(path: Path) -> int:
    """1 where no test passed: a suite that skips everything has checked nothing."""
    found = read_tests(path)
    print(f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    if found["passed"] and not found["failed"]:
        return 0
    print("no GPU test passed", file=sys.stderr)
    return 1


def join(work: Path, out: Path, seconds: float, budget: float) -> int:
    """Writes OUT/<gpu>.json and OUT/<gpu>.log from what the steps left in `work`."""
    about = _json(work / "environment.json") or {}
    steps = [_step(work, line) for line in (work / "steps.tsv").read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {
        "what": "gpu-check",
        "ok": bool(steps) and all(step["status"] == "passed" for step in steps),
        "gpu": about.get("gpu"),
        "commit": os.environ.get("LORAFORGE_COMMIT") or "unknown",
        "date": datetime.date.today().isoformat(),
        "seconds": seconds,
        "budget_s": budget,
        "environment": about,
        "steps": steps,
    }
    tests = work / "tests.xml"
    if tests.is_file():
        result["tests"] = _tests(tests)
    result["sanitizer"] = {
        tool: [line for line in _text(work / f"sanitizer-{tool}.log").splitlines() if "SUMMARY" in line]
        for tool in ("memcheck", "racecheck")
    }
    for name in ("bench_kernels", "bench_merge"):
        result[name] = _json(work / f"{name}.out")
    for name in ("iteris_two_layers", "iteris_8b"):
        result[name] = _json(work / f"{name}.json")
    slug = re.sub(r"[^a-z0-9]+", "-", (about.get("gpu") or "no-gpu").lower()).strip("-")
    text = json.dumps(_scrubbed(result, work), indent=1, allow_nan=False) + "\n"
    (out / f"{slug}.json").write_text(text, encoding="utf-8")
    log = "\n".join(_log(work, step) for step in steps)
    (out / f"{slug}.log").write_text(log.replace(str(work), "."), encoding="utf-8")
    print(f"{sum(s['status'] == 'passed' for s in steps)} of {len(steps)} steps passed: {slug}.json, {slug}.log")
    return 0


def _step(work: Path, line: str) -> dict[str, Any]:
    name, status, rc, seconds, limit, reason = line.split("\t")
    step: dict[str, Any] = {
        "name": name,
        "status": status,
        "rc": None if rc == "-" else int(rc),
        "seconds": int(seconds),
        "limit_s": int(limit),
        "reason": reason,
    }
    if status not in ("passed", "not run"):
        both = _text(work / f"{name}.out").splitlines() + _text(work / f"{name}.err").splitlines()
        step["end"] = [found[:300] for found in both[-END:]]
    return step


def _log(work: Path, step: dict[str, Any]) -> str:
    """The end of both streams of a step, under a line that names it."""
    parts = [f"==== {step['name']}: {step['status']}, rc {step['rc']}, {step['seconds']} s {step['reason']}"]
    for stream in ("out", "err"):
        text = _text(work / f"{step['name']}.{stream}")
        parts.append(text[-LOG_BYTES:] if len(text) > LOG_BYTES else text)
    return "\n".join(parts)


def _tests(path: Path) -> dict[str, Any]:
    try:
        return read_tests(path)
    except ElementTree.ParseError as error:  # cut off in the middle
        return {"error": str(error)}


def _json(path: Path) -> Any:
    """What a file holds; None where there is none, or it was cut off (the step's status then says so)."""
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError:
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _scrubbed(value: Any, work: Path) -> Any:
    """Paths of the temporary folder and numbers that JSON does not have are taken out."""
    if isinstance(value, dict):
        return {key: _scrubbed(entry, work) for key, entry in value.items()}
    if isinstance(value, list):
        return [_scrubbed(entry, work) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.replace(str(work), ".") if isinstance(value, str) else value


def main(arguments: list[str]) -> int:
    """Runs one part."""
    part, *rest = arguments
    if part == "environment":
        return environment(Path(rest[0]))
    if part == "arch":
        return architecture(Path(rest[0]))
    if part == "built":
        return built()
    if part == "ran":
        return ran(Path(rest[0]))
    return join(Path(rest[0]), Path(rest[1]), float(rest[2]), float(rest[3]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
