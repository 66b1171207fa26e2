"""Carbon: traces of intensity, the windows in them, and what a run drew, emitted and cost. Pure numpy.

    python carbon.py describe traces/paper_day.csv [column=... unit=... tz=...] [--threshold 100] [--json]
    python carbon.py describe traces/paper_day_price.csv unit=USD/MWh
    python carbon.py account runs/demo/intervals.csv configs/demo.yaml [--rule exact|paper] [--energy energy.csv] [--json]

A trace holds each sample until the next one: half-open intervals [start, next start) with a constant value in
gCO2/kWh (a price trace: currency/MWh), times in int64 UTC seconds. Energy is power x time, emissions and cost are
power x the exact integral of intensity and of price, so splitting an interval never changes a total. Power is a state's
idle_kw or train_kw, scaled to what the site's meters say where they were read (`drawn`). Knows nothing of torch, sockets or clocks.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import zlib
from array import array
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

import config
from config import BadInput

G_PER_KWH = {"g/kWh": 1.0, "kg/kWh": 1000.0, "kg/MWh": 1.0, "lb/MWh": 0.45359237}  # factor to gCO2/kWh
MAX_G_PER_KWH = 3000.0  # lignite is about 1,200, the dirtiest oil peakers about 1,500
STATES = ("off", "provisioning", "starting", "waiting", "syncing", "training")
CODES = {state: i for i, state in enumerate(STATES)}


@dataclass(frozen=True)
class Trace:
    """One region's intensity, or prices. `starts` (n,) int64 UTC seconds, `values` (n,) gCO2/kWh = kg/MWh (prices: currency/MWh,
    which may be below 0), valid on [starts[0], end)."""

    region: str
    starts: np.ndarray
    values: np.ndarray
    step_s: int  # nominal step: the median difference; how long the last sample holds
    interpolation: str = "hold"
    source: str = ""
    known: np.ndarray | None = None  # (n,) bool, of a live signal: False where nobody knows and `values` is what is charged

    def _prefix(self) -> np.ndarray:
        """(n + 1,) integral of intensity from the first sample to each edge, gCO2/kWh x s."""
        widths = np.diff(self.starts, append=self.starts[-1] + self.step_s).astype(float)
        if self.interpolation == "linear":
            heights = (self.values + np.append(self.values[1:], self.values[-1])) / 2
        else:
            heights = self.values
        return np.concatenate(([0.0], np.cumsum(heights * widths)))

    @cached_property
    def _cumulative(self) -> np.ndarray:
        return self._prefix()

    @property
    def begin(self) -> int:
        return int(self.starts[0])

    @property
    def end(self) -> int:
        return int(self.starts[-1]) + self.step_s

    def _require(self, t: float, last: float) -> None:
        if not self.begin <= t <= last:
            raise BadInput(f"{self.source}: no {self.region} value at {iso(t)}; the trace covers "
                           f"{iso(self.begin)} to {iso(self.end)}")  # fmt: skip

    def at(self, t: float) -> float:
        """Intensity at UTC second t, gCO2/kWh. Raises BadInput outside [begin, end)."""
        self._require(t, np.nextafter(self.end, 0))
        i = int(np.searchsorted(self.starts, t, side="right")) - 1
        if self.interpolation == "linear" and i + 1 < len(self.starts):
            share = (t - self.starts[i]) / (self.starts[i + 1] - self.starts[i])
            return float(self.values[i] + share * (self.values[i + 1] - self.values[i]))
        return float(self.values[i])

    def _primitive(self, t, cumulative: np.ndarray):
        """Integral from the trace's begin to UTC second(s) t."""
        t = np.asarray(t, float)
        if t.size:
            self._require(float(t.min()), self.end)
            self._require(float(t.max()), self.end)
        last = len(self.starts) - 1
        i = np.minimum(np.searchsorted(self.starts, t, side="right") - 1, last)
        into, height = t - self.starts[i], self.values[i]
        if self.interpolation == "linear":
            after = np.minimum(i + 1, last)
            slope = (self.values[after] - height) / np.maximum(self.starts[after] - self.starts[i], 1)
            height = height + slope * into / 2
        return cumulative[i] + into * height

    def integral(self, t0: float, t1: float) -> float:
        """Exact integral of intensity over [t0, t1], in gCO2/kWh x s. Raises BadInput outside the trace."""
        a, b = self._primitive([t0, t1], self._cumulative)
        return float(b - a)

    def integrals(self, t0: np.ndarray, t1: np.ndarray) -> np.ndarray:
        """The same for many intervals at once, (n,) each. Keeps no prefix sums, which are as large as the trace."""
        cumulative = self._prefix()
        return self._primitive(t1, cumulative) - self._primitive(t0, cumulative)

    def seconds_below(self, threshold: float, t0: np.ndarray, t1: np.ndarray) -> np.ndarray:
        """(n,) seconds of each interval during which the held sample is below the threshold."""
        low = replace(self, values=(self.values < threshold).astype(float), interpolation="hold")
        return low.integrals(t0, t1)

    def below(self, threshold: float, t0: float, t1: float) -> list[tuple[float, float]]:
        """The parts of [t0, t1) during which the held sample is below the threshold."""
        return [(max(a, t0), min(b, t1)) for a, b in self.windows(threshold) if a < t1 and b > t0]

    def windows(self, threshold: float) -> list[tuple[int, int]]:
        """Half-open [start, end) runs of samples below the threshold; an edge belongs to what follows it."""
        low = np.concatenate(([False], self.values < threshold, [False]))
        edges = np.append(self.starts, self.end)
        flips = np.flatnonzero(low[1:] != low[:-1])
        return [(int(edges[a]), int(edges[b])) for a, b in zip(flips[::2], flips[1::2])]


