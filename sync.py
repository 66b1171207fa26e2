"""How sites agree on one model: pseudo-gradients, their average, the outer step, digests, durable state.

The averaging of one federated round, on a whiteboard. Every member i holds the same theta (start of the round) and
its own theta_i (end of the round), and trained n_i tokens:

    delta_i = theta - theta_i                         pseudo-gradient, note the sign
    delta   = sum_i  n_i / sum(n)  x  delta_i         all-reduce, chunk by chunk, never in place on theta
    vote    : SHA-256 over the chunks of delta        equal at all members, or nothing is committed
    theta  <- outer step (theta, m, delta)            same bits everywhere: separate multiplies and adds

`ring` reduces between the members over gloo; `star` sends the weighted deltas to the coordinator, which adds them in
member order. With two members both give the same bits. A joiner takes part with weight zero: applying the result
makes it current. All tensors here are flat fp32 CPU vectors over all parameters (`Flat` says in which order).
"""

import hashlib
import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

KEEP_STATES = 2


class Flat:
    """The one order in which a model's parameters stand in a flat vector (that of `named_parameters`)."""

    def __init__(self, model: nn.Module):
        self.items = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]
        self.numel = sum(n for _, _, n in self.items)

    def read(self, model: nn.Module, out: Tensor | None = None) -> Tensor:
        """The model's parameters as a flat fp32 CPU vector."""
        out = torch.empty(self.numel) if out is None else out
        at = 0
        for (_, _, n), p in zip(self.items, model.parameters()):
            out[at : at + n].copy_(p.detach().reshape(-1))
            at += n
        return out

    def write(self, flat: Tensor, model: nn.Module) -> None:
        at = 0
        with torch.no_grad():
            for (_, shape, n), p in zip(self.items, model.parameters()):
                p.copy_(flat[at : at + n].view(shape))
                at += n


# ---------------------------------------------------------------------------------------------------------------------
# Averaging


