"""`benchmarks/gpu_check.sh` without a GPU: order, limits, results and exit codes, with programs that only pretend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_results import architecture, main, read_tests

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.sh"
STEPS = [
    "environment", "build", "tests", "memcheck", "racecheck", "bench_kernels", "bench_merge", "iteris_two_layers",
    "iteris_8b",
]  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs the timeout program")

PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
for last in "$@"; do :; done
case "$*" in
    "-m benchmarks.gpu_results environment "*) echo '{"gpu": "Fake H900 SXM", "capability": [9, 0]}' >"$last" ;;
    "-m benchmarks.gpu_results built") exit ${BUILT:-0} ;;
    "-m benchmarks.gpu_results "*) exec "$REAL" "$@" ;;
    "setup.py build_ext --inplace")
        echo "arch $TORCH_CUDA_ARCH_LIST home $CUDA_HOME require $LORAFORGE_REQUIRE_EXT" >>"$CALLS"
        ! grep -q license pyproject.toml && grep -q '"loraforge"' pyproject.toml || exit 9
        [ "${BUILD:-0}" = 0 ] || { echo "nvcc fatal: no such thing" >&2; exit "$BUILD"; } ;;
    *junitxml*)
        for word in "$@"; do case $word in --junitxml=*) file=${word#--junitxml=} ;; esac; done
        echo "$JUNIT" >"$file"; exit "${TESTS:-0}" ;;
    "-m benchmarks.gpu_small") echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$CALLS" ;;
    "-m loraforge bench kernels --device cuda --json") echo '{"rows": [{"op": "anderson_dots", "roofline": 0.9}]}' ;;
    "-m loraforge bench merge --device cuda --json") echo '{"rows": []}' ;;
    *"iteris_at_size --device cuda --layers 2 --out "*) echo '{"state": "done"}' >"$last" ;;
    *iteris_at_size*) echo '{"state": "running"}' >"$last"; exit "${ITERIS:-0}" ;;
    *) echo "nobody taught me: $*" >&2; exit 99 ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" >>"$CALLS"
[ "${SANITIZER:-works}" = works ] || { echo "========= Error: Device not supported"; exit 1; }
tool=$2; while [[ $1 == --* ]]; do shift 2; done; "$@"
echo "========= ${tool^^} SUMMARY: 0 errors"
"""
NVCC = """#!/usr/bin/env bash
case "$*" in *--dryrun*) echo "#\\$ _HERE_=/" >&2; echo "#\\$ TOP=/usr/bin/.." >&2 ;; *) echo "release 13.0" ;; esac
"""
GOOD = '<testsuites><testsuite><testcase classname="t" name="a" time="0.5"/></testsuite></testsuites>'
BAD = (
    '<testsuites><testsuite><testcase classname="t" name="a" time="0.5"/><testcase classname="t" name="b">'
    '<failure message="assert 1 == 2&#10;more">text</failure></testcase>'
    '<testcase classname="t" name="c"><skipped message="two GPUs"/></testcase></testsuite></testsuites>'
)


@dataclass
class Done:
    """What a run of the script left."""

    rc: int
    result: dict[str, Any]
    status: dict[str, str]
    calls: list[str]
    output: str
    files: list[str]


@pytest.fixture
def check(tmp_path: Path) -> Any:
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {"python": PYTHON, "compute-sanitizer": SANITIZER, "nvcc": NVCC, "c++": "#!/bin/sh\necho a compiler\n",
                "nvidia-smi": "#!/bin/sh\nsleep ${SMI_SLEEPS:-0}; echo GPU 0; exit ${SMI:-0}\n"}  # fmt: skip
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(**variables: str) -> Done:
        out = tmp_path / "out"
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {
            **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "OUT": str(out),
            "REAL": sys.executable, "CALLS": str(calls), "CXX": "c++", "LORAFORGE_COMMIT": "abc123", "JUNIT": GOOD,
            **variables,
        }  # fmt: skip
        done = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True, check=False)
        files = sorted(p.name for p in out.iterdir())
        result = json.loads(next(out.glob("*.json")).read_text())
        status = {step["name"]: step["status"] for step in result.get("steps", [])}
        return Done(done.returncode, result, status, calls.read_text().splitlines(), done.stdout + done.stderr, files)

    return run


