"""The protocol with real processes: what sites agree on is what one process would compute."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CLEAN, DIRTY, REPO
from reference import train as reference

import carbon
import config
import simulate
import sync
from journal import check, decision
from ledger import count
from train import Plan, Site


def finished(runner, argv, sites, **kwargs):
    code = runner.run(argv, sites, **kwargs)
    assert code == 0, runner.said() + "".join(runner.said(s) for s in sites)
    journal = runner.journal()
    assert all(ok for ok, _ in check(journal, config.num_batches(runner.load(argv)), 128)), runner.said()
    return journal


def test_one_site_with_plain_local_rounds_is_plain_uninterrupted_training(runner):
    argv = runner.write({"a": {}})
    journal = finished(runner, argv, ["a"])
    commits = [r for r in journal if r["type"] == "commit"]
    assert len(commits) > 3
    cfg = runner.load(argv)
    one_round = [
        {"t_s": 0.0, "type": "open", "round": 0, "rates": {"a": 1.0}},
        {"t_s": 1.0, "type": "commit", "round": 0, "batches": {"a": [[0, config.num_batches(cfg)]]}},
    ]
    assert torch.equal(runner.theta(), reference(cfg, one_round)[-1])


# Unequal rates: 6 and 4 steps a round. A third site, where there is one, joins late.
PAIR = {"a": {}, "b": {"tokens_per_s": 8.6}}


@pytest.mark.parametrize("changes", [
    {"rounds": {"outer": "none"}},
    pytest.param({"rounds": {"outer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9, "inner_state": "reset",
                             "lr_position": "own", "split_steps": False}}, marks=pytest.mark.slow),
    pytest.param({"sync": {"wire": "int8"}}, marks=pytest.mark.slow),
], ids=["plain averaging, split steps", "nesterov, inner state reset", "int8 with error feedback"])  # fmt: skip
def test_two_sites_equal_the_single_process_reference_bit_for_bit(runner, changes):
    argv = runner.write(PAIR, **changes)
    journal = finished(runner, argv, ["a", "b"])
    commits = [r for r in journal if r["type"] == "commit"]
    assert len(commits) >= 4
    weights = next(r for r in journal if r["type"] == "attempt")["weights"]
    assert weights == {"a": 0.6, "b": 0.4}
    thetas = reference(runner.load(argv), journal)
    assert torch.equal(runner.theta(), thetas[-1])


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_ring_and_star_give_the_same_bits(runner, wire):
    """For good in fp32. A lossy star's head node keeps what its sums lost, in a ring the members do: the first round is the same."""
    argv = runner.write(PAIR, sync={"wire": wire})
    for run in ("ring", "star"):
        assert runner.run([*argv, f"run={run}", f"sync.topology={run}"], ["a", "b"]) == 0, runner.said()
        assert all(ok for ok, _ in check(runner.journal(run), 40, 128))
    digests = [[r["digest"] for r in runner.journal(run) if r["type"] == "commit"] for run in ("ring", "star")]
    assert digests[0][0] == digests[1][0] and len(digests[0]) >= 4
    if wire == "fp32":
        assert digests[0] == digests[1] and torch.equal(runner.theta("ring"), runner.theta("star"))
    else:
        losses = [runner.summary(run)["val_loss"] for run in ("ring", "star")]
        assert abs(losses[0] / losses[1] - 1) < 0.01


# a alone, then a + b, then c comes on in the middle of one of their rounds, then a's window closes, then only c.
DAY = {"a": [CLEAN] * 8 + [DIRTY], "b": [DIRTY] * 2 + [CLEAN] * 9 + [DIRTY], "c": [DIRTY] * 4 + [CLEAN]}
THREE = {"a": {}, "b": {"tokens_per_s": 10.0}, "c": {"startup_s": 17}}


