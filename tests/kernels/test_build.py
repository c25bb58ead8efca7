"""setup.py in a copy of the sources, with a compiler that only leaves a mark: nothing is compiled or downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    copy = tmp_path / "tree"
    (copy / "loraforge").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name in ("README.md", "LICENSE", "loraforge/__init__.py"):
        (copy / name).touch()
    return copy


IN_PLACE = ["setup.py", "build_ext", "--inplace"]
EDITABLE = [
    "-c",
    "from setuptools import build_meta; build_meta.build_editable('wheels')",
]  # what `pip install -e` calls


def _build(tree: Path, *, how: list[str] = IN_PLACE, **variables: str) -> tuple[subprocess.CompletedProcess, bool]:
    """Builds with a compiler that answers questions and fails to compile; also tells whether it was asked to."""
    mark, compiler = tree / "called", tree / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) touch "{mark}"; exit 1;; esac\necho 12.2.0\n')
    compiler.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORAFORGE_")}
    env |= {"CXX": str(compiler), "CC": str(compiler), "MAX_JOBS": "1"} | variables
    done = subprocess.run([sys.executable, *how], cwd=tree, env=env, capture_output=True, text=True, timeout=120)
    return done, mark.exists()


def test_no_ext_never_compiles(tree):
    done, compiled = _build(tree, LORAFORGE_NO_EXT="1")
    assert done.returncode == 0 and not compiled, done.stderr
    assert "compiled operators are not built: LORAFORGE_NO_EXT=1" in done.stderr
    assert not list(tree.glob("loraforge/_C*"))


def test_a_compiler_that_fails_leaves_a_pure_python_package_and_a_notice(tree):
    done, compiled = _build(tree, how=EDITABLE)
    assert done.returncode == 0 and compiled, done.stderr
    assert list(tree.glob("wheels/loraforge-*.whl"))
    assert "the compiler failed" in done.stderr and "runs on pure PyTorch" in done.stderr
    assert not list(tree.glob("loraforge/_C*"))


def test_require_ext_fails_where_it_would_fall_back(tree):
    done, compiled = _build(tree, LORAFORGE_REQUIRE_EXT="1")
    assert done.returncode != 0 and compiled
    assert "required (LORAFORGE_REQUIRE_EXT=1) but the compiler failed" in done.stderr


def _fake_torch(tree: Path, text: str) -> str:
    package = tree / "shadow" / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "cpp_extension.py").write_text(
        "from setuptools.command.build_ext import build_ext\n"
        "class BuildExtension(build_ext):\n"
        "    def build_extensions(self):\n"
        "        print('sources', sorted(self.extensions[0].sources))\n"
        "        self.extensions = []\n"
        "def include_paths(): return []\n"
        "def library_paths(): return []\n"
    )
    return str(tree / "shadow")


def test_without_torch_the_package_is_pure_python(tree):
    shadow = _fake_torch(tree, "raise ImportError('no torch here')\n")
    done, compiled = _build(tree, PYTHONPATH=shadow)
    assert done.returncode == 0 and not compiled, done.stderr
    assert "torch cannot be imported here (no torch here)" in done.stderr and "--no-build-isolation" in done.stderr
    done, _ = _build(tree, PYTHONPATH=shadow, LORAFORGE_REQUIRE_EXT="1")
    assert done.returncode != 0 and "required" in done.stderr


def test_a_cuda_torch_builds_the_cpu_operators_and_says_so(tree):
    shadow = _fake_torch(tree, "class version: cuda = '13.0'\n__version__ = '2.11.0+cu130'\n")
    done, _ = _build(tree, PYTHONPATH=shadow)
    assert done.returncode == 0, done.stderr
    assert "only the CPU operators are built" in done.stderr
    sources = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    assert f"sources {sources}" in done.stdout
