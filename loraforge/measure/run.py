"""`loraforge measure run`: everything that is measured of one training, step by step, into one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from loraforge.errors import LoraforgeError
from loraforge.measure.files import CONFIG, IMPORTANCE, STATS, SUBSET, SUBSET_ABOUT
from loraforge.measure.plan import Plan, Progress
from loraforge.measure.record import Trained, open_trained
from loraforge.measure.settings import MeasureSettings
from loraforge.measure.steps import Record, do_steps
from loraforge.measure.subjects.subset import choose_subset, read_subset, write_subset
from loraforge.storage.leftovers import hold
from loraforge.tasks import TaskSpec


def measure_run(
    run_dir: str | Path,
    *,
    out: str | Path | None = None,
    base: str | Path | None = None,
    final: str | Path | None = None,
    task: TaskSpec | str | Path | None = None,
    data: Any = None,
    seed: int | None = None,
    norms: Path | None = None,
    others: Sequence[str | Path] = (),
    overwrite: bool | Literal["changed"] = False,
    command: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures a training: importance before and after, Fisher, update, spectra, statistics, pictures.

    Every step is recorded; the same call goes on where an earlier one was broken off, head by head, and does nothing
    twice. What was done with other settings is not replaced without `overwrite`.

    Args:
        run_dir: Folder with `ckpt_final`, or itself what train-lora or train-full wrote.
        out: Folder of the results; default `run_dir`, or its folder `measure` where it is a training's output.
        base: The base, where it is no longer at its recorded place.
        final: Adapter or model, instead of the folder's own.
        task: Task, or file of one, instead of the recorded one.
        data: Rows to measure on, instead of the task's.
        seed: Of the head, for folders without a record.
        norms: File in which norms of the base are kept for further runs.
        others: Folders of other runs: what of theirs was measured of the same theta0 with the same settings is taken.
        overwrite: Start anew; "changed": replace what was done with other settings and keep the rest.
        command: Kept in run_config.json.
        progress: Called with (stage, detail, done, total).
        settings: Of `MeasureSettings`.

    Returns:
        {out, method, task, seed, rank, profile, n_heads, stats (stats.json), steps: [{name, state, seconds}],
        warnings, paths}.

    Raises:
        UsageError: An unknown setting.
        LoraforgeError: No training there; base, rows or settings that are not those of before; heads that cannot be
            told apart.
        CheckFailed: A loss that is not finite.
    """
    chosen = MeasureSettings.read(settings)
    trained = open_trained(
        run_dir, out=out, base=base, final=final, task=task, data=data, split=chosen.split, seed=seed
    )
    folder = trained.out
    with _held(folder):
        drawn = not (folder / SUBSET).is_file()
        indices = _rows(trained, chosen, overwrite=bool(overwrite))
        plan = Plan(trained, chosen, indices, norms=norms, progress=progress)
        record = Record(folder, plan.about(command))
        try:
            told = do_steps(plan.steps(), folder, record, overwrite=overwrite, others=[Path(o) for o in others])
        except LoraforgeError:
            if drawn and not any(folder.glob(f"*{IMPORTANCE['pre']}*")):
                # Nothing was measured on these rows: a corrected call draws its own.
                for name in (SUBSET, SUBSET_ABOUT):
                    (folder / name).unlink(missing_ok=True)
            raise
        finally:
            plan.close()
    stats = json.loads((folder / STATS).read_text(encoding="utf-8"))
    names = {"numbers": STATS, "record": CONFIG} | ({"report": "report.html"} if chosen.plots else {})
    return {
        "out": str(folder),
        **{key: record.content[key] for key in ("method", "task", "seed", "rank", "profile")},
        "n_heads": stats["n_heads"],
        "stats": stats,
        "steps": told,
        "warnings": plan.warnings,
        "paths": {name: str(folder / file) for name, file in names.items()},
    }


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder of the results, made if need be and locked against a second run.

    Raises:
        LoraforgeError: Another run works in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = hold(folder)
    except BlockingIOError as error:
        hint = "wait for it, or choose another --out"
        raise LoraforgeError("another measurement is at work in this folder", where=folder, hint=hint) from error
    except OSError as error:
        raise LoraforgeError("the folder of the run cannot be made", where=folder, got=error.strerror) from error
    try:
        yield
    finally:
        os.close(handle)


def _rows(trained: Trained, settings: MeasureSettings, *, overwrite: bool) -> list[int]:
    """The rows of the run: those of its file, else drawn and written.

    Raises:
        LoraforgeError: The file is of other data, or was drawn otherwise.
    """
    path, beside = trained.out / SUBSET, trained.out / SUBSET_ABOUT
    drawn = {"size": trained.size, "data_sha256": trained.data["sha256"], "seed": settings.subset_seed,
             "asked": settings.subset}  # fmt: skip
    if path.is_file() and not (overwrite and beside.is_file()):
        indices = read_subset(path, size=trained.size, data_sha256=trained.data["sha256"])
        about = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        other = [key for key in ("seed", "asked") if key in about and about[key] != drawn[key]]
        if other:
            got = "; ".join(f"{key} {about[key]}" for key in other)
            wanted = "; ".join(f"{key} {drawn[key]}" for key in other)
            raise LoraforgeError("the rows of this run were drawn otherwise", where=path, got=got, expected=wanted,
                                 hint="--overwrite does all of it anew; or choose another --out")  # fmt: skip
        return indices
    indices = choose_subset(trained.size, settings.subset, settings.subset_seed)
    write_subset(trained.out, indices, drawn)
    return indices
