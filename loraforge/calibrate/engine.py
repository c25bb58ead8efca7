"""The sweep, the fixed-point iteration and the verification of the calibrated methods.

X~ of a module depends only on modules that run before it. Solving the modules once in running order, while the merged
activations walk along, therefore reaches the fixed point of the iteration W <- G(W) exactly (`sweep`). `verify` replays
the merged model and compares every module's inputs with those it was solved on: equal inputs mean G(W) = W. Where they
differ (modules shared across depth), `iterate` goes on with ordinary iterations and Anderson mixing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from loraforge.calibrate.batches import Batch
from loraforge.calibrate.clock import Clock
from loraforge.calibrate.features import Features
from loraforge.calibrate.lockstep import Deltas, Lockstep, Visit
from loraforge.calibrate.modules import weight_view
from loraforge.calibrate.statistics import collect_stats
from loraforge.calibrate.trace import Trace
from loraforge.calibrate.weights import Collecting, Layer
from loraforge.errors import LoraforgeError
from loraforge.linalg.anderson import AndersonMixer
from loraforge.types import LayerSolution, LayerStats, LowRank

Choices = tuple[float | None, float | None]
Solve = Callable[[LayerStats, Choices | None], LayerSolution]
Left = tuple[Tensor, Tensor]
Cut = Callable[[str, Tensor | None, Tensor, Tensor | None, Left | None, int], LowRank]
Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True, slots=True)
class Monitor:
    """When the iteration stops and how it mixes.

    Attributes:
        max_iter: Largest number of solves of every module.
        threshold: Relative change of the merged deltas that stops it.
        mixer: Makes an empty Anderson history, or None for plain iteration.
        shared_history: One history over all modules instead of one a module.
    """

    max_iter: int
    threshold: float
    mixer: Callable[[], AndersonMixer] | None
    shared_history: bool


@dataclass(slots=True, eq=False)
class _Image:
    """G(W) of one module: the factors that would be installed, and what is needed to speak of them as a state.

    The state is basis^T delta (p, d), p <= R in delta mode; with the full weight the basis is the identity (None).
    """

    pair: LowRank
    basis: Tensor | None
    choices: Choices
    rank: int

    def state(self) -> Tensor:
        """(p, d) float64."""
        B = self.pair.B if self.basis is None else self.basis.mT @ self.pair.B
        return B @ self.pair.A


@dataclass(slots=True, eq=False)
class Engine:
    """Calibrated merging of one model.

    Attributes:
        model: Base model in evaluation mode.
        modules: Target modules by name.
        factors: Per module one entry an adapter (None where it is missing), scaling folded in, float64.
        batches: Calibration batches; each holds samples of one task and one fold.
        options: Further keyword arguments of the forward.
        trace: Order, calls, shared inputs and masks of the modules.
        how: What to collect.
        solve: The method.
        cut: Makes the factors that are installed and returned: (module, basis, state, metric factor or
            None, left singular vectors in that metric or None, R) -> LowRank.
        monitor: Stopping rule and mixing.
        progress: Called with (stage, module, done, total).
        clock: Seconds by part of the walks: forwards, rows, weights, grams, targets, solve, cut, checks.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    factors: Mapping[str, Sequence[LowRank | None]]
    batches: Sequence[Batch]
    options: Mapping[str, object]
    trace: Trace
    how: Collecting
    solve: Solve
    cut: Cut
    monitor: Monitor
    progress: Progress | None = None
    clock: Clock = field(default_factory=Clock)
    layers: dict[str, dict[str, object]] = field(default_factory=dict)
    iterations: list[dict[str, float]] = field(default_factory=list)
    merged: dict[str, LowRank] = field(default_factory=dict)
    _deltas: dict[str, Deltas] = field(default_factory=dict)
    _installed: dict[str, _Image] = field(default_factory=dict)
    _probes: dict[str, list[Tensor]] = field(default_factory=dict)
    _features: Features = field(init=False)

    def __post_init__(self) -> None:
        """Puts the adapters into the hooks of the task stream."""
        for name, module in self.modules.items():
            weight = weight_view(module)
            pairs = [
                None if f is None else (f.B.to(weight.device, weight.dtype), f.A.to(weight.device, weight.dtype))
                for f in self.factors[name]
            ]
            self._deltas[name] = Deltas(pairs)
        self._features = Features(self.modules, self._deltas, self.trace, self.how)

    def sweep(self) -> None:
        """Solves every module once, in running order, each on the inputs that the solved ones before it give."""

        def visitor(name: str, visits: list[Visit]) -> None:
            # A later call of a shared module: what the first one found stands until `iterate`.
            if name in self._installed or not self._counts(name, visits):
                return
            self._tell("solving", name, len(self._installed))
            self._install(name, self._solve(name, visits, None))
            with self.clock.part("checks"):
                self._probes[name] = self._probed(name, visits)

        self._walk(visitor, both_streams=True)
        self.iterations.append({"k": 0, "relative_change": 1.0, "residual": math.nan})

    def verify(self) -> float:
        """Largest relative difference of a module's merged inputs between the sweep and a replay; 0 is a fixed point.

        The smallest batch is replayed: every batch takes the same path through the modules, so inputs that come back
        bit for bit in one of them come back in all.

        Modules that run more than once a forward were solved on their first call alone, so nothing is known: infinity.
        """
        if not self.trace.is_feed_forward:
            return math.inf
        worst = 0.0
        sample = [min(range(len(self.batches)), key=lambda j: len(self.batches[j].indices))]

        def visitor(name: str, visits: list[Visit]) -> None:
            nonlocal worst
            if not self._counts(name, visits):
                return
            self._tell("verifying", name, len(self._installed))
            now = self._probed(name, visits)
            before = [self._probes[name][j] for j in sample]
            size = math.sqrt(sum(float(b.double().square().sum()) for b in before))
            change = math.sqrt(sum(float((n - b).double().square().sum()) for n, b in zip(now, before, strict=True)))
            worst = max(worst, change / size if size > 0 else 0.0)

        self._walk(visitor, both_streams=True, only=sample)
        return worst

    def iterate(self) -> bool:
        """Ordinary iterations until the merged deltas stand still; from X~ = X where no module was solved before.

        Returns:
            Whether the threshold was reached within `max_iter` solves.
        """
        mixers: dict[str, AndersonMixer] = {}
        best, stale = math.inf, 0
        for k in range(len(self.iterations), self.monitor.max_iter):
            first = not self._installed
            images = self._solve_all(k)
            if first:
                for name, image in images.items():
                    self._install(name, image)
                self.iterations.append({"k": k, "relative_change": 1.0, "residual": math.nan})
                continue
            old = {name: image.state() for name, image in self._installed.items()}
            new = {name: image.state() for name, image in images.items()}
            residual = _distance(new, old)
            mixed = self._mix(mixers, old, new)
            change = _distance(mixed, old)
            for name, image in images.items():
                moved = mixed[name] is not new[name]
                # A mixture of several iterates has a larger rank: it is cut again, close to the solution in any metric.
                pair = self.cut(name, image.basis, mixed[name], None, None, image.rank) if moved else image.pair
                self._install(name, _Image(pair, image.basis, image.choices, image.rank))
            self.iterations.append({"k": k, "relative_change": change, "residual": residual})
            if not math.isfinite(change):
                raise LoraforgeError(
                    "the iteration diverged",
                    where="merged deltas",
                    got=f"relative change {change} at iteration {k}",
                    hint="raise alpha_1 and alpha_2, or use --init sweep",
                )
            if change < self.monitor.threshold:
                return True
            # Rounding of the forward sets a floor under the change: three iterations without progress are the end.
            best, stale = (change, 0) if change < best else (best, stale + 1)
            if stale == 3:
                return False
        return False

    def _solve_all(self, k: int) -> dict[str, _Image]:
        """G(W) of every module at the installed deltas."""
        both = bool(self._installed)
        waiting: dict[str, list[Visit]] = {}
        images: dict[str, _Image] = {}
        calls = self.trace.calls

        def visitor(name: str, visits: list[Visit]) -> None:
            if not self._counts(name, visits):
                return
            self._tell(f"iteration {k + 1}", name, len(images))
            if calls[name] > 1:
                # First calls wait for the last; meanwhile the forward adds its deltas to their outputs in place.
                visits = [replace(v, x=v.x.clone(), y=v.y.clone()) for v in visits]
            waiting.setdefault(name, []).extend(visits)
            if len(waiting[name]) == calls[name] * len(self.batches) * (2 if both else 1):
                # alpha and rho are searched until the merged stream has been seen once, then they stay.
                earlier = self._installed[name].choices if both and k > 1 else None
                images[name] = self._solve(name, waiting.pop(name), earlier)

        self._walk(visitor, both_streams=both)
        return images

    def _mix(
        self, mixers: dict[str, AndersonMixer], old: Mapping[str, Tensor], new: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The next states: G(W), or its Anderson mixture."""
        make = self.monitor.mixer
        if make is None:
            return new
        if self.monitor.shared_history:
            mixer = mixers.setdefault("", make())
            mixed = mixer.step(
                torch.cat([old[n].flatten() for n in new]), torch.cat([s.flatten() for s in new.values()])
            )
            parts = mixed.split([s.numel() for s in new.values()])
            return {n: part.view_as(s) for (n, s), part in zip(new.items(), parts, strict=True)}
        states = {}
        for name, image in new.items():
            mixer = mixers.setdefault(name, make())
            residual = float((image - old[name]).norm()) / max(float(image.norm()), 1e-300)
            if residual < 10 * self.monitor.threshold:  # exact already: mixing would only disturb it
                mixer.reset()
                states[name] = image
                continue
            mixed = mixer.step(old[name].flatten(), image.flatten())
            # The mixer hands G(W) itself back while it has no history.
            states[name] = image if mixed.data_ptr() == image.data_ptr() else mixed.view_as(image)
        return states

    def _solve(self, name: str, visits: list[Visit], choices: Choices | None) -> _Image:
        module = self.modules[name]
        wanted = self.how.lambda_weight == "full" or self.how.full_weight
        with self.clock.part("weights"):
            layer = Layer(name, self.factors[name], weight_view(module).double() if wanted else None)
        with self.clock.part("rows"):
            rows = self._features.rows(name, visits)
        stats = collect_stats(layer, rows, self.how, self._features.shared(name), self.clock)
        with self.clock.part("solve"):
            solution = self.solve(stats, choices)
        self.layers[name] = {
            "module": name,
            "tokens": list(stats.tokens),
            "lambda": list(stats.lambdas),
            **(stats.weighting or {"sigma": None, "tau": None, "ess": None}),
            **solution.report,
        }
        with self.clock.part("cut"):
            pair = self.cut(name, stats.basis, solution.state, solution.factor, solution.left, stats.rank)
        return _Image(pair, stats.basis, solution.choices, stats.rank)

    def _probed(self, name: str, visits: list[Visit]) -> list[Tensor]:
        """Per batch (t,) the merged inputs along one direction, in float32 at least: bfloat16 would hide a change."""
        rows = (Xm if Xm.dtype == torch.float64 else Xm.float() for _, Xm in self._features.pack(name, visits))
        return [Xm @ _probe(Xm.shape[1], Xm.dtype, Xm.device) for Xm in rows]

    def _install(self, name: str, image: _Image) -> None:
        self._installed[name] = image
        self.merged[name] = image.pair
        weight = weight_view(self.modules[name])
        pair = self.merged[name].to(weight.dtype, weight.device)
        self._deltas[name].merged = (pair.B, pair.A)

    def _walk(
        self, visitor: Callable[[str, list[Visit]], None], *, both_streams: bool, only: Sequence[int] | None = None
    ) -> None:
        """Walks all batches (or those of `only`) through the model, the visitor called at every module."""
        batches = self.batches if only is None else [self.batches[j] for j in only]
        self._features.start(batches)
        walk = Lockstep(self.model, self.modules, self._deltas, self.options, both_streams=both_streams)
        with torch.no_grad(), self.clock.part("forwards"):
            walk.run([(b.task, b.inputs) for b in batches], visitor, sum(map(len, self.trace.kinds.values())))
        self._features.stop()

    def _counts(self, name: str, visits: Sequence[Visit]) -> bool:
        """Whether this call's input holds samples."""
        return self.trace.kinds[name][visits[0].call] is not None

    def _tell(self, stage: str, detail: str, done: int) -> None:
        if self.progress is not None:
            self.progress(stage, detail, done, len(self.modules))


@functools.lru_cache(maxsize=16)
def _probe(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(d,) fixed direction; two inputs that agree along it are taken for equal."""
    return torch.cos(torch.arange(d, dtype=torch.float64) * 0.7390851 + 0.1).to(dtype).to(device)


def _distance(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> float:
    """||new - old||_F / ||new||_F over all modules."""
    away = sum(float((state - old[name]).square().sum()) for name, state in new.items())
    size = sum(float(state.square().sum()) for state in new.values())
    return math.sqrt(away / size) if size > 0 else 0.0
