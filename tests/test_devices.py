"""What machines can do and draw: peaks, meters against made-up counters, and accounts of what meters said."""

import itertools
import json
import queue
import subprocess
import sys
import types

import numpy as np
import pynvml
import pytest
import torch
from conftest import CLEAN, REPO, examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_carbon import trace_of
from test_runs import until

import carbon
import devices
import figures
import report
import shard
from carbon import Interval, Reading
from config import BadInput
from coordinator import Coordinator
from devices import Meter, peak_flops

CPU, GPUS = torch.device("cpu"), [torch.device("cuda", 0), torch.device("cuda", 1)]
WRAP_UJ = 65_532_610_987

# -- peaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, float32, bfloat16", [
    ("NVIDIA A100-SXM4-80GB", 19.5, 312), ("NVIDIA A100 80GB PCIe", 19.5, 312), ("NVIDIA H100 80GB HBM3", 67, 989),
    ("NVIDIA H100 PCIe", 51, 756), ("NVIDIA H100 NVL", 60, 835), ("NVIDIA GH200 480GB", 67, 989), ("NVIDIA L4", 30.3, 121),
    ("NVIDIA L40S", 91.6, 362), ("NVIDIA GeForce RTX 5090", 104.8, 209.5), ("Tesla V100-SXM2-16GB", 15.7, None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
])  # fmt: skip
def test_a_peak_is_of_just_the_gpu_it_is_known_of(monkeypatch, name, float32, bfloat16):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for dtype, tflops in (("float32", float32), ("bfloat16", bfloat16)):
        assert peak_flops(GPUS[0], dtype, None) == (None if tflops is None else 1e12 * tflops)
        assert peak_flops(GPUS[0], dtype, 3.5) == peak_flops(CPU, dtype, 3.5) == 3.5e12
        assert peak_flops(CPU, dtype, None) is None


# -- meters -----------------------------------------------------------------------------------------------------------


class Powercap:
    """A /sys/class/powercap of our own: two packages beside zones that must not be counted."""

    def __init__(self, folder):
        self.folder = folder
        names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "dram", "intel-rapl:2": "psys",
                 "intel-rapl-mmio:0": "package-0"}  # fmt: skip
        for zone, name in names.items():
            (folder / zone).mkdir()
            (folder / zone / "name").write_text(name + "\n")
            (folder / zone / "max_energy_range_uj").write_text(f"{WRAP_UJ}\n")
            self.set(zone, 7)

    def set(self, zone: str, energy_uj: int) -> None:
        (self.folder / zone / "energy_uj").write_text(f"{energy_uj % WRAP_UJ}\n")


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    monkeypatch.setattr(Meter, "_keep_up", lambda meter: None)
    return Powercap(tmp_path)


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, WRAP_UJ - 1), st.lists(st.tuples(st.integers(0, WRAP_UJ - 1), st.integers(0, WRAP_UJ - 1)), max_size=6))
def test_rapl_adds_up_all_packages_over_any_wrap_around(powercap, at_uj, steps):
    now = [at_uj, 0]
    for i in (0, 1):
        powercap.set(f"intel-rapl:{i}", now[i])
    meter = Meter([CPU], "auto", powercap.folder)
    assert meter.method == "rapl" and meter.joules() == 0
    for step in steps:
        now = [a + b for a, b in zip(now, step)]
        for i in (0, 1):
            powercap.set(f"intel-rapl:{i}", now[i])
        assert meter.joules() == pytest.approx((sum(now) - at_uj) / 1e6, rel=1e-12)
        assert meter.joules() == meter.joules()


