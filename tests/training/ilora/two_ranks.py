"""One of two processes of a run: started by test_ranks.py, writes what it ended with into a folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from loraforge.training.ilora.adapters import save_pair
from loraforge.training.ilora.buffer import ReplayBuffer
from tests.training.ilora.models import bert, class_rows, config, llama, text_rows, trainer

VALUES = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}


def settings(size):
    return config(ilora_buffer_size=40, replay_batch_size=size, ema_alpha=0.3)


def build(folder, values, size):
    # Three steps an epoch: the second is in the middle of one.
    past, current = text_rows(4, 1, (6, 6)), text_rows(12, 2, (6, 6), task=1)
    return trainer(llama(), current, folder, settings(size), past=past, train=values, keep=3)


def write(tr, folder):
    tr.save_buffer(folder / "buffer.safetensors")
    if tr.args.process_index == 0:
        save_pair(tr.model, folder, tr.pairs)
        logs = [log for log in tr.state.log_history if "loss" in log]
        (folder / "logs.json").write_text(json.dumps(logs))
    tr.accelerator.wait_for_everyone()


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    tr = build(out / "run", VALUES, 20)
    tr.train()
    write(tr, out / "whole")
    assert {p.requires_grad for name, p in tr.model.named_parameters() if "ema" in name.split(".")} == {False}

    # The same run, taken up at its second step.
    if rank == 0:
        shutil.copytree(out / "run" / "checkpoint-2", out / "again" / "checkpoint-2")
    torch.distributed.barrier()
    tr = build(out / "again", VALUES, 20)
    tr.train(resume_from_checkpoint=str(out / "again" / "checkpoint-2"))
    write(tr, out / "continued")

    # Rank 1 holds nothing that has targets: no rank replays, none waits for the other. Rows are ragged, so that each
    # rank for itself would choose another way through the model.
    past = text_rows(6, 3)
    if rank:
        past = [row | {"labels": torch.full_like(row["labels"], -100)} for row in past]
    shard = ReplayBuffer(8, rank=rank, world=2)
    shard.offer(past, 0)
    tr = trainer(llama(), text_rows(8, 4, task=1), out / "none", config(), buffer=shard, train={"max_steps": 1})
    tr.train()
    write(tr, out / "none")

    # Rows of one rank are so long that it would not fuse; and a model with a head of its own.
    shard = ReplayBuffer(8, rank=rank, world=2)
    lengths = (20, 20) if rank else (4, 5)
    shard.offer([row | {"labels": torch.tensor(0)} for row in text_rows(6, 5, lengths)], 0)
    tr = trainer(
        bert(), class_rows(8, 6, task=1), out / "ragged", config(), kind="classification", buffer=shard,
        train={"max_steps": 2},
    )  # fmt: skip
    tr.train()
    write(tr, out / "ragged")
    digest = torch.tensor([float(p.detach().double().sum()) for p in tr.model.parameters() if p.requires_grad])
    all_digests = [torch.zeros_like(digest) for _ in range(2)]
    torch.distributed.all_gather(all_digests, digest)
    assert torch.equal(*all_digests)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
