"""Jobs in processes of their own, so that the peak memory of one is not that of another.

Loading torch takes seconds; a process that has loaded it and computed nothing is forked for each job instead. Such a
child starts with the resident memory of its parent, and its high-water mark with it.

    python -m loraforge.bench.children THREADS MODULE...     # reads jobs from stdin: {"job": "module:function", ...}
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol


class Jobs(Protocol):
    """What runs jobs."""

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Calls `module:function` with the arguments."""
        ...


class Here:
    """Runs jobs in this process: on a GPU the peak memory of a call is counted by itself, and a fork has no GPU.

    Args:
        modules: Modules that the jobs need, loaded before the first.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        for name in modules:
            importlib.import_module(name)

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Calls `module:function` with the arguments."""
        return _call({"job": job, "arguments": arguments})


class Children:
    """Runs jobs one at a time, each in a fresh process.

    Args:
        threads: Threads of the CPU in each.
        modules: Modules that the jobs need, loaded once.
    """

    def __init__(self, threads: int, modules: Sequence[str]) -> None:
        command = [sys.executable, "-m", "loraforge.bench.children", str(threads), *modules]
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._nursery = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | quiet
        )

    def __enter__(self) -> Children:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process that jobs are forked from."""
        if self._nursery.stdin is not None:
            self._nursery.stdin.close()
        if kind is not None:
            self._nursery.terminate()
        self._nursery.wait()
        if self._nursery.stdout is not None:
            self._nursery.stdout.close()

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Calls `module:function` with the arguments in a process of its own.

        Args:
            job: Module and function; it returns an object that JSON holds.
            arguments: JSON-ready.

        Raises:
            RuntimeError: The job failed; its traceback is in the message.
        """
        stdin, stdout = self._nursery.stdin, self._nursery.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise RuntimeError(f"the process that jobs are forked from was ended before {job}")
        try:
            stdin.write(json.dumps({"job": job, "arguments": arguments}) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"the process that jobs are forked from ended before {job}") from error
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the process that jobs are forked from ended in {job}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(f"{job} failed in its process: {answer['failed']}")
        found: dict[str, Any] = answer["result"]
        return found


def _serve(threads: int, modules: Sequence[str]) -> None:
    """Forks a child for each line of stdin; its answer is a line of stdout."""
    import torch

    torch.set_num_threads(threads)
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page with an object on it
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            _work(json.loads(line), answers)
        _, status = os.waitpid(child, 0)
        if status:
            _answer(answers, {"failed": f"ended with status {status} and without a word (out of memory?)"})


def _call(request: dict[str, Any]) -> dict[str, Any]:
    module, name = request["job"].split(":")
    found: dict[str, Any] = getattr(importlib.import_module(module), name)(**request["arguments"])
    return found


def _work(request: dict[str, Any], answers: int) -> None:
    """The child: one job, one answer, and out, without the parent's clean-up."""
    warnings.simplefilter("ignore")
    try:
        _answer(answers, {"result": _call(request)})
    except Exception:
        _answer(answers, {"failed": traceback.format_exc()})
        raise
    finally:
        os._exit(0)


def _answer(descriptor: int, value: dict[str, Any]) -> None:
    data = (json.dumps(value) + "\n").encode()
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2:])