def test_counters_are_read_between_readings_so_that_none_wraps_twice(powercap, monkeypatch):
    meter, naps = Meter([CPU], "auto", powercap.folder), itertools.count(1)
    monkeypatch.undo()

    def sleep(seconds):
        nap = next(naps)
        if nap > 5:
            raise InterruptedError
        powercap.set("intel-rapl:0", 7 + nap * (WRAP_UJ // 2))

    monkeypatch.setattr(devices.time, "sleep", sleep)
    with pytest.raises(InterruptedError):
        meter._keep_up()
    assert meter.joules() == pytest.approx(2.5 * WRAP_UJ / 1e6)


def test_what_cannot_be_read_is_not_measured(powercap):
    assert Meter([CPU], "model", powercap.folder).method == "model"
    assert Meter([torch.device("mps")], "auto", powercap.folder).method == "model"
    meter = Meter([CPU], "auto", powercap.folder)
    energy = powercap.folder / "intel-rapl:1" / "energy_uj"
    energy.rename(energy.with_name("hidden"))
    assert meter.joules() is None, "for now"
    half = Meter([CPU], "auto", powercap.folder)
    assert (half.method, half.joules()) == ("model", None)
    powercap.set("intel-rapl:1", 7 + 5_000_000)
    assert meter.joules() == 5.0, "the next reading has it"
    assert Meter([CPU], "auto", powercap.folder / "nowhere").method == "model"


class Nvml:
    """As much of pynvml as is used, for GPUs named by UUID."""

    NVMLError, NVMLError_NotSupported, NVML_DEVICE_MIG_ENABLE = pynvml.NVMLError, pynvml.NVMLError_NotSupported, 1

    def __init__(self, millijoules: dict[str, int | None], mig=None, driver: bool = True):
        self.millijoules, self.mig, self.driver = millijoules, mig, driver

    def nvmlInit(self):
        if not self.driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.millijoules:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules[handle] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.millijoules[handle]

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [self.mig, self.mig]


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that CUDA numbers the other way round; make(...) puts an NVML in place."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(uuid="ba"[d.index]))

    def make(*args, **options):
        nvml = Nvml(*args, **options)
        monkeypatch.setattr(devices, "pynvml", nvml)
        return nvml

    return make


def test_nvml_counts_the_gpus_of_the_list_each_once(gpus, powercap):
    nvml = gpus({"GPU-a": 10_000, "GPU-b": 500, "GPU-c": 0}, mig=0)
    alone, both = Meter(GPUS[:1], "auto", powercap.folder / "nowhere"), Meter([*GPUS, GPUS[0]], "auto", powercap.folder)
    assert (alone.method, both.method) == ("nvml", "nvml+rapl")
    nvml.millijoules |= {"GPU-a": 17_000, "GPU-b": 2_500, "GPU-c": 10**9}
    powercap.set("intel-rapl:0", 7 + 250_000)
    assert alone.joules() == 2.0 and both.joules() == 9.25


@pytest.mark.parametrize("counters, options", [
    ({"GPU-a": 1, "GPU-b": None}, {}), ({"GPU-a": 1}, {}), ({"GPU-a": 1, "GPU-b": 1}, {"mig": 1}),
    ({"GPU-a": 1, "GPU-b": 1}, {"driver": False}),
], ids=["one has no counter", "one is not found", "split by MIG", "no driver"])  # fmt: skip
def test_half_a_measurement_is_none(gpus, powercap, counters, options):
    gpus(counters, **options)
    meter = Meter(GPUS, "auto", powercap.folder)
    assert (meter.method, meter.joules()) == ("model", None)


# -- accounts ---------------------------------------------------------------------------------------------------------

SPEC = {"region": "X", "idle_kw": 0.5, "train_kw": 2.0}
CFG = OmegaConf.create({"clock": {"start": "1970-01-12T13:46:40Z"}, "carbon": {"curtailed_below_g_per_kwh": 100}, "sites": {"a": SPEC}})
kw_of = {state: carbon.power_kw(CFG.sites.a, state) for state in carbon.STATES}


@st.composite
def days(draw):
    """A trace, a site's intervals in it, and what the meters of its processes said."""
    values = draw(st.lists(st.floats(0, 900), min_size=20, max_size=20))
    moves = draw(st.lists(st.tuples(st.integers(1, 400), st.sampled_from(carbon.STATES)), min_size=1, max_size=10))
    meter, t = carbon.Meter(["a"]), 0
    for wait, state in moves:
        t += wait
        meter.set(t, "a", state)
    rows, readings, at = meter.closed(t + draw(st.integers(1, 400))), [], 0.0
    for process in range(draw(st.integers(0, 3))):
        kwh = draw(st.floats(0, 5))
        for wait, more in draw(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 0.5)), max_size=8)):
            at, kwh = at + wait, kwh + more
            readings.append(Reading("a", f"p{process}", at, kwh, "rapl"))
    return {"X": trace_of(values)}, rows, readings


