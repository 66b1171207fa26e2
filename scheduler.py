"""When may a site run: policies and the life of a site, off -> provisioning -> starting -> on -> off.

    schedule = Schedule(policy, sites, timed=True)
    schedule.observe(t, "texas", 26.8)        # a sample of its grid's marginal carbon intensity; None: unknown
    moves = schedule.advance(t)               # what changed, each with its reason

Pure: no clock, no sockets, no files. Times are seconds since clock.start. The live run, the virtual clock and the
simulator call this same code, so that fed the same observations they decide alike.
"""

from dataclasses import dataclass

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

    def __init__(self, policy: Threshold, sites: dict[str, Site], timed: bool):
        self.policy, self.sites, self.timed = policy, sites, timed

    def observe(self, t: float, name: str, mci: float | None) -> None:
        """A new sample: it may set the mark of a pending start or stop, or lift it. Decides nothing yet."""
        site = self.sites[name]
        site.mci = mci
        up = site.state != "off"
        if self.policy.wants(mci, up) != ("stop" if up else "start"):
            site.mark_s = site.mark_mci = None
            if not up:
                site.absent = ""  # its window is over; the next one is a new chance
        elif site.mark_s is None or (up and site.mark_mci is None and mci is not None):
            site.mark_s, site.mark_mci = t, mci

    def _due(self, site: Site) -> float:
        """When the pending start or stop happens if no sample changes it; infinity if none is pending."""
        if site.mark_s is None:
            return INFINITY
        up = site.state != "off"
        hold = self.policy.min_on_s if up else self.policy.min_off_s
        return max(site.mark_s + self.policy.delay_s(site.mark_mci, up), site.up_since_s + hold)

    def known_stop(self, name: str) -> float:
        """When a site that is up will stop, as far as is known now; infinity if nothing is pending."""
        site = self.sites[name]
        return self._due(site) if site.state != "off" else INFINITY

    def next_time(self) -> float:
        """The earliest moment at which `advance` would do something, if no sample came before."""
        times = [INFINITY]
        for site in self.sites.values():
            if site.absent and site.state == "off":
                continue
            times.append(self._due(site))
            if self.timed and site.state == "provisioning":
                times.append(site.since_s + site.provision_s)
            if self.timed and site.state == "starting":
                times.append(site.since_s + site.startup_s)
        return min(times)

    def advance(self, t: float) -> list[Move]:
        """Carry out everything due by t, in site order."""
        moves = []
        for name, site in self.sites.items():
            if self._due(site) <= t and not (site.absent and site.state == "off"):
                if site.state != "off":
                    reason = self.policy.stop_reason(site.mark_mci)
                    moves.append(self._move(t, name, "off", reason))
                    self._re_mark(t, name)
                else:
                    moves.append(self._move(t, name, "provisioning", self.policy.start_reason(site.mci)))
            if self.timed and site.state == "provisioning" and site.since_s + site.provision_s <= t:
                moves.append(self._move(t, name, "starting", f"provisioned in {site.provision_s:.0f} s"))
            if self.timed and site.state == "starting" and site.since_s + site.startup_s <= t:
                moves.append(self._move(t, name, "on", f"started in {site.startup_s:.0f} s"))
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

    def _move(self, t: float, name: str, to: str, reason: str) -> Move:
        site = self.sites[name]
        move = Move(t, name, site.state, to, reason, site.mci)
        if "off" in (site.state, to):
            site.mark_s = site.mark_mci = None
            site.up_since_s = t
        site.state, site.since_s = to, t
        return move
