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
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LORAFORGE_", "CUDA_", "FORCE_", "TORCH_"))}
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


def _fake_torch(tree: Path, text: str, *, home: bool = False, fails_on_cuda: bool = False) -> str:
    """A torch that has a version and a BuildExtension that prints its sources; CUDA_HOME as the environment has it."""
    package = tree / "shadow" / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "cpp_extension.py").write_text(
        "from setuptools.command.build_ext import build_ext\n"
        "class BuildExtension(build_ext):\n"
        "    def build_extensions(self):\n"
        "        sources = sorted(self.extensions[0].sources)\n"
        f"        if {fails_on_cuda} and any(s.endswith('.cu') for s in sources): raise RuntimeError('no luck')\n"
        "        print('sources', sources)\n"
        "        self.extensions = []\n"
        "def include_paths(device_type='cpu'): return []\n"
        "def library_paths(device_type='cpu'): return []\n"
        f"import os\nCUDA_HOME = os.environ.get('CUDA_HOME') if {home} else None\n"
    )
    return str(tree / "shadow")


def test_without_torch_the_package_is_pure_python(tree):
    shadow = _fake_torch(tree, "raise ImportError('no torch here')\n")
    done, compiled = _build(tree, PYTHONPATH=shadow)
    assert done.returncode == 0 and not compiled, done.stderr
    assert "torch cannot be imported here (no torch here)" in done.stderr and "--no-build-isolation" in done.stderr
    done, _ = _build(tree, PYTHONPATH=shadow, LORAFORGE_REQUIRE_EXT="1")
    assert done.returncode != 0 and "required" in done.stderr


CUDA_TORCH = """
class version: cuda = '13.0'
class cuda:
    @staticmethod
    def device_count(): return 0
__version__ = '2.11.0+cu130'
"""


def _toolkit(tree: Path, release: str) -> dict[str, str]:
    """A toolkit whose nvcc answers questions; found through CUDA_HOME."""
    nvcc = tree / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in --list-gpu-arch) echo compute_80; echo compute_90;; *) "
        f"echo 'Cuda compilation tools, release {release}, V{release}.88';; esac\n"
    )
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(tree / "toolkit")}


def _sources(*kinds: str) -> str:
    return f"sources {sorted(str(p.relative_to(ROOT)) for kind in kinds for p in ROOT.glob(kind))}"


CPU_SOURCES = ("csrc/*.cpp", "csrc/cpu/*.cpp")
CUDA_SOURCES = (*CPU_SOURCES, "csrc/cuda/*_torch.cpp", "csrc/cuda/*.cu")


def test_a_cuda_torch_with_its_toolkit_builds_both(tree):
    shadow = _fake_torch(tree, CUDA_TORCH, home=True)
    done, _ = _build(tree, PYTHONPATH=shadow, **_toolkit(tree, "13.0"))
    assert done.returncode == 0, done.stderr
    assert _sources(*CUDA_SOURCES) in done.stdout
    # No GPU is visible: the usual targets that this nvcc knows.
    assert "CUDA operators are built for 8.0;9.0a+PTX with" in done.stderr


@pytest.mark.parametrize(
    ("home", "release", "why"),
    [
        (False, "13.0", "there is no nvcc: set CUDA_HOME to a CUDA toolkit"),
        (True, "12.4", "nvcc is of CUDA 12 and torch of CUDA 13.0"),
    ],
)
def test_a_cuda_torch_without_a_fitting_toolkit_builds_the_cpu_operators_and_says_why(tree, home, release, why):
    shadow = _fake_torch(tree, CUDA_TORCH, home=home)
    variables = {"PYTHONPATH": shadow, **_toolkit(tree, release)}
    done, _ = _build(tree, **variables)
    assert done.returncode == 0, done.stderr
    assert f"CUDA operators are not built: {why}" in done.stderr and _sources(*CPU_SOURCES) in done.stdout
    done, _ = _build(tree, FORCE_CUDA="1", **variables)
    assert done.returncode != 0 and f"required (FORCE_CUDA=1) but {why}" in done.stderr


def test_cuda_sources_that_do_not_compile_leave_the_cpu_operators(tree):
    shadow = _fake_torch(tree, CUDA_TORCH, home=True, fails_on_cuda=True)
    variables = {"PYTHONPATH": shadow, **_toolkit(tree, "13.0")}
    done, _ = _build(tree, **variables)
    assert done.returncode == 0, done.stderr
    assert "building the CPU operators alone" in done.stderr and _sources(*CPU_SOURCES) in done.stdout
    done, _ = _build(tree, FORCE_CUDA="1", **variables)
    assert done.returncode != 0 and "required (FORCE_CUDA=1) but the compiler failed" in done.stderr


def test_forcing_cuda_on_a_cpu_torch_is_refused(tree):
    shadow = _fake_torch(tree, "class version: cuda = None\n__version__ = '2.13.0+cpu'\n")
    done, compiled = _build(tree, PYTHONPATH=shadow, FORCE_CUDA="1")
    assert done.returncode != 0 and not compiled
    assert "required (FORCE_CUDA=1) but torch is a CPU build" in done.stderr


def test_the_toolkit_of_a_wrapped_nvcc_is_found(tree):
    """nvcc on PATH is a script outside of the toolkit: what it says of its own place counts."""
    folder = tree / "path"
    folder.mkdir()
    (folder / "nvcc").write_text("#!/bin/sh\necho '#$ _HERE_=/opt/toolkit-13/bin'\n")
    (folder / "nvcc").chmod(0o755)
    shadow = _fake_torch(tree, CUDA_TORCH, home=True)
    done, _ = _build(tree, PYTHONPATH=shadow, PATH=f"{folder}:{os.environ['PATH']}")
    assert "CUDA_HOME=/opt/toolkit-13 holds no nvcc that runs" in done.stderr
