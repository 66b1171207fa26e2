"""Machines that exist only while they are needed: a site's job is started when its window opens and stopped when it is released.

    jobs = provisioner(cfg, run_id, address)    at the coordinator, on the wall clock
    jobs.follow(t, run, connected)              once per turn of its loop; never blocks
    jobs.close()                                at the run's end: nothing is left running
    python provision.py stop runs/demo          by hand: stop what a coordinator that is gone for good has left running
    python coordinator.py configs/slurm.yaml    a run whose coordinator starts and stops Slurm jobs
    python launch.py configs/demo.yaml run=local clock.mode=wall clock.max_hours=0.05 provision.mode=local

`provision.mode`, which may differ from site to site (`sites.NAME.provision`):

    resident    processes stay alive and wait: nothing to do here
    local       torchrun processes on this machine
    slurm       sbatch, squeue, scancel
    command     any program that starts, stops and shows a job; {placeholders} are filled in (PLACEHOLDERS)

What should run is read from the state of the run at every turn and compared with what does run; there is no list of
orders that a crash could lose. So a coordinator that was killed finds its jobs by their name, which follows from run id
and site, adopts those that should run and stops those that should not. A site has one call to its cluster under way at a
time, in a thread of its own: a cluster that hangs delays nobody else. A job is started only after it was seen not to be
there, and a try that failed is stopped before the next one begins: there are never two copies.

A site that is being started is `provisioning`, at idle power. After `retries` it is absent until its next window.
"""

import contextlib
import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

import config
import journal
from config import BadInput

HERE = Path(__file__).resolve().parent
TURN_S = 0.2  # between two looks at what the run wants
QUIET_S = 60.0  # a site that has been on for so long may fail `retries` times again
FRESH_S = 1.0  # an answer of the cluster older than this does not allow a start
UNASKED_POLLS = 12  # a job that should not be there is looked for every so many poll_s
OWN_WAY_S = 5.0  # at the run's end sites are told so, and go by themselves

PLACEHOLDERS = """
    {site} {region}             the site's name, and of its grid
    {run} {job}                 name of the run; of the job: curtail-RUNID-SITE in lower case, the same after a restart
    {ranks}                     sites.SITE.ranks
    {address} {host} {port}     where the coordinator listens
    {folder} {repo} {python}    its working folder, this repository, its interpreter
    {config} {keys} {log}       the resolved config, the folder of the keys, the site's log
    {train}                     the command line that trains the site, quoted for a shell
"""
NAMES = re.findall(r"{(\w+)}", PLACEHOLDERS)

SCRIPT = """#!/bin/sh
cd {folder} || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
exec {train}
"""


class Trouble(RuntimeError):
    """The cluster refused, did not answer, or did not answer in time."""


# ---------------------------------------------------------------------------------------------------------------------
# Clusters. Each has start(cancel), stop(hard), alive() -> bool; each may take its time, and raises Trouble.


class Local:
    """torchrun on this machine. What belongs to a job carries its name in its environment, whoever its parent is by now."""

    def __init__(self, values: dict[str, str], p, alone: bool):
        self.job, self.folder, self.log = values["job"], values["folder"], Path(values["log"])
        self.command = shlex.split(values["train"])
        if not alone:  # a meter of this machine counts whole devices, whoever uses them
            self.command.append(f"sites.{values['site']}.energy=model")
        self.children: list[subprocess.Popen] = []

    def start(self, cancel: threading.Event) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | os.environ | {"CURTAIL_JOB": self.job}
        with open(self.log, "a") as log:
            try:
                self.children.append(subprocess.Popen(self.command, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                                      stderr=log, start_new_session=True))  # fmt: skip
            except OSError as error:
                raise Trouble(f"{self.command[0]}: {error.strerror}") from None

    def processes(self) -> list[psutil.Process]:
        self.children = [child for child in self.children if child.poll() is None]  # the dead are reaped
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("CURTAIL_JOB") == self.job and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def alive(self) -> bool:
        return bool(self.processes())

    def stop(self, hard: bool) -> None:
        """SIGTERM to torchrun, which passes it on (or to workers that have outlived it); SIGKILL to all."""
        found = self.processes()
        pids = {process.pid for process in found}
        for process in found:
            with contextlib.suppress(psutil.Error):
                if hard or process.ppid() not in pids:
                    process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)


