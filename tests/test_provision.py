"""Provisioning: laws of the jobs against a cluster that fails in every way, then real processes. Real launchers: test_launchers.py."""

import os
import random
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import CLEAN, DIRTY, examples, processes_in
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_runs import all_hold, until
from test_schedule import make_run

import carbon
import config
import provision
from provision import Job, Provisioner, Trouble

P = SimpleNamespace(start_timeout_s=30.0, retries=2, backoff_s=4.0, poll_s=5.0, command_s=10.0, stop_s=8.0)
LEAVE_S = 3.0  # the fake site's


# -- laws -------------------------------------------------------------------------------------------------------------


class Copy:
    """One running copy of a site's process."""

    def __init__(self, hello_at: float, dies_at: float, deaf: bool):
        self.hello_at, self.dies_at, self.deaf, self.here = hello_at, dies_at, deaf, False


class Cluster:
    """A fake cluster. Each call takes its time, and then succeeds, fails, or fails although it has worked; a copy may never say
    hello, die early, or ignore SIGTERM. `faults`: the share of calls and copies with something wrong."""

    def __init__(self, world: "World", name: str, seed: int, faults: float):
        self.world, self.name, self.rng, self.faults = world, name, random.Random(seed), faults
        self.copies: list[Copy] = []
        self.starts: list[float] = []
        self.calls: list[tuple[float, object]] = []

    def bad(self) -> bool:
        return self.rng.random() < self.faults

    def defer(self, work) -> None:
        hangs = self.bad() and self.rng.random() < 0.3
        self.calls.append((self.world.t + (P.command_s if hangs else self.rng.choice([0.0, 0.5, 2.0])), work))

    def alive(self) -> bool:
        if self.bad():
            raise Trouble("status: no answer")
        return bool(self.copies)

    def start(self, cancel) -> None:
        if cancel.is_set():
            raise Trouble("start: nobody wants it any more")
        self.starts.append(self.world.t)
        assert not self.copies, f"a second copy of {self.name}"
        kind = self.rng.choice(["refused", "late", "mute", "short"]) if self.bad() else "good"
        if kind != "refused":
            hello_at = float("inf") if kind == "mute" else self.world.t + self.rng.choice([1.0, 3.0])
            dies_at = self.world.t + self.rng.choice([0.5, 6.0, 40.0]) if kind == "short" else float("inf")
            self.copies.append(Copy(hello_at, dies_at, self.bad()))
        if kind in ("refused", "late"):
            raise Trouble(f"start: {kind}")

    def stop(self, hard: bool) -> None:
        if self.bad():
            raise Trouble("stop: no answer")
        for copy in self.copies:
            if hard:
                copy.dies_at = self.world.t
            elif not copy.deaf:
                copy.dies_at = min(copy.dies_at, self.world.t + LEAVE_S)
                if copy.here:
                    self.world.run.leave(self.world.t, self.name, "SIGTERM")


