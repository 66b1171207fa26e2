"""A rehearsal of full scale: the shipped configs with everything that will be on, only smaller and faster, and real faults.

    make rehearsal                          d20 with all faults, then the paper's configs; at most 6 minutes on 2 idle cores
    python bench/rehearsal.py --short       d20 with one kill; at most 2 minutes
    python bench/rehearsal.py --json        one JSON object on stdout, all else on stderr
    python bench/rehearsal.py --keep DIR    leaves the scratch folder there, logs and all

configs/d20.yaml, paper.yaml, paper_two_site.yaml, paper_centralized.yaml and ours.yaml are loaded as they are shipped. What
differs is key=value on the command lines, from one table (SCALE) that is printed first: sizes, and the pace of the day. The rest,
such as bf16, torch.compile, the wire format and the data source, is the shipped one.

d20 is started by hand, as the README says: data.py prepare at the head node and at each site, keys, coordinator.py, a torchrun a
site in a folder of its own with only its keys, one site on two nodes. Then, each at a moment that the journal shows to be the right
one: a rank is killed, a site, the head node; Ctrl-C, and the site again on fewer ranks; a window closes within a round. At
the end the whole budget is committed, the invariants hold, and the model is exported, opened by transformers, and speaks.

Exit code 0 if everything held, 1 with one line and the ends of all logs otherwise. A hub on loopback serves the text.
"""

import argparse
import io
import itertools
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import environments
from hub import Hub
from scene import REPO, Refuted, Scene, Tail, free_port, kill_tree, rank_of, require

import config
from config import Parser

PYTHON, TORCHRUN = sys.executable, [sys.executable, "-m", "torch.distributed.run"]
CONFIGS = ("paper", "ours", "paper_two_site", "paper_centralized")
PACE = 300  # seconds of the day in one: an interval of the trace is one second, the day 3.6 minutes
DAYS = 4  # the trace repeats, so that a slow machine never runs out of windows
TRAIN_S = {"full": 100, "short": 25}  # the budget: what the measured rate makes in so long
SAMPLE_S = 300  # of the trace
BEGIN = {"full": "19:30", "short": "02:55"}  # where the day begins; the latter just before two windows overlap for five hours
START_S, WINDOW_S, BACK_S, END_S = 300, 420, 240, 600  # bounds of waits, real seconds
PAPER = REPO / "configs/paper.yaml"
PAPER_STEPS, PAPER_STEP_S = 40, 150  # on the virtual clock: three steps a round of 515 s or 570 s
FILES, DOCUMENTS = 4, 150  # on the hub
PROMPT = "import sys\n\ndef main("

# key -> what it is in the rehearsal, and why. Numbers of seconds that belong to the day are divided by PACE.
SCALE = {
    "model.depth": (2, "width 128 and one head follow from it, as 1,280 and 10 from 20"),
    "model.seq_len": (64, ""),
    "model.vocab": (512, "the tokenizer's"),
    "data.tokenizer": ("bpe-512", "trained on what the hub serves"),
    "data.shards": (3, f"of the {FILES} files on the hub"),
    "data.tokens_per_step": (384, "6 rows of a sequence, 3 a rank"),
    "data.val_tokens": (4096, ""),
    "eval.tokens": (1024, ""),
    "budget.tokens": (None, "so many seconds at the rate measured first"),
    "sites.*.tokens_per_s": (None, "measured; on the virtual clock a step takes 150 s"),
    "sites.*.device": ("cpu", "torch sees no GPU here"),
    "sites.*.device_batch": (1, "several pieces a step"),
    "sites.*.ranks": (2, "six on this machine"),
    "sites.*.threads_local": (1, "a core a rank"),
    "sites.*.energy": ("model", "the sites share a machine"),
    "sites.*.parallel": (None, "fsdp at one site"),
    "sync.port": (None, "a free one; each site is told"),
    "carbon.trace": (None, "the same day, faster and repeated"),
    "clock.start": ("2026-01-11T21:30:00Z", "just before two windows overlap"),
    "rounds.train_s": ("pace", ""),
    "rounds.sync_s": ("pace", ""),
    "rounds.commit_every_s": ("pace", ""),
    "policy.off_delay_s": ("pace", ""),
}
VIRTUAL_ONLY = ("clock.start",)
D20_ONLY = ("model.vocab", "data.shards", "sync.port", "carbon.trace", "sites.*.energy", *(k for k, v in SCALE.items() if v[0] == "pace"))


