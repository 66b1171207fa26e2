"""What starts a site elsewhere: Slurm, Kubernetes, SkyPilot. Their shipped files start what a person
starts by hand, with as many ranks as the config says; a day passes on a real Slurm."""

import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import CLEAN, DIRTY, REPO, processes_in
from test_provision import FAST, QUICK, WALL, faults_of, states
from test_runs import all_hold, until

import carbon
import config
import provision

SITE, RUN, JOB = "south_australia", "demo", "curtail-0a1b2c-south-australia"
EXAMPLES = REPO / "examples"


@pytest.fixture
def fake_tools(tmp_path, monkeypatch):
    """Programs that only say how they were called, in a folder at the front of the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("kubectl", "sky", "sbatch", "squeue", "scancel", "srun"):
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n[ "$1" != create ] || cat\n')
    nodes = 'printf "node1\\nnode2\\n"'
    (folder / "scontrol").write_text(f'#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && {nodes}\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def by_hand(config_: str, site: str, ranks: int, run: str | None = None) -> list[str]:
    """What a person says to torchrun for one site: its options, then from the script's name on. With a run:
    the config is a copy that does not know it, nor how many ranks the machines there have."""
    told = [] if run is None else [f"run={run}", f"sites.{site}.ranks={ranks}"]
    return relative(provision.site_command([config_, *told], site, ranks)[3:])


def relative(words: list[str]) -> list[str]:
    return [word.removeprefix(f"{REPO}/") for word in words]


def readme(chapter: str, language: str = "") -> list[str]:
    """The blocks of code of one chapter."""
    section = (REPO / "README.md").read_text().partition(f"\n## {chapter}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


def kubernetes_job(site: str, ranks: int, run: str) -> dict:
    """The manifest that examples/kubernetes.sh hands to kubectl."""
    command = ["sh", "examples/kubernetes.sh", JOB, site, str(ranks), run]
    said = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert said.startswith("create\n--filename=-\n")
    return yaml.safe_load(said.partition("--filename=-\n")[2])


def skypilot_task() -> dict:
    return yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())


def given_by_sky(argv: list[str]) -> dict[str, str]:
    """The environment that a `sky launch` gives its task."""
    return dict(value.split("=", 1) for option, value in zip(argv, argv[1:]) if option == "--env")


# -- the same command line everywhere ------------------------------------------------------------------------


def test_a_site_is_started_as_the_readme_says():
    (line,) = [line for line in readme("On real machines")[0].splitlines() if line.startswith("torchrun")]
    words = [word for word in line.split("#")[0].split()[1:] if word != "sites.texas.ranks=8"]
    assert ["--standalone", *words] == by_hand("my.yaml", "texas", 8)


def test_the_readmes_examples_of_commands_are_good_configs_and_pass_the_ranks_on(runner, fake_tools):
    blocks = readme("Provisioning", "yaml")
    assert len(blocks) == 2
    for block in blocks:
        (runner.folder / "my.yaml").write_text("base: config.yaml\n" + block)
        runner.write({"texas": {"ranks": 2}, SITE: {"ranks": 4}}, clock={"mode": "wall"})
        cfg = config.load([str(runner.folder / "my.yaml")])
        provision.check(cfg)
        cluster = provision.cluster_of(cfg, SITE, "0a1b2c", "10.0.0.1:5555")
        assert all(any(JOB in word for word in argv) for argv in cluster.argv.values())
        assert cluster.argv["status"][-1] == JOB or f"--selector=job-name={JOB}" in cluster.argv["status"]
        for site, ranks in (("texas", "2"), (SITE, "4")):
            start = provision.cluster_of(cfg, site, "0a1b2c", "10.0.0.1:5555").argv["start"]
            if start[0] == "sh":
                job = f"curtail-0a1b2c-{site.replace('_', '-')}"
                assert start[1:] == ["examples/kubernetes.sh", job, site, ranks, "tiny"]
            else:
                assert given_by_sky(start) == {"SITE": site, "RUN": "tiny", "RANKS": ranks}
                assert start[start.index("--gpus") + 1] == f"H100:{ranks}"
                assert start[-1] == "examples/skypilot.yaml"


def test_the_kubernetes_example_makes_a_job_that_runs_one_site_with_its_own_key(fake_tools):
    job = kubernetes_job(SITE, 4, RUN)
    pod = job["spec"]["template"]["spec"]
    (site,) = pod["containers"]
    assert job["metadata"]["name"] == JOB and job["spec"]["backoffLimit"] == 0
    assert site["command"] == [".venv/bin/torchrun", *by_hand("/config/config.yaml", SITE, 4, RUN)]
    assert site["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert {m["name"] for m in site["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["volumes"][1]["secret"]["secretName"] == "curtail-keys-south-australia"


def test_the_skypilot_example_trains_the_site_it_is_given_with_its_own_key():
    task, given = skypilot_task(), {"SITE": SITE, "RUN": RUN, "RANKS": "4"}
    assert set(task["envs"]) == set(given)
    assert "accelerators" not in task["resources"], "how many stands in the config alone"
    words = ["sh", "-c", task["run"].replace("exec ", "printf '%s\\n' ")]
    env = os.environ | given
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [".venv/bin/torchrun", *by_hand("my.yaml", SITE, 4, RUN)]
    secrets = [path for path in task["file_mounts"].values() if "key_secret" in path]
    assert secrets == ["runs/${RUN}/keys/${SITE}.key_secret"]


def test_slurm_jobs_are_what_the_shipped_config_says(fake_tools, tmp_path, monkeypatch):
    cfg = config.load([str(REPO / "configs" / "slurm.yaml"), "sites.texas.ranks=2"])
    provision.check(cfg)
    monkeypatch.chdir(tmp_path)
    job = provision.cluster_of(cfg, "texas", "0a1b2c", "10.0.0.1:5555")
    job.start(provision.threading.Event())
    options = ["--partition=texas", "--gres=gpu:2", "--cpus-per-task=32", "--time=12:00:00"]
    assert job.argv["start"][-5:-1] == options
    script = Path(job.argv["start"][-1]).read_text()
    assert f"cd {shlex.quote(str(tmp_path))} || exit 1" in script
    words = shlex.split(script.splitlines()[-1])
    assert relative(words[4:]) == by_hand(f"{tmp_path}/runs/slurm/config.yaml", "texas", 2)
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0


def test_the_slurm_script_for_two_nodes_divides_the_ranks_among_its_tasks(fake_tools, tmp_path):
    names = {"site": SITE, "job": JOB, "ranks": "8", "config": "runs/demo/config.yaml"}
    places = {"folder": str(tmp_path), "repo": str(REPO), "python": "python"}
    values = dict.fromkeys(provision.NAMES, "x") | names | places
    script = provision.fill((EXAMPLES / "slurm_two_nodes.sh").read_text(), values)
    env = os.environ | {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
    env.pop("SLURM_CPUS_PER_TASK", None)

    def said(**more: str) -> list[str]:
        bash = {"input": script, "env": env | more, "capture_output": True, "text": True, "check": True}
        return relative(subprocess.run(["bash"], **bash).stdout.splitlines())

    (one, *rest) = by_hand("runs/demo/config.yaml", SITE, 8)[1:]
    assert one == "--nproc_per_node=8"
    meet = ["--rdzv_backend=c10d", f"--rdzv_id={JOB}", "--rdzv_endpoint=node1:23456"]
    start = ["python", "-m", "torch.distributed.run"]
    assert said() == ["--kill-on-bad-exit=1", *start, "--nnodes=2", "--nproc_per_node=4", *meet, *rest]
    four = said(SLURM_NTASKS="4", SLURM_CPUS_PER_TASK="32")
    step = ["--kill-on-bad-exit=1", "--cpus-per-task=32"]
    assert four == [*step, *start, "--nnodes=4", "--nproc_per_node=2", *meet, *rest]


def test_the_readme_names_every_example_and_none_that_is_not_there():
    named = set(re.findall(r"examples/([\w.]+\w)", (REPO / "README.md").read_text()))
    assert named == {path.name for path in EXAMPLES.iterdir()}


# -- real runs -----------------------------------------------------------------------------------------------


class Grids:
    """Live signals that a test moves: a growing CSV, whose rows hold until the next one."""

    def __init__(self, runner, *sites: str):
        self.path, self.values = runner.folder / "grids.csv", dict.fromkeys(sites, DIRTY)
        self.path.write_text(",".join(["time", *sites]) + "\n")
        self.show()

    def show(self, **values: float) -> None:
        self.values |= values
        with open(self.path, "a") as file:
            file.write(",".join([carbon.iso(int(time.time())), *map(str, self.values.values())]) + "\n")

    @property
    def config(self) -> dict:
        return WALL | {"clock": {"mode": "wall", "start": "now"}, "carbon": {"baseline_regions": []},
                       "signals": {"source": "csv", "url": str(self.path), "poll_s": 0.5}}  # fmt: skip


def together(runner, *sites: str) -> int:
    """Commits to which all of these sites have given batches."""
    commits = [r for r in runner.journal() if r["type"] == "commit"]
    return sum(r["batches"].keys() >= set(sites) for r in commits)


def with_two_ranks(runner, log: str) -> list[str]:
    """Sites whose every hello was of two ranks."""
    hellos = re.findall(r"^(\w+) +\| connected, .* (\d+) rank\(s\)$", runner.said(log), re.M)
    return sorted({site for site, _ in hellos} - {site for site, ranks in hellos if ranks != "2"})


def checked(runner) -> None:
    result = runner.call("coordinator.py", "check", "runs/tiny")
    assert result.returncode == 0, result.stdout + result.stderr


def as_shipped(runner, words: list[str], log: str, **env: str) -> subprocess.Popen:
    """Start a shipped file's command line in the test's folder, which looks like what it is for."""
    shipped = runner.folder / ".venv" / "bin" / "torchrun"
    if not shipped.exists():
        shipped.parent.mkdir(parents=True)
        shipped.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n')
        shipped.chmod(0o755)
        (runner.folder / "train.py").symlink_to(REPO / "train.py")
        (runner.folder / "my.yaml").symlink_to(runner.folder / "config.yaml")
    env = {k: v for k, v in runner.env.items() if k not in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")} | env
    with open(runner.folder / f"{log}.log", "w") as out:
        streams = {"stdout": out, "stderr": out, "start_new_session": True}
        process = subprocess.Popen(words, cwd=runner.folder, env=env, **streams)
    runner.processes.append(process)
    return process


@pytest.mark.slow
def test_what_kubernetes_and_skypilot_start_trains_a_run_to_its_end_at_two_ranks_a_site(runner, fake_tools):
    """From the README's configs to the words that its files make of them. The config there has no ranks."""
    grids = Grids(runner, "texas", SITE)
    argv = runner.write({"texas": FAST, SITE: FAST}, **grids.config | {"budget": {"tokens": 128 * 400}})
    ranks = ["sites.texas.ranks=2", f"sites.{SITE}.ranks=2"]
    head = runner.start("coordinator.py", *argv, *ranks, log="coordinator")
    started = {}
    for site, block in zip((SITE, "texas"), readme("Provisioning", "yaml")):
        (runner.folder / "launcher.yaml").write_text("base: config.yaml\n" + block)
        cfg = config.load([str(runner.folder / "launcher.yaml"), *ranks])
        started[site] = provision.cluster_of(cfg, site, "0a1b2c", "").argv["start"]
    said = subprocess.run(started[SITE], cwd=REPO, capture_output=True, text=True, check=True).stdout
    (pod,) = yaml.safe_load(said.partition("--filename=-\n")[2])["spec"]["template"]["spec"]["containers"]
    words = [word.replace("/config/", f"{runner.folder}/") for word in pod["command"]]
    run = ["sh", "-c", skypilot_task()["run"]]
    sites = [
        as_shipped(runner, words, SITE, **{variable["name"]: variable["value"] for variable in pod["env"]}),
        as_shipped(runner, run, "texas", **given_by_sky(started["texas"])),
    ]
    until(lambda: with_two_ranks(runner, "coordinator") == [SITE, "texas"], 120)
    grids.show(**{"texas": CLEAN, SITE: CLEAN})
    assert head.wait(180) == 0, runner.said()
    assert [site.wait(30) for site in sites] == [0, 0]
    assert together(runner, "texas", SITE) and runner.summary()["tokens"] == 128 * 400
    assert not processes_in(runner.folder), "nothing is left"
    checked(runner)


