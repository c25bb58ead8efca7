"""Convolutions, embeddings, experts and biases through the writer: PEFT gives the outputs of dense sums."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loraforge.adapters import AdapterWriter, all_modules, open_adapter
from loraforge.adapters.reader import Adapter
from loraforge.errors import LoraforgeError
from loraforge.linalg.factored import stack

# PEFT takes the one-dimensional bias of lora_B for a broken factor.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")
WEIGHTS = (0.7, -0.4)
# float32 through two layers of about 30 summands each: a few hundred units of the last place.
CLOSE = 1e-5


class Images(nn.Module):
    """Convolutions of one and two dimensions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.point(self.first(x).tanh()).flatten(2)).tanh().mean(2))


class Words(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(17, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x))


class Experts(nn.Module):
    """Two stacks of experts in one module, as in mixture-of-experts models: (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 7, 6) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 6, 7) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eoi->beo", x, self.up).tanh()
        return torch.einsum("beh,eoh->bo", hidden, self.down)


class Mixture(nn.Module):
    """A linear layer before the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.inner(x))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def trained(base: nn.Module, path: Path, seed: int, **fields: Any) -> Path:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(path)
    return path


def dense_sum(base: nn.Module, paths: Sequence[Path]) -> nn.Module:
    """Base plus the weighted sum of what each adapter, merged by PEFT, adds to it."""
    total = copy.deepcopy(base)
    with torch.no_grad():
        for weight, path in zip(WEIGHTS, paths, strict=True):
            one = PeftModel.from_pretrained(copy.deepcopy(base), path).merge_and_unload()
            for name, parameter in total.named_parameters():
                parameter += weight * (one.get_parameter(name) - base.get_parameter(name))
    return total


def merge(adapters: Sequence[Adapter], out: Path, **options: Any) -> Path:
    names = all_modules(adapters)
    with AdapterWriter(out, adapters, **options).session(names) as session:
        for name in names:
            pairs = [(w, a) for w, a in zip(WEIGHTS, adapters, strict=True) if name in a.modules_set]
            biases = [w * a.info(name).scaling * b for w, a in pairs if (b := a.bias(name)) is not None]
            update = stack([(w, a.load(name)) for w, a in pairs])
            session.add(name, update, {"module": name}, torch.stack(biases).sum(0) if biases else None)
    return out


