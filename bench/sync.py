"""What a sync costs: the real coordinator, sites and protocol, with a model of any size that is never trained.

    python bench/sync.py --params 124e6 --sites 2 --wire fp32                   on loopback
    python bench/sync.py --params 124e6 --rate 1gbit --wire int8                on links of 1 Gbit/s (Linux, root)
    python bench/sync.py --params 124e6 --ranks 1,2,4                           sites of so many ranks (torchrun), one after the other
    python bench/sync.py --params 124e6 --flower                                beside Flower, same payload, same machine

Each site is `train.py` whose step only moves its parameters a little; a round is one such step, begun once the state
before it is stored, so that what runs in the background is over. The stall is that of every run: from the freeze to
the next round's first step. After the rounds, the same processes measure the parts a sync cannot do without, all sites
at the same time: a bare gloo all-reduce of the parameters, one pass for the delta, the outer step, one digest.

--rate puts every site into a network namespace of its own, behind a veth pair whose both ends are limited by `tc tbf`,
and removes all that afterwards. Threads: one per rank. Memory: the peak of a rank's process over its fp32 parameters.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # not bench/: `sync` is the one at the top

import numpy as np  # noqa: E402
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import config  # noqa: E402
import sync  # noqa: E402
import wire  # noqa: E402

TOKENS = 128  # of a step: nothing is trained
PARTS = 5  # measurements of each part


# ---------------------------------------------------------------------------------------------------------------------
# Inside the processes


def as_site(out: Path, rounds: int, argv: list[str]) -> None:
    """train.py, but for its steps."""
    import replica
    import shard
    import train

    records, full = [], []  # full: rounds that all sites were members of
    spent = dict.fromkeys(("freeze", "average", "apply", "write"), 0.0)  # seconds of the last sync in each
    if rank := int(os.environ.get("RANK", 0)):
        end = shard.TOGETHER["end"]
        shard.TOGETHER["end"] = lambda *args: (Path(f"{out}.{rank}").write_text(json.dumps(peak_bytes())), end(*args))

    def step(site, plan, batch) -> torch.Tensor:
        a, r = site.replica.averager, site.replica
        if full and plan.done == 0:
            stall_s = time.monotonic() - site.frozen_at - site.excused_s
            records.append(spent | {"stall_s": stall_s, "bytes": a.sent_bytes, "bytes_per_s": a.rate, "wire": a.wire})
        if plan.splits < len(site.cfg.sites):  # still waiting for the others
            time.sleep(0.5)
            return torch.tensor(1.0)
        full.append(r.round)
        if len(full) > rounds:
            out.write_text(json.dumps({"rounds": records, "peak_bytes": peak_bytes()} | parts_of(site)))
            raise train.Over("measured", config.EXIT_DONE)
        manifest = config.run_dir(site.cfg) / "state" / "manifest.json"
        while max(s["round"] for s in json.loads(manifest.read_text())["states"]) < r.round:
            time.sleep(0.05)
        r.settle()
        r.theta_i.mul_(1.0 - 1e-3 * (1 + list(site.cfg.sites).index(site.name)))
        return torch.tensor(1.0)

    train.Site.inner_step = step
    for name in ("freeze", "average", "apply"):
        timed(replica.Replica, name, spent)
    timed(shard.Shard, "write", spent)  # theta to all ranks, at the end of `apply`
    sys.argv = ["train.py", *argv]
    train.die_with_parent()
    config.command(train.main)


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(owner, name: str, spent: dict[str, float]) -> None:
    """Keep how long the last call of a method took."""
    plain = getattr(owner, name)

    def wrapped(*args, **kwargs):
        began = time.monotonic()
        result = plain(*args, **kwargs)
        spent[name] = time.monotonic() - began
        return result

    setattr(owner, name, wrapped)


def parts_of(site) -> dict:
    """Seconds of what a sync cannot do without, as medians; all sites measure at the same time."""
    from channel import ChannelStore

    a, r, names = site.replica.averager, site.replica, list(site.cfg.sites)
    store = ChannelStore(site.link, "parts", 120.0)
    group = sync.ring_group(store, names.index(site.name), len(names), site.cfg.sync.interface, 600.0)
    buffer = a.agreed.view(torch.float32)[: r.theta.numel()] if a.wire == "fp32" else r.theta_i
    r.theta_i.copy_(r.theta)

    def seconds(work) -> float:
        taken = []
        for _ in range(PARTS):
            group.barrier().wait()
            began = time.monotonic()
            work()
            taken.append(time.monotonic() - began)
            if sum(taken) > 20:
                break
        return float(np.median(taken))

    return {
        "delta_pass_s": seconds(lambda: sync.weighted_delta(r.theta, r.theta_i, 0.5, buffer)),
        "bare_allreduce_s": seconds(lambda: group.allreduce([buffer]).wait()),
        "outer_step_s": seconds(lambda: sync.outer_step_(r.theta, r.m, buffer, *r._outer)),
        "digest_s": seconds(lambda: sync.digest(a.agreed)),
    }


def as_coordinator(out: Path, argv: list[str]) -> None:
    """coordinator.py, which notes how far apart the heartbeats of each site come in."""
    import channel
    import coordinator
    import train

    heard, gaps, plain = {}, {}, channel.Hub._on_heartbeat

    def listen(hub, site, *args):
        now = time.monotonic()
        if site in heard:
            gaps.setdefault(site, []).append(now - heard[site])
        heard[site] = now
        plain(hub, site, *args)

    channel.Hub._on_heartbeat = listen
    train.die_with_parent()
    atexit.register(lambda: out.write_text(json.dumps(gaps)))
    sys.argv = ["coordinator.py", *argv]
    config.command(coordinator.main)


# ---------------------------------------------------------------------------------------------------------------------
# Around them


class Links:
    """Network namespaces: one with a bridge for the head node, one per site, each site's link limited both ways."""

    def __init__(self, rate: str, sites: int):
        if sys.platform != "linux" or os.geteuid() != 0:
            raise config.BadInput(f"--rate {rate}: needs root on Linux (network namespaces); leave it away to measure on loopback")
        self.names = [f"curtail-{os.getpid()}-{n}" for n in ("head", *range(sites))]
        burst = str(max(131072, int(bits_per_s(rate) / 8 / 100)))
        limit = ["tbf", "rate", rate, "burst", burst, "latency", "50ms"]
        head, *others = self.names
        try:
            for name in self.names:
                self._do("ip", "netns", "add", name)
                self._do("ip", "-n", name, "link", "set", "lo", "up")
            self._do("ip", "-n", head, "link", "add", "sync0", "type", "bridge")
            self._do("ip", "-n", head, "addr", "add", "10.77.0.1/24", "dev", "sync0")
            self._do("ip", "-n", head, "link", "set", "sync0", "up")
            for i, name in enumerate(others):
                self._do("ip", "-n", head, "link", "add", f"site{i}", "type", "veth", "peer", "name", "sync0", "netns", name)
                self._do("ip", "-n", head, "link", "set", f"site{i}", "master", "sync0", "up")
                self._do("ip", "-n", name, "addr", "add", f"10.77.0.{10 + i}/24", "dev", "sync0")
                self._do("ip", "-n", name, "link", "set", "sync0", "up")
                self._do("tc", "-n", head, "qdisc", "add", "dev", f"site{i}", "root", *limit)
                self._do("tc", "-n", name, "qdisc", "add", "dev", "sync0", "root", *limit)
        except BaseException:
            self.close()
            raise

    def _do(self, *argv: str) -> None:
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise config.BadInput(f"{' '.join(argv)}: {done.stderr.strip()}; --rate needs iproute2 and network namespaces")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def bits_per_s(rate: str) -> float:
    """1gbit, 100mbit, 10mbit -> bits per second."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise config.BadInput(f"--rate {rate}: say it like 1gbit, 100mbit or 10mbit")


def shape(params: float) -> dict:
    """Depth and width of a model of about so many parameters."""
    width = next((w for w in (128, 256, 384, 512, 768, 1024, 1280, 1536) if params / (12 * w * w) < 1.2 * w / 64), 1536)
    return {"depth": max(1, round((params - 512 * width) / (12 * width * width))), "width": width, "heads": width // 128, "seq_len": 32}


def write_config(folder: Path, args, ranks: int) -> list[str]:
    names = [f"site{i}" for i in range(args.sites)]
    (folder / "trace.csv").write_text("time,grid\n2026-01-01T00:00:00Z,0\n2026-01-02T00:00:00Z,0\n")
    network = {"host": "10.77.0.1", "interface": "sync0", "trusted_network": True} if args.rate else {}
    OmegaConf.save({
        "run": "sync", "clock": {"mode": "wall", "start": "2026-01-01T00:00:00Z"},
        "budget": {"tokens": TOKENS * 100_000}, "model": shape(args.params),
        "data": {"source": str(REPO / "tests"), "dir": str(folder / "data"), "tokens_per_step": TOKENS, "val_tokens": 1024},
        "rounds": {"train_s": args.train_s, "max_steps": 1, "sync_s": 1.0, "grace_s": 600.0, "outer": args.outer,
                   "outer_lr": 0.7, "outer_momentum": 0.9},
        "policy": {"name": "always"}, "carbon": {"trace": str(folder / "trace.csv"), "max_gap_s": 86400.0},
        "sync": {"wire": args.wire, "topology": args.topology, "chunk_mb": args.chunk_mb, "dead_s": 30.0} | network,
        "sites": {n: {"region": "grid", "tokens_per_s": 1000.0, "idle_kw": 0.1, "train_kw": 0.1, "threads_local": 1, "ranks": ranks}
                  for n in names},
        "eval": {"every_rounds": 0}, "wandb": {"mode": "disabled"}, "log": {"every_steps": 1},
    }, folder / "config.yaml")  # fmt: skip
    return names


def measure(args, folder: Path, ranks: int) -> dict:
    """One run in a scratch folder -> what the sites and the coordinator measured."""
    names, launcher = write_config(folder, args, ranks), [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    links = Links(args.rate, args.sites) if args.rate else None
    processes: list[subprocess.Popen] = []
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def start(name: str, where: int, *argv: str) -> subprocess.Popen:
        inside = ["ip", "netns", "exec", links.names[where]] if links else []
        program = [*(launcher if argv[0] == "--site" else [sys.executable]), __file__]
        with open(folder / f"{name}.log", "w") as log:
            process = subprocess.Popen([*inside, *program, *argv], cwd=folder, env=env, stdout=log,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        processes.append(process)
        return process

    try:
        subprocess.run(
            [sys.executable, str(REPO / "coordinator.py"), "keys", "config.yaml"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        head = start("coordinator", 0, "--coordinator", "coordinator.json", "config.yaml")
        outs = {name: folder / f"{name}.json" for name in names}
        sites = [start(n, 1 + i, "--site", f"{n}.json", str(args.rounds), "config.yaml", f"site={n}") for i, n in enumerate(names)]
        until = time.monotonic() + args.timeout_s
        while any(s.poll() is None for s in sites) and time.monotonic() < until and head.poll() is None:
            time.sleep(0.2)
        head.terminate()
        head.wait(60)
        if not all(path.exists() for path in outs.values()):
            said = "\n".join((folder / f"{n}.log").read_text()[-1500:] for n in ("coordinator", *names))
            raise RuntimeError(f"the sites have not finished within --timeout-s {args.timeout_s:g}:\n{said}")
        log = (folder / "coordinator.log").read_text()
        return {
            "sites": [json.loads(path.read_text()) for path in outs.values()],
            "followers": [json.loads(Path(f"{path}.{rank}").read_text()) for path in outs.values() for rank in range(1, ranks)],
            "gaps": json.loads((folder / "coordinator.json").read_text()),
            "auto": [line.split("|", 1)[1].strip() for line in log.splitlines() if line.startswith("wire ")],
        }
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        if links:
            links.close()


def report(args, found: dict, ranks: int) -> dict:
    """The numbers of a run. Stalls: over all rounds and sites but the first round."""
    sites = found["sites"]
    kept = [r for s in sites for r in s["rounds"][1:]]
    stalls = [r["stall_s"] for r in kept]
    part = {name: max(s[name] for s in sites) for name in ("bare_allreduce_s", "delta_pass_s", "outer_step_s", "digest_s")}
    with torch.device("meta"):
        from model import GPT, Shape, num_params

        s = shape(args.params)
        params = num_params(GPT(Shape(s["depth"], s["width"], s["heads"], s["heads"], s["seq_len"], 257)))
    p50, payload = float(np.percentile(stalls, 50)), 4 * params
    gaps = [g for site in found["gaps"].values() for g in site]
    out = {
        "params": params, "sites": args.sites, "ranks": ranks, "wire": kept[-1]["wire"], "topology": args.topology, "rate": args.rate,
        "outer": args.outer, "chunk_mb": args.chunk_mb, "rounds": len(sites[0]["rounds"]) - 1,
        "stall_s": {"p50": p50, "p95": float(np.percentile(stalls, 95)), "all": [round(x, 4) for x in stalls]},
        **part, "parts_s": sum(part.values()), "stall_over_parts": p50 / sum(part.values()),
        "spent_s": {name: float(np.median([r[name] for r in kept])) for name in ("freeze", "average", "apply", "write")},
        "bytes": max(r["bytes"] for r in kept), "gb_per_s": payload / p50 / 1e9,
        "peak_memory": max(s["peak_bytes"] for s in sites) / payload,
        "peak_memory_other_ranks": max(found["followers"]) / payload if ranks > 1 else None,
        "heartbeat_gap_s": {"p50": float(np.median(gaps)), "max": max(gaps), "due": 2.0} if gaps else None, "auto": found["auto"],
    }  # fmt: skip
    if args.rate:
        out["wire_s"] = 8 * out["bytes"] / bits_per_s(args.rate)
        out["stall_over_wire"] = p50 / out["wire_s"]
        out["link_share"] = out["wire_s"] / p50
    return out


def stall_ratio(several: dict, one: dict) -> float:
    """A stall over that of sites of one rank plus the time in which theta goes to the ranks."""
    return several["stall_s"]["p50"] / (one["stall_s"]["p50"] + several["spent_s"]["write"] - one["spent_s"]["write"])


def lines(r: dict) -> str:
    s, h, spent = r["stall_s"], r["heartbeat_gap_s"], r["spent_s"]
    where = f"links of {r['rate']}" if r["rate"] else "loopback"
    rows = [
        f"{r['params'] / 1e6:,.0f} M parameters, {r['sites']} sites of {r['ranks']} rank(s), {r['wire']}, {r['topology']}, "
        f"outer {r['outer']}, {where}, {r['rounds']} rounds",
        f"  stall                 p50 {s['p50']:.3f} s, p95 {s['p95']:.3f} s, {r['gb_per_s']:.2f} GB/s of fp32 parameters",
        f"  parts                 {r['parts_s']:.3f} s: bare all-reduce {r['bare_allreduce_s']:.3f}, delta {r['delta_pass_s']:.3f}, "
        f"outer step {r['outer_step_s']:.3f}, digest {r['digest_s']:.3f}",
        f"  stall over parts      {r['stall_over_parts']:.2f}",
        f"  of the stall          average {spent['average']:.3f} s, apply {spent['apply']:.3f} (theta to the ranks "
        f"{spent['write']:.3f}), check of theta_i {spent['freeze']:.3f}",
        f"  sent by a site        {r['bytes'] / 1e6:,.1f} MB",
        f"  peak memory           {r['peak_memory']:.2f} x the fp32 parameters"
        + (f" at rank 0, {r['peak_memory_other_ranks']:.2f} x at the others" if r["ranks"] > 1 else ""),
    ]
    if r["rate"]:
        rows.append(f"  time on the wire      {r['wire_s']:.3f} s; stall over it {r['stall_over_wire']:.3f}, "
                    f"share of the link {100 * r['link_share']:.0f} %")  # fmt: skip
    if h:
        rows.append(f"  heartbeats            every {h['p50']:.2f} s, at most {h['max']:.2f} s apart; due every {h['due']:g} s")
    rows += [f"  wire                  {line}" for line in r["auto"]]
    for n, each in r.get("by_ranks", {}).items():
        rows.append(f"  {n} rank(s)             stall {each['stall_s']['p50']:.3f} s, {each['stall_ratio']:.2f} x that of the first "
                    f"plus {each['spent_s']['write']:.3f} s for theta to the ranks")  # fmt: skip
    for name, share in r.get("goodput", {}).items():
        rows.append(f"  goodput               {100 * share:.1f} % on the paper's timeline {name}")
    if f := r.get("flower"):
        rows.append(f"  Flower, a round       p50 {f['p50_s']:.1f} s: {f['p50_s'] / s['p50']:.0f} x the stall")
    return "\n".join(rows)


def goodput(sync_s: float) -> dict[str, float]:
    """Training time over up time on the paper's day: by its own protocol, and by ours with what a sync was measured to cost."""
    import simulate

    runs = {
        "by its own protocol (130 s a round)": ("paper", []),
        f"by ours ({sync_s:.2f} s a round)": ("ours", [f"rounds.sync_s={sync_s}"]),
    }
    trace = f"carbon.trace={REPO / 'traces/paper_day.csv'}"
    return {
        name: simulate.simulate(config.load([str(REPO / f"configs/{c}.yaml"), trace, *more]))["goodput"] for name, (c, more) in runs.items()
    }


