"""A storm: seeded real faults on a real run on the wall clock, several processes on this machine, then the bill.

    python bench/storm.py --seed 1 --faults 50 [--sites 3|4] [--json] [--keep DIR]

A coordinator and three or four sites (b under torchrun, c with windows) train a tiny model in rounds of 2 s. Each site reaches
the coordinator through a proxy of ours, so that its link can be cut, reset or slowed. Faults strike at about every second
round: kill -9, SIGSTOP, SIGTERM, cut links, dead coordinators, junk; some at a random moment, some just after `open`,
`attempt` or `commit` appears in the journal. What died is started again. Which faults, in which order, on whom (the first site
of a preference that is in the round) and when is a function of the seed, printed first. Then the same run without faults.

The report goes to stderr (not with --json), one line of JSON to stdout; exit code 1 if an invariant is broken, the budget is
not committed, or a process, port or temporary file stays behind. --keep DIR: the run's folder, logs and all, stays there.

A cut holds traffic back in both directions, as TCP does when packets are lost: nothing arrives, nothing is closed.
"""

import argparse
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
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import psutil
from omegaconf import OmegaConf

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import config  # noqa: E402
import timeouts  # noqa: E402
from journal import effective, read  # noqa: E402

START = "2026-01-11T17:00:00Z"
TORCHRUN, WINDOWED = "b", "c"
PER_STEP, STEPS = 1536, 25  # tokens; about so many steps a site makes in a round
TINY = {
    "clock": {"mode": "wall", "start": START},
    "model": {"depth": 2, "width": 64, "heads": 2, "kv_heads": 1, "seq_len": 64},
    "data": {"tokenizer": "bytes", "tokens_per_step": PER_STEP, "val_tokens": 16384, "source": "corpus", "dir": "tokens"},
    "rounds": {"train_s": 2, "sync_s": 0.3, "commit_every_s": 2, "grace_s": 2, "max_offline_s": 60,
               "rejoin_wait_s": 30},
    "policy": {"off_delay_s": 2},
    "sync": {"heartbeat_s": 0.4, "dead_s": 2.0, "chunk_mb": 1},
    "carbon": {"trace": "trace.csv", "baseline_regions": ["a"], "max_gap_s": 10},
    "eval": {"every_rounds": 10, "tokens": 2048},
    "wandb": {"mode": "disabled"},
    "log": {"every_steps": 10},
}  # fmt: skip
SITE = {"tokens_per_s": 15 * PER_STEP, "idle_kw": 0.5, "train_kw": 2.0, "device_batch": 32, "threads_local": 1, "threads_federated": 1}

# One deck; it is shuffled and dealt again and again.
DECK = ["kill"] * 4 + ["kill_two", "kill_all", "kill_joiner", "kill_parent"] + ["freeze"] * 3 + ["term"] * 2 \
    + ["kill_head"] * 4 + ["cut"] * 3 + ["reset"] * 2 + ["slow_link", "slow_site", "junk"]  # fmt: skip
AIMED = ("kill", "kill_two", "freeze", "kill_head", "cut", "reset")
FATAL = ("kill", "kill_two", "kill_all", "kill_joiner")  # kill -9 of the process that trains
NEVER = ("wrong base", "wrong result", "digests differ", "non-finite loss")  # fault records that no fault of ours explains
STUCK_S, NOISE_S = 100.0, 1.5  # no commit for so long: the run hangs; what two busy cores may add to a bound


@dataclass
class Fault:
    """One card of the plan, and after it struck, what it hit."""

    kind: str
    order: str  # sites in order of preference
    aim: str | None  # journal record it follows at once
    delay_rounds: float
    seconds: float  # of the freeze, the cut; between two kills
    sites: list[str] = field(default_factory=list)
    unix: float = 0.0
    until: float = 0.0  # end of what was done
    phase: str = ""  # last record of a round then: open, attempt, commit
    watched: list[str] = field(default_factory=list)  # sites that were on then


