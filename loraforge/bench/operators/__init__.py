"""Cases of every operator of `loraforge.kernels`, one definition for `loraforge bench kernels` and pytest-benchmark.

Forms: "reference" is the PyTorch form that runs where nothing was built, "torch" the best library calls for the same
numbers where they differ from it, "native" the compiled form on the device.
"""

from __future__ import annotations

from loraforge.bench.cases import Case
from loraforge.bench.operators import anderson, consistency, core_svd, covariance, dcs, entrywise
from loraforge.bench.session import Session

BUDGET = {"default": 0.5, "full": 3.0, "tiny": 0.0}
_FILES = (anderson, dcs, covariance, core_svd, consistency, entrywise)


def kernel_cases(size: str, device_type: str = "cpu") -> list[Case]:
    """The cases of a size; a GPU is measured on the full sizes, the small ones are over before they have begun."""
    chosen = "full" if device_type == "cuda" and size == "default" else size
    return [case for file in _FILES for case in file.cases(chosen)]


def measure(session: Session) -> None:
    """Measures the group `kernels`."""
    cases = kernel_cases(session.size, session.device.type)
    for done, case in enumerate(cases):
        session.tell("kernels", case.name, done, len(cases))
        session.measure("kernels", case, BUDGET[session.size])
