"""The run as a state machine: rounds, attempts, leases, commits. Events in, records and actions out.

    run = Run(facts, schedule, meter)
    run.observe(t, site, mci) ... run.advance(t)      # time and signals
    run.frozen(...), run.voted(...), run.stored(...)  # what the sites report
    records, actions = run.take()                     # what to journal, then what to tell the sites

One machine, three drivers: the coordinator in real time, the coordinator on the virtual clock, and the simulator
(`drive` serves the last two). Pure: knows neither torch nor sockets nor the clock. Times are seconds since
clock.start.

A round, on a whiteboard:

    idle --open--> train --freeze--> freezing --all frozen--> reduce --all votes equal--> commit   (two or more members)
                                        \\------------------> storing --stored-----------> commit   (one member: local)
    local round + another site on:  freeze, store, then `handover` until the joiner holds the state, then open

`facts.timed` says who owns time. True (virtual clock, simulator): a step takes step_s, a sync takes sync_s, reports
arrive at once and the machine waits until they are due. False (wall clock): reports arrive when they do.
"""

import heapq
from dataclasses import dataclass, field

from carbon import Meter
from ledger import Ledger, Ranges, count, split
from scheduler import INFINITY, Move, Schedule

ROUND_OFF = 1e-6  # seconds; a step that ends this close to a deadline fits


@dataclass(frozen=True)
class Facts:
    """What the machine must know of a config. `step_s` and `rates` (tokens/s) per site, in site order."""

    step_s: dict[str, float]
    rates: dict[str, float]
    tokens_per_step: int
    num_batches: int
    timed: bool
    train_s: float
    sync_s: float
    max_steps: int | None
    commit_every_s: float | None
    grace_s: float
    eval_every_rounds: int
    end_s: float  # the trace or clock.max_hours ends here


def facts_of(cfg, end_s: float) -> Facts:
    r, per_step = cfg.rounds, cfg.data.tokens_per_step
    rates = {name: site.tokens_per_s for name, site in cfg.sites.items()}
    return Facts(
        {name: per_step / rate for name, rate in rates.items()}, rates, per_step, cfg.budget.tokens // per_step,
        cfg.clock.mode == "virtual", r.train_s, r.sync_s, r.max_steps, r.commit_every_s, r.grace_s,
        cfg.eval.every_rounds, end_s,
    )  # fmt: skip


@dataclass(slots=True)
class Action:
    """Something to tell the sites. `kind`: start, fetch, open, lease, freeze, store, attempt, commit, cancel, drop,
    evaluate, end."""

    kind: str
    site: str | None = None
    data: dict = field(default_factory=dict)


@dataclass
class Round:
    number: int
    mode: str  # local | federated
    members: list[str]
    open_s: float
    end_s: float  # planned freeze
    leases: dict[str, Ranges]
    steps: dict[str, int] = field(default_factory=dict)  # frozen members
    freeze_s: float = INFINITY
    attempt: int = 0
    taking_part: list[str] = field(default_factory=list)  # members and joiners of the attempt
    tokens: dict[str, int] = field(default_factory=dict)
    votes: dict[str, str] = field(default_factory=dict)


