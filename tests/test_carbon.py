"""Laws of traces and accounting."""

import itertools
import math

import numpy as np
import pytest
from conftest import REPO, examples
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import carbon
import config
import floor
import simulate
from carbon import Meter, Trace, emissions_kg, read_trace
from config import BadInput

GOLDEN = {  # 1 kW over the whole file, hold: mean g/kWh, total kg, share below 100
    "CAISO_NORTH": (318.835, 5.765608, 0.336), "SPP_TX": (407.978, 7.377598, 0.378),
    "NEM_SA": (350.358, 6.335648, 0.581), "DE": (751.612, 13.591642, 0.0),
}  # fmt: skip


def trace_of(values, step=300, start=1_000_000, **kw):
    return Trace("X", start + step * np.arange(len(values), dtype=np.int64), np.array(values, float), step, **kw)


traces = st.lists(st.floats(0, 1000), min_size=2, max_size=20).map(trace_of)


@given(traces, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["hold", "linear"]))
def test_splitting_an_interval_changes_nothing(trace, a, b, c, interpolation):
    trace = trace_of(trace.values, interpolation=interpolation)
    t0, t1, t2 = (trace.begin + x * (trace.end - trace.begin) for x in sorted((a, b, c)))
    whole, parts = trace.integral(t0, t2), trace.integral(t0, t1) + trace.integral(t1, t2)
    assert whole == pytest.approx(parts, rel=1e-9, abs=1e-6)


@given(traces, st.floats(0, 1), st.floats(0, 1))
def test_the_integral_is_the_sum_over_a_fine_grid(trace, a, b):
    t0, t1 = sorted(round(trace.begin + x * (trace.end - trace.begin)) for x in (a, b))
    assert trace.integral(t0, t1) == pytest.approx(sum(trace.at(t) for t in range(t0, t1)), rel=1e-9, abs=1e-6)


@given(traces, st.floats(0, 1000))
def test_a_window_edge_belongs_to_one_side(trace, threshold):
    windows = trace.windows(threshold)
    for t in [*map(int, trace.starts), trace.end - 1]:
        assert any(a <= t < b for a, b in windows) == (trace.at(t) < threshold)
    assert all(a < b for a, b in windows) and all(x[1] < y[0] for x, y in zip(windows, windows[1:]))


def test_outside_its_span_a_trace_raises():
    trace = trace_of([1, 2, 3])
    for t in (trace.begin - 1, trace.end):
        with pytest.raises(BadInput, match="the trace covers"):
            trace.at(t)
    with pytest.raises(BadInput):
        trace.integral(trace.begin, trace.end + 1)


@given(st.lists(st.tuples(st.integers(1, 500), st.sampled_from(carbon.STATES)), min_size=1, max_size=30))
def test_meter_intervals_are_gapless_and_do_not_overlap(moves):
    meter, t = Meter(["a"]), 0
    for wait, state in moves:
        t += wait
        meter.set(t, "a", state)
    rows = meter.closed(t + 1)
    assert rows[0].start_s == 0 and rows[-1].end_s == t + 1
    assert all(x.end_s == y.start_s and x.state != y.state for x, y in zip(rows, rows[1:]))


def test_training_overrides_an_overlapping_up(tmp_path):
    path = tmp_path / "i.csv"
    path.write_text("site,state,start_s,end_s\na,train,10,20\na,up,0,100\na,train,30,40\n")
    rows = carbon.read_intervals(str(path))
    assert [(r.state, r.start_s, r.end_s) for r in rows] == [
        ("waiting", 0, 10), ("training", 10, 20), ("waiting", 20, 30), ("training", 30, 40), ("waiting", 40, 100),
    ]  # fmt: skip


def test_the_shipped_day_keeps_the_published_facts():
    path = str(REPO / "traces" / "paper_day.csv")
    means = {"CAISO_NORTH": 318.8, "SPP_TX": 408.0, "NEM_SA": 350.4, "DE": 751.6}
    windows = {
        "CAISO_NORTH": ["17:05-19:05", "19:20-23:25"], "SPP_TX": ["03:05-03:15", "03:20-09:25", "09:30-10:05"],
        "NEM_SA": ["21:40-08:10"], "DE": [],
    }  # fmt: skip
    for region, mean in means.items():
        trace = read_trace(path, region)
        assert trace.values.mean() == pytest.approx(mean, rel=0.01)
        assert [f"{carbon.iso(a)[11:16]}-{carbon.iso(b)[11:16]}" for a, b in trace.windows(100)] == windows[region]


def test_the_shipped_day_is_what_its_script_writes(tmp_path):
    import shutil
    import subprocess
    import sys

    shutil.copy(REPO / "traces" / "make_paper_day.py", tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "make_paper_day.py")], check=True, capture_output=True)
    assert (tmp_path / "paper_day.csv").read_bytes() == (REPO / "traces" / "paper_day.csv").read_bytes()


