"""The forward of the stable adapter on replayed rows, and the loss that draws the plastic one to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loraforge.training.ilora.adapters import STABLE, Switch
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.consistency import LabelMask, kept_fraction, kept_tokens, pull, token_mask
from loraforge.training.ilora.hidden import HiddenStates, accepted


class Stable:
    """One forward without gradient a replayed batch: hidden states of the wanted layers, no more logits than needed.

    Args:
        model: Not wrapped; a wrapper for several processes would get ready for a backward pass.
        config: The parameters.
        kind: Kind of the task.
        shifted: Position t of the logits predicts label t + 1.
        given: What the model's forward takes for a batch with labels.
        states: The layers.
        labels: Restricts logits to labels of the row's task.
    """

    def __init__(
        self,
        model: Any,
        config: ILoraConfig,
        kind: str,
        shifted: bool,
        given: Callable[[Mapping[str, Tensor]], dict[str, Any]],
        states: HiddenStates,
        labels: LabelMask | None,
    ) -> None:
        self._model, self._config, self._kind, self._shifted = model, config, kind, shifted
        self._given, self.states, self._labels = given, states, labels
        self._switch = Switch(model)
        self._modules = list(model.modules())
        self._by_token = config.rule == "token"
        self.options = {"output_hidden_states": states.request}
        # The rule `token` compares losses, for which it needs all of them.
        self._lean = {} if self._by_token else accepted(model, logits_to_keep=1)
        self._lean |= accepted(model, use_cache=False)

    def consistency(
        self, plastic: list[Tensor], logits: Tensor, batch: Mapping[str, Tensor], tasks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """l_cons, and the share of entries that are left to the plastic adapter.

        Args:
            plastic: Hidden states of the rows under the plastic adapter; they may be filled up on the right.
            logits: Its logits of these rows.
            batch: The rows.
            tasks: (R,) numbers of their tasks.
        """
        stable, stable_logits = self._pass(batch)
        plastic = [P[:, : S.shape[1]] for P, S in zip(plastic, stable, strict=True)]
        shape = stable[0].shape[:2]
        keep = None
        if self._by_token:
            if logits.dim() == 3:
                logits = logits[:, : stable_logits.shape[1]]
            if self._labels is not None:
                logits, stable_logits = self._labels(logits, tasks), self._labels(stable_logits, tasks)
            keep = kept_tokens(logits, stable_logits, batch["labels"], shape, shifted=self._shifted)
        mask = token_mask(self._config, self._kind, batch, shape)
        kept = kept_fraction(self._config, plastic, stable, mask, keep)
        return pull(self._config, plastic, stable, mask, keep), kept

    @torch.no_grad()
    def _pass(self, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        with self._switch.active(STABLE), self._mode():
            outputs = self._model(**self._given(batch), **self.options, **self._lean)
        return self.states.of(outputs), outputs.logits

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Evaluation mode, unless the config wants the stable forward's dropout."""
        if self._config.stable_mode == "train":
            yield
            return
        before = [module.training for module in self._modules]
        for module in self._modules:
            # Past nn.Module.__setattr__, which looks for parameters.
            module.__dict__["training"] = False
        try:
            yield
        finally:
            for module, mode in zip(self._modules, before, strict=True):
                module.__dict__["training"] = mode
