"""The model: its gradients against autograd's, its loss in chunks, its switches, and transformers' NanoChat as the judge."""

import json
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, examples
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import devices
import model
import parallel
import sync
from export import hf_names
from model import GPT, LOGIT_CAP, NORM_EPS, Shape, chunk_loss, compile_, flops_per_token, num_params, shape_of

DEMO = config.load([str(REPO / "configs/demo.yaml")])
SMALL = Shape(depth=3, width=64, heads=4, kv_heads=2, seq_len=48, vocab=160, residual_scalars=True)
laws = examples(40)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def randn(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_model(shape: Shape = SMALL, seed: int = 0) -> GPT:
    """Every parameter random, as none is at the start: logits of a few units, the cap at work."""
    made, g = GPT(shape), torch.Generator().manual_seed(seed)
    for name, p in made.named_parameters():
        spread = 1.0 if name.startswith("embed") or p.dim() == 1 else 2.0 * p.shape[-1] ** -0.5
        torch.nn.init.normal_(p, std=spread, generator=g)
    return made


def random_ids(shape: Shape = SMALL, rows: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randint(shape.vocab, (rows, shape.seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return both[:, :-1], both[:, 1:]


def gradients(of: GPT, ids: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
    (scale * of(ids, targets)).backward()
    made = {name: p.grad for name, p in of.named_parameters()}
    of.zero_grad()
    return made


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest |a - b| / |b| over named tensors."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


# -- what it is ---------------------------------------------------------------------------------------------------------


def test_d20_has_the_papers_number_of_parameters():
    shape = shape_of(OmegaConf.merge(DEMO.model, {"depth": 20, "width": None, "heads": None, "kv_heads": None, "seq_len": 2048}), 65536)
    assert (shape.width, shape.heads) == (1280, 10)
    with torch.device("meta"):
        assert num_params(GPT(shape)) == 560_988_160
        scalars = Shape(**{**vars(shape), "residual_scalars": True})
        assert num_params(GPT(scalars)) == 560_988_200
    assert flops_per_token(shape) == 6 * (560_988_160 - 65536 * 1280) + 12 * 20 * 1280 * 2048


def test_the_benchmark_counts_what_is_there(runner):
    argv = ("model.depth=26", "model.width=null", "model.heads=13", "model.kv_heads=1", "model.residual_scalars=true")
    done = runner.call("bench/train.py", str(REPO / "configs/demo.yaml"), *argv, "--count", "--json")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    shape = Shape(**out["shape"])
    with torch.device("meta"):
        assert out["params"] == num_params(GPT(shape)) == sum(out["params_by_kind"].values())
    assert (shape.depth, shape.width, out["flops_per_token"]) == (26, 64 * 26, flops_per_token(shape))


def test_the_model_is_causal_and_starts_at_the_uniform_loss():
    ids, _ = random_ids()
    assert GPT(SMALL).init_weights(0)(ids, ids).item() == pytest.approx(torch.log(torch.tensor(160.0)).item(), abs=0.05)
    made, changed = random_model(), ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 160
    assert torch.equal(made(ids)[:, :9], made(changed)[:, :9])
    assert not torch.allclose(made(ids)[:, 9:], made(changed)[:, 9:])


def test_theta_0_is_a_function_of_seed_and_shape():
    a, b, c = (sync.Flat(m).read(m) for m in (GPT(SMALL).init_weights(s) for s in (1, 1, 2)))
    assert torch.equal(a, b) and not torch.equal(a, c)


# -- gradients written out by hand --------------------------------------------------------------------------------------


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As model.rotate, from the angles of one half."""
    (x1, x2), c, s = x.chunk(2, dim=-1), cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]
    return torch.cat((x1 * c + x2 * s, x2 * c - x1 * s), dim=-1)


@laws
@given(seed=st.integers(0, 99), half=st.integers(1, 20), heads=st.integers(1, 3), T=st.integers(1, 9), size=st.floats(1e-3, 1e3))
def test_norm_rotation_and_squared_relu_have_autograds_gradients(seed, half, heads, T, size):
    tables = model.rotary_tables(T, 2 * half)
    for ours, plain in (
        (model.rms_norm, lambda x: F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)),
        (lambda x: model.rotate(x, *tables), lambda x: plain_rotate(x, *tables)),
        (model.SquaredReLU.apply, lambda x: F.relu(x).square()),
    ):
        x = (size * randn(seed, 2, T, heads, 2 * half)).requires_grad_()
        y, z = ours(x), plain(x)
        weights = randn(seed + 1, *y.shape)
        (dy,), (dz,) = torch.autograd.grad(y, x, weights), torch.autograd.grad(z, x, weights)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5 * float(z.detach().abs().max()))
        torch.testing.assert_close(dy, dz, rtol=1e-5, atol=1e-5 * float(dz.abs().max()))


def plain_loss(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return F.cross_entropy(LOGIT_CAP * torch.tanh(x @ w.t() / LOGIT_CAP), targets, reduction=reduction)


@laws
@given(seed=st.integers(0, 99), N=st.integers(1, 40), C=st.integers(1, 24), V=st.integers(1, 50), size=st.integers(1, 50),
       scale=st.floats(1e-3, 1e3), dtype=dtypes)  # fmt: skip
@example(seed=54, N=1, C=1, V=29, size=11, scale=109.52229021947024, dtype=torch.bfloat16)  # terms of 60 that add up to 8
def test_the_loss_in_chunks_is_the_plain_one(seed, N, C, V, size, scale, dtype):
    """In bfloat16 the logits and their gradients are rounded to 8 bits: an error in proportion to the terms of a sum, not to the sum."""
    x, w = randn(seed, N, C).to(dtype).requires_grad_(), (3 * randn(seed + 1, V, C)).to(dtype).float().requires_grad_()
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    loss, plain = model.MeanLoss.apply(x, w, targets, size, chunk_loss), plain_loss(x.float(), w, targets)
    ours = torch.autograd.grad(scale * loss, (x, w))
    theirs = torch.autograd.grad(scale * plain, (x, w))
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert loss.dtype == torch.float32 and abs(loss - plain) <= bound * max(1.0, plain)
    logits = (x.float() @ w.t()).detach().requires_grad_()
    capped = F.cross_entropy(LOGIT_CAP * torch.tanh(logits / LOGIT_CAP), targets)
    d = torch.autograd.grad(scale * capped, logits)[0].abs()
    for a, b, terms in zip(ours, theirs, (d @ w.abs(), d.t() @ x.float().abs())):
        assert a.dtype == b.dtype and (a - b).norm() <= bound * max(terms.norm(), scale * 1e-2)


# -- its switches -------------------------------------------------------------------------------------------------------


def test_pieces_of_a_batch_add_up_to_its_gradient(monkeypatch):
    (ids, targets), made = random_ids(rows=5), random_model()
    whole = gradients(made, ids, targets)
    monkeypatch.setattr(model, "MIN_CHUNK_TOKENS", 7)
    monkeypatch.setattr(model, "CPU_CHUNK", 0)
    for rows in (2, 2, 1):
        x, ids, y, targets = ids[:rows], ids[rows:], targets[:rows], targets[rows:]
        (made(x, y) * (rows / 5)).backward()
    assert furthest({name: p.grad for name, p in made.named_parameters()}, whole) < 1e-5


def test_each_tokens_loss_is_the_plain_one_without_a_gradient():
    (ids, targets), made = random_ids(), random_model()
    logits = made(ids)
    losses = made(ids, targets, reduction="none")
    assert losses.shape == ids.shape and not losses.requires_grad and logits.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(losses))
    with torch.no_grad():
        means = [made(ids, targets), losses.mean()]
    torch.testing.assert_close(made(ids, targets).detach().expand(2), torch.stack(means))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_never_holds_all_logits(monkeypatch, reduction):
    shape = Shape(depth=1, width=8, heads=1, kv_heads=1, seq_len=64, vocab=1000)
    monkeypatch.setattr(model, "MIN_CHUNK_TOKENS", 16)
    monkeypatch.setattr(model, "CPU_CHUNK", 0)
    (ids, targets), made = random_ids(shape), random_model(shape)
    with Largest() as largest:
        loss = made(ids, targets, reduction)
        if loss.requires_grad:
            loss.backward()
    assert largest.numel == 16 * 1000 < ids.numel() * 1000 / 4


def test_checkpointing_computes_blocks_twice_and_the_same_bits():
    (ids, targets), made, calls = random_ids(), random_model(), []
    made.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    kept = gradients(made, ids, targets)
    assert len(calls) == 1
    made.checkpointing = True
    again = gradients(made, ids, targets)
    assert len(calls) == 3 and all(torch.equal(again[name], kept[name]) for name in kept)


def test_under_autocast_the_residual_stream_is_bfloat16_and_gradients_are_close():
    (ids, targets), made, seen = random_ids(), random_model(), []
    for block in made.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append((args[0].dtype, out.dtype)))
    exact = gradients(made, ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(made, ids, targets)
        logits = made(ids)
    assert set(seen[:3]) == {(torch.float32,) * 2} and set(seen[3:]) == {(torch.bfloat16,) * 2}
    assert logits.dtype == torch.float32 and all(g.dtype == torch.float32 for g in rounded.values())
    torch.testing.assert_close(logits, made(ids), rtol=0, atol=0.5)
    assert 1e-4 < furthest(rounded, exact) < 0.1


@pytest.mark.slow
def test_compiled_sharded_and_checkpointed_it_has_the_same_gradients(monkeypatch, tmp_path):
    """In the order that `compile_` asks for, and all blocks from one compilation: another one for FSDP2, which changes their class."""
    import torch.distributed as dist
    from torch._dynamo.utils import counters
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    shape = Shape(depth=2, width=16, heads=2, kv_heads=1, seq_len=16, vocab=32)
    (ids, targets), made = random_ids(shape), random_model(shape)
    names, plain = list(made.state_dict()), gradients(made, ids, targets)
    counters.clear()
    compile_(made)
    assert furthest(gradients(made, ids, targets), plain) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2 and list(made.state_dict()) == names
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        made.checkpointing = True
        for part in (*made.blocks, made.head, made):
            fully_shard(part, mesh=dist.init_device_mesh("cpu", (1,)))
        sharded = {name: g.full_tensor() for name, g in gradients(made, ids, targets).items()}
    finally:
        dist.destroy_process_group()
    assert furthest(sharded, plain) < 1e-5 and counters["stats"]["unique_graphs"] == 3


# -- transformers -------------------------------------------------------------------------------------------------------

THEIRS = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import NanoChatConfig, NanoChatForCausalLM

for draw in json.load(sys.stdin):
    weights = load_file(draw["path"])
    ids = weights.pop("ids")
    model = NanoChatForCausalLM(NanoChatConfig(**draw["config"])).train()
    model.load_state_dict(weights)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    made = {name: p.grad for name, p in model.named_parameters()}
    save_file(made | {"logits": out.logits[:, :-1].detach().contiguous(), "loss": out.loss.detach()}, draw["path"])
"""


def any_shape(rng: random.Random) -> Shape:
    kv_heads, group, head_width = rng.choice([1, 2, 4]), rng.choice([1, 2, 3]), 2 * rng.randint(1, 32)
    heads = kv_heads * group
    return Shape(rng.randint(1, 5), heads * head_width, heads, kv_heads, rng.randint(2, 200), rng.randint(2, 700))


@pytest.mark.slow
def test_logits_loss_and_every_gradient_are_transformers_nanochats(tmp_path):
    """fp32, random shapes and weights: logits (of up to 15 units) within 1e-4, loss and gradients within 1e-5 relative."""
    rng, draws, cases = random.Random(0), [], []
    for i in range(16):
        shape, path = any_shape(rng), tmp_path / f"{i}.safetensors"
        made, (ids, targets) = random_model(shape, seed=i), random_ids(shape, rng.randint(1, 3), seed=i)
        names = hf_names(shape.depth)
        weights = {names[name]: p.detach() for name, p in made.named_parameters()}
        save_file(weights | {"ids": torch.cat((ids, targets[:, -1:]), dim=1)}, path)
        cases.append((made, ids, targets, names, path))
        draws.append({"path": str(path), "config": {
            "vocab_size": shape.vocab, "hidden_size": shape.width, "intermediate_size": 4 * shape.width,
            "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": shape.seq_len, "rms_norm_eps": NORM_EPS, "pad_token_id": None,
        }})  # fmt: skip
    bin_ = subprocess.run([sys.executable, REPO / "bench/environments.py", "transformers"], check=True, capture_output=True, text=True)
    subprocess.run([f"{bin_.stdout.strip()}/python", "-c", THEIRS], input=json.dumps(draws), text=True, check=True, timeout=300)
    for made, ids, targets, names, path in cases:
        theirs = load_file(path)
        with torch.no_grad():
            torch.testing.assert_close(made(ids), theirs.pop("logits"), rtol=0, atol=1e-4)
            torch.testing.assert_close(made(ids, targets), theirs.pop("loss"), rtol=1e-5, atol=0)
        ours = {names[name]: g for name, g in gradients(made, ids, targets).items()}
        assert furthest(ours, theirs) < 1e-5, made.shape


@pytest.mark.parametrize("in_hardware", [True, False])
@pytest.mark.parametrize("together", [1, 2048, 1 << 20])
def test_muon_on_a_cpu_is_torchs_but_for_its_rounding(monkeypatch, in_hardware, together):
    """Alone or in groups of any size, in bfloat16 or in fp32."""
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda device: in_hardware)
    monkeypatch.setattr(parallel, "TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    begin = [torch.randn(*shape, generator=generator) for shape in [(16, 48), (48, 16), (64, 64)] * 3]
    ours, theirs = ([torch.nn.Parameter(b.clone()) for b in begin] for _ in range(2))
    hyper = {"lr": 0.02, "weight_decay": 0.1, "nesterov": True, "adjust_lr_fn": "original"}
    both = ((ours, parallel.Muon(ours, **hyper)), (theirs, torch.optim.Muon(theirs, **hyper)))
    for step in range(5):
        for i, b in enumerate(begin):
            grad = torch.randn(*b.shape, generator=generator)
            for params, _ in both:
                params[i].grad = None if i == step else grad.clone()  # one without a gradient stays as it is
        for _, optimizer in both:
            optimizer.step()
    for a, b, was in zip(ours, theirs, begin):
        assert (a - b).norm() < 0.02 * (b - was).norm()
        assert torch.equal(both[0][1].state[a]["momentum_buffer"], both[1][1].state[b]["momentum_buffer"])
    assert both[0][1].state_dict()["state"].keys() == both[1][1].state_dict()["state"].keys()


@pytest.mark.parametrize("avx512_bf16, amx, held", [(False, False, ""), (True, False, ""), (False, True, ""), (True, True, "avx512_core"),
                                                    (True, False, "AVX512_CORE_BF16")])  # fmt: skip
def test_bfloat16_is_used_only_where_the_processor_multiplies_it(monkeypatch, avx512_bf16, amx, held):
    """AVX-512 alone does not: there bfloat16 takes five times as long as fp32. Nor does a processor that oneDNN is held to treat so."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    iterated = []
    monkeypatch.setattr(parallel, "orthogonal", lambda matrices, *_: iterated.append(matrices.dtype) or matrices)
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    parallel.Muon([p], lr=0.02, adjust_lr_fn="original").step()
    expected = torch.bfloat16 if (avx512_bf16 or amx) and held != "avx512_core" else torch.float32
    assert iterated == [expected] and str(expected) == f"torch.{devices.dtype_on(torch.device('cpu'), 'auto')}"
    for dtype in ("float32", "bfloat16"):
        assert devices.dtype_on(torch.device("cpu"), dtype) == dtype


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 17, 8), (3, 4, 64, 32), (1, 2, 128, 8), (2, 2, 300, 16)])
def test_attention_of_short_sequences_is_pytorchs_and_so_is_its_gradient(dtype, bound, shape):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(4))
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    ours = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    y, theirs = model.ShortAttention.apply(*ours), F.scaled_dot_product_attention(*exact, is_causal=True)
    y.backward(dy.to(dtype))
    theirs.backward(dy)
    for mine, true in zip((y, *(x.grad for x in ours)), (theirs, *(x.grad for x in exact))):
        assert (mine - true).norm() <= bound * true.norm().clamp(min=1e-6), dtype


def test_a_norm_leaves_what_it_is_given():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        was, dy = x.detach().clone(), torch.ones(3, 8, dtype=dtype)
        model.rms_norm(x).backward(dy)
        assert torch.equal(x.detach(), was) and torch.equal(dy, torch.ones_like(dy))


def test_a_model_in_bfloat16_attends_alike_with_either(monkeypatch):
    shape = Shape(depth=2, width=32, heads=4, kv_heads=4, seq_len=48, vocab=64)
    made, (ids, targets) = random_model(shape, seed=3), random_ids(shape, 3, seed=3)
    called, grads = [], []
    monkeypatch.setattr(model.ShortAttention, "apply", lambda *qkv, real=model.ShortAttention.apply: called.append(1) or real(*qkv))
    for short in (512, 0):
        monkeypatch.setattr(model, "SHORT", short)
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(gradients(made, ids, targets))
    assert len(called) == shape.depth
    assert furthest(*grads) < 0.05
