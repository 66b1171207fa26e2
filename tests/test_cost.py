"""What a run costs: price x power, by the same exact integrals as emissions, in every summary; it decides nothing."""

import csv
import io
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import CLEAN, DIRTY, REPO, examples
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import carbon
import config
import figures
import report
import simulate
from carbon import Interval, Reading, Trace
from config import BadInput

START = 1768150800  # 2026-01-11 17:00 UTC
SPEC = {"region": "X", "price_region": None, "tokens_per_s": 1.0, "idle_kw": 0.5, "train_kw": 2.0}
CFG = OmegaConf.create({
    "clock": {"start": "2026-01-11T17:00:00Z"}, "carbon": {"curtailed_below_g_per_kwh": 100.0, "baseline_regions": ["X"]},
    "price": {"trace": "p.csv", "unit": "EUR/MWh"}, "sites": {"a": SPEC},
})  # fmt: skip
MCI = {"X": Trace("X", START + 300 * np.arange(20), np.linspace(0.0, 700.0, 20), 300)}


def prices_of(values, step_s=900) -> dict[str, Trace]:
    return {"X": Trace("X", START + step_s * np.arange(len(values)), np.array(values, float), step_s)}


def cost_of(rows, prices, readings=()):
    return carbon.account(rows, CFG, MCI, readings, prices)["cost"]


prices = st.lists(st.floats(-1000, 20000), min_size=7, max_size=7).map(prices_of)
days = st.lists(st.tuples(st.sampled_from(carbon.STATES), st.integers(1, 900)), min_size=1, max_size=6).map(
    lambda parts: [Interval("a", s, float(sum(n for _, n in parts[:i])), float(sum(n for _, n in parts[: i + 1])))
                   for i, (s, _) in enumerate(parts)]
)  # fmt: skip


# -- laws --------------------------------------------------------------------------------------------------------------


@examples()
@given(days, prices, st.lists(st.integers(0, 5400), max_size=8))
def test_splitting_an_interval_never_changes_cost(rows, prices, cuts):
    pieces = []
    for r in rows:
        edges = [r.start_s, *(float(t) for t in sorted(set(cuts)) if r.start_s < t < r.end_s), r.end_s]
        pieces += [Interval(r.site, r.state, a, b) for a, b in zip(edges, edges[1:])]
    assert cost_of(pieces, prices) == pytest.approx(cost_of(rows, prices), rel=1e-9, abs=1e-6)


@examples()
@given(days, st.floats(-500, 500, allow_subnormal=False))  # 5e-324 a MWh costs nothing
def test_a_constant_price_costs_price_times_energy_and_a_negative_one_pays(rows, price):
    spent = carbon.account(rows, CFG, MCI, prices=prices_of([price] * 7))
    assert spent["cost"] == pytest.approx(price * spent["energy_kwh"] / 1000, rel=1e-9, abs=1e-9)
    assert spent["cost"] * price >= 0 and (spent["cost"] != 0) == (spent["energy_kwh"] * price != 0)


@examples()
@given(days, prices)
def test_cost_is_the_sum_over_seconds_and_over_states_and_leaves_the_rest_alone(rows, prices):
    spent = carbon.account(rows, CFG, MCI, prices=prices)
    price = np.repeat(prices["X"].values, 900)
    by_hand = sum(carbon.power_kw(CFG.sites.a, r.state) * price[int(r.start_s) : int(r.end_s)].sum() / 3.6e6 for r in rows)
    assert spent["cost"] == pytest.approx(by_hand, rel=1e-9, abs=1e-6)
    assert sum(spent["sites"]["a"]["cost_by_state"].values()) == pytest.approx(by_hand, rel=1e-9, abs=1e-6)
    free = carbon.account(rows, CFG, MCI)
    assert free["cost"] is None and set(free) == set(spent) and set(free["sites"]["a"]) == set(spent["sites"]["a"])
    assert all(free[k] == spent[k] for k in ("energy_kwh", "emissions_kg", "curtailed_share"))


