"""Live signals: what each site's grid emits right now, asked of an API or a growing file, again and again.

    signals: {source: watttime}                         # login from WATTTIME_USER and WATTTIME_PASSWORD
    python launch.py CONFIG clock.mode=wall clock.start=now

A thread a site asks; nobody waits for it, and no other site. It hands over a reading or why there is none; `Live` decides on the
coordinator's clock what counts: a reading, until it is `max_age_s` old, and then nothing. Whatever a source answers (errors, junk,
percentages, another unit, silence), the value is a finite number of gCO2/kWh or unknown. It is never 0 for want of a better one.
Every reading is appended to runs/RUN/signals.csv before anyone acts on it, and what the run emits is computed from that file.

Secrets come from the environment alone. Requests follow no redirect, which would take them elsewhere; proxies are taken from the
environment as usual.
"""

import base64
import contextlib
import csv
import http.client
import json
import math
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote, urlsplit
from zoneinfo import ZoneInfo

import numpy as np

import carbon
import config
from carbon import G_PER_KWH, MAX_G_PER_KWH, Heard, Signal
from config import BadInput

MAX_BYTES = 8 << 20  # of an answer; three days of 5-minute forecast are 60 kB
TAIL_BYTES = 1 << 20  # of a CSV file that are read each time
MAX_RETRY_AFTER_S = 3600.0
AHEAD_S = 300.0  # how far a source's clock may be ahead of ours


class Unread(Exception):
    """There is no reading. The message is a fragment of one line for people, whatever a server put into it; wait_s: how long the source
    asks us to stay away; status: HTTP's, 0 without one."""

    def __init__(self, reason: str, wait_s: float = 0.0, status: int = 0):
        super().__init__("".join(c if c.isprintable() else " " for c in reason).strip())
        self.wait_s, self.status = wait_s, status


@dataclass(frozen=True)
class Reading:
    """What a source said of one site's grid."""

    g_per_kwh: float
    unix: float  # UTC s: since when, by the source
    unit: str  # as the source has it
    ahead: tuple[np.ndarray, np.ndarray] | None = None  # forecast issued with it: (n,) UTC s when each value begins to hold, (n,) g/kWh