@pytest.mark.slow
@pytest.mark.parametrize("topology, wire", [("ring", "fp32"), ("star", "fp32"), ("ring", "int8")])
def test_a_day_of_joins_and_leaves_follows_the_reference_and_the_simulator(runner, topology, wire):
    argv = runner.write(THREE, DAY, budget={"tokens": 128 * 180}, sync={"topology": topology, "wire": wire})
    journal = finished(runner, argv, list(THREE))
    cfg = runner.load(argv)

    # The simulator, fed the same trace, decides alike.
    run, samples = simulate.new_run(cfg, carbon.load_traces(cfg))
    records: list[dict] = []
    simulate.drive(run, samples, journal=records.extend)
    live = [decision(r) for r in journal if r["type"] not in ("genesis", "eval")]
    assert sorted(live) == sorted(map(decision, records))

    # Its intervals are the simulator's: the accounting rests on decisions alone.
    rows = carbon.read_intervals(str(runner.run_dir / "intervals.csv"))
    assert rows == run.meter.closed(records[-1]["t_s"])

    # A joiner during a round took part with zero tokens, and was current after it.
    attempts = [r for r in journal if r["type"] == "attempt"]
    joined = [r for r in attempts if r["tokens"].get("c") == 0]
    assert joined and joined[0]["members"] == ["a", "b", "c"]
    after = next(r for r in journal if r["type"] == "open" and r["round"] == joined[0]["round"] + 1)
    assert "c" in after["members"]
    modes = [r["mode"] for r in journal if r["type"] == "open"]
    assert modes[0] == modes[-1] == "local" and "federated" in modes
    assert max(len(r["members"]) for r in attempts) == 3

    # The same model as in one process, to the last bit and round.
    thetas = reference(cfg, journal)
    stored = {r["round"]: r["digest_theta"] for r in journal if r["type"] == "store"}
    for number in range(1, len(thetas)):
        assert stored[number] == sync.digest(thetas[number]), f"round {number}"


@pytest.mark.slow
def test_three_sites_in_a_ring_equal_the_reference_bit_for_bit(runner):
    argv = runner.write({"a": {}, "b": {"tokens_per_s": 10.0}, "c": {}}, budget={"tokens": 128 * 16}, eval={"every_rounds": 0})
    journal = finished(runner, argv, ["a", "b", "c"])
    assert [r["tokens"] for r in journal if r["type"] == "commit"] == [128 * 16]
    assert torch.equal(runner.theta(), reference(runner.load(argv), journal)[-1])


@pytest.mark.slow
def test_two_ranks_a_site_train_the_same_model(runner):
    argv = runner.write({"a": {"ranks": 2}}, budget={"tokens": 128 * 6})
    head = runner.start("coordinator.py", *argv, log="coordinator")
    runner.start("torchrun", "--nproc_per_node=2", str(REPO / "train.py"), *argv, "site=a", log="a")
    assert head.wait(120) == 0, runner.said() + runner.said("a")
    start, one = reference(runner.load(argv), [
        {"t_s": 0.0, "type": "open", "round": 0, "rates": {"a": 1.0}},
        {"t_s": 1.0, "type": "commit", "round": 0, "batches": {"a": [[0, 6]]}},
    ])  # fmt: skip
    # Two halves of a batch add up in another order than the whole, and both optimizers amplify rounding (AdamW by the
    # gradient's sign, Muon in bfloat16), so single entries may differ: the way travelled is what must be the same.
    assert (runner.theta() - one).norm() <= 2e-3 * (one - start).norm()


@pytest.mark.slow
def test_the_same_run_twice_writes_the_same_journal_and_summary(runner):
    argv = runner.write(PAIR, {"a": [CLEAN] * 6 + [DIRTY], "b": [CLEAN]}, budget={"tokens": 128 * 60})
    kept = []
    for _ in range(2):
        finished(runner, [*argv, "fresh=true"], ["a", "b"])
        journal = [{k: v for k, v in r.items() if k != "wall"} for r in runner.journal()]
        summary = {k: v for k, v in runner.summary().items() if k != "wall"}
        kept.append((journal, summary))
    assert kept[0] == kept[1]


def test_the_learning_rate_position_after_the_last_step_is_the_budget(runner):
    """Over a day of joins and leaves; with one member to the token, with several to within a step of theirs."""
    cfg = runner.load(runner.write(THREE, DAY, budget={"tokens": 128 * 180}))
    run, samples = simulate.new_run(cfg, carbon.load_traces(cfg))
    records: list[dict] = []
    simulate.drive(run, samples, journal=records.extend)
    assert run.committed_tokens == cfg.budget.tokens
    committed, per_step = 0, cfg.data.tokens_per_step
    opened = {r["round"]: r for r in records if r["type"] == "open"}
    for commit in (r for r in records if r["type"] == "commit"):
        rates = opened[commit["round"]]["rates"]
        for site, ranges in commit["batches"].items():
            ratio = sum(rates.values()) / rates[site]
            plan = Plan(commit["round"], "federated", [], committed, ratio, done=count(ranges))
            after = Site.position(SimpleNamespace(cfg=cfg), plan)
            assert abs(after - min(committed + commit["tokens"], cfg.budget.tokens)) <= per_step * ratio * (len(rates) > 1)
        committed += commit["tokens"]
    assert committed == cfg.budget.tokens
