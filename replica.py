"""The state of the run as one site holds it: theta, outer momentum, averager, and their way to and from the coordinator.

Only rank 0 of a site has a Replica; shard.py takes theta to the parameters of all ranks, and theirs back into theta_i. theta is the
start of the open round and stays untouched until that round is committed; the model's parameters move on from it. theta, m
and theta_i are flat fp32 CPU vectors (see sync.py); on a CPU theta_i *is* the model's parameters, so that freezing costs
nothing. Digests, files and uploads are made in the background, while the next round trains.
"""

import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import torch

import sync
from channel import ChannelError, Link
from report import Lines
from shard import Shard

TRIES = 3  # downloads of a state before we give up on it


class Mismatch(RuntimeError):
    """What arrived, or what was committed, is not what it must be."""


class Replica:
    def __init__(self, cfg, shard: Shard, link: Link, run_id: str):
        self.cfg, self.shard, self.link, self.run_id = cfg, shard, link, run_id
        self.chunk_mb = cfg.sync.chunk_mb
        self.round = -1  # whose start state theta and m are; -1: none
        self._digest: Future = Future()  # of theta
        shard.folder.mkdir(parents=True, exist_ok=True)
        self.held_log = Lines(shard.folder / "held.jsonl")
        self.download_s = 0.0  # what the last download took
        self.agreed_of = -1  # the round whose committed average is still in `averager.agreed`
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
        """theta and m of a round from the coordinator, unless we hold them already. False if the coordinator fell silent, no
        longer has that round, or TRIES downloads arrived with another digest."""
        if self.shard.held is None:
            self._allocate()
        if self.theta.numel() != numel:
            raise Mismatch(f"the model here has {self.theta.numel()} parameters, the run's {numel}")
        self.settle()
        self.download_s = 0.0  # nothing was needed
        if round_ == self.round and digest == self.digest == sync.digest(self.theta):
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

    def _allocate(self) -> None:
        self.shard.build()
        size = self.shard.held.layout.numel
        self.theta, self.m, self.averager = sync.zeros(size), sync.zeros(size), sync.Averager(size, self.chunk_mb)
        self.theta_i = self.shard.held.new_vector()  # the parameters as they were last read or written; on a CPU, as they are

    def take(self, round_: int, own_disk: bool) -> bool:
        """What was downloaded becomes the start of our next round, on all ranks.

        The inner optimizer's state of that very round is taken from our own disk if it survived there and `own_disk`
        says it may (a resume, or keep_disk); True if so. Else it starts fresh.
        """
        self.round, self.digest = round_, sync.digest(self.theta)
        self._log({"round": round_, "how": "fetch", "result": ""}, self.digest)
        self.restore()
        if self.shard.inner is not None:
            return False
        self.shard.new_inner()
        more = self.shard.load(round_, self.run_id, digest=self.digest) if own_disk else None
        if more is not None:
            self.averager.restore(more.get("residual"))
        return more is not None

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

    def restore(self) -> None:
        """The model's parameters back to theta, on all ranks."""
        sync.copy_(self.theta_i, self.theta)
        self.shard.write(vector=self.theta_i)

    @contextmanager
    def at_theta(self):
        """For a while, the model is theta again."""
        self.shard.put_aside()
        self.restore()
        yield
        self.shard.take_back()

    def freeze(self) -> bool:
        """theta_i from the model; False if it holds anything that is not a finite number."""
        self.shard.read(into=self.theta_i)
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
        self.settle()
        a = self.averager
        sync.apply_agreed_(a.agreed, a.wire, self.theta, self.m, self._outer, also=self.theta_i)
        a.kept()
        self.shard.write(vector=self.theta_i)
        self.agreed_of = self.round
        self._now_holds(self.round + 1, "commit", result, done)

    def take_own(self) -> dict[str, torch.Tensor]:
        """A local round's result becomes theta: as it is (m = 0), or by an outer step of its own (`rounds.local`).
        Returns the vectors the coordinator needs."""
        self.settle()
        self.agreed_of = -1
        parts = {"theta": self.theta}
        if self.cfg.rounds.local == "outer":
            for theta, m, theta_i in zip(*(v.split(sync.PIECE) for v in (self.theta, self.m, self.theta_i))):
                sync.outer_step_(theta, m, theta - theta_i, *self._outer)
            self.restore()
            parts["m"] = self.m
        else:
            sync.copy_(self.theta, self.theta_i)
            if self.cfg.rounds.outer != "none":
                self.m.zero_()
        self._now_holds(self.round + 1, "local")
        return parts

    @property
    def _outer(self) -> tuple[str, float, float]:
        r = self.cfg.rounds
        return r.outer, r.outer_lr, r.outer_momentum

    def _now_holds(self, round_: int, how: str, result: str = "", done=None) -> None:
        """theta and m are those of a round. Digests, our log and the ranks' own disks follow in the background."""
        self.round, self._digest = round_, Future()
        digest, about = self._digest, {"round": round_, "how": how, "result": result}

        def follow():
            digest.set_result(sync.digest(self.theta))
            self._log(about, digest.result())
            if done:
                done(digest.result(), sync.digest(self.m))

        self.shard.save(round_, self.run_id, digest=digest, residual=self.averager.residual)
        self._in_background(follow)

    def _log(self, about: dict, digest: str) -> None:
        """One line for each state we come to hold: evidence for `coordinator.py check`."""
        self.held_log.add({"run_id": self.run_id, "digest": digest} | about)

    @property
    def num_chunks(self) -> int:
        return len(self.averager.chunks)

    def drop(self, keep_disk: bool) -> None:
        """What was on the machine is gone."""
        self.settle()
        self.shard.drop(keep_disk)
        self.theta = self.m = self.theta_i = self.averager = None
        self.round = self.agreed_of = -1

    def _in_background(self, work) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._background.append(thread)
        thread.start()

    def settle(self) -> None:
        """Wait for uploads and files under way."""
        for thread in self._background:
            thread.join()
        self._background.clear()
        self.shard.settle()
