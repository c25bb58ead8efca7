"""Measuring heads: exact ablation with and without what the layers below gave, gradients, and updates from factors.

Exact ablation of every head of a random BERT: whole forward passes ("reference"), passes that begin at the ablated
layer ("loraforge"), and the same with several heads a pass ("shared"), which is how it is done; that beside one
backward pass for all heads ("taylor"). The update of an attention's heads from the adapter's factors beside merging and
subtracting ("reference").

What is compared: differences of losses with those of whole passes, to the bit ("shared": to rounding); the order of
gradients with that of exact ablation; norms with those of the float64 product.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor

from loraforge.bench.cases import Case, Draws, Work
from loraforge.bench.session import Session
from loraforge.bench.timing import interleave

BUDGET = {"default": 6.0, "full": 30.0, "tiny": 0.0}
# layers, width, heads a layer, rows, tokens a row: a pass of many tokens, and one of few
_MODELS = {
    "tiny": ({"layers": 2, "width": 16, "heads": 2, "rows": 3, "tokens": 5},),
    "default": ({"layers": 12, "width": 96, "heads": 12, "rows": 4, "tokens": 32},),
    "full": (
        {"layers": 12, "width": 192, "heads": 12, "rows": 8, "tokens": 32},
        {"layers": 12, "width": 192, "heads": 12, "rows": 1, "tokens": 16},
    ),
}
_UPDATES = {
    "tiny": {"width": 32, "heads": 4, "rank": 2},
    "default": {"width": 4096, "heads": 32, "rank": 16},
    "full": {"width": 4096, "heads": 32, "rank": 64},
}
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_CLASSES, _VOCABULARY, _PAD = 3, 500, 0
# Losses near 1 in float32, over effects of 1e-3 and more.
_ROUNDING = 1e-3
_ORDER = 0.5  # least rank correlation of gradients with exact ablation; 0.95 and above is usual
_NORMS = 1e-3  # merging into float32 loses as many digits as the update is smaller than the weights


def measure(session: Session) -> None:
    """Measures the group `heads`."""
    models = _MODELS[session.size]
    for done, sizes in enumerate(models):
        session.tell("heads", "ablation", done, len(models) + 2)
        session.measure("heads", ablation_case(sizes), BUDGET[session.size])
    session.tell("heads", "gradients", len(models), len(models) + 2)
    measure_gradients(session, models[0])
    session.tell("heads", "update", len(models) + 1, len(models) + 2)
    with tempfile.TemporaryDirectory() as folder:
        session.measure("heads", update_case(_UPDATES[session.size], Path(folder)), BUDGET[session.size])


def ablation_case(sizes: dict[str, int]) -> Case:
    """Exact ablation of all heads of a model."""
    label = "BERT {layers} x {width}, {heads} heads a layer, {rows} rows of {tokens} tokens".format(**sizes)
    return Case("exact", label, sizes, partial(_ablation, sizes))


def _ablation(sizes: dict[str, int], device: torch.device) -> Work:
    subject, objective = make_subject(sizes, device)
    whole = partial(whole_passes, subject, objective)
    return Work(
        forms={
            "reference": whole,
            "loraforge": partial(_exact, subject, objective, 1),
            "shared": partial(_exact, subject, objective, None),
        },
        exact=lambda: [whole()],
        rtol=0.0 if device.type == "cpu" else _ROUNDING,
        own={"shared": _ROUNDING},
        peer="reference",
    )


def make_subject(sizes: dict[str, int], device: torch.device) -> tuple[Any, Any]:
    """A random BERT classifier with rows of one length, and the objective `task`."""
    from transformers import BertConfig, BertForSequenceClassification

    from loraforge.measure.heads.find import layout_of_model
    from loraforge.measure.subjects.objectives import make_objective
    from loraforge.measure.subjects.subject import Subject
    from loraforge.tasks import TaskData, TaskSpec

    config = BertConfig(
        vocab_size=_VOCABULARY, hidden_size=sizes["width"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], intermediate_size=4 * sizes["width"], num_labels=_CLASSES,
        initializer_range=0.1, pad_token_id=_PAD, max_position_embeddings=sizes["tokens"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval().requires_grad_(False).to(device)
    generator = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(sizes["rows"]):
        ids = torch.randint(_PAD + 1, _VOCABULARY, (sizes["tokens"],), generator=generator)
        label = torch.randint(_CLASSES, (), generator=generator)
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    kind, labels = "classification", tuple("abc")
    references = [int(example["labels"]) for example in examples]
    data = TaskData(
        TaskSpec("bench"), "test", kind, examples, references, None, None, labels, (0, 1, 2), None, "drawn", "",
        len(examples),
    )  # fmt: skip
    subject = Subject(
        model, layout_of_model(model), data, tuple(range(len(examples))), kind, config, None, device, {"model": None},
        batch_size=len(examples),
    )  # fmt: skip
    return subject, make_objective("task", subject)


def whole_passes(subject: Any, objective: Any) -> Tensor:
    """(heads, N) differences of the losses by a whole forward pass for every head and batch."""
    from loraforge.measure.heads.gates import HeadGates

    rows = []
    with torch.no_grad(), HeadGates(subject.model, subject.layout) as gates:
        base = [objective.losses(subject.model, batch).double().cpu() for batch in subject.batches()]
        for index, attention in enumerate(subject.layout.attentions):
            for head in range(attention.n_q):
                gate = torch.ones(attention.n_q, device=subject.device)
                gate[head] = 0.0
                gates.set(index, gate)
                found = [objective.losses(subject.model, batch).double().cpu() for batch in subject.batches()]
                rows.append(torch.cat([a - b for a, b in zip(found, base, strict=True)]))
            gates.clear()
    return torch.stack(rows)


def _exact(subject: Any, objective: Any, tokens_per_pass: int | None) -> Tensor:
    from loraforge.measure.importance.ablation import make_fills
    from loraforge.measure.importance.choice import units_of
    from loraforge.measure.importance.exact import exact_differences
    from loraforge.measure.importance.passes import Passes

    with Passes(subject, objective, tokens_per_pass=tokens_per_pass) as passes:
        found = exact_differences(passes, units_of(subject.layout), make_fills("zero", subject))
        return torch.stack([values for _, values in found])


def measure_gradients(session: Session, sizes: dict[str, int]) -> None:
    """All heads by one backward pass, beside exact ablation; `error` is what lacks of their rank correlation."""
    from loraforge.measure.importance.gradients import gate_gradients

    subject, objective = make_subject(sizes, session.device)
    forms = {
        "exact": lambda: _exact(subject, objective, None).mean(1),
        "taylor": lambda: torch.as_tensor(-gate_gradients(subject, objective).s.mean(0)),
    }
    times = interleave(forms, session.clock, runs=session.runs, budget=BUDGET[session.size])
    rho = float(stats.spearmanr(times["taylor"].result, times["exact"].result).statistic)
    case = "all heads, " + ablation_case(sizes).label
    for form, found in times.items():
        peer = "exact" if form == "taylor" else None
        error = 1.0 - rho if peer else None
        session.add(
            "heads", case, form, found, op="taylor", size=dict(sizes), error=error, allowed=1.0 - _ORDER,
            ok=error is None or error <= 1.0 - _ORDER, peer=peer,
            speedup=times["exact"].median / max(found.median, 1e-9) if peer else None,
        )  # fmt: skip


def update_case(sizes: dict[str, int], folder: Path) -> Case:
    """Norms of an attention's update, head by head; the adapter is written into `folder`."""
    label = "{width} x {width}, r={rank}, {heads} heads, q k v o".format(**sizes)
    return Case("update", label, sizes, partial(_update, sizes, folder))


