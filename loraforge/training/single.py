"""Fine-tuning on one task: a LoRA adapter, or all weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from loraforge.calibrate.base import load_config
from loraforge.calibrate.encode import load_tokenizer
from loraforge.errors import LoraforgeError, UsageError
from loraforge.evaluation.metrics import default_metric
from loraforge.evaluation.score import score_task
from loraforge.linalg.device import choose_device, peak_bytes
from loraforge.report.training import write_training_report
from loraforge.storage.atomic import check_target, new_folder
from loraforge.storage.leftovers import RESUME
from loraforge.tasks import (
    Collator,
    TaskData,
    TaskSpec,
    load_model,
    load_task,
    pad_token_id_of,
    parse_task,
    resolve_kind,
    write_task_card,
)
from loraforge.tasks.spec import SPLITS
from loraforge.training.arguments import training_arguments
from loraforge.training.log import JsonlLog, Progress, StepProgress, check_tensorboard, read_log, tensorboard_callback
from loraforge.training.options import LoraOptions, adapt
from loraforge.training.plan import Plan, is_sharded, make_plan
from loraforge.training.recipes import find_recipe
from loraforge.training.record import base_record, data_record, peak_rss, task_record, versions, write_record
from loraforge.training.saving import check_weights, save_adapter
from loraforge.training.snapshots import EarlyStop, Snapshots, kept_snapshots
from loraforge.training.task_file import read_task
from loraforge.training.trainer import TaskTrainer, drop_torn, whole_checkpoints

Task = TaskSpec | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class _Request:
    """What was asked for; `lora` is None for full fine-tuning."""

    base: str | Path
    spec: TaskSpec
    out: Path
    lora: LoraOptions | None
    train: Mapping[str, Any]
    seed: int
    resume: bool
    overwrite: bool
    snapshots: int | Sequence[int] | None
    early_stopping: int | None
    tensorboard: bool
    device: str
    dtype: str
    dry_run: bool
    progress: Progress | None
    recipe: str | None


@dataclass(frozen=True)
class _Job:
    """What is trained on what."""

    request: _Request
    kind: str
    data: Mapping[str, TaskData]
    tokenizer: Any
    model: Any
    config: Any
    fresh: tuple[str, ...]
    plan: Plan
    device: torch.device


def train_lora(
    base: str | Path,
    task: Task,
    out: str | Path,
    *,
    lora: Mapping[str, Any] | LoraOptions | None = None,
    train: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    snapshots: int | Sequence[int] | None = None,
    early_stopping: int | None = None,
    tensorboard: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a LoRA adapter on one task.

    Works in one process, and in several that a launcher started (`torchrun -m loraforge ...`, `accelerate launch -m
    loraforge ...`, with `--lora-r` for `--r`, which torchrun takes for its own); rank 0 alone writes. Data parallelism
    is tested with two processes on a CPU. FSDP and DeepSpeed come with the engine by the launcher's or the training
    arguments' settings; this project does not test them, and metrics and snapshots, which need whole weights, are
    refused or left out there.

    Args:
        base: Folder, or id in the local cache.
        task: The task, its mapping, or a YAML or JSON file of one.
        out: Folder to make: adapter, task.json, run.json, train_log.jsonl, report.html, README.md.
        lora: LoRA options.
        train: Training arguments, by the names of transformers.TrainingArguments.
        recipe: Name of settings that come with the program; what is given here overrides them.
        seed: Of the new weights, the order of the rows and dropout.
        resume: Go on from the last whole checkpoint of an interrupted run of the same command.
        overwrite: Replace an earlier output.
        snapshots: How many adapters are kept along the way, or at which steps (0 is the start).
        early_stopping: End after so many evaluations without a better one, and take the best.
        tensorboard: Write event files into `tensorboard/` too.
        device: `auto`, `cpu` or `cuda`.
        dtype: Of the base's weights; those that are trained stay float32.
        dry_run: Report what would be done; write nothing.
        progress: Called with (stage, detail, done, total).

    Returns:
        The content of run.json; without measurements on all ranks but the first.

    Raises:
        UsageError: Unknown or contradicting settings.
        LoraforgeError: Data, base or targets that cannot be used, a loss that is not finite, a full disk.
    """
    found = find_recipe(recipe, "lora")
    spec = _with_length(_as_task(task), found.max_length)
    options = LoraOptions.read({**found.lora, **(lora or {})}) if not isinstance(lora, LoraOptions) else lora
    request = _Request(
        base, spec, Path(out), options, {**found.train, **(train or {})}, seed, resume, overwrite, snapshots,
        early_stopping, tensorboard, device, dtype, dry_run, progress, recipe,
    )  # fmt: skip
    return _run(request)


