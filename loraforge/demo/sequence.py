"""The demo of training: three domains learnt one after another, by plain training, by replay and by I-LORA."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import ViTForImageClassification

from loraforge.demo.digits import Domain, Split, as_pixels, domain, load_splits
from loraforge.demo.evaluation import accuracy
from loraforge.demo.steps import Phases, Progress
from loraforge.demo.training import Recipe, build_base, train_base
from loraforge.errors import LoraforgeError
from loraforge.provenance import versions
from loraforge.training.record import PACKAGES
from loraforge.training.sequence.run import train_ilora

METHODS = ("seq", "er", "ilora")
# Written with the data, before any training: an output that has it is a demo, finished when it has RESULTS too.
CARD, RESULTS, SEQUENCE = "demo.json", "results.json", "sequence.yaml"
_METRICS = ("acc", "bwt", "forgetting")


@dataclass(frozen=True, slots=True)
class SequenceRecipe:
    """Sizes and steps of the sequence.

    Attributes:
        domains: Names of the tasks, in order.
        train: Training images a task.
        test: Test images a task.
        epochs: Passes over a task's images.
        batch: Images a step.
        rate: Learning rate, constant.
        rank: r of the adapter.
        buffer: Images that replay keeps.
    """

    domains: tuple[str, ...] = ("rotated", "mirrored", "inverted")
    train: int = 600
    test: int = 400
    epochs: int = 5
    batch: int = 32
    rate: float = 1e-3
    rank: int = 4
    buffer: int = 100

    def quick(self) -> SequenceRecipe:
        """The same pipeline in seconds, for tests."""
        return replace(self, domains=("rotated", "inverted"), train=160, test=60, epochs=4, rate=8e-3, buffer=40)


def run_sequence_demo(
    out: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a base, writes three tasks and their sequence.yaml, trains the sequence by three methods, compares them.

    A demo that was stopped goes on where it was: the finished tasks of each method are kept.

    Args:
        out: Folder of the results: base, tasks (images by class), sequence.yaml, run, run-seq, run-er, results.json,
            picture.png, report.html.
        seed: Seed of every random draw.
        quick: Two tasks and few steps: shows that everything works, says nothing about the methods.
        overwrite: Replace an earlier demo.
        progress: Called as (phase, detail, done, total).

    Returns:
        {tasks, notes, rows: [{name, method, adapter, accuracies, acc, bwt, forgetting, seconds}], courses: [{name,
        rows}] (the base's accuracies, then those after each task), runs: {method: folder}, plain_accuracy, sizes, seed,
        quick, phases, versions, command, seconds, summary, warnings, paths}; accuracies in percent, in the order of
        tasks; `seconds` of a row is training alone.

    Raises:
        LoraforgeError: The folder is there and no demo that this one can continue (or, with `overwrite`, replace).
    """
    out, recipe = Path(out), SequenceRecipe().quick() if quick else SequenceRecipe()
    card = {"demo": "sequence", "seed": seed, "quick": quick, "recipe": asdict(recipe)}
    # As JSON gives it back: tuples are lists there.
    card = json.loads(json.dumps(card))
    known = _check_place(out, card, overwrite)
    start, phases = time.perf_counter(), Phases(progress)
    if not known:
        _prepare(out, recipe, card, phases)
    found = {method: _train(out, method, phases, progress) for method in METHODS}
    results = _results(recipe, found) | {
        "plain_accuracy": json.loads((out / CARD).read_text(encoding="utf-8"))["plain_accuracy"],
        "sizes": {"train": recipe.train, "test": recipe.test, "buffer": recipe.buffer},
        "seed": seed,
        "quick": quick,
        "versions": versions(*PACKAGES),
        "command": "loraforge demo --sequence" + (" --quick" if quick else "") + (f" --seed {seed}" if seed else ""),
        "phases": phases.seconds,
        "seconds": time.perf_counter() - start,
    }
    return _write(out, results)


