"""Figures of a run, from its files alone.

    python figures.py runs/demo [--out DIR]

timeline.png (and .pdf): marginal carbon intensity of the regions with the policy's threshold on top, below it one loss
panel per site, which trains only inside its windows; the run's modes are marked along the top. Readable in grey. The
command that made a figure stands in its metadata.
"""

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
MODES = {"local": "#9fc6de", "federated": "#2f6690", "paused": "#e8e8e8"}


def load(run_dir: Path) -> dict:
    """A run's config, traces, records, intervals and steps. Raises BadInput when one is missing."""
    for name in ("config.yaml", "journal.jsonl", "intervals.csv"):
        if not (run_dir / name).is_file():
            raise BadInput(f"{run_dir}/{name} does not exist; is {run_dir} the folder of a run that has started?")
    cfg = OmegaConf.merge(OmegaConf.structured(config.Config), OmegaConf.load(run_dir / "config.yaml"))
    return {
        "dir": run_dir, "cfg": cfg, "traces": carbon.load_traces(cfg), "records": effective(read_journal(run_dir / "journal.jsonl")),
        "rows": carbon.read_intervals(str(run_dir / "intervals.csv")), "steps": report.load_steps(run_dir, cfg.sites),
    }  # fmt: skip


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
    fig, axes = plt.subplots(
        len(sites) + 2, 1, sharex=True, figsize=(10.5, 3.7 + 1.25 * len(sites)),
        gridspec_kw={"height_ratios": [0.16, 1.75, *[1] * len(sites)], "hspace": 0.12},
    )  # fmt: skip
    strip, top, panels = axes[0], axes[1], axes[2:]
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
        when = [moment(t) for t in trace.starts[inside]]
        color, line = style[name]
        top.step(when, trace.values[inside], where="post", color=color, ls=line, lw=1.5, label=f"{name} ({trace.region})")
        highest = max(highest, float(trace.values[inside].max()))
    threshold = cfg.policy.on_below_g_per_kwh
    if cfg.policy.name == "threshold":
        top.axhline(threshold, color=INK, lw=0.9)
        top.annotate(f"threshold {threshold:g}", (1.0, threshold), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                     textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=INK)  # fmt: skip
    top.set_ylim(-25, highest * 1.24)
    top.set_ylabel("marginal carbon\nintensity, gCO$_2$/kWh")
    top.legend(loc="upper center", ncols=min(3, len(sites)), frameon=False, fontsize=9, borderaxespad=0.3)

    losses = [s["loss"] for s in run["steps"]]
    low, high = (min(losses), np.percentile(losses, 99.5)) if losses else (0, 1)
    for panel, name in zip(panels, sites):
        color, _ = style[name]
        for a, b in run["traces"][cfg.sites[name].region].below(threshold, start, start + end_s):
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
    last.set_xlabel(f"UTC, from {carbon.iso(start)[:10]}; shaded: below the threshold; bars: training")
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


def save(fig, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = "python figures.py " + shlex.join(sys.argv[1:])
    fig.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight", metadata={"Description": command})
    fig.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"Subject": command})
    plt.close(fig)


def main(argv: list[str]) -> int:
    out = None
    if "--out" in argv:
        i = argv.index("--out")
        if i + 1 == len(argv):
            raise BadInput("--out needs a folder")
        out, argv = Path(argv[i + 1]), argv[:i] + argv[i + 2 :]
    if not argv:
        raise BadInput("no run given; say figures.py runs/NAME [--out DIR]")
    for name in argv:
        run = load(Path(name))
        folder = out or run["dir"] / "figures"
        title = "timeline" if len(argv) == 1 else f"timeline-{run['dir'].name}"
        save(timeline(run), folder, title)
        print(f"figure: {folder}/{title}.png", file=sys.stderr)
    return 0


if __name__ == "__main__":
    config.command(main)
