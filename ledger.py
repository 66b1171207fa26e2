"""Which batches of the budget are free, leased or committed. Pure; batch ids in half-open ranges [a, b)."""

Ranges = list[list[int]]


def count(ranges: Ranges) -> int:
    total = 0
    for a, b in ranges:
        total += b - a
    return total


def split(ranges: Ranges, n: int) -> tuple[Ranges, Ranges]:
    """The first n ids, and the rest."""
    if len(ranges) == 1 and n == ranges[0][1] - ranges[0][0]:
        return ranges, []
    head, tail = [], []
    for a, b in ranges:
        k = min(b - a, n)
        n -= k
        head += [[a, a + k]] if k else []
        tail += [[a + k, b]] if a + k < b else []
    return head, tail


class Ledger:
    """A batch is free, or leased to a member of an open round, or committed: in the model exactly once, for good."""

    def __init__(self, num_batches: int):
        self.num_batches = num_batches
        self.free: Ranges = [[0, num_batches]] if num_batches else []
        self.num_committed = 0

    def lease(self, n: int) -> Ranges:
        """The n lowest free ids (fewer when fewer are left)."""
        taken, self.free = split(self.free, n)
        return taken

    def lease_each(self, counts: dict[str, int]) -> dict[str, Ranges]:
        """The same for several takers at once, lowest ids to the first."""
        taken = self.lease(sum(counts.values()))
        out: dict[str, Ranges] = {}
        parts = iter(taken)
        a = b = 0
        for taker, n in counts.items():
            mine = out[taker] = []
            while n:
                if a == b:
                    a, b = next(parts)
                k = min(n, b - a)
                mine.append([a, a + k])
                a, n = a + k, n - k
        return out

    def give_back(self, ranges: Ranges) -> None:
        """Leased ids that were not trained, or not committed, are free again."""
        merged: Ranges = []
        for a, b in sorted(self.free + ranges):
            assert not merged or a >= merged[-1][1], f"batch {a} returned twice"
            if merged and merged[-1][1] == a:
                merged[-1][1] = b
            else:
                merged.append([a, b])
        self.free = merged

    def commit(self, ranges: Ranges) -> None:
        """Leased ids became part of the model."""
        self.num_committed += count(ranges)
        assert self.num_committed + count(self.free) <= self.num_batches

    def uncommit(self, ranges: Ranges) -> None:
        """A committed round was lost before it was durable: its ids are free again."""
        self.num_committed -= count(ranges)
        self.give_back(ranges)

    def take(self, ranges: Ranges) -> None:
        """Lease ids read back from a journal: these very ones, out of the free ones."""
        for a, b in ranges:
            before = count(self.free)
            self.free = [part for x, y in self.free for part in ([x, min(y, a)], [max(x, b), y]) if part[0] < part[1]]
            assert before - count(self.free) == b - a, f"batches [{a}, {b}) taken twice"

    def replay(self, ranges: Ranges) -> None:
        """Commit ids read back from a journal."""
        self.take(ranges)
        self.num_committed += count(ranges)
