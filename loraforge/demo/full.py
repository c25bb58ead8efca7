"""The demo with fully fine-tuned models in the place of adapters: the case of eight vision transformers of one base."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import ViTForImageClassification

import loraforge
from loraforge.demo.digits import Split, as_pixels
from loraforge.demo.evaluation import accuracy, weight_bytes
from loraforge.demo.steps import DemoRun, relative
from loraforge.demo.training import HEAD, Recipe, fit

# Sums of eight full task vectors leave the neighbourhood of the base: the paper of task arithmetic scales them by 0.3.
SCALE = 0.3
SUMS = ("task-arithmetic", "ties", "dare", "dare-ties", "della", "breadcrumbs")
FULL_METHODS = (
    "iso-c", "iso-cts", "tsv", "ties", "dare-ties", "task-arithmetic", "weighted-average", "karcher", "model-stock",
)  # fmt: skip


class FullDemo(DemoRun):
    """One run with full models; the folders "models" and "merged" hold transformers models."""

    kind = "models"

    def broaden(self, base: ViTForImageClassification) -> None:
        """Shows the base a few images of every domain: a weak generalist, as a pre-trained model is.

        On plain digits alone the domains lie so far apart that eight full models share nothing that a merge could keep.
        """
        few = [as_pixels(self.train, d, seed=self.seed).head(self.recipe.shown) for d in self.domains]
        mixed = Split(torch.cat([s.images for s in few]), torch.cat([s.labels for s in few]))
        fit(base, mixed, self.recipe.shown_epochs, self.recipe.base_rate / 2, self.recipe.batch, self.seed)

    def train_inputs(self, base: ViTForImageClassification) -> dict[str, float]:
        """Fine-tunes, saves and measures one model a domain."""
        single: dict[str, float] = {}
        for i, domain in enumerate(self.domains):
            folder = self.work / self.kind / domain.name
            with self.phases.of("train models", domain.name, i, len(self.domains)):
                split = as_pixels(self.train, domain, seed=self.seed)
                tune(base, split, self.recipe, self.seed + 1 + i, folder)
            with self.phases.of("measure", domain.name):
                single[domain.name] = accuracy(_load(folder), self.tests[domain.name])
        return single

    def merge(self, base: ViTForImageClassification, name: str, needs: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Merges the models by one method and measures what was written."""
        folder = self.work / "merged" / name
        weights = [SCALE] * len(self.tests) if name in SUMS else None
        start = time.perf_counter()
        models = [str(self.work / self.kind / task) for task in self.tests]
        merged = loraforge.merge(
            models, method=name, base=str(self.work / "base"), out=str(folder), weights=weights, seed=self.seed
        )
        seconds = time.perf_counter() - start
        model = _load(folder)
        found = {task: accuracy(model, split) for task, split in self.tests.items()}
        row = self.row(name, "merge", found, seconds=seconds, bytes=weight_bytes(folder), needs="base")
        return row, relative(merged.report, self.work)


def tune(base: ViTForImageClassification, split: Split, recipe: Recipe, seed: int, folder: Path) -> float:
    """Fine-tunes every weight but the head on one domain and saves the model; returns the last loss.

    Args:
        base: Trained base; left as it is. Its head is shared, so that one merged model serves all domains.
        split: Training images of the domain.
        recipe: Epochs and rate.
        seed: Seed of the order of the images.
        folder: The model's folder, made here.
    """
    model = copy.deepcopy(base)
    model.get_submodule(HEAD).requires_grad_(False)
    loss = fit(model, split, recipe.full_epochs, recipe.full_rate, recipe.batch, seed)
    model.save_pretrained(os.fspath(folder))
    return loss


def _load(folder: Path) -> ViTForImageClassification:
    model: ViTForImageClassification = ViTForImageClassification.from_pretrained(
        str(folder), local_files_only=True
    ).eval()
    return model
