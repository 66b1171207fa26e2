"""The protocol in one process, written for the eye: what the tests trust.

`train` follows a journal's decisions (who trained which batches in which round) with one model per site and no
sockets, and returns theta after each round. The real thing must arrive at the same bits.
"""

import torch

import sync
from data import Corpus
from model import GPT, shape_of
from optim import Inner, schedule


def train(cfg, records: list[dict]) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    corpus = Corpus(cfg)
    per_step, budget, r = cfg.data.tokens_per_step, cfg.budget.tokens, cfg.rounds
    shape = shape_of(cfg.model, corpus.vocab)
    start = GPT(shape).init_weights(cfg.seed)
    flat = sync.Flat(start)
    thetas = [flat.read(start)]
    m = torch.zeros(flat.numel)
    models, inners, opened, committed = {}, {}, {}, 0
    for record in sorted(records, key=lambda x: (x["t_s"], x["type"] != "commit")):
        if record["type"] == "site" and record["to"] == "off":
            models.pop(record["site"], None)  # what was on the machine is gone
        if record["type"] == "open":
            opened[record["round"]] = record
        if record["type"] != "commit":
            continue
        theta, rates = thetas[-1], opened[record["round"]]["rates"]
        ends, counts = {}, {}
        for site, ranges in record["batches"].items():
            if site not in models:
                models[site] = GPT(shape)
                inners[site] = Inner(models[site], cfg.optim)
            if r.inner_state == "reset":
                inners[site] = Inner(models[site], cfg.optim)
            flat.write(theta, models[site])
            batches = [b for first, last in ranges for b in range(first, last)]
            ratio = sum(rates.values()) / rates[site] if r.lr_position == "global" else 1.0
            for i, batch in enumerate(batches):
                position = min(committed + i * per_step * ratio, budget)
                inners[site].set(schedule(position, budget, per_step, cfg.optim))
                ids, targets = corpus.batch(batch)
                models[site](ids, targets).backward()
                inners[site].step()
                inners[site].zero_grad()
            ends[site], counts[site] = flat.read(models[site]), len(batches)
        if len(ends) == 1:  # local
            (end,) = ends.values()
            if r.local == "plain":
                theta, m = end, torch.zeros_like(m)
            else:
                theta = theta.clone()
                sync.outer_step_(theta, m, thetas[-1] - end, r.outer, r.outer_lr, r.outer_momentum)
        else:
            total = sum(counts.values())
            mean = torch.zeros_like(theta)
            for site, end in ends.items():
                if counts[site]:
                    mean += (theta - end) * torch.tensor(counts[site] / total)
            theta = theta.clone()
            sync.outer_step_(theta, m, mean, r.outer, r.outer_lr, r.outer_momentum)
        thetas.append(theta)
        committed += sum(counts.values()) * per_step
    return thetas
