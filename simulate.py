"""The same run without training: what a schedule would do and emit, in milliseconds.

    python simulate.py configs/demo.yaml [key=value ...] [--json] [--write]      --write: a run folder for figures.py
    python simulate.py configs/ours.yaml --sweep policy.off_delay_s=0,300,600 rounds.train_s=300,600      a CSV over the grid
    python simulate.py configs/ours.yaml --policies threshold/off_delay_s=600,forecast_gate,plan@14.6 [--out DIR]   table, pareto.png

`drive` runs the very `scheduler` and `rounds` of the live run on the virtual clock; `imagine` puts "a site would have
trained n steps" in the place of real sites. The coordinator's virtual clock is the same `drive` with real ones.
"""

import csv
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np

import config
import floor
import report
from carbon import Meter, Trace, load_forecasts, load_prices, load_traces, price_column, write_intervals
from forecast import Forecast
from journal import order
from rounds import Action, Run, facts_of
from scheduler import INFINITY, Objective, Schedule, Site, policy_of, sieve


def new_run(cfg, traces: dict[str, Trace], live=None) -> tuple[Run, "Samples"]:
    """The machine of a run at its very start, and the samples that drive it. traces: region -> Trace; live: signals.Live instead."""
    start, timed = config.start_unix(cfg), cfg.clock.mode == "virtual"
    sites = {name: Site(s.provision_s, s.startup_s, s.tokens_per_s, s.idle_kw, s.train_kw) for name, s in cfg.sites.items()}
    prices = load_prices(cfg, traces) if config.by_price(cfg) else None
    objective = Objective(cfg.policy, prices and {name: prices[price_column(s)] for name, s in cfg.sites.items()}, start)
    limit_s = (cfg.clock.max_hours or INFINITY) * 3600
    if live:
        by_site, end_s = {}, min(limit_s, 3.2e8)
        unknown_s = max(config.poll_s(cfg), cfg.signals.timeout_s)  # for as long as the next answer may take
    else:
        by_site = {name: traces[site.region] for name, site in cfg.sites.items()}
        end_s = min(float(min(t.end for t in by_site.values()) - start), limit_s)
        unknown_s = max(t.step_s for t in by_site.values())
    forecast, facts = forecast_of(cfg, by_site, start, objective), facts_of(cfg, end_s)
    policy = policy_of(cfg.policy, unknown_s, forecast, facts.train_s, facts.sync_s, facts.tokens_per_step)
    if not live:
        issued = load_forecasts(cfg) if forecast and forecast.kind == "issued" else {}
        ahead = {name: issued[s.region] for name, s in cfg.sites.items() if s.region in issued}
        samples = Samples(by_site, start, end_s, sieve(policy) if timed and objective.plain else None, ahead)
    schedule = Schedule(policy, sites, timed, samples.at if timed else None, None if objective.plain else objective, cfg.policy.max_sites)
    return Run(facts, schedule, Meter(list(sites))), live or samples


