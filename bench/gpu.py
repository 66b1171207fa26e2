"""Everything that needs a GPU, in nine minutes on one: parts that do not take each other along when they fail.

    python bench/gpu.py OUT_DIR                       gpu.json and gpu.md there, written anew after every part
    python bench/gpu.py OUT_DIR --only numbers,day    some of them
    python bench/gpu.py OUT_DIR --reduced             the same on a CPU and small: whether it works at all

Each part is a process of its own with a time-out of its own. It needs nothing but torch 2.11 or later and our other requirements; what
else a part wants (transformers, a driver with energy counters) it says when it is not there.

    device        what it is, and the versions
    numbers       loss and gradients of d4 against the CPU's in fp32: the same within 1e-4 in fp32, within bf16's error in bf16
    d12, d20      tokens/s, MFU, peak memory against the computed one (footprint.py); first step with a cold and a warm compiler
    transformers  tokens/s beside NanoChatForCausalLM, in turns
    power         NVML's joules, idle and training, against the config's power model
    day           the demo's day with its three sites on this GPU; centralized, and two sites: validation losses
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # not bench/: `train` is the one at the top

import config  # noqa: E402
from config import BadInput, Parser  # noqa: E402

ALL_S = 540
ONE_GPU = ["site=california", "sites.california.ranks=1", "sites.california.parallel=ddp"]


class Part(NamedTuple):
    timeout_s: int
    work: callable


def main(argv: list[str]) -> int:
    parser = Parser()
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...")
    parser.add_argument("--reduced", action="store_true", help="on a CPU, and small")
    parser.add_argument("--part", help="for itself: do this one here, and print what came of it")
    args = parser.parse_args(argv)
    if args.part:
        print(json.dumps(PARTS[args.part].work(args.reduced)), flush=True)
        return 0
    if unknown := set(args.only.split(",")) - set(PARTS):
        raise BadInput(f"--only {','.join(sorted(unknown))}: no such part; there are {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), {}
    for name in args.only.split(","):
        left_s = ALL_S - (time.monotonic() - began)
        done[name] = attempt(name, min(PARTS[name].timeout_s, left_s), args) if left_s > 10 else {"error": "no time was left"}
        (args.out / "gpu.json").write_text(json.dumps(done, indent=1) + "\n")
        (args.out / "gpu.md").write_text(page(done, args.reduced))
        print(f"{name:14} {done[name].get('seconds', 0):5.0f} s  {done[name].get('error', 'done')}", flush=True)
    return int(any("error" in part for part in done.values()))


def attempt(name: str, timeout_s: float, args) -> dict:
    """What a part prints last, or why it printed nothing."""
    began, words = time.monotonic(), [sys.executable, __file__, str(args.out), "--part", name] + ["--reduced"] * args.reduced
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
        process = subprocess.Popen(words, stdout=said, stderr=wrong, text=True, start_new_session=True, cwd=REPO)
        try:
            code = process.wait(timeout_s)
            error = None if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            error = f"not done in {timeout_s:.0f} s"
        out = {"seconds": round(time.monotonic() - began, 1)}
        if error is None:
            said.seek(0)
            return out | json.loads(said.read().strip().splitlines()[-1])
        wrong.seek(0)
        last = (wrong.read().strip().splitlines() or [""])[-1]
        return out | {"error": f"{error}: {last}"}


def page(done: dict[str, dict], reduced: bool) -> str:
    """One Markdown page."""
    about = done.get("device", {})
    lines = [f"# On {about.get('name', 'a GPU')}{', reduced' if reduced else ''}", ""]
    lines += ["| part | s | | |", "| --- | ---: | --- | --- |"]
    for name, part in done.items():
        facts = [(k, v) for k, v in part.items() if k != "seconds"]
        for i, (key, value) in enumerate(facts):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {name if i == 0 else ''} | {part.get('seconds', '') if i == 0 else ''} | {key} | {shown} |")
    return "\n".join(lines) + "\n"


def call(*words: str, **more) -> str:
    """A command of ours; what it prints. Raises with its last line."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=REPO, env=os.environ | more)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["?"])[-1])
    return done.stdout


def device(reduced: bool) -> dict:
    import torch

    import devices

    out = {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    if reduced:
        return {"name": "a CPU"} | out
    gpu, place = torch.cuda.get_device_properties(0), torch.device("cuda:0")
    peak = devices.peak_flops(place, "bfloat16", None)
    method = devices.Meter([place], "auto").method
    return {"name": gpu.name, "memory_gb": gpu.total_memory / 1e9, "cuda": torch.version.cuda, "peak_tflops": peak and peak / 1e12,
            "energy": method} | out  # fmt: skip


def numbers(reduced: bool) -> dict:
    """Raises where they are further apart than they may be."""
    import torch

    from model import GPT, Shape
    from parallel import Held, Ranks

    shape = Shape(4, 256, 2, 2, 256, 4096)
    both = torch.randint(shape.vocab, (8, shape.seq_len + 1), generator=torch.Generator().manual_seed(1))

    def gradient(kind: str, dtype: str) -> tuple[float, torch.Tensor]:
        made = GPT(shape).init_weights(1)
        for block in made.blocks:  # which begin at zero, and would hide what is behind them
            for matrix in (block.attn.proj.weight, block.mlp.proj.weight):
                torch.nn.init.normal_(matrix, std=0.02, generator=torch.Generator().manual_seed(2))
        held = Held(made, Ranks(kind, 8), dtype=dtype)
        ids, targets = (t.to(held.ranks.device) for t in (both[:, :-1], both[:, 1:]))
        loss = held.gradient(ids, targets, 4)
        return loss.item(), torch.cat([p.grad.float().cpu().flatten() for p in held.model.parameters()])

    kind, (loss, plain), out = "cpu" if reduced else "cuda:0", gradient("cpu", "float32"), {}
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 3e-2)):
        other, its = gradient(kind, dtype)
        out |= {f"{dtype}_loss": abs(other / loss - 1), f"{dtype}_gradient": ((its - plain).norm() / plain.norm()).item()}
        assert out[f"{dtype}_loss"] < bound and out[f"{dtype}_gradient"] < bound, out
    return out