@dataclass
class SiteAt:
    """A site of the d20 run: how it is started, and its torchruns, one a node."""

    name: str
    parallel: str
    nodes: int
    ranks: int = 2
    torchruns: list = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [self.name] if self.nodes == 1 else [f"{self.name}-node{i}" for i in range(self.nodes)]


class Stage:
    """One line of the report."""

    def __init__(self, name: str):
        self.name, self.facts, self.seconds = name, [], 0.0

    def add(self, text: str) -> None:
        self.facts.append(text)

    def line(self) -> str:
        return f"  {self.name:32} {self.seconds:6.1f} s  {'; '.join(self.facts)}"


def overrides(path: Path, values: dict, paced: bool) -> list[str]:
    """SCALE for one config as key=value; `values`: what is known only now. paced: the day is real time, and passes faster."""
    shipped, out = config.load([str(path), "only=[]"]), {}
    for key, (value, _) in SCALE.items():
        if value is None or key in values or (key in D20_ONLY if not paced else key in VIRTUAL_ONLY):
            continue
        if key == "sites.*.device" and sees_gpu():
            continue
        if value == "pace":
            section, name = key.split(".")
            value = shipped[section][name] / PACE
        out[key] = value
    return [f"{k}={v}" for key, v in (out | values).items()
            for k in ([key.replace("*", site) for site in shipped.sites] if "*" in key else [key])]  # fmt: skip


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def differences(path: Path, changes: list[str]) -> dict[str, tuple]:
    """key -> (as shipped, here) of every key that `changes` change; where all sites are alike, sites.*."""

    def flat(value, key: str = "") -> dict:
        if not isinstance(value, dict):
            return {key: value}
        return {k: v for name, part in value.items() for k, v in flat(part, f"{key}.{name}" if key else name).items()}

    before, after = (flat(config.plain(config.load([str(path), *more]))) for more in ([], changes))
    changed, out = {k: (before[k], after[k]) for k in after if before[k] != after[k]}, {}
    for key, pair in changed.items():
        parts = key.split(".")
        out.setdefault("sites.*." + parts[2] if parts[0] == "sites" else key, pair)
    return out


def table(changes: dict[str, tuple], paper: dict[str, tuple]) -> list[str]:
    """What is scaled, a line a key. Raises Refuted for a difference that SCALE does not know of."""
    lines = [f"  {'scaled':24} {'as shipped':>38}    here"]
    for key, (was, now) in (changes | {k: v for k, v in paper.items() if k in VIRTUAL_ONLY}).items():
        require(key in SCALE, f"{key} differs from what is shipped, {was} and {now}, and SCALE does not say so")
        why = SCALE[key][1] or (f"/ {PACE}" if SCALE[key][0] == "pace" else "")
        short = now if not isinstance(now, str) or "/" not in now else Path(now).name
        lines.append(f"  {key:24} {was!s:>38} -> {short!s:22} {why}".rstrip())
    for key in paper:
        require(key in SCALE, f"{key} of the paper's configs differs from what is shipped, and SCALE does not say so")
    return lines


def paced_trace(source: Path, into: Path, start: str, first: str) -> None:
    """A trace whose day passes PACE times as fast, from clock.start on, again and again; it begins at the hour `first` of the day."""
    header, *rows = [line.split(",") for line in source.read_text().splitlines()]
    at = next(i for i, row in enumerate(rows) if first in row[0])
    day = rows[at:] + rows[:at]
    begin, step = datetime.fromisoformat(start), timedelta(seconds=SAMPLE_S / PACE)
    require(step == timedelta(seconds=1), f"PACE={PACE} must make a sample of {SAMPLE_S} s one second: traces have whole seconds")
    stamps = ((begin + i * step).strftime("%Y-%m-%dT%H:%M:%SZ") for i in itertools.count())
    into.write_text("\n".join([",".join(header), *(",".join([next(stamps), *row[1:]]) for _ in range(DAYS) for row in day)]) + "\n")


