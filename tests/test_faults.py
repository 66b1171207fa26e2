"""Whatever fails, at whatever moment: real processes, real signals, on the wall clock. Nobody else loses a step.

The faults themselves are in faulty.py. Every test ends with the whole budget committed and every invariant of
`coordinator.py check` held.
"""

import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time

import psutil
import pytest
import torch
from conftest import CLEAN, DIRTY, REPO, Runner, processes_in, records
from test_runs import until

import coordinator
from journal import effective

pytestmark = pytest.mark.slow
PACE_S = 0.02  # slept at each step
STEPS = 12  # of each site in a round
BUSY_S = 1.5  # what two busy cores may add to a bound; the bounds themselves are measured by bench/storm.py
FAST = {
    "clock": {"mode": "wall"},
    "rounds": {
        "train_s": 20,
        "max_steps": STEPS,
        "sync_s": 0.2,
        "grace_s": 3,
        "commit_every_s": 1,
        "max_offline_s": 40,
        "rejoin_wait_s": 40,
    },
    "sync": {"heartbeat_s": 0.2, "dead_s": 1.5, "chunk_mb": 1},
    "eval": {"every_rounds": 0},
    "optim": {"matrices": "adamw"},  # the cheapest: what fails here is never the optimizer
}
FAST_SITE = {"tokens_per_s": 4000.0}


