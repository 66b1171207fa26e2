"""A second opinion on our accounting: Vessim's GridImportEmissions on the same power and the same grids.

    python bench/referee.py [RUN_DIR] [--json]        (or: make referee)

Two cases: 1 kW at every site over the whole demo day, and the power of a recorded run (RUN_DIR; without one, the demo's
schedule as simulated). Vessim (github.com/dos-group/vessim) steps through both second by second, with the mean power of
each second, as a meter would read it, in an environment of its own, .venv-vessim, which environments.py makes on first use.
Ours are exact integrals. Bound: 0.1 %.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import environments

REPO = Path(__file__).resolve().parent.parent
STEP_S = 1


def theirs(cases: dict) -> dict:
    """Runs inside .venv-vessim. cases: name -> site -> {edges_s, watts, kg_per_kwh} -> name -> kgCO2."""
    import pandas as pd
    import vessim as vs

    out = {}
    for name, sites in cases.items():
        recorder_metrics = []
        environment = vs.Environment(sim_start="2026-01-11 17:00:00", step_size=STEP_S)
        for site, s in sites.items():
            index = s["edges_s"]  # Vessim wants a value at the end too
            environment.add_microgrid(
                name=site,
                actors=[vs.Consumer("gpus", vs.Trace(pd.Series(s["watts"], index=index)))],
                dispatchables=[vs.GridConnection()],
                grid_signals={"carbon": vs.Trace(pd.Series(s["kg_per_kwh"], index=index))},
            )
            recorder_metrics.append(vs.GridImportEmissions(site, "carbon"))
        recorder = vs.Recorder(metrics=False, timeseries=False, custom_metrics={"kg": recorder_metrics})
        environment.add_controller(recorder)
        environment.run(until=max(s["edges_s"][-1] for s in sites.values()))
        out[name] = sum(values["kg"] for values in recorder.metrics["microgrids"].values())
    return out


def main(argv: list[str]) -> int:
    if argv == ["--inside"]:
        print(json.dumps(theirs(json.load(sys.stdin))))
        return 0
    sys.path[:0] = [str(REPO)]
    import numpy as np

    import carbon
    import config
    import figures
    import simulate

    folders, cases, ours = [a for a in argv if a != "--json"], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        if not folders:
            cfg = config.load([str(REPO / "configs/demo.yaml"), f"carbon.trace={REPO / 'traces/paper_day.csv'}", "price.trace=null"])
            simulate.simulate(cfg, folder=Path(scratch) / "demo")
        run = figures.load(Path(folders[0]) if folders else Path(scratch) / "demo")
    cfg, start = run["cfg"], config.start_unix(run["cfg"])
    end_s = min(t.end for t in run["traces"].values()) - start
    constant = carbon.columns([carbon.Interval(site, "training", 0.0, float(end_s)) for site in cfg.sites])
    for name, columns in (("1 kW at every site", constant), (f"recorded run {cfg.run}", carbon.columns(run["rows"]))):
        cases[name], ours[name] = {}, 0.0
        for site, spec in cfg.sites.items():
            readings = [] if columns is constant else run["readings"]
            edges, kw, mci = figures.draw(run | {"rows": columns, "readings": readings}, site)
            kw = kw / spec.train_kw if columns is constant else kw
            ticks = np.arange(0.0, edges[-1] + STEP_S, STEP_S)  # what a meter would read: the mean power of each second
            joules = np.interp(ticks, edges, np.concatenate(([0.0], np.cumsum(1000 * kw * np.diff(edges)))))
            factor = mci[np.clip(np.searchsorted(edges, ticks, side="right") - 1, 0, len(mci) - 1)] / 1000
            watts = [*np.diff(joules) / STEP_S, 0.0]
            cases[name][site] = {"edges_s": ticks.tolist(), "watts": watts, "kg_per_kwh": factor.tolist()}
            if columns is constant:
                ours[name] += carbon.emissions_kg(1.0, run["traces"][spec.region], start, start + end_s)
        if columns is not constant:
            ours[name] = carbon.account(columns, cfg, run["traces"], run["readings"])["emissions_kg"]
    call = [environments.make("vessim") / "python", __file__, "--inside"]
    done = subprocess.run(call, input=json.dumps(cases), stdout=subprocess.PIPE, text=True, check=True)
    rows = {
        name: {"ours_kg": ours[name], "vessim_kg": kg, "difference": kg / ours[name] - 1} for name, kg in json.loads(done.stdout).items()
    }
    if "--json" in argv:
        print(json.dumps(rows))
    else:
        for name, r in rows.items():
            print(f"{name}: ours {r['ours_kg']:.6f} kg, Vessim {r['vessim_kg']:.6f} kg, {100 * r['difference']:+.4f} % (bound 0.1 %)")
    return 0 if all(abs(r["difference"]) < 1e-3 for r in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