def _check_place(out: Path, card: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `out` holds an unfinished demo of the same settings; refuses what may not be written over."""
    if not out.exists():
        return False
    ours = out.is_dir() and not out.is_symlink() and ((out / CARD).is_file() or not any(out.iterdir()))
    if not ours:
        what, hint = "the output exists and is no demo of a training sequence", "choose another folder"
        raise LoraforgeError(what, where=out, hint=hint)
    if overwrite:
        return False
    hint = "choose another folder, or replace it: --overwrite"
    if not (out / CARD).is_file() or (out / RESULTS).is_file():
        raise LoraforgeError("the output exists", where=out, hint=hint)
    begun = json.loads((out / CARD).read_text(encoding="utf-8"))
    if {key: begun.get(key) for key in card} != card:
        told = [f"seed {each['seed']}" + (", quick" if each["quick"] else "") for each in (begun, card)]
        raise LoraforgeError(
            "the output is an unfinished demo with other settings", where=out, got=told[0], expected=told[1], hint=hint
        )
    return True


def _prepare(out: Path, recipe: SequenceRecipe, card: Mapping[str, Any], phases: Phases) -> None:
    """Base, images and sequence.yaml, built beside their place: a folder of that name always has them all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as draft:
        work = Path(draft) / out.name
        with phases.of("train base"):
            plain = _train_base(work, card["seed"], card["quick"])
        with phases.of("write tasks"):
            train, test = load_splits(card["seed"])
            for each in map(domain, recipe.domains):
                for part, split in (("train", train.head(recipe.train)), ("test", test.head(recipe.test))):
                    pixels = as_pixels(split, each, seed=card["seed"], part=part)
                    write_images(work / "tasks" / each.name / part, pixels)
        (work / SEQUENCE).write_text(sequence_yaml(recipe, card["seed"]), encoding="utf-8")
        content = json.dumps({**card, "plain_accuracy": plain}, indent=1)
        (work / CARD).write_text(content + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)


def _train_base(work: Path, seed: int, quick: bool) -> float:
    """Trains the base on plain digits and saves it; returns its accuracy on plain test digits in percent."""
    recipe = Recipe().quick() if quick else Recipe()
    train, test = load_splits(seed)
    base = build_base(recipe, seed)
    # The head's rows are named as the classes of the tasks are, so that a task finds its own.
    base.config.id2label = {digit: str(digit) for digit in range(10)}
    base.config.label2id = {str(digit): digit for digit in range(10)}
    train_base(base, as_pixels(train.head(recipe.train)), recipe, seed)
    base.save_pretrained(str(work / "base"))
    saved = ViTForImageClassification.from_pretrained(str(work / "base"), local_files_only=True).eval()
    return accuracy(saved, as_pixels(test.head(recipe.test)))


def write_images(folder: Path, split: Split) -> None:
    """Writes a domain's images as PNG files, `folder/CLASS/0000.png`.

    Args:
        folder: Made here.
        split: Images (S, 1, 8, 8) in [-1, 1]; 256 grey levels of them are kept.
    """
    from PIL import Image

    grey = ((split.images.squeeze(1) + 1.0) * 127.5).round().to(torch.uint8)
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(grey, split.labels.tolist(), strict=True)):
        Image.fromarray(image.numpy()).save(folder / str(label) / f"{i:04d}.png")


