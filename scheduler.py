"""When may a site run: policies and the life of a site, off -> provisioning -> starting -> on -> off.

    schedule = Schedule(policy, sites, timed=True)
    schedule.observe(t, "texas", 26.8)        # a sample of its grid's marginal carbon intensity; None: unknown
    moves = schedule.advance(t, left)         # what changed, each with its reason; left: tokens yet to be trained

A policy decides by one value a site, in g/kWh: the MCI, or what `Objective` makes of MCI and price.

    threshold      the paper's: start below one threshold, stop when above another for off_delay_s
    break_even     the same, but ride a dirty gap through for as long as that has emitted less than a restart would
    forecast_gate  the same, but start only into windows expected to outlast a restart plus min_window_s
    percentile     the same, but the thresholds are a share of the site's own last days
    deadline       the budget by deadline_h: a shadow price, re-solved at every sample, that the expected clean hours just suffice
                   for; dirty hours only when the slack is used up
    plan           receding horizon: the least that the forecast allows, start costs and minimum windows included
    oracle         `plan` that knows the truth: what the others are judged by
    always         regardless of the grid: the baselines

Pure: no clock, no sockets, no files. Times are seconds since clock.start. The live run, the virtual clock and the
simulator call this same code, so that fed the same observations they decide alike.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import floor
from forecast import Forecast

INFINITY = float("inf")
LATEST = "the slack is used up: all run for the deadline"
RETRY_S = 1800.0  # joint policies know no windows: a site without a process gets a new chance after so long
RESERVE = 0.003  # a plan makes so much more than is left: the last hours are the dearest to find
MARGIN_S = 5.0  # of a deadline, for what is rounded, and beside it
MARGIN_STEPS = 3  # of the slowest site: a step under way is lost where a team changes, and the last one ends when it ends


@dataclass(frozen=True)
class Move:
    """One transition of a site. `reason` is a sentence fragment for people, e.g. 'MCI 463 > 100 for 600 s'."""

    t_s: float
    site: str
    was: str
    now: str
    reason: str
    mci_g_per_kwh: float | None


@dataclass
class Site:
    """What the schedule knows of one site."""

    provision_s: float
    startup_s: float
    tokens_per_s: float = 1.0
    idle_kw: float = 0.0
    train_kw: float = 1.0
    state: str = "off"
    since_s: float = -INFINITY  # when the present state began
    up_since_s: float = -INFINITY  # when it last left off, or went off
    mci: float | None = None
    value: float | None = None  # what the policy decides by; None: unknown
    barred: str = ""  # why a hard cap forbids it to run
    mark_s: float | None = None  # since when the policy has wanted the change now pending
    mark_value: float | None = None
    excess_g: float = 0.0  # break_even: what the present dirty gap has emitted too much by seen_s
    seen_s: float = -INFINITY
    absent: str = ""  # why no process answers for it; such a site is not started for the rest of its window

    @property
    def up(self) -> bool:
        return self.state != "off"

    @property
    def restart_s(self) -> float:
        return self.provision_s + self.startup_s

    def ready_s(self, t: float) -> float:
        """Seconds from t until it could train, if it were started now or is starting."""
        if self.state == "off":
            return self.restart_s
        if self.state == "on":
            return 0.0
        return max(0.0, self.since_s + (self.restart_s if self.state == "provisioning" else self.startup_s) - t)


class Objective:
    """What a policy decides by, in g/kWh: MCI, price (per MWh), or MCI + g_per_currency x price; and hard caps on either."""

    def __init__(self, policy, prices: dict | None = None, start_unix: int = 0):
        """prices: site -> carbon.Trace of currency/MWh."""
        self.name, self.prices, self.start = policy.objective, prices, start_unix
        self.g_per_currency = 1000 * policy.mix_kg_per_currency
        self.cap_g, self.cap_price = policy.cap_g_per_kwh, policy.cap_price_per_mwh
        self.what = {"carbon": "MCI", "price": "price", "mix": "mix"}[self.name]

    @property
    def plain(self) -> bool:
        """MCI alone, and nothing is barred."""
        return self.name == "carbon" and self.cap_g is None and self.cap_price is None

    def price(self, site: str, t):
        """Currency/MWh at run time(s) t; that of the last sample where the prices have ended."""
        trace = self.prices[site]
        at = np.searchsorted(trace.starts, self.start + np.asarray(t, float) + 1e-6, side="right") - 1
        return trace.values[np.maximum(at, 0)]

    def values(self, site: str, t, mci):
        """Of MCI (n,) or a number at run time(s) t."""
        if self.name == "carbon":
            return mci
        price = self.price(site, t)
        return price if self.name == "price" else mci + self.g_per_currency * price / 1000

    def barred(self, site: str, t: float, mci: float) -> str:
        if self.cap_g is not None and mci > self.cap_g:
            return f"MCI {mci:.0f} > cap {self.cap_g:g}"
        if self.cap_price is not None and (price := float(self.price(site, t))) > self.cap_price:
            return f"price {price:.0f} > cap {self.cap_price:g}"
        return ""


class Threshold:
    """The paper's policy: start below `on`, mark above `off`, stop when the mark is off_delay old.

    Equality keeps the state. A signal that is unknown never starts a site and stops a running one after one nominal
    step of its trace.
    """

    joint = False  # decides for each site by itself

    def __init__(self, policy, unknown_after_s: float = 300.0, forecast: Forecast | None = None):
        self.on, self.off = policy.on_below_g_per_kwh, policy.off_above_g_per_kwh
        self.on_delay_s, self.off_delay_s = policy.on_delay_s, policy.off_delay_s
        self.min_on_s, self.min_off_s = policy.min_on_s, policy.min_off_s
        self.unknown_after_s, self.forecast, self.what = unknown_after_s, forecast, "MCI"

    def wants(self, t: float, name: str, site: Site) -> str:
        """keep | start | stop, by the sample alone."""
        if site.value is None:
            return "stop" if site.up else "keep"
        if site.value < self.on:
            return "start"
        return "stop" if site.value > self.off else "keep"

    def matters(self, values: np.ndarray) -> np.ndarray:
        """(n,) bool: the samples of a trace (n,) that can change a decision made at the sample before. Not inherited, see `sieve`."""
        kind = np.where(values < self.on, 0, np.where(values > self.off, 2, 1))
        return np.append(True, kind[1:] != kind[:-1])

    def observe(self, t: float, name: str, site: Site) -> None:
        """A sample: it may set the mark of a pending start or stop, or lift it."""
        if self.wants(t, name, site) != ("stop" if site.up else "start"):
            site.mark_s = site.mark_value = None
            if not site.up:
                site.absent = ""  # its window is over; the next one is a new chance
        elif site.mark_s is None or (site.up and site.mark_value is None and site.value is not None):
            site.mark_s, site.mark_value = t, site.value

    def due(self, name: str, site: Site) -> float:
        """When the pending start or stop happens if no sample changes it; infinity if none is pending."""
        if site.mark_s is None:
            return INFINITY
        hold = self.min_on_s if site.up else self.min_off_s
        return max(site.mark_s + self.delay_s(site), site.up_since_s + hold)

    def delay_s(self, site: Site) -> float:
        if site.mark_value is None:
            return self.unknown_after_s
        return self.off_delay_s if site.up else self.on_delay_s

    def reason(self, name: str, site: Site) -> str:
        """Why the pending change happens."""
        if not site.up:
            return f"{self.what} {site.value:.0f} < {self.on:g}" + (f" for {self.on_delay_s:.0f} s" if self.on_delay_s else "")
        if site.mark_value is None:
            return f"signal unknown for {self.unknown_after_s:.0f} s"
        return f"{self.what} {site.mark_value:.0f} > {self.off:g}" + (f" for {self.off_delay_s:.0f} s" if self.off_delay_s else "")


class Always(Threshold):
    """Train regardless of the grid: the baselines."""

    matters = Threshold.matters

    def wants(self, t: float, name: str, site: Site) -> str:
        return "start"

    def delay_s(self, site: Site) -> float:
        return 0.0

    def reason(self, name: str, site: Site) -> str:
        return "always on"


class BreakEven(Threshold):
    """Ride a dirty gap through for as long as that has emitted less than a restart would (ski rental).

    What riding emits too much: train_kw x (value - off) x time since the gap began. What a restart would: idle_kw x `on` x
    restart_s, since it happens below `on`. So a gap that turns out long costs at most twice what knowing it would have.
    """

    def observe(self, t: float, name: str, site: Site) -> None:
        if not site.up or site.value is None or site.value <= self.off:
            site.excess_g = 0.0
        elif site.mark_value is not None:  # the gap goes on: by the sample before
            site.excess_g += self._rate(site, site.mark_value) * (t - site.seen_s)
        super().observe(t, name, site)
        site.seen_s = t
        if site.up and site.mark_value is not None:
            site.mark_value = site.value

    def _rate(self, site: Site, value: float) -> float:
        """g/s"""
        return site.train_kw * max(0.0, value - self.off) / 3600

    def restart_g(self, site: Site) -> float:
        return site.idle_kw * self.on * site.restart_s / 3600

    def due(self, name: str, site: Site) -> float:
        if not site.up or site.mark_value is None:
            return super().due(name, site)
        left = max(0.0, self.restart_g(site) - site.excess_g)
        rides = left / rate if (rate := self._rate(site, site.mark_value)) else INFINITY
        return max(site.seen_s + rides, site.mark_s + self.off_delay_s, site.up_since_s + self.min_on_s)

    def reason(self, name: str, site: Site) -> str:
        if not site.up or site.mark_value is None:
            return super().reason(name, site)
        return f"{self.what} {site.mark_value:.0f} > {self.off:g}: going on emits more than a restart, {self.restart_g(site):.1f} g"


class ForecastGate(Threshold):
    """Start only if every value that the forecast expects for a restart plus min_window_s is below `on`: shorter windows cost
    a start and train little or nothing."""

    def __init__(self, policy, unknown_after_s: float, forecast: Forecast):
        super().__init__(policy, unknown_after_s, forecast)
        self.min_window_s = policy.min_window_s

    def wants(self, t: float, name: str, site: Site) -> str:
        wants = super().wants(t, name, site)
        return "keep" if wants == "start" and not site.up and not self.lasts(t, name, site) else wants

    def lasts(self, t: float, name: str, site: Site) -> bool:
        steps = max(1, int(np.ceil((site.restart_s + self.min_window_s) / self.forecast.step_s - 1e-9)))
        return bool((self.forecast.ahead(t, name, steps) < self.on).all())

    def reason(self, name: str, site: Site) -> str:
        if site.up:
            return super().reason(name, site)
        return f"{super().reason(name, site)}, expected for {site.restart_s + self.min_window_s:.0f} s"


class Percentile(Threshold):
    """The thresholds are a share of what the site itself has seen in the last percentile_hours: for grids that are never, or
    nearly always, below a fixed one. Until a day has been seen, the fixed ones."""

    def __init__(self, policy, unknown_after_s: float, forecast: Forecast):
        super().__init__(policy, unknown_after_s, forecast)
        self.share, self.num = policy.percentile / 100, int(policy.percentile_hours * 3600 // forecast.step_s)
        self.least, self.bounds = int(86400 // forecast.step_s), {}

    def wants(self, t: float, name: str, site: Site) -> str:
        past = self.forecast.past.get(name)
        if site.value is None or past.num < self.least:
            self.bounds.pop(name, None)
            return super().wants(t, name, site)
        self.bounds[name] = bound = float(np.quantile(past.values[max(0, past.num - self.num) : past.num], self.share))
        return "start" if site.value <= bound else "stop"

    def reason(self, name: str, site: Site) -> str:
        if name not in self.bounds or site.value is None:
            return super().reason(name, site)
        return f"{self.what} {site.value:.0f} {'>' if site.up else '<='} {self.bounds[name]:.0f}, its {100 * self.share:g} % quantile"


class Joint:
    """Policies that decide for all sites together, anew at every sample and every move: `replan` sets what is pending."""

    joint = True

    def __init__(self, policy, unknown_after_s: float, forecast: Forecast, train_s: float, sync_s: float, tokens_per_step: int):
        """train_s, sync_s: of a federated round."""
        self.tokens_per_step = tokens_per_step
        self.deadline_s = None if policy.deadline_h is None else 3600 * policy.deadline_h
        self.on, self.min_window_s, self.max_sites = policy.on_below_g_per_kwh, policy.min_window_s, policy.max_sites
        self.horizon_s = 3600 * policy.horizon_h
        self.unknown_after_s, self.forecast, self.train_s, self.sync_s = unknown_after_s, forecast, train_s, sync_s
        self.pending: dict[str, tuple[float, str]] = {}  # site -> when its next change is due, and why
        self.what = "MCI"

    def observe(self, t: float, name: str, site: Site) -> None:
        if not site.up and t - site.since_s >= RETRY_S:
            site.absent = ""
        if site.value is not None:
            site.mark_s = None
        elif site.mark_s is None:
            site.mark_s = t  # unknown since

    def due(self, name: str, site: Site) -> float:
        if site.value is None:
            return site.mark_s + self.unknown_after_s if site.up and site.mark_s is not None else INFINITY
        return self.pending.get(name, (INFINITY, ""))[0]

    def reason(self, name: str, site: Site) -> str:
        return f"signal unknown for {self.unknown_after_s:.0f} s" if site.value is None else self.pending[name][1]

    def usable(self, sites: dict[str, Site]) -> dict[str, Site]:
        return {n: s for n, s in sites.items() if s.value is not None and not s.barred and not s.absent}

    def efficiency(self, num: int) -> float:
        """Share of its time that one of `num` sites trains."""
        return 1.0 if num < 2 else self.train_s / (self.train_s + self.sync_s)

    def step_s(self, sites: dict[str, Site]) -> float:
        """Seconds of the slowest site's step."""
        return max(self.tokens_per_step / s.tokens_per_s for s in sites.values())

    def reserve_s(self, sites: dict[str, Site]) -> float:
        """So long before its deadline the budget should be trained, by what is known."""
        return MARGIN_S + MARGIN_STEPS * self.step_s(sites)

    def last_s(self, t: float, sites: dict[str, Site], left: float, off: str = "", on: str = "") -> tuple[float, list[str]]:
        """When the budget would surely be trained if from t on those that are up ran, `off` restarted first and `on` started, and as
        many more as make it sooner; and who they are: a few tokens are done sooner without an average."""
        ready = {n: s.restart_s if n == off else s.ready_s(t) for n, s in sites.items()}
        sure = [n for n, s in sites.items() if (s.up and n != off) or n == on]
        first = sorted(ready[n] for n in sure)[1:2]  # when two are there, a round may be under way, and takes nobody in
        ready = {n: r + self.train_s + self.sync_s if r and first and (n not in sure or r > first[0]) else r for n, r in ready.items()}
        more = sorted((n for n in sites if n not in sure), key=lambda n: (ready[n], -sites[n].tokens_per_s))
        best: tuple[float, list[str]] = (INFINITY, [])
        step_s = self.step_s(sites)
        whole_s = max(step_s, self.train_s // step_s * step_s)  # of a round: a step that does not fit is not begun
        round_s = max(self.train_s, whole_s) + self.sync_s
        for num in range(max(1, len(sure)), min(len(sites), max(self.max_sites or len(sites), len(sure))) + 1):
            team = sorted((sure + more)[:num], key=ready.get)
            begin = ready[team[-1]]
            share = 1.0 if num == 2 else whole_s / round_s  # of the time until the last one joins
            before = sum(sites[n].tokens_per_s * share * (begin - ready[n]) for n in team[:-1])
            train_s = max(0.0, left - before) / sum(sites[n].tokens_per_s for n in team)
            rounds = 0 if num == 1 else int(np.ceil(train_s / whole_s - 1e-9))
            waits_s = rounds * (round_s - whole_s) + (0.0 if num == 1 else self.sync_s)
            joins = 0 if num == 1 or ready[team[0]] == begin else 2
            best = min(best, (t + begin + train_s + waits_s + joins * self.sync_s, team))
        return best

    def guard(self, t: float, sites: dict[str, Site], left: float) -> tuple[float, list[str]]:
        """When at the latest some sites must run for the budget to be trained by the deadline, and which."""
        if self.deadline_s is None or not sites:
            return INFINITY, []
        end, team = self.last_s(t, sites, left)
        total = sum(sites[n].tokens_per_s for n in team)
        running = sum(sites[n].tokens_per_s for n in team if sites[n].state == "on")
        return t + max(0.0, self.deadline_s - self.reserve_s(sites) - end) / max(1e-9, 1 - 0.99 * running / total), team


class Deadline(Joint):
    """The budget by deadline_h with the least emissions: a shadow price of work, re-solved at every sample.

    The price is what the dirtiest moment costs that the forecast says is needed, cleanest moments first (the sort of floor.lp,
    starts included). A site trains while its own grid is below it; it starts only once the gain expected before the next
    loss pays for the start, and stops only once the loss expected before the next gain does. `guard` starts everyone when
    the slack is used up, whatever the price.
    """

    def replan(self, t: float, all_sites: dict[str, Site], left: float) -> None:
        sites = self.usable(all_sites)
        self.pending = {}
        if not sites or left <= 0:
            return
        step, end = self.forecast.step_s, max(self.deadline_s, t + 1.0)
        first = self.forecast.slot(t)
        n = int(np.ceil((end - first * step) / step - 1e-9))
        edges = np.clip(step * (first + np.arange(n + 1)), t, end)
        value = np.array([self.forecast.ahead(t, name, n) for name in sites])
        seconds = np.array([np.diff(np.maximum(edges, t + s.ready_s(t))) for s in sites.values()])
        cost, work = self.marginal(list(sites.values()), value, seconds)
        price = self._price(list(sites.values()), cost, work, left)
        must, team = self.guard(t, sites, left)
        worth = {}  # g/s that a site at work gains: what coming and going costs it, since all average then
        for (name, s), c in zip(sites.items(), cost):
            if s.state == "on" and price < INFINITY:
                worth[name] = s.tokens_per_s * max(0.0, price - c[0])
        for (name, s), c, w, v in zip(sites.items(), cost, work, value):
            gains = np.cumsum(w * (price - np.where(w > 0, c, price))) if price < INFINITY else np.full(n, INFINITY)
            start_g = s.idle_kw * s.restart_s * max(0.0, float(v[0])) / 3600
            start_g += self.sync_s * sum(worth[n] for n in worth if n != name)
            shown = f"{self.what} {s.value:.0f}, price {price * 3600 * s.tokens_per_s / s.train_kw:.0f}"
            if not s.up:
                if name in team:
                    self.pending[name] = (must, LATEST)
                elif price == INFINITY:
                    continue
                late = self.last_s(t, sites, left, on=name)[0] > self.deadline_s - self.reserve_s(sites)
                if t < must and s.since_s < t and self._pays(gains, start_g) and not late:
                    self.pending[name] = (t, shown)
            elif s.since_s < t:  # else it has just moved
                bad = np.flatnonzero(gains < -start_g)
                good = np.flatnonzero(gains > 0)
                if bad.size and (not good.size or bad[0] < good[0]):
                    rest = self.deadline_s - self.reserve_s(sites) - self.last_s(t, sites, left, off=name)[0]
                    at = list(sites).index(name)
                    cut = seconds.copy()
                    cut[at] = np.diff(np.maximum(edges, t + s.restart_s))
                    c2, w2 = self.marginal(list(sites.values()), value, cut)
                    price2 = self._price(list(sites.values()), c2, w2, left)
                    if rest > step + self.sync_s and price2 < c[0]:
                        self.pending[name] = (t, f"{shown}: others will do by the deadline")

    @staticmethod
    def _pays(gains: np.ndarray, start_g: float) -> bool:
        """Does the gain reach what the start costs before it is a loss?"""
        good, bad = np.flatnonzero(gains >= start_g), np.flatnonzero(gains < 0)
        return bool(good.size) and (not bad.size or good[0] < bad[0])

    def marginal(self, sites: list[Site], value: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each site would add to those that are cleaner than it, slot by slot. value: (K, n) g/kWh; seconds: (K, n) each
        site could train. -> (K, n) g/token, (K, n) tokens.

        Alone a site trains all the time; together all lose what the averages take. So the second costs more than its own
        emissions, and as many as are cheapest together count as one step (the lower hull of cost over work).
        """
        kw, idle, rate = (np.array([[getattr(s, k)] for s in sites]) for k in ("train_kw", "idle_kw", "tokens_per_s"))
        eff, up = self.efficiency(2), np.array([[s.up] for s in sites])
        order = np.argsort(kw * value / rate - 1e-9 * up, axis=0, kind="stable")
        alone_g, alone = kw * value * seconds / 3600, rate * seconds
        shared_g = (eff * kw + (1 - eff) * idle) * value * seconds / 3600
        (alone_g, shared_g, alone), k = (np.take_along_axis(x, order, 0) for x in (alone_g, shared_g, alone)), len(sites)
        grams, tokens = np.cumsum(shared_g, 0), eff * np.cumsum(alone, 0)  # of the m + 1 cleanest together
        grams[0], tokens[0] = alone_g[0], alone[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            if k > 1:
                slope = np.where(tokens[1:] > tokens[0], (grams[1:] - grams[0]) / (tokens[1:] - tokens[0]), np.inf)
                best = 1 + np.argmin(slope, 0)
                among = (np.arange(k)[:, None] >= 1) & (np.arange(k)[:, None] <= best)
            each = np.diff(tokens, axis=0, prepend=0.0)
            cost = np.where(each > 0, np.diff(grams, axis=0, prepend=0.0) / each, np.inf)
            if k > 1:
                cost = np.where(among, slope.min(0), cost)
                each = np.where(among, (np.take_along_axis(tokens, best[None], 0) - tokens[0]) / best, np.maximum(each, 0.0))
        if self.max_sites:
            cost[self.max_sites :], each[self.max_sites :] = np.inf, 0.0
        back = np.argsort(order, axis=0)
        return np.take_along_axis(cost, back, 0), np.take_along_axis(each, back, 0)

    def _price(self, sites: list[Site], cost: np.ndarray, work: np.ndarray, left: float) -> float:
        """g/token of the dirtiest moment needed; infinity if all are."""
        order = np.argsort(cost, axis=None, kind="stable")
        costs, filled, lost = cost.ravel()[order], np.cumsum(work.ravel()[order]), 0.0
        restart = np.array([s.restart_s * s.tokens_per_s for s in sites])
        for _ in range(3):
            at = int(np.searchsorted(filled, left + lost))
            if at >= len(costs):
                return INFINITY
            runs = cost <= costs[at]
            lost = float((runs[:, 1:] & ~runs[:, :-1]).sum(1) @ restart)
        return float(costs[at])


class Plan(Joint):
    """The best windows by the forecast, start costs and minimum windows included, planned anew at every sample.

    With a deadline: the budget by then for the least emissions (the dynamic programme of floor.py, on the forecast). Without:
    over horizon_h, whatever emits less than training at `on` would. Sites that average train only part of the time: the
    plan is made for so much more.
    """

    SLOTS = 288  # of a plan; a longer horizon takes longer slots

    def __init__(self, *args):
        super().__init__(*args)
        self.windows: dict[str, list[tuple[float, float]]] = {}
        self.share = self.efficiency(2)  # of the time a site is on, that it trains

    def due(self, name: str, site: Site) -> float:
        if site.value is None or name not in self.windows:
            return super().due(name, site)
        ahead = [(a, b) for a, b in self.windows[name] if b > max(site.since_s, site.up_since_s)]
        if site.up:
            return ahead[0][1] if ahead else site.since_s
        return ahead[0][0] - site.restart_s if ahead else INFINITY

    def reason(self, name: str, site: Site) -> str:
        if site.value is None or name not in self.windows:
            return super().reason(name, site)
        hours = sum(b - a for a, b in self.windows[name]) / 3600
        return f"planned: {hours:.1f} h in {len(self.windows[name])} windows; {self.what} {site.value:.0f}"

    def replan(self, t: float, all_sites: dict[str, Site], left: float) -> None:
        sites, self.windows = self.usable(all_sites), {}
        if not sites or left <= 0:
            return
        end = t + self.horizon_s if self.deadline_s is None else self.deadline_s - self.reserve_s(sites)
        step = self.forecast.step_s
        begin = step * np.ceil((t - 1e-6) / step)
        steps = int((end - begin + 1e-6) // step)
        width = step * max(1, -(-steps // self.SLOTS))
        num = int((end - begin + 1e-6) // width)
        if num < 1:
            self.windows = self._all(sites, t, left)
            return
        edges = begin + width * np.arange(num + 1)
        curves, choices = {}, {}
        for name, s in sites.items():
            curves[name], choices[name] = self._curve(t, name, s, edges)
        if self.deadline_s is None:
            unit_g = self.on * width / 3600
            taken = {n: int(np.argmin(curves[n] - unit_g * s.train_kw * np.arange(num + 1))) for n, s in sites.items()}
            self.windows = self._windows(t, sites, choices, taken, edges, end)
            return
        left *= 1 + RESERVE
        need, best = left / self.share, None
        for _ in range(8):  # the least time on that trains what is left
            taken = self._share_out(sites, curves, need, width)
            if taken is None:
                break
            windows = self._windows(t, sites, choices, taken, edges, end)
            made = self._yield(sites, windows)
            if made >= left and (best is None or need < best[0]):
                best = need, windows
            if 0 <= made - left < RESERVE * left:
                break
            need = max(0.0, need + left - made + (0.2 * RESERVE * left if made < left else 0.0))
        self.windows = best[1] if best else self._all(sites, t, left)
        self.share = left / best[0] if best else self.efficiency(2)

    @staticmethod
    def _all(sites: dict[str, Site], t: float, left: float) -> dict[str, list[tuple[float, float]]]:
        """Too late for choices: everyone who is ready before those at work are done."""
        rate = sum(s.tokens_per_s for s in sites.values() if s.up)
        return {n: [(t, INFINITY)] if s.up or left > rate * s.restart_s else [] for n, s in sites.items()}

    def _curve(self, t: float, name: str, site: Site, edges: np.ndarray):
        """Least gCO2 for k of the slots, k = 0..n, and how."""
        step, num = self.forecast.step_s, len(edges) - 1
        first = self.forecast.slot(t)
        values = self.forecast.ahead(t, name, int(round((edges[-1] - step * first) / step)))
        at, grown = step * (first + np.arange(len(values) + 1.0)), np.concatenate(([0.0], np.cumsum(values))) * step / 3600
        area = np.interp(edges, at, grown)
        costs, ready = site.train_kw * np.diff(area), t + site.ready_s(t)
        begins = site.idle_kw * (area[:-1] - np.interp(edges[:-1] - site.restart_s, at, grown))
        begins[edges[:-1] < ready - 1e-6] = np.inf
        if site.up and site.state != "on" and (first := int(np.searchsorted(edges[:-1], ready - 1e-6))) < num:
            begins[first] = 0.0  # the start is paid for already
        age, gap = (max(1, int(np.ceil(x / (edges[1] - edges[0]) - 1e-9))) for x in (self.min_window_s, site.restart_s))
        return floor.programme(costs, begins, age, site.state == "on", gap)

    def _share_out(self, sites, curves, tokens: float, width: float) -> dict[str, int] | None:
        """How many slots each site trains, for `tokens` in all with the least emissions; None if they do not suffice."""
        unit = min(s.tokens_per_s for s in sites.values()) * width
        scaled, sizes = [], []
        for name, s in sites.items():
            size, k = s.tokens_per_s * width / unit, np.arange(len(curves[name]))
            scaled.append(np.interp(np.arange(int(k[-1] * size) + 1) / size, k, curves[name]))
            sizes.append(size)
        taken = floor.share_out(scaled, int(np.ceil(tokens / unit - 1e-6)))
        return taken and {n: int(np.ceil(k / size - 1e-9)) for n, k, size in zip(sites, taken, sizes)}

    @staticmethod
    def _windows(t: float, sites, choices, taken, edges, end: float) -> dict[str, list[tuple[float, float]]]:
        out = {}
        for name, s in sites.items():
            runs = np.concatenate(([False], floor.trained(choices[name], taken[name]), [False]))
            flips = np.flatnonzero(runs[1:] != runs[:-1])
            out[name] = [(float(edges[a]), float(edges[b])) for a, b in zip(flips[::2], flips[1::2])]
            soon = max(edges[0], t + s.ready_s(t)) + edges[1] - edges[0]
            if s.up and out[name] and out[name][0][0] < soon - 1e-6:
                out[name][0] = (t, out[name][0][1])
            elif s.up:
                out[name].insert(0, (t, t))  # it stops now
            if out[name] and out[name][-1][1] == edges[-1]:
                out[name][-1] = (out[name][-1][0], end)
        return out

    def _yield(self, sites, plan) -> float:
        """Tokens that planned windows would train, rounds and hand-overs taken into account."""
        moments = sorted({x for windows in plan.values() for window in windows for x in window})
        made, before = 0.0, []
        for a, b in zip(moments, moments[1:]):
            now = [n for n in sites if any(x <= a and b <= y for x, y in plan[n])]
            made += sum(sites[n].tokens_per_s for n in now) * self.efficiency(len(now)) * (b - a)
            joins = [n for n in now if n not in before]
            if joins and len(before) == 1:
                made -= sites[before[0]].tokens_per_s * self.sync_s
            if joins and before:
                made -= sum(sites[n].tokens_per_s for n in joins) * (self.sync_s if len(before) == 1 else self.train_s / 2)
            if len(before) > 1 and set(now) != set(before):  # a round cut short averages, too
                made -= sum(sites[n].tokens_per_s for n in before) * self.sync_s / 2
            before = now
        return made


class Oracle(Plan):
    """`plan` that knows the truth: policy_of gives it that forecast."""


POLICIES = {
    "threshold": Threshold, "break_even": BreakEven, "forecast_gate": ForecastGate, "percentile": Percentile,
    "deadline": Deadline, "plan": Plan, "oracle": Oracle, "always": Always,
}  # fmt: skip


def policy_of(policy, unknown_after_s: float = 300.0, forecast: Forecast | None = None, train_s: float = 600.0, sync_s: float = 0.0,
              tokens_per_step: int = 1):  # fmt: skip
    """The policy a config names. forecast: what all but threshold, break_even and always need."""
    kind = POLICIES[policy.name]
    more = (train_s, sync_s, tokens_per_step) if issubclass(kind, Joint) else ()
    return kind(policy, unknown_after_s, forecast, *more)


def sieve(policy: Threshold | Joint) -> Callable[[np.ndarray], np.ndarray] | None:
    """Which samples of a trace the policy needs; None: all. Only a class's own word counts: one that decides otherwise than the class
    it is made from may need what that leaves out."""
    return policy.matters if "matters" in vars(type(policy)) else None


class Schedule:
    """States of all sites. `timed`: provisioning and start-up take what the config says (virtual clock, simulator);
    else `provisioned` and `started` report when they are over (wall clock)."""

    def __init__(
        self, policy: Threshold | Joint, sites: dict[str, Site], timed: bool, mci_at: Callable[[str, float], float | None] | None = None,
        objective: Objective | None = None, max_sites: int | None = None,
    ):  # fmt: skip
        """mci_at(site, t): the intensity to report with a move, where only the samples that matter are observed. objective: None: MCI
        as it is. max_sites: that many at once; the cleanest that may start do, and stay until their own window ends."""
        self.policy, self.sites, self.timed, self.mci_at = policy, sites, timed, mci_at
        self.objective, self.max_sites = objective, max_sites or len(sites)
        if objective:
            policy.what = objective.what
        self.full: set[str] = set()  # sites that may start once another stops
        self._stale = False  # a joint policy has not seen the last sample or move
        self.up: set[str] = set()  # sites in any state but off
        self.stops: dict[str, float] = {}  # sites that are up and will stop, as far as is known now -> when
        self._order = {name: i for i, name in enumerate(sites)}
        self._next = dict.fromkeys(sites, INFINITY)  # when something is due at a site
        self._queue: list[tuple[float, int, str]] = []  # the same, earliest first; entries that differ are stale

    def observe(self, t: float, name: str, mci: float | None, ahead: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """A new sample: it may set the mark of a pending start or stop, or lift it. Decides nothing yet.

        ahead: the forecast issued with it, if any: (n,) seconds since clock.start at which each value begins to hold,
        (n,) gCO2/kWh.
        """
        site, objective, policy = self.sites[name], self.objective, self.policy
        site.mci = site.value = mci
        if objective and mci is not None:
            site.value, site.barred = float(objective.values(name, t, mci)), objective.barred(name, t, mci)
            if ahead is not None:
                ahead = ahead[0], objective.values(name, *ahead)
        if policy.forecast:
            policy.forecast.observe(t, name, site.value, ahead)
        policy.observe(t, name, site)
        if policy.joint:
            self._stale = True
        self._plan(name)

    def set_absent(self, name: str, why: str) -> None:
        self.sites[name].absent = why
        self._plan(name)

    def consider(self, t: float, left: float) -> None:
        """Have a joint policy decide again if something has changed. left: tokens yet to be trained, about."""
        if self._stale:
            self._stale = False
            self.policy.replan(t, self.sites, left)
            for name in self.sites:
                self._plan(name)

    def _due(self, name: str) -> float:
        """When the pending start or stop happens if no sample changes it; infinity if none is pending."""
        site = self.sites[name]
        if site.barred:
            return site.up_since_s if site.up else INFINITY
        return self.policy.due(name, site)

    def _plan(self, name: str) -> None:
        """Something about a site has changed: when is its next move due?"""
        site = self.sites[name]
        self.full.discard(name)
        due = t = self._due(name)
        if site.state == "off":
            self.stops.pop(name, None)
            if site.absent:
                t = INFINITY
        elif due < INFINITY:
            self.stops[name] = due
        else:
            self.stops.pop(name, None)
        if self.timed and site.state == "provisioning":
            t = min(t, site.since_s + site.provision_s)
        if self.timed and site.state == "starting":
            t = min(t, site.since_s + site.startup_s)
        if t != self._next[name]:
            self._next[name] = t
            if t < INFINITY:
                heapq.heappush(self._queue, (t, self._order[name], name))

    def restore(self, t: float, name: str, was: str, to: str) -> None:
        """A move read back from a journal. Once all are, observe every sample again, each at its time, then `resume`."""
        site = self.sites[name]
        site.state, site.since_s = to, t
        if "off" in (was, to):
            site.up_since_s = t
            (self.up.discard if to == "off" else self.up.add)(name)

    def resume(self) -> None:
        """The samples observed again set marks that may be older than the state they are to change."""
        for name, site in self.sites.items():
            if site.mark_s is not None:
                site.mark_s = max(site.mark_s, site.up_since_s)
            self._plan(name)
        self._stale = self.policy.joint

    def next_time(self) -> float:
        """The earliest moment at which `advance` would do something, if no sample came before; at once if it must `consider`."""
        return -INFINITY if self._stale else self._queue_time()

    def _queue_time(self) -> float:
        queue = self._queue
        while queue and self._next[queue[0][2]] != queue[0][0]:
            heapq.heappop(queue)
        return queue[0][0] if queue else INFINITY

    def advance(self, t: float) -> list[Move]:
        """Carry out everything due by t, in site order; but starts, where max_sites bounds them, cleanest first."""
        if self._queue_time() > t:
            return []
        due, moves = set(), []
        while self._queue_time() <= t:
            due.add(name := heapq.heappop(self._queue)[2])
            self._next[name] = INFINITY  # planned anew below
        for name in sorted(due, key=self._rank if len(self.sites) > self.max_sites else self._order.get):
            site = self.sites[name]
            if self._due(name) <= t and not (site.absent and not site.up):
                if site.up:
                    moves.append(self._move(t, name, "off", site.barred or self.policy.reason(name, site)))
                    self._re_mark(t, name)
                elif len(self.up) < self.max_sites:
                    if not self.objective:
                        site.value = self._mci(t, name)  # may be newer than the last sample that mattered
                    moves.append(self._move(t, name, "provisioning", self.policy.reason(name, site)))
                else:
                    self.full.add(name)
                    continue
            if self.timed and site.state == "provisioning" and site.since_s + site.provision_s <= t:
                moves.append(self._move(t, name, "starting", f"provisioned in {site.provision_s:.0f} s"))
            if self.timed and site.state == "starting" and site.since_s + site.startup_s <= t:
                moves.append(self._move(t, name, "on", f"started in {site.startup_s:.0f} s"))
            self._plan(name)
        return moves

    def _rank(self, name: str) -> tuple:
        """Sites that stop make room first; then the cleanest."""
        site = self.sites[name]
        return (0, 0.0) if site.up else (1, site.value if site.value is not None else INFINITY), self._order[name]

    def provisioned(self, t: float, name: str) -> list[Move]:
        """Wall clock: the machine is there."""
        site = self.sites[name]
        return [self._move(t, name, "starting", f"provisioned in {t - site.since_s:.1f} s")] if site.state == "provisioning" else []

    def started(self, t: float, name: str) -> list[Move]:
        """Wall clock: the site holds the state of the run and can train."""
        site = self.sites[name]
        return [self._move(t, name, "on", f"started in {t - site.since_s:.1f} s")] if site.state == "starting" else []

    def stop(self, t: float, name: str, reason: str) -> list[Move]:
        """Off at once, whatever the policy says (a dead process, the end of the run)."""
        if self.sites[name].state == "off":
            return []
        move = self._move(t, name, "off", reason)
        self._re_mark(t, name)
        return [move]

    def _re_mark(self, t: float, name: str) -> None:
        """Just off: the present sample may already ask for the next start."""
        site = self.sites[name]
        if site.value is not None and not self.policy.joint and self.policy.wants(t, name, site) == "start":
            site.mark_s, site.mark_value = t, site.value
            self._plan(name)

    def _mci(self, t: float, name: str) -> float | None:
        return self.mci_at(name, t) if self.mci_at else self.sites[name].mci

    def _move(self, t: float, name: str, to: str, reason: str) -> Move:
        site = self.sites[name]
        move = Move(t, name, site.state, to, reason, self._mci(t, name))
        if "off" in (site.state, to):
            (self.up.discard if to == "off" else self.up.add)(name)
            site.mark_s = site.mark_value = None
            site.up_since_s = t
        site.state, site.since_s = to, t
        self._stale = self.policy.joint
        self._plan(name)
        if to == "off":
            for waiting in list(self.full):
                self._plan(waiting)
        return move
