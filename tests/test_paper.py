"""What reproduces the paper: simulator, sweeps, configs that differ in one place, figures, report, referee."""

import csv
import html.parser
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, examples
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import AxesImage
from test_schedule import make_run, policy

import carbon
import config
import figures
import simulate
from config import BadInput


def flat(cfg) -> dict:
    def walk(value, key=""):
        if isinstance(value, dict):
            for name, item in value.items():
                yield from walk(item, f"{key}.{name}" if key else name)
        else:
            yield key, value

    return dict(walk(config.plain(cfg)))


# -- simulator -------------------------------------------------------------------------------------------------------

levels = st.lists(st.sampled_from([20.0, 60.0, 99.0, 100.0, 150.0, 500.0]), min_size=40, max_size=40)


@examples(100)
@given(st.lists(levels, min_size=1, max_size=3), st.sampled_from([0.0, 60.0, 200.0]))
def test_samples_that_cannot_change_a_decision_change_nothing(columns, off_delay_s):
    signals = {f"s{i}": column for i, column in enumerate(columns)}
    options = dict(rates=dict.fromkeys(signals, 1.0), off_delay_s=off_delay_s, budget=1000)
    records = []
    for skip in (False, True):
        run, samples = make_run(signals, **options)
        if skip:
            samples = simulate.Samples(samples._traces, 0, matters=policy().matters)
            run.schedule.mci_at = samples.at
        records.append([])
        simulate.drive(run, samples, journal=records[-1].extend)
    assert records[0] == records[1]


@pytest.mark.parametrize("name", ["demo", "paper", "ours", "paper_two_site"])
def test_a_simulated_run_emits_what_its_own_intervals_say(name, tmp_path):
    cfg = config.load([str(REPO / f"configs/{name}.yaml"), f"carbon.trace={REPO / 'traces/paper_day.csv'}"])
    summary = simulate.simulate(cfg, folder=tmp_path)
    rows, traces = carbon.read_intervals(str(tmp_path / "intervals.csv")), carbon.load_traces(cfg)
    kg = kwh = 0.0
    for row in rows:  # by hand, interval by interval
        spec = cfg.sites[row.site]
        kw = carbon.power_kw(spec, row.state)
        start = config.start_unix(cfg)
        kwh += kw * (row.end_s - row.start_s) / 3600
        kg += carbon.emissions_kg(kw, traces[spec.region], start + row.start_s, start + row.end_s) if kw else 0.0
    assert summary["emissions_kg"] == pytest.approx(kg, rel=1e-9) and summary["energy_kwh"] == pytest.approx(kwh, rel=1e-9)
    assert json.loads((tmp_path / "summary.json").read_text())["emissions_kg"] == summary["emissions_kg"]
    with pytest.raises(StopIteration):
        next(r for r in rows if r.start_s >= r.end_s)


def test_a_sweep_is_one_simulation_per_point_of_the_grid(capsys):
    path = str(REPO / "configs/ours.yaml")
    trace = f"carbon.trace={REPO / 'traces/paper_day.csv'}"
    grid = ["policy.off_delay_s=0,600", "only=[california,texas],[south_australia]"]
    assert simulate.main([path, trace, "--sweep", *grid]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["policy.off_delay_s"], r["only"]) for r in rows] == [
        ("0", "[california,texas]"), ("0", "[south_australia]"), ("600", "[california,texas]"), ("600", "[south_australia]"),
    ]  # fmt: skip
    for row in rows:
        one = simulate.simulate(config.load([path, trace, *(f"{k}={row[k]}" for k in ("policy.off_delay_s", "only"))]))
        assert float(row["emissions_kg"]) == one["emissions_kg"] and int(row["exit"]) == one["exit"]


