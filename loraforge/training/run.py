"""One run from its request to the finished folder: whole or not at all, broken off and taken up at any step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn

from loraforge.calibrate.base import no_bars
from loraforge.errors import LoraforgeError
from loraforge.evaluation.score import score_task
from loraforge.linalg.device import peak_bytes, peak_rss
from loraforge.report.training import write_training_report
from loraforge.storage.atomic import check_target, new_folder
from loraforge.storage.leftovers import RESUME
from loraforge.tasks import Collator, pad_token_id_of, write_task_card
from loraforge.training.arguments import training_arguments
from loraforge.training.checkpoints import drop_torn, whole_checkpoints
from loraforge.training.job import Job, Request, about_of, prepare
from loraforge.training.log import JsonlLog, StepProgress, read_log, tensorboard_callback
from loraforge.training.plan import is_sharded
from loraforge.training.record import write_record
from loraforge.training.saving import check_weights, save_adapter
from loraforge.training.snapshots import EarlyStop, Snapshots, kept_snapshots
from loraforge.training.trainer import TaskTrainer

# Inside of the temporary folder: checkpoints, and what training came to once it is done.
CHECKPOINTS = f"{RESUME}/checkpoints"
TRAINED = f"{RESUME}/trained.json"


def run_training(request: Request) -> dict[str, Any]:
    """Trains what is asked for and makes the folder; the content of run.json.

    Raises:
        UsageError: Unknown or contradicting settings.
        LoraforgeError: Input that cannot be used, an output that is taken, a loss that is not finite, a full disk.
    """
    started = time.perf_counter()
    if not request.dry_run:
        check_target(request.out.resolve(), request.overwrite)
    job = prepare(request)
    prepared = time.perf_counter() - started
    about = about_of(job)
    if request.dry_run:
        return {"dry_run": True, **about}
    target = request.out.resolve()
    part = target.with_name(f".{target.name}.part")
    work = part / CHECKPOINTS
    # Every part of an adapter takes part in every step; looking for parts that do not costs a pass over the graph.
    defaults = {} if request.lora is None else {"ddp_find_unused_parameters": False}
    arguments = training_arguments(job.plan.arguments, work, device=job.device, seed=request.seed, defaults=defaults)
    fingerprint = json.loads(json.dumps(about | {"processes": PartialState().num_processes}, default=str))
    with _shared_folder(request, part, work, fingerprint):
        trained = _train(job, arguments, part, work)
        if not PartialState().is_main_process:
            return about | trained
        ended = time.perf_counter() - started
        metrics = {} if is_sharded(job.plan.arguments) else _final_scores(job)
        seconds = time.perf_counter() - started
        record = {
            "out": str(request.out),
            **about,
            **trained,
            "metrics": metrics,
            "snapshots": kept_snapshots(part / "snapshots"),
            "seconds": seconds,
            "phases": {"prepare": prepared, "train": ended - prepared, "evaluate": seconds - ended},
            "peak_rss_bytes": peak_rss(),
            "peak_device_bytes": peak_bytes(job.device),
        }
        write_record(part, record)
        write_training_report(part / "report.html", record, read_log(part / "train_log.jsonl"))
    return record


@contextmanager
def _shared_folder(request: Request, part: Path, work: Path, fingerprint: Mapping[str, Any]) -> Iterator[None]:
    """The temporary folder of the output: rank 0 makes and publishes it, the others wait until it is there."""
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
        yield
        return
    if _worth_keeping(part) and not (request.resume or request.overwrite):
        hint = "--resume goes on with it, --overwrite starts anew"
        raise LoraforgeError("an unfinished run of this output was left", where=part, hint=hint)
    with new_folder(
        request.out, request.overwrite, resume=request.resume, fingerprint=fingerprint, keep=_worth_keeping
    ):
        work.mkdir(exist_ok=True)
        drop_torn(work)
        state.wait_for_everyone()
        yield


def _worth_keeping(part: Path) -> bool:
    """Whether a run that was broken off left something to go on with."""
    return bool(whole_checkpoints(part / CHECKPOINTS)) or (part / TRAINED).is_file()


def _train(job: Job, arguments: Any, part: Path, work: Path) -> dict[str, Any]:
    """Trains (or goes on), leaves the final weights in the model and in `part`; steps, epochs and the best."""
    done = part / TRAINED
    if done.is_file():
        _load_final(job, part)
        return dict(json.loads(done.read_text(encoding="utf-8")))
    untouched = dict(vars(job.config))
    trainer = TaskTrainer(
        job.model,
        arguments,
        kind=job.kind,
        collate=Collator(job.kind, pad_token_id_of(job.tokenizer, job.config)),
        train_rows=job.data["train"].examples,
        eval_rows=job.data["eval"].examples if "eval" in job.data else None,
        score=(lambda model: _scores(model, job)) if job.plan.scored else None,
        callbacks=_callbacks(job, part),
        keep=job.plan.keep,
    )
    # The trainer writes into the configuration that is saved with the model; the forward is told each time instead.
    vars(job.config).pop("use_cache", None)
    vars(job.config).update({key: value for key, value in untouched.items() if key == "use_cache"})
    last = whole_checkpoints(work)
    trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    trainer.check_finite()
    state = trainer.state
    found: dict[str, Any] = {"steps": state.global_step, "epochs": state.epoch, "best": None}
    if job.plan.best is not None:
        _check_best(trainer, job.plan.best)
        found["best"] = {"metric": job.plan.best, "value": state.best_metric, "step": state.best_global_step}
    found["stopped_early"] = state.global_step < state.max_steps
    # All processes have read their best checkpoint, which rank 0 is about to remove.
    trainer.accelerator.wait_for_everyone()
    if is_sharded(job.plan.arguments):
        trainer.save_model(str(part))
    elif trainer.args.should_save:
        check_weights(job.model)
        _save(job, job.model, part)
    if trainer.args.should_save:
        write_task_card(part, job.request.spec, job.kind, job.data["train"].labels, job.request.base)
        done.write_text(json.dumps(found), encoding="utf-8")
    return found


def _check_best(trainer: TaskTrainer, metric: str) -> None:
    """Refuses to call the last weights the best ones."""
    if trainer.state.best_model_checkpoint is None:
        raise LoraforgeError(
            "there is no best checkpoint to take", where=trainer.args.output_dir, got=f"{metric} {_best_of(trainer)}",
            expected="an evaluation with a number, and its checkpoint where it was written",
            hint="the metric may be undefined on these rows; a run that was moved while it was broken off cannot go on",
        )  # fmt: skip


def _best_of(trainer: TaskTrainer) -> str:
    value = trainer.state.best_metric
    return "without a value" if value is None else f"{value:g} at step {trainer.state.best_global_step}"


def _callbacks(job: Job, part: Path) -> list[Any]:
    found: list[Any] = [JsonlLog(part / "train_log.jsonl"), StepProgress(job.request.progress)]
    if job.plan.patience is not None and job.plan.best is not None:
        found.append(EarlyStop(f"eval_{job.plan.best}", job.plan.patience, job.plan.greater_is_better))
    if job.request.snapshots is not None:
        wanted = job.request.snapshots
        found.append(Snapshots(part / "snapshots", wanted, lambda model, folder: _snapshot(job, model, folder)))
    if job.request.tensorboard and PartialState().is_main_process:
        found.append(tensorboard_callback(part / "tensorboard"))
    return found


def _snapshot(job: Job, model: Any, folder: Path) -> None:
    _save(job, model, folder)
    write_task_card(folder, job.request.spec, job.kind, job.data["train"].labels, job.request.base)


def _save(job: Job, model: Any, folder: Path) -> None:
    """The adapter, or the model with what it needs to read its input."""
    if job.request.lora is not None:
        save_adapter(model, folder)
        return
    with no_bars():
        model.save_pretrained(folder)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        source = Path(job.request.base) / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())


def _load_final(job: Job, part: Path) -> None:
    """The weights of a run that was interrupted behind its last step."""
    if job.request.lora is not None:
        job.model.load_adapter(str(part), "default")
    else:
        files = sorted(part.glob("*.safetensors"))
        state = {name: tensor for path in files for name, tensor in load_file(path).items()}
        # Tied weights are saved under one of their names.
        job.model.load_state_dict(state, strict=False)
    job.model.to(job.device)


def _scores(model: nn.Module, job: Job) -> dict[str, float]:
    """Metrics on the eval rows in the middle of a run; those that are undefined are left out."""
    found = score_task(model, job.data["eval"], tokenizer=job.tokenizer, draws=0)
    return {name: value for name, value in found.metrics.items() if value is not None}


def _final_scores(job: Job) -> dict[str, Any]:
    """Scores with intervals on the splits that were not trained on."""
    found = {}
    for split, rows in job.data.items():
        if split != "train":
            score = score_task(job.model, rows, tokenizer=job.tokenizer, seed=job.request.seed)
            kept = asdict(score)
            found[split] = {key: kept[key] for key in ("n", "main", "metrics", "intervals", "reasons", "seconds")}
    return found