def check(base: nn.Module, paths: Sequence[Path], out: Path, given: Tensor) -> dict[str, Any]:
    """Loads the output with PEFT; gives its configuration."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
    scales = [scale for m in model.modules() if hasattr(m, "scaling") for scale in m.scaling.values()]
    assert scales and set(scales) == {1.0}
    with torch.no_grad():
        expected = dense_sum(base, paths)(given)
        assert (expected - base(given)).abs().max() > 1e-2, "the adapters do something"
        assert (model(given) - expected).abs().max() <= CLOSE
    return dict(json.loads((out / "adapter_config.json").read_text()))


def test_convolutions(tmp_path: Path) -> None:
    base = made(Images)
    a = trained(base, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["first", "point", "line", "head"])
    b = trained(base, tmp_path / "b", 2, r=3, lora_alpha=9, target_modules=["first", "line"], use_rslora=True)
    out = merge([open_adapter(a), open_adapter(b)], tmp_path / "out")
    config = check(base, [a, b], out, torch.randn(2, 3, 6, 5))
    assert config["r"] == 7 and config["rank_pattern"] == {"^point": 4, "^head": 4}
    found = open_adapter(out)
    assert found.info("first").kernel == (3, 2) and found.info("line").kernel == (3,)


def test_an_embedding(tmp_path: Path) -> None:
    base = made(Words)
    a = trained(base, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["words", "out"])
    b = trained(base, tmp_path / "b", 2, r=2, lora_alpha=8, target_modules=["words"])
    out = merge([open_adapter(a), open_adapter(b)], tmp_path / "out")
    check(base, [a, b], out, torch.arange(17).reshape(1, 17))
    assert open_adapter(out).info("words").kind == "embedding"


PARAMETERS = ["experts.up", "experts.down"]


@pytest.mark.parametrize("linear", [True, False])
def test_experts(tmp_path: Path, linear: bool) -> None:
    base = made(Mixture)
    targets = ["inner"] if linear else []
    a = trained(base, tmp_path / "a", 1, r=2, lora_alpha=4, target_modules=targets, target_parameters=PARAMETERS)
    b = trained(base, tmp_path / "b", 2, r=3, lora_alpha=6, target_modules=targets, target_parameters=PARAMETERS)
    out = merge([open_adapter(a), open_adapter(b)], tmp_path / "out")
    config = check(base, [a, b], out, torch.randn(4, 6))
    assert config["target_modules"] == targets and config["target_parameters"] == PARAMETERS
    assert len(open_adapter(out).modules) == 6 + linear


def test_experts_of_several_ranks_are_padded_to_the_widest(tmp_path: Path) -> None:
    """Only the first expert of each stack gets both adapters; the others keep the rank of one."""
    base = made(Mixture)
    a = trained(base, tmp_path / "a", 1, r=2, lora_alpha=4, target_modules=[], target_parameters=PARAMETERS)
    adapter = open_adapter(a)
    names = [name for name in adapter.modules if not name.endswith(".2")]
    with AdapterWriter(tmp_path / "out", [adapter]).session(names) as session:
        for name in names:
            pair = adapter.load(name)
            session.add(name, stack([(0.5, pair), (0.5, pair)]) if name.endswith(".0") else pair)
    assert set(session.report.ranks.values()) == {2, 4} and set(session.report.file_ranks.values()) == {4}
    found = open_adapter(tmp_path / "out")
    for name in adapter.modules:
        wanted = adapter.load(name).delta() * (name in names)
        assert torch.allclose(found.load(name).delta(), wanted, atol=1e-6), name


# It looks for the names of parameters among those of modules; the rank is used all the same.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_one_parameter_alone_and_two_in_an_order_that_nobody_tells(tmp_path: Path) -> None:
    base = made(Mixture)
    a = trained(base, tmp_path / "a", 1, r=2, lora_alpha=4, target_modules=[], target_parameters=PARAMETERS[:1])
    b = trained(base, tmp_path / "b", 2, r=3, lora_alpha=6, target_modules=[], target_parameters=PARAMETERS[1:])
    both = trained(base, tmp_path / "c", 3, r=3, lora_alpha=6, target_modules=[], target_parameters=PARAMETERS)
    out = merge([open_adapter(a), open_adapter(both)], tmp_path / "out")
    check(base, [a, both], out, torch.randn(4, 6))
    with pytest.raises(LoraforgeError, match="order of adapted parameters"):
        merge([open_adapter(a), open_adapter(b)], tmp_path / "refused")


def test_biases_of_lora_B(tmp_path: Path) -> None:
    base = made(Images)
    a = trained(base, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["first", "head"], lora_bias=True)
    b = trained(base, tmp_path / "b", 2, r=3, lora_alpha=9, target_modules=["first", "point"])
    out = merge([open_adapter(a), open_adapter(b)], tmp_path / "out")
    config = check(base, [a, b], out, torch.randn(2, 3, 6, 5))
    assert config["lora_bias"] is True
    assert open_adapter(out).bias("point") is not None, "PEFT gives every module one"


def test_a_bias_beside_an_embedding_is_refused(tmp_path: Path) -> None:
    base = made(Words)
    a = trained(base, tmp_path / "a", 1, r=2, lora_alpha=4, target_modules=["out"], lora_bias=True)
    b = trained(base, tmp_path / "b", 2, r=2, lora_alpha=4, target_modules=["words"])
    with pytest.raises(LoraforgeError, match="lora_bias"):
        merge([open_adapter(a), open_adapter(b)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    ("kind", "fields", "what"),
    [
        (Words, {"target_modules": ["words"]}, "an embedding"),
        (Mixture, {"target_modules": [], "target_parameters": PARAMETERS}, "experts"),
        (Images, {"target_modules": ["head"], "lora_bias": True}, "a bias"),
    ],
)
def test_what_other_formats_cannot_hold_is_named(
    tmp_path: Path, kind: type[nn.Module], fields: dict[str, Any], what: str, format: str
) -> None:
    a = open_adapter(trained(made(kind), tmp_path / "a", 1, r=2, lora_alpha=4, **fields))
    with pytest.raises(LoraforgeError, match=f"{format} cannot hold {what}") as caught:
        AdapterWriter(tmp_path / "out", [a], format=format).write((m, a.load(m)) for m in a.modules)
    assert caught.value.where in a.modules
