"""The shapes of a user's job: which there are, which of them to try, how one is run, what each run must show.

    pairwise()                   shapes in which every two settings that can meet do meet
    lab = Lab(folder, corpus, warm)
    lab.prove(shape)             runs it; raises AssertionError with what broke and the ends of the logs

tests/test_shapes.py tries the pairwise ones, bench/shapes.py as many others as one likes. Coordinator,
torchrun and its workers are processes of their own; they start warm (warm.py), but for those that a caller
wants `cold`: there torchrun is the command that a person types.
"""

import math
import random
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from conftest import CLEAN, DIRTY, ENV, REPO, Runner, processes_in, records
from safetensors import safe_open
from warm import Warm

from journal import decision

# The first value of each is the plain one: where nothing decides, it is taken.
SETTINGS = {
    "sites": (2, 3),
    "ranks": ("one", "two", "first", "last"),  # of each site; first, last: two there alone
    "parallel": ("ddp", "fsdp", "mixed"),  # of several ranks; mixed: fsdp at the first site
    "topology": ("ring", "star"),
    "wire": ("fp32", "bf16", "int8"),
    "outer": ("none", "nesterov"),
    "matrices": ("muon", "adamw"),
    "compile": (False, True),
    "dtype": ("float32", "bfloat16"),
    "checkpointing": (False, True),
    "inner_state": ("keep", "reset"),
    "split_steps": (True, False),
    "clock": ("virtual", "wall"),
}
# What cannot meet: FSDP shards over the ranks of a site, and to be mixed takes two sites of several ranks.
IMPOSSIBLE = (
    {"ranks": "one", "parallel": "fsdp"},
    {"ranks": "one", "parallel": "mixed"},
    {"ranks": "first", "parallel": "mixed"},
    {"ranks": "last", "parallel": "mixed"},
)
NAMES = ("a", "b", "c")
RATES = {"a": 19.2, "b": 12.8, "c": 19.2}  # tokens per virtual second: 3 and 2 steps in a round
ROWS, SEQ_LEN = 12, 16  # of a step: 2 and 3 sites' parts of it can be divided by 2 ranks
BATCHES = {"virtual": 24, "wall": 120}
# No pool of processes and no test of the instruction set, either of which loads torch anew.
COMPILE = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
ROUNDS = 3  # federated ones, at least
SEED, DEAR = 1, 8  # of the covering: found to give few shapes, and few compiled ones, which take longest


@dataclass(frozen=True)
class Shape:
    sites: int = 2
    ranks: str = "one"
    parallel: str = "ddp"
    topology: str = "ring"
    wire: str = "fp32"
    outer: str = "none"
    matrices: str = "muon"
    compile: bool = False
    dtype: str = "float32"
    checkpointing: bool = False
    inner_state: str = "keep"
    split_steps: bool = True
    clock: str = "virtual"

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[: self.sites]

    @property
    def layout(self) -> dict[str, int]:
        """site -> ranks."""
        several = {"one": (), "two": self.names, "first": self.names[:1], "last": self.names[-1:]}[self.ranks]
        return {name: 1 + (name in several) for name in self.names}

    @property
    def held(self) -> dict[str, str]:
        """site -> ddp | fsdp, how its ranks hold the model; alone: one rank."""
        out = {name: self.parallel if ranks > 1 else "alone" for name, ranks in self.layout.items()}
        if self.parallel == "mixed":
            out = {name: "fsdp" if name == self.names[0] else "ddp" for name in self.names}
        return out

    @property
    def reference(self) -> "Shape":
        """The shape with one rank a site, and without what changes the arithmetic by no more than rounding.
        Ring and star keep what a lossy wire left out at different places."""
        plain = replace(self, ranks="one", parallel="ddp", compile=False, checkpointing=False)
        return replace(plain, clock="virtual", topology="ring" if self.wire == "fp32" else self.topology)

    def __str__(self) -> str:
        ranks = "+".join(map(str, self.layout.values()))
        how = [f"{self.sites}sites", ranks, self.parallel, self.topology, self.wire]
        model = ["compiled"] * self.compile + [self.dtype] + ["checkpointed"] * self.checkpointing
        rounds = [self.inner_state, "split" if self.split_steps else "whole", self.clock]
        words = [*how, self.outer, self.matrices, *model, *rounds]
        return "-".join(words)