def texts() -> dict[str, bytes]:
    """What the hub serves: the standard library's text as parquet files, column `text`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import data

    documents, files = [text for _, text in itertools.islice(data.documents("stdlib"), DOCUMENTS)], {}
    for i in range(FILES):
        into = io.BytesIO()
        pq.write_table(pa.table({"text": documents[i::FILES]}), into)
        files[f"shard_{i:05d}.parquet"] = into.getvalue()
    return files


class Rehearsal:
    def __init__(self, scene: Scene, short: bool, say):
        self.scene, self.short, self.say, self.stages = scene, short, say, []
        self.facts: dict = {"form": "short" if short else "full"}

    @contextmanager
    def stage(self, name: str):
        """A part of the rehearsal, timed, that ends in one line of the report."""
        stage, began = Stage(name), time.monotonic()
        self.stages.append(stage)
        try:
            yield stage
        except Refuted as error:
            raise Refuted(f"{name}: {error}") from None
        finally:
            stage.seconds = time.monotonic() - began
        self.say(stage.line())

    def all(self) -> None:
        hub = Hub(texts())
        self.scene.env["HF_ENDPOINT"] = hub.url
        try:
            d20 = D20(self)
            d20.all()
            if not self.short:
                paper(self, d20.head)
        finally:
            hub.close()
        self.facts["left_behind"] = left = [" ".join(p.cmdline())[-80:] for p in self.scene.processes()]
        require(not left, f"{len(left)} processes stayed behind: {left[:1]}")


class D20:
    """configs/d20.yaml on the wall clock, every process started by hand."""

    config = REPO / "configs/d20.yaml"

    def __init__(self, rehearsal: Rehearsal):
        self.r, self.scene = rehearsal, rehearsal.scene
        self.sites = {s.name: s for s in (SiteAt("california", "ddp", 1), SiteAt("south_australia", "fsdp", 1),
                                          SiteAt("texas", "ddp", 2))}  # fmt: skip
        self.head = self.scene.folder / "head"
        self.run = self.head / "runs/d20"
        self.journal = Tail(self.run / "journal.jsonl")
        self.head.mkdir()
        for name in self.sites:
            (self.scene.folder / name).mkdir()
        shipped = config.load([str(self.config)])
        trace = self.scene.folder / "day.csv"
        paced_trace(REPO / shipped.carbon.trace, trace, shipped.clock.start, BEGIN["short" if rehearsal.short else "full"])
        self.values = {"carbon.trace": trace, "sync.port": free_port(), "sites.south_australia.parallel": "fsdp",
                       "budget.tokens": 384 * 2400, "sites.*.tokens_per_s": 5000}  # fmt: skip
        self.changes = overrides(self.config, self.values, paced=True)

    # -- before it starts ---------------------------------------------------------------------------------------------

    def all(self) -> None:
        self.measure()
        self.prepare()
        with self.r.stage("d20 starts") as stage:
            self.start_head()
            for site in self.sites.values():
                self.start_site(site)
            first = self.until("the first round is committed", lambda: self.records("commit"), START_S)[0]
            stage.add(f"coordinator and 4 torchruns; first commit {first['t_s']:.0f} s into the day")
        if self.r.short:
            self.lose_rank(self.sites["south_australia"])
        else:
            self.interrupt_site(self.sites["california"])
            self.lose_rank(self.sites["south_australia"])
            self.lose_site(self.sites["texas"])
            self.lose_head()
        self.end()
        self.use()

    def measure(self) -> None:
        """Tokens/s by bench/train.py, which also fills the compiler's cache; the budget follows from it."""
        with self.r.stage("measured: bench/train.py") as stage:
            argv, cwd = [self.config, *self.changes, "--json", "--threads", "1", "--steps", "10"], self.scene.folder
            runs = {"alone": [PYTHON], "fsdp, 2 ranks": [*TORCHRUN, "--standalone", "--nproc_per_node=2"]}
            site = {"alone": "california", "fsdp, 2 ranks": "south_australia"}
            rates = {}
            for name, program in runs.items():
                out = self.scene.call("measure", [*program, REPO / "bench/train.py", *argv, f"site={site[name]}"], cwd, 600)
                rates[name] = json.loads(out.strip().splitlines()[-1])["tokens_per_s"]
            rate, steps = round(rates["alone"]), max(1, round(TRAIN_S[self.r.facts["form"]] * rates["alone"] / 384))
            self.values |= {"budget.tokens": 384 * steps, "sites.*.tokens_per_s": rate}
            self.changes = overrides(self.config, self.values, paced=True)
            stage.add(", ".join(f"{name} {value:,.0f} tokens/s" for name, value in rates.items()) + f"; budget {steps:,} steps")
        scaled = differences(self.config, self.changes)
        self.r.facts["scaled"] = {k: [str(a), str(b)] for k, (a, b) in scaled.items()}
        for line in table(scaled, differences(PAPER, overrides(PAPER, paper_values(), paced=False))):
            self.r.say(line)

    def prepare(self) -> None:
        """data.py prepare at the head node and at each site, as far apart as machines are; then the keys."""
        with self.r.stage("data.py prepare; keys") as stage:
            places = ["head", *self.sites]
            started = {n: self.scene.start(f"prepare-{n}", [PYTHON, REPO / "data.py", "prepare", self.config, *self.changes],
                                           self.scene.folder / n) for n in places}  # fmt: skip
            self.scene.leaves(*(f"prepare-{n}" for n in places))
            for name, process in started.items():
                code = self.scene.wait(f"prepare-{name}", process, 240)
                require(code == 0, f"prepare at {name} ended with exit code {code}")
            said = [self.scene.said(f"prepare-{n}").strip().splitlines()[-1].partition(": ")[2] for n in places]
            require(len(set(said)) == 1, f"{len(places)} machines prepared different corpora: {set(said)}")
            self.scene.call("keys", [PYTHON, REPO / "coordinator.py", "keys", self.config, *self.changes], self.head)
            for name in self.sites:
                keys = self.scene.folder / name / "runs/d20/keys"
                keys.mkdir(parents=True)
                for file in ("coordinator.key", f"{name}.key_secret"):
                    (keys / file).write_bytes((self.run / "keys" / file).read_bytes())
                    (keys / file).chmod(0o600)
            stage.add(f"{len(places)} times the same: {said[0]}")

    # -- processes and the journal ------------------------------------------------------------------------------------

    def start_head(self) -> None:
        command = [PYTHON, REPO / "coordinator.py", self.config, *self.changes, "sync.host=127.0.0.1"]
        self.scene.start("head", command, self.head)

    def start_site(self, site: SiteAt) -> None:
        """Its torchruns, one a node, in the site's own folder."""
        meet = ["--standalone"]
        if site.nodes > 1:
            meet = [f"--nnodes={site.nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}",
                    f"--rdzv_id={site.name}", "--local_addr=127.0.0.1"]  # fmt: skip
        command = [*TORCHRUN, *meet, f"--nproc_per_node={site.ranks // site.nodes}", REPO / "train.py", self.config,
                   *self.changes, f"site={site.name}", "sync.host=127.0.0.1", f"sites.{site.name}.ranks={site.ranks}"]  # fmt: skip
        site.torchruns = [self.scene.start(name, command, self.scene.folder / site.name) for name in site.names]

    def records(self, *types: str, since: int = 0, **fields) -> list[dict]:
        """Of the journal, those of some types whose fields are so, from record number `since` on."""
        return [r for r in self.journal.records() if r["n"] >= since and r["type"] in types
                and all(r.get(k) == v for k, v in fields.items())]  # fmt: skip

    def until(self, what: str, true, limit_s: float):
        def checked():
            ended = self.records("end")
            require(not ended, f"the run ended before {what}: {ended and ended[0]['reason']}; raise TRAIN_S")
            return true()

        return self.scene.until(what, checked, limit_s)

    @property
    def now(self) -> int:
        """The number of the next record."""
        return len(self.journal.records())

    def training(self, site: SiteAt, federated: bool = True) -> dict:
        """Waits for a round to be open that this site has a part in; its `open` record."""

        def opened() -> dict | None:
            r = self.journal.open_round()
            return r if r and site.name in r["members"] and (r["mode"] == "federated" or not federated) else None

        kind = "a federated round" if federated else "a round"
        return self.until(f"{kind} with {site.name} is open", opened, WINDOW_S)

    def fate(self, opened: dict, site: SiteAt, since: int) -> str:
        """What the journal says became of a round, and of the site's part in it."""
        end = self.until(
            f"round {opened['round']} is over",
            lambda: self.records("commit", "cancel", "rollback", since=since, round=opened["round"]),
            BACK_S,
        )[0]
        if end["type"] != "commit":
            return f"round {opened['round']} void ({end.get('reason', 'rolled back')}), {end['tokens']:,} tokens trained again"
        used = any(b > a for a, b in end["batches"].get(site.name, []))
        wasted = end.get("wasted", {}).get(site.name, 0)
        return f"round {opened['round']} committed {'with' if used else 'without'} its part, {wasted:,} tokens wasted"

    def bring_back(self, site: SiteAt, stage: Stage) -> None:
        """Start a site again, and wait until a round with batches of its own is committed."""
        began, since = time.monotonic(), self.now
        self.start_site(site)
        on = self.until(f"{site.name} is on again", lambda: self.records("site", since=since, site=site.name, to="on"), WINDOW_S)[0]
        ready_s = time.monotonic() - began
        commit = self.until(
            f"a round with batches of {site.name} is committed",
            lambda: [r for r in self.records("commit", since=on["n"]) if any(b > a for a, b in r["batches"].get(site.name, []))],
            WINDOW_S,
        )[0]
        stage.add(f"back after {ready_s:.0f} s with {site.ranks} rank(s), its part in round {commit['round']}")

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def strike(self, site: SiteAt, stage: Stage, deed, federated: bool = True) -> list[int]:
        """Do something to a site within a round of its own, wait until the journal knows and its torchruns have ended."""
        opened = self.training(site, federated)
        since, leaving = self.now, self.scene.leaves(*site.names)
        deed()
        seen = self.until(
            f"the journal says that {site.name} is gone",
            lambda: [r for r in self.records("fault", "site", since=since, site=site.name) if r["type"] == "fault" or r["to"] == "off"],
            BACK_S,
        )[0]
        says = f"{seen['kind']}: {seen['action']}" if seen["type"] == "fault" else seen["reason"]
        stage.add(f"in {opened['mode']} round {opened['round']} -> {says}")
        stage.add(self.fate(opened, site, since))
        return [self.scene.wait(name, process, BACK_S) for name, process in zip(site.names, leaving)]

    def lose_rank(self, site: SiteAt) -> None:
        with self.r.stage(f"kill -9, rank 1 of {site.name}") as stage:
            codes = self.strike(site, stage, lambda: self.rank(site, 1).kill())
            require(0 not in codes, f"torchrun of {site.name} ended with exit codes {codes} though a rank was killed")
            self.bring_back(site, stage)

    def rank(self, site: SiteAt, rank: int):
        found = next((p for torchrun in site.torchruns if (p := rank_of(torchrun, rank))), None)
        require(found, f"rank {rank} of {site.name} has no process")
        return found

    def lose_site(self, site: SiteAt) -> None:
        with self.r.stage(f"kill -9, all of {site.name}") as stage:
            self.strike(site, stage, lambda: [kill_tree(torchrun) for torchrun in site.torchruns])
            self.bring_back(site, stage)

    def interrupt_site(self, site: SiteAt) -> None:
        """Ctrl-C at the terminal of its torchrun; then on as many ranks less one."""
        with self.r.stage(f"Ctrl-C, {site.name}") as stage:
            codes = self.strike(site, stage, lambda: os.killpg(site.torchruns[0].pid, signal.SIGINT), federated=False)
            stage.add(f"torchrun's exit code {codes[0]}")
            site.ranks -= 1
            self.bring_back(site, stage)
            require(f"{site.ranks} rank(s)" in self.scene.said("head"), f"the coordinator did not hear of {site.ranks} rank(s)")

    def lose_head(self) -> None:
        with self.r.stage("kill -9, the head node") as stage:
            opened = self.training(self.sites["texas"])
            since, (head,) = self.now, self.scene.leaves("head")
            head.kill()
            head.wait()
            self.start_head()
            resume = self.until("the head node resumes", lambda: self.records("resume", since=since), BACK_S)[0]
            stage.add(self.fate(opened, self.sites["texas"], since))
            self.until("a round opened after the resume is committed",
                       lambda: {r["round"] for r in self.records("open", since=resume["n"])}
                       & {r["round"] for r in self.records("commit", since=resume["n"])}, WINDOW_S)  # fmt: skip
            lost = self.records("fault", since=since)
            stage.add(f"resumed at round {resume['round']}; {len(lost)} faults with it")

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        with self.r.stage("to the end of the budget") as stage:
            self.scene.until("the run ends", lambda: self.records("end"), END_S)
            names = ["head", *(name for site in self.sites.values() for name in site.names)]
            for name, process in zip(names, self.scene.leaves(*names)):
                require((code := self.scene.wait(name, process, 60)) == 0, f"{name} ended with exit code {code}")
            said = check(self.scene, self.config.stem, self.head, self.run)
            summary = json.loads((self.run / "summary.json").read_text())
            budget = self.values["budget.tokens"]
            require(summary["tokens"] == budget, f"{summary['tokens']:,} of {budget:,} tokens are committed")
            modes = [r["mode"] for r in self.records("open")]
            require("federated" in modes, "no round was federated")
            self.r.facts |= {k: summary[k] for k in ("tokens", "rounds", "wasted_tokens", "starts", "val_loss")}
            self.r.facts |= {"faults": len(self.records("fault")), "wires": sorted({r["wire"] for r in self.records("attempt")})}
            stage.add(f"exit code 0 everywhere; {summary['rounds']} rounds, {summary['tokens']:,} tokens, "
                      f"{summary['wasted_tokens']:,} wasted; wire {', '.join(self.r.facts['wires'])}; {said}")  # fmt: skip
        if not self.r.short:
            with self.r.stage("windows that closed in a round") as stage:
                require(closed := self.closed_early(), "no window closed within a round")
                self.r.facts["closed_early"] = len(closed)
                stage.add(f"{len(closed)}, e.g. {closed[0]}")

    def closed_early(self) -> list[str]:
        """Sites whose window ended before the planned end of a round of theirs that was committed with their part."""
        out, opened = [], {}
        committed = {r["round"]: r for r in self.records("commit")}
        for r in self.journal.records():
            if r["type"] == "open":
                opened = r
            elif r["type"] == "site" and r["to"] == "off" and "MCI" in r["reason"] and opened:
                part = committed.get(opened["round"], {}).get("batches", {}).get(r["site"], [])
                if r["site"] in opened["members"] and any(b > a for a, b in part):
                    out.append(f"{r['site']} ({r['reason']}) off at {r['t_s']:.1f} s, round {opened['round']} "
                               f"planned to {opened['end_s']:.1f} s, committed with its part")  # fmt: skip
        return out

    def use(self) -> None:
        """What a user does with the model of a run."""
        self.scene.env["HF_HUB_OFFLINE"] = "1"
        with self.r.stage("export, generate, figures") as stage:
            call = self.scene.call
            call("export", [PYTHON, REPO / "export.py", "d20", "d20-hf", "--to", "hf"], self.head)
            greedy = ["--prompt", PROMPT, "--temperature", "0", "--tokens", "32"]
            text = call("generate", [PYTHON, REPO / "generate.py", "d20", *greedy], self.head)
            require(text.startswith(PROMPT) and len(text) > len(PROMPT) + 1, f"generate.py printed {text!r}")
            call("figures", [PYTHON, REPO / "figures.py", "runs/d20"], self.head)
            drawn = sorted(p.name for p in (self.run / "figures").glob("*.png"))
            require(drawn, "figures.py drew nothing")
            stage.add(f"{len(text) - len(PROMPT) - 1} characters after the prompt; {len(drawn)} figures")
        if self.r.short and not (environments.folder("transformers") / ".ready").exists():
            self.r.facts["transformers"] = None
            self.r.say("  transformers is not installed here, and not tried in the short form")
            return
        python = environments.make("transformers") / "python"
        with self.r.stage("transformers opens it") as stage:
            call("transformers", [python, "-P", REPO / "bench/in_transformers.py", PROMPT, "d20-hf"], self.head)
            self.r.facts["transformers"] = furthest = self.same_as_transformers(text)
            stage.add(f"NanoChatForCausalLM; logits within {furthest:.0e} of ours, the same 32 greedy tokens")

    def same_as_transformers(self, text: str) -> float:
        """The largest difference of a logit. text: our greedy text of the run."""
        import torch

        import generate

        theirs = json.loads((self.head / "results.json").read_text())["d20-hf"]
        shape, theta, tokenizer = generate.load(str(self.head / "d20-hf"), None)
        ids, model = tokenizer.encode(PROMPT).ids, generate.GPT(shape)
        generate.sync.Flat(model).adopt(model, theta)
        require(theirs["class"] == "NanoChatForCausalLM" and theirs["ids"] == ids, f"it is a {theirs['class']}, ids {theirs['ids']}")
        with torch.inference_mode():
            furthest = (torch.tensor(theirs["logits"]) - model(torch.tensor([ids]))[0]).abs().max().item()
        greedy = list(itertools.islice(generate.sample(model, ids, 0.0, None, 0), len(theirs["tokens"])))
        require(furthest < 1e-4, f"logits differ by {furthest}")
        require(greedy == theirs["tokens"] and text == theirs["text"] + "\n", f"greedy: {text!r}, theirs {theirs['text']!r}")
        return furthest


