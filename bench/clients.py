"""One real coordinator, a thousand sites: its processor time, its memory, how fast it answers heartbeats.

    python bench/clients.py [--clients 1000] [--seconds 60] [--repeat 3] [--loads idle,grid] [--json] [--keep DIR]

The coordinator is `coordinator.py` as it is: wall clock, keys, CURVE, journal, durable state, star averages. The sites speak the
real control protocol with `channel.Link`, keys and two connections each, but live `CROWDS` to a process, without a thread each,
and do not train: a step takes its time, and their pseudo-gradient is zero, so that everything said about it is true
(digests, votes, sums, uploads, states). Their grids are traces/make_regions.py's.

    idle    no site's window ever opens: heartbeats only
    grid    as the grids have it: about one in seven trains, in rounds of TRAIN_S; windows open and close
    all     policy.name=always: every site is a member of every round (not by default: no sensible use of a thousand sites)

Each load: all sites join at once; after SETTLE_S, `--seconds` are measured; then the coordinator is killed (SIGKILL) and started
again, and all come back. Printed for each: medians over the repetitions and the range. A heartbeat's time is from `Link` sending it
until `Link` has the answer, the site's own turn included. Bounds: 1 core, 500 MiB, 99th percentile 100 ms.
"""

import collections
import contextlib
import heapq
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import zmq

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

import config  # noqa: E402
import sync  # noqa: E402
from channel import Lane, Link, pack  # noqa: E402
from data import Corpus  # noqa: E402
from ledger import count  # noqa: E402
from traces import make_regions  # noqa: E402
from wire import num_bytes  # noqa: E402

CROWDS = 2  # processes that the sites share
TRAIN_S, SETTLE_S, JOIN_S = 20.0, 30.0, 120.0
STEP_S, TOKENS = 2.7, 128  # seconds and tokens of a step; the seconds are d20's on the paper's sites
EVERY_S = 0.1  # every site has its turn at least so often: Pump's POLL_MS
START = "2026-04-10T18:00:00Z"
LOADS = {"idle": {"policy": {"on_delay_s": 1e9}}, "grid": {}, "all": {"policy": {"name": "always"}}}


# ---------------------------------------------------------------------------------------------------------------------
# Sites


class Then:
    """In place of the queue somebody waits at for an answer."""

    def __init__(self, put):
        self.put = put


class Turned:
    """Instead of a thread of its own, a Pump here has its turn when the crowd gives it one."""

    def start(self) -> None:
        """Nothing to start."""

    def post(self, parts: list) -> None:
        self._outgoing.put(parts)
        self.crowd.woken.add(self)

    def files(self) -> list[int]:
        """What to poll."""
        return [self.socket.getsockopt(zmq.FD)]

    def have_turn(self) -> None:
        while True:
            self.turn(self.ready())
            if not self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # sending may have taken note of an arrival
                return

    def ready(self) -> dict:
        return {}

    def act(self, now: float) -> None:
        """What is due."""


class SharedLane(Turned, Lane):
    def __init__(self, crowd: "Crowd", *args):
        self.crowd = crowd
        super().__init__(*args)
        crowd.add(self)


