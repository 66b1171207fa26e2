"""Laws of the policy and of the round machine: pure, thousands of runs in seconds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, examples
from hypothesis import given
from hypothesis import strategies as st

import carbon
import config
import simulate
from carbon import Meter, Trace
from journal import check
from ledger import Ledger, count, split
from rounds import Facts, Run
from scheduler import Schedule, Site, policy_of


def policy(**given_):
    base = {"name": "threshold", "on_below_g_per_kwh": 100.0, "off_above_g_per_kwh": 100.0, "on_delay_s": 0.0,
            "off_delay_s": 600.0, "min_on_s": 0.0, "min_off_s": 0.0}  # fmt: skip
    return policy_of(SimpleNamespace(**base | given_))


def moves_of(samples, until=10_000, provision_s=0.0, **given_):
    """(t, to) of one site fed (t, mci) samples."""
    schedule = Schedule(policy(**given_), {"a": Site(provision_s, 0.0)}, timed=True)
    out, t, rest = [], 0.0, list(samples)
    while t <= until:
        while rest and rest[0][0] <= t:
            schedule.observe(t, "a", rest.pop(0)[1])
        out += [(m.t_s, m.now) for m in schedule.advance(t) if m.now in ("provisioning", "off")]
        t = min(schedule.next_time(), rest[0][0] if rest else math.inf)
    return out


def test_equality_keeps_the_state():
    assert moves_of([(0, 100.0)]) == []
    assert moves_of([(0, 50.0), (300, 100.0)]) == [(0, "provisioning")]


def test_a_stop_waits_for_the_off_delay_and_is_lifted_by_a_clean_sample():
    assert moves_of([(0, 50), (300, 400)]) == [(0, "provisioning"), (900, "off")]
    assert moves_of([(0, 50), (300, 400), (600, 50)]) == [(0, "provisioning")]
    assert moves_of([(0, 50), (300, 400), (900, 50)]) == [(0, "provisioning")], "a sample at the very moment counts"


def test_unknown_never_starts_and_stops_after_one_nominal_step():
    assert moves_of([(0, None)]) == []
    assert moves_of([(0, 50), (1000, None)]) == [(0, "provisioning"), (1300, "off")]
    assert moves_of([(0, 50), (1000, None), (1200, 50)]) == [(0, "provisioning")]


def test_delays_and_minimum_times_hold():
    assert moves_of([(0, 50)], on_delay_s=120) == [(120, "provisioning")]
    assert moves_of([(0, 50), (60, 400)], off_delay_s=0, min_on_s=500) == [(0, "provisioning"), (500, "off")]
    restart = moves_of([(0, 50), (60, 400), (120, 50)], off_delay_s=0, min_off_s=500)
    assert restart == [(0, "provisioning"), (60, "off"), (560, "provisioning")]


def test_the_policy_starts_and_stops_when_the_paper_s_did(reference_data):
    """On the real trace, every provisioning decision and every stop within one sample of the paper's event log."""
    import csv

    names = {"client_0": "california", "client_1": "texas", "client_2": "south_australia"}
    theirs: dict[tuple, list[float]] = {}
    with open(reference_data / "paper_events.csv") as file:
        for row in csv.DictReader(file):
            kind = {"PROVISION_DECISION": "provisioning", "DEPROVISION_STARTED": "off"}.get(row["event_type"])
            if kind:
                theirs.setdefault((names[row["client"]], kind), []).append(float(row["elapsed_s"]))
    cfg = config.load([str(REPO / "configs/demo.yaml"), f"carbon.trace={reference_data / 'paper_mci_2026-01-11.csv'}"])
    run, samples = simulate.new_run(cfg, carbon.load_traces(cfg))
    records: list[dict] = []
    simulate.drive(run, samples, journal=records.extend)
    ours: dict[tuple, list[float]] = {}
    for r in records:
        if r["type"] == "site" and r["to"] in ("provisioning", "off") and r["reason"] != "run ended":
            ours.setdefault((r["site"], r["to"]), []).append(r["t_s"])
    assert sum(map(len, theirs.values())) >= 6
    for key, times in theirs.items():
        assert len(times) == len(ours[key]), key
        assert all(abs(a - b) <= 300 for a, b in zip(times, ours[key])), (key, times, ours[key])


