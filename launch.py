"""Everything on one machine: the coordinator and every site, as processes of their own.

    python launch.py configs/demo.yaml [key=value ...]
    python launch.py configs/demo.yaml run=two only=[california,texas] sites.texas.ranks=2
    python launch.py configs/mini_paper.yaml fresh=true
    python launch.py doctor configs/demo.yaml          what this machine has, and what will hurt
    python launch.py watch runs/demo [--svg FILE [--at HOURS]]

Shows what happens live (a table of sites on a terminal, plain lines elsewhere), starts again what was killed, leaves no
process behind whatever way it ends, draws the figure, and exits with the coordinator's exit code. It starts what the README
tells a person to start by hand, a site of one rank without torchrun, which would only start it 2 s later. `watch` shows the
same table of any run, also one that was started by hand or on Slurm, or is over.
"""

import ctypes
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE
from typing import TextIO

import config
import provision
import screen

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


def main(argv: list[str]) -> int:
    if argv[:1] == ["watch"]:
        return watch_command(argv[1:])
    if argv[:1] == ["doctor"]:
        import doctor  # loads torch, which nothing else here needs

        return doctor.main(argv[1:])
    cfg = config.load(argv)  # bad input is said here, before anything starts
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    launch = Launch(cfg, argv)
    code = launch.run()
    if code in (config.EXIT_DONE, config.EXIT_BUDGET_LEFT) and (launch.run_dir / "summary.json").exists():
        subprocess.run([sys.executable, str(HERE / "figures.py"), str(launch.run_dir)], check=False)
    return code


def watch_command(argv: list[str]) -> int:
    """python launch.py watch RUN_DIR [--svg FILE [--at HOURS]]"""
    parser = config.Parser(prog="launch.py watch", description="The live table of any run: by hand, on Slurm, on this machine, or over.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it once, into this file")
    parser.add_argument("--at", type=float, default=math.inf, metavar="HOURS", help="as it was so long after clock.start; only with --svg")
    args = parser.parse_args(argv)
    if args.svg is None:
        return screen.watch(args.run_dir)
    screen.picture(args.run_dir, args.at * 3600, args.svg)
    return config.EXIT_DONE