@pytest.mark.slow
def test_launch_and_the_coordinator_start_sites_of_two_ranks_on_this_machine(runner):
    """here is started by launch.py, there by the coordinator when its window opens."""
    grids = Grids(runner, "here", "there")
    local = {"provision": QUICK | {"mode": "local", "start_timeout_s": 120}}
    argv = runner.write({"here": FAST, "there": FAST | local}, **grids.config)
    launch = runner.start("launch.py", *argv, "sites.here.ranks=2", "sites.there.ranks=2", log="launch")
    until(lambda: runner.journal() and with_two_ranks(runner, "launch") == ["here"], 120)
    assert not states(runner, "there")
    grids.show(here=CLEAN, there=CLEAN)
    until(lambda: together(runner, "here", "there") >= 2, 180)
    launch.send_signal(signal.SIGINT)
    assert launch.wait(90) == 130, runner.said("launch")
    assert with_two_ranks(runner, "launch") == ["here", "there"]
    assert not processes_in(runner.folder), "nothing is left"
    checked(runner)


# -- Slurm ---------------------------------------------------------------------------------------------------

SLURM_CONF = """ClusterName=curtail
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
FirstJobId={first}
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=west Nodes={host} Default=YES State=UP MaxTime=INFINITE
PartitionName=south Nodes={host} State=UP MaxTime=INFINITE
PartitionName=east Nodes={host} State=UP MaxTime=INFINITE
"""


