"""The paper's design on Flower, to compare with: what a round costs, what it learns, whether its arithmetic is ours.

    python bench/flower/run.py echo --params 124e6 --sites 2 --rounds 4          seconds a round; sites send back what they got
    python bench/flower/run.py train CONFIG [key=value ...] --rounds 10          our model and data; --nesterov: outer 0.7 / 0.9
    python bench/flower/run.py parity                                            Flower's average and ours, bound 1e-6

Each with --json: one object on stdout; everything else goes to stderr. arXiv:2602.22760 is built on Flower; app/ is its
design as a Flower app: all parameters to every site, FedAvg weighted by micro-batches, model and inner optimizers new in
each round. A SuperLink and a SuperNode for each site run as real processes, in an environment of its own, .venv-flower, which
environments.py makes on first use; `train --here` runs the same app in one process without them. All addresses are loopback, all
that Flower writes is in a temporary folder, and nothing is left behind, whatever happens (kill -9 leaves that folder).
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO / "bench"))
import environments  # noqa: E402

APP = Path(__file__).resolve().parent / "app"
BOUND = 1e-6
TRIES = 3
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Lost(RuntimeError):
    """A SuperNode asked for a part of a message before the server app had pushed it. flwr 1.25.0's SuperLink then fails to
    count the traffic of zero bytes, the SuperNode gives the message up, and nobody sends it again: the run would hang."""


class Federation:
    """A SuperLink and a SuperNode for each site, with `run` to hand them the app. All they write is in `home`, which goes with
    them at the end of the `with` block."""

    def __init__(self, sites: int):
        self.bin, self.sites, self.processes = environments.make("flower"), sites, []

    def __enter__(self) -> "Federation":
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # what Flower's programs start comes to us when they die
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        self.folder = tempfile.TemporaryDirectory(prefix="curtail-flower-")
        self.home = Path(self.folder.name)
        self.log = open(self.home / "log", "w")
        # Flower makes ~/.flwr even with telemetry off, hence HOME; its programs find each other by PATH
        self.env = os.environ | {
            "HOME": str(self.home), "FLWR_HOME": str(self.home / "flwr"), "TMPDIR": str(self.home), "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return self

    def start(self, program: str, *argv: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [self.bin / program, *argv], env=self.env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            start_new_session=True, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, job: dict) -> dict:
        """The app's result. Raises RuntimeError if there is none, TimeoutError after the job's timeout_s."""
        app, file, result = self.home / "app", self.home / "job.json", self.home / "result.json"
        shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))  # `flwr run` writes into it
        file.write_text(json.dumps(job | {"result": str(result)}))
        until = time.monotonic() + job["timeout_s"]
        control, fleet, server_io, *client_io = [f"127.0.0.1:{port}" for port in free_ports(3 + self.sites)]
        self.start("flower-superlink", "--insecure", "--control-api-address", control, "--fleet-api-address", fleet,
                   "--serverappio-api-address", server_io)  # fmt: skip
        for site, address in enumerate(client_io):
            self.start("flower-supernode", "--insecure", "--superlink", fleet, "--clientappio-api-address", address,
                       "--node-config", f"site={site}")  # fmt: skip
        self.wait_for(lambda: listens(control), until)
        submit = self.start("flwr", "run", app, "local", "--federation-config", f'address="{control}"',
                            "--run-config", f'job="{file}"', "--stream")  # fmt: skip
        self.wait_for(lambda: result.exists() or submit.poll() is not None or self.lost(), until, but=submit)
        if self.lost() and not result.exists():
            raise Lost
        answer = json.loads(result.read_text()) if result.exists() else {"error": "the run ended without a result"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def lost(self) -> bool:
        return "Failed to receive message" in (self.home / "log").read_text(errors="replace")

    def wait_for(self, condition, until: float, but: subprocess.Popen | None = None) -> None:
        """Until the condition holds. Raises if a process other than `but` ends, or at the monotonic time `until`."""
        while not condition():
            for process in self.processes:
                if process is not but and process.poll() is not None:
                    raise RuntimeError(f"{Path(process.args[0]).name} ended with code {process.returncode}")
            if time.monotonic() > until:
                raise TimeoutError("no result within --timeout-s; give more")
            time.sleep(0.1)

    def __exit__(self, kind, error, trace) -> None:
        """Kill what we started and what that started (it shares our children's process groups), and see it gone."""
        before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}  # we are stopping
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
            with suppress(ChildProcessError):
                while True:
                    os.waitpid(-process.pid, 0)
        self.log.close()
        if error and not isinstance(error, (KeyboardInterrupt, SystemExit, Lost)):
            print((self.home / "log").read_text()[-6000:], file=sys.stderr)
        self.folder.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)