class Run:
    def __init__(self, facts: Facts, schedule: Schedule, meter: Meter):
        self.facts, self.schedule, self.meter = facts, schedule, meter
        self.ledger = Ledger(facts.num_batches)
        self.round = 0  # the round whose start state is theta_round
        self.stored = 0  # the newest round whose start state is durable at the coordinator
        self.phase = "idle"  # idle | train | freezing | reduce | storing | handover | ending | ended
        self.now: Round | None = None
        self.pending: list[dict] = []  # local rounds frozen but not yet stored, oldest first
        self.holds: dict[str, int] = {}  # site -> round whose start state it holds
        self.leaving: set[str] = set()  # off by the schedule, still busy with a round
        self.handover_s = INFINITY  # timed: when the hand-over is over; wall: when to stop waiting for all
        self.fetching: set[str] = set()  # sites told to download the state
        self.sync_s = facts.sync_s  # wall: replaced by what was measured
        self.rates = dict(facts.rates)  # wall: likewise
        self.reason, self.code = "", 0
        self._power = None  # what the sites' power was last derived from, and
        self._touched: set[str] = set()  # whose own part in it has changed since
        self._records: list[dict] = []
        self._actions: list[Action] = []

    # -- out --------------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        return self.phase == "ended"

    @property
    def mode(self) -> str:
        return self.now.mode if self.now else "paused"

    @property
    def committed_tokens(self) -> int:
        """Tokens in theta_round. A local round counts from its freeze on: the next one starts from its result."""
        waiting = sum(p["count"] for p in self.pending)
        return (self.ledger.num_committed + waiting) * self.facts.tokens_per_step

    def take(self) -> tuple[list[dict], list[Action]]:
        """Records to journal (first), actions to carry out (then), both since the last call."""
        actions, self._actions = self._actions, []
        return self.take_records(), actions

    def take_records(self) -> list[dict]:
        records, self._records = self._records, []
        return records

    def next_time(self) -> float:
        """When `advance` must be called next, if nothing is observed or reported before."""
        times = [self.schedule.next_time()]
        if self.phase == "train":
            times.append(self._freeze_time())
        if self.phase == "freezing" and not self.facts.timed:
            times.append(self.now.freeze_s + self.facts.grace_s)
        if self.phase == "reduce" and self.facts.timed and self._agreed():
            times.append(self.now.freeze_s + self.sync_s)
        if self.phase == "handover":
            times.append(self.handover_s)
        times.append(self.facts.end_s)
        return min(times)

    # -- in: time and signals ---------------------------------------------------------------------------------------

    def observe(self, t: float, site: str, mci: float | None) -> None:
        self.schedule.observe(t, site, mci)

    def advance(self, t: float) -> None:
        """Everything due by t: site transitions, freezes, commits, hand-overs, new rounds, the end."""
        if self.ended:
            return
        if self.phase == "reduce" and self._agreed() and self._sync_over(t):
            self._commit(t)
        if self.phase == "train" and self._freeze_time() <= t + ROUND_OFF:
            self._freeze(t)
        self._moves(t, self.schedule.advance(t))
        if self.phase == "train" and self._freeze_time() <= t + ROUND_OFF:
            self._freeze(t)  # a stop that was not known ahead, or a second site that just came on
        if self.phase == "freezing" and not self.facts.timed and t >= self.now.freeze_s + self.facts.grace_s:
            late = [site for site in self.now.members if site not in self.now.steps]
            self.lost(t, late[0], f"froze no state within rounds.grace_s={self.facts.grace_s:g} s")
        if self.phase == "handover" and (not self.facts.timed or t >= self.handover_s - ROUND_OFF):
            self._hand_over(t)
        if self.phase == "idle" and not (self.facts.timed and self.fetching):
            self._open_next(t)
        if t >= self.facts.end_s and self.phase in ("idle", "handover"):
            self._end_when_stored(t)
        self._set_power(t)

    def provisioned(self, t: float, site: str) -> None:
        """Wall: the machine of a site is there; it now needs the state."""
        self._moves(t, self.schedule.provisioned(t, site))
        self._set_power(t)

    def _moves(self, t: float, moves: list[Move]) -> None:
        for move in moves:
            self._touched.add(move.site)
            self._record(t, "site", site=move.site, **{"from": move.was}, to=move.now, reason=move.reason,
                         mci_g_per_kwh=move.mci_g_per_kwh)  # fmt: skip
            if move.now == "provisioning":
                self._actions.append(Action("start", move.site))
            if move.now == "off":
                self._site_off(t, move.site)
            elif move.now == ("on" if self.facts.timed else "starting"):
                self._fetch(move.site)

    def _fetch(self, site: str) -> None:
        """Have a site download the newest start state. On the virtual clock its start-up time covers that."""
        number = self.round if self.facts.timed else self.stored
        busy = self.facts.timed and self.phase in ("reduce", "storing", "freezing")
        if not busy:  # else `_open_next` fetches the state that is being made
            self.fetching.add(site)
            self._actions.append(Action("fetch", site, {"round": number}))

    # -- rounds -----------------------------------------------------------------------------------------------------

    def _step_s(self, site: str) -> float:
        return self.facts.step_s[site] if self.facts.timed else self.facts.tokens_per_step / self.rates[site]

    def _team(self, t: float) -> list[str]:
        """Sites that are on and have time for a step (and, with others, for the sync) before a stop known now."""
        on = [s for s, site in self.schedule.sites.items() if site.state == "on" and s not in self.leaving]
        stops, end_s = self.schedule.stops, self.facts.end_s
        spare = {s: min(stops.get(s, end_s), end_s) - t - self._step_s(s) + ROUND_OFF for s in on}
        together = [s for s in on if spare[s] >= self.sync_s]
        if len(together) >= 2:
            return together
        alone = together or [s for s in on if spare[s] >= 0]
        return alone if len(alone) < 2 else sorted(alone, key=lambda s: (-spare[s], on.index(s)))[:1]

    def _open_next(self, t: float) -> None:
        """Open the next round for whoever is on; fetch the state for those who lack it."""
        self.now, self.handover_s = None, INFINITY
        if not self.ledger.free and not self.pending:
            self._end_when_stored(t)
            return
        team = self._team(t)
        ready = [s for s in team if self.holds.get(s) == self.round]
        if not self.ledger.free or not team:
            self.phase = "idle"
            return
        for site in team:
            if site not in ready and (self.facts.timed or self.stored == self.round):  # else once it is stored
                self._actions.append(Action("fetch", site, {"round": self.round}))
        if ready and (len(ready) >= 2 or len(team) == 1):
            self._open(t, ready)
        else:
            self.phase, self.handover_s = "handover", t + (1 if self.facts.timed else 2) * self.sync_s

    def _hand_over(self, t: float) -> None:
        """Open once all who are on hold the state; past two sync times (wall), once two do (a slow download joins later)."""
        team = self._team(t)
        ready = [s for s in team if self.holds.get(s) == self.round]
        if self.facts.timed or len(ready) == len(team) or (t >= self.handover_s - ROUND_OFF and len(ready) >= 2):
            self._open_next(t)
        elif t >= self.handover_s - ROUND_OFF:
            self.handover_s = INFINITY  # only one is ready: wait for the next download

    def _end_when_stored(self, t: float) -> None:
        """Budget or trace are used up. The last state must be durable first; a finished budget is also measured."""
        self.phase = "ending"
        if self.stored < self.round:
            return
        left = (self.facts.num_batches - self.ledger.num_committed) * self.facts.tokens_per_step
        holders = [s for s in self.schedule.sites if self.holds.get(s) == self.round]
        if left:
            self.finish(t, f"the trace or clock.max_hours ended with {left:,} tokens left", 3)
        elif holders:
            self._actions.append(Action("evaluate", holders[0], {"round": self.round}))
        else:
            self.finish(t, "budget", 0)

    def _open(self, t: float, members: list[str]) -> None:
        mode = "local" if len(members) == 1 else "federated"
        leases, full = self._lease(members, mode)
        f = self.facts
        span = {s: count(leases[s]) * self._step_s(s) for s in members}
        if mode == "local":
            length = max(span.values()) if f.timed or f.commit_every_s is None else f.commit_every_s
        else:
            length = f.train_s
            if f.timed and (f.max_steps or not full):
                length = min(length, max(span.values()))
        number = self.round
        self.now = Round(number, mode, members, t, t + length, leases)
        self.phase, self._power = "train", None
        rates = {s: self.rates[s] for s in members}
        self._record(t, "open", round=number, mode=mode, members=members, end_s=round(t + length, 6), leases=leases, rates=rates)
        self._actions.append(Action("open", None, {
            "round": number, "mode": mode, "members": members, "leases": leases, "rates": rates, "open_s": t,
            "train_for_s": length, "committed_tokens": self.committed_tokens,
        }))  # fmt: skip

    def _lease(self, members: list[str], mode: str) -> tuple[dict[str, Ranges], bool]:
        """Batches for a round, in proportion to what each member can do in it; and whether all got their fill."""
        f, free = self.facts, count(self.ledger.free)
        room = {}
        for s in members:
            seconds = f.train_s if mode == "federated" else f.commit_every_s
            if seconds is None:
                room[s] = free
            elif mode == "federated":
                room[s] = int(seconds / self._step_s(s) + ROUND_OFF)
            else:
                room[s] = -int(-seconds / self._step_s(s) // 1)  # the first step end at or after commit_every_s
            if not f.timed and seconds is not None:
                room[s] += room[s] // 4 + 1  # rates are estimates; more are leased when these run out
            if mode == "federated" and f.max_steps:
                room[s] = min(room[s], f.max_steps)
        full = sum(room.values()) <= free
        given = room if full else dict.fromkeys(members, 0)
        if not full:  # the next batch to whoever would finish it first
            queue = [(self._step_s(s), s) for s in members if room[s]]
            heapq.heapify(queue)
            for _ in range(free):
                _, s = queue[0]
                given[s] += 1
                if given[s] < room[s]:
                    heapq.heapreplace(queue, ((given[s] + 1) * self._step_s(s), s))
                else:
                    heapq.heappop(queue)
        return self.ledger.lease_each(given), full

    def more(self, t: float, site: str) -> None:
        """Wall: a member has used up its lease before the round's end."""
        if self.phase != "train" or site not in self.now.members:
            return
        limit = self.facts.max_steps if self.now.mode == "federated" and self.facts.max_steps else 10**9
        room = limit - count(self.now.leases[site])
        left = max(0.0, self._freeze_time() - t)
        ranges = self.ledger.lease(min(room, int(left / self._step_s(site) / 4) + 1)) if room > 0 else []
        if ranges:
            self.now.leases[site] += ranges
            self._record(t, "lease", round=self.now.number, site=site, ranges=ranges)
        self._actions.append(Action("lease", site, {"round": self.now.number, "ranges": ranges}))

    def _freeze_time(self) -> float:
        """When the open round must stop training: its planned end, a member's known stop, or a site to hand over to."""
        now = self.now
        stop = self.facts.end_s
        for site, t in self.schedule.stops.items():
            if t < stop and site in now.leases:
                stop = t
        if now.mode == "local":
            joined = len(self.schedule.up) > 1 and len(self._team(now.open_s)) > 1
            return -INFINITY if joined else min(now.end_s, stop)
        return min(now.end_s, stop - self.sync_s)

    def _freeze(self, t: float) -> None:
        now = self.now
        self.phase, now.freeze_s = "freezing", t
        steps = None
        if self.facts.timed:
            steps = {s: min(count(now.leases[s]), int((t - now.open_s) / self._step_s(s) + ROUND_OFF)) for s in now.members}
        self._actions.append(Action("freeze", None, {"round": now.number, "members": now.members, "steps": steps}))

    # -- in: what the sites report ----------------------------------------------------------------------------------

    def frozen(self, t: float, site: str, steps: int, finite: bool = True, bad_step: int = -1) -> None:
        """A member holds still after `steps` steps of this round. Not finite: its loss left the numbers at bad_step."""
        now = self.now
        if self.phase not in ("train", "freezing") or site not in now.members or site in now.steps:
            return
        if not finite:
            self._record(t, "fault", site=site, kind="non-finite loss", action="round cancelled, nothing of it committed")
            self.finish(t, f"non-finite loss at {site}, step {bad_step} of round {now.number}; "
                           "lower optim.matrix_lr or optim.embedding_lr", 2)  # fmt: skip
            return
        assert self.facts.timed or steps <= count(now.leases[site]), (site, steps)
        now.steps[site] = steps
        idle_from = now.open_s + steps * self._step_s(site) if self.facts.timed else t
        self.meter.set(min(idle_from, t), site, "waiting")
        if len(now.steps) < len(now.members):
            return
        now.freeze_s = t
        if not sum(now.steps.values()):
            self._cancel(t, "no whole step fitted")
            self._open_next(t)
        elif now.mode == "local":
            self._freeze_local(t, site, steps)
        else:
            self._attempt(t)
        self._set_power(t)

    def _freeze_local(self, t: float, site: str, steps: int) -> None:
        """Nothing to agree on: theta_i is theta_{r+1}. It counts as committed once stored."""
        now = self.now
        used, rest = split(now.leases[site], steps)
        self.ledger.give_back(rest)
        self.pending.append({"round": now.number, "site": site, "batches": used, "count": steps})
        self.round += 1
        self.holds[site] = self.round
        self.now, self.phase = None, "storing"
        self._actions.append(Action("store", site, {"round": self.round}))
        if not self.facts.timed and len(self.pending) == 1 and self._team(t) == [site] and self.ledger.free:
            self._open_next(t)  # the site trains on while its snapshot travels

    def _attempt(self, t: float) -> None:
        now, per_step = self.now, self.facts.tokens_per_step
        joiners = [s for s, site in self.schedule.sites.items() if site.state == "on" and s not in now.leases
                   and self.holds.get(s) == now.number and s not in self.leaving]  # fmt: skip
        now.attempt += 1
        now.taking_part = now.members + joiners
        now.tokens = {s: now.steps.get(s, 0) * per_step for s in now.taking_part}
        total = sum(now.tokens.values())
        weights = {s: now.tokens[s] / total for s in now.taking_part}
        self.phase = "reduce"
        self._record(t, "attempt", round=now.number, attempt=now.attempt, members=now.taking_part, tokens=now.tokens,
                     weights=weights, wire="fp32")  # fmt: skip
        self._actions.append(Action("attempt", None, {"round": now.number, "attempt": now.attempt,
                             "members": now.taking_part, "weights": weights}))  # fmt: skip

    def voted(self, t: float, site: str, attempt: int, digest: str) -> None:
        """A member holds a complete average with this digest."""
        now = self.now
        if self.phase != "reduce" or attempt != now.attempt or site not in now.taking_part:
            return
        now.votes[site] = digest
        if len(now.votes) == len(now.taking_part) and len(set(now.votes.values())) > 1:
            kinds = ", ".join(f"{s} {d[:12]}" for s, d in now.votes.items())
            self._record(t, "fault", site=site, kind="digests differ", action="round cancelled")
            self.finish(t, f"members hold different averages of round {now.number}: {kinds}", 1)
        elif self._agreed() and self._sync_over(t):
            self._commit(t)
            self._set_power(t)

    def _agreed(self) -> bool:
        """Everyone voted the same, and the state this round started from is durable."""
        return len(self.now.votes) == len(self.now.taking_part) and self.stored == self.round

    def _sync_over(self, t: float) -> bool:
        return not self.facts.timed or t >= self.now.freeze_s + self.sync_s - ROUND_OFF

    def _commit(self, t: float) -> None:
        now = self.now
        batches, rests = {}, []
        for site in now.members:
            batches[site], rest = split(now.leases[site], now.steps[site])
            rests += rest
        self.ledger.give_back(rests)
        self.ledger.commit([part for used in batches.values() for part in used])
        self.round += 1
        self.holds |= dict.fromkeys(now.taking_part, self.round)
        digest = next(iter(now.votes.values()))
        self._record(t, "commit", round=now.number, tokens=sum(now.tokens.values()), batches=batches, digest=digest)
        staying = [s for s in now.taking_part if s not in self.leaving]
        sender = (staying or now.taking_part)[0]
        self._actions.append(Action("commit", None, {
            "round": now.number, "members": now.taking_part, "digest": digest, "sender": sender,
            "evaluate": self._evaluator(now.number, sender),
        }))  # fmt: skip
        self._release(t)
        self._open_next(t)

    def _evaluator(self, number: int, site: str) -> str | None:
        every = self.facts.eval_every_rounds
        return site if every and (number + 1) % every == 0 else None

    def store_done(self, t: float, number: int, digest_theta: str, digest_m: str) -> None:
        """theta_number and m_number are durable at the coordinator. Commits the local round that made them."""
        if number <= self.stored:
            return
        self.stored = number
        if self.pending and self.pending[0]["round"] + 1 == number:
            done = self.pending.pop(0)
            self.ledger.commit(done["batches"])
            self._record(t, "commit", round=done["round"], tokens=done["count"] * self.facts.tokens_per_step,
                         batches={done["site"]: done["batches"]}, digest=digest_theta)  # fmt: skip
            self._actions.append(Action("commit", None, {
                "round": done["round"], "members": [done["site"]], "digest": digest_theta, "sender": None,
                "evaluate": self._evaluator(done["round"], done["site"]) if done["site"] not in self.leaving else None,
            }))  # fmt: skip
        self._record(t, "store", round=number, digest_theta=digest_theta, digest_m=digest_m)
        if not self.facts.timed and self.stored == self.round and self.phase in ("train", "handover"):
            for site in self._team(t):
                if self.holds.get(site) != self.round:
                    self._actions.append(Action("fetch", site, {"round": self.round}))
        if self.phase in ("storing", "ending") and not self.pending:
            self._release(t)
            if self.phase == "storing":
                self._open_next(t)
            else:
                self._end_when_stored(t)
            self._set_power(t)
        elif self.phase == "reduce" and self._agreed() and self._sync_over(t):
            self._commit(t)
            self._set_power(t)

    def current(self, t: float, site: str, number: int) -> None:
        """A site has downloaded theta_number and m_number."""
        self.holds[site] = number
        self.fetching.discard(site)
        self._moves(t, self.schedule.started(t, site))
        if self.phase == "idle" and not self.fetching:
            self._open_next(t)
        if self.phase == "handover" and number == self.round and not self.facts.timed:
            self._hand_over(t)
        elif self.phase in ("train", "handover") and not self.facts.timed and number < self.stored == self.round:
            self._actions.append(Action("fetch", site, {"round": self.round}))  # rounds went by: take part in this one
        self._set_power(t)

    def evaluated(self, t: float, number: int, val_loss: float | None, val_bpb: float | None) -> None:
        """theta after round `number` - 1 was measured; None when only imagined."""
        if val_loss is not None:
            self._record(t, "eval", round=number, val_loss=val_loss, val_bpb=val_bpb)
        if self.phase == "ending" and number == self.round and self.stored == self.round:
            self.finish(t, "budget", 0)

    def absent(self, t: float, site: str, why: str) -> None:
        """No process answers for a site: it is left out until one does (wall) or until its next window (virtual, where
        all must follow from records)."""
        self._record(t, "fault", site=site, kind="absent", action=f"left out: {why}")
        self.schedule.set_absent(site, why)
        self._moves(t, self.schedule.stop(t, site, why))
        self._set_power(t)

    def present(self, site: str) -> None:
        self.schedule.set_absent(site, "")

    def lost(self, t: float, site: str, why: str) -> None:
        """A process died or fell silent. If it had a part in the run, the run stops here, resumable."""
        if self.ended:
            return
        if self.schedule.sites[site].state == "off" and site not in self.leaving:
            if not self.facts.timed:  # on the virtual clock it is missed when its next window comes, not before
                self.absent(t, site, why)
            return
        self._record(t, "fault", site=site, kind="lost", action="run stopped, resumable")
        self.finish(t, f"{site} {why}", 1)

    def _cancel(self, t: float, reason: str) -> None:
        now = self.now
        for ranges in now.leases.values():
            self.ledger.give_back(ranges)
        trained = dict(now.steps)
        for site in now.members:  # who has not reported will have done about so many
            trained.setdefault(site, min(count(now.leases[site]), int(max(0.0, t - now.open_s) / self._step_s(site))))
        tokens = sum(trained.values()) * self.facts.tokens_per_step
        self._record(t, "cancel", round=now.number, reason=reason, tokens=tokens)
        self._actions.append(Action("cancel", None, {"round": now.number, "members": now.members, "reason": reason}))
        self._release(t)
        self.now = None

    def finish(self, t: float, reason: str, code: int) -> None:
        """The run ends: 0 the whole budget is committed, 3 budget left, 1 failed (both resumable), 2 bad numbers."""
        if self.now and self.now.number == self.round:
            self._cancel(t, reason)
        self.phase, self.reason, self.code = "ended", reason, code
        for lost in self.pending:
            tokens = lost["count"] * self.facts.tokens_per_step
            self._record(t, "cancel", round=lost["round"], reason="ended before it was stored", tokens=tokens)
        self.now, self.pending = None, []
        for name in self.schedule.sites:
            self._moves(t, self.schedule.stop(t, name, "run ended"))
        self.leaving.clear()
        self._set_power(t)
        self._record(t, "end", reason=reason)
        self._actions.append(Action("end", None, {"reason": reason, "code": code}))

    # -- sites that leave -------------------------------------------------------------------------------------------

    def _site_off(self, t: float, site: str) -> None:
        """Off by the schedule. Someone with a part in a round stays, at idle power, until that is over."""
        now = self.now
        if self.phase == "ended":
            return  # `end` tells everyone; what is on the sites' disks stays, for an exact resume
        if self.phase == "train" and site in now.members:
            self.leaving.add(site)
            self._freeze(t)
        elif (self.phase in ("freezing", "reduce") and site in (now.taking_part or now.members)) or (
            site in [p["site"] for p in self.pending]
        ):
            self.leaving.add(site)
        else:
            self._drop(site)
            if self.phase == "handover":
                self._open_next(t)

    def _release(self, t: float) -> None:
        """The round is over for those who were only waiting for its end."""
        for site in [s for s in self.schedule.sites if s in self.leaving]:
            if site in [p["site"] for p in self.pending]:
                continue
            self.leaving.discard(site)
            self._touched.add(site)
            self._drop(site)

    def _drop(self, site: str) -> None:
        self.holds.pop(site, None)
        self.fetching.discard(site)
        self._actions.append(Action("drop", site))

    # -- power and records ------------------------------------------------------------------------------------------

    def _set_power(self, t: float) -> None:
        """The power state of every site whose part in the run has changed."""
        phase = "train" if self.phase == "freezing" else self.phase
        now, derived_from = self.now, (phase, self.round, self.now and self.now.attempt)
        if derived_from != self._power:
            self._power = derived_from
            self._touched |= self.schedule.up | self.leaving
        if not self._touched:
            return
        for name in self._touched:
            state = self.schedule.sites[name].state
            if phase == "train" and name in now.leases and name not in now.steps:
                state = "training"
            elif (phase == "reduce" and name in now.tokens) or (phase == "handover" and state == "on"):
                state = "syncing"
            elif name in self.leaving or state == "on":
                state = "waiting"
            self.meter.set(t, name, state)
        self._touched.clear()

    def _record(self, t: float, type_: str, /, **fields) -> None:
        self._records.append({"t_s": round(t, 6), "type": type_} | fields)
