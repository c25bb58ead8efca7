"""What the losses of a replay step are made of: label masks, per-row losses, token weights and what is kept plastic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels.consistency_loss import consistency_loss
from loraforge.training.ilora.buffer import MASK
from loraforge.training.ilora.config import ILoraConfig


class LabelMask:
    """Restricts logits to the labels of each row's task, so that a shared head never pushes other tasks' labels down.

    Args:
        label_ids: Positions in the head of every task's labels.
        width: Labels of the head.

    Raises:
        LoraforgeError: A position outside the head.
    """

    def __init__(self, label_ids: Mapping[int, Sequence[int]], width: int) -> None:
        self._known = frozenset(label_ids)
        # The last row is that of tasks without positions: rows out of another run, below 0.
        self._allowed = torch.ones(max(label_ids) + 2, width, dtype=torch.bool)
        for task, ids in label_ids.items():
            outside = [i for i in ids if not 0 <= i < width]
            if outside or not ids:
                got, expected = outside or "none", f"positions from 0 to {width - 1}"
                raise LoraforgeError("labels outside the head", where=f"task {task}", got=got, expected=expected)
            self._allowed[task] = False
            self._allowed[task, list(ids)] = True

    @property
    def acts(self) -> bool:
        """Whether any task lacks any label."""
        return not bool(self._allowed[list(self._known)].all())

    def __call__(self, logits: Tensor, tasks: Tensor) -> Tensor:
        """Logits (B, C) with minus infinity at labels of other tasks than the row's, tasks (B,)."""
        if self._allowed.device != logits.device:
            self._allowed = self._allowed.to(logits.device)
        tasks = tasks.to(logits.device)
        last = len(self._allowed) - 1
        rows = self._allowed[tasks.where((tasks >= 0) & (tasks < last), last)]
        return logits.masked_fill(~rows, float("-inf"))


def target_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """Cross-entropy where a hidden state is answerable for a label, 0 elsewhere, float32.

    Args:
        logits: (B, C) or (B, T, V).
        labels: (B,) or (B, T), -100 where there is none.
        shifted: Position t answers for label t + 1.

    Returns:
        (B,) or (B, T).
    """
    if shifted:
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    flat = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=-100, reduction="none"
    )
    return flat.view(labels.shape)


def kept_tokens(plastic: Tensor, stable: Tensor, labels: Tensor, shape: Sequence[int], *, shifted: bool) -> Tensor:
    """Tokens whose label is likelier under the plastic adapter, (B, T) bool; tokens without a label are not kept.

    Args:
        plastic: Logits under the plastic adapter.
        stable: Logits under the stable one.
        labels: (B, T), or (B,): then a row's tokens are kept together.
        shape: (B, T) of the hidden states.
        shifted: As `target_losses`.
    """
    better = target_losses(plastic.detach(), labels, shifted=shifted) < target_losses(stable, labels, shifted=shifted)
    return (better if better.dim() == 2 else better[:, None]).expand(*shape)


def token_mask(config: ILoraConfig, kind: str, batch: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor | None:
    """(B, T) of the tokens that count, None for all.

    Args:
        config: `consistency_mask`.
        kind: Kind of the task.
        batch: The replayed rows, with labels.
        shape: (B, T) of the hidden states.
    """
    if kind == "text-to-text":  # states are the decoder's, which reads one label behind: as many real tokens as labels
        return batch["labels"] != -100
    if config.consistency_mask == "labels":
        return batch["labels"] != -100
    mask = batch.get(MASK)
    # Patches of an image are all real.
    return mask.bool() if mask is not None and mask.shape == tuple(shape) else None


def pull(
    config: ILoraConfig, plastic: Sequence[Tensor], stable: Sequence[Tensor], mask: Tensor | None, keep: Tensor | None
) -> Tensor:
    """The consistency loss l_cons, a scalar float64.

    Args:
        config: Rule, threshold and its unit, normalisation.
        plastic: Hidden states under the plastic adapter, with gradient.
        stable: The same under the stable one.
        mask: (B, T) bool, or None.
        keep: (B, T) bool, for the rule `token`.
    """
    return consistency_loss(
        plastic,
        stable,
        mask,
        rule=config.rule,  # type: ignore[arg-type]
        threshold=config.min_update_threshold if config.rule in ("margin", "deadband") else 0.0,
        layer_normalise=config.layer_normalise,
        threshold_unit=config.threshold_unit,  # type: ignore[arg-type]
        keep=keep,
    )


@torch.no_grad()
def kept_fraction(
    config: ILoraConfig, plastic: Sequence[Tensor], stable: Sequence[Tensor], mask: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Share of the counted entries that the rule leaves to the plastic adapter, a scalar. Arguments as `pull`."""
    kept = torch.zeros((), device=plastic[0].device, dtype=torch.float64)
    entries = kept.clone()
    for P, S in zip(plastic, stable, strict=True):
        count = torch.as_tensor(P[..., 0].numel() if mask is None else mask.sum(), device=P.device)
        entries += count * P.shape[-1]
        if config.rule == "none":
            continue
        if keep is not None:
            chosen = (keep if mask is None else keep & mask).sum() * P.shape[-1]
        else:
            d = P.float() - S.float()
            if config.rule == "elementwise":
                chosen = d > 0
            else:
                limit = config.min_update_threshold * (
                    _root_mean_square(S, mask) if config.threshold_unit == "rms" else 1.0
                )
                chosen = d > limit if config.rule == "margin" else -d <= limit
            chosen = (chosen if mask is None else chosen & mask[..., None]).sum()
        kept += chosen
    return kept / entries.clamp(min=1)


def _root_mean_square(S: Tensor, mask: Tensor | None) -> Tensor:
    squares = S.float().square()
    if mask is None:
        return squares.mean().sqrt()
    return (squares * mask[..., None]).sum().div(mask.sum().clamp(min=1) * S.shape[-1]).sqrt()
