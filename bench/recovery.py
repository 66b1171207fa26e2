"""One death in the middle of an average, again and again: how long until it is noticed, made good, and the site is back?

    python bench/recovery.py [--deaths 12] [--seed 1] [--json] [--keep DIR]

Three sites on the wall clock train a model of 12.6 M parameters (50 MB a reduce) in rounds of 5 s. Every other round one of them is
killed with SIGKILL at a random moment of its all-reduce, and started again at once. Printed: medians and worst cases of

    detection_s   deed -> the coordinator's fault record                          bound 1 s
    recovery_s    that record -> COMMIT of the same round by the survivors        bound 1.5 x reduce_s
    reduce_s      ATTEMPT -> COMMIT of the rounds that nothing disturbed
    rejoin_s      deed -> the same site begins its first new step, and the parts of that: start_s (a new process until it is
                  admitted), transfer_s (theta and m), rest_s (the running round's end), remains_s (all else)     bound 2 s
The machinery (processes, supervision, journal) is storm.py's. Ratios within one run; two busy cores are noisy.
"""

import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import storm
from storm import Bill, Fault, Trial, config, end_all, spread

LARGER = {
    "model": {"depth": 64, "width": 128, "heads": 1, "kv_heads": 1, "seq_len": 64},
    "data": {"tokens_per_step": 256},
    "rounds": {"train_s": 5, "sync_s": 1.0, "commit_every_s": 5, "grace_s": 10},
    "eval": {"every_rounds": 0},
    "sync": {"chunk_mb": 4},
}


class Deaths(Trial):
    """Kills in the reduce: after `attempt` is announced and before the round is committed."""

    async def deal(self) -> None:
        await super().deal()
        await self.until(lambda goal=self.commits + 2: self.commits >= goal, 60)
        self.over = True
        end_all(self.folder)

    async def strike(self, fault: Fault, site: str) -> None:
        self.hurry = True  # who died is started again without a pause
        await asyncio.sleep(fault.seconds)
        fault.unix, fault.phase = time.time(), self.phase
        await super().strike(fault, site)


def parts(bill: Bill, fault: Fault, site: str) -> dict | None:
    """Kill to first step in its parts; None if another fault came between."""

    def at(type_: str, since: float, **fields) -> float | None:
        return next((r["unix"] for r in bill.records if r["type"] == type_ and r["unix"] > since
                     and all(r.get(k) == v for k, v in fields.items())), None)  # fmt: skip

    admitted = at("site", fault.unix, site=site, to="starting")
    current = admitted and at("site", admitted - 1e-3, site=site, to="on")
    taken_in = current and next(
        (r["unix"] for r in bill.records if r["type"] == "open" and r["unix"] >= current and site in r["members"]), None
    )
    lines = map(json.loads, (bill.trial.dir / f"{site}.jsonl").read_text().splitlines())
    began = [
        x["wall"]["unix"] - LARGER["data"]["tokens_per_step"] / x["wall"]["tok_per_s"] for x in lines if x["wall"]["unix"] > (taken_in or 0)
    ]
    first = next(iter(began), None)
    if first is None or any(f is not fault and fault.unix < f.unix < first and site in f.sites for f in bill.trial.struck):
        return None
    return {"rejoin_s": first - fault.unix, "start_s": admitted - fault.unix, "transfer_s": current - admitted,
            "rest_s": taken_in - current, "remains_s": first - taken_in}  # fmt: skip


def bill_of(trial: Trial) -> dict:
    bill = Bill(trial)
    opened = {r["round"]: r for r in bill.records if r["type"] == "open"}
    commits = {r["round"]: r for r in bill.commits}
    hit, detection, recovery = set(), [], []
    for fault in trial.struck:
        site = fault.sites[0]
        seen = next(
            (
                r
                for r in bill.records
                if r["type"] == "fault" and r["site"] == site and r["kind"] != "average failed" and r["unix"] > fault.unix
            ),
            None,
        )
        number = max((r["round"] for r in bill.records if r["type"] == "attempt" and r["unix"] < fault.unix), default=-1)
        hit |= {number, number + 1}
        if seen:
            detection.append(seen["unix"] - fault.unix)
            if number in commits and commits[number]["unix"] > seen["unix"]:  # else all had voted before
                recovery.append(commits[number]["unix"] - seen["unix"])
    attempts = {}
    for r in bill.records:
        if r["type"] == "attempt":
            attempts.setdefault(r["round"], []).append(r)
    normal = [c["unix"] - attempts[n][0]["unix"] for n, c in commits.items()
              if n not in hit and n > 1 and len(opened[n]["members"]) == 3 and len(attempts.get(n, ())) == 1]  # fmt: skip
    back = [p for f in trial.struck if (p := parts(bill, f, f.sites[0]))]
    reduce_s = statistics.median(normal) if normal else None
    return {
        "deaths": len(trial.struck), "reduce_s": spread(normal), "detection_s": spread(detection), "recovery_s": spread(recovery),
        "recovery_over_reduce": round(statistics.median(recovery) / reduce_s, 2) if recovery and reduce_s else None,
        "rejoin_s": {name: spread([p[name] for p in back]) for name in back[0]} if back else None,
        "findings": trial.findings,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = config.Parser()
    parser.add_argument("--deaths", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="no report, only the line of JSON")
    parser.add_argument("--keep", help="leave the run's folder here")
    args = parser.parse_args(argv)
    rng, sites = random.Random(args.seed), list("abc")
    say = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr, flush=True))
    plan = [Fault("kill", "".join(rng.sample(sites, 3)), "attempt", 3.0, round(rng.uniform(0.0, 0.12), 3)) for _ in range(args.deaths)]
    folder = Path(tempfile.mkdtemp(prefix="recovery-")).resolve()
    try:
        storm.write_inputs(folder, sites, num_rounds=99 * args.deaths, windowed="", **LARGER)
        trial = Deaths(folder, "deaths", sites, plan, say, args.seed)
        asyncio.run(trial.run(limit_s=60 + 60 * args.deaths))
        result = bill_of(trial)
    finally:
        end_all(folder)
        if args.keep:
            shutil.copytree(folder, args.keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    say("\n".join(f"{k:22} {v}" for k, v in result.items()))
    print(json.dumps(result), flush=True)
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    config.command(main, parses=True)