# -- rounds: any day -------------------------------------------------------------------------------------------------


def make_run(signals, *, rates, budget=60, timed=True, off_delay_s=120.0, sync_s=7.0, train_s=90.0, commit_every_s=100.0,
             max_steps=None, step_s=60):  # fmt: skip
    """signals: site -> list of MCI, one a minute."""
    per_step = 10
    stops = min(len(v) for v in signals.values()) * step_s
    facts = Facts({s: per_step / r for s, r in rates.items()}, dict(rates), per_step, budget, timed, train_s, sync_s, max_steps,
                  commit_every_s, 30.0, 3, stops)  # fmt: skip
    schedule = Schedule(policy(off_delay_s=off_delay_s), {s: Site(13.0, 5.0) for s in signals}, timed)
    traces = {s: Trace(s, step_s * np.arange(len(v), dtype=np.int64), np.array(v, float), step_s) for s, v in signals.items()}
    return Run(facts, schedule, Meter(list(signals))), simulate.Samples(traces, 0)


days = st.integers(1, 4).flatmap(lambda n: st.fixed_dictionaries({
    f"s{i}": st.lists(st.sampled_from([20.0, 500.0]), min_size=8, max_size=8).map(lambda v: [x for x in v for _ in range(7)])
    for i in range(n)
}))  # fmt: skip
settings_ = dict(
    off_delay_s=st.sampled_from([0.0, 60.0, 200.0]), sync_s=st.sampled_from([0.0, 7.0]), train_s=st.sampled_from([20.0, 95.0]),
    commit_every_s=st.sampled_from([None, 30.0, 100.0]), max_steps=st.sampled_from([None, 2]), budget=st.integers(1, 120),
)  # fmt: skip


@examples(300)
@given(days, st.fixed_dictionaries(settings_), st.lists(st.sampled_from([0.5, 1.0, 1.7]), min_size=4, max_size=4))
def test_whatever_joins_and_leaves_every_batch_is_committed_at_most_once_and_all_when_the_budget_ends(signals, given_, speeds):
    rates = {s: r for s, r in zip(signals, speeds)}
    run, samples = make_run(signals, rates=rates, **given_)
    records = [{"t_s": 0.0, "type": "genesis"}]
    simulate.drive(run, samples, journal=records.extend)
    numbered = [{"n": i} | r for i, r in enumerate(records)]
    broken = [line for ok, line in check(numbered, given_["budget"], 10) if not ok]
    assert not broken
    assert run.ended and records[-1]["type"] == "end"
    assert (run.code == 0) == (run.ledger.num_committed == given_["budget"])
    assert run.ledger.num_committed + count(run.ledger.free) == given_["budget"], "no batch is lost"
    rows = run.meter.closed(records[-1]["t_s"])
    for site in signals:
        mine = [r for r in rows if r.site == site]
        assert all(x.end_s == y.start_s for x, y in zip(mine, mine[1:]))
        trained = sum(r.end_s - r.start_s for r in mine if r.state == "training")
        steps = sum(count(c["batches"].get(site, [])) for c in records if c["type"] == "commit")
        assert trained >= steps * 10 / rates[site] - 1e-6, "nobody commits steps it had no time for"


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_ledger_partitions_the_budget(budget, work):
    ledger = Ledger(budget)
    for leased, used in work:
        ranges = ledger.lease(leased)
        kept, rest = split(ranges, min(used, count(ranges)))
        ledger.commit(kept)
        ledger.give_back(rest)
        assert ledger.num_committed + count(ledger.free) == budget


