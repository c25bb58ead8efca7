"""Full fine-tuning against LoRA, head by head: a real encoder, two tasks, equal seeds.

The trainings of `heads_train.py` are measured as by `loraforge measure run`, compared as by `loraforge compare` and
summarised as by `loraforge measure aggregate`; in addition importance before training is measured once more with a
trained probe in place of the random classifier. Every step is kept once it is finished.

    python benchmarks/real/heads.py                # everything
    python benchmarks/real/heads.py --table        # the tables of the stored results
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from heads_train import LORA, METHODS, RATES, SEEDS, TASKS, TRAIN, pilot, run_folder, task_of, train_all
from tasks_data import DEFAULT_WORK, REPOSITORY, base_folder, prepare

RESULTS = REPOSITORY / "benchmarks" / "results" / "real-heads.json"
ROWS, PROBE_STEPS = 256, 200


def measure(work: Path, seeds: list[int]) -> None:
    """Both methods of each task and seed; what is measured before training is shared by the two."""
    from loraforge.measure.run import measure_run

    for seed in seeds:
        for task in TASKS:
            folders = [run_folder(work, method, task, seed) for method in METHODS]
            for folder in folders:
                started = time.perf_counter()
                norms = work / "base_norms.json"
                found = measure_run(folder, subset=ROWS, norms=norms, others=[f for f in folders if f != folder])
                rho = found["stats"]["spearman_rho_Ipost_Urel"]
                print(
                    f"measured {folder.relative_to(work)}: {rho} in {time.perf_counter() - started:.0f} s", flush=True
                )


def probes(work: Path, seeds: list[int]) -> None:
    """Importance before training with a trained head, by task and seed: WORK/probe/<task>-seed<S>.jsonl."""
    from loraforge.measure.importance.measure import measure_importance
    from loraforge.measure.subjects.subject import open_subject
    from loraforge.tasks import parse_task

    for seed in seeds:
        for task in TASKS:
            out = work / "probe" / f"{task}-seed{seed}.jsonl"
            if out.is_file():
                continue
            out.parent.mkdir(exist_ok=True)
            spec = parse_task(task_of(work, task), task)
            subject = open_subject(base_folder(), task=spec, subset=ROWS, seed=seed, device="cpu")
            measure_importance(subject, objective="probe", probe_steps=PROBE_STEPS, seed=seed, out=out)
            print(f"probe {task} seed {seed}", flush=True)


def comparisons(work: Path, seeds: list[int]) -> None:
    """Each pair, then all runs together."""
    from loraforge.measure.analysis.compare import compare
    from loraforge.measure.analysis.seeds import summarise

    runs = []
    for seed in seeds:
        for task in TASKS:
            pair = [run_folder(work, method, task, seed) for method in METHODS]
            compare(pair, work / "COMPARE" / task / pair[1].name, overwrite=True)
            runs += pair
    summarise(runs, work / "summary")


STAGES: dict[str, Callable[[Path, list[int]], None]] = {
    "train": lambda work, seeds: train_all(work, tuple(seeds)),
    "measure": measure,
    "probe": probes,
    "compare": comparisons,
}


def assemble(work: Path, seeds: list[int]) -> dict[str, Any]:
    """The content of the results file."""
    import numpy as np
    import torch
    import transformers

    from loraforge.bench.machine import machine
    from loraforge.measure.analysis.statistics import spearman
    from loraforge.provenance import commit

    def column(path: Path) -> Any:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return np.array([line["I"] for line in sorted(lines, key=lambda line: (line["layer"], line["head"]))])

    found: dict[str, Any] = {
        "benchmark": "heads", "machine": machine(), "commit": commit(),
        "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "transformers": transformers.__version__, "tasks": list(TASKS), "seeds": seeds, "rows": ROWS, "train": TRAIN,
        "rates": RATES, "lora": LORA, "pilot": json.loads((work / "pilot.json").read_text(encoding="utf-8")),
        "runs": {}, "pairs": {}, "probe": {},
    }  # fmt: skip
    for seed in seeds:
        for task in TASKS:
            for method in METHODS:
                folder = run_folder(work, method, task, seed)
                record = json.loads((folder / "ckpt_final" / "run.json").read_text(encoding="utf-8"))
                found["runs"][str(folder.relative_to(work))] = {
                    "accuracy": record["metrics"]["test"]["metrics"]["accuracy"],
                    "stats": json.loads((folder / "stats.json").read_text(encoding="utf-8")),
                    "commit": json.loads((folder / "run_config.json").read_text(encoding="utf-8"))["commit"],
                    "path": _optional(folder / "path.json"),
                    "spectrum": _spectra(folder / "spectrum.jsonl"),
                }
            pair = work / "COMPARE" / task / run_folder(work, "LoRA", task, seed).name
            metrics = json.loads((pair / "compare_metrics.json").read_text(encoding="utf-8"))
            found["pairs"][f"{task} seed{seed}"] = metrics["comparison"]["pairs"]
            random, probed = folder / "importance_pre.jsonl", work / "probe" / f"{task}-seed{seed}.jsonl"
            if probed.is_file():
                post = folder / "importance_post.jsonl"
                found["probe"][f"{task} seed{seed}"] = {
                    "random_post": spearman(column(random), column(post)),
                    "probe_post": spearman(column(probed), column(post)),
                    "random_probe": spearman(column(random), column(probed)),
                }
    for task in TASKS:
        for name, place in (("random", "{0}/importance_pre.jsonl"), ("probe", "probe/{1}.jsonl")):
            columns = [
                column(path)
                for seed in seeds
                if (path := work / place.format(run_folder(work, "FFT", task, seed), f"{task}-seed{seed}")).is_file()
            ]
            rhos = [spearman(a, b) for i, a in enumerate(columns) for b in columns[i + 1 :]]
            found["probe"].setdefault("between seeds", {})[f"{task} {name}"] = float(np.mean(rhos)) if rhos else None
    found["summary"] = json.loads((work / "summary" / "seeds.json").read_text(encoding="utf-8"))
    return found


def _optional(path: Path) -> Any:
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: content[key] for key in ("steps", "total", "rank_correlation")}


def _spectra(path: Path) -> Any:
    """Means over modules of what the spectra say."""
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keys = ("eff_rank", "stable_rank", "rank90", "rank_use")
    means = {key: [line[key] for line in lines if line.get(key) is not None] for key in keys}
    return {key: sum(values) / len(values) if values else None for key, values in means.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK.parent / "heads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stages", nargs="*", choices=["pilot", *STAGES], default=list(STAGES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--no-results", action="store_true", help="fill the work folder only")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored results and stop")
    options = parser.parse_args()
    import torch
    from heads_report import table

    torch.set_num_threads(1)
    work = options.work.resolve()
    if not options.table:
        prepare(work / "source")
        for stage in options.stages:
            pilot(work) if stage == "pilot" else STAGES[stage](work, options.seeds)
        if options.no_results:
            return
        options.out.write_text(json.dumps(assemble(work, options.seeds), indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(options.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