def model_kwh(rows, a, b):
    return sum(kw_of[r.state] * max(0.0, min(r.end_s, b) - max(r.start_s, a)) for r in rows) / 3600


def spans(rows, readings):
    """(from, to, kWh) of what counts as measured, the slow way."""
    for x, y in zip(readings, readings[1:]):
        up_s = sum(max(0.0, min(r.end_s, y.t_s) - max(r.start_s, x.t_s)) for r in rows if r.state != "off")
        if x.incarnation == y.incarnation and up_s == y.t_s - x.t_s and model_kwh(rows, x.t_s, y.t_s) > 0:
            yield x.t_s, y.t_s, y.kwh - x.kwh


def close(a, b):
    assert a["energy_kwh"] == pytest.approx(b["energy_kwh"], rel=1e-9, abs=1e-9)
    assert a["emissions_kg"] == pytest.approx(b["emissions_kg"], rel=1e-9, abs=1e-9)
    assert (a["curtailed_share"] or 0) == pytest.approx(b["curtailed_share"] or 0, rel=1e-6, abs=1e-6)


@examples()
@given(days())
def test_what_meters_said_replaces_the_model_where_they_cover_it(day):
    traces, rows, readings = day
    got, measured = carbon.account(rows, CFG, traces, readings), list(spans(rows, readings))
    kwh = sum(kwh for _, _, kwh in measured)
    rest = model_kwh(rows, 0.0, rows[-1].end_s) - sum(model_kwh(rows, a, b) for a, b, _ in measured)
    assert got["energy_kwh"] == pytest.approx(kwh + rest, rel=1e-9, abs=1e-9)
    assert (got["measured_share"] or 0) * got["energy_kwh"] == pytest.approx(kwh, rel=1e-9, abs=1e-9)
    assert got["energy_method"] == got["sites"]["a"]["energy_method"] == ("rapl" if measured else "model")
    assert sum(got["sites"]["a"]["kwh_by_state"].values()) == pytest.approx(got["energy_kwh"])


@examples()
@given(days())
def test_power_keeps_its_shape_and_never_turns_negative(day):
    _, rows, readings = day
    codes, begins, ends, kw, measured = carbon.drawn(carbon.columns(rows)["a"], CFG.sites.a, readings)
    plain = np.array([kw_of[carbon.STATES[c]] for c in codes])
    assert (kw >= 0).all() and (kw[~measured] == plain[~measured]).all() and (begins < ends).all()
    for a, b, kwh in spans(rows, readings):
        scale = kwh / model_kwh(rows, a, b)
        inside = (begins >= a) & (ends <= b)
        assert measured[inside].all() and kw[inside] == pytest.approx(scale * plain[inside])


@examples()
@given(days(), st.lists(st.integers(0, 5000), max_size=6), st.data())
def test_splitting_intervals_or_spans_changes_nothing(day, cuts, data):
    traces, rows, readings = day
    whole = carbon.account(rows, CFG, traces, readings)
    pieces = []
    for r in rows:
        edges = [r.start_s, *(t for t in sorted(set(cuts)) if r.start_s < t < r.end_s), r.end_s]
        pieces += [Interval(r.site, r.state, a, b) for a, b in zip(edges, edges[1:])]
    close(carbon.account(pieces, CFG, traces, readings), whole)
    finer = list(readings)
    for x, y in zip(readings, readings[1:]):  # a reading more, of a meter that agrees with the model's shape
        if (x.t_s, y.t_s, y.kwh - x.kwh) in spans(rows, readings):
            t = x.t_s + data.draw(st.floats(0.01, 0.99)) * (y.t_s - x.t_s)
            share = model_kwh(rows, x.t_s, t) / model_kwh(rows, x.t_s, y.t_s)
            finer.append(Reading("a", x.incarnation, t, x.kwh + share * (y.kwh - x.kwh), "rapl"))
    close(carbon.account(rows, CFG, traces, sorted(finer, key=lambda r: r.t_s)), whole)