FILES = {"key": ".key", "pid": "d.pid", "log": "d.log", "seed": "d.seed"}  # munged's


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def with_conf(folder) -> list[psutil.Process]:
    """Processes of the Slurm whose config is in this folder, jobs included."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("SLURM_CONF") == str(folder / "slurm.conf")
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture
def slurm(runner, tmp_path_factory):
    """A cluster of one node and three partitions, of this test alone. Yields the folder of its config."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not found; Debian's packages slurm-wlm and munge have them")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    values = {
        "host": socket.gethostname().partition(".")[0],
        "user": psutil.Process().username(),
        "folder": folder,
        "first": random.randint(1, 10**6),  # a job's number makes the port at which its tasks meet
    }
    (folder / "slurm.conf").write_text(SLURM_CONF.format(ports=free_ports(2), **values))
    runner.env["SLURM_CONF"] = str(folder / "slurm.conf")
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munged += [f"--{what}-file={folder}/munge{end}" for what, end in FILES.items()]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D"]]
    daemons = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "w")
            streams = {"stdout": log, "stderr": log, "start_new_session": True}
            daemons.append(subprocess.Popen(command, env=runner.env, **streams))
            if command[0] == "munged":
                until(lambda: (folder / "munge.socket").exists() or daemons[0].poll() is not None, 10)
        ask = {"args": ["sinfo", "--noheader", "--format=%T"], "env": runner.env, "capture_output": True}
        until(lambda: b"idle" in subprocess.run(**ask).stdout or any(d.poll() for d in daemons), 30)
        said = [(folder / f"{command[0]}.out").read_text()[-500:] for command in commands]
        assert not any(d.poll() for d in daemons), said
        yield folder
    finally:
        for process in with_conf(folder):  # slurmd waits for jobs, slurmstepd for slurmd
            process.kill()
        for daemon in daemons:
            daemon.wait(10)


