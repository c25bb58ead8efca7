"""What a run trains on what: data and model made ready, everything checked that can be before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraforge.calibrate.base import load_config
from loraforge.calibrate.encode import load_tokenizer
from loraforge.errors import LoraforgeError, UsageError
from loraforge.evaluation.metrics import default_metric
from loraforge.linalg.device import choose_device
from loraforge.provenance import versions
from loraforge.tasks import TaskData, TaskSpec, load_model, load_task, resolve_kind
from loraforge.tasks.spec import SPLITS
from loraforge.training.log import Progress, check_tensorboard
from loraforge.training.options import LoraOptions, adapt
from loraforge.training.plan import Plan, is_sharded, make_plan
from loraforge.training.record import PACKAGES, base_record, data_record, task_record


@dataclass(frozen=True)
class Request:
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
class Job:
    """What is trained on what."""

    request: Request
    kind: str
    data: Mapping[str, TaskData]
    tokenizer: Any
    model: Any
    config: Any
    fresh: tuple[str, ...]
    plan: Plan
    device: torch.device


def prepare(request: Request) -> Job:
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
    return Job(request, kind, data, tokenizer, model, config, fresh, plan, device)


def about_of(job: Job) -> dict[str, Any]:
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
        "versions": versions(*PACKAGES),
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
            "modules_to_save": sorted(set(config.modules_to_save or ())),
            "modules": sum(hasattr(module, "lora_A") for module in job.model.modules()),
        }
    return found