def test_every_step_in_order_and_its_results_in_one_file(check: Any) -> None:
    done = check()
    assert done.rc == 0, done.output
    assert list(done.status) == STEPS and set(done.status.values()) == {"passed"}
    assert done.files == ["fake-h900-sxm.json", "fake-h900-sxm.log"]
    found = done.result
    assert (found["ok"], found["gpu"], found["commit"]) == (True, "Fake H900 SXM", "abc123")
    assert found["tests"]["passed"] == 1 and found["bench_kernels"]["rows"][0]["roofline"] == 0.9
    assert found["iteris_two_layers"] == {"state": "done"} and found["sanitizer"]["racecheck"]
    assert "arch 9.0a home /usr require 1" in done.calls, "from the device, and from the compiler itself"
    assert done.calls.count("caching off: 1") == 2
    assert not any("nobody taught me" in line for line in done.calls)
    assert (SCRIPT.parent.parent / "pyproject.toml").is_file(), "the working tree stays as it is"


def test_without_a_gpu_it_stops_at_once_and_says_so(check: Any) -> None:
    done = check(SMI="9")
    assert done.rc == 2 and done.files == ["no-gpu.json", "no-gpu.log"]
    assert done.status == {"environment": "failed"} | dict.fromkeys(STEPS[1:], "not run")
    assert done.result["steps"][0]["reason"] == "no NVIDIA GPU: nvidia-smi failed"
    assert done.result["steps"][3]["reason"] == "there is no GPU to check on"
    assert "no NVIDIA GPU: nvidia-smi failed" in done.output


@pytest.mark.parametrize("how", [{"BUILD": "1"}, {"BUILT": "1"}], ids=["the compiler fails", "no CUDA in it"])
def test_without_a_build_nothing_else_runs(check: Any, how: dict[str, str]) -> None:
    done = check(**how)
    assert done.rc == 2 and done.status["build"] == "failed"
    assert set(list(done.status.values())[2:]) == {"not run"}
    assert not any("junitxml" in line for line in done.calls)
    if "BUILD" in how:
        assert done.result["steps"][1]["reason"] == "nvcc fatal: no such thing"
        assert done.result["steps"][1]["end"][-1] == "nvcc fatal: no such thing"


def test_a_failed_step_does_not_stop_the_later_ones(check: Any) -> None:
    done = check(TESTS="1", JUNIT=BAD, ITERIS="3")
    assert done.rc == 1
    expected = dict.fromkeys(STEPS, "passed") | {"tests": "failed", "iteris_8b": "failed"}
    assert done.status == expected
    tests = done.result["tests"]
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 1, 1)
    assert tests["failures"][0].startswith("t::b: ") and "assert 1 == 2" in tests["failures"][0]
    assert tests["skips"] == ["t::c: two GPUs"]
    assert done.result["iteris_8b"] == {"state": "running"}, "what a step wrote before it died"


def test_tests_that_all_skip_have_checked_nothing(check: Any) -> None:
    done = check(JUNIT=BAD.replace("failure", "skipped").replace('name="a"', 'name="z"').replace(
        'time="0.5"/>', 'time="0.5"><skipped message="no device"/></testcase>'
    ))  # fmt: skip
    assert done.rc == 1 and done.status["tests"] == "failed"
    assert done.result["tests"]["passed"] == 0


def test_what_cannot_run_here_is_named_and_counted(check: Any) -> None:
    """A sanitizer that does not know the device, and a budget that the last step does not fit into."""
    done = check(SANITIZER="broken", GPU_CHECK_SECONDS="60")
    assert done.rc == 3
    assert done.status["memcheck"] == done.status["racecheck"] == "unavailable"
    assert "Device not supported" in done.result["steps"][3]["reason"]
    assert done.status["iteris_8b"] == "not run" and "60 needed" in done.result["steps"][8]["reason"]
    assert done.result["ok"] is False


def test_a_step_that_hangs_is_ended(check: Any) -> None:
    done = check(SMI_SLEEPS="30", GPU_CHECK_SECONDS="9")
    assert done.rc == 2
    assert done.status["environment"] == "timed out" and done.result["steps"][0]["rc"] == 124


def test_without_python_there_is_still_a_result(check: Any) -> None:
    done = check(PYTHON="false")
    assert done.rc == 2 and done.result["ok"] is False and "join" in done.result["error"]


def test_architecture_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for capability, want in (([8, 0], "8.0"), ([9, 0], "9.0a"), ([10, 0], "10.0a")):
        (tmp_path / "e.json").write_text(json.dumps({"capability": capability}))
        assert architecture(tmp_path / "e.json") == 0
        assert capsys.readouterr().out.strip() == want
    (tmp_path / "t.xml").write_text(GOOD)
    assert read_tests(tmp_path / "t.xml")["seconds"] == 0.5
    assert main(["ran", str(tmp_path / "t.xml")]) == 0