class Commands:
    """Any cluster with a command line. The words of a command are split before placeholders are filled in: no value can become
    a second argument, and no shell reads it."""

    def __init__(self, values: dict[str, str], p):
        self.values, self.p = values, p
        self.argv = {op: [fill(word, values) for word in shlex.split(p[op])] for op in ("start", "stop", "status", "kill") if p[op]}

    def start(self, cancel: threading.Event) -> None:
        self._run("start", self.p.start_timeout_s, cancel)

    def stop(self, hard: bool) -> None:
        self._run("kill" if hard and "kill" in self.argv else "stop", self.p.command_s)

    def alive(self) -> bool:
        return bool(self._run("status", self.p.command_s).strip())

    def _run(self, op: str, timeout_s: float, cancel: threading.Event | None = None) -> str:
        """What the command prints. Files instead of pipes: what it leaves in the background may keep them open."""
        argv, until = self.argv[op], time.monotonic() + timeout_s
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(argv, cwd=self.values["folder"], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                           start_new_session=True)  # fmt: skip
            except OSError as error:
                raise Trouble(f"{argv[0]}: {error.strerror}") from None
            while process.poll() is None and time.monotonic() < until and not (cancel and cancel.is_set()):
                time.sleep(0.02)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise Trouble(f"{op}: {Path(argv[0]).name} did not return within {timeout_s:g} s")
            text = [(file.seek(0), file.read(1 << 16).decode(errors="replace"))[1] for file in (out, err)]
        if process.returncode:
            last = (text[1].strip() or text[0].strip() or "no word").splitlines()[-1]
            raise Trouble(f"{op}: {Path(argv[0]).name} ended with code {process.returncode}: {last}"[:200])
        return text[0]


class Slurm(Commands):
    """One batch job a site. `singleton` has Slurm itself keep a second copy waiting, `no-requeue` leaves restarts to us; SIGTERM
    comes first and, after the cluster's KillWait (30 s by default), SIGKILL: there is no harder way."""

    def __init__(self, values: dict[str, str], p):
        super().__init__(values, p)
        self.script = Path(values["folder"]) / "runs" / values["run"] / "jobs" / f"{values['site']}.sh"
        ours = [f"--name={values['job']}", f"--user={getpass.getuser()}"]
        places = [f"--{key}={p[key]}" for key in ("partition", "account") if p[key]]
        self.argv = {
            "start": ["sbatch", "--parsable", f"--job-name={values['job']}", "--dependency=singleton", "--no-requeue",
                      f"--output={values['log']}", "--open-mode=append", f"--chdir={values['folder']}", *places,
                      *(fill(option, values) for option in p.options), str(self.script)],
            "status": ["squeue", "--noheader", "--format=%i %T", *ours],
            "stop": ["scancel", *ours],
        }  # fmt: skip

    def start(self, cancel: threading.Event) -> None:
        for folder in (self.script.parent, Path(self.values["log"]).parent):
            folder.mkdir(parents=True, exist_ok=True)
        quoted = {k: v if k == "train" else shlex.quote(v) for k, v in self.values.items()}
        self.script.write_text(fill(Path(self.p.script).read_text() if self.p.script else SCRIPT, quoted))
        super().start(cancel)


CLUSTERS = {"local": Local, "slurm": Slurm, "command": Commands}


def fill(text: str, values: dict[str, str]) -> str:
    """{placeholders} replaced; ${SHELL} variables, and braces around anything but one word, are left as they are."""
    return re.sub(r"(?<!\$){([a-z]+)}", lambda m: values[m[1]], text)


