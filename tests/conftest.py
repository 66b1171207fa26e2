"""What the tests share: a corpus, tiny configs, runs with real processes, and a guard that none of them stays."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import psutil
import pytest
from omegaconf import OmegaConf
from warm import Warm

import config

# A shell has what it runs in the background ignore Ctrl-C, and all that this starts: the tests are about Ctrl-C, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).parent.parent
START = "2026-01-11T17:00:00Z"

# Laws are tried on the same examples every time, so that a test judges the change; `make hunt` looks for new ones, so many times as
# many, does not shrink what it finds, which takes longer than to understand it, and says how to repeat it.
TIMES = int(os.environ.get("HUNT", "0"))
LOOKED_FOR = {"phases": (hypothesis.Phase.explicit, hypothesis.Phase.generate), "print_blob": True, "database": None}
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("hunt", deadline=None, max_examples=100 * max(1, TIMES), **LOOKED_FOR)
hypothesis.settings.load_profile("hunt" if TIMES else "same")


def examples(number: int = 100, **more) -> hypothesis.settings:
    """On how many examples a law is tried."""
    return hypothesis.settings(max_examples=number * max(1, TIMES), **more)


# A run of seconds: 2,800 parameters, steps of 128 tokens that cost 10 virtual seconds.
TINY = {
    "run": "tiny",
    "clock": {"mode": "virtual", "start": START},
    "budget": {"tokens": 128 * 40},
    "model": {"depth": 1, "width": 16, "heads": 2, "kv_heads": 1, "seq_len": 32},
    "data": {"tokenizer": "bytes", "tokens_per_step": 128, "val_tokens": 1024},
    "rounds": {"train_s": 60, "sync_s": 5, "commit_every_s": 60, "rejoin_wait_s": 60, "grace_s": 20},
    "policy": {"name": "threshold", "off_delay_s": 60},
    "sync": {"heartbeat_s": 0.5, "dead_s": 6},
    "carbon": {"baseline_regions": ["a"]},
    "eval": {"every_rounds": 4, "tokens": 256},
    "wandb": {"mode": "disabled"},
    "log": {"every_steps": 2},
}
SITE = {"tokens_per_s": 12.8, "idle_kw": 0.5, "train_kw": 2.0, "provision_s": 20, "startup_s": 10, "device_batch": 4,
        "threads_local": 1, "threads_federated": 1}  # fmt: skip
CLEAN, DIRTY = 20.0, 500.0
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}


def write_corpus(folder: Path) -> None:
    """Text that never changes: 150 documents of made-up words, common ones more often."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(400)]
    often = [1 / (i + 1) for i in range(len(words))]
    for i in range(150):
        (folder / f"{i:04d}.txt").write_text(" ".join(rng.choices(words, often, k=400)) + ".\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def write_trace(path: Path, columns: dict[str, list[float]], step_s: int = 60) -> None:
    """columns: region -> value per step from START on; the last one holds."""
    from datetime import datetime, timedelta

    first = datetime.fromisoformat(START)
    length = 400
    lines = ["time," + ",".join(columns)]
    for i in range(length):
        stamp = (first + timedelta(seconds=step_s * i)).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines.append(",".join([stamp, *(str(v[min(i, len(v) - 1)]) for v in columns.values())]))
    path.write_text("\n".join(lines) + "\n")


def records(path: Path) -> list[dict]:
    """The lines of a .jsonl file that are there whole: who writes it may be in the middle of its last one."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


class Runner:
    """A folder to run in: writes configs and traces there, starts our programs there, kills what is left."""

    def __init__(self, folder: Path, corpus: Path, data_dir: Path, warm: Warm | None):
        self.folder, self.corpus, self.data_dir, self.warm = folder, corpus, data_dir, warm
        self.processes: list[subprocess.Popen] = []
        self.calls = 0
        self.program: dict[str, list[str]] = {}  # log name -> what to run its python under
        self.env = dict(ENV)

    def write(self, sites: dict[str, dict], windows: dict[str, list[float]] | None = None, step_s: int = 60, **changes) -> list[str]:
        """config.yaml (and trace.csv) for these sites, region = site name; returns the arguments that name it."""
        windows = windows or {name: [CLEAN] * 400 for name in sites}
        write_trace(self.folder / "trace.csv", windows, step_s)
        raw = OmegaConf.merge(TINY, {
            "carbon": {"trace": str(self.folder / "trace.csv"), "baseline_regions": list(windows)[:1]},
            "data": {"source": str(self.corpus), "dir": str(self.data_dir)},
            "sites": {name: SITE | {"region": name} | given for name, given in sites.items()},
        }, changes)  # fmt: skip
        OmegaConf.save(raw, self.folder / "config.yaml")
        return [str(self.folder / "config.yaml")]

    def load(self, argv: list[str]):
        return config.load(argv)

    def start(self, script: str, *argv: str, log: str | None = None, cold: bool | None = None) -> subprocess.Popen:
        """cold: load torch anew, as a person's command does; None: torchrun only."""
        path = self.folder / f"{log or f'{script}-{len(self.processes)}'}.log"
        under, program = self.program.get(log, []), ["-m", "torch.distributed.run"] if script == "torchrun" else [str(REPO / script)]
        cold = script == "torchrun" if cold is None else cold
        if self.warm and not cold and not under:
            program = [script] if script == "torchrun" else program
            process = self.warm.start([*program, *argv], self.folder, self.env, path)
        else:
            with open(path, "w") as out:
                process = subprocess.Popen([*under, sys.executable, *program, *argv], cwd=self.folder, env=self.env, stdout=out,
                                           stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        process.log = path
        self.processes.append(process)
        return process

    def call(self, script: str, *argv: str, timeout: float = 120) -> subprocess.CompletedProcess:
        if not self.warm:
            return subprocess.run([sys.executable, str(REPO / script), *argv], cwd=self.folder, env=self.env, capture_output=True,
                                  text=True, timeout=timeout)  # fmt: skip
        self.calls += 1
        said = [self.folder / f".call-{self.calls}.{end}" for end in ("out", "err")]
        process = self.warm.start([str(REPO / script), *argv], self.folder, self.env, *said)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, code, *(path.read_text() for path in said))

    def begin(self, argv: list[str], sites: list[str]) -> tuple[subprocess.Popen, dict[str, subprocess.Popen]]:
        """Coordinator and sites as the README starts them, but for torchrun, which is slow to start."""
        head = self.start("coordinator.py", *argv, log="coordinator")
        workers = [a for a in argv if not a.startswith("fresh=")]
        return head, {name: self.start("train.py", *workers, f"site={name}", log=name) for name in sites}

    def run(self, argv: list[str], sites: list[str], timeout: float = 120) -> int:
        """A whole run; returns the coordinator's exit code, after everyone has gone."""
        head, workers = self.begin(argv, sites)
        code = head.wait(timeout)
        for worker in workers.values():
            worker.wait(30)
        return code

    def said(self, name: str = "coordinator") -> str:
        return (self.folder / f"{name}.log").read_text()

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "tiny"

    def journal(self, run: str = "tiny") -> list[dict]:
        return records(self.folder / "runs" / run / "journal.jsonl")

    def summary(self, run: str = "tiny") -> dict:
        return json.loads((self.folder / "runs" / run / "summary.json").read_text())

    def theta(self, run: str = "tiny"):
        """theta of the newest stored state, flat."""
        import sync

        states = sync.StateFolder(self.folder / "runs" / run / "state")
        return states.load(states.manifest[-1]["round"])[0]

    def stop(self) -> None:
        """Nothing of ours outlives the test, whatever way it ends; jobs are in no process group of ours, but in our folder."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.wait(10)
        for process in psutil.process_iter(["cwd"]):
            if process.info["cwd"] == str(self.folder) and process.pid != os.getpid():
                with contextlib.suppress(psutil.Error):
                    process.kill()


@pytest.fixture(scope="session")
def warm():
    """What starts our programs quickly; None where it cannot: there they start cold."""
    if sys.platform != "linux":
        yield None
        return
    made = Warm(ENV)
    yield made
    made.close()


@pytest.fixture
def runner(tmp_path, corpus, warm):
    r = Runner(tmp_path, corpus, corpus.parent / "tokens", warm)
    yield r
    r.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed run shows the end of every log and of the journal."""
    report = yield
    if report.failed and (r := item.funcargs.get("runner")):
        for path in [*sorted(r.folder.glob("*.log")), *r.folder.glob("runs/*/journal.jsonl")]:
            report.sections.append((path.name, path.read_text()[-3000:]))
    return report


def processes_in(folder: Path) -> list[str]:
    """Command lines of living processes that work in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        try:
            if process.info["cwd"] == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or [])[:160])
        except psutil.Error:
            continue
    return found


@pytest.fixture
def reference_data() -> Path:
    path = os.environ.get("REFERENCE_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("REFERENCE_DATA is not set: the reference traces are not part of the repository")
    return Path(path)
