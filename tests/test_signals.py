"""Live signals: five sources, all that can go wrong with each, and a run that trains, pauses, dies and resumes on them."""

import email.utils
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest
from conftest import CLEAN, DIRTY, REPO, SITE, TINY, processes_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_runs import all_hold, until

import carbon
import config
import journal
import signals
from signals import Live, Reading, Unread

SECRETS = {"WATTTIME_USER": "ada", "WATTTIME_PASSWORD": "p:ss", "ELECTRICITYMAPS_TOKEN": "em-key", "GRID_KEY": "Bearer grid-key"}


def iso(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat()


@contextmanager
def serving(answer):
    """A server on loopback. answer(path, headers) -> body as bytes, str or JSON; or (status, headers, body); or a function that
    writes to the connection itself."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            said = answer(self.path, self.headers)
            if callable(said):
                said(self.wfile)
                return
            status, headers, body = said if isinstance(said, tuple) else (200, {}, said)
            body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, address):
            pass  # we hang up on servers that are slow

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def make(tmp_path, monkeypatch):
    """cfg of a live run that has begun at a whole second. make(source, sites, **signals)"""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)

    def cfg(source: str, sites: dict[str, dict] | None = None, began: int | None = None, **given):
        sites = sites or {"a": {"region": "X"}}
        raw = OmegaConf.merge(TINY, {
            "clock": {"mode": "wall", "start": "now"}, "carbon": {"baseline_regions": []},
            "signals": {"source": source, "timeout_s": 1.0, "retry_s": 0.05, "poll_s": 0.1, "max_age_s": 600} | given,
            "sites": {name: SITE | {"region": name} | site for name, site in sites.items()},
        })  # fmt: skip
        OmegaConf.save(raw, tmp_path / "live.yaml")
        return config.begun(config.load([str(tmp_path / "live.yaml")]), iso(began or int(time.time())))

    return cfg


def read(cfg, site: str = "a") -> Reading:
    return signals.sources(cfg)[site].read()


def unread(cfg, site: str = "a") -> Unread:
    with pytest.raises(Unread) as caught:
        signals.sources(cfg)[site].read()
    return caught.value


# -- each source, in its vendor's documented form -------------------------------------------------------------------------


def watttime(value=882.5, now=None, **changes):
    """What api.watttime.org answers to /v3/forecast: 24 hours of 5-minute points."""
    first = (now or time.time()) // 300 * 300
    points = [{"point_time": iso(first + 300 * i), "value": value + i} for i in range(288)]
    meta = {"data_point_period_seconds": 300, "region": "CAISO_NORTH", "warnings": [], "signal_type": "co2_moer",
            "model": {"date": "2023-03-01"}, "units": "lbs_co2_per_mwh", "generated_at_period_seconds": 300,
            "generated_at": iso(first)}  # fmt: skip
    return {"data": points, "meta": meta | changes}


def test_watttime_logs_in_reads_the_present_of_the_forecast_and_logs_in_again_when_the_token_has_expired(make):
    asked, valid = [], []

    def answer(path, headers):
        asked.append(path)
        if path == "/login":
            assert headers["Authorization"] == "Basic YWRhOnA6c3M="  # ada:p:ss
            valid[:] = [f"token-{len(asked)}"]
            return {"token": valid[0]}
        if headers["Authorization"] not in [f"Bearer {t}" for t in valid]:
            return 401, {}, {"detail": "Invalid token"}
        return watttime()

    with serving(answer) as url:
        source = signals.sources(make("watttime", {"a": {"region": "CAISO_NORTH"}}, url=url))["a"]
        reading = source.read()
        assert reading.g_per_kwh == pytest.approx(882.5 * 0.45359237) and reading.unit == "lbs_co2_per_mwh"
        assert 0 <= time.time() - reading.unix < 300
        starts, values = reading.ahead
        assert len(starts) == len(values) == 288 and starts[0] == reading.unix and (np.diff(starts) == 300).all()
        assert values[1] == pytest.approx(883.5 * 0.45359237)
        source.read()
        valid.clear()  # 30 minutes later
        source.read()
    forecast = "/v3/forecast?region=CAISO_NORTH&signal_type=co2_moer"
    assert asked == ["/login", forecast, forecast, forecast, "/login", forecast]


WRONG_FORECASTS = {
    "percentile": (lambda: watttime(units="percentile"), "is an index, not an intensity"),
    "unit": (lambda: watttime(units="tonnes"), "unit 'tonnes' is none of"),
    "region": (lambda: watttime(region="PJM"), "asked for region CAISO_NORTH, the answer is of 'PJM'"),
    "signal": (lambda: watttime(signal_type="health_damage"), "asked for signal_type co2_moer"),
    "over": (lambda: watttime(now=time.time() - 2 * 86400), "does not cover the present"),
    "later": (lambda: watttime(now=time.time() + 86400), "does not cover the present"),
    "empty": (lambda: watttime() | {"data": []}, "no points"),
    "backwards": (lambda: watttime() | {"data": watttime()["data"][::-1]}, "times do not grow"),
    "nan": (lambda: watttime(math.nan), "lies outside"),
    "shape": (lambda: {"message": "hello"}, "the answer has no meta"),
    "list": (lambda: [], "the answer has no meta"),
}


@pytest.mark.parametrize("wrong", WRONG_FORECASTS)
def test_a_forecast_that_is_not_what_was_asked_for_is_unknown(make, wrong):
    body, message = WRONG_FORECASTS[wrong]
    with serving(lambda path, headers: {"token": "t"} if path == "/login" else body()) as url:
        assert message in str(unread(make("watttime", {"a": {"region": "CAISO_NORTH"}}, url=url)))


def test_a_login_that_fails_is_unknown_and_nothing_secret_is_said(make):
    for said in ((401, {}, {"detail": "bad password p:ss"}), (403, {}, ""), {"token": "a\nb"}, {"token": None}, {}, "<html>"):
        with serving(lambda path, headers, said=said: said) as url:
            reason = str(unread(make("watttime", url=url)))
            assert reason and not any(value in reason for value in SECRETS.values())


def electricitymaps(**changes):
    return {"zone": "DE", "carbonIntensity": 302, "datetime": "2026-04-25T18:00:00.000Z", "updatedAt": "2026-04-25T18:07:01.000Z",
            "createdAt": "2026-04-22T18:57:33.000Z", "emissionFactorType": "lifecycle", "isEstimated": True,
            "estimationMethod": "TIME_SLICER_AVERAGE", "temporalGranularity": "hourly"} | changes  # fmt: skip


def test_electricity_maps_is_asked_with_its_token_and_known_to_be_average(make):
    def answer(path, headers):
        assert path == "/v3/carbon-intensity/latest?zone=DE" and headers["auth-token"] == "em-key"
        return electricitymaps()

    with serving(answer) as url:
        cfg = make("electricitymaps", {"a": {"region": "DE"}}, url=url)
        assert read(cfg) == Reading(302.0, datetime(2026, 4, 25, 18, tzinfo=UTC).timestamp(), "gCO2eq/kWh")
    assert config.signal_kind(cfg) == "average"
    for changes, message in (({"zone": "FR"}, "the answer is of 'FR'"), ({"carbonIntensity": None}, "None is not a number"),
                             ({"datetime": "soon"}, "time 'soon' is neither")):  # fmt: skip
        with serving(lambda path, headers, changes=changes: electricitymaps(**changes)) as url:
            assert message in str(unread(make("electricitymaps", {"a": {"region": "DE"}}, url=url)))


def test_any_json_by_paths_to_value_time_and_unit_with_a_secret_header(make):
    def answer(path, headers):
        assert path == "/grid/X%2FY/now?full=1" and headers["X-Key"] == "Bearer grid-key"
        return {"data": [{"mci": {"X/Y": 0.3}, "at": 1767225600, "in": "kg CO2e / kWh"}]}

    with serving(answer) as url:
        given = {"url": url + "/grid/{region}/now?full=1", "path": "data.0.mci.{region}", "header": "X-Key", "header_env": "GRID_KEY"}
        cfg = make("json", {"a": {"region": "X/Y"}}, time_path="data.0.at", unit_path="data.0.in", **given)
        assert read(cfg) == Reading(300.0, 1767225600.0, "kg CO2e / kWh")
        reading = read(make("json", {"a": {"region": "X/Y"}}, unit="lb/MWh", **given))
        assert reading.g_per_kwh == pytest.approx(0.3 * 0.45359237) and abs(reading.unix - time.time()) < 5
        assert "the answer has no data.1.mci" in str(unread(make("json", {"a": {"region": "X/Y"}}, **given | {"path": "data.1.mci"})))


def test_a_vessim_whose_simulation_stands_still_grows_old(make):
    state = {"microgrid": "X", "time": "2026-01-11T17:00:00", "p_grid": 0.0, "grid_signals": {"mci": 64.0}}
    with serving(lambda path, headers: state if path == "/microgrids/X" else (404, {}, "")) as url:
        source = signals.sources(make("vessim", url=url))["a"]
        first = source.read()
        assert first.g_per_kwh == 64.0 and source.read().unix == first.unix
        state["time"] = "2026-01-11T17:00:01"
        assert source.read().unix > first.unix
        state["grid_signals"] = None
        assert "no grid_signals.mci" in str(unread(make("vessim", url=url)))
        assert str(unread(make("vessim", {"a": {"region": "Y"}}, url=url))).startswith("HTTP 404 from 127.0.0.1")


# -- a file that grows ----------------------------------------------------------------------------------------------------


def test_a_csv_file_is_followed_as_it_grows_is_cut_short_replaced_and_half_written(make, tmp_path):
    path, now = tmp_path / "grid.csv", time.time()
    source = signals.sources(make("csv", {"a": {"region": "X"}}, url=str(path)))["a"]

    def said():
        try:
            return source.read().g_per_kwh
        except Unread as error:
            return str(error)

    def row(age_s, *values):
        return ",".join([iso(now - age_s), *map(str, values)]) + "\n"

    assert "No such file" in said()
    path.write_text("time,Y,X")
    assert "no header yet" in said()
    path.write_text("time,Y\n")
    assert "no column 'X'; it has Y" in said()
    path.write_text("time,Y,X\n")
    assert "no row up to now" in said()
    with open(path, "a") as file:
        for age_s, value in ((600, 100), (300, 90)):
            file.write(row(age_s, 1, value))
        file.flush()
        assert said() == 90.0
        file.write(row(0, 1, 80)[:-2])  # "8": not all of it
        file.flush()
        assert said() == 90.0
        file.write("0\n" + row(-600, 1, 999))  # and the future
        file.flush()
        assert said() == 80.0
    path.write_text("time,X\n" + row(30, 70))  # rewritten, shorter, other columns
    assert said() == 70.0
    (tmp_path / "next.csv").write_text("time,X\n" + "".join(row(7200 - i, 60) for i in range(40_000 // 10)) + row(10, 50))
    os.replace(tmp_path / "next.csv", path)  # rotated
    assert said() == 50.0
    with open(path, "a") as file:  # longer than what is read of it
        file.write("".join(row(9 - i / 1e4, 40) for i in range(50_000)))
    assert path.stat().st_size > 1.5 * signals.TAIL_BYTES and said() == 40.0
    for junk, message in (("yesterday,5\n", "time 'yesterday' is neither"), (row(0, ""), "is '', not a number"), (row(0, "nan"), "outside"),
                          (row(0, "inf"), "outside"), (row(0, -1), "outside"), (iso(now) + "\n", "not a number")):  # fmt: skip
        path.write_text("time,X\n" + row(60, 70) + junk)
        assert message in said()
    path.unlink()
    assert "No such file" in said()


# -- what can go wrong with a server --------------------------------------------------------------------------------------


def drip(wfile):
    """An answer that never ends, a byte at a time: no socket's time-out ever expires."""
    for byte in b"HTTP/1.1 200 OK\r\n" + b"x" * 10_000:
        wfile.write(bytes([byte]))
        wfile.flush()
        time.sleep(0.05)


def hang(wfile):
    time.sleep(30)


BROKEN = {
    "500": ((500, {}, "oops"), "HTTP 500 from 127.0.0.1"),
    "404": ((404, {}, ""), "HTTP 404"),
    "401": ((401, {}, ""), "HTTP 401"),
    "redirect": ((302, {"Location": "http://127.0.0.1:9/"}, ""), "HTTP 302"),
    "empty": ("", "not JSON"),
    "html": ("<html>down for maintenance</html>", "not JSON"),
    "torn": ('{"v": 1', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "bytes": (b"\xff\xfe\x00", "not JSON"),
    "short": ((200, {"X": "y"}, b"{}"), "the answer has no v"),
    "text": ({"v": "12"}, "value '12' is not a number"),
    "true": ({"v": True}, "value True is not a number"),
    "null": ({"v": None}, "value None is not a number"),
    "nan": ('{"v": NaN}', "lies outside"),
    "-inf": ('{"v": -Infinity}', "lies outside"),
    "negative": ({"v": -5}, "lies outside"),
    "too much": ({"v": 5000}, "lies outside"),
    "huge": ('{"v": 1' + "0" * 400 + "}", "lies outside"),
    "big": (b" " * (signals.MAX_BYTES + 5), "more than 8 MiB"),
    "closed": (lambda wfile: None, "Remote end closed"),
    "not HTTP": (lambda wfile: wfile.write(b"SSH-2.0-x\r\n\r\n"), "127.0.0.1"),
    "hangs": (hang, "no answer within 0.3 s"),
    "drips": (drip, "no answer within 0.3 s"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_a_server_does_the_value_is_unknown_in_bounded_time(make, what):
    said, message = BROKEN[what]
    with serving(lambda path, headers: said) as url:
        error = unread(make("json", url=url, path="v", timeout_s=0.3 if what in ("hangs", "drips") else 5.0))
    assert message in str(error) and "\n" not in str(error)


def test_an_unreachable_server_is_unknown(make):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        error = unread(make("json", url=f"http://127.0.0.1:{taken.getsockname()[1]}", path="v"))
    assert "refused" in str(error)
    assert str(unread(make("json", url="http://no-such-host.invalid", path="v"))).startswith("no-such-host.invalid: ")


def test_a_rate_limit_is_obeyed_within_reason(make):
    later = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=90))
    for text, low, high in (("7", 7, 7), (later, 60, 91), ("999999999", 3600, 3600), ("-5", 0, 0), ("soon", 0, 0), ("nan", 0, 0)):
        with serving(lambda path, headers, text=text: (429, {"Retry-After": text}, "")) as url:
            error = unread(make("json", url=url, path="v"))
        assert "HTTP 429" in str(error) and low <= error.wait_s <= high


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["lb/MWh", "g/kWh", "percent", iso(0)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["v", "u", "t", "data", "meta"]), inner, max_size=3),
    max_leaves=12,
)


QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def asked(make, monkeypatch):
    """One source of each kind, and a function that makes a body the answer to whatever they ask."""
    paths = {"path": "v", "time_path": "t", "unit_path": "u"}
    kinds = [("json", paths), ("json", {"path": "v"}), ("vessim", {}), ("watttime", {}), ("electricitymaps", {})]
    found = [signals.sources(make(source, url="http://127.0.0.1:9", **keys))["a"] for source, keys in kinds]

    def say(body: bytes):
        def parse(*asked):
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise Unread("not JSON") from None

        monkeypatch.setattr(signals, "get_json", parse)

    return found, say


def is_sound(source):
    try:
        reading = source.read()
    except Unread as error:
        return str(error) and "\n" not in str(error)
    return 0 <= reading.g_per_kwh <= carbon.MAX_G_PER_KWH and math.isfinite(reading.unix)


@QUICK
@given(body=st.binary(max_size=40) | JUNK.map(lambda x: json.dumps(x).encode())
       | st.fixed_dictionaries({"v": JUNK, "t": JUNK, "u": JUNK}).map(lambda x: json.dumps(x).encode()))  # fmt: skip
def test_law_an_answer_is_a_number_in_bounds_or_unknown(asked, body):
    """Of every source: a reading is finite, in bounds and has a time; all else is Unread, and nothing else is raised."""
    found, say = asked
    say(body)
    assert all(is_sound(source) for source in found)


