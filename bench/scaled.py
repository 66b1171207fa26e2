"""What a rehearsal scales down of the shipped configs: one table, as key=value, and nothing beside it.

    changes = overrides(path, {"budget.tokens": 921600}, pace=300)        key=value arguments for our programs
    differences(path, changes)                                            what they change, from both configs

Sizes are smaller; seconds that belong to the day are divided by a pace on the wall clock, and the trace with
them: 300 on a machine that starts processes as two idle cores do, less where that takes longer. Seconds that
belong to machines (heartbeats, when a peer counts as dead, patience) stay as they are.
"""

import io
import itertools
from datetime import datetime, timedelta
from pathlib import Path

from scene import REPO, require

import config

PAPER = REPO / "configs/paper.yaml"
SAMPLE_S = 300  # of the trace; stamps are whole seconds, so that a day passes at most so many times as fast
DAYS = 4  # the trace repeats, so that nobody runs out of windows
FILES, DOCUMENTS = 4, 60  # on the hub
PAPER_STEPS, PAPER_STEP_S = 40, 150  # on the virtual clock: three steps a round of 515 s or 570 s
PAPER_START = "2026-01-11T21:30:00Z"

# key -> what it is here, and why. "pace": divided by the pace; None: known only when it runs, or of one site.
SCALE = {
    "model.depth": (2, "width 128 and one head follow from it, as 1,280 and 10 do from 20"),
    "model.seq_len": (64, ""),
    "model.vocab": (512, "the tokenizer's"),
    "data.tokenizer": ("bpe-512", "trained on what the hub serves"),
    "data.shards": (3, f"of the {FILES} files on the hub"),
    "data.tokens_per_step": (384, "6 rows of a sequence, 3 a rank"),
    "data.val_tokens": (1024, ""),
    "eval.tokens": (1024, ""),
    "budget.tokens": (None, "so many seconds at the rate measured first"),
    "sites.*.tokens_per_s": (None, f"as measured; on the virtual clock a step takes {PAPER_STEP_S} s"),
    "sites.*.device": ("cpu", "torch sees no GPU here"),
    "sites.*.device_batch": (1, "several pieces a step"),
    "sites.*.ranks": (2, ""),
    "sites.*.threads_local": (1, "a core a rank"),
    "sites.*.energy": ("model", "the sites share a machine"),
    "sites.*.parallel": (None, "fsdp at one site"),
    "sync.port": (None, "a free one, which each site is told"),
    "carbon.trace": (None, "the same day, faster, again and again"),
    "rounds.train_s": ("pace", ""),
    "rounds.sync_s": ("pace", ""),
    "rounds.commit_every_s": ("pace", ""),
    "policy.off_delay_s": ("pace", ""),
    "clock.start": (PAPER_START, "the paper's: just before two windows overlap"),
}
PACED = [key for key, (value, _) in SCALE.items() if value == "pace"]
VIRTUAL_ONLY = ("clock.start",)
WALL_ONLY = ("model.vocab", "data.shards", "sites.*.energy", *PACED)


def overrides(path: Path, values: dict, pace: float | None) -> list[str]:
    """SCALE for one config. values: what is known only now. pace: so much faster the day passes, on the wall
    clock; None on the virtual one."""
    shipped, out = config.load([str(path), "only=[]"]), {}
    for key, (value, _) in SCALE.items():
        if value is None or key in (VIRTUAL_ONLY if pace else WALL_ONLY):
            continue
        if key == "sites.*.device" and sees_gpu():
            continue
        if value == "pace":
            section, name = key.split(".")
            value = shipped[section][name] / pace
        out[key] = value
    changes = []
    for key, value in (out | values).items():
        places = [key.replace("*", site) for site in shipped.sites] if "*" in key else [key]
        changes += [f"{place}={value}" for place in places]
    return changes


def paper_values() -> dict:
    """For the paper's configs, on their virtual clock."""
    tokens = SCALE["data.tokens_per_step"][0]
    rate = tokens / PAPER_STEP_S
    fsdp = {"sites.california.parallel": "fsdp"}
    return {"budget.tokens": tokens * PAPER_STEPS, "sites.*.tokens_per_s": rate} | fsdp


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def differences(path: Path, changes: list[str]) -> dict[str, tuple]:
    """key -> (as shipped, here) of every key that `changes` change; of sites, sites.* of one that differs."""
    before, after = (_flat(config.plain(config.load([str(path), *more]))) for more in ([], changes))
    out: dict[str, tuple] = {}
    for key in after:
        if before[key] != after[key]:
            parts = key.split(".")
            out.setdefault(f"sites.*.{parts[2]}" if parts[0] == "sites" else key, (before[key], after[key]))
    return out


def _flat(value, key: str = "") -> dict:
    if not isinstance(value, dict):
        return {key: value}
    out = {}
    for name, part in value.items():
        out |= _flat(part, f"{key}.{name}" if key else name)
    return out


def table(wall: dict[str, tuple], virtual: dict[str, tuple], pace: float) -> list[str]:
    """What is scaled, a line a key. Raises Refuted for a difference that SCALE does not know of."""
    unknown = [key for key in (*wall, *virtual) if key not in SCALE]
    require(not unknown, f"{unknown} differ from what is shipped, and SCALE does not say so")
    lines = [f"  {'scaled':22} {'as shipped':>22}    here"]
    for key, (was, now) in (wall | {k: virtual[k] for k in VIRTUAL_ONLY}).items():
        why = SCALE[key][1] or (f"/ {pace:g}" if key in PACED else "")
        now = Path(now).name if isinstance(now, str) else now
        lines.append(f"  {key:22} {was!s:>22} -> {now!s:20} {why}".rstrip())
    return lines


def paced_trace(source: Path, into: Path, start: str, hours: list[tuple[str, str]], pace: float) -> None:
    """Some hours of a trace's day, [from, to) of each pair, one after the other and again and again, so many
    times as fast, from `start` on."""
    header, *rows = [line.split(",") for line in source.read_text().splitlines()]
    at, day = {row[0][11:16]: i for i, row in enumerate(rows)}, []
    for first, last in hours:
        day += rows[at[first] : at[last]]
    begin, lines = datetime.fromisoformat(start), [",".join(header)]
    for number, row in enumerate(day * DAYS):
        moment = begin + timedelta(seconds=number * SAMPLE_S // pace)
        lines.append(",".join([moment.strftime("%Y-%m-%dT%H:%M:%SZ"), *row[1:]]))
    into.write_text("\n".join(lines) + "\n")


def texts() -> dict[str, bytes]:
    """What the hub serves: the standard library's text as parquet files, column `text`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import data

    documents, files = [text for _, text in itertools.islice(data.documents("stdlib"), DOCUMENTS)], {}
    for i in range(FILES):
        into = io.BytesIO()
        pq.write_table(pa.table({"text": documents[i::FILES]}), into)
        files[f"shard_{i:05d}.parquet"] = into.getvalue()
    return files