class World:
    """A run on the wall clock whose sites are fakes: everything they are told succeeds at once, if they are there."""

    def __init__(self, signals: dict[str, list[float]], seed: int, faults: dict[str, float]):
        self.t, self.journal = 0.0, []
        self.run, self.samples = make_run(signals, rates=dict.fromkeys(signals, 1.0), budget=10**6, timed=False, off_delay_s=20.0)
        self.clusters = {name: Cluster(self, name, seed + i, faults[name]) for i, name in enumerate(signals)}
        self.begin()

    def begin(self) -> None:
        """The coordinator's part: what it knows of jobs is gone when it is killed, and with it calls on their way."""
        for cluster in self.clusters.values():
            cluster.calls = []
        self.jobs = Provisioner({n: Job(c, P, c.defer) for n, c in self.clusters.items()}, lambda: self.t, self.sleep)
        self.run.on_demand = dict.fromkeys(self.clusters, False)

    def here(self, name: str) -> bool:
        return any(copy.here for copy in self.clusters[name].copies)

    def sleep(self, seconds: float) -> None:
        self.t += max(seconds, 0.5)
        for cluster in self.clusters.values():
            due = [work for at, work in cluster.calls if at <= self.t]
            cluster.calls = [(at, work) for at, work in cluster.calls if at > self.t]
            for work in due:
                work()
            for copy in list(cluster.copies):
                if copy.dies_at <= self.t:
                    cluster.copies.remove(copy)
                    if copy.here:
                        self.run.lost(self.t, cluster.name, "has closed its connection", sure=cluster.rng.random() < 0.5)
                elif copy.hello_at <= self.t and not copy.here:
                    copy.here = True
                    self.run.present(cluster.name)

    def turn(self) -> None:
        self.sleep(0.5)
        run, t = self.run, self.t
        for site, mci, ahead in self.samples.due(t):
            run.observe(t, site, mci, ahead)
        for name, site in run.schedule.sites.items():
            if site.state == "provisioning" and self.here(name):
                run.provisioned(t, name)
        self.jobs.follow(t, run, self.here)
        run.advance(t)
        while (taken := run.take()) != ([], []):
            self.journal += taken[0]
            for action in taken[1]:
                self.carry_out(action)

    def carry_out(self, action) -> None:
        run, d, t = self.run, action.data, self.t
        if action.kind == "fetch" and self.here(action.site):
            run.current(t, action.site, d["round"])
        elif action.kind == "freeze":
            for site in d["members"]:
                run.frozen(t, site, 1)
        elif action.kind in ("store", "resend"):
            run.store_done(t, d["round"], "", "")
        elif action.kind == "attempt":
            for site in d["members"]:
                run.voted(t, site, d["attempt"], "same")
        elif action.kind == "commit" and d["sender"]:
            run.store_done(t, d["round"] + 1, "", "")
        elif action.kind == "drop":
            for copy in self.clusters[action.site].copies:
                if copy.here and copy.dies_at <= t + LEAVE_S:  # it was asked to go
                    copy.dies_at = t


minutes = st.lists(st.sampled_from([CLEAN, CLEAN, DIRTY]), min_size=8, max_size=8)


@examples(120)
@given(minutes, minutes, st.integers(0, 10**6), st.sampled_from([0.1, 0.3, 0.6]), st.lists(st.integers(1, 900), max_size=2))
def test_whatever_a_cluster_does_there_is_one_copy_at_most_none_at_the_end_and_nobody_else_waits(calm, wild, seed, faults, kills):
    world = World({"calm": calm, "wild": wild}, seed, {"calm": 0.0, "wild": faults})
    needless_s = 0.0
    for turn in range(2 * 60 * 8 - 2):
        if turn in kills:
            world.begin()
        world.turn()  # (a second copy is an assertion of its own)
        site = world.run.schedule.sites["calm"]
        needless_s = needless_s + 0.5 if world.clusters["calm"].copies and site.state == "off" and "calm" not in world.run.leaving else 0
        assert needless_s < 15, "a job outlives its window"
        assert site.state in ("off", "on") or world.t - site.since_s < (25 if kills else 12), "its start was held up"
    faulty = [r for r in world.journal if r["type"] == "fault" and r["site"] == "calm"]
    assert not faulty, faulty

    moves = [r for r in world.journal if r["type"] == "site" and r["site"] == "wild"]
    on_s = max((b["t_s"] - a["t_s"] for a, b in zip(moves, moves[1:]) if a["to"] == "on"), default=0.0)
    starts = world.clusters["wild"].starts
    for first, last in windows(wild):
        if not kills and on_s < provision.QUIET_S:
            assert sum(first <= t < last + 20 for t in starts) <= 1 + P.retries, "tried more often than allowed"
    assert all(any(first <= t <= last + 21 for first, last in windows(wild)) for t in starts), "started without a window"

    left = world.jobs.close()
    assert {name for name, c in world.clusters.items() if c.copies} <= set(left) <= {"wild"}, "what is left running is said"


def windows(values: list[float]) -> list[tuple[int, int]]:
    """Seconds between which a minute-by-minute signal is clean."""
    edges = [i for i in range(len(values) + 1) if ([DIRTY, *values][i] == CLEAN) != ([*values, DIRTY][i] == CLEAN)]
    return [(60 * a, 60 * b) for a, b in zip(edges[::2], edges[1::2])]


