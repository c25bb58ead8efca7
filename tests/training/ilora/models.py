"""Tiny models with a LoRA adapter, rows for them, and trainers over both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor

from loraforge.training.arguments import training_arguments
from loraforge.training.ilora.adapters import add_stable
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.trainer import ILoraTrainer

VOCAB, PAD = 32, 0


def llama(seed: int = 0, dropout: float = 0.0, **lora: Any) -> Any:
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return adapted(tf.LlamaForCausalLM, config, ["q_proj", "v_proj"], "CAUSAL_LM", seed, dropout, **lora)


def t5(seed: int = 0, **lora: Any) -> Any:
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2,
        dropout_rate=0.0, pad_token_id=PAD, eos_token_id=1, decoder_start_token_id=PAD,
    )  # fmt: skip
    return adapted(tf.T5ForConditionalGeneration, config, ["q", "v"], "SEQ_2_SEQ_LM", seed, **lora)


def bart(seed: int = 0, **lora: Any) -> Any:
    config = tf.BartConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return adapted(tf.BartForConditionalGeneration, config, ["q_proj", "v_proj"], "SEQ_2_SEQ_LM", seed, **lora)


def bert(seed: int = 0, labels: int = 4, dropout: float = 0.0, **lora: Any) -> Any:
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=PAD, initializer_range=0.2,
    )  # fmt: skip
    lora = {"modules_to_save": ["classifier"]} | lora
    return adapted(tf.BertForSequenceClassification, config, ["query", "value"], "SEQ_CLS", seed, dropout, **lora)


def vit(seed: int = 0, labels: int = 4, **lora: Any) -> Any:
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=labels, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        names = [name for name, module in tf.ViTForImageClassification(config).named_modules() if _is_linear(module)]
    targets = [name for name in names if "attention" in name]
    lora = {"modules_to_save": ["classifier"]} | lora
    return adapted(tf.ViTForImageClassification, config, targets, None, seed, **lora)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def adapted(
    kind: Any, config: Any, targets: Sequence[str], task: str | None, seed: int, dropout: float = 0.0, **lora: Any
) -> Any:
    """The model under an adapter whose B factors are not 0, so that it does something."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks for it under the old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        options = {"r": 2, "lora_alpha": 4, "lora_dropout": dropout, "target_modules": list(targets)} | lora
        model = get_peft_model(kind(config), LoraConfig(task_type=task, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.3)
    return model


def text_rows(count: int, seed: int = 0, lengths: tuple[int, int] = (4, 9), task: int = 0) -> list[dict[str, Tensor]]:
    """Rows of a causal task: the first two tokens are the prompt."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=draw))
        ids = torch.randint(3, VOCAB, (length,), generator=draw)
        labels = ids.clone()
        labels[:2] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **_task(task)})
    return rows


def pair_rows(count: int, seed: int = 0, task: int = 0) -> list[dict[str, Tensor]]:
    """Rows of a text-to-text task."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for row in text_rows(count, seed, task=task):
        length = int(torch.randint(2, 6, (), generator=draw))
        rows.append(row | {"labels": torch.randint(3, VOCAB, (length,), generator=draw)})
    return rows


def class_rows(count: int, seed: int = 0, labels: Sequence[int] = (0, 1), task: int = 0) -> list[dict[str, Tensor]]:
    return [
        row | {"labels": torch.tensor(labels[at % len(labels)])}
        for at, row in enumerate(text_rows(count, seed, task=task))
    ]


def image_rows(count: int, seed: int = 0, labels: Sequence[int] = (0, 1), task: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=draw),
            "labels": torch.tensor(labels[at % len(labels)]),
            **_task(task),
        }
        for at in range(count)
    ]


def _task(task: int) -> dict[str, Tensor]:
    return {"task": torch.tensor(task)}


def collate(rows: Sequence[Mapping[str, Tensor]], left: bool = False, extra: int = 0) -> dict[str, Tensor]:
    """Rows as one batch, padded on the right or left, by `extra` tokens more than needed."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].dim() != 1:
            batch[key] = torch.stack(values)
            continue
        length = max(len(value) for value in values) + extra
        fill = -100 if key == "labels" else 0
        padded = torch.full((len(values), length), fill)
        for at, value in enumerate(values):
            padded[at, length - len(value) :] = value if left else padded[at, length - len(value) :]
            if not left:
                padded[at, : len(value)] = value
        batch[key] = padded
    return batch


def config(**values: Any) -> ILoraConfig:
    return ILoraConfig(**({"use_ilora": True, "ilora_buffer_size": 8} | values))


def trainer(
    model: Any,
    rows: Sequence[dict[str, Tensor]],
    folder: Path,
    ilora: ILoraConfig,
    *,
    kind: str = "causal",
    stable: bool = True,
    past: Sequence[dict[str, Tensor]] = (),
    train: Mapping[str, Any] | None = None,
    **more: Any,
) -> ILoraTrainer:
    """A trainer of task 1 over a buffer that holds `past` as rows of task 0."""
    if stable and ilora.keeps_stable:
        add_stable(model)
    values = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "lr_scheduler_type": "constant",
    } | dict(train or {})  # fmt: skip
    arguments = training_arguments(values, folder, seed=3)
    if "buffer" not in more:
        more["buffer"] = ReplayBuffer(ilora.ilora_buffer_size, seed=5)
        more["buffer"].offer(past, 0)
    return ILoraTrainer(
        model, arguments, kind=kind, collate=more.pop("collate", collate), train_rows=list(rows), ilora=ilora,
        task_index=more.pop("task_index", 1), **more,
    )  # fmt: skip


def weights(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's tensors by the names of `default`."""
    return {
        name.replace(f".{adapter}", ".default"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if adapter in name.split(".")
    }