@examples()
@given(days())
def test_without_readings_all_is_exactly_the_model(day):
    traces, rows, readings = day
    model = carbon.account(rows, CFG, traces)
    assert model["energy_method"] == "model" and not model["measured_share"]
    assert carbon.account(rows, CFG, traces, readings[:1]) == model
    assert carbon.account(rows, CFG, traces, [Reading("b", r.incarnation, r.t_s, r.kwh, r.method) for r in readings]) == model
    each_anew = [Reading("a", str(i), r.t_s, r.kwh, r.method) for i, r in enumerate(readings)]
    close(carbon.account(rows, CFG, traces, each_anew), model)  # a counter that began anew measured nothing in between


@examples()
@given(days())
def test_the_picture_agrees_with_the_table(day):
    traces, rows, readings = day
    run = {"cfg": CFG, "traces": traces, "rows": rows, "readings": readings}
    kg = figures.emitted_kg(run, np.array([0.0, rows[-1].end_s]))
    assert kg[1] - kg[0] == pytest.approx(carbon.account(rows, CFG, traces, readings)["emissions_kg"], rel=1e-9, abs=1e-12)


def test_two_sites_with_other_meters_are_mixed():
    cfg = OmegaConf.merge(CFG, {"sites": {"b": SPEC, "c": SPEC}})
    rows = [Interval(site, "training", 0.0, 3600.0) for site in "abc"]
    readings = [Reading(s, "p", t, 4.0 * (t > 0), m) for s, m in (("a", "nvml"), ("b", "rapl")) for t in (0.0, 3600.0)]
    got = carbon.account(rows, cfg, {"X": trace_of([100.0] * 20)}, readings)
    assert [got["sites"][s]["energy_method"] for s in "abc"] == ["nvml", "rapl", "model"]
    assert got["energy_method"] == "mixed" and got["energy_kwh"] == 10.0 and got["measured_share"] == 0.8


# -- energy.csv -------------------------------------------------------------------------------------------------------

ROWS = ["a,p,1.0,0.5,rapl", "b,q,1.5,0.1,nvml", "a,p,3.0,0.75,rapl", "a,r,5.0,0.0,rapl"]


def test_energy_csv_is_read_as_it_was_written_but_for_a_torn_line(tmp_path):
    path = tmp_path / "energy.csv"
    assert carbon.readings_of(tmp_path) == []
    path.write_text("\n".join([carbon.READINGS, *ROWS]) + "\na,r,6.0,0.")
    readings = carbon.readings_of(tmp_path)
    assert [carbon.reading_line(r) for r in readings] == ROWS and readings[0] == Reading("a", "p", 1.0, 0.5, "rapl")
    row = carbon.reading_line(Reading("a", "r", 7.0, 0.25, "rapl"))
    report.Lines(path, carbon.READINGS).write(row)
    assert [r.t_s for r in carbon.readings_of(tmp_path)] == [1.0, 1.5, 3.0, 5.0, 7.0], "what came after it is whole"
    for torn in ("", carbon.READINGS[:4], f"{carbon.READINGS}\n", f"{carbon.READINGS}\na,p,1"):  # a crash at the very start
        path.write_text(torn)
        report.Lines(path, carbon.READINGS).write(row)
        assert path.read_text() == f"{carbon.READINGS}\n{row}\n"


@pytest.mark.parametrize(
    "row", ["a,r,5.0,1.0,rapl", "a,r,6.0,nan,rapl", "a,r,inf,1.0,rapl", "a,p,6.0", "b,q,9.0,0.0,nvml", "a,s,6.0,-1.0,x"]
)
def test_a_reading_that_cannot_be_is_refused_with_its_row(tmp_path, row):
    path = tmp_path / "energy.csv"
    path.write_text("\n".join([carbon.READINGS, *ROWS, row]) + "\n")
    with pytest.raises(BadInput, match=r"energy\.csv row 6: "):
        carbon.read_readings(str(path))