@QUICK
@given(
    point=st.fixed_dictionaries({"point_time": JUNK, "value": JUNK}), key=st.sampled_from(["units", "generated_at", "region"]), junk=JUNK
)
def test_law_a_forecast_with_one_thing_wrong_is_a_number_or_unknown(asked, point, key, junk):
    found, say = asked
    for body in (watttime(**{key: junk}), watttime() | {"data": [*watttime()["data"][:3], point]}):
        found[3].token = "t"
        say(json.dumps(body | {"token": "t"}).encode())
        assert is_sound(found[3])


@QUICK
@given(body=st.binary(max_size=60) | st.text(alphabet='0123456789-:TZ,.\nX"e', max_size=80).map(lambda x: b"time,X\n" + x.encode()))
def test_law_a_file_is_a_number_in_bounds_or_unknown(following, body):
    source, path = following
    path.write_bytes(body)
    assert is_sound(source)


@pytest.fixture
def following(make, tmp_path):
    path = tmp_path / "grid.csv"
    return signals.sources(make("csv", {"a": {"region": "X"}}, url=str(path)))["a"], path


WRITTEN = ["g/kWh", "gCO2eq/kWh", "gCO₂/kWh", "kg/MWh", "lbs_co2_per_mwh", "lb/MWh", "kg CO2 / kWh", "%", "percentile", "", "MWh", "g"]


