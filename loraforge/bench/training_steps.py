"""Steps of a real trainer: I-LORA beside plain replay of the same rows, and the switch between the two adapters."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer_callback import TrainerCallback

from loraforge.bench.session import Session
from loraforge.bench.timing import Clock, Times, interleave, no_collection
from loraforge.tasks import Collator
from loraforge.training.arguments import training_arguments
from loraforge.training.ilora.adapters import PLASTIC, STABLE, Switch, add_stable
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.trainer import ILoraTrainer
from loraforge.training.options import LoraOptions, adapt

# layers, width, rank, rows of a micro-batch (as many are replayed), tokens a row; steps a run, runs
SIZES = {
    "tiny": {"layers": 2, "width": 16, "rank": 2, "rows": 2, "tokens": 6},
    "default": {"layers": 4, "width": 256, "rank": 8, "rows": 8, "tokens": 64},
    "full": {"layers": 6, "width": 384, "rank": 8, "rows": 16, "tokens": 64},
}
STEPS, ROUNDS = {"tiny": 3, "default": 7, "full": 10}, {"tiny": 1, "default": 3, "full": 5}
METHODS = {
    "replay": ILoraConfig(
        use_ilora=True, consistency_weight=0.0, ema_every=0, handover="default_to_both", final_adapter="default"
    ),
    "ilora": ILoraConfig(use_ilora=True),
}
PEER = "replay"
CLASSES, VOCABULARY, PAD = 4, 500, 0
WARM = 2  # steps of a run that are not counted: libraries allocate what they keep
SAME = 1e-5  # losses in float32, whose sums are taken in another order


def measure(session: Session) -> None:
    """Measures whole steps and the switch."""
    sizes = SIZES[session.size]
    rounds = session.runs or ROUNDS[session.size]
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for done in range(rounds):
        for at, method in enumerate(METHODS):
            session.tell("train", f"step, {method}", done * len(METHODS) + at, rounds * len(METHODS))
            found[method].append(run_steps(method, sizes, STEPS[session.size], session.clock))
    case = "step, BERT {layers} x {width}, {rows} + {rows} rows of {tokens} tokens".format(**sizes)
    seconds = {method: Times([s for run in runs for s in run["seconds"]], None) for method, runs in found.items()}
    first = {method: runs[0]["first_loss"] for method, runs in found.items()}
    for method, times in seconds.items():
        error = abs(first[method] - first[PEER]) / abs(first[PEER])
        peer = None if method == PEER else PEER
        session.add(
            "train", case, method, times, op="step", size=sizes, error=error, allowed=SAME, ok=error <= SAME, peer=peer,
            speedup=None if peer is None else seconds[peer].median / max(times.median, 1e-9),
        )  # fmt: skip
    _measure_switch(session, sizes)


def run_steps(method: str, sizes: dict[str, int], steps: int, clock: Clock) -> dict[str, Any]:
    """Trains for some steps on the second of two tasks, the first in the buffer; seconds a step, and the first loss."""
    device = clock.device
    watch = StepWatch(clock)
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "max_steps": steps,
            "per_device_train_batch_size": sizes["rows"],
            "logging_steps": steps + 1,
            "dataloader_pin_memory": False,
        }
        buffer = ReplayBuffer(4 * sizes["rows"])
        buffer.offer(_rows(4 * sizes["rows"], sizes["tokens"], 0), 0)
        trainer = ILoraTrainer(
            make_model(sizes, stable=METHODS[method].keeps_stable),
            training_arguments(values, Path(folder), device=device, seed=0),
            kind="classification",
            collate=Collator("classification", PAD),
            train_rows=_rows(steps * sizes["rows"], sizes["tokens"], 1),
            ilora=METHODS[method],
            buffer=buffer,
            task_index=1,
            callbacks=[watch],
        )
        with no_collection():
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": watch.seconds()[WARM:] or watch.seconds(), "first_loss": losses[0]}


def make_model(sizes: dict[str, int], *, stable: bool) -> Any:
    """A BERT classifier with drawn weights and an adapter on its attention; dropout 0, so that both methods see one."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=sizes["width"], num_hidden_layers=sizes["layers"],
        num_attention_heads=max(1, sizes["width"] // 32), intermediate_size=4 * sizes["width"], num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=PAD,
        max_position_embeddings=sizes["tokens"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bare = BertForSequenceClassification(config)
    targets = ["query", "key", "value", "attention.output.dense"]
    model = adapt(bare, LoraOptions(r=sizes["rank"], targets=targets), "classification", ("classifier",), seed=0)
    if stable:
        add_stable(model)
    return model


def _rows(count: int, tokens: int, task: int) -> list[dict[str, Tensor]]:
    """Rows of one length, so that both methods pad nothing."""
    generator = torch.Generator().manual_seed(task)
    ids = torch.randint(PAD + 1, VOCABULARY, (count, tokens), generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label, "task": torch.tensor(task)}
        for row, label in zip(ids, labels, strict=True)
    ]


class StepWatch(TrainerCallback):
    """Takes the time from the begin of each step to the begin of the next; the last one ends with the training.

    Args:
        clock: The session's.
    """

    def __init__(self, clock: Clock) -> None:
        self._processor = clock.name == "processor"
        self._device = clock.device
        self._begins: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Notes the time."""
        self._note()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Notes the end of the last step."""
        self._note()

    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [end - begin for begin, end in zip(self._begins[:-1], self._begins[1:], strict=True)]

    def _note(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._begins.append(time.process_time() if self._processor else time.perf_counter())


def _measure_switch(session: Session, sizes: dict[str, int]) -> None:
    """To the stable adapter and back, beside PEFT's own calls."""
    model = make_model(sizes, stable=True).to(session.device)
    switch = Switch(model)

    def ours() -> list[str]:
        with switch.active(STABLE):
            inside = _active(model)
        return [inside, _active(model)]

    def peft() -> list[str]:
        model.set_adapter(STABLE)
        inside = _active(model)
        model.set_adapter(PLASTIC)
        return [inside, _active(model)]

    forms: dict[str, Callable[[], list[str]]] = {"loraforge": ours, "peft": peft}
    times = interleave(forms, session.clock, runs=session.runs, budget=0.3)
    modules = sum(hasattr(module, "lora_A") for module in model.modules())
    for form, found in times.items():
        right = found.result == [STABLE, PLASTIC]
        ours_here = form == "loraforge"
        session.add(
            "train", f"switch and back, {modules} modules", form, found, op="switch", size={"modules": modules},
            error=0.0 if right else float("inf"), allowed=0.0, ok=right, peer="peft" if ours_here else None,
            speedup=times["peft"].median / max(found.median, 1e-9) if ours_here else None,
        )  # fmt: skip


def _active(model: nn.Module) -> str:
    """The adapter that the first tuner layer would use."""
    layer: Any = next(module for module in model.modules() if hasattr(module, "lora_A"))
    return str(layer.active_adapters[0])
