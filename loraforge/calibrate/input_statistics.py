"""Second moments of what enters a model's linear maps, over every token that is no padding.

    diag: d_j = 1/S sum_t x_tj^2   (squared L2 norm of feature j a token, as OATS and Wanda have it a sample)
    gram: G = 1/S sum_t x_t x_t^T

One forward a batch with hooks; sums are float64, so neither the size of a batch nor padding shows in them. Which mask
counts (the encoder's, the decoder's, none for images) is read off the model, as the calibrated methods do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loraforge.calibrate.batches import Batch
from loraforge.calibrate.features import Features
from loraforge.calibrate.input_targets import Target, is_self_attention, reach
from loraforge.calibrate.lockstep import Visit
from loraforge.calibrate.sampling import content_hash
from loraforge.calibrate.trace import Trace, call_input, trace_model
from loraforge.calibrate.weights import Collecting
from loraforge.errors import LoraforgeError
from loraforge.kernels.covariance import gram_

KINDS = ("diag", "gram")
_ROWS = 1024  # rows that are squared in float64 at a time
_PLAIN = Collecting((1.0,), 1, "none", 0.0, False, False, False, 1.0, None)
_DIGESTED = 64  # values of each parameter that stand for it in the model's digest


def trace_targets(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Sequence[Batch],
    options: Mapping[str, object],
    *,
    lenient: bool,
) -> tuple[Trace, dict[str, str]]:
    """How the model runs its targets, and which of them it cannot have statistics of.

    Args:
        model: The base model.
        targets: Targets by name.
        batches: All batches; the longest are looked at.
        options: Further arguments of the forward.
        lenient: Leave out what has no input, instead of refusing it (nobody named it).

    Raises:
        LoraforgeError: A target without an input, unless `lenient`; no target at all.
    """
    # The longest on either side: what a sample of one token does says nothing about padding.
    longest = [max(batches, key=lambda b: _length(b, side)) for side in ("input_ids", "decoder_input_ids")]
    inputs = [on_model(batch, model).inputs for batch in longest]
    reasons = reach(model, targets, inputs[0], options)
    while True:
        modules = {name: target.module for name, target in targets.items() if name not in reasons}
        if (reasons and not lenient) or not modules:
            got = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:8])
            hint = "leave them out of --targets, or give data that reaches them (encoder-decoder models need `target`)"
            raise LoraforgeError("some targets have no input to measure", got=got, hint=hint)
        try:
            trace = trace_model(model, modules, inputs, options)
        except LoraforgeError as problem:
            if problem.where not in modules:
                raise
            reasons[str(problem.where)] = f"{problem.what} ({problem.got})"
            continue
        # What enters an attention's output projection is not what enters the attention.
        leaders = {n: n if targets[n].part == "heads" else leader for n, leader in trace.leaders.items()}
        return replace(trace, leaders=leaders), reasons


@dataclass(slots=True, eq=False)
class InputSums:
    """Sums over the batches that were added so far.

    Attributes:
        model: The base model, in evaluation mode.
        targets: Targets by name.
        trace: How the model runs them.
        kind: "diag" or "gram".
        options: Further arguments of the forward.
        sums: (d,) or (d, d) float64 by the module that owns it.
        tokens: Rows counted, by module.
    """

    model: nn.Module
    targets: Mapping[str, Target]
    trace: Trace
    kind: str
    options: Mapping[str, object]
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    _features: Features = field(init=False)
    _calls: dict[str, int] = field(default_factory=dict)
    _nested: bool = False

    def __post_init__(self) -> None:
        """Starts from zero tokens."""
        self._features = Features({}, {}, self.trace, _PLAIN)
        self.tokens = self.tokens or dict.fromkeys(self.targets, 0)

    def add(self, batch: Batch) -> None:
        """Runs one batch and adds what it shows.

        Raises:
            LoraforgeError: Rows that cannot be told from padding, or a module that runs another number of times than in
                the trace.
        """
        batch = on_model(batch, self.model)
        self._calls = dict.fromkeys(self.targets, 0)
        self._features.start([batch])
        with torch.no_grad(), self._watched():
            self.model(**batch.inputs, **self.options)
        self._features.stop()

    def at(self) -> str | None:
        """The target that took its input last in the batch at hand."""
        return next((name for name in reversed(self.trace.order) if self._calls.get(name)), None)

    def owner(self, name: str) -> str:
        """The module that keeps the sums of `name`: modules fed by one tensor share one Gram."""
        leader = self.trace.leaders[name]
        shares = self.kind == "gram" and self.trace.calls[name] == self.trace.calls[leader] == 1
        return leader if shares else name

    def means(self) -> dict[str, Tensor]:
        """The statistic of every module a token, in the model's order, on the CPU; shared where the sums are.

        The sums become the means: Gram matrices of a large model fit into memory once, not twice.

        Raises:
            LoraforgeError: A module without a token, or with inputs that are not finite.
        """
        means: dict[str, Tensor] = {}
        for name in self.targets:
            owner = self.owner(name)
            if self.tokens[name] == 0:
                raise LoraforgeError("no token reached a module", where=name, hint="give more data")
            if owner not in means:
                mean = self.sums.pop(owner).div_(self.tokens[owner])
                if not bool(torch.isfinite(mean).all()):
                    raise LoraforgeError(
                        "the inputs of a module have NaN or Inf",
                        where=name,
                        hint="check the data and the base model; or collect in float32",
                    )
                means[owner] = mean.cpu()
            means[name] = means[owner]
        return {name: means[name] for name in self.targets}

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Hooks on all targets; fused attention, which runs none, is off meanwhile."""
        fast = torch.backends.mha.get_fastpath_enabled()
        handles = []
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for name, target in self.targets.items():
                hook = self._heads_hook(name) if target.part == "heads" else self._input_hook(name, target)
                handles.append(target.module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for handle in handles:
                handle.remove()

    def _input_hook(self, name: str, target: Target) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if self._nested:
                return
            if target.part == "packed" and not is_self_attention(args, kwargs):
                raise LoraforgeError("query, key and value of an attention differ in some calls only", where=name)
            self._take(name, call_input(args, kwargs))

        return hook

    def _heads_hook(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if self._nested:
                return
            # The projection is a function call inside the attention, which no hook sees. With the identity in its
            # place the attention gives out what would have entered it.
            weight, bias = module.out_proj.weight, module.out_proj.bias
            plain = {"out_proj.weight": torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)}
            if bias is not None:
                plain["out_proj.bias"] = torch.zeros_like(bias)
            self._nested = True
            try:
                heads = functional_call(module, plain, args, kwargs)
            finally:
                self._nested = False
            self._take(name, heads[0])

        return hook

    def _take(self, name: str, x: Tensor) -> None:
        call = self._calls[name]
        self._calls[name] = call + 1
        kinds = self.trace.kinds[name]
        if call >= len(kinds):
            raise LoraforgeError("a module runs another number of times in some batches", where=name, got=call + 1)
        if kinds[call] is None:  # its input holds no samples
            return
        [(rows, _)] = self._features.pack(name, [Visit(0, False, call, x, x)])
        self.tokens[name] += rows.shape[0]
        if self.owner(name) != name:
            return
        d = rows.shape[1]
        if name not in self.sums:
            shape = (d, d) if self.kind == "gram" else (d,)
            self.sums[name] = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        if self.kind == "gram":
            gram_(self.sums[name], rows)
            return
        for part in rows.split(_ROWS):
            self.sums[name] += part.to(torch.float64).square().sum(dim=0)


def on_model(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device, float inputs in the model's dtype."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    inputs = {k: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for k, v in batch.inputs.items()}
    masks = [None if m is None else m.to(weight.device) for m in (batch.enc_mask, batch.dec_mask)]
    return replace(batch, inputs=inputs, enc_mask=masks[0], dec_mask=masks[1])


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and evenly spaced values of all parameters: what tells one base from another."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _DIGESTED)][:_DIGESTED].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


def batches_digest(batches: Sequence[Batch]) -> str:
    """SHA-256 over the content of all batches and how they are cut."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{batch.task},{len(batch.indices)};".encode())
        for i in range(len(batch.indices)):
            digest.update(content_hash({key: value[i] for key, value in batch.inputs.items()}))
    return digest.hexdigest()


def _length(batch: Batch, side: str) -> int:
    ids = batch.inputs.get(side)
    return 0 if ids is None else int(ids.shape[1])