def through_flower(job: dict) -> dict:
    """The app's result, from as many runs as it takes to see one without a lost message; `lost_runs` counts the others."""
    for lost in range(TRIES):
        try:
            with Federation(job["sites"]) as flower:
                return flower.run(job) | {"lost_runs": lost}
        except Lost:
            print("run.py: a message was lost in a race of flwr's own, and with it the run; again", file=sys.stderr, flush=True)
        except (RuntimeError, TimeoutError) as error:
            sys.exit(f"run.py: {error}")
    sys.exit(f"run.py: {TRIES} runs lost a message each")


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as s:
        return s.connect_ex((host, int(port))) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Inside .venv-flower


def here(job: dict) -> dict:
    """The app's result with its sites called one after the other, without processes."""
    from client_app import app
    from flwr.app import Context, RecordDict
    from server_app import run

    class Grid:
        def get_node_ids(self) -> list[int]:
            return list(range(job["sites"]))

        def send_and_receive(self, messages, *, timeout=None) -> list:
            run_config = {"job": job["file"]}
            sites = [m.metadata.dst_node_id for m in messages]
            contexts = [Context(0, i, {"site": i}, RecordDict(), run_config) for i in sites]
            return [app(message, context) for message, context in zip(messages, contexts)]

    return run(Grid(), job)


