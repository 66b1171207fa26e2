"""A site's rank on a GPU that is not there: builds a Shard, trains two batches, measures, and says where it has waited for the GPU.

    python tests/on_cuda.py SPOIL CONFIG [key=value ...]        SPOIL: none, or what the test must notice: item | copy | device

Prints {"build": {place: times}, "write": ..., "step": ..., "evaluate": ..., "read": ...}: waits.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import fake_cuda  # noqa: E402

fake_cuda.pretend()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402

import config  # noqa: E402
from data import Corpus  # noqa: E402
from optim import schedule  # noqa: E402
from parallel import Held, Ranks  # noqa: E402
from shard import Shard  # noqa: E402


def main(argv: list[str]) -> int:
    spoil, cfg = argv[0], config.load(argv[1:])
    ranks = config.num_ranks(cfg.sites[cfg.site])
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)})
    Ranks.tell = lambda self, word, timeout=None: None  # over gloo, whose other end is not there
    Ranks.sum = lambda self, values: values
    Corpus._pair = with_data(Corpus._pair)
    waits = {}
    with fake_cuda.Machine(ranks) as machine:
        shard = Shard(cfg)

        def noted(name: str, work, *args, **own):
            machine.waits.clear()
            out = work(*args, **own)
            waits[name] = Counter(machine.waits)
            return out

        noted("build", shard.build)
        vector = shard.held.new_vector()
        noted("write", shard.write, vector=vector)
        shard.new_inner()
        if spoil != "none":
            spoil_(shard.held, spoil)
        parts = [[first, first + shard.rows // 2, *schedule(first, 100, 1, cfg.optim)] for first in (0, shard.rows // 2)]
        losses = noted("step", lambda: [shard.step(batch, [batch + 1], parts) for batch in (0, 1)])
        assert all(loss.device.type == "cuda" for loss in losses)
        assert {p.device.type for p in shard.held.model.parameters()} == {"cuda"}
        noted("evaluate", shard.evaluate, cfg.data.val_tokens)
        noted("read", shard.read, into=vector)
    print(json.dumps(waits))
    return 0


def with_data(read):
    """What it reads has data even where nothing else has: a site's feed reads in a thread of its own, evaluation does not."""

    def call(*args):
        with unset_fake_temporarily():
            return read(*args)

    return call


def spoil_(held: Held, how: str) -> None:
    """What nobody should do in a step."""
    gradient = held.gradient

    def spoilt(ids, targets, device_batch):
        loss = gradient(ids, targets, device_batch)
        if how == "item":
            loss.item()
        elif how == "copy":
            loss = loss + torch.zeros(()).to(loss.device)
        return loss

    held.gradient = spoilt
    if how == "device":
        held.model.cos = held.model.cos.cpu()


if __name__ == "__main__":
    config.command(main)
