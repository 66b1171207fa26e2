"""One site. It trains while its grid throws clean power away, and agrees with the other sites on one model.

    torchrun --nproc_per_node=1 train.py configs/demo.yaml site=california [key=value ...]

The coordinator (coordinator.py) says when: this process connects to it, waits, and is told to fetch the model, to
train a round, to average it with others, to drop everything. Read `main` first: it is the algorithm of a round.

    next_round()  blocks while our grid is not curtailed            inner_step()  one batch, Muon and AdamW
    freeze()      hold still, report tokens and finiteness          agree()       average, vote, commit, outer step

Several ranks (torchrun --nproc_per_node=N) share a batch by rows; rank 0 speaks for the site and tells the others.
What listens: torchrun's own store (see README); this file only connects outwards, gloo binds sync.interface.
"""

import ctypes
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import config
import report
import sync
from carbon import energy_kwh
from channel import ChannelError, ChannelStore, Link
from config import BadInput
from data import Corpus
from model import GPT, shape_of
from optim import Inner, schedule

KEEP_INNER = 2


class Over(Exception):
    """The run has ended, or this process must."""

    def __init__(self, reason: str, code: int):
        super().__init__(reason)
        self.code = code


@dataclass
class Plan:
    """One round as this site sees it."""

    round: int
    mode: str  # local | federated
    batches: list[int]  # leased batch ids, in order
    committed_tokens: int  # before this round
    rate_ratio: float  # all members' tokens/s over our own
    open_s: float  # run time at the round's start
    train_for_s: float
    energy_kwh: float  # ours, up to the round's start
    emissions_kg: float
    signal: list  # [t_s, gCO2/kWh] from the round's start on
    started: float = 0.0  # monotonic
    steps: int | None = None  # virtual clock: train exactly so many
    done: int = 0
    stop: bool = False


def main(argv: list[str]) -> int:
    cfg = config.load(argv)
    if cfg.site is None:
        raise BadInput(f"site= is missing; say which one this is: {', '.join(cfg.sites)}")
    site = Site(cfg)
    try:
        while plan := site.next_round():  # blocks while our grid is not curtailed
            while site.may_step(plan):  # until the round's end, our lease's end, or a word from the coordinator
                batch_id = plan.batches[plan.done]
                loss = site.inner_step(plan, batch_id)
                plan.done += 1
                site.log_step(plan, batch_id, loss)
            site.freeze(plan)  # theta_i stays untouched until the commit
            if plan.mode == "federated":
                site.agree(plan)  # pseudo-gradients averaged, voted, committed; then the outer step
    except Over as over:
        return site.leave(str(over), over.code)
    except BaseException as error:
        site.leave(f"{type(error).__name__}: {error}", config.EXIT_FAILED)
        raise
    return site.leave("the run is over", config.EXIT_DONE)


