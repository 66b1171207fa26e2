"""Optimizers, averaging, state on disk: small laws in one process."""

import threading

import pytest
import torch
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

import config
import sync
from model import GPT, Shape
from optim import Inner, schedule
from train import integrate

DEMO = config.load([str(REPO / "configs/demo.yaml")])


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


def test_a_sites_own_meter_is_power_times_held_samples():
    emitted, mci = integrate([[0.0, 100.0], [300.0, 50.0], [600.0, 400.0]], 100.0, 500.0, 2.0)
    assert emitted == pytest.approx(2.0 * (200 * 100 + 200 * 50) / 3.6e6) and mci == 50.0
