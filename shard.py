"""One rank of a site: its part of the model, its rows of each batch, its optimizer state, its files. Every rank has one.

    shard = Shard(cfg)               at every rank, at the same time
    shard.follow()                   at ranks 1, 2, ...: do what rank 0 says, until it leaves
    shard.step(batch_id, ...)        at rank 0: all ranks take the step, each on its own rows

What the ranks do together is a method marked `together`: when rank 0 calls it, the others, who are waiting in `follow`, hear its name
and arguments and call it too. So they take the same collectives in the same order, and nobody decides anything but rank 0.

Rank 0 alone has a `Site` (train.py), and with it what this file knows nothing of: the coordinator, the plan of the round, theta, the
average (replica.py). The others have no object that could reach them.
"""

import contextlib
import math
import os
import re
import signal
import sys
import threading
from concurrent.futures import Future
from datetime import timedelta
from functools import wraps
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import config
import footprint
import sync
from config import BadInput
from data import Corpus, Feed
from devices import Meter, dtype_on, keep_freed_memory, peak_flops
from model import GPT, flops_per_token, shape_of
from optim import Inner, Point
from parallel import Held, Ranks

KEEP_INNER = 2
FAREWELL = timedelta(seconds=5)  # for the last word to ranks that may be stuck
TOGETHER = {}  # name -> what all ranks do when rank 0 says it


def together(work):
    """A method of Shard that all ranks carry out. Positional arguments go from rank 0 to the others and must be JSON; keyword
    arguments are rank 0's alone, the others have their defaults."""
    TOGETHER[work.__name__] = work

    @wraps(work)
    def call(self, *args, **own):
        self.ranks.tell([work.__name__, args])
        return work(self, *args, **own)

    return call