def test_account_takes_what_meters_said(tmp_path, capsys):
    intervals, energy = tmp_path / "intervals.csv", tmp_path / "energy.csv"
    intervals.write_text("site,state,start_s,end_s\ncalifornia,training,0,7200\n")
    energy.write_text(f"{carbon.READINGS}\ncalifornia,p,0.0,0.0,nvml+rapl\ncalifornia,p,3600.0,1.012,nvml+rapl\n")
    argv = ["account", str(intervals), str(REPO / "configs/demo.yaml"), "--energy", str(energy)]
    assert carbon.main([*argv, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["energy_kwh"] == pytest.approx(1.012 + 2.024)
    assert (got["energy_method"], got["measured_share"]) == ("nvml+rapl", pytest.approx(1 / 3))
    assert "scaled" in got["provenance"]["energy"]
    assert carbon.main(argv) == 0 and "33 % measured (nvml+rapl)" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--rule paper"):
        carbon.main([*argv, "--rule", "paper"])
    energy.unlink()
    with pytest.raises(BadInput, match="does not exist"):
        carbon.main(argv)


def test_the_coordinator_keeps_one_row_a_second_and_only_what_can_be(tmp_path):
    inbox = queue.Queue()
    head = types.SimpleNamespace(
        t=0.0, incarnations={"a": "p"}, readings=[], last_readings={}, energy=report.Lines(tmp_path / "energy.csv", carbon.READINGS),
        virtual=False, hub=types.SimpleNamespace(is_alive=lambda: True, hear=lambda timeout_s: inbox.get_nowait()), now=lambda: head.t,
    )  # fmt: skip
    head._metered = types.MethodType(Coordinator._metered, head)

    def hears(t, kwh, **more):
        head.t = t
        inbox.put(("a", b"", {"type": "meter", "energy": {"kwh": kwh, "method": "rapl"}} | more, b""))
        Coordinator._receive(head, 0.0)

    for t, kwh in ((10.0, 1.0), (10.5, 1.1), (11.0, 1.2), (12.5, 1.1)):
        hears(t, kwh)
    (tmp_path / "energy.csv").rename(tmp_path / "moved")
    (tmp_path / "energy.csv").mkdir()  # cannot be written: the run goes on, the row waits
    head.incarnations["a"] = "q"
    hears(13.0, 0.0)
    (tmp_path / "energy.csv").rmdir()
    (tmp_path / "moved").rename(tmp_path / "energy.csv")
    hears(14.25, 0.25)
    head.virtual = True
    hears(20.0, 9.0)
    rows = carbon.readings_of(tmp_path)
    assert [(r.incarnation, r.t_s, r.kwh) for r in rows] == [("p", 10.0, 1.0), ("p", 11.0, 1.2), ("q", 13.0, 0.0), ("q", 14.25, 0.25)]
    assert rows == head.readings


def test_wandb_sees_the_mfu_and_who_measured_the_energy():
    seen = []
    panel = types.SimpleNamespace(lines=types.SimpleNamespace(add=id), wandb=types.SimpleNamespace(log=seen.append))
    record = dict.fromkeys(("tokens", "t_s", "emissions_kg", "loss", "lr", "tok_per_s", "mci_g_per_kwh", "power_kw", "energy_kwh"), 1.0)
    report.Panel.step(panel, record | {"wall": {}}, "local")
    report.Panel.step(panel, record | {"wall": {"mfu": 0.5}, "energy_method": "nvml"}, "local")
    assert [(row.get("perf/mfu"), row["energy/method"]) for row in seen] == [(None, "model"), (0.5, "nvml")]


METERED = """
import sys, time
sys.path.insert(0, {repo!r})
import shard, train

class Meter:
    method = "rapl"

    def __init__(self, *_):
        self.began = time.monotonic()

    def joules(self):
        return {watts} * (time.monotonic() - self.began)

shard.Meter = Meter
train.config.command(train.main)
"""


@pytest.mark.slow
def test_a_run_on_the_wall_clock_is_accounted_for_by_its_meters(runner):
    """a has a meter and draws 3 kW, b none; the coordinator dies on the way and comes back."""
    script = runner.folder / "metered.py"
    script.write_text(METERED.format(repo=str(REPO), watts=3000.0))
    argv = runner.write({s: {"tokens_per_s": 2000.0, "energy": e} for s, e in (("a", "auto"), ("b", "model"))}, {s: [CLEAN] for s in "ab"},
                        clock={"mode": "wall"}, budget={"tokens": 128 * 900},
                        rounds={"train_s": 2, "sync_s": 0.2, "commit_every_s": 1, "max_steps": 60})  # fmt: skip
    head = runner.start("coordinator.py", *argv, log="coordinator")
    sites = [runner.start(str(script), *argv, "site=a", log="a"), runner.start("train.py", *argv, "site=b", log="b")]
    until(lambda: len(carbon.readings_of(runner.run_dir)) >= 3)
    head.kill()
    head.wait(10)
    head = runner.start("coordinator.py", *argv, log="coordinator-2")
    assert head.wait(120) == 0, runner.said("coordinator-2") + runner.said("a")
    assert [site.wait(30) for site in sites] == [0, 0]

    readings, summary, cfg = carbon.readings_of(runner.run_dir), runner.summary(), runner.load(argv)
    assert {(r.site, r.method) for r in readings} == {("a", "rapl")} and len({r.incarnation for r in readings}) == 1
    a, b = summary["sites"]["a"], summary["sites"]["b"]
    assert (a["energy_method"], b["energy_method"], summary["energy_method"]) == ("rapl", "model", "rapl")
    assert a["measured_share"] > 0.5 and b["measured_share"] == 0 and 0 < summary["measured_share"] < a["measured_share"]
    rows = carbon.read_intervals(str(runner.run_dir / "intervals.csv"))
    assert carbon.account(rows, cfg, carbon.load_traces(cfg), readings)["energy_kwh"] == summary["energy_kwh"]
    measured_kwh = a["measured_share"] * a["energy_kwh"]
    assert measured_kwh <= readings[-1].kwh - readings[0].kwh + 1e-9
    covered_s = sum(y.t_s - x.t_s for x, y in zip(readings, readings[1:]))
    assert measured_kwh == pytest.approx(3.0 * covered_s / 3600, rel=0.2), "but for what lies beside up time"
    assert "% measured (rapl)" in runner.said("coordinator-2")
    assert all(isinstance(r["energy_method"], str) for s in "ab" for r in report.read_lines(runner.run_dir / f"{s}.jsonl"))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_keeps_its_number_of_threads(compiled):
    """Another one has torch compile the model anew, in the middle of a run."""
    before, spec = torch.get_num_threads(), types.SimpleNamespace(threads_local=2, threads_federated=1)
    held = types.SimpleNamespace(spec=spec, cfg=types.SimpleNamespace(model=types.SimpleNamespace(compile=compiled)))
    try:
        seen = [(shard.TOGETHER["threads"](held, alone), torch.get_num_threads())[1] for alone in (True, False, True)]
    finally:
        torch.set_num_threads(before)
    assert seen == ([2, 2, 2] if compiled else [2, 1, 2])


def test_one_rank_of_a_node_reads_its_meters(monkeypatch):
    monkeypatch.setattr(shard, "Meter", lambda devices, want: (devices, want))
    ranks = [types.SimpleNamespace(node_devices=["gpu0", "gpu1"], leads_node=leads) for leads in (True, False)]
    assert [shard.node_meter(r, "auto") for r in ranks] == [(["gpu0", "gpu1"], "auto"), None]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_step_gets_the_memory_of_the_step_before():
    """Page faults of five steps of a small model, in a process of their own, with and without."""
    steps = """
import resource, sys, devices, torch
from model import GPT, Shape
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    devices.keep_freed_memory()
model = GPT(Shape(depth=2, width=128, heads=4, kv_heads=4, seq_len=256, vocab=257)).init_weights(0)
ids = torch.zeros(4, 256, dtype=torch.long)
for step in range(8):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(ids, ids).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    keep, give = (int(subprocess.check_output([sys.executable, "-c", steps, how], cwd=REPO)) for how in ("keep", "give"))
    assert 3 * keep < give