class Launch:
    """The processes of a run on this machine: `run()` starts them, keeps them going and shows them until the run has ended."""

    def __init__(self, cfg, argv: list[str]):
        self.cfg, self.argv, self.run_dir = cfg, argv, config.run_dir(cfg)
        self.again = [a for a in argv if not a.startswith("fresh=")]  # how what was killed is started again
        if len(cfg.sites) > 1:  # a meter of this machine counts whole devices, whoever uses them
            self.again += [f"sites.{name}.energy=model" for name in cfg.sites]
        self.on_demand = provision.on_demand(cfg)  # the coordinator starts and stops these
        self.scratch = tempfile.mkdtemp(prefix="curtail-")  # torchrun and wandb leave things in the temporary folder
        # libgomp's threads wait for each other spinning. By default for so long that a step takes fifty times as long, not twice, where
        # another program keeps a core busy; for 10 us a step takes no longer where none does.
        ours = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000"}
        self.env = ours | os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": self.scratch}
        self.children: dict[str, subprocess.Popen] = {}
        self.logs: dict[str, TextIO] = {}
        self.restarts = Restarts()
        self.terminal = sys.stdout.isatty()
        self.screen: screen.Screen | None = None

    def run(self) -> int:
        try:
            with ExitStack() as stack:
                code = self._lead(stack)
            if code == config.EXIT_FAILED:
                self._show_logs()
            wait_all(self.children, GRACE_S)
        except Stop:
            code = 130
            self._stop()
        finally:
            self._clear()
        if self.screen:  # elsewhere the coordinator has printed it
            print(screen.result(self.run_dir, self.cfg, 0.0), flush=True)
        return config.EXIT_FAILED if code < 0 else code

    def _lead(self, stack: ExitStack) -> int:
        """Start the coordinator, again if it is killed, and the sites once it has taken the run's folder. -> its exit code"""
        code, command = None, [sys.executable, str(HERE / "coordinator.py")]
        while code is None or (code < 0 and self.restarts.may("coordinator")):  # killed by a signal, not by us: the journal has it all
            if code is not None:
                say(f"{'coordinator':15} | killed by signal {-code}; starting it again")
            argv = self.argv if code is None else self.again
            head = self.children["coordinator"] = start([*command, *argv], self.env, stdout=PIPE, stderr=PIPE, text=True)
            errors = threading.Thread(target=lambda pipe=head.stderr: [say(line.rstrip("\n")) for line in pipe], daemon=True)
            errors.start()
            first = head.stdout.readline()  # it has taken the folder and cleared it, or has refused
            if first:
                for name in self.cfg.sites:
                    if name not in self.children and name not in self.on_demand:
                        self._start_site(name)
                if self.terminal and not self.screen:
                    self.logs["coordinator"] = self._log("coordinator")
                    self.screen = stack.enter_context(screen.Screen(self.run_dir))
                self._follow(head, first)
            code = head.wait()
            errors.join(1.0)
        return code

    def _log(self, name: str) -> TextIO:
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        return open(self.run_dir / "logs" / f"{name}.log", "a")

    def _start_site(self, name: str) -> None:
        self.logs[name] = self._log(name)
        ranks = config.num_ranks(self.cfg.sites[name])
        alone = [sys.executable, str(HERE / "train.py"), *self.again, f"site={name}"]
        command = alone if ranks == 1 else provision.site_command(self.again, name, ranks)
        self.children[name] = start(command, self.env, stdout=self.logs[name], stderr=self.logs[name])

    def _follow(self, head: subprocess.Popen, first: str) -> None:
        """Print the coordinator's lines, or keep them where the screen shows the run, until it closes its end; start a site again whose
        process was killed or failed."""
        lines: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=lambda: [lines.put(line) for line in head.stdout] + [lines.put(None)], daemon=True).start()
        due: dict[str, float] = {}
        given_up: set[str] = set()
        line = first
        while line is not None:
            if line:
                print(line, end="", flush=True, file=self.logs["coordinator"] if self.screen else None)
            for name, child in self.children.items():
                if name == "coordinator" or name in due or name in given_up or child.poll() in (None, 0, config.EXIT_BUDGET_LEFT):
                    continue
                if self.restarts.may(name):
                    due[name] = time.monotonic() + self.restarts.pause_s(name)
                    say(f"{name:15} | process ended with code {child.returncode}; starting it again")
                else:
                    given_up.add(name)
                    say(f"{name:15} | process ended with code {child.returncode} again and again; see its log")
            for name in [name for name, t in due.items() if time.monotonic() >= t]:
                del due[name]
                if head.poll() is None:
                    self._start_site(name)
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                line = ""

    def _stop(self) -> None:
        """Ctrl-C or SIGTERM: the coordinator ends the run and tells the sites how."""
        say("\nlaunch: stopping")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        head = {k: c for k, c in self.children.items() if k == "coordinator"}
        stop(head, signal.SIGTERM)
        wait_all(head, max([GRACE_S, *(provision.bound_s(config.provision_of(self.cfg, name)) for name in self.on_demand)]))
        wait_all(self.children, GRACE_S)

    def _clear(self) -> None:
        """No process of ours stays, and nothing in the temporary folder."""
        if not wait_all(self.children, 0.1):
            stop(self.children, signal.SIGTERM)
            if not wait_all(self.children, GRACE_S / 2):
                stop(self.children, signal.SIGKILL)
        for child in self.children.values():
            child.wait()
        for log in self.logs.values():
            log.close()
        if self.logs:
            provision.stop_left(self.cfg)  # of a coordinator that could not
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _show_logs(self) -> None:
        """The last words of sites that failed."""
        for name, file in self.logs.items():
            with open(file.name) as log:
                tail = [line.rstrip() for line in log if line.startswith(f"{name}:") or line.startswith("train.py:")][-2:]
            for line in tail:
                say(f"{name:15} | {line}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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


def _stop(number, frame) -> None:
    raise Stop


if __name__ == "__main__":
    config.command(main)
