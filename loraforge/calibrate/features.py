"""The counted rows of a module's inputs, out of the batches that stand there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraforge.calibrate.batches import Batch
from loraforge.calibrate.lockstep import Deltas, Visit
from loraforge.calibrate.statistics import Sums
from loraforge.calibrate.trace import Call, Trace
from loraforge.calibrate.weights import Collecting, Rows
from loraforge.errors import LoraforgeError
from loraforge.kernels.covariance import cov_pack


class Features:
    """Takes padding out of the inputs, mixes the streams and measures the outputs.

    Modules that are fed by the very same tensor get the same packed rows, and share their Grams.

    Args:
        modules: Target modules by name.
        deltas: What the hooks add.
        trace: Leaders and masks.
        how: What is collected.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], deltas: Mapping[str, Deltas], trace: Trace, how: Collecting
    ) -> None:
        self._modules, self._deltas, self._trace, self._how = modules, deltas, trace, how
        self._batches: Sequence[Batch] = ()
        self._leader = ""
        self._packed: list[tuple[Tensor, Tensor]] = []
        self._sums: dict[tuple[int, int], Sums] = {}

    def start(self, batches: Sequence[Batch]) -> None:
        """Before a walk: which batches stand behind the visits."""
        self.stop()
        self._batches = batches

    def stop(self) -> None:
        """After a walk: lets go of all activations."""
        self._batches, self._leader, self._packed, self._sums = (), "", [], {}

    def rows(self, name: str, visits: Sequence[Visit]) -> list[Rows]:
        """The rows of all batches, in their order."""
        found = []
        for (own, _), (X, Xm) in zip(_pairs(visits), self.pack(name, visits), strict=True):
            batch = self._batches[own.worker]
            energy = self._output_energy(name, own, X) if self._how.lambda_weight == "full" else 0.0
            found.append(Rows(batch.task, batch.fold, X, Xm, energy))
        return found

    def shared(self, name: str) -> dict[tuple[int, int], Sums] | None:
        """Where the Grams of this module's input are kept for the others that it feeds; None if it feeds no other.

        Sample weights differ by module, and so do weighted Grams: those are never shared.
        """
        leader = self._trace.leaders[name]
        feeds = sum(other == leader for other in self._trace.leaders.values())
        return self._sums if feeds > 1 and self._how.weighting is None and self._trace.calls[name] == 1 else None

    def pack(self, name: str, visits: Sequence[Visit]) -> list[tuple[Tensor, Tensor]]:
        """Per batch (X, X~), both (t, d), float32 or float64; one tensor where the task stream runs alone."""
        leader = self._trace.leaders[name]
        if leader == self._leader and self._trace.calls[name] == 1:
            return self._packed
        self._leader, self._sums, self._packed = leader, {}, []
        for own, merged in _pairs(visits):
            mask = self._mask(name, own)
            X = self._take(name, own, own.x, mask)
            if merged is None:
                self._packed.append((X, X))
                continue
            Xm = self._take(name, merged, merged.x, mask)
            if self._how.rho:
                Xm = torch.lerp(Xm, X, self._how.rho)
            self._packed.append((X, Xm))
        return self._packed

    def _kind(self, name: str, visit: Visit) -> Call:
        kind = self._trace.kinds[name][visit.call]
        assert kind is not None  # calls that do not count never come here
        return kind

    def _take(self, name: str, visit: Visit, t: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, features) of an input or output with the padding taken out, samples first."""
        if self._kind(name, visit).sample_dim == 1:
            t = t.transpose(0, 1)
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        return cov_pack(t.reshape(-1, t.shape[-1]), mask, None, dtype)

    def _mask(self, name: str, visit: Visit) -> Tensor | None:
        """(rows of one stream,) bool: which rows count; None where all do.

        Raises:
            LoraforgeError: The module sees another number of rows than the mask has.
        """
        batch = self._batches[visit.worker]
        rows = visit.x.numel() // visit.x.shape[-1]
        mask = {"encoder": batch.enc_mask, "decoder": batch.dec_mask, "all": None}[self._kind(name, visit).axis]
        if mask is None or (mask.numel() == rows and bool(mask.all())):
            return None
        if mask.numel() != rows:
            raise LoraforgeError(
                "the rows of a module cannot be told from padding",
                where=name,
                got=f"{rows} rows for a mask of {tuple(mask.shape)}",
                hint="use samples of one length without padding (safetensors calibration, all attention_mask 1)",
            )
        return mask.reshape(-1)

    def _output_energy(self, name: str, visit: Visit, X: Tensor) -> float:
        """||X W_i^T||_F^2 of task model i: the base module's output less its bias, plus the adapter's."""
        output = self._take(name, visit, visit.y, self._mask(name, visit))
        bias = getattr(self._modules[name], "bias", None)
        pair = self._deltas[name].tasks[self._batches[visit.worker].task]
        # `y` itself goes on through the model: the first change makes a copy, the others work in it.
        output = output.clone() if bias is None else output - bias.to(X.dtype)
        if pair is not None:
            output.addmm_(X @ pair[1].to(X.dtype).mT, pair[0].to(X.dtype).mT)
        return float(torch.linalg.vector_norm(output)) ** 2


def _pairs(visits: Sequence[Visit]) -> list[tuple[Visit, Visit | None]]:
    """(task stream, merged stream or None) of every batch and call, in order."""
    merged = {(v.worker, v.call): v for v in visits if v.merged}
    return [(v, merged.get((v.worker, v.call))) for v in visits if not v.merged]
