"""The server of the paper: FedAvg weighted by micro-batches, optionally with SGD-Nesterov on the pseudo-gradient."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import WEIGHT, echo_arrays, load_config, load_job, theta_0, val_loss

app = ServerApp()


class Paper(FedAvg):
    """FedAvg over all sites, always the same ones. `stamps`: when each round was over; `did`: what its sites reported."""

    def __init__(self, sites: int, outer: tuple[float, float] | None):
        """outer: learning rate and momentum of SGD-Nesterov; None: the average is the next theta."""
        super().__init__(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites, weighted_by_key=WEIGHT)
        self.outer, self.momentum, self.stamps, self.did = outer, {}, [time.monotonic()], []

    def configure_train(self, server_round, arrays, config, grid):
        self.theta = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            if reply.has_error():  # FedAvg would go on with the others
                raise RuntimeError(f"round {server_round}: {reply.error.reason}")
        replies.sort(key=lambda r: r.content["metrics"]["site"])  # the order of arrival must not decide how sums round
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self.outer:
            arrays = nesterov(self.theta, arrays, self.momentum, *self.outer)
        self.did.append([dict(r.content["metrics"]) for r in replies])
        self.stamps.append(time.monotonic())
        return arrays, metrics


def nesterov(theta: ArrayRecord, average: ArrayRecord, momentum: dict, lr: float, beta: float) -> ArrayRecord:
    """The step of torch.optim.SGD(nesterov=True) on theta - average; momentum (name -> array) is kept in place."""
    out = {}
    for name, array in theta.items():
        old = array.numpy()
        delta = old - average[name].numpy()
        m = momentum[name] = beta * momentum.get(name, np.float32(0)) + delta
        out[name] = Array(old - lr * (delta + beta * m))
    return ArrayRecord(out)


def run(grid: Grid, job: dict) -> dict:
    """A whole job over any grid; returns what run.py prints."""
    outer, cfg = None, None
    if job["mode"] == "train":
        cfg = load_config(job)
        outer = (cfg.rounds.outer_lr, cfg.rounds.outer_momentum) if cfg.rounds.outer == "nesterov" else None
    strategy = Paper(job["sites"], outer)
    start = theta_0(cfg) if cfg else echo_arrays(job["params"])
    arrays = strategy.start(grid, start, num_rounds=job["rounds"], timeout=job["timeout_s"]).arrays
    stamps = strategy.stamps
    out = {"sites": job["sites"], "rounds": job["rounds"], "round_s": [round(b - a, 3) for a, b in zip(stamps, stamps[1:])]}
    if cfg:
        tokens = sum(s["stop-batch"] - s["first-batch"] for did in strategy.did for s in did) * cfg.data.tokens_per_step
        batches = [[[s["first-batch"], s["stop-batch"]] for s in did] for did in strategy.did]
        out |= {"tokens": tokens, "batches": batches, "val_loss": val_loss(cfg, arrays)}
    return out


@app.main()
def main(grid: Grid, context: Context) -> None:
    job = load_job(context)
    try:
        result = run(grid, job)
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        part = Path(job["result"] + ".part")
        part.write_text(json.dumps(result))
        part.rename(job["result"])
