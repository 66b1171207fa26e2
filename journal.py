"""The run's append-only journal: what was decided and committed, one JSON object a line, fsynced before it is told.

    journal = Journal(run_dir / "journal.jsonl")
    journal.add(records)       # buffered, so that records of one virtual moment can be put in order
    journal.flush(upto_s)      # sorted by (t_s, type, site), numbered, written, fsynced

Also here: reading a journal back (`effective` leaves out what a resume took back) and the invariants it must keep
(`check`). Pure files and dictionaries; knows neither sockets nor torch.
"""

import contextlib
import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path

from config import BadInput
from ledger import Ledger, count

# What differs between a live run and its replay from decisions alone.
MEASURED = ("n", "wall", "digest", "digest_theta", "digest_m", "wire")


class Unwritable(RuntimeError):
    """A file of the run cannot be written. The message is one line: path, reason, remedy."""


def order(record: dict) -> tuple:
    """By time; in one moment a rollback comes first, as it makes way, and the end last."""
    rank = {"rollback": 0, "end": 2}.get(record["type"], 1)
    return record["t_s"], rank, record["type"], record.get("site") or ""


class Journal:
    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict] = read(path) if path.exists() else []
        self._buffer: list[dict] = []
        try:
            mend(path)
            self._file = open(path, "ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> Unwritable:
        return Unwritable(f"{self.path}: {error.strerror}; free space or mend the disk, then the same command resumes")

    def add(self, records: list[dict]) -> None:
        self._buffer += records

    def flush(self, upto_s: float = float("inf")) -> list[dict]:
        """Write what is due by upto_s; returns it. On return it is on disk. Raises Unwritable, and then nothing of it is."""
        due = sorted((r for r in self._buffer if r["t_s"] <= upto_s), key=order)
        if not due:
            return []
        numbered = [{"n": len(self.records) + i} | record for i, record in enumerate(due)]
        data = "".join(json.dumps(record) + "\n" for record in numbered).encode()
        size = os.fstat(self._file.fileno()).st_size
        with uninterrupted():  # or it is on disk and in the buffer, and is written twice
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
                os.fsync(self._file.fileno())
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), size)
                raise self._unwritable(error) from None
            self._buffer = [r for r in self._buffer if r["t_s"] > upto_s]
            self.records += numbered
        return due

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C and SIGTERM wait until this is over: their handlers may raise between any two lines."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def mend(path: Path) -> None:
    """Cut off a last line torn by a crash while it was written, so that the next one is a line of its own."""
    if path.exists() and (torn := path.stat().st_size - path.read_bytes().rfind(b"\n") - 1):
        os.truncate(path, path.stat().st_size - torn)


def read(path: Path) -> list[dict]:
    """Records of a journal. A torn last line (a crash while writing, or a writer at work) is left out; damage elsewhere
    is BadInput."""
    data = path.read_bytes()
    try:
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); take another run name or fresh=true") from None


def effective(records: list[dict]) -> list[dict]:
    """The records that still hold. A resume on the virtual clock takes back all after the state it started from, a
    rollback the rounds from to_round on."""
    out: list[dict] = []
    for record in records:
        if record["type"] == "cancel" and record["reason"] == "resumed":
            stores = [i for i, r in enumerate(out) if r["type"] == "store" and r["round"] == record["round"]]
            keep = stores[-1] + 1 if stores else 1
            out = [r for r in out[:keep] if not (r["type"] == "open" and r["round"] == record["round"])]
        elif record["type"] == "rollback":
            undone = ("open", "attempt", "commit", "lease", "frozen")
            out = [r for r in out if r.get("round", -1) < record["to_round"] or r["type"] not in undone]
            out.append(record)
        else:
            out.append(record)
    return out


def decision(record: dict) -> str:
    """A record without what was measured: equal for the live run, the virtual run and the simulator."""
    return json.dumps({k: v for k, v in record.items() if k not in MEASURED}, sort_keys=True)


