"""Figures, table and report of runs, from their folders alone.

    python figures.py runs/demo [runs/paper ...] [--out DIR]      into DIR, or the first run's own folder
    python figures.py runs/demo                                   one run
    python figures.py runs/ours runs/paper --out compared         several, beside each other

Of each run: timeline (grids above, who trained below) and power (kW and kgCO2/h over time). Of all runs together:
perplexity (over time), emissions (beside the baselines and the floor), curtailed (share of the energy inside windows),
loss_over_kgco2, and table.md. With a price trace: prices in the timeline; cost/h, and kgCO2 and cost so far, in power;
cost beside emissions; loss_over_cost; a column of the table. Each as PNG and PDF with the command that made it in its
metadata; report.html holds all of it, with configs and provenance, in one file that needs no network. Readable in grey.
"""

import base64
import html
import shlex
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
from omegaconf import OmegaConf

import carbon
import config
import report
from config import BadInput
from journal import effective
from journal import read as read_journal

INK = "#22313f"
COLORS = ["#d1495b", "#2e86ab", "#e39b2d", "#5b8c5a", "#7d5ba6", "#6b705c"]
LINES = ["-", "--", "-.", ":"]
WINDOW = "#e9f2e4"
RUN_COLORS = ["#1b4965", "#d1495b", "#e39b2d", "#5b8c5a", "#7d5ba6", "#6b705c"]
MARKERS, HATCHES = ["o", "s", "^", "D", "v", "P"], ["", "///", "...", "xx", "\\\\\\", "++"]
MODES = {"local": "#9fc6de", "federated": "#2f6690", "paused": "#e8e8e8"}


def load(run_dir: Path) -> dict:
    """A run's config, traces, records, intervals, steps and summary. Raises BadInput when one is missing."""
    for name in ("config.yaml", "journal.jsonl", "intervals.csv"):
        if not (run_dir / name).is_file():
            raise BadInput(f"{run_dir}/{name} does not exist; is {run_dir} the folder of a run that has started?")
    cfg = OmegaConf.merge(OmegaConf.structured(config.Config), config.read_yaml(run_dir / "config.yaml"))
    rows = carbon.read_intervals(str(run_dir / "intervals.csv"))
    run = {
        "dir": run_dir, "cfg": cfg, "traces": (traces := carbon.load_traces(cfg, run_dir, max((r.end_s for r in rows), default=0.0))),
        "prices": carbon.load_prices(cfg, traces),
        "records": effective(read_journal(run_dir / "journal.jsonl")), "rows": rows, "steps": report.load_steps(run_dir, cfg.sites),
        "readings": carbon.readings_of(run_dir),
    }  # fmt: skip
    tally = report.Tally(cfg.sites)
    for record in run["records"]:
        tally.add(record)
    return run | {"summary": report.summarize(tally, run["rows"], run["steps"], cfg, traces, run["readings"], run["prices"])}


def moment(unix: float):
    return mdates.date2num(np.datetime64(round(unix * 1000), "ms"))


def modes(rows: list[carbon.Interval], end_s: float) -> list[tuple[str, float, float]]:
    """(mode, from, to): how many sites train or agree at a time, as paused, local or federated."""
    busy = [(r.start_s, r.end_s) for r in rows if r.state in ("training", "syncing", "waiting")]
    edges = sorted({0.0, end_s, *(t for pair in busy for t in pair)})
    out: list[tuple[str, float, float]] = []
    for a, b in zip(edges, edges[1:]):
        count = sum(s <= a and e >= b for s, e in busy)
        mode = ("paused", "local")[count] if count < 2 else "federated"
        if out and out[-1][0] == mode:
            out[-1] = (mode, out[-1][1], b)
        else:
            out.append((mode, a, b))
    return out


