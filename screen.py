"""What a terminal shows of a run. Everything on it is read from the run's folder, so it serves any run: one that launch.py
started, one started by hand or on Slurm, one that is over.

    with Screen(run_dir):          # a live table until the block ends
        ...
    watch(run_dir)                 # the same, until the run has ended
    picture(run_dir, 5.0, Path("screen.svg"))    # as it was five hours after the run's start
"""

import io
import json
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import carbon
import config
import report
from config import BadInput
from journal import effective

REFRESH_S = 0.5
QUIET_S = 15.0  # without a record; said on the screen
EVENTS = 10  # of the last ones, where the terminal is tall enough
AHEAD_S = 48 * 3600.0  # how far windows are looked for
PACE_S = 60.0  # the pace on this machine is that of the last minute
SUMMARY_S = 20.0  # a summary comes so soon after the end
READ_SHARE = 0.05  # of the time at most goes into reading intervals.csv again
MODE_STYLES = {"federated": "bold cyan", "local": "cyan", "paused": "dim"}
STATE_STYLES = {"training": "bold green", "syncing": "cyan", "waiting": "yellow", "starting": "yellow", "provisioning": "yellow"}


class Tail:
    """The whole lines that a growing file has gained since it was last asked."""

    def __init__(self, path: Path):
        self.path, self.inode, self.offset = path, None, 0

    def records(self) -> tuple[list[dict], bool]:
        """The new records, and whether they are all there are because the file has begun anew."""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                anew = self.offset > 0 and (stat.st_ino != self.inode or stat.st_size < self.offset)
                self.inode, self.offset = stat.st_ino, 0 if anew else self.offset
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return [], False
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        try:
            return [json.loads(line) for line in data.splitlines()], anew
        except ValueError as error:
            raise BadInput(f"{self.path} is damaged ({error}); see what `python coordinator.py check {self.path.parent}` says") from None


@dataclass
class Site:
    """What the records say of one site."""

    tail: Tail
    state: str = "off"  # the scheduler's: off, provisioning, starting or on
    step: dict | None = None  # its last logged step
    spent: dict | None = None  # energy_kwh, emissions_kg, cost of its intervals
    doing: str = "waiting"  # its last power state
    until_s: float = 0.0  # where its intervals end
    mci: float | None = None  # with live signals


