"""What a LoRA adapter is to be: rank, scale, targets, patterns; and the PEFT configuration made of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.training.patterns import ALIASES, ALL_LINEAR, is_whole, split_targets
from loraforge.training.targets import (
    all_linear,
    ends_with,
    lies_within,
    listed,
    matched_modules,
    pattern_problems,
    target_problems,
)

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

BIASES = ("none", "all", "lora_only")
INITS = ("default", "gaussian", "orthogonal")
TASK_HEADS = ("classifier", "score")
# Usual targets where PEFT's table has no entry, or one for the names of another release of transformers.
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"))
# Starts that are taken from the base's own weights and subtracted from them.
_SHIFTED = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraOptions:
    """What an adapter is to be.

    Attributes:
        r: Rank.
        alpha: Scale is alpha / r; None for 2 r.
        dropout: Of the adapter's input, in training.
        targets: Last parts of module names, a regular expression over whole names, `all-linear`, or None for what PEFT
            takes for the architecture.
        rank_pattern: Rank by name or pattern, for modules of another rank.
        alpha_pattern: The same for alpha; a module with a rank of its own and no alpha keeps `alpha`, as in PEFT.
        rslora: Scale is alpha / sqrt(r).
        dora: Weight-decomposed LoRA.
        bias: Biases that are trained too.
        modules_to_save: Modules trained in full beside those that the base's file lacks.
        init: Start of the factors.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    init: str = "default"

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._word_problems()]
        raise_problems(problems)

    def _number_problems(self) -> Iterable[LoraforgeError]:
        if not is_whole(self.r) or self.r < 1:
            yield _wrong("r", self.r, "a whole number above 0")
        if self.alpha is not None and not (_number(self.alpha) and self.alpha > 0):
            yield _wrong("alpha", self.alpha, "a number above 0")
        if not _number(self.dropout) or not 0 <= self.dropout < 1:
            yield _wrong("dropout", self.dropout, "a number from 0 to below 1")
        for key, rank in self.rank_pattern.items():
            if not is_whole(rank) or rank < 1:
                yield _wrong(f"rank_pattern: {key}", rank, "a whole number above 0")
        for key, alpha in self.alpha_pattern.items():
            if not _number(alpha) or alpha <= 0:
                yield _wrong(f"alpha_pattern: {key}", alpha, "a number above 0")

    def _word_problems(self) -> Iterable[LoraforgeError]:
        for key in ("rslora", "dora"):
            if not isinstance(getattr(self, key), bool):
                yield _wrong(key, getattr(self, key), "true or false")
        if self.bias not in BIASES:
            yield _wrong("bias", self.bias, ", ".join(BIASES))
        if str(self.init).split("_niter")[0] in _SHIFTED:
            hint = "the adapter would belong to a changed base and could not be merged with others; leave init out"
            yield UsageError(f"init '{self.init}' changes the base's weights", where="lora: init", hint=hint)
        elif self.init not in INITS:
            yield _wrong("init", self.init, ", ".join(INITS))
        if self.targets is not None and not self.targets:
            yield _wrong("targets", self.targets, "names of modules, all-linear, or nothing for the usual ones")

    @property
    def lora_alpha(self) -> float:
        """Alpha, or its default of twice the rank."""
        return 2 * self.r if self.alpha is None else self.alpha

    @classmethod
    def read(cls, values: Mapping[str, Any] | LoraOptions | None, where: object = "lora") -> LoraOptions:
        """Options out of a mapping; PEFT's names are known too.

        Raises:
            UsageError: An unknown key (with the closest known one) or an impossible value; all at once.
        """
        if isinstance(values, LoraOptions):
            return values
        known = [item.name for item in fields(cls)]
        read: dict[str, Any] = {}
        problems: list[LoraforgeError] = []
        for key, value in (values or {}).items():
            name = ALIASES.get(key, key)
            if name not in known:
                problems.append(UsageError(f"unknown LoRA option '{key}'", where=where, hint=did_you_mean(key, known)))
            elif name in read:
                problems.append(UsageError(f"LoRA option '{name}' is given twice", where=where))
            elif value is not None:
                read[name] = "default" if name == "init" and value is True else value
        raise_problems(problems)
        if isinstance(read.get("targets"), str):
            read["targets"] = split_targets(read["targets"])
        return cls(**read)

    def record(self) -> dict[str, Any]:
        """The options as run.json keeps them."""
        found = {item.name: getattr(self, item.name) for item in fields(self)} | {"alpha": self.lora_alpha}
        return {
            key: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            for key, value in found.items()
        }

    def peft_config(self, kind: str, fresh: Sequence[str], model: nn.Module) -> LoraConfig:
        """PEFT's configuration for a model.

        Args:
            kind: Kind of the task.
            fresh: Modules that the base's file lacks; they are trained and saved in full.
            model: The base.

        Raises:
            LoraforgeError: Targets or patterns that match no module of the model; what there is is listed.
        """
        from peft import LoraConfig

        from loraforge.tasks import task_type_of

        model_config = getattr(model, "config", None)
        task_type = task_type_of(kind, model_config)
        if task_type == "CAUSAL_LM" and getattr(model_config, "is_encoder_decoder", False):
            task_type = "SEQ_2_SEQ_LM"  # a choice among answers of an encoder-decoder
        # PEFT trains these in full by itself, whether the base's file has them or not.
        heads = [name for name in TASK_HEADS if task_type == "SEQ_CLS" and hasattr(model, name)]
        saved = list(dict.fromkeys([*fresh, *heads, *self.modules_to_save]))
        targets = self._targets(model, saved)
        matched = matched_modules(model, targets)
        in_full = [name for name in matched if lies_within(name, saved)]
        problems = [*target_problems(model, targets, matched, in_full)]
        problems += pattern_problems("rank_pattern", self.rank_pattern, matched)
        problems += pattern_problems("alpha_pattern", self.alpha_pattern, matched)
        problems += [
            LoraforgeError("modules_to_save names no module of the base", where=f"modules_to_save: {name}", got=name,
                           expected=listed(model))
            for name in self.modules_to_save
            if not any(ends_with(module, name) for module, _ in model.named_modules())
        ]  # fmt: skip
        raise_problems(problems)
        return LoraConfig(
            task_type=task_type,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            # A module that is trained in full has no use for a low-rank update beside it.
            exclude_modules=in_full or None,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            use_rslora=self.rslora,
            use_dora=self.dora,
            bias=self.bias,
            modules_to_save=saved or None,
            init_lora_weights=True if self.init == "default" else self.init,
            fan_in_fan_out=any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in matched),
        )

    def _targets(self, model: nn.Module, saved: Sequence[str]) -> str | list[str]:
        """The targets as PEFT takes them, never left to its own choice."""
        if isinstance(self.targets, str):
            if self.targets == ALL_LINEAR:
                return all_linear(model, saved)
            return self.targets
        if self.targets is not None:
            return list(self.targets)
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

        kind = getattr(getattr(model, "config", None), "model_type", None)
        leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        for names in (USUAL.get(kind, ()), *_QUERY_AND_VALUE):
            if names and leaves.issuperset(names):
                return list(names)
        raise LoraforgeError(
            "no usual targets are known for this architecture",
            where="lora: targets",
            got=kind,
            expected=listed(model),
            hint="--targets NAME,NAME or --targets all-linear",
        )


def adapt(model: nn.Module, options: LoraOptions, kind: str, fresh: Sequence[str], *, seed: int) -> Any:
    """The model with a new adapter `default` around it; the start of the factors is drawn under `seed` alone.

    Raises:
        LoraforgeError: As `LoraOptions.peft_config`, or what PEFT refuses.
    """
    import torch
    from peft import get_peft_model

    config = options.peft_config(kind, fresh, model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks for a property that later releases of transformers call by another name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0]
            raise LoraforgeError("PEFT cannot put this adapter on the base", where="lora", got=reason) from error


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(key: str, got: object, expected: str) -> UsageError:
    return UsageError("a LoRA option has an impossible value", where=f"lora: {key}", got=repr(got), expected=expected)
