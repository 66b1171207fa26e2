"""Laws of the policies that beat the paper's, of the forecasts they rest on and of the programme that plans."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, examples
from hypothesis import example, given
from hypothesis import strategies as st

import carbon
import config
import floor
import report
import scheduler
import simulate
from carbon import Trace
from config import BadInput
from forecast import Forecast
from scheduler import Threshold

sys.path.insert(0, str(REPO / "bench"))
import deadline as bench_deadline
import policies as bench_policies

START = 1_767_225_600
SITES = ("california", "texas", "south_australia")


def play(columns: list[list[float]], *keys: str, before: int = 0):
    """Simulate one to three sites on 5-minute columns of g/kWh, `before` samples of which precede the run. -> records, run, cfg, traces"""
    names = SITES[: len(columns)]
    cfg = config.load([str(REPO / "configs/ours.yaml"), f"only=[{','.join(names)}]", "carbon.baseline_regions=[]", "policy.off_delay_s=0",
                       f"clock.start={np.datetime64(START + 300 * before, 's')}Z", *keys])  # fmt: skip
    traces = {}
    for name, column in zip(names, columns):
        region = cfg.sites[name].region
        traces[region] = Trace(region, START + 300 * np.arange(len(column), dtype=np.int64), np.array(column, float), 300)
    run, samples = simulate.new_run(cfg, traces)
    records: list[dict] = []
    simulate.drive(run, samples, journal=records.extend)
    return records, run, cfg, traces


def moves(records, *to: str) -> list[tuple[float, str, str]]:
    return [(r["t_s"], r["site"], r["to"]) for r in records if r["type"] == "site" and r["to"] in to and r["reason"] != "run ended"]


levels = st.lists(st.sampled_from([0.0, 40.0, 95.0, 105.0, 150.0, 400.0, 800.0]), min_size=60, max_size=60)


# -- forecasts -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 900), min_size=288, max_size=288), st.integers(1, 600))
def test_a_grid_that_repeats_itself_every_day_is_forecast_exactly(day, n):
    f = Forecast("yesterday", 300.0, days=1)
    f.remember("a", np.array(day))
    f.observe(0.0, "a", day[0])
    assert f.ahead(0.0, "a", n) == pytest.approx(np.resize(day, n), abs=1e-9)


@given(
    st.lists(st.floats(0, 900), min_size=1, max_size=500),
    st.floats(0, 900),
    st.integers(1, 400),
    st.sampled_from(["persistence", "yesterday"]),
)
def test_a_forecast_begins_with_the_present_and_is_never_below_zero(past, now, n, kind):
    f = Forecast(kind, 300.0, days=3)
    f.remember("a", np.array(past))
    f.observe(0.0, "a", now)
    ahead = f.ahead(120.0, "a", n)
    assert len(ahead) == n and ahead[0] == now and np.isfinite(ahead).all() and (ahead >= 0).all()
    assert kind == "yesterday" or (ahead == now).all()


def test_an_issued_forecast_counts_while_it_lasts_and_then_the_profile_goes_on_from_its_end():
    f = Forecast("issued", 300.0, decay_s=600.0)
    f.remember("a", np.full(288, 200.0))
    f.observe(0.0, "a", 50.0, (np.array([300.0, 600.0]), np.array([60.0, 70.0])))
    ahead = f.ahead(0.0, "a", 288)
    assert list(ahead[:3]) == [50.0, 60.0, 70.0] and 70 < ahead[3] < 200 and ahead[-1] == pytest.approx(200.0)
    assert list(f.ahead(300.0, "a", 2)) == [50.0, 70.0], "five minutes later its second value comes next"


# -- the programme ---------------------------------------------------------------------------------------------------


def brute(costs, begins, age, on, gap) -> np.ndarray:
    """Least cost of each k over all 2^n choices."""
    n, best = len(costs), np.full(len(costs) + 1, np.inf)
    for pick in itertools.product([False, True], repeat=n):
        runs = [list(g) for _, g in itertools.groupby(range(n), key=lambda i: pick[i])]
        cost, ok, before = 0.0, True, on
        for run in runs:
            if pick[run[0]]:
                carried = on and run[0] == 0
                ok &= len(run) >= age or carried
                cost += sum(costs[i] for i in run) + (0.0 if carried else begins[run[0]])
            elif before:
                ok &= len(run) >= gap or run[-1] == n - 1
            before = pick[run[0]]
        if on and not pick[0] and runs[0][-1] < n - 1:
            ok &= len(runs[0]) >= gap
        if ok:
            best[sum(pick)] = min(best[sum(pick)], cost)
    return best


numbers = st.lists(st.integers(0, 50).map(float), min_size=8, max_size=8)


@examples(60)
@given(numbers, numbers, st.integers(1, 3), st.booleans(), st.integers(1, 3))
def test_the_programme_finds_what_trying_everything_finds_and_says_how(costs, begins, age, on, gap):
    costs, begins = np.array(costs), np.array(begins)
    curve, choices = floor.programme(costs, begins, age, on, gap)
    assert curve == pytest.approx(brute(costs, begins, age, on, gap))
    for k in np.flatnonzero(np.isfinite(curve)):
        picked = floor.trained(choices, int(k))
        starts = picked & ~np.concatenate(([on], picked[:-1]))
        assert picked.sum() == k and (costs[picked].sum() + begins[starts].sum()) == pytest.approx(curve[k])


@examples(60)
@given(st.lists(numbers, min_size=1, max_size=3), st.data())
def test_work_is_shared_out_for_the_least(columns, data):
    curves = [np.concatenate(([0.0], np.cumsum(column))) for column in columns]
    need = data.draw(st.integers(0, 8 * len(curves)))
    taken = floor.share_out(curves, need)
    best = min(sum(c[k] for c, k in zip(curves, ks)) for ks in itertools.product(range(9), repeat=len(curves)) if sum(ks) == need)
    assert sum(taken) == need and sum(c[k] for c, k in zip(curves, taken)) == pytest.approx(best)
    assert floor.share_out(curves, 8 * len(curves) + 1) is None


# -- online ----------------------------------------------------------------------------------------------------------


@examples(30)
@given(levels)
def test_break_even_rides_a_gap_for_just_what_a_restart_emits(column):
    records, _run, cfg, traces = play([column], "policy.name=break_even")
    site, trace = cfg.sites.california, traces[cfg.sites.california.region]
    restart_g = site.idle_kw * 100 * (site.provision_s + site.startup_s) / 3600
    ups = moves(records, "provisioning", "off")
    for (a, _, to), (b, _, _) in zip(ups, [*ups[1:], (300.0 * len(column), "", "")]):
        if to != "provisioning":
            continue
        seconds = np.arange(a, b)
        values = trace.values[(seconds // 300).astype(int)]
        begins = int(np.flatnonzero(values <= 100)[-1]) + 1 if (values <= 100).any() else 0
        excess_g = site.train_kw * np.maximum(values[begins:] - 100, 0).sum() / 3600
        assert excess_g <= restart_g + 1.0, "it rode on for more than a restart costs"
        if b < 300 * len(column):
            assert excess_g >= restart_g - 1.0, "it stopped although riding on was still cheaper"


@examples(30)
@given(levels)
def test_a_gate_that_knows_the_truth_wastes_no_start(column):
    records, _run, _cfg, _ = play([column], "policy.name=forecast_gate", "policy.forecast=truth")
    for t, _, _ in moves(records, "provisioning"):
        assert max(column[int(t // 300) : int(t // 300) + 2]) < 100
    ends = dict(zip([t for t, *_ in moves(records, "provisioning")], [t for t, *_ in moves(records, "off")]))
    assert all(off - on >= 580 for on, off in ends.items())


@examples(60)
@given(
    st.lists(levels, min_size=2, max_size=3), st.integers(1, 2), st.sampled_from(["threshold", "forecast_gate", "percentile", "break_even"])
)
def test_never_more_sites_than_max_sites_and_none_above_a_cap(columns, most, name):
    records, run, cfg, traces = play(columns, f"policy.name={name}", f"policy.max_sites={most}", "policy.cap_g_per_kwh=120",
                                     "policy.off_above_g_per_kwh=500", "policy.on_below_g_per_kwh=500")  # fmt: skip
    up: set[str] = set()
    for r in records:
        if r["type"] == "site":
            (up.discard if r["to"] == "off" else up.add)(r["site"])
            assert len(up) <= most
            if r["to"] == "provisioning":
                assert r["mci_g_per_kwh"] <= 120
    for row in run.meter.closed(records[-1]["t_s"]):
        if row.state == "training":
            values = traces[cfg.sites[row.site].region].values[int(row.start_s // 300) : int((row.end_s - 1e-6) // 300) + 1]
            assert values.max() <= 120, "a cap is hard: it stops at the very sample"


@examples(15)
@given(column=levels, prices=levels)
def test_what_a_policy_decides_by_may_be_price(column, prices, tmp_path_factory):
    """By price on (MCI, prices), or by carbon on a grid whose MCI is that price: the same moves."""
    path = tmp_path_factory.mktemp("prices") / "price.csv"
    rows = [f"{np.datetime64(START + 300 * i, 's')},{x}" for i, x in enumerate(prices)]
    cfg = config.load([str(REPO / "configs/ours.yaml")])
    path.write_text(f"time,{cfg.sites.california.region}\n" + "\n".join(rows) + "\n")
    by_price, *_ = play([column], "policy.name=threshold", "policy.objective=price", f"price.trace={path}")
    by_mci, *_ = play([prices], "policy.name=threshold")
    assert moves(by_price, "provisioning", "off") == moves(by_mci, "provisioning", "off")
    mix, *_ = play([column], "policy.name=threshold", "policy.objective=mix", "policy.mix_kg_per_currency=1", f"price.trace={path}")
    sums, *_ = play([[a + b for a, b in zip(column, prices)]], "policy.name=threshold")
    assert moves(mix, "provisioning", "off") == moves(sums, "provisioning", "off")


def test_a_percentile_runs_about_its_share_of_any_grid():
    rng = np.random.default_rng(3)
    column = list(500 + 100 * rng.standard_normal(288 * 8))  # never below 100
    records, _run, _cfg, _ = play([column], "policy.name=percentile", "policy.percentile=30", before=288 * 2)
    assert not moves(play([column], "policy.name=threshold")[0], "provisioning")
    share = sum(column[i] <= np.quantile(column[:i], 0.3) for i in range(288 * 2, len(column))) / (288 * 6)
    assert len(moves(records, "provisioning")) > 100 and 0.25 < share < 0.35


# -- with a deadline -------------------------------------------------------------------------------------------------

days = st.lists(st.sampled_from([0.0, 60.0, 250.0, 400.0, 420.0, 800.0]), min_size=8, max_size=8)


def beside_always(columns, hours: float, slack: float, *keys: str) -> tuple[float, float]:
    """Any grid, whose every value lasts 90 minutes; the deadline is slack x what always-on takes. -> when it was done, the deadline"""
    columns = [[x for x in column for _ in range(18)] * 6 for column in columns]
    tokens = max(1, round(hours * len(columns) * 3600 * 190_832 / 524_288)) * 524_288
    always, *_ = play(columns, f"budget.tokens={tokens}", *keys, "policy.name=always")
    by_s = slack * always[-1]["t_s"]
    records, run, *_ = play(columns, f"budget.tokens={tokens}", f"policy.deadline_h={by_s / 3600}", *keys)
    assert run.code == 0
    return records[-1]["t_s"], by_s


grids, works, slacks = st.lists(days, min_size=1, max_size=3), st.floats(2.0, 6.0), st.floats(1.05, 3.0)
kinds = st.sampled_from(["persistence", "yesterday", "truth"])


BUSY_START = [[420.0, 60.0, 60.0, 0.0, 400.0, 800.0, 400.0, 800.0], [420.0, 250.0, 250.0, 800.0, 0.0, 420.0, 0.0, 250.0],
              [420.0, 60.0, 60.0, 0.0, 400.0, 800.0, 400.0, 800.0]]  # fmt: skip


@examples(40)
@example(BUSY_START, 3.6576416947057324, 1.2600928146432282, "yesterday", (615, 30))  # who starts second waits for a whole round
@given(grids, works, slacks, kinds, st.sampled_from([(515, 130), (615, 30)]))
def test_a_deadline_is_kept_whatever_the_grid_does(columns, hours, slack, forecast, rounds):
    keys = [f"rounds.train_s={rounds[0]}", f"rounds.sync_s={rounds[1]}"]
    done_s, by_s = beside_always(columns, hours, slack, *keys, "policy.name=deadline", f"policy.forecast={forecast}")
    assert done_s <= by_s


@examples(5)
@given(grids, works, slacks, kinds)
def test_a_plan_with_a_deadline_ends_within_a_round_of_it(columns, hours, slack, forecast):
    done_s, by_s = beside_always(columns, hours, slack, "policy.name=plan", f"policy.forecast={forecast}")
    assert done_s <= by_s + 600


@pytest.mark.slow
def test_no_draw_on_real_months_misses(reference_data):
    traces, rng = bench_deadline.months(reference_data), np.random.default_rng(7)
    rows = [bench_deadline.play(bench_deadline.draw(rng), traces, "deadline", "policy.forecast=yesterday") for _ in range(12)]
    assert all(r["kept"] for r in rows)
    assert np.median([r["kg"] / r["floor_kg"] for r in rows]) < np.median([r["always_kg"] / r["floor_kg"] for r in rows])


# -- the paper's day, and months -------------------------------------------------------------------------------------


def compare(reference_data, names: list[str], *keys: str) -> list[dict]:
    return simulate.compare([str(REPO / "configs/ours.yaml"), f"carbon.trace={reference_data / 'paper_mci_2026-01-11.csv'}",
                             "policy.off_delay_s=0", *keys], names)  # fmt: skip


def test_the_paper_s_day_online(reference_data):
    (gate,) = compare(reference_data, ["forecast_gate"], "rounds.train_s=515", "rounds.sync_s=130")
    assert gate["emissions_kg"] <= 0.98 and gate["runtime_h"] <= 14.9
    (gate,) = compare(reference_data, ["forecast_gate"], "rounds.train_s=615", "rounds.sync_s=30")
    assert gate["emissions_kg"] <= 1.00 and gate["runtime_h"] <= 13.9


def test_the_paper_s_day_planned_with_a_perfect_forecast(reference_data):
    early, late = compare(reference_data, ["oracle@14.6", "oracle@16"], "rounds.train_s=615", "rounds.sync_s=30")
    assert early["emissions_kg"] <= 0.74 and early["runtime_h"] <= 14.6 and early["emissions_kg"] > early["floor_kg"]
    assert late["emissions_kg"] <= 0.52 and late["runtime_h"] <= 16 and late["emissions_kg"] > late["floor_kg"]
    (plan,) = compare(reference_data, ["plan@16"], "rounds.train_s=615", "rounds.sync_s=30", "policy.forecast=truth")
    assert plan["emissions_kg"] == late["emissions_kg"], "oracle is plan that knows the truth"


def test_the_gate_wastes_fewer_starts_on_real_months(reference_data):
    for keys, region, forecasts in bench_policies.months().values():
        at_once = bench_policies.play(keys, region, "policy.name=threshold")
        gate = bench_policies.play(keys, region, "policy.name=forecast_gate", f"policy.forecast={'issued' if forecasts else 'yesterday'}")
        assert gate["g_per_kwh"] <= at_once["g_per_kwh"] and gate["hours"] >= 0.9 * at_once["hours"] and gate["wasted"] < at_once["wasted"]
        if forecasts:
            assert (at_once["wasted"], at_once["starts"]) == (44, 143) and at_once["g_per_kwh"] == pytest.approx(25, abs=0.5)
            assert gate["wasted"] <= 26


# -- the command -----------------------------------------------------------------------------------------------------


def test_policies_are_compared_in_a_table_and_a_figure(tmp_path):
    argv = [sys.executable, "simulate.py", "configs/ours.yaml", "--policies", "threshold,oracle@16", "--out", str(tmp_path), "--json"]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=120)
    out = json.loads(done.stdout)
    assert [r["policy"] for r in out["rows"]] == ["threshold", "oracle@16"] and out["rows"][0]["floor_kg"] < out["rows"][0]["emissions_kg"]
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    lines = simulate.compared(out["rows"]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| threshold | ")


@pytest.mark.parametrize("keys, says", [
    (["policy.name=deadline"], "policy.name=deadline needs policy.deadline_h"),
    (["policy.name=greedy"], "policy.name=greedy is not one of threshold, break_even"),
    (["policy.objective=price", "price.trace=null"], "policy.objective=price.*set price.trace"),
    (["policy.max_sites=0"], "policy.max_sites=0 must be > 0, or null"),
    (["policy.percentile=0"], "policy.percentile=0.0 must be > 0 and <= 100"),
    (["policy.forecast=tarot"], "policy.forecast=tarot is not one of persistence"),
    (["policy.min_window_s=-1"], "policy.min_window_s=-1.0 must be >= 0"),
])  # fmt: skip
def test_what_a_policy_cannot_do_is_one_line(keys, says):
    with pytest.raises(BadInput, match=says) as error:
        config.load([str(REPO / "configs/ours.yaml"), *keys])
    assert "\n" not in str(error.value)


class Eager(Threshold):
    """What a user may write: the paper's policy with bounds of its own."""

    def wants(self, t, name, site):
        return "keep" if site.value is None else "start" if site.value < 250 else "stop"


