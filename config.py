"""The configuration: every key, its default, its unit, and the checks that need no other file.

    python config.py                      every key: default, unit, meaning
    python config.py rounds               those of one section
    python config.py sites policy         of two

    cfg = load(["configs/demo.yaml", "rounds.outer=none", "run=mine"])

Layers: defaults here < the file a YAML file names as its `base:` < the YAML file < key=value on the command line (OmegaConf
over dataclasses, then read-only).
An unknown key, a wrong type or a value out of bounds raises BadInput, which `command` turns into one line and exit
code 2, before anything is started or written.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

SPEAKER_S = 10.0  # the first rank to end has torchrun end the others: so long one waits for the first of its node to speak
EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_BUDGET_LEFT = 0, 1, 2, 3


class BadInput(ValueError):
    """Something the user can fix. The message is one line: value, bound, remedy."""


HELP = """
key=value, after CONFIG, changes any key: `python config.py` lists them all with default, unit and meaning, `python config.py SECTION`
those of one section. configs/ has examples; what a run was started with stands in runs/RUN/config.yaml.
Exit codes: 0 done, 1 failed, 2 bad input (one line: value, bound, remedy), 3 ended with budget left (resumable), 130 Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """For options beyond CONFIG [key=value ...]; what is wrong with them is one line, as everywhere. --help shows the script's own
    docstring above the options."""

    def __init__(self, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": form, "description": sys.modules["__main__"].__doc__, "epilog": HELP} | options)

    def error(self, message: str):
        raise BadInput(f"{message}; see --help")


@dataclass
class Clock:
    mode: str = "virtual"  # virtual: trace-driven and deterministic | wall: real seconds
    start: str = "2026-01-11T17:00:00Z"  # first moment of the run, UTC | now: when the run begins; live signals ask for it
    max_hours: float | None = None  # end (resumable) after this much trace time; null: where the trace ends


@dataclass
class Budget:
    tokens: int = 2457600  # all sites together; a multiple of data.tokens_per_step


@dataclass
class Model:
    depth: int = 4
    width: int | None = None  # null: 64 x depth
    heads: int | None = None  # null: width / 128
    kv_heads: int | None = None  # null: heads
    seq_len: int = 256
    vocab: int | None = None  # null: the tokenizer's; a number is refused unless the tokenizer has just as many
    residual_scalars: bool = False  # per-layer residual and x0 scalars, on in the paper's code
    init: str | None = None  # theta_0: null: from the seed | a folder in Hugging Face's format, such as export.py writes
    dtype: str = "float32"  # float32 | bfloat16 (autocast; what is kept and averaged stays fp32) | auto: bfloat16 where it is in hardware
    compile: bool = False  # torch.compile, block by block


@dataclass
class Data:
    source: str = "stdlib"  # stdlib: the installed Python's own .py text | a folder of .txt, .md, .py or .parquet | hf://OWNER/DATASET
    revision: str | None = None  # of a Hugging Face dataset: branch, tag or commit; null: its main branch
    shards: int | None = None  # of a Hugging Face dataset: so many parquet files, the last of them for validation; null: all
    tokenizer: str = "bytes"  # bytes | bpe-VOCAB (trained on the source) | the path of a tokenizer.json
    tokenizer_chars: int = 2_000_000_000  # of the source, that a BPE is trained on (nanochat's speedrun: 2e9)
    dir: str = "data"  # folder of prepared corpora
    workers: int | None = None  # processes that tokenize; null: one a core
    tokens_per_step: int = 2048  # one batch = one inner step, the same at every site
    val_tokens: int = 131072  # evaluated once, at the end


@dataclass
class Optim:
    matrices: str = "muon"  # what trains the blocks' matrices: muon | adamw (a reference that ranks agree on to rounding)
    matrix_lr: float = 0.02  # learning rate of the blocks' matrices
    embedding_lr: float = 0.3  # learning rate of AdamW for the embedding, at width 768
    unembedding_lr: float = 0.004  # of AdamW for the head, at width 768
    scalar_lr: float = 0.5  # of AdamW for the residual scalars
    weight_decay: float = 0.0  # matrices; falls linearly to 0
    betas: list[float] = field(default_factory=lambda: [0.8, 0.95])  # of AdamW
    warmup: float = 0.0  # share of the budget
    warmdown: float = 0.4  # share of the budget
    final_lr: float = 0.0  # share of the full rate at the budget's end
    muon_momentum: list[float] = field(default_factory=lambda: [0.85, 0.95])  # at the start, and from muon_momentum_steps on
    muon_momentum_steps: int = 300  # over which the momentum rises


@dataclass
class Rounds:
    train_s: float = 570.0  # training time of a federated round
    sync_s: float = 30.0  # what a sync costs on the virtual clock, and the first guess on the wall clock
    max_steps: int | None = None  # H: the round ends after this many steps, if sooner
    commit_every_s: float | None = 600.0  # local rounds; null: only when the number of sites changes (the paper)
    grace_s: float = 30.0  # how long a frozen round waits for a slow member
    max_offline_s: float = 600.0  # how long a site may stay silent before its local round is void
    rejoin_wait_s: float = 120.0  # real seconds the virtual clock waits for a missing site
    outer: str = "none"  # none: plain averaging, what measured best (bench/README.md) | nesterov: DiLoCo-style, outer_lr and outer_momentum
    outer_lr: float = 1.0  # nesterov: arXiv:2311.08105 has 0.7
    outer_momentum: float = 0.3  # nesterov: arXiv:2311.08105 has 0.9, which overshoots when rounds are short
    local: str = "plain"  # plain: a local round's theta as it is, m = 0 | outer: the outer step on it too
    inner_state: str = "keep"  # keep | reset (new each round, the paper)
    lr_position: str = "global"  # global: counts the other members' steps | own (the paper)
    split_steps: bool = True  # while K sites train, each takes a batch in K inner steps of 1/K of its rows


@dataclass
class Sync:
    topology: str = "ring"  # ring: gloo between members | star: through the head node
    wire: str = "fp32"  # fp32 | bf16 | int8 (wire.py) | auto: the most exact that takes 1 % of a round on the measured link
    link_gbit: float | None = None  # Gbit/s between sites, for `auto`; null: measured, which the virtual clock cannot
    chunk_mb: int = 16
    interface: str = "lo"  # what gloo binds
    trusted_network: bool = False  # gloo is plaintext without authentication: say yes only on a private network
    host: str = "127.0.0.1"  # where sites reach the coordinator
    port: int = 0  # 0: a free one, written to runs/RUN/address
    heartbeat_s: float = 2.0
    dead_s: float = 8.0  # silence after which a peer counts as dead
    chunk_s: float | None = None  # time-out of one chunk, and
    attempt_s: float | None = None  # of one attempt to average; null: derived from measured rate and payload (timeouts.py)


@dataclass
class Policy:
    name: str = "forecast_gate"  # best without a deadline; the paper's: threshold with off_delay_s 600; all: scheduler.py
    on_below_g_per_kwh: float = 100.0  # a window is open below it; in the unit of the objective
    off_above_g_per_kwh: float = 100.0  # a window closes above it; in the unit of the objective
    on_delay_s: float = 0.0  # how long it must have been below before a start
    off_delay_s: float = 0.0  # how long it must have been above before a stop
    min_on_s: float = 0.0  # a site that is up stays up so long
    min_off_s: float = 0.0  # a site that is off stays off so long
    max_sites: int | None = None  # so many at once, the cleanest; null: all
    objective: str = "carbon"  # carbon: MCI, g/kWh | price: currency/MWh | mix: MCI + mix_kg_per_currency x price, g/kWh
    mix_kg_per_currency: float = 0.0  # what one unit of currency is worth; a carbon price of 100 per tonne: 10
    cap_g_per_kwh: float | None = None  # above it no site runs, whatever the policy says
    cap_price_per_mwh: float | None = None  # above this price no site runs, whatever the policy says
    forecast: str = "yesterday"  # persistence | yesterday | issued (f1..fk beside the trace) | truth; see forecast.py
    forecast_days: int = 3  # yesterday: the mean of so many days; one is the day before alone
    forecast_decay_s: float = 3600.0  # yesterday: how fast its error of now fades
    min_window_s: float = 240.0  # forecast_gate, plan: shortest window worth a start, beyond the restart itself
    deadline_h: float | None = None  # deadline: the budget by then, from clock.start | plan, oracle: null: no deadline
    horizon_h: float = 24.0  # plan without a deadline looks so far ahead
    percentile: float = 20.0  # percentile: run in so many percent of the time,
    percentile_hours: float = 168.0  # of what was seen in the last so many hours


@dataclass
class Carbon:
    trace: str = "traces/paper_day.csv"  # CSV: time, then a column per region
    unit: str = "g/kWh"  # g/kWh | kg/kWh | kg/MWh | lb/MWh
    signal: str = "marginal"  # what the trace is, for the report: marginal | average
    tz: str = "UTC"  # zone of stamps that name none
    stamp: str = "start"  # the stamp marks an interval's start | end
    interpolation: str = "hold"  # hold | linear (to reproduce others)
    max_gap_s: float = 900.0  # a longer gap in the trace is refused
    curtailed_below_g_per_kwh: float = 100.0  # what counts as curtailed power in every report
    baseline_regions: list[str] = field(default_factory=list)  # regions whose one-site baselines the report has
    pue: float = 1.0  # power usage effectiveness: facility over devices, in a figure of its own


@dataclass
class Signals:
    source: str = "trace"  # trace: carbon.trace is replayed | live, on the wall clock: vessim | watttime | electricitymaps | csv | json
    url: str | None = None  # of the API, csv: the file that grows; `{region}` stands for a site's region; null: where such APIs are
    path: str | None = None  # where in a JSON answer the value is, e.g. data.0.value; null: grid_signals.mci, for vessim
    time_path: str | None = None  # json: where its time is, ISO 8601 or Unix seconds; null: it counts from when it was read
    unit_path: str | None = None  # json: where its unit is; null: `unit`
    unit: str = "g/kWh"  # of values that come without one: g/kWh | kg/kWh | kg/MWh | lb/MWh
    header_env: str | None = None  # json: an environment variable that holds a secret, sent as
    header: str = "Authorization"  # this header
    poll_s: float | None = None  # a site is asked this often; null: as often as such a source has news (LIVE)
    max_age_s: float | None = None  # an older reading is unknown; null: LIVE
    timeout_s: float = 10.0  # of one request, all of it
    retry_s: float = 5.0  # first pause after a failure, doubled after each further one up to poll_s


@dataclass
class Price:
    trace: str | None = None  # CSV of electricity prices, as carbon.trace; null: no cost anywhere
    goes_with: str | None = None  # the carbon.trace whose grids these are: no cost beside another, unless price.trace is given as key=value
    unit: str = "USD/MWh"  # CURRENCY/MWh | CURRENCY/kWh: one three-letter currency for every column; prices may be negative
    tz: str = "UTC"  # zone of stamps that name none
    stamp: str = "start"  # the stamp marks an interval's start | end
    interpolation: str = "hold"  # hold | linear
    max_gap_s: float = 3600.0  # prices are often hourly


@dataclass
class Site:
    region: str = MISSING  # column of carbon.trace, or what a live source calls the grid
    signal_url: str | None = None  # live signals: instead of signals.url
    price_region: str | None = None  # column of price.trace; null: the one named as the region
    tokens_per_s: float = MISSING  # training rate: fixes the virtual clock, first guess on the wall clock
    idle_kw: float = MISSING  # drawn in every state but off and training
    train_kw: float = MISSING  # drawn while training
    provision_s: float = 0.0  # from a window's opening until the machine is there, at idle power
    startup_s: float = 0.0  # from there until it trains, at idle power
    device: str = "cpu"  # cpu | cuda (each rank the GPU of its local rank) | cuda:N
    device_batch: Any = 8  # rows per rank and forward pass | auto: the most that the GPU has memory for, computed (footprint.py)
    ranks: int | None = None  # of all its nodes; null: as many as torchrun starts, and launch.py and jobs start one
    parallel: str = "ddp"  # how ranks share the model: ddp: each holds all of it | fsdp: each holds 1/N (FSDP2)
    checkpointing: bool = False  # recompute a block's activations in the backward pass: less memory, a third more time
    energy: str = "auto"  # wall clock: auto: measured where it can be (devices.py) | model: idle_kw and train_kw
    peak_tflops: float | None = None  # of one device at model.dtype, for the MFU; null: known GPUs by name, others have none
    threads_local: int = 2  # torch threads of a rank while the site trains alone
    threads_federated: int = 1  # ... and with others; a compiled model keeps threads_local
    keep_disk: bool = False  # the site's disk outlives its windows, and inner optimizer state on it
    provision: dict[str, Any] = field(default_factory=dict)  # keys of `provision:` that differ at this site


@dataclass
class Provision:
    mode: str = "resident"  # resident: processes stay alive and wait | local | slurm | command (provision.py); wall clock only
    start_timeout_s: float = 900.0  # from the start of a site's job to its hello; a queue's waiting time counts
    retries: int = 3  # how often in one window a start that failed, or a job that died, is tried again
    backoff_s: float = 5.0  # pause before the first retry; twice as long before each further one
    poll_s: float = 10.0  # between two looks at a job that should say hello, or should be gone
    command_s: float = 60.0  # time-out of one command that stops a job or asks for it
    stop_s: float = 40.0  # between asking a job to go and killing it; a site takes 20 s at most to leave a round cleanly
    partition: str | None = None  # slurm: null: the cluster's default
    account: str | None = None  # slurm: null: your default one
    options: list[str] = field(default_factory=list)  # slurm: further options of sbatch, e.g. --gres=gpu:8
    script: str | None = None  # slurm: file of the job's script, with {placeholders}; null: provision.SCRIPT
    start: str | None = None  # command: one program and its arguments, with {placeholders}; starts the job and returns
    stop: str | None = None  # command: asks the job to end; none running is no error
    status: str | None = None  # command: prints anything if the job waits or runs, nothing if not; fails if it cannot know
    kill: str | None = None  # command: ends it by force; null: as `stop`


@dataclass
class Eval:
    every_rounds: int = 5  # 0: only at the end
    tokens: int = 16384


@dataclass
class Wandb:
    mode: str = "offline"  # offline | online | disabled; WANDB_MODE in the environment goes over a config file's
    project: str = "curtail"  # the project in wandb


@dataclass
class Log:
    every_steps: int = 5


@dataclass
class Config:
    run: str = "demo"  # name of the run and of its folder, runs/RUN
    seed: int = 1
    fresh: bool = False  # start over: removes what an earlier run of this name left
    only: list[str] = field(default_factory=list)  # sites to take part; empty: all
    site: str | None = None  # which one this process is (train.py)
    clock: Clock = field(default_factory=Clock)
    budget: Budget = field(default_factory=Budget)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    rounds: Rounds = field(default_factory=Rounds)
    sync: Sync = field(default_factory=Sync)
    policy: Policy = field(default_factory=Policy)
    carbon: Carbon = field(default_factory=Carbon)
    signals: Signals = field(default_factory=Signals)
    price: Price = field(default_factory=Price)
    sites: dict[str, Site] = field(default_factory=dict)
    provision: Provision = field(default_factory=Provision)
    eval: Eval = field(default_factory=Eval)
    wandb: Wandb = field(default_factory=Wandb)
    log: Log = field(default_factory=Log)


CHOICES = {
    "clock.mode": ("virtual", "wall"),
    "model.dtype": ("float32", "bfloat16", "auto"),
    "rounds.outer": ("none", "nesterov"),
    "rounds.local": ("plain", "outer"),
    "rounds.inner_state": ("keep", "reset"),
    "rounds.lr_position": ("global", "own"),
    "sync.topology": ("ring", "star"),
    "optim.matrices": ("muon", "adamw"),
    "sync.wire": ("fp32", "bf16", "int8", "auto"),
    "policy.name": ("threshold", "break_even", "forecast_gate", "percentile", "deadline", "plan", "oracle", "always"),
    "policy.objective": ("carbon", "price", "mix"),
    "policy.forecast": ("persistence", "yesterday", "issued", "truth"),
    "carbon.unit": ("g/kWh", "kg/kWh", "kg/MWh", "lb/MWh"),
    "carbon.stamp": ("start", "end"),
    "signals.source": ("trace", "vessim", "watttime", "electricitymaps", "csv", "json"),
    "signals.unit": ("g/kWh", "kg/kWh", "kg/MWh", "lb/MWh"),
    "carbon.interpolation": ("hold", "linear"),
    "price.stamp": ("start", "end"),
    "price.interpolation": ("hold", "linear"),
    "provision.mode": ("resident", "local", "slurm", "command"),
    "wandb.mode": ("offline", "online", "disabled"),
}
POSITIVE = (
    "budget.tokens", "model.depth", "model.seq_len", "data.tokens_per_step", "rounds.train_s", "rounds.grace_s",
    "rounds.max_offline_s", "rounds.rejoin_wait_s", "rounds.outer_lr", "sync.chunk_mb", "sync.heartbeat_s",
    "carbon.max_gap_s", "carbon.pue", "price.max_gap_s", "signals.timeout_s", "signals.retry_s", "log.every_steps",
    "data.tokenizer_chars", "policy.forecast_days", "policy.horizon_h", "policy.percentile_hours",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "data.val_tokens", "rounds.sync_s", "rounds.outer_momentum", "sync.port",
    "policy.on_below_g_per_kwh", "policy.off_above_g_per_kwh", "policy.on_delay_s", "policy.off_delay_s",
    "policy.min_on_s", "policy.min_off_s", "policy.forecast_decay_s", "policy.min_window_s", "policy.mix_kg_per_currency",
    "eval.every_rounds", "eval.tokens", "optim.warmup", "optim.warmdown",
)  # fmt: skip
# How sources write our units of intensity, in small letters without spaces and what follows CO2.
UNITS = {"g/kwh": "g/kWh", "gco2/kwh": "g/kWh", "kg/kwh": "kg/kWh", "kgco2/kwh": "kg/kWh", "kg/mwh": "kg/MWh", "kgco2/mwh": "kg/MWh",
         "lb/mwh": "lb/MWh", "lbs/mwh": "lb/MWh", "lbco2/mwh": "lb/MWh", "lbsco2/mwh": "lb/MWh", "lbs_co2_per_mwh": "lb/MWh"}  # fmt: skip
PRICE_UNIT = re.compile(r"([A-Z]{3})/([Mk])Wh")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Live sources: default poll_s, max_age_s, url, and what kind of intensity it is (None: as carbon.signal says). WattTime issues a
# forecast every 5 minutes; an hour of Electricity Maps is stamped with its start and may be an estimate that is a while late.
LIVE = {
    "vessim": (10.0, 900.0, "http://127.0.0.1:8700", None),
    "watttime": (120.0, 900.0, "https://api.watttime.org", "marginal"),
    "electricitymaps": (300.0, 7200.0, "https://api.electricitymaps.com", "average"),
    "csv": (5.0, 900.0, None, None),
    "json": (60.0, 900.0, None, None),
}


def load(argv: list[str]) -> Config:
    """CONFIG [key=value ...] -> the checked, read-only configuration. Raises BadInput."""
    if not argv or "=" in argv[0]:
        raise BadInput(f"first argument {argv[0]!r} is not a config file; say e.g. configs/demo.yaml" if argv
                       else "no config file given; say e.g. configs/demo.yaml")  # fmt: skip
    path = Path(argv[0])
    if not path.is_file():
        raise BadInput(f"config {argv[0]!r} does not exist; see configs/ for the ones shipped")
    for arg in argv[1:]:
        if "=" not in arg:
            raise BadInput(f"argument {arg!r} is not of the form key=value")
    given = [f"only=[{arg[5:]}]" if arg.startswith("only=") and not arg.startswith("only=[") else arg for arg in argv[1:]]
    try:
        cfg = OmegaConf.unsafe_merge(OmegaConf.structured(Config), *_layers(path))  # nothing is merged into again: no copies
        known = list(cfg.sites)
        cfg = OmegaConf.unsafe_merge(cfg, OmegaConf.from_dotlist(given))
        if extra := [name for name in cfg.sites if name not in known]:
            raise BadInput(f"unknown site {extra[0]!r} on the command line; sites of {path}: {', '.join(known)}")
        OmegaConf.to_container(cfg, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, TypeError, UnicodeDecodeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        key = getattr(error, "full_key", None)
        raise BadInput(f"{path}: {key + ': ' if key else ''}{reason}; keys and types are listed in config.py") from None
    for section in (cfg.carbon, cfg.signals):
        section.unit = intensity_unit(section.unit) or section.unit
    if (mode := os.environ.get("WANDB_MODE")) and not any(arg.startswith("wandb.mode=") for arg in given):
        if mode not in CHOICES["wandb.mode"]:
            raise BadInput(f"WANDB_MODE={mode} in the environment is not one of {', '.join(CHOICES['wandb.mode'])}; unset it")
        cfg.wandb.mode = mode
    mine = any(arg.startswith("price.trace=") for arg in given)
    if cfg.price.goes_with and not mine and Path(cfg.price.goes_with).resolve() != Path(cfg.carbon.trace).resolve():
        cfg.price.trace = None
    _check(cfg)
    if cfg.only:
        cfg.sites = {name: cfg.sites[name] for name in cfg.sites if name in cfg.only}
    OmegaConf.set_readonly(cfg, True)
    return cfg


def intensity_unit(text: str) -> str | None:
    """One of carbon.unit's choices, however a source writes it (`lbs_co2_per_mwh`, `gCO2eq/kWh`); None: it is none of them."""
    return UNITS.get(re.sub(r"(?<=co2)e(q(uiv)?)?(?=/)", "", re.sub(r"\s", "", text.lower().replace("₂", "2"))))


def read_yaml(path: Path) -> Any:
    """A YAML file as OmegaConf has it, up to some 20,000 sites; OmegaConf's own limit, against files that blow up, is at 250."""
    return OmegaConf.load(path, max_yaml_expanded_nodes=10**6)


def _layers(path: Path, above: tuple = ()) -> list:
    """A YAML file below what its `base:` names (a path relative to it), and so on down."""
    if not path.is_file():
        raise BadInput(f"{above[-1]}: base: {path} does not exist; it is relative to the file that names it")
    if path.resolve() in above:
        raise BadInput(f"{path}: base: leads back to itself")
    layer = read_yaml(path)
    base = layer.pop("base", None) if OmegaConf.is_dict(layer) else None
    return (_layers(path.parent / str(base), (*above, path.resolve())) if base else []) + [layer]


def _check(cfg: Config) -> None:
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in allowed:
            raise BadInput(f"{key}={value} is not one of {', '.join(allowed)}")
    for keys, bound, ok in ((POSITIVE, "> 0", lambda v: v > 0), (NOT_NEGATIVE, ">= 0", lambda v: v >= 0)):
        for key in keys:
            value = OmegaConf.select(cfg, key)
            if not ok(value):
                raise BadInput(f"{key}={value} must be {bound}")
    for key, value in _numbers(plain(cfg)):
        if not math.isfinite(value):
            raise BadInput(f"{key}={value} must be a finite number")
    for key in ("clock.max_hours", "rounds.commit_every_s", "rounds.max_steps", "sync.chunk_s", "sync.attempt_s", "sync.link_gbit",
                "policy.max_sites", "policy.deadline_h", "policy.cap_g_per_kwh", "model.width", "model.heads", "model.kv_heads",
                "model.vocab", "data.shards", "data.workers", "signals.poll_s", "signals.max_age_s"):  # fmt: skip
        value = OmegaConf.select(cfg, key)
        if value is not None and value <= 0:
            raise BadInput(f"{key}={value} must be > 0, or null")
    if not PRICE_UNIT.fullmatch(cfg.price.unit):
        raise BadInput(f"price.unit={cfg.price.unit} is not CURRENCY/MWh or CURRENCY/kWh with a three-letter currency, e.g. USD/MWh")
    if cfg.sync.port > 65535:
        raise BadInput(f"sync.port={cfg.sync.port} must be <= 65535")
    for key in ("optim.betas", "optim.muon_momentum"):
        value = OmegaConf.select(cfg, key)
        if len(value) != 2 or not all(0 <= x < 1 for x in value):
            raise BadInput(f"{key}={list(value)} must be two numbers in [0, 1)")
    if not cfg.run or "/" in cfg.run or cfg.run.startswith("."):
        raise BadInput(f"run={cfg.run!r} must be a plain folder name")
    per_step, seq_len = cfg.data.tokens_per_step, cfg.model.seq_len
    if cfg.budget.tokens % per_step:
        near = max(per_step, round(cfg.budget.tokens / per_step) * per_step)
        raise BadInput(f"budget.tokens={cfg.budget.tokens} must be a multiple of data.tokens_per_step={per_step}; "
                       f"nearest: {near}")  # fmt: skip
    if per_step % seq_len:
        raise BadInput(f"data.tokens_per_step={per_step} must be a multiple of model.seq_len={seq_len}")
    if not cfg.sites:
        raise BadInput("sites: none given; name at least one with region, tokens_per_s, idle_kw, train_kw")
    for name in cfg.only:
        if name not in cfg.sites:
            raise BadInput(f"only={name}: unknown site; sites: {', '.join(cfg.sites)}")
    if cfg.site is not None and cfg.site not in (cfg.only or cfg.sites):
        raise BadInput(f"site={cfg.site}: unknown site; sites: {', '.join(cfg.only or cfg.sites)}")
    _check_provision(cfg.provision, "provision")
    for name, site in cfg.sites.items():
        if not name.replace("_", "").isalnum():
            raise BadInput(f"site name {name!r} must be letters, digits and underscores")
        _check_device_batch(name, site)
        for key in ("tokens_per_s", "train_kw", "ranks", "threads_local", "threads_federated"):
            if site[key] is not None and site[key] <= 0:
                raise BadInput(f"sites.{name}.{key}={site[key]} must be > 0")
        for key, allowed in (("parallel", ("ddp", "fsdp")), ("energy", ("auto", "model"))):
            if site[key] not in allowed:
                raise BadInput(f"sites.{name}.{key}={site[key]} is not one of {', '.join(allowed)}")
        if site.peak_tflops is not None and site.peak_tflops <= 0:
            raise BadInput(f"sites.{name}.peak_tflops={site.peak_tflops} must be > 0, or null")
        for key in ("idle_kw", "provision_s", "startup_s"):
            if site[key] < 0:
                raise BadInput(f"sites.{name}.{key}={site[key]} must be >= 0")
        if per_step / site.tokens_per_s > cfg.rounds.train_s and len(cfg.only or cfg.sites) > 1:
            raise BadInput(f"rounds.train_s={cfg.rounds.train_s:g} must be >= a step of site {name}, {per_step / site.tokens_per_s:g} s "
                           f"at tokens_per_s={site.tokens_per_s:g}; lower data.tokens_per_step, or make rounds longer")  # fmt: skip
        if site.provision:
            _check_provision(provision_of(cfg, name), f"sites.{name}.provision")
        if (per_step // seq_len) % num_ranks(site):
            raise BadInput(f"sites.{name}.ranks={site.ranks} must divide the {per_step // seq_len} rows of a step, "
                           f"data.tokens_per_step={per_step} / model.seq_len={seq_len}; take fewer ranks")  # fmt: skip
        if site.parallel == "fsdp" and num_ranks(site) == 1:
            raise BadInput(f"sites.{name}.parallel=fsdp cuts the model over at least 2 ranks, sites.{name}.ranks={site.ranks or 'null'}; "
                           f"say sites.{name}.ranks=N, or parallel=ddp")  # fmt: skip
    if cfg.sync.wire == "auto" and cfg.clock.mode == "virtual" and cfg.sync.link_gbit is None:
        raise BadInput("sync.wire=auto on the virtual clock: nothing is measured there; set sync.link_gbit, or fp32, bf16 or int8")
    if not 0 < cfg.policy.percentile <= 100:
        raise BadInput(f"policy.percentile={cfg.policy.percentile} must be > 0 and <= 100, the share of the time to run in")
    if by_price(cfg) and cfg.price.trace is None:
        raise BadInput(f"policy.objective={cfg.policy.objective}, policy.cap_price_per_mwh={cfg.policy.cap_price_per_mwh}: needs prices; "
                       "set price.trace")  # fmt: skip
    if is_live(cfg) and (cfg.policy.name == "oracle" or cfg.policy.forecast == "truth"):
        raise BadInput(f"policy.name={cfg.policy.name}, policy.forecast={cfg.policy.forecast}: live signals do not know the truth; "
                       "take plan, with forecast persistence, yesterday or issued")  # fmt: skip
    if cfg.policy.name == "deadline" and cfg.policy.deadline_h is None:
        raise BadInput("policy.name=deadline needs policy.deadline_h, hours from clock.start by which the budget must be trained")
    if cfg.policy.off_above_g_per_kwh < cfg.policy.on_below_g_per_kwh:
        raise BadInput(f"policy.off_above_g_per_kwh={cfg.policy.off_above_g_per_kwh} must be >= "
                       f"policy.on_below_g_per_kwh={cfg.policy.on_below_g_per_kwh}")  # fmt: skip
    if (cfg.sync.host not in LOOPBACK or cfg.sync.interface != "lo") and cfg.sync.topology == "ring":
        if not cfg.sync.trusted_network:
            raise BadInput(f"sync.topology=ring over host {cfg.sync.host}, interface {cfg.sync.interface}: gloo has no "
                           "authentication; set sync.trusted_network=true on a private network or tunnel, "
                           "or sync.topology=star")  # fmt: skip
    if is_live(cfg):
        _check_live(cfg)
    elif cfg.clock.start == "now":
        raise BadInput("clock.start=now needs live signals; set signals.source, or give a UTC time in the trace")
    if cfg.clock.start != "now":
        start_unix(cfg)


def _check_live(cfg: Config) -> None:
    s = cfg.signals
    if cfg.clock.mode != "wall":
        raise BadInput(f"signals.source={s.source} reads the present, which virtual clock and simulator cannot; set clock.mode=wall, "
                       "or signals.source=trace")  # fmt: skip
    if poll_s(cfg) > max_age_s(cfg):
        raise BadInput(f"signals.max_age_s={max_age_s(cfg):g} must be >= signals.poll_s={poll_s(cfg):g}, or each reading is unknown "
                       "before the next")  # fmt: skip
    if s.source == "json" and not s.path:
        raise BadInput("signals.path: none given; say where in the answer the value is, e.g. data.0.value")
    urls: dict[str, str] = {}
    for name, site in cfg.sites.items():
        url = signal_url(cfg, name)
        if not url:
            raise BadInput(f"signals.url: none given for site {name}; signals.source={s.source} needs one")
        if s.source != "csv" and not url.startswith(("http://", "https://")):
            raise BadInput(f"signals.url={url} must begin with http:// or https://")
        secret = s.source in ("watttime", "electricitymaps") or s.header_env
        if secret and url.startswith("http://") and urlsplit(url).hostname not in LOOPBACK:
            raise BadInput(f"signals.url={url} would carry secrets that everyone on the way can read; write https://")
        if "@" in url.split("//")[-1].split("/")[0]:
            raise BadInput(f"signals.url of site {name} holds a password; secrets come from the environment, see signals.header_env")
        if urls.setdefault(site.region, url) != url:
            raise BadInput(f"sites.{name}.signal_url={url}: region {site.region} is asked for at {urls[site.region]} already; one region, "
                           "one place")  # fmt: skip
    if missing := [r for r in cfg.carbon.baseline_regions if r not in urls]:
        raise BadInput(f"carbon.baseline_regions={missing[0]}: no site reads it live; leave it out, or name one of {', '.join(urls)}")


def is_live(cfg: Config) -> bool:
    return cfg.signals.source != "trace"


def poll_s(cfg: Config) -> float:
    return cfg.signals.poll_s or LIVE[cfg.signals.source][0]


def max_age_s(cfg: Config) -> float:
    return cfg.signals.max_age_s or LIVE[cfg.signals.source][1]


def signal_url(cfg: Config, site: str) -> str | None:
    return cfg.sites[site].signal_url or cfg.signals.url or LIVE[cfg.signals.source][2]


def signal_kind(cfg: Config) -> str:
    """marginal | average | what carbon.signal says."""
    return (LIVE[cfg.signals.source][3] if is_live(cfg) else None) or cfg.carbon.signal


def begun(cfg: Config, start: str) -> Config:
    """The config of a run that has begun: `now` replaced by when that was."""
    cfg = OmegaConf.merge(cfg, {"clock": {"start": start}})
    OmegaConf.set_readonly(cfg, True)
    return cfg


def provision_of(cfg: Config, site: str) -> Provision:
    """How the jobs of one site are started: `provision`, and over it `sites.SITE.provision`. Raises BadInput."""
    if not (own := cfg.sites[site].provision):
        return cfg.provision
    try:
        return OmegaConf.merge(OmegaConf.structured(Provision), cfg.provision, own)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"sites.{site}.provision: {reason}; its keys are those of `provision`, listed in config.py") from None


def _check_device_batch(name: str, site: Site) -> None:
    rows = site.device_batch
    if rows == "auto" and site.device == "cpu":
        raise BadInput(f"sites.{name}.device_batch=auto is for device=cuda; say how many rows a CPU is to take at once, e.g. 8")
    if rows != "auto" and (not isinstance(rows, int) or isinstance(rows, bool) or rows <= 0):
        raise BadInput(f"sites.{name}.device_batch={rows} must be a number of rows > 0, or auto")


def _check_provision(p: Provision, where: str) -> None:
    if p.mode not in CHOICES["provision.mode"]:
        raise BadInput(f"{where}.mode={p.mode} is not one of {', '.join(CHOICES['provision.mode'])}")
    for key in ("start_timeout_s", "poll_s", "command_s", "stop_s"):
        if p[key] <= 0:
            raise BadInput(f"{where}.{key}={p[key]} must be > 0")
    for key in ("retries", "backoff_s"):
        if p[key] < 0:
            raise BadInput(f"{where}.{key}={p[key]} must be >= 0")


def _numbers(value: Any, key: str = ""):
    """(dotted key, number) of everything numeric in a plain config."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, (int, float)):
        yield key, value


def start_unix(cfg: Config) -> int:
    """`clock.start` in whole UTC seconds; `begun` replaces `now`."""
    if cfg.clock.start == "now":
        raise BadInput("clock.start=now: the run has not begun; take the config in its folder, runs/RUN/config.yaml")
    return unix_of(cfg.clock.start, "clock.start")


def unix_of(text: str, key: str) -> int:
    """An ISO time with its zone -> whole UTC seconds. key: what to call it when it is wrong."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"{key}={text!r} is not a time; write e.g. 2026-01-11T17:00:00Z") from None
    if moment.tzinfo is None:
        raise BadInput(f"{key}={text!r} names no zone; write e.g. {text if len(text) > 10 else moment.isoformat()}Z")
    try:
        return int(moment.astimezone(UTC).timestamp())
    except (OverflowError, ValueError):
        raise BadInput(f"{key}={text!r} is out of range") from None


def num_batches(cfg: Config) -> int:
    return cfg.budget.tokens // cfg.data.tokens_per_step


def num_ranks(site: Site) -> int:
    """Ranks of a site's job, where nobody starts it by hand."""
    return site.ranks or 1


def step_s(cfg: Config, site: str) -> float:
    """Seconds a step takes at a site, by its configured rate."""
    return cfg.data.tokens_per_step / cfg.sites[site].tokens_per_s


def run_dir(cfg: Config) -> Path:
    return Path("runs") / cfg.run


def plain(cfg: Any) -> Any:
    """The config as dictionaries and lists (as it is, if it already is)."""
    return cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg, resolve=True)


def _digest(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def train_digest(cfg: Config) -> str:
    """Digest of all that every member must share: model, data, optimizer, rounds, budget, seed, numerics of sync."""
    c = {k: plain(cfg[k]) for k in ("clock", "model", "data", "optim", "rounds", "sync", "budget", "eval")} | {"seed": cfg["seed"]}
    data = {k: v for k, v in c["data"].items() if k not in ("dir", "workers")}
    model = {k: v for k, v in c["model"].items() if k not in ("compile", "init")}  # theta_0 has a digest of its own
    sync = {k: c["sync"][k] for k in ("wire", "chunk_mb", "topology")}
    parts = {k: c[k] for k in ("optim", "rounds", "budget", "seed", "eval")}
    return _digest(parts | {"model": model, "data": data, "sync": sync, "clock_mode": c["clock"]["mode"]})


def by_price(cfg: Config) -> bool:
    """Does the policy decide by prices?"""
    return cfg["policy"].get("objective", "carbon") != "carbon" or cfg["policy"].get("cap_price_per_mwh") is not None


def thresholds(cfg: Config) -> tuple[float, float, str] | None:
    """Below and above what value the policy starts and stops a site, and of which unit that is; None: it has no such values."""
    if cfg.policy.name not in ("threshold", "break_even", "forecast_gate"):
        return None
    unit = f"{cfg.price.unit[:3]}/MWh" if cfg.policy.objective == "price" else "gCO2/kWh"
    return cfg.policy.on_below_g_per_kwh, cfg.policy.off_above_g_per_kwh, unit


def schedule_digest(cfg: Config) -> str:
    """Digest of what decides when sites train and what they emit; a resumed run must match it too. Prices are part of it where
    the policy decides by them."""
    c = plain(cfg)
    paid = by_price(cfg)
    machine = ("signal_url", *(() if paid else ("price_region",)), "device", "device_batch", "ranks", "parallel", "checkpointing",
               "energy", "peak_tflops", "threads_local", "threads_federated", "provision")  # fmt: skip
    sites = {n: {k: v for k, v in s.items() if k not in machine} for n, s in c["sites"].items()}
    clock = dict(c["clock"])
    if clock["mode"] == "wall":  # a run that ended at its limit may go on under a later one
        del clock["max_hours"]
    parts = {k: c[k] for k in ("policy", "carbon", *(("price",) if paid else ()))} | {"clock": clock, "sites": sites}
    if c.get("signals", {}).get("source", "trace") != "trace":  # a live run starts when it starts, and may be asked elsewhere
        del clock["start"]
        parts["signals"] = {k: c["signals"][k] for k in ("source", "path", "time_path", "unit_path", "unit", "max_age_s")}
    return _digest(parts)


@cache
def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": ".".join(map(str, sys.version_info[:3])), "torch": version("torch"), "numpy": version("numpy")}


def listing(sections: list[str]) -> str:
    """Every key of some sections (all, if none is named) with its default and the comment behind it, which says unit and meaning."""
    text, lines = Path(__file__).read_text(), []
    kinds = {"": "Config"} | {f.name: f.type.__name__ for f in fields(Config) if is_dataclass(f.type)} | {"sites": "Site"}
    if unknown := [name for name in sections if name not in kinds]:
        raise BadInput(f"no section {unknown[0]!r}; sections: {', '.join(filter(None, kinds))}")
    for section, kind in kinds.items():
        if sections and section not in sections:
            continue
        body = text.partition(f"class {kind}:\n")[2].partition("\n\n\n")[0]
        where = "sites.NAME." if section == "sites" else f"{section}." if section else ""
        for line in body.splitlines():
            m = re.fullmatch(r"    (\w+): (.+?)(?: = (.+?))?(?:  # (.+))?", line)
            if m and (section or m[1] not in kinds):
                key = where + m[1]
                default = (m[3] or "(must be given)").replace('"', "").replace("None", "null").replace("field(default_factory=", "")
                default = re.sub(r"^lambda: (.+)\)$", r"\1", default).replace("list)", "[]").replace("dict)", "{}")
                default = default.replace("True", "true").replace("False", "false").replace("MISSING", "(must be given)")
                bound = "> 0" if key in POSITIVE else ">= 0" if key in NOT_NEGATIVE else ""
                choices = " | ".join(CHOICES.get(key, ()))
                said = "; ".join(filter(None, [m[4], bound, choices if not m[4] or "|" not in m[4] else ""]))
                lines.append(f"{key:32} {default:24} {said}".rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    print(listing(argv))
    return EXIT_DONE


def command(main, parses: bool = False) -> None:
    """Run an entry point: BadInput becomes one line and exit code 2, Ctrl-C a quiet 130; --help is the script's docstring and where
    the keys are. parses: it has a Parser, which answers --help with its options as well."""
    if {"-h", "--help"} & set(sys.argv[1:]) and not parses:
        print(sys.modules["__main__"].__doc__.rstrip(), HELP, sep="\n")
        sys.exit(EXIT_DONE)
    try:
        code = main(sys.argv[1:])
    except BadInput as error:
        if int(os.environ.get("LOCAL_RANK", 0)):  # torchrun: one line a node, from its first rank
            time.sleep(SPEAKER_S)
        else:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `... | head` closed our stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    sys.exit(code or EXIT_DONE)


if __name__ == "__main__":
    command(main)
