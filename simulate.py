"""The same run without training: what a schedule would do and emit, in milliseconds.

    python simulate.py configs/demo.yaml [key=value ...] [--json] [--write]      --write: a run folder for figures.py
    python simulate.py configs/ours.yaml --sweep policy.off_delay_s=0,300,600 rounds.train_s=300,600      a CSV over the grid

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
import report
from carbon import Meter, Trace, load_prices, load_traces, write_intervals
from journal import order
from rounds import Action, Run, facts_of
from scheduler import INFINITY, Schedule, Site, policy_of


def new_run(cfg, traces: dict[str, Trace]) -> tuple[Run, "Samples"]:
    """The machine of a run at its very start, and the samples that drive it. traces: region -> Trace."""
    start, timed = config.start_unix(cfg), cfg.clock.mode == "virtual"
    by_site = {name: traces[site.region] for name, site in cfg.sites.items()}
    end_s = min(float(min(t.end for t in by_site.values()) - start), (cfg.clock.max_hours or INFINITY) * 3600)
    policy = policy_of(cfg.policy, max(t.step_s for t in by_site.values()))
    sites = {name: Site(s.provision_s, s.startup_s) for name, s in cfg.sites.items()}
    samples = Samples(by_site, start, end_s, policy.matters if timed else None)
    schedule = Schedule(policy, sites, timed, samples.at if timed else None)
    return Run(facts_of(cfg, end_s), schedule, Meter(list(sites))), samples


class Samples:
    """What the sites' grids report, in time order, as seconds since clock.start. A trace that ends says unknown."""

    def __init__(self, traces: dict[str, Trace], start_unix: int, until_s: float = INFINITY, matters=None):
        """traces: site -> carbon.Trace; matters(values) -> bool per sample: hand out only these (and a site's first)."""
        self._traces, self._start, self._sites = traces, start_unix, list(traces)
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
        times, values, owners = np.concatenate(times), np.concatenate(values), np.concatenate(owners)
        by_time = np.lexsort((owners, times))
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

    def due(self, t: float) -> list[tuple[str, float | None, tuple | None]]:
        """(site, gCO2/kWh or None, forecast issued with it or None) of every sample at or before t not handed out yet."""
        out = []
        while self._next_time <= t:
            i = self._next
            value = float(self._values[i])
            out.append((self._sites[self._owners[i]], None if value != value else value, None))
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


def virtual(argv: list[str]):
    """The config of a simulation: always on the virtual clock."""
    cfg = config.load(argv)
    return cfg if cfg.clock.mode == "virtual" else config.load([*argv, "clock.mode=virtual"])


def main(argv: list[str]) -> int:
    as_json, write = "--json" in argv, "--write" in argv
    argv = [a for a in argv if a not in ("--json", "--write")]
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
