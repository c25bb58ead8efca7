"""`loraforge doctor`: the environment, the extension and a self-test of every kernel."""

from __future__ import annotations

import platform
import sys
from typing import Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._errors import CHECK_FAILED
from loraforge.cli._output import Output

PACKAGES = ("loraforge", "torch", "transformers", "peft", "safetensors", "typer", "rich", "datasets")


def doctor(
    json: opt.Json = False, quiet: opt.Quiet = False, verbose: opt.Verbose = False, debug: opt.Debug = False
) -> None:
    """Check the environment, the extension and every kernel."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.kernels.backend import kernel_report, self_test

        environment, kernels, tests = describe_environment(), kernel_report(), self_test()
        if environment["gpus"]:
            tests += self_test("cuda")
        healthy = all(test["ok"] for test in tests)
        voice.result({"ok": healthy, "environment": environment, "kernels": kernels, "tests": tests})
        _print(voice, environment, kernels, tests)
    if not healthy:
        failed = ", ".join(test["op"] for test in tests if not test["ok"])
        sys.stderr.write(f"a check failed: {failed}\n")
        raise typer.Exit(CHECK_FAILED)


def describe_environment() -> dict[str, Any]:
    """Python, machine, torch with its devices and threads, and the versions of the packages that count."""
    import os
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_build": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "versions": versions,
    }


def _print(voice: Output, environment: dict[str, Any], kernels: dict[str, Any], tests: list[dict[str, Any]]) -> None:
    for label in ("python", "executable", "system", "cores", "threads", "cpu_capability"):
        voice.line(f"{label.replace('_', ' '):<16}{environment[label]}")
    voice.line(f"{'CUDA':<16}{environment['cuda_build'] or 'torch is built without it'}")
    voice.line(f"{'GPU':<16}{', '.join(environment['gpus']) or 'none'}")
    versions = environment["versions"].items()
    voice.line(f"{'packages':<16}{', '.join(f'{name} {found}' for name, found in versions if found)}")
    state = "native" if kernels["native"] else "PyTorch references"
    voice.line(f"{'kernels':<16}{state} (LORAFORGE_KERNELS={kernels['mode']})" + f": {kernels['why']}")
    for key, value in {**kernels["build_info"], **kernels["capabilities"]}.items() if voice.verbose else ():
        voice.line(f"  {key}: {value}")
    headers = ["kernel", "device", "runs", "largest error", "allowed", "result"]
    rows = [
        [t["op"], t["device"], t["path"], t["max_error"], t["tolerance"], "ok" if t["ok"] else "FAILED"] for t in tests
    ]
    voice.table(headers, rows)
