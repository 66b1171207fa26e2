"""Model, optimizers, averaging, state on disk: small laws in one process."""

import threading

import pytest
import torch
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import config
import data
import sync
from config import BadInput
from model import GPT, Shape, flops_per_token, num_params, shape_of
from optim import Inner, schedule
from train import integrate

DEMO = config.load([str(REPO / "configs/demo.yaml")])


def test_d20_has_the_papers_number_of_parameters():
    shape = shape_of(OmegaConf.merge(DEMO.model, {"depth": 20, "width": None, "heads": None, "kv_heads": None, "seq_len": 2048}), 65536)
    assert (shape.width, shape.heads) == (1280, 10)
    with torch.device("meta"):
        assert num_params(GPT(shape)) == 560_988_160
        scalars = Shape(**{**vars(shape), "residual_scalars": True})
        assert num_params(GPT(scalars)) == 560_988_200
    assert flops_per_token(shape) == 6 * (560_988_160 - 65536 * 1280) + 12 * 20 * 1280 * 2048


def test_the_model_is_causal_and_starts_at_the_uniform_loss():
    model = GPT(Shape(2, 32, 4, 2, 16, 64)).init_weights(0)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    assert model(ids, ids).item() == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=0.05)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 64
    assert torch.equal(model(ids)[:, :9], model(changed)[:, :9])
    assert not torch.allclose(model(ids)[:, 9:], model(changed)[:, 9:])


def test_theta_0_is_a_function_of_seed_and_shape():
    shape = Shape(1, 32, 4, 4, 16, 64)
    a, b, c = (sync.Flat(m).read(m) for m in (GPT(shape).init_weights(s) for s in (1, 1, 2)))
    assert torch.equal(a, b) and not torch.equal(a, c)


@given(st.floats(-1e6, 4e6, allow_nan=False))
def test_the_schedule_is_clamped_at_both_ends(position):
    point = schedule(position, DEMO.budget.tokens, DEMO.data.tokens_per_step, DEMO.optim)
    assert 0.0 <= point.lr_scale <= 1.0 and 0.0 <= point.weight_decay_scale <= 1.0
    assert 0.85 <= point.muon_momentum <= 0.95
    budget = DEMO.budget.tokens
    assert schedule(budget, budget, 2048, DEMO.optim).lr_scale == 0.0
    assert schedule(0, budget, 2048, DEMO.optim).lr_scale == 1.0


@pytest.mark.parametrize("lr, momentum", [(0.7, 0.9), (1.0, 0.3)])
def test_the_outer_step_is_sgd_with_nesterov_on_the_pseudo_gradient(lr, momentum):
    g = torch.Generator().manual_seed(3)
    theta = torch.randn(1000, generator=g)
    m, theirs = torch.zeros(1000), theta.clone().requires_grad_()
    sgd = torch.optim.SGD([theirs], lr=lr, momentum=momentum, nesterov=True)
    for _ in range(5):
        delta = torch.randn(1000, generator=g)
        sync.outer_step_(theta, m, delta, "nesterov", lr, momentum)
        theirs.grad = delta.clone()
        sgd.step()
    assert torch.allclose(theta, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_plain_averaging_is_the_outer_step_with_rate_one_and_no_momentum():
    g = torch.Generator().manual_seed(3)
    theta, delta = torch.randn(100, generator=g), torch.randn(100, generator=g)
    a, b = theta.clone(), theta.clone()
    sync.outer_step_(a, torch.zeros(100), delta, "none", 0.1, 0.9)
    sync.outer_step_(b, torch.zeros(100), delta, "nesterov", 1.0, 0.0)
    assert torch.equal(a, b)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_gloo_gives_all_members_the_same_bits_and_leaves_theta_alone(wire):
    import torch.distributed as dist

    store, results, theta = dist.HashStore(), {}, torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    before = theta.clone()

    def member(rank):
        group = sync.ring_group(store, rank, 3, "lo", 20.0)
        end = theta + torch.randn(10_000, generator=torch.Generator().manual_seed(rank + 1))
        averager = sync.Averager(10_000, 1)
        averager.use(wire)
        results[rank] = averager.average(theta, end, 1 / 3, sync.Ring(group, rank, 3, 20.0, wire))

    threads = [threading.Thread(target=member, args=(r,)) for r in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert len(results) == 3 and len(set(results.values())) == 1 and torch.equal(theta, before)


def test_state_on_disk_keeps_two_and_reads_back_in_pieces(tmp_path):
    folder = sync.StateFolder(tmp_path / "state")
    for r in range(4):
        folder.save(r, torch.full((100,), float(r)), torch.zeros(100), {"digest_theta": str(r)})
    again = sync.StateFolder(tmp_path / "state")
    assert [s["round"] for s in again.manifest] == [2, 3]
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == 2
    assert torch.equal(again.load(3)[0], torch.full((100,), 3.0))
    assert again.read(3, "theta", 40, 80) == bytes(torch.full((10,), 3.0).numpy())
    assert again.read(1, "theta", 0, 1) is None and again.read(3, "secret", 0, 1) is None


def test_inner_optimizer_state_survives_its_file_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    shape = Shape(1, 32, 4, 4, 16, 64)
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))

    def step(model, inner):
        inner.set(schedule(0, 1000, 10, DEMO.optim))
        model(ids[:, :-1], ids[:, 1:]).backward()
        inner.step()
        inner.zero_grad()

    model = GPT(shape).init_weights(0)
    inner = Inner(model, DEMO.optim)
    step(model, inner)
    save_file({k: v.clone() for k, v in inner.tensors().items()}, tmp_path / "i.safetensors")
    twin = GPT(shape)
    twin.load_state_dict(model.state_dict())
    other = Inner(twin, DEMO.optim)
    other.load(load_file(tmp_path / "i.safetensors"))
    step(model, inner)
    step(twin, other)
    assert torch.equal(sync.Flat(model).read(model), sync.Flat(twin).read(twin))


