"""How sites agree on one model: pseudo-gradients, their average, the outer step, digests, durable state.

The averaging of one federated round, on a whiteboard. Every member i holds the same theta (start of the round) and
its own theta_i (end of the round), and trained n_i tokens:

    delta_i = theta - theta_i                         pseudo-gradient, note the sign
    delta   = sum_i  n_i / sum(n)  x  delta_i         chunk by chunk, added in member order, never in place on theta
    vote    : BLAKE3 digest of delta                  equal at all members, or nothing is committed
    theta  <- outer step (theta, m, delta)            same bits everywhere: separate multiplies and adds

A chunk is a small coroutine; what it does between two messages happens while other chunks are on the wire:

    ring    prepare -> EXCHANGE -> add up my part -> GATHER -> hash        each member adds up one range of each chunk
    star    prepare -> TOTAL by the head node -> hash

    prepare: weight x delta_i (+ what lossy formats left out of earlier averages), encoded for the wire (wire.py)

All members send the same messages in the same order, whatever is ready first. Ring and star add in member order: the same bits.
What a lossy wire leaves out, of a member's part and of the sum, stays with whoever encoded it and goes into its part of the
next average; it counts only once the average is committed. A joiner takes part with weight zero: applying the result makes
it current. theta, theta_i, m are flat fp32 CPU vectors over all parameters (`Flat` says in which order).
"""

import json
import os
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wire import BLOCK, FORMATS, add_up, num_bytes

KEEP_STATES = 2
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}  # safetensors' names
IN_FLIGHT = 6  # chunks under way: while one is waited for, the next is on the wire
PIECE = 1 << 18  # elements that fit a core's cache
STRETCH = 16 << 20  # bytes for which a thread may keep Python's lock: a few milliseconds, else heartbeats would be late


class Flat:
    """The one order in which a model's parameters stand in a flat vector (that of `named_parameters`)."""

    def __init__(self, model: nn.Module):
        self.items = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]
        self.numel = sum(n for _, _, n in self.items)

    def adopt(self, model: nn.Module, flat: Tensor) -> None:
        """From now on the model's parameters live in the flat vector: reading and writing it costs nothing."""
        at = 0
        for (_, shape, n), p in zip(self.items, model.parameters()):
            p.data = flat[at : at + n].view(shape)
            at += n

    def read(self, model: nn.Module, out: Tensor | None = None) -> Tensor:
        """The model's parameters as a flat fp32 CPU vector."""
        out = torch.empty(self.numel) if out is None else out
        at = 0
        for (_, _, n), p in zip(self.items, model.parameters()):
            out[at : at + n].copy_(p.detach().reshape(-1))
            at += n
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Averaging


def chunks(numel: int, chunk_mb: int) -> list[tuple[int, int]]:
    """[start, stop) element ranges of at most chunk_mb MiB of fp32."""
    size = chunk_mb << 18
    return [(a, min(a + size, numel)) for a in range(0, numel, size)]


def zeros(size: int, dtype=np.float32) -> Tensor:
    """A large buffer: the pages of it that are never written take no memory."""
    return torch.from_numpy(np.zeros(size, dtype))


def copy_(into: Tensor, vector: Tensor) -> None:
    """All of a flat CPU vector, as fast as memory allows (twice as fast as Tensor.copy_)."""
    there, here = raw(into), raw(vector)
    for a in range(0, len(here), STRETCH):
        there[a : a + STRETCH] = here[a : a + STRETCH]


def weighted_delta(theta: Tensor, theta_i: Tensor, weight: float, out: Tensor) -> Tensor:
    """weight x (theta - theta_i) into out; weight is applied as the fp32 nearest to it."""
    return torch.sub(theta, theta_i, out=out).mul_(torch.tensor(weight, dtype=torch.float32))


class Alone:
    """The only member: its own part is the sum."""

    bytes = 0

    def reduce(self, index: int, data: Tensor, inbox: Tensor, add_up):
        yield from ()


