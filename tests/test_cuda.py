"""What CUDA would refuse, or wait for, found without a GPU: the site's own code on tensors that have no data (fake_cuda.py).

Numbers, speed and kernels need a GPU; devices, types, shapes, collectives, synchronisation and memory do not.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ENV, REPO

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="a CPU-only torch takes CUDA for there with what c++ builds: install g++")
ROWS = 16


def on_gpu(runner, depth: int = 4, ranks: int = 1, spoil: str = "none", compiled: bool = False, **site) -> subprocess.CompletedProcess:
    """A site of `ranks` GPUs of a model as deep and wide as nanochat's of that depth, with a small vocabulary and short rows."""
    rows, model = ROWS * ranks, {"depth": depth, "width": 64 * depth, "heads": depth // 2, "kv_heads": depth // 2}
    argv = runner.write(
        {"a": {"device": "cuda", "ranks": ranks, "energy": "model"} | site},
        budget={"tokens": rows * 32 * 40}, model=model | {"dtype": "bfloat16", "compile": compiled},
        data={"tokens_per_step": rows * 32, "val_tokens": 32 * 32}, rounds={"train_s": 10**6},
    )  # fmt: skip
    command = [sys.executable, str(REPO / "tests" / "on_cuda.py"), spoil, *argv, "site=a"]
    return subprocess.run(command, cwd=runner.folder, env=ENV, capture_output=True, text=True, timeout=300)


def waits(done: subprocess.CompletedProcess) -> dict[str, dict[str, int]]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


SHAPES = [  # depth, ranks, parallel, compiled, more
    (4, 1, "ddp", False, {}),
    (4, 8, "ddp", True, {"checkpointing": True}),
    (4, 4, "fsdp", True, {"checkpointing": True}),
    (12, 1, "ddp", True, {"checkpointing": True}),
    (12, 4, "ddp", False, {}),
    (20, 4, "ddp", True, {}),
    (20, 8, "fsdp", True, {}),
    (26, 8, "fsdp", False, {"checkpointing": True}),
    (26, 1, "ddp", True, {}),
]


@pytest.mark.parametrize(
    "depth, ranks, parallel, compiled, more", [pytest.param(*shape, marks=[pytest.mark.slow] * (i > 0)) for i, shape in enumerate(SHAPES)]
)
def test_a_site_works_on_gpus_and_no_step_waits_for_them(runner, depth, ranks, parallel, compiled, more):
    """Two batches in two inner steps each, in pieces of 4 rows, evaluation, and the flat vector there and back."""
    seen = waits(on_gpu(runner, depth, ranks, compiled=compiled, parallel=parallel, **more))
    assert seen["step"] == {}
    assert {place.split(" ", 1)[1] for place in seen["write"]} <= {"synchronize"}, "it waits once, at the end"
    assert sum(seen["write"].values()) == 1
    assert [n for place, n in seen["read"].items() if place.endswith("synchronize")] == [1]
    batches = -(-32 // (4 * ranks))
    assert sum(n for place, n in seen["evaluate"].items() if place.endswith("to the CPU")) == batches, "one result of each batch"


@pytest.mark.parametrize("spoil, place", [("item", "_local_scalar_dense"), pytest.param("copy", "copy from the CPU", marks=pytest.mark.slow)])
def test_a_wait_inside_a_step_is_seen(runner, spoil, place):
    assert [n for what, n in waits(on_gpu(runner, spoil=spoil))["step"].items() if what.endswith(place)] == [4]


@pytest.mark.slow
def test_two_devices_in_one_operation_are_refused(runner):
    done = on_gpu(runner, spoil="device")
    assert done.returncode == 1 and "found at least two devices, cuda:0 and cpu" in done.stderr