@given(st.floats() | st.integers(), st.sampled_from(WRITTEN))
def test_law_an_intensity_is_in_bounds_or_unread(value, unit):
    try:
        g = signals.intensity(value, unit)
    except Unread:
        return
    factor = {"lb": 0.45359237}.get(unit[:2], 1000.0 if unit.startswith("kg CO2 / kWh") else 1.0)
    assert 0 <= g <= carbon.MAX_G_PER_KWH and g == pytest.approx(value * factor)


# -- on the coordinator's clock -------------------------------------------------------------------------------------------


class Said:
    """A source that says what it is told to say."""

    def __init__(self):
        self.next, self.asked = Unread("nothing yet"), []

    def read(self):
        self.asked.append(time.monotonic())
        said = self.next() if callable(self.next) else self.next
        if isinstance(said, Exception):
            raise said
        return said


def fed(live, t, site, said):
    live._inbox.put((site, said))
    return live.due(t)


def test_a_reading_counts_until_it_is_too_old_and_people_are_told_once_a_change(make):
    cfg, lines = make("json", {"a": {}, "b": {}}, url="http://h", path="v", max_age_s=60, poll_s=10), []
    start, live = config.start_unix(cfg), None
    live = Live(cfg, {}, write=lines.append)
    live.asking = True
    assert live.next_time() == 0.0
    assert live.due(0.4) == [("a", None, None), ("b", None, None)], "nobody has said anything"
    assert live.due(1.0) == [] and live.next_time() == math.inf and live.at("a", 1.0) is None
    ahead = (np.array([start + 0.0, start + 300.0]), np.array([50.0, 40.0]))
    ((site, mci, (starts, values)),) = fed(live, 5.5, "a", Reading(50.0, start + 2.5, "g/kWh", ahead))
    assert (site, mci, starts.tolist(), values.tolist()) == ("a", 50.0, [0.0, 300.0], [50.0, 40.0])
    assert live.at("a", 6.0) == 50.0 and live.next_time() == 62.5 and live.news() == []
    assert fed(live, 15.0, "a", Reading(50.0, start + 2.5, "g/kWh")) == [], "the same reading again"
    assert fed(live, 20.0, "a", Unread("HTTP 503 from h")) == fed(live, 30.0, "a", Unread("HTTP 503 from h")) == []
    assert live.at("a", 30.0) == 50.0
    assert [(n["state"], n["reason"]) for n in live.news()] == [("failing", "HTTP 503 from h")]
    assert live.due(62.4) == [] and live.due(62.5) == [("a", None, None)] and live.at("a", 62.5) is None
    assert [(n["state"], n["reason"]) for n in live.news()] == [("unknown", "HTTP 503 from h")]
    assert fed(live, 70.0, "a", Reading(5.0, start + 9.0, "g/kWh")) == [], "too old when it comes"
    assert fed(live, 71.0, "a", Reading(5.0, start + 9.0, "g/kWh")) == [], "and told of once, whatever its age"
    assert "61 s old, more than signals.max_age_s=60" in live.news()[0]["reason"] and live.news() == []
    assert fed(live, 72.0, "a", Reading(5.0, start + 72 + 400.0, "g/kWh")) == [] and "in the future" in live.news()[0]["reason"]
    assert fed(live, 80.2, "a", Reading(0.0, start + 80.0, "g/kWh")) == [("a", 0.0, None)], "0 is a reading like any other"
    assert [n["state"] for n in live.news()] == ["known"]
    assert fed(live, 81.0, "a", Reading(9.0, start + 79.0, "g/kWh")) == [], "an older one"
    rows = [line.split(",")[:3] for line in lines]
    assert rows == [["0", "a", ""], ["0", "b", ""], ["5", "a", "50.0"], ["62", "a", ""], ["80", "a", "0.0"]]
    assert lines[2].split(",")[3:] == ["62.5", "3.0", carbon.iso(start + 2.5).replace(" ", "T"), "g/kWh", "json"]