def make_plan(seed: int, number: int, sites: list[str]) -> list[Fault]:
    rng, deck, plan = random.Random(seed), [], []
    for _ in range(number):
        deck = deck or rng.sample(DECK, len(DECK))
        kind = deck.pop()
        aim = "commit" if kind == "kill_all" else rng.choice([None, None, "open", "attempt", "commit"]) if kind in AIMED else None
        seconds = {"freeze": rng.uniform(0.5, 4), "cut": rng.choice([1, 1, 4, 4, 4, 10, 10, 60]), "kill_two": rng.random()}.get(kind, 3.0)
        order = TORCHRUN if kind == "kill_parent" else "".join(rng.sample(sites, len(sites)))
        plan.append(Fault(kind, order, aim, round(min(5.0, max(0.1, rng.expovariate(1 / 1.6))), 2), round(seconds, 2)))
    return plan


def write_inputs(folder: Path, sites: list[str], rounds: int) -> None:
    """Corpus, trace, config, and a copy of the code: an edit meanwhile does not mix versions."""
    for name in ("corpus", "code"):
        (folder / name).mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(400)]
    for i in range(400):
        text = " ".join(rng.choices(words, [1 / (k + 1) for k in range(400)], k=600))
        (folder / "corpus" / f"{i:04d}.txt").write_text(text + ".\n")
    first, lines = datetime.fromisoformat(START), ["time," + ",".join(sites)]
    for i in range(600):  # 5 s each; c: 30 s clean, 15 s dirty
        values = [500 if s == WINDOWED and i % 9 >= 6 else 20 for s in sites]
        lines.append(",".join([(first + timedelta(seconds=5 * i)).strftime("%Y-%m-%dT%H:%M:%SZ"), *map(str, values)]))
    (folder / "trace.csv").write_text("\n".join(lines) + "\n")
    more = {"budget": {"tokens": PER_STEP * STEPS * len(sites) * rounds}, "sites": {s: SITE | {"region": s} for s in sites}}
    OmegaConf.save(OmegaConf.merge(TINY, more), folder / "config.yaml")
    for file in REPO.glob("*.py"):
        shutil.copy(file, folder / "code")


