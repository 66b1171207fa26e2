"""What this machine has, what a config needs, and what of it will hurt: before a run, not in the middle of one.

    python doctor.py                                     the machine alone
    python launch.py doctor configs/demo.yaml            all sites here, as launch.py starts them
    python launch.py doctor configs/d20.yaml site=texas  one site of a run whose others are elsewhere
    python launch.py doctor configs/d20.yaml --head      the head node of such a run

Every finding is one line with its remedy. "stops": it cannot run here as it is, and the exit code is 1; "hurts": it can, slower or on
thinner ice. `look` gathers the facts and `findings` judges them: it reads nothing but those and the config.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

import config
import data
import devices
import footprint
from coordinator import open_files
from model import GPT, num_params, shape_of

OLDEST_TORCH = (2, 11)
PROCESS_BYTES = 0.5e9  # libraries of one of our processes
SITE_VECTORS, HEAD_VECTORS = 5, 4  # fp32 copies of the parameters that rank 0 of a site, and the head node, hold at most
TEXT_BYTES, TOKEN_BYTES = 4.8, 2  # of a token, on disk
STATES = 2  # of theta and m, that the head node keeps


class Finding(NamedTuple):
    stops: bool
    what: str
    remedy: str


@dataclass(frozen=True)
class Machine:
    """Facts. Bytes, and of GPUs their names and bytes."""

    processor: str
    cores: int  # that this process may use
    instructions: str
    bfloat16: bool  # multiplied in hardware
    memory: int
    free_memory: int
    gpus: tuple[tuple[str, int], ...]
    open_files: int  # that a process may have; -1: as many as it likes
    addresses: dict[str, str]  # interface -> its first IPv4 address
    clock_in_step: bool | None  # with the world's; None: not known
    compiler: bool  # of C++
    python: str
    torch: str
    free_disk: int  # of the working folder, where runs/ and data/ are


def look() -> Machine:
    cpu, memory = torch.device("cpu"), psutil.virtual_memory()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    addresses = {name: next((a.address for a in all_ if a.family == socket.AF_INET), "") for name, all_ in psutil.net_if_addrs().items()}
    return Machine(
        processor=processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        instructions=torch.backends.cpu.get_cpu_capability(),
        bfloat16=devices.multiplies_bfloat16(cpu),
        memory=memory.total,
        free_memory=memory.available,
        gpus=tuple((gpu.name, gpu.total_memory) for gpu in gpus),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        addresses={name: address for name, address in addresses.items() if address},
        clock_in_step=clock_in_step(),
        compiler=shutil.which(os.environ.get("CXX", "c++")) is not None,
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        free_disk=shutil.disk_usage(".").free,
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def clock_in_step() -> bool | None:
    """What systemd says of it."""
    try:
        command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"yes": True, "no": False}.get(said)


def findings(cfg, here: Machine, head: bool = False) -> list[Finding]:
    """What stops or hurts on this machine: one site of this config (site=), its head node (head), or that and all sites (only=)."""
    names = [] if head else [cfg.site] if cfg.site else list(cfg.only or cfg.sites)
    sites = {name: cfg.sites[name] for name in names}
    alone = cfg.site is not None and not head  # others, and the head node, are elsewhere
    parts = (_versions(here), _devices(cfg, sites, here), _corpus(cfg, here), _room(cfg, sites, alone, here),
             _gpu_memory(cfg, sites, here), [] if alone else _head(cfg, here), _clock(cfg, alone, here))  # fmt: skip
    return sorted((f for part in parts for f in part), key=lambda f: not f.stops)


def _versions(here: Machine) -> list[Finding]:
    found = tuple(int(n) for n in here.torch.split("+")[0].split(".")[:2])
    if found >= OLDEST_TORCH:
        return []
    oldest = ".".join(map(str, OLDEST_TORCH))
    return [Finding(True, f"torch {here.torch} is older than {oldest}", "pip install -r requirements.txt")]


def _devices(cfg, sites: dict, here: Machine) -> list[Finding]:
    out, on_cpu = [], {name: s for name, s in sites.items() if s.device == "cpu"}
    for name, s in sites.items():
        ranks = config.num_ranks(s)
        if s.device != "cpu" and not here.gpus:
            out.append(Finding(True, f"sites.{name}.device={s.device}, and torch sees no GPU", f"a GPU, or sites.{name}.device=cpu"))
        elif s.device != "cpu" and ranks > len(here.gpus):
            out.append(Finding(True, f"sites.{name}.ranks={ranks}, and torch sees {several(len(here.gpus), 'GPU')}",
                               f"sites.{name}.ranks={len(here.gpus)}, or further nodes (torchrun --nnodes)"))  # fmt: skip
    if cfg.model.compile and sites and not here.compiler:
        out.append(Finding(True, "model.compile=true, and there is no C++ compiler", "install g++, or model.compile=false"))
    if on_cpu and cfg.model.dtype == "bfloat16" and not here.bfloat16:
        out.append(Finding(False, "model.dtype=bfloat16, which this processor multiplies five times as slowly as float32",
                           "model.dtype=auto"))  # fmt: skip
    busy = sum(config.num_ranks(s) * (s.threads_federated if len(sites) > 1 else s.threads_local) for s in on_cpu.values())
    if busy > here.cores:
        many = f"{len(on_cpu)} sites train" if len(on_cpu) > 1 else "the site trains"
        out.append(Finding(False, f"{many} with {busy} threads on {several(here.cores, 'core')}: "
                           f"together they take {busy / here.cores:.1f} times as long",
                           "fewer sites at once (only=), fewer threads or ranks, or more cores"))  # fmt: skip
    return out


def _corpus(cfg, here: Machine) -> list[Finding]:
    if data.read_meta(data.tokens_dir(cfg)) or not data.hub_dataset(cfg):
        return []  # there, or made in seconds
    need = cfg.budget.tokens * (TEXT_BYTES + TOKEN_BYTES)
    out = [Finding(True, f"data.source={cfg.data.source} is not prepared in data.dir={cfg.data.dir}", "python data.py prepare CONFIG")]
    if need > here.free_disk and not Path(cfg.data.dir).is_absolute():
        out.append(Finding(True, f"its text and tokens take about {need / 1e9:,.0f} GB, {here.free_disk / 1e9:,.0f} GB are free",
                           "another disk (data.dir=PATH), or fewer data.shards"))  # fmt: skip
    return out


def _room(cfg, sites: dict, alone: bool, here: Machine) -> list[Finding]:
    with torch.device("meta"):
        vector = 4 * num_params(GPT(shape_of(cfg.model, data.vocabulary(cfg))))
    memory = sum(config.num_ranks(s) * PROCESS_BYTES + SITE_VECTORS * vector for s in sites.values())
    memory += sum(config.num_ranks(s) * 3 * vector for s in sites.values() if s.device == "cpu")  # gradients, inner optimizer
    disk = len(sites) * 2 * 2 * vector  # inner optimizers of two rounds
    if not alone:
        memory, disk = memory + PROCESS_BYTES + HEAD_VECTORS * vector, disk + STATES * 2 * vector
    out = []
    if memory > here.free_memory:
        out.append(Finding(memory > here.memory, f"it takes at least {memory / 1e9:.1f} GB of memory, {here.free_memory / 1e9:.1f} of "
                           f"{here.memory / 1e9:.1f} GB are free", "fewer sites on this machine (only=), or a smaller model"))  # fmt: skip
    if disk > here.free_disk:
        out.append(Finding(True, f"runs/{cfg.run} takes up to {disk / 1e9:.1f} GB, {here.free_disk / 1e9:.1f} GB are free",
                           "run it from a folder on another disk"))  # fmt: skip
    return out


def _gpu_memory(cfg, sites: dict, here: Machine) -> list[Finding]:
    """By a step that is computed (footprint.py): half a minute for d20."""
    out = []
    for name, s in sites.items():
        if s.device == "cpu" or not here.gpus:
            continue
        gpu_gb = min(count for _, count in here.gpus) / 1e9
        one = footprint.of_config(cfg, name, config.num_ranks(s), gpu_gb)
        fits, need_gb = one["fits"][repr(gpu_gb)], (one["peak_bytes"] + footprint.RESERVE) / 1e9
        key = f"sites.{name}.device_batch"
        if fits is None:
            out.append(Finding(True, f"not one row of a step fits the {gpu_gb:.0f} GB of a GPU here",
                               f"more ranks with sites.{name}.parallel=fsdp, or sites.{name}.checkpointing=true"))  # fmt: skip
        elif s.device_batch != "auto" and need_gb > gpu_gb:
            out.append(
                Finding(True, f"{key}={one['device_batch']} takes {need_gb:.0f} GB of a GPU's {gpu_gb:.0f}", f"{key}={fits}, or auto")
            )
    return out


def _head(cfg, here: Machine) -> list[Finding]:
    out, (host, port), need = [], (cfg.sync.host, cfg.sync.port), open_files(len(cfg.sites))
    if 0 <= here.open_files < need:
        out.append(Finding(True, f"{len(cfg.sites)} sites need {need} open files at the head node, this system allows {here.open_files}",
                           "raise it (ulimit -Hn), or fewer sites"))  # fmt: skip
    if host not in config.LOOPBACK and not (config.run_dir(cfg) / "keys").exists():
        out.append(Finding(True, f"sync.host={host} is not loopback, and there are no keys", "python coordinator.py keys CONFIG"))
    if host not in config.LOOPBACK and host[:1].isdigit() and host not in here.addresses.values():
        known = ", ".join(f"{address} ({name})" for name, address in here.addresses.items())
        out.append(Finding(False, f"sync.host={host} is no address of this machine, which has {known}",
                           "start the head node there, or listen at one of these"))  # fmt: skip
    if port and host in (*config.LOOPBACK, *here.addresses.values()):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                out.append(Finding(True, f"sync.port={port}: {error.strerror}", "stop what holds it, or another port"))
    return out


def _clock(cfg, alone: bool, here: Machine) -> list[Finding]:
    if cfg.clock.mode != "wall" or here.clock_in_step is not False:
        return []
    whose = "the site's log is" if alone else "windows are"
    return [Finding(False, f"this machine's clock is not synchronised: {whose} off by as much", "timedatectl set-ntp true, or chrony")]


def several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def describe(here: Machine) -> str:
    gpus = ", ".join(f"{name} ({count / 1e9:.0f} GB)" for name, count in here.gpus) or "none that torch sees"
    bf16 = "bfloat16 in hardware" if here.bfloat16 else "no bfloat16 in hardware: float32"
    clock = {True: "synchronised", False: "not synchronised", None: "not known whether synchronised"}[here.clock_in_step]
    cores, compiler = several(here.cores, "core"), "a C++ compiler" if here.compiler else "no C++ compiler"
    lines = {
        "processor": f"{here.processor}, {cores}, {here.instructions}, {bf16}",
        "GPUs": gpus,
        "memory": f"{here.free_memory / 1e9:.1f} of {here.memory / 1e9:.1f} GB free",
        "disk": f"{here.free_disk / 1e9:,.0f} GB free at {Path.cwd()}",
        "open files": "as many as it likes" if here.open_files < 0 else f"{here.open_files:,}",
        "addresses": ", ".join(f"{address} ({name})" for name, address in here.addresses.items()),
        "clock": clock,
        "versions": f"Python {here.python}, torch {here.torch}, {compiler}",
    }
    return "\n".join(f"{what:12} {value}" for what, value in lines.items())


def main(argv: list[str]) -> int:
    parser = config.Parser()
    parser.add_argument("config", nargs="*", help="CONFIG [key=value ...]")
    parser.add_argument("--head", action="store_true", help="of the head node alone: its sites are elsewhere")
    args = parser.parse_intermixed_args(argv)
    cfg, here = config.load(args.config) if args.config else None, look()
    print(describe(here))
    if cfg is None:
        return config.EXIT_DONE
    found = findings(cfg, here, args.head)
    for finding in found:
        print(f"{'stops' if finding.stops else 'hurts':12} {finding.what} -> {finding.remedy}")
    if not found:
        print(f"{'ready':12} nothing of {args.config[0]} will hurt here")
    sys.stdout.flush()
    return config.EXIT_FAILED if any(finding.stops for finding in found) else config.EXIT_DONE


if __name__ == "__main__":
    config.command(main, parses=True)
