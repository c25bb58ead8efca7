"""Builds `loraforge._C`, the compiled operators; everything else about the package is in pyproject.toml.

The package works without them, so a machine that cannot compile gets a pure Python install and a notice, and one that
cannot compile CUDA gets the CPU operators. Variables: LORAFORGE_NO_EXT=1 never compiles, LORAFORGE_REQUIRE_EXT=1 fails
where it would fall back, FORCE_CUDA=1 demands the CUDA operators (no GPU need be present), TORCH_CUDA_ARCH_LIST names
their targets, CUDA_HOME the toolkit, LORAFORGE_NATIVE=1 tunes for this processor alone, MAX_JOBS bounds the compilers
that run at once.
"""

import os
import re
import shutil
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
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"
NATIVE = os.environ.get("LORAFORGE_NATIVE") == "1"
CUDA_ARCHS = ("8.0", "9.0a", "10.0")


def notice(text):
    """Prints a line that is seen under `pip install -v` and in a direct run."""
    print(f"loraforge: {text}", file=sys.stderr, flush=True)


def give_up(reason):
    """Falls back to pure Python, or stops where the extension is required."""
    if REQUIRE_EXT or FORCE_CUDA:
        word = "FORCE_CUDA=1" if FORCE_CUDA else "LORAFORGE_REQUIRE_EXT=1"
        raise SystemExit(f"loraforge: compiled operators are required ({word}) but {reason}")
    notice(f"compiled operators are not built: {reason}; the package runs on pure PyTorch")


def output_of(*command):
    """What a program says on both streams; nothing where it cannot be run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
    except OSError:
        return ""


def find_toolkit():
    """Sets CUDA_HOME from the nvcc that runs: the one on PATH may be a script that lies outside of its toolkit."""
    if "CUDA_HOME" not in os.environ and shutil.which("nvcc"):
        found = re.search(r"_HERE_=(\S+)", output_of("nvcc", "--dryrun", "-x", "cu", "-c", os.devnull))
        if found:
            os.environ["CUDA_HOME"] = str(Path(found[1]).parent)


def why_no_cuda(torch, cpp):
    """Why the CUDA operators cannot be built here, or nothing."""
    if torch.version.cuda is None:
        return "torch is a CPU build"
    if cpp.CUDA_HOME is None:
        return "there is no nvcc: set CUDA_HOME to a CUDA toolkit"
    release = re.search(r"release (\d+)", output_of(str(Path(cpp.CUDA_HOME, "bin", "nvcc")), "--version"))
    if release is None:
        return f"CUDA_HOME={cpp.CUDA_HOME} holds no nvcc that runs"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1]} and torch of CUDA {torch.version.cuda}"
    return None


def set_archs(torch, cpp):
    """Sets TORCH_CUDA_ARCH_LIST: the GPUs at hand, else the usual ones as far as nvcc knows them."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        seen = {".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())}
        known = output_of(str(Path(cpp.CUDA_HOME, "bin", "nvcc")), "--list-gpu-arch")
        usual = [a for a in CUDA_ARCHS if f"compute_{a.replace('.', '').rstrip('a')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(sorted(seen) or usual) + "+PTX"
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def extension(torch, cpp, cuda):
    """The one extension module, from every source in csrc; the CUDA ones where `cuda`."""
    flags = ["-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wno-psabi", f"-ffile-prefix-map={ROOT}=."]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("LORAFORGE_TORCH_TARGET", TORCH_TARGET)]
    macros.append(("LORAFORGE_TORCH_VERSION", torch.__version__))
    libraries, kinds = ["torch_cpu"], ["csrc/*.cpp", "csrc/cpu/*.cpp"]
    if NATIVE:
        flags.append("-march=native")
        macros.append(("LORAFORGE_NATIVE", "1"))
    if cuda:
        archs = set_archs(torch, cpp)
        notice(f"CUDA operators are built for {archs} with {cpp.CUDA_HOME}")
        macros += [("USE_CUDA", "1"), ("LORAFORGE_CUDA_ARCHS", archs.replace(";", "/"))]
        libraries += ["torch_cuda", "cudart"]
        kinds += ["csrc/cuda/*_torch.cpp", "csrc/cuda/*.cu"]
    where = {"device_type": "cuda"} if cuda else {}
    return Extension(
        "loraforge._C",
        sorted(str(p.relative_to(ROOT)) for kind in kinds for p in ROOT.glob(kind)),
        depends=sorted(str(p.relative_to(ROOT)) for kind in ("h", "cuh") for p in ROOT.glob(f"csrc/*/*.{kind}")),
        include_dirs=[str(ROOT / "csrc"), *cpp.include_paths(**where)],
        library_dirs=cpp.library_paths(**where),
        libraries=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]},
        language="c++",
    )


def build_arguments():
    """What setup() needs to compile; nothing where compiling is not wanted or torch is not there."""
    if NO_EXT:
        notice("compiled operators are not built: LORAFORGE_NO_EXT=1")
        return {}
    find_toolkit()
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError as error:
        give_up(f"torch cannot be imported here ({error}); install it first and pass --no-build-isolation")
        return {}
    reason = why_no_cuda(torch, cpp)
    if reason and FORCE_CUDA:
        give_up(reason)
    if reason:
        notice(f"CUDA operators are not built: {reason}")

    class Build(cpp.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except (BaseError, RuntimeError, subprocess.CalledProcessError, OSError) as error:
                failed = f"the compiler failed ({type(error).__name__}: {error})"
                if any(source.endswith(".cu") for source in self.extensions[0].sources) and not FORCE_CUDA:
                    notice(f"CUDA operators are not built: {failed}; building the CPU operators alone")
                    self.extensions = [extension(torch, cpp, cuda=False)]
                    self.build_extensions()
                    return
                give_up(failed)
                self.extensions = []  # an editable install would copy the absent module otherwise

    return {"ext_modules": [extension(torch, cpp, cuda=reason is None)], "cmdclass": {"build_ext": Build}}


setup(**build_arguments())
