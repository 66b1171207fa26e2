"""Does `deadline` keep its deadlines, and at what cost? Random draws on real months, beside the floor with the truth known.

    python bench/deadline.py [--draws 1000] [--seed 1] [--forecast yesterday] [--jobs 2] [--policy deadline] [--json]

A draw: one to three sites, each on one of two months of Californian 5-minute intensity ($REFERENCE_DATA), 4 to 48 site-hours
of work, a start somewhere after the first day of the month, and a deadline of 1.05 to 3 times what always-on takes, starts
included. Missed: the budget was not committed by then. The floor (floor.with_starts) knows the month, trains the
same site-hours by the same deadline, and neither averages nor loses time to starts.
"""

import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import carbon
import config
import floor
import simulate
from carbon import Trace, read_trace

REPO = Path(__file__).resolve().parent.parent
MONTHS = (("caiso_north_2023-06.csv", None, "g/kWh"), ("sgip_pge_2020-04_forecasts.csv.gz", "moer", "kg/kWh"))
SITES = ("california", "texas", "south_australia")
RATE, PER_STEP = 190_832, 524_288


def months(folder: Path) -> list[Trace]:
    """Both months, each moved so that it begins at 2026-01-01 00:00 UTC."""
    out = []
    for name, column, unit in MONTHS:
        trace = read_trace(str(folder / name), column, unit=unit)
        out.append(Trace(name, trace.starts - trace.begin + 1_767_225_600, trace.values, trace.step_s, "hold", name))
    return out


def draw(rng: np.random.Generator) -> dict:
    return {"sites": int(rng.integers(1, 4)), "months": rng.integers(0, 2, 3).tolist(), "hours": float(rng.uniform(4, 48)),
            "slack": float(rng.uniform(1.05, 3)), "start": float(rng.uniform())}  # fmt: skip


def play(case: dict, traces: list[Trace], policy: str, *more: str) -> dict:
    """What became of a draw. -> hours, deadline_h, done_h, kg, floor_kg, always_kg"""
    names = SITES[: case["sites"]]
    tokens = max(1, round(case["hours"] * 3600 * RATE / PER_STEP)) * PER_STEP
    longest = 3.2 * (tokens / RATE / len(names) * 1.3 + 900)
    first, last = traces[0].begin + 86400, min(t.end for t in traces) - longest
    start = first + int(case["start"] * max(0.0, last - first)) // 300 * 300
    base = [str(REPO / "configs/paper.yaml"), f"budget.tokens={tokens}", f"only=[{','.join(names)}]", "carbon.baseline_regions=[]",
            f"clock.start={np.datetime64(start, 's')}Z"]  # fmt: skip

    def run(*args: str):
        cfg = config.load([*base, *args])
        by_region = {cfg.sites[name].region: traces[m] for name, m in zip(names, case["months"])}
        machine, samples = simulate.new_run(cfg, by_region)
        records: list[dict] = []
        simulate.drive(machine, samples, journal=records.extend)
        end_s = records[-1]["t_s"]
        bill = carbon.account(machine.meter.columns(end_s), cfg, by_region)
        starts = sum(r["type"] == "site" and r["to"] == "provisioning" for r in records)
        hours = sum(s["train_hours"] for s in bill["sites"].values())
        return cfg, by_region, {"done_h": end_s / 3600, "code": machine.code, "kg": bill["emissions_kg"], "hours": hours, "starts": starts}

    *_, always = run("policy.name=always")
    deadline_h = case["slack"] * always["done_h"]
    cfg, by_region, ours = run(f"policy.name={policy}", f"policy.deadline_h={deadline_h}", *more)
    bound = floor.with_starts(cfg, by_region, ours["hours"], deadline_h * 3600)
    kept = ours["code"] == 0 and ours["done_h"] <= deadline_h
    return case | ours | {"deadline_h": deadline_h, "kept": kept, "floor_kg": bound, "always_kg": always["kg"]}


def _play(args):
    return play(*args)


def main(argv: list[str]) -> int:
    parser = config.Parser()
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--forecast", default="yesterday")
    parser.add_argument("--policy", default="deadline")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args, more = parser.parse_known_args(argv)
    if "REFERENCE_DATA" not in os.environ:
        raise config.BadInput("REFERENCE_DATA is not set; say where the reference traces lie")
    traces, rng = months(Path(os.environ["REFERENCE_DATA"])), np.random.default_rng(args.seed)
    cases = [draw(rng) for _ in range(args.draws)]
    work = [(case, traces, args.policy, f"policy.forecast={args.forecast}", *more) for case in cases]
    with get_context("spawn").Pool(args.jobs) as pool:
        rows = pool.map(_play, work, chunksize=4)
    if args.json:
        print(json.dumps({"rows": rows}))
        return 0
    missed = [r for r in rows if not r["kept"]]
    for r in missed[:10]:
        print(f"missed by {60 * (r['done_h'] - r['deadline_h']):.1f} min: {r}")
    print(f"{args.policy}, {args.forecast}: {len(rows)} draws, {len(missed)} missed")
    judged = [r for r in rows if r["floor_kg"]]
    for what, some in [("all", judged)] + [(f"{n} site{'s'[: n - 1]}", [r for r in judged if r["sites"] == n]) for n in (1, 2, 3)]:
        if not some:
            continue
        ratio, saved = (np.array([r["kg"] / r[k] for r in some]) for k in ("floor_kg", "always_kg"))
        low, mid, high = np.quantile(ratio, (0.05, 0.5, 0.95))
        print(f"  {what:8} emissions / floor: median {mid:.3f} (5 % {low:.3f}, 95 % {high:.3f}); / always on: {np.median(saved):.3f}; "
              f"starts: median {np.median([r['starts'] for r in some]):.0f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    config.command(main, parses=True)
