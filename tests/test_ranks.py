"""The ranks of a site: however many, however they hold the model, they train the same one."""

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file
from test_runs import until

from ledger import count

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def ranked(size: int) -> dict:
    """What tests/ranked.py prints with so many ranks."""
    command = [*TORCHRUN, f"--nproc_per_node={size}", str(REPO / "tests/ranked.py")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results() -> dict[int, dict]:
    return {size: ranked(size) for size in (1, 2, 4)}


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_has_the_loss_curve_of_one(results, size, parallel):
    one, several = ({m: r[f"{p}-{m}"]["losses"] for m in ("adamw", "muon")} for r, p in ((results[1], "ddp"), (results[size], parallel)))
    assert one["adamw"][-1] < 0.5 * one["adamw"][0] and one["muon"][-1] < 0.5 * one["muon"][0], "there is something to compare"
    assert furthest(several["adamw"], one["adamw"]) < 1e-5
    assert furthest(several["muon"][:5], one["muon"][:5]) < 1e-4  # Newton-Schulz runs in bfloat16 and amplifies rounding
    assert furthest(several["muon"], one["muon"]) < 5e-3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_from_a_flat_vector_and_the_saved_optimizer_state_training_goes_on_to_the_same_bits(results, size):
    for name, r in results[size].items():
        assert r["back"] == r["saved"] != r["end"] == r["end again"], name
        assert r["again"] == r["losses"][-len(r["again"]) :], name


def test_as_many_ranks_again_on_two_nodes_give_the_same_bits(results):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*TORCHRUN[:3], "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={meet}", "--rdzv_id=two",
               "--local_addr=127.0.0.1", str(REPO / "tests/ranked.py")]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads("".join(out for out, _ in said)) == results[2]


@pytest.mark.parametrize("said, sites, more", [
    ("sites.a.ranks=4, but torchrun has started 2 (nodes x --nproc_per_node); start as many, or say sites.a.ranks=2", {},
     ["sites.a.ranks=4"]),
    ("sites.a.parallel=fsdp cuts the model over at least 2 ranks, sites.a.ranks=null; say sites.a.ranks=N, or parallel=ddp",
     {"parallel": "fsdp"}, []),
    ("2 ranks (nodes x --nproc_per_node) must divide the 3 rows of a step", {}, ["data.tokens_per_step=96", "budget.tokens=960"]),
])  # fmt: skip
def test_ranks_that_do_not_fit_are_refused_in_one_line(runner, said, sites, more):
    argv = runner.write({"a": sites})
    process = runner.start("torchrun", "--standalone", "--nproc_per_node=2", str(REPO / "train.py"), *argv, "site=a", *more, log="a")
    assert process.wait(60) != 0
    ours = [line for line in runner.said("a").splitlines() if line.startswith("train.py:")]
    assert ours == [f"train.py: {said}"]
    assert not (runner.run_dir / "sites").exists(), "nothing was begun"


def start(runner, argv: list[str]) -> list:
    head = runner.start("coordinator.py", *argv, log="coordinator")
    return [head, runner.start("torchrun", "--standalone", "--nproc_per_node=2", str(REPO / "train.py"), *argv, "site=a", log="a")]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_killed_in_the_middle_of_a_round_end_where_no_stop_would_have(runner, parallel):
    argv = runner.write({"a": {"ranks": 2, "parallel": parallel, "device_batch": 1}}, budget={"tokens": 128 * 60})
    (scratch := runner.folder / "tmp").mkdir()
    runner.env |= {"TMPDIR": str(scratch)}
    head, site = start(runner, [*argv, "run=calm", "wandb.mode=offline"])
    assert head.wait(120) == site.wait(30) == 0, runner.said() + runner.said("a")
    left = [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor_")]  # that is a cache
    assert not left, "what torchrun, which a person has started, and wandb put into the temporary folder is gone"

    everyone = start(runner, argv)
    workers: list[psutil.Process] = []

    def at_rest() -> bool:
        """Frozen within a round whose start is stored, and each rank's optimizer state beside it."""
        workers[:] = [p for e in everyone for p in (psutil.Process(e.pid), *psutil.Process(e.pid).children(recursive=True))]
        for p in workers:
            p.send_signal(signal.SIGSTOP)
        stored = [r["round"] for r in runner.journal() if r["type"] == "store"]
        opened = [r["round"] for r in runner.journal() if r["type"] == "open"]
        files = [runner.run_dir / f"sites/a/inner-{stored[-1]:06d}-{rank}.safetensors" for rank in (0, 1)] if stored else []
        if len(stored) >= 3 and opened[-1] == stored[-1] and all(f.exists() for f in files):
            return True
        for p in workers:
            p.send_signal(signal.SIGCONT)
        return False

    until(at_rest)
    for p in workers:
        p.kill()
    for p in everyone:
        p.wait(30)
    head, _ = start(runner, argv)
    assert head.wait(120) == 0, runner.said() + runner.said("a")
    assert "found on own disk" in runner.said("a")
    assert torch.equal(runner.theta(), runner.theta("calm"))
    kept = [{name.split(".")[0] for name in load_file(sorted(runner.run_dir.glob(f"sites/a/inner-*-{r}.*"))[-1])} for r in (0, 1)]
    assert kept[0] == {"adam", "muon", "rng"}
    assert kept[1] == kept[0] - ({"adam"} if parallel == "ddp" else set()), "what all ranks have alike is kept once"
    commits = [r for r in runner.journal() if r["type"] == "commit"]
    assert sum(count(r["batches"]["a"]) for r in commits) == 60  # the ledger: each batch once, though two ranks trained it
    assert runner.summary()["tokens"] == 128 * 60