class Proxy:
    """What lies between a site and the coordinator: forwards, and fails on request."""

    def __init__(self, address: Path):
        self.address, self.lag_s, self.flows, self.open = address, 0.0, asyncio.Event(), set()
        self.flows.set()

    async def listen(self) -> "Proxy":
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _accept(self, reader, writer) -> None:
        await self.flows.wait()
        try:
            host, port = self.address.read_text().strip().split(":")
            there, onward = await asyncio.open_connection(host, int(port))
        except (OSError, ValueError):
            writer.transport.abort()
            return
        self.open |= {writer, onward}
        await asyncio.gather(self._pump(reader, onward), self._pump(there, writer), return_exceptions=True)
        self.open -= {writer, onward}

    async def _pump(self, reader, writer) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = await reader.read(1 << 16)
                await self.flows.wait()
                if not data:
                    break
                if self.lag_s:
                    await asyncio.sleep(self.lag_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    def reset(self) -> None:
        for writer in list(self.open):
            writer.transport.abort()


class Trial:
    """One run with its processes, supervised; with a plan it is a storm."""

    def __init__(self, folder: Path, name: str, sites: list[str], plan: list[Fault], say, seed: int):
        self.folder, self.name, self.sites, self.plan, self.say = folder, name, sites, plan, say
        self.dir, self.rng = folder / "runs" / name, {s: random.Random(f"{seed} {s}") for s in [*sites, "coordinator"]}
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.proxies: dict[str, Proxy] = {}
        self.struck: list[Fault] = []
        self.busy: dict[str, float] = {}  # site -> until when something is being done to it
        self.hit: set[int] = set()  # processes that end by our hand
        self.findings: list[str] = []  # each a broken promise
        self.ports: set[int] = set()
        self.records: list[dict] = []
        self.read_to, self.commits, self.last_commit = 0, 0, time.time()
        self.state: dict[str, str] = {}
        self.members: list[str] = []
        self.phase, self.over, self.heard = "", False, asyncio.Event()
        self.hurry = self.tries = 0

    # -- processes ----------------------------------------------------------------------------------------------------

    async def start(self, name: str):
        self.tries += 1
        python, code = [sys.executable], self.folder / "code"
        argv = [str(code / "train.py"), "config.yaml", f"run={self.name}", f"site={name}"]
        if name == "coordinator":
            argv = [str(code / "coordinator.py"), "config.yaml", f"run={self.name}"]
        elif name in self.proxies:
            argv.append(f"sync.port={self.proxies[name].port}")
        if name == TORCHRUN:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        log = open(self.folder / f"{self.name}-{name}-{self.tries:03d}.log", "wb")
        self.processes[name] = process = await asyncio.create_subprocess_exec(
            *python, *argv, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        process.log, process.told = Path(log.name), set()
        return process

    async def supervise(self, name: str) -> None:
        """Start it, and start it again when it has died, until the run is over."""
        while name != "coordinator" and not (self.dir / "address").exists():  # and keys
            await asyncio.sleep(0.05)
        while not self.over:
            process = await self.start(name)
            code = await process.wait()
            log = process.log.read_text(errors="replace")
            for error in errors_in(log):
                self.finding(f"{process.log.name}: {error}")
            ended = bool(self.records) and self.records[-1]["type"] == "end" and self.records[-1]["reason"] == "budget"
            if name == "coordinator" and (code in (0, 3) or ended):
                self.over = True
            if process.pid not in self.hit and not (self.over or ended) and not (name == TORCHRUN and code == 0):
                self.finding(f"{process.log.name} ended by itself with code {code}: {' / '.join(log.strip().splitlines()[-2:])[-400:]}")
                await asyncio.sleep(0.5)
            if name != "coordinator" and not self.over:
                await asyncio.sleep(0 if self.hurry else self.rng[name].uniform(0, 2))

    def finding(self, text: str) -> None:
        self.findings.append(text)
        self.say(f"{self.at()} !! {text}")

    def at(self) -> str:
        return f"{time.time() - self.began:6.1f} s"

    def worker(self, name: str) -> int | None:
        """The process that trains (torchrun is only its parent)."""
        process = self.processes.get(name)
        if process is None or process.returncode is not None:
            return None
        if name != TORCHRUN:
            return process.pid
        with contextlib.suppress(psutil.Error):
            return next((p.pid for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())), None)

    def send(self, name: str, number: int, parent: bool = False) -> None:
        if name in self.processes and number in (signal.SIGKILL, signal.SIGTERM):
            self.hit.add(self.processes[name].pid)
        pid = self.processes[name].pid if parent and name in self.processes else self.worker(name)
        if pid and self.processes[name].returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # -- the journal, as it is written --------------------------------------------------------------------------------

    async def follow(self) -> None:
        path = self.dir / "journal.jsonl"
        while True:
            if path.exists() and path.stat().st_size > self.read_to:
                with open(path, "rb") as file:
                    file.seek(self.read_to)
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                self.read_to += len(whole)
                for line in whole.splitlines():
                    self.note(json.loads(line))
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
        """Carry out the plan, one card after the other; what lasts goes on beside the next."""
        await self.until(lambda: self.commits >= 2, 60)
        for number, f in enumerate(self.plan):
            start = self.commits
            await self.until(lambda at=start + int(f.delay_rounds): self.commits >= at, 25)
            await asyncio.sleep(f.delay_rounds % 1 * TINY["rounds"]["train_s"])
            alone = f.kind not in ("kill_head", "junk", "kill_all")
            await self.until(lambda f=f, alone=alone: not alone or self.targets(f), 25)
            if f.aim:
                seen = len(self.records)
                await self.until(lambda seen=seen, f=f: any(r["type"] == f.aim for r in self.records[seen:]), 15)
            found = self.targets(f)
            if self.over or (alone and not found):
                self.say(f"{self.at()} fault {number} {f.kind} does not strike: {'the run is over' if self.over else 'nobody to strike'}")
                continue
            f.sites = list(f.order) if f.kind == "kill_all" else found[: 2 if f.kind == "kill_two" else 1] if alone else []
            f.unix, f.phase = time.time(), self.phase
            f.watched = [s for s in f.sites if self.state.get(s) == "on"]
            self.struck.append(f)
            self.say(f"{self.at()} fault {number} {f.kind} {' '.join(f.sites)} (aim {f.aim}, after {f.phase}, {f.seconds:g} s)")
            await getattr(self, f.kind)(f)
            f.until = max(f.until, time.time())

    def later(self, f: Fault, seconds: float, undo) -> None:
        """Leave a fault standing for so long, then undo it."""
        f.until = time.time() + seconds
        self.busy |= dict.fromkeys(f.sites, f.until + 0.5)
        asyncio.get_running_loop().call_later(seconds, undo)

    async def kill(self, f: Fault) -> None:
        for site in f.sites:
            self.send(site, signal.SIGKILL)

    kill_all = kill

    async def kill_two(self, f: Fault) -> None:
        for site in f.sites:
            self.send(site, signal.SIGKILL)
            await asyncio.sleep(f.seconds)

    async def kill_head(self, f: Fault) -> None:
        self.send("coordinator", signal.SIGKILL)

    async def kill_parent(self, f: Fault) -> None:
        self.send(f.sites[0], signal.SIGKILL, parent=True)

    async def term(self, f: Fault) -> None:
        self.send(f.sites[0], signal.SIGTERM, parent=True)

    async def freeze(self, f: Fault) -> None:
        self.send(f.sites[0], signal.SIGSTOP)
        pid = self.worker(f.sites[0])
        self.later(f, f.seconds, lambda: pid and psutil.pid_exists(pid) and os.kill(pid, signal.SIGCONT))

    async def slow_site(self, f: Fault) -> None:
        self.busy[f.sites[0]] = time.time() + f.seconds + 1
        for _ in range(int(f.seconds / 0.2)):
            self.send(f.sites[0], signal.SIGSTOP)
            await asyncio.sleep(0.15)
            self.send(f.sites[0], signal.SIGCONT)
            await asyncio.sleep(0.05)

    async def cut(self, f: Fault) -> None:
        proxy = self.proxies[f.sites[0]]
        proxy.flows.clear()
        if f.seconds >= TINY["rounds"]["max_offline_s"]:  # it may give up, as it should
            self.hit.add(self.processes[f.sites[0]].pid)
        self.later(f, f.seconds, proxy.flows.set)

    async def reset(self, f: Fault) -> None:
        self.proxies[f.sites[0]].reset()

    async def slow_link(self, f: Fault) -> None:
        proxy = self.proxies[f.sites[0]]
        proxy.lag_s = 0.1
        self.later(f, f.seconds, lambda: setattr(proxy, "lag_s", 0.0))

    async def kill_joiner(self, f: Fault) -> None:
        """Kill it, and again while it downloads."""
        site, seen, self.hurry = f.sites[0], len(self.records), 1
        self.send(site, signal.SIGKILL)
        joins = lambda: any(r["type"] == "site" and r["site"] == site and r["to"] == "starting" for r in self.records[seen:])  # noqa: E731
        if await self.until(joins, 25):
            self.send(site, signal.SIGKILL)
        self.hurry = 0

    async def junk(self, f: Fault) -> None:
        """200 connections to the coordinator's own port that speak no protocol of ours."""
        rng, few = random.Random(f.delay_rounds), asyncio.Semaphore(50)
        host, port = (self.dir / "address").read_text().strip().split(":")

        async def one(i: int) -> None:
            async with few:
                with contextlib.suppress(OSError, TimeoutError):
                    _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 3)
                    writer.write([b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + rng.randbytes(9), rng.randbytes(5000)][i % 4])
                    await asyncio.sleep(rng.random())
                    writer.close()

        await asyncio.gather(*(one(i) for i in range(200)))

    # -- all of it ----------------------------------------------------------------------------------------------------

    async def run(self, limit_s: float) -> None:
        self.began = time.time()
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
                if time.time() - max(self.began, self.last_commit) > STUCK_S or time.time() - self.began > limit_s:
                    self.hangs(limit_s)
                    return
            for proxy in self.proxies.values():
                proxy.flows.set()
            self.say(f"{self.at()} the coordinator has ended; {self.records[-1].get('reason')}")
            _, late = await asyncio.wait(tasks, timeout=TINY["rounds"]["max_offline_s"] + 15)
            if late:
                self.finding(f"{len(late)} site(s) still there {TINY['rounds']['max_offline_s'] + 15} s after the run's end")
        finally:
            self.over = True
            for task in [*tasks, *beside]:
                task.cancel()
            self.left = [" ".join(p.cmdline())[-120:] for p in processes_in(self.folder)]
            for process in processes_in(self.folder):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            for proxy in self.proxies.values():
                proxy.reset()
                proxy.server.close()

    def hangs(self, limit_s: float) -> None:
        """No progress: have every process say where it stands, into its log."""
        self.finding(f"no commit for {time.time() - self.last_commit:.0f} s, {time.time() - self.began:.0f} of {limit_s:g} s used")
        for name, process in self.processes.items():
            self.send(name, signal.SIGCONT)
            self.send(name, signal.SIGABRT)
            time.sleep(0.5)
            self.say(f"---- {name}\n{process.log.read_text(errors='replace')[-3500:]}")
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


