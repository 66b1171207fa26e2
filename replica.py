"""The state of the run as one site holds it: model, theta, outer momentum, inner optimizer, and their way to and from
the coordinator and the site's own disk.

theta is the start of the open round and stays untouched until that round is committed; the model's parameters move on
from it. theta, m and theta_i are flat fp32 CPU vectors (see sync.py); on a CPU theta_i *is* the model's parameters, so that
freezing costs nothing. On several ranks rank 0 holds these vectors and speaks to the coordinator; parallel.py takes them to
everyone's parameters and back. Digests, files and uploads are made in the background, while the next round trains.
"""

import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import sync
from channel import ChannelError, Link
from model import GPT, Shape
from optim import Inner
from parallel import Held, Ranks
from report import Lines

KEEP_INNER = 2
TRIES = 3  # downloads of a state before we give up on it


class Mismatch(RuntimeError):
    """What arrived, or what was committed, is not what it must be."""


class Replica:
    def __init__(self, cfg, shape: Shape, ranks: Ranks, link: Link | None, folder: Path, run_id: str):
        self.cfg, self.shape, self.link, self.spec = cfg, shape, link, cfg.sites[cfg.site]
        self.ranks, self.rank, self.folder, self.run_id = ranks, ranks.rank, folder, run_id
        self.chunk_mb = cfg.sync.chunk_mb
        self.round = -1  # whose start state theta and m are; -1: none
        self._digest: Future = Future()  # of theta
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.held_log = Lines(folder / "held.jsonl")
        self.download_s = 0.0  # what the last download took
        self.agreed_of = -1  # the round whose committed average is still in `averager.agreed`
        self.held: Held | None = None
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
        if self.held is None:
            c = self.cfg.model
            self.held = Held(GPT(self.shape), self.ranks, self.spec.parallel, c.dtype, c.compile, self.spec.checkpointing)
            if self.rank == 0:
                size = self.held.flat.numel
                self.theta, self.m, self.averager = sync.zeros(size), sync.zeros(size), sync.Averager(size, self.chunk_mb)
        if self.held.flat.numel != numel:
            raise Mismatch(f"the model here has {self.held.flat.numel} parameters, the run's {numel}")
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
        self.round, self.digest = round_, self.ranks.agree(sync.digest(self.theta) if self.rank == 0 else None)
        self._log({"round": round_, "how": "fetch", "result": ""}, self.digest)
        self.restore()
        if self.inner is not None:
            return False
        self.new_inner()
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
        if self.rank:
            return
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

    # -- round by round -----------------------------------------------------------------------------------------------

    @property
    def theta_i(self) -> torch.Tensor:
        """The parameters as they were when they were last read or written; on a CPU, as they are. Rank 0's."""
        return self.held.vector

    def new_inner(self) -> None:
        self.inner = Inner(self.held.model, self.cfg.optim, self.ranks)

    def restore(self) -> None:
        """The model's parameters back to theta, on all ranks."""
        if self.rank == 0:
            sync.copy_(self.theta_i, self.theta)
        self.held.write()

    @contextmanager
    def at_theta(self):
        """For a while, the model is theta again."""
        with self.held.elsewhere():
            self.restore()
            yield

    def freeze(self) -> bool:
        """theta_i from the model; False if it holds anything that is not a finite number."""
        self.held.read()
        return self.ranks.agree(sync.all_finite(self.theta_i) if self.rank == 0 else None)

    def average(self, weight: float, peers, wire: str, stepped: bool) -> str:
        """Our weighted pseudo-gradient, averaged over the members, into `averager.agreed`; returns the digest to vote for."""
        self.settle()  # what was agreed before may still be on its way to the coordinator
        self.agreed_of = -1
        self.averager.use(wire)
        return self.averager.average(self.theta, self.theta_i if stepped else None, weight, peers)

    def apply(self, result: str, done) -> None:
        """The outer step with the committed average (digest `result`), the same bits at every member. done(digest of theta, digest
        of m): called in the background, once they are known."""
        self.settle()
        if self.rank == 0:
            a = self.averager
            sync.apply_agreed_(a.agreed, a.wire, self.theta, self.m, self._outer, also=self.theta_i)
            a.kept()
        self.held.write()
        self.agreed_of = self.round
        self._now_holds(self.round + 1, "commit", result, done)

    def take_own(self) -> dict[str, torch.Tensor]:
        """A local round's result becomes theta: as it is (m = 0), or by an outer step of its own (`rounds.local`).
        Returns the vectors the coordinator needs."""
        self.settle()
        self.agreed_of = -1
        parts = self._take_own() if self.rank == 0 else {}
        if self.cfg.rounds.local == "outer":
            self.restore()
        self._now_holds(self.round + 1, "local")
        return parts

    def _take_own(self) -> dict[str, torch.Tensor]:
        if self.cfg.rounds.local == "outer":
            for theta, m, theta_i in zip(*(v.split(sync.PIECE) for v in (self.theta, self.m, self.theta_i))):
                sync.outer_step_(theta, m, theta - theta_i, *self._outer)
            return {"theta": self.theta, "m": self.m}
        sync.copy_(self.theta, self.theta_i)
        if self.cfg.rounds.outer != "none":
            self.m.zero_()
        return {"theta": self.theta}

    @property
    def _outer(self) -> tuple[str, float, float]:
        r = self.cfg.rounds
        return r.outer, r.outer_lr, r.outer_momentum

    def _now_holds(self, round_: int, how: str, result: str = "", done=None) -> None:
        """theta and m are those of a round. Digests, our log and our own disk follow in the background."""
        self.round, self._digest = round_, Future()
        digest, inner, about = self._digest, self._snapshot(), {"round": round_, "how": how, "result": result}

        def follow():
            if self.rank == 0:
                digest.set_result(sync.digest(self.theta))
                self._log(about, digest.result())
                if done:
                    done(digest.result(), sync.digest(self.m))
            self._save_inner(inner, round_)

        self._in_background(follow)

    def _log(self, about: dict, digest: str) -> None:
        """One line for each state we come to hold: evidence for `coordinator.py check`."""
        if self.rank == 0:
            self.held_log.add({"run_id": self.run_id, "digest": digest} | about)

    @property
    def num_chunks(self) -> int:
        return len(self.averager.chunks)

    def drop(self, keep_disk: bool) -> None:
        """What was on the machine is gone."""
        self.settle()
        self.held = self.inner = self.theta = self.m = self.averager = None
        self.round = self.agreed_of = -1
        if not keep_disk:
            for path in self._inner_files():
                path.unlink(missing_ok=True)

    # -- our own disk -------------------------------------------------------------------------------------------------

    def _inner_file(self, round_: int) -> Path:
        """Ours of a round: each rank keeps what it holds, on its node's disk."""
        return self.folder / f"inner-{round_:06d}-{self.rank}.safetensors"

    def _inner_files(self) -> list[Path]:
        return sorted(self.folder.glob(f"inner-*-{self.rank}.safetensors"))

    def _about(self, round_: int) -> dict[str, str]:
        parallel = self.spec.parallel if self.ranks.size > 1 else "alone"
        return {"run_id": self.run_id, "round": str(round_), "ranks": str(self.ranks.size), "parallel": parallel}

    def _snapshot(self) -> dict[str, torch.Tensor]:
        """What an exact resume needs besides theta: inner optimizer state, RNG, what the wire left out. AdamW's state is the same
        on all ranks, but under FSDP: rank 0 keeps it for all."""
        tensors = {k: v for k, v in self.inner.tensors().items() if self._keeps(k)}
        tensors = {k: v.detach().cpu().clone() for k, v in tensors.items()} | {"rng": torch.get_rng_state()}
        left = self.averager.residual if self.rank == 0 else None  # stays as it is until the next commit, which waits for the file
        return tensors | ({} if left is None else {"residual": left})

    def _keeps(self, name: str) -> bool:
        return self.rank == 0 or self.held.sharded or not name.startswith("adam.")

    def _save_inner(self, tensors: dict[str, torch.Tensor], round_: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about, path = self._about(round_), self._inner_file(round_)
        if self.rank == 0:
            about["digest"] = self.digest
        try:
            sync.write_durably(path, lambda tmp: sync.save_file(tensors, tmp, about))
        except (OSError, SafetensorError) as error:  # a resume would start it fresh: no reason to stop
            print(f"{path}: {error}", file=sys.stderr, flush=True)
        for old in self._inner_files()[:-KEEP_INNER]:
            old.unlink()

    def _load_inner(self) -> bool:
        """All ranks or none: they may be on several nodes, and one of them may be new."""
        path, about = self._inner_file(self.round), self._about(self.round)
        if self.rank == 0:
            about["digest"] = self.digest
        found = path.exists()
        if found:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() == about
        if not self.ranks.all(found):
            return False
        tensors = load_file(path)
        torch.set_rng_state(tensors.pop("rng"))
        left = tensors.pop("residual", None)
        if self.rank == 0:
            self.averager.restore(left)
        if not self.held.sharded:
            tensors |= self.ranks.share({k: v for k, v in tensors.items() if k.startswith("adam.")})
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