# -- data ---------------------------------------------------------------------------------------------------------------


def corpus_of(runner, **changes):
    return data.Corpus(runner.load(runner.write({"a": {}}, **changes)))


def test_an_epoch_is_a_permutation_and_batches_do_not_depend_on_ranks(runner):
    corpus = corpus_of(runner)
    total = corpus.train_tokens // corpus.seq_len
    order = [int(corpus._order(0)[i]) for i in range(total)]
    assert sorted(order) == list(range(total)) and order != sorted(order)
    assert not (corpus._order(0) == corpus._order(1)).all()
    whole = corpus.batch(3)
    halves = [corpus.batch(3, first, 2) for first in (0, 2)]
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([h[i] for h in halves]))
    assert torch.equal(whole[0][:, 1:], whole[1][:, :-1]), "targets are inputs shifted by one"
    again = corpus_of(runner, seed=2)
    assert not torch.equal(again.batch(3)[0], whole[0])


def test_a_batch_across_two_epochs_is_whole(runner):
    corpus = corpus_of(runner)
    total = corpus.train_tokens // corpus.seq_len
    ids, _ = corpus.batch(total // corpus.rows)
    assert ids.shape == (corpus.rows, corpus.seq_len)


def test_held_out_documents_are_never_trained_on(runner):
    corpus = corpus_of(runner)
    text = {k: b"".join(bytes(s.astype("uint8")) for s in v) for k, v in corpus._shards.items()}
    pieces = [p for p in text["val"].split(b"\0") if len(p) > 500]
    assert pieces and not any(p in text["train"] for p in pieces)


def test_bpe_counts_bytes(runner):
    cfg = runner.load(runner.write({"a": {}}, data={"tokenizer": "bpe-400", "val_tokens": 256}))
    corpus = data.Corpus(cfg)
    tokenizer = data.make_tokenizer(cfg)
    text = "def f(x):\n    return x + 1  # naïve\n"
    tokens = tokenizer.encode([text])[0]
    assert corpus.vocab == 400 and sum(corpus.token_bytes[int(t)] for t in tokens) == len(text.encode())


def test_a_damaged_shard_is_named(runner):
    cfg = runner.load(runner.write({"a": {}}, data={"dir": str(runner.folder / "own")}))
    folder = data.prepare(cfg)
    shard = next(folder.glob("train_*.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(BadInput, match=shard.name):
        data.Corpus(cfg)


def test_a_sites_own_meter_is_power_times_held_samples():
    emitted, mci = integrate([[0.0, 100.0], [300.0, 50.0], [600.0, 400.0]], 100.0, 500.0, 2.0)
    assert emitted == pytest.approx(2.0 * (200 * 100 + 200 * 50) / 3.6e6) and mci == 50.0