class Day:
    """A wall-clock run of paced sites, some with a fault built in."""

    def __init__(self, runner, sites="abc", rounds=14, windows=None, **changes):
        self.runner, self.sites = runner, list(sites)
        budget = {"tokens": 128 * STEPS * len(sites) * rounds}
        merged = {k: FAST[k] | changes.pop("rounds_" if k == "rounds" else k, {}) for k in FAST}
        self.argv = runner.write(dict.fromkeys(self.sites, FAST_SITE), windows, budget=budget, **merged, **changes)
        self.count, self.paces = 0, {}

    def start(self, name: str, fault: str = "none", *more: str):
        self.count += 1
        script = "coordinator.py" if name == "coordinator" else "train.py"
        extra = [] if name == "coordinator" else [f"site={name}"]
        log = name if self.count <= len(self.sites) + 1 else f"{name}-{self.count}"
        return self.runner.start("tests/faulty.py", str(self.paces.get(name, PACE_S)), fault, script, *self.argv, *extra, *more, log=log)

    def begin(self, **faults):
        self.head = self.start("coordinator", faults.pop("coordinator", "none"))
        self.workers = {name: self.start(name, faults.get(name, "none")) for name in self.sites}

    def journal(self, *types):
        return [r for r in self.runner.journal() if not types or r["type"] in types]

    def commits(self):
        return len(self.journal("commit"))

    def faults(self, kind=None):
        return [r for r in self.journal("fault") if kind in (None, r["kind"])]

    def fault_at(self, point: str, name: str) -> float:
        """Unix time at which a built-in fault struck, waiting for it."""
        path = self.runner.folder / f"fault-{point}-{name}"
        until(lambda: path.exists() and path.read_text(), 60)
        return float(path.read_text())

    def unix(self, record: dict) -> float:
        return self.journal()[0]["wall"]["epoch_unix"] + record["t_s"]

    def voided(self):
        """Rounds that came to nothing, but for one that a second site's arrival cut short before its first step."""
        return [r for r in self.journal("cancel", "rollback") if r.get("reason") != "no whole step fitted"]

    def whole(self) -> bool:
        """Whether all three have been members of a round."""
        return any(len(r["members"]) == 3 for r in self.journal("open"))

    def after(self, number: int):
        """Wait for `number` more commits."""
        goal = self.commits() + number
        until(lambda: self.commits() >= goal or self.head.poll() is not None, 60)

    def next_attempt(self):
        seen = len(self.journal("attempt"))
        until(lambda: len(self.journal("attempt")) > seen, 30)

    def end(self, gone=()):
        """The run ends with everything committed and every invariant held; nobody stays behind."""
        assert self.head.wait(150) == 0, self.said()
        for name, worker in self.workers.items():
            if name not in gone:
                assert worker.wait(20) == 0, self.runner.said(name)
        assert coordinator.main(["check", str(self.runner.run_dir)]) == 0
        assert self.runner.summary()["tokens"] == self.runner.load(self.argv).budget.tokens
        until(lambda: not processes_in(self.runner.folder), 15)

    def said(self):
        logs = sorted(self.runner.folder.glob("*.log"))
        return "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in logs)

    def steps(self, site: str) -> list[tuple[int, int]]:
        """(round, step of the round) of each step it has logged: the first, and every second."""
        out = []
        for round_ in (line["round"] for line in records(self.runner.run_dir / f"{site}.jsonl")):
            last = out[-1] if out else (-1, 0)
            out.append((round_, 1 if round_ != last[0] else last[1] // 2 * 2 + 2))
        return out

    def contributions(self, site: str) -> dict[int, int]:
        """Round -> batches of a site in it, of the commits that hold."""
        commits = [r for r in effective(self.journal()) if r["type"] == "commit"]
        return {c["round"]: sum(b - a for a, b in c["batches"].get(site, [])) for c in commits}


@pytest.mark.parametrize("point", ["step", "freeze", "reduce", "vote", "apply"])
def test_a_site_killed_anywhere_in_a_round_costs_only_its_own_part_of_it(runner, point):
    day = Day(runner)
    day.begin(c=f"{point}:3")
    struck = day.fault_at(point, "c")
    until(day.faults, 10)
    assert day.unix(day.faults()[0]) - struck < 1.0 + BUSY_S, "a closed connection is noticed within a second"
    day.workers["c"].wait(5)
    day.workers["c"] = day.start("c")
    day.end()
    assert next(r for r in day.journal("open") if r["round"] == 3)["members"] == ["a", "b", "c"]
    assert day.contributions("a")[3] == day.contributions("b")[3] == STEPS, "nobody else lost a step"
    if point in ("step", "freeze"):
        assert day.contributions("c")[3] == 0
    if point == "apply":
        assert day.contributions("c")[3] == STEPS, "what was agreed on stays, though one of its makers died"
    assert not day.voided()
    assert max(r for r, n in day.contributions("c").items() if n) > 4, "and it came back"
    stall = next(r["t_s"] for r in day.journal("commit") if r["round"] == 3) - next(
        r["t_s"] for r in day.journal("attempt") if r["round"] == 3
    )
    assert stall < FAST["sync"]["dead_s"] + BUSY_S


@pytest.mark.parametrize("deed", ["alone", "holder dies", "all holders die"])
def test_a_result_some_hold_and_others_lack_reaches_them_or_is_made_again(runner, deed):
    """b finishes the all-reduce and fails all the same; the others hold the result, and may die on the way to give it."""
    day = Day(runner)
    day.begin(b="vote:3:fail", **{"alone": {}, "holder dies": {"a": "give:3"}, "all holders die": {"a": "give:3", "c": "give:3"}}[deed])
    day.fault_at("vote", "b")
    for name in {"alone": "", "holder dies": "a", "all holders die": "ac"}[deed]:
        day.fault_at("give", name)
        day.workers[name].wait(5)
        day.workers[name] = day.start(name)
    day.end()
    assert day.contributions("b")[3] == STEPS, "the one that failed loses nothing"
    attempts = [r for r in day.journal("attempt") if r["round"] == 3]
    assert [r["members"] for r in attempts] == [["a", "b", "c"]] + [["b"]] * (deed == "all holders die")
    if deed != "all holders die":
        assert day.contributions("a")[3] == day.contributions("c")[3] == STEPS
    assert not day.voided()


def test_if_all_holders_die_before_it_is_stored_the_round_is_rolled_back_and_trained_again(runner):
    day = Day(runner)
    day.begin(a="applied:3", b="applied:3", c="applied:3")
    for name in "abc":
        day.fault_at("applied", name)
        day.workers[name].wait(5)
    for name in "abc":
        day.workers[name] = day.start(name)
    day.end()
    (back,) = day.journal("rollback")
    assert back["to_round"] == 3 and back["tokens"] == 3 * STEPS * 128
    assert day.journal("commit")[4]["round"] == 3, "the next commit makes it again"


def test_a_sender_that_dies_is_replaced_by_another_holder(runner):
    day = Day(runner)
    day.begin(a="store:3")
    day.fault_at("store", "a")
    day.workers["a"].wait(5)
    day.workers["a"] = day.start("a")
    day.end()
    assert not day.voided()
    assert day.contributions("a")[3] == STEPS


@pytest.mark.parametrize("point", ["training", "attempted", "voted", "announce", "storing"])
def test_a_killed_coordinator_comes_back_and_nothing_is_lost(runner, point):
    day = Day(runner)
    day.begin(coordinator=f"{point}:3")
    day.fault_at(point, "coordinator")
    day.head.wait(5)
    day.head = day.start("coordinator")
    day.end()
    assert not day.voided()
    assert {r["kind"] for r in day.faults()} <= ({"average failed"} if point == "attempted" else set()), day.faults()
    for name in "abc":
        assert day.contributions(name)[3] == STEPS
        assert day.workers[name].returncode == 0


def test_a_killed_coordinator_comes_back_to_a_local_round_that_was_not_stored(runner):
    day = Day(runner, "a", rounds=30)
    day.begin(coordinator="storing:3")
    day.fault_at("storing", "coordinator")
    day.head.wait(5)
    time.sleep(1.0)  # the site trains on
    day.head = day.start("coordinator")
    day.end()
    assert not day.voided() and not day.faults()
    (frozen,) = [r for r in day.journal("frozen") if r["round"] == 3]
    assert day.contributions("a")[3] == frozen["steps"] > 0, "what it had trained by itself counts"


@pytest.mark.parametrize("point", ["step", "freeze", "reduce", "apply"])
def test_a_frozen_site_blocks_nobody_and_is_no_ghost_when_it_wakes(runner, point):
    day = Day(runner, rounds=24)
    day.begin(c=f"{point}:3:stop")
    struck = day.fault_at(point, "c")
    until(day.faults, 15)
    assert day.unix(day.faults()[0]) - struck < FAST["sync"]["dead_s"] + 1.0 + BUSY_S
    day.after(4)
    day.workers["c"].send_signal(signal.SIGCONT)
    day.end()
    assert day.contributions("a")[3] == day.contributions("b")[3] == STEPS
    assert not day.voided()
    assert day.contributions("c")[3] in {"apply": (STEPS,), "reduce": (0, STEPS)}.get(point, (0,)), "what it had put in counts"
    assert max(r for r, n in day.contributions("c").items() if n) > 7, "it took part again"


def test_an_orphan_beside_its_restarted_site_is_fenced(runner):
    day = Day(runner, rounds=24)
    day.begin(c="step:3:stop")
    orphan, _ = day.workers["c"], day.fault_at("step", "c")
    until(day.faults, 15)
    day.workers["c"] = day.start("c")
    until(lambda: any(r["t_s"] > day.faults()[-1]["t_s"] and "c" in r["members"] for r in day.journal("open")), 60)
    orphan.send_signal(signal.SIGCONT)
    assert orphan.wait(20) == 1 and "already connected" in runner.said("c")
    day.end()


# -- numbers that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point, kind", [("nan", "non-finite loss"), ("base", "wrong base"), ("digest", "digests differ")])
def test_wrong_numbers_are_named_left_out_and_never_reach_theta(runner, point, kind):
    day = Day(runner)
    day.begin(c=f"{point}:3")
    day.fault_at(point, "c")
    day.end()
    assert {r["kind"] for r in day.faults()} == {kind}
    if kind != "digests differ":
        assert {r["site"] for r in day.faults()} == {"c"}
    assert all(torch.isfinite(runner.theta())), "nothing that is not a number"
    for name in "ab":
        assert day.contributions(name)[3] == day.contributions(name)[4] == STEPS
    if point == "nan":
        assert day.contributions("c")[3] == 0 and day.contributions("c")[4] == STEPS, "it took the others' result, and went on"
    if point == "base":
        assert day.contributions("c")[3] == STEPS and day.contributions("c")[4] == 0
        assert max(r for r, n in day.contributions("c").items() if n) > 5


def test_a_member_whose_result_stays_wrong_is_found_by_the_coordinators_own_sum(runner):
    day = Day(runner)
    day.begin(c="lie:3")
    day.fault_at("lie", "c")
    day.end()
    assert [r["kind"] for r in day.faults()] == ["digests differ", "digests differ", "wrong result"]
    assert day.faults()[-1]["site"] == "c"
    assert [r["topology"] for r in day.journal("attempt") if r["round"] == 3] == ["ring", "ring", "star"]
    assert day.contributions("a")[3] == STEPS


def test_a_corrupted_download_is_noticed_and_made_again(runner):
    day = Day(runner)
    day.begin(c="corrupt:0")
    day.fault_at("corrupt", "c")
    day.end()
    assert "again" in runner.said("c")


@pytest.mark.parametrize("sites, kind", [("abc", "wrong base"), ("a", "spoiled upload")])
def test_a_result_that_arrives_damaged_is_not_stored_but_sent_again(runner, sites, kind):
    """By the sender of a federated round's result: another sends it. By a site alone: it is asked once more."""
    day = Day(runner, sites, rounds=14 if len(sites) > 1 else 30)
    day.begin(a="upload:3")
    day.fault_at("upload", "a")
    day.end()
    assert [(r["site"], r["kind"]) for r in day.faults()] == [("a", kind)]
    assert not day.journal("rollback") and day.contributions("a")[3] > 0, "what was agreed on stays"
    assert next(r for r in day.journal("store") if r["round"] == 4)["t_s"] < day.faults()[0]["t_s"] + 2 + BUSY_S


# -- slow ------------------------------------------------------------------------------------------------------------


def test_a_slow_site_contributes_what_it_has_and_a_late_one_is_left_out(runner):
    day = Day(runner, rounds=16, rounds_={"max_steps": None, "train_s": 1.5, "grace_s": 2})
    day.paces["c"] = 10 * PACE_S
    day.begin(b="step:3:sleep")
    day.end()
    assert [(r["site"], r["kind"]) for r in day.faults()] == [("b", "late")]
    full = {o["round"] for o in day.journal("open") if all(len(ranges) for ranges in o["leases"].values())}
    weights = [r["weights"] for r in day.journal("attempt") if len(r["members"]) == 3 and r["tokens"]["b"] and r["round"] in full]
    assert weights and all(0 < w["c"] < 0.8 * w["a"] for w in weights[1:]), "a share by what it did"
    waits = [c["t_s"] - next(o["t_s"] for o in day.journal("open") if o["round"] == c["round"]) for c in day.journal("commit")]
    assert max(waits) < 1.5 + 2.0 + 1.0 + BUSY_S, "training, grace, and the sync"


def test_a_slow_link_costs_its_own_time_and_nothing_else(wired):
    """c reaches the head node at 500 kB/s; each average of 0.5 MB by star takes it some two seconds, its download four."""
    changes = {"model": {"depth": 2, "width": 64}, "sync": {"topology": "star"}, "rounds_": {"max_steps": None, "train_s": 5}}
    day, _ = wired(rounds=20, lag_s=0.02, bytes_per_s=6e5, pace_s=0.1, **changes)
    day.end()
    assert not day.voided() and not day.faults()
    shared = [r for r in day.journal("attempt") if r["tokens"].get("c")]
    assert len(shared) >= 2 and all(r["attempt"] == 1 and r["weights"]["c"] > 0.2 for r in shared)
    commits = {r["round"]: r["t_s"] for r in day.journal("commit")}
    assert statistics.median(commits[r["round"]] - r["t_s"] for r in shared) > 1.0, "the link was slow indeed"


# -- several at once -------------------------------------------------------------------------------------------------


def test_two_failures_within_a_second_and_a_joiner_that_dies_while_downloading(runner):
    day = Day(runner, "abcd", rounds=12)
    day.begin(c="reduce:3", d="vote:3")
    for point, name in (("reduce", "c"), ("vote", "d")):
        day.fault_at(point, name)
        day.workers[name].wait(5)
    day.start("c", "download:0").wait(60)
    day.workers |= {"c": day.start("c"), "d": day.start("d")}
    day.end()
    assert day.contributions("a")[3] == day.contributions("b")[3] == STEPS
    assert not day.voided()


def test_when_all_sites_die_the_run_pauses_and_the_next_one_starts_from_the_stored_state(runner):
    day = Day(runner, rounds=8)
    day.begin()
    day.after(3)
    for name in "abc":
        day.workers[name].kill()
    until(lambda: len(day.faults()) >= 3, 15)
    time.sleep(2.5)
    assert day.head.poll() is None
    count = day.commits()
    day.workers["b"] = day.start("b")
    day.after(2)
    assert day.commits() > count
    day.workers |= {"a": day.start("a"), "c": day.start("c")}
    day.end()


@pytest.mark.parametrize("off_delay_s", [1, 0])
def test_one_leaves_while_another_joins_and_a_local_round_is_stored_before_its_site_goes(runner, off_delay_s):
    """a alone; b joins as a leaves; b alone, and leaves; c ends it. Their stops are known a second ahead, or not at all."""
    windows = {"a": [CLEAN] * 4 + [DIRTY], "b": [DIRTY] * 4 + [CLEAN] * 5 + [DIRTY], "c": [DIRTY] * 10 + [CLEAN]}
    day = Day(runner, rounds=30, windows=windows, step_s=2, policy={"off_delay_s": off_delay_s}, carbon={"max_gap_s": 10})
    day.begin()
    day.end()
    assert not day.journal("rollback") and not day.faults()
    offs = {r["site"]: r for r in day.journal("site") if r["to"] == "off" and "MCI" in r["reason"]}
    assert set(offs) == {"a", "b"}
    for site in "ab":
        frozen = [r["round"] for r in day.journal("frozen") if r["site"] == site]
        assert set(frozen) <= {r["round"] for r in day.journal("commit")}, "every local round it froze was committed"


# -- asked to go -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_sigterm_or_ctrl_c_is_a_stop_not_known_ahead_and_costs_nothing(runner, number, code):
    day = Day(runner)
    day.begin()
    day.after(2)
    until(lambda: day.steps("c") and day.steps("c")[-1] == (day.journal("open")[-1]["round"], 4), 30)
    started = time.monotonic()
    day.workers["c"].send_signal(number)
    assert day.workers["c"].wait(20) == code and time.monotonic() - started < 10
    last = max(r for r, n in day.contributions("c").items() if n)
    opened = [r["round"] for r in day.journal("open") if "c" in r["members"]]
    assert last == max(opened), "its last round was agreed on before it went"
    day.end(gone="c")
    assert not day.faults() and not day.voided()


@pytest.mark.parametrize("victim", ["parent terminated", "parent killed", "one rank killed"])
def test_torchrun_and_its_workers(runner, victim):
    """SIGTERM to torchrun, kill -9 of torchrun, kill -9 of one of two ranks: all of the site is gone within its grace."""
    day = Day(runner, "ab", rounds=30)
    day.head = day.start("coordinator")
    command = [
        "--standalone",
        "--nproc_per_node=2",
        str(REPO / "tests" / "faulty.py"),
        str(PACE_S),
        "none",
        "train.py",
        *day.argv,
        "site=b",
    ]
    parent = runner.start("torchrun", *command, "sites.b.ranks=2", log="b")
    day.workers = {"a": day.start("a")}
    until(lambda: any(len(r["members"]) == 2 for r in day.journal("open")), 60)
    day.after(2)
    ranks = [p for p in psutil.Process(parent.pid).children(recursive=True) if "faulty.py" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    {"parent terminated": parent.terminate, "parent killed": parent.kill, "one rank killed": ranks[1].kill}[victim]()
    psutil.wait_procs(ranks, 25)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    parent.wait(30)
    day.end()
    if victim == "parent terminated":
        assert not day.faults() and not day.voided()


# -- links -----------------------------------------------------------------------------------------------------------


class Proxy(threading.Thread):
    """A wire between one site and the coordinator: listens on a port of its own, and can be cut, broken or recorded."""

    def __init__(self, day: Day, lag_s: float = 0.0, bytes_per_s: float = 0.0):
        super().__init__(daemon=True)
        self.day = day
        self.lag_s, self.bytes_per_s = lag_s, bytes_per_s
        self.address = day.runner.run_dir / "address"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.cut = False  # nothing passes; connections stay
        self.seen = b""  # what the last connection's site sent
        self.open: list[socket.socket] = []
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                with contextlib.suppress(OSError, ValueError):
                    host, _, port = self.address.read_text().strip().rpartition(":")
                    far = socket.create_connection((host, int(port)))
                    self.open += [near, far]
                    self.seen = b""
                    threading.Thread(target=self.pump, args=(near, far, True), daemon=True).start()
                    threading.Thread(target=self.pump, args=(far, near, False), daemon=True).start()
                    continue
                near.close()

    def pump(self, source, sink, record):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.lag_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0))
                while self.cut:
                    time.sleep(0.02)
                self.seen += data if record else b""
                sink.sendall(data)
        self.shut(source, sink)

    def shut(self, *connections):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self):
        self.cut = False
        self.shut(*self.open)
        self.listener.close()