def intensity(value, unit: str) -> float:
    """A value in a source's unit as gCO2/kWh. Raises Unread for what cannot be one."""
    if re.search(r"percent|%|index", unit.lower()):
        raise Unread(f"{unit!r:.40} is an index, not an intensity; ask for gCO2/kWh or lb/MWh")
    known = config.intensity_unit(unit)
    if known is None:
        raise Unread(f"unit {unit!r:.40} is none of {', '.join(G_PER_KWH)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unread(f"value {value!r:.40} is not a number")
    if not 0 <= value <= MAX_G_PER_KWH / G_PER_KWH[known]:  # nan is not, either; and no integer is too large to be compared
        raise Unread(f"value {value!r:.40} {unit} lies outside 0 to {MAX_G_PER_KWH:g} g/kWh, where every grid is")
    return float(value) * G_PER_KWH[known]


def moment(stamp, tz: str = "UTC") -> float:
    """ISO 8601 or Unix seconds as UTC seconds; naive stamps are in zone `tz`. Raises Unread."""
    try:
        if isinstance(stamp, str):
            when = datetime.fromisoformat(stamp.strip())
            stamp = (when if when.tzinfo else when.replace(tzinfo=ZoneInfo(tz))).timestamp()
        if not isinstance(stamp, bool) and math.isfinite(stamp):
            return float(stamp)
    except (ValueError, TypeError, OverflowError, KeyError):
        pass
    raise Unread(f"time {stamp!r:.40} is neither ISO 8601 nor Unix seconds")


def pick(data, path: str):
    """What a dotted path leads to in parsed JSON; numbers are places in lists. Raises Unread."""
    for key in path.split("."):
        try:
            data = data[int(key)] if isinstance(data, list) else data[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise Unread(f"the answer has no {path}") from None
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def _opener(sockets: list, here: bool) -> urllib.request.OpenerDirector:
    """urllib's, but for redirects, and for proxies if the host is here; puts its sockets into the list, for a deadline to shut."""

    def seen(kind):
        class Seen(kind):
            def connect(self):
                super().connect()
                sockets.append(self.sock)

        return Seen

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(seen(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(seen(http.client.HTTPSConnection), request)

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args):
            return None

    return urllib.request.build_opener(Http, Https, Stay, urllib.request.ProxyHandler({} if here else None))


def _retry_after(text: str | None) -> float:
    """Seconds a 429 or 503 asks us to wait, at most an hour."""
    if not text:
        return 0.0
    try:
        wait_s = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)


def get_json(url: str, headers: dict[str, str], timeout_s: float):
    """The parsed answer to one GET, all of which may take timeout_s. Raises Unread; its `status` is HTTP's where there was one."""
    host, sockets, late = urlsplit(url).netloc, [], threading.Event()

    def stop() -> None:
        late.set()
        for s in sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(s, socket.SHUT_RDWR)

    deadline = threading.Timer(timeout_s, stop)  # a socket's own time-out begins anew with each byte
    deadline.daemon = True
    deadline.start()
    too_late = Unread(f"{host}: no answer within {timeout_s:g} s")
    try:
        request = urllib.request.Request(url, headers={"Accept": "application/json", "User-Agent": "curtail"} | headers)
        with _opener(sockets, urlsplit(url).hostname in config.LOOPBACK).open(request, timeout=timeout_s) as answer:
            body = answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise Unread(f"HTTP {error.code} from {host}", _retry_after(error.headers.get("Retry-After")), error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        raise (
            too_late if late.is_set() or isinstance(why, TimeoutError) else Unread(f"{host}: {str(why) or type(why).__name__:.80}")
        ) from None
    finally:
        deadline.cancel()
    if late.is_set():
        raise too_late
    if len(body) > MAX_BYTES:
        raise Unread(f"{host}: the answer has more than {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Unread(f"{host}: the answer is not JSON") from None


def secret(name: str, what: str) -> str:
    """A secret from the environment. Raises BadInput."""
    value = os.environ.get(name, "").strip()
    if not value or not value.isprintable():
        raise BadInput(f"{what} needs the environment variable {name}, which is {'not one line' if value else 'not set'}; export it first")
    return value


class Vessim:
    """Vessim's REST API, as arXiv:2602.22760 used it: /microgrids/NAME. Its clock may be a simulated one, so a state counts from when
    we first see it; one that no longer changes its time is a simulation that stands still."""

    def __init__(self, cfg, site: str):
        region = quote(cfg.sites[site].region, safe="")
        self.url = f"{config.signal_url(cfg, site).replace('{region}', region).rstrip('/')}/microgrids/{region}"
        self.s, self.stamp, self.since = cfg.signals, None, 0.0

    def read(self) -> Reading:
        state = get_json(self.url, {}, self.s.timeout_s)
        value, stamp = pick(state, self.s.path or "grid_signals.mci"), pick(state, "time")
        if stamp != self.stamp:
            self.stamp, self.since = stamp, time.time()
        return Reading(intensity(value, self.s.unit), self.since, self.s.unit)


class WattTime:
    """WattTime v3's forecast of co2_moer (marginal, lb/MWh), whose point for the present is the reading. Not its /v3/signal-index, which
    is a percentile of the region's own month. https://docs.watttime.org"""

    def __init__(self, cfg, site: str):
        self.region, self.timeout_s = cfg.sites[site].region, cfg.signals.timeout_s
        self.url = config.signal_url(cfg, site).rstrip("/")
        login = ":".join(secret(name, "signals.source=watttime") for name in ("WATTTIME_USER", "WATTTIME_PASSWORD"))
        self.basic, self.token = "Basic " + base64.b64encode(login.encode()).decode(), ""

    def read(self) -> Reading:
        fresh = not self.token
        if fresh:
            self.log_in()
        try:
            answer = self.forecast()
        except Unread:
            if self.token or fresh:
                raise
            self.log_in()  # a token lasts for 30 minutes
            answer = self.forecast()
        return self.reading(answer)

    def log_in(self) -> None:
        self.token = ""
        token = pick(get_json(f"{self.url}/login", {"Authorization": self.basic}, self.timeout_s), "token")
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise Unread("the login brought no token")
        self.token = token

    def forecast(self):
        url = f"{self.url}/v3/forecast?region={quote(self.region, safe='')}&signal_type=co2_moer"
        try:
            return get_json(url, {"Authorization": f"Bearer {self.token}"}, self.timeout_s)
        except Unread as error:
            self.token = "" if error.status == 401 else self.token
            raise

    def reading(self, answer) -> Reading:
        meta, points = pick(answer, "meta"), pick(answer, "data")
        for key, asked in (("region", self.region), ("signal_type", "co2_moer")):
            if (got := pick(meta, key)) != asked:
                raise Unread(f"asked for {key} {asked}, the answer is of {got!r:.40}")
        unit = str(pick(meta, "units"))
        if not isinstance(points, list) or not points:
            raise Unread("the forecast has no points")
        starts = np.array([moment(pick(p, "point_time")) for p in points])
        values = np.array([intensity(pick(p, "value"), unit) for p in points])
        if (np.diff(starts) <= 0).any():
            raise Unread("the forecast's times do not grow")
        now, period_s = time.time(), float(np.median(np.diff(starts))) if len(starts) > 1 else 300.0
        if not starts[0] - period_s <= now < starts[-1] + period_s:
            raise Unread(f"the forecast, {carbon.iso(starts[0])} to {carbon.iso(starts[-1] + period_s)}, does not cover the present")
        at = max(0, int(np.searchsorted(starts, now, side="right")) - 1)
        return Reading(float(values[at]), moment(meta.get("generated_at", points[0]["point_time"])), unit, (starts, values))


class ElectricityMaps:
    """Electricity Maps' latest carbon intensity of a zone: the average of what is consumed there, life-cycle, in gCO2eq/kWh; not marginal,
    so thresholds mean something else. https://portal.electricitymaps.com/docs/api"""

    def __init__(self, cfg, site: str):
        self.zone, self.timeout_s = cfg.sites[site].region, cfg.signals.timeout_s
        self.url = f"{config.signal_url(cfg, site).rstrip('/')}/v3/carbon-intensity/latest?zone={quote(self.zone, safe='')}"
        self.headers = {"auth-token": secret("ELECTRICITYMAPS_TOKEN", "signals.source=electricitymaps")}

    def read(self) -> Reading:
        answer = get_json(self.url, self.headers, self.timeout_s)
        if (zone := pick(answer, "zone")) != self.zone:
            raise Unread(f"asked for zone {self.zone}, the answer is of {zone!r:.40}")
        unit = "gCO2eq/kWh"
        return Reading(intensity(pick(answer, "carbonIntensity"), unit), moment(pick(answer, "datetime")), unit)


class Json:
    """Any URL that answers JSON, by the paths of value, time and unit in it."""

    def __init__(self, cfg, site: str):
        self.s, region = cfg.signals, cfg.sites[site].region
        self.url = config.signal_url(cfg, site).replace("{region}", quote(region, safe=""))
        self.paths = [p and p.replace("{region}", region) for p in (self.s.path, self.s.time_path, self.s.unit_path)]
        self.headers = {self.s.header: secret(self.s.header_env, "signals.header_env")} if self.s.header_env else {}

    def read(self) -> Reading:
        answer = get_json(self.url, self.headers, self.s.timeout_s)
        value, at, unit = self.paths
        unit = str(pick(answer, unit)) if unit else self.s.unit
        return Reading(intensity(pick(answer, value), unit), moment(pick(answer, at)) if at else time.time(), unit)


class Csv:
    """A file in the form of a trace (first column time, others regions) that somebody appends to: its newest row that is not in the
    future. Header and tail are read anew each time, so that it may also be cut short, replaced or rewritten; a line that is not
    finished does not count yet."""

    def __init__(self, cfg, site: str):
        self.path = Path(config.signal_url(cfg, site).replace("{region}", cfg.sites[site].region))
        self.region, self.unit, self.tz = cfg.sites[site].region, cfg.signals.unit, cfg.carbon.tz

    def read(self) -> Reading:
        try:
            with open(self.path, "rb") as file:
                head = file.readline(TAIL_BYTES)
                begin = max(len(head), os.fstat(file.fileno()).st_size - TAIL_BYTES)
                file.seek(begin)
                tail = file.read(TAIL_BYTES)
        except OSError as error:
            raise Unread(f"{self.path}: {error.strerror}") from None
        if not head.endswith(b"\n"):
            raise Unread(f"{self.path}: no header yet")
        lines = tail[: tail.rfind(b"\n") + 1].split(b"\n")[begin > len(head) : -1]  # of a tail the first may be half a line
        try:
            header = next(csv.reader([head.decode("utf-8-sig", "replace")]), [])
            if self.region not in header[1:]:
                raise Unread(f"{self.path}: no column {self.region!r}; it has {', '.join(header[1:]):.80}")
            return self.newest(csv.reader(line.decode("utf-8", "replace") for line in reversed(lines)), header.index(self.region))
        except csv.Error as error:
            raise Unread(f"{self.path}: {error}") from None

    def newest(self, rows, column: int) -> Reading:
        """Of rows from last to first."""
        now = time.time()
        for row in filter(None, rows):
            if (unix := moment(row[0], self.tz)) <= now:
                cell = row[column].strip() if column < len(row) else ""
                try:
                    return Reading(intensity(float(cell), self.unit), unix, self.unit)
                except ValueError:
                    raise Unread(f"{self.path}: {self.region} at {row[0]:.40} is {cell!r:.40}, not a number") from None
        raise Unread(f"{self.path}: no row up to now")


def sources(cfg) -> dict:
    """site -> what to ask for its grid. Raises BadInput if a secret is missing."""
    kind = {"vessim": Vessim, "watttime": WattTime, "electricitymaps": ElectricityMaps, "csv": Csv, "json": Json}[cfg.signals.source]
    return {name: kind(cfg, name) for name in cfg.sites}


class Poller(threading.Thread):
    """Asks for one site until told to stop. Nothing that happens ends it; what it hears or why it hears nothing goes to `tell`."""

    def __init__(self, site: str, source, tell, poll_s: float, retry_s: float):
        super().__init__(name=f"signal-{site}", daemon=True)
        self.site, self.source, self.tell, self.poll_s, self.retry_s = site, source, tell, poll_s, retry_s
        self.over = threading.Event()

    def run(self) -> None:
        failures = 0
        while not self.over.is_set():
            try:
                self.tell(self.site, self.source.read())
                failures, pause_s = 0, self.poll_s
            except Exception as error:
                reason = error if isinstance(error, Unread) else Unread(f"{type(error).__name__}: {error}"[:120])
                pause_s = min(self.retry_s * 2 ** min(failures, 30), max(self.poll_s, self.retry_s)) * random.uniform(0.5, 1.0)
                pause_s, failures = max(pause_s, reason.wait_s), failures + 1
                self.tell(self.site, reason)
            self.over.wait(pause_s)


# ---------------------------------------------------------------------------------------------------------------------
# What counts


@dataclass
class Site:
    """What counts at one site, and what was said of it."""

    reading: Reading | None = None
    until_s: float = math.inf  # seconds since clock.start: when it is too old; infinity: unknown already
    failure: str = ""  # why the last request brought nothing
    told: str = ""  # what people were told last: known | failing ... | unknown ...


class Live:
    """The signals of all sites on the coordinator's clock, as simulate.Samples gives a trace's: t is seconds since clock.start.

    sources: site -> what to ask; signals: what earlier processes of this run have heard, which `due` hands out again, in order,
    before anything new; write: takes each new line of signals.csv."""

    def __init__(self, cfg, sources: dict, signals: list[Signal] = (), write=lambda line: None):
        self.cfg, self.start_unix, self.write = cfg, config.start_unix(cfg), write
        self.heard, self.sites = Heard(cfg.sites, signals), {name: Site() for name in cfg.sites}
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._news: list[dict] = []
        self._path = str(config.run_dir(cfg) / "signals.csv")
        tell, poll_s = (lambda *said: self._inbox.put(said)), config.poll_s(cfg)
        self.pollers = [Poller(name, source, tell, poll_s, cfg.signals.retry_s) for name, source in sources.items()]
        if not signals:  # nobody has said anything yet
            signals = [Signal(0, name, None, source=cfg.signals.source) for name in cfg.sites]
            for one in signals:
                self._note(one)
        end_s, last = max(s.t_s for s in signals) + 1.0, {s.site: s for s in signals}
        changes = {name: zip(*(x.tolist() for x in self.heard.changes(name, end_s))) for name in cfg.sites}
        self._past = sorted((t, name, value, last.get(name)) for name in cfg.sites for t, value in changes[name])
        self._past.reverse()
        self.asking = False

    def start(self) -> None:
        """Begin to ask. Only from now on can a reading be too old: after a break the first answer comes before its stop."""
        self.asking = True
        for poller in self.pollers:
            poller.start()

    def close(self) -> None:
        for poller in self.pollers:
            poller.over.set()

    def next_time(self) -> float:
        """When the next thing is due, if no reading comes before."""
        if self._past or not self.asking:
            return self._past[-1][0] if self._past else math.inf
        return min(site.until_s for site in self.sites.values())

    def due(self, t: float) -> list[tuple[str, float | None, tuple | None]]:
        """(site, gCO2/kWh or None, forecast issued with it or None) of all that has changed up to t. A forecast: (n,) seconds since
        clock.start at which each value begins to hold, (n,) gCO2/kWh."""
        out = []
        while self._past and self._past[-1][0] <= t:
            out.append(self._again(*self._past.pop()))
        if self._past or not self.asking:
            return out
        while not self._inbox.empty():
            site, said = self._inbox.get()
            out += self._hear(t, site, said)
        for name, site in self.sites.items():
            if site.until_s <= t:
                why = site.failure or f"nothing new for {t - (site.reading.unix - self.start_unix):.0f} s"
                site.reading, site.until_s = None, math.inf
                self._note(Signal(int(t), name, None, source=self.cfg.signals.source))
                self._tell(name, "unknown", why)
                out.append((name, None, None))
        return out

    def at(self, site: str, t: float) -> float | None:
        """gCO2/kWh at a site, as far as is known now."""
        reading = self.sites[site].reading
        return reading.g_per_kwh if reading else None

    def traces(self, t: float) -> dict[str, carbon.Trace]:
        """region -> what was heard up to t, for accounting."""
        return self.heard.traces(self.cfg, t, self._path)

    def news(self) -> list[dict]:
        """What people should know since the last call: journal records of type `signal`, but for their time."""
        news, self._news = self._news, []
        return news

    def _again(self, t: float, name: str, value: float, last: Signal | None) -> tuple:
        """What was handed out by an earlier process. The last reading of all still counts until it is too old."""
        site, known = self.sites[name], value == value
        site.reading = Reading(value, self.start_unix + t, "") if known else None
        site.until_s = last.until_s if known and last else math.inf
        if last and known and last.g_per_kwh == value:
            site.reading = Reading(value, moment(last.time), last.unit)
        site.told = "known" if known else ""
        return name, value if known else None, None

    def _hear(self, t: float, name: str, said: "Reading | Unread") -> list[tuple]:
        site, now, max_age_s = self.sites[name], self.start_unix + t, config.max_age_s(self.cfg)
        if isinstance(said, Reading):
            age_s = now - said.unix
            if age_s > max_age_s:
                said = Unread(f"the newest reading is {age_s:.0f} s old, more than signals.max_age_s={max_age_s:g}")
            elif age_s < -AHEAD_S:
                said = Unread(f"the newest reading lies {-age_s:.0f} s in the future; is a clock wrong?")
        if isinstance(said, Unread):
            site.failure = str(said)
            self._tell(name, "failing" if site.reading else "unknown", site.failure)
            return []
        site.failure = ""
        before, site.reading = site.reading, said if not site.reading or said.unix >= site.reading.unix else site.reading
        self._tell(name, "known", f"{site.reading.g_per_kwh:.0f} gCO2/kWh from {self.cfg.signals.source}")
        if before and (site.reading.unix, site.reading.g_per_kwh) == (before.unix, before.g_per_kwh):
            return []
        site.until_s = max(t, said.unix + max_age_s - self.start_unix)
        stamp = carbon.iso(said.unix).replace(" ", "T")
        self._note(Signal(int(t), name, said.g_per_kwh, round(site.until_s, 3), round(now - said.unix, 3), stamp, said.unit,
                          self.cfg.signals.source))  # fmt: skip
        ahead = said.ahead and (said.ahead[0] - self.start_unix, said.ahead[1])
        return [(name, said.g_per_kwh, ahead)]

    def _note(self, signal: Signal) -> None:
        self.heard.add(signal)
        self.write(carbon.signal_line(signal))

    def _tell(self, name: str, state: str, reason: str) -> None:
        """Once a change: of state, or of what is wrong."""
        told = state if state == "known" else re.sub(r"\d+", "0", f"{state} {reason}")  # another age is no other reason
        before, self.sites[name].told = self.sites[name].told, told
        if told != before and not (state == "known" and not before):  # that it works at once is no news
            self._news.append({"type": "signal", "site": name, "state": state, "reason": reason})