@pytest.mark.parametrize("argv, says", [
    ([], "key=a,b"), (["policy.off_delay_s"], "not key=a,b"), (["policy.off_delay_s="], "not key=a,b"), (["nosuch.key=1,2"], "nosuch"),
    (["policy.off_delay_s=0,-5"], "must be >= 0"),
])  # fmt: skip
def test_a_wrong_sweep_is_refused_before_anything_is_printed(argv, says, capsys):
    with pytest.raises(BadInput, match=says):
        simulate.main([str(REPO / "configs/ours.yaml"), f"carbon.trace={REPO / 'traces/paper_day.csv'}", "--sweep", *argv])
    assert capsys.readouterr().out == ""


def test_a_simulation_never_overwrites_a_trained_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/ours/state").mkdir(parents=True)
    with pytest.raises(BadInput, match="take run=NEW"):
        simulate.main([str(REPO / "configs/ours.yaml"), f"carbon.trace={REPO / 'traces/paper_day.csv'}", "--write"])


# -- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, base, differs", [
    ("paper_centralized", "paper", {"run", "only", "policy.name"}),
    ("paper_two_site", "paper", {"run", "only", "policy.name"}),
    ("paper_nesterov", "paper", {"run", "rounds.outer", "rounds.outer_lr", "rounds.outer_momentum"}),
    ("mini_centralized", "mini_ours", {"run", "only", "policy.name", "clock.max_hours"}),
])  # fmt: skip
def test_an_experiment_s_config_differs_only_where_the_experiment_does(name, base, differs):
    here, there = (flat(config.load([str(REPO / f"configs/{n}.yaml")])) for n in (name, base))
    common = {k for k in here | there if not k.startswith("sites.")}
    assert {k for k in common if here.get(k) != there.get(k)} == differs
    assert all(there[k] == v for k, v in here.items() if k.startswith("sites."))


def test_ours_differs_from_the_paper_in_the_protocol_alone_and_is_the_default():
    ours, paper = (flat(config.load([str(REPO / f"configs/{n}.yaml")])) for n in ("ours", "paper"))
    default = flat(config.OmegaConf.structured(config.Config))
    assert all(k == "run" or k.startswith("rounds.") for k in ours if ours[k] != paper[k])
    assert all(ours[k] == default[k] for k in ours if k.startswith("rounds."))


def test_a_base_is_found_beside_the_file_and_may_not_lead_back(tmp_path):
    (tmp_path / "b.yaml").write_text((REPO / "configs/demo.yaml").read_text())
    (tmp_path / "a.yaml").write_text("base: b.yaml\nrun: derived\nbudget: {tokens: 204800}\n")
    cfg = config.load([str(tmp_path / "a.yaml"), "seed=3"])
    assert (cfg.run, cfg.budget.tokens, cfg.seed, cfg.model.depth) == ("derived", 204800, 3, 4)
    (tmp_path / "c.yaml").write_text("base: gone.yaml\n")
    with pytest.raises(BadInput, match=r"gone\.yaml does not exist"):
        config.load([str(tmp_path / "c.yaml")])
    (tmp_path / "d.yaml").write_text("base: d.yaml\n")
    with pytest.raises(BadInput, match="leads back to itself"):
        config.load([str(tmp_path / "d.yaml")])


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """Two run folders: schedules as simulated, with steps as a run would log them."""
    folders = []
    for name in ("demo", "mini_centralized"):
        folder = tmp_path_factory.mktemp("runs") / name
        cfg = config.load([str(REPO / f"configs/{name}.yaml"), f"carbon.trace={REPO / 'traces/paper_day.csv'}", f"run={name}"])
        simulate.simulate(cfg, folder=folder)
        for i, site in enumerate(cfg.sites):
            trained = [r for r in carbon.read_intervals(str(folder / "intervals.csv")) if r.site == site and r.state == "training"]
            with open(folder / f"{site}.jsonl", "w") as file:
                for row in trained:
                    for t in np.arange(row.start_s, row.end_s, 60.0):
                        step = {"t_s": float(t), "round": 0, "loss": 1 + 4 * math.exp(-t / 2e4) + 0.01 * i, "wall": {"unix": float(t)}}
                        file.write(json.dumps(step) + "\n")
        folders.append(folder)
    return folders


