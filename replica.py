"""The state of the run as one site holds it: model, theta, outer momentum, inner optimizer, and their way to and from
the coordinator and the site's own disk.

theta is the start of the open round and stays untouched until that round is committed; the model's parameters move on
from it. theta, m and theta_i are flat fp32 CPU vectors (see sync.py); on a CPU theta_i *is* the model's parameters, so that
freezing costs nothing. On several ranks each holds all of them, rank 0 speaks to the coordinator and shares what it
learns. Digests, files and uploads are made in the background, while the next round trains.
"""

import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

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
        self._digest: Future = Future()  # of theta
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.held = Lines(folder / "held.jsonl")
        self.download_s = 0.0  # what the last download took
        self.agreed_of = -1  # the round whose committed average is still in `averager.agreed`
        self.model: GPT | None = None
        self.inner: Inner | None = None
        self._background: list[threading.Thread] = []

    @property
    def digest(self) -> str:
        """Of theta; waits until it is known."""
        return self._digest.result()

    @digest.setter
    def digest(self, value: str) -> None:
        self._digest = Future()
        self._digest.set_result(value)

    # -- from and to the coordinator ----------------------------------------------------------------------------------

    def download(self, round_: int, numel: int, digest: str | None) -> bool:
        """theta and m of a round from the coordinator, at rank 0, unless we hold them already. False if the coordinator fell
        silent, no longer has that round, or TRIES downloads arrived with another digest."""
        if self.model is None:
            self.model = GPT(self.shape).to(self.device)
            self.flat = sync.Flat(self.model)
            self.theta, self.m, self.theta_i = (sync.zeros(self.flat.numel) for _ in range(3))
            self.averager = sync.Averager(self.flat.numel, self.chunk_mb)
            if self.device.type == "cpu":
                self.flat.adopt(self.model, self.theta_i)
        if self.flat.numel != numel:
            raise Mismatch(f"the model here has {self.flat.numel} parameters, the run's {numel}")
        self.settle()
        self.download_s = 0.0  # nothing was needed
        if self.rank or (round_ == self.round and digest == self.digest == sync.digest(self.theta)):
            return True
        self.round = self.agreed_of = -1
        for _ in range(TRIES):
            began = time.monotonic()
            try:
                self._download(round_, "theta", self.theta)
                if self.cfg.rounds.outer != "none":  # else it is zero, and not even touched
                    self._download(round_, "m", self.m)
            except ChannelError:
                return False
            self.download_s = time.monotonic() - began
            self.digest = sync.digest(self.theta)
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
        self.round, self.digest = round_, sync.digest(self.theta)
        self._log({"round": round_, "how": "fetch", "result": ""}, self.digest)
        self.restore()
        if self.inner is not None:
            return False
        self.inner = Inner(self.model, self.cfg.optim)
        return own_disk and self._load_inner()

    def _download(self, round_: int, name: str, vector: torch.Tensor) -> None:
        into = sync.raw(vector)
        for a, b in self._spans(vector):
            header, data = self.link.request({"type": "chunk", "round": round_, "name": name, "start": a, "stop": b}, large=True)
            if not header["found"] or len(data) != b - a:
                raise ChannelError(f"the coordinator has no {name[:12]} of round {round_}")
            into[a:b] = data

    def _spans(self, vector: torch.Tensor) -> list[tuple[int, int]]:
        """[start, stop) byte ranges of at most chunk_mb MiB."""
        size, step = len(sync.raw(vector)), self.chunk_mb << 20
        return [(a, min(a + step, size)) for a in range(0, size, step)]

    def receive(self, digest: str) -> bool:
        """The result the others agreed on, into `averager.agreed`; False if it did not arrive whole."""
        a = self.averager
        try:
            self._download(self.round, digest, a.agreed)
        except ChannelError:
            return False
        return sync.digest(a.agreed) == digest

    def give(self, attempt: int, digest: str) -> None:
        """Send the result up, for those who lack it."""
        self.upload({"result": self.averager.agreed}, {"attempt": attempt, "digest": digest, "wire": self.averager.wire})

    def resend(self) -> None:
        """Send the state we hold once more: the committed average that made it, if we still have it, or the state itself."""
        self.settle()
        self.upload({"delta": self.averager.agreed} if self.agreed_of == self.round - 1 else {"theta": self.theta, "m": self.m})

    def upload(self, parts: dict[str, torch.Tensor], about: dict | None = None) -> None:
        """Send vectors that make up the state we now hold, in the background, chunk by chunk."""
        if self.rank:
            return
        round_, digest = self.round, self._digest
        todo = [(n, v, a, b) for n, v in parts.items() for a, b in self._spans(v)]

        def send():
            try:
                self.link.request({"type": "ping"})  # what we said before is heard before
                whole = about or ({"digest": digest.result()} if "theta" in parts else {})
                for i, (name, vector, a, b) in enumerate(todo):
                    header = {"type": "upload", "round": round_, "name": name, "start": a, "stop": b, "last": i == len(todo) - 1}
                    self.link.request(header | whole, bytes(sync.raw(vector)[a:b]), large=True)
            except ChannelError:
                return  # the coordinator is gone; when it is back it asks for what it lacks

        self._in_background(send)

    def _share(self) -> None:
        """Rank 0's theta and m on all ranks."""
        if self.ranks > 1:
            for vector in (self.theta,) if self.cfg.rounds.outer == "none" else (self.theta, self.m):
                there = vector.to(self.device)
                dist.broadcast(there, 0)
                vector.copy_(there)

    # -- round by round -----------------------------------------------------------------------------------------------

    def new_inner(self) -> None:
        self.inner = Inner(self.model, self.cfg.optim)

    def restore(self) -> None:
        """The model's parameters back to theta."""
        self._write(self.theta)

    def _write(self, flat: torch.Tensor) -> None:
        sync.copy_(self.theta_i, flat) if self.device.type == "cpu" else self.flat.write(flat, self.model)

    @contextmanager
    def at_theta(self):
        """For a while, the model is theta again."""
        moved = self.flat.read(self.model)
        self.restore()
        yield
        self._write(moved)

    def freeze(self) -> bool:
        """theta_i from the model; False if it holds anything that is not a finite number."""
        if self.device.type != "cpu":
            self.flat.read(self.model, self.theta_i)
        return sync.all_finite(self.theta_i)

    def average(self, weight: float, peers, wire: str, stepped: bool) -> str:
        """Our weighted pseudo-gradient, averaged over the members, into `averager.agreed`; returns the digest to vote for."""
        self.settle()  # what was agreed before may still be on its way to the coordinator
        self.agreed_of = -1
        self.averager.use(wire)
        return self.averager.average(self.theta, self.theta_i if stepped else None, weight, peers)

    def apply(self, result: str, done) -> None:
        """The outer step with the committed average (digest `result`), the same bits at every member. done(digest of theta, digest
        of m): called in the background, once they are known."""
        a = self.averager
        self.settle()
        if self.rank == 0:
            here = self.theta_i if self.device.type == "cpu" else None
            sync.apply_agreed_(a.agreed, a.wire, self.theta, self.m, self._outer, also=here)
            a.kept()
        self._share()
        if self.rank or self.device.type != "cpu":
            self.restore()
        self.agreed_of = self.round
        self._now_holds(self.round + 1, "commit", result, done)

    def take_own(self) -> dict[str, torch.Tensor]:
        """A local round's result becomes theta: as it is (m = 0), or by an outer step of its own (`rounds.local`).
        Returns the vectors the coordinator needs."""
        self.settle()
        self.agreed_of = -1
        if self.cfg.rounds.local == "outer":
            for theta, m, theta_i in zip(*(v.split(sync.PIECE) for v in (self.theta, self.m, self.theta_i))):
                sync.outer_step_(theta, m, theta - theta_i, *self._outer)
            self.restore()
            parts = {"theta": self.theta, "m": self.m}
        else:
            sync.copy_(self.theta, self.theta_i)
            if self.cfg.rounds.outer != "none":
                self.m.zero_()
            parts = {"theta": self.theta}
        self._now_holds(self.round + 1, "local")
        return parts

    @property
    def _outer(self) -> tuple[str, float, float]:
        r = self.cfg.rounds
        return r.outer, r.outer_lr, r.outer_momentum

    def _now_holds(self, round_: int, how: str, result: str = "", done=None) -> None:
        """theta and m are those of a round. Digests, our log and our own disk follow in the background."""
        self.round, self._digest = round_, Future()
        digest, inner, about = self._digest, self._snapshot(), {"round": round_, "how": how, "result": result}

        def follow():
            digest.set_result(sync.digest(self.theta))
            self._log(about, digest.result())
            if done:
                done(digest.result(), sync.digest(self.m))
            if self.rank == 0:
                self._save_inner(inner, round_, digest.result())

        self._in_background(follow)

    def _log(self, about: dict, digest: str) -> None:
        """One line for each state we come to hold: evidence for `coordinator.py check`."""
        if self.rank == 0:
            self.held.add({"run_id": self.run_id, "digest": digest} | about)

    @property
    def num_chunks(self) -> int:
        return len(self.averager.chunks)

    def drop(self, keep_disk: bool) -> None:
        """What was on the machine is gone."""
        self.settle()
        self.model = self.inner = self.theta = self.m = self.theta_i = self.averager = None
        self.round = self.agreed_of = -1
        if not keep_disk and self.rank == 0:
            for path in self._inner_files():
                path.unlink()

    # -- our own disk -------------------------------------------------------------------------------------------------

    def _inner_file(self, round_: int) -> Path:
        return self.folder / f"inner-{round_:06d}.safetensors"

    def _inner_files(self) -> list[Path]:
        return sorted(self.folder.glob("inner-*.safetensors"))

    def _snapshot(self) -> dict[str, torch.Tensor]:
        """What an exact resume needs besides theta: inner optimizer state, RNG, what the wire left out. Rank 0's: it is the same
        on all ranks."""
        if self.rank:
            return {}
        tensors = {k: v.detach().cpu().clone() for k, v in self.inner.tensors().items()}
        left = self.averager.residual  # stays as it is until the next commit, which waits for the file
        return tensors | {"rng": torch.get_rng_state()} | ({} if left is None else {"residual": left})

    def _save_inner(self, tensors: dict[str, torch.Tensor], round_: int, digest: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about, path = {"run_id": self.run_id, "round": str(round_), "digest": digest}, self._inner_file(round_)
        try:
            sync.write_durably(path, lambda tmp: sync.save_file(tensors, tmp, about))
        except (OSError, SafetensorError) as error:  # a resume would start it fresh: no reason to stop
            print(f"{path}: {error}", file=sys.stderr, flush=True)
        for old in self._inner_files()[:-KEEP_INNER]:
            old.unlink()

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
        self.averager.restore(tensors.pop("residual", None))
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