def test_cost_follows_the_meter():
    rows = [Interval("a", "training", 0.0, 3600.0)]
    readings = [Reading("a", "p", t, 6.0 * (t > 0), "nvml") for t in (0.0, 3600.0)]  # thrice the model's 2 kWh
    assert cost_of(rows, prices_of([100.0, -100.0, 300.0, 40.0, 0.0, 0.0])) == pytest.approx(0.17)
    assert cost_of(rows, prices_of([100.0, -100.0, 300.0, 40.0, 0.0, 0.0]), readings) == pytest.approx(3 * 0.17)


# -- the shipped day ---------------------------------------------------------------------------------------------------

DEMO = [
    str(REPO / "configs/demo.yaml"),
    f"carbon.trace={REPO / 'traces/paper_day.csv'}",
    f"price.trace={REPO / 'traces/paper_day_price.csv'}",
]


def read_prices() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Hours since 17:00 and the columns, read without our loader."""
    with open(REPO / "traces/paper_day_price.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    hours = np.array([np.datetime64(r["time"][:-1]) - np.datetime64("2026-01-11T17:00") for r in rows]) / np.timedelta64(1, "h")
    return hours, {name: np.array([float(r[name]) for r in rows]) for name in rows[0] if name != "time"}


def test_the_shipped_prices_are_what_their_script_writes_and_fall_below_0_in_the_windows(tmp_path):
    for name in ("make_paper_day_price.py", "paper_day.csv"):
        shutil.copy(REPO / "traces" / name, tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "make_paper_day_price.py")], check=True, capture_output=True)
    assert (tmp_path / "paper_day_price.csv").read_bytes() == (REPO / "traces/paper_day_price.csv").read_bytes()
    cfg = config.load(DEMO)
    traces = carbon.load_traces(cfg)
    prices = carbon.load_prices(cfg, traces)
    assert list(prices) == list(traces)
    for region, price in prices.items():
        mci = np.array([traces[region].integral(t, min(t + 3600, traces[region].end)) for t in price.starts])
        assert np.corrcoef(mci[:-1], price.values[:-1])[0, 1] > 0.9 or region == "DE"
        assert (price.values < 0).any() == bool(traces[region].windows(100))


def test_a_simulated_day_costs_what_an_independent_sum_says(tmp_path):
    cfg = config.load(DEMO)
    summary = simulate.simulate(cfg, folder=tmp_path)
    hours, columns = read_prices()
    total, per_s = 0.0, 50  # points of a grid
    hour = np.arange(18 * 3600 * per_s) // (3600 * per_s)
    for name, site in cfg.sites.items():
        kw = np.zeros(len(hour))
        for line in (tmp_path / "intervals.csv").read_text().splitlines()[1:]:
            who, state, a, b = line.split(",")
            if who == name and state != "off":
                kw[round(float(a) * per_s) : round(float(b) * per_s)] = site.train_kw if state == "training" else site.idle_kw
        cost = float((kw * columns[site.region][hour]).sum() / per_s / 3.6e6)
        assert summary["sites"][name]["cost"] == pytest.approx(cost, abs=2e-5)
        total += cost
    assert summary["cost"] == pytest.approx(total, abs=5e-5) and summary["cost"] < 0
    assert summary["currency"] == "USD" and summary["cost_with_pue"] == summary["cost"]
    seconds = np.minimum(np.maximum(summary["tokens"] / 38.6 - 3600 * hours, 0.0), 3600.0)
    alone = {region: float((column * seconds).sum() * 2.024 / 3.6e6) for region, column in columns.items()}
    assert summary["baselines_cost"] == pytest.approx(alone) and min(alone.values()) > summary["cost"]
    scaled = simulate.simulate(config.load([*DEMO, "carbon.pue=1.5"]))
    assert scaled["cost"] == summary["cost"] and scaled["cost_with_pue"] == 1.5 * summary["cost"]
    text = report.table(summary, cfg)
    assert f"cost                       {summary['cost']:.3f} USD" in text and f"{summary['baselines_cost']['DE']:.3f} USD" in text


def test_prices_decide_nothing_and_without_them_all_is_as_before(tmp_path):
    priced, free = (config.load([*DEMO, *more]) for more in ([], ["price.trace=null"]))
    assert config.schedule_digest(priced) == config.schedule_digest(free) and config.train_digest(priced) == config.train_digest(free)
    with_, without = (simulate.simulate(cfg, folder=tmp_path / name) for cfg, name in ((priced, "priced"), (free, "free")))
    for name in ("journal.jsonl", "intervals.csv"):
        assert (tmp_path / "priced" / name).read_bytes() == (tmp_path / "free" / name).read_bytes()
    keys = ("cost", "currency", "cost_with_pue", "baselines_cost")
    assert set(with_) == set(without) and all(without[k] is None for k in keys) and all(with_[k] is not None for k in keys)
    for summary in (with_, without):
        for part in [summary, *summary["sites"].values()]:
            for key in (*keys, "cost_by_state"):
                part.pop(key, None)
        assert (summary["provenance"].pop("price") is None) == (summary is without)
    assert with_ == without and "USD" not in report.table(simulate.simulate(free), free)


def test_a_sweep_has_the_cost_of_each_point(capsys):
    assert simulate.main([*DEMO, "--sweep", "policy.off_delay_s=0,600"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(r["cost"]) for r in rows] == [
        simulate.simulate(config.load([*DEMO, f"policy.off_delay_s={s}"]))["cost"] for s in (0, 600)
    ]
    assert {r["currency"] for r in rows} == {"USD"}


def test_account_tells_the_cost(tmp_path, capsys):
    summary = simulate.simulate(config.load(DEMO), folder=tmp_path)
    for more, cost in (([], summary["cost"]), (["--rule", "paper"], None)):
        assert carbon.main(["account", str(tmp_path / "intervals.csv"), *DEMO, *more, "--json"]) == 0
        got = json.loads(capsys.readouterr().out)
        assert got["cost"] == (cost and pytest.approx(cost)) and got["currency"] == "USD"
    assert carbon.main(["describe", str(REPO / "traces/paper_day_price.csv"), "unit=USD/MWh", "column=DE"]) == 0
    assert "USD/MWh; below 0: 0.0 %" in capsys.readouterr().out


# -- price traces ------------------------------------------------------------------------------------------------------


def price_file(tmp_path, cells, header="time,CAISO_NORTH,SPP_TX,NEM_SA", first="2026-01-11T17:00"):
    at = np.datetime64(first) + np.arange(len(cells)) * np.timedelta64(1, "h")
    (tmp_path / "p.csv").write_text("\n".join([header, *(f"{t}:00Z" + f",{c}" * header.count(",") for t, c in zip(at, cells))]) + "\n")
    return f"price.trace={tmp_path / 'p.csv'}"


def test_units_columns_and_baselines_without_a_price(tmp_path):
    argv = [*DEMO, price_file(tmp_path, ["-0.05", *["0.25"] * 19], "time,CAISO_NORTH,HB_WEST,NEM_SA"), "price.unit=EUR/kWh"]
    cfg = config.load([*argv, "sites.texas.price_region=HB_WEST"])
    prices = carbon.load_prices(cfg)
    assert list(prices) == ["CAISO_NORTH", "HB_WEST", "NEM_SA"] and list(prices["HB_WEST"].values[:2]) == [-50.0, 250.0]
    summary = simulate.simulate(cfg)
    assert summary["currency"] == "EUR" and list(summary["baselines_cost"]) == ["CAISO_NORTH", "SPP_TX", "NEM_SA", "DE"]
    assert summary["baselines_cost"]["DE"] is None and summary["baselines_cost"]["SPP_TX"] > 0 and "- EUR" not in report.table(summary, cfg)
    assert summary["provenance"]["price"]["columns"]["texas"] == "HB_WEST"


@pytest.mark.parametrize("cells, more, says", [
    (["1"] * 10, [], "covers 2026-01-11 17:00:00Z to 2026-01-12 03:00:00Z, not all of"),
    (["1"] * 20, ["sites.texas.price_region=HB_WEST"], "no column 'HB_WEST'.*sites.X.price_region"),
    (["1", "nan", *["1"] * 18], [], "row 3: CAISO_NORTH is 'nan', not a number"),
    (["1"] * 20, ["price.unit=usd/MWh"], "price.unit=usd/MWh is not CURRENCY/MWh"),
    (["1"] * 20, ["price.unit=g/kWh"], "price.unit=g/kWh is not CURRENCY/MWh"),
    (["1"] * 20, ["price.max_gap_s=1800"], "exceeds price.max_gap_s=1800"),
    (["1"] * 20, ["price.tz=Mars/Base"], "price.tz='Mars/Base'"),
    (["1"] * 20, ["price.stamp=middle"], "price.stamp=middle is not one of start, end"),
    (["1"] * 20, ["price.trace=nowhere.csv"], "nowhere.csv does not exist"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_a_price_trace_that_would_make_the_accounting_guess_is_refused(tmp_path, cells, more, says):
    with pytest.raises(BadInput, match=says) as error:
        carbon.load_prices(config.load([*DEMO, price_file(tmp_path, cells), *more]))
    assert "\n" not in str(error.value)
    assert carbon.load_prices(config.load([*DEMO, price_file(tmp_path, ["-99999"] * 20)]))["SPP_TX"].values[0] == -99999


# -- figures, wandb, real processes ------------------------------------------------------------------------------------


def not_rendered(fig, folder, name):
    """In the place of figures.save, which takes seconds a picture."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").touch()
    figures.plt.close(fig)
    return folder / f"{name}.png"