def test_a_resumed_run_repeats_what_was_heard_and_goes_on(make, tmp_path):
    cfg, lines = make("json", {"a": {}, "b": {}}, url="http://h", path="v", max_age_s=60, poll_s=10), [carbon.SIGNALS]
    start, live, told = config.start_unix(cfg), None, []
    live = Live(cfg, {}, write=lines.append)
    live.asking = True
    for t, site, said in ((0.5, "a", Reading(50.0, start, "g/kWh")), (10.0, "b", Reading(7.0, start + 10.0, "g/kWh")),
                          (100.0, "b", Reading(9.0, start + 100.0, "g/kWh")),
                          (130.0, "a", Reading(8.0, start + 130.0, "g/kWh"))):  # fmt: skip
        while live.next_time() < t:
            moment = live.next_time()
            told += [(int(moment), *x[:2]) for x in live.due(moment)]
        told += [(int(t), *x[:2]) for x in fed(live, t, site, said)]
    (tmp_path / "signals.csv").write_text("\n".join(lines) + "\n110,a,5")  # torn by a crash
    again = Live(cfg, {}, carbon.read_signals(tmp_path / "signals.csv"))
    repeated = []
    while again.next_time() <= 150.0:
        moment = again.next_time()
        repeated += [(int(moment), *x[:2]) for x in again.due(moment)]
    assert sorted(repeated, key=str) == sorted([x for x in told if x != (0, "a", None)], key=str)
    assert (again.at("a", 150.0), again.at("b", 150.0), again.due(300.0)) == (8.0, 9.0, []), "nothing gets too old before it is asked for"
    again.asking = True
    assert again.next_time() == 160.0
    assert fed(again, 155.0, "b", Reading(9.0, start + 100.0, "g/kWh")) == [], "the same reading as before the crash"
    assert again.due(190.0) == [("a", None, None), ("b", None, None)]


def test_unknown_is_charged_at_the_highest_heard_never_as_curtailed(make, tmp_path):
    cfg = make("json", {"a": {}, "b": {}, "c": {}}, url="http://h", path="v")
    start = config.start_unix(cfg)
    heard = [
        carbon.Signal(10, "a", 300.0, 100.5),
        carbon.Signal(30, "a", 20.0, 50.0),
        carbon.Signal(70, "a", 40.0),
        carbon.Signal(5, "b", 10.0),
    ]
    traces = carbon.Heard(cfg.sites, heard).traces(cfg, 99.5, "x")
    a, b, c = (traces[r] for r in "abc")
    assert [(int(t - start), v, k) for t, v, k in zip(a.starts, a.values, a.known)] == [
        (0, 300.0, False), (10, 300.0, True), (30, 20.0, True), (50, 300.0, False), (70, 40.0, True)]  # fmt: skip
    assert a.end == start + 100 and a.integral(start, start + 99.5) == 30 * 300 + 20 * 20 + 20 * 300 + 29.5 * 40
    assert b.values.tolist() == [100.0, 10.0] and not b.below(100, start, start + 5), "clean ones only: as if just not curtailed"
    assert c.values.tolist() == [carbon.MAX_G_PER_KWH] and not c.known.any()