class Shard:
    def __init__(self, cfg):
        self.cfg, self.spec, virtual = cfg, cfg.sites[cfg.site], cfg.clock.mode == "virtual"
        _check_ranks(cfg.site, self.spec)
        self.corpus = Corpus(cfg)
        try:
            self.shape = shape_of(cfg.model, self.corpus.vocab)
        except ValueError as error:
            raise BadInput(str(error)) from None
        self.ranks = Ranks(self.spec.device, self.corpus.rows)
        self.device = self.ranks.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.rows = self.corpus.rows // self.ranks.size  # of a batch, at each rank
        self.device_batch = self._device_batch()
        self.feed = Feed(self.corpus, self.ranks.rank, self.ranks.size, self.device)
        self.meter = node_meter(self.ranks, "model" if virtual else self.spec.energy)
        self.measured = self.ranks.all(self.meter is None or self.meter.method != "model")
        peak = peak_flops(self.device, dtype_on(self.device, cfg.model.dtype), self.spec.peak_tflops)
        self.mfu_per_rate = flops_per_token(self.shape) / (peak * self.ranks.size) if peak else None  # per token/s
        self.folder = config.run_dir(cfg) / "sites" / cfg.site
        self.held: Held | None = None
        self.inner: Inner | None = None
        self._copied: list[Tensor] = []
        self._asked_to_leave = False
        self._saving: threading.Thread | None = None

    def _device_batch(self) -> int:
        """Rows of a forward pass, the same at all ranks: `auto` is what rank 0's GPU has memory for. Raises BadInput."""
        if self.spec.device_batch != "auto":
            return self.spec.device_batch
        if self.ranks.rank:
            return self.ranks.hear()
        gpu_bytes = torch.cuda.get_device_properties(self.device).total_memory
        rows = footprint.largest_batch(self.cfg, self.cfg.site, self.ranks.size, gpu_bytes)
        print(f"{self.cfg.site:15} | device_batch {rows}: the most that this GPU has memory for", flush=True)
        self.ranks.tell(rows)
        return rows

    # -- who says what ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Ranks 1, 2, ...: do what rank 0 says. Ends the process when rank 0 leaves, or is gone."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            while True:
                name, args = self.ranks.hear()
                TOGETHER[name](self, *args)
        except RuntimeError as error:
            if not lost_a_rank(error):
                raise
            self._end(config.EXIT_FAILED, f"rank {self.ranks.rank} stops: {brief(error)}")

    def _on_signal(self, number, frame) -> None:
        """Rank 0 is told at the next pulse, and leaves for all of us."""
        self._asked_to_leave = True

    @together
    def pulse(self) -> bool:
        """A sign of life from rank 0. Has any other rank been asked to go (a second node has a torchrun of its own)?"""
        return self.ranks.sum([float(self._asked_to_leave)])[0] > 0

    def leave(self, code: int) -> None:
        """Rank 0: end the other ranks with this exit code, and with them, if there are any, this process: one that has lost a gloo
        peer can abort in its exit handlers."""
        if self.ranks.size == 1:
            return
        with contextlib.suppress(RuntimeError):  # they are gone, or will notice that we are
            self.ranks.tell(["end", [code]], FAREWELL)
        self._end(code)

    def _end(self, code: int, why: str = "") -> None:
        self.settle()
        if why:
            print(f"{self.cfg.site}: {why}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @together
    def end(self, code: int) -> None:
        self._end(code)

    # -- the model ----------------------------------------------------------------------------------------------------

    @together
    def build(self) -> None:
        """The model as this rank holds it, its parameters yet to be written."""
        c, s = self.cfg.model, self.spec
        self.held = Held(GPT(self.shape), self.ranks, s.parallel, c.dtype, c.compile, s.checkpointing)

    @together
    def write(self, vector: Tensor | None = None) -> None:
        """Rank 0's flat vector into everyone's parameters."""
        self.held.write(vector)

    @together
    def read(self, into: Tensor | None = None) -> None:
        """Everyone's parameters into rank 0's flat vector."""
        self.held.read(into)

    @together
    def put_aside(self) -> None:
        """Keep the parameters as they are, to `take_back` them."""
        self._copied = self.held.copy()

    @together
    def take_back(self) -> None:
        self.held.put_back(self._copied)
        self._copied = []

    # -- training and measuring ---------------------------------------------------------------------------------------

    @together
    def new_inner(self) -> None:
        """Inner optimizers that have seen nothing."""
        self.inner = Inner(self.held.model, self.cfg.optim, self.ranks)

    @together
    def threads(self, alone: bool) -> None:
        """As many as the config says for a site alone, or for one among others. A compiled model keeps the first number: with another
        it would be compiled anew."""
        one_number = alone or self.cfg.model.compile
        torch.set_num_threads(self.spec.threads_local if one_number else self.spec.threads_federated)

    @together
    def step(self, batch_id: int, likely_next: list[int], parts: list) -> Tensor:
        """Train one batch; returns its mean loss over all ranks, nats per token, on the device: nothing here waits for a GPU.

        parts: one inner step each, [first row, stop row, *Point]: the rows of this rank's share that it takes, and what the schedule
        says there.
        """
        total = 0.0
        ids, targets = self.feed.take(batch_id, likely_next, len(parts))
        for first, stop, *point in parts:
            self.inner.set(Point(*point))
            loss = self.held.gradient(ids[first:stop], targets[first:stop], self.device_batch)
            self.inner.step()
            self.inner.zero_grad()
            total += loss * ((stop - first) / self.rows)
        return total

    @together
    @torch.no_grad()
    def evaluate(self, tokens: int) -> list[float]:
        """Sums over so many validation tokens, each rank a share of them: nats, tokens; nats of tokens that are text, their bytes."""
        sums = [0.0] * 4
        for counts, (ids, targets) in self.corpus.validation(tokens, self.device_batch, self.ranks.rank, self.ranks.size):
            with self.held.autocast():
                losses = self.held.model(ids.to(self.device), targets.to(self.device), reduction="none")
            if counts:  # under FSDP a rank that has no more rows goes on with the others
                losses, width = losses.double().cpu().flatten(), self.corpus.token_bytes[targets.flatten()]
                text = width > 0
                of_these = losses.sum().item(), losses.numel(), losses[text].sum().item(), width.sum().item()
                sums = [a + b for a, b in zip(sums, of_these)]
        self.held.reshard()
        return self.ranks.sum(sums)

    def joules(self) -> float | None:
        """What the site's devices have drawn since it started; None where that is not measured, or cannot be read just now."""
        if not self.measured:
            return None
        joules = self._joules_of_nodes() if self.ranks.num_nodes > 1 else self.meter.joules()
        return None if joules is None or math.isnan(joules) else joules

    @together
    def _joules_of_nodes(self) -> float:
        joules = self.meter.joules() if self.meter else 0.0
        return self.ranks.sum([math.nan if joules is None else joules])[0]

    # -- our own disk -------------------------------------------------------------------------------------------------

    @together
    def save(self, round_: int, run_id: str, digest: Future | None = None, residual: Tensor | None = None) -> None:
        """What an exact resume of a round's start needs besides theta and m, in the background: each rank's optimizer state and
        RNG to its node's disk; at rank 0 also what the wire left out, and the digest of theta.

        AdamW's state is the same on all ranks, but under FSDP: rank 0, who has a digest, keeps it for all.
        """
        self.settle()
        tensors = {k: v for k, v in self.inner.tensors().items() if digest or self.held.sharded or not k.startswith("adam.")}
        tensors = {k: v.detach().cpu().clone() for k, v in tensors.items()} | {"rng": torch.get_rng_state()}
        tensors |= {} if residual is None else {"residual": residual}  # nobody changes it before it is settled
        self._saving = threading.Thread(target=self._save, args=(tensors, round_, run_id, digest), daemon=True)
        self._saving.start()

    def _save(self, tensors: dict[str, Tensor], round_: int, run_id: str, digest: Future | None) -> None:
        about, path = self._about(round_, run_id, digest and digest.result()), self._file(round_)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync.write_durably(path, lambda tmp: sync.save_file(tensors, tmp, about))
        except (OSError, SafetensorError) as error:  # a resume would start it fresh: no reason to stop
            print(f"{path}: {error}", file=sys.stderr, flush=True)
        for old in self._files()[:-KEEP_INNER]:
            old.unlink()

    @together
    def load(self, round_: int, run_id: str, digest: str | None = None) -> dict[str, Tensor] | None:
        """Continue with what `save` left of a round's start; what of it is not the ranks', or None if any of them lacks its file: they
        may be on several nodes, and one of them may be new."""
        path, about = self._file(round_), self._about(round_, run_id, digest)
        found = path.exists()
        if found:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() == about
        if not self.ranks.all(found):
            return None
        tensors = load_file(path)
        torch.set_rng_state(tensors.pop("rng"))
        ours = {k: v for k, v in tensors.items() if k.split(".")[0] in ("adam", "muon")}
        if not self.held.sharded:
            ours |= self.ranks.share({k: v for k, v in ours.items() if k.startswith("adam.")} if digest else None)
        self.inner.load(ours)
        return {k: v for k, v in tensors.items() if k not in ours}

    @together
    def drop(self, keep_disk: bool) -> None:
        """What was on the machine is gone."""
        self.settle()
        self.held = self.inner = None
        if not keep_disk:
            for path in self._files():
                path.unlink(missing_ok=True)

    def settle(self) -> None:
        """Wait for this rank's file under way."""
        if self._saving:
            self._saving.join()
            self._saving = None

    def _file(self, round_: int) -> Path:
        return self.folder / f"inner-{round_:06d}-{self.ranks.rank}.safetensors"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"inner-*-{self.ranks.rank}.safetensors"))

    def _about(self, round_: int, run_id: str, digest: str | None) -> dict[str, str]:
        parallel = self.spec.parallel if self.ranks.size > 1 else "alone"
        about = {"run_id": run_id, "round": str(round_), "ranks": str(self.ranks.size), "parallel": parallel}
        return about | ({"digest": digest} if digest else {})


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error says that another rank of the site is gone, or stuck."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def brief(error: BaseException) -> str:
    """An error in one line, without the file names and advice that gloo puts around it."""
    line = (str(error).splitlines() or ["?"])[0]
    return re.sub(r"^\[\S*\] ", "", line).partition(". This is typically")[0]


def node_meter(ranks: Ranks, want: str) -> Meter | None:
    """The meter of a node's devices, at the one rank of it that reads it; the others would count the same joules again."""
    return Meter(ranks.node_devices, want) if ranks.leads_node else None


def _check_ranks(name: str, spec) -> None:
    """What the config says of a site's ranks against what torchrun has started. Raises BadInput."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if spec.ranks is not None and spec.ranks != size:
        raise BadInput(f"sites.{name}.ranks={spec.ranks}, but torchrun has started {size} (nodes x --nproc_per_node); start as many, or "
                       f"say sites.{name}.ranks={size}")  # fmt: skip
    if spec.parallel == "fsdp" and size == 1:
        raise BadInput(f"sites.{name}.parallel=fsdp cuts the model over at least 2 ranks, this is 1; start more (torchrun "
                       f"--nproc_per_node=2 with sites.{name}.ranks=2), or say sites.{name}.parallel=ddp")  # fmt: skip