class Board:
    """A run as its folder has it: `update()` reads what is new, of what happened before `upto_s`."""

    def __init__(self, run_dir: Path, upto_s: float = math.inf):
        for name in ("config.yaml", "journal.jsonl"):
            if not (run_dir / name).is_file():
                raise BadInput(f"{run_dir}/{name} does not exist; is {run_dir} the folder of a run that has started?")
        self.dir, self.upto_s = run_dir, upto_s
        self.cfg = OmegaConf.merge(OmegaConf.structured(config.Config), config.read_yaml(run_dir / "config.yaml"))
        self.live = config.is_live(self.cfg)
        self.traces = None if self.live else carbon.load_traces(self.cfg)
        self.prices = carbon.load_prices(self.cfg, self.traces)
        self._begin()

    def _begin(self) -> None:
        self.journal, self.records = Tail(self.dir / "journal.jsonl"), []
        self.sites = {name: Site(Tail(self.dir / f"{name}.jsonl")) for name in self.cfg.sites}
        self.tokens, self.t, self.round, self.predicted_end_s = 0, 0.0, None, None
        self.val, self.over = None, None
        self.rates: dict[str, float] = {}  # of the last round's members
        self.events: deque[str] = deque(maxlen=EVENTS)
        self.pace: deque[tuple[float, float]] = deque()  # (unix, tokens in the model and in the open round) of the last steps
        self.read_again = 0.0
        self.stamps: dict[str, float] = {}

    def update(self) -> list[str]:
        """Read what is new. Returns the new events, a line each."""
        records, anew = self.journal.records()
        if anew:
            self._begin()
            records, _ = self.journal.records()
        said = []
        for record in records:
            if record["t_s"] <= self.upto_s and (line := self._take(record)):
                said.append(line)
                self.events += [line] if record["type"] != "open" else []  # which round is open stands above
        steps = [(step, site) for site in self.sites.values() for step in site.tail.records()[0] if step["t_s"] <= self.upto_s]
        for step, site in sorted(steps, key=lambda found: found[0]["wall"]["unix"]):
            self._step(site, step)
        if time.monotonic() >= self.read_again:
            began = time.monotonic()
            self._read_intervals()
            self.read_again = began + (time.monotonic() - began) / READ_SHARE
        return said

    def _changed(self, name: str) -> bool:
        path = self.dir / name
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        before, self.stamps[name] = self.stamps.get(name, 0), stamp
        return stamp != before

    def _take(self, record: dict) -> str | None:
        kind = record["type"]
        self.records.append(record)
        self.t = record["t_s"]
        self.over = record["reason"] if kind == "end" else None
        if kind == "genesis":
            self.predicted_end_s = record.get("wall", {}).get("predicted_end_s")
        elif kind == "site":
            self.sites[record["site"]].state = record["to"]
        elif kind == "open":
            self.round, self.rates = record, record["rates"]
        elif kind == "commit":
            self.tokens, self.round = self.tokens + record["tokens"], None
        elif kind in ("cancel", "rollback", "resume"):
            self.round = None
            self.records = effective(self.records)
            self.tokens = sum(r["tokens"] for r in self.records if r["type"] == "commit")
        elif kind == "eval" and record["val_loss"] is not None:
            self.val = record
        return report.describe(record, self.cfg, self.tokens)

    def _step(self, site: Site, step: dict) -> None:
        site.step, self.t = step, max(self.t, step["t_s"])
        if site.mci is None or self.live:
            site.mci = step["mci_g_per_kwh"]
        self.pace.append((step["wall"]["unix"], step["tokens"]))
        while self.pace[0][0] < self.pace[-1][0] - PACE_S:
            self.pace.popleft()

    def _read_intervals(self) -> None:
        """Who is in which power state, and what each site has drawn, emitted and cost: intervals.csv, by the exact rule."""
        if self.live and self._changed("signals.csv"):
            self.traces = carbon.load_traces(self.cfg, self.dir, self.t + 1)
        if not self._changed("intervals.csv") or self.traces is None:
            return
        rows = carbon.read_intervals(str(self.dir / "intervals.csv"))
        rows = [replace(row, end_s=min(row.end_s, self.upto_s)) for row in rows if row.start_s < self.upto_s]
        columns = carbon.columns(rows)
        spent = carbon.account(columns, self.cfg, self.traces, carbon.readings_of(self.dir), self.prices)["sites"]
        for name, site in self.sites.items():
            if name in columns:
                codes, _, ends = columns[name]
                site.spent, site.doing, site.until_s = spent[name], carbon.STATES[codes[-1]], float(ends[-1])

    # -- what is shown ------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        return self.round["mode"] if self.round else "paused"

    def state(self, name: str) -> str:
        """A site's power state: its scheduler's where that says it all, else what it did last."""
        site = self.sites[name]
        if site.state != "on":
            return site.state
        if site.step and site.step["t_s"] > site.until_s:
            return "training"
        return site.doing if site.doing in ("training", "syncing") else "waiting"

    def spent(self, name: str) -> dict:
        """energy_kwh, emissions_kg and cost up to now: of the intervals, or of a step that came after them."""
        site = self.sites[name]
        if site.step and (site.spent is None or site.step["t_s"] > site.until_s):
            return site.step
        return site.spent or {"energy_kwh": 0.0, "emissions_kg": 0.0, "cost": 0.0 if self.prices else None}

    def signal(self, name: str) -> tuple[float | None, float | None]:
        """Of a site's grid, now: gCO2/kWh, and currency/MWh where there are prices; None: unknown."""
        spec, now = self.cfg.sites[name], config.start_unix(self.cfg) + self.t
        known = [] if self.live else [self.traces[spec.region]]
        known += [self.prices[carbon.price_column(spec)]] if self.prices else []
        values = [trace.at(now) if trace.begin <= now < trace.end else None for trace in known]
        return (self.sites[name].mci if self.live else values[0]), (values[-1] if self.prices else None)

    def windows(self, name: str) -> list[tuple[float, float]] | None:
        """Unix [begin, end) of the windows from now on; None where nobody knows them."""
        if self.live:
            return None
        now = config.start_unix(self.cfg) + self.t
        return report.windows(self.cfg, name, self.traces, self.prices, math.ceil(now), int(now + AHEAD_S))

    def left(self) -> str:
        """What is still to come, in training time, on the run's clock, and on this machine's where the two differ."""
        tokens = max(0, self.cfg.budget.tokens - self.tokens)
        parts = []
        if rate := sum(self.rates.values()):
            parts.append(f"{tokens / rate / 3600:.1f} h of training")
        if self.predicted_end_s is not None:
            end = carbon.iso(config.start_unix(self.cfg) + self.predicted_end_s)
            parts.append(f"{max(0.0, self.predicted_end_s - self.t) / 3600:.1f} h to the schedule's end at {end[11:16]} UTC")
        if self.cfg.clock.mode == "virtual" and len(self.pace) > 1 and self.pace[-1][1] > self.pace[0][1]:
            (since, before), (now, after) = self.pace[0], self.pace[-1]
            seconds = tokens * (now - since) / (after - before)
            parts.append(f"{duration(seconds)} on this machine")
        return ", ".join(parts) or "nobody knows yet"

    def quiet_s(self) -> float:
        """Seconds since the folder last grew; 0 of a moment that is past."""
        if self.over or self.upto_s < math.inf:
            return 0.0
        paths = [self.journal.path, *(site.tail.path for site in self.sites.values())]
        return time.time() - max((path.stat().st_mtime for path in paths if path.exists()), default=time.time())


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(board: Board, width: int, height: int) -> Group:
    """The whole screen, `width` x `height` characters."""
    table, shown = sites(board, width, height)
    parts = [*head(board, width), Text(), table]
    if len(board.sites) > shown:
        parts.append(Text(f"  and {len(board.sites) - shown} more sites", style="dim"))
    room = height - shown - 9 - (len(board.sites) > shown)
    lines = list(board.events)[-max(0, min(EVENTS, room)) :] if room > 0 else []
    parts += [Text(), *(event(line) for line in lines)]
    return Group(*parts)


