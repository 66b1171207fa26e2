"""The same run without training: what a schedule would do and emit, in milliseconds.

    python simulate.py configs/demo.yaml [key=value ...] [--json]

`drive` runs the very `scheduler` and `rounds` of the live run on the virtual clock; `imagine` puts "a site would have
trained n steps" in the place of real sites. The coordinator's virtual clock is the same `drive` with real ones.
"""

import config
from carbon import Meter, Trace
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