def forecast_of(cfg, traces: dict[str, Trace], start: int, objective: Objective) -> Forecast | None:
    """What a policy may know of the time to come; None for those that ask for nothing. traces: site -> Trace, none if live."""
    p = cfg.policy
    if p.name in ("threshold", "break_even", "always"):
        return None
    step = min((t.step_s for t in traces.values()), default=LIVE_STEP_S)

    def mean(site: str, t: float, n: int) -> np.ndarray:
        """(n,) of the steps from run time t on: the trace's mean, at its edges its first and last value."""
        trace, edges = traces[site], start + t + step * np.arange(n + 1.0)
        inside = np.clip(edges, trace.begin, trace.end)
        area = np.diff(trace._primitive(inside, trace._cumulative))
        seconds = np.diff(inside)
        ends = np.where(edges[:-1] < trace.begin, trace.values[0], trace.values[-1])
        mci = np.where(seconds > 0, area / np.maximum(seconds, 1e-9), ends)
        return objective.values(site, t + step * np.arange(n), mci)

    forecast = Forecast("truth" if p.name == "oracle" else p.forecast, step, p.forecast_decay_s, p.forecast_days, mean)
    for site, trace in traces.items():
        before = int(min(8 * 86400, start - trace.begin) // step)
        if before > 0:
            forecast.remember(site, mean(site, -before * step, before))
    return forecast


LIVE_STEP_S = 300.0  # grid of forecasts where no trace sets one


class Samples:
    """What the sites' grids report, in time order, as seconds since clock.start. A trace that ends says unknown."""

    def __init__(self, traces: dict[str, Trace], start_unix: int, until_s: float = INFINITY, matters=None, ahead=None):
        """traces: site -> carbon.Trace; matters(values) -> bool per sample: hand out only these (and a site's first); ahead: site ->
        (n, k) forecasts issued with its n samples, for the k steps after each."""
        self._traces, self._start, self._sites = traces, start_unix, list(traces)
        self._ahead, self._at = ahead or {}, []
        times, values, owners = [], [], []
        for site, trace in enumerate(traces.values()):
            first = int(np.searchsorted(trace.starts, start_unix, side="right")) - 1
            last = int(np.searchsorted(trace.starts, start_unix + until_s, side="right"))
            some = trace.values[first:last]
            kept = np.arange(len(some)) if matters is None else np.flatnonzero(matters(some))
            t = trace.starts[first:last][kept].astype(float) - start_unix
            t[0] = 0.0
            times += [t, [float(trace.end - start_unix)]]
            values += [some[kept], [np.nan]]
            owners.append(np.full(len(kept) + 1, site))
            self._at.append(np.append(first + kept, -1))
        times, values, owners = np.concatenate(times), np.concatenate(values), np.concatenate(owners)
        by_time = np.lexsort((owners, times))
        self._at = np.concatenate(self._at)[by_time] if self._ahead else None
        self._times, self._values, self._owners = times[by_time], values[by_time], owners[by_time]
        self._next, self._next_time = 0, float(self._times[0]) if len(times) else INFINITY

    def at(self, site: str, t: float) -> float | None:
        """gCO2/kWh at a site, t seconds from clock.start; None past the trace's end."""
        trace, unix = self._traces[site], self._start + int(t)  # whole seconds, as the samples: a float would cast them all
        if unix >= trace.end:
            return None
        return float(trace.values[trace.starts.searchsorted(unix, side="right") - 1])

    def next_time(self) -> float:
        return self._next_time

    def _issued(self, site: str, i: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Run times at which each value begins to hold, gCO2/kWh: (k,) each."""
        at, step, values = self._at[i], self._traces[site].step_s, self._ahead[site]
        return None if at < 0 else (float(self._times[i]) + step * np.arange(1.0, values.shape[1] + 1), values[at])

    def due(self, t: float) -> list[tuple[str, float | None, tuple | None]]:
        """(site, gCO2/kWh or None, forecast issued with it or None) of every sample at or before t not handed out yet."""
        out = []
        while self._next_time <= t:
            i = self._next
            value = float(self._values[i])
            site = self._sites[self._owners[i]]
            out.append((site, None if value != value else value, self._issued(site, i) if site in self._ahead else None))
            self._next = i + 1
            self._next_time = float(self._times[i + 1]) if i + 1 < len(self._times) else INFINITY
        return out


def imagine(t: float, action: Action, run: Run) -> None:
    """Carry out an action by assuming it succeeds: what the simulator puts in the place of real sites."""
    d = action.data
    if action.kind == "fetch":
        run.current(t, action.site, d["round"])
    elif action.kind == "freeze":
        for site in d["members"]:
            run.frozen(t, site, d["steps"][site])
    elif action.kind == "store":
        run.store_done(t, d["round"], "", "")
    elif action.kind == "attempt":
        for site in d["members"]:
            run.voted(t, site, d["attempt"], "")
    elif action.kind == "evaluate":
        run.evaluated(t, d["round"], None, None)
    elif action.kind == "commit" and d["sender"]:
        run.store_done(t, d["round"] + 1, "", "")


def drive(run: Run, samples: Samples, execute=imagine, journal=lambda records: None, wait=None) -> None:
    """Run on the virtual clock: jump from one moment that matters to the next until the run ends.

    execute(t, action, run) carries an action out and reports back into `run`; `journal` gets the records, before the
    actions that follow from them; `wait(t, run)` is called when only a report can move the run on.
    """
    t = 0.0
    while True:
        for site, mci, ahead in samples.due(t):
            run.observe(t, site, mci, ahead)
        run.advance(t)
        while True:
            records, actions = run.take()
            if records:
                journal(records)
            if not actions:
                break
            for action in actions:
                execute(t, action, run)
        if run.ended:
            return
        if run.phase == "ending" or (run.phase == "reduce" and not run._agreed()):
            wait(t, run)
            continue
        t = max(t, min(run.next_time(), samples.next_time()))


def simulate(cfg, traces: dict[str, Trace] | None = None, decisions: bool = True, folder: Path | None = None) -> dict:
    """The summary of the run this config would make, with its decisions unless told otherwise; nothing is trained.
    folder: where to write what a run would have left: config, journal, intervals, summary."""
    traces = traces or load_traces(cfg)
    prices = load_prices(cfg, traces)
    run, samples = new_run(cfg, traces)
    tally, told, over_s = report.Tally(cfg.sites), [], 0.0

    def take(records: list[dict]) -> None:
        nonlocal over_s
        for r in records:
            over_s = r["t_s"]
            tally.add(r)
            if decisions and r["type"] in ("site", "open", "commit", "cancel", "end"):
                told.append({"t_s": r["t_s"], "site": r.get("site"), "event": r.get("to", r["type"]), "reason": r.get("reason") or _why(r)})

    kept: list[dict] = [{"t_s": 0.0, "type": "genesis", "digest": ""}]
    drive(run, samples, journal=(lambda records: (take(records), kept.extend(records))) if folder else take)
    summary = report.summarize(tally, run.meter.columns(over_s), [], cfg, traces, prices=prices)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        config.OmegaConf.save(cfg, folder / "config.yaml")
        lines = [json.dumps({"n": n} | record) + "\n" for n, record in enumerate(sorted(kept, key=order))]
        (folder / "journal.jsonl").write_text("".join(lines))
        write_intervals(folder / "intervals.csv", run.meter.closed(over_s))
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary | ({"decisions": told} if decisions else {}) | {"exit": run.code}


def _why(record: dict) -> str:
    if record["type"] == "open":
        return f"{record['mode']}: {' + '.join(record['members'])}"
    return f"round {record['round']}, {record['tokens']:,} tokens" if record["type"] == "commit" else ""


SWEPT = ("exit", "tokens", "rounds", "runtime_h", "train_site_hours", "goodput", "energy_kwh", "emissions_kg", "cost", "currency",
         "curtailed_share", "starts", "wasted_starts", "wasted_tokens")  # fmt: skip


def sweep(argv: list[str], grid: list[str]) -> list[dict]:
    """One row for each point of a grid of `key=a,b,...`; the other arguments hold for all of them."""
    axes = []
    for arg in grid:
        key, _, values = arg.partition("=")
        choices = re.split(r",(?![^\[]*\])", values)  # [a,b] is one value
        if not key or not all(choices):
            raise config.BadInput(f"--sweep {arg!r} is not key=a,b,...; say e.g. --sweep policy.off_delay_s=0,300,600")
        axes.append([(key, value) for value in choices])
    if not axes:
        raise config.BadInput("--sweep needs at least one key=a,b,...; say e.g. --sweep policy.off_delay_s=0,300,600")
    points = list(itertools.product(*axes))
    cfgs = [virtual([*argv, *(f"{k}={v}" for k, v in point)]) for point in points]  # all checked before the first is run
    rows = []
    for point, cfg in zip(points, cfgs):
        summary = simulate(cfg, decisions=False)
        rows.append(dict(point) | {k: summary[k] for k in SWEPT} | {f"floor_{k}_kg": v for k, v in summary["floor_kg"].items()})
    return rows


def compare(argv: list[str], names: list[str]) -> list[dict]:
    """One row for each policy: NAME, NAME@HOURS with a deadline, either with /KEY=VALUE of the policy's section. Beside its
    emissions, the floor for its own training hours by the time it took, or by its deadline."""
    cfgs = [virtual([*argv, *policy_keys(name)]) for name in names]
    rows = []
    for name, cfg in zip(names, cfgs):
        traces = load_traces(cfg)
        summary = simulate(cfg, traces, decisions=False)
        by_h = (
            cfg.policy.deadline_h if cfg.policy.name in ("deadline", "plan", "oracle") and cfg.policy.deadline_h else summary["runtime_h"]
        )
        least_kg = floor.with_starts(cfg, traces, summary["train_site_hours"], 3600 * by_h)
        rows.append({"policy": name} | {k: summary[k] for k in COMPARED} | {"floor_kg": least_kg, "by_h": by_h})
    return rows


def policy_keys(name: str) -> list[str]:
    """`deadline@16/forecast=persistence` as arguments."""
    (kind, at, hours), *more = name.split("/")[0].partition("@"), *name.split("/")[1:]
    return [f"policy.name={kind}", *([f"policy.deadline_h={hours}"] if at else []), *(f"policy.{key}" for key in more)]


COMPARED = ("exit", "runtime_h", "emissions_kg", "energy_kwh", "cost", "currency", "train_site_hours", "goodput", "starts", "wasted_starts")


def compared(rows: list[dict]) -> str:
    """The rows as a table in Markdown."""
    paid = next((r["currency"] for r in rows if r["currency"]), None)
    head = ["policy", "runtime h", "kgCO2", "floor kg", "above it", *([paid] if paid else []), "kWh", "goodput", "starts", "wasted"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for r in rows:
        least = r["floor_kg"]
        cells = [r["policy"] + ("" if r["exit"] == 0 else " (budget left)"), f"{r['runtime_h']:.2f}", f"{r['emissions_kg']:.3f}",
                 f"{least:.3f}" if least else "", f"{100 * (r['emissions_kg'] / least - 1):.0f} %" if least else "",
                 *([f"{r['cost']:.2f}"] if paid else []), f"{r['energy_kwh']:.1f}", f"{r['goodput']:.3f}", str(r["starts"]),
                 str(r["wasted_starts"])]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def floors(cfg, rows: list[dict]) -> list[tuple[float, float]]:
    """(hours, kg) of the floor with starts for the training hours of the rows, from the fastest row to the slowest."""
    done = [r for r in rows if r["exit"] == 0] or rows
    hours, traces = max(r["train_site_hours"] for r in done), load_traces(cfg)
    first, last = min(r["runtime_h"] for r in done), max(r["runtime_h"] for r in done)
    at = np.linspace(first - 0.05 * (last - first), last + 0.05 * (last - first), 12) if last > first else [first]
    points = [(float(h), floor.with_starts(cfg, traces, hours, 3600 * h)) for h in at]
    return [(h, kg) for h, kg in points if kg]


def virtual(argv: list[str]):
    """The config of a simulation: always on the virtual clock."""
    cfg = config.load(argv)
    return cfg if cfg.clock.mode == "virtual" else config.load([*argv, "clock.mode=virtual"])


def main(argv: list[str]) -> int:
    as_json, write = "--json" in argv, "--write" in argv
    argv = [a for a in argv if a not in ("--json", "--write")]
    if "--policies" in argv:
        at = argv.index("--policies")
        names, rest = (argv[at + 1].split(",") if at + 1 < len(argv) else []), argv[at + 2 :]
        out = Path(rest[rest.index("--out") + 1]) if "--out" in rest[:-1] else None
        keys = argv[:at] + [a for i, a in enumerate(rest) if a != "--out" and (i == 0 or rest[i - 1] != "--out")]
        if not all(names) or not names:
            raise config.BadInput(
                "--policies needs names, e.g. --policies threshold/off_delay_s=600,forecast_gate,plan@14.6 (a deadline in hours)"
            )
        rows = compare(keys, names)
        cfg = virtual([*keys, *policy_keys(names[0])])
        import figures  # matplotlib: only here

        picture = figures.pareto(rows, floors(cfg, rows), out or config.run_dir(cfg) / "figures")
        print(json.dumps({"rows": rows, "figure": str(picture)}) if as_json else compared(rows))
        print(f"written: {picture}", file=sys.stderr)
        return 0
    if "--sweep" in argv:
        at = argv.index("--sweep")
        rows = sweep(argv[:at], argv[at + 1 :])
        if as_json:
            print(json.dumps({"rows": rows}))
        else:
            table = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        return 0
    cfg = virtual(argv)
    folder = config.run_dir(cfg) if write else None
    if folder and (folder / "state").exists():
        raise config.BadInput(f"{folder} holds a run that was trained; take run=NEW for the simulated one")
    summary = simulate(cfg, folder=folder)
    code = summary.pop("exit")
    if as_json:
        print(json.dumps(summary))
    else:
        for d in summary["decisions"]:
            if d["event"] in ("provisioning", "on", "off", "end"):
                print(f"{report.clock(cfg, d['t_s'])}  {d['site'] or '':16} {d['event']:13} {d['reason']}")
        print(report.table(summary, cfg))
    return code


if __name__ == "__main__":
    config.command(main)
