"""Everything on one machine: the coordinator and one torchrun per site, as processes of their own.

    python launch.py configs/demo.yaml [key=value ...]
    python launch.py configs/demo.yaml run=two only=[california,texas] sites.texas.ranks=2
    python launch.py configs/mini_paper.yaml fresh=true

Shows what happens live (a table of sites on a terminal, plain lines elsewhere), starts again what was killed, leaves no
process behind whatever way it ends, draws the figure, and exits with the coordinator's exit code. It starts just what the
README tells a person to start by hand, with the same commands.
"""

import ctypes
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

import config
import provision

GRACE_S = 10.0
MAX_RESTARTS, QUIET_S = 4, 60.0  # in a row; after so long without one the count begins anew
HERE = Path(__file__).parent


class Stop(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


def die_with_parent() -> None:
    """In the child, before exec, on Linux: do not outlive the launcher, even if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def start(command: list[str], env: dict, **options) -> subprocess.Popen:
    """A child in a process group of its own, so that it and its children can be stopped together."""
    return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=die_with_parent, **options)


def stop(children: dict[str, subprocess.Popen], number: int) -> None:
    for child in children.values():
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            continue


def wait_all(children: dict[str, subprocess.Popen], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if all(child.poll() is not None for child in children.values()):
            return True
        time.sleep(0.05)
    return False


STEP = re.compile(
    r"(?P<time>\S+) (?P<mode>\w+)\s+MCI\s+(?P<MCI>\S+)\s+round\s+\d+\s+step\s+(?P<step>\S+ \([^)]*\))\s+loss (?P<loss>\S+)"
    r"\s+tok/s\s+(?P<tokens_s>\S+)(?:\s+MFU\s+\S+)?\s+(?P<kWh>\S+) kWh\s+(?P<gCO2>\S+) gCO2\s+eta (?P<eta>.*)"
)  # what report.step_line writes


class Screen:
    """A table of sites above the last events on a terminal; the coordinator's lines as they are elsewhere."""

    columns = ("state", "mode", "MCI", "loss", "tokens_s", "kWh", "gCO2")

    def __init__(self, cfg):
        self.sites = {name: {"state": "off"} for name in cfg.sites}
        self.events: deque[str] = deque(maxlen=16)
        self.title = f"run {cfg.run}"
        self.table: list[str] = []  # the final one
        self.live = None
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(refresh_per_second=4, transient=True)
            self.live.start()

    def show(self, line: str) -> None:
        if self.live is None:
            print(line, flush=True)
        elif self.table or (line.startswith("run ") and self.events and "parameters" not in line):
            self.table.append(line)
        else:
            self._note(line)
            self._draw()

    def _note(self, line: str) -> None:
        who, _, rest = (part.strip() for part in line.partition("|"))
        step = STEP.match(rest) if who in self.sites else None
        if step:
            self.sites[who] |= {c: step[c] for c in self.columns[1:]}
            self.title = f"{step['time']} UTC  step {step['step']}  eta {step['eta']}"
            return
        self.events.append(line)
        for words, state in (("window open", "provisioning"), (" on: ", "on"), ("window closed", "off"), (" off: ", "off")):
            if who in self.sites and words in line:
                kept = {c: self.sites[who].get(c, "") for c in ("kWh", "gCO2")}
                self.sites[who] = {"state": state} | kept

    def _draw(self) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        grid = Table(title=self.title, title_justify="left", min_width=80)
        grid.add_column("site", no_wrap=True)
        for column in self.columns:
            grid.add_column(column.replace("_", "/"), justify="left" if column in ("state", "mode") else "right", no_wrap=True)
        for name, site in self.sites.items():
            grid.add_row(name, *(site.get(c, "") for c in self.columns))
        self.live.update(Group(grid, Text("\n".join(self.events), no_wrap=True, overflow="ellipsis")))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
            print("\n".join(["", *self.table]), flush=True)


def main(argv: list[str]) -> int:
    cfg = config.load(argv)  # bad input is said here, before anything starts
    run_dir = config.run_dir(cfg)
    scratch = tempfile.mkdtemp(prefix="curtail-")  # torchrun and wandb leave things in the temporary folder
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1", "TMPDIR": scratch}
    children: dict[str, subprocess.Popen] = {}
    logs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    on_demand = provision.on_demand(cfg)  # the coordinator starts and stops these
    head_s = max([GRACE_S, *(provision.bound_s(config.provision_of(cfg, name)) for name in on_demand)])
    screen, again = None, [a for a in argv if not a.startswith("fresh=")]
    if len(cfg.sites) > 1:  # a meter of this machine counts whole devices, whoever uses them
        again += [f"sites.{name}.energy=model" for name in cfg.sites]

    def start_site(name: str) -> None:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        logs[name] = open(run_dir / "logs" / f"{name}.log", "a")
        children[name] = start(
            provision.site_command(again, name, config.num_ranks(cfg.sites[name])), env, stdout=logs[name], stderr=logs[name]
        )

    try:
        code, restarts, coordinator = None, Restarts(), [sys.executable, str(HERE / "coordinator.py")]
        while code is None or (code < 0 and restarts.may("coordinator")):  # killed by a signal, not by us: the journal has it all
            if code is not None:
                print(f"{'coordinator':15} | killed by signal {-code}; starting it again", file=sys.stderr, flush=True)
            command = [*coordinator, *(argv if code is None else again)]
            head = children["coordinator"] = start(command, env, stdout=subprocess.PIPE, text=True)
            first = head.stdout.readline()  # the coordinator has taken the folder and cleared it, or has refused
            if first:
                for name in cfg.sites:
                    if name not in children and name not in on_demand:
                        start_site(name)
                screen = screen or Screen(cfg)
                _follow(head, children, start_site, restarts, screen, first)
            code = head.wait()
        if code == config.EXIT_FAILED:
            _show_logs(logs)
        wait_all(children, GRACE_S)
    except Stop:
        print("\nlaunch: stopping", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop({k: c for k, c in children.items() if k == "coordinator"}, signal.SIGTERM)  # it tells the sites how it ends
        code = 130
        wait_all({k: c for k, c in children.items() if k == "coordinator"}, head_s)
        wait_all(children, GRACE_S)
    finally:
        if not wait_all(children, 0.1):
            stop(children, signal.SIGTERM)
            if not wait_all(children, GRACE_S / 2):
                stop(children, signal.SIGKILL)
        for child in children.values():
            child.wait()
        if screen:
            screen.close()
            provision.stop_left(cfg)  # of a coordinator that could not
        shutil.rmtree(scratch, ignore_errors=True)
    code = config.EXIT_FAILED if code < 0 else code
    if code in (config.EXIT_DONE, config.EXIT_BUDGET_LEFT) and (run_dir / "summary.json").exists():
        subprocess.run([sys.executable, str(HERE / "figures.py"), str(run_dir)], env=env, check=False)
    return code


class Restarts:
    """How often what may be started again: a few times in a row, with growing pauses, and anew after a quiet while."""

    def __init__(self):
        self.count: dict[str, int] = {}
        self.last: dict[str, float] = {}

    def may(self, name: str) -> bool:
        now = time.monotonic()
        self.count[name] = 1 if now - self.last.get(name, 0.0) > QUIET_S else self.count[name] + 1
        self.last[name] = now
        return self.count[name] <= MAX_RESTARTS

    def pause_s(self, name: str) -> float:
        return 2.0 ** self.count[name] / 2


def _follow(head: subprocess.Popen, children: dict[str, subprocess.Popen], start_site, restarts: Restarts, screen: Screen, first: str):
    """Show the coordinator's lines until it closes its end; start a site again whose process was killed or failed."""
    lines: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=lambda: [lines.put(line) for line in head.stdout] + [lines.put(None)], daemon=True).start()
    due: dict[str, float] = {}
    given_up: set[str] = set()
    line = first
    while line is not None:
        if line:
            screen.show(line.rstrip("\n"))
        for name, child in children.items():
            if name == "coordinator" or name in due or name in given_up or child.poll() in (None, 0, config.EXIT_BUDGET_LEFT):
                continue
            if restarts.may(name):
                due[name] = time.monotonic() + restarts.pause_s(name)
                print(f"{name:15} | process ended with code {child.returncode}; starting it again", file=sys.stderr, flush=True)
            else:
                given_up.add(name)
                print(f"{name:15} | process ended with code {child.returncode} again and again; see its log", file=sys.stderr, flush=True)
        for name in [name for name, t in due.items() if time.monotonic() >= t]:
            del due[name]
            if head.poll() is None:
                start_site(name)
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            line = ""


def _show_logs(logs: dict) -> None:
    for name, file in logs.items():
        file.flush()
        with open(file.name) as log:
            tail = [line.rstrip() for line in log if line.startswith(f"{name}:") or line.startswith("train.py:")][-2:]
        for line in tail:
            print(f"{name:15} | {line}", file=sys.stderr)


def _stop(number, frame) -> None:
    raise Stop


if __name__ == "__main__":
    config.command(main)