# ---------------------------------------------------------------------------------------------------------------------
# The bill


def spread(values: list[float]) -> dict:
    return {"p50": round(statistics.median(values), 2), "max": round(max(values), 2), "n": len(values)} if values else None


class Bill:
    """What the journal, the sites' logs and the list of faults say together."""

    def __init__(self, trial: Trial):
        self.trial, path = trial, trial.dir / "journal.jsonl"
        self.records = read(path) if path.exists() else []
        self.held = effective(self.records)
        self.epoch = self.records[0]["wall"]["epoch_unix"] if self.records else 0.0
        heads = [f.unix for f in trial.struck if f.kind == "kill_head"]
        after = [next((self.unix(r) for r in self.records if self.unix(r) > t + 0.5), t + 5) for t in heads]
        self.down = list(zip(heads, after))  # without a coordinator
        self.commits = [r for r in self.held if r["type"] == "commit"]
        self.opens = {r["round"]: r for r in self.held if r["type"] == "open"}

    def unix(self, record: dict) -> float:
        return self.epoch + record["t_s"]

    def down_s(self, a: float, b: float) -> float:
        return sum(max(0.0, min(b, stop) - max(a, start)) for start, stop in self.down)

    def detection(self, kinds: tuple, least_s: float = 0.0) -> dict[tuple[int, str], float]:
        """(fault, site) -> seconds from the deed to the first fault record of that site, with a coordinator to make it."""
        out = {}
        for i, f in enumerate(self.trial.struck):
            for site in f.watched if f.kind in kinds and f.seconds >= least_s else []:
                late = f.seconds if f.kind == "kill_two" and site == f.sites[-1] and len(f.sites) == 2 else 0.0
                at = f.unix + late
                seen = next((self.unix(r) for r in self.records if r["type"] == "fault" and r.get("site") == site
                             and self.unix(r) >= at - 0.05), None)  # fmt: skip
                if seen and not self.down_s(at, seen) and seen - at < 20:
                    out[i, site] = seen - at
                elif not seen or not self.down_s(at, seen):
                    self.trial.say(f"fault {f.kind} {site} at {f.unix - self.trial.began:.1f} s was never recorded")
        return out

    def recovery(self, detected: dict) -> list[float]:
        """From the detection of a death in the middle of an average to the next attempt or commit."""
        out = []
        for (i, _), seconds in detected.items():
            f = self.trial.struck[i]
            seen = f.unix + seconds
            then = next((self.unix(r) for r in self.records if r["type"] in ("attempt", "commit") and self.unix(r) >= seen), None)
            if f.phase == "attempt" and then and not self.down_s(seen, then):
                out.append(then - seen)
        return out

    def rejoin(self) -> list[float]:
        """From a kill to the same site's first step after it, if neither its window nor another fault came between."""
        out = []
        for f in self.trial.struck:
            for site in f.watched if f.kind in FATAL[:3] else []:
                path = self.trial.dir / f"{site}.jsonl"
                steps = [json.loads(x)["wall"]["unix"] for x in path.read_text().splitlines()] if path.exists() else []
                back = next((s for s in sorted(steps) if s > f.unix + 1.5), None)
                others = [g for g in self.trial.struck if g is not f and (site in g.sites or g.kind == "kill_head") and back
                          and f.unix - 0.5 <= g.unix <= back]  # fmt: skip
                closed = any(r["type"] == "site" and r["site"] == site and r["to"] == "off" and "MCI" in r["reason"]
                             and f.unix < self.unix(r) < (back or 0) for r in self.records)  # fmt: skip
                if back and not others and not closed:
                    out.append(back - f.unix)
        return out

    def stalls(self, attempt_s: float) -> list[tuple[float, float, int]]:
        """(seconds from a federated round's first attempt to its commit, bound, round); a missing coordinator is added to
        the bound."""
        out, first = [], {}
        for r in self.records:
            if r["type"] == "open":
                first.pop(r["round"], None)
            elif r["type"] == "attempt":
                first.setdefault(r["round"], self.unix(r))
            elif r["type"] == "commit" and r["round"] in first:
                a, b = first.pop(r["round"]), self.unix(r)
                out.append((b - a, 3 * attempt_s + NOISE_S + self.down_s(a, b), r["round"]))
        return out

    def lost_parts(self) -> list[tuple[str, int, int, bool]]:
        """(site, round, tokens by estimate, whether a fault of ours struck it) of members whose round was committed without
        them. They trained at the rate of `open` until their first fault record of that round, at most what was leased."""
        out = []
        for c in self.commits:
            o = self.opens.get(c["round"])
            if not o or o["mode"] == "local":
                continue
            a, b = self.unix(o), self.unix(c)
            for site in o["members"]:
                if any(y > x for x, y in c["batches"].get(site, [])):
                    continue
                ends = [self.unix(r) for r in self.records if r["type"] == "fault" and r.get("site") == site and a <= self.unix(r) <= b]
                leased = sum(y - x for x, y in o["leases"][site]) * PER_STEP
                ours = any(site in f.sites and f.unix <= b and f.until + 2 * TINY["sync"]["dead_s"] >= a for f in self.trial.struck)
                trained_s = min([*ends, a + TINY["rounds"]["train_s"]]) - a
                out.append((site, c["round"], int(min(leased, o["rates"][site] * trained_s)), ours))
        return out

    def val_loss(self) -> float | None:
        return next((r["val_loss"] for r in reversed(self.held) if r["type"] == "eval"), None)

    def complete(self) -> bool:
        return bool(self.held) and self.held[-1]["type"] == "end" and self.held[-1]["reason"] == "budget"


