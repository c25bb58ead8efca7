"""Parameters of I-LORA: names and defaults of the design document, and the options around them. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems

CHOICES: dict[str, tuple[str, ...]] = {
    "ema_convention": ("weight_of_new", "decay"),
    "ema_dtype": ("float32", "float64"),
    "selective_rule": ("elementwise", "margin", "deadband", "token", "none"),
    "threshold_unit": ("abs", "rms"),
    "consistency_mask": ("attention", "labels"),
    "stable_mode": ("eval", "train"),
    "replay_scope": ("past", "all"),
    "buffer_policy": ("reservoir", "task_balanced"),
    "handover": ("ema_to_both", "default_to_both", "restore_both", "keep"),
    "final_adapter": ("ema", "default"),
    "fused_forward": ("auto", "always", "never"),
}
_FLAGS = (
    "use_ilora",
    "save_ema_adapter",
    "selective_update",
    "layer_normalise",
    "ema_warmup",
    "buffer_dedup",
    "persist_buffer",
)
_PATHS = ("ema_adapter_path", "previous_task_model")
_IDS = ("current_task_id", "prev_task_id")
_ID = re.compile(r"[A-Za-z0-9_.-]+")
_LEAST = {"ilora_buffer_size": 0, "ema_every": 0, "replay_every": 1}


@dataclass(frozen=True, slots=True)
class ILoraConfig:
    """Parameters of I-LORA.

    Attributes:
        use_ilora: Whether anything here acts. Off, the trainer is the plain one, to the bit.
        ema_alpha: Smoothing coefficient in [0, 1]; `ema_convention` says what it weighs.
        consistency_weight: Weight of the consistency loss, at least 0; at 0 the stable forward is not run.
        save_ema_adapter: Write the `ema` adapter; without it the next task cannot take over.
        ema_adapter_path: Where the previous `ema` is read from, instead of the place that the ids tell.
        selective_update: Select entries by `selective_rule`; off, all entries are drawn to the stable ones.
        min_update_threshold: Of the rules margin and deadband; without effect under the others.
        hidden_state_layers: Indices into the hidden states (0: embeddings, negative: from the end), or "all": 1 to L.
        ilora_buffer_size: Rows that the replay buffer holds, over all processes together; 0: no replay.
        previous_task_model: Folder of the previous task or of its sequence.
        current_task_id: Id of this task.
        prev_task_id: Id of the task before; None: this is the first.
        ema_convention: `weight_of_new`: ema <- (1 - alpha) ema + alpha default; `decay`: the other way round.
        ema_warmup: The weight of the new value is at least 1 / (step + 1).
        ema_every: Optimiser steps between updates; 0: no stable adapter (then `consistency_weight` is 0).
        ema_dtype: Precision that the average is kept in.
        selective_rule: See `loraforge.kernels.consistency`; `token`: a token is kept where its label likes it better.
        threshold_unit: `abs`, or `rms`: in units of the root mean square of the stable states.
        layer_normalise: Divide each layer's loss by the mean square of its stable states.
        consistency_mask: Tokens that count: `attention`, all but padding; `labels`, those of the answer.
        stable_mode: Mode of the model in the stable forward; `train` draws dropout there as well.
        replay_batch_size: Rows replayed with a micro-batch; None: as many as the micro-batch has.
        replay_scope: `past`: rows of earlier tasks alone; `all`.
        replay_every: Optimiser steps between steps with replay.
        buffer_dedup: Offer equal rows once.
        buffer_policy: `reservoir`: uniform over all rows offered; `task_balanced`: equal shares of the tasks.
        handover: What the next task starts from.
        final_adapter: The adapter that stands for the result.
        persist_buffer: Write the buffer, which holds training rows as they are; without it later tasks replay nothing.
        fused_forward: Current and replayed rows in one forward: `auto` where padding wastes under a quarter.
    """

    use_ilora: bool = False
    ema_alpha: float = 0.25
    consistency_weight: float = 1.0
    save_ema_adapter: bool = True
    ema_adapter_path: str | None = None
    selective_update: bool = True
    min_update_threshold: float = 0.1
    hidden_state_layers: Sequence[int] | str = field(default=(-1, -2, -3))
    ilora_buffer_size: int = 500
    previous_task_model: str | None = None
    current_task_id: str | None = None
    prev_task_id: str | None = None
    ema_convention: str = "weight_of_new"
    ema_warmup: bool = False
    ema_every: int = 1
    ema_dtype: str = "float32"
    selective_rule: str = "elementwise"
    threshold_unit: str = "abs"
    layer_normalise: bool = False
    consistency_mask: str = "attention"
    stable_mode: str = "eval"
    replay_batch_size: int | None = None
    replay_scope: str = "past"
    replay_every: int = 1
    buffer_dedup: bool = True
    buffer_policy: str = "reservoir"
    handover: str = "ema_to_both"
    final_adapter: str = "ema"
    persist_buffer: bool = True
    fused_forward: str = "auto"

    def __post_init__(self) -> None:
        for name in _PATHS + _IDS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):  # ids such as 1 and Path objects are meant as text
                object.__setattr__(self, name, str(value))
        if isinstance(self.hidden_state_layers, list):
            object.__setattr__(self, "hidden_state_layers", tuple(self.hidden_state_layers))
        raise_problems(_problems(self))

    @property
    def rule(self) -> str:
        """The selective rule that acts."""
        return self.selective_rule if self.selective_update else "none"

    @property
    def new_weight(self) -> float:
        """Weight of the new value in an update of the average, without warm-up."""
        return self.ema_alpha if self.ema_convention == "weight_of_new" else 1.0 - self.ema_alpha

    @property
    def keeps_stable(self) -> bool:
        """Whether there is a stable adapter at all."""
        return self.use_ilora and self.ema_every > 0

    @property
    def replays(self) -> bool:
        """Whether there is a buffer at all."""
        return self.use_ilora and self.ilora_buffer_size > 0

    @property
    def pulls(self) -> bool:
        """Whether there is a consistency loss on replayed rows."""
        return self.replays and self.keeps_stable and self.consistency_weight > 0

    def as_dict(self) -> dict[str, Any]:
        """All parameters, ready for JSON."""
        values = asdict(self)
        if not isinstance(self.hidden_state_layers, str):
            values["hidden_state_layers"] = list(self.hidden_state_layers)
        return values

    def notices(self) -> list[str]:
        """What someone who chose these values should be told once."""
        said = []
        default = type(self).__dataclass_fields__["min_update_threshold"].default
        if self.min_update_threshold != default and self.rule not in ("margin", "deadband"):
            said.append(
                f"min_update_threshold={self.min_update_threshold:g} has no effect under the rule {self.rule}; "
                "selective_rule=margin or deadband uses it"
            )
        if self.keeps_stable and not self.save_ema_adapter:
            said.append("save_ema_adapter=false: no task can take over from this one by its ema adapter")
        if self.replays and not self.persist_buffer:
            said.append("persist_buffer=false: later tasks replay nothing after a restart")
        if self.keeps_stable and self.new_weight == 0.0:
            said.append(f"ema_alpha={self.ema_alpha:g} under {self.ema_convention}: the ema adapter never moves")
        return said


def ilora_config(values: Mapping[str, Any]) -> ILoraConfig:
    """The config of a mapping (a recipe's `ilora` section).

    Raises:
        UsageError: An unknown name.
        LoraforgeError: Values that are not allowed; all of them at once.
    """
    known = [item.name for item in fields(ILoraConfig)]
    raise_problems(
        [
            UsageError(f"unknown parameter '{name}' of ilora", where=name, hint=did_you_mean(str(name), known))
            for name in values
            if name not in known
        ]
    )
    return ILoraConfig(**values)


def _problems(config: ILoraConfig) -> list[LoraforgeError]:
    found: list[LoraforgeError] = []

    def refuse(name: str, expected: str, hint: str | None = None) -> None:
        got = repr(getattr(config, name))
        found.append(LoraforgeError(f"{name} of ilora", where=name, got=got, expected=expected, hint=hint))

    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            refuse(name, "true or false")
    for name, known in CHOICES.items():
        value = getattr(config, name)
        if value not in known:
            refuse(name, f"one of {', '.join(known)}", did_you_mean(str(value), known))
    if not _is_number(config.ema_alpha) or not 0.0 <= config.ema_alpha <= 1.0:
        refuse("ema_alpha", "a number from 0 to 1")
    for name in ("consistency_weight", "min_update_threshold"):
        value = getattr(config, name)
        if not _is_number(value) or not 0.0 <= value < math.inf:
            refuse(name, "a finite number, at least 0")
    for name, least in _LEAST.items():
        if not _is_whole(getattr(config, name), least):
            refuse(name, f"a whole number, at least {least}")
    if config.replay_batch_size is not None and not _is_whole(config.replay_batch_size, 1):
        refuse("replay_batch_size", "a whole number, at least 1, or none")
    layers = config.hidden_state_layers
    if layers != "all" and not (
        isinstance(layers, tuple) and layers and all(isinstance(x, int) and not isinstance(x, bool) for x in layers)
    ):
        refuse("hidden_state_layers", 'a list of whole numbers, or "all"')
    for name in _IDS:
        value = getattr(config, name)
        if value is not None and not _ID.fullmatch(value):
            refuse(name, "letters, digits, '_', '.' and '-'")
    if not found and config.ema_every == 0 and config.consistency_weight > 0:
        refuse("ema_every", "at least 1 where consistency_weight > 0: the stable adapter must move")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
