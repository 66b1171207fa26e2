"""A rehearsal of full scale: the shipped configs with all that is on, but small and fast, and real faults.

    make rehearsal                        d20 with all faults, then the paper's; 8 minutes on 2 idle cores
    python bench/rehearsal.py --short     d20 with one kill; at most 2 minutes
    python bench/rehearsal.py --json      one JSON object on stdout, all else on stderr
    python bench/rehearsal.py --keep DIR  leaves the scratch folder there, logs and all

configs/d20.yaml, paper.yaml, ours.yaml, paper_two_site.yaml and paper_centralized.yaml are loaded as they are
shipped. What differs is key=value on the command lines, from one table (scaled.py) that is printed: sizes and
the pace of the day. Everything else (bf16, torch.compile, wire format, data source, ...) is as shipped.

d20 is started by hand, as the README says: data.py prepare at the head node and at each site, keys,
coordinator.py, a torchrun a site in a folder of its own with only its keys, one site on two nodes. Then, each
in a moment that the journal shows to be the right one: a rank killed; a site killed; the head node killed;
Ctrl-C, and the site again on fewer ranks; windows that close within a round. At the end the whole budget is
committed, the invariants hold, and the model is exported, opened by transformers, and speaks.

Exit code 0 if everything held, 1 with one line and the ends of all logs otherwise. A hub on loopback serves
the text. TORCHINDUCTOR_CACHE_DIR, if set, is where compilers find what they made before; else nothing stays.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import environments
import psutil
import scaled
from hub import Hub
from scene import REPO, Refuted, Scene, Tail, free_port, kill_all, lives, rank_of, require

import config
from config import Parser

PYTHON, TORCHRUN = sys.executable, [sys.executable, "-m", "torch.distributed.run"]
CONFIGS = ("paper", "ours", "paper_two_site", "paper_centralized")
# Of the day: two sites, of which one leaves; then two others for 5 hours. Left out: hours of one site only.
EARLY, LATE = ("20:50", "23:45"), ("02:55", "10:20")
HOURS = {"full": [EARLY, LATE], "short": [LATE, EARLY]}
IDLE_S = 9  # what four times data.py prepare takes on two idle cores; where it takes longer, so does the day
TRAIN_S = {"full": 200, "short": 15}  # the budget: what one processor makes in so long; six ranks on two make it in twice that
START_S, WINDOW_S, BACK_S, END_S = 300, 420, 240, 900  # bounds of waits, real seconds
PROMPT = "import sys\n\ndef main("


@dataclass
class SiteAt:
    """A site of the d20 run: how it is started, and its torchruns, one a node."""

    name: str
    nodes: int = 1
    ranks: int = 2
    torchruns: list = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of its torchruns."""
        return [self.name] if self.nodes == 1 else [f"{self.name}-node{i}" for i in range(self.nodes)]


class Stage:
    """One line of the report."""

    def __init__(self, name: str):
        self.name, self.facts, self.seconds = name, [], 0.0

    def add(self, text: str) -> None:
        self.facts.append(text)

    def line(self) -> str:
        return f"  {self.name:32} {self.seconds:6.1f} s  {'; '.join(self.facts)}"


class Rehearsal:
    def __init__(self, scene: Scene, short: bool, say):
        self.scene, self.short, self.say = scene, short, say
        self.stages: list[Stage] = []
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
        hub = Hub(scaled.texts())
        self.scene.env["HF_ENDPOINT"] = hub.url
        try:
            d20 = D20(self)
            d20.all()
            if not self.short:
                paper(self, d20.head)
        finally:
            hub.close()
        left = [" ".join(p.cmdline())[-80:] for p in self.scene.processes()]
        self.facts["left_behind"] = left
        require(not left, f"{len(left)} processes stayed behind: {left[:1]}")