def test_golden_numbers_of_one_kilowatt(reference_data):
    for region, (mean, total, share) in GOLDEN.items():
        t = read_trace(str(reference_data / "paper_mci_2026-01-11.csv"), region)
        seconds = t.end - t.begin
        assert t.integral(t.begin, t.end) / seconds == pytest.approx(mean, abs=5e-4)
        assert emissions_kg(1.0, t, t.begin, t.end) == pytest.approx(total, abs=5e-7)
        assert sum(b - a for a, b in t.windows(100)) / seconds == pytest.approx(share, abs=5e-4)
    t = read_trace(str(reference_data / "caiso_north_2023-06.csv"))
    assert emissions_kg(1.0, t, t.begin, t.end) == pytest.approx(264.369169, abs=5e-7)
    for name, total in (("gb_2020_mixed_steps.csv", 1992.160763), ("de_2020_gaps.csv", 2927.294080)):
        t = read_trace(str(reference_data / name), max_gap_s=3600)
        assert emissions_kg(1.0, t, t.begin, int(t.starts[-1])) == pytest.approx(total, abs=5e-6)
    spain = read_trace(str(reference_data / "electricitymaps_es_2022.csv"), "Carbon Intensity gCO₂eq/kWh (direct)", max_gap_s=3600)
    assert emissions_kg(1.0, spain, spain.begin, spain.end) == pytest.approx(1460.794250, abs=5e-6)


@pytest.mark.parametrize("rule, between, kg, kwh, baselines", [
    ("exact", "hold", 1.3371, 37.616, (11.407, 14.550, 12.331, 27.071)),
    ("exact", "linear", 1.3903, 37.616, (11.406, 14.550, 12.329, 27.071)),
    ("paper", "hold", 1.3795, 37.722, (11.405, 14.549, 12.327, 27.069)),
])  # fmt: skip
def test_golden_numbers_of_the_paper_run(reference_data, capsys, rule, between, kg, kwh, baselines):
    import json

    code = carbon.main(["account", str(reference_data / "paper_run_intervals.csv"), str(REPO / "configs/demo.yaml"),
                        f"carbon.trace={reference_data / 'paper_mci_2026-01-11.csv'}", f"carbon.interpolation={between}",
                        "--rule", rule, "--json"])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["emissions_kg"] == pytest.approx(kg, abs=5e-4)
    assert result["energy_kwh"] == pytest.approx(kwh, abs=5e-4)
    assert tuple(result["baselines"].values()) == pytest.approx(baselines, abs=1e-3)


def test_the_floor_on_the_real_day(reference_data):
    cfg = config.load([str(REPO / "configs/demo.yaml"), f"carbon.trace={reference_data / 'paper_mci_2026-01-11.csv'}"])
    traces_ = carbon.load_traces(cfg)
    golden = ((11.1, 4.932, 5.030), (12, 3.305, 3.414), (14.6, 0.584, 0.616), (16, 0.350, 0.376), (18, 0.340, 0.366))
    for hours, lp, with_starts in golden:
        assert floor.lp(cfg, traces_, 17.86, hours * 3600) == pytest.approx(lp, rel=5e-3)
        assert floor.with_starts(cfg, traces_, 17.86, hours * 3600) == pytest.approx(with_starts, rel=1e-2)


def test_the_published_run_is_replayed(reference_data):
    """Its protocol on its day: starts, hours, kWh, kg and share of every baseline."""
    cfg = config.load([str(REPO / "configs/paper.yaml"), f"carbon.trace={reference_data / 'paper_mci_2026-01-11.csv'}"])
    s = simulate.simulate(cfg)
    assert s["starts"] == 4 and s["steps"] == 23_400 and s["wasted_tokens"] == 0
    assert s["runtime_h"] == pytest.approx(14.5, abs=0.15)
    assert s["emissions_kg"] == pytest.approx(1.345, abs=0.01)
    assert s["energy_kwh"] == pytest.approx(37.5, abs=0.3)
    shares = sorted(s["emissions_kg"] / kg for kg in s["baselines"].values())
    assert shares[0] > 0.048 and shares[-1] < 0.122


values = st.lists(st.floats(0, 900), min_size=6, max_size=6)


