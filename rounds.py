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

from agreement import Agreement, Verdict
from carbon import Meter
from journal import effective
from ledger import Ledger, Ranges, count, split
from scheduler import INFINITY, Move, Schedule

URGENT = ("resend", "give", "take", "cancel", "drop", "rollback")
ASKS = 3  # times a result is asked for before its sender counts as lost
BLOWN = 2  # rounds running without one finite number: the run ends
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
    star: bool = False  # averages always go by way of the head node
    wire: str = "fp32"  # format of the averages; auto: the coordinator chooses
    dead_s: float = 8.0
    attempt_s: float = 60.0  # wall: how long an attempt to average may take
    max_offline_s: float = 600.0


def facts_of(cfg, end_s: float) -> Facts:
    r, per_step = cfg.rounds, cfg.data.tokens_per_step
    rates = {name: site.tokens_per_s for name, site in cfg.sites.items()}
    return Facts(
        {name: per_step / rate for name, rate in rates.items()}, rates, per_step, cfg.budget.tokens // per_step,
        cfg.clock.mode == "virtual", r.train_s, r.sync_s, r.max_steps, r.commit_every_s, r.grace_s,
        cfg.eval.every_rounds, end_s, cfg.sync.topology == "star", cfg.sync.wire, cfg.sync.dead_s,
        max_offline_s=r.max_offline_s,
    )  # fmt: skip