def test_a_start_that_always_fails_is_journalled_charged_and_given_another_chance_in_the_next_window():
    world = World({"calm": [CLEAN] * 8, "wild": [CLEAN] * 3 + [DIRTY] * 2 + [CLEAN] * 3}, 0, {"calm": 0.0, "wild": 0.0})

    def refuse(cancel):
        world.clusters["wild"].starts.append(world.t)
        raise Trouble("start: no capacity")

    world.clusters["wild"].start = refuse
    while world.t < 470:
        world.turn()
    faults = [r for r in world.journal if r["type"] == "fault"]
    first = [r["action"] for r in faults if r["t_s"] < 180]
    assert [r["kind"] for r in faults] == 2 * ["provision", "provision", "provision", "absent"]
    assert first == ["start: no capacity; again in 4 s (1 of 2)", "start: no capacity; again in 8 s (2 of 2)",
                     "start: no capacity; no retries left",
                     "left out: not started in 3 tries; the last one: start: no capacity; no retries left"]  # fmt: skip
    assert len(world.clusters["wild"].starts) == 2 * (1 + P.retries)
    rows = [r for r in world.run.meter.closed(world.t) if r.site == "wild"][1:]  # off before the first turn
    assert [r.state for r in rows] == ["provisioning", "off", "provisioning", "off"]
    assert rows[0].end_s - rows[0].start_s >= P.backoff_s * 3, "retries are made, and charged, in this state"
    assert rows[0].end_s == pytest.approx(faults[3]["t_s"], abs=1e-6) and rows[2].start_s == 300
    opened = [r for r in world.journal if r["type"] == "open"]
    assert opened[0]["members"] == ["calm"] and opened[0]["t_s"] < faults[1]["t_s"], "others train meanwhile"


def test_a_job_killed_by_its_cluster_is_started_again_while_its_window_lasts():
    world = World({"a": [CLEAN] * 8}, 0, {"a": 0.0})
    for moment in (30, 60, 90):
        while world.t < moment:
            world.turn()
        if world.clusters["a"].copies:
            world.clusters["a"].copies[0].dies_at = world.t
    while world.t < 200:
        world.turn()
    kinds = [(r["kind"], r["action"]) for r in world.journal if r["type"] == "fault"]
    assert [k for k, _ in kinds if k != "silent"] == ["lost", "provision"] * 3
    said = [action for kind, action in kinds if kind == "provision"]
    assert said[0] == "its window is still open: its job is started again (1 of 2)"
    assert said[2] == "left out for the rest of its window: provision.retries=2" and len(world.clusters["a"].starts) == 3


def test_an_adopted_job_is_not_started_again_and_an_orphan_is_stopped():
    world = World({"up": [CLEAN] * 8, "down": [DIRTY] * 8}, 0, {"up": 0.0, "down": 0.0})
    for cluster in world.clusters.values():
        cluster.copies = [Copy(3.0, float("inf"), False)]
    while world.t < 30:
        world.turn()
    assert world.clusters["up"].copies and not world.clusters["down"].copies
    assert not world.clusters["up"].starts and world.run.schedule.sites["up"].state == "on"
    assert not [r for r in world.journal if r["type"] == "fault"]


# -- commands and configs ---------------------------------------------------------------------------------------------


def settings_of(**given_):
    return OmegaConf.structured(config.Provision(mode="command", **given_))


def test_no_value_becomes_an_argument_or_is_read_by_a_shell(tmp_path):
    values = dict.fromkeys(provision.NAMES, "") | {"site": "a b; touch pwned $(touch pwned)", "folder": str(tmp_path)}
    words = ["{site}", "x{job}y", "$1", "-o", "jsonpath={.items[*]}"]
    show = shlex.join([sys.executable, "-c", "import sys; print(sys.argv[1:])", *words])
    cluster = provision.Commands(values, settings_of(start=show, stop=show, status=show))
    assert cluster._run("status", 20).strip() == str([values["site"], "xy", "$1", "-o", "jsonpath={.items[*]}"])
    assert provision.fill("${HOME} {site} {SITE} { site } {}", {"site": "a"}) == "${HOME} a {SITE} { site } {}"
    assert not list(tmp_path.iterdir())


