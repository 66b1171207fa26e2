"""The same run without training: what a schedule would do and emit, in milliseconds.

    python simulate.py configs/demo.yaml [key=value ...] [--json]

`drive` runs the very `scheduler` and `rounds` of the live run on the virtual clock; `imagine` puts "a site would have
trained n steps" in the place of real sites. The coordinator's virtual clock is the same `drive` with real ones.
"""

import json

import config
import report
from carbon import Meter, Trace, load_traces
from rounds import Action, Run, facts_of
from scheduler import INFINITY, Schedule, Site, policy_of


def new_run(cfg, traces: dict[str, Trace]) -> tuple[Run, "Samples"]:
    """The machine of a run at its very start, and the samples that drive it. traces: region -> Trace."""
    start = config.start_unix(cfg)
    by_site = {name: traces[site.region] for name, site in cfg.sites.items()}
    end_s = min(float(min(t.end for t in by_site.values()) - start), (cfg.clock.max_hours or INFINITY) * 3600)
    policy = policy_of(cfg.policy, max(t.step_s for t in by_site.values()))
    sites = {name: Site(s.provision_s, s.startup_s) for name, s in cfg.sites.items()}
    schedule = Schedule(policy, sites, timed=cfg.clock.mode == "virtual")
    return Run(facts_of(cfg, end_s), schedule, Meter(list(sites))), Samples(by_site, start)


class Samples:
    """What the sites' grids report, in time order, as seconds since clock.start. Ends with unknown."""

    def __init__(self, traces: dict, start_unix: int):
        """traces: site -> carbon.Trace."""
        events = []
        for order, (site, trace) in enumerate(traces.items()):
            events.append((0.0, order, site, trace.at(start_unix)))
            later = trace.starts > start_unix
            events += [(float(s - start_unix), order, site, float(v)) for s, v in zip(trace.starts[later], trace.values[later])]
            events.append((float(trace.end - start_unix), order, site, None))
        self._events = sorted(events, key=lambda e: e[:2])
        self._next = 0

    def next_time(self) -> float:
        return self._events[self._next][0] if self._next < len(self._events) else INFINITY

    def due(self, t: float) -> list[tuple[str, float | None]]:
        """(site, gCO2/kWh or None) of every sample at or before t not handed out yet."""
        out = []
        while self.next_time() <= t:
            _, _, site, value = self._events[self._next]
            out.append((site, value))
            self._next += 1
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
        for site, mci in samples.due(t):
            run.observe(t, site, mci)
        run.advance(t)
        while True:
            records, actions = run.take()
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


def simulate(cfg, traces: dict[str, Trace] | None = None) -> dict:
    """The summary of the run this config would make, with its decisions; nothing is trained."""
    traces = traces or load_traces(cfg)
    run, samples = new_run(cfg, traces)
    records: list[dict] = [{"t_s": 0.0, "type": "genesis", "digest": ""}]
    drive(run, samples, journal=records.extend)
    rows = run.meter.closed(records[-1]["t_s"])
    summary = report.summarize(records, rows, [], cfg, traces)
    events = [r for r in records if r["type"] in ("site", "open", "commit", "cancel", "end")]
    summary["decisions"] = [
        {"t_s": r["t_s"], "site": r.get("site"), "event": r.get("to", r["type"]), "reason": r.get("reason") or _why(r)} for r in events
    ]
    return summary | {"exit": run.code}


def _why(record: dict) -> str:
    if record["type"] == "open":
        return f"{record['mode']}: {' + '.join(record['members'])}"
    return f"round {record['round']}, {record['tokens']:,} tokens" if record["type"] == "commit" else ""


def main(argv: list[str]) -> int:
    as_json = "--json" in argv
    cfg = config.load([a for a in argv if a != "--json"])
    virtual = config.OmegaConf.merge(cfg, {"clock": {"mode": "virtual"}})
    summary = simulate(virtual)
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
