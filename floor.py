"""The floor: the least that any schedule of a run's sites could have emitted, with the whole trace known ahead. Pure numpy.

`lp` lets sites start for free (a sort); `with_starts` charges each start and asks for windows of at least half an hour
(a dynamic programme). Both stand beside the emissions in every summary, so that a policy can be judged.
"""

import numpy as np

import config
from carbon import Trace

MIN_WINDOW_S = 1800.0  # shortest window with start costs


def lp(cfg, traces: dict[str, Trace], hours: float, deadline_s: float) -> float | None:
    """Least kg for `hours` training site-hours by deadline_s, starts free: fill the cleanest moments first.

    A sort by kW x intensity; only the samples around the marginal one are really sorted, so that a year of hundreds of
    sites fits into memory.
    """
    start, need = config.start_unix(cfg), hours * 3600

    def moments(spec) -> tuple[np.ndarray, np.ndarray]:
        """kW x gCO2/kWh and seconds of each sample between the run's start and the deadline."""
        trace = traces[spec.region]
        edges = np.clip(np.append(trace.starts, trace.end), start, min(start + deadline_s, trace.end)).astype(float)
        width = np.diff(edges)
        return spec.train_kw * trace.values[width > 0], width[width > 0]

    specs = list(cfg.sites.values())
    highest = max(spec.train_kw * float(traces[spec.region].values.max()) for spec in specs)
    bins = 1024

    def bin_of(rate: np.ndarray) -> np.ndarray:
        return (rate / (highest or 1.0) * (bins - 1)).astype(int)

    seconds, cost = np.zeros(bins), np.zeros(bins)
    for spec in specs:
        rate, width = moments(spec)
        at = bin_of(rate)
        seconds += np.bincount(at, width, bins)
        cost += np.bincount(at, rate * width, bins)
    filled = np.cumsum(seconds)
    if filled[-1] + 1e-6 < need:
        return None
    marginal = min(int(np.searchsorted(filled, need)), bins - 1)
    left = need - (filled[marginal - 1] if marginal else 0.0)
    pairs = [(rate[at == marginal], width[at == marginal]) for rate, width in map(moments, specs) for at in [bin_of(rate)]]
    rate, width = np.concatenate([r for r, _ in pairs]), np.concatenate([w for _, w in pairs])
    order = np.argsort(rate, kind="stable")
    rate, width = rate[order], width[order]
    taken = np.clip(left - np.concatenate(([0.0], np.cumsum(width)[:-1])), 0.0, width)
    return float((cost[:marginal].sum() + (rate * taken).sum()) / 3.6e6)


def with_starts(cfg, traces: dict[str, Trace], hours: float, deadline_s: float) -> float | None:
    """The same with provision_s at idle power charged before each start, and windows of at least 30 minutes.

    A dynamic programme over trace samples, samples trained so far and window age per site, then a min-plus
    convolution over sites. None where samples are irregular or the table would be large.
    """
    start = config.start_unix(cfg)
    regions = [traces[s.region] for s in cfg.sites.values()]
    step = regions[0].step_s
    available = min(deadline_s, min(t.end for t in regions) - start) / step
    need = hours * 3600 / step
    regular = all(t.step_s == step and (np.diff(t.starts) == step).all() and (start - t.begin) % step == 0 for t in regions)
    if not regular or available**2 * len(regions) > 2e7 or need > available * len(regions):
        return None
    # The deadline cuts a sample: between the two whole numbers of samples around it the cost is taken as linear.
    low, part = int(available), available % 1.0
    curves = [_site_curves(spec, traces[spec.region], start, step, low, bool(part)) for spec in cfg.sites.values()]
    ends = [_least_kg([curve[i] for curve in curves], need) for i in range(2 if part else 1)]
    kg = ends[0] if len(ends) == 1 else (1 - part) * ends[0] + part * ends[1]
    return kg if np.isfinite(kg) else None


def _least_kg(curves: list[np.ndarray], need: float) -> float:
    """Least sum of all sites' costs for `need` samples together, linear between whole numbers."""
    *first, last = curves
    total = np.array([0.0])
    for curve in first:
        total, _ = _joint(total, curve)
    low, most = int(need), len(total) + len(last) - 2

    def at(n: int) -> float:
        k = np.arange(max(0, n - len(last) + 1), min(n, len(total) - 1) + 1)
        return float((total[k] + last[n - k]).min()) if n <= most else np.inf

    return at(low) if need == low else (1 - need + low) * at(low) + (need - low) * at(low + 1)


