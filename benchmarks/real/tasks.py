"""Six tasks, one encoder: adapters trained, merged by every method, and three of the tasks learned one after the other.

Base all-MiniLM-L6-v2, one LoRA and head a task and seed. Every unit of work (an adapter, a merge with its scores, a
sequence) is kept in the work folder once it is finished, so the script can be stopped and started again, and several of
them with different --stages may share a work folder.

    python benchmarks/real/tasks.py                                # everything
    python benchmarks/real/tasks.py --stages adapters six          # some of it
    python benchmarks/real/tasks.py --table                        # the tables of the stored results
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tasks_data import DEFAULT_WORK, REPOSITORY, prepare
from tasks_variants import SEEDS, Variant, ablation_variants, count_variants, six_variants

RESULTS = REPOSITORY / "benchmarks" / "results" / "real-tasks.json"


def adapters(options: argparse.Namespace) -> None:
    """Trains what is not trained yet."""
    from tasks_train import train_all

    train_all(options.work, options.seeds)


def six(options: argparse.Namespace) -> None:
    """Every method over all tasks."""
    merge_all(options, six_variants())


def ablation(options: argparse.Namespace) -> None:
    """The switches of `iteris-plus`."""
    merge_all(options, ablation_variants())


def counts(options: argparse.Namespace) -> None:
    """The leading merges over fewer tasks; needs `six`."""
    from tasks_report import assemble, leading_names

    names = leading_names(assemble(options.work, None)["six"])
    merge_all(options, count_variants([v for v in six_variants() if v.name in names]))


def merge_all(options: argparse.Namespace, variants: list[Variant]) -> None:
    """Every variant of every seed, seeds outermost; a line each."""
    from tasks_merge import own_scores, run_case
    from tasks_scores import normalised
    from tasks_train import missing

    if absent := missing(options.work, options.seeds):
        raise SystemExit(f"not trained yet: {', '.join(absent)}; run --stages adapters first")
    for seed in options.seeds:
        own = own_scores(options.work, seed)["own"]
        for variant in variants:
            if options.only and variant.name not in options.only and variant.method not in options.only:
                continue
            found = run_case(options.work, variant, seed, options.keep)
            score = normalised([found["correct"]], [{task: own[task] for task in variant.tasks}])
            seconds = found["seconds"]
            print(
                f"seed {seed} | {variant.name} | {len(variant.tasks)} tasks | {score:.4f} | "
                f"merge {seconds['merge']:.1f} s, evaluation {seconds['eval']:.0f} s",
                flush=True,
            )


def sequence(options: argparse.Namespace) -> None:
    """Every run of the sequence, seeds outermost."""
    from tasks_sequence import RUNS, run_sequence

    for seed in options.seeds:
        for run in RUNS:
            if options.only and run not in options.only:
                continue
            started = time.perf_counter()
            found = run_sequence(options.work, run, seed)
            shares = {name: round(metrics["acc"], 3) for name, metrics in found["metrics"].items()}
            print(f"seed {seed} | {run} | ACC {shares} | {time.perf_counter() - started:.0f} s", flush=True)


def check(options: argparse.Namespace) -> None:
    """`loraforge eval` of a saved merge gives the numbers of the table."""
    from tasks_check import check_row

    options.checked = check_row(options.work, options.seeds[0])


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "adapters": adapters, "six": six, "ablation": ablation, "counts": counts, "sequence": sequence, "check": check,
}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="adapters, merges, scores and sequences")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    parser.add_argument(
        "--stages", nargs="*", choices=list(STAGES), default=list(STAGES), help="none: just the results file"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="merges (labels or methods) or runs of the sequence")
    parser.add_argument("--keep", action="store_true", help="reuse scores of merges that other library code made")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-results", action="store_true", help="fill the work folder only")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored results and stop")
    options = parser.parse_args()
    options.work = options.work.resolve()
    import torch
    from tasks_report import assemble, table

    torch.set_num_threads(options.threads)
    if not options.table:
        prepare(options.work)
        for stage in options.stages:
            STAGES[stage](options)
        if options.no_results:
            return
        earlier = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
        results = assemble(options.work, earlier)
        if "checked" in options:
            results["check"] = options.checked
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"written: {options.out}")
    if not options.out.is_file():
        raise SystemExit(f"no results at {options.out}: run without --table first")
    print(table(json.loads(options.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
