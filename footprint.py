"""What a step takes of a GPU's memory, computed on a machine that has none.

    python footprint.py configs/d20.yaml                                  of the first site, or site=NAME: bytes by kind, and
                                                                          the largest device_batch for 40, 80 and 141 GB
    python footprint.py configs/d20.yaml sites.california.ranks=8         ... with other settings
    python footprint.py configs/d26.yaml site=texas --json                ... for programs

It is the site's own step on tensors without data (fake_cuda.py), watched by torch's MemTracker: at most two pieces of device_batch rows,
for the gradients are there from the second on, then the optimizers, twice. The peak is in bytes of tensors that live at once, each
rounded up to 512 as CUDA's allocator does. It leaves out what is no tensor of ours: CUDA's context and libraries and what the
allocator holds in pieces too small (RESERVE). A compiled block is traced and cut as inductor does it, but not fused: what it makes
on the way is counted as an upper bound, what it keeps for its backward pass as it is. For a site on CPUs it is the CPU's memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fake_cuda

GPUS_GB = (40, 80, 141)  # A100, H100, H200; GB of 10^9 bytes
RESERVE = 3e9  # bytes of a GPU: CUDA's context, cuBLAS' and NCCL's buffers, fragments; an estimate
KINDS = ("parameters", "gradients", "optimizer", "activations", "loss", "temporary")


def main(argv: list[str]) -> int:
    try:
        fake_cuda.pretend()  # before anything imports torch
    except fake_cuda.Unavailable as error:
        print(f"footprint.py: {error}", file=sys.stderr)
        return 2
    import config

    config.command(run, parses=True)
    return 0


def run(argv: list[str]) -> int:
    import config

    parser = config.Parser()
    parser.add_argument("config", nargs="+", help="CONFIG [key=value ...]")
    parser.add_argument("--gpu-gb", type=float, help="of this GPU instead of 40, 80 and 141 GB")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_intermixed_args(argv)
    out = compute(config.load(args.config), GPUS_GB if args.gpu_gb is None else (args.gpu_gb,))
    print(json.dumps(out) if args.json else table(out), flush=True)
    return 0


def of(argv: list[str], gpu_gb: float | None = None) -> dict:
    """`compute` of a CONFIG [key=value ...], in a process of its own. Raises BadInput with what that has to say."""
    from config import BadInput

    more = [] if gpu_gb is None else ["--gpu-gb", repr(gpu_gb)]
    done = subprocess.run([sys.executable, __file__, *argv, "--json", *more], capture_output=True, text=True)
    if done.returncode:
        raise BadInput((done.stderr.strip().splitlines() or ["footprint.py failed"])[-1].partition(": ")[2])
    return json.loads(done.stdout)


def of_config(cfg, name: str, ranks: int, gpu_gb: float) -> dict:
    """The same of a site of a config that is read, on so many ranks: torchrun may have started them without the config's knowing."""
    from config import plain

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(plain(cfg)))  # JSON is YAML
        return of([str(path), f"site={name}", f"sites.{name}.ranks={ranks}"], gpu_gb)


def largest_batch(cfg, name: str, ranks: int, gpu_bytes: int) -> int:
    """The largest device_batch with which a step of a site of so many ranks fits GPUs of so many bytes, CUDA's own share included; it
    divides the rows of a rank. Raises BadInput."""
    from config import BadInput

    gpu_gb = gpu_bytes / 1e9
    rows = of_config(cfg, name, ranks, gpu_gb)["fits"][repr(gpu_gb)]
    if rows is None:
        raise BadInput(f"sites.{name}.device_batch=auto: not one row fits a GPU of {gpu_gb:.1f} GB; take more ranks with "
                       "parallel=fsdp, or checkpointing=true")  # fmt: skip
    return rows