assert [f.name for f in fields(Shape)] == list(SETTINGS)
# Of several ranks, the plainest two: DDP at the site that sends the results, FSDP2 at the one that joins.
SMALLEST = (Shape(ranks="first"), Shape(ranks="last", parallel="fsdp", topology="star", outer="nesterov"))


def compiler() -> str | None:
    """What torch.compile makes its kernels with on a CPU."""
    return shutil.which("g++") or shutil.which("c++")


# -- which to try --------------------------------------------------------------------------------------------


def possible(settings: dict) -> bool:
    """settings: some of a shape's or all."""
    return not any(settings.items() >= pair.items() for pair in IMPOSSIBLE)


def pairs() -> set[frozenset]:
    """Every two settings that can meet: {(name, value), (name, value)}."""
    every = [(name, value) for name, values in SETTINGS.items() for value in values]
    both = (dict(pair) for pair in combinations(every, 2))
    return {frozenset(pair.items()) for pair in both if len(pair) == 2 and possible(pair)}


def met(settings: dict) -> set[frozenset]:
    return {frozenset(pair) for pair in combinations(settings.items(), 2)}


def missing(shapes: list[Shape]) -> set[frozenset]:
    """The pairs that meet in none of these shapes."""
    return pairs() - {pair for shape in shapes for pair in met(asdict(shape))}


def pairwise() -> list[Shape]:
    """Few shapes, SMALLEST among them, in which every possible pair meets; the same ones at each call.

    Greedy: until no pair is missing, of some shapes that hold a missing pair the one that meets most of
    them; to be compiled must be worth DEAR more. Such a shape takes setting after setting, in random order,
    the value that meets most; of equal ones the plainest.
    """
    shapes, rng = list(SMALLEST), random.Random(SEED)
    while left := missing(shapes):
        seeds = sorted(left, key=lambda pair: sorted(map(str, pair)))
        tries = [_filled(dict(sorted(rng.choice(seeds))), left, rng) for _ in range(40)]
        best = max(tries, key=lambda settings: len(met(settings) & left) - DEAR * settings["compile"])
        shapes.append(Shape(**best))
    return shapes


def _filled(settings: dict, left: set[frozenset], rng: random.Random) -> dict:
    for name in rng.sample([n for n in SETTINGS if n not in settings], len(SETTINGS) - len(settings)):
        given = [settings | {name: value} for value in SETTINGS[name]]
        settings = max((s for s in given if possible(s)), key=lambda s: len(met(s) & left))
    return {name: settings[name] for name in SETTINGS}


def random_shape(rng: random.Random) -> Shape:
    while not possible(settings := {name: rng.choice(values) for name, values in SETTINGS.items()}):
        pass
    return Shape(**settings)


# -- one run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    journal: list[dict]
    summary: dict
    losses: dict[tuple, float]  # (site, round, batch) -> nats per token, in the order of its steps
    theta: torch.Tensor
    held: dict[str, list[dict]]  # site -> lines of its held.jsonl
    kept: dict[str, dict]  # site -> what its inner optimizer's file says of itself
    said: str  # by the coordinator

    @property
    def repeatable(self) -> list[dict]:
        return [{k: v for k, v in r.items() if k != "wall"} for r in self.journal]

    @property
    def decisions(self) -> list[str]:
        """What follows from config and trace alone, whatever the sites compute and by what topology."""
        records = [r for r in self.journal if r["type"] not in ("genesis", "eval")]
        return [decision({k: v for k, v in r.items() if k != "topology"}) for r in records]