def iso(t: float) -> str:
    return datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a trace


def _parse_times(stamps: list[str], where: str, first_row: int, tz: str, section: str = "carbon") -> np.ndarray:
    """ISO stamps -> int64 UTC seconds. Naive stamps are in zone `tz`."""
    try:
        zone = ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError):
        raise BadInput(f"{section}.tz={tz!r} is not a known time zone; write e.g. UTC or America/Los_Angeles") from None
    seconds, offset_seen = np.empty(len(stamps), np.int64), None
    for i, stamp in enumerate(stamps):
        row = f"{where} row {first_row + i}"
        try:
            moment = datetime.fromisoformat(stamp.strip())
        except ValueError:
            raise BadInput(f"{row}: time {stamp!r} cannot be read; write ISO 8601, e.g. 2026-01-11 17:05:00") from None
        offset = moment.utcoffset()
        kind = "none" if offset is None else offset
        if offset_seen is not None and kind != offset_seen:
            raise BadInput(f"{row}: time {stamp!r} has another UTC offset than the rows before ({offset_seen}); "
                           "write all stamps in one offset, best UTC")  # fmt: skip
        offset_seen = kind
        if offset is None:
            first, second = (moment.replace(tzinfo=zone, fold=f).utcoffset() for f in (0, 1))
            if first != second:
                raise BadInput(f"{row}: local time {stamp!r} happens twice or never in {tz} (clock change); "
                               "write the file in UTC")  # fmt: skip
            moment = moment.replace(tzinfo=timezone(first or timedelta(0)))
        try:
            seconds[i] = round(moment.timestamp())
        except (OverflowError, ValueError):
            raise BadInput(f"{row}: time {stamp!r} is out of range") from None
    return seconds


