"""Averaging and its wire formats: whatever the format, everyone ends with the same bits and nothing is lost for good."""

import queue
import threading
from collections import defaultdict

import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

import sync
import wire
from sync import Averager
from wire import BLOCK, FORMATS


class Mail:
    """Stands in for a gloo group: messages between members that are threads."""

    def __init__(self):
        self.boxes = defaultdict(queue.SimpleQueue)

    def of(self, rank):
        group, boxes = type("Group", (), {})(), self.boxes
        done = type("Done", (), {"wait": lambda self, timeout: None})

        def send(tensors, to, tag):
            boxes[rank, to, tag].put(tensors[0].clone())
            return done()

        def recv(tensors, source, tag):
            work = done()
            work.wait = lambda timeout: tensors[0].copy_(boxes[source, rank, tag].get(timeout=20))
            return work

        group.send, group.recv = send, recv
        return group


def together(averagers, theta, ends, weights, wire_, peers=None):
    """One attempt of all members at once; returns their votes."""
    mail, votes = Mail(), [None] * len(ends)
    for a in averagers:
        a.use(wire_)

    def member(i):
        ring = peers(i) if peers else sync.Ring(mail.of(i), i, len(ends), 20.0, wire_)
        votes[i] = averagers[i].average(theta, ends[i], weights[i], ring)

    threads = [threading.Thread(target=member, args=(i,)) for i in range(len(ends))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    return votes


def decoded(averager):
    out = torch.zeros(wire.num_bytes("fp32", averager.numel) // 4)
    FORMATS[averager.wire].decode(averager.agreed, out)
    return out[: averager.numel]


def members(numel, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(numel, generator=g)
    return theta, [theta + torch.randn(numel, generator=g) for _ in range(count)]


SIZES = st.integers(1, 4 * BLOCK) | st.sampled_from([(1 << 18) - 1, (1 << 18) + 1, 2 << 18])


@examples(40)
@given(SIZES, st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any), st.sampled_from(list(FORMATS)))
def test_all_members_end_with_the_same_bits_and_theta_is_as_it_was(numel, tokens, wire_):
    theta, ends = members(numel, len(tokens))
    before, kept = theta.clone(), [e.clone() for e in ends]
    weights = [n / sum(tokens) for n in tokens]
    each = [Averager(numel, 1) for _ in tokens]
    votes = together(each, theta, ends, weights, wire_)
    assert len(set(votes)) == 1 and all(torch.equal(a.agreed, each[0].agreed) for a in each)
    assert votes[0] == sync.digest(each[0].agreed)
    assert torch.equal(theta, before) and all(map(torch.equal, ends, kept))
    exact = sum(w * (theta - e).double() for w, e in zip(weights, ends))
    worst = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05}[wire_]  # of the largest, about 5
    assert (decoded(each[0]).double() - exact).abs().max() <= worst * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fp32_adds_in_member_order(count):
    """So a ring of any size gives the bits of the star, and of the reference in one process."""
    numel = (1 << 18) + 1000
    theta, ends = members(numel, count)
    weights = [(i + 1) / sum(range(1, count + 1)) for i in range(count)]
    each = [Averager(numel, 1) for _ in ends]
    together(each, theta, ends, weights, "fp32", peers=None if count > 1 else lambda i: sync.Alone())
    expected = torch.zeros(numel)
    for end, weight in zip(ends, weights):
        expected += (theta - end) * torch.tensor(weight)
    assert torch.equal(decoded(each[0]), expected)


def test_a_weight_of_zero_keeps_garbage_out():
    """A joiner, or a member without a step, contributes exact zeros, whatever its buffer holds."""
    for wire_ in FORMATS:
        a = Averager(10, 1)
        a.use(wire_)
        a.agreed.fill_(255)
        a.average(torch.ones(10), torch.full((10,), float("nan")), 0.0, sync.Alone())
        assert torch.equal(decoded(a), torch.zeros(10))


# -- lossy formats --------------------------------------------------------------------------------------------------------


@examples(100)
@given(st.integers(1, 3 * BLOCK), st.integers(-40, 37), st.integers(0, 99), st.sampled_from(["bf16", "int8"]))
def test_an_element_loses_at_most_half_a_step(numel, magnitude, seed, wire_):
    values = torch.zeros(-(-numel // BLOCK) * BLOCK)
    values[:numel] = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    data, back = torch.zeros(wire.num_bytes(wire_, numel), dtype=torch.uint8), torch.empty_like(values)
    FORMATS[wire_].encode(values, data, torch.empty_like(values))
    FORMATS[wire_].decode(data, back)
    rows, off = values.view(-1, BLOCK).double(), (back - values).view(-1, BLOCK).double().abs()
    step = rows.abs().amax(1, keepdim=True) / 127 if wire_ == "int8" else rows.abs() * 2.0**-7
    assert (off <= 0.501 * step + 1e-36).all()


@examples(25)
@given(st.integers(1, 3 * BLOCK), st.integers(1, 4), st.sampled_from(["bf16", "int8"]), st.integers(0, 9))
def test_what_a_round_leaves_out_later_rounds_bring(numel, count, wire_, seed):
    """Error feedback: over any number of rounds, what was applied plus what the members still hold back is what was trained."""
    each, applied, trained = [Averager(numel, 1) for _ in range(count)], 0.0, 0.0
    for round_ in range(6):
        theta, ends = members(numel, count, seed * 10 + round_)
        weights = [1 / count] * count
        votes = together(each, theta, ends, weights, wire_, peers=None if count > 1 else lambda i: sync.Alone())
        assert len(set(votes)) == 1
        for a in each:
            a.kept()
        applied = applied + decoded(each[0]).double()
        trained = trained + sum(w * (theta - e).double() for w, e in zip(weights, ends))
    held_back = sum(a.residual.double() for a in each)
    assert held_back.abs().max() > 0 or numel < 3
    assert (applied + held_back - trained).abs().max() < 2e-3, "to the precision of a residual in bfloat16"


@pytest.mark.parametrize("wire_", ["bf16", "int8"])
def test_a_failed_attempt_leaves_the_residual_as_it_was(wire_):
    theta, ends = members(5000, 2)
    each = [Averager(5000, 1) for _ in ends]
    together(each, theta, ends, [0.5, 0.5], wire_)
    for a in each:
        a.kept()
    residuals = [a.residual.clone() for a in each]

    class Cut(sync.Ring):
        def _move(self, tag, there, here):
            raise RuntimeError("Connection closed by peer")

    for a, end in zip(each, ends):
        with pytest.raises(RuntimeError, match="closed by peer"):
            a.average(theta, end, 0.5, Cut(None, 0, 2, 1.0, wire_))
    assert all(torch.equal(a.residual, r) for a, r in zip(each, residuals))
    again = together(each, theta, ends, [0.5, 0.5], wire_)
    other = [Averager(5000, 1) for _ in ends]
    for a, r in zip(other, residuals):
        a.use(wire_)
        a.restore(r.clone())
    assert again == together(other, theta, ends, [0.5, 0.5], wire_), "as if the failed attempt had not been"


@pytest.mark.parametrize("wire_", list(FORMATS))
@pytest.mark.parametrize("outer", ["none", "nesterov"])
def test_the_outer_step_with_agreed_bytes_is_the_outer_step_with_what_they_mean(wire_, outer):
    numel = (1 << 18) + 77
    theta, ends = members(numel, 1)
    a = Averager(numel, 1)
    a.use(wire_)
    a.average(theta, ends[0], 1.0, sync.Alone())
    plain, model = theta.clone(), torch.empty(numel)
    m, m_plain = torch.full((numel,), 0.1), torch.full((numel,), 0.1)
    sync.apply_agreed_(a.agreed, wire_, theta, m, (outer, 0.7, 0.9), also=model)
    sync.outer_step_(plain, m_plain, decoded(a), outer, 0.7, 0.9)
    assert torch.equal(theta, plain) and torch.equal(m, m_plain) and torch.equal(model, theta)


@examples(60)
@given(st.floats(1e4, 1e11), st.floats(1e4, 1e11), st.floats(1.0, 3600.0), st.integers(1, 10**9))
def test_auto_is_the_most_exact_format_that_fits_and_never_less_exact_on_a_faster_link(a, b, train_s, numel):
    order = list(FORMATS)
    slow, fast = (wire.choose(numel, rate, train_s) for rate in sorted((a, b)))
    assert order.index(fast) <= order.index(slow)
    fits = [f for f in order if wire.num_bytes(f, numel) / min(a, b) <= wire.WIRE_SHARE * train_s]
    assert slow == (fits[0] if fits else order[-1])
    took = {f: wire.num_bytes(f, numel) / min(a, b) for f in order}
    assert wire.choose(numel, 1e15, train_s, took) == slow, "what was measured counts, not what the link was taken for"


@examples(60)
@given(st.lists(st.sampled_from([1.0, -3e38, 3e38, float("inf"), float("-inf"), float("nan"), 0.0]), min_size=1, max_size=9))
def test_finite_means_every_element(values):
    assert sync.all_finite(torch.tensor(values)) == bool(torch.isfinite(torch.tensor(values)).all())
