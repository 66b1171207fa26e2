"""What CUDA would refuse, or wait for, found without a GPU: the site's own code on tensors that have no data (fake_cuda.py).

Numbers, speed and kernels need a GPU; devices, types, shapes, collectives, synchronisation and memory do not.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ENV, REPO
from torch.profiler import ProfilerActivity, profile

import config
import footprint
from data import vocabulary
from model import GPT, shape_of
from optim import Inner, schedule
from parallel import Held, Ranks

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


@pytest.mark.slow
@pytest.mark.parametrize("spoil, place", [("item", "_local_scalar_dense"), ("copy", "copy from the CPU")])
def test_a_wait_inside_a_step_is_seen(runner, spoil, place):
    assert [n for what, n in waits(on_gpu(runner, spoil=spoil))["step"].items() if what.endswith(place)] == [4]


@pytest.mark.slow
def test_two_devices_in_one_operation_are_refused(runner):
    done = on_gpu(runner, spoil="device")
    assert done.returncode == 1 and "found at least two devices, cuda:0 and cpu" in done.stderr


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_memory_of_a_step_on_a_cpu_is_what_a_real_one_takes():
    """Within 10 %: the allocator's own account, of a real step of d4, against the sum over tensors without data."""
    config_ = str(REPO / "configs" / "d4_cpu.yaml")
    computed, cfg = footprint.of([config_]), config.load([config_])
    spec, shape = next(iter(cfg.sites.values())), shape_of(cfg.model, vocabulary(cfg))
    rows = cfg.data.tokens_per_step // shape.seq_len
    assert (computed["rows"], computed["device_batch"]) == (rows, min(rows, spec.device_batch))
    ids = torch.randint(shape.vocab, (rows, shape.seq_len))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        held = Held(GPT(shape).init_weights(1), Ranks("cpu", rows), dtype=cfg.model.dtype)
        inner = Inner(held.model, cfg.optim, held.ranks)
        for _ in range(2):
            inner.set(schedule(0, cfg.budget.tokens, cfg.data.tokens_per_step, cfg.optim))
            held.gradient(ids, ids, spec.device_batch)
            inner.step()
            inner.zero_grad()
    changes = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        most = max(most, live)
    assert abs(computed["peak_bytes"] / most - 1) < 0.1


def memory(*argv: str) -> tuple[dict, int]:
    """What footprint.py says, and the bytes it took itself."""
    with subprocess.Popen([sys.executable, str(REPO / "footprint.py"), *argv, "--json"], env=ENV, stdout=subprocess.PIPE) as process:
        out = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return out, 1024 * usage.ru_maxrss


@pytest.mark.slow
def test_a_row_more_takes_the_same_again(runner):
    """So that the largest device_batch that fits need not be tried."""
    model = {"depth": 2, "width": 128, "heads": 1, "kv_heads": 1, "seq_len": 2048, "vocab": 65536, "dtype": "bfloat16"}
    argv = runner.write({"a": {"device": "cuda"}}, model=model, budget={"tokens": 2**19}, rounds={"train_s": 10**6},
                        data={"tokens_per_step": 2**15})  # fmt: skip
    by_batch = {n: memory(*argv, f"sites.a.device_batch={n}")[0] for n in (4, 8, 12, 15)}
    per_row = by_batch[4]["bytes_per_row"]
    for n in (8, 12, 15):
        assert by_batch[n]["peak_bytes"] == pytest.approx(by_batch[8]["peak_bytes"] + per_row * (n - 8), rel=0.001)
    assert by_batch[12]["bytes"]["loss"] == pytest.approx(by_batch[8]["bytes"]["loss"], rel=1e-3), "chunks, however many rows"


