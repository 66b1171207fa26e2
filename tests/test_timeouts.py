"""How long anybody waits for anybody: the one table of time-outs, and who is waited for in a round."""

import time
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
from conftest import CLEAN, DIRTY
from hypothesis import given
from hypothesis import strategies as st
from test_schedule import make_run

import coordinator
import timeouts
import wire
from config import BadInput


def config_of(heartbeat_s=2.0, dead_s=8.0, chunk_mb=16, chunk_s=None, attempt_s=None, train_s=570.0, grace_s=30.0, max_offline_s=600.0):
    sync = SimpleNamespace(heartbeat_s=heartbeat_s, dead_s=dead_s, chunk_mb=chunk_mb, chunk_s=chunk_s, attempt_s=attempt_s)
    return SimpleNamespace(sync=sync, rounds=SimpleNamespace(train_s=train_s, grace_s=grace_s, max_offline_s=max_offline_s))


@given(st.floats(0.05, 30), st.floats(2, 10), st.integers(1, 64), st.integers(4, 10**11), st.floats(1e3, 1e11), st.floats(1, 1e4))
def test_each_time_out_is_longer_than_the_one_before_it(heartbeat_s, times, chunk_mb, payload_bytes, bytes_per_s, train_s):
    cfg = config_of(heartbeat_s, heartbeat_s * times, chunk_mb, train_s=train_s, max_offline_s=1e6)
    table = astuple(timeouts.derive(cfg, payload_bytes, bytes_per_s))
    assert all(a < b for a, b in zip(table, table[1:])), table
    assert table[2] > min(payload_bytes, chunk_mb << 20) / bytes_per_s and table[3] > payload_bytes / bytes_per_s, "a transfer has its time"


def test_rounds_of_a_second_fit():
    table = timeouts.derive(config_of(0.1, 0.3, 1, train_s=1.0, grace_s=0.5), 11_000)
    assert table.attempt_s < 1.0 < table.round_s < 5.0


@pytest.mark.parametrize("wrong, message", [
    ({"heartbeat_s": 5.0}, "sync.dead_s=8 must be at least twice sync.heartbeat_s=5"),
    ({"chunk_s": 8.0}, "sync.chunk_s=8 must be > sync.dead_s=8"),
    ({"attempt_s": 9.0}, "sync.attempt_s=9 must be > the time-out of a chunk"),
    ({"max_offline_s": 5.0}, "rounds.max_offline_s=5 must be >= sync.dead_s=8"),
])  # fmt: skip
def test_a_table_out_of_order_is_refused(wrong, message):
    with pytest.raises(BadInput, match=message):
        timeouts.derive(config_of(**wrong), 4 << 26)


def test_it_is_refused_before_anything_is_written_and_printed_at_the_start(runner):
    argv = runner.write({"a": {}}, budget={"tokens": 128 * 4})
    result = runner.call("coordinator.py", *argv, "sync.attempt_s=1")
    assert result.returncode == 2 and "sync.attempt_s=1 must be >" in result.stderr and not runner.journal()
    assert runner.run(argv, ["a"]) == 0
    lines = [line.split()[:1] for line in runner.said().splitlines()]
    start = lines.index(["heartbeat"])
    assert lines[start : start + 5] == [["heartbeat"], ["dead"], ["chunk"], ["attempt"], ["round"]]


# -- a round with its members ----------------------------------------------------------------------------------------


def open_round(**options):
    """A wall-clock run whose three members have just been opened a round of 90 s; everyone makes a step in 10 s."""
    run, samples = make_run(dict.fromkeys("abc", [20.0] * 60), rates=dict.fromkeys("abc", 1.0), budget=500, timed=False, **options)
    for site, mci, ahead in samples.due(0.0):
        run.observe(0.0, site, mci, ahead)
    run.advance(0.0)
    for site in "abc":
        run.provisioned(0.0, site)
    for site in "abc":
        run.current(0.0, site, 0)
    if run.now.mode == "local":  # the first was alone for a moment
        run.advance(0.0)
        run.frozen(0.0, "a", 0)
    assert run.now.mode == "federated" and run.now.members == ["a", "b", "c"]
    run.take()
    return run


