"""How fast a config trains on this machine: parameters, FLOPs, tokens/s, MFU, memory, loader.

    python bench/train.py CONFIG [key=value ...]                  of the first site, or site=NAME; --json for programs
    python bench/train.py CONFIG --count                          parameters and FLOPs only, at once, for any size
    python bench/train.py CONFIG --memory                         computed without a GPU: peak by kind, the largest device_batch
    torchrun --nproc_per_node=8 bench/train.py CONFIG             several ranks, DDP or FSDP2 as the site says
    python bench/train.py CONFIG --transformers                   beside transformers' NanoChatForCausalLM

A step is the site's own: data.tokens_per_step tokens over all ranks, in pieces of device_batch rows, then Muon and AdamW; its
device, dtype, checkpointing and compilation are the config's. Medians over --steps of them, after one that warms up; MFU is
of the whole step. Memory: CUDA's own peak, or on a CPU how much the process grew. If the corpus is not prepared, token ids are random.

--transformers times one piece of device_batch random rows, forward and backward, in one process of an environment of its own
(environments.py), which holds both models and takes turns, so that noise hits both.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # not bench/: `train` and `sync` are those at the top

import torch  # noqa: E402

import config  # noqa: E402
import footprint  # noqa: E402
from config import BadInput, Parser  # noqa: E402
from model import GPT, NORM_EPS, Shape, compile_, flops_per_token, num_params, shape_of  # noqa: E402

LOADER_BATCHES = 20


def main(argv: list[str]) -> int:
    if argv[:1] == ["--beside"]:
        print(json.dumps(beside(**json.loads(argv[1]))))
        return 0
    parser = Parser()
    parser.add_argument("config", nargs="+", help="CONFIG [key=value ...]")
    parser.add_argument("--count", action="store_true", help="measure nothing")
    parser.add_argument("--memory", action="store_true", help="compute it (footprint.py); measure nothing")
    parser.add_argument("--transformers", action="store_true", help="beside NanoChatForCausalLM")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of the CPU; default: the site's threads_local")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 2:
        raise BadInput(f"--steps {args.steps} must be >= 2")
    cfg = config.load(args.config)
    if args.memory:
        out = footprint.of(args.config)
        print(json.dumps(out) if args.json else footprint.table(out), flush=True)
        return 0
    name = cfg.site or next(iter(cfg.sites))
    spec = cfg.sites[name]
    try:
        from data import vocabulary  # not in the environment of `beside`

        shape = shape_of(cfg.model, vocabulary(cfg))
    except ValueError as error:
        raise BadInput(str(error)) from None
    if args.transformers and spec.device_batch == "auto":
        raise BadInput(f"sites.{name}.device_batch=auto: beside transformers, say how many rows")
    out = {"site": name, "tokens_per_step": cfg.data.tokens_per_step} | count(shape)
    if not args.count:
        from parallel import Ranks  # which the environment of `beside` cannot import

        ranks = Ranks(spec.device, cfg.data.tokens_per_step // shape.seq_len)
        out["threads"] = args.threads or spec.threads_local
        torch.set_num_threads(out["threads"])
        if args.transformers:
            out |= versus(cfg, spec, shape, args.steps, out["threads"])
        else:
            out |= measure(cfg, spec, shape, args.steps, ranks)
    if args.count or ranks.rank == 0:
        print(json.dumps(out) if args.json else table(out), flush=True)
    return 0


def count(shape: Shape) -> dict:
    """Parameters by kind, and FLOPs per token; nothing is allocated."""
    with torch.device("meta"):
        model = GPT(shape)
    kinds = {"embedding": num_params(model.embed), "matrices": num_params(model.blocks), "head": num_params(model.head)}
    total = num_params(model)
    kinds["scalars"] = total - sum(kinds.values())
    return {"shape": vars(shape), "params": total, "params_by_kind": kinds, "flops_per_token": flops_per_token(shape)}


def measure(cfg, spec, shape: Shape, steps: int, ranks) -> dict:
    """Steps as a site takes them, on the ranks that torchrun has started, or alone. What it says is rank 0's."""
    import torch.distributed as dist

    from data import Corpus, read_meta, tokens_dir
    from devices import dtype_on, peak_flops
    from optim import Inner, schedule
    from parallel import Held

    corpus, tokens = Corpus(cfg) if read_meta(tokens_dir(cfg)) else None, cfg.data.tokens_per_step
    device_batch = spec.device_batch
    if device_batch == "auto":
        gpu_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
        device_batch = footprint.largest_batch(cfg, cfg.site or next(iter(cfg.sites)), ranks.size, gpu_bytes)
    rows, before_bytes = tokens // shape.seq_len // ranks.size, grown_to_bytes()
    model = GPT(shape).init_weights(cfg.seed)
    held = Held(model, ranks, spec.parallel, cfg.model.dtype, cfg.model.compile, spec.checkpointing)
    inner = Inner(held.model, cfg.optim, ranks)
    inner.set(schedule(0, cfg.budget.tokens, tokens, cfg.optim))
    gradient_s, step_s, processor_s = [], [], 0.0
    for i in range(steps + 1):
        processor_s = time.process_time() if i == 1 else processor_s
        ids, targets = corpus.batch(i, ranks.rank * rows, rows) if corpus else random_batch(rows, shape)
        ids, targets = ids.to(ranks.device), targets.to(ranks.device)
        start_s = now_s(ranks.device)
        held.gradient(ids, targets, device_batch)
        gradient_s.append(now_s(ranks.device) - start_s)
        inner.step()
        inner.zero_grad()
        step_s.append(now_s(ranks.device) - start_s)
    rate, processor_s = tokens / median(step_s[1:]), time.process_time() - processor_s
    dtype = dtype_on(ranks.device, cfg.model.dtype)
    peak = peak_flops(ranks.device, dtype, spec.peak_tflops)
    cuda = ranks.device.type == "cuda"
    out = {
        "ranks": ranks.size, "parallel": spec.parallel if ranks.size > 1 else None,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else "cpu", "dtype": dtype,
        "device_batch": device_batch, "checkpointing": spec.checkpointing, "compile": cfg.model.compile,
        "first_step_s": step_s[0], "gradient_tokens_per_s": tokens / median(gradient_s[1:]), "tokens_per_s": rate,
        "tokens_per_processor_s": tokens * steps / processor_s,
        "mfu": flops_per_token(shape) * rate / (peak * ranks.size) if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated(ranks.device) if cuda else grown_to_bytes() - before_bytes,
        "data": "corpus" if corpus else "random ids: the corpus is not prepared",
    }  # fmt: skip
    if corpus:
        start_s = time.perf_counter()
        for b in range(LOADER_BATCHES):
            corpus.batch(b, ranks.rank * rows, rows)
        out["loader_tokens_per_s"] = LOADER_BATCHES * tokens / (time.perf_counter() - start_s)
        out["loader_over_training"] = out["loader_tokens_per_s"] / rate
    if ranks.size > 1:
        dist.destroy_process_group()
    return out


