"""Every time-out of a run in one table, each derived from the one above it and from measured rate and payload.

A peer's heartbeats are due every heartbeat_s; after dead_s of silence it counts as dead. A transfer of one chunk may
take chunk_s: longer than dead_s, so that a frozen peer is known to be dead before the others give up on its chunk. An
attempt to average may take attempt_s, a round round_s. Pure.
"""

from dataclasses import dataclass

from config import BadInput

NOTICE_S = 0.6  # a connection that closed is a death after this long, unless the same process is back by then
SLACK = 4.0  # a transfer may be this much slower than the link was measured
FIRST_GUESS = 12.5e6  # bytes/s until a rate is measured: 100 Mbit/s


@dataclass(frozen=True)
class Timeouts:
    """Seconds."""

    heartbeat_s: float
    dead_s: float
    chunk_s: float
    attempt_s: float
    round_s: float

    def table(self) -> str:
        rows = (
            ("heartbeat", self.heartbeat_s, "sync.heartbeat_s"),
            ("dead", self.dead_s, "sync.dead_s of silence; a closed connection: " + f"{NOTICE_S:g} s"),
            ("chunk", self.chunk_s, f"dead + {SLACK:g} x chunk bytes / rate"),
            ("attempt", self.attempt_s, f"2 x chunk + {SLACK:g} x payload / rate"),
            ("round", self.round_s, "rounds.train_s + rounds.grace_s + 3 x attempt"),
        )
        return "\n".join(f"    {name:10} {value:9.1f} s   {how}" for name, value, how in rows)


def derive(cfg, payload_bytes: int, bytes_per_s: float = FIRST_GUESS) -> Timeouts:
    """The table of a run whose state vector has payload_bytes, over a link of bytes_per_s. Raises BadInput when what the
    config sets itself (heartbeat, dead, chunk, attempt) is out of order."""
    s, r = cfg.sync, cfg.rounds
    one = min(payload_bytes, int(s.chunk_mb * (1 << 20)))
    chunk_s = s.chunk_s or s.dead_s + SLACK * one / bytes_per_s
    attempt_s = s.attempt_s or 2 * chunk_s + SLACK * payload_bytes / bytes_per_s
    out = Timeouts(s.heartbeat_s, s.dead_s, chunk_s, attempt_s, r.train_s + r.grace_s + 3 * attempt_s)
    if s.heartbeat_s * 2 > s.dead_s:
        raise BadInput(f"sync.dead_s={s.dead_s:g} must be at least twice sync.heartbeat_s={s.heartbeat_s:g}")
    if chunk_s <= s.dead_s:
        raise BadInput(f"sync.chunk_s={chunk_s:g} must be > sync.dead_s={s.dead_s:g}: a frozen peer must count as dead first")
    if attempt_s <= chunk_s:
        raise BadInput(f"sync.attempt_s={attempt_s:g} must be > the time-out of a chunk, {chunk_s:g} s")
    if r.max_offline_s < s.dead_s:
        raise BadInput(f"rounds.max_offline_s={r.max_offline_s:g} must be >= sync.dead_s={s.dead_s:g}")
    return out