@pytest.fixture
def wired(runner):
    """A day whose site c reaches the coordinator through a wire of ours; a second one runs beside it, in a folder of its own."""
    made = []

    def make(fault="none", lag_s=0.0, bytes_per_s=0.0, pace_s=PACE_S, begun=True, **changes):
        own = runner if not made else Runner(runner.folder / f"day-{len(made)}", runner.corpus, runner.data_dir, runner.warm)
        own.folder.mkdir(exist_ok=True)
        day = Day(own, **changes)
        day.paces = dict.fromkeys(day.sites, pace_s)
        day.head = day.start("coordinator")
        until(lambda: (own.run_dir / "address").exists(), 30)
        made.append(wire := Proxy(day, lag_s, bytes_per_s))
        day.workers = {"a": day.start("a"), "b": day.start("b"), "c": day.start("c", fault, f"sync.port={wire.port}")}
        if begun:
            until(day.whole, 60)
        return day, wire

    yield make
    for wire in made:
        wire.close()
        wire.day.runner.stop()


def cut_off_for(seconds: float, days: dict[str, tuple[Day, Proxy]]) -> dict[str, list[dict]]:
    """Cuts each day's site c off at its moment; moment -> what was committed until the link healed."""
    for moment, (day, wire) in days.items():
        day.after(1)
        if moment == "reduce":
            day.next_attempt()
        wire.cut = True
    time.sleep(seconds)
    during = {moment: day.journal("commit") for moment, (day, _) in days.items()}
    for _, wire in days.values():
        wire.cut = False
    return during


