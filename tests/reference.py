"""The protocol in one process, written for the eye: what the tests trust, and what bench/ablation.py tries ideas on.

`train` follows a journal's decisions (who trained which batches in which round) with one model per site and no
sockets, and returns theta after each round. The real thing must arrive at the same bits.
"""

from dataclasses import dataclass

import torch

import sync
import wire
from data import Corpus, split_rows
from model import GPT, shape_of
from optim import Inner, schedule


@dataclass(frozen=True)
class Trial:
    """What the protocol does not do (the defaults), for bench/ablation.py to measure."""

    outer_momentum: str = "constant"  # | decayed: with the learning rate | reset: to m = 0 when membership changes
    federated_lr: float = 0.0  # the inner learning rate times sites ** this, while several train
    momentum_by_tokens: bool = False  # betas and Muon momentum ** (1 / splits): the same memory in tokens
    hand_over_inner: bool = False  # a joiner starts from a copy of the inner state of the site that trained last


def average(theta: torch.Tensor, parts: dict, wire_: str, chunk_mb: int, residuals: dict[str, torch.Tensor]) -> torch.Tensor:
    """The members' average pseudo-gradient as a ring makes it. parts: site -> weight, theta_i (None: a joiner), in member order.
    residuals change with it."""
    format_, mean = wire.FORMATS[wire_], torch.zeros_like(theta)
    for a, b in sync.chunks(theta.numel(), chunk_mb):
        blocks = -(-(b - a) // wire.BLOCK)
        encoded, scratch = [], [torch.zeros(blocks * wire.BLOCK) for _ in range(2)]
        for site, (weight, end) in parts.items():
            values, data = torch.zeros(blocks * wire.BLOCK), torch.zeros(blocks * format_.block_bytes, dtype=torch.uint8)
            if end is not None and weight:
                values[: b - a] = (theta[a:b] - end[a:b]) * torch.tensor(weight)
            residual = residuals.setdefault(site, torch.zeros(theta.numel(), dtype=torch.bfloat16))[a:b]
            values[: b - a] += residual
            format_.encode(values, data, scratch[0])
            format_.decode(data, scratch[0])
            residual.copy_((values - scratch[0])[: b - a])
            encoded.append(data)
        summed = torch.zeros_like(encoded[0])
        if len(parts) == 1:
            summed = encoded[0]
        elif (left := wire.add_up(wire_, encoded, summed, scratch)) is not None:
            for i, site in enumerate(parts):  # each member has added up one range, and keeps what its sum lost
                first, stop = (wire.BLOCK * (blocks * j // len(parts)) for j in (i, i + 1))
                residuals[site][a + first : min(a + stop, b)].add_(left[first : min(stop, b - a)])
        whole = torch.empty(blocks * wire.BLOCK)
        format_.decode(summed, whole)
        mean[a:b] = whole[: b - a]
    return mean


def train(cfg, records: list[dict], trial: Trial = Trial(), log=lambda committed_tokens, losses: None) -> list[torch.Tensor]:
    """theta before the first and after each committed round. `log` gets the committed tokens before a round and its
    batches' losses by site."""
    torch.set_num_threads(1)
    corpus = Corpus(cfg)
    per_step, budget, r = cfg.data.tokens_per_step, cfg.budget.tokens, cfg.rounds
    shape = shape_of(cfg.model, corpus.vocab)
    start = GPT(shape).init_weights(cfg.seed)
    flat = sync.Flat(start)
    thetas = [flat.read(start)]
    m = torch.zeros(flat.numel)
    models, inners, opened, attempts, committed, members, last = {}, {}, {}, {}, 0, [], None
    residuals: dict[str, torch.Tensor] = {}  # site -> what the wire left out of its parts so far
    for record in sorted(records, key=lambda x: (x["t_s"], x["type"] != "commit")):
        if record["type"] == "site" and record["to"] == "off":
            models.pop(record["site"], None)  # what was on the machine is gone
            residuals.pop(record["site"], None)
            if record["site"] != last or not trial.hand_over_inner:
                inners.pop(record["site"], None)
        if record["type"] == "open":
            opened[record["round"]] = record
        if record["type"] == "attempt":
            attempts[record["round"]] = record
        if record["type"] != "commit":
            continue
        theta, rates = thetas[-1], opened[record["round"]]["rates"]
        if trial.outer_momentum == "reset" and set(rates) != set(members):
            m = torch.zeros_like(m)
        ends, counts, losses, members = {}, {}, {}, list(rates)
        for site, ranges in record["batches"].items():
            if site not in models:
                models[site] = GPT(shape)
                inner = Inner(models[site], cfg.optim)
                if trial.hand_over_inner and last in inners:
                    inner.load({k: v.clone() for k, v in inners[last].tensors().items()})
                inners[site] = inner
            if r.inner_state == "reset":
                inners[site] = Inner(models[site], cfg.optim)
            torch.nn.utils.vector_to_parameters(theta.clone(), models[site].parameters())
            batches = [b for first, stop in ranges for b in range(first, stop)]
            ratio = sum(rates.values()) / rates[site] if r.lr_position == "global" else 1.0
            losses[site] = []
            for i, batch in enumerate(batches):
                ids, targets = corpus.batch(batch)
                loss_of_batch = 0.0
                parts = split_rows(corpus.rows, len(rates) if r.split_steps else 1)
                for first, stop in parts:
                    position = min(committed + (i + first / corpus.rows) * per_step * ratio, budget)
                    point = schedule(position, budget, per_step, cfg.optim)
                    slower = 1 / len(parts) if trial.momentum_by_tokens else 1.0
                    point = point._replace(lr_scale=point.lr_scale * len(rates) ** trial.federated_lr,
                                    muon_momentum=point.muon_momentum**slower)  # fmt: skip
                    inners[site].set(point)
                    for group in inners[site].adam.param_groups:
                        group["betas"] = tuple(b**slower for b in cfg.optim.betas)
                    loss = models[site](ids[first:stop], targets[first:stop])
                    loss.backward()
                    inners[site].step()
                    inners[site].zero_grad()
                    loss_of_batch += loss.item() * (stop - first) / corpus.rows
                losses[site].append(loss_of_batch)
            ends[site], counts[site] = flat.read(models[site]), len(batches)
        last = max(counts, key=lambda s: counts[s])
        log(committed, losses)
        decay = schedule(committed, budget, per_step, cfg.optim).lr_scale if trial.outer_momentum == "decayed" else 1.0
        outer = (r.outer, r.outer_lr, r.outer_momentum * decay)
        if len(ends) == 1:  # local
            (end,) = ends.values()
            if r.local == "plain":
                theta, m = end, torch.zeros_like(m)
            else:
                theta = theta.clone()
                sync.outer_step_(theta, m, thetas[-1] - end, *outer)
        else:
            parts = {s: (w, ends.get(s)) for s, w in attempts[record["round"]]["weights"].items()}
            mean = average(theta, parts, cfg.sync.wire, cfg.sync.chunk_mb, residuals)
            theta = theta.clone()
            sync.outer_step_(theta, m, mean, *outer)
        thetas.append(theta)
        committed += sum(counts.values()) * per_step
    return thetas
