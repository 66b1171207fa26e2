"""One site. It trains while its grid throws clean power away, and agrees with the other sites on one model.

    torchrun --nproc_per_node=1 train.py configs/demo.yaml site=california [key=value ...]
    torchrun --nproc_per_node=4 train.py configs/d20.yaml site=texas
    torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=NODE0:29500 train.py configs/d20.yaml site=texas

The coordinator (coordinator.py) says when: this process connects to it, waits, and is told to fetch the model, to
train a round, to average it with others, to drop everything. Read `main` first: it is the algorithm of a round.

    next_round()  blocks while our grid is not curtailed            inner_step()  one batch, Muon and AdamW
    freeze()      hold still, report tokens and finiteness          agree()       average, vote, commit, outer step

Several ranks (torchrun --nproc_per_node=N, --nnodes=M) share a batch by rows. Only rank 0 runs what is below: it speaks for the
site, and what it does with its shard (shard.py), the others do too. A step is queued, not awaited: its loss is read when the
next one is under way.
When the coordinator cannot be heard we work off our lease and then hold still, for at most rounds.max_offline_s; when it is
back it learns from our hello where we stand. SIGTERM or Ctrl-C: we freeze, take part in one last average, and go.

theta and its way to the coordinator are replica.py's, the socket channel.py's. What listens: torchrun's own store (see
README); this file only connects outwards, gloo binds sync.interface.
"""

import ctypes
import math
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import config
import report
import sync
from carbon import charged, energy_kwh
from channel import ChannelError, ChannelStore, Link
from config import BadInput
from data import split_rows
from optim import schedule
from replica import Mismatch, Replica
from shard import Shard, brief, lost_a_rank

LEAVE_S = 20.0  # after SIGTERM: less than the 30 s torchrun grants
PULSE_S = 2.0  # the other ranks hear from us this often, and can say that they were asked to go


class Over(Exception):
    """The run has ended, or this process must."""

    def __init__(self, reason: str, code: int):
        super().__init__(reason)
        self.code = code


@dataclass
class Plan:
    """One round as this site sees it."""

    round: int
    mode: str  # local | federated | void: cancelled, or our numbers left the finite
    batches: list[int]  # leased batch ids, in order
    committed_tokens: int = 0  # before this round
    rate_ratio: float = 1.0  # all members' tokens/s over our own
    splits: int = 1  # inner steps per batch
    open_s: float = 0.0  # run time at the round's start
    train_for_s: float = 0.0
    energy_kwh: float = 0.0  # ours, up to the round's start
    emissions_kg: float = 0.0
    cost: float | None = None  # in the price trace's currency; None without one
    drawn_kwh: float | None = None  # what our meter showed then
    signal: list = ()  # [t_s, gCO2/kWh, currency/MWh or None] from the round's start on
    started: float = 0.0  # monotonic
    steps: int | None = None  # virtual clock: train exactly so many
    done: int = 0
    stop: bool = False
    bad_step: int | None = None  # after which our numbers were no longer finite


@dataclass
class Step:
    """A step that has been queued, to be logged once its loss is known."""

    plan: Plan
    done: int  # steps of this round with it
    batch: int
    position: float
    lr: float
    loss: torch.Tensor