@pytest.mark.slow
def test_device_batch_auto_is_what_fits(runner):
    """A site asks for the memory of its own GPU; one in which not a row fits is told what would help."""
    model = {"depth": 2, "width": 128, "heads": 1, "kv_heads": 1, "seq_len": 2048, "vocab": 65536, "dtype": "bfloat16"}
    argv = runner.write({"a": {"device": "cuda", "device_batch": "auto"}}, model=model, budget={"tokens": 2**19},
                        rounds={"train_s": 10**6}, data={"tokens_per_step": 2**15})  # fmt: skip
    cfg, asked = config.load([*argv, "site=a"]), footprint.of([*argv, "sites.a.device_batch=2"])
    enough = asked["peak_bytes"] + footprint.RESERVE
    assert footprint.largest_batch(cfg, "a", 1, int(enough) + 1) == 2 and footprint.largest_batch(cfg, "a", 1, int(enough) - 1) == 1
    assert footprint.largest_batch(cfg, "a", 8, 80 * 10**9) == 2, "of all 16 rows a rank of 8 has 2, whatever the config says of ranks"
    with pytest.raises(config.BadInput, match=r"sites.a.device_batch=auto: not one row fits a GPU of 4.0 GB; take more ranks"):
        footprint.largest_batch(cfg, "a", 1, 4 * 10**9)


@pytest.mark.parametrize("said", ["0", "some", "1.5", "true", "auto"])
def test_a_device_batch_that_is_none_is_named(said):
    remedy = "is for device=cuda; say how many rows a CPU" if said == "auto" else "must be a number of rows > 0, or auto"
    with pytest.raises(config.BadInput, match=rf"(?i)^sites.california.device_batch={said} {remedy}"):
        config.load([str(REPO / "configs" / "demo.yaml"), f"sites.california.device_batch={said}"])


@pytest.mark.slow
def test_d20_on_eight_gpus_is_computed_in_little_memory(runner):
    eight = ["sites.california.ranks=8", "sites.california.parallel=fsdp"]
    (out, taken), (alone, _) = (
        memory(str(REPO / "configs/d20.yaml"), *eight),
        memory(str(REPO / "configs/d20.yaml"), "sites.california.ranks=1"),
    )
    assert taken < 4 * 2**30
    kinds, whole = out["bytes"], alone["bytes"]
    assert whole["parameters"] == whole["gradients"] + 2048 * 128 * 4 * 2, "and the tables of rotary embeddings"
    assert kinds["parameters"] == pytest.approx(whole["parameters"] / 8, rel=0.01) and sum(kinds.values()) == out["peak_bytes"]
    assert alone["fits"]["40"] < alone["fits"]["80"] < alone["fits"]["141"]


def test_what_it_has_to_say_is_one_line():
    with pytest.raises(config.BadInput, match=r"^config 'nowhere.yaml' does not exist"):
        footprint.of(["nowhere.yaml"])
    with pytest.raises(config.BadInput, match=r"^model.width=130 must be an even multiple of model.heads=4"):
        footprint.of([str(REPO / "configs" / "demo.yaml"), "model.width=130"])


# -- the bench that waits for a GPU -----------------------------------------------------------------------------------------


def bench(runner, *argv: str) -> tuple[int, dict]:
    command = [sys.executable, str(REPO / "bench" / "gpu.py"), str(runner.folder / "out"), *argv]
    code = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300).returncode
    assert (runner.folder / "out" / "gpu.md").read_text().startswith("# On ")
    return code, json.loads((runner.folder / "out" / "gpu.json").read_text())


@pytest.mark.slow
def test_the_bench_for_gpus_works_before_there_is_one(runner):
    code, parts = bench(runner, "--reduced", "--only", "device,numbers,d12,power")
    assert code == 0 and list(parts) == ["device", "numbers", "d12", "power"] and not any("error" in part for part in parts.values())
    assert parts["numbers"]["float32_gradient"] < 1e-4 and 0 < parts["numbers"]["bfloat16_gradient"] < 3e-2
    assert parts["d12"]["tokens_per_s"] > 0 and parts["d12"]["computed_gb"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_part_that_fails_does_not_take_the_others(runner):
    code, parts = bench(runner, "--only", "device,numbers")
    assert code == 1 and list(parts) == ["device", "numbers"]
    assert all(part["error"].startswith("exit code ") and part["seconds"] > 0 for part in parts.values())