def faults(run):
    return [(r["site"], r["kind"]) for r in run.take()[0] if r["type"] == "fault"]


def test_grace_begins_when_somebody_waits():
    run = open_round()
    run.advance(90.0)
    assert run.phase == "freezing"
    run.advance(125.0)
    assert run.phase == "freezing" and not faults(run), "steps may be longer than the grace: nobody holds still yet"
    run.frozen(126.0, "a", 9)
    run.frozen(140.0, "b", 9)
    run.advance(155.9)
    assert run.phase == "freezing"
    run.advance(156.0)
    assert faults(run) == [("c", "late")] and run.phase == "reduce" and run.now.agreement.members == ["a", "b"]


def test_a_silent_member_is_waited_for_no_longer_than_the_grace_once_the_others_have_nothing_left_to_do():
    run = open_round(max_steps=2)
    run.lost(5.0, "c", "cut off", sure=False)
    run.frozen(20.0, "a", 2)
    run.frozen(25.0, "b", 2)
    run.advance(54.9)
    assert run.phase == "train" and faults(run) == [("c", "silent")]
    run.advance(55.0)
    assert faults(run) == [("c", "lost")] and run.now.agreement.members == ["a", "b"]


def test_when_all_are_silent_they_may_be_at_work():
    run = open_round()
    for site in "abc":
        run.lost(5.0, site, "cut off", sure=False)
    run.advance(89.0)
    assert run.phase == "train", "until the round's own end"


def committed_round(run):
    """The first round, agreed on by all, not stored."""
    for site in "abc":
        run.frozen(60.0, site, 5)
    for site in "abc":
        run.voted(61.0, site, 1, "d")
    assert run.round == 1 and run.sender == "a" and run.unstored
    run.take()


def test_when_the_sender_of_a_result_may_be_dying_another_sends_it_at_once():
    run = open_round()
    committed_round(run)
    run.hurry_store(61.1, "b")
    assert not run.take()[1], "b sends nothing anyway"
    run.hurry_store(61.2, "a")
    assert [(a.kind, a.site) for a in run.take()[1]] == [("resend", "b")]
    run.lost(61.3, "b", "closed", sure=False)
    assert [(a.kind, a.site) for a in run.take()[1] if a.kind == "resend"] == [("resend", "a")]


def test_a_result_that_is_being_written_needs_no_site_any_more():
    run = open_round()
    committed_round(run)
    run.writing(1)
    run.hurry_store(61.1, "a")
    for site in "abc":
        run.lost(61.5, site, "killed", sure=False)
    for t in (62.0, 80.0, 200.0):
        run.advance(t)
    records, actions = run.take()
    assert "rollback" not in [r["type"] for r in records] and not [a for a in actions if a.kind == "resend"]
    run.store_done(201.0, 1, "theta", "m")
    assert run.stored == run.round == 1 and not run.unstored


def test_a_result_that_was_written_wrongly_is_asked_for_again():
    run = open_round()
    committed_round(run)
    run.writing(1)
    run.not_written()
    run.differs(61.2, "a", "sent another result")
    run.advance(61.3)
    assert [a.site for a in run.take()[1] if a.kind == "resend"] == ["b"]


def test_a_local_round_that_is_being_written_outlives_its_site():
    run, samples = make_run({"a": [CLEAN] * 10}, rates={"a": 1.0}, timed=False, budget=100, commit_every_s=60.0)
    for site, mci, ahead in samples.due(0.0):
        run.observe(0.0, site, mci, ahead)
    run.advance(0.0)
    run.provisioned(0.0, "a")
    run.current(0.0, "a", 0)
    run.frozen(60.0, "a", 6)
    run.writing(1)
    run.lost(60.5, "a", "killed", sure=True)
    run.store_done(61.0, 1, "theta", "m")
    kinds = [r["type"] for r in run.take()[0]]
    assert run.stored == run.round == 1 and "commit" in kinds and run.ledger.num_committed == 6