def test_a_policy_made_from_another_gets_the_samples_it_needs(monkeypatch):
    columns = [[40.0, 105.0, 150.0, 400.0, 150.0, 105.0] * 30, [105.0, 400.0, 400.0] * 60]
    keys = ("policy.name=threshold",)
    bounds = play(columns, *keys, "policy.on_below_g_per_kwh=250", "policy.off_above_g_per_kwh=250")[0]
    monkeypatch.setitem(scheduler.POLICIES, "threshold", Eager)
    assert moves(play(columns, *keys)[0], "provisioning", "off") == moves(bounds, "provisioning", "off") != []


@pytest.mark.parametrize("keys, says", [
    (["policy.name=threshold", "policy.off_delay_s=600"], "threshold: MCI, on below 100, off above 100 gCO2/kWh for 600 s"),
    (["policy.name=forecast_gate"], "forecast_gate: MCI, on below 100, off above 100 gCO2/kWh"),
    (["policy.name=always"], "always: whatever the grid does"),
    (["policy.name=percentile"], "percentile: MCI, the lowest 20 % of the last 168 h"),
    (["policy.name=deadline", "policy.deadline_h=16"], "deadline: MCI, the budget within 16 h"),
    (["policy.name=plan", "policy.cap_g_per_kwh=300"], "plan: MCI, 24 h ahead; never above 300 gCO2/kWh"),
    (["policy.name=break_even", "policy.objective=price"], "break_even: price, on below 100, off above 100 USD/MWh"),
])  # fmt: skip
def test_what_a_policy_decides_by_is_said_in_its_own_unit(keys, says):
    cfg = config.load([str(REPO / "configs/demo.yaml"), "policy.off_delay_s=0", *keys])
    assert report.policy_words(cfg) == says
    traces = carbon.load_traces(cfg)
    prices = carbon.load_prices(cfg, traces)
    start = config.start_unix(cfg)
    known = report.windows(cfg, "texas", traces, prices, start, start + 18 * 3600)
    assert (known is None) == ("below" not in says)
    if "USD" in says:
        assert known == prices["SPP_TX"].below(100.0, start, start + 18 * 3600)


def test_issued_forecasts_must_stand_beside_the_trace():
    cfg = config.load([str(REPO / "configs/ours.yaml"), "policy.name=forecast_gate", "policy.forecast=issued"])
    with pytest.raises(BadInput, match=r"no columns CAISO_NORTH_f1"):
        carbon.load_forecasts(cfg)