def _update(sizes: dict[str, int], folder: Path, _device: torch.device) -> Work:
    from loraforge.measure.updates.update import update_from_factors

    width, heads, rank = sizes["width"], sizes["heads"], sizes["rank"]
    draws = Draws(torch.device("cpu"))
    factors = {part: (draws.normal(width, rank), draws.normal(rank, width) / width) for part in _PARTS}
    weight = draws.normal(width, width) / width**0.5
    write_adapter(folder, factors, rank)

    def ours() -> Tensor:
        lines = update_from_factors(folder, heads=heads).lines
        return torch.tensor([[line[f"U{part[0]}"] for line in lines] for part in _PARTS], dtype=torch.float64)

    def merged() -> Tensor:
        found = []
        for part, (b, a) in factors.items():
            delta = (weight + b @ a) - weight
            found.append(_head_norms(delta, heads, part))
        return torch.stack(found)

    def exact() -> list[Tensor]:
        return [torch.stack([_head_norms(b.double() @ a.double(), heads, p) for p, (b, a) in factors.items()])]

    return Work(
        forms={"reference": merged, "loraforge": ours}, exact=exact, rtol=1e-6, own={"reference": _NORMS},
        peer="reference",
    )  # fmt: skip


def write_adapter(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], rank: int) -> None:
    """A PEFT adapter on one attention, with scaling 1."""
    names = {part: f"base_model.model.model.layers.0.self_attn.{part}" for part in factors}
    tensors = {f"{names[part]}.lora_A.weight": a.contiguous() for part, (_, a) in factors.items()}
    tensors |= {f"{names[part]}.lora_B.weight": b.contiguous() for part, (b, _) in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(factors)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _head_norms(delta: Tensor, heads: int, part: str) -> Tensor:
    """(heads,) Frobenius norms of a head's rows, or its columns of the output projection."""
    rows = delta.mT if part == "o_proj" else delta
    return rows.unflatten(0, (heads, -1)).double().flatten(1).norm(dim=1)
