"""The inner optimizer and its one schedule.

Muon for the matrices of the blocks, AdamW for embeddings, head and scalars, as in nanochat. We use
`torch.optim.Muon`; nanochat's own is a variant of it (later versions add a variance-normalised step), so curves agree in
shape, not in digits. How several ranks share its work is parallel.py's.

The outer step, which joins sites, lives in sync.py: it is part of the protocol.
"""

from typing import NamedTuple

import torch

from model import GPT
from parallel import Muon, Ranks, SharedMuon, is_cut, like, local

ADAM_EPS = 1e-10  # nanochat; torch's 1e-8 is not small beside its tiny second moments


class Point(NamedTuple):
    """What the schedule says at one position of the run."""

    lr_scale: float
    muon_momentum: float
    weight_decay_scale: float


def schedule(position_tokens: float, budget_tokens: int, tokens_per_step: int, optim) -> Point:
    """Learning rate, Muon momentum and weight decay at a position, clamped to [0, budget].

    Warm-up over the first `warmup`, warm-down to `final_lr` over the last `warmdown` of the budget (shares);
    momentum rises over the first `muon_momentum_steps` steps; weight decay falls linearly to 0 (nanochat).
    """
    progress = min(max(position_tokens / budget_tokens, 0.0), 1.0)
    scale = 1.0
    if optim.warmup > 0 and progress < optim.warmup:
        scale = progress / optim.warmup
    elif optim.warmdown > 0 and progress > 1.0 - optim.warmdown:
        left = (1.0 - progress) / optim.warmdown
        scale = left + (1.0 - left) * optim.final_lr
    low, high = optim.muon_momentum
    rise = min(max(position_tokens, 0.0) / (max(optim.muon_momentum_steps, 1) * tokens_per_step), 1.0)
    return Point(scale, low + rise * (high - low), 1.0 - progress)


class Inner:
    """Muon and AdamW as one optimizer whose settings follow `schedule`. ranks: who shares the model, if not this process alone."""

    def __init__(self, model: GPT, optim, ranks: Ranks | None = None):
        width_scale = (model.shape.width / 768) ** -0.5  # nanochat tuned the AdamW rates at width 768
        adam = [
            {"params": [model.embed.weight], "base_lr": optim.embedding_lr * width_scale},
            {"params": [model.head.weight], "base_lr": optim.unembedding_lr * width_scale},
        ]
        scalars = [p for p in (model.residual, model.x0) if p is not None]
        if scalars:
            adam.append({"params": scalars, "base_lr": optim.scalar_lr})
        matrices = list(model.blocks.parameters())
        if optim.matrices == "adamw":
            adam.append({"params": matrices, "base_lr": optim.matrix_lr})
        fused = matrices[0].device.type == "cuda"
        self.adam = torch.optim.AdamW(adam, lr=0.0, betas=tuple(optim.betas), eps=ADAM_EPS, weight_decay=0.0, fused=fused)
        self.muon = None
        if optim.matrices == "muon" and ranks and ranks.size > 1:
            self.muon = SharedMuon(matrices, ranks.rank, ranks.size)
        elif optim.matrices == "muon":
            self.muon = Muon(matrices, lr=0.0, weight_decay=0.0, nesterov=True, adjust_lr_fn="original")
        self.matrices["base_lr"] = optim.matrix_lr
        self.weight_decay = optim.weight_decay
        self._all = {name: o for name, o in (("adam", self.adam), ("muon", self.muon)) if o}

    @property
    def matrices(self) -> dict:
        """The parameter group of the blocks' matrices."""
        return self.muon.param_groups[0] if self.muon else self.adam.param_groups[-1]

    def set(self, point: Point) -> None:
        for optimizer in self._all.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * point.lr_scale
        self.matrices["weight_decay"] = self.weight_decay * point.weight_decay_scale
        if self.muon:
            self.matrices["momentum"] = point.muon_momentum

    def step(self) -> None:
        for optimizer in self._all.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._all.values():
            optimizer.zero_grad(set_to_none=True)

    # State as flat named tensors, so that it can be kept in safetensors and never needs unpickling.
    def tensors(self) -> dict[str, torch.Tensor]:
        """What this rank holds, on whatever device it is."""
        out = {}
        for name, optimizer in self._all.items():
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    out[f"{name}.{index}.{key}"] = local(torch.as_tensor(value))
        return out

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """What `tensors` gave at this rank of as many."""
        for name, optimizer in self._all.items():
            full = optimizer.state_dict()
            full["state"] = {}
            for key, value in tensors.items():
                owner, index, field = key.split(".")
                if owner == name:
                    full["state"].setdefault(int(index), {})[field] = value
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if name == "adam" and is_cut(params[0]):
                for index, state in full["state"].items():
                    full["state"][index] = {k: like(params[index], v) if v.dim() else v for k, v in state.items()}
            optimizer.load_state_dict(full)
