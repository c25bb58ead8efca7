"""The calibrated merge beside the document's loop: time, peak memory and objective, each run in a process of its own.

The loop makes as many solves as a feed-forward model needs (one for each module that a token passes on its way, and
one more), so the loop, the iteration and the sweep end at one solution. They are compared by their deltas with the loop
in float64 throughout: ours may be twice as far off as the loop in float32, which is far (the systems' condition number
is 1 / alpha = 1e7). Their objectives, which do not feel that, must agree with the exact one. `iteris-plus` with its
defaults solves another problem (for the full weights); its objective on this one only has to be below 1, that of no
merge at all.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from loraforge.bench.session import Session
from loraforge.bench.timing import Times

RUNS = {"default": 3, "full": 3, "tiny": 1}
# Sizes as in iteris_problem.Problem, which needs transformers.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 1, "width": 32, "rank": 2, "tasks": 2, "samples": 4, "tokens": 16, "solves": 5},
    "default": {"layers": 2, "width": 128, "rank": 8, "tasks": 2, "samples": 16, "tokens": 32, "solves": 9},
    "full": {"layers": 6, "width": 384, "rank": 8, "tasks": 3, "samples": 64, "tokens": 64, "solves": 10},
}
SIDES = ("document", "sweep", "iterate", "iteris-plus")
PEER, OTHER_PROBLEM = "document", "iteris-plus"
_JOBS = "loraforge.bench.iteris_problem"
_LOOP = 0.25  # the loop's own distance from float64, above which its size would be no comparison
_OBJECTIVE = 1e-3


def measure(session: Session) -> None:
    """Measures the group `iteris`."""
    sizes = SIZES[session.size]
    case = "BERT {layers} x {width}, {tasks} adapters r={rank}, {tasks} x {samples} x {tokens} tokens".format(**sizes)
    runs = session.runs or RUNS[session.size]
    with tempfile.TemporaryDirectory() as folder:
        session.tell("iteris", "exact solution", 0, runs * len(SIDES))
        path, exact = str(Path(folder) / "exact.pt"), None
        if _converges(sizes):
            place = str(session.device)
            exact = session.jobs.run(f"{_JOBS}:solve_exactly", sizes=sizes, path=path, device=place)["objective"]
        found = _run_all(session, sizes, runs, None if exact is None else path)
    document = found[PEER]["seconds"].median
    for side in SIDES:
        figures = found[side]
        error, allowed, ok = _judge(side, figures, found[PEER], exact)
        session.add(
            "iteris", case, side, figures["seconds"], op=side, size=sizes, error=error, allowed=allowed, ok=ok,
            peer=None if side == PEER else PEER,
            speedup=None if side == PEER else document / max(figures["seconds"].median, 1e-9),
            peak_bytes=figures["peak_bytes"], objective=figures["objective"],
        )  # fmt: skip


def _converges(sizes: dict[str, int]) -> bool:
    """Whether the loop's solves suffice: a BERT layer has four modules one after the other."""
    return sizes["solves"] > 4 * sizes["layers"]


def _run_all(session: Session, sizes: dict[str, int], runs: int, exact: str | None) -> dict[str, dict[str, Any]]:
    """Every side in turn, several times."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[int]] = {side: [] for side in SIDES}
    last: dict[str, dict[str, Any]] = {}
    for run in range(runs):
        for at, side in enumerate(SIDES):
            session.tell("iteris", side, run * len(SIDES) + at, runs * len(SIDES))
            last[side] = session.jobs.run(
                f"{_JOBS}:solve", side=side, sizes=sizes, device=str(session.device), threads=session.threads,
                exact=exact,
            )  # fmt: skip
            seconds[side].append(last[side]["seconds"])
            peaks[side].append(last[side]["peak_bytes"])
    return {
        side: last[side] | {"seconds": Times(seconds[side], None), "peak_bytes": int(statistics.median(peaks[side]))}
        for side in SIDES
    }


def _judge(
    side: str, figures: dict[str, Any], loop: dict[str, Any], exact: float | None
) -> tuple[float | None, float | None, bool]:
    """Error, what is allowed, and whether that and the objective hold."""
    objective = figures["objective"]
    if side == OTHER_PROBLEM or exact is None:
        return None, None, bool(objective < 1.0)
    allowed = _LOOP if side == PEER else 2.0 * loop["error"]
    return figures["error"], allowed, figures["error"] <= allowed and abs(objective - exact) <= _OBJECTIVE * exact
