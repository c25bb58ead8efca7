"""Importance, plasticity and Fisher information out of the gradients of a loss by the heads' gates. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.layout import HeadKey

Array = NDArray[np.float64]
# Half a width of a 95 % interval of a mean, in standard errors.
Z95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class GateGradients:
    """Gradients of a loss by gates that are all 1.

    Attributes:
        heads: One a column.
        s: (N, H) a row of the subset each, in its order (mode `sample`); (batches, H) of the batches' mean losses
            (mode `batch`).
        losses: (N,) of the rows, or (batches,) means.
        mode: `sample` or `batch`.
        n_samples: Rows that were measured.
    """

    heads: tuple[HeadKey, ...]
    s: Array
    losses: Array
    mode: str
    n_samples: int


@dataclass(frozen=True, eq=False)
class Estimate:
    """An importance by gradients: (H,) each, with the normal 95 % interval of a mean over rows."""

    heads: tuple[HeadKey, ...]
    value: Array
    se: Array
    ci_lo: Array
    ci_hi: Array

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Whether the interval leaves 0 out."""
        found: NDArray[np.bool_] = (self.ci_lo > 0) | (self.ci_hi < 0)
        return found


@dataclass(frozen=True, eq=False)
class Fisher:
    """What gradients say of how much the loss depends on each gate: (H,) each.

    Attributes:
        heads: One a column.
        g: Mean of |s|.
        f: Mean of s^2, the diagonal of the empirical Fisher information.
        p: g^2 / (f + eps), in [0, 1]: 1 where every gradient has the same size; NaN where all are 0.
        s: Mean of s; its negative is the first-order importance.
        m: Mean of |s| over rows (Michel et al. 2019, equation 5); NaN by batches, whose means hide it.
        eps: What was added to f.
    """

    heads: tuple[HeadKey, ...]
    g: Array
    f: Array
    p: Array
    s: Array
    m: Array
    eps: float


def taylor(gradients: GateGradients) -> Estimate:
    """First-order importance -mean s: what the loss would rise by if it went on as at the gate's 1; signed.

    Standard errors are those of a mean over rows (over batches in mode `batch`).
    """
    return _mean(gradients.heads, -gradients.s)


def michel(gradients: GateGradients, *, normalise: bool = False) -> Estimate:
    """Mean of |s| over rows (Michel et al. 2019, equation 5).

    Args:
        gradients: By rows.
        normalise: Divide by the Euclidean norm over the heads of the same attention, as after Molchanov et al. 2017.

    Raises:
        LoraforgeError: The gradients are of batches, whose means understate it.
    """
    if gradients.mode != "sample":
        raise LoraforgeError("absolute gradients are taken row by row", got="gradients of batches")
    size = np.abs(gradients.s)
    if normalise:
        owners = [key[:3] for key in gradients.heads]
        mean = size.mean(0)
        for owner in dict.fromkeys(owners):
            own = np.array([other == owner for other in owners])
            norm = np.linalg.norm(mean[own])
            size[:, own] /= norm if norm > 0 else 1.0
    return _mean(gradients.heads, size)


def _mean(heads: tuple[HeadKey, ...], values: Array) -> Estimate:
    """Mean over rows with its standard error; NaN for one row."""
    n = len(values)
    value = values.mean(0)
    se = values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(value), np.nan)
    return Estimate(heads, value, se, value - Z95 * se, value + Z95 * se)


def fisher(gradients: GateGradients, *, eps: float = 1e-6, relative: bool = True) -> Fisher:
    """Plasticity G, Fisher information F and their ratio Ppred = G^2 / (F + eps).

    Args:
        gradients: By rows, or by batches as in the document.
        eps: Keeps the ratio finite.
        relative: Whether eps is a share of the largest F, so that small gradients are not measured by it alone; the
            document's is absolute.
    """
    s = gradients.s
    g, f = np.abs(s).mean(0), np.square(s).mean(0)
    added = eps * float(f.max(initial=0.0)) if relative else eps
    p = np.divide(g**2, f + added, out=np.full_like(g, np.nan), where=f + added > 0)
    m = g.copy() if gradients.mode == "sample" else np.full_like(g, np.nan)
    return Fisher(gradients.heads, g, f, p, s.mean(0), m, added)
