"""One look at how the model runs its target modules: order, number of calls, shared inputs, which mask applies.

Nothing here depends on a model family's name: every fact is read off two or three tiny forwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraforge.errors import LoraforgeError


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module in a forward.

    Attributes:
        axis: "encoder", "decoder" or "all": whose attention mask says which rows count.
        sample_dim: Dimension of the input that holds the samples: 0, or 1 in sequence-first models.
    """

    axis: str
    sample_dim: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a few tiny forwards of the model showed.

    Attributes:
        order: Module names in order of first call.
        kinds: Every call of each module; None for one whose input holds no samples (a table of relative positions):
            it gets the deltas, but no statistic counts it.
        leaders: The first module that was fed the very same tensor (q, k and v have q).
    """

    order: tuple[str, ...]
    kinds: Mapping[str, Sequence[Call | None]]
    leaders: Mapping[str, str]

    @property
    def calls(self) -> dict[str, int]:
        """Number of calls of each module that count (more than 1: shared across depth)."""
        return {name: sum(kind is not None for kind in kinds) for name, kinds in self.kinds.items()}

    @property
    def axis(self) -> dict[str, str]:
        """The axis of each module's first call that counts."""
        return {name: next(k.axis for k in kinds if k is not None) for name, kinds in self.kinds.items()}

    @property
    def is_feed_forward(self) -> bool:
        """Whether each target runs once a forward, so that one sweep reaches the fixed point exactly."""
        return all(count == 1 for count in self.calls.values())


def call_input(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """The input of a module's call, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def trace_model(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    options: Mapping[str, object],
) -> Trace:
    """Runs the model on single samples of `batches` and records its target modules.

    Args:
        model: The base model.
        modules: Target modules by name.
        batches: Tensors of the calibration batches; dimension 0 is the batch. The longest ones are looked at, since
            what a sample of one token does says nothing about padding.
        options: Further keyword arguments of the forward (`use_cache=False`, ...).

    Raises:
        LoraforgeError: A target module that the forward never calls, or whose input holds the samples elsewhere than
            in dimension 0 or 1.
    """
    runs = [_Runs(model, modules, max(batches, key=lambda b: _length(b, prefix)), options, prefix)
            for prefix in ("", "decoder_")]  # fmt: skip
    record = runs[0].base
    missing = [name for name in modules if name not in record.shapes]
    if missing:
        raise LoraforgeError(
            "the model's forward never runs some of the adapters' modules",
            where=", ".join(missing[:8]),
            got=f"{len(missing)} of {len(modules)} modules never called",
            expected="calibration inputs that reach every adapted module",
            hint="encoder-decoder models need `target`, `labels` or decoder_input_ids in the calibration file",
        )
    kinds: dict[str, list[Call | None]] = {}
    for name, shapes in record.shapes.items():
        kinds[name] = []
        for i in range(len(shapes)):
            sample_dim = runs[0].sample_dim(name, i)
            axis = "encoder" if runs[0].shrinks(name, i) else "decoder" if runs[1].shrinks(name, i) else "all"
            kinds[name].append(None if sample_dim is None else Call(axis, sample_dim))
    _check_kinds(kinds)
    return Trace(tuple(record.shapes), kinds, record.leaders)


def _check_kinds(kinds: Mapping[str, Sequence[Call | None]]) -> None:
    """Refuses modules without a usable call."""
    for name, calls in kinds.items():
        found = [c.sample_dim for c in calls if c is not None]
        if not found or max(found) > 1:
            raise LoraforgeError(
                "the input of a module does not hold the samples where they can be told apart",
                where=name,
                got=f"samples in dimension {max(found)}" if found else "no dimension that grows with the samples",
                expected="samples in dimension 0, or in 1 behind the tokens",
                hint="leave the module out of the adapters' targets, or use a method without calibration, such as svd",
            )


def _length(batch: Mapping[str, Tensor], prefix: str) -> int:
    """Tokens of a batch's encoder or decoder side."""
    ids = batch.get(f"{prefix}input_ids")
    return 0 if ids is None else int(ids.shape[1])


@dataclass(slots=True)
class _Record:
    shapes: dict[str, list[tuple[int, ...]]]
    leaders: dict[str, str]


class _Runs:
    """One sample alone, twice, and with one token fewer on one side."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batch: Mapping[str, Tensor],
        options: Mapping[str, object],
        prefix: str,
    ) -> None:
        one = {k: v[:1] for k, v in batch.items()}
        self.base = _record(model, modules, one, options)
        self._twice: _Record | None = None
        self._shorter: _Record | None = None
        if not prefix:
            self._twice = _record(model, modules, {k: torch.cat([v, v]) for k, v in one.items()}, options)
        length = _length(one, prefix)
        if length > 1:
            cut = {
                k: v[:, :-1]
                if k.startswith("decoder_") == bool(prefix) and k != "pixel_values" and v.shape[1:2] == (length,)
                else v
                for k, v in one.items()
            }
            self._shorter = _record(model, modules, cut, options)

    def sample_dim(self, name: str, call: int) -> int | None:
        """The dimension that doubled with the samples."""
        assert self._twice is not None  # the encoder's runs have it
        one, two = self.base.shapes[name][call], self._twice.shapes[name][call]
        return next((d for d, (a, b) in enumerate(zip(one, two, strict=True)) if b == 2 * a), None)

    def shrinks(self, name: str, call: int) -> bool:
        """Whether the call has fewer rows when there is one token less."""
        return self._shorter is not None and self._shorter.shapes[name][call] != self.base.shapes[name][call]


def _record(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], options: Mapping[str, object]
) -> _Record:
    record = _Record({}, {})
    # The inputs are held, so that an address cannot be used twice; a change in place makes another version.
    seen: list[tuple[Tensor, int, str]] = []

    def watch(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = call_input(args, kwargs)
            record.shapes.setdefault(name, []).append(tuple(x.shape))
            if name in record.leaders:
                return
            record.leaders[name] = next(
                (leader for tensor, version, leader in seen if tensor is x and version == x._version), name
            )
            seen.append((x, x._version, record.leaders[name]))

        return hook

    handles = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in modules.items()]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            model(**inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return record
