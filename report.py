"""What people see of a run: console lines, the final table, summary.json, SITE.jsonl and wandb.

Everything here is computed from the run's files (journal, intervals, SITE.jsonl) and its config, so that it can be
computed again; wandb is a view of the same numbers.
"""

import errno
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import carbon
import config
import floor
from journal import effective, mend
from journal import read as read_journal
from ledger import count

SHOWN = 12  # sites named in one line; of more there are only so many
EMA = 0.99  # of the train loss, without bias correction: the paper's smoothed perplexity


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def clock(cfg, t_s: float) -> str:
    return carbon.iso(config.start_unix(cfg) + t_s)[11:16]


def policy_words(cfg) -> str:
    """What the policy decides by, in one line."""
    p, bounds = cfg.policy, config.thresholds(cfg)
    what = {"carbon": "MCI", "price": "price", "mix": f"MCI + {p.mix_kg_per_currency:g} kg per {carbon.currency(cfg)}"}[p.objective]
    if bounds:
        words = f"{what}, on below {bounds[0]:g}, off above {bounds[1]:g} {bounds[2]}"
        words += "" if p.name != "threshold" or not p.off_delay_s else f" for {p.off_delay_s:g} s"
    elif p.name == "percentile":
        words = f"{what}, the lowest {p.percentile:g} % of the last {p.percentile_hours:g} h"
    elif p.name == "always":
        words = "whatever the grid does"
    else:
        words = f"{what}, " + (f"the budget within {p.deadline_h:g} h" if p.deadline_h else f"{p.horizon_h:g} h ahead")
    both = ((p.cap_g_per_kwh, "gCO2/kWh"), (p.cap_price_per_mwh, f"{carbon.currency(cfg)}/MWh"))
    caps = [f"never above {cap:g} {unit}" for cap, unit in both if cap is not None]
    return f"{p.name}: {'; '.join([words, *caps])}"


def windows(cfg, name: str, traces, prices, start: int, end: int) -> list[tuple[float, float]] | None:
    """Unix [begin, end) in which a site's grid is below the policy's threshold; None where the policy has none, or decides by more
    than one signal."""
    bounds, site = config.thresholds(cfg), cfg.sites[name]
    if bounds is None or cfg.policy.objective == "mix":
        return None
    signal = prices[carbon.price_column(site)] if cfg.policy.objective == "price" else traces[site.region]
    return signal.below(bounds[0], start, min(end, signal.end))


def opening(cfg, traces, prices, num_params: int, address: str, predicted_end_s: float | None, timeouts) -> str:
    """A dozen lines: what will be trained, where, when, and where it is written."""
    start, end_s = config.start_unix(cfg), predicted_end_s
    live = "" if end_s is not None else (
        f"{cfg.signals.source}, {config.signal_kind(cfg)} intensity, asked every {config.poll_s(cfg):g} s, unknown when "
        f"{config.max_age_s(cfg):g} s old"
    )  # fmt: skip
    lines = [
        f"run {cfg.run}: {num_params:,} parameters, {config.num_batches(cfg):,} steps of {cfg.data.tokens_per_step:,} tokens "
        f"from {cfg.data.source} ({cfg.data.tokenizer})",
        f"  clock    {cfg.clock.mode}, from {carbon.iso(start)}; "
        + (f"signals {live}" if live else f"the schedule should end {carbon.iso(start + end_s)}, after {end_s / 3600:.1f} h"),
        f"  policy   {policy_words(cfg)}",
        f"  outer    {cfg.rounds.outer} lr {cfg.rounds.outer_lr:g} momentum {cfg.rounds.outer_momentum:g}; rounds of "
        f"{cfg.rounds.train_s:g} s + {cfg.rounds.sync_s:g} s sync; inner state {cfg.rounds.inner_state}; {cfg.sync.topology}",
    ]
    for name, site in list(cfg.sites.items())[:SHOWN]:
        known = None if live else windows(cfg, name, traces, prices, start, traces[site.region].end)
        text = ", ".join(f"{carbon.iso(a)[11:16]}-{carbon.iso(b)[11:16]}" for a, b in (known or [])[:4])
        text = text or ("as they come" if known is None else "none")
        lines.append(f"  {name:15} {site.region:12} {site.tokens_per_s:g} tokens/s, {site.train_kw:g} kW; windows {text}")
    if len(cfg.sites) > SHOWN:
        lines.append(f"  and {len(cfg.sites) - SHOWN} more sites")
    lines.append("  time-outs, each from the one above it")
    lines.append(timeouts.table())
    lines.append(f"  written  {config.run_dir(cfg)}; control channel at {address} (CURVE keys in {config.run_dir(cfg)}/keys)")
    return "\n".join(lines)