def random_batch(rows: int, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randint(shape.vocab, (rows, shape.seq_len + 1))
    return both[:, :-1], both[:, 1:]


def now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def grown_to_bytes() -> int:
    """The most memory this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------------------------------------------------------------
# Beside transformers


def versus(cfg, spec, shape: Shape, steps: int, threads: int) -> dict:
    """`beside`, in the environment that has transformers."""
    from bench.environments import make
    from devices import dtype_on

    dtype = dtype_on(torch.device(spec.device), cfg.model.dtype)
    about = {"shape": vars(shape), "device": spec.device, "dtype": dtype, "compiled": cfg.model.compile,
             "rows": spec.device_batch, "steps": steps, "threads": threads}  # fmt: skip
    command = [make("transformers") / "python", __file__, "--beside", json.dumps(about)]
    seconds = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    tokens = spec.device_batch * shape.seq_len
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"])]
    rates = {f"{who}_tokens_per_s": [tokens / s for s in took] for who, took in seconds.items()}
    return {"device": spec.device, "dtype": dtype, "device_batch": spec.device_batch, "compile": cfg.model.compile,
            "ratio": ratios} | rates  # fmt: skip


def beside(shape: dict, device: str, dtype: str, compiled: bool, rows: int, steps: int, threads: int) -> dict:
    """Seconds of forward and backward of both models, in turns. Needs transformers."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    torch.set_num_threads(threads)
    s, device = Shape(**shape), torch.device(device)
    hf = NanoChatConfig(vocab_size=s.vocab, hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.depth,
                        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, max_position_embeddings=s.seq_len,
                        rms_norm_eps=NORM_EPS, pad_token_id=None, use_cache=False)  # fmt: skip
    ours, theirs = GPT(s).init_weights(0).to(device), NanoChatForCausalLM(hf).to(device).train()
    if compiled:
        compile_(ours)
        theirs.compile()
    ids, targets = (t.to(device) for t in random_batch(rows, s))
    losses = {"ours": lambda: ours(ids, targets), "theirs": lambda: theirs(input_ids=ids, labels=ids).loss}
    models, seconds = {"ours": ours, "theirs": theirs}, {"ours": [], "theirs": []}
    for _ in range(steps + 1):
        for who, loss in losses.items():
            models[who].zero_grad()
            start_s = now_s(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                nats = loss()
            nats.backward()
            seconds[who].append(now_s(device) - start_s)
    return {who: took[1:] for who, took in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# For people


def table(out: dict) -> str:
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in out["params_by_kind"].items() if n)
    lines = [("parameters", f"{out['params']:,}: {kinds}"), ("FLOPs per token", f"{out['flops_per_token']:.4g}, nanochat's count"),
             ("tokens per step", f"{out['tokens_per_step']:,}")]  # fmt: skip
    if "ratio" in out:
        lines += [("on", f"{out['device']}, {out['threads']} threads, {out['dtype']}, pieces of {out['device_batch']} rows"),
                  ("ours", spread(out["ours_tokens_per_s"], ",.0f") + " tokens/s, forward and backward"),
                  ("transformers", spread(out["theirs_tokens_per_s"], ",.0f") + " tokens/s"),
                  ("ours / theirs", spread(out["ratio"], ".3f"))]  # fmt: skip
    elif "tokens_per_s" in out:
        mfu = f"{out['mfu']:.1%}" if out["mfu"] else "not known: no peak for this device; say sites.NAME.peak_tflops"
        switches = "".join(f", {key}" for key in ("checkpointing", "compile") if out[key])
        lines += [("on", f"{out['ranks']} x {out['device']}, {out['threads']} threads, {out['dtype']}, pieces of "
                         f"{out['device_batch']} rows{switches}" + (f", {out['parallel']}" if out["parallel"] else "")),
                  ("data", out["data"]),
                  ("forward, backward", f"{out['gradient_tokens_per_s']:,.0f} tokens/s"),
                  ("whole step", f"{out['tokens_per_s']:,.0f} tokens/s; the first took {out['first_step_s']:.1f} s"),
                  ("MFU", mfu), ("peak memory", f"{out['peak_bytes'] / 2**20:,.0f} MiB a rank")]  # fmt: skip
        if "loader_tokens_per_s" in out:
            lines.append(("loader", f"{out['loader_tokens_per_s']:,.0f} tokens/s, {out['loader_over_training']:,.0f} x training"))
    return "\n".join(f"{what:18} {value}" for what, value in lines)


def spread(values: list[float], as_: str) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):{as_}} (quartiles {low:{as_}} to {high:{as_}})"


if __name__ == "__main__":
    config.command(main, parses=True)
