"""A storm: seeded real faults on a real run on the wall clock, several processes on this machine, then the bill.

    python bench/storm.py --seed 1 --faults 50 [--sites 3|4] [--json] [--keep DIR]

A coordinator and three or four sites (b under torchrun, c with windows) train a tiny model in rounds of 2 s. Each site reaches
the coordinator through a proxy of ours, so that its link can be cut, reset or slowed. About every second round a fault strikes:
kill -9, SIGSTOP, SIGTERM, cut links, dead coordinators, junk; at a random moment, or just after `open`, `attempt` or `commit`
appears in the journal. What died is started again. Which faults, in which order, on whom (the first of a preference that is in
the round) and when is a function of the seed, printed first. Then comes the same run without faults.

The report goes to stderr (not with --json), one line of JSON to stdout; exit code 1 if an invariant is broken, the budget is
not committed, or a process, port or temporary file stays behind. --keep DIR: the run's folder, logs and all, stays there.
A cut holds traffic back in both directions, as TCP does while packets are lost: nothing arrives, nothing is closed.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import psutil
from omegaconf import OmegaConf

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import config  # noqa: E402
from journal import effective, read  # noqa: E402

START = "2026-01-11T17:00:00Z"
TORCHRUN, WINDOWED = "b", "c"
PER_STEP, STEPS = 1536, 25  # tokens; about so many steps a site makes in a round
TINY = {
    "clock": {"mode": "wall", "start": START},
    "model": {"depth": 2, "width": 64, "heads": 2, "kv_heads": 1, "seq_len": 64},
    "data": {"tokenizer": "bytes", "tokens_per_step": PER_STEP, "val_tokens": 16384, "source": "corpus", "dir": "tokens"},
    "rounds": {"train_s": 2, "sync_s": 0.3, "commit_every_s": 2, "grace_s": 2, "max_offline_s": 60, "rejoin_wait_s": 30},
    "policy": {"off_delay_s": 2},
    "sync": {"heartbeat_s": 0.4, "dead_s": 2.0, "chunk_mb": 1},
    "carbon": {"trace": "trace.csv", "baseline_regions": ["a"], "max_gap_s": 10},
    "eval": {"every_rounds": 10, "tokens": 2048},
    "wandb": {"mode": "disabled"},
    "log": {"every_steps": 1},
}
SITE = {"tokens_per_s": 15 * PER_STEP, "idle_kw": 0.5, "train_kw": 2.0, "device_batch": 32, "threads_local": 1, "threads_federated": 1}

# One deck; it is shuffled and dealt again and again.
DECK = (["kill"] * 4 + ["kill_two", "kill_all", "kill_joiner", "kill_parent"] + ["freeze"] * 3 + ["term"] * 2 + ["kill_head"] * 4
        + ["cut"] * 3 + ["reset"] * 2 + ["slow_link", "slow_site", "junk"])  # fmt: skip
AIMED = ("kill", "kill_two", "freeze", "kill_head", "cut", "reset")
SITELESS = ("kill_head", "junk")
FATAL = ("kill", "kill_two", "kill_all", "kill_joiner")  # kill -9 of the process that trains
NEVER = ("wrong base", "wrong result", "digests differ", "non-finite loss")  # fault records that no fault of ours explains
APART = 2.0  # rounds from a fault to the next: mean of an exponential distribution
STUCK_S, NOISE_S = 100.0, 1.5  # no commit for so long: the run hangs; what two busy cores may add to a bound
OFFLINE_S, DEAD_S, TRAIN_S = TINY["rounds"]["max_offline_s"], TINY["sync"]["dead_s"], TINY["rounds"]["train_s"]


@dataclass
class Fault:
    """One card of the plan and, after it struck, what it hit."""

    kind: str
    order: str  # sites in order of preference
    aim: str | None  # journal record it follows at once
    delay_rounds: float
    seconds: float  # of the freeze, the cut; between two kills
    sites: list[str] = field(default_factory=list)
    on: list[str] = field(default_factory=list)  # those of them that were on
    unix: float = 0.0
    until: float = 0.0  # end of what was done
    phase: str = ""  # the round's last record then: open, attempt, commit


def make_plan(seed: int, number: int, sites: list[str]) -> list[Fault]:
    rng, deck, plan = random.Random(seed), [], []
    for _ in range(number):
        deck = deck or rng.sample(DECK, len(DECK))
        kind = deck.pop()
        aim = "commit" if kind == "kill_all" else rng.choice([None, None, "open", "attempt", "commit"]) if kind in AIMED else None
        seconds = {"freeze": rng.uniform(0.5, 4), "cut": rng.choice([1, 1, 4, 4, 4, 10, 10, 60]), "kill_two": rng.random()}.get(kind, 3.0)
        order = TORCHRUN if kind == "kill_parent" else "".join(rng.sample(sites, len(sites)))
        plan.append(Fault(kind, order, aim, round(min(6.0, max(0.1, rng.expovariate(1 / APART))), 2), round(seconds, 2)))
    return plan


def write_inputs(folder: Path, sites: list[str], num_rounds: int, windowed: str = WINDOWED, **changes) -> None:
    """Corpus, trace, config (`changes` on top), and a copy of the code: an edit meanwhile does not mix versions."""
    (folder / "corpus").mkdir()
    (folder / "code").mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(400)]
    for i in range(400):
        text = " ".join(rng.choices(words, [1 / (k + 1) for k in range(400)], k=600))
        (folder / "corpus" / f"{i:04d}.txt").write_text(text + ".\n")
    first, lines = datetime.fromisoformat(START), ["time," + ",".join(sites)]
    for i in range(600):  # 5 s each; c: 30 s clean, 15 s dirty
        values = [500 if s == windowed and i % 9 >= 6 else 20 for s in sites]
        lines.append(",".join([(first + timedelta(seconds=5 * i)).strftime("%Y-%m-%dT%H:%M:%SZ"), *map(str, values)]))
    (folder / "trace.csv").write_text("\n".join(lines) + "\n")
    more = {"budget": {"tokens": PER_STEP * STEPS * len(sites) * num_rounds}, "sites": {s: SITE | {"region": s} for s in sites}}
    OmegaConf.save(OmegaConf.merge(TINY, more, changes), folder / "config.yaml")
    for file in REPO.glob("*.py"):
        shutil.copy(file, folder / "code")


class Proxy:
    """What lies between a site and the coordinator: forwards, and fails on request."""

    def __init__(self, address: Path):
        self.address, self.lag_s, self.flows, self.writers = address, 0.0, asyncio.Event(), set()
        self.flows.set()

    async def listen(self) -> "Proxy":
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _accept(self, reader, writer) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self.flows.wait()
            try:
                there, onward = await asyncio.open_connection(*self.address.read_text().strip().split(":"))
            except (OSError, ValueError):
                writer.transport.abort()
                return
            self.writers |= {writer, onward}
            await asyncio.gather(self._pump(reader, onward), self._pump(there, writer))
            self.writers -= {writer, onward}

    async def _pump(self, reader, writer) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = await reader.read(1 << 16)
                await self.flows.wait()
                if not data:
                    break
                await asyncio.sleep(self.lag_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    def reset(self) -> None:
        for writer in list(self.writers):
            writer.transport.abort()


class Tail:
    """What is added to a file of lines. Where the file is replaced by another, what that one starts with is not new."""

    def __init__(self, path: Path):
        self.path, self.at, self.inode = path, 0, None

    def read(self) -> list[bytes]:
        try:
            about = self.path.stat()
        except OSError:
            return []
        if self.inode not in (None, about.st_ino):
            self.at = about.st_size
        self.inode = about.st_ino
        if about.st_size <= self.at:
            return []
        with open(self.path, "rb") as file:
            file.seek(self.at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        return whole.splitlines()


class Trial:
    """One run with its processes, supervised; with a plan it is a storm."""

    def __init__(self, folder: Path, name: str, sites: list[str], plan: list[Fault], say, seed: int):
        self.folder, self.name, self.sites, self.plan, self.say, self.dir = folder, name, sites, plan, say, folder / "runs" / name
        self.rng = {s: random.Random(f"{seed} {s}") for s in sites}  # of the pauses before a restart
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self.processes, self.logs, self.proxies, self.workers = {}, {}, {}, {}
        self.struck: list[Fault] = []
        self.busy: dict[str, float] = {}  # site -> until when something is being done to it
        self.hit: set[int] = set()  # processes that end by our hand
        self.findings: list[str] = []  # each a broken promise
        self.ports: set[int] = set()
        self.records: list[dict] = []
        self.state: dict[str, str] = {}  # of the sites, as journalled
        self.members, self.phase, self.over, self.hurry, self.heard = [], "", False, False, asyncio.Event()
        self.trained_tokens = self.commits = self.started = 0
        self.left: list[str] = []

    def finding(self, text: str) -> None:
        self.findings.append(text)
        self.say(f"{time.time() - self.began:6.1f} s !! {text}")

    # -- processes ----------------------------------------------------------------------------------------------------

    async def start(self, name: str):
        self.started += 1
        program = "coordinator.py" if name == "coordinator" else "train.py"
        argv = [sys.executable, str(self.folder / "code" / program), "config.yaml", f"run={self.name}"]
        if name in self.sites:
            argv += [f"site={name}"] + [f"sync.port={self.proxies[s].port}" for s in self.proxies if s == name]
        if name == TORCHRUN:
            argv[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        self.logs[name] = self.folder / f"{self.name}-{name}-{self.started:03d}.log"
        with open(self.logs[name], "wb") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                *argv, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        return self.processes[name]

    async def supervise(self, name: str) -> None:
        """Start it, and start it again when it has died, until the run is over."""
        while name != "coordinator" and not (self.dir / "address").exists():  # and keys
            await asyncio.sleep(0.05)
        while not self.over:
            process = await self.start(name)
            code = await process.wait()
            log = self.logs[name].read_text(errors="replace")
            for error in errors_in(log):
                self.finding(f"{self.logs[name].name}: {error}")
            await asyncio.sleep(0.1)  # the journal is read
            ended = bool(self.records) and self.records[-1]["type"] == "end" and self.records[-1]["reason"] == "budget"
            self.over |= name == "coordinator" and (code in (0, 3) or ended)
            orphaned = name == TORCHRUN and "is already connected" in log  # torchrun died, its worker is still on the way out
            if process.pid not in self.hit and not (self.over or ended or orphaned):
                self.finding(f"{self.logs[name].name} ended by itself with code {code}: {log.strip()[-300:]}")
            if name != "coordinator" and not (self.over or self.hurry):
                await asyncio.sleep(self.rng[name].uniform(0, 2))

    def worker(self, name: str) -> int | None:
        """The process that trains (torchrun is only its parent)."""
        process = self.processes.get(name)
        if process is None or process.returncode is not None or name != TORCHRUN:
            return process.pid if process and process.returncode is None else None
        if not psutil.pid_exists(self.workers.get(process.pid, -1)):
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(process.pid).children(recursive=True)
                self.workers[process.pid] = next((p.pid for p in children if "train.py" in " ".join(p.cmdline())), -1)
        return pid if (pid := self.workers.get(process.pid, -1)) > 0 else None

    def send(self, name: str, number: int, parent: bool = False) -> None:
        if pid := self.processes[name].pid if parent and self.worker(name) else self.worker(name):
            if number in (signal.SIGKILL, signal.SIGTERM):
                self.hit.add(self.processes[name].pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # -- the journal, as it is written --------------------------------------------------------------------------------

    async def follow(self) -> None:
        journal, logs = Tail(self.dir / "journal.jsonl"), {site: Tail(self.dir / f"{site}.jsonl") for site in self.sites}
        while True:
            for line in journal.read():
                self.note(json.loads(line))
            for tail in logs.values():  # a line is a step, whatever becomes of it
                self.trained_tokens += PER_STEP * len(tail.read())
            await asyncio.sleep(0.003 if self.plan else 0.1)

    def note(self, r: dict) -> None:
        self.records.append(r)
        if r["type"] == "site":
            self.state[r["site"]] = r["to"]
        elif r["type"] in ("open", "attempt", "commit"):
            self.phase, self.members = r["type"], r.get("members", self.members)
        if r["type"] == "commit":
            self.commits, self.last_commit = self.commits + 1, time.time()
        self.heard.set()
        self.heard.clear()

    async def until(self, true, limit_s: float) -> bool:
        """Wait for the journal to make something true; false if it does not in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not true() and not self.over:
                    await self.heard.wait()
        return bool(true()) and not self.over

    # -- faults -------------------------------------------------------------------------------------------------------

    def targets(self, f: Fault) -> list[str]:
        """Sites this fault may strike now: on, alive, nothing else being done to them; those in the round first."""
        able = [s for s in f.order if self.busy.get(s, 0) < time.time() and self.state.get(s) == "on" and self.worker(s)]
        return sorted(able, key=lambda s: s not in self.members)

    async def deal(self) -> None:
        """Carry out the plan, one card after the other; a freeze or a cut goes on beside the next."""
        await self.until(lambda: self.commits >= 2, 60)
        for number, f in enumerate(self.plan):
            goal = self.commits + int(f.delay_rounds)
            await self.until(lambda goal=goal: self.commits >= goal, 25)
            await asyncio.sleep(f.delay_rounds % 1 * TRAIN_S)
            await self.until(lambda f=f: f.kind in SITELESS or self.targets(f), 25)
            if f.aim:
                seen = len(self.records)
                await self.until(lambda seen=seen, f=f: any(r["type"] == f.aim for r in self.records[seen:]), 15)
            if self.over or not (f.kind in SITELESS or (found := self.targets(f))):
                self.say(f"fault {number} {f.kind} does not strike: {'the run is over' if self.over else 'there is nobody to strike'}")
                continue
            if f.kind not in SITELESS:
                f.sites = list(f.order) if f.kind == "kill_all" else found[: 2 if f.kind == "kill_two" else 1]
            f.on, f.unix, f.phase = [s for s in f.sites if self.state.get(s) == "on"], time.time(), self.phase
            self.struck.append(f)
            self.say(f"{time.time() - self.began:6.1f} s fault {number} {f.kind} {' '.join(f.sites)} (after {f.phase}, {f.seconds:g} s)")
            await self.strike(f, f.sites[0] if f.sites else "coordinator")
            f.until = max(f.until, time.time())

    async def strike(self, f: Fault, site: str) -> None:
        if f.kind in ("kill", "kill_all", "kill_head", "kill_two"):
            for name in f.sites or [site]:
                self.send(name, signal.SIGKILL)
                await asyncio.sleep(f.seconds if f.kind == "kill_two" else 0)
        elif f.kind in ("kill_parent", "term"):
            self.send(site, signal.SIGTERM if f.kind == "term" else signal.SIGKILL, parent=True)
        elif f.kind == "kill_joiner":  # and again while it downloads
            seen, self.hurry = len(self.records), True
            self.send(site, signal.SIGKILL)
            if await self.until(lambda: any(r["type"] == "site" and r["site"] == site and r["to"] == "starting"
                                            for r in self.records[seen:]), 25):  # fmt: skip
                self.send(site, signal.SIGKILL)
            self.hurry = False
        elif f.kind == "slow_site":
            for _ in range(int(f.seconds / 0.2)):
                self.send(site, signal.SIGSTOP)
                await asyncio.sleep(0.15)
                self.send(site, signal.SIGCONT)
                await asyncio.sleep(0.05)
        elif f.kind == "freeze":
            pid = self.worker(site)
            self.send(site, signal.SIGSTOP)
            self.later(f, lambda: self.worker(site) == pid and self.send(site, signal.SIGCONT))
        elif f.kind == "cut":
            self.proxies[site].flows.clear()
            if f.seconds >= OFFLINE_S:  # it may give up, as it should
                self.hit.add(self.processes[site].pid)
            self.later(f, self.proxies[site].flows.set)
        elif f.kind == "slow_link":
            self.proxies[site].lag_s = 0.1
            self.later(f, lambda: setattr(self.proxies[site], "lag_s", 0.0))
        elif f.kind == "reset":
            self.proxies[site].reset()
        elif f.kind == "junk":  # 200 connections to the coordinator's own port that speak no protocol of ours
            rng, few = random.Random(f.order), asyncio.Semaphore(50)
            await asyncio.gather(*(self.babble(few, rng, i) for i in range(200)))

    def later(self, f: Fault, undo) -> None:
        """Leave a fault standing for f.seconds, then undo it."""
        f.until = time.time() + f.seconds
        self.busy |= dict.fromkeys(f.sites, f.until + 0.5)
        asyncio.get_running_loop().call_later(f.seconds, undo)

    async def babble(self, few: asyncio.Semaphore, rng: random.Random, i: int) -> None:
        async with few:
            with contextlib.suppress(OSError, TimeoutError):
                _, writer = await asyncio.wait_for(asyncio.open_connection(*(self.dir / "address").read_text().strip().split(":")), 3)
                writer.write([b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + rng.randbytes(9), rng.randbytes(5000)][i % 4])
                await asyncio.sleep(rng.random())
                writer.close()

    # -- all of it ----------------------------------------------------------------------------------------------------

    async def run(self, limit_s: float) -> None:
        self.began = self.last_commit = time.time()
        if self.plan:
            self.proxies = {s: await Proxy(self.dir / "address").listen() for s in self.sites}
        tasks = [asyncio.create_task(self.supervise(name)) for name in ["coordinator", *self.sites]]
        beside = [asyncio.create_task(self.follow()), asyncio.create_task(self.deal())]
        try:
            while not self.over:
                await asyncio.sleep(0.2)
                with contextlib.suppress(OSError, ValueError):
                    self.ports.add(int((self.dir / "address").read_text().rpartition(":")[2]))
                for task in [*tasks, *beside]:
                    if task.done() and task.exception():
                        raise task.exception()
                if time.time() - self.last_commit > STUCK_S or time.time() - self.began > limit_s:
                    self.hangs()
                    return
            for proxy in self.proxies.values():
                proxy.flows.set()
            self.say(f"{time.time() - self.began:6.1f} s the coordinator has ended: {self.records[-1].get('reason')}")
            await asyncio.wait(tasks, timeout=OFFLINE_S + 15)  # who did not hear of the end gives up by then
            self.left = [" ".join(p.cmdline())[-120:] for p in processes_in(self.folder)]
        finally:
            self.over = True
            for task in [*tasks, *beside]:
                task.cancel()
            end_all(self.folder)
            for proxy in self.proxies.values():
                proxy.reset()
                proxy.server.close()

    def hangs(self) -> None:
        """No progress: have every process say where it stands, into its log."""
        self.finding(f"the run hangs: no commit for {time.time() - self.last_commit:.0f} s, {time.time() - self.began:.0f} s in all")
        for name in self.processes:
            self.send(name, signal.SIGCONT)
            self.send(name, signal.SIGABRT)
            time.sleep(0.5)
            self.say(f"---- {name}\n{self.logs[name].read_text(errors='replace')[-3000:]}")
        self.say("---- journal\n" + "\n".join(json.dumps(r)[:300] for r in self.records[-25:]))


