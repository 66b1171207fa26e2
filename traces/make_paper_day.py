"""Writes traces/paper_day.csv: a reconstruction of the marginal carbon intensity of 2026-01-11 17:00 to
2026-01-12 11:00 UTC in four regions, made from published facts of arXiv:2602.22760 (window edges, hourly means,
regional means). It is not the WattTime-derived series the paper used: between the published facts the values are
smooth fill with a small seeded ripple. Run it again and the same bytes come out.

    python traces/make_paper_day.py
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

START = datetime(2026, 1, 11, 17, tzinfo=UTC)
STEP_MIN = 5
NUM_SAMPLES = 217
MEAN_G_PER_KWH = {"CAISO_NORTH": 318.8, "SPP_TX": 408.0, "NEM_SA": 350.4, "DE": 751.6}

# Windows below 100 gCO2/kWh: (from, to, mean in each clock hour touched). Times UTC, half-open.
WINDOWS = {
    "CAISO_NORTH": [("17:05", "19:05", (52, 76, 93)), ("19:20", "23:25", (87, 83, 84, 70, 51))],
    "SPP_TX": [("03:05", "03:15", (47,)), ("03:20", "09:25", (25, 16, 12, 10, 7, 20, 60)), ("09:30", "10:05", (60, 60))],
    "NEM_SA": [("21:40", "08:10", (0,) * 12)],
    "DE": [],
}
SINGLE = {"SPP_TX": {"03:15": 661.0, "09:25": 662.0}, "NEM_SA": {"08:05": 47.0}}
# Level outside: (from the start, level), the first switching time is the start of the last window.
OUTSIDE = {"CAISO_NORTH": (443, 443), "SPP_TX": (646, 599), "NEM_SA": (852, 808), "DE": (719, 795)}


def index(clock: str) -> int:
    """Sample index of a clock time within the 18 hours from 17:00."""
    hours, minutes = map(int, clock.split(":"))
    return ((hours - 17) % 24 * 60 + minutes) // STEP_MIN


def region(name: str, rng: np.random.Generator) -> np.ndarray:
    """(217,) gCO2/kWh."""
    stamps = [START + timedelta(minutes=STEP_MIN * i) for i in range(NUM_SAMPLES)]
    inside = np.zeros(NUM_SAMPLES, bool)
    values = np.zeros(NUM_SAMPLES)
    first = min((index(a) for a, _, _ in WINDOWS[name]), default=NUM_SAMPLES)
    before, after = OUTSIDE[name]
    if name == "DE":
        values[:] = np.linspace(before, after, NUM_SAMPLES) + 2.0 * np.sin(np.arange(NUM_SAMPLES) / 9.0)
        values = np.clip(values + (MEAN_G_PER_KWH[name] - values.mean()), before, after)
    else:
        values[:] = np.where(np.arange(NUM_SAMPLES) < first, before, after)
        values += rng.uniform(-4.0, 4.0, NUM_SAMPLES)
    for a, b, means in WINDOWS[name]:
        lo, hi = index(a), index(b)
        inside[lo:hi] = True
        hours = [s.replace(minute=0) for s in stamps[lo:hi]]
        for hour, mean in zip(sorted(set(hours)), means, strict=True):
            where = lo + np.flatnonzero([h == hour for h in hours])
            room = min(mean, 99.0 - mean, 5.0)
            ripple = rng.uniform(-1.0, 1.0, len(where)) * max(room, 0.0)
            values[where] = mean + (ripple - ripple.mean() if len(where) > 1 else 0.0)
    if name == "CAISO_NORTH":
        values[index("19:05") : index("19:20")] = 458.0
    if name != "DE":  # the last facts are means: shift what lies outside the windows until the region's mean holds
        fixed = inside.copy()
        fixed[[index(c) for c in SINGLE.get(name, {})]] = True
        if name == "CAISO_NORTH":
            fixed[index("19:05") : index("19:20")] = True
        for clock, value in SINGLE.get(name, {}).items():
            values[index(clock)] = value
        miss = MEAN_G_PER_KWH[name] * NUM_SAMPLES - values.sum()
        values[~fixed] += np.clip(miss / (~fixed).sum(), -6.0, 6.0)
    assert (values[inside] < 100).all() and (values[~inside] > 400).all() and (values >= 0).all(), name
    assert abs(values.mean() / MEAN_G_PER_KWH[name] - 1) < 0.01, (name, values.mean())
    return values


def main() -> None:
    rng = np.random.default_rng(20260111)
    columns = {name: region(name, rng) for name in WINDOWS}
    lines = ["time," + ",".join(columns)]
    for i in range(NUM_SAMPLES):
        stamp = START + timedelta(minutes=STEP_MIN * i)
        lines.append(stamp.strftime("%Y-%m-%dT%H:%M:%SZ") + "".join(f",{v[i]:.1f}" for v in columns.values()))
    path = Path(__file__).with_name("paper_day.csv")
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.name}: {NUM_SAMPLES} samples, means " + ", ".join(f"{n} {v.mean():.1f}" for n, v in columns.items()))


if __name__ == "__main__":
    main()