def test_a_stop_known_ahead_freezes_one_sync_before_it():
    run, samples = make_run({"a": [20.0] * 8 + [500.0] * 12, "b": [20.0] * 20}, rates={"a": 1.0, "b": 1.0}, budget=500)
    records = []
    simulate.drive(run, samples, journal=records.extend)
    off = next(r["t_s"] for r in records if r["type"] == "site" and r["site"] == "a" and r["to"] == "off")
    last = [r for r in records if r["type"] == "attempt" and "a" in r["members"]][-1]
    assert off == 600.0 and last["t_s"] + 7.0 <= off
    assert any(r["type"] == "commit" and r["t_s"] == last["t_s"] + 7.0 and "a" in r["batches"] for r in records)


def test_a_stop_not_known_ahead_syncs_past_the_stop_at_idle_power():
    run, samples = make_run({"a": [20.0] * 8 + [500.0] * 12, "b": [20.0] * 20}, rates={"a": 1.0, "b": 1.0}, budget=500, off_delay_s=0.0)
    records = []
    simulate.drive(run, samples, journal=records.extend)
    assert any(r["type"] == "attempt" and r["t_s"] == 480.0 and "a" in r["members"] for r in records)
    tail = [r for r in run.meter.closed(records[-1]["t_s"]) if r.site == "a" and r.start_s >= 480.0]
    assert [(r.state, r.start_s, r.end_s) for r in tail[:2]] == [("syncing", 480.0, 487.0), ("off", 487.0, tail[1].end_s)]


def test_weights_follow_tokens():
    run, samples = make_run({"a": [20.0] * 20, "b": [20.0] * 20}, rates={"a": 2.0, "b": 0.5}, budget=300)
    records = []
    simulate.drive(run, samples, journal=records.extend)
    for attempt in (r for r in records if r["type"] == "attempt"):
        total = sum(attempt["tokens"].values())
        assert attempt["weights"] == {s: n / total for s, n in attempt["tokens"].items()}
    assert any(r["tokens"]["a"] >= 4 * r["tokens"]["b"] > 0 for r in records if r["type"] == "attempt")


# -- three drivers, one decision-maker -------------------------------------------------------------------------------