def main(argv: list[str]) -> int:
    cfg = config.load(argv)
    if cfg.site is None:
        raise BadInput(f"site= is missing; say which one this is: {', '.join(cfg.sites)}")
    shard = Shard(cfg)
    if shard.ranks.rank:
        shard.follow()  # to the end
    site = Site(cfg, shard)
    try:
        site.join()
        while True:
            plan = site.next_round()  # blocks while our grid is not curtailed
            while site.may_step(plan):  # until the round's end, our lease's end, or a word from the coordinator
                batch_id = plan.batches[plan.done]
                loss = site.inner_step(plan, batch_id)
                plan.done += 1
                site.log_step(plan, batch_id, loss)
            site.freeze(plan)  # theta stays untouched until the commit
            if plan.mode == "federated":
                site.agree(plan)  # pseudo-gradients averaged, voted, committed; then the outer step
    except Over as over:
        return site.leave(str(over), over.code)
    except Mismatch as error:
        return site.leave(str(error), config.EXIT_FAILED)
    except BadInput as error:
        return site.leave(str(error), config.EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return site.leave("stopped by Ctrl-C", 130)
    except Exception as error:
        if not lost_a_rank(error):
            traceback.print_exc()
        return site.leave(f"{type(error).__name__}: {brief(error)}", config.EXIT_FAILED)


class Site:
    """A site, as its rank 0 sees it."""

    def __init__(self, cfg, shard: Shard):
        self.cfg, self.name, self.spec, self.shard = cfg, cfg.site, cfg.sites[cfg.site], shard
        self.virtual = cfg.clock.mode == "virtual"
        self.queued: Step | None = None
        self.unlogged: list[list[float]] = []  # [t_s, loss] of the steps read since the last that was logged
        self.write_last = None  # logs the last of them
        self.frozen_at = 0.0  # monotonic; 0: no sync behind us
        self.excused_s = 0.0  # since then: evaluation, and waiting for slower members
        self.stall_s: float | None = None
        self.link: Link | None = None
        self.leaving_since = 0.0  # monotonic; 0: nobody asked us to go
        self.leaving_code = config.EXIT_DONE
        self.pulsed = 0.0  # monotonic: when the other ranks last heard from us for no other reason
        self.looked = 0.0  # monotonic: when we last looked whether the coordinator has moved
        self.status = {"held": -1, "round": -1, "open_s": 0.0, "phase": "idle", "steps": 0, "finite": True, "attempt": 0, "vote": "",
                       "unstored": {}}  # fmt: skip
        self.panel: report.Panel | None = None
        self.replica: Replica | None = None

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Find our place in the run."""
        run_id = self._join()
        self.replica = Replica(self.cfg, self.shard, self.link, run_id)
        self.note()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _join(self) -> str:
        """Say hello until the coordinator welcomes us (returns the run's id) or refuses us (raises BadInput)."""
        cfg, started = self.cfg, time.monotonic()
        until = started + cfg.rounds.rejoin_wait_s
        hello = {"type": "hello", "site": self.name, "incarnation": uuid.uuid4().hex[:12],
                 "config digest": config.train_digest(cfg), "corpus digest": self.shard.corpus.digest,
                 "tokenizer digest": self.shard.corpus.tokenizer_digest, "versions": config.versions(),
                 "device": str(self.shard.device), "ranks": self.shard.ranks.size}  # fmt: skip
        reason, busy, address, keys, link = "nothing answers", False, None, config.run_dir(cfg) / "keys", None
        while time.monotonic() < until:
            if link and link.address != self._address():
                link = link.close()
            if not link and (address := self._address()):
                link = Link(address, keys, self.name, cfg.sync.heartbeat_s, cfg.sync.dead_s, hello)
            try:
                header = link.inbox.get(timeout=2.0)[0] if link else {"type": "silence"}
            except queue.Empty:  # a coordinator may take a while to make theta_0: it has heard us, and one hello is enough
                header = {"type": "silence"}
            if header["type"] == "welcome":
                link.welcomed = True
                self.link, self.panel = link, report.Panel(cfg, header["run_id"], self.name)
                return header["run_id"]
            if header["type"] == "refused":
                link = link.close()
                if not header.get("busy") and header.get("sure", True):
                    raise BadInput(f"site {self.name}: refused: {header['reason']}")
                reason, busy = header["reason"], busy or bool(header.get("busy"))
                if busy:  # our predecessor may have died without a word: it counts as gone after dead_s
                    until = min(until, started + 2 * cfg.sync.dead_s)
            time.sleep(0.3)
        if link:
            link.close()
        where = address or config.run_dir(cfg) / "address"
        remedy = "stop the other process" if busy else "start `python coordinator.py CONFIG` there"
        raise BadInput(f"site {self.name}: no place in the run at {where} within {time.monotonic() - started:.0f} s: {reason}; {remedy}")

    def _address(self) -> str | None:
        """Where the coordinator listens: the config says, or it wrote it into the run's folder beside our key."""
        folder = config.run_dir(self.cfg)
        if self.cfg.sync.port:
            return f"{self.cfg.sync.host}:{self.cfg.sync.port}"
        there = (folder / "address").exists() and (folder / "keys" / f"{self.name}.key_secret").exists()
        return (folder / "address").read_text().strip() if there else None

    def leave(self, reason: str, code: int) -> int:
        """Say goodbye, close everything, end the other ranks (and this process with them); returns the exit code."""
        if self.link:
            if self.replica:
                self.replica.settle()
            last = self.energy() if self.shard.ranks.num_nodes == 1 else {}  # the others may be gone
            self.link.close({"type": "bye", "reason": reason} | last)
        if self.panel:
            self.panel.finish({})
        if code not in (config.EXIT_DONE, config.EXIT_BUDGET_LEFT):
            who = "train.py" if code == config.EXIT_BAD_INPUT else self.name
            print(f"{who}: {reason}", file=sys.stderr, flush=True)
        self.shard.leave(code)
        return code

    # -- being told ---------------------------------------------------------------------------------------------------

    def wait(self) -> dict:
        """The coordinator's next command, however long it takes."""
        while not (c := self.command(PULSE_S)):
            pass
        return c

    def command(self, wait_s: float) -> dict | None:
        """The coordinator's next command; None if there is none within wait_s seconds. Raises Over when the run ends, we are to go, or
        the coordinator has been silent for too long."""
        if time.monotonic() - self.pulsed >= PULSE_S:
            self.pulsed = time.monotonic()
            if self.shard.pulse():
                self._asked_to_leave(signal.SIGTERM)
        c = self._command(wait_s)
        if c and c["type"] in ("end", "refused"):
            code = c.get("code", config.EXIT_FAILED)
            raise Over(c["reason"], config.EXIT_FAILED if code == config.EXIT_BAD_INPUT else code)
        return c

    def _command(self, wait_s: float) -> dict | None:
        until = time.monotonic() + wait_s
        while True:
            try:
                c = self.link.inbox.get(timeout=max(0.0, min(0.2, until - time.monotonic())))[0]
            except queue.Empty:
                c = self._patience()
            if c and c["type"] == "drop" and self.leaving_since:
                return {"type": "end", "code": self.leaving_code, "reason": "asked to stop"}
            if c or time.monotonic() >= until:
                return c

    def _patience(self) -> dict | None:
        """Nothing to hear: has the coordinator moved, is it gone for good, have we been asked to go long enough ago?"""
        now, silent_s, limit_s = time.monotonic(), self.link.silent_s(), self.cfg.rounds.max_offline_s
        if silent_s > self.cfg.sync.dead_s and now - self.looked > 1.0:
            self.looked = now
            if (address := self._address()) and address != self.link.address:
                self.link.move(address)
        if silent_s > limit_s:
            return {"type": "end", "reason": f"the coordinator has not been heard for rounds.max_offline_s={limit_s:g} s; "
                    "start it again, then this site: both resume"}  # fmt: skip
        if self.leaving_since and (now - self.leaving_since > LEAVE_S or silent_s > self.cfg.sync.dead_s):
            return {"type": "end", "code": self.leaving_code, "reason": "asked to stop"}
        return None

    def _on_signal(self, number, frame) -> None:
        """SIGTERM, or Ctrl-C; a second Ctrl-C does not wait for anything."""
        if number == signal.SIGINT and self.leaving_since:
            raise KeyboardInterrupt
        self._asked_to_leave(number)

    def _asked_to_leave(self, number: int) -> None:
        """On the virtual clock a round cannot be cut short: we go at once."""
        self.leaving_code = 130 if number == signal.SIGINT else config.EXIT_DONE
        name = signal.Signals(number).name
        if self.virtual:
            raise Over(f"asked to stop ({name})", self.leaving_code)
        if not self.leaving_since:
            self.leaving_since = time.monotonic()
            self.link.send({"type": "leaving", "reason": name})

    def note(self, **changes) -> None:
        """Where we stand, for the next hello."""
        self.status = self.status | {"held": self.replica.round} | changes
        if self.link:
            self.link.status = self.status

    def tell(self, **report_) -> None:
        """A report to the coordinator."""
        self.link.send(report_)

    def energy(self) -> dict:
        """What the site has drawn since it started, for a report; nothing where that is not measured."""
        joules = self.shard.joules()
        return {} if joules is None else {"energy": {"kwh": joules / 3.6e6, "method": self.shard.meter.method}}

    def next_round(self) -> Plan:
        """Follow the coordinator until it opens a round for us."""
        while True:
            c, held = self.wait(), self.replica.round
            if c["type"] == "fetch":
                self.fetch(c)
            elif c["type"] == "open" and c["round"] == held:
                return self._plan(c)
            elif c["type"] == "attempt" and c["round"] == held:  # we joined during this round: zero tokens
                self.agree(Plan(held, "federated", []), c)
            elif c["type"] == "cancel" and held >= 0:
                self.replica.restore()
                self.note(round=-1, phase="idle", vote="", unstored={})
            elif c["type"] == "evaluate" or (c["type"] == "commit" and c["eval"] and c["round"] + 1 == held):
                self.evaluate(c)
            elif c["type"] in ("open", "freeze", "attempt"):  # not of the state we hold
                self.link.greet()
            else:
                self._common(c)

    def _common(self, c: dict) -> bool:
        """What may be asked of us at any time; True if that leaves us without the state of the run."""
        if c["type"] == "drop":
            self.replica.drop(self.spec.keep_disk or c.get("keep", False))
            self.note(round=-1, phase="idle", vote="", unstored={})
            return True
        if c["type"] == "resend" and c["round"] <= self.replica.round:
            self.replica.resend()
        elif c["type"] == "commit":
            self.note(unstored={r: n for r, n in self.status["unstored"].items() if int(r) > c["round"]})
        return False

    def fetch(self, c: dict) -> None:
        fresh = self.shard.inner is None
        if before := self.energy():  # from here on the download is measured, too
            self.tell(type="meter", **before)
        if not self.replica.download(c["round"], c["numel"], c["digest"]):
            self.note(round=-1, phase="idle")
            self.tell(type="again")
            return
        kept = self.replica.take(c["round"], c["own_disk"])
        if fresh:
            self.panel.rewind(c["rewind"])
            if kept:
                print(f"{self.name:15} | inner optimizer state of round {c['round']} found on own disk", flush=True)
        self.note(round=-1, phase="idle", vote="", unstored={})
        self.tell(type="current", id=c["id"], round=c["round"], download_s=self.replica.download_s, **self.energy())

    def _plan(self, c: dict) -> Plan:
        if self.cfg.rounds.inner_state == "reset":
            self.shard.new_inner()
        self.shard.threads(c["mode"] == "local")
        together = self.cfg.rounds.lr_position == "global"
        ratio = c["rate_ratio"] if together else 1.0
        splits = c["num_members"] if self.cfg.rounds.split_steps else 1
        batches = [b for first, last in c["leases"] for b in range(first, last)]
        drawn = self.energy().get("energy", {}).get("kwh")
        self.note(round=c["round"], open_s=c["open_s"], phase="train", steps=0, finite=True, vote="")
        return Plan(c["round"], c["mode"], batches, c["committed_tokens"], ratio, splits, c["open_s"], c["train_for_s"],
                    c["energy_kwh"], c["emissions_kg"], c["cost"], drawn, c["signal"], started=time.monotonic())  # fmt: skip

    def may_step(self, plan: Plan) -> bool:
        """Whether another step belongs to this round. Virtual clock: so many as we are told. Wall clock: until the
        round's time is over, the coordinator says freeze, or no batch is left."""
        if self.virtual:
            while plan.steps is None and not plan.stop:
                self._in_round(plan, self.wait())
            return not plan.stop and plan.done < plan.steps
        while not plan.stop and (c := self.command(0.0)):
            self._in_round(plan, c)
        late = time.monotonic() - plan.started >= plan.train_for_s
        if not plan.stop and not late and plan.done == len(plan.batches):
            while plan.done == len(plan.batches) and not plan.stop:
                self.tell(type="more", round=plan.round, open_s=plan.open_s, known=len(plan.batches))
                if c := self.command(1.0):
                    self._in_round(plan, c)
        return not plan.stop and not late

    def _in_round(self, plan: Plan, c: dict) -> None:
        ours = c.get("round") == plan.round
        if c["type"] == "go" and ours:
            plan.steps, plan.signal = c["steps"], c["signal"]
        elif c["type"] == "lease" and ours:
            more = [b for first, last in c["ranges"] for b in range(first, last)]
            plan.batches += [b for b in more if b not in plan.batches]
            plan.stop = plan.stop or not more
        elif c["type"] == "signal":
            plan.signal.append([c["t_s"], c["mci"], c["price"]])
        elif c["type"] == "freeze" and ours:
            plan.stop = True
        elif c["type"] == "cancel" and c["round"] <= plan.round:
            self.replica.restore()
            self._void(plan)
        elif c["type"] == "fetch":  # our copy is not what it should be, or the run has moved on
            self._void(plan)
            self.fetch(c)
        else:
            if c["type"] == "commit" and c["eval"] and c["round"] + 1 == plan.round:
                with self.replica.at_theta():  # our local round before this one: the model has moved on, theta has not
                    self.evaluate(c)
            if self._common(c):
                self._void(plan)

    def _void(self, plan: Plan) -> None:
        plan.stop, plan.mode = True, "void"
        self.note(round=-1, phase="idle", vote="")

    # -- the inner step -----------------------------------------------------------------------------------------------

    def position(self, plan: Plan, share: float = 0.0) -> float:
        """Tokens of the whole run before our next step, `share` of a batch further: what is committed plus what all
        members train meanwhile."""
        own = (plan.done + share) * self.cfg.data.tokens_per_step
        return min(plan.committed_tokens + own * plan.rate_ratio, self.cfg.budget.tokens)

    def inner_step(self, plan: Plan, batch_id: int) -> torch.Tensor:
        """One batch of tokens_per_step tokens over all ranks; returns its mean loss in nats per token, on the device: nothing here
        waits for a GPU.

        It is one step of the inner optimizer, or with `rounds.split_steps` as many as there are members, of that much
        fewer tokens each: a federated run then takes as many steps one after the other as a site alone.
        """
        if plan.done == 0 and self.frozen_at:
            self.stall_s = time.monotonic() - self.frozen_at - self.excused_s
        cfg, rows, parts = self.cfg, self.shard.rows, []
        for first, stop in split_rows(rows, plan.splits):
            position = self.position(plan, first / rows)
            point = schedule(position, cfg.budget.tokens, cfg.data.tokens_per_step, cfg.optim)
            parts.append([first, stop, *point])
        return self.shard.step(batch_id, plan.batches[plan.done + 1 : plan.done + 2], parts)

    # -- the outer step -----------------------------------------------------------------------------------------------

    def freeze(self, plan: Plan) -> None:
        """Hold still. Federated: report and wait in `agree`. Local: theta_i is the next theta; it travels to the
        coordinator while we train on, and counts once it is stored there."""
        self.read_step()
        if self.unlogged:  # a round's last step is logged, however many came before it
            self.write_last(told=False)
        if plan.mode == "void":
            return
        train_s, steps = time.monotonic() - plan.started, plan.done
        finite = plan.bad_step is None and self.replica.freeze()
        if not finite:  # from theta again, with an optimizer that has not seen this
            plan.done = 0
            self.replica.restore()
            self.shard.new_inner()
        self.note(phase="frozen", steps=plan.done, finite=finite)
        self.tell(type="frozen", round=plan.round, open_s=plan.open_s, steps=plan.done, finite=finite,
                  bad_step=plan.bad_step or steps, train_s=train_s, **self.energy())  # fmt: skip
        self.frozen_at, self.excused_s = time.monotonic(), 0.0
        if plan.mode == "local":
            self.frozen_at = 0.0  # nobody to wait for: not a sync
            if plan.done:
                parts = self.replica.take_own()
                self.note(round=-1, phase="idle", unstored=self.status["unstored"] | {str(plan.round): plan.done})
                self.replica.upload(parts)

    def agree(self, plan: Plan, attempt: dict | None = None) -> None:
        """From FREEZE to COMMIT or CANCEL: average the pseudo-gradients, vote, apply what was committed."""
        self.note(round=plan.round, open_s=plan.open_s, phase="frozen", steps=plan.done, vote="")
        while True:
            c, attempt = attempt or self.wait(), None
            ours = c.get("round") == plan.round
            if c["type"] == "attempt" and ours:
                self.excused_s += c["waited_s"]
                self._reduce_and_vote(plan, c)
            elif c["type"] == "give" and ours:
                self.replica.give(c["attempt"], c["digest"])
            elif c["type"] == "take" and ours:
                if self.replica.receive(c["digest"]):
                    self._vote(c, c["digest"])
            elif c["type"] == "commit" and ours:
                self._apply(c)
                break
            elif c["type"] == "cancel" and c["round"] <= plan.round:
                self.replica.restore()
                break
            elif c["type"] == "fetch":  # the round went on without us
                self.fetch(c)
                break
            elif self._common(c):
                break
        self.note(round=-1, phase="idle")

    def _reduce_and_vote(self, plan: Plan, c: dict) -> None:
        interface, round_, number = self.cfg.sync.interface, c["round"], c["attempt"]
        self.note(attempt=number, vote="")
        if c["weight"] and not plan.done:  # the average counts on a delta that we do not have: never put nothing in its place
            self.tell(type="failed", round=round_, attempt=number, reason="nothing is frozen here")
            self.link.greet()
            return
        try:
            if c["num_members"] == 1:  # the others are gone: our own delta is the result
                peers = sync.Alone()
            elif c["topology"] == "star":
                peers = sync.Star(self.link, round_, number, self.replica.num_chunks, c["chunk_s"])
            else:
                store = ChannelStore(self.link, f"{round_}/{number}", c["chunk_s"])
                group = sync.ring_group(store, c["rank"], c["num_members"], interface, c["chunk_s"])
                peers = sync.Ring(group, c["rank"], c["num_members"], c["chunk_s"], c["wire"])
            digest = self.replica.average(c["weight"], peers, c["wire"], stepped=plan.done > 0)
        except (RuntimeError, ChannelError) as error:
            peers = group = None  # closes its sockets: the other survivors stop waiting, too
            self.tell(type="failed", round=round_, attempt=number, reason=brief(error))
            return
        self._vote(c, digest, bytes_per_s=self.replica.averager.rate, took_s=self.replica.averager.took_s)

    def _vote(self, c: dict, digest: str, **measured) -> None:
        self.note(vote=digest)
        self.tell(type="vote", round=c["round"], attempt=c["attempt"], digest=digest, **measured)

    def _apply(self, c: dict) -> None:
        """The outer step, only with what was committed."""
        if c["digest"] != self.status["vote"]:
            raise Mismatch(f"round {c['round']} was committed with digest {c['digest'][:12]}, ours is {self.status['vote'][:12]}")
        made = c["round"] + 1
        self.replica.apply(c["digest"], lambda theta, m: self.tell(type="applied", round=made, digest_theta=theta, digest_m=m))
        self.note(phase="idle")
        if c["send"]:
            self.replica.upload({"delta": self.replica.averager.agreed})
        if c["eval"]:
            self.evaluate(c)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def evaluate(self, c: dict) -> None:
        """Validation loss (nats per token) and bits per byte (separators left out) of the model we hold."""
        began, last = time.monotonic(), c["type"] == "evaluate"
        if last:  # the others have no work any more
            self.shard.threads(True)
        nats, count, byte_nats, num_bytes = self.shard.evaluate(self.cfg.data.val_tokens if last else self.cfg.eval.tokens)
        self.excused_s += time.monotonic() - began
        round_ = c["round"] if last else c["round"] + 1
        self.tell(type="eval", round=round_, val_loss=nats / count, val_bpb=byte_nats / math.log(2) / num_bytes,
                  **self.energy())  # fmt: skip

    def log_step(self, plan: Plan, batch_id: int, loss: torch.Tensor) -> None:
        """Log the step before this one, for on a GPU this one has only been queued."""
        self.read_step()
        self.queued = Step(plan, plan.done, batch_id, self.position(plan), self.shard.inner.matrices["lr"], loss)
        if self.shard.device.type == "cpu":
            self.read_step()

    def read_step(self) -> None:
        """Wait for the queued step. A round's first step, its last and every log.every_steps: a line in SITE.jsonl and wandb, a word
        to the coordinator. The line also has the losses of the steps since the line before."""
        step, self.queued = self.queued, None
        if step is None:
            return
        plan, loss = step.plan, step.loss.item()
        if not math.isfinite(loss) and plan.bad_step is None:
            plan.stop, plan.bad_step = True, step.done
        elapsed = time.monotonic() - plan.started
        trained_s = step.done * config.step_s(self.cfg, self.name) if self.virtual else elapsed
        self.unlogged.append([round(plan.open_s + trained_s, 3), loss])
        self.write_last = partial(self._write_step, step, loss, elapsed, trained_s)
        if step.done == 1 or step.done % self.cfg.log.every_steps == 0:
            self.write_last()

    def _write_step(self, step: Step, loss: float, elapsed: float, trained_s: float, told: bool = True) -> None:
        drawn, plan = self.energy(), step.plan
        per_step, kw = self.cfg.data.tokens_per_step, self.spec.train_kw
        rate = step.done * per_step / elapsed
        t_s, method = plan.open_s + trained_s, "model"
        *since, _ = self.unlogged
        self.unlogged = []
        if drawn and plan.drawn_kwh is not None:
            method, kw = drawn["energy"]["method"], (drawn["energy"]["kwh"] - plan.drawn_kwh) / trained_s * 3600
        emitted_kg, mci = integrate([(t, mci) for t, mci, _ in plan.signal], plan.open_s, t_s, kw)
        paid, price = integrate([(t, price) for t, _, price in plan.signal if price is not None], plan.open_s, t_s, kw)
        wall = {"unix": round(time.time(), 3), "tok_per_s": round(rate, 1)}
        if self.shard.mfu_per_rate:
            wall["mfu"] = round(self.shard.mfu_per_rate * rate, 4)
        if self.stall_s is not None:
            wall["stall_s"], self.stall_s = round(self.stall_s, 4), None
        record = {
            "t_s": round(t_s, 3), "round": plan.round, "step": round(step.position / per_step), "batch": step.batch, "loss": loss,
            "since": since,
            "lr": step.lr, "tokens": int(step.position), "tok_per_s": self.spec.tokens_per_s if self.virtual else round(rate, 1),
            "state": "training", "mci_g_per_kwh": mci, "power_kw": kw, "energy_kwh": plan.energy_kwh + energy_kwh(kw, trained_s),
            "emissions_kg": plan.emissions_kg + emitted_kg, "cost": None if plan.cost is None else plan.cost + paid,
            "price_per_mwh": price, "energy_method": method, "wall": wall,
        }  # fmt: skip
        self.panel.step(record, plan.mode)
        if told:
            words = {k: v for k, v in record.items() if k not in ("wall", "since")} | {"tok_per_s": rate, "mfu": wall.get("mfu")}
            self.tell(type="progress", mode=plan.mode, **words, **drawn)


def integrate(signal_: list, t0: float, t1: float, power_kw: float) -> tuple[float, float | None]:
    """kgCO2 of a constant power over [t0, t1] against (t_s, gCO2/kWh) samples that hold, and the last of them; against
    (t_s, currency/MWh) ones: what it costs."""
    total, last = 0.0, None
    for i, (since, value) in enumerate(signal_):
        until = signal_[i + 1][0] if i + 1 < len(signal_) else t1
        a, b = max(since, t0), min(until, t1)
        if b > a or last is None:
            total, last = total + value * max(b - a, 0.0), value
    return charged(power_kw, total), last


def remove_torchrun_s_folder() -> None:
    """torchrun makes a folder for logs that nobody asked for, and leaves it behind."""
    for folder in Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents:
        if folder.name.startswith("torchelastic_") and folder.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(folder, ignore_errors=True)


def die_with_parent() -> None:
    """Linux: do not outlive torchrun, even if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    die_with_parent()
    remove_torchrun_s_folder()
    config.command(main)
