"""Many sites: grids made up for them, what the simulator does for each, a crowd of sites at one hub."""

import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SITE, TINY
from omegaconf import OmegaConf

import carbon
import channel
import config
import coordinator
import journal
import simulate
import train
from bench.clients import Crowd, FakeSite
from traces import make_regions

BEGIN = 1775001600  # 2026-04-01


# -- synthetic grids --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def month() -> dict[str, np.ndarray]:
    return dict(make_regions.regions(60, 30, BEGIN))


def of_kind(month: dict[str, np.ndarray], kind: str) -> list[carbon.Trace]:
    starts = BEGIN + make_regions.STEP_S * np.arange(30 * 288)
    return [carbon.Trace(n, starts, v, make_regions.STEP_S) for n, v in month.items() if n.startswith(kind)]


def test_the_same_seed_makes_the_same_grids(month):
    again, other = dict(make_regions.regions(60, 30, BEGIN)), dict(make_regions.regions(60, 30, BEGIN, seed=2))
    assert list(again) == list(month) and all((again[n] == v).all() for n, v in month.items())
    assert not any((a == b).all() for a, b in zip(other.values(), month.values()))


@pytest.mark.parametrize("kind, least, most", [("solar", 0.08, 0.22), ("wind", 0.15, 0.30)])
def test_windows_are_as_long_and_as_many_as_measured_ones(month, kind, least, most):
    """Measured, two months of 5-minute Californian data: 14 and 17 % of the time below 100 g/kWh, 3.3 and 4.5 windows a day, half of
    them at most 15 minutes, three quarters at most 30 and 45, yet 61 and 74 % of that time in windows of two hours and more."""
    traces = of_kind(month, kind)
    hours = np.array([(b - a) / 3600 for t in traces for a, b in t.windows(100)])
    assert least < np.mean([(t.values < 100).mean() for t in traces]) < most
    assert 2.5 < len(hours) / len(traces) / 30 < 5.5
    assert 10 / 60 <= np.median(hours) <= 20 / 60 and 0.4 < np.quantile(hours, 0.75) < 1.0
    assert 0.5 < hours[hours >= 2].sum() / hours.sum() < 0.85


def test_solar_grids_are_clean_by_day_and_thermal_ones_never(month):
    assert all((t.values >= 100).all() for t in of_kind(month, "thermal"))
    for trace in of_kind(month, "solar"):
        hours = (trace.starts[trace.values < 100] % 86400) / 3600
        middle = np.angle(np.exp(2j * np.pi * hours / 24).mean()) * 24 / 2 / np.pi
        assert np.mean(abs((hours - middle + 12) % 24 - 12) < 7) > 0.98


def test_neighbours_share_their_weather_and_it_lasts():
    longitude, latitude = np.radians([0.0, 1.0, 90.0]), np.radians([45.0, 45.0, 45.0])
    weather = make_regions._weather(np.random.default_rng(0), longitude, latitude, np.full(3, 12.0), 20_000)
    near, far = np.corrcoef(weather)[0, 1:]
    assert near > 0.8 and abs(far) < 0.1
    assert np.corrcoef(weather[0, 12:], weather[0, :-12])[0, 1] == pytest.approx(np.exp(-1), abs=0.06)


def test_what_is_written_reads_as_a_trace(tmp_path):
    make_regions.main([str(tmp_path / "r.csv"), "--regions", "3", "--days", "1", "--start", "2026-04-01T00:00:00Z"])
    for name, values in make_regions.regions(3, 1, BEGIN):
        trace = carbon.read_trace(str(tmp_path / "r.csv"), name)
        assert trace.begin == BEGIN and trace.step_s == 300 and (trace.values == values).all()
    with pytest.raises(config.BadInput, match="--regions=0"):
        make_regions.main([str(tmp_path / "r.csv"), "--regions", "0"])


# -- the simulator ----------------------------------------------------------------------------------------------------