def several(sites: list[str]) -> str:
    more = len(sites) - SHOWN
    return " + ".join(sites) if more <= 0 else f"{' + '.join(sites[:SHOWN])} and {more} more"


def describe(record: dict, cfg, committed_tokens: int) -> str | None:
    """One line for one journal record, or None for those that tell a reader nothing."""
    kind, at = record["type"], clock(cfg, record["t_s"])
    if kind == "site":
        words = {"provisioning": "window open", "starting": "starting", "on": "on", "off": "window closed"}
        if record["to"] == "starting":
            return None
        word = "off" if record["reason"] == "run ended" else words[record["to"]]
        return f"{record['site']:15} | {at} {word}: {record['reason']}"
    if kind == "open" and record["mode"] == "federated":
        return f"{'federated':15} | {at} round {record['round']}: {several(record['members'])}"
    if kind == "open":
        return f"{'local':15} | {at} round {record['round']}: {record['members'][0]}"
    if kind == "commit":
        done = 100 * committed_tokens / cfg.budget.tokens
        return f"{'commit':15} | {at} round {record['round']}: {record['tokens']:,} tokens, {done:.1f} % of the budget"
    if kind == "eval":
        measured = f"loss {record['val_loss']:.4f} nats/token, {record['val_bpb']:.4f} bits/byte"
        return f"{'validation':15} | {at} round {record['round']}: {measured}"
    if kind == "fault":
        return f"{record['site']:15} | {at} FAULT {record['kind']}: {record['action']}"
    if kind == "signal":
        return f"{record['site']:15} | {at} signal {record['state']}: {record['reason']}"
    if kind == "rollback":
        return f"{kind:15} | {at} to round {record['to_round']}: {record['tokens']:,} tokens are trained again"
    if kind in ("cancel", "end"):
        return f"{kind:15} | {at} {record.get('reason', '')}"
    return None