def test_every_figure_of_emissions_has_its_cost(tmp_path, monkeypatch):
    folders = {"priced": [], "free": ["price.trace=null"]}
    for name, more in folders.items():
        cfg = config.load([*DEMO, *more, f"run={name}"])
        simulate.simulate(cfg, folder=tmp_path / name)
        steps = [{"t_s": 900.0 * i, "round": 0, "loss": 5 - 0.05 * i, "wall": {"unix": i}} for i in range(1, 30)]
        (tmp_path / name / "california.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    priced, free = (figures.load(tmp_path / name) for name in folders)
    end_s, total = max(r.end_s for r in priced["rows"]), priced["summary"]["cost"]
    paid = figures.emitted_kg(priced, np.array([0.0, end_s]), paid=True)
    assert paid[0] == 0.0 and paid[1] == pytest.approx(total, rel=1e-9)
    for make in (figures.timeline, figures.power):
        with_, without = make(priced), make(free)
        labels = [axis.get_ylabel() for axis in with_.axes]
        assert len(with_.axes) > len(without.axes) and any("USD" in label for label in labels)
        assert not any("USD" in axis.get_ylabel() for axis in without.axes)
        if make is figures.power:  # cost so far ends at the total, beside the kilograms so far
            ends = {axis.get_ylabel().split()[0]: axis.lines[0].get_ydata()[-1] for axis in with_.axes if "so far" in axis.get_ylabel()}
            assert ends == {"kgCO$_2$": pytest.approx(priced["summary"]["emissions_kg"]), "USD": pytest.approx(total)}
        for fig in (with_, without):
            figures.plt.close(fig)
    (axis,) = figures.cost([priced]).axes
    assert [p.get_width() for p in axis.patches] == pytest.approx([total, *priced["summary"]["baselines_cost"].values()])
    monkeypatch.setattr(figures, "save", not_rendered)
    made = {path.name for path in figures.draw_all([priced, free], tmp_path / "both")}
    assert {"cost.png", "loss_over_cost.png"} <= made
    head, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in (tmp_path / "both/table.md").read_text().splitlines())
    assert [row[head.index("cost")] for row in rows[1:]] == [f"{total:.3f} USD", ""]
    made = {path.name for path in figures.draw_all([free], tmp_path / "none")}
    assert not {"cost.png", "loss_over_cost.png"} & made and "cost" not in (tmp_path / "none/table.md").read_text()