def head(board: Board, width: int) -> list:
    """Which run, when, in what mode, how far, what is left."""
    cfg, iso = board.cfg, carbon.iso(config.start_unix(board.cfg) + board.t)
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(f"run {cfg.run}  ", style="bold").append(f"{iso[:10]} {iso[11:16]} UTC", style="bold")
    title.append(f" on the {cfg.clock.mode} clock  ", style="dim")
    if board.over:
        title.append(f"over: {board.over}", style="bold")
    elif board.round:
        words = f"{board.mode}: {report.several(board.round['members'])}, round {board.round['round']}"
        title.append(words, style=MODE_STYLES[board.mode])
    else:
        title.append("paused: no site trains", style=MODE_STYLES["paused"])
    if (quiet_s := board.quiet_s()) > QUIET_S:
        title.append(f"  nothing new for {duration(quiet_s)}", style="yellow")
    share = min(1.0, board.tokens / cfg.budget.tokens)
    bar = Table.grid(padding=(0, 2))
    bar.add_row(ProgressBar(cfg.budget.tokens, board.tokens, width=max(10, width // 3), complete_style="green",
                           finished_style="green"), Text(f"{100 * share:.1f} %", style="bold"),
                Text(f"{board.tokens:,} of {cfg.budget.tokens:,} tokens", style="dim"))  # fmt: skip
    lines = [title, Text(report.policy_words(cfg), style="dim", no_wrap=True, overflow="ellipsis"), bar]
    if not board.over:
        lines.append(Text(f"left: {board.left()}", no_wrap=True, overflow="ellipsis"))
    if board.val:
        words = f"{board.val['val_loss']:.4f} nats/token, {board.val['val_bpb']:.4f} bits/byte"
        lines.append(Text(f"validation: {words}, before round {board.val['round']}", no_wrap=True, overflow="ellipsis"))
    return lines


def sites(board: Board, width: int, height: int) -> tuple[Table, int]:
    """A row a site; how many are shown: those that do something first, where there are too many."""
    bounds, cfg = config.thresholds(board.cfg), board.cfg
    by_price, paid = cfg.policy.objective == "price", carbon.currency(cfg)
    columns = ["site", "state", "mode", "MCI", *([f"{paid}/MWh"] if board.prices else []), "round", "step", "loss", "tok/s", "kWh", "kgCO2",
               *([paid] if board.prices else []), "window"]  # fmt: skip
    names = list(board.sites)
    room = max(3, height - 12)
    if len(names) > room:
        names = sorted(names, key=lambda name: board.state(name) == "off")[:room]
    rows = [row(board, name, None if cfg.policy.objective == "mix" else bounds, by_price) for name in names]
    hidden = {c for c in columns if all(not r.get(c) for r in rows)} - {"mode", "loss", "tok/s"}
    gap, spare = 2, [paid, f"{paid}/MWh", "tok/s", "mode", "round", "step", "window"]  # a narrow terminal goes without, the last first
    while sum(max(len(c), *(len(r.get(c, "")) for r in rows)) + gap for c in columns if c not in hidden) >= width:
        if gap == 1 and not spare:
            break
        gap, hidden = 1, hidden | ({spare.pop()} if gap == 1 else set())
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="dim", pad_edge=False)
    kept = [c for c in columns if c not in hidden]
    for c in kept:
        table.add_column(c, justify="left" if c in ("site", "state", "mode", "window") else "right", no_wrap=True, overflow="ellipsis")
    for cells in rows:
        table.add_row(*(cells.get(c, "") for c in kept))
    return table, len(names)


