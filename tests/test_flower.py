"""The paper's design on a real Flower against ours: the same arithmetic, the same batches, the same loss, nothing left behind.

bench/environments.py makes .venv-flower first, which takes about a minute. A round through Flower's processes takes 6 to
12 s however small it is (flwr polls every 3 s and starts a process for each message), so only THROUGH rounds go that way and
must give the same bits as without them.
"""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import REPO

pytestmark = pytest.mark.slow
RUN = [sys.executable, str(REPO / "bench/flower/run.py")]
ROUNDS, THROUGH, H, SITES = 10, 2, 3, ["a", "b"]
PAPER = {
    "rounds": {"train_s": 600, "max_steps": H, "split_steps": False, "inner_state": "reset", "lr_position": "own", "outer": "none"},
    "budget": {"tokens": ROUNDS * H * len(SITES) * 128},
    "optim": {"matrix_lr": 0.005, "embedding_lr": 0.1},  # at four times that, rounding grows to 0.02 % of the loss
    "data": {"val_tokens": 6400},
    "eval": {"every_rounds": 0},
}


def flower_processes() -> set[int]:
    """Everything that .venv-flower's programs run as."""
    return {p.pid for p in psutil.process_iter(["cmdline"]) if ".venv-flower" in " ".join(p.info["cmdline"] or [])}


@pytest.fixture(scope="module")
def made():
    """.venv-flower, made with the user's own HOME: pip, and what pip asks for its versions, may write there."""
    subprocess.run([sys.executable, REPO / "bench/environments.py", "flower"], check=True, stdout=subprocess.DEVNULL, timeout=600)


@pytest.fixture
def env(tmp_path, made):
    """The environment for run.py, which must leave no process, nothing in TMPDIR, and nothing in HOME."""
    folders = {name: tmp_path / name.lower() for name in ("HOME", "TMPDIR")}
    for folder in folders.values():
        folder.mkdir()
    before = flower_processes()
    yield os.environ | {name: str(folder) for name, folder in folders.items()}
    assert not flower_processes() - before
    assert not [path for folder in folders.values() for path in folder.iterdir()]


def flower(env: dict, *argv: str, cwd=REPO) -> dict:
    done = subprocess.run([*RUN, *argv, "--json"], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_flowers_average_and_outer_step_are_ours(env):
    result = flower(env, "parity")
    kinds = [rows for rows in result.values() if isinstance(rows, list)]
    assert len(kinds) == 3 and all(len(rows) == 5 for rows in kinds)
    assert all(0 <= row["rel"] < 1e-6 for rows in kinds for row in rows)


def test_the_same_miniature_through_flower_learns_the_same(runner, env):
    argv = runner.write({site: {} for site in SITES}, **PAPER)
    assert runner.run(argv, SITES) == 0
    commits = [record for record in runner.journal() if record["type"] == "commit"]
    theirs = flower(env, "train", *argv, "--rounds", str(ROUNDS), "--here", cwd=runner.folder)
    assert [[c["batches"][site] for site in SITES] for c in commits] == [[[b] for b in round_] for round_ in theirs["batches"]]
    assert theirs["rounds"] == ROUNDS and theirs["tokens"] == PAPER["budget"]["tokens"]
    assert theirs["val_loss"] == pytest.approx(runner.summary()["val_loss"], rel=1e-3)


def test_flowers_processes_change_no_bit(runner, env):
    argv = ["train", *runner.write({site: {} for site in SITES}, **PAPER), "--rounds", str(THROUGH), "--nesterov"]
    here, there = flower(env, *argv, "--here", cwd=runner.folder), flower(env, *argv, cwd=runner.folder)
    assert all(here[key] == there[key] for key in ("rounds", "tokens", "batches", "val_loss"))


def test_interrupted_it_takes_everything_with_it(env):
    before = flower_processes()
    run = subprocess.Popen([*RUN, "echo", "--params", "1e5", "--rounds", "100"], env=env, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(flower_processes() - before) < 6 and run.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert run.poll() is None and len(flower_processes() - before) >= 6  # SuperLink, two SuperNodes, their SuperExecs
    os.kill(run.pid, signal.SIGINT)
    try:
        assert run.wait(20) == 130
    finally:
        for pid in flower_processes() - before if run.poll() is None else ():  # it did not: nothing stays all the same
            os.kill(pid, signal.SIGKILL)
        run.kill()
