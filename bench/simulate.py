"""How fast the simulator is: the paper's day; a year of 5-minute samples at 3 and at 300 sites; a month at 100 and at 1,000.

    python bench/simulate.py [--sites 300] [--days 365] [--json] [key=value ...]        (or: make bench-simulate)

The months' grids are traces/make_regions.py's, with the paper's machines at each; key=value changes the config of all but the day
(policy.max_sites=32). The years' traces are made up, a different one per site: a solar valley of random depth each day with noise
that flickers around the threshold, so that sites join and leave all the time (their number a day is printed). The budget never ends.
Seconds are those of `simulate` inside the process, traces in memory, summary and decisions included; memory is the
largest resident size of a process that does only this.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

import carbon  # noqa: E402
import config  # noqa: E402
import simulate  # noqa: E402
from traces import make_regions  # noqa: E402

STEP_S, DAY = 300, 288


def made_up(site: int, days: int) -> np.ndarray:
    """(days x 288,) gCO2/kWh of a made-up grid."""
    rng = np.random.Generator(np.random.PCG64(site))
    hour = np.arange(DAY) / 12
    noon, width = rng.uniform(0, 24), rng.uniform(3, 6)
    valley = np.exp(-(((hour - noon + 12) % 24 - 12) ** 2) / (2 * width**2))
    depth = rng.uniform(0.5, 1.3, (days, 1)) * 430
    return np.maximum(0.0, 450 - depth * valley + rng.normal(0, 15, (days, DAY))).reshape(-1)


def year(num_sites: int, days: int, regions: bool = False, changes: tuple[str, ...] = ()):
    """A config with that many sites, and their traces: made up as above, or traces/make_regions.py's."""
    sites = {f"site{i:03d}": {"region": f"R{i}", "tokens_per_s": 190832, "idle_kw": 0.468, "train_kw": 2.024,
                              "provision_s": 240, "startup_s": 100} for i in range(num_sites)}  # fmt: skip
    raw = {"run": "year", "clock": {"mode": "virtual", "start": "2026-01-01T00:00:00Z"}, "sites": sites,
           "policy": {"name": "threshold", "off_delay_s": 600},
           "data": {"tokens_per_step": 524288}, "budget": {"tokens": 524288 * 10**9}, "model": {"seq_len": 2048}}  # fmt: skip
    cfg = config.OmegaConf.merge(config.OmegaConf.structured(config.Config), raw, config.OmegaConf.from_dotlist(list(changes)))
    config._check(cfg)
    config.OmegaConf.set_readonly(cfg, True)
    begin = config.start_unix(cfg)
    starts = begin + STEP_S * np.arange(days * DAY, dtype=np.int64)
    grids = (v for _, v in make_regions.regions(num_sites, days, begin)) if regions else (made_up(i, days) for i in range(num_sites))
    return cfg, {f"R{i}": carbon.Trace(f"R{i}", starts, values, STEP_S) for i, values in enumerate(grids)}


def day() -> dict:
    cfg = config.load([str(REPO / "configs" / "paper.yaml"), f"carbon.trace={REPO / 'traces' / 'paper_day.csv'}"])
    traces, seconds = carbon.load_traces(cfg), []
    for _ in range(20):
        began = time.perf_counter()
        simulate.simulate(cfg, traces)
        seconds.append(time.perf_counter() - began)
    return {"what": "the paper's day, 3 sites (median of 20)", "seconds": statistics.median(seconds)}


def many(what: str, num_sites: int, days: int, changes: list[str]) -> dict:
    import resource

    cfg, traces = year(num_sites, days, what == "grids", tuple(changes))
    began = time.perf_counter()
    summary = simulate.simulate(cfg, traces)
    seconds = time.perf_counter() - began
    moves = sum(1 for d in summary["decisions"] if d["event"] in ("provisioning", "off"))
    return {
        "what": f"{days} days of 5-minute samples, {num_sites} sites" + (" on synthetic grids" if what == "grids" else ""),
        "seconds": seconds, "rounds": summary["rounds"], "starts_and_stops_a_day": round(moves / days, 1),
        "train_site_hours": round(summary["train_site_hours"]), "tokens_e9": summary["tokens"] / 1e9, "kg": summary["emissions_kg"],
        "floor_kg": summary["floor_kg"]["lp"], "goodput": summary["goodput"], "curtailed_share": summary["curtailed_share"],
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    if argv[:1] == ["--one"]:
        print(json.dumps(day() if len(argv) == 1 else many(argv[1], int(argv[2]), int(argv[3]), argv[4:])))
        return 0
    as_json, changes = "--json" in argv, [a for a in argv if "=" in a]
    sites = int(argv[argv.index("--sites") + 1]) if "--sites" in argv else 300
    days = int(argv[argv.index("--days") + 1]) if "--days" in argv else 365
    rows = []
    parts = ["made_up", 3, days], ["made_up", sites, days], ["grids", 100, min(30, days)], ["grids", 1000, min(30, days)]
    for part, bound in zip([[], *([*part, *changes] for part in parts)], (0.010, 1.0, 60.0, 10.0, 120.0)):
        done = subprocess.run([sys.executable, __file__, "--one", *map(str, part)], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout) | {"bound_s": bound})
        r = rows[-1]
        more = "".join(f", {k.replace('_', ' ')} {v:,.2f}" for k, v in r.items() if k not in ("what", "seconds", "bound_s"))
        print(f"{r['what']}: {r['seconds']:.4f} s (bound {bound:g}){more}", file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    config.command(main)