@pytest.mark.parametrize("seconds, rounds, moments", [
    (1, 24, ["train"]), (1, 24, ["reduce"]), (10, 46, ["train", "reduce"]), (60, 80, ["train", "reduce"]),
])  # fmt: skip
def test_a_site_cut_from_the_coordinator_cannot_commit_alone_and_heals(wired, seconds, rounds, moments):
    """The long cuts at both moments at once, in two runs that wait more than they work."""
    train = {"train": {"max_steps": None, "train_s": 3}, "reduce": {}}
    pace_s, dead_s = (0.03 if seconds == 10 else 0.06, 3) if len(moments) > 1 else (PACE_S, 1.5)
    days = {m: wired(pace_s=pace_s, begun=False, rounds=rounds, rounds_=train[m] | {"max_offline_s": 90}, sync={"dead_s": dead_s})
            for m in moments}  # fmt: skip
    for day, _ in days.values():
        until(day.whole, 60)
    during = cut_off_for(seconds, days)
    for day, _ in days.values():
        day.end()
    for moment, (day, _) in days.items():
        went_on_and_healed(day, seconds, during[moment])


def went_on_and_healed(day: Day, seconds: float, during: list[dict]) -> None:
    assert not day.voided()
    kinds = {(r["site"], r["kind"]) for r in day.faults()}
    assert kinds <= {("c", "silent"), ("c", "lost"), ("a", "average failed"), ("b", "average failed"), ("c", "average failed")}
    if seconds == 1:
        assert not {k for _, k in kinds} & {"silent", "lost"}, "shorter than dead_s: nothing happened"
    else:
        assert kinds and during[-1]["n"] > day.faults()[0]["n"], "the others went on meanwhile"
    parts = day.contributions("c")
    assert any(parts[r] for r in sorted(parts)[-3:]), "it is back at the end"