class Site:
    def __init__(self, cfg):
        self.cfg, self.name = cfg, cfg.site
        self.spec = cfg.sites[self.name]
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.corpus = Corpus(cfg)
        if self.corpus.rows % self.ranks:
            raise BadInput(f"--nproc_per_node={self.ranks} must divide the {self.corpus.rows} rows of a step")
        try:
            self.shape = shape_of(cfg.model, self.corpus.vocab)
        except ValueError as error:
            raise BadInput(str(error)) from None
        self.device = torch.device(self.spec.device if ":" in self.spec.device or self.spec.device == "cpu"
                                   else f"{self.spec.device}:{os.environ.get('LOCAL_RANK', 0)}")  # fmt: skip
        self.virtual = cfg.clock.mode == "virtual"
        self.dir = config.run_dir(cfg)
        self.model: GPT | None = None
        self.inner: Inner | None = None
        self.round = -1  # whose start state theta and m are
        self.background: list[threading.Thread] = []
        self.frozen_at = 0.0  # monotonic
        self.excused_s = 0.0  # since then: evaluation, and waiting for slower members
        self.stall_s: float | None = None
        self.link: Link | None = None
        self.panel = None
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank == 0:
            self._join()
            signal.signal(signal.SIGTERM, _sigterm)

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Say hello until the coordinator welcomes or refuses us."""
        cfg, started = self.cfg, time.monotonic()
        until = started + cfg.rounds.rejoin_wait_s
        hello = {"type": "hello", "site": self.name, "incarnation": uuid.uuid4().hex[:12],
                 "config digest": config.train_digest(cfg), "corpus digest": self.corpus.digest,
                 "tokenizer digest": self.corpus.tokenizer_digest, "versions": config.versions(),
                 "device": str(self.device), "ranks": self.ranks}  # fmt: skip
        reason, busy = "nothing answers", False
        while time.monotonic() < until:
            address = self._address()
            if address:
                link = Link(address, self.dir / "keys", self.name, cfg.sync.heartbeat_s, cfg.sync.dead_s)
                link.send(hello)
                try:
                    header, _ = link.inbox.get(timeout=2.0)
                except queue.Empty:
                    header = {"type": "silence"}
                if header["type"] == "welcome":
                    link.welcomed = True
                    self.link, self.run_id = link, header["run_id"]
                    self.panel = report.Panel(cfg, self.run_id, self.name)
                    return
                link.close()
                if header["type"] == "refused" and not header.get("busy"):
                    raise BadInput(f"site {self.name}: refused: {header['reason']}")
                reason = header.get("reason", reason)
                busy = busy or bool(header.get("busy"))
                if busy:  # our predecessor may have died without a word: it counts as gone after dead_s
                    until = min(until, started + 2 * cfg.sync.dead_s)
            time.sleep(0.3)
        remedy = "stop the other process" if busy else "start `python coordinator.py CONFIG` there"
        raise BadInput(f"site {self.name}: no place in the run at {address or self.dir / 'address'} within "
                       f"{time.monotonic() - started:.0f} s: {reason}; {remedy}")  # fmt: skip

    def _address(self) -> str | None:
        if self.cfg.sync.port:
            return f"{self.cfg.sync.host}:{self.cfg.sync.port}"
        path = self.dir / "address"
        keys = self.dir / "keys" / f"{self.name}.key_secret"
        return path.read_text().strip() if path.exists() and keys.exists() else None

    def leave(self, reason: str, code: int) -> int:
        """Say goodbye, close everything; returns the exit code."""
        if self.link:
            self._finish_background()
            self.link.send({"type": "bye", "reason": reason})
            self.link.close()
        if self.panel:
            self.panel.finish({})
        if code not in (config.EXIT_DONE, config.EXIT_BUDGET_LEFT):
            print(f"{self.name}: {reason}", file=sys.stderr, flush=True)
        if self.ranks > 1:  # a process that lost a gloo peer can abort in its exit handlers
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    # -- being told ---------------------------------------------------------------------------------------------------

    def command(self, wait: bool = True) -> dict | None:
        """The coordinator's next command, the same on all ranks; None if there is none and we do not wait."""
        header = self._command(wait) if self.rank == 0 else None
        if self.ranks > 1:
            header = self._tell_ranks(header)
        if header and header["type"] == "end":
            raise Over(header["reason"], header["code"] if header["code"] != config.EXIT_BAD_INPUT else config.EXIT_FAILED)
        return header

    def _command(self, wait: bool) -> dict | None:
        while True:
            try:
                return self.link.inbox.get(timeout=0.2 if wait else 0.0)[0]
            except queue.Empty:
                if self.link.silent_s() > self.cfg.sync.dead_s:
                    return {"type": "end", "code": config.EXIT_FAILED, "reason": f"the coordinator has not been heard for "
                            f"{self.cfg.sync.dead_s:g} s; start it again, then this site: both resume"}  # fmt: skip
                if not wait:
                    return None

    def _tell_ranks(self, header: dict | None) -> dict | None:
        """Rank 0's header on every rank, as JSON bytes."""
        data = json.dumps(header).encode() if self.rank == 0 else b""
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, 0)
        blob = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            blob.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(blob, 0)
        return json.loads(bytes(blob.cpu().numpy()))

    def next_round(self) -> Plan | None:
        """Follow the coordinator until it opens a round for us."""
        while True:
            c = self.command()
            if c["type"] == "fetch":
                self.fetch(c)
            elif c["type"] == "open" and c["round"] == self.round:
                return self._plan(c)
            elif c["type"] == "attempt" and c["round"] == self.round:
                self.agree(Plan(self.round, "federated", [], 0, 1.0, 0.0, 0.0, 0.0, 0.0, []), c)  # a joiner, zero tokens
            elif c["type"] == "drop":
                self.drop()
            elif c["type"] in ("commit", "evaluate") and c.get("eval", True):
                self.evaluate(c)

    def _plan(self, c: dict) -> Plan:
        if self.cfg.rounds.inner_state == "reset":
            self.inner = Inner(self.model, self.cfg.optim)
        torch.set_num_threads(self.spec.threads_local if c["mode"] == "local" else self.spec.threads_federated)
        own = c["rates"][self.name]
        ratio = sum(c["rates"].values()) / own if self.cfg.rounds.lr_position == "global" else 1.0
        batches = [b for first, last in c["leases"] for b in range(first, last)]
        return Plan(c["round"], c["mode"], batches, c["committed_tokens"], ratio, c["open_s"], c["train_for_s"],
                    c["energy_kwh"], c["emissions_kg"], c["signal"], started=time.monotonic())  # fmt: skip

    def may_step(self, plan: Plan) -> bool:
        """Whether another step belongs to this round. Virtual clock: so many as we are told. Wall clock: until the
        round's time is over, the coordinator says freeze, or no batch is left."""
        while self.virtual and plan.steps is None and not plan.stop:
            self._in_round(plan, self.command())
        while not self.virtual and not plan.stop and (c := self.command(wait=False)):
            self._in_round(plan, c)
        if self.virtual:
            return not plan.stop and plan.done < plan.steps
        late = self._agree_on(time.monotonic() - plan.started >= plan.train_for_s)
        if plan.stop or late:
            return False
        if plan.done == len(plan.batches):
            if self.rank == 0:
                self.link.send({"type": "more", "round": plan.round})
            while plan.done == len(plan.batches) and not plan.stop:
                self._in_round(plan, self.command())
        return not plan.stop

    def _agree_on(self, flag: bool) -> bool:
        """Rank 0's view of a flag, on all ranks."""
        if self.ranks == 1:
            return flag
        tensor = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(tensor, 0)
        return bool(tensor.item())

    def _in_round(self, plan: Plan, c: dict) -> None:
        if c["type"] == "go" and c["round"] == plan.round:
            plan.steps, plan.signal = c["steps"], c["signal"]
        elif c["type"] == "lease" and c["round"] == plan.round:
            more = [b for first, last in c["ranges"] for b in range(first, last)]
            plan.batches += more
            plan.stop = plan.stop or not more
        elif c["type"] == "signal":
            plan.signal.append([c["t_s"], c["mci"]])
        elif c["type"] in ("freeze", "cancel") and c["round"] == plan.round:
            plan.stop = True
            if c["type"] == "cancel":
                self._restore_theta()
                plan.mode, plan.done = "cancelled", -1
        elif c["type"] == "commit" and c.get("eval"):
            self.evaluate(c)
        elif c["type"] == "drop":
            self.drop()
            plan.stop, plan.mode, plan.done = True, "cancelled", -1

    # -- state --------------------------------------------------------------------------------------------------------

    def fetch(self, c: dict) -> None:
        """Download theta and m of a round, build the model around them. Our own inner optimizer state of that very
        round is used if it survived (a resume, or keep_disk), else it starts fresh."""
        if self.model is None:
            self.model = GPT(self.shape).to(self.device)
            self.flat = sync.Flat(self.model)
            n = self.flat.numel
            self.theta, self.m, self.theta_i, self.mean = (torch.zeros(n) for _ in range(4))
            self.inner = None
        if self.flat.numel != c["numel"]:
            raise Over(f"the model here has {self.flat.numel} parameters, the run's {c['numel']}", config.EXIT_FAILED)
        self._finish_background()
        if self.rank == 0:
            for name, vector in (("theta", self.theta), ("m", self.m)):
                for a, b in sync.chunks(vector.numel(), self.cfg.sync.chunk_mb):
                    header, data = self.link.request({"type": "chunk", "round": c["round"], "name": name, "start": a, "stop": b})
                    if not header["found"]:
                        raise Over(f"the coordinator has no stored round {c['round']}", config.EXIT_FAILED)
                    vector[a:b] = torch.frombuffer(bytearray(data), dtype=torch.float32)
        self._share_state()
        digest = sync.digest(self.theta, self.cfg.sync.chunk_mb)
        if c["digest"] and digest != c["digest"]:
            raise Over(f"round {c['round']} arrived with digest {digest[:12]}, the coordinator's is {c['digest'][:12]}", config.EXIT_FAILED)
        self._restore_theta()
        self.round, self.digest = c["round"], digest
        if self.inner is None:
            self.inner = Inner(self.model, self.cfg.optim)
            kept = c["own_disk"] and self._load_inner()
            if self.rank == 0:
                self.panel.rewind(c["rewind"])
                if kept:
                    print(f"{self.name:15} | inner optimizer state of round {self.round} found on own disk", flush=True)
        if self.rank == 0:
            self.link.send({"type": "current", "round": self.round})

    def _share_state(self) -> None:
        """Rank 0's theta and m on all ranks of the site."""
        if self.ranks > 1:
            for vector in (self.theta, self.m):
                there = vector.to(self.device)
                dist.broadcast(there, 0)
                vector.copy_(there)

    def _restore_theta(self) -> None:
        self.flat.write(self.theta, self.model)

    def drop(self) -> None:
        """Our grid's window has closed: what was on the machine is gone (but for keep_disk)."""
        self._finish_background()
        self.model = self.inner = None
        self.theta = self.m = self.theta_i = self.mean = None
        self.round = -1
        if not self.spec.keep_disk:
            for path in self._inner_files():
                path.unlink()

    def _inner_files(self) -> list[Path]:
        return sorted((self.dir / "sites" / self.name).glob(f"inner-*-rank{self.rank}.safetensors"))

    def _save_inner(self) -> None:
        """Inner optimizer state of the round we now hold, on our own disk, so that a resume is exact."""
        folder = self.dir / "sites" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().clone() for k, v in self.inner.tensors().items()}
        tensors["rng"] = torch.get_rng_state()
        about = {"run_id": self.run_id if self.rank == 0 else "", "round": str(self.round), "digest": self.digest}
        path = folder / f"inner-{self.round:06d}-rank{self.rank}.safetensors"

        def write():
            sync.write_durably(path, lambda tmp: save_file(tensors, tmp, metadata=about))
            for old in self._inner_files()[:-KEEP_INNER]:
                old.unlink()

        self._in_background(write)

    def _load_inner(self) -> bool:
        path = self.dir / "sites" / self.name / f"inner-{self.round:06d}-rank{self.rank}.safetensors"
        if not path.exists():
            return False
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        if about["digest"] != self.digest:
            return False
        tensors = load_file(path)
        torch.set_rng_state(tensors.pop("rng"))
        self.inner.load(tensors)
        return True

    def _in_background(self, work) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self.background.append(thread)
        thread.start()

    def _finish_background(self) -> None:
        for thread in self.background:
            thread.join()
        self.background.clear()

    # -- the inner step -----------------------------------------------------------------------------------------------

    def position(self, plan: Plan) -> float:
        """Tokens of the whole run before our next step: what is committed plus what all members train meanwhile."""
        own = plan.done * self.cfg.data.tokens_per_step
        return min(plan.committed_tokens + own * plan.rate_ratio, self.cfg.budget.tokens)

    def inner_step(self, plan: Plan, batch_id: int) -> float:
        """One batch of tokens_per_step tokens over all ranks; returns its mean loss in nats per token."""
        if plan.done == 0 and self.frozen_at:
            self.stall_s = time.monotonic() - self.frozen_at - self.excused_s
        cfg, rows = self.cfg, self.corpus.rows // self.ranks
        self.inner.set(schedule(self.position(plan), cfg.budget.tokens, cfg.data.tokens_per_step, cfg.optim))
        ids, targets = self.corpus.batch(batch_id, self.rank * rows, rows)
        total = 0.0
        for first in range(0, rows, self.spec.device_batch):
            part = slice(first, min(first + self.spec.device_batch, rows))
            x, y = ids[part].to(self.device), targets[part].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.model.dtype == "bfloat16"):
                loss = self.model(x, y) * (len(x) / rows)
            loss.backward()
            total += loss.item()
        if self.ranks > 1:
            total = self._mean_over_ranks(total)
        self.inner.step()
        self.inner.zero_grad()
        if not math.isfinite(total):
            raise_to = plan.done + 1
            if self.rank == 0:
                self.link.send({"type": "frozen", "round": plan.round, "steps": plan.done, "finite": False,
                                "bad_step": raise_to, "train_s": 0.0})  # fmt: skip
            plan.stop, plan.mode = True, "void"
        return total

    def _mean_over_ranks(self, loss: float) -> float:
        """Gradients and loss averaged over the site's ranks, in one buffer."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        buffer = torch.cat([g.reshape(-1) for g in grads] + [torch.tensor([loss], device=self.device)])
        dist.all_reduce(buffer)
        buffer /= self.ranks
        at = 0
        for g in grads:
            g.copy_(buffer[at : at + g.numel()].view_as(g))
            at += g.numel()
        return float(buffer[-1])

    # -- the outer step -----------------------------------------------------------------------------------------------

    def freeze(self, plan: Plan) -> None:
        """Hold still. Federated: report and wait in `agree`. Local: theta_i is the next theta; it travels to the
        coordinator while we train on, and counts once it is stored there."""
        if plan.mode not in ("local", "federated"):
            return
        train_s = time.monotonic() - plan.started
        self.flat.read(self.model, self.theta_i)
        finite = bool(torch.isfinite(self.theta_i).all())
        if self.rank == 0:
            self.link.send({"type": "frozen", "round": plan.round, "steps": plan.done, "finite": finite,
                            "bad_step": plan.done, "train_s": train_s})  # fmt: skip
        self.frozen_at, self.excused_s = time.monotonic(), 0.0
        if plan.mode == "local" and plan.done and finite:
            self.frozen_at = 0.0  # nobody to wait for: not a sync
            self._finish_background()
            r = self.cfg.rounds
            if r.local == "outer":
                torch.sub(self.theta, self.theta_i, out=self.mean)
                sync.outer_step_(self.theta, self.m, self.mean, r.outer, r.outer_lr, r.outer_momentum)
                self._restore_theta()
            else:
                self.theta.copy_(self.theta_i)
                self.m.zero_()
            self._now_holds(plan.round + 1)
            parts = {"theta": self.theta} | ({"m": self.m} if r.local == "outer" else {})
            self._upload(parts)

    def _now_holds(self, round_: int) -> None:
        self.round = round_
        self.digest = sync.digest(self.theta, self.cfg.sync.chunk_mb)
        self._save_inner()

    def _upload(self, parts: dict[str, torch.Tensor]) -> None:
        """Send vectors of the state we now hold to the coordinator, in the background, chunk by chunk."""
        if self.rank:
            return
        round_ = self.round

        def send():
            todo = [(n, v, a, b) for n, v in parts.items() for a, b in sync.chunks(v.numel(), self.cfg.sync.chunk_mb)]
            for i, (name, vector, a, b) in enumerate(todo):
                header = {"type": "upload", "round": round_, "name": name, "start": a, "stop": b, "last": i == len(todo) - 1}
                try:
                    self.link.request(header, bytes(sync.raw(vector[a:b])))
                except ChannelError:
                    return  # the coordinator is gone; `command` notices

        self._in_background(send)

    def agree(self, plan: Plan, attempt: dict | None = None) -> None:
        """From FREEZE to COMMIT or CANCEL: average the pseudo-gradients, vote, apply what was committed."""
        while True:
            c, attempt = attempt or self.command(), None
            if c["type"] == "attempt" and c["round"] == self.round:
                self._finish_background()  # the buffers may still be on their way to the coordinator
                self.excused_s += c["waited_s"]
                if self.rank == 0:
                    self._reduce_and_vote(plan, c)
            elif c["type"] == "commit" and c["round"] == self.round:
                self._apply(c)
                return
            elif c["type"] == "cancel" and c["round"] == self.round:
                self._restore_theta()
                return
            elif c["type"] == "drop":
                self.drop()
                return

    def _reduce_and_vote(self, plan: Plan, c: dict) -> None:
        s = self.cfg.sync
        timeout_s = max(30.0, self.cfg.rounds.grace_s)
        try:
            if s.topology == "star":
                reduce_chunk = sync.star_reduce(self.link, self.round, c["attempt"], timeout_s)
            else:
                store = ChannelStore(self.link, f"{c['round']}/{c['attempt']}", timeout_s)
                group = sync.ring_group(store, c["rank"], len(c["members"]), s.interface, timeout_s)
                reduce_chunk = sync.ring_reduce(group)
            theta_i = self.theta_i if plan.done else None
            self.vote = sync.average(self.theta, theta_i, c["weight"], reduce_chunk, s.chunk_mb, self.mean)
        except (RuntimeError, ChannelError) as error:
            reason = str(error).splitlines()[0]
            self.link.send({"type": "failed", "round": c["round"], "attempt": c["attempt"], "reason": reason})
            return
        self.link.send({"type": "vote", "round": c["round"], "attempt": c["attempt"], "digest": self.vote})

    def _apply(self, c: dict) -> None:
        """The outer step, the same bits at every member."""
        if self.rank == 0 and c["digest"] != self.vote:
            raise Over(f"round {c['round']} was committed with digest {c['digest'][:12]}, ours is {self.vote[:12]}", config.EXIT_FAILED)
        r = self.cfg.rounds
        if self.rank == 0:
            sync.outer_step_(self.theta, self.m, self.mean, r.outer, r.outer_lr, r.outer_momentum)
        self._share_state()
        self._restore_theta()
        if c["send"]:
            self.round = c["round"] + 1
            self._upload({"delta": self.mean})
        self._now_holds(c["round"] + 1)
        if self.rank == 0:
            self.link.send({"type": "applied", "round": self.round, "digest_theta": self.digest,
                            "digest_m": sync.digest(self.m, self.cfg.sync.chunk_mb)})  # fmt: skip
        if c["eval"]:
            self.evaluate(c)

    # -- measuring ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, c: dict) -> None:
        """Validation loss (nats per token) and bits per byte (separators left out) of the model we hold."""
        began = time.monotonic()
        last = c["type"] == "evaluate"
        round_ = c["round"] if last else c["round"] + 1
        tokens = self.cfg.data.val_tokens if last else self.cfg.eval.tokens
        model, sizes = self.model, self.corpus.token_bytes
        if self.round > round_ or model is None:
            return
        nats = count = byte_nats = num_bytes = 0.0
        for ids, targets in self.corpus.validation(tokens, self.spec.device_batch):
            logits = model(ids.to(self.device))
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.to(self.device).flatten(), reduction="none"
            ).cpu().double()  # fmt: skip
            width = sizes[targets.flatten()]
            nats, count = nats + losses.sum().item(), count + losses.numel()
            byte_nats, num_bytes = byte_nats + losses[width > 0].sum().item(), num_bytes + width.sum().item()
        self.excused_s += time.monotonic() - began
        if self.rank == 0:
            report_ = {"val_loss": nats / count, "val_bpb": byte_nats / math.log(2) / num_bytes}
            self.link.send({"type": "eval", "round": round_} | report_)

    def log_step(self, plan: Plan, batch_id: int, loss: float) -> None:
        """A round's first step and every log.every_steps: a line in SITE.jsonl and wandb, a word to the coordinator."""
        if self.rank or (plan.done > 1 and plan.done % self.cfg.log.every_steps):
            return
        elapsed = time.monotonic() - plan.started
        rate = plan.done * self.cfg.data.tokens_per_step / elapsed
        trained_s = plan.done * config.step_s(self.cfg, self.name) if self.virtual else elapsed
        t_s = plan.open_s + trained_s
        position = self.position(plan)
        lr = self.inner.muon.param_groups[0]["lr"]
        emitted, mci = integrate(plan.signal, plan.open_s, t_s, self.spec.train_kw)
        record = {
            "t_s": round(t_s, 3), "round": plan.round, "step": round(position / self.cfg.data.tokens_per_step),
            "batch": batch_id, "loss": loss, "lr": lr, "tokens": int(position),
            "tok_per_s": self.spec.tokens_per_s if self.virtual else round(rate, 1), "state": "training",
            "mci_g_per_kwh": mci, "power_kw": self.spec.train_kw,
            "energy_kwh": plan.energy_kwh + energy_kwh(self.spec.train_kw, trained_s),
            "emissions_kg": plan.emissions_kg + emitted,
            "wall": {"unix": round(time.time(), 3), "tok_per_s": round(rate, 1)} | ({"stall_s": round(self.stall_s, 4)} if self.stall_s is not None else {}),
        }  # fmt: skip
        self.stall_s = None
        self.panel.step(record, plan.mode)
        self.link.send({"type": "progress", "round": plan.round, "step": record["step"], "loss": loss, "mode": plan.mode,
                        "tok_per_s": rate, "energy_kwh": record["energy_kwh"], "emissions_kg": record["emissions_kg"],
                        "mci": mci, "t_s": t_s})  # fmt: skip


def integrate(signal_: list, t0: float, t1: float, power_kw: float) -> tuple[float, float | None]:
    """kgCO2 of a constant power over [t0, t1] against [t_s, gCO2/kWh] samples that hold, and the last of them."""
    total, mci = 0.0, None
    for i, (since, value) in enumerate(signal_):
        until = signal_[i + 1][0] if i + 1 < len(signal_) else t1
        a, b = max(since, t0), min(until, t1)
        if b > a or mci is None:
            total, mci = total + value * max(b - a, 0.0), value
    return power_kw * total / 3.6e6, mci


def _sigterm(number, frame) -> None:
    raise Over("asked to stop (SIGTERM)", config.EXIT_DONE)


def die_with_parent() -> None:
    """Linux: do not outlive torchrun, even if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    die_with_parent()
    config.command(main)