def site_command(argv: list[str], name: str, ranks: int) -> list[str]:
    """What a person would type for one site: torchrun --nproc_per_node=N train.py CONFIG site=NAME."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
            str(HERE / "train.py"), *argv, f"site={name}"]  # fmt: skip


def job_name(run_id: str, site: str) -> str:
    """Letters, digits and dashes: a name that Slurm, Kubernetes and clouds accept."""
    return f"curtail-{run_id}-{site}".lower().replace("_", "-")


# ---------------------------------------------------------------------------------------------------------------------
# One site's job


def in_thread(call) -> None:
    threading.Thread(target=call, daemon=True).start()


class Job:
    """What is known of a site's job, and what to do next: one call to its cluster at a time, made by `defer`. Times are seconds
    of any clock that only goes forward."""

    def __init__(self, cluster, p, defer=in_thread):
        self.cluster, self.p, self.defer = cluster, p, defer
        self.alive: bool | None = None  # None: not known
        self.seen_at = self.look_at = self.hit_at = -float("inf")  # last answer; when to ask again; when to stop or kill next
        self.began: float | None = None  # since when its hello is waited for
        self.stopping: float | None = None  # since when it is being stopped; then nothing else until it is gone
        self.submitted = False  # by us, and not seen to be gone since
        self.tries, self.pause_until = 0, -float("inf")  # failures in this window; no start before
        self.silent_since: float | None = None  # its process has been there, and is not now
        self.wronged = False  # its site is off in the middle of its window, and that is counted
        self.doing, self.answer = "", None  # the call under way; (value, error) once it has come back
        self.hits, self.said, self.cancel = 0, "", threading.Event()

    @property
    def gone(self) -> bool:
        return self.alive is False and not self.doing and self.stopping is None

    @property
    def _may_start(self) -> bool:
        return self.began is not None and self.tries <= self.p.retries

    def step(self, t: float, wanted: bool, here: bool) -> list[str]:
        """Do what is next. wanted: the site is up; here: its process has said hello. Returns what went wrong, for the journal."""
        wrong: list[str] = []
        if self.doing:
            if self.doing == "start" and not wanted:
                self.cancel.set()
            if self.answer is None:
                return self._overdue(t, wanted, here)
            self._hear(t, wanted, here, wrong)
        if not wanted or here:
            self.began = None
        elif self.began is None and t >= self.pause_until:
            self.began = t
        wrong += self._overdue(t, wanted, here)
        if self.alive is False and (self.stopping is not None or not wanted):
            self.stopping, self.submitted = None, False
        if self.stopping is not None:
            if t >= self.hit_at:
                self.hit_at, self.alive, self.look_at = t + self.p.stop_s, None, t
                self.hits += 1
                self._call("stop" if self.hits == 1 else "kill")
            elif t >= self.look_at:
                self._call("status")
        elif not wanted and self.alive:
            self._stop(t)
        elif wanted and not here and self.alive is False and self.submitted:
            self.submitted = False
            wrong.append(self._failed(t, "its job ended before its process had said hello"))
        elif wanted and not here and self.alive is False and self._may_start and t - self.seen_at <= FRESH_S:
            self.submitted = True
            self._call("start")
        elif t >= self.look_at or (wanted and not here and self.alive is False and self._may_start):
            self._call("status")
        return wrong

    def _call(self, op: str) -> None:
        def work() -> None:
            try:
                value = self.cluster.alive() if op == "status" else self.cluster.start(cancel) if op == "start" else self.cluster.stop(hard)
                self.answer = value, ""
            except Exception as error:  # whatever a cluster does must not be lost in a thread
                self.answer = None, str(error) if isinstance(error, Trouble) else f"{type(error).__name__}: {error}"

        self.doing, self.answer, hard = op, None, op == "kill"
        self.cancel = cancel = threading.Event()
        self.defer(work)

    def _hear(self, t: float, wanted: bool, here: bool, wrong: list[str]) -> None:
        """The call under way has come back."""
        op, (value, error), self.doing = self.doing, self.answer, ""
        self.look_at = t + (min(self.p.poll_s, FRESH_S) if self.stopping is not None else self.p.poll_s)
        if op == "status" and not error:
            self.alive, self.seen_at = value, t
            if value and wanted:
                self.submitted = True
            elif not value and not wanted:
                self.look_at = t + UNASKED_POLLS * self.p.poll_s
        elif op == "start":
            self.alive = None if error else True
            if error and wanted and not here and self.stopping is None:
                wrong.append(self._failed(t, error))
            if error and not here:  # it may be there all the same
                self._stop(t)
        else:
            self.alive = None
            if error and error != self.said:
                wrong.append(error)
        self.said = error

    def _overdue(self, t: float, wanted: bool, here: bool) -> list[str]:
        """A try has taken too long: its hello has not come, or what was there before it cannot be stopped."""
        limit_s = self.p.start_timeout_s
        if wanted and not here and self.stopping is None and self.began is not None and t - self.began > limit_s:
            self.cancel.set()
            self._stop(t)
            what = "its start has not returned" if self.doing == "start" else "no hello"
            return [self._failed(t, f"{what} within start_timeout_s={limit_s:g} s")]
        if wanted and not here and self.stopping is not None and t - self.stopping > limit_s + 2 * self.p.stop_s:
            self.stopping = t
            return [self._failed(t, "its job cannot be stopped")]
        return []

    def _stop(self, t: float) -> None:
        self.stopping, self.hit_at, self.hits = t, t, 0

    def count(self, t: float) -> None:
        """One more failure in this window."""
        self.pause_until = t + self.p.backoff_s * 2**self.tries
        self.tries, self.began = self.tries + 1, None

    def _failed(self, t: float, why: str) -> str:
        self.count(t)
        again = f"again in {self.pause_until - t:g} s ({self.tries} of {self.p.retries})"
        return f"{why}; {again if self.tries <= self.p.retries else 'no retries left'}"


# ---------------------------------------------------------------------------------------------------------------------
# All of them


class Provisioner:
    def __init__(self, jobs: dict[str, Job], clock=time.monotonic, sleep=time.sleep):
        self.jobs, self.clock, self.sleep = jobs, clock, sleep
        self.turn_at = -float("inf")

    def follow(self, t: float, run, connected) -> None:
        """Compare what the run wants with what there is. t: run time; connected(site): is its process?"""
        now = self.clock()
        if now < self.turn_at:
            return
        self.turn_at = now + TURN_S
        for name, job in self.jobs.items():
            site = run.schedule.sites[name]
            up, here = site.state != "off" or name in run.leaving, connected(name)
            if not up or here or site.state == "provisioning":
                job.silent_since = None
            elif job.silent_since is None:
                job.silent_since = job.look_at = now
            elif job.alive is False and job.seen_at > job.silent_since:  # the protocol may hope for its return: it is in vain
                run.lost(t, name, "its job has ended", sure=True)
            if up:
                job.wronged = False
                if site.state == "on" and t - site.since_s > QUIET_S:
                    job.tries = 0
            elif not site.absent:  # its window is over, or not yet open; or it was given up, is back, and starts in a moment
                job.tries, job.wronged = job.tries if here else 0, False
            elif not job.wronged:  # died, preempted, or lost
                job.wronged = True
                job.count(now)
                if job.tries > job.p.retries:
                    run.trouble(t, name, f"left out for the rest of its window: provision.retries={job.p.retries}")
            elif job.gone and job.tries <= job.p.retries and now >= job.pause_until:
                run.again(t, name, f"its window is still open: its job is started again ({job.tries} of {job.p.retries})")
            for wrong in job.step(now, up, here or site.state != "provisioning"):
                run.trouble(t, name, wrong)
                if job.tries > job.p.retries and site.state != "off":
                    job.wronged = True
                    run.absent(t, name, f"not started in {job.tries} tries; the last one: {wrong}"[:200])
            run.on_demand[name] = job.stopping is not None

    def close(self, patience_s: float = OWN_WAY_S) -> list[str]:
        """Stop every job, and wait until they are gone, at most `bound_s`. Returns the names of those that would not go."""
        began, left = self.clock(), dict(self.jobs)
        while left and (now := self.clock()) - began < max(bound_s(job.p) for job in left.values()):
            for name, job in list(left.items()):
                if now - began < patience_s and job.alive and job.stopping is None:  # it may be about to go by itself
                    job.look_at = min(job.look_at, now + FRESH_S)
                    job.step(now, True, True)
                else:
                    job.step(now, False, False)
                if job.gone:
                    del left[name]
            self.sleep(0.02)
        return list(left)


def provisioner(cfg, run_id: str, address: str) -> Provisioner:
    return Provisioner({name: Job(cluster_of(cfg, name, run_id, address), config.provision_of(cfg, name)) for name in on_demand(cfg)})


def stop_left(cfg) -> list[str]:
    """Stop what a coordinator that is gone has left running. Returns the sites whose job would not go."""
    records = []
    with contextlib.suppress(OSError, BadInput):  # no journal, no job; a damaged one is somebody else's to report
        records = journal.read(config.run_dir(cfg) / "journal.jsonl")
    return provisioner(cfg, records[0]["wall"]["run_id"], "").close(0.0) if records else []


def bound_s(p) -> float:
    """How long stopping one job may take at the run's end."""
    return OWN_WAY_S + 2 * p.stop_s + p.command_s