def many(num: int, hours: float, num_batches: int, **changes):
    """A config of `num` sites on grids of their own, and their traces."""
    grids = dict(make_regions.regions(num, int(hours // 24) + 1, BEGIN))
    starts = BEGIN + make_regions.STEP_S * np.arange(len(next(iter(grids.values()))))
    sites = {n: SITE | {"region": n, "tokens_per_s": 10.0 + i % 7} for i, n in enumerate(grids)}
    raw = OmegaConf.merge(OmegaConf.structured(config.Config), TINY, {
        "clock": {"start": "2026-04-01T00:00:00Z", "max_hours": hours}, "sites": sites, "carbon": {"baseline_regions": []},
        "budget": {"tokens": 128 * num_batches}, "rounds": {"train_s": 600, "commit_every_s": 600, "sync_s": 30},
    }, changes)  # fmt: skip
    config._check(raw)
    return raw, {n: carbon.Trace(n, starts, values, make_regions.STEP_S) for n, values in grids.items()}


def test_a_day_of_a_hundred_sites_keeps_every_invariant(tmp_path):
    cfg, traces = many(100, 24, 40_000)
    summary = simulate.simulate(cfg, traces, folder=tmp_path / "day")
    held = journal.check(journal.read(tmp_path / "day" / "journal.jsonl"), config.num_batches(cfg), cfg.data.tokens_per_step)
    assert all(ok for ok, _ in held), held
    assert summary["end"] == "budget" and summary["tokens"] == cfg.budget.tokens
    assert sum(site["starts"] > 0 for site in summary["sites"].values()) > 30
    assert all(site["starts"] == 0 for name, site in summary["sites"].items() if name.startswith("thermal"))
    assert 0.5 < summary["goodput"] < 1 and summary["floor_kg"]["lp"] < summary["emissions_kg"]


def operations(num: int) -> tuple[int, int]:
    """Bytecodes of a simulated hour in which all sites train together, and what happened: members of all rounds."""
    cfg, traces = many(num, 1.0, 10**7, policy={"name": "always"})
    run, samples = simulate.new_run(cfg, traces)
    done, members = 0, 0

    def trace(frame, event, arg):
        nonlocal done
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        done += event == "opcode"
        return trace

    def take(records):
        nonlocal members
        members += sum(len(r["members"]) for r in records if r["type"] == "open")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        simulate.drive(run, samples, journal=take)
    finally:
        sys.settrace(before)
    return done, members


def test_a_member_of_a_round_costs_the_same_among_few_and_among_many():
    (few, of_few), (many_, of_many) = operations(10), operations(80)
    assert of_few >= 50 and of_many == 8 * of_few
    assert many_ / of_many < 1.1 * few / of_few


# -- the head node ----------------------------------------------------------------------------------------------------


def test_a_config_of_hundreds_of_sites_can_be_read(tmp_path):
    sites = {f"s{i}": {"region": f"r{i}", "tokens_per_s": 1000.0, "idle_kw": 0.5, "train_kw": 2.0, "device": "cpu"} for i in range(300)}
    OmegaConf.save({"sites": sites, "wandb": {"mode": "disabled"}}, tmp_path / "many.yaml")
    cfg = config.load([str(tmp_path / "many.yaml"), "sites.s7.idle_kw=0.25"])
    assert len(cfg.sites) == 300 and cfg.sites.s7.idle_kw == 0.25 and cfg.sites.s299.region == "r299"


def test_a_system_that_allows_too_few_connections_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    with pytest.raises(config.BadInput, match="3000 sites need 6200 open files, this system allows 4096"):
        coordinator.allow_connections(3000)
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: asked.append(both))
    coordinator.allow_connections(1000)
    assert asked == [(2200, 4096)]
    coordinator.allow_connections(3)
    assert len(asked) == 1


def test_keys_are_read_again_only_when_their_files_have_changed(tmp_path, monkeypatch):
    names = ["a", "b"]
    channel.make_keys(tmp_path, names)
    allow, read = channel.AllowList(tmp_path, names), []
    real = channel.read_key
    monkeypatch.setattr(channel, "read_key", lambda *args, **kwargs: (read.append(args[1]), real(*args, **kwargs))[1])

    def look() -> list[str]:
        allow._looked = 0.0
        return allow.refresh()

    assert look() == [] and look() == [] and read == names, "once to know the files, then never"
    (tmp_path / "b.key").unlink()
    assert look() == ["b"]
    channel.make_keys(tmp_path / "new", ["b"])
    (tmp_path / "new" / "b.key").replace(tmp_path / "b.key")
    assert look() == [] and len(allow.sites) == 2


def test_a_site_that_says_hello_again_and_again_waits_once_and_with_its_last_word(tmp_path):
    channel.make_keys(tmp_path, ["a"])
    hub = channel.Hub("127.0.0.1", 0, tmp_path, ["a"], lambda *_: None, 1 << 20)
    link = channel.Link(hub.address, tmp_path, "a", 60.0, 60.0, {"type": "hello", "site": "a", "incarnation": "x"})
    try:
        until = time.monotonic() + 10
        while hub.inbox.empty():  # its own first one
            assert time.monotonic() < until
            time.sleep(0.01)
        for held in range(50):
            link.send(link.hello | {"status": {"held": held}})
        while next(iter(hub._hellos.values()))[2]["status"].get("held") != 49:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert hub.inbox.qsize() == 1 and hub.hear(1.0)[2]["status"] == {"held": 49} and hub.hear(0.0) is None
        link.send(link.hello | {"status": {"held": 50}})
        assert hub.hear(10.0)[2]["status"] == {"held": 50}
    finally:
        link.close()
        hub.close()


def test_a_site_that_waits_for_its_answer_has_asked_once(runner):
    """As at a coordinator that is making a large theta_0: a second hello would be that of another process, and the first one lost."""
    cfg = runner.load([*runner.write({"a": {}}), "site=a"])
    folder, corpus = config.run_dir(cfg), SimpleNamespace(digest="c", tokenizer_digest="t")
    channel.make_keys(folder / "keys", ["a"])
    hub = channel.Hub("127.0.0.1", 0, folder / "keys", ["a"], lambda *_: None, 1 << 20)
    (folder / "address").write_text(hub.address)
    site = train.Site.__new__(train.Site)
    site.cfg, site.name = cfg, "a"
    site.shard = SimpleNamespace(corpus=corpus, device="cpu", ranks=SimpleNamespace(size=1))
    joined = ThreadPoolExecutor(1).submit(site._join)
    try:
        name, identity, hello, _ = hub.hear(10.0)
        assert hub.hear(3.0) is None, "it only waits"
        hub.admit(name, identity, hello["incarnation"])
        hub.send(name, {"type": "welcome", "run_id": "r"})
        assert joined.result(10) == "r"
    finally:
        hub.close()
        if joined.done() and not joined.exception():
            site.link.close()
            site.panel.finish({})


def test_nothing_is_heard_of_a_site_after_its_goodbye(tmp_path):
    """However long it takes to close: a heartbeat would be a stranger's, whose greeting brings back a site that has left."""

    class Slow:
        def close(self) -> None:
            time.sleep(0.6)

    channel.make_keys(tmp_path, ["a"])
    hub = channel.Hub("127.0.0.1", 0, tmp_path, ["a"], lambda *_: None, 1 << 20)
    link = channel.Link(hub.address, tmp_path, "a", 0.01, 60.0, {"type": "hello", "site": "a", "incarnation": "x"})
    try:
        site, identity, _, _ = hub.hear(10.0)
        hub.admit(site, identity, "x")
        hub.send(site, {"type": "welcome", "run_id": "r"})
        assert link.inbox.get(timeout=10)[0]["type"] == "welcome"
        link.welcomed, link.status, link._lane = True, {"held": 3}, Slow()
        closing = threading.Thread(target=link.close, args=[{"type": "bye", "reason": "test"}])
        closing.start()
        assert hub.hear(10.0)[2]["type"] == "bye"
        hub.dismiss(site)
        closing.join(10)
        assert not closing.is_alive() and hub.hear(0.2) is None
    finally:
        link.close()
        hub.close()


def test_a_hub_answers_every_heartbeat_of_fifty_sites(tmp_path):
    num = 50
    names = [f"s{i}" for i in range(num)]
    channel.make_keys(tmp_path, names)
    hub = channel.Hub("127.0.0.1", 0, tmp_path, names, lambda *_: None, 1 << 20)
    cfg = OmegaConf.create({"sync": {"heartbeat_s": 0.05, "dead_s": 8.0}})
    crowd = Crowd(cfg, names)
    try:
        crowd.sites = [FakeSite(crowd, hub.address, tmp_path, n, {"type": "hello", "site": n, "incarnation": n}) for n in names]
        until, admitted = time.monotonic() + 30, 0
        while any(site.answers < 20 for site in crowd.sites):
            assert time.monotonic() < until, (admitted, min(site.answers for site in crowd.sites))
            crowd.lap()
            while message := hub.hear(0.0) if not hub.inbox.empty() else None:
                site, identity, header, _ = message
                assert header["type"] == "hello", "nobody is gone"
                hub.admit(site, identity, header["incarnation"])
                hub.send(site, {"type": "welcome", "run_id": "r"})
                admitted += 1
        for site in crowd.sites:
            site.heartbeat_s = 1e9
        while any(site.answers < site.beats for site in crowd.sites):
            assert time.monotonic() < until, "a heartbeat was not answered"
            crowd.lap()
        assert admitted == num and not hub.silent(8.0) and hub.longest_silent_s() < 8.0
    finally:
        hub.close()
        crowd.context.destroy(linger=0)
