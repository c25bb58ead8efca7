"""The counted rows of a module's inputs, out of the batches that stand there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraforge.calibrate.batches import Batch
from loraforge.calibrate.lockstep import Deltas, Visit
from loraforge.calibrate.statistics import Sums
from loraforge.calibrate.trace import Call, Trace
from loraforge.calibrate.weights import Collecting, Rows, times
from loraforge.errors import LoraforgeError
from loraforge.kernels.covariance import cov_pack


class _Mask(NamedTuple):
    """What of one side of a batch counts: all where `kept` is None, and how many rows that are."""

    shape: torch.Size
    kept: Tensor | None
    rows: int


class Features:
    """Takes padding out of the inputs, mixes the streams and measures the outputs.

    Modules that are fed by the very same tensor get the same packed rows, and share their Grams.

    Rows are float32 (float64 for float64 models). On CUDA those of a bfloat16 or float16 model stay as they are, since
    their products are exact in float32 anyhow; not so where they are weighted or mixed, which takes more than 16 bits.

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
        self._masks: list[dict[str, _Mask | None]] = []
        self._leader = ""
        self._packed: list[tuple[Tensor, Tensor]] = []
        self._sums: dict[tuple[int, int], Sums] = {}

    def start(self, batches: Sequence[Batch]) -> None:
        """Before a walk: which batches stand behind the visits."""
        self.stop()
        self._batches, self._masks = batches, _read_masks(batches)

    def stop(self) -> None:
        """After a walk: lets go of all activations."""
        self._batches, self._masks, self._leader, self._packed, self._sums = (), [], "", [], {}

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
        """Per batch (X, X~), both (t, d); one tensor where the task stream runs alone."""
        leader = self._trace.leaders[name]
        if leader == self._leader and self._trace.calls[name] == 1:
            return self._packed
        self._leader, self._sums, self._packed = leader, {}, []
        for own, merged in _pairs(visits):
            dtype = self._dtype(own.x)
            X = self._take(name, own, own.x, dtype)
            if merged is None:
                self._packed.append((X, X))
                continue
            Xm = self._take(name, merged, merged.x, dtype)
            if self._how.rho:
                Xm = torch.lerp(Xm, X, self._how.rho)
            self._packed.append((X, Xm))
        return self._packed

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the packed rows of an input."""
        if x.dtype == torch.float64:
            return torch.float64
        untouched = self._how.weighting is None and not self._how.rho
        return x.dtype if x.is_cuda and untouched else torch.float32

    def _kind(self, name: str, visit: Visit) -> Call:
        kind = self._trace.kinds[name][visit.call]
        assert kind is not None  # calls that do not count never come here
        return kind

    def _take(self, name: str, visit: Visit, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows, features) of an input or output with the padding taken out, samples first."""
        kept = self._mask(name, visit)
        if self._kind(name, visit).sample_dim == 1:
            t = t.transpose(0, 1)
        flat = t.reshape(-1, t.shape[-1])
        return flat.to(dtype) if kept is None else cov_pack(flat, kept.kept, None, dtype, rows=kept.rows)

    def _mask(self, name: str, visit: Visit) -> _Mask | None:
        """Which rows of one stream count; None where all do.

        Raises:
            LoraforgeError: The module sees another number of rows than the mask has.
        """
        rows = visit.x.numel() // visit.x.shape[-1]
        axis = self._kind(name, visit).axis
        mask = self._masks[visit.worker][axis]
        if mask is None:
            return None
        if mask.shape.numel() != rows:
            raise LoraforgeError(
                "the rows of a module cannot be told from padding",
                where=name,
                got=f"{rows} rows for a mask of {tuple(mask.shape)}",
                hint="use samples of one length without padding (safetensors calibration, all attention_mask 1)",
            )
        if mask.kept is None:
            return None
        if mask.kept.device != visit.x.device:
            mask = self._masks[visit.worker][axis] = mask._replace(kept=mask.kept.to(visit.x.device))
        return mask

    def _output_energy(self, name: str, visit: Visit, X: Tensor) -> Tensor:
        """||X W_i^T||_F^2 of task model i: the base module's output less its bias, plus the adapter's.

        Returns:
            A number of float64 that stays on the device: nobody waits for it before all of them are there.
        """
        wide = torch.float64 if visit.y.dtype == torch.float64 else torch.float32
        output = self._take(name, visit, visit.y, wide)
        bias = getattr(self._modules[name], "bias", None)
        pair = self._deltas[name].tasks[self._batches[visit.worker].task]
        # `y` itself goes on through the model: the first change makes a copy, the others work in it.
        output = output.clone() if bias is None else output - bias.to(output.dtype)
        if pair is not None:
            output.addmm_(times(X, pair[1]), pair[0].to(output.dtype).mT)
        return torch.linalg.vector_norm(output).double().square()


def _read_masks(batches: Sequence[Batch]) -> list[dict[str, _Mask | None]]:
    """Per batch the masks of its sides ("all" has none), in one read of the device for all of them."""
    sides = [{"encoder": b.enc_mask, "decoder": b.dec_mask, "all": None} for b in batches]
    present = [mask for side in sides for mask in side.values() if mask is not None]
    counts = iter(torch.stack([mask.sum() for mask in present]).tolist() if present else [])
    found: list[dict[str, _Mask | None]] = []
    for side in sides:
        found.append({})
        for axis, mask in side.items():
            rows = next(counts) if mask is not None else 0
            whole = mask is None or rows == mask.numel()
            kept = None if mask is None or whole else mask.reshape(-1)
            found[-1][axis] = None if mask is None else _Mask(mask.shape, kept, rows)
    return found


def _pairs(visits: Sequence[Visit]) -> list[tuple[Visit, Visit | None]]:
    """(task stream, merged stream or None) of every batch and call, in order."""
    merged = {(v.worker, v.call): v for v in visits if v.merged}
    return [(v, merged.get((v.worker, v.call))) for v in visits if not v.merged]
