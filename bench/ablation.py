"""Which protocol learns best from the same tokens? Validation loss over seeds, each variant differing in one place.

    python bench/ablation.py [--scale small|demo] [--seeds 1,2,3] [--only NAME,...] [--jobs N] [--out DIR] [key=value ...]
    python bench/ablation.py --seeds 101,102,103,104,105,106,107,108 --only centralized,split-average-short,split-average,paper

Each variant is simulated (who trains what, when) and then trained for real by tests/reference.py, the protocol in one
process that the tests hold the real thing to. Variants change configs/demo.yaml in the place they name; `key=value`
changes all of them. `small`, the default, halves the demo's batch and width and learns the same 1,200 steps in about 75 s;
at the demo's own size seeds differ more than variants do (bench/README.md). `--jobs` processes, one per core unless told
otherwise, one thread each; results are kept in DIR/results.jsonl, so that a second call only adds what is missing. Prints the
table of bench/README.md.
"""

import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from reference import Trial  # noqa: E402
from reference import train as reference  # noqa: E402

import carbon  # noqa: E402
import config  # noqa: E402
import simulate  # noqa: E402
from data import Corpus  # noqa: E402
from model import GPT, shape_of  # noqa: E402

CONFIG = str(REPO / "configs" / "demo.yaml")
BASE = ["rounds.train_s=584", "rounds.sync_s=30", "rounds.commit_every_s=600", "rounds.outer=nesterov", "rounds.outer_lr=1.0",
        "rounds.outer_momentum=0.3", "rounds.local=plain", "rounds.inner_state=keep", "rounds.lr_position=global",
        "rounds.split_steps=false"]  # fmt: skip
PAPER = ["rounds.train_s=515", "rounds.sync_s=130", "rounds.commit_every_s=null", "rounds.outer=none",
         "rounds.inner_state=reset", "rounds.lr_position=own"]  # fmt: skip
SMALL = ["data.tokens_per_step=1024", "budget.tokens=1228800", "sites.california.tokens_per_s=19.3", "sites.texas.tokens_per_s=19.3",
         "sites.south_australia.tokens_per_s=19.3", "model.depth=3", "model.width=96", "model.heads=3", "model.kv_heads=3"]  # fmt: skip
HALF, SHORT = ["rounds.train_s=277"], ["rounds.train_s=160"]
SPLIT, AVERAGE = ["rounds.split_steps=true"], ["rounds.outer=none"]

# name: (what it is, overrides of BASE, Trial)
VARIANTS = {
    "centralized": ("one site without pause, the yardstick", ["only=[california]", "policy.name=always"], Trial()),
    "paper": ("the paper's protocol", PAPER, Trial()),
    "base": ("DiLoCo-style 1.0 / 0.3, inner state kept, LR position global", [], Trial()),
    "average": ("plain averaging", AVERAGE, Trial()),
    "reset": ("inner state reset every round", ["rounds.inner_state=reset"], Trial()),
    "local-outer": ("the outer step on local rounds too", ["rounds.local=outer"], Trial()),
    "outer-0.7-0.9": ("outer lr 0.7, momentum 0.9 (DiLoCo)", ["rounds.outer_lr=0.7", "rounds.outer_momentum=0.9"], Trial()),
    "outer-0.9-0.5": ("outer lr 0.9, momentum 0.5", ["rounds.outer_lr=0.9", "rounds.outer_momentum=0.5"], Trial()),
    "momentum-decayed": ("outer momentum decayed with the learning rate", [], Trial(outer_momentum="decayed")),
    "momentum-reset": ("outer momentum reset when membership changes", [], Trial(outer_momentum="reset")),
    "rounds-half": ("rounds half as long", HALF, Trial()),
    "rounds-double": ("rounds twice as long", ["rounds.train_s=1198"], Trial()),
    "lr-own": ("LR position own", ["rounds.lr_position=own"], Trial()),
    "lr-sqrt": ("learning rate x sqrt(sites)", [], Trial(federated_lr=0.5)),
    "hand-over": ("inner state handed over to joiners", [], Trial(hand_over_inner=True)),
    "split": ("a step's tokens split over the members", SPLIT, Trial()),
    "split-average": ("split, plain averaging", [*SPLIT, *AVERAGE], Trial()),
    "split-hand-over": ("split, inner state handed over", SPLIT, Trial(hand_over_inner=True)),
    "split-lr-down": ("split, learning rate / sqrt(sites)", SPLIT, Trial(federated_lr=-0.5)),
    "split-rounds-half": ("split, rounds half as long", [*SPLIT, *HALF], Trial()),
    "split-average-lr-up": ("split, plain averaging, learning rate x sqrt(sites)", [*SPLIT, *AVERAGE], Trial(federated_lr=0.5)),
    "split-average-hand-over": ("split, plain averaging, inner state handed over", [*SPLIT, *AVERAGE], Trial(hand_over_inner=True)),
    "average-half": ("plain averaging, rounds half as long", [*AVERAGE, *HALF], Trial()),
    "split-average-lr-down": ("split, plain averaging, learning rate / sqrt(sites)", [*SPLIT, *AVERAGE], Trial(federated_lr=-0.5)),
    "split-average-half": ("split, plain averaging, rounds half as long", [*SPLIT, *AVERAGE, *HALF], Trial()),
    "split-average-half-memory": ("`split-average-half`, momenta remember as many tokens as unsplit", [*SPLIT, *AVERAGE, *HALF],
                                  Trial(momentum_by_tokens=True)),
    "split-average-short": ("**ours**: split, plain averaging, rounds of 3 batches", [*SPLIT, *AVERAGE, *SHORT], Trial()),
    "wire-bf16": ("ours, averages in bf16", [*SPLIT, *AVERAGE, *SHORT, "sync.wire=bf16"], Trial()),
    "wire-int8": ("ours, averages in int8", [*SPLIT, *AVERAGE, *SHORT, "sync.wire=int8"], Trial()),
    "split-short": ("split, 1.0 / 0.3, rounds of 3 steps", [*SPLIT, *SHORT], Trial()),
    "split-average-half-lr-down": ("`split-average-half`, learning rate / sqrt(sites)", [*SPLIT, *AVERAGE, *HALF],
                                   Trial(federated_lr=-0.5)),
}  # fmt: skip