def test_wandb_sees_cost_beside_emissions_and_price_beside_intensity():
    cfg, seen = config.load(DEMO), []
    traces = carbon.load_traces(cfg)
    panel = types.SimpleNamespace(cfg=cfg, lines=types.SimpleNamespace(add=id), wandb=types.SimpleNamespace(log=seen.append))
    record = dict.fromkeys(("tokens", "t_s", "emissions_kg", "loss", "lr", "tok_per_s", "mci_g_per_kwh", "power_kw", "energy_kwh"), 1.0)
    report.Panel.step(panel, record | {"wall": {}, "cost": -0.5, "price_per_mwh": -40.0}, "local")
    assert (seen[0]["cost/usd"], seen[0]["price/per_mwh"]) == (-0.5, -40.0)
    rows = [Interval("california", "training", 0.0, 3600.0)]
    run = types.SimpleNamespace(committed_tokens=1, mode="local")
    for prices in (carbon.load_prices(cfg, traces), None):
        report.Panel.log(panel, {"type": "commit", "t_s": 3600.0}, run, traces, prices, lambda t: rows, [])
    assert seen[1]["cost/usd"] == pytest.approx(read_prices()[1]["CAISO_NORTH"][0] * 2.024 / 1000)
    assert {k for k in seen[1] if k.startswith("price/")} == {"price/CAISO_NORTH", "price/SPP_TX", "price/NEM_SA"}
    assert seen[1]["price/SPP_TX"] == read_prices()[1]["SPP_TX"][1]
    assert {k for k in seen[1] if k not in seen[2]} == {"cost/usd", "price/CAISO_NORTH", "price/SPP_TX", "price/NEM_SA"}


