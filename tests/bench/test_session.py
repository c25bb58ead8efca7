"""A session measures forms, compares each with float64 and names what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loraforge.bench.cases import Case, Work, error_of, frobenius_error
from loraforge.bench.costs import Cost
from loraforge.bench.session import Session, allowed_error, compiled, missing_native
from loraforge.kernels import backend

CPU = torch.device("cpu")
X = torch.linspace(0.1, 1.0, 64)


def session() -> Session:
    return Session(CPU, "tiny", runs=3)


def case(forms: dict[str, Callable[[], Any]], **more: Any) -> Case:
    return Case("op", "n=64", {"n": 64}, lambda device: Work(forms, lambda: [X.double() * 2.0], 1e-6, **more))


def test_a_row_has_times_error_speedup_and_shares() -> None:
    run = session()
    run.measure("kernels", case({"reference": lambda: X * 2.0, "torch": lambda: X + X}, cost=Cost(256, 256, 64)), 0.0)
    reference, plain = run.rows
    assert [row["form"] for row in run.rows] == ["reference", "torch"] and run.failures == []
    assert reference["case"] == "op n=64" and reference["op"] == "op" and reference["size"] == {"n": 64}
    assert reference["peer"] == "torch" and reference["speedup"] == plain["seconds"] / reference["seconds"]
    assert plain["peer"] is None and plain["speedup"] is None
    assert reference["error"] == 0.0 and reference["allowed"] == 1e-6 and reference["runs"] == 3
    assert reference["bytes"] == 512 and reference["gb_per_s"] == pytest.approx(512 / reference["seconds"] / 1e9)
    assert reference["roofline"] == pytest.approx(
        max(512 / run.ceilings.bytes_per_second, 64 / run.ceilings.flops_per_second["float32"]) / reference["seconds"]
    )
    assert reference["peak_bytes"] is None and reference["device"] == "cpu"


def test_a_wrong_result_is_named() -> None:
    run = session()
    run.measure("kernels", case({"reference": lambda: X * 2.0, "torch": lambda: X * 2.001}), 0.0)
    (failure,) = run.failures
    assert failure["form"] == "torch" and failure["case"] == "op n=64" and failure["group"] == "kernels"
    assert failure["error"] == pytest.approx(5e-4, rel=1e-3) and failure["allowed"] == 1e-6


def test_a_form_may_be_twice_as_far_off_as_a_right_peer_of_its_precision() -> None:
    work = Work({}, lambda: [], 1e-6)
    assert allowed_error(work, "native", {"torch": 9e-7, "reference": 1e-9}) == pytest.approx(1.8e-6)
    assert allowed_error(work, "native", {"torch": 0.5, "reference": 1e-9}) == 1e-6  # a wrong peer excuses nothing
    assert allowed_error(work, "torch", {"torch": 9e-7}) == 1e-6
    coarse = Work({}, lambda: [], 1e-6, own={"torch": 1e-2})
    assert allowed_error(coarse, "native", {"torch": 5e-3, "reference": 8e-7}) == pytest.approx(1.6e-6)
    assert allowed_error(coarse, "torch", {"torch": 5e-3}) == 1e-2


def test_the_compiled_form_is_left_out_with_the_reason_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "reference")
    run = session()
    run.measure("kernels", case({"reference": lambda: X * 2.0, "native": lambda: X * 0.0}), 0.0)
    assert [row["form"] for row in run.rows] == ["reference"]
    reason = "LORAFORGE_KERNELS=reference"
    assert run.skipped == [{"group": "kernels", "case": "op n=64", "form": "cpu", "reason": reason}]


def test_a_missing_build_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "native_available", lambda: False)
    assert backend.BUILD_COMMAND in str(missing_native(CPU))


def test_the_compiled_form_is_named_by_its_device_and_runs_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def native() -> torch.Tensor:
        seen.append(os.environ.get(backend.VARIABLE))
        return X * 2.0

    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr("loraforge.bench.session.missing_native", lambda device: None)
    run = session()
    run.measure("kernels", case({"reference": lambda: X * 2.0, "native": native}), 0.0)
    assert [row["form"] for row in run.rows] == ["reference", "cpu"] and set(seen) == {"native"}
    assert backend.VARIABLE not in os.environ


def test_the_environment_is_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "auto")
    with pytest.raises(ZeroDivisionError), compiled(True):
        assert os.environ[backend.VARIABLE] == "native"
        _ = 1 / 0
    assert os.environ[backend.VARIABLE] == "auto"


def test_errors_are_relative_to_the_largest_value() -> None:
    exact = [torch.tensor([4.0, -8.0], dtype=torch.float64), torch.tensor([3])]
    assert error_of([torch.tensor([4.0, -7.0]), torch.tensor([3])], exact) == 0.125
    assert error_of([torch.tensor([4.0, -8.0]), torch.tensor([2])], exact) == float("inf")
    assert error_of([torch.tensor([4.0, float("nan")]), torch.tensor([3])], exact) == float("inf")
    assert error_of([torch.tensor([4.0, -8.0])], exact) == float("inf")
    assert error_of([torch.zeros(3)], [torch.zeros(2)]) == float("inf")
    assert error_of([torch.full((2,), 0.5)], [torch.zeros(2)]) == 0.5
    assert error_of([torch.zeros(0)], [torch.zeros(0)]) == 0.0


def test_the_frobenius_distance() -> None:
    exact = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    assert frobenius_error([torch.tensor([3.0, 4.5])], exact) == pytest.approx(0.1)
    assert frobenius_error([torch.tensor([3.0, float("nan")])], exact) == float("inf")
    assert frobenius_error([], exact) == float("inf")
