"""How the members of one federated round come to one result, whoever dies on the way. Pure: reports in, verdicts out.

    attempt 1 --all voted alike--> commit
        |  some voted, others failed ---> give (a holder sends the result up), take (the others fetch it) --> commit
        |  nobody alive holds a result -> attempt 2, from the deltas of those still alive --> ...
        |  results differ --------------> attempt 2; differ again: by star, where the head node's own sum names the culprit
        `- two attempts failed with all alive (a cut link): attempt 3 goes by star

A member is `gone` once it counts as dead, or was left out: nothing waits for it any more. What it had already put into
an average stays in it, and counts.
"""

from dataclasses import dataclass

MAX_ATTEMPTS = 8  # then the round is void; its batches are trained again


@dataclass(frozen=True)
class Verdict:
    """kind: commit | again | give | take | out | void. `sites`: whom it is for (give: one holder; out: the culprits)."""

    kind: str
    sites: tuple[str, ...] = ()
    digest: str = ""
    reason: str = ""


class Agreement:
    """tokens: what each taking part has trained, joiners 0. star: always by way of the head node. before: the number of the
    last attempt of a round of this number; numbers are never used again, so that nothing late can be taken for new."""

    def __init__(self, tokens: dict[str, int], star: bool, before: int = 0):
        self.frozen = dict(tokens)  # everyone still able to take part in a new attempt
        self.always_star = star
        self.number = self.before = before
        self.mute: dict[str, int] = {}  # site -> attempts over which it reported nothing at all
        self.gone: set[str] = set()
        self.torn = 0  # attempts that failed with all alive
        self.differed = 0  # attempts whose results differed
        self.tokens: dict[str, int] = {}  # of the present attempt
        self.weights: dict[str, float] = {}
        self.star = star
        self._begin()

    def _begin(self) -> None:
        self.votes: dict[str, str] = {}
        self.failed: set[str] = set()
        self.died = False  # somebody, during this attempt
        self.holder: str | None = None  # asked to send the result up
        self.at_head: str | None = None  # digest of the result the head node holds
        self.truth: str | None = None  # digest of the head node's own sum (star)
        self.told: tuple[str, ...] = ()  # who was told to fetch it
        self.result: str | None = None  # what everyone alive holds

    @property
    def members(self) -> list[str]:
        """Who takes part in the present attempt, in order."""
        return list(self.tokens)

    @property
    def living(self) -> list[str]:
        return [s for s in self.tokens if s not in self.gone]

    def lives(self, site: str) -> bool:
        return site in self.tokens and site not in self.gone

    def attempt(self) -> Verdict | None:
        """Begin the next attempt among those alive; a verdict if there can be none."""
        tokens = {s: n for s, n in self.frozen.items() if s not in self.gone}
        total = sum(tokens.values())
        if not total:
            return Verdict("void", reason="nobody who trained is left")
        if self.number - self.before == MAX_ATTEMPTS:
            return Verdict("void", reason=f"no agreement in {MAX_ATTEMPTS} attempts")
        self.number += 1
        self.tokens, self.weights = tokens, {s: n / total for s, n in tokens.items()}
        self.star = self.always_star or self.torn >= 2 or self.differed >= 2
        self._begin()
        return None

    def leave(self, site: str) -> None:
        """A member counts as dead, or is left out."""
        if site in self.frozen and site not in self.gone:
            self.gone.add(site)
            self.died = True

    def judge(self) -> Verdict | None:
        """What the reports so far decide; None: wait for more. Repeats itself until the caller has acted on it."""
        living = self.living
        votes = {s: self.votes[s] for s in living if s in self.votes}
        kinds = set(votes.values())
        if not living:
            return Verdict("void", reason="all members are gone")
        if any(s not in self.votes and s not in self.failed for s in living):
            return None
        if self.truth and (culprits := tuple(s for s, d in votes.items() if d != self.truth)):
            return Verdict("out", culprits, reason=f"the head node's own sum is {self.truth[:12]}")
        if len(kinds) > 1:
            return Verdict("again", reason=", ".join(f"{s} {d[:12]}" for s, d in votes.items()))
        if len(votes) == len(living):
            return Verdict("commit", digest=next(iter(kinds)))
        needy = tuple(s for s in living if s not in votes)
        if self.at_head is not None:
            return Verdict("take", needy, self.at_head)
        if votes:
            holder = self.holder if self.holder in votes else next(iter(votes))
            return Verdict("give", (holder,), votes[holder])
        return Verdict("again")

    def again(self) -> Verdict | None:
        """Act on `again`: count why, then begin the next attempt."""
        if len({self.votes[s] for s in self.living if s in self.votes}) > 1:
            self.differed += 1
        elif not self.died:
            self.torn += 1
        return self.attempt()

    def expire(self) -> tuple[str, ...]:
        """The attempt's time is over. Who holds nothing is treated as failed, or left out if others hold the result, or if
        it has been mute before; returns the latter."""
        late = [s for s in self.living if s not in self.votes]
        if any(s in self.votes for s in self.living):
            return tuple(late)
        for site in set(late) - self.failed:
            self.mute[site] = self.mute.get(site, 0) + 1
        self.failed |= set(late)
        return tuple(s for s in late if self.mute.get(s, 0) >= 2)
