"""One of our programs with one real fault built in: it dies, freezes or goes wrong at an exact point of the protocol.

    python tests/faulty.py PACE_S POINT:ROUND[:DEED] train.py|coordinator.py ARGV...

PACE_S: seconds added to each step. POINT: where, as below; `none`: nowhere. DEED: kill (default, SIGKILL), stop (SIGSTOP),
fail (an exception as gloo raises it), sleep (5 s, heartbeats go on). It happens once, when round >= ROUND; the file
fault-POINT-NAME then holds the moment (unix time).

Ranks other than 0 know no rounds. Their points begin with `rank-`, and ROUND counts how often they come by: rank-OP at the beginning
of what all ranks do together (shard.TOGETHER), rank-gradient before the gradients are averaged, rank-compile while the model compiles.
STEP_TIMEOUT_S in the environment: how long the ranks of a site wait for each other in a step.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import coordinator
import parallel
import replica
import shard
import sync
import train


def deed(kind: str) -> None:
    if kind == "fail":
        raise RuntimeError("Connection closed by peer (test)")
    if kind == "sleep":
        time.sleep(5.0)
        return
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


def once(here: int, round_: int) -> bool:
    """True the first time."""
    if here < round_ or MARK.exists():
        return False
    MARK.write_text(str(time.time()))
    return True


def wrap(owner, name: str, before=None, after=None) -> None:
    """before(self, *args) and after(self, result, *args) around a method; `after` may replace the result."""
    plain = getattr(owner, name)

    def wrapped(self, *args, **kwargs):
        if before:
            before(self, *args)
        result = plain(self, *args, **kwargs)
        return after(self, result, *args) if after else result

    setattr(owner, name, wrapped)


def build_rank(point: str, nth: int, kind: str) -> None:
    """A fault of a rank other than 0."""
    count = 0

    def strike(*_):
        nonlocal count
        count += 1
        if once(count, nth):
            deed(kind)

    def soon(*_):
        if not MARK.exists():
            threading.Timer(0.3, strike).start()

    def half_way(held, ids, *_):  # the forward pass is over, its gradients are yet to be averaged
        if count == nth - 1:
            held.model(ids)
        strike()

    if point == "gradient":
        wrap(parallel.Held, "gradient", half_way)
    elif point == "compile":
        wrap(parallel.Held, "gradient", soon)
    elif point == "slow":  # every step
        work = shard.TOGETHER["step"]
        shard.TOGETHER["step"] = lambda *args: (time.sleep(0.2), work(*args))[1]
    else:
        work = shard.TOGETHER[point]
        shard.TOGETHER[point] = lambda *args: (strike(), work(*args))[1]


def build(point: str, round_: int, kind: str) -> None:
    def strike(here):
        if once(here, round_):
            deed(kind)

    def federated(plan):
        return plan.round if plan.mode == "federated" else -1

    if point == "freeze":  # after FREEZE
        wrap(train.Site, "agree", lambda site, plan, *a: strike(federated(plan)))
    elif point == "reduce":  # after the first exchange of a chunk
        now = {"round": -1}
        wrap(train.Site, "_reduce_and_vote", lambda site, plan, c: now.update(round=c["round"]))
        wrap(sync.Averager, "_wait", after=lambda a, waited_s, *_: (strike(now["round"]), waited_s)[1])
    elif point == "vote":  # after REDUCE, before VOTE
        wrap(replica.Replica, "average", after=lambda r, result, *a: (strike(r.round), result)[1])
    elif point == "apply":  # after VOTE, before APPLY
        wrap(train.Site, "_apply", lambda site, c: strike(c["round"]))
    elif point == "store":  # after COMMIT, before or while it sends the result
        wrap(replica.Replica, "upload", lambda r, parts, *a: strike(r.round - 1) if "delta" in parts else None)
    elif point == "applied":  # after APPLY, nothing sent
        wrap(replica.Replica, "apply", after=lambda r, result, *a: strike(r.round - 1))
    elif point == "give":
        wrap(replica.Replica, "give", lambda r, *a: strike(r.round))
    elif point == "step":
        wrap(train.Site, "inner_step", lambda site, plan, b: strike(federated(plan)) if plan.done == 3 else None)
    elif point == "local":
        wrap(train.Site, "inner_step", lambda site, plan, b: strike(plan.round) if plan.mode == "local" and plan.done == 3 else None)
    elif point == "download":
        wrap(replica.Replica, "_download", lambda r, number, *a: strike(number))
    elif point == "nan":  # the model's numbers leave the finite
        wrap(train.Site, "inner_step", lambda site, plan, b: plan.done == 3 and once(federated(plan), round_)
             and next(site.shard.held.model.parameters()).data.fill_(float("nan")))  # fmt: skip
    elif point == "base":  # theta is not what it was
        wrap(replica.Replica, "apply", lambda r, *a: once(r.round, round_) and r.theta[:1].add_(1.0))
    elif point == "corrupt":  # a chunk arrives damaged

        def damage(r, result, number, name, vector):
            if once(number, round_):
                vector[:1].add_(1.0)

        wrap(replica.Replica, "_download", after=damage)
    elif point == "upload":  # what is sent up is not what is held

        def blot(r, parts, *a):
            if "theta" in parts and once(r.round - 1, round_):  # a local round's theta
                parts["theta"] = parts["theta"] + 1.0
            elif "delta" in parts and once(r.round - 1, round_):
                parts["delta"] = parts["delta"] + 1

        wrap(replica.Replica, "upload", blot)
    elif point == "digest":  # one member's average differs

        def spoil(r, result, *a):
            return "0" * 64 if once(r.round, round_) else result

        wrap(replica.Replica, "average", after=spoil)
    elif point == "lie":  # one member's average differs, and goes on differing

        def lie(r, result, *a):
            if r.round == round_ or not MARK.exists():
                return "0" * 64 if once(r.round, round_) or r.round == round_ else result
            return result

        wrap(replica.Replica, "average", after=lie)
    elif point == "announce":  # coordinator: journalled, not told
        wrap(coordinator.Coordinator, "_tell", lambda c, a: strike(a.data["round"]) if a.kind == "commit" and a.data["attempt"] else None)
    elif point == "attempted":  # coordinator: the attempt is told
        wrap(coordinator.Coordinator, "_tell", after=lambda c, result, a: strike(a.data["round"]) if a.kind == "attempt" else None)
    elif point == "voted":
        wrap(coordinator.Coordinator, "_on_vote", lambda c, site, header, p: strike(header["round"]))
    elif point == "training":
        wrap(coordinator.Coordinator, "_on_progress", lambda c, site, header, p: strike(header["round"]))
    elif point == "storing":
        wrap(coordinator.Coordinator, "_write", lambda c, round_, *a: strike(round_ - 1))
    else:
        assert point == "none", point


if __name__ == "__main__":
    pace_s, where, script, *argv = sys.argv[1:]
    POINT, number, kind = (where.split(":") + ["0", "kill"][where.count(":") :])[:3] if where != "none" else ("none", "0", "kill")
    name = next((a.removeprefix("site=") for a in argv if a.startswith("site=")), "coordinator")
    MARK = Path(f"fault-{POINT}-{name}")
    if POINT.startswith("rank-"):
        build_rank(POINT.removeprefix("rank-"), int(number), kind)
    else:
        build(POINT, int(number), kind)
    if "STEP_TIMEOUT_S" in os.environ:
        parallel.STEP_TIMEOUT = timedelta(seconds=float(os.environ["STEP_TIMEOUT_S"]))
    wrap(train.Site, "inner_step", lambda *a: time.sleep(float(pace_s)))
    sys.argv = [script, *argv]
    module = {"train.py": train, "coordinator.py": coordinator}[script]
    if script == "train.py":
        train.die_with_parent()
    module.config.command(module.main)