def errors_in(log: str) -> list[str]:
    """Last lines of the tracebacks in a log, but for torchrun's own about a child that was killed or about SIGTERM."""
    found = re.findall(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", log, re.M)
    return [line[:300] for line in found if "elastic" not in line and "SignalException" not in line]


def processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all(folder: Path) -> None:
    for process in processes_in(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# The bill


def spread(values) -> dict | None:
    return {"p50": round(statistics.median(values), 2), "max": round(max(values), 2), "n": len(values)} if values else None


class Bill:
    """What the journal, the sites' logs and the list of faults say together. Times are unix."""

    def __init__(self, trial: Trial):
        self.trial, path = trial, trial.dir / "journal.jsonl"
        raw = read(path) if path.exists() else []
        epoch = raw[0]["wall"]["epoch_unix"] if raw else 0.0
        self.records = [r | {"unix": epoch + r["t_s"]} for r in raw]
        self.held = effective(self.records)
        self.commits = [r for r in self.held if r["type"] == "commit"]
        heads = [f.unix for f in trial.struck if f.kind == "kill_head"]
        self.down = [(t, next((r["unix"] for r in self.records if r["unix"] > t + 0.5), t + 5)) for t in heads]  # no coordinator

    def down_s(self, a: float, b: float) -> float:
        return sum(max(0.0, min(b, stop) - max(a, start)) for start, stop in self.down)

    def first(self, since: float, *types: str, site: str | None = None) -> float | None:
        return next((r["unix"] for r in self.records if r["type"] in types and r["unix"] >= since and site in (None, r.get("site"))), None)

    def detection(self, kinds: tuple, least_s: float = 0.0) -> list[tuple[Fault, float, float]]:
        """(fault, moment of the deed, of the first fault record of its site), where there was a coordinator to make it."""
        out = []
        for f, site in [(g, s) for g in self.trial.struck if g.kind in kinds and g.seconds >= least_s for s in g.on]:
            at = f.unix + (f.seconds if f.kind == "kill_two" and site != f.sites[0] else 0.0)
            seen = self.first(at - 0.05, "fault", site=site)
            if self.down_s(at, seen or at + 5):
                continue
            if seen is None or seen - at > 20:
                self.trial.say(f"{f.kind} {site} at {at - self.trial.began:.1f} s is in no fault record")
            else:
                out.append((f, at, seen))
        return out

    def rejoin(self) -> list[float]:
        """From a kill to the same site's first step after it, if neither its window nor another fault came between."""
        out = []
        for f, site in [(g, s) for g in self.trial.struck if g.kind in FATAL[:3] for s in g.on]:
            path = self.trial.dir / f"{site}.jsonl"
            steps = [json.loads(x)["wall"]["unix"] for x in path.read_text().splitlines()] if path.exists() else []
            if back := next((s for s in sorted(steps) if s > f.unix + 1.5), None):
                others = [g for g in self.trial.struck if g is not f and (site in g.sites or g.kind == "kill_head")]
                between = [g for g in others if f.unix - 1 < g.unix < back]
                closed = [r for r in self.records if r["type"] == "site" and r["site"] == site and "MCI" in r["reason"] and r["to"] == "off"
                          and f.unix < r["unix"] < back]  # fmt: skip
                out += [] if between or closed else [back - f.unix]
        return out

    def stalls(self) -> list[tuple[float, float, int]]:
        """(seconds from a federated round's first attempt to its commit, bound, round). Bound: three attempts (timeouts.py: two
        by ring, one by star), as the first one was announced, and the time without a coordinator."""
        out, first = [], {}
        for r in self.records:
            if r["type"] == "open":
                first.pop(r["round"], None)
            elif r["type"] == "attempt":
                first.setdefault(r["round"], r)
            elif r["type"] == "commit" and r["round"] in first:
                a, b = first[r["round"]], r["unix"]
                out.append((b - a["unix"], 3 * a["wall"]["attempt_s"] + NOISE_S + self.down_s(a["unix"], b), r["round"]))
        return out

    def gaps(self) -> list[tuple[float, int]]:
        """(seconds before a commit in which nothing was committed though a coordinator and a site that is on were there, round)."""
        out, on, before, idle_s = [], set(), 0.0, 0.0
        for r in self.records:
            idle_s += r["unix"] - before - self.down_s(before, r["unix"]) if on else 0.0
            before = r["unix"]
            if r["type"] == "site":
                (on.add if r["to"] == "on" else on.discard)(r["site"])
            elif r["type"] == "commit":
                out, idle_s = [*out, (idle_s, r["round"])], 0.0
        return out

    def lost_parts(self) -> list[tuple[str, int, bool]]:
        """(site, round, whether a fault of ours had struck it) of members whose round was committed without them."""
        out, opens = [], {r["round"]: r for r in self.held if r["type"] == "open"}
        for c in self.commits:
            o = opens.get(c["round"])
            leased = [s for s in o["members"] if o["leases"][s]] if o and o["mode"] == "federated" else []
            for site in leased:
                if not any(y > x for x, y in c["batches"].get(site, [])):
                    ours = any((site in f.sites or f.kind == "kill_head") and f.unix <= c["unix"] and f.until + 2 * DEAD_S >= o["unix"]
                               for f in self.trial.struck)  # fmt: skip
                    out.append((site, c["round"], ours))
        return out

    def val_loss(self) -> float | None:
        return next((r["val_loss"] for r in reversed(self.held) if r["type"] == "eval"), None)


def account(trial: Trial, seed: int) -> dict:
    """The line of JSON, but for the calm run's part."""
    bill = Bill(trial)
    stalls, lost = bill.stalls(), bill.lost_parts()
    killed, frozen = bill.detection(FATAL), bill.detection(("freeze",), DEAD_S + 0.5)
    midway = [(seen, bill.first(seen, "attempt", "commit")) for f, _, seen in killed if f.phase == "attempt"]
    committed = sum(c["tokens"] for c in bill.commits)
    discarded = max(0, trial.trained_tokens - committed)
    longest = max(stalls, default=(0.0, 0.0, -1))
    attempts_s = [r["wall"]["attempt_s"] for r in bill.records if r["type"] == "attempt"]
    round_s = TRAIN_S + TINY["rounds"]["grace_s"] + 3 * max(attempts_s, default=0.0) + NOISE_S  # as in timeouts.py

    check = subprocess.run([sys.executable, str(trial.folder / "code" / "coordinator.py"), "check", str(trial.dir)], text=True,
                           capture_output=True, cwd=trial.folder)  # fmt: skip
    lines = check.stdout.splitlines() or [f"BROKEN check itself: {check.stderr[-300:]}"]
    wrong = {name: [r for r in bill.records if r["type"] == "fault" and r["kind"] == name] for name in NEVER}
    own = {f"no fault record `{name}`": [json.dumps(r) for r in found[:1]] for name, found in wrong.items()} | {
        "every average within three attempts": [f"round {r}: {s:.1f} > {bound:.1f} s" for s, bound, r in stalls if s > bound],
        "while a site is on there is a commit in time": [f"{s:.1f} s before round {r}'s" for s, r in bill.gaps() if s > round_s],
        "only who was struck lost its part of a round": [f"{site} in round {r}" for site, r, ours in lost if not ours],
        "no process failed by itself, and the run never hung": trial.findings,
    }  # fmt: skip
    lines += [f"BROKEN {law}: {'; '.join(bad)}" if bad else f"ok     {law}" for law, bad in own.items()]
    return {
        "seed": seed, "faults": dict(sorted(Counter(f.kind for f in trial.struck).items())), "rounds": len(bill.commits),
        "rounds_per_fault": round(len(bill.commits) / max(1, len(trial.struck)), 2),
        "committed_tokens": committed, "discarded_tokens": discarded,
        "step_efficiency": round(committed / max(1, committed + discarded), 4),
        "longest_stall_s": round(longest[0], 2), "longest_stall_bound_s": round(longest[1], 2),
        "detection_s": {"killed": spread([b - a for _, a, b in killed]), "frozen": spread([b - a for _, a, b in frozen])},
        "recovery_s": spread([b - a for a, b in midway if b and not bill.down_s(a, b)]), "rejoin_s": spread(bill.rejoin()),
        "val_loss": bill.val_loss(), "calm_val_loss": None, "val_loss_ratio": None,
        "budget_committed": bool(bill.held) and bill.held[-1].get("reason") == "budget",
        "invariants": {"held": sum(x.startswith("ok") for x in lines), "broken": [x[7:] for x in lines if not x.startswith("ok")]},
        "left_behind": {
            "processes": trial.left,
            "sockets": sorted({c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"} & trial.ports),
            "files": [str(p.relative_to(trial.dir)) for p in trial.dir.rglob("*.tmp")],
        },
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = config.Parser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--sites", type=int, default=3, choices=(3, 4))
    parser.add_argument("--json", action="store_true", help="no report, only the line of JSON")
    parser.add_argument("--keep", help="leave the run's folder here")
    args = parser.parse_args(argv)
    started, sites = time.time(), list("abcd"[: args.sites])
    say = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr, flush=True))
    folder = Path(tempfile.mkdtemp(prefix="storm-")).resolve()
    try:
        plan = make_plan(args.seed, args.faults, sites)
        for i, f in enumerate(plan):
            say(f"plan {i:3d}  {f.kind:11} order {f.order}  aim {f.aim or '-':7}  after {f.delay_rounds:4} rounds  {f.seconds:g} s")
        write_inputs(folder, sites, num_rounds=6 + round(1.6 * args.faults))
        storm, calm = (Trial(folder, name, sites, cards, say, args.seed) for name, cards in (("storm", plan), ("calm", [])))
        asyncio.run(storm.run(limit_s=120 + 15 * args.faults))
        result = account(storm, args.seed)
        if result["budget_committed"]:
            say("the same without faults")
            asyncio.run(calm.run(limit_s=900))
            quiet = Bill(calm)
            result["calm_val_loss"] = loss = quiet.val_loss()
            result["calm_discarded_tokens"] = calm.trained_tokens - sum(c["tokens"] for c in quiet.commits)
            result["val_loss_ratio"] = round(result["val_loss"] / loss, 4) if loss and result["val_loss"] else None
            result["invariants"]["broken"] += [f"calm run: {text}" for text in calm.findings]
    finally:
        end_all(folder)
        if args.keep:
            shutil.copytree(folder, args.keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    result["wall_s"] = round(time.time() - started, 1)
    say("\n".join(f"{k:22} {v}" for k, v in result.items()))
    say("discarded_tokens: of all steps that the sites logged, those that were not committed. detection_s: deed to journal.\n"
        "recovery_s: from there to the next attempt or commit, for deaths after an `attempt`. rejoin_s: kill to next step.")  # fmt: skip
    print(json.dumps(result), flush=True)
    return 1 if result["invariants"]["broken"] or not result["budget_committed"] or any(result["left_behind"].values()) else 0


if __name__ == "__main__":
    config.command(main, parses=True)