def marks(axis) -> int:
    """Points and shapes with data in an axes, invisible and empty ones left out."""
    points = sum(np.isfinite(np.asarray(line.get_ydata(), float)).sum() for line in axis.lines if line.get_visible())
    shapes = sum(p.get_width() * p.get_height() > 0 for p in axis.patches if hasattr(p, "get_width"))
    filled = sum(len(c.get_paths()) for c in axis.collections)
    return int(points + shapes + filled + sum(isinstance(i, AxesImage) for i in axis.images))


@pytest.mark.parametrize("make", [figures.timeline, figures.power])
def test_each_figure_of_a_run_shows_its_data(run_dirs, make):
    for folder in run_dirs:
        run = figures.load(folder)
        fig = make(run)
        assert len(fig.axes) >= len(run["cfg"].sites) + 1
        assert all(marks(axis) > 0 for axis in fig.axes)
        assert any("UTC" in axis.get_xlabel() for axis in fig.axes) and any(axis.get_ylabel() for axis in fig.axes)
        figures.plt.close(fig)


@pytest.mark.parametrize("make", [figures.perplexity, figures.loss_over_kgco2, figures.emissions, figures.curtailed])
def test_each_figure_of_all_runs_shows_every_run(run_dirs, make):
    runs = [figures.load(folder) for folder in run_dirs]
    fig = make(runs)
    (axis,) = fig.axes
    assert axis.get_xlabel()
    if make in (figures.perplexity, figures.loss_over_kgco2):
        names = [t.get_text() for t in axis.get_legend().get_texts()]
        assert all(len(line.get_xdata()) > 100 for line in axis.lines[: len(runs)])
    else:
        names = [t.get_text() for t in axis.get_yticklabels()][: len(runs)]
        drawn = [p.get_width() for p in axis.patches]
        assert len(drawn) >= len(runs) + 4
    assert names == [r["cfg"].run for r in runs]
    fig.canvas.draw()
    for legend in filter(None, [axis.get_legend()]):  # a legend covers no data
        assert legend.get_window_extent().y0 >= axis.get_window_extent().y1 - 1
    figures.plt.close(fig)


def test_the_emissions_drawn_over_time_end_at_the_run_s_total(run_dirs):
    for folder in run_dirs:
        run = figures.load(folder)
        end_s = max(r.end_s for r in run["rows"])
        kg = figures.emitted_kg(run, np.array([0.0, end_s]))
        assert kg[0] == 0.0 and kg[1] == pytest.approx(run["summary"]["emissions_kg"], rel=1e-9)


class References(html.parser.HTMLParser):
    """What a page would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            v for k, v in attrs if k in ("src", "href", "srcset", "data", "action") and not v.startswith("data:image/png;base64,")
        ]


def test_the_report_is_one_file_that_needs_no_network(run_dirs, tmp_path):
    argv = [sys.executable, str(REPO / "figures.py"), *map(str, run_dirs), "--out", str(tmp_path)]
    subprocess.run(argv, check=True, capture_output=True, cwd=REPO)
    page = (tmp_path / "report.html").read_text()
    seen = References()
    seen.feed(page)
    assert seen.tags.count("img") == len(list(tmp_path.glob("*.png"))) == 10
    assert not seen.loads and "script" not in seen.tags and "link" not in seen.tags and "url(" not in page
    for word in ("demo", "mini_centralized", "trace_sha256", "tokens_per_step", "validation loss"):
        assert word in page
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| demo")]
    assert len(rows) == 1 and f"{figures.load(run_dirs[0])['summary']['emissions_kg']:.3f}" in rows[0]
    assert b"figures.py" in (tmp_path / "emissions.png").read_bytes() and len(list(tmp_path.glob("*.pdf"))) == 10


# -- referee ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vessim_agrees_with_our_accounting():
    done = subprocess.run([sys.executable, str(REPO / "bench/referee.py"), "--json"], cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 2 and all(abs(r["difference"]) < 1e-3 and r["ours_kg"] > 1 for r in rows.values())