def validation(cfg, theta: torch.Tensor) -> float:
    """Nats per token of data.val_tokens held-out tokens."""
    corpus = Corpus(cfg)
    model = GPT(shape_of(cfg.model, corpus.vocab))
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    nats = tokens = 0.0
    with torch.no_grad():
        for _, (ids, targets) in corpus.validation(cfg.data.val_tokens, 32):
            nats += F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum").item()
            tokens += targets.numel()
    return nats / tokens


def one(name: str, seed: int, extra: list[str]) -> dict:
    _, overrides, trial = VARIANTS[name]
    began = time.monotonic()
    cfg = config.load([CONFIG, *BASE, *overrides, *extra, f"seed={seed}", "clock.max_hours=null"])
    records: list[dict] = []
    run, samples = simulate.new_run(cfg, carbon.load_traces(cfg))
    simulate.drive(run, samples, journal=records.extend)
    assert run.committed_tokens == cfg.budget.tokens, f"{name}: {run.committed_tokens} of {cfg.budget.tokens} tokens fit the trace"
    federated = sum(r["tokens"] for r in records if r["type"] == "commit" and len(r["batches"]) > 1) / cfg.budget.tokens
    theta = reference(cfg, records, trial)[-1]
    return {"name": name, "seed": seed, "extra": extra, "val_loss": validation(cfg, theta), "federated_share": federated,
            "goodput": simulate.simulate(cfg, decisions=False)["goodput"], "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


# Student's t, 97.5 %, by degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


def mean_and_interval(values: list[float], form: str) -> str:
    """The mean, and its 95 % interval by Student's t where there are two values or more."""
    mean = format(statistics.mean(values), form)
    if len(values) < 2:
        return mean
    half = T[min(len(values) - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {format(half, form.lstrip('+'))}"


def table(rows: list[dict], seeds: list[int]) -> str:
    """Mean over seeds with its 95 % interval, the distance to centralized, seed by seed, and the goodput of the same settings."""
    loss = {(r["name"], r["seed"]): r["val_loss"] for r in rows}
    goodput = {r["name"]: r["goodput"] for r in rows if "goodput" in r}
    lines = ["| variant | what differs | validation loss | over centralized, % | goodput |", "| --- | --- | ---: | ---: | ---: |"]
    for name, (text, _, _) in VARIANTS.items():
        have = [s for s in seeds if (name, s) in loss]
        if not have:
            continue
        over = [100 * (loss[name, s] / loss["centralized", s] - 1) for s in have if ("centralized", s) in loss]
        note = "" if len(have) == len(seeds) else f" (seeds {', '.join(map(str, have))})"
        last = mean_and_interval(over, "+.2f") if over and name != "centralized" else ""
        share = f"{goodput[name]:.3f}" if name in goodput else ""
        lines.append(f"| `{name}` | {text}{note} | {mean_and_interval([loss[name, s] for s in have], '.4f')} | {last} | {share} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = {"--seeds": "1,2,3", "--only": ",".join(VARIANTS), "--scale": "small", "--jobs": str(os.cpu_count()), "--out": None}
    extra = []
    while argv:
        word, *argv = argv
        if word in options and argv:
            options[word], *argv = argv
        elif "=" in word:
            extra.append(word)
        else:
            raise config.BadInput(f"{word!r} is neither key=value nor one of {', '.join(options)} VALUE")
    names, seeds = options["--only"].split(","), [int(s) for s in options["--seeds"].split(",")]
    if unknown := [n for n in names if n not in VARIANTS]:
        raise config.BadInput(f"--only {unknown[0]}: no such variant; there are {', '.join(VARIANTS)}")
    if options["--scale"] not in ("small", "demo"):
        raise config.BadInput(f"--scale {options['--scale']} is not one of small, demo")
    extra = (SMALL if options["--scale"] == "small" else []) + extra
    path = Path(options["--out"] or REPO / "runs" / f"ablation-{options['--scale']}") / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [r for r in known if r["extra"] == extra]
    done = {(r["name"], r["seed"]) for r in rows}
    todo = [(n, s) for s in seeds for n in names if (n, s) not in done]
    Corpus(config.load([CONFIG, *extra]))  # prepared once, before the processes want it
    spawn = get_context("spawn")  # a fork would inherit the locks of BLAKE3's and torch's threads, and wait for ever
    with ProcessPoolExecutor(int(options["--jobs"]), spawn) as pool:
        for future in as_completed([pool.submit(one, n, s, extra) for n, s in todo]):
            rows.append(future.result())
            with open(path, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows, seeds))
    return 0


if __name__ == "__main__":
    config.command(main)