def parity() -> dict:
    """Five rounds of three sites' random parameters and weights: the difference each round between our averaging (with each
    outer step) and Flower's own `aggregate_arrayrecords`, the one FedAvg calls (followed by torch's SGD, and by the app's
    Nesterov in numpy). rel: norm of the difference over the norm of the parameters; max: the same of the largest elements."""
    import numpy as np
    import torch
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    from server_app import nesterov
    from task import WEIGHT

    import sync

    torch.set_num_threads(1)
    shapes = {"embed": (256, 128), "fc": (512, 128), "proj": (128, 512), "scalars": (8,)}
    lr, beta, sites, rounds = 0.7, 0.9, 3, 5
    rng = np.random.default_rng(1)

    def flat(record: ArrayRecord) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([a.numpy().reshape(-1) for a in record.values()]))

    def draw(around: ArrayRecord | None, scale: float) -> ArrayRecord:
        noise = {k: scale * rng.standard_normal(shape, dtype=np.float32) for k, shape in shapes.items()}
        return ArrayRecord({k: Array(v if around is None else around[k].numpy() + v) for k, v in noise.items()})

    def difference(ours: torch.Tensor, theirs: torch.Tensor) -> dict:
        d = ours.double() - theirs.double()
        return {"rel": float(d.norm() / theirs.double().norm()), "max": float(d.abs().max() / theirs.abs().max())}

    out = {"plain": [], "nesterov, torch": [], "nesterov, numpy": []}
    start = draw(None, 0.1)
    theirs = dict.fromkeys(out, start)
    ours = {name: flat(start) for name in out}
    m = {name: torch.zeros_like(flat(start)) for name in out}
    momentum, parameter = {}, torch.nn.Parameter(flat(start))
    sgd = torch.optim.SGD([parameter], lr=lr, momentum=beta, nesterov=True)
    for _ in range(rounds):
        weights = rng.integers(1, 100, sites).tolist()
        for name in out:
            ends = [draw(theirs[name], 0.02) for _ in range(sites)]
            replies = [RecordDict({"arrays": e, "metrics": MetricRecord({WEIGHT: w})}) for e, w in zip(ends, weights)]
            average = aggregate_arrayrecords(replies, WEIGHT)
            delta = torch.zeros_like(ours[name])
            for end, weight in zip(ends, weights):
                delta += sync.weighted_delta(ours[name], flat(end), weight / sum(weights), torch.empty_like(delta))
            sync.outer_step_(ours[name], m[name], delta, "none" if name == "plain" else "nesterov", lr, beta)
            if name == "nesterov, torch":
                parameter.grad = parameter.detach() - flat(average)
                sgd.step()
                at = np.cumsum([0] + [int(np.prod(s)) for s in shapes.values()])
                pieces = zip(shapes.items(), at, at[1:])
                average = ArrayRecord({k: Array(parameter.detach()[a:b].view(s).numpy()) for (k, s), a, b in pieces})
            elif name == "nesterov, numpy":
                average = nesterov(theirs[name], average, momentum, lr, beta)
            theirs[name] = average
            out[name].append(difference(ours[name], flat(average)))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def inside(command: str, job: dict) -> dict:
    """parity or here, by .venv-flower's Python."""
    env = os.environ | {"PYTHONPATH": f"{REPO}:{APP}", "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="curtail-flower-") as home:
        file = Path(home) / "job.json"
        file.write_text(json.dumps(job | {"file": str(file)}))
        call = [environments.make("flower") / "python", __file__, "--inside", command, str(file)]
        done = subprocess.run(call, env=env | {"HOME": home, "TMPDIR": home}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"run.py: {command} failed with code {done.returncode}")
    return json.loads(done.stdout)


def load_config(argv: list[str], rounds: int):
    """The config, if the paper's protocol can do what it asks; else raises BadInput."""
    from config import BadInput, load, num_batches

    cfg = load(argv)
    r = cfg.rounds
    if r.max_steps is None or r.split_steps or r.inner_state != "reset" or r.lr_position != "own":
        raise BadInput("set rounds.max_steps=H rounds.split_steps=false rounds.inner_state=reset rounds.lr_position=own")
    if (need := rounds * len(cfg.sites) * r.max_steps) > num_batches(cfg):
        raise BadInput(f"--rounds {rounds}: {need} batches are more than the budget's {num_batches(cfg)}")
    return cfg


def main(argv: list[str]) -> int:
    if argv[:1] == ["--inside"]:
        job = json.loads(Path(argv[2]).read_text())
        print(json.dumps(parity() if argv[1] == "parity" else here(job)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("echo", "train", "parity"))
    parser.add_argument("config", nargs="*", help="train: CONFIG [key=value ...]")
    parser.add_argument("--params", type=float, default=124e6, help="echo: fp32 numbers")
    parser.add_argument("--sites", type=int, default=2, help="echo: how many")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--same", action="store_true", help="echo: send back the very bytes, which Flower does not transfer twice")
    parser.add_argument("--nesterov", action="store_true", help="train: outer step 0.7 / 0.9 instead of the config's")
    parser.add_argument("--here", action="store_true", help="train: in one process, without Flower's transport")
    parser.add_argument("--timeout-s", type=float, default=1800.0)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_intermixed_args(argv)
    if a.command == "parity":
        result = inside("parity", {})
        worst = max(r["rel"] for rows in result.values() for r in rows)
        result |= {"bound": BOUND, "worst": worst}
        lines = [f"{name}: " + ", ".join(f"{r['rel']:.1e}" for r in rows) for name, rows in result.items() if isinstance(rows, list)]
        lines.append(f"largest relative difference {worst:.1e} (bound {BOUND:g})")
    elif a.command == "echo":
        params = int(a.params)
        job = {"mode": "echo", "params": params, "sites": a.sites, "rounds": a.rounds, "differ": not a.same, "timeout_s": a.timeout_s}
        result = {"params": params, "gb": 4 * params / 1e9} | through_flower(job)
        later = sorted(result["round_s"][1:] or result["round_s"])
        result |= {"p50_s": statistics.median(later), "p95_s": later[min(len(later) - 1, int(0.95 * len(later)))]}
        lines = [f"{result['gb']:.2f} GB, {a.sites} sites: {result['p50_s']:.1f} s a round (p95 {result['p95_s']:.1f} s; "
                 f"rounds: {', '.join(f'{s:.1f}' for s in result['round_s'])})"]  # fmt: skip
    else:
        overrides = ["rounds.outer=nesterov", "rounds.outer_lr=0.7", "rounds.outer_momentum=0.9"] if a.nesterov else []
        cfg = load_config(a.config + overrides, a.rounds)
        job = {"mode": "train", "config": a.config + overrides, "sites": len(cfg.sites), "rounds": a.rounds, "timeout_s": a.timeout_s}
        result = inside("here", job) if a.here else through_flower(job)
        lines = [f"{result['rounds']} rounds, {result['tokens']} tokens: validation loss {result['val_loss']:.4f}"]
    print(json.dumps(result) if a.json else "\n".join(lines))
    return 1 if a.command == "parity" and worst >= BOUND else 0


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    import config

    config.command(main)
