"""`run_bench`: the groups asked for, in one run on one device."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraforge.bench.groups import SIZES, check_groups, measurer
from loraforge.bench.machine import describe
from loraforge.bench.session import Progress, Session
from loraforge.bench.verdicts import SCHEMA, compare, load_result
from loraforge.errors import UsageError, did_you_mean
from loraforge.kernels.backend import kernel_report
from loraforge.linalg.device import choose_device


def run_bench(
    groups: Sequence[str] = (),
    *,
    size: str = "default",
    device: str = "auto",
    threads: int = 1,
    runs: int | None = None,
    compare_with: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures groups of benchmarks.

    Args:
        groups: Names of `GROUPS`; none for all.
        size: "default" (all groups in under 3 minutes on 2 cores), "full", or "tiny" (for tests).
        device: auto, cpu, cuda or cuda:i.
        threads: Threads of the CPU; with one, figures are processor time.
        runs: Timings a form; None for as many as fit in each case's share of the time.
        compare_with: File of an earlier result.
        progress: Called with (stage, detail, done, total).

    Returns:
        The result as the package's docstring describes it. Wrong results of forms do not raise: they are in `failures`.

    Raises:
        UsageError: Unknown group, size or device, or a count below 1.
        LoraforgeError: The file of the earlier result cannot be used.
    """
    names = check_groups(groups)
    if size not in SIZES:
        raise UsageError("unknown size", got=repr(size), hint=did_you_mean(size, SIZES))
    for name, count in (("threads", threads), ("runs", 1 if runs is None else runs)):
        if count < 1:
            raise UsageError(f"{name} must be at least 1", where=name, got=count)
    stored = None if compare_with is None else load_result(Path(compare_with))
    started = time.perf_counter()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Session(_numbered(choose_device(device)), size, threads, runs, progress) as session:
            for name in names:
                measurer(name)(session)
            result = _result(names, session)
    finally:
        torch.set_num_threads(before)
    if stored is not None:
        result["comparison"] = {"file": os.fspath(compare_with or ""), **compare(result, stored)}
    result["seconds"] = time.perf_counter() - started
    return result


def _numbered(device: torch.device) -> torch.device:
    """A GPU with its number, so that rows of two runs have one name."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _result(names: list[str], session: Session) -> dict[str, Any]:
    report = kernel_report()
    kernels = {key: report[key] for key in ("mode", "native", "why", "build_info", "capabilities")}
    return {
        "schema": SCHEMA,
        "groups": names,
        "size": session.size,
        "machine": describe() | {"kernels": kernels},
        "device": str(session.device),
        "clock": session.clock.name,
        # Only measured if a row asked for it.
        "ceilings": session.ceilings.as_dict() if "ceilings" in vars(session) else None,
        "rows": session.rows,
        "fits": session.fits,
        "skipped": session.skipped,
        "failures": session.failures,
    }
