"""Measurements of this program against its references and peers: `loraforge bench`, `run_bench`.

A result (`--json`, `--out`) is one object; `schema` changes where a key changes its meaning:

    schema       1
    groups       names of the groups that ran
    size         "default" | "full" | "tiny"
    machine      machine, cores, threads, commit, date, python, torch, gpu (null without one), kernels
    device       "cpu" | "cuda:0"
    clock        "processor" (seconds of this process, one thread) | "wall" | "events" (of the
                 GPU; groups iteris and tokens of scale by the wall)
    ceilings     {bytes_per_second, flops_per_second: {float32, float64, bfloat16}}, measured in the same run; null
                 where no group needed them
    rows         one object a form of a case:
        group, case, form, device    what was measured; these four name a row
        op, size                     operator (or method, side, axis) and its sizes {name: number}
        seconds, iqr, runs           median and interquartile range over `runs` timings
        bytes, flops                 read and written, and computed, counted from shapes (`costs`); null: not counted
        gb_per_s, gflop_per_s        these over seconds, in 1e9
        roofline                     max(bytes / bandwidth, flops / rate) / seconds against `ceilings`; above 1 only
                                     where a cache holds the data. An SVD counts 22 R^3 flops, however it is computed.
        error, allowed, ok           largest deviation from the float64 reference relative to its largest value, what
                                     was allowed (the stated tolerance, or twice the error of the plain PyTorch form),
                                     and whether it held; error null: see the group for what is compared instead
        peer, speedup                the form that it is compared with, and seconds of that over these
        peak_bytes                   most memory above the start of the call: resident (CPU, in a process of its own) or
                                     allocated (GPU); group train, buffer: of the rows it holds; null: not measured
        objective                    group iteris: missed share of the task outputs, lower is better; else null
    fits         group scale: {axis, form, quantity, points, exponent, stderr} of value ~ axis^exponent, least squares
                 of the logarithms
    skipped      {group, case, form, reason}: forms that this machine has not
    failures     {group, case, form, error, allowed}: results that are wrong; the command then exits with 4
    comparison   with --compare: {file, rows, only_new, only_old, notes}; a row has seconds_old, seconds_new, ratio,
                 spread, verdict ("slower" | "faster" | "same": within 1.5 times both IQRs | "unknown": too few timings)
    seconds      wall time of the whole run
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraforge.bench.run import run_bench as run_bench

__all__ = ["run_bench"]


def __getattr__(name: str) -> Any:
    """Loads torch only when something is to be measured."""
    if name != "run_bench":
        raise AttributeError(f"module 'loraforge.bench' has no attribute '{name}'")
    from loraforge.bench.run import run_bench

    return run_bench