def invariants(trial: Trial, bill: Bill, lost: list, stalls: list) -> tuple[int, list[str]]:
    """Of `coordinator.py check`, and those that only a storm can see."""
    check = subprocess.run([sys.executable, str(trial.folder / "code" / "coordinator.py"), "check", str(trial.dir)], text=True,
                           capture_output=True, cwd=trial.folder)  # fmt: skip
    lines = check.stdout.splitlines() or [f"BROKEN check itself: {check.stderr[-300:]}"]
    for name in NEVER:
        bad = [r for r in bill.records if r["type"] == "fault" and r["kind"] == name]
        lines.append(f"{'BROKEN' if bad else 'ok    '} no fault record `{name}`{': ' + json.dumps(bad[0]) if bad else ''}")
    slow = [f"round {r}: {s:.1f} > {bound:.1f} s" for s, bound, r in stalls if s > bound]
    lines.append(f"{'BROKEN' if slow else 'ok    '} every average within 3 attempts {slow or ''}")
    innocent = [f"{site} in round {r}" for site, r, _, ours in lost if not ours]
    lines.append(f"{'BROKEN' if innocent else 'ok    '} only who was struck lost its part of a round {innocent or ''}")
    lines += [f"BROKEN {text}" for text in trial.findings] or ["ok     no process failed by itself, and the run never hung"]
    return sum(x.startswith("ok") for x in lines), [x[7:] for x in lines if not x.startswith("ok")]


