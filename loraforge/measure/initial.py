"""theta0 as a folder: the base and the head that a training made up with its seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save

from loraforge.calibrate.base import no_bars
from loraforge.calibrate.encode import load_tokenizer
from loraforge.measure.files import write_json
from loraforge.measure.record import Trained
from loraforge.measure.subjects.subject import state_sha256
from loraforge.storage.atomic import new_folder, write_whole
from loraforge.tasks import load_model

ABOUT, HEAD = "init.json", "head.safetensors"


def write_initial(folder: Path, trained: Trained, *, whole: bool) -> dict[str, Any]:
    """Writes what the training started from.

    Args:
        folder: To make.
        trained: The training.
        whole: A model folder that transformers loads, as the document keeps it; else `init.json` (the base, the seed
            and a digest of theta0) and `head.safetensors` (the tensors that the base's file does not have), a few kB.

    Returns:
        {base, base_sha256, seed, labels, made_up (modules), theta0_sha256}.

    Raises:
        LoraforgeError: The base cannot be loaded, or the disk refuses.
    """
    model, _, fresh = load_model(trained.base, trained.kind, head_labels=trained.labels, seed=trained.seed)
    about = {
        "base": trained.base,
        "base_sha256": trained.base_sha256,
        "seed": trained.seed,
        "labels": list(trained.labels),
        "made_up": list(fresh),
        "theta0_sha256": state_sha256(model),
    }
    with new_folder(folder) as part:
        if whole:
            with no_bars():
                model.save_pretrained(part)  # type: ignore[operator]
            if trained.kind != "images":
                load_tokenizer(trained.base, folder).save_pretrained(part)
        else:
            head = {
                name: tensor.contiguous()
                for name, tensor in model.state_dict().items()
                if any(name.startswith(f"{module}.") for module in fresh)
            }
            if head:
                write_whole(part / HEAD, save(head))
            write_json(part / ABOUT, about)
    return about
