"""Starts our programs from a process that has torch loaded already: the tests start hundreds, and each would load it for seconds.

    warm = Warm(env)
    process = warm.start([script, *argv], cwd, env, out)        # poll, wait, kill, ... as of a subprocess.Popen
    warm.start(["torchrun", "--standalone", "--nproc_per_node=2", script, *argv], cwd, env, out)
    warm.close()

A started program is a process of its own, forked, in a session of its own; only what others wrote is loaded, every line of
ours runs as it does cold. Fork wants one thread: nothing here computes or listens. torchrun is torch's own agent with its
rendezvous, store and environment; only that it forks its workers, which it otherwise executes. Linux only.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path


class Process:
    """A child of the warm process, used as a subprocess.Popen."""

    def __init__(self, warm: "Warm", pid: int, args: list[str]):
        self.warm, self.pid, self.args, self.returncode = warm, pid, args, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.warm.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    def __init__(self, env: dict[str, str], more: tuple[str, ...] = ()):
        """env: what is read while torch is loaded, e.g. OMP_NUM_THREADS. more: modules to be loaded, too."""
        ours, theirs = socket.socketpair()
        argv = [sys.executable, __file__, str(theirs.fileno()), *more]
        self._process = subprocess.Popen(argv, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self._socket, self._file, self._asking = ours, ours.makefile("rw"), threading.Lock()

    def ask(self, question: dict):
        with self._asking:
            self._file.write(json.dumps(question) + "\n")
            self._file.flush()
            return json.loads(self._file.readline())

    def start(self, argv: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path | None = None) -> Process:
        """argv: a script and its arguments. err: None: with out."""
        return Process(self, self.ask({"argv": argv, "cwd": str(cwd), "env": env, "out": str(out), "err": err and str(err)}), argv)

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        self._process.kill()  # it may still be loading torch
        self._process.wait(10)


def serve(connection: socket.socket) -> dict:
    """Answers until nobody asks; returns only in a child: what that is to become."""
    file = connection.makefile("rw")
    for line in file:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            return question
        file.write(json.dumps(answer) + "\n")
        file.flush()
    os._exit(0)


def become(job: dict) -> None:
    die_with_parent()
    os.setsid()
    os.chdir(job["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(job["out"], flags, 0o644), 1)
    os.dup2(os.open(job["err"], flags, 0o644) if job["err"] else 1, 2)
    os.closerange(3, 256)  # above all the way back to the tests
    os.environ.clear()
    os.environ.update(job["env"])
    if prefix := job["env"].get("WARM_PYCACHE"):  # here alone: what starts cold has torch compiled already
        sys.pycache_prefix, sys.dont_write_bytecode = prefix, False


def die_with_parent() -> None:
    """When the process that started this one is gone, so is it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def execute(argv: list[str]) -> None:
    """argv: a script and its arguments, as after `python`."""
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


def torchrun(argv: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.run import main

    SubprocessHandler._popen = lambda handler, args, env: Worker(args, env)
    main(argv)


class Worker:
    """A worker of the agent that this process is: what it uses of a subprocess.Popen."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]):
        python, unbuffered, *argv = args
        assert (python, unbuffered) == (sys.executable, "-u"), args
        self.args, self.returncode, self.pid = args, None, os.fork()
        if self.pid == 0:
            os._exit(self._live(argv, env))

    def _live(self, argv: list[str], env: dict[str, str]) -> int:
        """In the child. The agent's signal handlers and exit functions are not its own; to return into its frames would end it."""
        die_with_parent()
        os.setsid()
        atexit._clear()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        code = 0
        try:
            execute(argv)
        except SystemExit as over:
            code = over.code if isinstance(over.code, int) else int(over.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()  # as at the end of any program: its threads, its exit functions, its output
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return Process.wait(self, timeout)


if __name__ == "__main__":
    import numpy  # noqa: F401
    import omegaconf  # noqa: F401
    import torch._dynamo  # the first optimizer asks for it
    import torch.distributed.run  # noqa: F401

    for module in sys.argv[2:]:
        importlib.import_module(module)
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # a child that ends would look at all of torch's objects, and copy the pages they are on
    job = serve(socket.socket(fileno=int(sys.argv[1])))
    become(job)
    program, *rest = job["argv"]
    torchrun(rest) if program == "torchrun" else execute(job["argv"])
