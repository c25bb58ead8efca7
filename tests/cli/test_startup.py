"""Help, the table of methods and completion start without torch; measured on loaded modules, not on a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors", "matplotlib", "datasets")
PROBE = """
import json, sys
from loraforge.cli.app import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as left:
    code = left.code
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def loaded(arguments: list[str], **environment: str) -> set[str]:
    command = [sys.executable, "-c", PROBE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    assert done.stdout
    return set(modules)


COMMANDS = (
    "merge", "methods", "inspect", "resize", "convert", "collect-stats", "train-lora", "train-full", "train-ilora",
    "cl-eval", "cl-report", "eval", "run", "download", "doctor", "demo", "bench",
)  # fmt: skip


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_loads_neither_torch_nor_rich(command: list[str]) -> None:
    modules = loaded([*command, "--help"])
    assert modules.isdisjoint((*HEAVY, "rich", "pydantic"))


def test_help_says_what_the_options_take() -> None:
    def help_of(command: str) -> str:
        line = [sys.executable, "-m", "loraforge", command, "--help"]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"})
        return " ".join(done.stdout.split())

    merge = help_of("merge")
    assert "default: (0; calibrated methods: 42)" in merge and "folders or files" not in merge
    assert "any sign for sums, 0 or more for calibrated methods" in merge
    assert "Adapter folder." in help_of("inspect") and "calibrated methods" not in help_of("demo")


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "iteris-plus"], ["methods", "--json"], ["--version"]])
def test_the_table_of_methods_loads_no_torch(arguments: list[str]) -> None:
    assert loaded(arguments).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("loraforge me", "merge"),
        ("loraforge methods iter", "iteris-plus"),
        ("loraforge merge a --method task", "task-arithmetic"),
        ("loraforge merge a --method iteris --set use_", "use_mats="),
        ("loraforge merge a --preset GL", "GLUE_t5"),
    ],
)
def test_completion_knows_the_words_and_loads_no_torch(words: str, expected: str) -> None:
    probe = f"""
import sys
from loraforge.cli.app import main
try:
    main([])
except SystemExit:
    pass
heavy = sorted(set({HEAVY!r}) & set(sys.modules))
sys.exit(f"loaded {{heavy}}" if heavy else 0)
"""
    count = len(words.split()) - 1
    environment = {"_LORAFORGE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout.split()


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "loraforge", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: loraforge" in done.stdout
