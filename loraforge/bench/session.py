"""A run of the benchmarks: what is asked for, and the rows that come of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

import torch

from loraforge.bench.cases import Case, Work
from loraforge.bench.ceilings import Ceilings, measure_ceilings
from loraforge.bench.children import Children, Here, Jobs
from loraforge.bench.costs import Cost
from loraforge.bench.timing import Clock, Times, interleave
from loraforge.kernels import backend

Progress = Callable[[str, str, int, int], None]
# Loaded before a job's process begins: what a method loads at its first call would count as its time.
JOB_MODULES = ("loraforge.bench.scale", "loraforge.bench.iteris_problem", "loraforge.merging.calibrated")
_TWICE = 2.0  # the house rule: an error may be twice that of plain PyTorch


@dataclass(eq=False)
class Session:
    """What a group measures with and into.

    Attributes:
        device: Where to compute.
        size: "default", "full" or "tiny" (for tests).
        threads: Threads of the CPU.
        runs: Timings a form; None for as many as a case's budget allows.
        progress: Called with (stage, detail, done, total).
    """

    device: torch.device
    size: str = "default"
    threads: int = 1
    runs: int | None = None
    progress: Progress | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    _open: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def clock(self) -> Clock:
        """The clock of the device."""
        return Clock(self.device, self.threads)

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured when the first row asks for them."""
        self.tell("ceilings", str(self.device), 0, 1)
        return measure_ceilings(self.clock, tiny=self.size == "tiny")

    @cached_property
    def jobs(self) -> Jobs:
        """What runs jobs: processes of their own on the CPU, this one on a GPU."""
        if self.device.type == "cuda":
            return Here(JOB_MODULES)
        self.tell("loading", "a process to measure in", 0, 1)
        return self._open.enter_context(Children(self.threads, JOB_MODULES))

    def __enter__(self) -> Session:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes that were started."""
        self._open.__exit__(kind, error, trace)

    def tell(self, stage: str, detail: str, done: int, total: int) -> None:
        """Reports progress."""
        if self.progress is not None:
            self.progress(stage, detail, done, total)

    def skip(self, group: str, case: str, form: str, reason: str) -> None:
        """Notes a form that cannot run here."""
        self.skipped.append({"group": group, "case": case, "form": form, "reason": reason})

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The rows whose result was wrong."""
        keys = ("group", "case", "form", "error", "allowed")
        return [{key: row[key] for key in keys} for row in self.rows if not row["ok"]]

    def add(self, group: str, case: str, form: str, times: Times, **more: Any) -> dict[str, Any]:
        """Adds a row; `more` holds any of its other keys (see the package's docstring)."""
        cost: Cost | None = more.pop("cost", None)
        median = times.median
        row: dict[str, Any] = {
            "group": group, "case": case, "form": form, "device": str(self.device), "op": case, "size": {},
            "seconds": median, "iqr": times.iqr, "runs": len(times.seconds),
            "bytes": None, "flops": None, "gb_per_s": None, "gflop_per_s": None, "roofline": None,
            "error": None, "allowed": None, "ok": True, "peer": None, "speedup": None,
            "peak_bytes": None, "objective": None,
        }  # fmt: skip
        if cost is not None and median > 0.0:
            row |= {
                "bytes": cost.bytes,
                "flops": cost.flops,
                "gb_per_s": cost.bytes / median / 1e9,
                "gflop_per_s": cost.flops / median / 1e9,
                "roofline": self.ceilings.shortest(cost) / median,
            }
        self.rows.append(row | more)
        return self.rows[-1]

    def measure(self, group: str, case: Case, budget: float) -> None:
        """Times every form of a case in turn, and compares what each gave with the float64 reference."""
        work = case.build(self.device)
        forms = dict(work.forms)
        if "native" in forms and (reason := missing_native(self.device)):
            del forms["native"]
            self.skip(group, case.name, self.device.type, reason)
        with compiled("native" in forms):
            times = interleave(forms, self.clock, before=work.before, runs=self.runs, budget=budget)
            exact = [t.detach() for t in work.exact()]
            errors = {name: work.distance(work.numbers(found.result), exact) for name, found in times.items()}
            # Last, when libraries have what they keep, and because a call may write over a result.
            peaks = {name: self._allocated(name, form, work.before) for name, form in forms.items()}
        peer = work.compared_with
        for name, found in times.items():
            allowed = allowed_error(work, name, errors)
            self.add(
                group, case.name, self.device.type if name == "native" else name, found,
                op=case.op, size=dict(case.size), cost=work.cost, error=errors[name], allowed=allowed,
                ok=errors[name] <= allowed, peer=peer if peer in times and peer != name else None,
                speedup=_speedup(times, peer, name), peak_bytes=peaks[name],
            )  # fmt: skip

    def _allocated(self, name: str, form: Callable[[], Any], before: Callable[[str], object] | None) -> int | None:
        """Bytes that a call allocates at most above what there was, on a GPU; None on the CPU."""
        if self.device.type != "cuda":
            return None
        if before is not None:
            before(name)
        start = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        form()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - start


def allowed_error(work: Work, form: str, errors: Mapping[str, float]) -> float:
    """The stated tolerance; for our own forms also twice what plain PyTorch is off by."""
    stated = work.own.get(form, work.rtol)
    # A peer of another precision, or one that is wrong, excuses nothing.
    plain = errors.get("torch" if "torch" not in work.own else "reference", errors.get("reference", 0.0))
    return max(stated, _TWICE * plain) if form == "native" and plain <= work.rtol else stated


def _speedup(times: Mapping[str, Times], peer: str, form: str) -> float | None:
    if peer not in times or form == peer or times[form].median <= 0.0:
        return None
    return times[peer].median / times[form].median


def missing_native(device: torch.device) -> str | None:
    """Why the compiled operators cannot run on a device; None where they can."""
    if backend.mode() == "reference":
        return f"{backend.VARIABLE}=reference"
    if not backend.native_available():
        return f"loraforge._C is not built for this: {backend.BUILD_COMMAND}"
    devices = backend.native_devices()
    if device.type not in devices:
        return f"loraforge._C was built for {', '.join(sorted(devices))}"
    return None


@contextmanager
def compiled(wanted: bool) -> Iterator[None]:
    """LORAFORGE_KERNELS=native while it is open: an operator without its compiled form is then an error."""
    before = os.environ.get(backend.VARIABLE)
    if wanted:
        os.environ[backend.VARIABLE] = "native"
    try:
        yield
    finally:
        if wanted:
            if before is None:
                del os.environ[backend.VARIABLE]
            else:
                os.environ[backend.VARIABLE] = before