class FakeSite(Turned, Link):
    """One site by train.py's rules, whose pseudo-gradient is zero."""

    def __init__(self, crowd: "Crowd", address: str, keys: Path, name: str, hello: dict):
        s, self.crowd, self.name_, self.welcomes = crowd.cfg.sync, crowd, name, []
        self.beats = self.answers = 0
        super().__init__(address, keys, name, s.heartbeat_s, s.dead_s, hello, crowd.context)
        self._new_lane = lambda: SharedLane(crowd, self.address, keys, name, self._arrived, crowd.context)
        self.digest, self.numel = "", 0
        self.status = {"held": -1, "round": -1, "open_s": 0.0, "phase": "idle", "steps": 0, "finite": True, "attempt": 0, "vote": "",
                       "unstored": {}}  # fmt: skip
        self.plan: dict | None = None
        crowd.add(self)

    def files(self) -> list[int]:
        return [*super().files(), self._monitor.getsockopt(zmq.FD)]

    def ready(self) -> dict:
        return {self._monitor: zmq.POLLIN} if self._monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN else {}

    def receive(self, frames) -> None:
        head, now = frames[0].bytes, time.monotonic()
        if b'"heartbeat"' in head:
            self.answers += 1
            self.crowd.seconds.append(now - self._beat)
        elif b'"welcome"' in head:
            self.welcomes.append(now)
        super().receive(frames)

    def tick(self, ready: dict) -> None:
        before = self._beat
        super().tick(ready)
        self.beats += self._beat != before

    def note(self, **changes) -> None:
        self.status = self.status | changes

    def tell(self, **report) -> None:
        self.send(report)

    def call(self, header: dict, payload, then) -> None:
        """A request by the lane; then(header, payload) once it is answered."""
        self._next_id += 1
        number, self._lane = self._next_id, self._lane or self._new_lane()

        def answered(answer) -> None:
            self._replies.pop(number, None)
            if "error" not in answer[0]:
                then(*answer)

        self._replies[number] = Then(answered)
        self._lane.post(pack(header | {"id": number, "lane_of": self.hello["incarnation"]}, payload))

    def act(self, now: float) -> None:
        while not self.inbox.empty():
            c = self.inbox.get()[0]
            if handler := getattr(self, "_" + c["type"], None):
                handler(c)

    # what we are told

    def _welcome(self, c: dict) -> None:
        self.welcomed = True

    def _refused(self, c: dict) -> None:
        if c.get("sure", True):
            self.crowd.fail(f"{self.name_}: {c['reason']}")

    def _end(self, c: dict) -> None:
        self.crowd.ended += 1

    def _idle(self, **changes) -> None:
        self.plan = None
        self.note(round=-1, phase="idle", vote="", **changes)

    def _fetch(self, c: dict) -> None:
        self._idle(held=-1, unstored={})
        began, self.numel = time.monotonic(), c["numel"]

        def arrived(header: dict, theta) -> None:
            if not header["found"] or (c["digest"] and sync.blake3(theta).hexdigest() != c["digest"]):
                self.tell(type="again")
                return
            self.digest = c["digest"] or sync.blake3(theta).hexdigest()
            self.theta = bytes(theta)
            self.note(held=c["round"])
            self.tell(type="current", id=c["id"], round=c["round"], download_s=time.monotonic() - began)

        self.call({"type": "chunk", "round": c["round"], "name": "theta", "start": 0, "stop": 4 * self.numel}, b"", arrived)

    def _open(self, c: dict) -> None:
        if c["round"] != self.status["held"]:
            self.greet()
            return
        self.plan = c | {"batches": count(c["leases"]), "began": time.monotonic(), "told": 0}
        self.note(round=c["round"], open_s=c["open_s"], phase="train", steps=0, vote="")
        self.crowd.at(self.plan["began"] + STEP_S, self._step)

    def _step(self) -> None:
        """One more step is done, or would be."""
        plan, now = self.plan, time.monotonic()
        if not plan or self.status["phase"] != "train":
            return
        done = min(int((now - plan["began"]) / STEP_S), plan["batches"])
        if now - plan["began"] >= plan["train_for_s"] or done == plan["batches"]:
            self._hold_still(done)
            return
        if done and done % 5 in (0, 1) and done > plan["told"] + 3:
            plan["told"] = done
            self.tell(type="progress", mode=plan["mode"], t_s=plan["open_s"] + done * STEP_S, round=plan["round"], step=done, loss=9.0,
                      tok_per_s=TOKENS / STEP_S, mci_g_per_kwh=50.0, energy_kwh=plan["energy_kwh"],
                      emissions_kg=plan["emissions_kg"])  # fmt: skip
        self.crowd.at(min(now + STEP_S, plan["began"] + plan["train_for_s"]), self._step)

    def _freeze(self, c: dict) -> None:
        if self.plan and self.status["phase"] == "train" and c["round"] == self.plan["round"]:
            self._hold_still(min(int((time.monotonic() - self.plan["began"]) / STEP_S), self.plan["batches"]))

    def _hold_still(self, steps: int) -> None:
        plan = self.plan
        self.note(phase="frozen", steps=steps)
        self.tell(type="frozen", round=plan["round"], open_s=plan["open_s"], steps=steps, finite=True, bad_step=steps,
                  train_s=time.monotonic() - plan["began"])  # fmt: skip
        if plan["mode"] == "local" and steps:
            held = plan["round"] + 1
            self._idle(held=held, unstored=self.status["unstored"] | {str(plan["round"]): steps})
            self._upload(held, "theta", self.theta, digest=self.digest)

    def _attempt(self, c: dict) -> None:
        if c["round"] != self.status["held"]:
            self.greet()
            return
        self.note(round=c["round"], attempt=c["attempt"], vote="", phase="frozen")
        self.nothing = bytes(num_bytes(c["wire"], self.numel))
        header = {"type": "reduce", "round": c["round"], "attempt": c["attempt"], "of": 1, "index": 0}

        def summed(_, total) -> None:
            assert not any(total), "nothing and nothing is something"
            digest = sync.blake3(total).hexdigest()
            self.note(vote=digest)
            self.tell(type="vote", round=c["round"], attempt=c["attempt"], digest=digest)

        self.call(header, self.nothing, summed)

    def _commit(self, c: dict) -> None:
        if c["attempt"] == 0 or c["round"] != self.status["held"]:
            self.note(unstored={r: n for r, n in self.status["unstored"].items() if int(r) > c["round"]})
            return
        held = c["round"] + 1
        self._idle(held=held)
        self.tell(type="applied", round=held, digest_theta=self.digest, digest_m=self.crowd.digest_of_zeros(4 * self.numel))
        if c["send"]:
            self._upload(held, "delta", self.nothing)

    def _resend(self, c: dict) -> None:
        self._upload(self.status["held"], "theta", self.theta, digest=self.digest)

    def _upload(self, round_: int, name: str, data: bytes, **more) -> None:
        chunk = {"type": "upload", "round": round_, "name": name, "start": 0, "stop": len(data), "last": True} | more
        self.call({"type": "ping"}, b"", lambda *_: self.call(chunk, data, lambda *_: None))

    def _cancel(self, c: dict) -> None:
        if c["round"] <= self.status["round"]:
            self._idle()

    def _drop(self, c: dict) -> None:
        self._idle(held=-1, unstored={})