@pytest.mark.parametrize("row", ["x,a,1,inf,0,,,", "1,a,nan,inf,0,,,", "1,a,-1,inf,0,,,", "1,a,9999,inf,0,,,", "1,a,1,nan,0,,,", "1,a,1"])
def test_a_damaged_row_is_named(tmp_path, row):
    (tmp_path / "signals.csv").write_text(f"{carbon.SIGNALS}\n{row}\n")
    with pytest.raises(config.BadInput, match="row 2"):
        carbon.read_signals(tmp_path / "signals.csv")


# -- threads --------------------------------------------------------------------------------------------------------------


def test_one_site_that_hangs_delays_no_other_and_nothing_kills_a_thread(make):
    cfg = make("json", {"a": {}, "b": {}, "c": {}}, url="http://h", path="v", poll_s=0.05, retry_s=0.01)
    said, released = {n: Said() for n in "abc"}, threading.Event()
    said["a"].next = lambda: released.wait(30) and Reading(1.0, time.time(), "g/kWh")
    said["b"].next = lambda: Reading(float(len(said["b"].asked)), time.time(), "g/kWh")
    said["c"].next = lambda: [][1]  # a bug of ours
    live = Live(cfg, said)
    live.start()
    seen = {n: [] for n in "abc"}

    def hears(site, number):
        begun = time.monotonic()
        for name, mci, _ in live.due(time.time() - config.start_unix(cfg)):
            seen[name].append(mci)
        assert time.monotonic() - begun < 5, "the main loop never waits"
        return len(seen[site]) >= number

    until(lambda: hears("b", 10), 20)
    until(lambda: len(said["c"].asked) >= 5, 20)
    assert len(said["a"].asked) == 1 and seen["a"] == [None] and seen["c"] == [None]
    assert "IndexError: list index out of range" in {n["site"]: n["reason"] for n in live.news()}["c"]
    said["c"].next = lambda: Reading(3.0, time.time(), "g/kWh")
    released.set()
    until(lambda: hears("a", 2) and hears("c", 2), 20)
    assert all(p.is_alive() for p in live.pollers)
    live.close()
    for poller in live.pollers:
        poller.join(5)
        assert not poller.is_alive()


def test_failures_back_off_with_jitter_and_a_rate_limit_is_waited_for():
    waits = []

    class Over:
        def is_set(self):
            return len(waits) >= 12

        def wait(self, seconds):
            waits.append(seconds)

    source = Said()
    poller = signals.Poller("a", source, lambda *said: None, 60.0, 2.0)
    poller.over = Over()
    script = iter([Unread("x")] * 8 + [Unread("429", 500.0), Reading(1.0, 0.0, "g/kWh"), Unread("x"), Reading(1.0, 0.0, "g/kWh")])
    source.next = lambda: next(script)
    poller.run()
    for i, seconds in enumerate(waits[:8]):
        most = min(2.0 * 2**i, 60.0)
        assert most / 2 <= seconds <= most
    assert waits[8] == 500.0 and waits[9] == 60.0 and 1.0 <= waits[10] <= 2.0 and waits[11] == 60.0
    assert len(set(waits[5:8])) == 3, "jitter: many that failed together do not come back together"


# -- bad input ------------------------------------------------------------------------------------------------------------