def speed(name: str, reduced: bool, rows: int) -> dict:
    """A config's step on one GPU: twice, with an empty compiler's cache and with a full one."""
    import footprint

    seq_len = 2048
    argv = [str(REPO / "configs" / f"{name}.yaml"), *ONE_GPU, f"sites.california.device_batch={rows}"]
    argv += [f"data.tokens_per_step={2 * rows * seq_len}", f"budget.tokens={200 * rows * seq_len}", "sites.california.device=cuda:0"]
    if reduced:
        argv = [*argv[:-1], "model.depth=2", "model.seq_len=64", "model.vocab=512", "model.compile=false", "sites.california.device=cpu"]
    with tempfile.TemporaryDirectory() as cache:
        timed = [json.loads(call("bench/train.py", *argv, "--json", "--steps", "3" if reduced else "8", TORCHINDUCTOR_CACHE_DIR=cache))
                 for _ in range(2)]  # fmt: skip
    best, computed = timed[1], footprint.of(argv)["peak_bytes"]
    out = {"tokens_per_s": best["tokens_per_s"], "mfu": best["mfu"], "first_step_cold_s": timed[0]["first_step_s"],
           "first_step_warm_s": best["first_step_s"], "peak_gb": best["peak_bytes"] / 1e9, "computed_gb": computed / 1e9}  # fmt: skip
    return out if reduced else out | {"peak_over_computed": best["peak_bytes"] / computed}


def transformers(reduced: bool) -> dict:
    argv = [str(REPO / "configs" / "d20.yaml"), *ONE_GPU, "sites.california.device_batch=8"]
    if reduced:
        argv = [str(REPO / "bench" / "configs" / "speed_cpu.yaml")]
    out = json.loads(call("bench/train.py", *argv, "--transformers", "--json", "--steps", "2" if reduced else "10"))
    return {f"{key}_median": sorted(out[key])[len(out[key]) // 2] for key in ("ours_tokens_per_s", "theirs_tokens_per_s", "ratio")}


def power(reduced: bool) -> dict:
    """kW of a GPU, idle and in d12's steps; the model's are the config's, for a site of 4."""
    import torch

    import devices
    from model import GPT, shape_of
    from optim import Inner, schedule
    from parallel import Held, Ranks

    cfg = config.load(
        [str(REPO / "configs" / "d12.yaml"), *ONE_GPU] + ["model.depth=2", "model.seq_len=64", "model.compile=false"] * reduced
    )
    spec, place = cfg.sites.california, "cpu" if reduced else "cuda:0"
    meter, seconds = devices.Meter([torch.device(place)], "auto"), 1 if reduced else 8

    def drawn_kw(work) -> float | None:
        before, began = meter.joules(), time.monotonic()
        while time.monotonic() - began < seconds:
            work()
        if not reduced:
            torch.cuda.synchronize()
        after = meter.joules()
        return None if None in (before, after) else (after - before) / (time.monotonic() - began) / 1000

    shape = shape_of(cfg.model, 65536)
    held = Held(GPT(shape).init_weights(1), Ranks(place, 8), "ddp", cfg.model.dtype, cfg.model.compile)
    inner, ids = Inner(held.model, cfg.optim, held.ranks), torch.zeros(8, shape.seq_len, dtype=torch.long, device=held.ranks.device)
    inner.set(schedule(0, 1, 1, cfg.optim))

    def step() -> None:
        held.gradient(ids, ids, 8)
        inner.step()
        inner.zero_grad()

    idle_kw = drawn_kw(lambda: time.sleep(0.1))
    step()
    return {
        "method": meter.method,
        "idle_kw": idle_kw,
        "train_kw": drawn_kw(step),
        "model_idle_kw": spec.idle_kw / 4,
        "model_train_kw": spec.train_kw / 4,
    }


def day(reduced: bool) -> dict:
    """The demo's day in bfloat16 on one GPU that the sites share, with the losses that its figures compare."""
    small = ["budget.tokens=40960", "model.depth=1", "model.width=32", "model.heads=2", "model.seq_len=64", "data.val_tokens=4096"]
    gpu = [f"sites.{s}.device=cuda:0" for s in ("california", "texas", "south_australia")]
    out = {}
    for name, changes in (("ours", []), ("centralized", ["only=[california]", "policy.name=always", "clock.max_hours=null"]),
                          ("two_site", ["only=[california,texas]", "policy.name=always"])):  # fmt: skip
        began = time.monotonic()
        call(
            "launch.py", "configs/demo.yaml", f"run=gpu_{name}", "fresh=true", "wandb.mode=disabled", *changes, *(small if reduced else gpu)
        )
        summary = json.loads((REPO / "runs" / f"gpu_{name}" / "summary.json").read_text())
        out |= {f"{name}_val_loss": summary["val_loss"], f"{name}_s": round(time.monotonic() - began, 1)}
    return out


PARTS = {
    "device": Part(30, device),
    "numbers": Part(60, numbers),
    "d12": Part(90, lambda reduced: speed("d12", reduced, 4 if reduced else 32)),
    "d20": Part(130, lambda reduced: speed("d20", reduced, 4 if reduced else 32)),
    "transformers": Part(90, transformers),
    "power": Part(45, power),
    "day": Part(180, day),
}

if __name__ == "__main__":
    config.command(main, parses=True)
