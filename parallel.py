"""The ranks of one site: how rank 0 reaches the others, and how they hold one model together.

torchrun starts them (`--nproc_per_node`, `--nnodes`); each trains its rows of every batch. Rank 0 alone speaks to the
coordinator and holds theta as a flat CPU vector (replica.py); this file takes that vector to every rank's parameters and
back. What the ranks do, and on whose word, is shard.py's. Words go over gloo on the CPU, so that they wait for no GPU;
gradients and parameters over NCCL on GPUs.

    ddp     every rank holds the whole model; gradients are averaged while the backward pass runs
    fsdp    every rank holds 1/N of every parameter, gradient and optimizer state (FSDP2, block by block)

Either way Muon's work is divided by matrices (SharedMuon).
"""

import json
import os
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import devices
import sync
from config import BadInput
from model import GPT, compile_

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
WORD_BYTES = 4096  # what one broadcast carries; longer words take a second one
WORD_TIMEOUT = timedelta(days=1)  # the others wait for rank 0's next word while it downloads, or averages over a slow link
STEP_TIMEOUT = timedelta(minutes=30)  # of what all ranks are about to do; the first step may have to wait for compilers


class Ranks:
    """This process among those of its site. One process alone needs no torchrun and no process group."""

    def __init__(self, kind: str, rows: int):
        """kind: cpu | cuda (each rank takes the GPU of its local rank) | cuda:N. rows: of a step, which the ranks share. Raises
        BadInput."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local, on_node = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.num_nodes, self.leads_node = self.size // on_node, local == 0  # one rank of each node reads its meters
        if rows % self.size:
            raise BadInput(f"{self.size} ranks (nodes x --nproc_per_node) must divide the {rows} rows of a step")
        self.device = torch.device(kind if ":" in kind or kind == "cpu" else f"{kind}:{local}")
        self.node_devices = [self.device] if ":" in kind or kind == "cpu" else [torch.device(kind, i) for i in range(on_node)]
        if self.device.type == "cuda":
            if (last := self.node_devices[-1].index) >= torch.cuda.device_count():
                raise BadInput(f"device={kind}: torch sees {torch.cuda.device_count()} GPUs here, and rank {last} of this node wants "
                               f"GPU {last}; start fewer ranks, or set sites.NAME.device=cpu")  # fmt: skip
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=STEP_TIMEOUT)
            self._words = dist.new_group(backend="gloo", timeout=WORD_TIMEOUT)

    def tell(self, word, timeout: timedelta = WORD_TIMEOUT) -> None:
        """Rank 0: say a word, any JSON, to the others, who `hear` it. Raises RuntimeError if one of them is gone, or does not hear
        it in time."""
        assert self.rank == 0, "only rank 0 has a say"
        if self.size == 1:
            return
        data = json.dumps(word).encode()
        first = len(data).to_bytes(8, "little") + data[: WORD_BYTES - 8]
        self._pass_on(torch.frombuffer(bytearray(first.ljust(WORD_BYTES, b"\0")), dtype=torch.uint8), timeout)
        if len(data) > WORD_BYTES - 8:
            self._pass_on(torch.frombuffer(bytearray(data[WORD_BYTES - 8 :]), dtype=torch.uint8), timeout)

    def hear(self):
        """The other ranks: the next word of rank 0, however long it takes. Raises RuntimeError if rank 0 is gone."""
        first = self._pass_on(torch.zeros(WORD_BYTES, dtype=torch.uint8))
        size = int.from_bytes(first[:8], "little")
        more = size - (WORD_BYTES - 8)
        rest = self._pass_on(torch.zeros(more, dtype=torch.uint8)) if more > 0 else b""
        return json.loads((first[8:] + rest)[:size])

    def _pass_on(self, data: Tensor, timeout: timedelta = WORD_TIMEOUT) -> bytes:
        dist.broadcast(data, 0, group=self._words, async_op=True).wait(timeout)
        return bytes(data.numpy())

    def sum(self, values: list[float]) -> list[float]:
        """Numbers on the CPU added up over the ranks, in double precision, the same on all."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all(self, yes: bool) -> bool:
        return self.sum([not yes])[0] == 0

    def share(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's named tensors on every rank, on the device; the others give None."""
        if self.size == 1:
            return tensors
        if tensors is not None:
            self.tell([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()])
        else:
            tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, shape, dtype in self.hear()}
        out = {name: t.to(self.device) for name, t in tensors.items()}
        for t in out.values():
            dist.broadcast(t, 0)
        return out

    def mean_(self, x: Tensor) -> Tensor:
        """A small tensor on the device, averaged over the ranks in place; nothing waits for it."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x


class Held:
    """The model as this rank holds it, in parameters that an optimizer can step.

    flat: the vector in which the parameters live, where they are whole and on the CPU: reading and writing it costs nothing. Else
    None, and `read` and `write` copy. Both are collectives: rank 0 gives its vector, the others None.
    """

    def __init__(self, model: GPT, ranks: Ranks, parallel: str = "ddp", dtype: str = "float32", compiled: bool = False,
                 checkpointing: bool = False):  # fmt: skip
        self.model, self.ranks, self.layout = model.to(ranks.device), ranks, sync.Flat(model)
        self.sharded = ranks.size > 1 and parallel == "fsdp"
        self.dtype = torch.bfloat16 if devices.dtype_on(ranks.device, dtype) == "bfloat16" else torch.float32
        self.flat: Tensor | None = None
        if ranks.device.type == "cpu" and not self.sharded:
            self.flat = self.layout.read(model)
            self.layout.adopt(model, self.flat)
        model.checkpointing = checkpointing
        if compiled:
            compile_(model)
        self.forward = model
        if self.sharded:
            self._shard()
        elif ranks.size > 1:
            self.forward = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
            self.forward.broadcast_buffers = False  # as an argument torch 2.13 warns of it, and 2.11 knows no other

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # here, as they take half a second that others need not wait
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.size,))
        cast = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*self.model.blocks, self.model.head):  # these would be cast by autocast anyway: half the bytes to gather
            fully_shard(part, mesh=mesh, mp_policy=cast)
        fully_shard(self.model, mesh=mesh)

    def autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def gradient(self, ids: Tensor, targets: Tensor, device_batch: int) -> Tensor:
        """Adds the gradient of the mean loss over all ranks' rows to the parameters' .grad, in pieces of at most device_batch
        rows; returns that loss on the device, nats per token, without waiting for it."""
        rows, total = len(ids), torch.zeros((), device=self.ranks.device)
        pieces = list(zip(ids.split(device_batch), targets.split(device_batch)))
        for i, (x, y) in enumerate(pieces):
            whole = self.sharded or self.forward is self.model or i == len(pieces) - 1
            with nullcontext() if whole else self.forward.no_sync():  # DDP: one average for all pieces
                with self.autocast():
                    loss = self.forward(x, y) * (len(x) / rows)
                loss.backward()
            total += loss.detach()
        return self.ranks.mean_(total)

    def reshard(self) -> None:
        """After a forward pass that no backward pass follows: until one does, FSDP2's root keeps its own parameters whole, and
        nobody else here knows them so."""
        if self.sharded:
            self.model.reshard()

    # -- flat vectors -------------------------------------------------------------------------------------------------

    def new_vector(self) -> Tensor:
        """For rank 0: a flat fp32 CPU vector of all parameters, or the very one in which they live."""
        return torch.zeros(self.layout.numel, pin_memory=self.ranks.device.type == "cuda") if self.flat is None else self.flat

    def read(self, into: Tensor | None) -> None:
        """All parameters into rank 0's vector."""
        if self.flat is not None or (into is None and not self.sharded):
            return
        at = 0
        for (_, _, n), p in zip(self.layout.items, self.model.parameters()):
            whole = p.full_tensor() if self.sharded else p
            if into is not None:
                into[at : at + n].copy_(whole.detach().reshape(-1), non_blocking=True)
            at += n
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def write(self, vector: Tensor | None) -> None:
        """Rank 0's vector into the parameters of all ranks."""
        if self.flat is not None:
            if self.ranks.size > 1:
                dist.broadcast(self.flat, 0)
            return
        at = 0
        for (_, shape, n), p in zip(self.layout.items, self.model.parameters()):
            whole = torch.empty(shape, device=self.ranks.device) if self.sharded else p.data
            if vector is not None:
                whole.copy_(vector[at : at + n].view(shape), non_blocking=True)
            if self.ranks.size > 1:
                dist.broadcast(whole, 0)
            if self.sharded:
                mine = whole.chunk(self.ranks.size)  # as FSDP2 cuts: the last ranks may have fewer rows, or none
                if self.ranks.rank < len(mine):
                    p.to_local().copy_(mine[self.ranks.rank])
            at += n
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()  # rank 0's vector may change now

    def copy(self) -> list[Tensor]:
        """This rank's parameters as they are."""
        return [local(p).clone() for p in self.model.parameters()]

    @torch.no_grad()
    def put_back(self, copied: list[Tensor]) -> None:
        for p, was in zip(self.model.parameters(), copied):
            local(p).copy_(was)


