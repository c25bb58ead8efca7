"""Builds `loraforge._C`, the compiled operators; everything else about the package is in pyproject.toml.

The package works without them, so a machine that cannot compile gets a pure Python install and a notice. Variables:
LORAFORGE_NO_EXT=1 never compiles, LORAFORGE_REQUIRE_EXT=1 fails where it would fall back, LORAFORGE_NATIVE=1 tunes for
this processor alone, MAX_JOBS bounds the compilers that run at once.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
# torch 2.11: what is newer is hidden from the sources, so that torch 2.11 can load the build.
TORCH_TARGET = "0x020b000000000000"
NO_EXT = os.environ.get("LORAFORGE_NO_EXT") == "1"
REQUIRE_EXT = os.environ.get("LORAFORGE_REQUIRE_EXT") == "1"
NATIVE = os.environ.get("LORAFORGE_NATIVE") == "1"


def notice(text):
    """Prints a line that is seen under `pip install -v` and in a direct run."""
    print(f"loraforge: {text}", file=sys.stderr, flush=True)


def give_up(reason):
    """Falls back to pure Python, or stops where the extension is required."""
    if REQUIRE_EXT:
        raise SystemExit(f"loraforge: compiled operators are required (LORAFORGE_REQUIRE_EXT=1) but {reason}")
    notice(f"compiled operators are not built: {reason}; the package runs on pure PyTorch")


def extension(torch, cpp):
    """The one extension module, from every source in csrc."""
    flags = ["-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wno-psabi", f"-ffile-prefix-map={ROOT}=."]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("LORAFORGE_TORCH_TARGET", TORCH_TARGET)]
    macros.append(("LORAFORGE_TORCH_VERSION", torch.__version__))
    if NATIVE:
        flags.append("-march=native")
        macros.append(("LORAFORGE_NATIVE", "1"))
    if torch.version.cuda is not None:
        notice("torch is a CUDA build, but only the CPU operators are built: there are no CUDA operators yet")
    return Extension(
        "loraforge._C",
        [str(p.relative_to(ROOT)) for p in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])],
        depends=[str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/common/*.h"))],
        include_dirs=[str(ROOT / "csrc"), *cpp.include_paths()],
        library_dirs=cpp.library_paths(),
        libraries=["torch_cpu"],
        define_macros=macros,
        extra_compile_args={"cxx": flags},
        language="c++",
    )


def build_arguments():
    """What setup() needs to compile; nothing where compiling is not wanted or torch is not there."""
    if NO_EXT:
        notice("compiled operators are not built: LORAFORGE_NO_EXT=1")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError as error:
        give_up(f"torch cannot be imported here ({error}); install it first and pass --no-build-isolation")
        return {}

    class Build(cpp.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except (BaseError, RuntimeError, subprocess.CalledProcessError, OSError) as error:
                give_up(f"the compiler failed ({type(error).__name__}: {error})")
                self.extensions = []  # an editable install would copy the absent module otherwise

    return {"ext_modules": [extension(torch, cpp)], "cmdclass": {"build_ext": Build}}


setup(**build_arguments())