def test_a_broken_connection_is_made_again_and_nothing_is_lost(wired):
    day, wire = wired(rounds=20)
    for _ in range(3):
        day.after(1)
        wire.shut(*wire.open)
        wire.open.clear()
    day.end()
    assert not day.voided()
    assert all(n > 0 for r, n in day.contributions("c").items() if r > 1)


def test_a_site_cut_off_for_longer_than_max_offline_s_ends_with_a_message(wired):
    day, wire = wired(rounds=40, rounds_={"max_offline_s": 4})
    day.after(1)
    wire.cut = True
    assert day.workers["c"].wait(60) == 1
    assert "has not been heard for rounds.max_offline_s=4 s" in day.runner.said("c")
    wire.close()
    day.workers["c"] = day.start("c")
    day.end()


def test_a_cut_between_two_members_sends_that_round_by_star(runner):
    """Three network namespaces; a's and b's routes to each other end in a black hole for a while."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    tag = f"{os.getpid() % 10000}"
    names, bridge, base = [f"c{tag}{s}" for s in "ab"], f"b{tag}", f"10.{os.getpid() % 200 + 20}.7"

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{base}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "data0", "netns", name)
            ip("link", "set", f"v{name}", "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{base}.{i + 2}/24", "dev", "data0")
            ip("-n", name, "link", "set", "data0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        day = Day(runner, "ab", rounds=16)
        net = [f"sync.host={base}.1", "sync.trusted_network=true", "sync.interface=data0"]
        day.argv += net
        assert runner.call("coordinator.py", "keys", *day.argv).returncode == 0
        day.head = day.start("coordinator")
        until(lambda: (runner.run_dir / "address").exists(), 30)
        runner.program = {s: ["ip", "netns", "exec", n] for s, n in zip("ab", names)}
        day.workers = {s: day.start(s) for s in "ab"}
        day.after(3)
        ip("-n", names[0], "route", "add", "blackhole", f"{base}.3/32")
        ip("-n", names[1], "route", "add", "blackhole", f"{base}.2/32")
        until(lambda: any(r["topology"] == "star" for r in day.journal("attempt")), 60)
        day.after(1)
        ip("-n", names[0], "route", "del", "blackhole", f"{base}.3/32")
        ip("-n", names[1], "route", "del", "blackhole", f"{base}.2/32")
        day.end()
        first = next(r for r in day.journal("attempt") if r["topology"] == "star")
        assert first["attempt"] == 3 and not day.voided()
        assert day.journal("attempt")[-1]["topology"] == "ring", "only that round went by star"
    finally:
        runner.stop()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


# -- the disk, and other runs ----------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_before_anything_is_announced(runner):
    """The run's folder is a small disk of its own, and somebody fills it."""
    folder = runner.folder / "runs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a disk of its own needs root")
    try:
        day = Day(runner, "ab", rounds=20)
        day.begin()
        day.after(2)
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(512)):
                pass
        assert day.head.wait(60) == 1
        last = runner.said().strip().splitlines()[-1]
        assert last.startswith("coordinator: ") and "No space left" in last and "the same command resumes" in last, last
        count = day.commits()
        assert all(w.poll() is None for w in day.workers.values()), "the sites hold still"
        (folder / "filler").unlink()
        day.head = day.start("coordinator")
        day.end()
        assert day.commits() > count and not day.voided()
    finally:
        runner.stop()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_two_runs_on_one_machine_do_not_meet(runner):
    day = Day(runner, "a", rounds=20)
    heads = [runner.start("coordinator.py", *day.argv, f"run={run}", log=run) for run in ("one", "two")]
    until(lambda: all((runner.folder / "runs" / run / "address").exists() for run in ("one", "two")), 30)
    shutil.copy(runner.folder / "runs" / "two" / "address", runner.folder / "one-meets-two")
    port = (runner.folder / "one-meets-two").read_text().strip().rpartition(":")[2]
    stranger = runner.call("train.py", *day.argv, "run=one", "site=a", f"sync.port={port}", "rounds.rejoin_wait_s=5")
    assert stranger.returncode == 2 and "does not accept our key" in stranger.stderr, "the key of another run"
    sites = [runner.start("train.py", *day.argv, f"run={run}", "site=a", log=f"a-{run}") for run in ("one", "two")]
    assert [p.wait(90) for p in (*heads, *sites)] == [0] * 4
    for run in ("one", "two"):
        assert coordinator.main(["check", str(runner.folder / "runs" / run)]) == 0


