"""Operators against their PyTorch reference and against what a PyTorch user would write, through pytest-benchmark.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 pytest -o addopts= benchmarks/bench_kernels.py --benchmark-only \
        --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

The cases are those of `loraforge bench kernels` (`loraforge.bench.operators`), which times the forms in turn and adds
bytes, flops and the share of the roofline. On a machine that other work shares, add
`--benchmark-timer=time.process_time` (one thread: processor time is then the time of the call alone). Every timing is
followed by a comparison of its result with the float64 reference. LORAFORGE_BENCH_SIZE: default, full or tiny.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from loraforge.bench.cases import Case
from loraforge.bench.operators import kernel_cases
from loraforge.bench.session import allowed_error, compiled, missing_native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.name: case for case in kernel_cases(os.environ.get("LORAFORGE_BENCH_SIZE", "default"), DEVICE.type)}
FORMS = ("reference", "torch", "native")
ROUNDS = 7


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield CASES[request.param]


@pytest.mark.parametrize("form", FORMS)
def test_kernel(benchmark, case: Case, form: str) -> None:
    if form == "native" and (reason := missing_native(DEVICE)):
        pytest.skip(reason)
    work = case.build(DEVICE)
    if form not in work.forms:
        pytest.skip(f"{case.op} has no form {form}")
    function, before = work.forms[form], work.before

    def timed() -> object:
        found = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return found

    benchmark.group = case.name
    benchmark.extra_info.update(case=case.name, form=form, threads=torch.get_num_threads())

    def setup() -> None:
        if before is not None:
            before(form)

    with compiled(form == "native"):
        result = benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=2)
    exact = [t.detach() for t in work.exact()]
    peers = {name: work.distance(work.numbers(run()), exact) for name, run in _plain(work.forms, form, before)}
    error = work.distance(work.numbers(result), exact)
    assert error <= allowed_error(work, form, peers | {form: error})


def _plain(forms, form, before):
    """The PyTorch forms whose error the compiled one is measured by."""
    for name in ("reference", "torch") if form == "native" else ():
        if name in forms:
            if before is not None:
                before(name)
            yield name, forms[name]
