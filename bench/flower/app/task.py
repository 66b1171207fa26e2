"""What both apps share: the work of a site in a round, and the payload of the echo. Our own model, data, optimizer and
schedule; only train.py's loop is written again, as that file brings our protocol along.

Flower starts a process for every message, so whatever a site needs is built anew in each round, as in the paper.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord

import config
from data import Corpus
from model import GPT, shape_of
from optim import Inner, schedule

WEIGHT = "num-micro-batches"
ECHO_WIDTH, ECHO_ROWS = 1024, 39_000  # the echo's arrays: at most 39.9 M elements, the size of a large embedding


def load_job(context) -> dict:
    return json.loads(Path(context.run_config["job"]).read_text())


def load_config(job: dict):
    return config.load(job["config"])


def echo_arrays(params: int) -> ArrayRecord:
    """`params` fp32 numbers as matrices of ECHO_WIDTH columns and one vector. Random: Flower sends equal pieces once."""
    rows, left = divmod(params, ECHO_WIDTH)
    shapes = [(min(ECHO_ROWS, rows - at), ECHO_WIDTH) for at in range(0, rows, ECHO_ROWS)] + [(left,)] * (left > 0)
    rng = np.random.default_rng(0)
    return ArrayRecord({f"w{i}": Array(rng.standard_normal(shape, dtype=np.float32)) for i, shape in enumerate(shapes)})


def plan(cfg, round_: int, site: int) -> range:
    """The batches of a site in a round, both counted from 0: H = rounds.max_steps for each, the next H for the next."""
    first = (round_ * len(cfg.sites) + site) * cfg.rounds.max_steps
    return range(first, first + cfg.rounds.max_steps)


def theta_0(cfg) -> ArrayRecord:
    return ArrayRecord(GPT(shape_of(cfg.model, Corpus(cfg).vocab)).init_weights(cfg.seed).state_dict())


def rebuild(cfg, corpus: Corpus, arrays: ArrayRecord, device: str) -> GPT:
    model = GPT(shape_of(cfg.model, corpus.vocab))
    model.load_state_dict(arrays.to_torch_state_dict())
    return model.to(device)


def train_round(cfg, arrays: ArrayRecord, round_: int, site: int) -> tuple[ArrayRecord, dict]:
    """One round of one site, with a model and inner optimizers of its own; returns its parameters and what it did."""
    spec, per_step = list(cfg.sites.values())[site], cfg.data.tokens_per_step
    torch.set_num_threads(spec.threads_federated)
    corpus, batches = Corpus(cfg), plan(cfg, round_, site)
    model = rebuild(cfg, corpus, arrays, spec.device)
    inner, committed, losses, micro_batches = Inner(model, cfg.optim), plan(cfg, round_, 0).start * per_step, [], 0
    for done, batch in enumerate(batches):
        ids, targets = corpus.batch(batch)
        inner.set(schedule(committed + done * per_step, cfg.budget.tokens, per_step, cfg.optim))
        losses.append(0.0)
        for x, y in zip(ids.split(spec.device_batch), targets.split(spec.device_batch)):
            with torch.autocast(model.head.weight.device.type, torch.bfloat16, enabled=cfg.model.dtype == "bfloat16"):
                loss = model(x.to(spec.device), y.to(spec.device)) * (len(x) / corpus.rows)
            loss.backward()
            losses[-1] += loss.item()
            micro_batches += 1
        inner.step()
        inner.zero_grad()
    did = {WEIGHT: micro_batches, "site": site, "first-batch": batches.start, "stop-batch": batches.stop}
    return ArrayRecord(model.cpu().state_dict()), did | {"loss": sum(losses) / len(losses)}


@torch.no_grad()
def val_loss(cfg, arrays: ArrayRecord) -> float:
    """Nats per token over data.val_tokens, as Site.evaluate counts it."""
    spec, corpus = next(iter(cfg.sites.values())), Corpus(cfg)
    torch.set_num_threads(spec.threads_federated)
    model, nats, count = rebuild(cfg, corpus, arrays, spec.device), 0.0, 0
    for _, (ids, targets) in corpus.validation(cfg.data.val_tokens, spec.device_batch):
        logits = model(ids.to(spec.device))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.to(spec.device).flatten(), reduction="none").cpu().double()
        nats, count = nats + losses.sum().item(), count + losses.numel()
    return nats / count
