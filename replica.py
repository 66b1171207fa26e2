"""The state of the run as one site holds it: model, theta, outer momentum, inner optimizer, and their way to and from
the coordinator and the site's own disk.

theta is the start of the open round and stays untouched until that round is committed; the model's parameters move on
from it. theta, m and the two buffers are flat fp32 CPU vectors (see sync.py); on several ranks each holds all of them,
rank 0 speaks to the coordinator and shares what it learns.
"""

import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import sync
from channel import ChannelError, Link
from model import GPT, Shape
from optim import Inner
from report import Lines

KEEP_INNER = 2
TRIES = 3  # downloads of a state before we give up on it


class Mismatch(RuntimeError):
    """What arrived, or what was committed, is not what it must be."""


class Replica:
    def __init__(self, cfg, shape: Shape, device: torch.device, link: Link | None, rank: int, ranks: int, folder: Path, run_id: str):
        self.cfg, self.shape, self.device, self.link = cfg, shape, device, link
        self.rank, self.ranks, self.folder, self.run_id = rank, ranks, folder, run_id
        self.chunk_mb = cfg.sync.chunk_mb
        self.round = -1  # whose start state theta and m are; -1: none
        self.digest = ""
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.held = Lines(folder / "held.jsonl")
        self.download_s = 0.0  # what the last download took
        self.mean_of = -1  # the round whose committed average `mean` still is
        self.model: GPT | None = None
        self.inner: Inner | None = None
        self._background: list[threading.Thread] = []

    # -- from and to the coordinator ----------------------------------------------------------------------------------

    def download(self, round_: int, numel: int, digest: str | None) -> bool:
        """theta and m of a round from the coordinator, at rank 0, unless we hold them already. False if the coordinator fell
        silent, no longer has that round, or TRIES downloads arrived with another digest."""
        if self.model is None:
            self.model = GPT(self.shape).to(self.device)
            self.flat = sync.Flat(self.model)
            self.theta, self.m, self.theta_i, self.mean = (torch.zeros(self.flat.numel) for _ in range(4))
        if self.flat.numel != numel:
            raise Mismatch(f"the model here has {self.flat.numel} parameters, the run's {numel}")
        self.settle()
        self.download_s = 0.0  # nothing was needed
        if self.rank or (round_ == self.round and digest == self.digest == sync.digest(self.theta, self.chunk_mb)):
            return True
        self.round = self.mean_of = -1
        for _ in range(TRIES):
            began = time.monotonic()
            try:
                self._download(round_, "theta", self.theta)
                self._download(round_, "m", self.m)
            except ChannelError:
                return False
            self.download_s = time.monotonic() - began
            self.digest = sync.digest(self.theta, self.chunk_mb)
            if digest is None or self.digest == digest:
                return True
            print(f"round {round_} arrived with digest {self.digest[:12]}, the coordinator's is {digest[:12]}; again", flush=True)
        return False

    def take(self, round_: int, own_disk: bool) -> bool:
        """What was downloaded becomes the start of our next round, on all ranks.

        The inner optimizer's state of that very round is taken from our own disk if it survived there and `own_disk`
        says it may (a resume, or keep_disk); True if so. Else it starts fresh.
        """
        self._share()
        self.round, self.digest = round_, sync.digest(self.theta, self.chunk_mb)
        self._log("fetch")
        self.restore()
        if self.inner is not None:
            return False
        self.inner = Inner(self.model, self.cfg.optim)
        return own_disk and self._load_inner()

    def _download(self, round_: int, name: str, vector: torch.Tensor) -> None:
        for a, b in sync.chunks(vector.numel(), self.chunk_mb):
            header, data = self.link.request({"type": "chunk", "round": round_, "name": name, "start": a, "stop": b}, large=True)
            if not header["found"]:
                raise ChannelError(f"the coordinator has no {name[:12]} of round {round_}")
            vector[a:b] = torch.frombuffer(bytearray(data), dtype=torch.float32)

    def receive(self, digest: str) -> bool:
        """The result the others agreed on, into `mean`; False if it did not arrive whole."""
        try:
            self._download(self.round, digest, self.mean)
        except ChannelError:
            return False
        return sync.digest(self.mean, self.chunk_mb) == digest

    def give(self, attempt: int, digest: str) -> None:
        """Send the result in `mean` up, for those who lack it."""
        self.upload({"result": self.mean}, {"attempt": attempt, "digest": digest})

    def resend(self) -> None:
        """Send the state we hold once more: the committed average that made it, if we still have it, or the state itself."""
        self.settle()
        self.upload({"delta": self.mean} if self.mean_of == self.round - 1 else {"theta": self.theta, "m": self.m})

    def upload(self, parts: dict[str, torch.Tensor], about: dict | None = None) -> None:
        """Send vectors that make up the state we now hold, in the background, chunk by chunk."""
        if self.rank:
            return
        round_, about = self.round, {"digest": self.digest} | (about or {})
        todo = [(n, v, a, b) for n, v in parts.items() for a, b in sync.chunks(v.numel(), self.chunk_mb)]

        def send():
            try:
                self.link.request({"type": "ping"})  # what we said before is heard before
                for i, (name, vector, a, b) in enumerate(todo):
                    header = {"type": "upload", "round": round_, "name": name, "start": a, "stop": b, "last": i == len(todo) - 1}
                    self.link.request(header | about, bytes(sync.raw(vector[a:b])), large=True)
            except ChannelError:
                return  # the coordinator is gone; when it is back it asks for what it lacks

        self._in_background(send)

    def _share(self) -> None:
        """Rank 0's theta and m on all ranks."""
        if self.ranks > 1:
            for vector in (self.theta, self.m):
                there = vector.to(self.device)
                dist.broadcast(there, 0)
                vector.copy_(there)

    # -- round by round -----------------------------------------------------------------------------------------------

    def new_inner(self) -> None:
        self.inner = Inner(self.model, self.cfg.optim)

    def restore(self) -> None:
        """The model's parameters back to theta."""
        self.flat.write(self.theta, self.model)

    @contextmanager
    def at_theta(self):
        """For a while, the model is theta again."""
        moved = self.flat.read(self.model)
        self.restore()
        yield
        self.flat.write(moved, self.model)

    def freeze(self) -> bool:
        """theta_i from the model; False if it holds anything that is not a finite number."""
        self.flat.read(self.model, self.theta_i)
        return bool(torch.isfinite(self.theta_i).all())

    def average(self, weight: float, reduce_chunk, stepped: bool) -> str:
        """Our weighted pseudo-gradient, reduced over the members, into `mean`; returns the digest to vote for."""
        self.settle()  # `mean` may still be on its way to the coordinator
        self.mean_of = -1
        return sync.average(self.theta, self.theta_i if stepped else None, weight, reduce_chunk, self.chunk_mb, self.mean)

    def apply(self, result: str) -> None:
        """The outer step with the committed average (digest `result`), the same bits at every member."""
        if self.rank == 0:
            self._outer_step()
        self._share()
        self.restore()
        self.mean_of = self.round
        self._now_holds(self.round + 1, "commit", result)

    def take_own(self) -> dict[str, torch.Tensor]:
        """A local round's result becomes theta: as it is (m = 0), or by an outer step of its own (`rounds.local`).
        Returns the vectors the coordinator needs."""
        self.settle()
        self.mean_of = -1
        if self.cfg.rounds.local == "outer":
            torch.sub(self.theta, self.theta_i, out=self.mean)
            self._outer_step()
            self.restore()
            parts = {"theta": self.theta, "m": self.m}
        else:
            self.theta.copy_(self.theta_i)
            self.m.zero_()
            parts = {"theta": self.theta}
        self._now_holds(self.round + 1, "local")
        return parts

    def _outer_step(self) -> None:
        r = self.cfg.rounds
        sync.outer_step_(self.theta, self.m, self.mean, r.outer, r.outer_lr, r.outer_momentum)

    def _now_holds(self, round_: int, how: str, result: str = "") -> None:
        self.round, self.digest = round_, sync.digest(self.theta, self.chunk_mb)
        self._log(how, result)
        self._save_inner()

    def _log(self, how: str, result: str = "") -> None:
        """One line for each state we come to hold: evidence for `coordinator.py check`."""
        if self.rank == 0:
            self.held.add({"run_id": self.run_id, "round": self.round, "how": how, "digest": self.digest, "result": result})

    @property
    def num_chunks(self) -> int:
        return len(sync.chunks(self.flat.numel, self.chunk_mb))

    def drop(self, keep_disk: bool) -> None:
        """What was on the machine is gone."""
        self.settle()
        self.model = self.inner = self.theta = self.m = self.theta_i = self.mean = None
        self.round = self.mean_of = -1
        if not keep_disk and self.rank == 0:
            for path in self._inner_files():
                path.unlink()

    # -- our own disk -------------------------------------------------------------------------------------------------

    def _inner_file(self, round_: int) -> Path:
        return self.folder / f"inner-{round_:06d}.safetensors"

    def _inner_files(self) -> list[Path]:
        return sorted(self.folder.glob("inner-*.safetensors"))

    def _save_inner(self) -> None:
        """Inner optimizer state and RNG of the round we now hold, in the background, so that a resume is exact. It is the
        same on all ranks: rank 0 writes it."""
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().clone() for k, v in self.inner.tensors().items()}
        tensors["rng"] = torch.get_rng_state()
        about = {"run_id": self.run_id, "round": str(self.round), "digest": self.digest}
        path = self._inner_file(self.round)

        def write():
            try:
                sync.write_durably(path, lambda tmp: save_file(tensors, tmp, metadata=about))
            except (OSError, SafetensorError) as error:  # a resume would start it fresh: no reason to stop
                print(f"{path}: {error}", file=sys.stderr, flush=True)
            for old in self._inner_files()[:-KEEP_INNER]:
                old.unlink()

        self._in_background(write)

    def _load_inner(self) -> bool:
        path = self._inner_file(self.round)
        found = path.exists()
        if found:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() == {"run_id": self.run_id, "round": str(self.round), "digest": self.digest}
        if self.ranks > 1:  # all or none: ranks on several nodes may not see the same disk
            everyone = torch.tensor([int(found)], device=self.device)
            dist.all_reduce(everyone, dist.ReduceOp.MIN)
            found = bool(everyone.item())
        if not found:
            return False
        tensors = load_file(path)
        torch.set_rng_state(tensors.pop("rng"))
        self.inner.load(tensors)
        return True

    def _in_background(self, work) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._background.append(thread)
        thread.start()

    def settle(self) -> None:
        """Wait for uploads and files under way."""
        for thread in self._background:
            thread.join()
        self._background.clear()