def read_table(path: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file, plain or .gz. Raises BadInput when there is nothing to read."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"trace {path} does not exist; see traces/README.md for the ones shipped and the format")
    raw = file.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8-sig")
        same: dict[str, str] = {}  # cells repeat: a month of a thousand grids is millions of them, but few thousand values
        rows = [[same.setdefault(cell, cell) for cell in row] for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not a UTF-8 CSV file ({error}); convert it first") from None
    if not rows:
        raise BadInput(f"{path} is empty: 0 samples; at least 2 are needed")
    return rows[0], rows[1:]


def read_trace(
    path: str, column: str | None = None, *, unit: str = "g/kWh", tz: str = "UTC", stamp: str = "start",
    interpolation: str = "hold", max_gap_s: float = 900.0, table: tuple | None = None, section: str = "carbon",
) -> Trace:  # fmt: skip
    """One column of a CSV file as a Trace. First column is time; `column` None takes the only other one.

    unit: one of G_PER_KWH; or a price's, CURRENCY/MWh or CURRENCY/kWh, whose values are kept in currency/MWh. Variable steps are
    legal up to max_gap_s. Raises BadInput with file, row and remedy for anything that would make the accounting guess: see the
    messages below, which name `section` of the config. table: header, rows and times, where they have been read already.
    """
    header, rows, starts = table or (*read_table(path), None)
    if len(rows) < 2:
        raise BadInput(f"{path} has {len(rows)} samples; at least 2 are needed")
    if column is None:
        if len(header) != 2:
            raise BadInput(f"{path}: which column? It has {', '.join(header[1:])}; say column=NAME")
        column = header[1]
    if column not in header[1:]:
        remedy = "; name one as sites.X.price_region, or set price.trace=null" if section == "price" else ""
        raise BadInput(f"{path}: no column {column!r}; it has {', '.join(header[1:])}{remedy}")
    price, unit = config.PRICE_UNIT.fullmatch(unit), config.intensity_unit(unit) or unit
    if unit not in G_PER_KWH and not price:
        raise BadInput(f"{section}.unit={unit!r} is not one of {', '.join(G_PER_KWH)}, nor a price such as USD/MWh")
    index = header.index(column)
    starts = _parse_times([row[0] for row in rows], path, 2, tz, section) if starts is None else starts
    values = np.empty(len(rows))
    for i, row in enumerate(rows):
        cell = row[index].strip() if index < len(row) else ""
        try:
            values[i] = float(cell)
        except ValueError:
            values[i] = np.nan
        if not math.isfinite(values[i]):
            raise BadInput(f"{path} row {i + 2}: {column} is {cell!r}, not a number; fill the gap or cut the file")
    values *= G_PER_KWH[unit] if not price else {"M": 1.0, "k": 1000.0}[price[2]]
    steps = np.diff(starts)
    if (bad := np.flatnonzero(steps <= 0)).size:
        what = "repeats" if steps[bad[0]] == 0 else "goes back before"
        raise BadInput(f"{path} row {bad[0] + 3}: time {rows[bad[0] + 1][0]} {what} the row above; sort and deduplicate")
    if (bad := np.flatnonzero(steps > max_gap_s)).size:
        raise BadInput(f"{path} row {bad[0] + 3}: gap of {steps[bad[0]]} s before {rows[bad[0] + 1][0]} exceeds "
                       f"{section}.max_gap_s={max_gap_s:g}; fill it or raise the bound")  # fmt: skip
    if not price:
        _check_intensity(values, path, [row[index] for row in rows], column, unit)
    step = int(np.median(steps))
    if stamp == "end":  # a stamp at an interval's end: the value held since the stamp before
        starts = np.concatenate(([starts[0] - step], starts[:-1]))
    return Trace(column, starts, values, step, interpolation, path)


def _check_intensity(values: np.ndarray, path: str, cells: list[str], column: str, unit: str) -> None:
    """What no grid can be, in gCO2/kWh. Prices have no such bounds: they fall below zero, and currencies differ."""
    if (bad := np.flatnonzero(values < 0)).size:
        raise BadInput(f"{path} row {bad[0] + 2}: {column} is {cells[bad[0]]}; intensity must be >= 0")
    if (bad := np.flatnonzero(values > MAX_G_PER_KWH)).size:
        raise BadInput(f"{path} row {bad[0] + 2}: {column} is {cells[bad[0]]} {unit} = {values[bad[0]]:,.0f} g/kWh, "
                       f"above {MAX_G_PER_KWH:,.0f}, which no grid reaches; is carbon.unit right?")  # fmt: skip
    if 0 < values.max() < 3:
        raise BadInput(f"{path}: {column} never exceeds {values.max():.3g} g/kWh; is it in kg/kWh? set carbon.unit")


def _read_columns(c, columns: list[str], section: str, optional: list[str] = ()) -> dict[str, Trace]:
    """Columns of the trace that a section of the config describes, optional ones if it has them; its times are read once."""
    header, rows = read_table(c.trace)
    columns = [*columns, *(column for column in optional if column in header[1:])]
    table = (header, rows, _parse_times([row[0] for row in rows], c.trace, 2, c.tz, section))
    described = {"unit": c.unit, "tz": c.tz, "stamp": c.stamp, "interpolation": c.interpolation, "max_gap_s": c.max_gap_s}
    return {column: read_trace(c.trace, column, **described, table=table, section=section) for column in dict.fromkeys(columns)}


def load_traces(cfg, folder: Path | None = None, until_s: float = 0.0) -> dict[str, Trace]:
    """Every region a run needs (sites and baselines), checked to cover `clock.start`. Of a run with live signals: what was heard,
    from signals.csv in its folder, up to until_s seconds after its start."""
    if config.is_live(cfg):
        if folder is None:
            raise BadInput(f"signals.source={cfg.signals.source} has no trace ahead of time; only a run that was made has, in its folder")
        return Heard(cfg.sites, read_signals(folder / "signals.csv")).traces(cfg, until_s, str(folder / "signals.csv"))
    c, start = cfg.carbon, config.start_unix(cfg)
    traces = _read_columns(c, [site.region for site in cfg.sites.values()] + list(c.baseline_regions), "carbon")
    for trace in traces.values():
        if not trace.begin <= start < trace.end:
            raise BadInput(f"clock.start={cfg.clock.start} lies outside {c.trace}, which covers {iso(trace.begin)} to "
                           f"{iso(trace.end)}")  # fmt: skip
    if cfg.policy.name in ("threshold", "break_even", "forecast_gate") and cfg.policy.objective == "carbon":
        stop = min(start + (cfg.clock.max_hours or 1e9) * 3600, min(t.end for t in traces.values()))
        low = cfg.policy.on_below_g_per_kwh
        if not any(traces[site.region].below(low, start, stop) for site in cfg.sites.values()):
            least = min(traces[site.region].values.min() for site in cfg.sites.values())
            raise BadInput(f"policy.on_below_g_per_kwh={low:g}: no window for any site in {c.trace} (minimum MCI "
                           f"{least:.0f} gCO2/kWh, {iso(start)} to {iso(stop)}); raise the threshold")  # fmt: skip
    return traces


def load_forecasts(cfg) -> dict[str, np.ndarray]:
    """region -> (n, k) gCO2/kWh: the forecasts that stand beside a trace's n samples, columns f1..fk (of its only region) or
    REGION_f1..REGION_fk, for the k steps after each sample. Raises BadInput where a site's region has none."""
    c, out = cfg.carbon, {}
    header, rows = read_table(c.trace)
    regions = list(dict.fromkeys(site.region for site in cfg.sites.values()))
    for region in regions:
        prefix = f"{region}_f" if f"{region}_f1" in header else "f"
        columns = [header.index(f"{prefix}{k}") for k in range(1, len(header)) if f"{prefix}{k}" in header]
        if not columns or (prefix == "f" and len(regions) > 1):
            raise BadInput(f"policy.forecast=issued: {c.trace} has no columns {region}_f1.. (f1.. with one region); add them, or take "
                           "policy.forecast=yesterday")  # fmt: skip
        try:
            out[region] = G_PER_KWH[c.unit] * np.array([[float(row[i]) for i in columns] for row in rows])
        except (ValueError, IndexError):
            raise BadInput(f"{c.trace}: a forecast of {region} is not a number; fill the gap or cut the file") from None
    return out


def price_column(site) -> str:
    """Column of the price trace that a site (its config section) pays by."""
    return site.price_region or site.region


def alone(cfg, region: str) -> tuple:
    """(config section, price column) of the one site that trains in a baseline region: the region's own, else the first."""
    own = next((s for s in cfg.sites.values() if s.region == region), None)
    return (own, price_column(own)) if own else (next(iter(cfg.sites.values())), region)


def load_prices(cfg, traces: dict[str, Trace] | None = None) -> dict[str, Trace] | None:
    """Prices, currency/MWh, by column, of every site, and of the baseline regions that have one; None without a price trace.

    Checked to cover what the intensity covers from `clock.start` on. The steps may differ.
    """
    if cfg.price.trace is None:
        return None
    start = config.start_unix(cfg)
    if config.is_live(cfg):  # nobody knows how long it will take
        traces, live_end = {}, start + 3600 * (cfg.clock.max_hours or 0.0)
    else:
        traces = traces or load_traces(cfg)
    sites = [(price_column(site), site.region) for site in cfg.sites.values()]
    others = [(alone(cfg, region)[1], region) for region in cfg.carbon.baseline_regions]
    prices = _read_columns(cfg.price, [column for column, _ in sites], "price", [column for column, _ in others])
    for column, region in sites + others:
        price, end = prices.get(column), traces[region].end if traces else live_end
        if price and (price.begin > start or price.end < end or end == start):
            raise BadInput(f"price.trace={cfg.price.trace} covers {iso(price.begin)} to {iso(price.end)}, not all of {iso(start)} to "
                           f"{iso(end)} of {region}; extend it, set clock.max_hours, or set price.trace=null")  # fmt: skip
    return prices


def currency(cfg) -> str | None:
    """Of every cost of a run, e.g. USD; None without a price trace."""
    return cfg.price.unit[:3] if cfg.price.trace else None


def provenance(cfg, traces: dict[str, Trace]) -> dict:
    def described(c) -> dict:
        digest = hashlib.sha256(Path(c.trace).read_bytes()).hexdigest()
        return {"trace": c.trace, "trace_sha256": digest, "unit": c.unit, "tz": c.tz, "stamp": c.stamp, "interpolation": c.interpolation}

    price = described(cfg.price) | {"columns": {n: price_column(s) for n, s in cfg.sites.items()}} if cfg.price.trace else None
    columns = {n: s.region for n, s in cfg.sites.items()}
    if config.is_live(cfg):
        path, s = Path(next(iter(traces.values())).source), cfg.signals
        unknown_s = {
            n: float(np.diff(t.starts, append=t.end)[~t.known].sum()) for n, t in ((n, traces[x.region]) for n, x in cfg.sites.items())
        }
        return {"signals": s.source, "readings": str(path), "readings_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "unit": s.unit, "signal": config.signal_kind(cfg), "interpolation": "hold", "unknown_s": unknown_s,
                "unknown_charged": UNKNOWN, "columns": columns, "price": price}  # fmt: skip
    return described(cfg.carbon) | {"signal": cfg.carbon.signal, "columns": columns, "price": price}


# ---------------------------------------------------------------------------------------------------------------------
# What live signals said


@dataclass(frozen=True)
class Signal:
    """From t_s on, whole seconds since clock.start, a site's intensity counts as g_per_kwh (None: unknown), until the next one
    or until_s, whichever is first: then it is too old."""

    t_s: int
    site: str
    g_per_kwh: float | None
    until_s: float = math.inf
    age_s: float = 0.0  # at t_s, by the source's own time
    time: str = ""  # that time, UTC
    unit: str = ""  # as the source has it; g_per_kwh is converted
    source: str = ""


SIGNALS = "t_s,site,g_per_kwh,until_s,age_s,time,unit,source"
UNKNOWN = ("where nobody knew: the highest intensity heard there, but no less than carbon.curtailed_below_g_per_kwh, so that it is never "
           f"cheap nor counts as curtailed; {MAX_G_PER_KWH:g} g/kWh where none was heard at all")  # fmt: skip


def signal_line(s: Signal) -> str:
    value = "" if s.g_per_kwh is None else repr(s.g_per_kwh)
    return f"{s.t_s},{s.site},{value},{s.until_s!r},{s.age_s!r},{s.time},{s.unit},{s.source}"


def read_signals(path: Path) -> list[Signal]:
    """Rows of a signals.csv, in the order of the file; a last line torn by a crash is left out."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist; a run with live signals leaves it beside its intervals.csv")
    text = path.read_text()
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [SIGNALS]
    if header != SIGNALS:
        raise BadInput(f"{path}: header is {header}; expected {SIGNALS}")
    out: list[Signal] = []
    for i, line in enumerate(lines):
        try:
            t_s, site, value, until_s, age_s, time, unit, source = line.split(",")
            s = Signal(int(t_s), site, float(value) if value else None, float(until_s), float(age_s), time, unit, source)
            if s.t_s < 0 or not (s.g_per_kwh is None or 0 <= s.g_per_kwh <= MAX_G_PER_KWH) or math.isnan(s.until_s):
                raise ValueError
        except ValueError:
            raise BadInput(f"{path} row {i + 2}: {line!r} is not {SIGNALS}; mend the row or take it out") from None
        out.append(s)
    return out


class Heard:
    """All that live signals have said, per site, as columns: a week of polls each 10 seconds is 60,000 rows."""

    def __init__(self, sites, signals: list[Signal] = ()):
        self._columns = {site: tuple(array("d") for _ in range(3)) for site in sites}
        for s in signals:
            self.add(s)

    def add(self, s: Signal) -> None:
        if s.site in self._columns:
            value = math.nan if s.g_per_kwh is None else s.g_per_kwh
            for column, x in zip(self._columns[s.site], (s.t_s, value, s.until_s)):
                column.append(x)

    def changes(self, site: str, until_s: float) -> tuple[np.ndarray, np.ndarray]:
        """(n,) seconds since clock.start, from 0 on and below until_s; (n,) gCO2/kWh from then on, nan: unknown. A reading holds from
        when it was heard, not from its own time, so that nothing changes afterwards."""
        t, values, until = (np.array(column) for column in self._columns[site])
        over = np.ceil(until)
        late = ~np.isnan(values) & (over < np.append(t[1:], until_s))
        t, values = np.concatenate(([0.0], t, over[late])), np.concatenate(([np.nan], values, np.full(late.sum(), np.nan)))
        by_time = np.argsort(t, kind="stable")  # of one second the last word counts
        t, values = t[by_time], values[by_time]
        last = np.append(t[1:] != t[:-1], True) & (t < until_s)
        return t[last], values[last]

    def traces(self, cfg, until_s: float, source: str) -> dict[str, Trace]:
        """region -> Trace from clock.start to the second after until_s. Unknown is charged as UNKNOWN says."""
        start, end, traces = config.start_unix(cfg), int(until_s) + 1, {}
        for name, spec in cfg.sites.items():
            if spec.region in traces:
                continue  # config allows it only where both ask the same
            t, values = self.changes(name, end)
            known = ~np.isnan(values)
            charged = max(values[known].max(), cfg.carbon.curtailed_below_g_per_kwh) if known.any() else MAX_G_PER_KWH
            starts = start + t.astype(np.int64)
            traces[spec.region] = Trace(spec.region, starts, np.where(known, values, charged), int(start + end - starts[-1]),
                                        source=source, known=known)  # fmt: skip
        return traces


# ---------------------------------------------------------------------------------------------------------------------
# Accounting


@dataclass(frozen=True)
class Interval:
    """A site in one power state over [start_s, end_s), seconds since clock.start."""

    site: str
    state: str
    start_s: float
    end_s: float


class Meter:
    """Who was in which state, when: one gapless line of intervals per site, from 0 on. Nine bytes an interval."""

    def __init__(self, sites: list[str], rows: list[Interval] = (), keep_last: bool = False):
        """rows: what came before; keep_last: the last states go on, else all sites are off since."""
        self._starts = {site: array("d", [0.0]) for site in sites}
        self._codes = {site: bytearray([0]) for site in sites}
        for row in sorted(rows, key=lambda r: (r.site, r.start_s)):
            self.set(row.start_s, row.site, row.state)
        for row in rows:
            if not keep_last and row.end_s > self._starts[row.site][-1]:
                self.set(row.end_s, row.site, "off")

    def set(self, t: float, site: str, state: str) -> None:
        """From t on, `site` is in `state`. Times never go back."""
        codes, code = self._codes[site], CODES[state]
        if codes[-1] == code:
            return
        starts = self._starts[site]
        assert t >= starts[-1], (site, t, starts[-1])
        if t == starts[-1]:  # what it was in for no time does not count
            codes.pop()
            starts.pop()
            if codes and codes[-1] == code:
                return
        codes.append(code)
        starts.append(t)

    def columns(self, t: float) -> "Columns":
        """All intervals up to t, the open ones cut there."""
        out = {}
        for site in sorted(self._starts):
            starts = np.array(self._starts[site] + array("d", [t]))
            if n := int(np.searchsorted(starts[:-1], t)):
                starts[n] = t
                out[site] = np.frombuffer(bytes(self._codes[site][:n]), np.uint8), starts[:n], starts[1 : n + 1]
        return out

    def closed(self, t: float) -> list[Interval]:
        """The same as rows, by site and time."""
        rows = []
        for site, (codes, starts, ends) in self.columns(t).items():
            rows += [Interval(site, STATES[c], a, b) for c, a, b in zip(codes.tolist(), starts.tolist(), ends.tolist())]
        return rows


# Intervals as arrays: site -> state codes (n,) uint8 (indices of STATES), start_s (n,), end_s (n,), in time order.
Columns = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def columns(rows: list[Interval]) -> Columns:
    by_site: dict[str, list[Interval]] = {}
    for row in sorted(rows, key=lambda r: (r.site, r.start_s)):
        by_site.setdefault(row.site, []).append(row)
    return {
        site: (np.array([CODES[r.state] for r in mine], np.uint8), np.array([r.start_s for r in mine]), np.array([r.end_s for r in mine]))
        for site, mine in by_site.items()
    }


def write_intervals(path: Path, rows: list[Interval]) -> None:
    lines = ["site,state,start_s,end_s"] + [f"{r.site},{r.state},{r.start_s!r},{r.end_s!r}" for r in rows]
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("\n".join(lines) + "\n")
    tmp.replace(path)


def read_intervals(path: str) -> list[Interval]:
    """Rows of an intervals file; `train` reads as training, `up` as waiting. `train` wins where both overlap."""
    header, rows = read_table(path)
    if header[:4] != ["site", "state", "start_s", "end_s"]:
        raise BadInput(f"{path}: header is {','.join(header)}; expected site,state,start_s,end_s")
    words = {"train": "training", "up": "waiting"} | {s: s for s in STATES}
    out: list[Interval] = []
    for i, row in enumerate(rows):
        try:
            out.append(Interval(row[0], words[row[1]], float(row[2]), float(row[3])))
            if not 0 <= out[-1].start_s <= out[-1].end_s < float("inf"):
                raise ValueError
        except (KeyError, ValueError, IndexError):
            raise BadInput(f"{path} row {i + 2}: {','.join(row)!r} is not site,state,start_s,end_s with a state of "
                           f"{', '.join(words)}") from None  # fmt: skip
    training: dict[str, list[Interval]] = {}
    for row in out:
        if row.state == "training":
            training.setdefault(row.site, []).append(row)
    cut: list[Interval] = []
    for row in out:
        pieces = [row]
        if row.state == "waiting":
            for t in training.get(row.site, []):
                pieces = [p for piece in pieces for p in _without(piece, t)]
        cut += pieces
    cut.sort(key=lambda r: (r.site, r.start_s))
    for a, b in zip(cut, cut[1:]):
        if a.site == b.site and b.start_s < a.end_s - 1e-6:
            raise BadInput(f"{path}: {a.site} is {a.state} until {a.end_s:g} s and {b.state} from {b.start_s:g} s; intervals "
                           "must not overlap (but `train` in `up`)")  # fmt: skip
    return cut


def _without(row: Interval, hole: Interval) -> list[Interval]:
    if hole.end_s <= row.start_s or hole.start_s >= row.end_s:
        return [row]
    left = Interval(row.site, row.state, row.start_s, hole.start_s)
    right = Interval(row.site, row.state, hole.end_s, row.end_s)
    return [piece for piece in (left, right) if piece.end_s > piece.start_s]


@dataclass(frozen=True)
class Reading:
    """A process of a site has drawn `kwh` from its start to t_s (seconds since clock.start), by its meters."""

    site: str
    incarnation: str  # which process
    t_s: float
    kwh: float
    method: str  # which meters: devices.Meter.method


READINGS = "site,incarnation,t_s,kwh,method"


def reading_line(r: Reading) -> str:
    return f"{r.site},{r.incarnation},{r.t_s!r},{r.kwh!r},{r.method}"


def read_readings(path: str) -> list[Reading]:
    """Rows of an energy.csv, in the order of the file; a last line torn by a crash is left out."""
    if not Path(path).is_file():
        raise BadInput(f"{path} does not exist; only sites with meters, on the wall clock, leave an energy.csv")
    text = Path(path).read_text()
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [READINGS]
    if header != READINGS:
        raise BadInput(f"{path}: header is {header}; expected {READINGS}")
    out: list[Reading] = []
    before: dict[str, Reading] = {}
    for i, line in enumerate(lines):
        try:
            site, incarnation, t_s, kwh, method = line.split(",")
            r = Reading(site, incarnation, float(t_s), float(kwh), method)
            last = before.get(site, Reading(site, "", -1.0, 0.0, ""))
            least = last.kwh if last.incarnation == incarnation else 0.0
            if not (last.t_s < r.t_s < math.inf and least <= r.kwh < math.inf):
                raise ValueError
        except ValueError:
            raise BadInput(f"{path} row {i + 2}: {line!r} is not {READINGS}, with t_s growing at a site and kwh never falling in "
                           "a process; mend the row or take it out") from None  # fmt: skip
        before[site] = r
        out.append(r)
    return out


def readings_of(run_dir: Path) -> list[Reading]:
    """What the meters of a run's sites said, if any did."""
    path = run_dir / "energy.csv"
    return read_readings(str(path)) if path.exists() else []


def power_kw(site, state: str) -> float:
    """kW drawn by a site (its config section) in a power state."""
    return {"off": 0.0, "training": site.train_kw}.get(state, site.idle_kw)


def energy_kwh(power: float, seconds: float) -> float:
    return power * seconds / 3600.0


def charged(power, integral):
    """kgCO2 of a constant power (kW), by the integral of intensity (gCO2/kWh = kg/MWh, x s); by that of price (currency/MWh, x s):
    what it costs. Numbers or arrays."""
    return power * integral / 3600.0 / 1000.0


def emissions_kg(power: float, trace: Trace, t0: float, t1: float) -> float:
    """kgCO2 of a constant power (kW) over [t0, t1] UTC seconds: power x exact integral of the trace."""
    return charged(power, trace.integral(t0, t1))


MODELLED = "idle_kw and train_kw"
MEASURED = ("between two readings of one process's meters, throughout which its site was up: idle_kw and train_kw scaled to what they "
            "measured; elsewhere, and for baselines and floor: idle_kw and train_kw")  # fmt: skip
NOTHING = (np.empty(0, np.uint8), np.empty(0), np.empty(0))  # a site without an interval, as Columns


def drawn(column: tuple, spec, readings: list[Reading] = ()) -> tuple[np.ndarray, ...]:
    """A site's power over its intervals. -> state codes, start_s, end_s, kW, whether measured; (n,) each.

    column: its entry in Columns; spec: its config section; readings: its own, in time order. Between two readings of one
    process, throughout which the site was up, the model's power is scaled so that its energy is what was measured; intervals
    are split there. Without readings all is the model's, and the intervals are as they were.
    """
    codes, begins, ends = column
    model_kw = np.array([power_kw(spec, state) for state in STATES])
    if len(readings) < 2 or not len(codes):
        return codes, begins, ends, model_kw[codes], np.zeros(len(codes), bool)
    times, kwh = (np.array([getattr(r, name) for r in readings]) for name in ("t_s", "kwh"))
    edges = np.unique(np.concatenate((begins, ends, times)))
    begins_in, ends_in = edges[:-1], edges[1:]
    of = np.searchsorted(begins, begins_in, side="right") - 1
    inside = (of >= 0) & (begins_in < ends[of])
    begins, ends, codes = begins_in[inside], ends_in[inside], codes[of[inside]]
    kw, seconds = model_kw[codes], ends - begins
    span = np.searchsorted(times, begins, side="right")  # 0: before the first reading; i: from reading i - 1 on
    modelled_kwh, up_s = (np.bincount(span, x, len(times) + 1)[1:-1] for x in (energy_kwh(kw, seconds), seconds * (codes != CODES["off"])))
    measured_kwh = np.diff(kwh)
    counts = np.array([a.incarnation == b.incarnation for a, b in zip(readings, readings[1:])])
    counts &= (measured_kwh >= 0) & (modelled_kwh > 0) & (up_s > np.diff(times) - 1e-6)
    scale = np.divide(measured_kwh, modelled_kwh, out=np.ones(len(counts)), where=counts)
    scale, counts = np.pad(scale, 1, constant_values=1.0), np.pad(counts, 1)
    return codes, begins, ends, kw * scale[span], counts[span]


def account(
    rows: "list[Interval] | Columns", cfg, traces: dict[str, Trace], readings: list[Reading] = (), prices: dict[str, Trace] | None = None
) -> dict:
    """Energy, emissions and cost of a run, exact rule, measured where `readings` cover it.
    -> {energy_kwh, emissions_kg, cost, curtailed_share, energy_method, measured_share, sites: {...}}

    cost: in the config's `currency`, below 0 where consumers are paid; None without prices.
    energy_method: model, or the meters that measured measured_share of the energy; mixed: several kinds.
    Raises BadInput if an interval that draws power leaves its trace.
    """
    start, low = config.start_unix(cfg), cfg.carbon.curtailed_below_g_per_kwh
    by_site, sites = rows if isinstance(rows, dict) else columns(rows), {}
    read: dict[str, list[Reading]] = {}
    for r in readings:
        read.setdefault(r.site, []).append(r)
    for name, spec in cfg.sites.items():
        mine = read.get(name, [])
        codes, begins, ends, kw, measured = drawn(by_site.get(name, NOTHING), spec, mine)
        up = codes != CODES["off"]
        codes, t0, t1, kw, measured = codes[up], start + begins[up], start + ends[up], kw[up], measured[up]
        trace = traces[spec.region]
        kwh, kg = energy_kwh(kw, t1 - t0), charged(kw, trace.integrals(t0, t1))
        paid = None if prices is None else charged(kw, prices[price_column(spec)].integrals(t0, t1))
        curtailed = energy_kwh(kw, trace.seconds_below(low, t0, t1))
        hours = np.bincount(codes, t1 - t0, len(STATES)) / 3600
        sites[name] = {
            "energy_kwh": float(kwh.sum()), "emissions_kg": float(kg.sum()), "curtailed_kwh": float(curtailed.sum()),
            "energy_method": _one_of({r.method for r in mine} if measured.any() else set()), "measured_kwh": float(kwh[measured].sum()),
            "train_hours": float(hours[CODES["training"]]), "up_hours": float(hours.sum() - hours[CODES["provisioning"]]),
            "kwh_by_state": _by_state(codes, kwh), "kg_by_state": _by_state(codes, kg),
            "cost": None if paid is None else float(paid.sum()), "cost_by_state": None if paid is None else _by_state(codes, paid),
        }  # fmt: skip
    total = {k: sum(s[k] for s in sites.values()) for k in ("energy_kwh", "emissions_kg", "curtailed_kwh", "measured_kwh")}
    total["cost"] = None if prices is None else sum(s["cost"] for s in sites.values())
    total["energy_method"] = _one_of({s["energy_method"] for s in sites.values()} - {"model"})
    for part in [total, *sites.values()]:
        for share in ("curtailed", "measured"):
            kwh = part.pop(f"{share}_kwh")
            part[f"{share}_share"] = kwh / part["energy_kwh"] if part["energy_kwh"] else None
    return total | {"sites": sites}


def how_measured(part: dict) -> str:
    """Of an account or one of its sites, to go behind its kWh; empty for the model's."""
    return f", {100 * part['measured_share']:.0f} % measured ({part['energy_method']})" if part.get("measured_share") else ""


def in_money(part: dict, cfg) -> str:
    """Cost of an account or one of its sites, to go behind its kWh; empty without a price trace."""
    return "" if part.get("cost") is None else f", {part['cost']:.4f} {currency(cfg)}"


def _one_of(methods: set[str]) -> str:
    return "mixed" if len(methods) > 1 else next(iter(methods), "model")


def _by_state(codes: np.ndarray, amounts: np.ndarray) -> dict[str, float]:
    sums = np.bincount(codes, amounts, len(STATES))
    return {STATES[i]: float(sums[i]) for i in np.unique(codes)}


def account_paper(rows: list[Interval], cfg, traces: dict[str, Trace], grid_s: float = 60.0) -> dict:
    """The same by the rule of arXiv:2602.22760: a 60 s grid over the run with inclusive ends, intensity interpolated
    linearly on the grid, power x intensity summed x 60 s. One total per site."""
    start = config.start_unix(cfg)
    grid = np.arange(0.0, max(row.end_s for row in rows) + 1e-9, grid_s)
    sites = {}
    for name, spec in cfg.sites.items():
        kw = np.zeros_like(grid)
        for state in ("provisioning", "starting", "waiting", "syncing", "training"):  # training last: it wins
            for row in rows:
                if row.site == name and row.state == state:
                    kw[(grid >= row.start_s) & (grid <= row.end_s)] = power_kw(spec, state)
        trace = traces[spec.region]
        trace._require(start + grid[-1], trace.end)
        mci = np.interp(start + grid, trace.starts, trace.values)
        sites[name] = {"energy_kwh": float(kw.sum() * grid_s / 3600), "emissions_kg": float((kw * mci).sum() * grid_s / 3.6e6)}
    total = {k: sum(s[k] for s in sites.values()) for k in ("energy_kwh", "emissions_kg")}
    return total | {"sites": sites}


def baselines(
    cfg, traces: dict[str, Trace], tokens: int, prices: dict[str, Trace] | None = None
) -> tuple[dict[str, float] | None, dict[str, float | None] | None, str | None]:
    """(kg, cost, None) for the same tokens at one site, continuous from the start, per baseline region; a cost is None where
    there is no price. (None, None, why) if it cannot be."""
    start, kg, cost = config.start_unix(cfg), {}, {}
    for region in cfg.carbon.baseline_regions:
        spec, column = alone(cfg, region)
        seconds = tokens / spec.tokens_per_s
        if start + seconds > traces[region].end:
            return None, None, f"{seconds / 3600:.1f} h from {iso(start)} leave the trace, which ends {iso(traces[region].end)}"
        kg[region] = emissions_kg(spec.train_kw, traces[region], start, start + seconds)
        if prices is not None:
            cost[region] = charged(spec.train_kw, prices[column].integral(start, start + seconds)) if column in prices else None
    return kg, None if prices is None else cost, None


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def describe(argv: list[str]) -> int:
    as_json, threshold = "--json" in argv, None
    argv = [a for a in argv if a != "--json"]
    if "--threshold" in argv:
        i = argv.index("--threshold")
        try:
            threshold = float(argv[i + 1])
        except (IndexError, ValueError):
            raise BadInput("--threshold needs a number in gCO2/kWh (of a price: in currency/MWh)") from None
        del argv[i : i + 2]
    if not argv:
        raise BadInput("describe needs a trace; say carbon.py describe TRACE.csv [column=... unit=... tz=...]")
    path, options = argv[0], dict(a.split("=", 1) for a in argv[1:] if "=" in a)
    known = {"column", "unit", "tz", "stamp", "max_gap_s"}
    if bad := [a for a in argv[1:] if a.split("=", 1)[0] not in known]:
        raise BadInput(f"unknown option {bad[0]!r}; options: {', '.join(sorted(known))} as key=value")
    columns = [options.pop("column")] if "column" in options else read_table(path)[0][1:]
    price = config.PRICE_UNIT.fullmatch(options.get("unit", ""))
    if price:
        options = {"max_gap_s": config.Price.max_gap_s, "section": "price"} | options
    try:
        options |= {"max_gap_s": float(options["max_gap_s"])} if "max_gap_s" in options else {}
    except ValueError:
        raise BadInput(f"max_gap_s={options['max_gap_s']} is not a number of seconds") from None
    if options.get("stamp", "start") not in ("start", "end"):
        raise BadInput(f"stamp={options['stamp']} is not one of start, end")
    out = {}
    unit, per, charge = (f"{price[1]}/MWh", "per_mwh", "cost") if price else ("gCO2/kWh", "g_per_kwh", "kg")
    threshold = (0.0 if price else 100.0) if threshold is None else threshold
    for column in columns:
        t = read_trace(path, column, **options)
        seconds = t.end - t.begin
        inside = sum(b - a for a, b in t.windows(threshold))
        out[column] = {
            "begin": iso(t.begin), "end": iso(t.end), "samples": len(t.values), "step_s": t.step_s,
            f"mean_{per}": t.integral(t.begin, t.end) / seconds, f"min_{per}": float(t.values.min()),
            f"max_{per}": float(t.values.max()), f"{charge}_at_1_kw": charged(1.0, t.integral(t.begin, t.end)),
            f"{charge}_at_1_kw_to_last_sample": charged(1.0, t.integral(t.begin, int(t.starts[-1]))),
            "share_below": inside / seconds, "windows": [[iso(a), iso(b)] for a, b in t.windows(threshold)],
        }  # fmt: skip
    if as_json:
        print(json.dumps({"trace": path, f"threshold_{per}": threshold, "columns": out}))
        return 0
    for column, d in out.items():
        print(f"{column}: {d['begin']} to {d['end']}, {d['samples']} samples of {d['step_s']} s, mean {d[f'mean_{per}']:.1f}, "
              f"min {d[f'min_{per}']:.0f}, max {d[f'max_{per}']:.0f} {unit}; below {threshold:g}: "
              f"{100 * d['share_below']:.1f} % in {len(d['windows'])} windows")  # fmt: skip
        for a, b in d["windows"][:12]:
            print(f"    {a} .. {b}")
    return 0


def account_command(argv: list[str]) -> int:
    as_json, given = "--json" in argv, {"--rule": "exact", "--energy": None}
    argv = [a for a in argv if a != "--json"]
    for option in given:
        if option in argv:
            i = argv.index(option)
            given[option] = argv[i + 1] if i + 1 < len(argv) else ""
            del argv[i : i + 2]
    rule, energy = given.values()
    if rule not in ("exact", "paper"):
        raise BadInput(f"--rule {rule} is not one of exact, paper")
    if energy is not None and rule == "paper":
        raise BadInput("--rule paper knows no measured energy; leave out --energy, or take --rule exact")
    if len(argv) < 2:
        raise BadInput("account needs INTERVALS.csv and CONFIG")
    rows, cfg, folder = read_intervals(argv[0]), config.load(argv[1:]), Path(argv[0]).parent
    readings = [] if energy is None else read_readings(energy)
    if cfg.clock.start == "now" and (folder / "config.yaml").is_file():
        cfg = config.begun(cfg, config.read_yaml(folder / "config.yaml").clock.start)
    traces = load_traces(cfg, folder, max((row.end_s for row in rows), default=0.0))
    prices = load_prices(cfg, traces)
    used = [row for row in rows if row.site in cfg.sites]
    if not used:
        raise BadInput(f"{argv[0]}: no row of a site of {argv[1]} ({', '.join(cfg.sites)})")
    result = account(used, cfg, traces, readings, prices) if rule == "exact" else account_paper(used, cfg, traces)
    result |= {"rule": rule, "cost": result.get("cost"), "currency": currency(cfg)}  # the paper's rule knows no prices
    if central := [row for row in rows if row.site == "centralized"]:
        result["baselines"] = {}
        spec = next(iter(cfg.sites.values()))
        for region in cfg.carbon.baseline_regions:
            one = config.OmegaConf.create({"clock": cfg.clock, "carbon": cfg.carbon, "sites": {"centralized": {**spec, "region": region}}})
            one_result = (account if rule == "exact" else account_paper)(central, one, traces)
            result["baselines"][region] = one_result["emissions_kg"]
    result["provenance"] = provenance(cfg, traces) | {"rule": rule, "energy": MEASURED if result.get("measured_share") else MODELLED}
    if as_json:
        print(json.dumps(result))
        return 0
    print(f"{rule} rule: {result['emissions_kg']:.4f} kgCO2, {result['energy_kwh']:.3f} kWh{how_measured(result)}{in_money(result, cfg)}")
    for name, s in result["sites"].items():
        print(f"  {name:18} {s['emissions_kg']:.4f} kgCO2  {s['energy_kwh']:.3f} kWh{how_measured(s)}{in_money(s, cfg)}")
    for region, kg in result.get("baselines", {}).items():
        print(f"  centralized in {region:12} {kg:.3f} kgCO2, ours is {100 * result['emissions_kg'] / kg:.1f} %")
    return 0


def main(argv: list[str]) -> int:
    commands = {"describe": describe, "account": account_command}
    if not argv or argv[0] not in commands:
        raise BadInput(f"say one of: {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


if __name__ == "__main__":
    config.command(main)