def test_a_site_that_went_off_while_the_coordinator_was_away_still_sends_the_local_round_it_froze_alone():
    run, samples = make_run({"a": [CLEAN] * 2 + [DIRTY] * 8}, rates={"a": 1.0}, timed=False, budget=100, commit_every_s=60.0)
    for site, mci, ahead in samples.due(0.0):
        run.observe(0.0, site, mci, ahead)
    run.advance(0.0)
    run.provisioned(0.0, "a")
    run.current(0.0, "a", 0)
    run.lost(70.0, "a", "not heard", sure=False)
    run.observe(120.0, "a", DIRTY)
    run.advance(240.0)
    assert run.schedule.sites["a"].state == "off" and run.leaving == {"a"}
    run.take()
    run.back(241.0, "a", {"held": 1, "round": -1, "open_s": 0.0, "phase": "idle", "steps": 6, "finite": True, "attempt": 0, "vote": "",
                          "unstored": {"0": 6}})  # fmt: skip
    told = [(a.kind, a.data["round"]) for a in run.take()[1]]
    assert ("resend", 1) in told and "cancel" not in [kind for kind, _ in told] and run.holds == {"a": 1}
    run.store_done(242.0, 1, "theta", "m")
    assert run.ledger.num_committed == 6 and run.phase == "idle" and not run.leaving


def test_tokens_that_were_trained_in_vain_are_in_the_record():
    run = open_round()
    run.lost(35.0, "c", "killed", sure=False)
    run.advance(90.0)
    for site in "ab":
        run.frozen(91.0, site, 9)
    for site in "ab":
        run.voted(92.0, site, 1, "d")
    (commit,) = [r for r in run.take()[0] if r["type"] == "commit"]
    assert commit["tokens"] == 180 and commit["wasted"] == {"c": 30}, "three steps of ten seconds before it fell silent"


def test_a_member_that_hangs_while_its_heartbeats_go_on_does_not_keep_the_others_from_training():
    """c is left out of its round and answers nothing any more, then b likewise; a trains alone until one of them fetches the state."""
    run = open_round()

    def answered(t: float, *sites: str) -> None:
        """Time goes on, and these sites do what they are asked."""
        run.advance(t)
        for action in run.take()[1]:
            for site in action.data.get("members", ()) if action.site is None else [action.site]:
                if site not in sites:
                    continue
                if action.kind == "freeze":
                    run.frozen(t, site, 3)
                elif action.kind == "attempt":
                    run.voted(t, site, action.data["attempt"], "d")
                elif action.kind == "fetch":
                    run.current(t, site, action.data["round"])
                elif action.kind == "store" or (action.kind == "commit" and action.data["sender"] == site):
                    run.store_done(t, run.round, "", "")

    for second in range(1, 400):
        answered(second, "a", "b")
    assert run.now.members == ["a", "b"] and run.round >= 3
    for second in range(400, 800):
        answered(second, "a")
    assert run.now.mode == "local" and run.now.members == ["a"] and run.missing == {"b", "c"}
    before = run.round
    for second in range(800, 1000):
        answered(second, "a")
    assert run.round > before, "and goes on"
    run.current(1000.0, "b", run.stored)
    for second in range(1001, 1100):
        answered(second, "a", "b")
    assert run.now.members == ["a", "b"], "one of them is back"


def test_what_a_sync_takes_fades_once_a_sync_and_counts_only_accepted_votes():
    """However many members there are: the guess of 40 s is halved by one sync of a second, not by each of three votes."""
    run = open_round(sync_s=40.0)
    run.facts = replace(run.facts, sync_s=40.0)
    run.sync_s = 40.0
    committed_round(run)
    assert run.sync_s == 20.0
    assert not run.attempting("a", 0, 1), "the attempt is over: a vote that comes now says nothing of the link"


@pytest.mark.parametrize("format_", wire.FORMATS)
def test_a_link_is_as_fast_as_the_bytes_it_carried(format_):
    """1,000,000 numbers averaged in two seconds."""
    heard = []
    head = SimpleNamespace(virtual=False, attempt_began=time.monotonic() - 2.0, bytes_per_s=0.0, vault=SimpleNamespace(numel=1_000_000),
                           _measured=heard.append)  # fmt: skip
    coordinator.Coordinator._synced(head, format_)
    assert heard == [pytest.approx(0.5 * wire.num_bytes(format_, 1_000_000) / 2.0, rel=0.05)]