class Replay:
    """The decisions a resumed run on the virtual clock must repeat, up to the state it starts from, before it goes live.

    held: effective records; start: the round whose start state is stored. Decisions follow from config and trace alone,
    so a record that does not come again means that one of them, or the code, has changed.
    """

    def __init__(self, held: list[dict], start: int):
        self.start = start
        self.set_aside: list[dict] = []  # the stored round's own `open`, if it was decided before it was stored
        end = next((i for i, r in enumerate(held) if r["type"] == "store" and r["round"] == start), 0)
        known = [r for r in held[1 : end + 1] if r["type"] != "eval" and not self._reopens(r)]
        self._left = Counter(map(decision, known))
        self._faults = [r for r in known if r["type"] == "fault"]
        self._absent = {(r["t_s"], r["site"]): r["action"].removeprefix("left out: ") for r in known if r.get("kind") == "absent"}

    def _reopens(self, record: dict) -> bool:
        return record["type"] == "open" and record["round"] == self.start

    @property
    def done(self) -> bool:
        return not self._left

    def absent(self, t: float, site: str, run) -> bool:
        """Repeat that no process answered for a site, if none did at this moment."""
        why = self._absent.get((round(t, 6), site))
        if why:
            run.absent(t, site, why)
        return bool(why)

    def faults(self, kind: str, t: float, run, site: str | None = None) -> list[dict]:
        """Faults of a kind that struck at this very moment of the run (at a site); each is handed out once."""
        attempt = run.now.agreement.number if run.now and run.now.agreement else 0
        now = (kind, round(t, 6), run.phase, attempt)
        due = [r for r in self._faults if (r["kind"], r["t_s"], r["phase"], r["attempt"]) == now and site in (None, r["site"])]
        self._faults = [r for r in self._faults if r not in due]
        return due

    def verify(self, records: list[dict]) -> None:
        for record in records:
            if self._reopens(record):
                self.set_aside.append(record)
                continue
            key = decision(record)
            if not self._left[key]:
                raise BadInput(f"the journal does not follow from this config and trace at t_s={record['t_s']} ({record['type']}); "
                               "the trace file or the code has changed: take run=NEW or fresh=true")  # fmt: skip
            self._left[key] -= 1
            self._left += Counter()  # drops what is used up


def check(records: list[dict], num_batches: int, tokens_per_step: int) -> list[tuple[bool, str]]:
    """The invariants of a run that its journal can show, one (holds, sentence) each. A batch has tokens_per_step tokens."""
    out = []
    out.append(([r["n"] for r in records] == list(range(len(records))), "record numbers are contiguous"))
    held = effective(records)
    times = [r["t_s"] for r in held]
    out.append((times == sorted(times), "time never goes back, but for a resume"))
    commits = [r for r in held if r["type"] == "commit"]
    out.append(([c["round"] for c in commits] == list(range(len(commits))), f"{len(commits)} committed rounds are contiguous"))
    ledger, once = Ledger(num_batches), True
    for commit in commits:
        try:
            for ranges in commit["batches"].values():
                ledger.replay(ranges)
        except AssertionError:
            once = False
    out.append((once, f"each batch is committed at most once ({ledger.num_committed:,} of {num_batches:,})"))
    summed = all(c["tokens"] == tokens_per_step * sum(map(count, c["batches"].values())) for c in commits)
    out.append((summed, "committed tokens are the sum of the contributions"))
    opened = {r["round"]: r for r in held if r["type"] == "open"}
    leased = all(c["round"] in opened and set(c["batches"]) <= set(opened[c["round"]]["members"]) for c in commits)
    out.append((leased, "nothing is committed without an open round and its members"))
    agreed = {r["round"] for r in held if r["type"] == "attempt"}
    federated = {c["round"] for c in commits if opened.get(c["round"], {}).get("mode") == "federated"}
    out.append((federated <= agreed, "no federated commit without an attempt"))
    stores = [r["round"] for r in held if r["type"] == "store"]
    out.append((stores == sorted(set(stores)) and set(stores) <= {c["round"] + 1 for c in commits}, "only committed states are stored"))
    late = [f"round {r}: {s:.1f} s" for r, s, bound in stalls(records) if s > bound]
    out.append((not late, "no stall is longer than its attempts may take" + "".join(f"; {x}" for x in late)))
    ended = [r for r in held if r["type"] == "end"]
    if ended and ended[-1]["reason"] == "budget":
        out.append((ledger.num_committed == num_batches, "the whole budget is committed"))
    return out