class D20:
    """configs/d20.yaml on the wall clock, every process started by hand."""

    config = REPO / "configs/d20.yaml"

    def __init__(self, rehearsal: Rehearsal):
        self.r, self.scene = rehearsal, rehearsal.scene
        sites = SiteAt("california"), SiteAt("south_australia"), SiteAt("texas", nodes=2)
        self.sites = {site.name: site for site in sites}
        self.head = self.scene.folder / "head"
        self.run = self.head / "runs/d20"
        self.journal = Tail(self.run / "journal.jsonl")
        for name in ("head", *self.sites):
            (self.scene.folder / name).mkdir()
        self.per_step = scaled.SCALE["data.tokens_per_step"][0]
        self.values = {"carbon.trace": self.scene.folder / "day.csv", "sync.port": free_port()}
        self.values["sites.south_australia.parallel"] = "fsdp"
        self.pace = float(scaled.SAMPLE_S)
        self.scale(steps=1000, rate=5000)  # for whatever comes before these are known

    def scale(self, steps: int, rate: int) -> None:
        self.values |= {"budget.tokens": self.per_step * steps, "sites.*.tokens_per_s": rate}
        self.changes = scaled.overrides(self.config, self.values, self.pace)

    def all(self) -> None:
        self.prepare()
        self.measure()
        with self.r.stage("d20 starts") as stage:
            self.start_head()
            for site in self.sites.values():
                self.start_site(site)
            first = self.until("the first round is committed", lambda: self.records("commit"), START_S)[0]
            stage.add(f"coordinator, 4 torchruns, 6 ranks; first commit after {first['t_s']:.0f} s")
        if not self.r.short:
            self.close_early()
        self.lose_rank(self.sites["south_australia"])
        if not self.r.short:
            self.lose_site(self.sites["texas"])
            self.lose_head()
            self.interrupt_site(self.sites["texas"])
        self.end()
        self.use()

    # -- before it starts --------------------------------------------------------------------------------

    def measure(self) -> None:
        """Tokens/s by bench/train.py, which also fills the compiler's cache. The budget follows from tokens a
        second of processor time: that is the machine's speed, whatever else it does just now."""
        programs = {"one rank": ("california", [PYTHON])}
        if not self.r.short:
            two = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
            programs["two ranks, fsdp"] = "south_australia", two
        with self.r.stage("measured: bench/train.py") as stage:
            rates, options = {}, ["--json", "--threads", "1", "--steps", "20"]
            for name, (site, program) in programs.items():
                command = [*program, REPO / "bench/train.py", self.config, *self.changes, *options]
                out = self.scene.call("measure", [*command, f"site={site}"], self.scene.folder, 600)
                measured = json.loads(out.strip().splitlines()[-1])
                rates[name], of_processor = measured["tokens_per_s"], measured["tokens_per_processor_s"]
                if name == "one rank":  # several wait for each other
                    rate = max(rates[name], of_processor)
            slow = max(1, round(self.r.stages[0].seconds / IDLE_S), round(rate / rates["one rank"]))
            self.pace = scaled.SAMPLE_S / slow
            steps = round(TRAIN_S[self.r.facts["form"]] * rate / self.per_step)
            self.scale(max(1, steps), round(rates["one rank"]))
            measured = ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in rates.items())
            stage.add(f"{measured}; budget {steps:,} steps; the day passes {self.pace:g} times as fast")
        shipped, hours = config.load([str(self.config)]), HOURS[self.r.facts["form"]]
        trace = REPO / shipped.carbon.trace
        scaled.paced_trace(trace, self.values["carbon.trace"], shipped.clock.start, hours, self.pace)
        wall = scaled.differences(self.config, self.changes)
        virtual = scaled.overrides(scaled.PAPER, scaled.paper_values(), pace=None)
        self.r.facts["scaled"] = {key: [str(was), str(now)] for key, (was, now) in wall.items()}
        for line in scaled.table(wall, scaled.differences(scaled.PAPER, virtual), self.pace):
            self.r.say(line)

    def prepare(self) -> None:
        """data.py prepare at the head node and at each site, as far apart as machines are; then the keys."""
        with self.r.stage("data.py prepare; keys") as stage:
            places = {f"prepare-{name}": self.scene.folder / name for name in ("head", *self.sites)}
            command = [PYTHON, REPO / "data.py", "prepare", self.config, *self.changes]
            started = {name: self.scene.start(name, command, cwd) for name, cwd in places.items()}
            self.scene.leaves(*places)
            for name, process in started.items():
                code = self.scene.wait(name, process, BACK_S)
                require(code == 0, f"{name} ended with exit code {code}")
            said = {self.scene.said(name).strip().splitlines()[-1].partition(": ")[2] for name in places}
            require(len(said) == 1, f"{len(places)} machines prepared different corpora: {said}")
            command = [PYTHON, REPO / "coordinator.py", "keys", self.config, *self.changes]
            self.scene.call("keys", command, self.head)
            for name in self.sites:
                keys = self.scene.folder / name / "runs/d20/keys"
                keys.mkdir(parents=True)
                for file in ("coordinator.key", f"{name}.key_secret"):
                    (keys / file).write_bytes((self.run / "keys" / file).read_bytes())
                    (keys / file).chmod(0o600)
            stage.add(f"{len(places)} times the same: {said.pop()}")

    # -- processes and the journal -----------------------------------------------------------------------

    def start_head(self) -> None:
        command = [PYTHON, REPO / "coordinator.py", self.config, *self.changes, "sync.host=127.0.0.1"]
        self.scene.start("head", command, self.head)

    def start_site(self, site: SiteAt) -> None:
        """Its torchruns, one a node, in the site's own folder."""
        meet = ["--standalone"]
        if site.nodes > 1:
            where = f"127.0.0.1:{free_port()}"
            meet = ["--rdzv_backend=c10d", f"--rdzv_endpoint={where}", f"--rdzv_id={site.name}"]
            meet += [f"--nnodes={site.nodes}", "--local_addr=127.0.0.1"]
        own = [f"site={site.name}", f"sites.{site.name}.ranks={site.ranks}", "sync.host=127.0.0.1"]
        program = [*TORCHRUN, *meet, f"--nproc_per_node={site.ranks // site.nodes}", REPO / "train.py"]
        command, cwd = [*program, self.config, *self.changes, *own], self.scene.folder / site.name
        site.torchruns = [self.scene.start(name, command, cwd) for name in site.names]

    @property
    def now(self) -> int:
        """The number of the journal's next record."""
        return len(self.journal.records())

    def records(self, *types: str, since: int = 0, **fields) -> list[dict]:
        """Of the journal, those of some types whose fields are so, from record number `since` on."""

        def asked(r: dict) -> bool:
            return r["type"] in types and r["n"] >= since and all(r.get(k) == v for k, v in fields.items())

        return [r for r in self.journal.records() if asked(r)]

    def until(self, what: str, true, limit_s: float):
        """As Scene.until, while the run goes on."""

        def checked():
            if found := true():
                return found
            ended = self.records("end")
            why = ended and ended[-1]["reason"]
            require(not ended, f"the run ended ({why}) before {what}: raise TRAIN_S")

        return self.scene.until(what, checked, limit_s)

    def contributed(self, site: SiteAt, since: int) -> list[dict]:
        """Commits with batches of a site."""
        return [r for r in self.records("commit", since=since) if gave(r, site.name)]

    def training(self, site: SiteAt | None = None, federated: bool = True) -> dict:
        """Waits for a round to be open that this site, or anyone, has a part in; its `open` record."""

        def opened() -> dict | None:
            r = self.journal.open_round()
            meant = r and (site is None or site.name in r["members"])
            return r if meant and (r["mode"] == "federated" or not federated) else None

        kind, who = "a federated round" if federated else "a round", f" with {site.name}" if site else ""
        return self.until(f"{kind}{who} is open", opened, WINDOW_S)

    def fate(self, opened: dict, site: SiteAt, since: int) -> str:
        """What the journal says became of a round, and of the site's part in it."""
        number, ends = opened["round"], ("commit", "cancel", "rollback")

        def over() -> list[dict]:
            return self.records(*ends, since=since, round=number)

        end = self.until(f"round {number} is over", over, BACK_S)[0]
        if end["type"] == "commit":
            part = "with" if gave(end, site.name) else "without"
            wasted = end.get("wasted", {}).get(site.name, 0)
            return f"round {number} committed {part} its part, {wasted:,} tokens wasted"
        why = end.get("reason", "rolled back")
        return f"round {number} void ({why}), {end['tokens']:,} tokens trained again"

    def bring_back(self, site: SiteAt, stage: Stage) -> None:
        """Start a site again, and wait until a round with batches of its own is committed."""
        began, since = time.monotonic(), self.now
        self.start_site(site)

        def on_again() -> list[dict]:
            return self.records("site", since=since, site=site.name, to="on")

        on = self.until(f"{site.name} is on again", on_again, WINDOW_S)[0]
        ready_s, what = time.monotonic() - began, f"a round with batches of {site.name} is committed"
        commit = self.until(what, lambda: self.contributed(site, on["n"]), WINDOW_S)[0]
        stage.add(f"back after {ready_s:.0f} s, {site.ranks} rank(s), its part in round {commit['round']}")

    # -- what goes wrong ---------------------------------------------------------------------------------

    def strike(self, site: SiteAt, stage: Stage, deed, federated: bool = True) -> list[int]:
        """Do something to a site in a round of its own, wait until the journal knows and its torchruns have
        ended; their exit codes."""

        def gone() -> list[dict]:
            about = self.records("fault", "site", since=since, site=site.name)
            return [r for r in about if r["type"] == "fault" or r["to"] == "off"]

        opened = self.training(site, federated)
        since, leaving = self.now, self.scene.leaves(*site.names)
        deed()
        seen = self.until(f"the journal says that {site.name} is gone", gone, BACK_S)[0]
        says = f"{seen['kind']}: {seen['action']}" if seen["type"] == "fault" else seen["reason"]
        stage.add(f"in {opened['mode']} round {opened['round']} -> {says[:120]}")
        stage.add(self.fate(opened, site, since))
        return [self.scene.wait(name, process, BACK_S) for name, process in zip(site.names, leaving)]

    def close_early(self) -> None:
        with self.r.stage("a window closes in a round") as stage:
            closed = self.until("a window closes in a round", self.closed_early, WINDOW_S)
            stage.add(closed[0])

    def lose_rank(self, site: SiteAt) -> None:
        with self.r.stage(f"kill -9, rank 1 of {site.name}") as stage:
            codes = self.strike(site, stage, lambda: self.rank(site, 1).kill())
            require(0 not in codes, f"torchrun's exit codes are {codes}, though a rank was killed")
            self.bring_back(site, stage)

    def rank(self, site: SiteAt, number: int) -> psutil.Process:
        found = next((p for torchrun in site.torchruns if (p := rank_of(torchrun, number))), None)
        require(found, f"rank {number} of {site.name} has no process")
        return found

    def lose_site(self, site: SiteAt) -> None:
        with self.r.stage(f"kill -9, all of {site.name}") as stage:
            self.strike(site, stage, lambda: kill_all(site.torchruns))
            self.bring_back(site, stage)

    def interrupt_site(self, site: SiteAt) -> None:
        """Ctrl-C at the terminal of its last node, which ends all ranks. The other's torchrun would wait five
        minutes for the one that is gone: a Ctrl-C there, too. Then the site again, one node with one rank."""

        def deed() -> None:
            ranks = [self.rank(site, number) for number in range(site.ranks)]
            os.killpg(site.torchruns[-1].pid, signal.SIGINT)
            self.until(f"all ranks of {site.name} end", lambda: not any(map(lives, ranks)), BACK_S)
            for torchrun in site.torchruns[:-1]:
                os.killpg(torchrun.pid, signal.SIGINT)

        with self.r.stage(f"Ctrl-C, {site.name}") as stage:
            self.strike(site, stage, deed, federated=False)
            site.nodes = site.ranks = 1
            self.bring_back(site, stage)
            lines = self.scene.said("head").splitlines()
            heard = [x for x in lines if x.startswith(site.name) and "| connected" in x][-1]
            require(heard.endswith(f" {site.ranks} rank(s)"), f"the coordinator's last word is: {heard}")

    def lose_head(self) -> None:
        with self.r.stage("kill -9, the head node") as stage:
            opened = self.training()
            since, (head,) = self.now, self.scene.leaves("head")
            head.kill()
            head.wait()
            self.start_head()
            resumes = self.until("it resumes", lambda: self.records("resume", since=since), BACK_S)
            resume = resumes[0]
            stage.add(self.fate(opened, self.sites[opened["members"][0]], since))

            def on_its_way() -> set[int]:
                begun, done = (self.records(kind, since=resume["n"]) for kind in ("open", "commit"))
                return {r["round"] for r in begun} & {r["round"] for r in done}

            self.until("a round that began after the resume is committed", on_its_way, WINDOW_S)
            lost = [f"{r['site']} {r['kind']}" for r in self.records("fault", since=since)]
            stage.add(f"resumed at round {resume['round']}; faults with it: {', '.join(lost) or 'none'}")

    # -- the end -----------------------------------------------------------------------------------------

    def end(self) -> None:
        with self.r.stage("to the end of the budget") as stage:
            self.scene.until("the run ends", lambda: self.records("end"), END_S)
            names = ["head", *(name for site in self.sites.values() for name in site.names)]
            for name, process in zip(names, self.scene.leaves(*names)):
                code = self.scene.wait(name, process, BACK_S)
                require(code == 0, f"{name} ended with exit code {code}")
            said, summary = check(self.scene, "d20", self.head, self.run)
            budget = self.values["budget.tokens"]
            require(summary["tokens"] == budget, f"{summary['tokens']:,} of {budget:,} tokens are committed")
            require(self.records("open", mode="federated"), "no round was federated")
            wires = sorted({r["wire"] for r in self.records("attempt")})
            keys = "tokens", "rounds", "wasted_tokens", "starts", "val_loss"
            self.r.facts |= {key: summary[key] for key in keys}
            self.r.facts |= {"faults": len(self.records("fault")), "wires": wires}
            stage.add(f"exit code 0 everywhere; {summary['rounds']} rounds, {budget:,} tokens")
            stage.add(f"{summary['wasted_tokens']:,} wasted; wire {', '.join(wires)}; {said}")

    def closed_early(self) -> list[str]:
        """Sites whose window ended before the planned end of a round that they were in to its commit."""
        out, last = [], {}  # site -> the last round it was a member of
        committed = {r["round"]: r for r in self.records("commit")}
        for r in self.records("open", "site"):
            if r["type"] == "open":
                last |= dict.fromkeys(r["members"], r)
            elif r["to"] == "off" and "MCI" in r["reason"] and r["site"] in last:
                site, opened = r["site"], last[r["site"]]
                number, end_s = opened["round"], opened["end_s"]
                agreed = any(site in a["members"] for a in self.records("attempt", round=number))
                part = committed.get(number, {}).get("batches", {}).get(site, [])
                if number in committed and (agreed or part) and r["t_s"] < end_s:
                    num = sum(stop - first for first, stop in part)
                    planned = f"round {number}, planned to {end_s:.1f} s, committed with {num} batches of it"
                    out.append(f"{site} ({r['reason']}) off at {r['t_s']:.1f} s; {planned}")
        return out

    def use(self) -> None:
        """What a user does with the model of a run."""
        self.scene.env["HF_HUB_OFFLINE"] = "1"
        call = self.scene.call
        with self.r.stage("export, generate, figures") as stage:
            call("export", [PYTHON, REPO / "export.py", "d20", "d20-hf", "--to", "hf"], self.head)
            greedy = ["--prompt", PROMPT, "--temperature", "0", "--tokens", "32"]
            text = call("generate", [PYTHON, REPO / "generate.py", "d20", *greedy], self.head)
            require(text.startswith(PROMPT) and len(text) > len(PROMPT) + 1, f"generate.py printed {text!r}")
            call("figures", [PYTHON, REPO / "figures.py", "runs/d20"], self.head)
            drawn = list((self.run / "figures").glob("*.png"))
            require(drawn, "figures.py drew nothing")
            stage.add(f"{len(text) - len(PROMPT) - 1} characters after the prompt; {len(drawn)} figures")
        if self.r.short and not (environments.folder("transformers") / ".ready").exists():
            self.r.facts["transformers"] = None
            self.r.say("  transformers is not installed here, and not tried in the short form")
            return
        python = environments.make("transformers") / "python"
        with self.r.stage("transformers opens it") as stage:
            script = REPO / "bench/in_transformers.py"
            call("transformers", [python, "-P", script, PROMPT, "d20-hf"], self.head)
            self.r.facts["transformers"] = furthest = self.same_as_transformers(text)
            stage.add(f"NanoChatForCausalLM; logits within {furthest:.0e} of ours, the same greedy tokens")

    def same_as_transformers(self, text: str) -> float:
        """The largest difference of a logit. text: our greedy text of the run."""
        import torch

        import generate
        from sync import Flat

        theirs = json.loads((self.head / "results.json").read_text())["d20-hf"]
        shape, theta, tokenizer = generate.load(str(self.head / "d20-hf"), None)
        ids, model = tokenizer.encode(PROMPT).ids, generate.GPT(shape)
        Flat(model).adopt(model, theta)
        require(theirs["class"] == "NanoChatForCausalLM", f"it is a {theirs['class']}")
        require(theirs["ids"] == ids, f"the prompt's ids are {ids}, theirs {theirs['ids']}")
        with torch.inference_mode():
            furthest = (torch.tensor(theirs["logits"]) - model(torch.tensor([ids]))[0]).abs().max().item()
        require(furthest < 1e-4, f"logits differ by {furthest}")
        greedy = itertools.islice(generate.sample(model, ids, 0.0, None, 0), len(theirs["tokens"]))
        require(list(greedy) == theirs["tokens"], "other greedy tokens than theirs")
        require(text == theirs["text"] + "\n", f"generate.py prints {text!r}, theirs is {theirs['text']!r}")
        return furthest


