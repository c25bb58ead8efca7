"""What an adapter_config.json says, checked, with features that change the arithmetic refused by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.adapters.fields import Fields
from loraforge.errors import LoraforgeError, raise_problems

CONFIG_NAME = "adapter_config.json"

# Initialisations that subtract the adapter's start from the base: the delta then belongs to a changed base.
_SHIFTED_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}
# Fields that, when set, make the update something else than scaling * B A added to the weight.
_FEATURES = {
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "Arrow",
    "megatron_config": "Megatron parallel layers",
    "layer_replication": "layer replication",
}
_KINDS = ("LORA", "LOHA", "LOKR")
# PEFT adds these to modules_to_save by itself.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True, slots=True)
class PeftSettings:
    """The part of a PEFT LoRA configuration that reading needs.

    Attributes:
        r: Default rank; 0 where no configuration says: the shapes do then, and every scale is 1 (alpha = r).
        alpha: Default lora_alpha.
        rank_pattern: (key pattern, rank) in file order.
        alpha_pattern: (key pattern, alpha) in file order.
        rslora: Scale is alpha / sqrt(r) instead of alpha / r.
        fan_in_fan_out: The base layers are Conv1D; the factors are B (m, r), A (r, n) all the same.
        bias: "none", "all" or "lora_only".
        head_names: Module names saved in full: modules_to_save and what PEFT adds for the task.
        kind: "LORA", "LOHA" or "LOKR".
        dora: Every module has a DoRA magnitude.
        target_parameters: Adapted parameters (experts), in their order.
    """

    r: int
    alpha: float
    rank_pattern: tuple[tuple[str, float], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    rslora: bool
    fan_in_fan_out: bool
    bias: str
    head_names: frozenset[str]
    kind: str = "LORA"
    dora: bool = False
    target_parameters: tuple[str, ...] = ()

    @classmethod
    def unknown(cls) -> PeftSettings:
        """Settings of a file without a configuration."""
        return cls(0, 0.0, (), (), False, False, "none", frozenset())

    def rank_of(self, module: str) -> int:
        """Rank that the configuration gives a module; 0 where it does not say."""
        return int(first_match(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str, rank: int) -> float:
        """Scale of a module of this rank: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        if not self.r:
            return 1.0
        alpha = first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def first_match(patterns: tuple[tuple[str, float], ...], module: str, default: float) -> float:
    """Value of the first pattern that matches the whole name or its end after a dot, as in PEFT."""
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), default)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a PEFT folder as a dictionary.

    Raises:
        LoraforgeError: The file cannot be read or is not one JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraforgeError("The adapter's configuration cannot be read", where=path, got=error) from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraforgeError(
            "The adapter's configuration is not valid JSON", where=path, got=error, hint="copy the adapter again"
        ) from error
    if not isinstance(config, dict):
        raise LoraforgeError(
            "The adapter's configuration is not a JSON object", where=path, got=type(config).__name__, expected="{...}"
        )
    return config


def parse_config(config: dict[str, Any], path: Path) -> PeftSettings:
    """Checks a configuration and keeps what reading needs.

    Args:
        config: Parsed adapter_config.json.
        path: The file, for messages.

    Raises:
        LoraforgeError: Neither LoRA nor LoHa nor LoKr, an unsupported feature, or fields of wrong type; several
            problems come together.
    """
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise LoraforgeError(
            "This is not a LoRA adapter",
            where=f"{path}: peft_type",
            got=kind,
            expected=", ".join(_KINDS),
            hint="OFT, BOFT, IA3, VeRA, AdaLoRA and prompt tuning are no low-rank sums and cannot be merged",
        )
    problems = _unsupported(config, path)
    fields = Fields(config, path, problems)
    settings = PeftSettings(
        r=int(fields.number("r", integer=True)),
        alpha=fields.number("lora_alpha" if kind == "LORA" else "alpha"),
        rank_pattern=fields.pattern("rank_pattern", integer=True),
        alpha_pattern=fields.pattern("alpha_pattern"),
        rslora=fields.flag("use_rslora"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        bias=fields.choice("bias", ("none", "all", "lora_only")),
        head_names=fields.names("modules_to_save") | frozenset(TASK_HEADS.get(str(config.get("task_type")), ())),
        kind=kind,
        dora=fields.flag("use_dora"),
        target_parameters=fields.listed("target_parameters"),
    )
    for field in ("base_model_name_or_path", "task_type"):
        if config.get(field) is not None and not isinstance(config[field], str):
            fields.wrong(field, "a string or null")
    raise_problems(problems)
    return settings


def _unsupported(config: dict[str, Any], path: Path) -> list[LoraforgeError]:
    """One problem for each feature that would be read wrongly as a plain sum."""
    problems = []
    for field, name in _FEATURES.items():
        if config.get(field) not in (None, False, [], {}):
            problems.append(
                LoraforgeError(
                    f"Adapters with {name} are not supported",
                    where=f"{path}: {field}",
                    got=json.dumps(config[field])[:200],
                    expected="unset",
                    hint="their effect is not scaling * B A added to the weight; leave this adapter out",
                )
            )
    start = config.get("init_lora_weights")
    name = str(start).lower().partition("_niter")[0]
    if isinstance(start, str) and name in _SHIFTED_BASE:
        problems.append(
            LoraforgeError(
                f"{_SHIFTED_BASE[name]} adapters change the base model and cannot be merged as they are",
                where=f"{path}: init_lora_weights",
                got=start,
                expected="an adapter of the unchanged base",
                hint="save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        )
    return problems
