"""The live table: what a terminal shows of a run is what the run's folder says, whoever started it and whenever it is looked at."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pyte
import pytest
from conftest import CLEAN, DIRTY, REPO
from rich.console import Console
from test_runs import until

import carbon
import config
import report
import screen
import simulate
from config import BadInput

PAIR = {"a": {}, "b": {}}
SCREEN = (118, 34)  # columns, lines
DAY = [f"carbon.trace={REPO / 'traces/paper_day.csv'}", f"price.trace={REPO / 'traces/paper_day_price.csv'}",
       f"price.goes_with={REPO / 'traces/paper_day.csv'}"]  # fmt: skip


class Terminal:
    """A command on a pseudo-terminal of its own, and what stands on its screen."""

    def __init__(self, command, size=SCREEN, **options):
        self.lines, self.stream = screen_and_stream(size)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        options["env"] = options.get("env", os.environ) | {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, **options)
        os.close(slave)
        self.all = b""

    def read(self, seconds: float) -> list[str]:
        """The screen's lines after so long, or after the process has closed it."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and select.select([self.master], [], [], left)[0]:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:  # the other end is closed
                break
            self.all += data
            self.stream.feed(data)
        return [line.rstrip() for line in self.lines.display]

    def text(self) -> str:
        """All that was ever written, without colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.all.decode(errors="replace"))


def screen_and_stream(size):
    lines = pyte.HistoryScreen(*size, history=10_000)
    return lines, pyte.ByteStream(lines)


def cells(lines: list[str]) -> dict[str, dict[str, str]]:
    """site -> column -> what the table says, by where the columns stand."""
    at = next((i for i, line in enumerate(lines) if line.startswith("site ") and " kgCO2" in line), None)
    if at is None:
        return {}
    spans = [m.span() for m in re.finditer(r"\S+", lines[at])]
    found = {}
    for line in lines[at + 1 :]:
        words = [(m.start(), m.end(), m.group()) for m in re.finditer(r"\S+(?: [<>]=? \S+)?", line)]
        if not words:
            break
        mine = {}
        for a, b in spans:
            touching = [w for s, e, w in words if s < b and e > a]
            mine[lines[at][a:b]] = touching[0] if touching else ""
        found[mine["site"]] = mine
    return found


def shown(board, width=118, height=30) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO())
    console.print(screen.draw(board, width, height))
    return console.file.getvalue().splitlines()


def simulated(folder, *changes, path=REPO / "configs/demo.yaml"):
    simulate.simulate(config.load([str(path), *DAY, *changes]), folder=folder)
    return folder


def board_of(folder, upto_s=float("inf")):
    board = screen.Board(folder, upto_s)
    board.update()
    return board


def prices_beside(runner, **columns):
    trace = (runner.folder / "trace.csv").read_text().splitlines()
    rows = [",".join([line.split(",")[0], *(str(v) for v in columns.values())]) for line in trace[1:]]
    (runner.folder / "price.csv").write_text("\n".join(["time," + ",".join(columns), *rows]) + "\n")
    return {"trace": str(runner.folder / "price.csv"), "unit": "EUR/MWh"}


# -- a real run on a real terminal ------------------------------------------------------------------------------------


def test_the_table_lives_from_the_first_minute_to_the_last_and_ends_in_the_result(runner):
    windows = {"a": [CLEAN] * 70 + [DIRTY], "b": [DIRTY] * 35 + [CLEAN]}  # a alone, both, b alone
    runner.write(PAIR, windows)
    argv = runner.write(PAIR, windows, budget={"tokens": 128 * 700}, price=prices_beside(runner, a=-40.0, b=70.0))
    terminal = Terminal([sys.executable, str(REPO / "launch.py"), *argv], cwd=runner.folder, env=runner.env)
    runner.processes.append(terminal.process)
    tables, heads = [], set()
    while terminal.process.poll() is None:
        lines = terminal.read(0.3)
        tables.append(cells(lines))
        heads |= {word for line in lines for word in ("local: a", "federated: a + b", "left: ", "% ") if word in line}
    last = terminal.read(1.0)
    assert terminal.process.returncode == 0, terminal.text()[-3000:]
    assert heads == {"local: a", "federated: a + b", "left: ", "% "}, heads
    live = [t["a"] for t in tables if t.get("a", {}).get("loss")]
    assert len(live) >= 3, "the table was alive while it trained"
    assert {t["mode"] for t in live} >= {"local", "federated"} and any(t["state"] == "training" for t in live)
    for t in live:
        assert t["MCI"] in ("20 < 100", "500 > 100") and t["EUR/MWh"] == "-40" and float(t["EUR"]) <= 0
        assert int((t["tok/s"] or "1").replace(",", "")) > 0 or t["state"] == "off"
    kwh = [float(t["kWh"]) for t in live]
    assert kwh == sorted(kwh) and kwh[-1] > 0
    losses = {f"{r['loss']:.3f}" for r in report.read_lines(runner.run_dir / "a.jsonl")}
    assert {t["loss"] for t in live} <= losses, "each is one that the run has logged"
    assert len({t["loss"] for t in live}) > 1
    # it ends in the result, and the table above it says the same
    s, text = runner.summary(), "\n".join(last)
    assert f"{s['emissions_kg']:.3f} kgCO2" in text and f"{s['val_loss']:.4f} nats/token" in text and "written: runs/tiny/figures" in text
    final = [t for t in tables if t][-1]
    everything = terminal.text()
    assert "100.0 %" in everything and "over: budget" in everything
    for name in "ab":
        for column, key in (("kWh", "energy_kwh"), ("kgCO2", "emissions_kg"), ("EUR", "cost")):
            assert f"{s['sites'][name][key]:.{2 if column == 'kWh' else 3}f}" in everything
    assert set(final) == {"a", "b"}
    assert "torchrun" not in everything.replace("torchrun's", ""), "what the launcher does itself it does not ask a person for"
    assert (runner.run_dir / "logs" / "coordinator.log").read_text().count("commit") == s["rounds"]


@pytest.mark.slow
def test_ctrl_c_on_the_terminal_ends_the_run_and_leaves_it_whole(runner):
    argv = runner.write(PAIR, budget={"tokens": 128 * 3000})
    terminal = Terminal([sys.executable, str(REPO / "launch.py"), *argv], cwd=runner.folder, env=runner.env)
    runner.processes.append(terminal.process)
    until(lambda: terminal.read(0.2) and cells([line.rstrip() for line in terminal.lines.display]).get("a", {}).get("loss"), 60)
    os.killpg(terminal.process.pid, signal.SIGINT)
    while terminal.process.poll() is None:
        terminal.read(0.2)
    terminal.read(0.5)
    assert terminal.process.returncode == 130
    assert "launch: stopping" in terminal.text() and "run tiny: interrupted" in terminal.text() and "Traceback" not in terminal.text()
    assert "\x1b[?25h" in terminal.all.decode()[-4000:], "the cursor is given back"


@pytest.mark.slow
def test_a_run_started_by_hand_is_watched_by_terminals_and_by_pipes(runner):
    argv = runner.write(PAIR, budget={"tokens": 128 * 600})
    head = runner.start("coordinator.py", *argv, log="coordinator")
    for name in "ab":
        runner.start("torchrun", "--nproc_per_node=1", str(REPO / "train.py"), *argv, f"site={name}", log=name)
    until(lambda: (runner.run_dir / "journal.jsonl").exists(), 60)
    watch = [sys.executable, str(REPO / "launch.py"), "watch", "runs/tiny"]
    terminal = Terminal(watch, cwd=runner.folder, env=runner.env)
    with open(runner.folder / "piped", "w") as out:
        piped = subprocess.Popen(watch, cwd=runner.folder, env=runner.env, stdout=out, start_new_session=True)
    runner.processes += [terminal.process, piped]
    live = []
    while terminal.process.poll() is None:
        live.append(cells(terminal.read(0.3)))
    assert head.wait(60) == 0 and terminal.process.returncode == 0 and piped.wait(30) == 0
    assert len({t["a"]["step"] for t in live if t.get("a", {}).get("step")}) > 1
    table = report.table(runner.summary(), config.load(argv)).strip()
    said = (runner.folder / "piped").read_text()
    assert table in said and "\x1b" not in said
    assert said.count("| ") >= len([r for r in runner.journal() if r["type"] in ("commit", "open", "eval")])
    over = runner.call("launch.py", "watch", "runs/tiny")  # and of a run that is over
    assert over.returncode == 0 and over.stdout == said


# -- every number is the folder's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
def test_at_any_moment_the_screen_says_what_was_spent_and_committed_until_then(tmp_path, share):
    folder = simulated(tmp_path / "run")
    end_s = json.loads((folder / "journal.jsonl").read_text().splitlines()[-1])["t_s"]
    t = share * end_s
    board = board_of(folder, t)
    cfg = board.cfg
    rows = [carbon.Interval(r.site, r.state, r.start_s, min(r.end_s, t)) for r in carbon.read_intervals(str(folder / "intervals.csv"))
            if r.start_s < t]  # fmt: skip
    by_hand = carbon.account(rows, cfg, board.traces, prices=board.prices)["sites"]
    before = [r for r in map(json.loads, (folder / "journal.jsonl").read_text().splitlines()) if r["t_s"] <= t]
    tokens = sum(r["tokens"] for r in before if r["type"] == "commit")
    lines = shown(board)
    assert f"{tokens:,} of {cfg.budget.tokens:,} tokens" in "\n".join(lines)
    assert len(lines) <= 30 and all(len(line) <= 118 for line in lines)
    table = cells(lines)
    states = {r.site: r.state for r in rows}
    for name, spent in by_hand.items():
        assert table[name]["kWh"] == f"{spent['energy_kwh']:.2f}" and table[name]["kgCO2"] == f"{spent['emissions_kg']:.3f}"
        assert table[name]["USD"] == f"{spent['cost']:.3f}" and table[name]["state"] == states[name]
        now = config.start_unix(cfg) + board.t
        mci = board.traces[cfg.sites[name].region].at(now)
        assert table[name]["MCI"] == f"{mci:.0f} {'<' if mci < 100 else '>'} 100"
        inside = table[name]["window"].startswith("now-")
        assert inside == (mci < 100), "a window is open exactly while the grid is below the threshold"


def test_a_resume_on_the_virtual_clock_and_a_rollback_take_tokens_back(tmp_path):
    folder = simulated(tmp_path / "run")
    path = folder / "journal.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    commits = [r for r in records if r["type"] == "commit"]
    board = board_of(folder)
    assert board.tokens == sum(c["tokens"] for c in commits) and board.over == "budget"
    back = {"n": len(records), "t_s": records[-1]["t_s"], "type": "rollback", "to_round": commits[-2]["round"], "tokens": 1}
    with open(path, "a") as file:
        file.write(json.dumps(back) + "\n" + '{"n": 9999, "torn')
    said = board.update()
    assert board.tokens == sum(c["tokens"] for c in commits[:-2]) and board.over is None and len(said) == 1
    path.write_text("".join(json.dumps(r) + "\n" for r in records[: len(records) // 2]))  # fresh=true under our eyes
    board.update()
    assert board.tokens == sum(r["tokens"] for r in records[: len(records) // 2] if r["type"] == "commit")


@pytest.mark.parametrize("width, height", [(60, 12), (80, 24), (100, 30), (160, 50)])
def test_a_screen_of_any_size_is_filled_and_never_overrun(tmp_path, width, height):
    names = [f"site_{i:03d}" for i in range(40)]
    spec = "{region: CAISO_NORTH, tokens_per_s: 3.86, idle_kw: 0.5, train_kw: 2}"
    sites = "".join(f"  {name}: {spec}\n" for name in names)
    (tmp_path / "many.yaml").write_text(f"base: {REPO / 'configs/demo.yaml'}\nsites:\n{sites}")
    folder = simulated(tmp_path / "run", "rounds.train_s=600", path=tmp_path / "many.yaml")
    board = board_of(folder, 3600.0 * 2)
    lines = shown(board, width, height)
    assert len(lines) <= height and all(len(line) <= width for line in lines)
    rows = [line for line in lines if line.split() and line.split()[0] in board.sites]
    assert len(rows) >= 3 and any("more sites" in line for line in lines)
    assert all("off" not in line.split()[:2] for line in rows[:3]), "those that do something stand first"


@pytest.mark.parametrize("changes, says, column, cell", [
    (["policy.objective=price", "policy.on_below_g_per_kwh=20", "policy.off_above_g_per_kwh=20"], "price, on below 20",
     "USD/MWh", r"-?\d+ [<>] 20"),
    (["policy.name=always"], "whatever the grid does", "MCI", r"\d+"),
    (["policy.name=percentile"], "the lowest", "MCI", r"\d+"),
])  # fmt: skip
def test_a_signal_stands_beside_what_the_policy_holds_it_against_and_only_there(tmp_path, changes, says, column, cell):
    board = board_of(simulated(tmp_path / "run", *changes), 3600.0)
    lines = shown(board)
    assert says in "\n".join(lines)
    for name, mine in cells(lines).items():
        assert re.fullmatch(cell, mine[column]), (name, mine)
        assert column == "MCI" or re.fullmatch(r"\d+", mine["MCI"]), "a threshold of prices says nothing of an MCI"


def test_what_cannot_be_shown_is_one_line(runner, tmp_path):
    for argv, says in ((["watch", "runs/nowhere"], "runs/nowhere/config.yaml does not exist"), (["watch"], "RUN_DIR"),
                       (["watch", "a", "b"], "unrecognized arguments: b")):  # fmt: skip
        refused = runner.call("launch.py", *argv)
        assert refused.returncode == 2 and says in refused.stderr and refused.stderr.count("\n") == 1
    folder = simulated(tmp_path / "run")
    with open(folder / "journal.jsonl", "a") as file:
        file.write("nonsense\n")
    with pytest.raises(BadInput, match=r"journal\.jsonl is damaged.*coordinator\.py check"):
        board_of(folder)


def test_a_picture_of_any_moment(runner):
    folder = simulated(runner.folder / "runs/day")
    drawn = runner.call("launch.py", "watch", "runs/day", "--svg", "day.svg", "--at", "5")
    assert drawn.returncode == 0, drawn.stderr
    svg = (runner.folder / "day.svg").read_text().replace("&#160;", " ")
    board = board_of(folder, 5 * 3600)
    assert svg.startswith("<svg") and carbon.iso(config.start_unix(board.cfg) + board.t)[:10] in svg and "21:" in svg
    assert f"{board.tokens:,} of 2,457,600 tokens" in svg