def gave(commit: dict, site: str) -> bool:
    """Whether a commit has batches of a site."""
    return any(stop > first for first, stop in commit["batches"].get(site, []))


def check(scene: Scene, name: str, cwd: Path, run: Path) -> tuple[str, dict]:
    """What coordinator.py check says of a run, in short, and its summary. A stored state must be there."""
    out = scene.call(f"check-{name}", [PYTHON, REPO / "coordinator.py", "check", run], cwd).splitlines()
    broken = [line for line in out if not line.startswith("ok")]
    require(out and not broken, f"{name}: {broken}")
    require(json.loads((run / "state/manifest.json").read_text()), f"{name} has no stored state")
    return f"check holds, {len(out)} lines", json.loads((run / "summary.json").read_text())


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
            changes = scaled.overrides(path, scaled.paper_values(), pace=None)
            scene.call(name, [PYTHON, REPO / "launch.py", path, *changes], cwd, END_S)
            said, summary = check(scene, name, cwd, run)
            require(summary["steps"] == scaled.PAPER_STEPS, f"{summary['steps']} steps are committed")
            modes = [r["mode"] for r in Tail(run / "journal.jsonl").records() if r["type"] == "open"]
            count = {mode: modes.count(mode) for mode in ("local", "federated")}
            rehearsal.facts["paper"][name] = count
            alone = len(summary["sites"]) == 1
            require(alone or count["federated"], f"{len(summary['sites'])} sites, and no round was federated")
            stage.add(f"exit code 0; {count['local']} local, {count['federated']} federated rounds; {said}")