def windows(shape: Shape) -> dict[str, list[float]]:
    """The first site trains alone, the second joins it, a third joins in the middle of one of their rounds.
    On the wall clock two start together, or the first had trained everything before the second is there."""
    if shape.clock == "wall":
        return {"a": [DIRTY] * 3 + [CLEAN], "b": [DIRTY] * 3 + [CLEAN], "c": [DIRTY] * 4 + [CLEAN]}
    return {"a": [CLEAN], "b": [DIRTY] * 5 + [CLEAN], "c": [DIRTY] * 9 + [CLEAN]}


def write(runner: Runner, shape: Shape) -> list[str]:
    """The config of a shape; returns the arguments that name it."""
    every = {"checkpointing": shape.checkpointing, "device_batch": 4}
    if shape.compile:  # every piece of one size: one graph
        least = ROWS // max(shape.layout.values()) // (shape.sites if shape.split_steps else 1)
        every["device_batch"] = 1 if least % 2 else 2
    sites = {}
    for name, ranks in shape.layout.items():
        parallel = "fsdp" if shape.held[name] == "fsdp" else "ddp"
        sites[name] = every | {"ranks": ranks, "tokens_per_s": RATES[name], "parallel": parallel}
    per_step = ROWS * SEQ_LEN
    changes = {
        "budget": {"tokens": per_step * BATCHES[shape.clock]},
        "model": {"seq_len": SEQ_LEN, "dtype": shape.dtype, "compile": shape.compile},
        "data": {"tokens_per_step": per_step},
        "optim": {"matrices": shape.matrices} | ({"matrix_lr": 0.003} if shape.matrices == "adamw" else {}),
        "rounds": {"train_s": 30} | {k: getattr(shape, k) for k in ("outer", "inner_state", "split_steps")},
        "sync": {"topology": shape.topology, "wire": shape.wire, "dead_s": 20},  # a busy machine
        "log": {"every_steps": 1},
        "carbon": {"trace": "trace.csv"},  # where a run's folder is belongs to no journal
    }
    if shape.clock == "wall":
        changes["clock"], changes["carbon"]["max_gap_s"] = {"mode": "wall"}, 10
        changes["rounds"] |= {"train_s": 2, "sync_s": 0.5, "commit_every_s": 1, "max_steps": 5}
        changes["rounds"]["grace_s"] = 300  # one compiles in its first round, others have
        for site in sites.values():
            site["tokens_per_s"] = 2000.0
    given = {name: values for name, values in windows(shape).items() if name in sites}
    return runner.write(sites, given, step_s=1 if shape.clock == "wall" else 10, **changes)