def train_full(
    base: str | Path,
    task: Task,
    out: str | Path,
    *,
    train: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    snapshots: int | Sequence[int] | None = None,
    early_stopping: int | None = None,
    tensorboard: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains all weights of a base on one task; the output is a model folder. Otherwise as `train_lora`.

    Raises:
        UsageError: Unknown or contradicting settings.
        LoraforgeError: Data or base that cannot be used, a loss that is not finite, a full disk.
    """
    found = find_recipe(recipe, "full")
    spec = _with_length(_as_task(task), found.max_length)
    request = _Request(
        base, spec, Path(out), None, {**found.train, **(train or {})}, seed, resume, overwrite, snapshots,
        early_stopping, tensorboard, device, dtype, dry_run, progress, recipe,
    )  # fmt: skip
    return _run(request)


def _as_task(task: Task) -> TaskSpec:
    if isinstance(task, TaskSpec):
        return task
    if isinstance(task, Mapping):
        return parse_task(task, "task")
    return read_task(task)


def _with_length(spec: TaskSpec, length: int | None) -> TaskSpec:
    return spec if length is None or spec.max_length is not None else replace(spec, max_length=length)


def _run(request: _Request) -> dict[str, Any]:
    started = time.perf_counter()
    if not request.dry_run:
        check_target(request.out.resolve(), request.overwrite)
    job = _prepare(request)
    about = _about(job)
    if request.dry_run:
        return {"dry_run": True, **about}
    target = request.out.resolve()
    part = target.with_name(f".{target.name}.part")
    work = part / RESUME / "checkpoints"
    # Every part of an adapter takes part in every step; looking for parts that do not costs a pass over the graph.
    defaults = {} if request.lora is None else {"ddp_find_unused_parameters": False}
    arguments = training_arguments(job.plan.arguments, work, device=job.device, seed=request.seed, defaults=defaults)
    if not PartialState().num_processes > 1:
        # One process, one GPU: several visible ones would be taken together, with another batch size.
        arguments._n_gpu = min(1, arguments.n_gpu)
    fingerprint = json.loads(json.dumps(about | {"processes": PartialState().num_processes}, default=str))
    with _shared_folder(request, part, work, fingerprint):
        trained = _train(job, arguments, part, work)
        if not PartialState().is_main_process:
            return about | trained
        phases = {"train": time.perf_counter() - started}
        metrics = {} if is_sharded(job.plan.arguments) else _final_scores(job)
        phases["evaluate"] = time.perf_counter() - started - phases["train"]
        record = {
            "out": str(request.out),
            **about,
            **trained,
            "metrics": metrics,
            "snapshots": kept_snapshots(part / "snapshots"),
            "seconds": time.perf_counter() - started,
            "phases": phases,
            "peak_rss_bytes": peak_rss(),
            "peak_device_bytes": peak_bytes(job.device),
        }
        write_record(part, record)
        write_training_report(part / "report.html", record, read_log(part / "train_log.jsonl"))
    return record


def _prepare(request: _Request) -> _Job:
    """Data and model, with everything checked that can be before the first step."""
    device = choose_device(request.device)
    if device.index:
        hint = f"CUDA_VISIBLE_DEVICES={device.index} and --device cuda"
        raise UsageError("training takes the first GPU that it sees", got=request.device, hint=hint)
    if request.tensorboard:
        check_tensorboard()
    spec = request.spec
    config = load_config(request.base)
    kind = resolve_kind(spec, config=config)
    metric = spec.metrics[0] if spec.metrics else default_metric(kind)
    plan = make_plan(
        request.train, kind, metric, evaluates=spec.eval is not None, early_stopping=request.early_stopping
    )
    if request.snapshots is not None and is_sharded(plan.arguments):
        raise LoraforgeError("snapshots cannot be taken while weights are dealt out (FSDP, DeepSpeed)")
    tokenizer = None if kind == "images" else load_tokenizer(request.base, f"task '{spec.id}'")
    splits = ["train", *(split for split in SPLITS[1:] if spec.source(split) is not None)]
    data = {
        split: load_task(spec, split, base=request.base, config=config, tokenizer=tokenizer, seed=request.seed)
        for split in splits
    }
    model, config, fresh = load_model(
        request.base, kind, head_labels=data["train"].labels, dtype=request.dtype, seed=request.seed,
        trainable=request.lora is None,
    )  # fmt: skip
    if request.lora is not None:
        model = adapt(model, request.lora, kind, fresh, seed=request.seed)
    return _Job(request, kind, data, tokenizer, model, config, fresh, plan, device)


def _about(job: _Job) -> dict[str, Any]:
    """What decides the result: the head of run.json, and the fingerprint of a run that may be resumed."""
    request, lora = job.request, job.request.lora
    trainable = [p for p in job.model.parameters() if p.requires_grad]
    bare = job.model.get_base_model() if lora is not None else job.model
    found: dict[str, Any] = {
        "method": "full" if lora is None else "lora",
        **base_record(request.base, job.config),
        "model_class": type(bare).__name__,
        "task": task_record(request.spec, job.kind),
        "labels": list(job.data["train"].labels),
        "data": data_record(job.data),
        "recipe": request.recipe,
        "train": job.plan.arguments,
        "early_stopping": request.early_stopping,
        "snapshots_wanted": request.snapshots,
        "seed": request.seed,
        "device": str(job.device),
        "dtype": request.dtype,
        "versions": versions(),
        "fresh": list(job.fresh),
        "parameters": sum(p.numel() for p in bare.parameters()),
        "trainable_parameters": sum(p.numel() for p in trainable),
    }
    if lora is not None:
        config = job.model.peft_config["default"]
        names = config.target_modules
        found |= {
            "lora": lora.record(),
            "targets": names if isinstance(names, str) else sorted(names),
            "modules_to_save": sorted(config.modules_to_save or ()),
            "modules": sum(hasattr(module, "lora_A") for module in job.model.modules()),
        }
    return found


@contextmanager
def _shared_folder(request: _Request, part: Path, work: Path, fingerprint: Mapping[str, Any]) -> Iterator[None]:
    """The temporary folder of the output: rank 0 makes and publishes it, the others wait until it is there."""
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
        yield
        return
    if whole_checkpoints(work) and not (request.resume or request.overwrite):
        hint = "--resume goes on with it, --overwrite starts anew"
        raise LoraforgeError("an unfinished run of this output was left", where=part, hint=hint)
    folder = new_folder(
        request.out, request.overwrite, resume=request.resume, fingerprint=fingerprint,
        keep=lambda _: bool(whole_checkpoints(work)),
    )  # fmt: skip
    with folder:
        work.mkdir(exist_ok=True)
        drop_torn(work)
        state.wait_for_everyone()
        yield


def _train(job: _Job, arguments: Any, part: Path, work: Path) -> dict[str, Any]:
    """Trains (or goes on), leaves the final weights in the model and in `part`; steps, epochs and the best."""
    done = part / RESUME / "trained.json"
    if done.is_file():
        _load_final(job, part)
        return dict(json.loads(done.read_text(encoding="utf-8")))
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
    cache = getattr(job.config, "use_cache", None)
    job.config.use_cache = False
    last = whole_checkpoints(work)
    trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    job.config.use_cache = cache
    trainer.check_finite()
    state = trainer.state
    found: dict[str, Any] = {"steps": state.global_step, "epochs": state.epoch, "best": None}
    if job.plan.best is not None:
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


def _callbacks(job: _Job, part: Path) -> list[Any]:
    found: list[Any] = [JsonlLog(part / "train_log.jsonl"), StepProgress(job.request.progress)]
    if job.plan.patience is not None and job.plan.best is not None:
        found.append(EarlyStop(f"eval_{job.plan.best}", job.plan.patience, job.plan.greater_is_better))
    if job.request.snapshots is not None:
        wanted = job.request.snapshots
        found.append(Snapshots(part / "snapshots", wanted, lambda model, folder: _snapshot(job, model, folder)))
    if job.request.tensorboard and PartialState().is_main_process:
        found.append(tensorboard_callback(part / "tensorboard"))
    return found


def _snapshot(job: _Job, model: Any, folder: Path) -> None:
    _save(job, model, folder)
    write_task_card(folder, job.request.spec, job.kind, job.data["train"].labels, job.request.base)


def _save(job: _Job, model: Any, folder: Path) -> None:
    """The adapter, or the model with what it needs to read its input."""
    if job.request.lora is not None:
        save_adapter(model, folder)
        return
    model.save_pretrained(folder)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        source = Path(job.request.base) / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())


def _load_final(job: _Job, part: Path) -> None:
    """The weights of a run that was interrupted behind its last step."""
    from safetensors.torch import load_file

    if job.request.lora is not None:
        job.model.load_adapter(str(part), "default")
    else:
        job.model.load_state_dict(_whole_state(part, load_file), strict=False)
    job.model.to(job.device)


def _whole_state(folder: Path, load: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load(path).items()}


def _scores(model: nn.Module, job: _Job) -> dict[str, float]:
    """Metrics on the eval rows in the middle of a run; those that are undefined are left out."""
    found = score_task(model, job.data["eval"], tokenizer=job.tokenizer, draws=1)
    return {name: value for name, value in found.metrics.items() if value is not None}


def _final_scores(job: _Job) -> dict[str, Any]:
    """Scores with intervals on the splits that were not trained on."""
    found = {}
    for split, rows in job.data.items():
        if split != "train":
            score = score_task(job.model, rows, tokenizer=job.tokenizer, seed=job.request.seed)
            kept = asdict(score)
            found[split] = {key: kept[key] for key in ("n", "main", "metrics", "intervals", "reasons", "seconds")}
    return found
