"""What a site's grid is expected to do next: forecasts on the grid of the trace's step. Pure numpy.

    forecast = Forecast("yesterday", step_s=300)
    forecast.observe(t, "texas", 26.8)            # and what was observed before the run, through `remember`
    forecast.ahead(t, "texas", 12)                # (12,) expected values: the slot t lies in, and the 11 after it

    persistence   the present value goes on
    yesterday     the same time of the last `days` days, on average, moved by how far the present is off it; that error
                  fades with decay_s (where no day is known: persistence)
    issued        the forecast that came with the sample (f1..fk of a file, or a live source's); `yesterday` beyond its end
    truth         the trace itself: the perfect forecast, to judge the others by

Values are what the policy decides by: gCO2/kWh, or what its objective makes of it. Times are seconds since clock.start.
"""

import numpy as np

DAY_S = 86400


class Past:
    """One site's values on the step grid, from `first` (a slot, negative before clock.start) on; gaps hold the value before."""

    def __init__(self, values: np.ndarray, first: int):
        self.values, self.first, self.num = np.resize(values, max(64, len(values))).astype(float), first, len(values)

    def add(self, slot: int, value: float) -> None:
        at = slot - self.first
        if at >= len(self.values):
            self.values = np.concatenate((self.values, np.empty(max(at + 1 - len(self.values), len(self.values)))))
        self.values[self.num : at + 1] = self.values[self.num - 1] if self.num else value
        self.values[at], self.num = value, max(self.num, at + 1)

    def at(self, slots: np.ndarray) -> np.ndarray:
        """(n,) values; NaN where nothing is known."""
        i = np.asarray(slots) - self.first
        known = (i >= 0) & (i < self.num)
        return np.where(known, self.values[np.clip(i, 0, max(self.num - 1, 0))], np.nan)


class Forecast:
    def __init__(self, kind: str, step_s: float, decay_s: float = 3600.0, days: int = 1, truth=None):
        """truth(site, t, n) -> (n,) what will be; only for kind `truth`."""
        self.kind, self.step_s, self.decay_s, self.days, self.truth = kind, step_s, decay_s, days, truth
        self.past: dict[str, Past] = {}
        self.issued: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._day = int(DAY_S // step_s)

    def remember(self, site: str, values: np.ndarray) -> None:
        """(n,) what was observed in the n steps before clock.start."""
        if len(values):
            self.past[site] = Past(values, -len(values))

    def slot(self, t: float) -> int:
        return int((t + 1e-6) // self.step_s)

    def observe(self, t: float, site: str, value: float | None, ahead: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        if value is not None and np.isfinite(value):
            if site not in self.past:
                self.past[site] = Past(np.empty(0), self.slot(t))
            self.past[site].add(self.slot(t), value)
        if ahead is not None:
            self.issued[site] = ahead

    def ahead(self, t: float, site: str, n: int) -> np.ndarray:
        """(n,) expected values of the slot that holds t and of those after it. The site must have been observed."""
        slot = self.slot(t)
        if self.kind == "truth":
            return self.truth(site, slot * self.step_s, n)
        past = self.past[site]
        now = past.values[past.num - 1]
        if self.kind == "persistence":
            return np.full(n, now)
        out, at = np.full(n, now), 1
        if self.kind == "issued" and site in self.issued:
            starts, values = self.issued[site]
            slots = np.array([self.slot(s) for s in starts]) - slot
            good = (slots >= 1) & (slots < n)
            if good.any():  # each value holds until the next one
                at = min(n, int(slots[good][-1]) + 1)
                which = np.searchsorted(slots, np.arange(1, at), side="right") - 1
                out[1:at] = np.where(which >= 0, values[np.maximum(which, 0)], now)
        i = np.arange(at - 1, n)  # the first only to see how far off the profile is there
        back = slot + i - self._day * (1 + i // self._day)  # the last day that is known there
        days = np.array([past.at(back - self._day * k) for k in range(self.days)])
        known = np.isfinite(days)
        profile = np.where(known, days, 0.0).sum(0) / np.maximum(known.sum(0), 1)
        known = known.any(0)
        fade = np.exp(-(i - at + 1) * self.step_s / self.decay_s) if self.decay_s else np.zeros(len(i))
        error = (out[at - 1] - profile[0]) * fade if known[0] else 0.0
        out[at:] = np.where(known, np.maximum(profile + error, np.minimum(profile, 0.0)), now)[1:]
        return out