@pytest.mark.slow
def test_a_day_on_slurm_sites_of_two_ranks_come_and_go_and_train_together_and_none_is_left(runner, slurm):
    """west (one task of two ranks) trains from the start, south (two tasks of one) comes and goes, east
    (one task) comes; nowhere names a partition that is not there."""

    def queue() -> dict[str, str]:
        ask = ["squeue", "--noheader", "--format=%j %P %T"]
        jobs = subprocess.run(ask, env=runner.env, capture_output=True, text=True, check=True)
        rows = [line.split() for line in jobs.stdout.splitlines()]
        assert len({name for name, _, _ in rows}) == len(rows), "two jobs of one site"
        assert all(name == f"curtail-{run_id}-{partition}" for name, partition, _ in rows)
        return {partition: state for _, partition, state in rows}

    names, comment = ("west", "south", "east", "nowhere"), "--comment={run} {site}"
    sites = {name: FAST | {"ranks": 2, "provision": {"partition": name}} for name in names}
    script = str(EXAMPLES / "slurm_two_nodes.sh")
    sites["south"]["provision"] |= {"script": script, "options": [comment, "--nodes=1", "--ntasks=2"]}
    grids = Grids(runner, *sites)
    jobs = QUICK | {"mode": "slurm", "start_timeout_s": 120, "retries": 1, "options": [comment]}
    argv = runner.write(sites, **grids.config, provision=jobs)
    grids.show(west=CLEAN, south=CLEAN, nowhere=CLEAN)
    launch = runner.start("launch.py", *argv, log="launch")  # starts nothing but the coordinator
    until(lambda: states(runner, "west"))
    run_id = runner.journal()[0]["wall"]["run_id"]
    until(lambda: queue().keys() >= {"west", "south"}, 20)
    assert not states(runner, "east")
    until(lambda: together(runner, "west", "south") >= 2, 180)
    assert queue() == {"west": "RUNNING", "south": "RUNNING"}
    until(lambda: re.search("absent|left out", str(faults_of(runner, "nowhere"))), 30)
    assert "nvalid partition" in faults_of(runner, "nowhere")[0]
    assert states(runner, "nowhere") == ["provisioning", "off"]
    grids.show(south=DIRTY, east=CLEAN)
    until(lambda: "off" in states(runner, "south") and "south" not in queue(), 90)
    until(lambda: together(runner, "west", "east"), 180)
    assert queue() == {"west": "RUNNING", "east": "RUNNING"}
    launch.send_signal(signal.SIGINT)
    assert launch.wait(90) == 130, runner.said("launch")
    assert runner.journal()[-1]["reason"] == "interrupted"
    assert "could not be stopped" not in runner.said("launch")
    assert queue() == {} and not processes_in(runner.folder), "nothing is left"
    assert with_two_ranks(runner, "launch") == ["east", "south", "west"]
    faulty = {r["site"] for r in runner.journal() if r["type"] == "fault"}
    assert faulty == {"nowhere"}, "whoever went, went cleanly"
    checked(runner)
    all_hold(runner, argv)
