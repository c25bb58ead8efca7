"""The operators as torch sees them: schemas, fakes, refusals of the compiled form itself, what the build may link."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from loraforge.kernels import anderson_dots, anderson_mix, backend

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("native")


def _samples():
    torch.manual_seed(3)
    x, square = torch.randn(7, 5), torch.randn(5, 5, dtype=F64)
    mask = torch.tensor([True, False, True, True, False, True, True])
    a = torch.ones(7, dtype=F64)
    return {
        "anderson_dots": [(x, x[0]), (x.double()[:, ::2], x.double()[0, ::2]), (x[:0], x[0])],
        "anderson_mix": [
            (x, x.clone(), a, 0.5, torch.empty(5)),
            (x.double(), x.double(), a, 1.0, torch.zeros(5).double()),
        ],
        "dcs_variance": [(x, square), (x.bfloat16(), square.float()), (x[:0], square)],
        "dcs_weights": [(a * 2, 1.0, 0.25, False, False), (square.abs().flatten(), 0.5, 0.9, True, True)],
        "dcs_batch": [
            (torch.stack([x, x]), torch.stack([square, square]), None, 1.0, 0.25, False, False),
            (x[None].half(), square[None].float(), torch.tensor([3]), 0.5, 0.9, True, True),
        ],
        "consistency_forward": [(x, x.flip(0), mask, 0, 0.0, None), (x.half(), x.half(), None, 2, 0.1, a[0])],
        "consistency_backward": [
            (a[0], x, x.flip(0), mask, 1, 0.1, None),
            (a[0], x.double().T, x.double().T, a[:5], 3, 0.0, a[0]),
        ],
        "cov_pack": [
            (x, mask, None, torch.float32),
            (x, None, a, torch.bfloat16),
            (x.half(), mask, a.float(), F64),
            (x, torch.zeros(7, dtype=torch.bool), None, torch.float32),
            (x, mask, None, torch.float32, 5),
        ],
        "cov_fold_": [
            (square.clone(), square.float(), True),
            (square.clone(), torch.stack([square, square]), True, False),
            (torch.zeros(5, 7).double(), x.T, False),
        ],
        "entry_merge": [
            (
                [square, square.T],
                [square, square],
                [1.0] * 2,
                [0.5, 2.0],
                [0.1] * 2,
                [9.0] * 2,
                [1, 2, 3, -4],
                2**31,
                2.0,
                3,
                True,
                torch.float32,
            ),
            ([x.bfloat16()], [], [0.5], [1.0], [0.0], [float("inf")], [0, 0], 2**32, 1.0, 0, False, F64),
        ],
        "entry_counts_": [
            (torch.zeros(1, 2**16).long(), square, square, 1.0, torch.float32, False, [0], 15, 31),
            (torch.zeros(2, 2**16).long(), x, None, 2.0, F64, True, [3, 4], 31, 47),
        ],
        "drop_rescale_": [(x.clone(), 1, -2, 3, 2**31, 2.0), (x.double().T, 1, 2, 0, 5, 1.0)],
        "jacobi_svd": [(x[None], 9), (x.double().T.expand(2, 5, 7), 9), (x[None, :0], 9)],
        "gram_factor": [((square @ square.T)[None], 1e-14), (torch.zeros(2, 3, 3, dtype=F64), 0.5)],
        "pick_rank": [(a, 0.5, 1, 7), (x.abs(), 0.9, 0, 3)],
        "scale_write": [(x, x[0].abs(), x.T[:5], 3, torch.bfloat16), (x.double(), a[:5], x.double().T, 0, F64)],
    }


@pytest.mark.parametrize("op", list(_samples()))
def test_opcheck(op):
    for arguments in _samples()[op]:
        found = torch.library.opcheck(getattr(torch.ops.loraforge, op).default, arguments)
        assert set(found.values()) == {"SUCCESS"} and len(found) == 4


def test_every_schema_has_a_fake_a_sample_and_a_wrapper():
    text = (ROOT / "csrc" / "ops.cpp").read_text()
    schemas = set(re.findall(r'm\.def\("(\w+)\(', text))
    assert schemas == set(_samples()) == set(backend._fakes)
    import loraforge.kernels

    assert schemas <= set(loraforge.kernels.__all__)


def test_the_interface_number_is_the_same_on_both_sides():
    text = (ROOT / "csrc" / "common" / "interface.h").read_text()
    assert int(re.search(r"kInterface = (\d+)", text)[1]) == backend.INTERFACE


def test_operators_compile_into_a_graph():
    def step(H, f, a):
        out = torch.empty_like(f)
        torch.ops.loraforge.anderson_mix(H, H, a, 0.5, out)
        return torch.ops.loraforge.anderson_dots(H, out)

    H, a = torch.randn(3, 97), torch.ones(3, dtype=F64)
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(H, H[0], a), step(H, H[0], a))


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("anderson_dots", (torch.zeros(2, 3), torch.zeros(4)), r"anderson_dots: f has shape \(4,\), expected size 3"),
        ("anderson_dots", (torch.zeros(3), torch.zeros(3)), r"H has shape \(3,\), expected shape \(m, P\)"),
        (
            "anderson_dots",
            (torch.zeros(2, 3).half(), torch.zeros(3).half()),
            "H has dtype Half, expected dtype Float or",
        ),
        ("dcs_variance", (torch.zeros(2, 3), torch.zeros(3, 4)), r"M has shape \(3, 4\), expected size 3 along axis 1"),
        ("dcs_weights", (torch.zeros(2), 1.0, 0.0, False, False), "V has dtype Float, expected dtype Double"),
        (
            "cov_pack",
            (torch.zeros(2, 3), torch.ones(2), None, torch.float32),
            "mask has dtype Float, expected dtype Bool",
        ),
        (
            "cov_pack",
            (torch.zeros(2, 3), None, None, torch.int64),
            "the result has dtype Long, expected dtype Float or",
        ),
        ("cov_fold_", (torch.zeros(2, 3).double(), torch.zeros(2, 3), True), "a symmetric acc is square"),
        ("cov_fold_", (torch.zeros(2, 2), torch.zeros(2, 2), True), "acc has dtype Float, expected dtype Double"),
        ("jacobi_svd", (torch.zeros(2, 3), 9), r"C has shape \(2, 3\), expected shape \(b, R, R'\)"),
        ("jacobi_svd", (torch.zeros(1, 2, 3).half(), 9), "C has dtype Half, expected dtype Float or"),
        ("gram_factor", (torch.zeros(1, 2, 3).double(), 0.1), r"G has shape \(1, 2, 3\), expected size 2 along axis 2"),
        ("gram_factor", (torch.zeros(1, 2, 2), 0.1), "G has dtype Float, expected dtype Double"),
        ("pick_rank", (torch.zeros(1, 1, 1), 0.9, 1, 1), r"S has shape \(1, 1, 1\)"),
        (
            "scale_write",
            (torch.zeros(5, 3), torch.zeros(3), torch.zeros(3, 4), 4, F64),
            "rank has value 4, expected 0 to 3",
        ),
    ],
)
def test_the_compiled_form_checks_for_itself(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.loraforge, op)(*arguments)


def test_wrapper_and_operator_give_the_same():
    H, a, out, again = torch.randn(3, 97), torch.ones(3, dtype=F64), torch.empty(97), torch.empty(97)
    assert torch.equal(anderson_dots(H, H[1]), torch.ops.loraforge.anderson_dots(H, H[1]))
    anderson_mix(H, H, a, 0.5, out)
    torch.ops.loraforge.anderson_mix(H, H, a, 0.5, again)
    assert torch.equal(out, again)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_the_build_uses_the_stable_interface_only():
    """A symbol of c10:: or at:: would tie the build to one torch release."""
    import loraforge._C

    listing = subprocess.run(
        ["nm", "-D", "-u", "-C", loraforge._C.__file__], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if name.startswith(("c10::", "at::", "torch::"))]