class Ring:
    """The members of one attempt among themselves, over a gloo group: each adds up one range of every chunk, in member order.

    It sends each range to its owner and gets its own from everyone; then everyone gets each sum from its owner. That
    is what a ring all-reduce moves, 2 (K - 1) / K of the payload each way, in two hops instead of 2 (K - 1).
    """

    def __init__(self, group, rank: int, size: int, timeout_s: float, wire: str):
        self.group, self.rank, self.size, self.timeout = group, rank, size, timedelta(seconds=timeout_s)
        self.block_bytes, self.bytes = FORMATS[wire].block_bytes, 0
        self.others = [(rank + i) % size for i in range(1, size)]

    def reduce(self, index: int, data: Tensor, inbox: Tensor, add_up):
        blocks = len(data) // self.block_bytes
        cuts = [blocks * i // self.size * self.block_bytes for i in range(self.size + 1)]
        ranges = [data[a:b] for a, b in zip(cuts, cuts[1:])]
        mine = ranges[self.rank]
        parts = [mine] * self.size
        for i, other in enumerate(self.others):
            parts[other] = inbox[i * len(mine) : (i + 1) * len(mine)]
        yield self._move(2 * index, [(r, ranges[r]) for r in self.others], [(r, parts[r]) for r in self.others])
        if len(mine):
            add_up(parts, mine, cuts[self.rank])
        yield self._move(2 * index + 1, [(r, mine) for r in self.others], [(r, ranges[r]) for r in self.others])

    def _move(self, tag: int, there: list, here: list):
        """Begin to send and to receive (rank, tensor); returns what waits for it."""
        works = [self.group.recv([t], rank, tag) for rank, t in here if len(t)]
        works += [self.group.send([t], rank, tag) for rank, t in there if len(t)]
        self.bytes += sum(len(t) for _, t in there)
        return lambda: [work.wait(self.timeout) for work in works]


class Star:
    """By way of the head node, which adds up in member order."""

    def __init__(self, link, round_: int, attempt: int, num_chunks: int, timeout_s: float):
        self.link, self.timeout_s, self.bytes = link, timeout_s, 0
        self.header = {"type": "reduce", "round": round_, "attempt": attempt, "of": num_chunks}

    def reduce(self, index: int, data: Tensor, inbox: Tensor, add_up):
        answer = self.link.ask(self.header | {"index": index}, bytes(raw(data)), self.timeout_s, large=True)
        self.bytes += len(data)

        def total():
            raw(data)[:] = answer()[1]

        yield total


def ring_group(store: dist.Store, rank: int, size: int, interface: str, timeout_s: float):
    """A fresh gloo group of the members of one attempt, bound to one network interface, or RuntimeError after `timeout_s`."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s / 5)  # gloo waits five time-outs for each connection (measured)
    options._devices = [dist.ProcessGroupGloo.create_device(interface=interface)]
    return dist.ProcessGroupGloo(store, rank, size, options)


class Averager:
    """A site's part in the averages of its rounds. Its buffers are allocated once, and again when the wire format changes.

    agreed: what the members agreed on, as bytes of the wire. residual: what lossy formats left out of the committed averages,
    (numel,) bf16, made when first needed; next_residual: what it will be if the present average is committed.
    """

    def __init__(self, numel: int, chunk_mb: int):
        self.numel, self.chunks = numel, chunks(numel, chunk_mb)
        self.wire, self.agreed = "", torch.empty(0, dtype=torch.uint8)
        self.residual: Tensor | None = None
        self.next_residual: Tensor | None = None
        room = -(-max(b - a for a, b in self.chunks) // BLOCK) * BLOCK
        self._scratch = [torch.zeros(room) for _ in range(2)]
        self._values = torch.zeros(room)
        self.sent_bytes = 0  # by the last average
        self.took_s = 0.0  # by the last average, but for the wait for the slowest member to begin
        self.rate: float | None = None  # payload bytes per second of waiting in it; None: too little to tell

    def use(self, wire: str) -> None:
        """Lay out the buffers for a wire format."""
        if wire != self.wire:
            self.wire, self.agreed = wire, torch.empty(0, dtype=torch.uint8)
            self.agreed = zeros(num_bytes(wire, self.numel), np.uint8)
            room = num_bytes(wire, len(self._values)) + 1024 * FORMATS[wire].block_bytes  # ranges of up to so many members are uneven
            self._inboxes = [torch.empty(room, dtype=torch.uint8) for _ in range(IN_FLIGHT)]
        if FORMATS[wire].lossy and self.next_residual is None:
            self.restore(torch.zeros(self.numel, dtype=torch.bfloat16) if self.residual is None else self.residual)
        elif not FORMATS[wire].lossy:
            self.next_residual = None

    def average(self, theta: Tensor, theta_i: Tensor | None, weight: float, peers) -> str:
        """The members' weighted average pseudo-gradient into `agreed`; returns its digest.

        theta_i: None for a joiner. peers: Alone, Ring or Star. Raises RuntimeError or ChannelError; theta, theta_i and residual
        are then as they were.
        """
        try:
            return self._average(theta, None if weight == 0.0 else theta_i, weight, peers)
        except RuntimeError as error:  # ChannelError is one, too
            raise error.with_traceback(None)  # else it would keep the group, and so its sockets, alive

    def _average(self, theta: Tensor, theta_i: Tensor | None, weight: float, peers) -> str:
        hashed, running, waiting, waits, began = blake3(), deque(), enumerate(self.chunks), [], time.monotonic()

        def go_on(chunk):  # up to its next message
            if arrived := next(chunk, None):
                running.append((chunk, arrived))

        while True:
            while len(running) < IN_FLIGHT and (following := next(waiting, None)):
                go_on(self._chunk(*following, theta, theta_i, weight, peers, hashed))
            if not running:
                break
            chunk, arrived = running.popleft()
            waits.append(self._wait(arrived))
            go_on(chunk)
        self.sent_bytes, waited_s = peers.bytes, sum(waits[1:])  # the first is for the slowest member to begin
        self.took_s = time.monotonic() - began - sum(waits[:1])
        waited_s = max(waited_s, self.took_s / 2)  # while we compute the link is busy as well: waiting alone would flatter it
        self.rate = len(self.agreed) * (len(waits) - 1) / len(waits) / waited_s if len(waits) > 1 else None
        return hashed.hexdigest()

    def _wait(self, arrived) -> float:
        """Wait for a message; returns the seconds it took."""
        began = time.monotonic()
        arrived()
        return time.monotonic() - began

    def _chunk(self, index: int, span: tuple[int, int], theta, theta_i, weight: float, peers, hashed):
        a, b = span
        step = PIECE if FORMATS[self.wire].lossy else b - a  # many passes: in pieces that stay in the cache
        for first in range(a, b, step):
            self._prepare(first, min(first + step, b), theta, theta_i, weight)
        data = blocks(self.agreed, self.wire, a, b)

        def add(parts: list[Tensor], out: Tensor, at: int) -> None:
            left, first = add_up(self.wire, parts, out, self._scratch), a + at // FORMATS[self.wire].block_bytes * BLOCK
            if left is not None:
                mine = self.next_residual[first : min(first + len(left), b)]
                mine.add_(left[: len(mine)])

        yield from peers.reduce(index, data, self._inboxes[index % IN_FLIGHT], add)
        hashed.update(raw(data))  # chunks come to this in order

    def _prepare(self, a: int, b: int, theta, theta_i, weight: float) -> None:
        """Our part of elements [a, b) as bytes of the wire."""
        format_, data = FORMATS[self.wire], blocks(self.agreed, self.wire, a, b)
        values = self._values[: len(data) // format_.block_bytes * BLOCK] if format_.lossy else data.view(torch.float32)
        values[b - a :].zero_()
        if theta_i is None:
            values.zero_()
        else:
            weighted_delta(theta[a:b], theta_i[a:b], weight, values[: b - a])
        if format_.lossy:
            values[: b - a].add_(self.residual[a:b])
            back = self._scratch[0][: len(values)]
            format_.encode(values, data, back)
            format_.decode(data, back)
            self.next_residual[a:b].copy_(values.sub_(back)[: b - a])

    def kept(self) -> None:
        """The average is committed: what it left out goes into the next one."""
        if FORMATS[self.wire].lossy:
            self.residual, self.next_residual = self.next_residual, self.residual

    def restore(self, residual: Tensor | None) -> None:
        """Continue with a residual of before."""
        self.residual = residual
        self.next_residual = None if residual is None else torch.zeros_like(residual)


def blocks(data: Tensor, wire: str, a: int, b: int) -> Tensor:
    """The bytes of elements [a, b) of a vector on the wire; a is a multiple of BLOCK."""
    return data[num_bytes(wire, a) : num_bytes(wire, b)]


def apply_agreed_(agreed: Tensor, wire: str, theta: Tensor, m: Tensor, how: tuple[str, float, float], also: Tensor | None = None) -> None:
    """The outer step with the agreed bytes, in place, piece by piece. how: outer, lr, momentum. also: gets a copy of the new theta."""
    size = PIECE // 2
    delta, step = torch.empty(size), torch.empty(size)
    for a in range(0, theta.numel(), size):
        b = min(a + size, theta.numel())
        data = blocks(agreed, wire, a, b)
        if FORMATS[wire].lossy:
            FORMATS[wire].decode(data, delta[: num_bytes("fp32", b - a) // 4])
            part = delta[: b - a]
        else:
            part = data.view(torch.float32)[: b - a]
        outer_step_(theta[a:b], m[a:b], part, *how, scratch=step[: b - a])
    if also is not None:
        copy_(also, theta)


def outer_step_(theta: Tensor, m: Tensor, delta: Tensor, outer: str, lr: float, momentum: float, scratch: Tensor | None = None) -> None:
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
    step = torch.mul(m, momentum, out=scratch)
    step.add_(delta)
    step.mul_(lr)
    theta.sub_(step)


def all_finite(flat: Tensor) -> bool:
    """Whether every element is a finite number. One cheap pass: a sum is finite only if all its terms are, and if it is not
    (it may have overflowed) we look closer."""
    return bool(torch.isfinite(flat.sum())) or all(bool(torch.isfinite(part).all()) for part in flat.split(PIECE))


# ---------------------------------------------------------------------------------------------------------------------
# Digests and durable state


def raw(flat: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy."""
    return memoryview(flat.detach().reshape(-1).view(torch.uint8).numpy())


def digest(flat: Tensor) -> str:
    """BLAKE3 of a vector, or of agreed bytes: cryptographic, and five times as fast as SHA-256 here."""
    hashed, data = blake3(), raw(flat)
    for a in range(0, len(data), STRETCH):
        hashed.update(data[a : a + STRETCH])
    return hashed.hexdigest()


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


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """CPU tensors as a safetensors file. Written here, and in stretches, because the library's own writer keeps Python's lock for
    as long as the disk takes: seconds without a heartbeat for a large model. Reading is the library's."""
    header, at = {"__metadata__": metadata}, 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that all are aligned
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            data = raw(tensor)
            for a in range(0, len(data), STRETCH):
                file.write(data[a : a + STRETCH])


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
        """Bytes [start, stop) of theta or m of a listed round (whole elements); None if it is not there."""
        if name not in ("theta", "m") or round_ not in [s["round"] for s in self.manifest] or not self._file(round_).exists():
            return None
        try:
            with safe_open(self._file(round_), framework="pt") as file:
                return bytes(raw(file.get_slice(name)[start // 4 : stop // 4].contiguous()))
        except (OSError, SafetensorError):  # just replaced by a newer one
            return None