class Crowd:
    """Many sites in one thread."""

    def __init__(self, cfg, names: list[str]):
        self.cfg, self.names = cfg, names
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 8 * len(names) + 64)
        self.epoll, self.of = select.epoll(), {}
        self.woken: set[Turned] = set()
        self.order: collections.deque[Turned] = collections.deque()  # whose turn it is next, asked or not
        self.timers: list[tuple] = []
        self.seconds: list[float] = []  # of each heartbeat that was answered
        self.laps: list[float] = []  # seconds a round of the loop took: what it adds to them
        self.ended, self.made, self.zeros = 0, 0, {}
        self.began_lap = time.monotonic()
        self.questions = open(0, "rb", buffering=0, closefd=False)  # buffered, it would take in more than polling then tells of

    def fail(self, why: str) -> None:
        raise SystemExit(why)

    def digest_of_zeros(self, size: int) -> str:
        return self.zeros.setdefault(size, sync.blake3(bytes(size)).hexdigest())

    def at(self, when: float, what) -> None:
        self.made += 1
        heapq.heappush(self.timers, (when, self.made, what))

    def add(self, member: Turned) -> None:
        self.order.append(member)
        for file in member.files():
            self.of[file] = member
            self.epoll.register(file, select.EPOLLIN)

    def join(self, address: str, keys: Path) -> list[FakeSite]:
        cfg, corpus = self.cfg, Corpus(self.cfg)
        same = {"type": "hello", "config digest": config.train_digest(cfg), "corpus digest": corpus.digest,
                "tokenizer digest": corpus.tokenizer_digest, "versions": config.versions(), "device": "cpu", "ranks": 1}  # fmt: skip
        say(ready=len(self.names))
        self.questions.readline()
        self.began = time.monotonic()
        self.sites = [FakeSite(self, address, keys, n, same | {"site": n, "incarnation": uuid.uuid4().hex[:12]}) for n in self.names]
        return self.sites

    def run(self) -> None:
        """Until the run ends; answers the bench's questions from stdin."""
        self.epoll.register(self.questions, select.EPOLLIN)
        while self.ended < len(self.sites):
            if self.lap() and not self.answer(self.questions.readline().decode()):
                return

    def lap(self) -> bool:
        """Everyone with something to hear, to say or to do has a turn, and in turns those without. True if we are asked something."""
        wait_s = min(0.01, self.timers[0][0] - time.monotonic()) if self.timers else 0.01
        hot = {self.of.get(file) for file, _ in self.epoll.poll(0 if self.woken else max(0.0, wait_s))}
        now = time.monotonic()
        share = min(int(len(self.order) * (now - self.began_lap) / EVERY_S) + 1, len(self.order))
        idle, self.began_lap = {self.order[i] for i in range(share)}, now
        self.order.rotate(-share)
        woken, self.woken = self.woken, set()
        for member in (hot - {None}) | idle | woken:
            member.have_turn()
            member.act(now)
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()
        self.laps.append(time.monotonic() - now)
        return None in hot

    def answer(self, question: str) -> bool:
        if question == "begin\n":
            self.seconds, self.laps = [], []
            for site in self.sites:
                site.beats = site.answers = 0
        elif question == "welcomes\n":
            say(welcomes=[site.welcomes[-1] if site.welcomes else 0.0 for site in self.sites], began=self.began)
        elif question == "report\n":
            say(seconds=self.seconds, laps=self.laps, training=sum(s.status["phase"] != "idle" for s in self.sites),
                beats=sum(s.beats for s in self.sites), answers=sum(s.answers for s in self.sites))  # fmt: skip
        return bool(question)


