"""Synthetic grids: marginal carbon intensity of any number of regions, 5-minute samples, the same for the same seed.

    python traces/make_regions.py OUT.csv [--regions 100] [--days 30] [--start 2026-04-01T00:00:00Z] [--seed 1]

For runs larger than the grids one has data of (bench/simulate.py, bench/clients.py). Regions lie on five continents; a
third are solar (curtailed around local noon, more so in their summer and under clear skies), a third windy (curtailed for
hours or days, by night rather than by day), a third thermal (never). Weather lasts, and neighbours share it: its correlation
falls to 1/e over LENGTH_KM. Within a window the margin flickers over 5 to 80 minutes, as market dispatch does.

A grid is curtailed while its surplus is above 0; its marginal intensity is then that of curtailed power plus a little, else
that of the thermal plant at the margin. What is tuned, and to what (traces/README.md compares): the flicker to the lengths of
windows and the solar surplus to the share of time below 100 gCO2/kWh of measured Californian months, the wind's to the
windy day of arXiv:2602.22760; levels of the plants at the margin to both. Nothing here is a measurement.
"""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import config  # noqa: E402

STEP_S, HOUR = 300, 12  # seconds of a sample, samples of an hour
BOXES = np.array([(-122, -76, 28, 48), (-8, 28, 37, 58), (116, 150, -38, -24), (70, 86, 12, 28), (-70, -48, -34, -10)], float)
KINDS = ("solar", "wind", "thermal")
LENGTH_KM = 600.0  # of the weather
LASTS_H = {"solar": 30.0, "wind": 15.0, "thermal": 15.0}  # likewise, to 1/e
FLICKER = {1: 0.03, 2: 0.04, 4: 0.06, 8: 0.06, 16: 0.05}  # samples it holds -> standard deviation, in units of the surplus


def regions(num: int, days: int, start_unix: int, seed: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (days x 288,) gCO2/kWh) of each region; a name says kind and place in the list, as `solar_0`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    west, east, south, north = BOXES[rng.integers(len(BOXES), size=num)].T
    longitude, latitude = np.radians(rng.uniform(west, east)), np.radians(rng.uniform(south, north))
    kinds = [KINDS[k] for k in rng.permutation(np.arange(num) % len(KINDS))]
    hourly = _weather(rng, longitude, latitude, np.array([LASTS_H[kind] for kind in kinds]), 24 * days + 1)
    t = start_unix + STEP_S * np.arange(days * 24 * HOUR)
    hours = np.arange(len(t)) / HOUR
    for i, kind in enumerate(kinds):
        own = np.random.Generator(np.random.PCG64((seed, i)))
        sun = _sun(t, longitude[i], latitude[i])
        weather = np.interp(hours, np.arange(24 * days + 1), hourly[i])
        local_day = np.cos(2 * np.pi * (t / 86400 + longitude[i] / 2 / np.pi - 0.58))  # 1 in the early afternoon, -1 by night
        noise = sum(sd * own.standard_normal(len(t) // n + 1).repeat(n)[: len(t)] for n, sd in FLICKER.items())
        surplus = {
            "solar": sun * (0.95 + 0.2 * weather) / np.cos(latitude[i]) - own.normal(0.82, 0.06),
            "wind": 0.55 * weather - 0.15 * local_day - own.normal(0.45, 0.10),
            "thermal": np.full(len(t), -9.0),
        }[kind] + noise
        clean = own.choice([0.0, 15.0, 45.0]) + own.gamma(1.5, 8.0, len(t))
        dirty = own.uniform(380, 850) + 20 * local_day + 15 * weather + own.normal(0, 8, len(t))
        yield f"{kind}_{i}", np.round(np.where(surplus > 0, np.minimum(clean, 99.0), np.maximum(dirty, 150.0)), 1)


def _weather(rng, longitude: np.ndarray, latitude: np.ndarray, lasts_h: np.ndarray, hours: int) -> np.ndarray:
    """(regions, hours) standard normal, correlated in time over lasts_h (regions,) and in space over LENGTH_KM."""
    xyz = np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)])
    km = 6371 * np.arccos(np.clip(xyz.T @ xyz, -1, 1))
    shared = np.linalg.cholesky(np.exp(-km / LENGTH_KM) + 1e-9 * np.eye(len(km)))
    out, keep = rng.standard_normal((hours, len(km))) @ shared.T, np.exp(-1 / lasts_h)
    for before, now in zip(out, out[1:]):
        now *= np.sqrt(1 - keep**2)
        now += keep * before
    return out.T


def _sun(t: np.ndarray, longitude: float, latitude: float) -> np.ndarray:
    """Sine of the sun's height (0 by night) at UTC seconds t. Declination by the usual cosine, no equation of time."""
    days = t / 86400
    tilt = -np.radians(23.44) * np.cos(2 * np.pi * (days % 365.25 + 10) / 365.25)
    turned = 2 * np.pi * (days - 0.5) + longitude
    return np.maximum(0.0, np.sin(latitude) * np.sin(tilt) + np.cos(latitude) * np.cos(tilt) * np.cos(turned))


def main(argv: list[str]) -> int:
    parser = config.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--regions", type=int, default=100)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--start", default="2026-04-01T00:00:00Z")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.regions < 1 or args.days < 1:
        raise config.BadInput(f"--regions={args.regions} --days={args.days}: both must be at least 1")
    start = config.unix_of(args.start, "--start")
    columns = dict(regions(args.regions, args.days, start, args.seed))
    with open(args.out, "w") as file:
        file.write("time," + ",".join(columns) + "\n")
        for i, row in enumerate(np.stack(list(columns.values()), 1).tolist()):
            stamp = datetime.fromtimestamp(start + STEP_S * i, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            file.write(stamp + "".join(f",{value:g}" for value in row) + "\n")
    print(f"{args.out}: {args.regions} regions, {args.days} days from {args.start}, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    config.command(main)
