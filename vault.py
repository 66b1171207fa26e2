"""The coordinator's copy of the model: theta and m of the newest stored round, durable and served to joiners.

It is made twice over: a site sends the agreed average (federated) or its own result (local); the vault repeats the outer
step on its own copy, writes it, and compares digests with what the sites report to hold.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError

import config
import sync
from config import BadInput
from journal import Unwritable
from model import GPT, Shape


class Vault:
    def __init__(self, cfg, folder: Path):
        self.cfg, self.states = cfg, sync.StateFolder(folder)
        self.chunk_mb = cfg.sync.chunk_mb
        self.run_id, self.digest = "", ""
        self.agreed: dict[int, str] = {}  # round -> digest of the average that was committed to make it
        self._partial: dict[tuple[int, str], dict[str, torch.Tensor]] = {}  # (round, sender) -> what has arrived
        self._held: dict[int, dict[str, tuple[str, str]]] = {}

    @property
    def numel(self) -> int:
        return self.theta.numel()

    def genesis(self, shape: Shape, run_id: str) -> None:
        """theta_0 from the seed, on CPU in fp32."""
        model = GPT(shape).init_weights(self.cfg.seed)
        self.theta, self.run_id = sync.Flat(model).read(model), run_id
        self.m = torch.zeros_like(self.theta)
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
        self.digest, self.digest_m = sync.digest(self.theta, self.chunk_mb), sync.digest(self.m, self.chunk_mb)
        for name, digest in (("theta", self.digest), ("m", self.digest_m)):
            if digest != state[f"digest_{name}"]:
                return f"{name} has digest {digest[:12]}, not {state[f'digest_{name}'][:12]}"
        return ""

    def receive(self, header: dict, payload) -> bool:
        """One uploaded chunk. True if it was the last one and the state of header['round'] is now durable.

        Raises ValueError if a federated result is not the one that was agreed, or a theta not the one of header['digest'].
        """
        round_ = header["round"]
        self._partial = {k: v for k, v in self._partial.items() if k[0] == round_}
        part = self._partial.setdefault((round_, header["site"]), {})
        vector = part.setdefault(header["name"], torch.empty(self.numel))
        vector[header["start"] : header["stop"]] = torch.frombuffer(bytearray(payload), dtype=torch.float32)
        if not header["last"]:
            return False
        del self._partial[round_, header["site"]]
        if "delta" in part and round_ not in self.agreed:
            return False  # of a round that was rolled back
        if "delta" in part:
            if sync.digest(part["delta"], self.chunk_mb) != self.agreed[round_]:
                raise ValueError(f"sent another result of round {round_ - 1} than was agreed")
            r = self.cfg.rounds
            sync.outer_step_(self.theta, self.m, part["delta"], r.outer, r.outer_lr, r.outer_momentum)
        elif sync.digest(part["theta"], self.chunk_mb) != header["digest"]:
            raise ValueError(f"sent another theta of round {round_} than it holds")
        else:
            self.theta, self.m = part["theta"], part.get("m", torch.zeros(self.numel))
        self.agreed = {r: digest for r, digest in self.agreed.items() if r > round_}
        self._save(round_)
        return True

    def _save(self, round_: int) -> None:
        self.digest, self.digest_m = sync.digest(self.theta, self.chunk_mb), sync.digest(self.m, self.chunk_mb)
        facts = {"run_id": self.run_id, "digest_theta": self.digest, "digest_m": self.digest_m,
                 "config_digest": config.train_digest(self.cfg)}  # fmt: skip
        try:
            self.states.save(round_, self.theta, self.m, facts)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise Unwritable(f"{self.states.folder}: {why}; free space, then the same command resumes") from None
        self.note(round_, "coordinator", self.digest, self.digest_m)

    def roll_back(self) -> None:
        """What was committed after the stored round counts no more, nor what sites said to hold of it."""
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
        return self.note(round_, "coordinator", self.digest, self.digest_m)