URL = ["signals.url=http://127.0.0.1:9", "clock.mode=wall", "clock.start=now", "carbon.baseline_regions=[]"]
BAD = {
    "virtual": (["signals.source=vessim", "clock.mode=virtual"], "set clock.mode=wall, or signals.source=trace"),
    "no url": (["signals.source=json", "signals.path=v", "signals.url=null"], "signals.url: none given for site a"),
    "no path": (["signals.source=json"], "signals.path: none given"),
    "file": (["signals.source=json", "signals.path=v", "signals.url=file:///etc/passwd"], "must begin with http:// or https://"),
    "password": (["signals.source=vessim", "signals.url=http://me:secret@h"], "secrets come from the environment"),
    "clear": (["signals.source=watttime", "signals.url=http://api.example.org"], "write https://"),
    "user": (["signals.source=watttime"], "WATTTIME_USER, which is not set"),
    "token": (["signals.source=electricitymaps"], "ELECTRICITYMAPS_TOKEN, which is not set"),
    "header": (["signals.source=json", "signals.path=v", "signals.header_env=NO_SUCH"], "NO_SUCH, which is not set"),
    "age": (["signals.source=vessim", "signals.poll_s=60", "signals.max_age_s=5"], "signals.max_age_s=5 must be >= signals.poll_s=60"),
    "region": (["signals.source=vessim", "carbon.baseline_regions=[MARS]"], "carbon.baseline_regions=MARS: no site reads it live"),
    "source": (["signals.source=weather"], "is not one of trace, vessim, watttime, electricitymaps, csv, json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_what_is_wrong_and_the_way_out(runner, monkeypatch, name):
    changes, message = BAD[name]
    for secret in SECRETS:
        monkeypatch.delenv(secret, raising=False)
    with pytest.raises(config.BadInput) as caught:
        signals.sources(config.load([*runner.write({"a": {}}), *URL, *changes]))
    assert message in str(caught.value) and "\n" not in str(caught.value) and "secret@" not in str(caught.value)


def test_bad_input_ends_a_coordinator_before_it_has_begun(runner):
    runner.env = {k: v for k, v in runner.env.items() if k not in SECRETS}
    argv = [*runner.write({"a": {}}), *URL]
    past = "clock.start=2026-01-11T17:00:00Z"
    for changes, message in ((["signals.source=watttime"], "WATTTIME_USER"), (["signals.source=vessim", past], "set clock.start=now")):
        result = runner.call("coordinator.py", *argv, *changes)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert not runner.journal() and not (runner.run_dir / "signals.csv").exists()
    result = runner.call("simulate.py", *argv, "signals.source=vessim")
    assert result.returncode == 2 and "set clock.mode=wall, or signals.source=trace" in result.stderr


def test_two_sites_of_one_region_ask_one_place(make):
    make("vessim", {"a": {"region": "X"}, "b": {"region": "X"}}, url="http://127.0.0.1:1")
    with pytest.raises(config.BadInput, match="one region, one place"):
        make("vessim", {"a": {"region": "X"}, "b": {"region": "X", "signal_url": "http://127.0.0.1:2"}}, url="http://127.0.0.1:1")


# -- the whole thing ------------------------------------------------------------------------------------------------------


def kg_by_hand(folder, cfg) -> float:
    """What a run emitted, second by second from its intervals and signals: no code of ours but the reading of a CSV."""

    def table(name):
        header, *lines = (folder / name).read_text().splitlines()
        return [dict(zip(header.split(","), line.split(","))) for line in lines]

    kg = 0.0
    for site, spec in cfg.sites.items():
        heard = [(int(r["t_s"]), float(r["g_per_kwh"] or "nan"), float(r["until_s"])) for r in table("signals.csv") if r["site"] == site]
        dearest = max([100.0, *(g for _, g, _ in heard if g == g)])
        for row in table("intervals.csv"):
            if row["site"] != site or row["state"] == "off":
                continue
            begin, end = float(row["start_s"]), float(row["end_s"])
            kw = spec.train_kw if row["state"] == "training" else spec.idle_kw
            for second in range(int(begin), math.ceil(end)):
                said = [(g, until_s) for t, g, until_s in heard if t <= second]
                known = said and said[-1][0] == said[-1][0] and said[-1][1] > second
                kg += kw * (said[-1][0] if known else dearest) * (min(end, second + 1) - max(begin, second)) / 3.6e6
    return kg


@pytest.mark.slow
def test_a_run_trains_in_live_windows_outlives_its_source_and_its_coordinator_and_accounts_for_what_it_heard(runner):
    said = {"a": CLEAN, "b": DIRTY}
    sites = {name: {"tokens_per_s": 1280, "provision_s": 0, "startup_s": 0} for name in said}

    def answer(path, headers):
        value = said[path[-1]]
        return (503, {}, "") if value is None else {"grid": {"value": value, "unit": "gCO2eq/kWh"}}

    def records(kind, **such):
        path = runner.run_dir / "journal.jsonl"
        return [
            r for r in (journal.read(path) if path.exists() else []) if r["type"] == kind and all(r.get(k) == v for k, v in such.items())
        ]

    def after(kind, number=1, **such):
        """Wait for so many more of such records."""
        before = len(records(kind, **such))
        until(lambda: len(records(kind, **such)) >= before + number, 90)
        return records(kind, **such)[-1]

    with serving(answer) as url:
        argv = runner.write(
            sites, clock={"mode": "wall", "start": "now"}, budget={"tokens": 128 * 10**6}, policy={"off_delay_s": 0},
            rounds={"train_s": 1, "sync_s": 0.5, "commit_every_s": 1, "rejoin_wait_s": 60}, carbon={"baseline_regions": []},
            signals={"source": "json", "url": url + "/{region}", "path": "grid.value", "unit_path": "grid.unit", "poll_s": 0.3,
                     "max_age_s": 3, "retry_s": 0.2, "timeout_s": 2},
        )  # fmt: skip
        launch = runner.start("launch.py", *argv, log="launch")
        until(lambda: len(records("commit")) >= 2, 90)
        said["a"] = DIRTY
        assert after("site", site="a", to="off")["reason"] == "MCI 500 > 100"
        said["b"] = CLEAN
        after("commit")
        said["a"] = CLEAN
        until(lambda: [r for r in records("attempt") if len(r["members"]) == 2], 90)
        said["b"] = None  # its source goes away; a goes on
        assert after("site", site="b", to="off")["reason"].startswith("signal unknown")
        assert "HTTP 503" in records("signal", site="b", state="unknown")[-1]["reason"]
        said["b"] = CLEAN
        after("site", site="b", to="on")
        (head,) = [p for p in psutil.Process(launch.pid).children() if any("coordinator.py" in arg for arg in p.cmdline())]
        head.kill()
        after("resume")
        after("commit", 2)
        said["a"] = said["b"] = DIRTY
        until(lambda: all(records("site", site=s)[-1]["to"] == "off" for s in said), 60)
        launch.send_signal(signal.SIGINT)
        assert launch.wait(60) == 130
    until(lambda: not processes_in(runner.folder), 20)
    all_hold(runner, argv)
    cfg, start = config.load([str(runner.run_dir / "config.yaml")]), runner.journal()[0]["wall"]["epoch_unix"]
    assert config.start_unix(cfg) == start and abs(start - time.time()) < 3600
    heard = carbon.read_signals(runner.run_dir / "signals.csv")
    assert {s.unit for s in heard if s.g_per_kwh is not None} == {"gCO2eq/kWh"} and {s.g_per_kwh for s in heard} == {CLEAN, DIRTY, None}
    assert [s.t_s for s in heard] == sorted(s.t_s for s in heard), "one clock through the crash"
    summary = runner.summary()
    assert summary["emissions_kg"] == pytest.approx(kg_by_hand(runner.run_dir, cfg), rel=1e-6) and summary["emissions_kg"] > 0
    assert summary["provenance"]["unknown_s"]["b"] > summary["provenance"]["unknown_s"]["a"]
    for path in (argv[0], "runs/tiny/config.yaml"):
        result = runner.call("carbon.py", "account", "runs/tiny/intervals.csv", path, "--json")
        assert json.loads(result.stdout)["emissions_kg"] == pytest.approx(summary["emissions_kg"], rel=1e-9), result.stderr
    result = runner.call("figures.py", "runs/tiny")
    assert result.returncode == 0 and (runner.run_dir / "figures" / "timeline.png").stat().st_size > 10_000, result.stderr
    assert "FAULT" not in runner.said("launch") and "signal unknown: HTTP 503" in runner.said("launch")


VESSIM = """
import sys, multiprocessing
import pandas as pd, uvicorn, vessim as vs
run = uvicorn.run
uvicorn.run = lambda app, host, **options: run(app, host="127.0.0.1", **options)  # else it listens to the whole network
multiprocessing.set_start_method("fork")
environment = vs.Environment.live(step_size=1)
for name, values in {"north": [20.0, 463.0], "south": [0.0, 0.0]}.items():
    mci = vs.Trace(pd.Series([values[0], values[1], values[1]], index=[0, 5, 600]))
    environment.add_microgrid(name=name, actors=[vs.Consumer("gpus", 1000)], dispatchables=[vs.GridConnection()], grid_signals={"mci": mci})
environment.add_controller(vs.Api(broker_port=int(sys.argv[1]), request_timeout=30))
environment.run(until=500)
"""


@pytest.mark.slow
def test_a_real_vessim_server_is_read_and_its_end_noticed(make, runner):
    sys.path.append(str(REPO / "bench"))
    import environments

    python = environments.make("vessim") / "python"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (runner.folder / "server.py").write_text(VESSIM)
    server = subprocess.Popen([python, runner.folder / "server.py", str(port)], start_new_session=True, cwd=runner.folder)
    runner.processes.append(server)
    sites = {"n": {"region": "north"}, "s": {"region": "south"}, "x": {"region": "atlantis"}}
    cfg = make("vessim", sites, url=f"http://127.0.0.1:{port}", max_age_s=5)
    live, seen = Live(cfg, signals.sources(cfg)), {name: [None] for name in sites}
    live.start()

    def look():
        for site, mci, _ in live.due(time.time() - config.start_unix(cfg)):
            seen[site] += [mci] if mci != seen[site][-1] else []
        return seen

    until(lambda: look()["n"] == [None, 20.0, 463.0], 60)
    assert seen == {"n": [None, 20.0, 463.0], "s": [None, 0.0], "x": [None]}, "0 where the grid says 0, never else"
    os.killpg(server.pid, signal.SIGKILL)
    until(lambda: look()["n"][-1] is look()["s"][-1] is None, 30)
    why = {news["site"]: news["reason"] for news in live.news()}
    assert "HTTP 404" in why["x"] or "refused" in why["x"]
    assert "refused" in why["n"]
    live.close()