def drive_in_real_time(run: Run, samples, timed: Facts, store_s: float = 0.0, fetch_s: float | None = None) -> list[dict]:
    """The wall-clock machine with sites that report exactly when the virtual clock says they would; or with stores and
    downloads that take longer."""
    records, queue, t = [], [], 0.0

    def later(at, call):
        queue.append((at, len(queue), call))

    def freeze(now, site, number, opened):
        if run.now and run.now.number == number and site in run.now.members:
            steps = min(count(run.now.leases[site]), int((now - opened) / timed.step_s[site] + 1e-6))
            run.frozen(now, site, steps)

    def carry_out(a, t):
        d = a.data
        if a.kind == "start":
            later(t + 13.0, lambda now: run.provisioned(now, a.site))
        elif a.kind == "fetch":
            wait = 5.0 if run.schedule.sites[a.site].state == "starting" else timed.sync_s
            wait = wait if fetch_s is None else fetch_s
            assert d["round"] <= run.stored, "only stored states are served"
            later(t + wait, lambda now: run.current(now, a.site, d["round"]))
        elif a.kind == "open" and d["mode"] == "local":  # a local member freezes by itself, at a step's end
            (site,) = d["members"]
            steps = min(count(d["leases"][site]), -int(-timed.commit_every_s / timed.step_s[site] // 1))
            later(t + steps * timed.step_s[site], lambda now: freeze(now, site, d["round"], t))
        elif a.kind == "freeze":
            opened = run.now.open_s
            for site in d["members"]:
                later(t, lambda now, site=site: freeze(now, site, d["round"], opened))
        elif a.kind == "attempt":
            for site in d["members"]:
                later(t + timed.sync_s, lambda now, site=site: run.voted(now, site, d["attempt"], ""))
        elif a.kind == "store" or (a.kind == "commit" and d["sender"]):
            made = d["round"] + (a.kind == "commit")
            later(t + store_s, lambda now: run.store_done(now, made, "", ""))
        elif a.kind == "evaluate":
            later(t, lambda now: run.evaluated(now, d["round"], None, None))

    while not run.ended:
        for site, mci, ahead in samples.due(t):
            run.observe(t, site, mci, ahead)
        while True:
            for entry in sorted((q for q in queue if q[0] <= t), key=lambda q: q[:2]):
                queue.remove(entry)
                entry[2](t)
            run.advance(t)
            new, actions = run.take()
            records += new
            for action in actions:
                carry_out(action, t)
            if not actions and not any(q[0] <= t for q in queue):
                break
        t = min(x for x in [run.next_time(), samples.next_time(), *(q[0] for q in queue)] if x > t) if not run.ended else t
    return records


@examples(60)
@given(days, st.sampled_from([60.0, 200.0]))
def test_the_wall_clock_decides_as_the_virtual_clock_does(signals, off_delay_s):
    """Fed the same observations and reports, both take the same turns: who is on when, who trains with whom."""
    rates = dict.fromkeys(signals, 1.0)
    options = dict(rates=rates, off_delay_s=off_delay_s, train_s=90.0, budget=10_000)
    virtual, samples = make_run(signals, **options)
    expected: list[dict] = []
    simulate.drive(virtual, samples, journal=expected.extend)
    wall, samples = make_run(signals, timed=False, **options)
    got = drive_in_real_time(wall, samples, virtual.facts)

    def turns(records):
        return [(r["t_s"], r["site"], r["to"]) for r in records if r["type"] == "site" and r["reason"] != "run ended"]

    def phases(records):
        done = {r["round"] for r in records if r["type"] == "commit"}
        teams = [(r["mode"], r["members"]) for r in records if r["type"] == "open" and r["round"] in done]
        return [team for i, team in enumerate(teams) if i == 0 or team != teams[i - 1]]

    assert turns(got) == turns(expected)
    assert phases(got) == phases(expected)


@examples(150)
@given(days, st.sampled_from([0.0, 60.0, 200.0]), st.sampled_from([0.0, 15.0, 70.0]), st.sampled_from([0.0, 11.0, 100.0]),
       st.integers(5, 400))  # fmt: skip
def test_slow_stores_and_downloads_lose_no_batch(signals, off_delay_s, store_s, fetch_s, budget):
    options = dict(rates=dict.fromkeys(signals, 1.0), off_delay_s=off_delay_s, train_s=60.0, commit_every_s=30.0, budget=budget)
    facts = make_run(signals, **options)[0].facts
    wall, samples = make_run(signals, timed=False, **options)
    records = [{"t_s": 0.0, "type": "genesis"}, *drive_in_real_time(wall, samples, facts, store_s, fetch_s)]
    assert all(ok for ok, _ in check([{"n": i} | r for i, r in enumerate(records)], budget, 10))
    assert wall.ended and not wall.pending
    assert wall.ledger.num_committed + count(wall.ledger.free) == budget, "no batch is lost"
    assert (wall.code == 0) == (wall.ledger.num_committed == budget)
    stored = [r["round"] for r in records if r["type"] == "store"]
    assert stored == list(range(1, len(stored) + 1)) and wall.stored == wall.round, "nothing committed is left undurable"


def test_the_simulator_refuses_nothing_the_trace_allows():
    run, samples = make_run({"a": [500.0] * 10}, rates={"a": 1.0})
    records = []
    simulate.drive(run, samples, journal=records.extend)
    assert run.code == 3 and "tokens left" in records[-1]["reason"]
    assert pytest.approx(run.meter.closed(600.0)[0].end_s) == 600.0