def timeline(run: dict):
    """The figure at the top of the README: grids above, who trained below."""
    cfg, rows, start = run["cfg"], run["rows"], config.start_unix(run["cfg"])
    sites = list(cfg.sites)
    end_s = max(r.end_s for r in rows)
    style = {name: (COLORS[i % len(COLORS)], LINES[i % len(LINES)]) for i, name in enumerate(sites)}
    priced = [0.9] if run["prices"] else []
    fig, axes = plt.subplots(
        len(sites) + 2 + len(priced), 1, sharex=True, figsize=(10.5, 3.7 + 1.25 * len(sites) + sum(priced)),
        gridspec_kw={"height_ratios": [0.16, 1.75, *priced, *[1] * len(sites)], "hspace": 0.12},
    )  # fmt: skip
    strip, top, panels = axes[0], axes[1], axes[2 + len(priced) :]
    for mode, a, b in modes(rows, end_s):
        strip.axvspan(moment(start + a), moment(start + b), color=MODES[mode], lw=0)
        if b - a > 0.055 * end_s:
            strip.text(moment(start + (a + b) / 2), 0.48, mode, ha="center", va="center", fontsize=8.5,
                       color="white" if mode == "federated" else INK)  # fmt: skip
    strip.set_yticks([])
    strip.set_ylabel("mode", rotation=0, ha="right", va="center", fontsize=8.5)
    strip.tick_params(axis="x", length=0)

    highest = 0.0
    for name in sites:
        trace = run["traces"][cfg.sites[name].region]
        inside = (trace.starts >= start) & (trace.starts <= start + end_s)
        when, values = [moment(t) for t in trace.starts[inside]], trace.values[inside]
        values = values if trace.known is None else np.where(trace.known[inside], values, np.nan)
        color, line = style[name]
        top.step(when, values, where="post", color=color, ls=line, lw=1.5, label=f"{name} ({trace.region})")
        highest = max(highest, float(trace.values[inside].max()))
    bounds = config.thresholds(cfg)
    if bounds and cfg.policy.objective == "carbon":
        top.axhline(bounds[0], color=INK, lw=0.9)
        top.annotate(f"threshold {bounds[0]:g}", (1.0, bounds[0]), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                     textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=INK)  # fmt: skip
    if priced:
        for name in sites:
            prices = run["prices"][carbon.price_column(cfg.sites[name])]
            first, last = np.searchsorted(prices.starts, (start, start + end_s), side="right") - 1
            edges = np.clip(np.append(prices.starts[first : last + 1], prices.end), start, start + end_s)
            heights = np.append(prices.values[first : last + 1], prices.values[last])
            color, line = style[name]
            axes[2].step([moment(t) for t in edges], heights, where="post", color=color, ls=line, lw=1.5)
        axes[2].axhline(0.0, color=INK, lw=0.6)
        axes[2].set_ylabel(f"price,\n{run['summary']['currency']}/MWh")
    top.set_ylim(-25, highest * 1.24)
    top.set_ylabel("marginal carbon\nintensity, gCO$_2$/kWh")
    top.legend(loc="upper center", ncols=min(3, len(sites)), frameon=False, fontsize=9, borderaxespad=0.3)

    losses = [s["loss"] for s in run["steps"]]
    low, high = (min(losses), np.percentile(losses, 99.5)) if losses else (0, 1)
    for panel, name in zip(panels, sites):
        color, _ = style[name]
        known = report.windows(cfg, name, run["traces"], run["prices"], start, start + end_s)
        if known is None:  # the policy has no threshold: where the grid was curtailed
            known = run["traces"][cfg.sites[name].region].below(cfg.carbon.curtailed_below_g_per_kwh, start, start + end_s)
        for a, b in known:
            panel.axvspan(moment(a), moment(b), color=WINDOW, lw=0)
        trained = [r for r in rows if r.site == name and r.state == "training"]
        steps = [s for s in run["steps"] if s["site"] == name]
        for group in runs_of(trained):
            part = [s for s in steps if group[0] <= s["t_s"] <= group[1] + 1e-3]
            panel.plot([moment(start + s["t_s"]) for s in part], [s["loss"] for s in part], color=color, lw=1.3, marker=".", ms=2.5)
            bar = low - 0.12 * (high - low)
            panel.plot([moment(start + t) for t in group], [bar, bar], color=color, lw=3.5, solid_capstyle="butt")
        panel.set_ylim(low - 0.2 * (high - low), high + 0.08 * (high - low))
        hours = sum(r.end_s - r.start_s for r in trained) / 3600
        left = np.mean([s["t_s"] for s in steps] or [end_s]) > end_s / 2  # the label goes where the site did not train
        place = {"x": 0.008 if left else 0.992, "ha": "left" if left else "right", "va": "top", "transform": panel.transAxes}
        panel.text(y=0.95, s=name.replace("_", " "), fontsize=9.5, color=color, fontweight="bold", **place)
        panel.text(y=0.76, s=f"{hours:.1f} h of training", fontsize=8.5, color=INK, **place)
    panels[len(panels) // 2].set_ylabel("train loss, nats/token")
    last = panels[-1]
    last.set_xlim(moment(start), moment(start + end_s))
    last.xaxis.set_major_locator(mdates.AutoDateLocator(minticks=5, maxticks=10))
    last.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M"))
    shaded = "the threshold" if bounds and cfg.policy.objective != "mix" else f"{cfg.carbon.curtailed_below_g_per_kwh:g} gCO$_2$/kWh"
    last.set_xlabel(f"UTC, from {carbon.iso(start)[:10]}; shaded: below {shaded}; bars: training")
    for axis in axes[1:]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
    for side in strip.spines.values():
        side.set_visible(False)
    fig.align_ylabels(axes[1:])
    return fig


def runs_of(trained: list[carbon.Interval], gap_s: float = 300.0) -> list[tuple[float, float]]:
    """Training intervals joined over syncs and short waits."""
    out: list[list[float]] = []
    for row in sorted(trained, key=lambda r: r.start_s):
        if out and row.start_s - out[-1][1] <= gap_s:
            out[-1][1] = row.end_s
        else:
            out.append([row.start_s, row.end_s])
    return [tuple(pair) for pair in out]


# ---------------------------------------------------------------------------------------------------------------------
# Power, energy, emissions and cost


def draw(run: dict, site: str, paid: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a site drew: edges (n + 1,) s since clock.start, kW (n,), gCO2/kWh (paid: currency/MWh) (n,), constant in between."""
    cfg, start = run["cfg"], config.start_unix(run["cfg"])
    spec = cfg.sites[site]
    trace = run["prices"][carbon.price_column(spec)] if paid else run["traces"][spec.region]
    rows = run["rows"]
    column = (rows if isinstance(rows, dict) else carbon.columns(rows))[site]
    _, begins, ends, kw, _ = carbon.drawn(column, spec, [r for r in run["readings"] if r.site == site])
    samples = trace.starts[(trace.starts > start) & (trace.starts < start + ends[-1])] - start
    edges = np.unique(np.concatenate((begins, ends, samples.astype(float))))
    now = np.searchsorted(begins, edges[:-1], side="right") - 1
    last = np.searchsorted(trace.starts, start + edges[:-1], side="right") - 1
    return edges, kw[now], trace.values[last]


def emitted_kg(run: dict, times: np.ndarray, paid: bool = False) -> np.ndarray:
    """kgCO2 (paid: cost, in the run's currency) of all sites from the start to each of the times (s since clock.start)."""
    total = np.zeros(len(times))
    for site in run["cfg"].sites:
        edges, kw, value = draw(run, site, paid)
        grown = np.concatenate(([0.0], np.cumsum(carbon.charged(kw, value * np.diff(edges)))))
        total += np.interp(times, edges, grown)
    return total


def clock_axis(axis, start: int, end_s: float) -> None:
    axis.set_xlim(moment(start), moment(start + end_s))
    axis.xaxis.set_major_locator(mdates.AutoDateLocator(minticks=5, maxticks=10))
    axis.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M"))


def bare(*axes) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)


def power(run: dict):
    """Power of each site, and below it the emission rate of all, over time; with prices, also cost, and both added up."""
    start, end_s, sites = config.start_unix(run["cfg"]), max(r.end_s for r in run["rows"]), list(run["cfg"].sites)
    heights = [1] * len(sites) + ([1.6, 1.4, 1.4] if run["prices"] else [1.9])
    fig, axes = plt.subplots(len(heights), 1, sharex=True, figsize=(10.5, 0.8 + 0.85 * sum(heights)),
                             gridspec_kw={"hspace": 0.18, "height_ratios": heights})  # fmt: skip
    panels, rates = axes[: len(sites)], axes[len(sites) : len(sites) + (2 if run["prices"] else 1)]
    draws = [draw(run, site) for site in sites]
    most = max([run["cfg"].sites[s].train_kw for s in sites] + [float(kw.max()) for _, kw, _ in draws])
    for i, (panel, site, (edges, kw, _)) in enumerate(zip(panels, sites, draws)):
        when, color = [moment(start + t) for t in edges], COLORS[i % len(COLORS)]
        panel.fill_between(when, np.append(kw, kw[-1]), step="post", color=color, alpha=0.75, lw=0)
        panel.set_ylim(0, 1.15 * most)
        panel.set_ylabel(f"{site.replace('_', chr(10))}\nkW", fontsize=8.5)
    for paid, (rate, unit) in enumerate(zip(rates, ("kgCO$_2$", run["summary"]["currency"]))):
        for i, site in enumerate(sites):
            edges, kw, value = draw(run, site, bool(paid))
            rate.step([moment(start + t) for t in edges], np.append(kw * value, 0.0) / 1000, where="post", color=COLORS[i % len(COLORS)],
                      ls=LINES[i % len(LINES)], lw=1.5, label=site.replace("_", " "))  # fmt: skip
        rate.set_ylabel(f"{unit}/h")
    rates[0].set_ylim(bottom=0)
    if run["prices"]:
        rates[1].axhline(0.0, color=INK, lw=0.6)
        so_far(run, axes[-1], start, end_s)
    clock_axis(axes[-1], start, end_s)
    axes[-1].set_xlabel(f"UTC, from {carbon.iso(start)[:10]}")
    fig.legend(*rates[0].get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0.89), ncols=6, frameon=False, fontsize=9)
    bare(*axes)
    fig.align_ylabels(axes)
    return fig


def so_far(run: dict, axis, start: int, end_s: float) -> None:
    """Emissions (left, solid) and cost (right, dashed) of all sites from the start to each time."""
    times = np.unique(np.concatenate([[0.0, end_s], *(draw(run, site, paid)[0] for site in run["cfg"].sites for paid in (False, True))]))
    for paid, (side, unit) in enumerate(((axis, "kgCO$_2$"), (axis.twinx(), run["summary"]["currency"]))):
        side.plot([moment(start + t) for t in times], emitted_kg(run, times, bool(paid)), color=RUN_COLORS[paid], ls=LINES[paid], lw=1.6)
        side.set_ylabel(f"{unit} so far\n({'dashed' if paid else 'solid'})", color=RUN_COLORS[paid])
        side.spines["top"].set_visible(False)
        side.tick_params(labelsize=8.5)


def bars(labels: list[str], form: str, unit: str):
    """Axes for horizontal bars, one a label, with room for the numbers at their ends."""
    fig, axis = plt.subplots(figsize=(8.5, 0.9 + 0.42 * len(labels)))
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.invert_yaxis()
    bare(axis)

    def put(i: int, value: float, at: float | None = None, **style) -> None:
        axis.barh(i, value, height=0.62, **{"edgecolor": INK, "lw": 0.6} | style)
        axis.text(value if at is None else at, i, "  " + format(value, form) + unit, va="center", fontsize=8.5, color=INK)

    return fig, axis, put


def emissions(runs: list[dict]):
    """Total kgCO2 of each run beside the same tokens at one site without pause, and the floor."""
    first = next((r for r in runs if r["summary"]["baselines"]), runs[0])
    alone = first["summary"]["baselines"] or {}
    labels = [r["cfg"].run for r in runs] + [f"{region} alone, always on" for region in alone]
    fig, axis, put = bars(labels, ".2f", "")
    for i, run in enumerate(runs):
        put(i, run["summary"]["emissions_kg"], color=RUN_COLORS[0])
        floor = run["summary"]["floor_kg"]["lp"]
        if floor is not None:
            axis.plot([floor, floor], [i - 0.4, i + 0.4], color="black", lw=2, label="floor: the least by the same hour" if not i else None)
    for i, kg in enumerate(alone.values(), len(runs)):
        put(i, kg, color="#d9dde0", hatch="///")
    axis.set_xlim(0, 1.14 * max([r["summary"]["emissions_kg"] for r in runs] + list(alone.values())))
    axis.set_xlabel("emissions of the whole run, kgCO$_2$")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    return fig


def priced(runs: list[dict]) -> list[dict]:
    """The runs whose cost can stand on one axis: those with prices, if all of them are in one currency."""
    some = [run for run in runs if run["prices"]]
    currencies = sorted({run["summary"]["currency"] for run in some})
    if len(currencies) > 1:
        print(f"no figure of cost: {', '.join(currencies)} cannot share an axis; see table.md", file=sys.stderr)
    return some if len(currencies) == 1 else []


def cost(runs: list[dict]):
    """Total cost of each run beside the same tokens at one site without pause; below 0 the grid paid for it."""
    first = next((r for r in runs if r["summary"]["baselines_cost"]), runs[0])
    alone = {region: paid for region, paid in (first["summary"]["baselines_cost"] or {}).items() if paid is not None}
    totals = [r["summary"]["cost"] for r in runs] + list(alone.values())
    fig, axis, put = bars([r["cfg"].run for r in runs] + [f"{region} alone, always on" for region in alone], ".3g", "")
    for i, paid in enumerate(totals):
        style = {"color": RUN_COLORS[0]} if i < len(runs) else {"color": "#d9dde0", "hatch": "///"}
        put(i, paid, at=max(paid, 0.0), **style)
    axis.axvline(0.0, color=INK, lw=0.8)
    room = 0.14 * (max(0.0, *totals) - min(0.0, *totals))
    axis.set_xlim(min(0.0, *totals) - 0.3 * room, max(0.0, *totals) + room)
    axis.set_xlabel(f"cost of the whole run, {first['summary']['currency']}")
    return fig


def curtailed(runs: list[dict]):
    """Share of the energy drawn inside windows, for each run and for one site without pause."""
    first = runs[0]
    start, spec = config.start_unix(first["cfg"]), next(iter(first["cfg"].sites.values()))
    low, alone = first["cfg"].carbon.curtailed_below_g_per_kwh, {}
    seconds = first["summary"]["tokens"] / spec.tokens_per_s
    for region in first["cfg"].carbon.baseline_regions:
        trace = first["traces"][region]
        if start + seconds <= trace.end and seconds:
            inside = trace.seconds_below(low, np.array([float(start)]), np.array([start + seconds]))[0]
            alone[f"{region} alone, always on"] = inside / seconds
    shares = {r["cfg"].run: r["summary"]["curtailed_share"] or 0.0 for r in runs}
    fig, axis, put = bars(list(shares) + list(alone), ".1f", " %")
    for i, share in enumerate([*shares.values(), *alone.values()]):
        axis.barh(i, 100, height=0.62, color="white", edgecolor="#9aa3ab", lw=0.6)
        put(i, 100 * share, at=100, color=RUN_COLORS[3] if i < len(shares) else "#d9dde0", hatch="" if i < len(shares) else "///")
    axis.set_xlim(0, 116)
    axis.set_xlabel(f"energy drawn below {low:g} gCO$_2$/kWh, % of the whole")
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def smoothed(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """(s since clock.start, EMA of the train loss) over all steps of all sites in time order. Bias-corrected, so that runs of few and
    of many steps compare; the summary's train_ppl_best, the paper's, is not."""
    found = report.all_losses(run["steps"])
    out, smooth = [], 0.0
    for i, (_, loss) in enumerate(found, 1):
        smooth = report.EMA * smooth + (1 - report.EMA) * loss
        out.append(smooth / (1 - report.EMA**i))
    return np.array([t_s for t_s, _ in found]), np.array(out)


def lines_of(runs: list[dict], over, xlabel: str, transform, ylabel: str):
    """One line a run of its smoothed train loss, over what `over(run, times)` says."""
    fig, axis = plt.subplots(figsize=(8.5, 4.4))
    tails = []
    for i, run in enumerate(runs):
        times, losses = smoothed(run)
        if not len(times):
            continue
        x, y = over(run, times), transform(losses)
        axis.plot(x, y, color=RUN_COLORS[i % 6], ls=LINES[i % 4], lw=1.6, marker=MARKERS[i % 6], ms=5,
                  markevery=max(1, len(x) // 12), label=run["cfg"].run)  # fmt: skip
        tails.append(y[len(y) // 4 :])
    if tails:
        low, high = min(t.min() for t in tails), max(t.max() for t in tails)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(color="#e6e6e6", lw=0.6)
    bare(axis)
    return fig


def perplexity(runs: list[dict]):
    """Smoothed train perplexity over the hours since the start."""
    fig = lines_of(runs, lambda run, t: t / 3600, "hours since the start", np.exp, "train perplexity (EMA 0.99), log scale")
    axis = fig.axes[0]
    axis.set_xlim(left=0)
    axis.set_yscale("log")
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which("{x:g}")
    return fig


def loss_over_kgco2(runs: list[dict]):
    """Smoothed train loss over the kgCO2 spent for it; a ring: the final validation loss."""
    fig = loss_over(runs, emitted_kg, "emissions_kg", "emissions so far, kgCO$_2$")
    fig.axes[0].set_xlim(0, 1.05 * max(r["summary"]["emissions_kg"] for r in runs))
    return fig


def loss_over_cost(runs: list[dict]):
    """Smoothed train loss over the cost so far, which falls while the price is below 0; a ring: the final validation loss."""
    return loss_over(runs, lambda run, t: emitted_kg(run, t, paid=True), "cost", f"cost so far, {runs[0]['summary']['currency']}")


def loss_over(runs: list[dict], over, total: str, xlabel: str):
    fig = lines_of(runs, over, xlabel, lambda y: y, "train loss (EMA 0.99), nats/token")
    axis = fig.axes[0]
    measured = [(i, r["summary"]) for i, r in enumerate(runs) if r["summary"]["val_loss"] is not None and r["steps"]]
    for i, s in measured:
        axis.plot(s[total], s["val_loss"], MARKERS[i % 6], ms=10, mfc="none", mec=RUN_COLORS[i % 6], mew=2, clip_on=False)
    if measured:
        low, high = axis.get_ylim()
        losses = [s["val_loss"] for _, s in measured]
        axis.set_ylim(min(low, min(losses) - 0.05 * (high - low)), max(high, max(losses)))
        axis.set_xlabel(f"{xlabel} (large open marks: validation loss at the end)")
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# Table and report

COLUMNS = ("scenario", "runtime, h", "training site-hours", "energy, kWh", "emissions, kgCO2", "best smoothed train perplexity",
           "validation loss, nats/token", "simulated")  # fmt: skip


def pareto(rows: list[dict], floor: list[tuple[float, float]], folder: Path) -> Path:
    """Runtime against kgCO2 of simulated policies, the floor for their training hours drawn in. rows: simulate.compare's."""
    fig, axis = plt.subplots(figsize=(8.5, 4.8))
    if floor:
        axis.plot(*zip(*floor), color=INK, lw=1.4, label="floor with starts")
        axis.fill_between([h for h, _ in floor], [kg for _, kg in floor], color="#eef1f3")
    for i, row in enumerate(rows):
        style = {"mfc": RUN_COLORS[i % 6] if row["exit"] == 0 else "none", "mec": RUN_COLORS[i % 6]}
        left = "" if row["exit"] == 0 else ", budget left"
        label = f"{row['policy']}: {row['emissions_kg']:.2f} kg, {row['runtime_h']:.1f} h{left}"
        axis.plot(row["runtime_h"], row["emissions_kg"], MARKERS[(i + i // 6) % 6], ms=9, mew=1.6, ls="", label=label, **style)
    axis.set(xlabel="hours until the budget is trained", ylabel="kgCO2", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    bare(axis)
    return save(fig, folder, "pareto")


def columns_of(runs: list[dict]) -> tuple[str, ...]:
    return COLUMNS[:5] + ("cost",) * any(run["prices"] for run in runs) + COLUMNS[5:]


def cells(run: dict, with_cost: bool) -> list[str]:
    s = run["summary"]
    numbers = [(s["runtime_h"], ".2f"), (s["train_site_hours"], ".2f"), (s["energy_kwh"], ".2f"), (s["emissions_kg"], ".3f"),
               (s["train_ppl_best"], ".3f"), (s["val_loss"], ".4f")]  # fmt: skip
    cells = [run["cfg"].run, *("" if v is None else format(v, form) for v, form in numbers), "" if run["steps"] else "yes"]
    cost = "" if s["cost"] is None else f"{s['cost']:.3f} {s['currency']}"
    return cells[:5] + [cost] * with_cost + cells[5:]


def table(runs: list[dict]) -> str:
    """The runs side by side, as Markdown."""
    columns = columns_of(runs)
    lines = [columns, ["---", *["---:"] * (len(columns) - 2), "---"], *(cells(run, "cost" in columns) for run in runs)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#22313f;max-width:62rem;margin:2rem auto;padding:0 1rem}
img{max-width:100%}table{border-collapse:collapse;font-size:.9rem}td,th{border-bottom:1px solid #ccd;padding:.3rem .6rem;
text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#f4f6f7;padding:1rem;overflow:auto;font-size:.8rem}
figcaption{color:#566;font-size:.9rem;margin-bottom:2rem}"""


def page(runs: list[dict], pictures: list[tuple[str, str, Path]]) -> str:
    """report.html: table, figures, configs and provenance in one file. pictures: (title, what it shows, PNG)."""
    e = html.escape
    columns = columns_of(runs)
    head = "".join(f"<th>{e(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{e(c)}</td>" for c in cells(run, "cost" in columns)) + "</tr>" for run in runs)
    parts = [f"<h1>{e(', '.join(r['cfg'].run for r in runs))}</h1>", f"<table><tr>{head}</tr>{body}</table>"]
    for title, shows, path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<figure><h2>{e(title)}</h2><img alt='{e(shows)}' src='data:image/png;base64,{data}'>"
                     f"<figcaption>{e(shows)}</figcaption></figure>")  # fmt: skip
    for run in runs:
        provenance = OmegaConf.to_yaml(OmegaConf.create(run["summary"]["provenance"]))
        parts.append(f"<h2>{e(run['cfg'].run)}: provenance</h2><pre>{e(provenance)}</pre>")
        parts.append(f"<details><summary>{e(run['cfg'].run)}: config</summary><pre>{e(OmegaConf.to_yaml(run['cfg']))}</pre></details>")
    parts.append(f"<p>Made by <code>{e(command())}</code></p>")
    title = e(" / ".join(r["cfg"].run for r in runs))
    return (f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>"
            f"<body>{''.join(parts)}</body></html>\n")  # fmt: skip


def command() -> str:
    return "python figures.py " + shlex.join(sys.argv[1:])


def save(fig, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight", metadata={"Description": command()})
    fig.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"Subject": command(), "CreationDate": None})
    plt.close(fig)
    return folder / f"{name}.png"


def first_line(function) -> str:
    return function.__doc__.splitlines()[0]


def draw_all(runs: list[dict], folder: Path) -> list[Path]:
    """Every figure, table.md and report.html of these runs into a folder; returns the files (PNG for figures)."""
    pictures = []
    for run in runs:
        tail = "" if len(runs) == 1 else f"-{run['dir'].name}"
        for make in (timeline, power):
            path = save(make(run), folder, make.__name__ + tail)
            pictures.append((f"{make.__name__}: {run['cfg'].run}", first_line(make), path))
    with_cost = priced(runs)
    for make, some in ((perplexity, runs), (loss_over_kgco2, runs), (loss_over_cost, with_cost)):
        if any(run["steps"] for run in some):
            pictures.append((make.__name__, first_line(make), save(make(some), folder, make.__name__)))
    for make, some in ((emissions, runs), (cost, with_cost), (curtailed, runs)):
        if some:
            pictures.append((make.__name__, first_line(make), save(make(some), folder, make.__name__)))
    (folder / "table.md").write_text(table(runs))
    (folder / "report.html").write_text(page(runs, pictures))
    return [path for _, _, path in pictures] + [folder / "table.md", folder / "report.html"]


def main(argv: list[str]) -> int:
    out = None
    if "--out" in argv:
        i = argv.index("--out")
        if i + 1 == len(argv):
            raise BadInput("--out needs a folder")
        out, argv = Path(argv[i + 1]), argv[:i] + argv[i + 2 :]
    if not argv:
        raise BadInput("no run given; say figures.py runs/NAME [--out DIR]")
    folders = list(dict.fromkeys(Path(name) for name in argv))
    runs = [load(folder) for folder in folders]
    for path in draw_all(runs, out or folders[0] / "figures"):
        print(f"written: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    config.command(main)