@examples(40)
@given(values, values, st.integers(1, 10), st.floats(0, 900))
@example([1.1125369292536007e-308, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 6, 1, 0.0)  # 1,023 divided by so little is infinite
def test_the_floor_is_what_brute_force_finds(a, b, k, provision_s):
    """Two sites, six quarter-hours: every pair of on/off patterns whose windows last at least 30 minutes."""
    cfg = OmegaConf.create({
        "clock": {"start": "1970-01-12T13:46:40Z"},
        "sites": {n: {"region": n, "train_kw": 2.0, "idle_kw": 0.5, "provision_s": provision_s} for n in "ab"},
    })  # fmt: skip
    traces_ = {n: trace_of(v, step=900) for n, v in zip("ab", (a, b))}

    def curve(n):
        best, trace = [math.inf] * 7, traces_[n]
        for pattern in itertools.product([0, 1], repeat=6):
            runs = [(i, len(list(g))) for i, g in runs_in(pattern)]
            if any(length < 2 for _, length in runs):
                continue
            kg = sum(emissions_kg(2.0, trace, trace.begin + 900 * i, trace.begin + 900 * (i + 1)) for i in range(6) if pattern[i])
            for i, _ in runs:
                before = max(0.0, provision_s - 900 * i)  # ahead of the trace: its first value
                kg += emissions_kg(0.5, trace, trace.begin + 900 * i - (provision_s - before), trace.begin + 900 * i)
                kg += 0.5 * before * trace.values[0] / 3.6e6
            best[sum(pattern)] = min(best[sum(pattern)], kg)
        return best

    curves = [curve(n) for n in "ab"]
    exact = min((curves[0][i] + curves[1][k - i] for i in range(max(0, k - 6), min(6, k) + 1)), default=math.inf)
    got = floor.with_starts(cfg, traces_, k / 4, 5400.0)
    assert got is None if math.isinf(exact) else got == pytest.approx(exact, rel=1e-9, abs=1e-12)
    lp = floor.lp(cfg, traces_, k / 4, 5400.0)
    assert got is None or lp <= got + 1e-12
    cheapest = sorted(v * 2.0 * 900 / 3.6e6 for v in a + b)
    assert lp == pytest.approx(sum(cheapest[:k]), rel=1e-9, abs=1e-12)


def runs_in(pattern):
    """(start, members) of each run of ones."""
    at = 0
    for value, group in itertools.groupby(pattern):
        group = list(group)
        if value:
            yield at, group
        at += len(group)


HEAD, ROW = "time,a", "2026-01-11T17:00:00Z,1"
BAD_TRACES = {
    "empty file": ("", "at least 2"),
    "one sample": (f"{HEAD}\n{ROW}\n", "at least 2"),
    "unknown column": ("time,b\n2026-01-11 17:00,1\n2026-01-11 17:05,1\n", "no column 'a'; it has b"),
    "unparsable time": (f"{HEAD}\n{ROW}\nyesterday,400\n", "row 3.*cannot be read"),
    "mixed offsets": (f"{HEAD}\n{ROW}\n2026-01-11T18:05:00+01:00,400\n", "row 3.*another UTC offset"),
    "naive after aware": (f"{HEAD}\n{ROW}\n2026-01-11T17:05:00,400\n", "row 3.*another UTC offset"),
    "duplicate": (f"{HEAD}\n{ROW}\n{ROW}\n", "row 3.*repeats"),
    "backwards": (f"{HEAD}\n{ROW}\n2026-01-11T16:55:00Z,400\n", "row 3.*goes back"),
    "not a number": (f"{HEAD}\n{ROW}\n2026-01-11T17:05:00Z,nan\n", "row 3.*not a number"),
    "empty cell": (f"{HEAD}\n{ROW}\n2026-01-11T17:05:00Z,\n", "row 3.*not a number"),
    "negative": (f"{HEAD}\n{ROW}\n2026-01-11T17:05:00Z,-4\n", "row 3.*must be >= 0"),
    "gap": (f"{HEAD}\n{ROW}\n2026-01-11T18:05:00Z,400\n", "gap of 3900 s.*max_gap_s"),
    "impossible value": (f"{HEAD}\n{ROW}\n2026-01-11T17:05:00Z,9000\n", "row 3.*no grid reaches"),
    "wrong unit": (f"{HEAD}\n2026-01-11T17:00:00Z,0.4\n2026-01-11T17:05:00Z,0.5\n", "kg/kWh"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_malformed_trace_is_refused_with_row_and_remedy(tmp_path, name):
    text, message = BAD_TRACES[name]
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        read_trace(str(path), "a")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_an_ambiguous_local_time_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("time,a\n2026-10-25 01:00,400\n2026-10-25 02:00,400\n")
    with pytest.raises(BadInput, match="twice or never"):
        read_trace(str(path), tz="Europe/Berlin", max_gap_s=3600)


@pytest.mark.parametrize("unit, factor", [("g/kWh", 1), ("kg/kWh", 1000), ("kg/MWh", 1), ("lb/MWh", 0.45359237),
                                          ("lbs_co2_per_mwh", 0.45359237), ("gCO2eq/kWh", 1)])  # fmt: skip
def test_units_become_grams_per_kilowatt_hour(tmp_path, unit, factor):
    path = tmp_path / "t.csv"
    path.write_text("time,a\n2026-01-11 17:00,0.5\n2026-01-11 17:05,0.4\n" if unit == "kg/kWh"
                    else "time,a\n2026-01-11 17:00,500\n2026-01-11 17:05,400\n")  # fmt: skip
    base = 0.5 if unit == "kg/kWh" else 500
    assert read_trace(str(path), unit=unit).values[0] == pytest.approx(base * factor)


def test_stamps_at_the_end_shift_by_one_step(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("time,a\n2026-01-11 17:05,10\n2026-01-11 17:10,20\n")
    start, end = (read_trace(str(path), stamp=s) for s in ("start", "end"))
    assert end.begin == start.begin - 300 and end.at(start.begin) == 20 and end.at(start.begin - 1) == 10