def row(board: Board, name: str, bounds: tuple | None, by_price: bool) -> dict[str, Text]:
    """Column -> cell of one site. bounds: what its signal is held against."""
    site, state, spent, (mci, price) = board.sites[name], board.state(name), board.spent(name), board.signal(name)
    member = board.round is not None and name in board.round["members"]
    quiet = "dim" if state == "off" else ""
    cells = {"site": Text(name, style=quiet or "bold"), "state": Text(state, style=STATE_STYLES.get(state, "dim"))}
    cells["mode"] = Text(board.mode if member else "", style=MODE_STYLES[board.mode])
    cells["MCI"] = against(mci, None if by_price else bounds)
    if board.prices:
        cells[f"{carbon.currency(board.cfg)}/MWh"] = against(price, bounds if by_price else None)
    if site.step:
        cells["round"] = Text(str(board.round["round"] if member else site.step["round"]), style=quiet)
        cells["step"] = Text(f"{site.step['step']:,}", style=quiet)
        cells["loss"] = Text(f"{site.step['loss']:.3f}", style=quiet)
        cells["tok/s"] = Text(f"{site.step['wall']['tok_per_s']:,.0f}" if state != "off" else "", style=quiet)
    cells["kWh"] = Text(f"{spent['energy_kwh']:.2f}", style=quiet)
    cells["kgCO2"] = Text(f"{spent['emissions_kg']:.3f}", style=quiet)
    if spent.get("cost") is not None:
        cells[carbon.currency(board.cfg)] = Text(f"{spent['cost']:.3f}", style=quiet)
    cells["window"] = Text(next_of(board.windows(name), config.start_unix(board.cfg) + board.t), style=quiet)
    return cells


def against(value: float | None, bounds: tuple | None) -> Text:
    """A signal beside what it is held against: 41 < 100."""
    if value is None:
        return Text("?", style="yellow")
    if bounds is None:
        return Text(f"{value:.0f}")
    if value < bounds[0]:
        return Text(f"{value:.0f} < {bounds[0]:g}", style="green")
    return Text(f"{value:.0f} > {bounds[1]:g}" if value > bounds[1] else f"{value:.0f} >= {bounds[0]:g}", style="dim")


def next_of(windows: list[tuple[float, float]] | None, now: float) -> str:
    """The window that is or comes next: now-23:10, 01:20-02:00; empty where nobody knows."""
    if not windows:
        return "" if windows is None else "none"
    begin, end = windows[0]
    return f"{'now' if begin <= now + 1 else carbon.iso(begin)[11:16]}-{carbon.iso(end)[11:16]}"


def event(line: str) -> Text:
    who, _, rest = line.partition("|")
    style = "bold red" if "FAULT" in rest else "green" if "window open" in rest else "dim" if who.strip() in ("commit", "local") else ""
    return Text(f" {who.strip():16}{rest.strip()}", style=style, no_wrap=True, overflow="ellipsis")


# ---------------------------------------------------------------------------------------------------------------------
# Showing


class Screen:
    """The live table on a terminal, drawn anew twice a second until the block ends; the last one stays.

    What keeps it from being drawn stands in its place and in `error`; the run goes on."""

    def __init__(self, run_dir: Path, console: Console | None = None):
        self.console, self.error = console or Console(), None
        self.board = Board(run_dir)
        self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=1 / REFRESH_S, vertical_overflow="crop")

    def _render(self) -> Group | Text:
        try:
            self.board.update()
            return draw(self.board, self.console.width, self.console.height)
        except Exception as error:  # in a thread of rich's, which would die in silence
            self.error = error
            return Text(f"cannot draw the run: {error!r}", style="red")

    def __enter__(self) -> "Screen":
        self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()  # draws once more


def watch(run_dir: Path) -> int:
    """Follow a run until it has ended: the table on a terminal, a line an event elsewhere. Then its result."""
    if sys.stdout.isatty():
        with Screen(run_dir) as screen:
            board = screen.board
            while not board.over:
                time.sleep(REFRESH_S)
                if screen.error:
                    raise screen.error
    else:
        board = Board(run_dir)
        while not board.over:
            for line in board.update():
                print(line, flush=True)
            time.sleep(0.0 if board.over else REFRESH_S)
    print(result(run_dir, board.cfg), flush=True)
    return config.EXIT_DONE


def picture(run_dir: Path, upto_s: float, path: Path, width: int = 118, height: int = 30) -> None:
    """The screen as it was upto_s seconds after the run's start, as SVG."""
    board = Board(run_dir, upto_s)
    board.update()
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(draw(board, width, height))
    console.save_svg(str(path), title=f"python launch.py watch {run_dir}")


def result(run_dir: Path, cfg, wait_s: float = SUMMARY_S) -> str:
    """The final table of a run that has ended. Its summary is written a moment after its journal's end."""
    path, journal, until = run_dir / "summary.json", run_dir / "journal.jsonl", time.monotonic() + wait_s
    while not (path.exists() and path.stat().st_mtime >= journal.stat().st_mtime):
        if time.monotonic() > until:
            return f"{path} is not there, or is of before the journal's last record"
        time.sleep(0.2)
    return report.table(json.loads(path.read_text()), cfg)
