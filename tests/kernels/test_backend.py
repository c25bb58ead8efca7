from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.kernels import anderson_dots, backend, kernel_report, self_test

# Every operator of csrc/ops.cpp, and what is made of several of them.
OPERATORS = set(backend._fakes) | {"gram_", "batched_core_svd"}
HIDE = "import sys; sys.modules['loraforge._C'] = None\n"


def _run(code: str, mode: str | None) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != backend.VARIABLE} | ({backend.VARIABLE: mode} if mode else {})
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, timeout=120
    )


def test_self_test_passes_and_names_the_path(path):
    rows = self_test()
    assert {row["op"] for row in rows} == OPERATORS
    assert [row for row in rows if not row["ok"]] == []
    assert all(0.0 <= row["max_error"] <= row["tolerance"] for row in rows)
    own = {"gram_": "blocks", "batched_core_svd": "threads" if path == "native" else "reference"}
    assert {row["op"]: row["path"] for row in rows} == {op: path for op in OPERATORS} | own
    assert {row["device"] for row in rows} == {"cpu"}


@pytest.mark.gpu
def test_self_test_passes_on_the_gpu():
    rows = self_test("cuda")
    assert {row["op"] for row in rows} == OPERATORS
    assert [row for row in rows if not row["ok"]] == []
    paths = {row["op"]: row["path"] for row in rows}
    assert paths == {op: "cuda" for op in OPERATORS} | {"gram_": "blocks", "batched_core_svd": "device"}


def test_self_test_reports_a_wrong_result(path, monkeypatch):
    monkeypatch.setattr("loraforge.kernels.anderson.anderson_dots", lambda H, f: torch.zeros(4, dtype=torch.float64))
    monkeypatch.setattr("loraforge.kernels.core_svd.pick_rank", lambda *a: torch.zeros(7))
    wrong = {row["op"]: row["max_error"] for row in self_test() if not row["ok"]}
    assert wrong == {"anderson_dots": 1.0, "pick_rank": float("inf")}


@pytest.mark.parametrize(
    ("value", "hint"), [("natve", "did you mean 'native'"), ("", "known: auto"), ("NATIVE", "known")]
)
def test_an_unknown_mode_is_refused(monkeypatch, value, hint):
    monkeypatch.setenv(backend.VARIABLE, value)
    for call in (kernel_report, lambda: anderson_dots(torch.zeros(1, 3), torch.zeros(3))):
        with pytest.raises(UsageError) as caught:
            call()
        assert repr(value) in str(caught.value) and hint in str(caught.value) and backend.VARIABLE in str(caught.value)


def test_report_counts_calls_by_path(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    before = kernel_report()["calls"].get("anderson_dots", {}).get("reference", 0)
    anderson_dots(torch.zeros(1, 3), torch.zeros(3))
    report = kernel_report()
    assert report["calls"]["anderson_dots"]["reference"] == before + 1
    assert report["mode"] == "reference" and report["native"] is False and "reference" in report["why"]
    assert json.loads(json.dumps(report))["build_info"] == {}


@pytest.mark.usefixtures("native")
def test_report_names_the_build():
    report = json.loads(json.dumps(kernel_report()))
    assert report["native"] is True and report["mode"] == "native"
    assert report["build_info"]["interface"] == backend.INTERFACE
    assert report["build_info"]["torch_target"] == "0x020b000000000000"
    assert report["capabilities"]["isa"] in {"x86-64", "x86-64-v3", "x86-64-v4", "as compiled"}


@pytest.mark.usefixtures("native")
def test_tensors_elsewhere_take_the_reference_in_auto_and_are_refused_in_native(monkeypatch):
    H = torch.zeros(2, 3, device="meta")
    with pytest.raises(LoraforgeError, match=r"anderson_dots has no compiled form here(.|\n)*tensors on meta"):
        backend.takes_native("anderson_dots", H)
    monkeypatch.setenv(backend.VARIABLE, "auto")
    assert backend.takes_native("anderson_dots", H) is False


def test_a_build_of_another_interface_is_not_used(monkeypatch):
    old = types.SimpleNamespace(build_info=lambda: {"interface": 0})
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: old)
    module, why = backend._load_once.__wrapped__()
    assert module is None and "interface 0" in why and "build it again" in why


def test_a_build_that_cannot_be_loaded_says_why(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(backend.importlib, "import_module", fail)
    assert backend._load_once.__wrapped__() == (
        None,
        "loraforge._C cannot be loaded: undefined symbol: torch_parallel_for",
    )


def test_reference_mode_never_loads_the_extension():
    done = _run(
        """
        import sys
        from loraforge.kernels import self_test
        assert all(row["ok"] and row["path"] in ("reference", "blocks") for row in self_test())
        assert "loraforge._C" not in sys.modules
        print("pure")
        """,
        "reference",
    )
    assert done.stdout.strip() == "pure", done.stderr
    assert "LoraforgeKernelNotice" not in done.stderr  # it was asked for


def test_a_hidden_extension_is_noticed_once_and_everything_still_works():
    done = _run(
        HIDE
        + textwrap.dedent("""
        from loraforge.kernels import kernel_report, native_available, self_test
        assert not native_available()
        rows = self_test() + self_test()
        assert all(row["ok"] for row in rows)
        assert {row["path"] for row in rows} == {"reference", "blocks", "threads"}
        assert kernel_report()["why"] == "loraforge._C was not built"
        print("pure")
        """),
        None,
    )
    assert done.stdout.strip() == "pure", done.stderr
    assert done.stderr.count("LoraforgeKernelNotice: compiled operators are not used") == 1
    assert backend.BUILD_COMMAND in done.stderr


def test_native_mode_without_a_build_stops_with_the_command():
    done = _run(
        HIDE
        + textwrap.dedent("""
        import torch
        from loraforge.errors import LoraforgeError, UsageError
        from loraforge.kernels import anderson_dots
        try:
            anderson_dots(torch.zeros(1, 3), torch.zeros(3))
        except LoraforgeError as error:
            print(error)
        """),
        "native",
    )
    assert "anderson_dots has no compiled form here" in done.stdout, done.stderr
    assert "was not built" in done.stdout and backend.BUILD_COMMAND in done.stdout
