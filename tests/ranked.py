"""A site's ranks without a site: started by torchrun, each rank trains its rows of the same batches; rank 0 prints what came out.

    torchrun --nproc_per_node=N tests/ranked.py      one JSON object: PARALLEL-OPTIMIZER -> losses, digests

Neither the widths nor the vocabulary can be divided by 4, so that FSDP2's shards are uneven.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sync
from config import Optim
from model import GPT, Shape
from optim import Inner, schedule
from parallel import Held, Ranks

SHAPE = Shape(depth=2, width=30, heads=3, kv_heads=1, seq_len=16, vocab=50)
ROWS, DEVICE_BATCH, STEPS, SAVED_AT = 8, 2, 50, 46


def batch(step: int) -> torch.Tensor:
    """(ROWS, seq_len + 1) tokens that can be learnt: a walk with small steps."""
    g = torch.Generator().manual_seed(step)
    return torch.randint(1, 4, (ROWS, SHAPE.seq_len + 1), generator=g).cumsum(1) % SHAPE.vocab


def train(ranks: Ranks, parallel: str, matrices: str) -> dict:
    optim, losses = Optim(matrices=matrices, matrix_lr=0.02 if matrices == "muon" else 0.003, embedding_lr=0.05, weight_decay=0.1), []
    held = Held(GPT(SHAPE).init_weights(1), ranks, parallel)
    inner = Inner(held.model, optim, ranks)

    def steps(first: int, stop: int) -> list[float]:
        out, mine = [], ROWS // ranks.size
        for step in range(first, stop):
            ids = batch(step)[ranks.rank * mine : (ranks.rank + 1) * mine]
            inner.set(schedule(step, STEPS, 1, optim))
            out.append(held.gradient(ids[:, :-1], ids[:, 1:], DEVICE_BATCH).item())
            inner.step()
            inner.zero_grad()
        return out

    vector = held.new_vector() if ranks.rank == 0 else None

    def digest() -> str | None:
        held.read(vector)
        return sync.digest(vector) if ranks.rank == 0 else None

    losses += steps(0, SAVED_AT)
    saved, state = digest(), {name: t.clone() for name, t in inner.tensors().items()}
    at_saved = vector.clone() if ranks.rank == 0 else None
    losses += steps(SAVED_AT, STEPS)
    end = digest()
    if ranks.rank == 0:  # back to where we were, by way of the flat vector and the saved state
        vector.copy_(at_saved)
    held.write(vector)
    back = digest()
    inner = Inner(held.model, optim, ranks)
    inner.load(state)
    again = steps(SAVED_AT, STEPS)
    return {"losses": losses, "again": again, "saved": saved, "back": back, "end": end, "end again": digest()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = Ranks("cpu", ROWS)
    kinds = [(p, m) for p in (("ddp", "fsdp") if ranks.size > 1 else ("ddp",)) for m in ("adamw", "muon")]
    result = {f"{p}-{m}": train(ranks, p, m) for p, m in kinds}
    long = "x" * 10_000  # a word longer than one broadcast
    if ranks.rank == 0:
        ranks.tell(long)
    else:
        assert ranks.hear() == long
    assert ranks.sum([1.0, float(ranks.rank)]) == [ranks.size, ranks.size * (ranks.size - 1) / 2]
    if ranks.rank == 0:
        print(json.dumps(result), flush=True)
    os._exit(0)  # a process that lost a gloo peer can abort in its exit handlers
