"""The round machine on the wall clock against an adversary: messages late, lost, twice and out of order, sites and the
coordinator killed at any moment, results that some hold and others do not. Pure: ten thousand schedules in seconds.

A string of bytes makes all choices, so that hypothesis can shrink a failure. Models are symbols: theta_{r+1} is named after
theta_r and what was averaged, so "same bits" is "same name".
"""

import hashlib
import json
import random

import pytest
from conftest import examples
from hypothesis import example, given
from hypothesis import strategies as st
from test_schedule import make_run

from journal import check
from ledger import count

BUDGET = 24
CLEAN, DIRTY = 20.0, 500.0


def name_of(*parts) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()[:10]


class Site:
    """One process of a site, by train.py's rules."""

    def __init__(self, name: str, world: "World"):
        self.name, self.world, self.alive = name, world, True
        self.known = False  # welcomed: the next hello tells where we stand
        self.up, self.down = [], []  # messages on their way to and from the coordinator
        self.forget()

    def forget(self):
        self.held, self.theta, self.mean, self.mean_of = -1, "", None, -1
        self.unstored = {}
        self.idle()

    def idle(self):
        self.round, self.phase, self.mode, self.leased, self.steps, self.finite = -1, "idle", "", 0, 0, True
        self.open_s = 0.0
        self.attempt, self.vote, self.joined = 0, "", None

    def status(self):
        unstored = {str(r): n for r, n in self.unstored.items()}
        names = ("held", "round", "open_s", "phase", "steps", "finite", "attempt", "vote")
        return {name: getattr(self, name) for name in names} | {"unstored": unstored}

    def say(self, *message):
        self.up.append(message)

    def work(self, choice: int):
        """One step, or what comes when leases are used up or a local round's time is over."""
        if self.phase != "train":
            return
        if self.mode == "local" and choice % 4 == 0:
            self.freeze()
        elif self.steps < self.leased:
            self.steps += 1
        else:
            self.say("more", self.round, self.leased, self.open_s)

    def freeze(self, finite=True):
        self.phase, self.finite = "frozen", finite
        self.steps = self.steps if finite else 0
        self.say("frozen", self.round, self.steps, finite, self.open_s)
        if self.mode == "local" and self.steps:
            self.unstored[self.round] = self.steps
            self.held, self.theta = self.round + 1, name_of(self.theta, "local", self.name, self.round, self.steps)
            self.mean_of = -1
            self.idle()
            self.say("upload", self.held, None, self.theta)
        elif self.mode == "local":
            self.idle()

    def hear(self, kind: str, d: dict):
        busy = self.phase == "train"
        ours = d.get("round") == self.round
        if kind == "fetch" and self.world.stored.get(d["round"]):
            self.forget()
            self.held, self.theta = d["round"], self.world.stored[d["round"]]
            self.say("current", self.held, d["id"])
        elif kind == "fetch":
            self.forget()
            self.say("again")
        elif kind == "open" and self.phase == "idle" and d["round"] == self.held:
            self.round, self.phase, self.mode, self.steps = d["round"], "train", d["mode"], 0
            self.open_s = d["open_s"]
            self.finite, self.vote = True, ""
            self.leased = count(d["leases"][self.name])
        elif kind == "lease" and busy and ours:
            self.leased += count(d["ranges"])
            if not d["ranges"]:
                self.freeze()
        elif kind == "freeze" and busy and ours:
            self.freeze()
        elif kind == "attempt" and not busy and d["round"] == self.held and d["weights"][self.name] and not self.steps:
            self.say("failed", d["round"], d["attempt"])  # nothing is frozen here
            self.say("hello")
        elif kind == "attempt" and not busy and d["round"] == self.held:
            if self.phase == "idle":  # a joiner
                self.round, self.phase, self.mode = d["round"], "frozen", "federated"
            self.attempt, self.vote, self.mean = d["attempt"], "", None
            self.mean_of = -1
            self.joined = (d["round"], d["attempt"])
            self.world.reduces.setdefault(self.joined, (d["members"], {}))[1][self] = (self.theta, self.steps)
        elif kind == "give" and ours and self.vote == d["digest"]:
            self.say("result", d["attempt"], d["digest"])
        elif kind == "take" and ours and d["digest"] in self.world.results:
            self.joined, self.mean, self.vote, self.attempt = None, d["digest"], d["digest"], d["attempt"]
            self.say("vote", self.round, self.attempt, self.vote)
        elif kind == "commit" and d["round"] in self.unstored:
            self.unstored = {r: n for r, n in self.unstored.items() if r > d["round"]}
        elif kind == "commit" and ours and self.phase == "frozen":
            assert (d["round"], d["digest"]) in self.world.committed, "applied what is not in the journal"
            assert self.vote == d["digest"], "told to apply what it does not hold"
            self.held, self.theta, self.mean_of = self.held + 1, name_of(self.theta, self.vote), self.held
            self.mean = d["digest"]
            self.idle()
            if d["sender"] == self.name:
                self.say("upload", self.held, self.mean, self.theta)
        elif kind in ("cancel", "rollback") and self.held >= 0 and (self.phase == "idle" or d["round"] <= self.round):
            self.idle()
            self.unstored = {}
        elif kind == "drop":
            self.forget()
        elif kind == "resend" and d["round"] == self.held:
            self.say("upload", self.held, self.mean if self.mean_of == self.held - 1 else None, self.theta)
        elif kind == "evaluate":
            self.say("eval", d["round"])
        elif kind in ("open", "freeze", "attempt") and self.phase == "idle":
            self.say("hello")