@dataclass(slots=True)
class Action:
    """Something to tell the sites. `kind`: start, fetch, open, lease, freeze, store, resend, attempt, give, take, commit, cancel,
    rollback, drop, evaluate, end."""

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
    still_s: dict[str, float] = field(default_factory=dict)  # when each of them froze
    freeze_s: float = INFINITY
    silent: dict[str, float] = field(default_factory=dict)  # wall: members that cannot be heard -> since when
    gone: dict[str, float] = field(default_factory=dict)  # dead or left out -> since when; nothing of theirs is waited for
    non_finite: tuple[str, int] | None = None  # a site and its step
    agreement: Agreement | None = None  # from the freeze on
    wire: str = ""  # of the present attempt
    attempt_s: float = INFINITY  # when the present attempt began
    told: dict = field(default_factory=dict)  # what `open` said


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
        self.handover_s = INFINITY  # timed: when the hand-over is over; wall: when to look whom it still waits for
        self.handover_began_s = INFINITY
        self.missing: set[str] = set()  # wall: on, but without an answer when they were handed the state: nobody waits for them
        self.fetching: set[str] = set()  # sites told to download the state
        self.sync_s = facts.sync_s  # wall: replaced by what was measured
        self.rates = dict(facts.rates)  # wall: likewise
        self.unstored: list[dict] = []  # committed federated rounds whose result is not durable yet
        self.sender: str | None = None  # who sends the last of them
        self.rollback_at = INFINITY  # wall: give up on them then
        self.store_by, self.asked = INFINITY, 0  # wall: when to ask for it again, and how often we have
        self.spoilt = ""  # the site whose local round has just arrived damaged
        self.last: dict | None = None  # the last federated commit, for members that missed it
        self.attempted: dict[int, int] = {}  # of the last rounds: the highest number of an attempt
        self.on_demand: dict[str, bool] = {}  # wall: sites whose processes end when they are off -> is it being stopped?
        self.blown = 0  # rounds running in which nobody had finite numbers
        self.attempt_s = facts.attempt_s  # wall: follows the measured rate
        self.wire = facts.wire  # of the next attempt
        self.arrived = -1  # the round whose start state is all here and being written: nobody is asked for it, nobody's death undoes it
        self.reason, self.code = "", 0
        self._power = None  # what the sites' power was last derived from, and
        self._touched: set[str] = set()  # whose own part in it has changed since
        self._records: list[dict] = []
        self._actions: list[Action] = []

    def restore(self, t: float, records: list[dict], stored: int) -> None:
        """Wall: continue where a journal ends. records: all of it; stored: the round whose start state the head node holds.
        Sites are taken to be where they were, until they are heard (`back`) or count as lost."""
        opens: dict[int, dict] = {}
        frozen: dict[int, dict] = {}
        attempts: dict[int, int] = {}
        self.stored = self.round = stored
        for r in (r for r in records if r["type"] == "attempt"):  # those that were taken back, too: no number is used twice
            self.attempted[r["round"]] = max(r["attempt"], self.attempted.get(r["round"], 0))
        for r in effective(records):
            kind, number = r["type"], r.get("round")
            if kind == "site":
                self.schedule.restore(r["t_s"], r["site"], r["from"], r["to"])
            elif kind == "open":
                opens[number] = r | {"leases": {s: list(ranges) for s, ranges in r["leases"].items()}}
                attempts.pop(number, None)
            elif kind == "lease":
                opens[number]["leases"][r["site"]] += r["ranges"]
            elif kind == "frozen":
                frozen[number] = r
            elif kind == "attempt":
                attempts[number] = r["attempt"]
            elif kind == "cancel":
                opens.pop(number, None)
                frozen.pop(number, None)
            elif kind == "commit":
                used = [part for ranges in r["batches"].values() for part in ranges]
                self.ledger.replay(used)
                self.round = max(self.round, number + 1)
                if number >= stored:
                    self.unstored.append({"round": number, "tokens": r["tokens"], "batches": used})
                if opens.pop(number)["mode"] == "federated":
                    self.last = {"round": number, "digest": r["digest"]}
        for number, r in sorted(opens.items()):
            if number in frozen:
                (site,) = r["members"]
                used, _ = split(r["leases"][site], frozen[number]["steps"])
                self.ledger.take(used)
                self.pending.append({"round": number, "site": site, "batches": used, "count": frozen[number]["steps"]})
                self.round, self.phase = number + 1, "storing"
                continue
            for ranges in r["leases"].values():
                self.ledger.take(ranges)
            self.now = Round(number, r["mode"], r["members"], r["t_s"], r["end_s"], r["leases"])
            self.now.told = {k: r[k] for k in ("round", "mode", "members", "leases", "rates")} | {
                "open_s": r["t_s"], "train_for_s": r["end_s"] - r["t_s"], "committed_tokens": self.committed_tokens,
            }  # fmt: skip
            self.phase = "freezing" if number in attempts else "train"
            self.now.freeze_s = t if number in attempts else INFINITY
        busy = {p["site"] for p in self.pending} | set(self.now.members if self.now else [])
        self.leaving = {s for s in busy if self.schedule.sites[s].state != "on"}
        if self.unstored:
            self.rollback_at = t + self.facts.dead_s

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

    def take_urgent(self) -> list[Action]:
        """Virtual clock: actions that cost no time and that a wait may depend on."""
        urgent = [a for a in self._actions if a.kind in URGENT]
        self._actions = [a for a in self._actions if a.kind not in URGENT]
        return urgent

    def take_records(self) -> list[dict]:
        records, self._records = self._records, []
        return records

    def next_time(self) -> float:
        """When `advance` must be called next, if nothing is observed or reported before."""
        times = [self.schedule.next_time()]
        if self.phase == "train":
            times.append(self._freeze_time())
        if self.phase == "reduce" and self.facts.timed and self._agreed():
            times.append(self.now.freeze_s + self.sync_s)
        if not self.facts.timed:
            times.append(min(self.rollback_at, self.store_by if self._owed else INFINITY, self._patience()))
        if self.phase == "handover":
            times.append(self.handover_s)
        times.append(self.facts.end_s)
        return min(times)

    # -- in: time and signals ---------------------------------------------------------------------------------------

    def observe(self, t: float, site: str, mci: float | None, ahead: tuple | None = None) -> None:
        """A sample of a site's grid, and the forecast issued with it, if any: Schedule.observe."""
        self.schedule.observe(t, site, mci, ahead)

    def advance(self, t: float) -> None:
        """Everything due by t: site transitions, freezes, commits, hand-overs, new rounds, the end."""
        if self.ended:
            return
        self.schedule.consider(t, self._left(t))
        if self.phase == "reduce" and self._agreed() and self._sync_over(t):
            self._commit(t)
        if self.phase == "train" and self._freeze_time() <= t + ROUND_OFF:
            self._freeze(t)
        self._moves(t, self.schedule.advance(t))
        if self.phase == "train" and self._freeze_time() <= t + ROUND_OFF:
            self._freeze(t)  # a stop that was not known ahead, or a second site that just came on
        if not self.facts.timed:
            self._lose_patience(t)
        if self.phase == "handover" and (not self.facts.timed or t >= self.handover_s - ROUND_OFF):
            self._hand_over(t)
        if self.phase == "idle" and not (self.facts.timed and self.fetching):
            self._open_next(t)
        if t >= self.facts.end_s and self.phase in ("idle", "handover"):
            self._end_when_stored(t)
        self._set_power(t)

    def _patience(self) -> float:
        """Wall: when to stop waiting for a slow or silent member."""
        now = self.now
        if now is None:
            return INFINITY
        if now.mode == "local":
            since = min(now.silent.values(), default=INFINITY)
            return min(since, now.freeze_s if self.phase == "freezing" else INFINITY) + self.facts.max_offline_s
        if self.phase == "freezing":  # grace begins when somebody waits
            first = min(now.still_s.values(), default=INFINITY)
            return min(max(now.freeze_s, first) + self.facts.grace_s, now.freeze_s + self.facts.max_offline_s)
        if self.phase == "train" and now.silent:
            heard = [s for s in now.members if s not in now.gone and s not in now.silent]
            if heard and all(s in now.steps for s in heard):  # they have nothing left to do but wait
                return max([*now.still_s.values(), *now.silent.values()]) + self.facts.grace_s
        return now.attempt_s + self.attempt_s if self.phase == "reduce" and now.agreement.result is None else INFINITY

    def _lose_patience(self, t: float) -> None:
        if t >= self.rollback_at:
            self._roll_back(t)
        elif self._owed and self.rollback_at == INFINITY and (t >= self.store_by or self.holds.get(self.sender) != self.round):
            if self.asked >= ASKS and self.sender:
                self._out(t, self.sender, f"did not send the result of round {self.round - 1} when asked {ASKS} times")
            else:
                self._ask_store(t)  # its sender has come to hold something else, or does not deliver
        if t < self._patience():
            return
        now = self.now
        if now.mode == "local":
            self._out(t, now.members[0], f"no word for rounds.max_offline_s={self.facts.max_offline_s:g} s")
        elif self.phase == "freezing":
            for site in [s for s in now.members if s not in now.steps and s not in now.gone]:
                self._leave_out(t, site, "late", f"not frozen within rounds.grace_s={self.facts.grace_s:g} s")
            self._when_frozen(t)
        elif self.phase == "train":
            self._freeze(t)
        else:
            self._attempt_over(t)

    def provisioned(self, t: float, site: str) -> None:
        """Wall: the machine of a site is there; it now needs the state. (Not while it still has a part in a round.)"""
        if site in self.leaving:
            return
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
        on = [s for s, site in self.schedule.sites.items() if site.state == "on" and s not in self.leaving and s not in self.missing]
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
            self.handover_began_s = t

    def _hand_over(self, t: float) -> None:
        """Open once all who are on hold the state; past two sync times (wall), once two do (a slow download joins later). Is only one
        ready, it waits for the next as long as an attempt to average may take, which a download does, too; then it trains alone."""
        team = self._team(t)
        ready = [s for s in team if self.holds.get(s) == self.round]
        patience_s = self.handover_began_s + max(2 * self.sync_s, self.attempt_s) if ready else INFINITY
        if self.facts.timed or len(ready) == len(team):
            self._open_next(t)
        elif (t >= self.handover_s - ROUND_OFF and len(ready) >= 2) or t >= patience_s - ROUND_OFF:
            self.missing |= set(team) - set(ready)
            self._open_next(t)
        elif t >= self.handover_s - ROUND_OFF or self.handover_s == INFINITY:
            self.handover_s = patience_s

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
        self.now.told = {
            "round": number, "mode": mode, "members": members, "leases": leases, "rates": rates, "open_s": t,
            "train_for_s": length, "committed_tokens": self.committed_tokens,
        }  # fmt: skip
        self._actions.append(Action("open", None, self.now.told))

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

    def more(self, t: float, site: str, known: int) -> None:
        """Wall: a member has used up the `known` batches it was leased before the round's end."""
        if self.phase != "train" or site not in self.now.members or known < count(self.now.leases[site]):
            return  # or what it lacks is on its way
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
        if now.mode == "federated":
            for site in list(now.silent):
                self._out(t, site, "still silent at the freeze")
        if self.now is not now or self.phase != "freezing":
            return
        alive, steps = [s for s in now.members if s not in now.gone], None
        if self.facts.timed:
            steps = {s: min(count(now.leases[s]), int((t - now.open_s) / self._step_s(s) + ROUND_OFF)) for s in alive}
        self._actions.append(Action("freeze", None, {"round": now.number, "members": alive, "steps": steps}))

    # -- in: what the sites report ----------------------------------------------------------------------------------

    def frozen(self, t: float, site: str, steps: int, finite: bool = True, bad_step: int = -1) -> None:
        """A member holds still after `steps` steps of this round. Not finite: its numbers left the finite at bad_step; it
        starts over from theta and takes part like a joiner, with zero tokens."""
        now = self.now
        if self.phase not in ("train", "freezing") or site not in now.leases or site in now.steps or site in now.gone:
            return
        now.silent.pop(site, None)
        if not finite:
            self._fault(t, site, "non-finite loss", f"its part of round {now.number} is left out", step=bad_step)
            now.non_finite, steps = (site, bad_step), 0
        now.steps[site], now.still_s[site] = min(steps, count(now.leases[site])), t
        idle_from = now.open_s + steps * self._step_s(site) if self.facts.timed else t
        self.meter.set(min(idle_from, t), site, "waiting")
        self._when_frozen(t)
        self._set_power(t)

    def _when_frozen(self, t: float) -> None:
        """Once every member that is not gone holds still: agree, or with one member store."""
        now = self.now
        if len(now.steps) + len(now.gone) < len(now.members):  # asked at every report: the list only at the last
            return
        alive = [s for s in now.members if s not in now.gone]
        if any(s not in now.steps for s in alive):
            return
        now.freeze_s = t
        if not any(now.steps[s] for s in alive):
            self._nothing(t, alive)
        elif now.mode == "local":
            self._freeze_local(t, alive[0], now.steps[alive[0]])
        else:
            per_step = self.facts.tokens_per_step
            joiners = [s for s, site in self.schedule.sites.items() if site.state == "on" and s not in now.leases
                       and self.holds.get(s) == now.number and s not in self.leaving]  # fmt: skip
            tokens = {s: now.steps[s] * per_step for s in alive} | dict.fromkeys(joiners, 0)
            now.agreement = Agreement(tokens, self.facts.star, self.attempted.get(now.number, 0))
            self._attempt(t, now.agreement.attempt())

    def _nothing(self, t: float, alive: list[str]) -> None:
        """No member alive has a step to show."""
        if self.now.non_finite:
            self.blown += 1
            site, step = self.now.non_finite
            if self.blown == BLOWN:
                self.finish(t, f"non-finite loss at {site}, step {step} of round {self.now.number}, {BLOWN} times running; "
                               "lower optim.matrix_lr or optim.embedding_lr", 2)  # fmt: skip
                return
        why = "no finite numbers" if self.now.non_finite else "no whole step fitted" if alive else "all members are gone"
        self._cancel(t, why)
        self._open_next(t)

    def _freeze_local(self, t: float, site: str, steps: int) -> None:
        """Nothing to agree on: theta_i is theta_{r+1}. It counts as committed once stored."""
        now = self.now
        used, rest = split(now.leases[site], steps)
        self.ledger.give_back(rest)
        self.pending.append({"round": now.number, "site": site, "batches": used, "count": steps})
        if not self.facts.timed:
            self._record(t, "frozen", round=now.number, site=site, steps=steps)
        self.round += 1
        self.holds[site] = self.round
        self.now, self.phase = None, "storing"
        self._actions.append(Action("store", site, {"round": self.round}))
        if not self.facts.timed and len(self.pending) == 1 and self._team(t) == [site] and self.ledger.free:
            self._open_next(t)  # the site trains on while its snapshot travels

    # -- agreement --------------------------------------------------------------------------------------------------

    def _attempt(self, t: float, verdict: Verdict | None) -> None:
        """Announce the attempt the agreement has just begun, or void the round if it could not."""
        now, a = self.now, self.now.agreement
        if verdict:
            self._cancel(t, verdict.reason)
            self._open_next(t)
            return
        self.phase, now.attempt_s = "reduce", t
        self.attempted = {r: n for r, n in self.attempted.items() if r >= now.number - 2} | {now.number: a.number}
        topology, now.wire = "star" if a.star else "ring", self.wire
        self._record(t, "attempt", round=now.number, attempt=a.number, members=a.members, tokens=a.tokens, weights=a.weights,
                     wire=now.wire, topology=topology)  # fmt: skip
        self._actions.append(Action("attempt", None, {"round": now.number, "attempt": a.number, "members": a.members,
                                                      "weights": a.weights, "wire": now.wire, "topology": topology}))  # fmt: skip

    def attempting(self, site: str, number: int, attempt: int) -> bool:
        """Is a site, still, a member of this attempt of this round?"""
        return self.now is not None and number == self.now.number and self._attempting(site, attempt)

    def _attempting(self, site: str, attempt: int) -> bool:
        a = self.now.agreement if self.phase == "reduce" else None
        return a is not None and attempt == a.number and site in a.tokens and site not in a.gone

    def voted(self, t: float, site: str, attempt: int, digest: str) -> None:
        """A member holds a complete average with this digest."""
        if self._attempting(site, attempt):
            a = self.now.agreement
            a.failed.discard(site)
            a.votes[site] = digest
            if a.gone or len(a.votes) + len(a.failed) >= len(a.tokens):
                self._judge(t)
                self._set_power(t)

    def failed(self, t: float, site: str, attempt: int, reason: str) -> None:
        """A member could not finish the average; its frozen delta is as it was."""
        if self._attempting(site, attempt) and site not in self.now.agreement.votes:
            if site not in self.now.agreement.failed:
                self._fault(t, site, "average failed", f"round {self.now.number} attempt {attempt}: {reason}"[:160])
            self.now.agreement.failed.add(site)
            self._judge(t)
            self._set_power(t)

    def at_head(self, t: float, attempt: int, digest: str) -> None:
        """The result a holder sent up is at the head node, and has this digest."""
        a = self.now.agreement if self.phase == "reduce" else None
        if a and attempt == a.number and digest in a.votes.values():
            a.at_head = digest
            self._judge(t)
            self._set_power(t)

    def summed(self, attempt: int, digest: str) -> None:
        """Star: the head node's own sum of the present attempt has this digest."""
        a = self.now.agreement if self.phase == "reduce" else None
        if a and attempt == a.number:
            a.truth = digest

    def _judge(self, t: float) -> None:
        """Act on what the reports so far decide."""
        now, a = self.now, self.now.agreement
        verdict = a.judge()
        if verdict is None:
            return
        if verdict.kind == "commit":
            a.result = verdict.digest
            if self._agreed() and self._sync_over(t):
                self._commit(t)
        elif verdict.kind == "again":
            if verdict.reason:
                self._fault(t, a.living[0], "digests differ", f"round {now.number} is averaged again: {verdict.reason}")
            self._attempt(t, a.again())
        elif verdict.kind == "give" and a.holder != verdict.sites[0]:
            a.holder = verdict.sites[0]
            self._actions.append(Action("give", a.holder, {"round": now.number, "attempt": a.number, "digest": verdict.digest}))
        elif verdict.kind == "take" and a.told != verdict.sites:
            a.told = verdict.sites
            for site in verdict.sites:
                self._actions.append(Action("take", site, {"round": now.number, "attempt": a.number, "digest": verdict.digest}))
        elif verdict.kind == "out":
            for site in verdict.sites:
                self._leave_out(t, site, "wrong result", verdict.reason)
            self._judge(t)
        elif verdict.kind == "void":
            self._cancel(t, verdict.reason)
            self._open_next(t)

    def _attempt_over(self, t: float) -> None:
        """Wall: the attempt's time is up. Who has not reported has failed, or is left out if others hold the result."""
        a = self.now.agreement
        self.now.attempt_s = t
        for site in a.expire():
            self._leave_out(t, site, "late", "no vote within the time of an attempt")
        self._judge(t)

    def _leave_out(self, t: float, site: str, kind: str, why: str) -> None:
        """A member is alive, but its part of this round is void; it downloads what the others agree on."""
        self._fault(t, site, kind, f"left out of round {self.now.number}: {why}")
        self.now.gone.setdefault(site, self.now.silent.pop(site, t))
        if self.now.agreement:
            self.now.agreement.leave(site)
        self.holds.pop(site, None)
        self._actions.append(Action("cancel", None, {"round": self.now.number, "members": [site], "reason": why}))

    def differs(self, t: float, site: str, why: str) -> None:
        """A site holds other bits than the head node: its part of the round is void, it downloads the stored state."""
        now = self.now
        if self.ended or site not in self.holds:
            return
        if (now and site in now.members and site not in now.gone) or (now and now.agreement and now.agreement.lives(site)):
            self._leave_out(t, site, "wrong base", why)
            self._after_loss(t)
        else:
            self._fault(t, site, "wrong base", why)
            self.holds.pop(site)
        if not self.facts.timed and self.stored == self.round and self.schedule.sites[site].state == "on":
            self._actions.append(Action("fetch", site, {"round": self.stored}))
        if self.facts.timed and self._owed and self.holds.get(self.sender) != self.round:
            self._ask_store(t)  # it was to send the result; the virtual clock waits for that
        self._set_power(t)

    def spoiled(self, t: float, site: str, number: int, why: str) -> None:
        """Wall: a local round's state did not arrive as its site holds it. It is asked once more; the second time it counts as lost."""
        self._fault(t, site, "spoiled upload", why)
        self.spoilt, again = site, self.spoilt == site
        if again:
            self._out(t, site, why)
        else:
            self._actions.append(Action("resend", site, {"round": number}))

    def _agreed(self) -> bool:
        """Everyone alive holds the same result, and the state this round started from is durable."""
        return self.now.agreement.result is not None and self.stored == self.round

    def _sync_over(self, t: float) -> bool:
        return not self.facts.timed or t >= self.now.freeze_s + self.sync_s - ROUND_OFF

    def _commit(self, t: float) -> None:
        now, a = self.now, self.now.agreement
        batches, rests = {}, []
        for site in now.members:
            batches[site], rest = split(now.leases[site], now.steps[site] if site in a.tokens else 0)
            rests += rest
        used = [part for ranges in batches.values() for part in ranges]
        self.ledger.give_back(rests)
        self.ledger.commit(used)
        self.round += 1
        self.blown = 0
        if not self.facts.timed:  # the next leaver needs this long: the last measured sync, old ones fading
            self.sync_s = max(t - now.freeze_s, 0.5 * self.sync_s)
        living, tokens = a.living, sum(a.tokens.values())
        wasted = {s: n for s in now.members if s not in a.tokens and (n := self._trained(t, s) * self.facts.tokens_per_step)}
        self.holds |= dict.fromkeys(living, self.round)
        self.last = {"round": now.number, "digest": a.result}
        self.unstored.append({"round": now.number, "tokens": tokens, "batches": used})
        self._record(
            t, "commit", round=now.number, tokens=tokens, batches=batches, digest=a.result, **({"wasted": wasted} if wasted else {})
        )
        staying = [s for s in living if s not in self.leaving]
        self.sender = None if a.at_head else (staying or living)[0]
        self.store_by, self.asked = t + self.attempt_s, 0
        self._actions.append(Action("commit", None, {
            "round": now.number, "members": living, "digest": a.result, "wire": now.wire, "sender": self.sender,
            "evaluate": self._evaluator(now.number, (staying or living)[0]), "attempt": a.number,
        }))  # fmt: skip
        self._release(t)
        self._open_next(t)

    def _evaluator(self, number: int, site: str) -> str | None:
        every = self.facts.eval_every_rounds
        return site if every and (number + 1) % every == 0 else None

    # -- durable states ---------------------------------------------------------------------------------------------

    def writing(self, number: int) -> None:
        """What makes theta_number is all here, and is being written."""
        self.arrived = max(self.arrived, number)
        if not self._owed:
            self.rollback_at = INFINITY

    def not_written(self) -> None:
        """It was not what it should have been."""
        self.arrived = -1

    @property
    def _owed(self) -> bool:
        """A committed result is neither durable nor at the head node: only sites hold it."""
        return bool(self.unstored) and self.unstored[-1]["round"] >= self.arrived

    def store_done(self, t: float, number: int, digest_theta: str, digest_m: str) -> None:
        """theta_number and m_number are durable at the coordinator. Commits the local round that made them."""
        self.arrived = self.arrived if self.arrived > number else -1
        if number <= self.stored or number > self.round:
            return
        self.stored, self.rollback_at, self.spoilt, sender = number, INFINITY, "", self.sender
        self.unstored = [c for c in self.unstored if c["round"] >= number]
        if sender and not self.facts.timed and not (self.now and sender in self.now.members):
            self._let_go(sender)  # it only waited for this
        while self.pending and self.pending[0]["round"] < number:
            done = self.pending.pop(0)
            self.ledger.commit(done["batches"])
            self._record(t, "commit", round=done["round"], tokens=done["count"] * self.facts.tokens_per_step,
                         batches={done["site"]: done["batches"]},
                         digest=digest_theta if done["round"] + 1 == number else "")  # fmt: skip
            self.blown = 0
            self._actions.append(Action("commit", None, {
                "round": done["round"], "members": [done["site"]], "digest": digest_theta, "sender": None, "attempt": 0,
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
        elif self.phase == "idle" and not self.facts.timed:
            self._open_next(t)
            self._set_power(t)
        elif self.phase == "reduce" and self._agreed() and self._sync_over(t):
            self._commit(t)
            self._set_power(t)

    def _ask_store(self, t: float) -> None:
        """A committed result is not durable and its sender is lost: another holder sends it, or the round is lost."""
        if not self._owed:
            return
        holders = [s for s in self.schedule.sites if self.holds.get(s) == self.round]
        self.store_by, self.asked = t + self.attempt_s, self.asked + 1
        if holders:
            silent = self.now.silent if self.now else ()
            self.sender = min(holders, key=lambda s: (s in silent, s == self.sender))
            self.rollback_at = INFINITY
            self._actions.append(Action("resend", self.sender, {"round": self.round}))
        elif self.facts.timed:
            self._roll_back(t)
        else:
            self.sender, self.rollback_at = None, t + self.facts.dead_s

    def hurry_store(self, t: float, site: str) -> None:
        """Wall: a site may be dying. If it is the one that sends a committed result, another holder sends it as well: the fewer
        moments there are in which only mortals hold it, the better."""
        if site == self.sender and self.unstored and any(self.holds[s] == self.round for s in self.holds if s != site):
            self._ask_store(t)

    def _roll_back(self, t: float) -> None:
        """All holders of a committed result are gone: continue from the stored round; its batches are trained again."""
        self.rollback_at = INFINITY
        if self.now:
            self._cancel(t, "rolled back")
        tokens = sum(c["tokens"] for c in self.unstored)
        self._record(t, "rollback", to_round=self.stored, tokens=tokens)
        for lost in self.unstored:
            self.ledger.uncommit(lost["batches"])
        self.unstored, self.last, self.round = [], None, self.stored
        self.holds = {s: n for s, n in self.holds.items() if n <= self.stored}
        self._actions.append(Action("rollback", None, {"round": self.stored}))
        self._open_next(t)

    def current(self, t: float, site: str, number: int) -> None:
        """A site has downloaded theta_number and m_number."""
        self.holds[site] = number
        self.fetching.discard(site)
        self.missing.discard(site)
        self._moves(t, self.schedule.started(t, site))
        if self.phase == "idle" and not self.fetching:
            self._open_next(t)
        if self.phase == "handover" and number == self.round and not self.facts.timed:
            self._hand_over(t)
        elif self.phase in ("train", "handover") and not self.facts.timed and number < self.stored == self.round:
            self._actions.append(Action("fetch", site, {"round": self.round}))  # rounds went by: take part in this one
        elif self.phase == "ending" and not self.facts.timed:
            self._end_when_stored(t)
        self._set_power(t)

    def evaluated(self, t: float, number: int, val_loss: float | None, val_bpb: float | None) -> None:
        """theta after round `number` - 1 was measured; None when only imagined."""
        if val_loss is not None:
            self._record(t, "eval", round=number, val_loss=val_loss, val_bpb=val_bpb)
        if self.phase == "ending" and number == self.round and self.stored == self.round:
            self.finish(t, "budget", 0)

    # -- sites that vanish ------------------------------------------------------------------------------------------

    def absent(self, t: float, site: str, why: str) -> None:
        """No process answers for a site: it is left out until one does (wall) or until its next window (virtual, where
        all must follow from records)."""
        self._fault(t, site, "absent", f"left out: {why}")
        self.schedule.set_absent(site, why)
        self._moves(t, self.schedule.stop(t, site, why))
        self._set_power(t)

    def trouble(self, t: float, site: str, action: str) -> None:
        """Wall: what went wrong with a site's job, and what is done about it (provision.py)."""
        self._fault(t, site, "provision", action)

    def counts_on(self, site: str) -> bool:
        """A site holds the state, or has a part in a round."""
        member = self.now is not None and site in self.now.members and site not in self.now.gone
        return member or site in self.holds or any(p["site"] == site for p in self.pending)

    def present(self, site: str) -> None:
        """A process answers for a site; it may be started, unless that process is about to be stopped."""
        if not self.on_demand.get(site):
            self.schedule.set_absent(site, "")

    def again(self, t: float, site: str, action: str) -> None:
        """Wall: a site that died in its window may be started again."""
        self.trouble(t, site, action)
        self.schedule.set_absent(site, "")

    def lost(self, t: float, site: str, why: str, sure: bool = True) -> None:
        """A process died (sure), or cannot be heard. A member that cannot be heard while it trains may still be at work: it
        counts if it is back before the freeze, alone at work for max_offline_s. Everyone else is out at once."""
        if self.ended:
            return
        now, busy = self.now, any(p["site"] == site for p in self.pending)
        member = now is not None and site in now.members and site not in now.gone
        if self.schedule.sites[site].state == "off" and site not in self.leaving and not member and not busy:
            resident = not self.facts.timed and site not in self.on_demand  # virtual: missed when its next window comes
            if resident and not self.schedule.sites[site].absent:
                self.absent(t, site, why)
            return
        if (
            not sure
            and member
            and not self.facts.timed
            and self.phase in ("train", "freezing")
            and (self.phase == "train" or now.mode == "local")
        ):
            if site not in now.silent:
                now.silent[site] = t
                until = "the freeze" if now.mode == "federated" else f"{self.facts.max_offline_s:g} s have passed"
                self._fault(t, site, "silent", f"{why}; its work counts if it is back before {until}")
                self.hurry_store(t, site)
            return
        self._out(t, site, why)
        self._set_power(t)

    def _out(self, t: float, site: str, why: str) -> None:
        """A site counts as dead. Its leases return at the commit; what it put into a finished average stays in it."""
        now = self.now
        self._fault(t, site, "lost", why)
        voided = [p for p in self.pending if p["site"] == site and p["round"] >= self.arrived]
        if voided:
            for p in voided:
                self.ledger.give_back(p["batches"])
                tokens = p["count"] * self.facts.tokens_per_step
                self._record(t, "cancel", round=p["round"], reason=f"{site} was lost before it was stored", tokens=tokens)
            self.pending = [p for p in self.pending if p not in voided]
        if now:
            now.gone.setdefault(site, now.silent.pop(site, t))
            if now.agreement:
                now.agreement.leave(site)
        self.leaving.discard(site)
        self.holds.pop(site, None)
        self.fetching.discard(site)
        self.missing.discard(site)
        self._touched.add(site)
        if not self.facts.timed:
            self.schedule.set_absent(site, why)
        self._moves(t, self.schedule.stop(t, site, f"lost: {why}"))
        if voided:
            if self.now:
                self._cancel(t, f"{site} was lost before its last round was stored")
            self.round = voided[0]["round"]
            if self.phase != "ending":
                self._open_next(t)
                return
        self._after_loss(t)
        if self.unstored and (site == self.sender or self.sender is None):
            self._ask_store(t)

    def _after_loss(self, t: float) -> None:
        """Somebody is gone: does that decide what was waited for?"""
        now = self.now
        if self.phase == "train" and all(s in now.gone for s in now.members):
            self._cancel(t, "all members are gone")
            self._open_next(t)
        elif self.phase in ("train", "freezing"):
            self._when_frozen(t)
        elif self.phase == "reduce":
            self._judge(t)
        elif self.phase == "handover":
            self._open_next(t)
        elif self.phase == "ending":
            self._end_when_stored(t)

    def back(self, t: float, site: str, status: dict) -> None:
        """Wall: a process of before is heard again, by us or by the coordinator we follow. status: `held` round, `round`, `open_s`,
        `phase` (idle | train | frozen), `steps`, `finite`, `attempt`, `vote`, `unstored` (local round -> its steps)."""
        now, held = self.now, status["held"]
        self.present(site)
        alone = status["unstored"]  # what it froze by itself meanwhile
        if now and now.mode == "local" and site in now.members and str(now.number) in alone:
            self.frozen(t, site, alone[str(now.number)])
        if any(p["site"] == site for p in self.pending):
            if str(self.pending[0]["round"]) in alone and held == self.round:
                self.holds[site] = self.round
                self._actions.append(Action("resend", site, {"round": self.round}))
            else:
                self._out(t, site, "came back without the local round it had not stored")
        now = self.now
        if self.last and held == self.last["round"] == self.round - 1 and status["vote"] == self.last["digest"]:
            held, status = self.round, status | {"round": -1}  # the commit it missed
            self._actions.append(Action("commit", None, self.last | {"members": [site], "sender": None, "evaluate": None, "attempt": 0}))
        if now and held == now.number and site in now.members and site not in now.gone:
            now.silent.pop(site, None)
            self.holds[site] = held
            a = now.agreement
            same = self.opened(status["round"], status["open_s"])
            if not same and status["round"] >= 0:
                self._actions.append(Action("cancel", None, {"round": status["round"], "members": [site], "reason": "opened anew"}))
            if not same and self.phase == "train" and site not in now.steps:  # it never heard of this round
                self._actions.append(Action("open", None, now.told | {"members": [site]}))
            elif a is None and not same:
                self.frozen(t, site, 0)
            elif a is None and status["phase"] == "frozen":
                self.frozen(t, site, status["steps"], status["finite"], status["steps"] + 1)
            elif a and a.frozen.get(site) and not (same and status["phase"] == "frozen"):
                self._leave_out(t, site, "void", "it no longer holds what it had frozen")
                self._after_loss(t)
            elif a and status["vote"] and status["attempt"] == a.number:
                self.voted(t, site, a.number, status["vote"])
            elif self.phase == "freezing":
                self._actions.append(Action("freeze", None, {"round": now.number, "members": [site], "steps": None}))
        elif now and site in now.members and site not in now.gone:
            self._leave_out(t, site, "void", "it came back without its part")
            self._after_loss(t)
        elif held == self.round and self.schedule.sites[site].state in ("starting", "on"):
            if status["round"] >= 0:
                self._actions.append(Action("cancel", None, {"round": status["round"], "members": [site], "reason": "void"}))
            self.current(t, site, held)
        elif held >= 0 and site not in [p["site"] for p in self.pending]:  # else: off since, but its round is still to come
            self.holds.pop(site, None)
            self._actions.append(Action("cancel", None, {"round": status["round"], "members": [site], "reason": "the run has moved on"}))
        if self.unstored and self.holds.get(site) == self.round and self.sender in (None, site):
            self._ask_store(t)
        if held != self.round and self.schedule.sites[site].state in ("starting", "on") and self.stored == self.round:
            self._actions.append(Action("fetch", site, {"round": self.stored}))
        if self.phase in ("idle", "handover"):
            self._open_next(t)
        self._set_power(t)

    def opened(self, number: int, open_s: float) -> bool:
        """Is this the round that is open now, and not an earlier opening of the same number?"""
        return self.now is not None and number == self.now.number and abs(open_s - self.now.open_s) < 1e-5

    def _trained(self, t: float, site: str) -> int:
        """Steps of a member in the open round: what it reported, or about what it will have done by now, or until it was lost."""
        now = self.now
        until = min(t, now.gone.get(site, t), now.silent.get(site, t))
        return now.steps.get(site, min(count(now.leases[site]), int(max(0.0, until - now.open_s) / self._step_s(site))))

    def _left(self, t: float) -> float:
        """Tokens yet to be trained, with what the open round has by now."""
        open_ = sum(self._trained(t, s) for s in self.now.members) if self.now else 0
        return self.facts.num_batches * self.facts.tokens_per_step - self.committed_tokens - open_ * self.facts.tokens_per_step

    def _cancel(self, t: float, reason: str) -> None:
        now = self.now
        for ranges in now.leases.values():
            self.ledger.give_back(ranges)
        tokens = sum(self._trained(t, s) for s in now.members) * self.facts.tokens_per_step
        self._record(t, "cancel", round=now.number, reason=reason, tokens=tokens)
        involved = now.members + [s for s in (now.agreement.frozen if now.agreement else ()) if s not in now.members]
        self._actions.append(Action("cancel", None, {"round": now.number, "members": involved, "reason": reason}))
        self._release(t)
        self.now = None

    def finish(self, t: float, reason: str, code: int) -> None:
        """The run ends: 0 the whole budget is committed, 3 budget left, 1 failed (both resumable), 2 bad numbers."""
        if self.now:
            self._cancel(t, reason)
        self.phase, self.reason, self.code = "ended", reason, code
        for lost in self.pending:
            self.ledger.give_back(lost["batches"])
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

    def leave(self, t: float, site: str, why: str) -> None:
        """Wall: a site asks to go (SIGTERM). It goes as at a stop not known ahead: the round freezes, it takes part."""
        if not self.ended and self.schedule.sites[site].state != "off":
            self.schedule.set_absent(site, why)
            self._moves(t, self.schedule.stop(t, site, why))
            self._set_power(t)
        elif site not in self.leaving:
            self._drop(site)

    def _site_off(self, t: float, site: str) -> None:
        """Off by the schedule. Someone with a part in a round stays, at idle power, until that is over."""
        now = self.now
        if self.phase == "ended":
            return  # `end` tells everyone; what is on the sites' disks stays, for an exact resume
        busy = any(p["site"] == site for p in self.pending)
        if now and site in now.gone and not busy:
            self._drop(site)
        elif self.phase == "train" and site in now.members:
            self.leaving.add(site)
            self._freeze(t)
        elif busy or (self.phase == "freezing" and site in now.members) or (self.phase == "reduce" and site in now.agreement.tokens):
            self.leaving.add(site)
        else:
            self._drop(site)
            if self.phase == "handover":
                self._open_next(t)

    def _release(self, t: float) -> None:
        """The round is over for those who were only waiting for its end."""
        for site in [s for s in self.schedule.sites if s in self.leaving]:
            if site in [p["site"] for p in self.pending] or (not self.facts.timed and self.unstored and site == self.sender):
                continue
            self._let_go(site)

    def _let_go(self, site: str) -> None:
        if site in self.leaving:
            self.leaving.discard(site)
            self._touched.add(site)
            if self.facts.timed or self.schedule.sites[site].state == "off":  # else its next window has begun meanwhile
                self._drop(site)

    def _drop(self, site: str) -> None:
        self.holds.pop(site, None)
        self.fetching.discard(site)
        self.missing.discard(site)
        self._actions.append(Action("drop", site))

    # -- power and records ------------------------------------------------------------------------------------------

    def _set_power(self, t: float) -> None:
        """The power state of every site whose part in the run has changed."""
        phase = "train" if self.phase == "freezing" else self.phase
        now, derived_from = self.now, (phase, self.round)
        if derived_from != self._power:
            self._power = derived_from
            self._touched |= self.schedule.up | self.leaving
        if not self._touched:
            return
        for name in self._touched:
            state = self.schedule.sites[name].state
            if phase == "train" and name in now.leases and name not in now.steps and name not in now.gone:
                state = "training"
            elif (phase == "reduce" and now.agreement.lives(name)) or (phase == "handover" and state == "on"):
                state = "syncing"
            elif name in self.leaving or state == "on":
                state = "waiting"
            self.meter.set(t, name, state)
        self._touched.clear()

    def _fault(self, t: float, site: str, kind: str, action: str, **more) -> None:
        attempt = self.now.agreement.number if self.now and self.now.agreement else 0
        self._record(t, "fault", site=site, kind=kind, action=action, phase=self.phase, attempt=attempt, **more)

    def _record(self, t: float, type_: str, /, **fields) -> None:
        self._records.append({"t_s": round(t, 6), "type": type_} | fields)