def check(scene: Scene, name: str, cwd: Path, run: Path) -> str:
    out = scene.call(f"check-{name}", [PYTHON, REPO / "coordinator.py", "check", run], cwd)
    require("BROKEN" not in out and "ok" in out, f"check of {name}: {[x for x in out.splitlines() if 'BROKEN' in x]}")
    stored = json.loads((run / "state/manifest.json").read_text())
    require(stored, f"{name} has no stored state")
    return f"check holds, {len(out.splitlines())} lines"


# ---------------------------------------------------------------------------------------------------------------------
# The paper's configs


def paper_values() -> dict:
    tokens = SCALE["data.tokens_per_step"][0]
    return {"budget.tokens": tokens * PAPER_STEPS, "sites.*.tokens_per_s": tokens / PAPER_STEP_S, "sites.california.parallel": "fsdp"}


def paper(rehearsal: Rehearsal, head: Path) -> None:
    """Each of CONFIGS by launch.py on its virtual clock. Their text is what the head node has downloaded."""
    scene, cwd = rehearsal.scene, rehearsal.scene.folder / "paper"
    (cwd / "data/fineweb-edu").mkdir(parents=True)
    (cwd / "traces").symlink_to(REPO / "traces")
    for path in head.glob("data/*/text/*.parquet"):
        (cwd / "data/fineweb-edu" / path.name).write_bytes(path.read_bytes())
    rehearsal.facts["paper"] = {}
    for name in CONFIGS:
        path, run = REPO / f"configs/{name}.yaml", cwd / "runs" / name
        with rehearsal.stage(f"{name}, virtual clock") as stage:
            scene.call(name, [PYTHON, REPO / "launch.py", path, *overrides(path, paper_values(), paced=False)], cwd, 300)
            said, summary = check(scene, name, cwd, run), json.loads((run / "summary.json").read_text())
            require(summary["steps"] == PAPER_STEPS, f"{summary['steps']} of {PAPER_STEPS} steps are committed")
            modes = [r["mode"] for r in Tail(run / "journal.jsonl").records() if r["type"] == "open"]
            rehearsal.facts["paper"][name] = {m: modes.count(m) for m in ("local", "federated")}
            stage.add(f"exit code 0; {modes.count('local')} local and {modes.count('federated')} federated rounds, "
                      f"{summary['wasted_tokens']:,} tokens wasted; {said}")  # fmt: skip
            alone = len(summary["sites"]) == 1
            require(alone or "federated" in modes, f"{name} has several sites, and no round was federated")


