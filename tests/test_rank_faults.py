"""A site of several ranks among others: what fails in one of its ranks costs that site its part, and nobody else anything.

The faults are in faulty.py. The ranks are started as torchrun starts them but without it, so that nothing but the ranks themselves
notices that one of them is gone; test_faults.py has torchrun around them.
"""

import os
import signal
import socket

import pytest
from test_faults import STEPS, Day
from test_runs import until

import coordinator

pytestmark = pytest.mark.slow
SLOW_LINK = {"chunk_s": 20, "attempt_s": 60}  # on which nobody minds an average of 5 s


class RankedDay(Day):
    """A day of sites whose ranks are processes of their own."""

    def start_ranks(self, name: str, *faults: str, env=None) -> list:
        """As many ranks of a site as there are faults."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        plain, size, ranks = self.runner.env, len(faults), []
        shared = plain | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | (env or {})
        for rank, fault in enumerate(faults):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            self.runner.env = shared | {k: str(v) for k, v in place.items()}
            self.count += 1
            argv = [str(self.paces.get(name, 0.02)), fault, "train.py", *self.argv, f"site={name}", f"sites.{name}.ranks={size}"]
            ranks.append(self.runner.start("tests/faulty.py", *argv, log=f"{name}-{self.count}-rank{rank}"))
        self.runner.env = plain
        self.workers[name] = ranks[0]
        return ranks

    def begin(self, *, ranked: dict[str, tuple], env=None, **faults) -> None:
        self.head = self.start("coordinator")
        self.workers = {name: self.start(name, faults.get(name, "none")) for name in self.sites if name not in ranked}
        self.ranks = {name: self.start_ranks(name, *each, env=env) for name, each in ranked.items()}

    def all_gone(self, ranks: list, within_s: float = 15.0) -> None:
        """Once one of them is dead the others end by themselves."""
        until(lambda: all(rank.poll() is not None for rank in ranks), within_s)


def test_a_rank_that_dies_at_any_stage_of_a_round_costs_its_site_its_part_and_nobody_else_anything(runner):
    """Before the freeze, in the reduce of gradients inside the site, at the freeze, at apply, at store, at a site under DDP and at one
    under FSDP at once; each time both are started again with the next fault."""
    day = RankedDay(runner, "abc", rounds=400)
    day.argv += ["sites.c.parallel=fsdp", "sites.b.ranks=2", "sites.c.ranks=2"]
    stages = ["rank-step:16", "rank-gradient:16", "rank-read:2", "rank-write:3", "rank-save:2"]
    day.begin(ranked=dict.fromkeys("bc", ("none", stages[0])))
    for stage, following in zip(stages, [*stages[1:], "none"]):
        for name in "bc":
            day.fault_at(stage.partition(":")[0], name)
            day.all_gone(day.ranks[name])
            day.ranks[name] = day.start_ranks(name, "none", following)
    seen = len(day.journal("open"))
    until(lambda: any(len(r["members"]) == 3 for r in day.journal("open")[seen:-2]), 60)
    day.head.terminate()
    assert day.head.wait(30) == 1
    assert coordinator.main(["check", str(runner.run_dir)]) == 0
    # one whose local round is just being written is counted on until then, and so said to be replaced by the next process
    deaths = sorted(r["site"] for r in day.faults("lost") if "was replaced" not in r["action"])
    assert deaths == ["b"] * len(stages) + ["c"] * len(stages), "each death is noticed once"
    assert not [r for r in day.voided() if r["reason"] != "interrupted"]
    a, together = day.contributions("a"), [r["round"] for r in day.journal("open") if len(r["members"]) > 1 and "a" in r["members"]]
    assert all(a[r] == STEPS for r in together if r in a), "a never lost a step"
    whole = [r["round"] for r in day.journal("open")[seen:-1] if len(r["members"]) == 3]
    assert day.contributions("b")[whole[0]] == day.contributions("c")[whole[0]] == STEPS, "and both are back at the end"


def test_a_rank_that_dies_while_rank_0_averages_does_not_undo_what_was_agreed(runner):
    """Rank 0 notices when it wants to hand out the new theta: its vote counts, the others commit, it comes back."""
    day = RankedDay(runner, "ab", rounds=14, sync=SLOW_LINK)
    day.begin(ranked={"b": ("reduce:3:sleep", "none")})
    day.fault_at("reduce", "b")
    day.ranks["b"][1].kill()
    day.all_gone(day.ranks["b"])
    day.start_ranks("b", "none", "none")
    day.end()
    assert day.contributions("a")[3] == day.contributions("b")[3] == STEPS
    assert not day.voided()


def test_ranks_wait_for_an_average_however_long_it_takes(runner):
    """Rank 0 is away for longer than ranks wait for each other in a step."""
    day = RankedDay(runner, "ab", rounds=8, sync=SLOW_LINK)
    day.begin(ranked={"b": ("reduce:3:sleep", "none")}, env={"STEP_TIMEOUT_S": "2"})
    day.fault_at("reduce", "b")
    day.end()
    assert not day.faults() and not day.voided()
    assert day.contributions("b")[3] == STEPS


def test_a_frozen_rank_makes_its_site_late_and_a_slow_one_makes_it_slow(runner):
    day = RankedDay(runner, "ab", rounds=16, rounds_={"max_steps": 30, "train_s": 2})
    day.begin(ranked={"b": ("none", "rank-slow")})
    day.after(2)
    os.kill(day.ranks["b"][1].pid, signal.SIGSTOP)
    until(lambda: day.faults("late"), 30)
    seen = len(day.journal("commit"))
    until(lambda: len(day.journal("commit")) >= seen + 3, 30)
    assert not any(r["batches"].get("b") for r in day.journal("commit")[seen:]), "a goes on meanwhile, alone"
    os.kill(day.ranks["b"][1].pid, signal.SIGCONT)
    day.end()
    assert {(r["site"], r["kind"]) for r in day.faults()} == {("b", "late")}
    parts = [(day.contributions("a")[r], day.contributions("b")[r]) for r in day.contributions("a")]
    assert all(0 < b < a for a, b in parts[1:2]), "slow, but nothing it did is lost"
    assert sum(b > 0 for _, b in parts[-6:]) >= 2, "and it is back"


def test_a_rank_that_dies_while_it_compiles_ends_its_site_which_starts_again(runner):
    runner.env["TORCHINDUCTOR_CACHE_DIR"] = str(runner.folder / "inductor")
    day = RankedDay(runner, "ab", rounds=8, model={"compile": True}, rounds_={"max_offline_s": 300})
    day.begin(ranked={"b": ("none", "rank-compile:1")})
    day.fault_at("rank-compile", "b")
    day.all_gone(day.ranks["b"], 200)  # rank 0 is busy compiling itself
    day.start_ranks("b", "none", "none")
    until(lambda: any(n for n in day.contributions("b").values()) or day.head.poll() is not None, 120)
    day.end()
    assert {r["site"] for r in day.faults()} == {"b"}
    mine = {r["round"] for r in day.journal("open") if r["members"] == ["b"]}
    assert {r["round"] for r in day.voided()} <= mine, "a round that it trained alone is its own part"


@pytest.mark.parametrize("clock", ["wall", "virtual"])
@pytest.mark.parametrize("topology", ["ring", "star"])
def test_a_site_of_two_ranks_sends_the_result_and_sends_it_again_where_another_sender_died(runner, clock, topology):
    day = RankedDay(runner, "ab", rounds=10, sync={"topology": topology}, clock={"mode": clock})
    day.begin(ranked={"b": ("none", "none")}, a="store:3")
    day.fault_at("store", "a")
    day.workers["a"].wait(5)
    day.workers["a"] = day.start("a")
    day.end()
    assert not day.voided()
    assert day.contributions("a")[3] == day.contributions("b")[3] == STEPS


def test_all_members_lost_on_the_virtual_clock_end_a_run_that_resumes(runner):
    day = RankedDay(runner, "ab", rounds=10, clock={"mode": "virtual"}, rounds_={"rejoin_wait_s": 4})
    day.begin(ranked={"a": ("none", "none"), "b": ("none", "none")})
    day.after(3)
    for ranks in day.ranks.values():
        for rank in ranks:
            rank.kill()
    assert day.head.wait(60) == 1, day.said()
    last = runner.said().strip().splitlines()[-1]
    assert last.endswith("The same command resumes."), last
    assert coordinator.main(["check", str(runner.run_dir)]) == 0
    committed = day.commits()
    day.head = day.start("coordinator")
    day.ranks = {name: day.start_ranks(name, "none", "none") for name in "ab"}
    day.end()
    assert day.commits() > committed


def test_a_second_node_that_is_asked_to_go_takes_its_site_along_cleanly(runner):
    """Only a rank other than 0 hears SIGTERM."""
    day = RankedDay(runner, "ab", rounds=12)
    day.begin(ranked={"b": ("none", "none")})
    day.after(2)
    day.ranks["b"][1].terminate()
    assert [rank.wait(20) for rank in day.ranks["b"]] == [0, 0]
    day.end()
    assert not day.faults() and not day.voided()