def step_line(cfg, site: str, p: dict, run, predicted_end_s: float | None) -> str:
    """One aligned line per logged step. ETA in two currencies: training time left, and the clock given the windows."""
    num_steps = config.num_batches(cfg)
    rates = run.facts.rates
    rate = sum(rates[n] for n in run.now.members) if run.now else rates[site]
    train_h = (cfg.budget.tokens - min(p["step"] * cfg.data.tokens_per_step, cfg.budget.tokens)) / rate / 3600
    wall = "   ?" if predicted_end_s is None else f"{max(0.0, predicted_end_s - p['t_s']) / 3600:4.1f}"
    mfu = f"  MFU {p['mfu']:4.1%}" if p.get("mfu") else ""
    mci = "   ?" if p["mci_g_per_kwh"] is None else f"{p['mci_g_per_kwh']:4.0f}"
    cost = "" if p.get("cost") is None else f"  {p['cost']:7.3f} {carbon.currency(cfg)}"
    return (
        f"{site:15} | {clock(cfg, p['t_s'])} {p['mode']:9} MCI {mci}  round {p['round']:3d}  step {p['step']:5d}/{num_steps} "
        f"({100 * p['step'] / num_steps:4.1f} %)  loss {p['loss']:.3f}  tok/s {p['tok_per_s']:8,.0f}{mfu}  {p['energy_kwh']:6.2f} kWh  "
        f"{1000 * p['emissions_kg']:6.0f} gCO2{cost}  eta {train_h:4.1f} h train / {wall} h wall"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Logs


class Lines:
    """A file of lines that only grows, behind a header if it has one. A disk that is full does not stop the training: its lines
    wait for space."""

    def __init__(self, path: Path, header: str | None = None):
        self.path, self.header, self.waiting = path, header, []
        mend(path)

    def add(self, record: dict) -> None:
        self.write(json.dumps(record))

    def write(self, line: str) -> None:
        if self.header and not self.waiting and not (self.path.exists() and self.path.stat().st_size):
            line = f"{self.header}\n{line}"
        self.waiting.append(line + "\n")
        data = "".join(self.waiting).encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(data) < len(data):
                    os.truncate(self.path, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if len(self.waiting) == 1:
                print(f"{self.path}: {error.strerror}; lines wait for space", file=sys.stderr, flush=True)
            return
        self.waiting.clear()


class Panel:
    """SITE.jsonl and a wandb run of one site, or the coordinator's wandb run. Offline unless asked otherwise."""

    def __init__(self, cfg, run_id: str, name: str):
        self.cfg, self.name = cfg, name
        self.path = config.run_dir(cfg) / f"{name}.jsonl"
        self.lines = Lines(self.path)
        self.wandb = None
        if cfg.wandb.mode != "disabled":
            self.wandb = self._open(run_id)
            for axis in ("tokens", "hours", "emissions/kg", *([cost_key(cfg)] if cfg.price.trace else [])):
                self.wandb.define_metric(axis)
            self.wandb.define_metric("*", step_metric="tokens")

    def _open(self, run_id: str):
        """wandb's run. What wandb puts into the temporary folder when it is imported, and leaves there if its process ends by
        os._exit, goes into a folder of ours, which `finish` removes."""
        cfg, name = self.cfg, self.name
        self.scratch = (config.run_dir(cfg) / "wandb" / f"scratch-{name}").absolute()
        self.scratch.mkdir(parents=True, exist_ok=True)
        before, tempfile.tempdir = tempfile.tempdir, str(self.scratch)
        try:
            import wandb
        finally:
            tempfile.tempdir = before
        return wandb.init(
            project=cfg.wandb.project, group=cfg.run, name=name, id=f"{run_id}-{name}", mode=cfg.wandb.mode,
            resume="allow" if cfg.wandb.mode == "online" else None, dir=str(config.run_dir(cfg)), config=config.plain(cfg),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True),
        )  # fmt: skip

    def rewind(self, round_: int) -> None:
        """Leave out what an earlier process logged of rounds that will be trained again."""
        if self.path.exists():
            kept = [r for r in read_lines(self.path) if r["round"] < round_]
            tmp = self.path.with_suffix(".tmp")
            tmp.write_text("".join(json.dumps(r) + "\n" for r in kept))
            tmp.replace(self.path)

    def step(self, record: dict, mode: str) -> None:
        self.lines.add(record)
        if self.wandb:
            more = {"perf/mfu": record["wall"]["mfu"]} if "mfu" in record["wall"] else {}
            if record.get("cost") is not None:
                more |= {cost_key(self.cfg): record["cost"], "price/per_mwh": record["price_per_mwh"]}
            self.wandb.log(more | {
                "tokens": record["tokens"], "hours": record["t_s"] / 3600, "emissions/kg": record["emissions_kg"],
                "train/loss": record["loss"], "train/ppl": math.exp(min(record["loss"], 50.0)), "train/lr": record["lr"],
                "perf/tok_per_s": record["tok_per_s"], "carbon/mci_g_per_kwh": record["mci_g_per_kwh"],
                "site/mode": mode, "site/power_kw": record["power_kw"], "energy/kwh": record["energy_kwh"],
                "energy/method": record.get("energy_method", "model"),
            })  # fmt: skip

    def log(self, record: dict, run, traces, prices, columns: Callable[[float], carbon.Columns], readings: list[carbon.Reading]) -> None:
        """The coordinator's run: totals at each commit, validation when measured."""
        if not self.wandb or record["type"] not in ("commit", "eval"):
            return
        cfg = self.cfg
        total = carbon.account(columns(record["t_s"]), cfg, traces, readings, prices)
        row = {"tokens": run.committed_tokens, "hours": record["t_s"] / 3600, "emissions/kg": total["emissions_kg"],
               "energy/kwh": total["energy_kwh"], "energy/method": total["energy_method"], "site/mode": run.mode}  # fmt: skip
        if record["type"] == "eval":
            row |= {"val/loss": record["val_loss"], "val/bpb": record["val_bpb"]}
        if total["cost"] is not None:
            row[cost_key(cfg)] = total["cost"]
        now = config.start_unix(cfg) + record["t_s"]
        for kind, known in (("carbon", traces), ("price", prices or {})):
            shown = {carbon.price_column(s) if kind == "price" else s.region for s in cfg.sites.values()}
            row |= {f"{kind}/{column}": known[column].at(now) for column in shown if column in known and now < known[column].end}
        self.wandb.log(row)

    def finish(self, summary: dict) -> None:
        if self.wandb:
            words = ("energy_method", "currency")
            self.wandb.summary.update({k: v for k, v in summary.items() if isinstance(v, (int, float)) or k in words})
            self.wandb.finish()
            shutil.rmtree(self.scratch, ignore_errors=True)


def cost_key(cfg) -> str:
    """What wandb calls the cost so far, e.g. cost/usd."""
    return f"cost/{carbon.currency(cfg).lower()}"


def read_lines(path: Path) -> list[dict]:
    """Records of a SITE.jsonl; a last line torn by a crash is left out."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Summary


class Tally:
    """What a summary needs of a journal, taken in record by record, so that a simulated year need not be kept."""

    def __init__(self, sites):
        self.tokens = self.rounds = self.wasted_tokens = 0
        self.steps = dict.fromkeys(sites, 0)
        self.begins, self.ends = ({site: [] for site in sites} for _ in range(2))  # s: leaves off, goes off
        self.measured: dict | None = None  # the last eval
        self.end: str | None = None

    def add(self, record: dict) -> "Tally":
        kind = record["type"]
        if kind == "commit":
            self.tokens += record["tokens"]
            self.rounds += 1
            for site, ranges in record["batches"].items():
                self.steps[site] += count(ranges)
            self.wasted_tokens += sum(record.get("wasted", {}).values())
        elif kind in ("cancel", "rollback"):
            self.wasted_tokens += record.get("tokens", 0)
        elif kind == "site" and record["to"] in ("provisioning", "off"):
            (self.begins if record["to"] == "provisioning" else self.ends)[record["site"]].append(record["t_s"])
        elif kind == "eval":
            self.measured = record
        elif kind == "end":
            self.end = record["reason"]
        return self

    def starts(self, site: str, trained_s: np.ndarray) -> tuple[int, int]:
        """How often a site was started, and how often it went off again without having trained. trained_s: when its
        training intervals begin, sorted."""
        begins, ends = np.array(self.begins[site]), np.array(self.ends[site] + [math.inf])
        over = ends[np.searchsorted(ends, begins)]
        trained = np.searchsorted(trained_s, over, side="right") - np.searchsorted(trained_s, begins)
        return len(begins), int((trained == 0).sum())


def up_hours(column: tuple, until_s: float) -> float:
    """Hours in any state but off and provisioning, up to a moment."""
    codes, begins, ends = column
    up = (codes != carbon.CODES["off"]) & (codes != carbon.CODES["provisioning"])
    return float(np.maximum(np.minimum(ends[up], until_s) - begins[up], 0.0).sum()) / 3600


def summarize(
    tally: Tally, rows: "list[carbon.Interval] | carbon.Columns", steps: list[dict], cfg, traces, readings: list[carbon.Reading] = (),
    prices: dict[str, carbon.Trace] | None = None,
) -> dict:  # fmt: skip
    """The keys of summary.json from a journal's tally, intervals, the logged steps of all sites and what their meters said."""
    columns = rows if isinstance(rows, dict) else carbon.columns(rows)
    training = {n: (a[c == carbon.CODES["training"]], b[c == carbon.CODES["training"]]) for n, (c, a, b) in columns.items()}
    runtime_s = max((float(ends[-1]) for _, ends in training.values() if len(ends)), default=0.0)
    spent = carbon.account(columns, cfg, traces, readings, prices)
    train_h = sum(s["train_hours"] for s in spent["sites"].values())
    committed_h = {n: k * config.step_s(cfg, n) / 3600 for n, k in tally.steps.items()}
    if cfg.clock.mode == "wall":  # steps take what they take: credit training time by the share of tokens committed
        share = tally.tokens / max(1, tally.tokens + tally.wasted_tokens)
        committed_h = {n: spent["sites"][n]["train_hours"] * share for n in cfg.sites}
    sites = {}
    for name, s in spent["sites"].items():
        starts, wasted_starts = tally.starts(name, training.get(name, (np.empty(0),))[0])
        up_h = up_hours(columns[name], runtime_s) if name in columns else 0.0
        sites[name] = {
            "tokens": tally.steps[name] * cfg.data.tokens_per_step, "steps": tally.steps[name],
            "train_site_hours": s["train_hours"], "up_site_hours": up_h, "goodput": committed_h[name] / up_h if up_h else None,
            "energy_kwh": s["energy_kwh"], "emissions_kg": s["emissions_kg"], "curtailed_share": s["curtailed_share"],
            "energy_method": s["energy_method"], "measured_share": s["measured_share"],
            "starts": starts, "wasted_starts": wasted_starts, "kwh_by_state": s["kwh_by_state"], "kg_by_state": s["kg_by_state"],
            "cost": s["cost"], "cost_by_state": s["cost_by_state"],
        }  # fmt: skip
    up_h = sum(s["up_site_hours"] for s in sites.values())
    baselines, baselines_cost, note = carbon.baselines(cfg, traces, tally.tokens, prices)
    plain = config.plain(cfg)
    measured = tally.measured or {"val_loss": None, "val_bpb": None}
    return {
        "tokens": tally.tokens, "steps": sum(tally.steps.values()), "rounds": tally.rounds, "runtime_h": runtime_s / 3600,
        "train_site_hours": train_h, "up_site_hours": up_h, "goodput": sum(committed_h.values()) / up_h if up_h else None,
        "energy_kwh": spent["energy_kwh"], "emissions_kg": spent["emissions_kg"], "curtailed_share": spent["curtailed_share"],
        "emissions_with_pue_kg": spent["emissions_kg"] * cfg.carbon.pue, "energy_method": spent["energy_method"],
        "measured_share": spent["measured_share"], "cost": spent["cost"], "currency": carbon.currency(cfg),
        "cost_with_pue": None if spent["cost"] is None else spent["cost"] * cfg.carbon.pue, "sites": sites,
        "starts": sum(s["starts"] for s in sites.values()), "wasted_starts": sum(s["wasted_starts"] for s in sites.values()),
        "wasted_tokens": tally.wasted_tokens, "baselines": baselines, "baselines_cost": baselines_cost, "baselines_note": note,
        "floor_kg": {
            "lp": floor.lp(cfg, traces, train_h, runtime_s),
            "with_starts": floor.with_starts(cfg, traces, train_h, runtime_s),
        },
        "val_loss": measured["val_loss"], "val_bpb": measured["val_bpb"], "train_ppl_best": train_ppl_best(steps), "end": tally.end,
        "provenance": carbon.provenance(cfg, traces) | {
            "rule": "exact", "energy": carbon.MEASURED if spent["measured_share"] else carbon.MODELLED,
            "span": [carbon.iso(config.start_unix(cfg) + t) for t in (0.0, runtime_s)],
            "config_digest": config.train_digest(plain), "schedule_digest": config.schedule_digest(plain), "versions": config.versions(),
        },
    }  # fmt: skip


def train_ppl_best(steps: list[dict]) -> float | None:
    """Lowest perplexity of the EMA-0.99 train loss over all steps of all sites in time order; the average starts at the first
    value, without bias correction (as the paper's plots do)."""
    smooth, best = None, math.inf
    for _, loss in all_losses(steps):
        smooth = loss if smooth is None else EMA * smooth + (1 - EMA) * loss
        best = min(best, smooth)
    return math.exp(best) if steps else None


def all_losses(steps: list[dict]) -> list[tuple[float, float]]:
    """(t_s, train loss) of every step of all sites in time order, from their logged steps and what those say of the ones between."""
    found = [(t_s, r.get("site", ""), loss) for r in steps for t_s, loss in (*r.get("since", ()), (r["t_s"], r["loss"]))]
    return [(t_s, loss) for t_s, _, loss in sorted(found) if math.isfinite(loss)]


def load_steps(run_dir: Path, sites) -> list[dict]:
    """Logged steps of all sites, each with its site."""
    out = []
    for site in sites:
        path = run_dir / f"{site}.jsonl"
        out += [r | {"site": site} for r in read_lines(path)] if path.exists() else []
    return out


def write_summary(run_dir: Path, cfg, traces, prices) -> dict:
    tally = Tally(cfg.sites)
    for record in effective(read_journal(run_dir / "journal.jsonl")):
        tally.add(record)
    rows = carbon.read_intervals(str(run_dir / "intervals.csv"))
    steps = load_steps(run_dir, cfg.sites)
    summary = summarize(tally, rows, steps, cfg, traces, carbon.readings_of(run_dir), prices)
    stalls = [r["wall"]["stall_s"] for r in steps if "stall_s" in r["wall"]]
    times = [r["wall"]["unix"] for r in steps]
    p50, p95 = np.percentile(stalls, [50, 95]) if stalls else (None, None)
    summary["wall"] = {
        "sync_stall_s": {"p50": float(p50), "p95": float(p95), "n": len(stalls)} if stalls else None,
        "train_span_s": max(times) - min(times) if times else None,
    }
    path = run_dir / "summary.json"
    path.with_suffix(".tmp").write_text(json.dumps(summary, indent=1))
    path.with_suffix(".tmp").replace(path)
    return summary


def table(summary: dict, cfg) -> str:
    """The final table, fit for pasting."""
    s, wide = summary, 26

    def row(name: str, text: str) -> str:
        return f"  {name:{wide}} {text}"

    def number(value, form: str, unit: str = "") -> str:
        return "-" if value is None else format(value, form) + unit

    lines = ["", f"run {cfg.run}: {s['end']}"]
    lines.append(row("tokens", f"{s['tokens']:,} in {s['steps']:,} steps, {s['rounds']} rounds"))
    lines.append(row("validation", f"{number(s['val_loss'], '.4f')} nats/token, {number(s['val_bpb'], '.4f')} bits/byte"))
    hours = f"{s['runtime_h']:.2f} h, {s['train_site_hours']:.2f} training site-hours"
    lines.append(row("time", f"{hours}, goodput {number(s['goodput'], '.3f')}"))
    inside = f"{100 * (s['curtailed_share'] or 0):.1f} % inside windows"
    lines.append(row("energy", f"{s['energy_kwh']:.2f} kWh, {inside}{carbon.how_measured(s)}"))
    lines.append(row("emissions", f"{s['emissions_kg']:.3f} kgCO2"))
    for region, kg in (s["baselines"] or {}).items():
        share = f", ours is {100 * s['emissions_kg'] / kg:.1f} %" if kg else ""
        lines.append(row(f"  of {region} alone", f"{kg:.3f} kgCO2{share}"))
    if s["baselines_note"]:
        lines.append(row("  baselines", f"none: {s['baselines_note']}"))
    floor = s["floor_kg"]
    lines.append(
        row("  floor by the same hour", f"{number(floor['lp'], '.3f')} kgCO2, {number(floor['with_starts'], '.3f')} with start costs")
    )
    if s["cost"] is not None:
        lines.append(row("cost", f"{s['cost']:.3f} {s['currency']}"))
    for region, cost in (s["baselines_cost"] or {}).items():
        lines.append(row(f"  of {region} alone", number(cost, ".3f", f" {s['currency']}")))
    lines.append(row("starts", f"{s['starts']}, of which {s['wasted_starts']} wasted; {s['wasted_tokens']:,} tokens wasted"))
    stall = (s.get("wall") or {}).get("sync_stall_s")
    if stall:
        lines.append(row("measured sync stall", f"p50 {stall['p50']:.3f} s, p95 {stall['p95']:.3f} s over {stall['n']}"))
    paid = "" if s["cost"] is None else f" {s['currency']:>8}"
    lines.append(f"  {'site':{wide}} {'hours':>7} {'kWh':>8} {'kgCO2':>8}{paid} {'starts':>7} {'steps':>7}")
    for name, site in s["sites"].items():
        cost = f" {site['cost']:8.3f}" if paid else ""
        lines.append(f"  {name:{wide}} {site['train_site_hours']:7.2f} {site['energy_kwh']:8.2f} {site['emissions_kg']:8.3f}{cost} "
                     f"{site['starts']:7d} {site['steps']:7d}{carbon.how_measured(site).replace(',', ' ')}")  # fmt: skip
    return "\n".join(lines)