def account(trial: Trial, seed: int) -> dict:
    """The line of JSON, but for the calm run's part."""
    bill = Bill(trial)
    said = re.search(r"([\d,]+) parameters", "".join(p.read_text(errors="replace") for p in trial.folder.glob("storm-coordinator-*.log")))
    numel = int(said[1].replace(",", "")) if said else 0
    limits = timeouts.derive(config.load([str(trial.folder / "config.yaml")]), 4 * numel)
    stalls, lost = bill.stalls(limits.attempt_s), bill.lost_parts()
    held, broken = invariants(trial, bill, lost, stalls)
    killed, frozen = bill.detection(FATAL), bill.detection(("freeze",), TINY["sync"]["dead_s"] + 0.5)
    committed = sum(c["tokens"] for c in bill.commits)
    discarded = sum(r["tokens"] for r in bill.held if r["type"] in ("cancel", "rollback")) + sum(x[2] for x in lost)
    longest = max(stalls, default=(0.0, 3 * limits.attempt_s, -1))
    listening = [c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port in trial.ports]
    return {
        "seed": seed, "faults": dict(sorted(Counter(f.kind for f in trial.struck).items())), "rounds": len(bill.commits),
        "committed_tokens": committed, "discarded_tokens": discarded,
        "step_efficiency": round(committed / max(1, committed + discarded), 4),
        "longest_stall_s": round(longest[0], 2), "longest_stall_bound_s": round(longest[1], 2),
        "detection_s": {"killed": spread([*killed.values()]), "frozen": spread([*frozen.values()])},
        "recovery_s": spread(bill.recovery(killed)), "rejoin_s": spread(bill.rejoin()), "val_loss": bill.val_loss(),
        "calm_val_loss": None, "val_loss_ratio": None, "budget_committed": bill.complete(),
        "invariants": {"held": held, "broken": broken},
        "left_behind": {"processes": trial.left, "sockets": listening, "files": [str(p) for p in trial.dir.rglob("*.tmp")]},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--sites", type=int, default=3, choices=(3, 4))
    parser.add_argument("--json", action="store_true", help="no report, only the line of JSON")
    parser.add_argument("--keep", help="leave the run's folder here")
    args = parser.parse_args()
    started, sites = time.time(), list("abcd"[: args.sites])
    say = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr, flush=True))
    folder = Path(tempfile.mkdtemp(prefix="storm-")).resolve()
    try:
        plan = make_plan(args.seed, args.faults, sites)
        for number, f in enumerate(plan):
            card = asdict(f)
            say(f"plan {number:3d}  " + "  ".join(f"{k} {card[k]}" for k in ("kind", "order", "aim", "delay_rounds", "seconds")))
        write_inputs(folder, sites, rounds=6 + round(1.4 * args.faults))
        storm, calm = (Trial(folder, name, sites, cards, say, args.seed) for name, cards in (("storm", plan), ("calm", [])))
        asyncio.run(storm.run(limit_s=120 + 15 * args.faults))
        result = account(storm, args.seed)
        if result["budget_committed"]:
            say("the same without faults")
            asyncio.run(calm.run(limit_s=900))
            bill = Bill(calm)
            result["calm_val_loss"] = loss = bill.val_loss()
            result["val_loss_ratio"] = round(result["val_loss"] / loss, 4) if loss else None
            say(f"calm: {len(bill.commits)} rounds, {bill.unix(bill.commits[-1]) - bill.epoch:.0f} s, findings {calm.findings}")
    finally:
        for process in processes_in(folder):
            with contextlib.suppress(psutil.Error):
                process.kill()
        if args.keep:
            shutil.copytree(folder, args.keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    result["wall_s"] = round(time.time() - started, 1)
    say("\n".join(f"{k:20} {v}" for k, v in result.items()))
    say("discarded_tokens: tokens of `cancel` and `rollback` records, and what members trained whose round was committed without\n"
        "them (rate at `open` x time to their fault record, at most the lease). detection_s: deed to journal; recovery_s: from\n"
        "there to the next attempt or commit, for deaths during an average; rejoin_s: kill to the next logged step.")  # fmt: skip
    print(json.dumps(result), flush=True)
    bad = result["invariants"]["broken"] or not result["budget_committed"] or any(result["left_behind"].values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