class Lab:
    """Runs shapes and keeps the references, which many share. Several threads may use one lab."""

    def __init__(self, folder: Path, corpus: Path, warm: Warm | None):
        """warm: None: everything starts cold."""
        self.folder, self.corpus, self.warm = folder, corpus, warm
        self.compiling: Warm | None = None  # has what compiles loaded, too
        self.runners: list[Runner] = []
        self._references: dict[Shape, Future] = {}
        self._lock = threading.Lock()

    def runner(self, compiles: bool) -> Runner:
        with self._lock:
            if compiles and self.warm and not self.compiling:
                self.compiling = Warm(ENV, ("torch._inductor.compile_fx",))
            folder = self.folder / f"{len(self.runners):03d}"
            folder.mkdir(parents=True)
            warm = self.compiling if compiles else self.warm
            runner = Runner(folder, self.corpus, self.corpus.parent / "tokens", warm)
            runner.env |= COMPILE | {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled")}
            runner.env["WARM_PYCACHE"] = str(self.folder / "pycache")
            self.runners.append(runner)
        return runner

    def run(self, shape: Shape, cold: bool = False, fault: str = "none", check: bool = False) -> Outcome:
        """cold: torchrun and its workers load torch anew. fault: what befalls the first site (faulty.py)."""
        runner = self.runner(shape.compile)
        argv = write(runner, shape)
        try:
            self._run(runner, shape, argv, cold, fault)
            if check:
                said = runner.call("coordinator.py", "check", "runs/tiny")
                assert said.returncode == 0 and "BROKEN" not in said.stdout, said.stdout
            return outcome(runner, shape)
        except BaseException as error:
            error.add_note(f"{shape}\n" + ends(runner))
            raise
        finally:
            runner.stop()

    def _run(self, runner: Runner, shape: Shape, argv: list[str], cold: bool, fault: str) -> None:
        early = shape.clock == "wall"  # they are ready when windows open
        sites = self._sites(runner, shape, argv, cold, fault) if early else []
        head = runner.start("coordinator.py", *argv, log="coordinator")
        sites = sites or self._sites(runner, shape, argv, cold, fault)
        codes = [head.wait(600 if shape.compile else 120), *(site.wait(30) for site in sites)]
        assert codes == [0] * len(codes), f"exit codes of coordinator and sites: {codes}"
        until = time.monotonic() + 10
        while stray := processes_in(runner.folder):
            assert time.monotonic() < until, f"left behind: {stray}"
            time.sleep(0.05)

    def _sites(self, runner: Runner, shape: Shape, argv: list[str], cold: bool, fault: str) -> list:
        """One rank needs no torchrun (parallel.Ranks), and starts sooner without."""
        started = []
        for name, ranks in shape.layout.items():
            own = [str(REPO / "train.py"), *argv, f"site={name}"]
            if fault != "none" and name == shape.names[0]:
                own = [str(REPO / "tests/faulty.py"), "0", fault, "train.py", *own[1:]]
            if ranks == 1:
                started.append(runner.start(*own, log=name))
            else:
                agent = ["--standalone", f"--nproc_per_node={ranks}"]
                started.append(runner.start("torchrun", *agent, *own, log=name, cold=cold))
        return started

    def reference(self, shape: Shape) -> Outcome:
        with self._lock:
            ours = shape.reference not in self._references
            kept = self._references.setdefault(shape.reference, Future())
        if ours:
            try:
                kept.set_result(self.run(shape.reference))
            except BaseException as error:
                kept.set_exception(error)
        return kept.result()

    def prove(self, shape: Shape, cold: bool = False) -> None:
        """All that a shape must show. cold: its first run."""
        once = self.run(shape, cold, check=True)
        sound(shape, once)
        if shape.clock == "wall":
            return  # when a round ends is up to the machine: nothing else to compare with
        one = self.reference(shape)
        twice = one if shape == shape.reference else self.run(shape)
        assert once.repeatable == twice.repeatable, f"{shape}: twice run, two journals"
        assert torch.equal(once.theta, twice.theta), f"{shape}: twice run, two models"
        alike(shape, once, one)

    def close(self) -> None:
        for runner in self.runners:
            runner.stop()
        if self.compiling:
            self.compiling.close()
            self.compiling = None


def outcome(runner: Runner, shape: Shape) -> Outcome:
    folder = runner.run_dir
    steps = [(name, r) for name in shape.names for r in records(folder / f"{name}.jsonl")]
    steps.sort(key=lambda step: (step[1]["t_s"], step[0]))
    losses = {(name, r["round"], r["batch"]): r["loss"] for name, r in steps}
    kept = {}
    for name in shape.names:
        with safe_open(max((folder / "sites" / name).glob("inner-*-0.safetensors")), framework="pt") as file:
            kept[name] = file.metadata()
    held = {name: records(folder / "sites" / name / "held.jsonl") for name in shape.names}
    return Outcome(runner.journal(), runner.summary(), losses, runner.theta(), held, kept, runner.said())


def ends(runner: Runner) -> str:
    """The end of every log and of the journal."""
    paths = [*sorted(runner.folder.glob("*.log")), *runner.folder.glob("runs/*/journal.jsonl")]
    return "\n".join(f"--- {path.name}\n{path.read_text()[-2500:]}" for path in paths)


# -- what it must show ---------------------------------------------------------------------------------------


def sound(shape: Shape, run: Outcome) -> None:
    """What holds of one run alone."""
    commits = [r for r in run.journal if r["type"] == "commit"]
    attempts = {r["round"]: r for r in run.journal if r["type"] == "attempt"}
    for name, ranks in shape.layout.items():  # or it is not the shape we think
        lines = [line for line in run.said.splitlines() if line.startswith(f"{name} ")]
        greeted = [line for line in lines if "rank(s)" in line]
        assert greeted and all(f" {ranks} rank(s)" in line for line in greeted), (shape, greeted)
        about = {k: run.kept[name][k] for k in ("ranks", "parallel")}
        assert about == {"ranks": str(ranks), "parallel": shape.held[name]}, (shape, name)
    assert len(attempts) >= ROUNDS, f"{shape}: federated {sorted(attempts)}"
    assert set(attempts) <= {r["round"] for r in commits}
    assert {m for r in attempts.values() for m in r["members"]} == set(shape.names)
    assert not [r for r in run.journal if r["type"] == "fault"]
    assert run.summary["tokens"] == sum(r["tokens"] for r in commits) == ROWS * SEQ_LEN * BATCHES[shape.clock]
    stored = {r["round"]: r["digest_theta"] for r in run.journal if r["type"] == "store"}
    for number, attempt in attempts.items():
        digests = {x["digest"] for m in attempt["members"] for x in run.held[m] if x["round"] == number + 1}
        assert digests == {stored[number + 1]}, (shape, number, digests, stored)
    losses = list(run.losses.values())
    quarter = len(losses) // 4
    assert all(map(math.isfinite, losses)), f"{shape}: {losses}"
    assert mean(losses[-quarter:]) < 0.9 * mean(losses[:quarter]), f"{shape}: {losses}"
    if shape.clock == "virtual":
        assert next(r["mode"] for r in run.journal if r["type"] == "open") == "local"
        members = {r["round"]: r["members"] for r in run.journal if r["type"] == "open"}
        joined = {m for number, r in attempts.items() for m in r["members"] if m not in members[number]}
        assert joined == set(shape.names[2:]), "the third site joins in the middle of a round"


def alike(shape: Shape, run: Outcome, one: Outcome) -> None:
    """What holds of a run and that of its reference, whose sites have one rank."""
    assert run.decisions == one.decisions, f"{shape}: who trains what is not up to the ranks"
    assert list(run.losses) == list(one.losses)
    for steps, bound in bounds(shape).items():
        off = furthest(run, one, steps)
        assert off < bound, f"{shape}: {off:.1e} from one rank a site over {steps} steps, bound {bound:.0e}"
    if exact(shape):
        assert torch.equal(run.theta, one.theta), f"{shape} must give the bits of {shape.reference}"


def exact(shape: Shape) -> bool:
    """Whether it does the sums of its reference in the same order."""
    return shape.ranks == "one" and not shape.compile


def bounds(shape: Shape) -> dict[int, float]:
    """The first so many steps -> how far their losses may be from the reference's, relative."""
    every = BATCHES["virtual"]
    if shape.dtype == "bfloat16":  # rounds to 2e-3, ranks and kernels each otherwise; measured 1.5e-3
        return {5: 1e-3, every: 5e-3}
    if shape.matrices == "muon":  # as in test_ranks.py: rounding grows, tenfold in some four steps. Measured
        return {10: 1e-4, every: 5e-3}  # 2e-6, 2e-3; 3e-3 at once where two ranks step on other rows
    return {every: 1e-5}


def furthest(run: Outcome, one: Outcome, steps: int) -> float:
    """The largest relative difference of the losses of the first steps."""
    both = list(zip(run.losses.values(), one.losses.values()))[:steps]
    return max(abs(x - y) / y for x, y in both)