def flower(args, params: int) -> dict:
    done = subprocess.run([sys.executable, str(REPO / "bench/flower/run.py"), "echo", "--params", str(params), "--sites", str(args.sites),
                           "--rounds", str(args.flower_rounds), "--json"], stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return json.loads(done.stdout)


def main(argv: list[str]) -> int:
    parser = config.Parser()
    parser.add_argument("--params", type=float, default=124e6)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--ranks", default="1", help="of each site, e.g. 2, or 1,2,4 one after the other")
    parser.add_argument("--wire", choices=[*wire.FORMATS, "auto"], default="fp32")
    parser.add_argument("--topology", choices=["ring", "star"], default="ring")
    parser.add_argument("--outer", choices=["none", "nesterov"], default="none")
    parser.add_argument("--rate", help="limit each site's link, e.g. 1gbit (Linux, root)")
    parser.add_argument("--rounds", type=int, default=6, help="the first is left out")
    parser.add_argument("--chunk-mb", type=int, default=16)
    parser.add_argument("--train-s", type=float, default=600.0, help="rounds.train_s, which `auto` looks at")
    parser.add_argument("--timeout-s", type=float, default=1500.0)
    parser.add_argument("--goodput", action="store_true", help="also simulate the paper's day with this stall")
    parser.add_argument("--flower", action="store_true", help="also Flower, clients that only echo")
    parser.add_argument("--flower-rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.rate:
        bits_per_s(args.rate)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(config.EXIT_FAILED))  # by way of every `finally`
    if args.sites < 2 or args.rounds < 2:
        raise config.BadInput(f"--sites {args.sites} --rounds {args.rounds}: both must be >= 2")
    if not all(n.isdigit() and int(n) > 0 for n in args.ranks.split(",")):
        raise config.BadInput(f"--ranks {args.ranks}: say it like 2, or 1,2,4")
    results = {}
    for ranks in map(int, args.ranks.split(",")):
        with tempfile.TemporaryDirectory(prefix="curtail-sync-") as folder:
            results[ranks] = report(args, measure(args, Path(folder), ranks), ranks)
    first, result = next(iter(results.values())), list(results.values())[-1]
    if len(results) > 1:
        if not args.json:
            print(*map(lines, list(results.values())[:-1]), sep="\n")
        result["by_ranks"] = {n: r | {"stall_ratio": stall_ratio(r, first)} for n, r in results.items()}
    if args.goodput:
        result["goodput"] = goodput(result["stall_s"]["p50"])
    if args.flower:
        result["flower"] = flower(args, result["params"])
    print(lines(result), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--site"]:
        as_site(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    elif sys.argv[1:2] == ["--coordinator"]:
        as_coordinator(Path(sys.argv[2]), sys.argv[3:])
    else:
        config.command(main, parses=True)