class World:
    def __init__(self, sites: int, off_delay_s: float):
        self.names = [f"s{i}" for i in range(sites)]
        self.options = dict(rates=dict.fromkeys(self.names, 5.0), budget=BUDGET, timed=False, off_delay_s=off_delay_s, sync_s=1.0,
                            train_s=12.0, commit_every_s=8.0, max_steps=3)  # fmt: skip
        self.signal = dict.fromkeys(self.names, CLEAN)
        self.t, self.journal, self.stored, self.committed = 0.0, [{"n": 0, "t_s": 0.0, "type": "genesis"}], {0: "theta0"}, set()
        self.reduces, self.results, self.agreed = {}, set(), {}
        self.sites = {n: Site(n, self) for n in self.names}
        self.processes = dict.fromkeys(self.names)  # whom the coordinator has admitted
        self.known = dict.fromkeys(self.names)  # the last process of each site it has met
        self.unheard, self.fetches = set(), {}
        self.run = None
        self.start()

    # -- the coordinator ----------------------------------------------------------------------------------------------

    def start(self):
        facts_signals = {n: [CLEAN] * 2 for n in self.names}
        self.run, _ = make_run(facts_signals, **self.options)
        object.__setattr__(self.run.facts, "end_s", 1e9)
        object.__setattr__(self.run.facts, "attempt_s", 6.0)
        object.__setattr__(self.run.facts, "dead_s", 3.0)
        object.__setattr__(self.run.facts, "max_offline_s", 40.0)
        self.run.attempt_s = 6.0
        self.processes = dict.fromkeys(self.names)
        if len(self.journal) > 1:
            self.run.restore(self.t, self.journal, max(self.stored))
            self.unheard = {n for n, s in self.run.schedule.sites.items() if s.state != "off"}
        for name in self.names:
            self.run.observe(self.t, name, self.signal[name])
        self.run.schedule.resume()
        self.restarted, self.results, self.being_written = self.t, set(), []
        for site in self.sites.values():
            site.up, site.down = [], []

    def settle(self, dies: bool = False):
        """What was decided is journalled, then told; `dies`: killed in between, and started again."""
        records, actions = self.run.take()
        self.journal += json.loads(json.dumps([{"n": len(self.journal) + i} | r for i, r in enumerate(records)]))
        self.committed |= {(r["round"], r["digest"]) for r in records if r["type"] == "commit"}
        for r in records:
            if r["type"] == "commit":
                self.agreed[r["round"] + 1] = r["digest"]
        ledger, pending = self.run.ledger, sum(p["count"] for p in self.run.pending)
        leased = sum(count(r) for r in self.run.now.leases.values()) if self.run.now else 0
        assert ledger.num_committed + count(ledger.free) + pending + leased == BUDGET, "no batch is lost, none is doubled"
        if dies:
            self.start()
            return
        for action in actions:
            whom = action.data.get("members", self.names) if action.site is None else [action.site]
            for name in whom:
                site = self.processes[name]
                if site and site.alive:
                    self.tell(site, action.kind, action.data)
            if action.kind == "commit" and action.data["attempt"] and action.data["digest"] in self.results:
                self.store(action.data["round"] + 1, name_of(self.stored[self.run.stored], action.data["digest"]))

    def tell(self, site: Site, kind: str, data: dict):
        if kind == "fetch":
            self.fetches[site.name] = data["id"] = self.fetches.get("last", 0) + 1
            self.fetches["last"] = data["id"]
        elif kind == "drop":
            self.fetches.pop(site.name, None)
        site.down.append((kind, data))

    def act(self, dies=False):
        if self.being_written:
            self.written()
        for name, site in self.run.schedule.sites.items():
            if site.state == "provisioning" and self.processes[name]:
                self.run.provisioned(self.t, name)
        self.run.advance(self.t)
        if self.unheard and self.t > self.restarted + 3.0:
            for name in sorted(self.unheard):
                self.run.lost(self.t, name, "not heard", sure=False)
            self.unheard = set()
        self.settle(dies)

    def greet(self, name: str):
        """The site's process says hello."""
        site, run = self.sites[name], self.run
        again = site.known and self.known[name] in (site, None)
        if self.known[name] and not again and (self.processes[name] or name in self.unheard or run.counts_on(name)):
            run.lost(self.t, name, "replaced", sure=True)
        self.processes[name] = self.known[name] = site
        self.unheard.discard(name)
        site.up, site.down = [], []
        if again:
            run.back(self.t, name, site.status())
        else:
            run.present(name)
        site.known = True
        self.settle()

    def part(self, name: str, sure: bool):
        """The connection to the site's process is gone, and the coordinator knows."""
        if self.processes[name]:
            self.processes[name] = None
            self.run.lost(self.t, name, "gone", sure=sure)
            self.settle()
        self.sites[name].up, self.sites[name].down = [], []

    def handle(self, site: Site, kind: str, *d):
        run, t, name = self.run, self.t, site.name
        open_ = run.now and run.now.number
        self.t += 1e-4
        if kind == "hello":
            self.greet(name)
        elif kind == "current" and d[1] == self.fetches.get(name):
            run.current(t, name, d[0])
        elif kind == "again" and run.schedule.sites[name].state in ("starting", "on"):
            self.tell(site, "fetch", {"round": run.stored})
        elif kind == "frozen" and run.opened(d[0], d[3]):
            run.frozen(t, name, d[1], d[2], d[1] + 1)
        elif kind == "more" and run.opened(d[0], d[2]):
            run.more(t, name, d[1])
        elif kind == "vote" and run.now and d[0] == open_:
            run.voted(t, name, d[1], d[2])
        elif kind == "failed" and run.now and d[0] == open_:
            run.failed(t, name, d[1], "torn")
        elif kind == "result":
            self.results.add(d[1])
            run.at_head(t, *d)
        elif kind == "upload":
            round_, delta, theta = d
            if delta and round_ == run.stored + 1 and self.agreed.get(round_) == delta:
                self.store(round_, name_of(self.stored[run.stored], delta))
            elif not delta and round_ > run.stored:
                self.store(round_, theta)
        elif kind == "eval":
            run.evaluated(t, d[0], 1.0, 1.0)

    def store(self, round_: int, theta: str):
        """A whole state is here: it is written in the background, and durable some time later."""
        if self.run.stored < round_ <= self.run.round:
            self.run.writing(round_)
            self.being_written.append((round_, theta))

    def written(self):
        round_, theta = self.being_written.pop(0)
        if round_ <= self.run.stored:
            return  # a second sender's
        assert round_ <= self.run.round, "what is being written was undone"
        self.stored = {r: x for r, x in self.stored.items() if r < round_} | {round_: theta}
        self.run.store_done(self.t, round_, theta, "m")

    # -- the adversary ------------------------------------------------------------------------------------------------

    def deliver(self, site: Site, choice: int, orderly: bool):
        """One message, either way; now and then twice, or before its turn."""
        if self.being_written and (orderly or choice % 5 == 0):
            self.written()
            self.settle()
        if site.up and (choice % 2 or not site.down) and self.processes[site.name] is site:
            i = 0 if orderly or choice % 7 or site.up[-1][0] == "upload" else min(1, len(site.up) - 1)  # it follows `frozen`
            message = site.up[i]
            if orderly or choice % 11:
                del site.up[i]
            self.handle(site, *message)
            self.settle(dies=not orderly and choice == 255)
        elif site.down:
            site.hear(*site.down.pop(0))

    def reduce(self, site: Site, choice: int, orderly: bool):
        """A member in an all-reduce finishes it, if all are in it, or fails."""
        if site.joined is None:
            return
        key = site.joined
        members, parts = self.reduces[key]
        complete = {s.name for s in parts} >= set(members)
        absent = [m for m in members if m != site.name and (self.processes[m] is not self.sites[m] or self.sites[m].joined != key)]
        if complete and (orderly or choice % 3):
            thetas = {theta for s, (theta, _) in parts.items() if s.name in members}
            assert len(thetas) == 1, "members average from different starts"
            told = next(r["tokens"] for r in reversed(self.journal) if r["type"] == "attempt" and (r["round"], r["attempt"]) == key)
            assert told == {s.name: 10 * n for s, (_, n) in parts.items() if s.name in members}, "a weight for what is not there"
            site.mean = site.vote = name_of(key, sorted((s.name, n) for s, (_, n) in parts.items()))
            if not orderly and choice % 29 == 1:
                site.mean = site.vote = "wrong"  # as a broken machine would have it
            site.say("vote", key[0], key[1], site.vote)
            site.joined = None
        elif choice % 3 == 0 or (orderly and absent):
            site.joined = None
            site.say("failed", *key)

    def kill(self, name: str):
        self.sites[name].alive = False
        self.sites[name] = Site(name, self)

    def disturb(self, what: int, choice: int):
        name = self.names[choice % len(self.names)]
        site = self.sites[name]
        if what < 8:
            self.deliver(site, choice // 3, orderly=False)
        elif what < 10:
            site.work(choice)
        elif what < 12:
            self.reduce(site, choice // 3, orderly=False)
        elif what == 12:
            self.t += (0.1, 1.0, 4.0, 30.0)[choice // 4 % 4]
            self.act(dies=choice > 250)
        elif what == 13:
            if self.processes[name] is not site and site.alive:
                self.greet(name)
        elif choice % 5 == 0:
            self.kill(name)
            if choice % 2:
                self.part(name, sure=False)
        elif choice % 5 == 1:
            self.part(name, sure=False)
        elif choice % 5 == 2 and choice > 200:
            self.start()
        elif choice % 5 == 3 and site.phase == "train":
            site.freeze(finite=choice % 10 > 4)
        elif choice % 5 == 4:
            self.signal[name] = DIRTY if self.signal[name] == CLEAN else CLEAN
            self.run.observe(self.t, name, self.signal[name])
            self.act()

    def calm(self):
        """Everyone alive and connected, windows open: the run must end."""
        for name in self.names:
            self.signal[name] = CLEAN
            self.run.observe(self.t, name, CLEAN)
            if self.processes[name] not in (None, self.sites[name]):
                self.part(name, sure=False)
        for turn in range(1500):
            if self.run.ended:
                return
            self.t += 0.25
            self.act()
            for name in self.names:
                site = self.sites[name]
                if self.processes[name] is not site:
                    self.greet(name)
                for _ in range(6):
                    self.deliver(site, turn, orderly=True)
                    self.deliver(site, turn + 1, orderly=True)
                site.work(turn)
                self.reduce(site, 1 + turn % 2, orderly=True)
        raise AssertionError(f"stuck in {self.run.phase}, {self.run.now}")

    def same_everywhere(self):
        by_round = {}
        for site in self.sites.values():
            if site.held >= 0 and not site.unstored and self.run.holds.get(site.name) == site.held:
                by_round.setdefault(site.held, set()).add(site.theta)
        for round_, thetas in by_round.items():
            thetas |= {self.stored[round_]} if round_ in self.stored else set()
            assert len(thetas) == 1, f"round {round_} is not one model: {thetas}"


def play(data: bytes, sites: int, off_delay_s: float) -> World:
    world = World(sites, off_delay_s)
    world.act()
    for name in world.names:
        world.greet(name)
    for what, choice in zip(data[::2], data[1::2]):
        if world.run.ended:
            break
        world.disturb(what % 16, choice)
        world.same_everywhere()
    world.calm()
    world.same_everywhere()
    return world


ENDED_WHILE_STORING = bytes.fromhex(
    "00000f4500c20000df9a0071001a00008fe900000000002f0000008300000000004d000058260000000000008c0e0000"
    "0000000b0002000e0000000000860000be710000000b0095"
)


@examples(10_000)
@given(st.binary(min_size=40, max_size=240), st.integers(2, 3), st.sampled_from([0.0, 2.0]))
@example(data=ENDED_WHILE_STORING, sites=3, off_delay_s=0.0)
def test_whatever_fails_and_whenever_all_hold_one_model_and_the_whole_budget_is_committed_once(data, sites, off_delay_s):
    all_is_well(play(data, sites, off_delay_s))


@pytest.mark.parametrize("seed", range(4))
def test_the_same_in_long_wild_days(seed):
    rng = random.Random(seed)
    for _ in range(500):
        all_is_well(play(rng.randbytes(rng.choice([150, 400, 900])), rng.choice([2, 3]), rng.choice([0.0, 2.0])))


def all_is_well(world: World) -> None:
    if world.run.code == 2:  # nobody had finite numbers, twice running
        assert "non-finite" in world.run.reason
        return
    assert world.run.code == 0 and world.run.ledger.num_committed == BUDGET, world.run.reason
    broken = [line for ok, line in check(world.journal, BUDGET, 10) if not ok]
    assert not broken, broken


def test_a_window_that_closed_while_the_coordinator_was_away_does_not_void_the_local_round_that_is_still_to_come():
    run, _ = make_run({"s0": [CLEAN] * 9}, rates={"s0": 5.0}, timed=False, off_delay_s=0.0)
    moves = [{"type": "site", "site": "s0", "from": a, "to": b, "t_s": 0.0} for a, b in (("off", "provisioning"), ("provisioning", "on"))]
    opened = {
        "type": "open",
        "round": 0,
        "mode": "local",
        "members": ["s0"],
        "t_s": 1.0,
        "end_s": 9.0,
        "leases": {"s0": [[0, 4]]},
        "rates": {},
    }
    run.restore(20.0, [*moves, opened, {"type": "frozen", "round": 0, "site": "s0", "steps": 4, "t_s": 9.0}], 0)
    run.observe(20.0, "s0", DIRTY)
    run.schedule.resume()
    run.advance(20.0)
    assert run.schedule.sites["s0"].state == "off"
    run.back(21.0, "s0", {"held": 1, "round": -1, "open_s": 0.0, "phase": "idle", "steps": 0, "finite": True, "attempt": 0, "vote": "",
                          "unstored": {"0": 4}})  # fmt: skip
    assert [a.kind for a in run.take()[1]] == ["resend"] and run.holds["s0"] == 1
    run.store_done(22.0, 1, "theta", "m")
    records, actions = run.take()
    assert [r["type"] for r in records] == ["commit", "store"] and [a.kind for a in actions if a.site == "s0"] == ["drop"]