def _joint(total: np.ndarray, curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Min-plus convolution. -> least cost of n units of both, (n,); how many of them are the second's."""
    joint = np.full(len(total) + len(curve) - 1, np.inf)
    second = np.zeros(len(joint), int)
    if len(total) > len(curve):
        for k, cost in enumerate(curve):
            better = total + cost < joint[k : k + len(total)]
            joint[k : k + len(total)][better], second[k : k + len(total)][better] = (total + cost)[better], k
    else:
        at = np.arange(len(curve))
        for k, cost in enumerate(total):
            better = cost + curve < joint[k : k + len(curve)]
            joint[k : k + len(curve)][better], second[k : k + len(curve)][better] = (cost + curve)[better], at[better]
    return joint, second


def share_out(curves: list[np.ndarray], need: int) -> list[int] | None:
    """Units of each site, `need` in all, with the least sum of costs; None if they do not suffice. Exact for up to four sites; more
    are priced (each takes what is cheapest at one price a unit), which may give a few units too many."""
    if sum(len(c) - 1 for c in curves) < need:
        return None
    if len(curves) > 4:
        low, high = 0.0, 2 * max(float(np.diff(c[np.isfinite(c)], prepend=0.0).max(initial=0.0)) for c in curves) + 1.0
        for _ in range(50):
            price = (low + high) / 2
            taken = [int(len(c) - 1 - np.argmin((c - price * np.arange(len(c)))[::-1])) for c in curves]
            low, high = (price, high) if sum(taken) < need else (low, price)
        taken = [int(len(c) - 1 - np.argmin((c - high * np.arange(len(c)))[::-1])) for c in curves]
        return taken if sum(taken) >= need else None
    total, seconds = np.array([0.0]), []
    for curve in curves:
        total, second = _joint(total, curve)
        seconds.append(second)
    if not np.isfinite(total[need]):
        above = np.flatnonzero(np.isfinite(total[need:]))
        if not above.size:
            return None
        need += int(above[0])  # minimum windows: a little more
    taken = []
    for second in reversed(seconds):
        taken.append(int(second[need]))
        need -= taken[-1]
    return taken[::-1]


def programme(costs: np.ndarray, begins: np.ndarray, age: int, on: bool = False, gap: int = 1) -> tuple[np.ndarray, tuple]:
    """Least cost of training exactly k of n slots, k = 0..n, in windows of at least `age` slots, and the choices `trained` reads.

    costs, begins (n,): of training in a slot, and of starting to at it. on: training when slot 0 begins, for long enough.
    gap: idle slots between windows, at least.
    A dynamic programme over (slots trained, age of the window).
    """
    n = len(costs)
    off, young = np.full(n + 1, np.inf), np.full((age, n + 1), np.inf)  # young[j]: trained j + 1 slots, the last row: or more
    (young[-1] if on else off)[0] = 0.0
    closed, stayed = np.empty((n, n + 1), bool), np.empty((n, n + 1), bool)
    before, rested = np.minimum(off, young[-1]), [off] * gap  # rested[0]: off for `gap` slots
    for slot, (begin, cost) in enumerate(zip(begins, costs)):
        grown = np.full_like(young, np.inf)
        grown[0, 1:] = rested[0][:-1] + (begin + cost)
        grown[1:, 1:] = young[:-1, :-1] + cost
        old = young[-1, :-1] + cost
        stayed[slot, 1:], stayed[slot, 0] = old <= grown[-1, 1:], False
        np.minimum(grown[-1, 1:], old, out=grown[-1, 1:])
        closed[slot] = young[-1] < off
        before = np.minimum(off, young[-1])
        off, young = before, grown
        rested = [*rested[1:], off]
    return np.minimum(off, young[-1]), (closed, stayed, young[-1] < off, age, gap, before)


def trained(choices: tuple, k: int) -> np.ndarray:
    """(n,) bool: the slots in which `programme`'s least cost for k is trained."""
    closed, stayed, last, age, gap, _ = choices
    out, row, rest = np.zeros(len(closed), bool), age - 1 if last[k] else -1, 0  # row -1: off
    for slot in range(len(closed) - 1, -1, -1):
        if rest:
            rest -= 1
        elif row < 0:
            row = age - 1 if closed[slot, k] else -1
        else:
            out[slot] = True
            if row < age - 1 or not stayed[slot, k]:
                row -= 1
                rest = gap - 1 if row < 0 else 0
            k -= 1
    return out


def _site_curves(spec, trace: Trace, start: int, step: int, slots: int, one_more: bool) -> list[np.ndarray]:
    """Least kg at one site for training exactly k of the first `slots` samples, k = 0..slots; and the same with one
    sample more."""
    age = max(1, int(np.ceil(MIN_WINDOW_S / step)))
    slots += one_more
    t = start + step * np.arange(slots, dtype=float)
    costs = spec.train_kw * trace.integrals(t, t + step) / 3.6e6
    ahead = t - spec.provision_s  # before the trace's first sample its value is taken to hold
    begins = trace.integrals(np.maximum(trace.begin, ahead), t) + trace.values[0] * np.maximum(0.0, trace.begin - ahead)
    begins *= spec.idle_kw / 3.6e6
    curve, (*_, before) = programme(costs, begins, age)
    return [before[:-1], curve] if one_more else [curve]
