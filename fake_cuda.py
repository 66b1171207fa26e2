"""CUDA without a GPU: what a step does on one, done with tensors that have a shape, a type and a device, but no data.

    import fake_cuda; fake_cuda.pretend()        for the whole process, and before torch is imported
    with fake_cuda.Machine() as machine:         here device="cuda" works; where it meets the CPU, torch raises
        shard = ...
        machine.waits                            what a host would have waited for its GPU at: ["parallel.py:189 synchronize", ...]

Tensors are PyTorch's fake ones (FakeTensorMode), a process group is its fake one: everything is traced as on a GPU, kernels apart. A
CPU-only build lacks two things for it, somebody who says that CUDA is there and what the current stream is; fake_cuda.cpp is that
(C++ is compiled once, in some 6 s, into the user's cache folder). A build for CUDA has them.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import traceback
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "curtailed-training"
DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")  # the host needs to know first


NUM_GPUS = 8


class Unavailable(Exception):
    """There is no C++ compiler to build the stand-in with, or it fails."""


def pretend() -> None:
    """From now on torch takes CUDA for there, NUM_GPUS H100 of it, in this process. Raises Unavailable."""
    assert "torch" not in sys.modules, "torch has looked for CUDA already"
    folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    if not list((folder / "lib").glob("*torch_cuda*")):
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(folder / "lib" / name), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(_built(folder)))
    _replace()


def _built(torch_folder: Path) -> Path:
    source = HERE / "fake_cuda.cpp"
    version = (torch_folder / "version.py").read_bytes()
    path = CACHE / f"fake_cuda-{hashlib.sha256(version + source.read_bytes()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        words = [os.environ.get("CXX", "c++"), "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(source)]
        try:
            done = subprocess.run([*words, "-o", str(new)], capture_output=True, text=True)
        except FileNotFoundError:
            raise Unavailable(f"no C++ compiler {words[0]!r}; install g++, or name one in CXX") from None
        if done.returncode:
            raise Unavailable(f"{words[0]} cannot build fake_cuda.cpp: {(done.stderr.splitlines() or ['?'])[0]}")
        new.replace(path)
    return path


def _replace() -> None:
    """What torch asks the driver, answered here; and what it does with data, left out."""
    import torch
    import torch._dynamo
    import torch.cuda.amp.common
    import torch.distributed as dist
    from torch import nn

    torch._dynamo.config.optimize_ddp = False  # it would trace the blocks once more, with tensors that it takes for others
    cuda = torch.cuda
    cuda.set_device, cuda.current_device, cuda.device_count = (lambda device: None), (lambda: 0), (lambda: NUM_GPUS)
    cuda.is_bf16_supported, cuda.get_device_capability = (lambda *_, **__: True), (lambda *_: (9, 0))
    cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.pin_memory, Machine.pinned = _pinning()
    torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")  # inductor's, but for the kernels
    nn.functional.scaled_dot_product_attention = _attention(nn.functional.scaled_dot_product_attention)
    nn.Module._apply = _apply
    dist.init_process_group = lambda *_, **__: None  # Machine has made it
    dist.new_group = lambda *_, **__: dist.group.WORLD
    nn.parallel.DistributedDataParallel = _ddp()


def _pinning():
    """pin(tensor), and pinned: the storages that stay where they are in the host's memory, so that a GPU copies from them by itself."""
    from torch.utils.weak import WeakIdKeyDictionary

    pinned = WeakIdKeyDictionary()

    def pin(tensor):
        pinned[tensor.untyped_storage()] = True
        return tensor

    return pin, pinned


def _attention(on_cpu):
    """The kernel that CUDA would take: a CPU-only build takes the plain one for it, which keeps all probabilities."""
    import torch

    def attention(q, k, v, is_causal: bool = False, enable_gqa: bool = False):
        if q.device.type == "cpu":
            return on_cpu(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)
        if enable_gqa:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        if q.dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad, 0.0, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    return attention