def stalls(records: list[dict]) -> list[tuple[int, float, float]]:
    """(round, stall, bound) in seconds of each federated round on the wall clock: from its first attempt, or from where a
    restarted coordinator took it up again, to its commit. Each attempt may take attempt_s, and as long again to bring its
    result to members that lack it; a commit also waits for the state before it to be stored, which takes no longer."""
    out: list[tuple[int, float, float]] = []
    began, bound = None, 0.0
    for r in records:
        if r["type"] == "attempt" and "attempt_s" in r.get("wall", {}):
            began, bound = (r["t_s"], 0.0) if began is None else (began, bound)
            bound += 3 * r["wall"]["attempt_s"]
        elif r["type"] == "resume" and began is not None:
            began = r["t_s"]
        elif r["type"] == "commit" and began is not None:
            out.append((r["round"], r["t_s"] - began, bound))
            began = None
        elif r["type"] in ("cancel", "rollback"):
            began = None
    return out


def check_held(records: list[dict], held: dict[str, list[dict]]) -> list[tuple[bool, str]]:
    """The same for what the sites themselves say to have held. held: site -> lines of its held.jsonl."""
    run_id = records[0].get("wall", {}).get("run_id")
    lines = {site: [x | {"site": site} for x in mine if x["run_id"] == run_id] for site, mine in held.items()}
    stored = {(r["round"], r["digest_theta"]) for r in records if r["type"] == "store"} | {(0, records[0]["digest"])}
    agreed = {(r["round"], r["digest"]) for r in records if r["type"] == "commit"}
    every = [x for mine in lines.values() for x in mine]
    fetched = all((x["round"], x["digest"]) in stored for x in every if x["how"] == "fetch")
    committed = all((x["round"] - 1, x["result"]) in agreed for x in every if x["how"] == "commit")
    bits: dict[tuple, set] = {}
    last = {r["round"]: r["digest_theta"] for r in records if r["type"] == "store"}
    named = {r["site"] for r in records if r["type"] == "fault" and r["kind"] == "wrong base"}  # found out, and mended
    for x in every:
        if x["how"] == "commit" and not (x["site"] in named and x["digest"] != last.get(x["round"])):
            bits.setdefault((x["round"], x["result"]), set()).add(x["digest"])
    same = all(len(digests) == 1 for digests in bits.values()) and all(
        digests == {last[round_]} for (round_, result), digests in bits.items()
        if round_ in last and any((r["round"], r["digest"]) == (round_ - 1, result) for r in effective(records) if r["type"] == "commit")
    )  # fmt: skip
    givers = {(s, c["round"]) for c in effective(records) if c["type"] == "commit" for s, used in c["batches"].items() if used}
    based = all(s not in lines or any(x["round"] == r for x in lines[s]) for s, r in givers)
    return [
        (fetched, f"sites started from stored states only ({sum(x['how'] == 'fetch' for x in every)} downloads)"),
        (committed, f"nothing was applied without its commit ({sum(x['how'] == 'commit' for x in every)} outer steps)"),
        (same, f"one digest per round at every site and at the head node ({len(bits)} rounds)"),
        (based, "every contribution came from a site that held the state its round started from"),
    ]
