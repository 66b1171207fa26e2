"""Writes traces/paper_day_price.csv: synthetic hourly electricity prices, USD/MWh, for the regions and hours of
traces/paper_day.csv. No market's data: each hour's price is a level of the region's own, a daily shape (cheap midday
sun, dear evening) and a seeded ripple, and the cleaner the hour's marginal unit, the more it falls towards what wind
and solar pay to stay on, which is negative. The levels are of the size that CAISO NP15, SPP, South Australia and
Germany see in January, put in one currency. Run it again and the same bytes come out.

    python traces/make_paper_day_price.py
"""

import csv
from datetime import datetime
from pathlib import Path

import numpy as np

# USD/MWh: (level with a fossil unit at the margin, with none, local hour at 00:00 UTC)
REGIONS = {"CAISO_NORTH": (48.0, -9.0, 16), "SPP_TX": (31.0, -16.0, 18), "NEM_SA": (74.0, -38.0, 10.5), "DE": (96.0, 4.0, 1)}
CLEAN = 60.0  # gCO2/kWh, hour's mean: at or below, a clean unit sets the price all hour


def main() -> None:
    folder = Path(__file__).parent
    with open(folder / "paper_day.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    hours = sorted({row["time"][:13] for row in rows})
    rng, columns = np.random.default_rng(20260111), {}
    for region, (fossil, clean, offset) in REGIONS.items():
        mci = np.array([np.mean([float(r[region]) for r in rows if r["time"][:13] == hour]) for hour in hours])
        local = np.array([(int(hour[11:]) + offset + 0.5) % 24 for hour in hours])
        daily = 1.0 + 0.16 * np.cos((local - 18.5) * np.pi / 12) - 0.1 * np.exp(-(((local - 12.5) / 2.5) ** 2))
        share = np.clip((mci - CLEAN) / (mci.max() - CLEAN), 0.0, 1.0)  # of the hour that a fossil unit sets the price
        columns[region] = share * fossil * daily + (1 - share) * clean + rng.normal(0.0, 1.5, len(hours))
    lines = ["time," + ",".join(columns)]
    lines += [f"{hour}:00:00Z" + "".join(f",{prices[i]:.2f}" for prices in columns.values()) for i, hour in enumerate(hours)]
    path = folder / "paper_day_price.csv"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.name}: {len(hours)} hours from {datetime.fromisoformat(rows[0]['time'])}, means "
          + ", ".join(f"{region} {prices.mean():.1f}" for region, prices in columns.items()))  # fmt: skip


if __name__ == "__main__":
    main()
