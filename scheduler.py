"""When may a site run: policies and the life of a site, off -> provisioning -> starting -> on -> off.

    schedule = Schedule(policy, sites, timed=True)
    schedule.observe(t, "texas", 26.8)        # a sample of its grid's marginal carbon intensity; None: unknown
    moves = schedule.advance(t)               # what changed, each with its reason

Pure: no clock, no sockets, no files. Times are seconds since clock.start. The live run, the virtual clock and the
simulator call this same code, so that fed the same observations they decide alike.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

INFINITY = float("inf")


@dataclass(frozen=True)
class Move:
    """One transition of a site. `reason` is a sentence fragment for people, e.g. 'MCI 463 > 100 for 600 s'."""

    t_s: float
    site: str
    was: str
    now: str
    reason: str
    mci_g_per_kwh: float | None


class Threshold:
    """The paper's policy: start below `on`, mark above `off`, stop when the mark is off_delay old.

    Equality keeps the state. A signal that is unknown never starts a site and stops a running one after one nominal
    step of its trace.
    """

    def __init__(self, policy, unknown_after_s: float = 300.0):
        self.on, self.off = policy.on_below_g_per_kwh, policy.off_above_g_per_kwh
        self.on_delay_s, self.off_delay_s = policy.on_delay_s, policy.off_delay_s
        self.min_on_s, self.min_off_s = policy.min_on_s, policy.min_off_s
        self.unknown_after_s = unknown_after_s

    def wants(self, mci: float | None, up: bool) -> str:
        """keep | start | stop, by one sample alone."""
        if mci is None:
            return "stop" if up else "keep"
        if mci < self.on:
            return "start"
        return "stop" if mci > self.off else "keep"

    def matters(self, values: np.ndarray) -> np.ndarray:
        """(n,) bool: the samples of a trace (n,) that can change a decision made at the sample before."""
        kind = np.where(values < self.on, 0, np.where(values > self.off, 2, 1))
        return np.append(True, kind[1:] != kind[:-1])

    def delay_s(self, mci: float | None, up: bool) -> float:
        if mci is None:
            return self.unknown_after_s
        return self.off_delay_s if up else self.on_delay_s

    def stop_reason(self, mci: float | None) -> str:
        if mci is None:
            return f"signal unknown for {self.unknown_after_s:.0f} s"
        return f"MCI {mci:.0f} > {self.off:g}" + (f" for {self.off_delay_s:.0f} s" if self.off_delay_s else "")

    def start_reason(self, mci: float) -> str:
        return f"MCI {mci:.0f} < {self.on:g}" + (f" for {self.on_delay_s:.0f} s" if self.on_delay_s else "")


class Always(Threshold):
    """Train regardless of the grid: the baselines."""

    def wants(self, mci: float | None, up: bool) -> str:
        return "start"

    def delay_s(self, mci: float | None, up: bool) -> float:
        return 0.0

    def start_reason(self, mci: float) -> str:
        return "always on"


def policy_of(policy, unknown_after_s: float = 300.0) -> Threshold:
    return {"threshold": Threshold, "always": Always}[policy.name](policy, unknown_after_s)


@dataclass
class Site:
    """What the schedule knows of one site."""

    provision_s: float
    startup_s: float
    state: str = "off"
    since_s: float = -INFINITY  # when the present state began
    up_since_s: float = -INFINITY  # when it last left off, or went off
    mci: float | None = None
    mark_s: float | None = None  # since when the policy has wanted the change now pending
    mark_mci: float | None = None
    absent: str = ""  # why no process answers for it; such a site is not started for the rest of its window


class Schedule:
    """States of all sites. `timed`: provisioning and start-up take what the config says (virtual clock, simulator);
    else `provisioned` and `started` report when they are over (wall clock)."""

    def __init__(self, policy: Threshold, sites: dict[str, Site], timed: bool, mci_at: Callable[[str, float], float | None] | None = None):
        """mci_at(site, t): the intensity to report with a move, where only the samples that matter are observed."""
        self.policy, self.sites, self.timed, self.mci_at = policy, sites, timed, mci_at
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
        site = self.sites[name]
        site.mci = mci
        up = site.state != "off"
        if self.policy.wants(mci, up) != ("stop" if up else "start"):
            site.mark_s = site.mark_mci = None
            if not up:
                site.absent = ""  # its window is over; the next one is a new chance
        elif site.mark_s is None or (up and site.mark_mci is None and mci is not None):
            site.mark_s, site.mark_mci = t, mci
        self._plan(name)

    def set_absent(self, name: str, why: str) -> None:
        self.sites[name].absent = why
        self._plan(name)

    def _due(self, site: Site) -> float:
        """When the pending start or stop happens if no sample changes it; infinity if none is pending."""
        if site.mark_s is None:
            return INFINITY
        up = site.state != "off"
        hold = self.policy.min_on_s if up else self.policy.min_off_s
        return max(site.mark_s + self.policy.delay_s(site.mark_mci, up), site.up_since_s + hold)

    def _plan(self, name: str) -> None:
        """Something about a site has changed: when is its next move due?"""
        site = self.sites[name]
        due = t = self._due(site)
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

    def next_time(self) -> float:
        """The earliest moment at which `advance` would do something, if no sample came before."""
        queue = self._queue
        while queue and self._next[queue[0][2]] != queue[0][0]:
            heapq.heappop(queue)
        return queue[0][0] if queue else INFINITY

    def advance(self, t: float) -> list[Move]:
        """Carry out everything due by t, in site order."""
        if self.next_time() > t:
            return []
        due, moves = set(), []
        while self.next_time() <= t:
            due.add(name := heapq.heappop(self._queue)[2])
            self._next[name] = INFINITY  # planned anew below
        for name in sorted(due, key=self._order.get):
            site = self.sites[name]
            if self._due(site) <= t and not (site.absent and site.state == "off"):
                if site.state != "off":
                    reason = self.policy.stop_reason(site.mark_mci)
                    moves.append(self._move(t, name, "off", reason))
                    self._re_mark(t, name)
                else:
                    moves.append(self._move(t, name, "provisioning", self.policy.start_reason(self._mci(t, name))))
            if self.timed and site.state == "provisioning" and site.since_s + site.provision_s <= t:
                moves.append(self._move(t, name, "starting", f"provisioned in {site.provision_s:.0f} s"))
            if self.timed and site.state == "starting" and site.since_s + site.startup_s <= t:
                moves.append(self._move(t, name, "on", f"started in {site.startup_s:.0f} s"))
            self._plan(name)
        return moves

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
        if site.mci is not None and self.policy.wants(site.mci, up=False) == "start":
            site.mark_s, site.mark_mci = t, site.mci
            self._plan(name)

    def _mci(self, t: float, name: str) -> float | None:
        return self.mci_at(name, t) if self.mci_at else self.sites[name].mci

    def _move(self, t: float, name: str, to: str, reason: str) -> Move:
        site = self.sites[name]
        move = Move(t, name, site.state, to, reason, self._mci(t, name))
        if "off" in (site.state, to):
            (self.up.discard if to == "off" else self.up.add)(name)
            site.mark_s = site.mark_mci = None
            site.up_since_s = t
        site.state, site.since_s = to, t
        self._plan(name)
        return move