def say(**facts) -> None:
    print(json.dumps(facts), flush=True)


def crowd_command(config_yaml: str, part: int) -> None:
    cfg = config.load([config_yaml])
    crowd = Crowd(cfg, list(cfg.sites)[part::CROWDS])
    folder = config.run_dir(cfg)
    crowd.join((folder / "address").read_text().strip(), folder / "keys")
    crowd.run()
    os._exit(0)  # a thousand sockets need not be closed one by one


# ---------------------------------------------------------------------------------------------------------------------
# The bench


def write(folder: Path, num: int, load: str) -> Path:
    """A config of `num` sites, each on a grid of its own, its trace and a little corpus."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(f"word{(i * j) % 97}" for j in range(400)))
    make_regions.main([str(folder / "trace.csv"), "--regions", str(num), "--days", "2", "--start", START[:11] + "00:00:00Z"])
    names = (folder / "trace.csv").open().readline().strip().split(",")[1:]
    site = {"tokens_per_s": TOKENS / STEP_S, "idle_kw": 0.468, "train_kw": 2.024, "energy": "model"}
    raw = config.OmegaConf.merge({
        "run": "clients", "clock": {"mode": "wall", "start": START}, "budget": {"tokens": TOKENS * 10**8},
        "model": {"depth": 1, "width": 16, "heads": 2, "kv_heads": 1, "seq_len": 32},
        "data": {"source": str(folder / "text"), "dir": str(folder / "data"), "tokens_per_step": TOKENS, "val_tokens": 256},
        "rounds": {"train_s": TRAIN_S, "commit_every_s": TRAIN_S, "sync_s": 5, "grace_s": 10}, "sync": {"topology": "star"},
        "policy": {"name": "threshold", "off_delay_s": 60}, "carbon": {"trace": str(folder / "trace.csv"), "baseline_regions": []},
        "eval": {"every_rounds": 0}, "wandb": {"mode": "disabled"}, "sites": {n: site | {"region": n} for n in names},
    }, LOADS[load])  # fmt: skip
    config.OmegaConf.save(raw, folder / "config.yaml")
    return folder / "config.yaml"


class Bench:
    def __init__(self, folder: Path, num: int, load: str):
        self.folder, self.num, self.load = folder, num, load
        self.config = write(folder, num, load)
        self.run_dir = folder / "runs" / "clients"
        self.crowds: list[subprocess.Popen] = []

    def start_head(self) -> float:
        """A coordinator, once it listens; returns the seconds that took."""
        began, log = time.monotonic(), self.folder / "coordinator.log"
        at = log.stat().st_size if log.exists() else 0
        self.head = subprocess.Popen(
            [sys.executable, "-u", str(REPO / "coordinator.py"), str(self.config)], cwd=self.folder, stdout=log.open("a"),
            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while b"control channel at" not in log.read_bytes()[at:]:
            if self.head.poll() is not None or time.monotonic() > began + JOIN_S:
                raise SystemExit(f"the coordinator did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.process = psutil.Process(self.head.pid)
        return time.monotonic() - began

    def start_crowds(self) -> None:
        for part in range(CROWDS):
            command = [sys.executable, __file__, "--crowd", str(self.config), str(part)]
            self.crowds.append(subprocess.Popen(command, cwd=self.folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for crowd in self.crowds:
            crowd.stdout.readline()

    def tell(self, word: str) -> None:
        for crowd in self.crowds:
            crowd.stdin.write(word + "\n")
            crowd.stdin.flush()

    def ask(self, word: str) -> list[dict]:
        self.tell(word)
        return [json.loads(crowd.stdout.readline()) for crowd in self.crowds]

    def all_welcome(self, since: float) -> list[float]:
        """Seconds from `since` (monotonic) until each site was welcomed, once all are."""
        while True:
            times = [t for answer in self.ask("welcomes") for t in answer["welcomes"]]
            if all(t > since for t in times):
                return [t - since for t in times]
            if time.monotonic() > since + JOIN_S or self.head.poll() is not None:
                raise SystemExit(f"{sum(t > since for t in times)} of {self.num} sites were welcomed within {JOIN_S:g} s")
            time.sleep(0.5)

    def measure(self, seconds: float) -> dict:
        """What the coordinator uses, and how long heartbeats take, over so many seconds."""
        self.tell("begin")
        cpu, began, rss = self.process.cpu_times(), time.monotonic(), 0
        while (now := time.monotonic()) < began + seconds:
            time.sleep(min(1.0, began + seconds - now))
            rss = max(rss, self.process.memory_info().rss)
        after, took = self.process.cpu_times(), time.monotonic() - began
        answers = self.ask("report")
        beats = np.array([s for a in answers for s in a["seconds"]])
        laps = np.concatenate([a["laps"] for a in answers])
        return {
            "cores": (after.user + after.system - cpu.user - cpu.system) / took, "rss_mib": rss / 2**20,
            "p50_ms": 1e3 * float(np.quantile(beats, 0.5)), "p99_ms": 1e3 * float(np.quantile(beats, 0.99)),
            "max_ms": 1e3 * float(beats.max()), "beats_per_s": len(beats) / took,
            "lap_p99_ms": 1e3 * float(np.quantile(laps, 0.99)), "lap_max_ms": 1e3 * float(laps.max()),
            "unanswered": sum(a["beats"] - a["answers"] for a in answers), "training": sum(a["training"] for a in answers),
            "load": os.getloadavg()[0],
        }  # fmt: skip

    def journal(self) -> list[dict]:
        lines = (self.run_dir / "journal.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def run(self, seconds: float) -> dict:
        start_s = self.start_head()
        self.start_crowds()
        cpu, began = sum(self.process.cpu_times()[:2]), time.monotonic()
        self.tell("go")
        joined = self.all_welcome(began)
        row = {"start_s": start_s, "join_p50_s": statistics.median(joined), "join_max_s": max(joined),
               "join_cpu_s": sum(self.process.cpu_times()[:2]) - cpu}  # fmt: skip
        time.sleep(SETTLE_S)
        row |= self.measure(seconds)
        before = len(self.journal())
        self.process.kill()
        self.head.wait()
        row["restart_s"] = self.start_head()
        began = time.monotonic() - row["restart_s"]
        row["back_max_s"] = max(self.all_welcome(began))
        time.sleep(10)
        again = self.measure(min(20, seconds))
        row |= {"after_p99_ms": again["p99_ms"], "after_rss_mib": again["rss_mib"]}
        records = self.journal()
        opens = [len(r["members"]) for r in records if r["type"] == "open"]
        row |= {
            "rounds": sum(r["type"] == "commit" for r in records), "members": statistics.median(opens) if opens else 0,
            "moves": sum(r["type"] == "site" for r in records), "lost_by_restart": sum(r["type"] == "fault" for r in records[before:]),
            "faults": sum(r["type"] == "fault" for r in records[:before]),
        }  # fmt: skip
        check = subprocess.run([sys.executable, str(REPO / "coordinator.py"), "check", str(self.run_dir)], capture_output=True, text=True)
        row["broken"] = [line for line in check.stdout.splitlines() if line.startswith("BROKEN")]
        return row

    def stop(self) -> None:
        if self.head.poll() is None:
            self.head.send_signal(signal.SIGTERM)
        for child in [self.head, *self.crowds]:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def main(argv: list[str]) -> int:
    parser = config.Parser()
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--loads", default="idle,grid")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave the run here")
    args = parser.parse_args(argv)
    rows = []
    for load in args.loads.split(","):
        each = []
        for _ in range(args.repeat):
            folder = args.keep or Path(tempfile.mkdtemp(prefix="clients-"))
            bench = Bench(folder, args.clients, load)
            try:
                each.append(bench.run(args.seconds))
            finally:
                with contextlib.suppress(AttributeError):
                    bench.stop()
                if not args.keep:
                    shutil.rmtree(folder, ignore_errors=True)
        print(f"{load}, {args.clients} sites, median of {len(each)} (range):", file=sys.stderr if args.json else sys.stdout)
        for key in each[0]:
            values = [row[key] for row in each]
            if key == "broken":
                line = "; ".join(line for lines in values for line in lines) or "nothing"
            else:
                line = f"{statistics.median(values):,.3f} ({min(values):,.3f} to {max(values):,.3f})"
            print(f"    {key:16} {line}", file=sys.stderr if args.json else sys.stdout, flush=True)
        rows.append({"load": load, "clients": args.clients, "repetitions": each})
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--crowd"]:
        crowd_command(sys.argv[2], int(sys.argv[3]))
    config.command(main, parses=True)