# -- who is let in ---------------------------------------------------------------------------------------------------


def test_a_revoked_key_is_shut_out_at_once(runner):
    day = Day(runner, rounds=16)
    day.begin()
    day.after(2)
    key = runner.run_dir / "keys" / "c.key"
    key.rename(key.with_name("c.revoked"))
    until(lambda: "the key of c is revoked" in runner.said(), 10)
    until(lambda: day.faults(), 10)
    day.after(2)
    assert "c" not in day.journal("open")[-1]["members"]
    day.workers["c"].kill()
    day.end(gone=("c",))


def test_replayed_and_truncated_messages_and_ten_thousand_junk_connections_change_nothing(wired):
    day, wire = wired(rounds=24)
    day.after(2)
    host, _, port = (day.runner.run_dir / "address").read_text().strip().rpartition(":")
    recorded, before = wire.seen, psutil.Process(day.head.pid).memory_info().rss
    for data in (recorded, recorded[: len(recorded) // 2], recorded[7:]):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(data)
    for batch in range(100):
        sockets = []
        for i in range(100):
            with contextlib.suppress(OSError):
                sockets.append(socket.create_connection((host, int(port)), timeout=5))
                sockets[-1].sendall(os.urandom(64 + 97 * (batch + i) % 900))
        for connection in sockets:
            connection.close()
    grown = psutil.Process(day.head.pid).memory_info().rss - before
    day.end()
    assert grown < 64 << 20, f"{grown >> 20} MiB"
    assert day.runner.said().count("does not speak our protocol") == 1, "said once per source"
    assert not day.voided() and not [r for r in day.faults() if r["kind"] not in ("silent", "average failed")]
