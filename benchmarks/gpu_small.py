"""Every operator on the GPU at small sizes, in one process: what compute-sanitizer looks at in `gpu_check.sh`.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_small

torch's caching allocator cuts tensors out of large blocks, where a step over the end of one hits the next and nobody
notices; the variable turns it off.
"""

from __future__ import annotations

import pytest

from loraforge.kernels.backend import self_test


def main() -> int:
    """The self-test, then the tests of the kernels that are named small."""
    failed = [row["op"] for row in self_test("cuda") if not row["ok"]]
    for op in failed:
        print(f"self-test failed: {op}", flush=True)
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    code = pytest.main([*options, "-m", "gpu", "-k", "small", "tests/kernels"])
    # 5: no test of that name; the self-test alone has then been looked at, and the output says so.
    return 1 if failed or code not in (0, 5) else 0


if __name__ == "__main__":
    raise SystemExit(main())
