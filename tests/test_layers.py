"""The doors between rooms: who may import whom, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "loraforge"
LEAVES = {"types", "errors", "provenance", "__init__"}
METHOD_ROOM = {"merging.methods", "merging.row", "merging.rows"}

# Room (or single file) -> rooms it may import. `merging` is split: a method file, and the files that join the rooms.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "provenance": {"__init__"},
    "kernels": LEAVES,
    "linalg": LEAVES | {"kernels"},
    "storage": LEAVES,
    "adapters": LEAVES | {"storage"},
    "checkpoints": LEAVES | {"storage"},
    "calibrate": LEAVES | {"kernels", "linalg"},
    "method": LEAVES | {"kernels", "linalg"} | METHOD_ROOM,
    "params": LEAVES | METHOD_ROOM,
    "merging": LEAVES
    | {"kernels", "linalg", "storage", "adapters", "checkpoints", "calibrate", "input_stats", "merging"},
    "inspection": LEAVES | {"kernels", "linalg", "adapters", "checkpoints"},
    "resizing": LEAVES | {"kernels", "linalg", "storage", "adapters"},
    "conversion": LEAVES | {"kernels", "linalg", "storage", "adapters"},
    "input_stats": LEAVES | {"kernels", "linalg", "storage", "adapters", "calibrate"},
    "recipes": LEAVES | METHOD_ROOM | {"recipe_keys", "storage"},
    "recipe_keys": LEAVES | METHOD_ROOM,
    "tasks": LEAVES | {"storage", "adapters", "calibrate"},
    "evaluation": LEAVES | {"kernels", "linalg", "storage", "adapters", "calibrate", "tasks", "report"},
    "training": LEAVES | {"kernels", "linalg", "storage", "adapters", "calibrate", "tasks", "evaluation", "report"},
    "measure": LEAVES
    | {"kernels", "linalg", "storage", "adapters", "checkpoints", "calibrate", "tasks", "evaluation", "report"},
    "pipelines": LEAVES
    | {"storage", "adapters", "calibrate", "input_stats", "tasks", "evaluation", "training", "merging", "measure"}
    | {"report", "recipes", "recipe_keys"},
    "report": LEAVES,
    "demo": LEAVES | {"report", "merging", "adapters", "training"},
    "bench": LEAVES | {"kernels", "linalg", "adapters", "merging", "tasks", "training", "measure"},
    "cli": {"*"},
    "__main__": {"cli"},
    "__init__": {"*"},
}
# Files of `merging` that join rooms or hold plain tables, and *_params; every other file there is a method.
JOINING = {
    "__init__", "methods", "row", "rows", "runner", "result", "account", "checks", "options", "calibrated", "job",
    "plan", "stream", "sinks", "models",
}  # fmt: skip


def is_params(name: str) -> bool:
    """Torch-free dataclasses of method parameters: any file may read them."""
    return name.startswith("merging.") and name.endswith("_params")


THIRD_PARTY_BANNED = {
    "method": {"safetensors", "transformers", "peft", "rich", "typer", "matplotlib", "os", "pathlib"},
    "linalg": {"safetensors", "transformers", "peft", "rich", "typer"},
    "kernels": {"safetensors", "transformers", "peft", "rich", "typer"},
    "report": {"torch", "transformers", "peft"},
}


def files():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "merging" and parts[1] not in JOINING:
        return "params" if parts[1].endswith("_params") else "method"
    return parts[0]


def imports_of(path: Path) -> list[str]:
    """Dotted names of everything a file imports, `TYPE_CHECKING` blocks and function bodies included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_doors(path):
    room = room_of(path)
    assert room in ALLOWED, f"no rule for the room {room}: add one here and to CONTRIBUTING"
    allowed = ALLOWED[room]
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "loraforge":
            assert parts[0] not in THIRD_PARTY_BANNED.get(room, set()), f"{path.name} ({room}) imports {name}"
            continue
        if "*" in allowed or len(parts) == 1:
            continue
        target = parts[1]
        own = room if room not in {"method", "params"} else "merging"
        if target == own and room not in {"method", "params"}:
            continue
        fits = is_params(".".join(parts[1:3])) and room in {"method", "params", "recipes", "recipe_keys"}
        fits = fits or target in allowed or ".".join(parts[1:3]) in allowed or target in {"__version__", "__init__"}
        if room == "method" and name.startswith(f"loraforge.merging.{path.stem}"):
            fits = True
        assert fits, f"{path.relative_to(PACKAGE)} ({room}) may not import {name}"


# Inside of `measure`: room -> rooms and files of `measure` that it may import.
MEASURE = {
    "files": {"heads"},
    "heads": set(),
    "subjects": {"heads", "files"},
    "importance": {"heads", "subjects", "files"},
    "updates": {"heads", "files", "analysis.statistics"},
    "analysis": {"heads", "files"},
}


@pytest.mark.parametrize("room", MEASURE)
def test_doors_inside_of_measure(room):
    places = [PACKAGE / "measure" / f"{room}.py"] if room == "files" else (PACKAGE / "measure" / room).glob("*.py")
    for path in places:
        for name in imports_of(path):
            if name.startswith("loraforge.measure."):
                parts = name.split(".")[2:]
                fits = parts[0] == room or parts[0] in MEASURE[room] or ".".join(parts[:2]) in MEASURE[room]
                assert fits, f"{path.relative_to(PACKAGE)} may not import {name}"


def test_method_files_do_not_import_each_other():
    stems = {p.stem for p in (PACKAGE / "merging").glob("*.py") if not p.stem.endswith("_params")} - JOINING
    for stem in stems:
        for name in imports_of(PACKAGE / "merging" / f"{stem}.py"):
            other = name.split(".")[2] if name.startswith("loraforge.merging.") else ""
            assert other not in stems - {stem}, f"merging/{stem}.py imports {name}"


def test_no_forbidden_file_names():
    assert not [p for p in files() if p.stem in {"utils", "common", "helpers"}]


@pytest.mark.parametrize(
    "command",
    ["import loraforge", "from loraforge import METHODS", "import loraforge.cli.app", "import loraforge.recipes"],
)
def test_cheap_imports_do_not_load_torch(command):
    code = f"import sys; {command}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_broad_except():
    """`except Exception` hides bugs; a carrier hands its error on, and the CLI's outermost frame reports it."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type is not None else ""
                reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                allowed = path.name == "carriers.py" or path.parent.name == "cli" or reraises
                assert caught not in {"", "Exception", "BaseException"} or allowed, f"{path}:{node.lineno}"
