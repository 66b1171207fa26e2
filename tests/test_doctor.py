"""What a machine has, against what a config needs: each thing that would stop or hurt a run is one line, with a remedy that works."""

import dataclasses
import socket
import subprocess
import sys

import pytest
from conftest import ENV, REPO

import config
import doctor

GB = 10**9
ROOMY = doctor.Machine(
    processor="test", cores=64, instructions="AVX512", bfloat16=True, memory=512 * GB, free_memory=500 * GB, gpus=(), open_files=-1,
    addresses={"lo": "127.0.0.1", "eth0": "10.0.0.5"}, clock_in_step=True, compiler=True, python="3.11.7", torch="2.13.0+cpu",
    free_disk=10_000 * GB,
)  # fmt: skip


def said(argv: list[str], **has) -> dict[str, bool]:
    """What is found, and whether it stops the run."""
    here = dataclasses.replace(ROOMY, **has)
    return {f"{f.what} -> {f.remedy}": f.stops for f in doctor.findings(config.load(argv), here)}


def config_of(name: str) -> str:
    return str(REPO / "configs" / f"{name}.yaml")


def test_on_a_roomy_machine_nothing_hurts(runner):
    assert said(runner.write({"a": {}, "b": {}})) == {}
    assert said([config_of("demo")]) == {}


HUB = "data.source=hf://karpathy/fineweb-edu-100b-shuffle"
STAR = ["sync.topology=star", "sync.port=5555"]
CASES = [  # what to change in the config, what the machine has; a part of the finding, whether it stops
    (["sites.texas.device=cuda"], {}, "torch sees no GPU -> a GPU, or sites.texas.device=cpu", True),
    (["model.compile=true"], {"compiler": False}, "no C++ compiler -> install g++, or model.compile=false", True),
    (["model.dtype=bfloat16"], {"bfloat16": False}, "model.dtype=bfloat16, which this processor", False),
    ([], {"cores": 2}, "3 sites train with 3 threads on 2 cores: together they take 1.5 times as long", False),
    (["only=california"], {"cores": 1}, "the site trains with 2 threads on 1 core", False),
    ([], {"torch": "2.10.1"}, "torch 2.10.1 is older than 2.11 -> pip install -r requirements.txt", True),
    ([], {"open_files": 100}, "3 sites need 206 open files at the head node, this system allows 100", True),
    ([], {"free_memory": GB}, "it takes at least 2.1 GB of memory, 1.0 of 512.0 GB are free", False),
    ([], {"memory": GB, "free_memory": GB}, "it takes at least 2.1 GB of memory, 1.0 of 1.0 GB are free", True),
    ([], {"free_disk": 1000}, "runs/demo takes up to 0.1 GB, 0.0 GB are free", True),
    (["clock.mode=wall"], {"clock_in_step": False}, "clock is not synchronised: windows are off", False),
    (["clock.mode=wall", "site=texas"], {"clock_in_step": False}, "the site's log is off by as much", False),
    ([*STAR, "sync.host=10.0.0.9"], {}, "no address of this machine, which has 127.0.0.1 (lo), 10.0.0.5 (eth0)", False),
    ([*STAR, "sync.host=10.0.0.5"], {}, "there are no keys -> python coordinator.py keys CONFIG", True),
    ([HUB], {}, "is not prepared in data.dir=data -> python data.py prepare CONFIG", True),
    ([HUB], {"free_disk": 10**7}, "its text and tokens take about", True),
]


@pytest.mark.parametrize("changes, has, finding, stops", CASES)
def test_each_thing_that_will_hurt_is_one_line_with_its_remedy(changes, has, finding, stops):
    found = said([config_of("demo"), *changes], **has)
    assert [stop for line, stop in found.items() if finding in line] == [stops], found


def test_a_head_node_needs_nothing_that_its_sites_need():
    here = dataclasses.replace(ROOMY, compiler=False, cores=1, free_memory=8 * GB, memory=8 * GB)
    cfg = config.load([config_of("d20"), "sync.topology=star"])
    assert not [f.what for f in doctor.findings(cfg, here, head=True) if "prepared" not in f.what and "GB" not in f.what]
    assert any("torch sees no GPU" in f.what for f in doctor.findings(cfg, here))
    small = dataclasses.replace(here, memory=2 * GB, free_memory=2 * GB)
    assert [f.what for f in doctor.findings(cfg, small, head=True) if "of memory" in f.what]


def test_a_port_that_somebody_holds_is_named(runner):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        found = said([*runner.write({"a": {}}), f"sync.port={port}"])
    assert found == {f"sync.port={port}: Address already in use -> stop what holds it, or another port": True}


@pytest.mark.slow
def test_a_step_too_large_for_the_gpus_here_is_found_before_it_fails(runner):
    model = {"depth": 2, "width": 128, "heads": 1, "kv_heads": 1, "seq_len": 2048, "vocab": 65536, "dtype": "bfloat16"}
    argv = runner.write({"a": {"device": "cuda", "ranks": 2}}, model=model, budget={"tokens": 2**19}, rounds={"train_s": 10**6},
                        data={"tokens_per_step": 2**15})  # fmt: skip
    assert said(argv, gpus=(("H100", 80 * GB),) * 2) == {}
    (found,) = said(argv, gpus=(("L4", 8 * GB),) * 2)
    assert found.startswith("sites.a.device_batch=4 takes 10 GB of a GPU's 8 -> sites.a.device_batch=") and found.endswith(", or auto")
    assert any("sites.a.ranks=2, and torch sees 1 GPU -> sites.a.ranks=1" in line for line in said(argv, gpus=(("L4", 8 * GB),)))


def test_the_command_says_what_is_here_and_fails_if_it_cannot_run(runner):
    def call(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(REPO / "launch.py"), "doctor", *runner.write({"a": {}}), *more]
        return subprocess.run(command, cwd=runner.folder, env=ENV, capture_output=True, text=True, timeout=120)

    good, bad = call(), call("sites.a.device=cuda")
    assert good.returncode == 0 and good.stdout.startswith("processor ") and "stops" not in good.stdout
    for what in ("GPUs", "memory", "disk", "open files", "addresses", "clock", "versions"):
        assert f"\n{what:12} " in good.stdout
    assert bad.returncode == 1 and "\nstops        sites.a.device=cuda, and torch sees no GPU" in bad.stdout