def sequence_yaml(recipe: SequenceRecipe, seed: int) -> str:
    """The sequence file, with a word on every setting."""
    tasks = [domain(name) for name in recipe.domains]
    return f"""\
# {len(tasks)} domains of handwritten digits, learnt one after another by one adapter.
#   loraforge train-ilora sequence.yaml --method joint     (or ilora, seq, er, single)
#   loraforge train-ilora sequence.yaml --set ema_alpha=0.02 --out run-slow
# Paths count from the folder of this file.
base_model: ./base
output_dir: run          # of the method below; --method seq writes to run-seq
method: ilora
label_space: shared      # the ten digits are the same classes in every task
lora: {{r: {recipe.rank}, alpha: {2 * recipe.rank}, targets: all-linear}}    # the head is the base's, and frozen
ilora:
  ema_alpha: 0.25              # weight of the new value in the slow copy
  consistency_weight: 1.0      # how strongly hidden states are held to the slow copy's
  ilora_buffer_size: {recipe.buffer}       # images of earlier tasks that are kept (for er, too)
train:
  num_train_epochs: {recipe.epochs}
  per_device_train_batch_size: {recipe.batch}
  learning_rate: {recipe.rate}
  lr_scheduler_type: constant  # with a rate that falls to 0 the slow copy catches up, and both adapters end equal
  save_strategy: "no"          # a task takes seconds: one that is stopped starts anew, finished ones are kept
  seed: {seed}
eval: {{adapters: [default, ema]}}
tasks:
{_task_lines(tasks)}"""


def _task_lines(tasks: list[Domain]) -> str:
    lines = [
        f"  # {task.what}\n  - {{id: {task.name}, train: tasks/{task.name}/train, test: tasks/{task.name}/test}}\n"
        for task in tasks
    ]
    return "".join(lines)


def _train(out: Path, method: str, phases: Phases, progress: Progress | None) -> dict[str, Any]:
    """Trains the sequence by one method; finished tasks of an earlier try are skipped."""

    def tell(stage: str, detail: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{method}: {stage}", detail, done, total)

    with phases.of(f"train by {method}"):
        # On the CPU everywhere: the same numbers, and no GPU is faster with models this small.
        return train_ilora(out / SEQUENCE, method=method, device="cpu", progress=tell)


def _results(recipe: SequenceRecipe, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Table and curves of all runs, in percent."""
    base = _percent(found["seq"]["matrix"]["base"])
    nothing = dict.fromkeys(_METRICS)
    rows: list[dict[str, Any]] = [
        {"name": "base", "method": "base", "adapter": None, "accuracies": base, **nothing, "seconds": None}
    ]
    rows[0]["acc"] = sum(base) / len(base)
    courses = []
    for method, run in found.items():
        seconds = sum(unit["seconds"] for unit in run["units"])
        adapters = [name for name in run["matrix"] if name != "base"]
        for adapter in adapters:
            name = f"{method} ({adapter})" if len(adapters) > 1 else method
            matrix = [_percent(row) for row in run["matrix"][adapter]]
            metrics = {key: 100.0 * run["metrics"][adapter][key] for key in _METRICS}
            rows.append(
                {"name": name, "method": method, "adapter": adapter, "accuracies": matrix[-1], **metrics}
                | {"seconds": seconds}
            )
            courses.append({"name": name, "rows": [base, *matrix]})
    return {
        "tasks": list(recipe.domains),
        "notes": {name: domain(name).what for name in recipe.domains},
        "rows": rows,
        "courses": courses,
        "runs": {method: Path(run["out"]).name for method, run in found.items()},
        "warnings": list(dict.fromkeys(line for run in found.values() for line in run["warnings"])),
    }


def _percent(row: Any) -> list[float]:
    return [100.0 * value for value in row]


def _write(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Picture, page and, last, the numbers, which say that the demo is whole."""
    from loraforge.report.demo_sequence import courses_chart, summary, write_sequence_demo
    from loraforge.report.page import whole_file
    from loraforge.report.plots import save_png

    results = results | {"summary": summary(results)}
    with whole_file(out / "picture.png") as draft:
        save_png(lambda: courses_chart(results, "Accuracy on each task over a training sequence"), draft)
    write_sequence_demo(out / "report.html", results)
    with whole_file(out / RESULTS) as draft:
        draft.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    names = {"sequence": SEQUENCE, "tasks": "tasks", "numbers": RESULTS, "picture": "picture.png"}
    return results | {"paths": {label: str(out / name) for label, name in (names | {"report": "report.html"}).items()}}