def test_a_command_that_hangs_is_killed_with_its_children_and_one_that_fails_says_why(tmp_path):
    commands = {"start": "sh -c 'sleep 300 & wait'", "stop": "sh -c 'echo queue is closed >&2; exit 3'", "status": "no-such-program"}
    values = dict.fromkeys(provision.NAMES, "") | {"folder": str(tmp_path)}
    cluster = provision.Commands(values, settings_of(**commands, start_timeout_s=0.3))
    with pytest.raises(Trouble, match=r"start: sh did not return within 0.3 s"):
        cluster.start(provision.threading.Event())
    until(lambda: not processes_in(tmp_path), 5)
    with pytest.raises(Trouble, match="stop: sh ended with code 3: queue is closed"):
        cluster.stop(hard=True)
    with pytest.raises(Trouble, match="no-such-program: No such file"):
        cluster.alive()


BAD = {
    "unknown mode": (["provision.mode=cloud"], "provision.mode=cloud is not one of resident, local, slurm, command"),
    "virtual clock": (["provision.mode=local"], "provision.mode=local at site a needs real time; set clock.mode=wall"),
    "no commands": (["clock.mode=wall", "provision.mode=command"], "provision.start is missing at site a"),
    "unknown key of a site": (["sites.a.provision.retires=3"], "sites.a.provision: Key 'retires' not in 'Provision'"),
    "out of bounds": (["sites.a.provision.poll_s=0"], "sites.a.provision.poll_s=0.0 must be > 0"),
    "placeholder": (["clock.mode=wall", "provision.mode=command", "provision.start=sh {stie}", "provision.stop=sh", "provision.status=sh"],
                    "provision.start of site a: unknown placeholder {stie}; there are site, region"),
    "no program": (["clock.mode=wall", "provision.mode=command", "provision.start=sky up", "provision.stop=sh", "provision.status=sh"],
                   "no program 'sky' on the PATH"),
    "no script": (["clock.mode=wall", "provision.mode=slurm", "provision.script=nowhere.sh"], "provision.script=nowhere.sh does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_anything_is_started(runner, name):
    changes, message = BAD[name]
    cfg = [*runner.write({"a": {}}), *changes]
    with pytest.raises(config.BadInput) as error:
        provision.check(config.load(cfg))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_coordinator_refuses_with_one_line_and_leaves_no_folder(runner):
    result = runner.call("coordinator.py", *runner.write({"a": {}}), "provision.mode=local")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1 and "set clock.mode=wall" in result.stderr
    assert not (runner.folder / "runs").exists()


def test_job_names_are_what_slurm_kubernetes_and_clouds_accept_and_differ_between_sites(runner):
    assert provision.job_name("0a1b2c3d4e5f", "South_Australia") == "curtail-0a1b2c3d4e5f-south-australia"
    cfg = config.load([*runner.write({"a_b": {}, "A_b": {}}), "provision.mode=local", "clock.mode=wall"])
    with pytest.raises(config.BadInput, match="a_b and A_b would have jobs of one name"):
        provision.check(cfg)


# -- real processes ---------------------------------------------------------------------------------------------------

WALL = {
    "clock": {"mode": "wall"}, "budget": {"tokens": 128 * 10**6}, "policy": {"off_delay_s": 2}, "carbon": {"max_gap_s": 60},
    "rounds": {"train_s": 2, "sync_s": 0.5, "commit_every_s": 1.5},
}  # fmt: skip
QUICK = {"poll_s": 1, "backoff_s": 0.5, "start_timeout_s": 60}
FAST = {"tokens_per_s": 2000.0}


def workers(runner, site: str) -> set[int]:
    """Processes of ours (not torchrun's, nor what they fork for a moment) that are a site of this run."""
    found = {}
    for process in psutil.process_iter(["cmdline", "cwd", "ppid"]):
        words = process.info["cmdline"] or []
        if process.info["cwd"] == str(runner.folder) and f"site={site}" in words and "torch.distributed.run" not in words:
            found[process.pid] = process.info["ppid"]
    return {pid for pid, parent in found.items() if parent not in found}


def states(runner, site: str) -> list[str]:
    return [r["to"] for r in runner.journal() if r["type"] == "site" and r["site"] == site]


def committed_by(runner, site: str) -> int:
    return sum(site in r["batches"] for r in runner.journal() if r["type"] == "commit")


def faults_of(runner, site: str) -> list[str]:
    return [r["action"] for r in runner.journal() if r["type"] == "fault" and r["site"] == site and r["kind"] in ("provision", "absent")]


FAKE_CLUSTER = """import os, signal, subprocess, sys, time
from pathlib import Path
op, job, *train = sys.argv[1:]
pid, count = Path(job + ".pid"), Path(job + ".count")
def alive():
    stat = Path("/proc") / (pid.read_text() if pid.exists() else "none") / "stat"
    return stat.exists() and stat.read_text().split()[2] != "Z"
if op == "start":
    count.write_text(count.read_text() + "x" if count.exists() else "x")
    if count.read_text() == "x":
        sys.exit("no capacity in this zone")
    if count.read_text() == "xx":
        time.sleep(1000)
    assert not alive()
    log = open(job + ".log", "w")
    child = subprocess.Popen(train, stdout=log, stderr=log, start_new_session=True)
    pid.write_text(str(child.pid))
elif op == "stop" and alive():
    os.kill(int(pid.read_text()), signal.SIGTERM)
elif op == "status" and alive():
    print("running")
"""


@pytest.mark.slow
def test_real_jobs_are_retried_restarted_adopted_and_stopped_and_hold_nobody_up(runner):
    """a is local. b has a cluster of its own, which says no, then nothing, then yes. a's process is killed, then the coordinator."""
    (runner.folder / "cluster.py").write_text(FAKE_CLUSTER)
    call = shlex.join([sys.executable, "cluster.py"])
    commands = {op: f"{call} {op} {{job}} {{python}} {{repo}}/train.py {{config}} site={{site}}" for op in ("start", "stop", "status")}
    own = {"mode": "command", **commands, "start_timeout_s": 12}
    argv = runner.write({"a": FAST, "b": FAST | {"provision": own}}, **WALL, provision={"mode": "local", **QUICK})
    head = runner.start("coordinator.py", *argv, log="coordinator")
    until(lambda: committed_by(runner, "a"))
    assert states(runner, "b") == ["provisioning"] and faults_of(runner, "b")[0].startswith("start: python"), "a trains meanwhile"
    (first,) = workers(runner, "a")
    os.kill(first, signal.SIGKILL)
    until(lambda: states(runner, "a").count("on") == 2)
    assert faults_of(runner, "a") == ["its window is still open: its job is started again (1 of 3)"]
    until(lambda: committed_by(runner, "b"), 90)
    assert [fault.partition(": ")[2].partition(" (")[0] or fault for fault in faults_of(runner, "b")[:2]] == [
        f"{Path(sys.executable).name} ended with code 1: no capacity in this zone; again in 0.5 s",
        "its start has not returned within start_timeout_s=12 s; again in 1 s (2 of 3)",
    ]
    head.kill()
    head.wait(10)
    before, count = workers(runner, "a") | workers(runner, "b"), committed_by(runner, "a")
    again = runner.start("coordinator.py", *argv, log="coordinator")
    until(lambda: committed_by(runner, "a") > count + 1)
    assert workers(runner, "a") | workers(runner, "b") == before and len(before) == 2, "adopted, not started again"
    again.kill()
    again.wait(10)
    by_hand = runner.call("provision.py", "stop", "runs/tiny")
    assert by_hand.returncode == 0 and by_hand.stdout.count("nothing runs") == 2, by_hand.stderr
    assert not processes_in(runner.folder), "nothing is left"
    assert max(r.end_s - r.start_s for r in carbon.read_intervals(str(runner.run_dir / "intervals.csv"))
               if (r.site, r.state) == ("b", "provisioning")) > 12, "the failed starts are charged"  # fmt: skip
    all_hold(runner, argv)