def compute(cfg, gpus_gb: tuple[float, ...] = GPUS_GB) -> dict:
    """Bytes by kind at the peak of a step with the site's device_batch (for auto: what fits the largest GPU, or 1), and the largest
    device_batch that fits GPUs of so many GB."""
    from config import BadInput, num_ranks
    from data import vocabulary
    from model import CPU_CHUNK, GPU_CHUNK, shape_of

    name = cfg.site or next(iter(cfg.sites))
    try:
        spec, shape = cfg.sites[name], shape_of(cfg.model, vocabulary(cfg))
    except ValueError as error:
        raise BadInput(str(error)) from None
    ranks, on_gpu = num_ranks(spec), spec.device != "cpu"
    rows = cfg.data.tokens_per_step // shape.seq_len // ranks
    peaks = {}

    def peak(batch: int) -> dict[str, int]:
        if batch not in peaks:
            peaks[batch] = measure(cfg, spec, shape, batch, pieces=1 if batch == rows else 2)
        return peaks[batch]

    # From its second chunk on the loss has no more in hand, and all else grows with the rows.
    low = min(rows, -(-2 * (GPU_CHUNK if on_gpu else CPU_CHUNK) // shape.vocab // shape.seq_len))
    high = min(2 * low, rows - 1)
    per_row = (total(peak(high)) - total(peak(low))) / (high - low) if high > low else 0.0

    def needs(batch: int) -> float:
        return total(peak(low)) + per_row * (batch - low) if low < batch < rows else total(peak(batch))

    def largest(gpu_gb: float) -> int | None:
        divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
        return next((n for n in divisors if needs(n) + RESERVE <= 1e9 * gpu_gb), None)

    fits = {gpu_gb: largest(gpu_gb) for gpu_gb in gpus_gb} if on_gpu else {}
    own = max(fits.values(), key=lambda n: n or 0) or 1 if spec.device_batch == "auto" else min(spec.device_batch, rows)
    return {
        "site": name, "device": spec.device, "ranks": ranks, "parallel": spec.parallel if ranks > 1 else None, "rows": rows,
        "device_batch": own, "bytes": peak(own), "peak_bytes": total(peak(own)), "bytes_per_row": per_row,
        "fits": fits,
    }  # fmt: skip


def total(peak: dict[str, int]) -> int:
    return sum(peak.values())


def measure(cfg, spec, shape, batch: int, pieces: int) -> dict[str, int]:
    """Bytes by kind at the peak of a step in `pieces` of `batch` rows."""
    import torch

    from config import num_ranks
    from model import GPT
    from optim import Inner, schedule
    from parallel import Held, Ranks, local

    ranks, device = num_ranks(spec), "cpu" if spec.device == "cpu" else "cuda"
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": min(ranks, fake_cuda.NUM_GPUS)}
    os.environ.update({k: str(v) for k, v in place.items()})
    with fake_cuda.Machine(ranks):
        held = Held(GPT(shape), Ranks(device, ranks), spec.parallel, cfg.model.dtype, cfg.model.compile, spec.checkpointing)
        inner = Inner(held.model, cfg.optim, held.ranks)
        tracker = fake_cuda.tracker()
        muon = inner.muon  # or None, or SharedMuon: a Muon of stand-ins
        stand_ins = getattr(muon, "mine", [])
        tracker.track_external(held.model, inner.adam, getattr(muon, "muon", muon), *stand_ins)
        peak = Peak(tracker, held)
        with tracker:
            for _ in range(2):
                inner.set(schedule(0, cfg.budget.tokens, cfg.data.tokens_per_step, cfg.optim))
                for _ in range(pieces):
                    ids = torch.zeros(batch, shape.seq_len, dtype=torch.long, device=held.ranks.device)
                    held.gradient(ids, ids, batch)
                gradients = sum(local(p.grad).untyped_storage().nbytes() for p in held.model.parameters())
                inner.step()
                inner.zero_grad()
        return peak.by_kind(gradients if pieces > 1 else 0)


class Peak:
    """A tracker's peak, taken apart. What the loss has in hand is what is alive in the head beyond what was when it was entered."""

    def __init__(self, tracker, held):
        self.tracker, self.device = tracker, held.ranks.device
        self.before, self.in_head = 0, 0  # Activation at its entry, and the peak that was reached there
        head, forward = held.model.head, held.model.head.forward

        def watched(*args, **kwargs):
            before, peak = self.of("current")["Activation"], self.of("peak")["Total"]
            out = forward(*args, **kwargs)
            if self.of("peak")["Total"] > peak:
                self.before, self.in_head = before, self.of("peak")["Total"]
            return out

        head.forward = watched

    def of(self, which: str) -> dict[str, int]:
        snapshot = self.tracker.get_tracker_snapshot(which).get(self.device, {})
        kinds = ("Parameter", "Buffer", "Gradient", "Activation", "Temp", "Optstate", "Other", "Total")
        return {kind: snapshot.get(kind, 0) for kind in kinds}

    def by_kind(self, gradients: int) -> dict[str, int]:
        """gradients: bytes of those that are there from the second piece on; the tracker takes them for temporary."""
        at = self.of("peak")
        loss = at["Activation"] - self.before if self.in_head == at["Total"] else 0
        found = at["Gradient"] + at["Temp"]
        values = (at["Parameter"] + at["Buffer"], min(gradients, found), at["Optstate"] + at["Other"], at["Activation"] - loss, loss,
                  found - min(gradients, found))  # fmt: skip
        return dict(zip(KINDS, values))


def table(out: dict) -> str:
    gb = {kind: f"{count / 1e9:.2f} GB" for kind, count in out["bytes"].items()}
    shape = f"{out['ranks']} x {out['device']}" + (f", {out['parallel']}" if out["parallel"] else "")
    lines = [("site", f"{out['site']}: {shape}, {out['device_batch']} of a rank's {out['rows']} rows at a time")]
    lines += gb.items()
    lines += [("peak", f"{out['peak_bytes'] / 1e9:.2f} GB a rank"), ("a row more", f"{out['bytes_per_row'] / 1e9:.2f} GB")]
    for gpu_gb, rows in out["fits"].items():
        what = f"device_batch {rows}" if rows else "nothing fits: take parallel=fsdp, checkpointing=true, or more ranks"
        lines.append((f"{gpu_gb} GB", f"{what}, with {RESERVE / 1e9:g} GB left for CUDA itself"))
    return "\n".join(f"{what:18} {value}" for what, value in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