def chunks(numel: int, chunk_mb: float) -> list[tuple[int, int]]:
    """[start, stop) element ranges of at most chunk_mb MiB of fp32."""
    size = max(1, int(chunk_mb * (1 << 20)) // 4)
    return [(a, min(a + size, numel)) for a in range(0, numel, size)]


def weighted_delta(theta: Tensor, theta_i: Tensor, weight: float, out: Tensor) -> Tensor:
    """weight x (theta - theta_i) into out; weight is applied as the fp32 nearest to it."""
    return torch.sub(theta, theta_i, out=out).mul_(torch.tensor(weight, dtype=torch.float32))


def average(theta: Tensor, theta_i: Tensor | None, weight: float, reduce_chunk, chunk_mb: float, out: Tensor) -> str:
    """The members' weighted average pseudo-gradient into `out` (numel,); returns its digest.

    theta_i: None for a joiner. reduce_chunk(index, chunk) turns a member's chunk into the sum over members, in place.
    """
    hashes = hashlib.sha256()
    for index, (a, b) in enumerate(chunks(theta.numel(), chunk_mb)):
        part = out[a:b]
        if theta_i is None or weight == 0.0:
            part.zero_()
        else:
            weighted_delta(theta[a:b], theta_i[a:b], weight, part)
        reduce_chunk(index, part)
        hashes.update(chunk_hash(part))
    return hashes.hexdigest()


def ring_group(store: dist.Store, rank: int, size: int, interface: str, timeout_s: float):
    """A fresh gloo group of the members of one attempt, bound to one network interface, or RuntimeError after `timeout_s`."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s / 5)  # gloo waits five time-outs for each connection (measured)
    options._devices = [dist.ProcessGroupGloo.create_device(interface=interface)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def ring_reduce(group, timeout_s: float):
    options = dist.AllreduceOptions()
    options.reduceOp, options.timeout = dist.ReduceOp.SUM, timedelta(seconds=timeout_s)

    def reduce_chunk(index: int, part: Tensor) -> None:
        group.allreduce([part], options).wait()

    return reduce_chunk


def alone(index: int, part: Tensor) -> None:
    """One member only: its own part is the sum."""


def star_reduce(link, round_: int, attempt: int, num_chunks: int, timeout_s: float):
    def reduce_chunk(index: int, part: Tensor) -> None:
        header = {"type": "reduce", "round": round_, "attempt": attempt, "index": index, "of": num_chunks}
        _, total = link.request(header, bytes(memoryview(part.numpy())), timeout_s, large=True)
        part.copy_(torch.frombuffer(bytearray(total), dtype=torch.float32))

    return reduce_chunk


def outer_step_(theta: Tensor, m: Tensor, delta: Tensor, outer: str, lr: float, momentum: float) -> None:
    """theta and m to their next round, in place.

    none: theta - delta, plain averaging. nesterov: SGD with Nesterov momentum on the pseudo-gradient, as
    torch.optim.SGD(nesterov=True) does it (DiLoCo, arXiv:2311.08105), in separate multiplies and adds so that every
    host rounds alike.
    """
    if outer == "none":
        theta.sub_(delta)
        return
    m.mul_(momentum)
    m.add_(delta)
    step = m.mul(momentum)
    step.add_(delta)
    step.mul_(lr)
    theta.sub_(step)


# ---------------------------------------------------------------------------------------------------------------------
# Digests and durable state


def raw(flat: Tensor) -> memoryview:
    """The bytes of a flat CPU tensor, without a copy."""
    return memoryview(flat.numpy()).cast("B")


def chunk_hash(part: Tensor) -> bytes:
    return hashlib.sha256(raw(part)).digest()


def digest(flat: Tensor, chunk_mb: float) -> str:
    """SHA-256 over the SHA-256 of each chunk."""
    total = hashlib.sha256()
    for a, b in chunks(flat.numel(), chunk_mb):
        total.update(chunk_hash(flat[a:b]))
    return total.hexdigest()


def fsync_dir(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, write) -> None:
    """write(temporary path), fsync, rename: a reader sees the old file or the whole new one. Raises OSError, and then
    leaves no temporary file."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        write(tmp)
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


class StateFolder:
    """theta_r and m_r of the last rounds on disk: safetensors with a manifest, the last two kept.

    What the manifest says of a state stands in the state's own metadata, too: a manifest that is lost or damaged is made
    again from the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):  # by a crash while writing
            left.unlink()
        self.manifest = self._read_manifest()

    def _read_manifest(self) -> list[dict]:
        path = self.folder / "manifest.json"
        try:
            return [s | {"round": int(s["round"])} for s in json.loads(path.read_text())["states"]]
        except (OSError, ValueError, KeyError, TypeError):
            return [about for file in sorted(self.folder.glob("round-*.safetensors")) if (about := self._about(file))]

    def _about(self, path: Path) -> dict | None:
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
            return about | {"round": int(about["round"])}
        except (OSError, ValueError, KeyError, SafetensorError):
            return None

    def _file(self, round_: int) -> Path:
        return self.folder / f"round-{round_:06d}.safetensors"

    def save(self, round_: int, theta: Tensor, m: Tensor, facts: dict) -> None:
        """facts: str -> str, what the manifest says of this state. Raises OSError; what was there before then still is."""
        about = {"round": str(round_)} | facts
        write_durably(self._file(round_), lambda tmp: save_file({"theta": theta, "m": m}, tmp, metadata=about))
        kept = [s for s in self.manifest if s["round"] < round_][-(KEEP_STATES - 1) :]
        manifest = kept + [{"round": round_} | facts]
        text = json.dumps({"states": manifest}, indent=1)
        write_durably(self.folder / "manifest.json", lambda tmp: tmp.write_text(text))
        self.manifest = manifest
        for path in self.folder.glob("round-*.safetensors"):
            if path not in [self._file(s["round"]) for s in self.manifest]:
                path.unlink()

    def load(self, round_: int) -> tuple[Tensor, Tensor]:
        """theta and m of a round. Raises ValueError if the file is not there or cannot be read."""
        try:
            with safe_open(self._file(round_), framework="pt") as file:
                return file.get_tensor("theta"), file.get_tensor("m")
        except (OSError, SafetensorError) as error:
            raise ValueError(str(error).splitlines()[0]) from None

    def forget(self, round_: int) -> None:
        """A state is damaged: it is neither listed nor served."""
        self.manifest = [s for s in self.manifest if s["round"] != round_]

    def read(self, round_: int, name: str, start: int, stop: int) -> bytes | None:
        """Elements [start, stop) of theta or m of a listed round as raw bytes; None if it is not there."""
        if name not in ("theta", "m") or round_ not in [s["round"] for s in self.manifest] or not self._file(round_).exists():
            return None
        with safe_open(self._file(round_), framework="pt") as file:
            return bytes(raw(file.get_slice(name)[start:stop].contiguous()))
