"""The coordinator's copy of the model: theta and m of the newest stored round, durable and served to joiners.

It is made twice over: a site sends the agreed bytes (federated) or its own result (local); the vault repeats the outer
step on its own copy, writes it, and compares digests with what the sites report to hold. That takes seconds for a large
model, so a thread of its own does it: what the main thread hands over with `write`, `written` tells of.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError

import config
import sync
from config import BadInput
from export import initial_theta
from journal import Unwritable
from model import GPT, Shape
from wire import num_bytes


class Vault:
    """written(round, site, name, error): called in the writing thread when a state is durable, or why it is not (ValueError: what was
    sent is not what it should be; Unwritable)."""

    def __init__(self, cfg, folder: Path, written: Callable[[int, str, str, Exception | None], None] = lambda *_: None):
        self.cfg, self.states = cfg, sync.StateFolder(folder)
        self.run_id = ""
        self.digests: dict[int, tuple[str, str]] = {}  # round -> digests of theta and m, of the last rounds written
        self.round, self._written = 0, written
        self._thread = ThreadPoolExecutor(1, "vault")
        self.agreed: dict[int, tuple[str, str]] = {}  # round -> digest and wire of the average that was committed to make it
        self._partial: dict[tuple[int, str], dict[str, torch.Tensor]] = {}  # (round, sender) -> what has arrived
        self._held: dict[int, dict[str, tuple[str, str]]] = {}

    @property
    def numel(self) -> int:
        return self.theta.numel()

    def genesis(self, shape: Shape, run_id: str) -> None:
        """theta_0 from the seed, or from the folder model.init, on CPU in fp32."""
        if self.cfg.model.init is None:
            model = GPT(shape).init_weights(self.cfg.seed)
            self.theta = sync.Flat(model).read(model)
        else:
            self.theta = initial_theta(self.cfg, shape)
        self.run_id = run_id
        self.m = sync.zeros(self.numel)
        self._save(0)

    def load(self, stored: dict[int, str], run_id: str) -> int:
        """The newest undamaged state on disk that the journal knows (stored: round -> digest); returns its round."""
        self.run_id, damaged = run_id, []
        known = [s for s in self.states.manifest if stored.get(s["round"]) == s["digest_theta"] and s["run_id"] == run_id]
        for state in reversed(known):
            round_ = state["round"]
            if not (why := self._damage(round_, state)):
                for line in damaged:
                    print(f"coordinator | {line}; using round {round_}", flush=True)
                self.round = round_
                return round_
            damaged.append(f"state of round {round_} is damaged ({why})")
            self.states.forget(round_)
        found = "; ".join(damaged) or "no state the journal knows"
        raise BadInput(f"{self.states.folder}: {found}; restore one of its files, or take fresh=true")

    def _damage(self, round_: int, state: dict) -> str:
        """Load a state; what is wrong with it, or nothing."""
        try:
            self.theta, self.m = self.states.load(round_)
        except ValueError as error:
            return str(error)
        found = sync.digest(self.theta), sync.digest(self.m)
        self.digests = {round_: found}
        for name, digest in zip(("theta", "m"), found):
            if digest != state[f"digest_{name}"]:
                return f"{name} has digest {digest[:12]}, not {state[f'digest_{name}'][:12]}"
        return ""

    def receive(self, header: dict, payload) -> dict[str, torch.Tensor] | None:
        """One uploaded chunk; all parts of that state (name -> bytes) once the last one is here. Raises ValueError for a chunk that
        does not fit."""
        round_, name, start, stop = header["round"], header["name"], header["start"], header["stop"]
        self._partial = {k: v for k, v in self._partial.items() if k[0] >= round_}
        part = self._partial.setdefault((round_, header["site"]), {})
        if name not in part:
            part[name] = torch.zeros(self.bytes_of(round_, name), dtype=torch.uint8)
        if not 0 <= start <= stop <= len(part[name]) or len(payload) != stop - start:
            raise ValueError(f"sent bytes {start} to {stop} of {name}, which has {len(part[name])}")
        sync.raw(part[name])[start:stop] = payload
        return self._partial.pop((round_, header["site"])) if header["last"] else None

    def bytes_of(self, round_: int, name: str) -> int:
        """How long a vector is that a site may send."""
        return num_bytes(self.agreed[round_][1], self.numel) if name == "delta" and round_ in self.agreed else 4 * self.numel

    def write(self, round_: int, site: str, parts: dict[str, torch.Tensor], digest: str) -> None:
        """Have a state written, in the background: from the agreed bytes (`delta`), or theta (of this digest) and m."""
        agreed = self.agreed.get(round_)
        self._thread.submit(self._write, round_, site, parts, digest, agreed)

    def _write(self, round_: int, site: str, parts: dict[str, torch.Tensor], digest: str, agreed: tuple[str, str] | None) -> None:
        error = None
        try:
            if round_ > self.round:
                self._make(round_, parts, digest, agreed)
                self._save(round_)
        except Exception as why:  # the main thread's to judge
            error = why
        self._written(round_, site, next(iter(parts)), error)

    def _make(self, round_: int, parts: dict[str, torch.Tensor], digest: str, agreed: tuple[str, str] | None) -> None:
        """theta and m of a round from what was sent; nothing has changed if this raises ValueError."""
        if "delta" in parts:
            if agreed is None or self.round != round_ - 1:
                raise ValueError(f"sent the result of round {round_ - 1}, which does not follow on round {self.round}")
            if sync.digest(parts["delta"]) != agreed[0]:
                raise ValueError(f"sent another result of round {round_ - 1} than was agreed")
            r = self.cfg.rounds
            sync.apply_agreed_(parts["delta"], agreed[1], self.theta, self.m, (r.outer, r.outer_lr, r.outer_momentum))
        elif "theta" not in parts or sync.digest(parts["theta"]) != digest:
            raise ValueError(f"sent another theta of round {round_} than it holds")
        else:
            self.theta = parts["theta"].view(torch.float32)
            self.m = parts["m"].view(torch.float32) if "m" in parts else sync.zeros(self.numel)

    def _save(self, round_: int) -> None:
        digest, digest_m = sync.digest(self.theta), sync.digest(self.m)
        facts = {"run_id": self.run_id, "digest_theta": digest, "digest_m": digest_m, "config_digest": config.train_digest(self.cfg)}
        try:
            self.states.save(round_, self.theta, self.m, facts)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise Unwritable(f"{self.states.folder}: {why}; free space, then the same command resumes") from None
        self.digests = {r: known for r, known in self.digests.items() if r > round_ - 3} | {round_: (digest, digest_m)}
        self.round = round_

    def close(self) -> None:
        """Finish what is being written."""
        self._thread.shutdown()

    def roll_back(self) -> None:
        """What was committed after the stored round counts no more, nor what sites said to hold of it. (Not while it is being
        written: rounds.py then waits for that.)"""
        self.agreed, self._held, self._partial = {}, {}, {}

    def note(self, round_: int, who: str, theta: str, m: str) -> list[tuple[str, str]]:
        """What a member holds of a round. -> (site, complaint) for everyone whose bits are not the coordinator's."""
        self._held = {r: seen for r, seen in self._held.items() if r > round_ - 3}
        seen = self._held.setdefault(round_, {})
        seen[who] = (theta, m)
        ours = seen.get("coordinator")
        if ours is None:
            return []
        return [(site, f"holds theta {held[0][:12]} of round {round_}, the coordinator {ours[0][:12]}")
                for site, held in seen.items() if held != ours]  # fmt: skip

    def complaints(self, round_: int) -> list[tuple[str, str]]:
        """What sites hold of the round just written, against ours."""
        self.agreed = {r: agreed for r, agreed in self.agreed.items() if r > round_}
        return self.note(round_, "coordinator", *self.digests[round_])
