"""Trains the demo's base model and its LoRA adapters: a small vision transformer, PEFT, a plain AdamW loop."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from loraforge.demo.digits import SIZE, Split

HEAD = "classifier"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and steps of the demo.

    Attributes:
        hidden: Width of the transformer.
        layers: Its depth.
        patch: Side of a patch in pixels.
        rank: r of every adapter.
        base_epochs: Passes over the plain training images.
        adapter_epochs: Passes over the images of one domain.
        full_epochs: The same for a model of which all weights are tuned.
        shown: Images of each domain that the base of full models sees.
        shown_epochs: Passes over them.
        base_rate: Largest learning rate of the base.
        adapter_rate: Largest learning rate of an adapter.
        full_rate: Largest learning rate where all weights are tuned.
        batch: Images a step.
        domains: Number of domains, from the first.
        train: Training images used.
        test: Test images used.
        calibration: Calibration images a domain.
    """

    hidden: int = 96
    layers: int = 4
    patch: int = 4
    rank: int = 4
    base_epochs: int = 30
    adapter_epochs: int = 10
    full_epochs: int = 4
    shown: int = 150
    shown_epochs: int = 6
    base_rate: float = 2e-3
    adapter_rate: float = 2e-3
    full_rate: float = 4e-4
    batch: int = 64
    domains: int = 8
    train: int = 1200
    test: int = 597
    calibration: int = 400

    def quick(self) -> Recipe:
        """The same pipeline in seconds, for tests: two domains, a tiny model, few steps."""
        return replace(
            self,
            hidden=32,
            layers=2,
            base_epochs=6,
            adapter_epochs=4,
            base_rate=4e-3,
            adapter_rate=8e-3,
            full_epochs=3,
            shown=50,
            shown_epochs=2,
            full_rate=2e-3,
            domains=2,
            train=640,
            test=200,
            calibration=96,
        )


def build_base(recipe: Recipe, seed: int) -> ViTForImageClassification:
    """An untrained vision transformer for 8x8 grey images and ten classes."""
    config = ViTConfig(
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        intermediate_size=2 * recipe.hidden,
        image_size=SIZE,
        patch_size=recipe.patch,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with _seeded(seed):
        return ViTForImageClassification(config)


def train_base(model: ViTForImageClassification, split: Split, recipe: Recipe, seed: int) -> float:
    """Trains all weights on plain digits, each batch lightly warped and noised; returns the last loss."""
    return fit(model, split, recipe.base_epochs, recipe.base_rate, recipe.batch, seed, decay=0.05, augment=True)


def train_adapter(base: ViTForImageClassification, split: Split, recipe: Recipe, seed: int, folder: Path) -> float:
    """Trains a LoRA adapter for one domain on every linear module except the head; saves it as a PEFT folder.

    Args:
        base: Trained base; left as it is. Its head is shared and frozen, so that one merged adapter serves all domains.
        split: Training images of the domain.
        recipe: Rank, epochs and rate.
        seed: Seed of the initial factors and of the order of the images.
        folder: The adapter's folder, made here.

    Returns:
        The last loss.
    """
    from peft import LoraConfig, get_peft_model

    with _seeded(seed), known_warnings():
        config = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=linear_modules(base))
        model = get_peft_model(copy.deepcopy(base), config)
        loss = fit(model, split, recipe.adapter_epochs, recipe.adapter_rate, recipe.batch, seed)
        # No embedding is trained, so PEFT has nothing to look up in the base's folder.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return loss


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Dotted names of every linear module except the head."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != HEAD]


def fit(
    model: nn.Module,
    split: Split,
    epochs: int,
    rate: float,
    batch: int,
    seed: int,
    *,
    decay: float = 0.0,
    augment: bool = False,
) -> float:
    """AdamW with one cosine cycle over (S, 1, 8, 8) images; returns the last batch's loss."""
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=decay, fused=True)
    steps = epochs * math.ceil(len(split) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.15)
    loss = torch.zeros(())
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(split), generator=generator).split(batch):
            images = split.images[chosen]
            pixels = _vary(images, generator) if augment else images
            loss = functional.cross_entropy(model(pixel_values=pixels).logits, split.labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()
    return float(loss.detach())


def _vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random warps, contrast and noise of (S, 1, 8, 8) images in [-1, 1], far weaker than any domain."""
    count = len(images)
    warp = torch.eye(2, 3).repeat(count, 1, 1)
    warp[:, :, :2] += 0.1 * torch.randn(count, 2, 2, generator=generator)
    warp[:, :, 2] += 0.08 * torch.randn(count, 2, generator=generator)
    grid = functional.affine_grid(warp, [count, 1, SIZE, SIZE], align_corners=False)
    plain = functional.grid_sample((images + 1.0) / 2.0, grid, align_corners=False)
    plain = plain * (0.8 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator))
    strength = 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return (plain + strength * noise).clamp(0.0, 1.0) * 2.0 - 1.0


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights come from torch's global generator: seeds it inside and puts its state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def known_warnings() -> Iterator[None]:
    """Silences transformers' warning about an attribute that PEFT still reads: nothing that a user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