def main(argv: list[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="bench/rehearsal.py", description=__doc__, formatter_class=layout)
    parser.add_argument("--short", action="store_true", help="d20 with one kill only")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    parser.add_argument("--keep", metavar="DIR", help="leave the scratch folder here")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    began, out = time.monotonic(), sys.stderr if args.json else sys.stdout
    with Scene(args.keep) as scene:
        rehearsal, why = Rehearsal(scene, args.short, lambda text: print(text, file=out, flush=True)), ""
        try:
            rehearsal.all()
        except Refuted as error:
            why = str(error)
            print(scene.tails(), file=sys.stderr, flush=True)
    wall_s = round(time.monotonic() - began, 1)
    stages = [{"name": s.name, "facts": s.facts, "seconds": round(s.seconds, 1)} for s in rehearsal.stages]
    if args.json:
        outcome = {"held": not why, "why": why, "wall_s": wall_s}
        print(json.dumps(outcome | rehearsal.facts | {"stages": stages}))
    if why:
        print(f"rehearsal: FAILED after {wall_s:.0f} s: {why}", file=sys.stderr, flush=True)
        return config.EXIT_FAILED
    rehearsal.say(f"everything held: {len(stages)} stages in {wall_s:.0f} s")
    return 0


if __name__ == "__main__":
    config.command(main)