def _apply(module, change, recurse: bool = True):
    """nn.Module's, that swaps a fake parameter for another one in place, and cannot where anyone has an eye on it."""
    import torch

    with torch.no_grad():
        for part in module.modules() if recurse else [module]:
            for name, p in part._parameters.items():
                if p is not None and (changed := change(p.detach())).device != p.device:
                    part._parameters[name] = torch.nn.Parameter(changed, requires_grad=p.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = change(buffer)
    return module


def _ddp():
    """DistributedDataParallel whose reducer never looks into a tensor: the fake process group gives it no gradients back, and what it
    orders its buckets anew by is data."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    class Blind:
        """A reducer, or what keeps its times."""

        def __init__(self, real):
            self.real = real

        def __getattr__(self, name: str):
            return getattr(self.real, name)

        def _rebuild_buckets(self) -> bool:
            return False

        def set_runtime_stats_and_log(self) -> None:
            pass

    def reduced(state, bucket) -> torch.futures.Future[torch.Tensor]:
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    class Fake(DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, reduced)
            self.reducer, self.logger = Blind(self.reducer), Blind(self.logger)

    return Fake


class Machine:
    """A machine with `ranks` GPUs, seen from its first one. waits: every place at which the host has waited for it."""

    def __init__(self, ranks: int = 1):
        self.ranks, self.waits = ranks, []

    def __enter__(self) -> "Machine":
        import torch
        import torch.distributed as dist
        import torch.distributed.device_mesh
        from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
        from torch.distributed.distributed_c10d import init_process_group
        from torch.fx.experimental.symbolic_shapes import ShapeEnv
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if self.ranks > 1:
            init_process_group("fake", store=FakeStore(), rank=0, world_size=self.ranks)
        make_mesh = torch.distributed.device_mesh.init_device_mesh

        def mesh(*args, **kwargs):
            with unset_fake_temporarily():  # it is a tensor itself, whose numbers are read
                return make_mesh(*args, **kwargs)

        torch.distributed.device_mesh.init_device_mesh = mesh
        torch.cuda.synchronize = lambda device=None: self.wait("synchronize")
        torch.cuda.Stream = torch.cuda.Event = partial(Stream, self)
        torch.cuda.current_stream = lambda device=None: Stream(self)
        torch.cuda.stream = lambda stream: nullcontext(stream)
        self._open = ExitStack()
        numbers = ShapeEnv()  # .item() gives one that nobody knows, and nonzero a size: noted, not refused
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=numbers, static_shapes=True)  # the corpus's rows are real
        self._open.enter_context(fake)
        self._open.enter_context(_watch()(self))
        if self.ranks > 1:
            self._open.callback(dist.destroy_process_group)
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def wait(self, what: str) -> None:
        ours = [f for f in traceback.extract_stack() if Path(f.filename).parent == HERE and Path(f.filename).name != Path(__file__).name]
        self.waits.append(f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {what}" if ours else what)


class Stream:
    """A stream, or an event on it: what is queued on one waits for another one, and no host for either but in synchronize."""

    def __init__(self, machine: Machine, *_, **__):
        self.machine = machine

    def synchronize(self) -> None:
        self.machine.wait("synchronize")

    def queue(self, *_, **__) -> "Stream":
        return self

    wait = wait_stream = wait_event = record = record_event = queue


def _watch():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        """Sees every operation, and notes those at which the host waits."""

        def __init__(self, machine: Machine):
            super().__init__()
            self.machine = machine

        @classmethod
        def is_infra_mode(cls) -> bool:
            return True  # torch.compile may trace what it sees

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = operation._schema.name.removeprefix("aten::")
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if name in DATA_DEPENDENT and tensors and tensors[0].device.type == "cuda":
                self.machine.wait(name)
            elif name in ("_to_copy", "copy_"):
                self._copy(name, tensors, args, kwargs)
            out = operation(*args, **kwargs)
            if kwargs.get("pin_memory"):
                out.pin_memory()
            return out

        def _copy(self, name: str, tensors: list, args: tuple, kwargs: dict) -> None:
            source = tensors[-1]
            target = tensors[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if {source.device.type, target.type} != {"cpu", "cuda"}:
                return
            if source.device.type == "cuda":
                self.machine.wait("copy to the CPU")
            elif blocks or source.untyped_storage() not in self.machine.pinned:
                self.machine.wait("copy from the CPU" + ("" if blocks else ", not pinned"))

    return Watch


def tracker():
    """A MemTracker (torch.distributed._tools) that asks no modules: what torch.compile has traced has none."""
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    class Modules:
        parents: frozenset = frozenset()

        @property
        def is_bw(self) -> bool:
            return torch._C._current_graph_task_id() != -1

        def nothing(self, *_, **__):
            return self

        register_user_hooks = clear_user_hooks = __enter__ = __exit__ = nothing

    class Tracker(MemTracker):
        def __init__(self):
            super().__init__()
            self._mod_tracker = Modules()

        @classmethod
        def is_infra_mode(cls) -> bool:
            return True

    return Tracker()
