"""Merging real adapters on real text: which merge keeps most of three emotion classifiers?

Base all-MiniLM-L6-v2, three tasks, three seeds of trained adapters (emotion_train.py), every merge scored by the mean
over tasks of accuracy / own adapter's accuracy, with paired bootstrap intervals against the plain average.

    python benchmarks/real/emotion_train.py                     # once, about 15 minutes on 2 threads
    python benchmarks/real/emotion.py                           # every merge; restartable
    python benchmarks/real/emotion.py --only iteris-plus --samples 64 --seeds 0
    python benchmarks/real/emotion.py --only none --settings-json '{"rho .5": {"reg_ceof": 0.5}}'
    python benchmarks/real/emotion.py --table                   # the table of the stored results
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from emotion_data import DEFAULT_WORK, MAX_TOKENS, REPOSITORY, TASKS, load_task, write_calibration
from emotion_eval import Correct, Harness, accuracies, normalised_average, read_correct, save_correct
from emotion_report import entry, header, table
from emotion_variants import REFERENCE, SAMPLES, SEEDS, Variant, code_fingerprint, extra_variants, standard_variants

RESULTS = REPOSITORY / "benchmarks" / "results" / "emotion.json"
Case = tuple[Variant, int, int]


@functools.cache
def harness(work: Path) -> Harness:
    """One harness a process."""
    return Harness(work)


def cross_check(bench: Harness, variant: Variant, seed: int, modules: dict[str, Any]) -> None:
    """The library's plain sums must equal the ones computed here from the files in float64.

    Raises:
        RuntimeError: Other modules, or a module whose delta is off by more than float32 rounding.
    """
    n = len(TASKS)
    by_hand = bench.weighted_sum(seed, variant.weights or [1.0 / n if variant.method == REFERENCE else 1.0] * n)
    if set(by_hand) != set(modules):
        raise RuntimeError(f"{variant.name}: modules differ from the files': {set(by_hand) ^ set(modules)}")
    for name, expected in by_hand.items():
        pair = modules[name]
        error = (pair.B.double() @ pair.A.double() * pair.scaling - expected).norm() / expected.norm()
        if not error < 1e-5:
            raise RuntimeError(f"{variant.name} is off at {name}: relative error {error:.2e}, expected below 1e-5")


def merge(bench: Harness, variant: Variant, samples: int, seed: int) -> tuple[Correct, dict[str, Any]]:
    """Merges by the library, checks, evaluates; the per-row correctness and what to keep of the run."""
    import loraforge as lf

    extra: dict[str, Any] = {}
    if variant.calibrated:
        files = {name: str(write_calibration(bench.work, load_task(name), samples, seed)) for name in TASKS}
        extra = {"base": bench.base, "calibration": files, "samples": samples, "max_length": MAX_TOKENS}
    if variant.weights is not None:
        extra["weights"] = variant.weights
    if variant.rank is not None:
        extra["rank"] = variant.rank
    paths = [str(path) for path in bench.adapter_paths(seed)]
    started = time.perf_counter()
    result = lf.merge(paths, method=variant.method, seed=seed, params=dict(variant.params), **extra)
    merged = time.perf_counter()
    if variant.method in (REFERENCE, "task-arithmetic") and variant.rank is None:
        cross_check(bench, variant, seed, result.modules)
    correct = bench.evaluate(seed, result.modules)
    seconds = {"call": merged - started, "eval": time.perf_counter() - merged}
    return correct, {"seconds": {"merge": float(result.report.get("seconds", merged - started)), **seconds},
                     "report": result.report}  # fmt: skip


def run_case(work: Path, variant: Variant, samples: int, seed: int, keep: bool) -> dict[str, Any]:
    """One cached case: from the work folder if there (and of the same library code, unless `keep`), else computed."""
    bench, code = harness(work), code_fingerprint()
    stem = f"{variant.method}-{samples}-{variant.settings_hash()}-{bench.fingerprint(seed)}"
    file = work / "cache" / f"seed{seed}" / f"{stem}.npz"
    meta_file = file.with_suffix(".json")
    if file.is_file() and meta_file.is_file():
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        if keep or meta["code"] == code:
            return {"correct": read_correct(file), "cached": True, **meta}
    correct, kept = merge(bench, variant, samples, seed)
    meta = {"code": code, "settings": variant.settings(), "samples": samples, "seed": seed, **kept}
    meta_file.parent.mkdir(parents=True, exist_ok=True)
    meta_file.write_text(json.dumps(meta, indent=1, default=str), encoding="utf-8")
    save_correct(file, correct)
    return {"correct": correct, "cached": False, **meta}


def run_cases(work: Path, cases: list[Case], keep: bool, jobs: int) -> Iterator[dict[str, Any]]:
    """Results in the order of the cases; with jobs > 1 in as many processes."""
    if jobs == 1:
        yield from (run_case(work, *case, keep) for case in cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from (f.result() for f in [pool.submit(run_case, work, *case, keep) for case in cases])


def plan(variants: list[Variant], options: argparse.Namespace) -> list[Case]:
    """Every (variant, samples, seed); data-free merges once a seed, as samples 0."""
    return [
        (variant, samples, seed)
        for variant in variants
        for samples in (options.samples if variant.calibrated else [0])
        for seed in options.seeds
    ]


def select(options: argparse.Namespace) -> list[Variant]:
    """The variants asked for by label or method; the reference always runs, since all differences are against it."""
    rows = standard_variants()
    if options.only is not None:
        rows = [v for v in rows if v.name in options.only or v.method in options.only or v.name == REFERENCE]
    return rows + extra_variants(options.settings_json)


def run(options: argparse.Namespace, out: Path) -> None:
    """Runs what is asked for, updates the results file after every variant and prints a line a case."""
    bench = harness(options.work)
    owns = {seed: bench.own(seed) for seed in options.seeds}
    bases = {seed: run_base(bench, seed) for seed in options.seeds}
    results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"merges": {}}
    now = header(owns, bases)
    for key in ("own_accuracy", "base_accuracy"):  # a run over fewer seeds keeps what is known of the others
        now[key] = {**results.get(key, {}), **now[key]}
    results.update(now)
    variants, done = select(options), {}
    cases = plan(variants, options)
    for (variant, samples, seed), found in zip(cases, run_cases(options.work, cases, options.keep, options.jobs)):  # noqa: B905
        done[variant.name, samples, seed] = found
        score = normalised_average([found["correct"]], [owns[seed]])
        shares = " ".join(f"{value:.3f}" for value in accuracies(found["correct"]).values())
        note = "cached" if found["cached"] else f"merge {found['seconds']['merge']:.1f} s"
        print(f"{variant.name} | samples {samples} | seed {seed} | {score:.4f} | {shares} | {note}", flush=True)
        if seed == options.seeds[-1]:
            runs, plain = ([done[n, k, s] for s in options.seeds] for n, k in ((variant.name, samples), (REFERENCE, 0)))
            row = entry(variant, options.seeds, runs, [r["correct"] for r in plain], [owns[s] for s in options.seeds])
            results["merges"].setdefault(variant.name, {})[str(samples)] = row
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")


def run_base(bench: Harness, seed: int) -> Correct:
    """The base without any adapter, read by the seed's heads."""
    file = bench.work / "cache" / f"seed{seed}" / f"base-{bench.fingerprint(seed)}.npz"
    if not file.is_file():
        save_correct(file, bench.evaluate(seed, {}))
    return read_correct(file)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="adapters, calibration files and cache")
    parser.add_argument("--out", type=Path, help="results file; exploratory runs default to WORK/explore.json")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="labels or methods; none: just the extras")
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--settings-json", metavar="JSON|@FILE", help="extra variants {label: params of iteris-plus}")
    parser.add_argument("--keep", action="store_true", help="reuse results that other library code computed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of the stored results and stop")
    options = parser.parse_args()
    sys.path.append(str(REPOSITORY))  # so that the library need not be installed
    out = options.out or (options.work / "explore.json" if options.settings_json else RESULTS)
    if not options.table:
        run(options, out)
    if not out.is_file():
        raise SystemExit(f"no results at {out}: run without --table first")
    print(table(json.loads(out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