def local(p: Tensor) -> Tensor:
    """What this rank holds of a parameter, gradient or optimizer state, as a plain tensor on the same memory."""
    p = p.detach()
    return p.to_local() if is_cut(p) else p


def is_cut(p: Tensor) -> bool:
    """Whether FSDP2 has made it a DTensor."""
    return hasattr(p, "to_local")


def like(p: Tensor, shard: Tensor) -> Tensor:
    """This rank's shard of something that is cut as p is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard.to(p.device), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


TOGETHER = 1 << 20  # elements: 4 MB of fp32, which stay in a cache


class Muon(torch.optim.Muon):
    """The same, on a CPU quicker. Newton-Schulz iterations are in bfloat16 only where the processor multiplies it, small matrices of
    one shape together; elsewhere in fp32 and one by one: torch's substitute for bfloat16 takes five to seven times as long."""

    @torch.no_grad()
    def step(self) -> None:
        device = self.param_groups[0]["params"][0].device
        if device.type != "cpu":
            super().step()
            return
        dtype = torch.bfloat16 if devices.multiplies_bfloat16(device) else torch.float32
        for group in self.param_groups:
            limit = TOGETHER if dtype == torch.bfloat16 else 1  # MKL multiplies fp32 no faster in batches
            for alike in same_shape([p for p in group["params"] if p.grad is not None], limit):
                ahead = []
                for p in alike:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                    buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    ahead.append(p.grad.lerp(buffer, group["momentum"]).to(dtype))
                updates = orthogonal(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
                scale = max(1.0, alike[0].shape[0] / alike[0].shape[1]) ** 0.5  # adjust_lr_fn="original"
                for p, update in zip(alike, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def same_shape(params: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Groups of one shape, each of at most `limit` elements, or of one matrix."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    sizes = {shape: max(1, limit // shape.numel()) for shape in by_shape}
    return [ps[i : i + sizes[shape]] for shape, ps in by_shape.items() for i in range(0, len(ps), sizes[shape])]


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(k, m, n) -> (k, m, n): singular values near 1, by Newton-Schulz iterations of degree five (Jordan et al., Muon, 2024)."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class SharedMuon:
    """Muon, its work shared by the ranks of a site.

    Newton-Schulz needs whole matrices, so each matrix has one rank that keeps its momentum and makes its update. Matrices of
    one shape take turns, as many in a turn as there are ranks: the owners get the gradients (DDP: they have them; FSDP2: an
    all-to-all of the shards), step at the same time, and hand out the updates the same way. The updates are made on stand-ins
    that start from zero, with a learning rate of 1; rate and weight decay come in where they are added to the parameters.
    """

    def __init__(self, params: list[nn.Parameter], rank: int, size: int):
        self.rank, self.size = rank, size
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        self.turns = [ps[i : i + size] for ps in by_shape.values() for i in range(0, len(ps), size)]
        self.mine = [nn.Parameter(torch.zeros(t[0].shape, device=t[0].device)) if rank < len(t) else None for t in self.turns]
        owned = [p for p in self.mine if p is not None] or [nn.Parameter(torch.zeros(1, 1))]
        self.muon = Muon(owned, lr=1.0, weight_decay=0.0, nesterov=True, adjust_lr_fn="original")
        self.param_groups = [{"params": params, "lr": 0.0, "momentum": 0.95, "weight_decay": 0.0}]

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        self.muon.param_groups[0]["momentum"] = group["momentum"]
        for turn, own in zip(self.turns, self.mine):
            grad = self._collect([p.grad for p in turn])
            if own is not None:
                own.zero_()
                own.grad = grad
        self.muon.step()
        for turn, own in zip(self.turns, self.mine):
            for p, update in zip(turn, self._hand_out(turn, own)):
                p = local(p)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=group["lr"])
            if own is not None:
                own.grad = None

    def _rows(self, matrix: Tensor) -> list[int]:
        """How many rows each rank holds of a matrix that FSDP2 has cut."""
        share = -(-matrix.shape[0] // self.size)
        return [max(0, min(share, matrix.shape[0] - share * rank)) for rank in range(self.size)]

    def _collect(self, grads: list[Tensor]) -> Tensor | None:
        """The gradients of one turn -> the whole one that is ours."""
        if not is_cut(grads[0]):
            return grads[self.rank] if self.rank < len(grads) else None
        rows, width, there = self._rows(grads[0]), grads[0].shape[1], self.rank < len(grads)
        send = torch.cat([local(g).reshape(-1) for g in grads])
        sizes_out = [rows[self.rank] * width if rank < len(grads) else 0 for rank in range(self.size)]
        sizes_in = [n * width if there else 0 for n in rows]
        whole = send.new_empty(sum(sizes_in))
        dist.all_to_all_single(whole, send, sizes_in, sizes_out)
        return whole.view(-1, width) if there else None

    def _hand_out(self, turn: list[nn.Parameter], own: nn.Parameter | None) -> list[Tensor]:
        """Our whole update -> what this rank needs of each update of the turn."""
        matrix, width = turn[0], turn[0].shape[1]
        if not is_cut(matrix):
            whole = matrix.new_empty(self.size * matrix.shape[0], width)
            all_gather(whole, torch.zeros_like(matrix) if own is None else own.detach())
            return list(whole.view(self.size, -1, width)[: len(turn)])
        rows, there = self._rows(matrix), own is not None
        sizes_out = [n * width if there else 0 for n in rows]
        sizes_in = [rows[self.rank] * width if rank < len(turn) else 0 for rank in range(self.size)]
        send = own.detach().reshape(-1) if there else local(matrix).new_empty(0)
        here = send.new_empty(sum(sizes_in))
        dist.all_to_all_single(here, send, sizes_in, sizes_out)
        return list(here.view(len(turn), rows[self.rank], width))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self) -> dict:
        return self.muon.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state)
