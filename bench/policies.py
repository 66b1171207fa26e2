"""Which online policy starts and stops best? One site, whole months of real 5-minute intensity, work without end.

    python bench/policies.py [--months all|NAME,...] [--json] [key=value ...]

Per month and policy: grams of CO2 per kWh of training (all the site drew, starts included), training hours, starts, and
starts that never trained (wasted). The months come from $REFERENCE_DATA, and from traces/make_regions.py. Restart: 340 s
at idle power; thresholds of 100 g/kWh and no delays unless given as key=value. `issued` uses the forecasts that were published.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import carbon
import config
import simulate

REPO = Path(__file__).resolve().parent.parent
POLICIES = {
    "threshold, paper": ("policy.name=threshold", "policy.off_delay_s=600"),
    "threshold": ("policy.name=threshold",),
    "break_even": ("policy.name=break_even",),
    "forecast_gate, persistence": ("policy.name=forecast_gate", "policy.forecast=persistence"),
    "forecast_gate, yesterday": ("policy.name=forecast_gate", "policy.forecast=yesterday"),
    "forecast_gate, issued": ("policy.name=forecast_gate", "policy.forecast=issued"),
    "forecast_gate, truth": ("policy.name=forecast_gate", "policy.forecast=truth"),
    "percentile": ("policy.name=percentile",),
    "plan, yesterday": ("policy.name=plan", "policy.forecast=yesterday", "policy.horizon_h=6"),
}


def months() -> dict[str, tuple]:
    """name -> (config keys that read it, has forecasts)"""
    folder, out = Path(os.environ.get("REFERENCE_DATA", "/nonexistent")), {}
    for name, path, region, unit in (
        ("sgip_pge_2020-04", folder / "sgip_pge_2020-04_forecasts.csv.gz", "moer", "kg/kWh"),
        ("caiso_north_2023-06", folder / "caiso_north_2023-06.csv", None, "g/kWh"),
    ):
        if path.is_file():
            region = region or carbon.read_table(str(path))[0][1]
            out[name] = (f"carbon.trace={path}", f"carbon.unit={unit}"), region, path.suffix == ".gz"
    return out


def play(args: tuple, region: str, *policy: str) -> dict:
    """A month of one policy. -> g_per_kwh, hours, starts, wasted"""

    def load(start: int):
        return config.load([
            str(REPO / "configs/paper.yaml"), "only=[california]", f"sites.california.region={region}", "carbon.baseline_regions=[]",
            "budget.tokens=5242880000000", "policy.off_delay_s=0", f"clock.start={np.datetime64(start, 's')}Z", *args, *policy,
        ])  # fmt: skip

    c = load(0).carbon
    trace = carbon.read_trace(c.trace, region, unit=c.unit)
    cfg = load(trace.begin)
    run, samples = simulate.new_run(cfg, {region: trace})
    records: list[dict] = []
    simulate.drive(run, samples, journal=records.extend)
    end_s = records[-1]["t_s"]
    bill = carbon.account(run.meter.columns(end_s), cfg, {region: trace})
    hours = bill["sites"]["california"]["train_hours"]
    starts, wasted, trained = 0, 0, True
    for row in run.meter.closed(end_s):
        if row.state == "provisioning":
            starts, wasted, trained = starts + 1, wasted + (not trained), False
        trained |= row.state == "training"
    kwh = hours * cfg.sites.california.train_kw
    return {
        "g_per_kwh": 1000 * bill["emissions_kg"] / kwh if kwh else None,
        "hours": hours,
        "starts": starts,
        "wasted": wasted + (not trained),
    }


def main(argv: list[str]) -> int:
    parser = config.Parser()
    parser.add_argument("--months", default="all")
    parser.add_argument("--json", action="store_true")
    args, more = parser.parse_known_args(argv)
    rows = []
    for month, (keys, region, forecasts) in months().items():
        if args.months not in ("all", month):
            continue
        at_once = None
        for name, policy in POLICIES.items():
            if "issued" in name and not forecasts:
                continue
            r = play(keys, region, *policy, *more)
            at_once = r if name == "threshold" else at_once
            rows.append({"month": month, "policy": name} | r)
            if not args.json:
                share = f"{100 * r['hours'] / at_once['hours']:5.1f} %" if at_once else "       "
                print(f"{month:22} {name:28} {r['g_per_kwh']:6.2f} g/kWh  {r['hours']:6.1f} h {share}  {r['starts']:4} starts, "
                      f"{r['wasted']:3} wasted", flush=True)  # fmt: skip
    if args.json:
        print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    config.command(main, parses=True)
