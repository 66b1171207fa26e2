"""Where a rehearsal takes place: a scratch folder, real processes with logs, bounded waits, an end for all.

    with Scene() as scene:
        head = scene.start("head", [python, "coordinator.py", ...], cwd)
        scene.until("round 3 is committed", lambda: ..., 60)

`until` also fails as soon as a process that should be alive has ended. Whatever happens, no process whose
working folder lies in the scratch folder outlives the scene: torchrun's ranks have sessions of their own, so
groups alone would not do.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from launch import start  # noqa: E402

POLL_S = 0.02
TAIL_LINES = 12


class Refuted(Exception):
    """Something did not hold; one line."""


def require(true, why: str) -> None:
    if not true:
        raise Refuted(why)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Scene:
    def __init__(self, keep: str | None = None):
        self.folder, self.keep = Path(tempfile.mkdtemp(prefix="rehearsal-")).resolve(), keep
        ours = {"HF_HOME": self.folder / "hf", "TMPDIR": self.folder / "tmp", "HF_HUB_DISABLE_TELEMETRY": 1}
        plain = {"OMP_NUM_THREADS": 1, "TORCHINDUCTOR_COMPILE_THREADS": 1, "PYTHONUNBUFFERED": 1}
        plain["MPLBACKEND"] = "Agg"
        self.env = os.environ | {key: str(value) for key, value in (ours | plain).items()}
        self.env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.folder / "inductor"))  # a restart finds it
        for name in ("tmp", "logs"):
            (self.folder / name).mkdir()
        self.alive: dict[str, subprocess.Popen] = {}  # processes that have no reason to end now

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_) -> None:
        self.end_all()
        try:
            if self.keep:
                caches = shutil.ignore_patterns("tmp", "inductor")
                shutil.copytree(self.folder, self.keep, dirs_exist_ok=True, ignore=caches)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- processes ---------------------------------------------------------------------------------------

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def said(self, name: str) -> str:
        return self.log(name).read_text(errors="replace") if self.log(name).exists() else ""

    def start(self, name: str, command: list, cwd: Path) -> subprocess.Popen:
        """A process that is expected to stay until `leaves` says otherwise; its log grows by what it says."""
        with open(self.log(name), "ab") as log:
            process = start([str(c) for c in command], self.env, cwd=cwd, stdout=log, stderr=log)
        self.alive[name] = process
        return process

    def leaves(self, *names: str) -> list[subprocess.Popen]:
        """From now on these may end."""
        return [self.alive.pop(name) for name in names]

    def wait(self, name: str, process: subprocess.Popen, limit_s: float) -> int:
        """The exit code of a process that is to end within limit_s seconds."""
        self.until(f"{name} ends", lambda: process.poll() is not None, limit_s)
        return process.returncode

    def call(self, name: str, command: list, cwd: Path, limit_s: float = 180.0, expect: int = 0) -> str:
        """A program that is to end with exit code `expect` within limit_s seconds; what it printed."""
        with open(self.log(name), "ab") as log:
            piped = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
            process = start([str(c) for c in command], self.env, cwd=cwd, **piped)
        try:
            out, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise Refuted(f"{name} did not end within {limit_s:g} s") from None
        with open(self.log(name), "a") as log:
            log.write(out)
        require(
            process.returncode == expect,
            f"{name} ended with exit code {process.returncode}, expected {expect}",
        )
        return out

    def until(self, what: str, true, limit_s: float):
        """Wait until true() is; returns what it gave. Raises Refuted when limit_s seconds are over, or one of
        those that should be alive has ended."""
        deadline = time.monotonic() + limit_s
        while not (found := true()):
            for name, process in self.alive.items():
                require(
                    process.poll() is None,
                    f"{name} ended by itself with code {process.returncode} while waiting until {what}",
                )
            require(time.monotonic() < deadline, f"waited {limit_s:g} s in vain until {what}")
            time.sleep(POLL_S)
        return found

    def processes(self) -> list[psutil.Process]:
        """All that live and work somewhere in the scratch folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = Path(process.cwd()).is_relative_to(self.folder)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end_all(self) -> None:
        self.alive.clear()
        for _ in range(100):  # one that was being started may appear late
            if not (left := self.processes()):
                return
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)

    def tails(self) -> str:
        """The ends of all logs, newest last."""
        logs = sorted((self.folder / "logs").glob("*.log"), key=lambda p: p.stat().st_mtime)
        parts = []
        for path in logs:
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            parts += [f"---- {path.stem}", *lines[-TAIL_LINES:]]
        return "\n".join(line[:240] for line in parts)


def kill_all(processes: list[subprocess.Popen]) -> None:
    """Processes and all they have started, as a power cut would: children first, for a child of ours is sent
    SIGTERM when its parent dies, and would say goodbye."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            found += [parent, *parent.children(recursive=True)]
    for one in reversed(found):
        with contextlib.suppress(psutil.Error):
            one.kill()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def rank_of(process: subprocess.Popen, rank: int) -> psutil.Process | None:
    """The process that torchrun has started as this rank."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank) and "train.py" in " ".join(child.cmdline()):
                    return child
    return None


class Tail:
    """The records of a journal, as it is written: whole lines only, from the start where it was mended."""

    def __init__(self, path: Path):
        self.path, self.at, self.inode, self._records = path, 0, None, []

    def records(self) -> list[dict]:
        try:
            about = self.path.stat()
        except OSError:
            return self._records
        if about.st_ino != self.inode or about.st_size < self.at:
            self.at, self.inode, self._records = 0, about.st_ino, []
        if about.st_size > self.at:
            with open(self.path, "rb") as file:
                file.seek(self.at)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self.at += len(whole)
            self._records += [json.loads(line) for line in whole.splitlines()]
        return self._records

    def open_round(self) -> dict | None:
        """The `open` record of the round that is being trained now."""
        kinds = ("open", "attempt", "commit", "cancel", "frozen", "rollback", "end")
        last = next((r for r in reversed(self.records()) if r["type"] in kinds), None)
        return last if last and last["type"] == "open" else None