def on_demand(cfg) -> list[str]:
    """Sites whose processes are there only while they are up."""
    return [name for name in cfg.sites if config.provision_of(cfg, name).mode != "resident"]


def cluster_of(cfg, site: str, run_id: str, address: str):
    p, folder, run_dir = config.provision_of(cfg, site), Path.cwd(), Path.cwd() / config.run_dir(cfg)
    host, _, port = address.rpartition(":")
    file, ranks = str(run_dir / "config.yaml"), config.num_ranks(cfg.sites[site])
    values = {
        "site": site, "region": cfg.sites[site].region, "run": cfg.run, "job": job_name(run_id, site), "ranks": str(ranks),
        "address": address, "host": host, "port": port, "folder": str(folder), "repo": str(HERE),
        "python": sys.executable, "config": file, "keys": str(run_dir / "keys"), "log": str(run_dir / "logs" / f"{site}.log"),
        "train": shlex.join(site_command([file], site, ranks)),
    }  # fmt: skip
    if p.mode == "local":
        return Local(values, p, sum(config.provision_of(cfg, s).mode == "local" for s in cfg.sites) == 1)
    return CLUSTERS[p.mode](values, p)


def check(cfg) -> None:
    """What must be right before anything is opened or started. Raises BadInput."""
    names: dict[str, str] = {}
    for site in on_demand(cfg):
        p = config.provision_of(cfg, site)
        if cfg.clock.mode == "virtual":
            raise BadInput(f"provision.mode={p.mode} at site {site} needs real time; set clock.mode=wall, or provision.mode=resident")
        if (other := names.setdefault(job_name("", site), site)) != site:
            raise BadInput(f"sites {other} and {site} would have jobs of one name; rename one")
        if p.mode == "command" and (missing := [key for key in ("start", "stop", "status") if not p[key]]):
            raise BadInput(f"provision.{missing[0]} is missing at site {site}; mode=command needs start, stop and status")
        texts = [(key, p[key]) for key in ("start", "stop", "status", "kill") if p.mode == "command" and p[key]]
        programs = [shlex.split(text)[0] for _, text in texts]
        if p.mode == "slurm":
            programs = ["sbatch", "squeue", "scancel"]
            texts = [("options", option) for option in p.options]
            if p.script:
                if not Path(p.script).is_file():
                    raise BadInput(f"provision.script={p.script} does not exist; it is relative to where the coordinator is started")
                texts.append(("script", Path(p.script).read_text()))
        for key, text in texts:
            try:
                fill(text, dict.fromkeys(NAMES, ""))
            except KeyError as error:
                unknown = f"provision.{key} of site {site}: unknown placeholder {{{error.args[0]}}}"
                raise BadInput(f"{unknown}; there are {', '.join(NAMES)}") from None
        for program in programs:
            if shutil.which(fill(program, dict.fromkeys(NAMES, ""))) is None:
                raise BadInput(f"provision.mode={p.mode} at site {site}: no program {program!r} on the PATH of this machine; install it")


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] != "stop" or not (Path(argv[1]) / "config.yaml").is_file():
        raise BadInput("say provision.py stop RUN_DIR, where its coordinator was started")
    cfg = config.load([f"{argv[1]}/config.yaml"])
    left = stop_left(cfg)
    for site in on_demand(cfg):
        print(f"{site:15} | {'is still there' if site in left else 'nothing runs'}")
    return config.EXIT_FAILED if left else config.EXIT_DONE


if __name__ == "__main__":
    config.command(main)