@pytest.mark.slow
def test_a_real_run_logs_the_cost_that_its_intervals_say(runner):
    """Sites that come and go, prices that change in the middle of rounds: every logged step has what was paid by then."""
    dear, cheap = 90.0, -30.0
    argv = runner.write({"a": {}, "b": {}}, {"a": [CLEAN] * 10 + [DIRTY], "b": [DIRTY] * 3 + [CLEAN]})
    stamp = np.datetime64("2026-01-11T17:00:00") + np.arange(580) * np.timedelta64(42, "s")
    lines = ["time,a,west", *(f"{t}Z,{(dear, cheap)[i % 2]},{(cheap, dear)[i % 3 == 0]}" for i, t in enumerate(stamp))]
    (runner.folder / "price.csv").write_text("\n".join(lines) + "\n")
    argv += ["price.trace=price.csv", "sites.b.price_region=west", "log.every_steps=1"]
    assert runner.run(argv, ["a", "b"]) == 0, runner.said()
    summary = runner.summary()
    assert f"cost                       {summary['cost']:.3f} USD" in runner.said()
    cfg, priced = runner.load([*argv[:1], f"price.trace={runner.folder / 'price.csv'}", "sites.b.price_region=west"]), {}
    for name in ("a", "b"):
        steps = report.read_lines(runner.run_dir / f"{name}.jsonl")
        rows = [r for r in carbon.read_intervals(str(runner.run_dir / "intervals.csv")) if r.site == name]
        for step in steps:
            until = [Interval(r.site, r.state, r.start_s, min(r.end_s, step["t_s"])) for r in rows if r.start_s < step["t_s"]]
            spent = carbon.account(until, cfg, carbon.load_traces(cfg), prices=carbon.load_prices(cfg))["sites"][name]
            assert step["cost"] == pytest.approx(spent["cost"], abs=1e-9) and step["emissions_kg"] == pytest.approx(spent["emissions_kg"])
        priced[name] = {step["price_per_mwh"] for step in steps}
    assert priced == {"a": {dear, cheap}, "b": {dear, cheap}} and len(steps) > 5