def main(argv: list[str]) -> int:
    parser = Parser(prog="bench/rehearsal.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="d20 with one kill only")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    parser.add_argument("--keep", help="leave the scratch folder here")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever starts us in the background has us ignore Ctrl-C, and our children too
        signal.signal(number, signal.default_int_handler)
    began, out = time.monotonic(), sys.stderr if args.json else sys.stdout
    with Scene(args.keep) as scene:
        rehearsal = Rehearsal(scene, args.short, lambda text: print(text, file=out, flush=True))
        try:
            rehearsal.all()
            why = ""
        except Refuted as error:
            why = str(error)
            print(scene.tails(), file=sys.stderr, flush=True)
    wall_s = time.monotonic() - began
    stages = [{"name": s.name, "facts": s.facts, "seconds": round(s.seconds, 1)} for s in rehearsal.stages]
    if args.json:
        print(json.dumps({"held": not why, "why": why, "wall_s": round(wall_s, 1)} | rehearsal.facts | {"stages": stages}))
    if why:
        print(f"rehearsal: FAILED after {wall_s:.0f} s: {why}", file=sys.stderr, flush=True)
        return config.EXIT_FAILED
    rehearsal.say(f"everything held: {len(stages)} stages in {wall_s:.0f} s")
    return 0


if __name__ == "__main__":
    config.command(main)
