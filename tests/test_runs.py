"""Runs with real processes: resume, death, refusal, the wall clock, Ctrl-C. Nothing stays behind."""

import json
import os
import shutil
import signal
import socket
import tempfile
import time

import psutil
import pytest
import torch
from conftest import CLEAN, DIRTY, REPO, processes_in, records, write_trace

import carbon
import config
import data
import launch
import report
from channel import Link
from journal import check, effective

PAIR = {"a": {}, "b": {"tokens_per_s": 8.6}}


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def committed(runner, number):
    return lambda: sum(r["type"] == "commit" for r in runner.journal()) >= number


def all_hold(runner, argv):
    held = check(runner.journal(), config.num_batches(runner.load(argv)), 128)
    assert all(ok for ok, _ in held), [line for ok, line in held if not ok]


def stop_at_rest(runner, processes, sites):
    """Freeze all processes in a round of two, at a moment when each site's own disk has caught up with the last
    stored state (it is written in the background, a few milliseconds after the commit)."""

    def at_rest():
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        stored = [r["round"] for r in runner.journal() if r["type"] == "store"]
        opened = [r for r in runner.journal() if r["type"] == "open"]
        kept = [runner.run_dir / "sites" / s / f"inner-{stored[-1]:06d}-0.safetensors" for s in sites] if stored else []
        training = len(stored) >= 5 and opened[-1]["round"] == stored[-1] and runner.journal()[-1]["type"] != "attempt"
        if training and len(opened[-1]["members"]) == len(sites) and all(path.exists() for path in kept):
            return True
        for process in processes:
            process.send_signal(signal.SIGCONT)
        return False

    until(at_rest)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["coordinator", "site", "everyone"])
def test_after_kill_9_the_run_goes_on_and_ends_where_no_stop_would_have(runner, victim):
    sync = {"wire": "int8"} if victim == "everyone" else {}  # what the wire left out is on the sites' disks, too
    argv = runner.write(PAIR, {"a": [CLEAN] * 20 + [DIRTY], "b": [DIRTY] * 2 + [CLEAN]}, budget={"tokens": 128 * 90}, sync=sync)
    assert runner.run([*argv, "run=calm"], ["a", "b"]) == 0, runner.said()

    head, workers = runner.begin(argv, ["a", "b"])
    everyone = [head, *workers.values()]
    stop_at_rest(runner, everyone, ["a", "b"])
    victims = {"coordinator": [head], "site": [workers["a"]], "everyone": everyone}[victim]
    for process in victims:
        process.kill()
    for process in everyone:
        process.send_signal(signal.SIGCONT)
    again = runner.start("coordinator.py", *argv, log="coordinator") if head in victims else head
    workers |= {name: runner.start("train.py", *argv, f"site={name}", log=name) for name, p in workers.items() if p in victims}
    assert again.wait(120) == 0, runner.said() + runner.said("a")
    assert [p.wait(30) for p in workers.values()] == [0, 0]
    all_hold(runner, argv)
    if victim == "site":  # its window began again, the others' round went on without it
        faults = [r for r in runner.journal() if r["type"] == "fault"]
        begun = [r for r in runner.journal() if r["type"] in ("attempt", "open") and r["n"] < faults[0]["n"]][-1]
        counted_on = begun["type"] == "attempt" and "a" in begun["members"]  # its report was still on its way when it was frozen
        assert [r["kind"] for r in faults] == ["lost", "average failed"][: 1 + counted_on]
        assert runner.summary()["tokens"] == 128 * 90
        return
    assert "resuming" in runner.said()
    if victim == "everyone":
        assert all("found on own disk" in runner.said(s) for s in ("a", "b"))
    assert torch.equal(runner.theta(), runner.theta("calm"))
    calm, broken = (json.loads(json.dumps(runner.summary(r))) for r in ("calm", "tiny"))
    for summary in (calm, broken):
        del summary["wall"]
    assert broken == calm, "energy, emissions and loss as if nothing had happened"


@pytest.mark.slow
def test_a_resume_repeats_the_faults_that_were_ridden_through(runner):
    argv = runner.write(PAIR, budget={"tokens": 128 * 150})
    head, workers = runner.begin(argv, ["a", "b"])
    until(committed(runner, 3))
    workers["a"].kill()
    workers["a"].wait(5)
    until(lambda: [r for r in runner.journal() if r["type"] == "fault"])
    workers["a"] = runner.start("train.py", *argv, "site=a", log="a")
    until(lambda: (fault := [r["n"] for r in runner.journal() if r["type"] == "fault"])
          and [r for r in runner.journal() if r["type"] == "store" and r["n"] > fault[0] + 8])  # fmt: skip
    for process in (head, *workers.values()):
        process.kill()
        process.wait(10)
    assert runner.journal()[-1]["type"] != "end"
    assert runner.run(argv, ["a", "b"]) == 0, runner.said()
    assert [(r["kind"], r["site"]) for r in effective(runner.journal()) if r["type"] == "fault"] == [("lost", "a")]
    assert runner.summary()["tokens"] == 128 * 150
    all_hold(runner, argv)


@pytest.mark.slow
def test_missing_sites_never_hang_a_run_nor_make_it_unresumable(runner):
    """c never comes and is left out of its window; b is missing at one resume; then all that is needed is there."""
    windows = {"a": [CLEAN], "b": [CLEAN], "c": [DIRTY] * 5 + [CLEAN]}
    argv = runner.write(PAIR | {"c": {}}, windows, budget={"tokens": 128 * 120}, rounds={"rejoin_wait_s": 4})

    def after_cs_turn():
        faults = [i for i, r in enumerate(runner.journal()) if r["type"] == "fault"]
        return faults and any(r["type"] == "store" for r in runner.journal()[faults[0] :])

    head, workers = runner.begin(argv, ["a", "b"])
    until(after_cs_turn)
    for process in (head, *workers.values()):
        process.kill()
        process.wait(10)
    assert runner.journal()[-1]["type"] != "end"
    assert runner.run(argv, ["a"]) == 1
    assert "b: no process within rounds.rejoin_wait_s=4 s. The same command resumes" in runner.said(), runner.said()
    assert runner.run(argv, ["a", "b"]) == 0, runner.said()
    faults = [r for r in effective(runner.journal()) if r["type"] == "fault"]
    assert [(r["site"], r["kind"]) for r in faults] == [("c", "absent")]
    assert runner.summary()["sites"]["c"]["wasted_starts"] == 1
    all_hold(runner, argv)


@pytest.mark.slow
def test_a_run_can_be_killed_and_resumed_again_and_again(runner):
    argv = runner.write({"a": {}}, budget={"tokens": 128 * 60})
    assert runner.run([*argv, "run=calm"], ["a"]) == 0
    for number in (2, 5):
        head, workers = runner.begin(argv, ["a"])
        until(committed(runner, number))
        for process in (head, workers["a"]):
            process.kill()
            process.wait(10)
    assert runner.run(argv, ["a"]) == 0, runner.said()
    all_hold(runner, argv)
    assert torch.equal(runner.theta(), runner.theta("calm"))
    kept = [r["t_s"] for r in effective(runner.journal())]
    assert kept == sorted(kept)


@pytest.mark.slow
def test_wall_clock_replays_a_shortened_trace_in_real_seconds(runner):
    """One trace minute is four real seconds here: real starts, real stops, real downloads."""
    sites = {name: {"tokens_per_s": 2000.0} for name in ("a", "b")}
    windows = {"a": [CLEAN] * 4 + [DIRTY], "b": [DIRTY] * 2 + [CLEAN] * 5 + [DIRTY]}
    argv = runner.write(sites, windows, step_s=4, clock={"mode": "wall", "max_hours": 32 / 3600}, budget={"tokens": 128 * 100_000},
                        policy={"off_delay_s": 2}, carbon={"max_gap_s": 10}, price={"trace": str(runner.folder / "price.csv")},
                        rounds={"train_s": 2, "sync_s": 0.5, "commit_every_s": 1.5})  # fmt: skip
    write_trace(runner.folder / "price.csv", {"a": [-40.0], "b": [70.0]}, 4)
    started = time.monotonic()
    head, workers = runner.begin(argv, ["a", "b"])
    assert head.wait(100) == config.EXIT_BUDGET_LEFT, runner.said()
    assert time.monotonic() - started > 31
    assert [w.wait(20) for w in workers.values()] == [3, 3]
    all_hold(runner, argv)
    journal = runner.journal()
    modes = {r["mode"] for r in journal if r["type"] == "open"}
    assert modes == {"local", "federated"}
    off = {r["site"]: r["t_s"] for r in journal if r["type"] == "site" and r["to"] == "off" and "MCI" in r["reason"]}
    assert off["a"] == pytest.approx(18, abs=1.5) and off["b"] == pytest.approx(30, abs=1.5)
    assert off["a"] >= 18 and off["b"] >= 30, "never before the off-delay is over"
    on = {r["site"]: r["t_s"] for r in journal if r["type"] == "site" and r["to"] == "provisioning"}
    assert on["b"] == pytest.approx(8, abs=1.5)
    rows = carbon.read_intervals(str(runner.run_dir / "intervals.csv"))
    for site, stop in off.items():
        assert max(r.end_s for r in rows if r.site == site and r.state == "training") <= stop + 2.5
    assert runner.summary()["tokens"] > 0 and "tokens left" in runner.said()
    for site, price in (("a", -40.0), ("b", 70.0)):
        steps = records(runner.run_dir / f"{site}.jsonl")
        for part in (steps[0], steps[-1], runner.summary()["sites"][site]):
            assert part["cost"] == pytest.approx(price * part["energy_kwh"] / 1000, rel=0.01)
        assert {step["price_per_mwh"] for step in steps} == {price}


@pytest.mark.slow
def test_wall_clock_resumes_from_the_last_commit(runner):
    argv = runner.write({"a": {"tokens_per_s": 2000.0}}, clock={"mode": "wall"}, budget={"tokens": 128 * 4000},
                        rounds={"commit_every_s": 1, "train_s": 2, "sync_s": 0.2})  # fmt: skip
    head, workers = runner.begin(argv, ["a"])
    until(committed(runner, 3))
    for process in (head, workers["a"]):
        process.kill()
        process.wait(10)
    before = len([r for r in runner.journal() if r["type"] == "commit"])
    assert runner.run(argv, ["a"], timeout=200) == 0, runner.said() + runner.said("a")
    all_hold(runner, argv)
    commits = [r for r in runner.journal() if r["type"] == "commit"]
    assert len(commits) > before and sum(c["tokens"] for c in commits) == 128 * 4000


# -- who is let in ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_strangers_are_refused_with_both_values_and_disturb_nobody(runner):
    """Another config, another corpus, an unknown name, a wrong key, junk: the run goes on to the same end."""
    argv = runner.write({"a": {}}, budget={"tokens": 128 * 80})
    assert runner.run([*argv, "run=calm"], ["a"]) == 0
    head = runner.start("coordinator.py", *argv, log="coordinator")
    until(lambda: (runner.run_dir / "address").exists())
    digest = config.train_digest(runner.load(argv))

    other_config = runner.call("train.py", *argv, "site=a", "optim.matrix_lr=0.5")
    assert other_config.returncode == 2 and digest in other_config.stderr
    assert config.train_digest(runner.load([*argv, "optim.matrix_lr=0.5"])) in other_config.stderr

    # Same source name in the digest, other text in it: what a changed or half-copied corpus looks like.
    other_corpus = runner.call("train.py", *argv, "site=a", f"data.dir={changed_corpus(runner)}")
    assert other_corpus.returncode == 2
    assert "corpus digest is '0123456789abcdef'" in other_corpus.stderr and "tokenizer digest is 'other'" in other_corpus.stderr
    assert data.Corpus(runner.load(argv)).digest in other_corpus.stderr

    unknown = runner.call("train.py", *argv, "site=mars")
    assert unknown.returncode == 2 and "mars" in unknown.stderr and "sites: a" in unknown.stderr

    keys = runner.run_dir / "keys"
    own = (keys / "a.key_secret").read_bytes()
    stranger = runner.call("coordinator.py", "keys", *argv, "run=stranger")
    assert stranger.returncode == 0
    (keys / "a.key_secret").write_bytes((runner.folder / "runs" / "stranger" / "keys" / "a.key_secret").read_bytes())
    wrong_key = runner.call("train.py", *argv, "site=a", "rounds.rejoin_wait_s=60", timeout=60)
    (keys / "a.key_secret").write_bytes(own)
    assert wrong_key.returncode == 2 and "does not accept our key" in wrong_key.stderr

    # A right key that claims another site's name: known by its key, not by what it says.
    hello = {"type": "hello", "site": "mars", "config digest": digest, "corpus digest": "x", "tokenizer digest": "bytes"}
    link = Link((runner.run_dir / "address").read_text().strip(), keys, "a", 0.5, 6.0, hello)
    answer, _ = link.inbox.get(timeout=10)
    link.close()
    assert answer["type"] == "refused" and "site is 'mars', the coordinator's 'a'" in answer["reason"]

    host, port = (runner.run_dir / "address").read_text().strip().split(":")
    for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000)):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(junk)

    site = runner.start("train.py", *argv, "site=a", log="a")
    assert head.wait(90) == 0, runner.said()
    assert site.wait(20) == 0
    assert torch.equal(runner.theta(), runner.theta("calm"))
    assert "refused a" in runner.said() and "unknown key" in runner.said()
    for secret in keys.glob("*.key_secret"):
        assert secret.stat().st_mode & 0o77 == 0, f"{secret} is readable by others"


def changed_corpus(runner):
    """A data folder whose shards of the same source hold other text."""
    cfg = runner.load([str(runner.folder / "config.yaml")])
    twin = runner.folder / "data2"
    shutil.copytree(runner.data_dir, twin)
    meta = twin / data.corpus_dir(cfg).name / "tokens-bytes" / "meta.json"
    facts = json.loads(meta.read_text())
    facts |= {"corpus_digest": "0123456789abcdef", "tokenizer_digest": "other"}
    meta.write_text(json.dumps(facts))
    return twin


@pytest.mark.slow
def test_a_second_process_of_a_site_is_refused_while_the_first_lives(runner):
    argv = runner.write({"a": {}}, clock={"mode": "wall"}, budget={"tokens": 128 * 10**6}, rounds={"commit_every_s": 1})
    head, workers = runner.begin(argv, ["a"])
    until(committed(runner, 1))
    second = runner.call("train.py", *argv, "site=a")
    assert second.returncode == 2 and "already connected; stop the other process" in second.stderr
    assert workers["a"].poll() is None and head.poll() is None, "the first one never noticed"


# -- bad input: one line, exit code 2, nothing left ---------------------------------------------------------------------

BAD = {
    "unknown key": (["rounds.trian_s=5"], "trian_s"),
    "wrong type": (["seed=one"], "seed"),
    "unknown site": (["sites.mars.region=X"], "mars"),
    "unknown choice": (["rounds.outer=adam"], "none, nesterov"),
    "missing trace": (["carbon.trace=nowhere.csv"], "nowhere.csv does not exist"),
    "unknown region": (["sites.a.region=ATLANTIS"], "no column 'ATLANTIS'"),
    "no window": (["policy.on_below_g_per_kwh=10"], "policy.on_below_g_per_kwh=10: no window"),
    "budget does not divide": (["budget.tokens=1000"], "multiple of data.tokens_per_step=128; nearest: 1024"),
    "only one site, a wrong one": (["only=fresno"], "only=fresno: unknown site; sites: a"),
    "a day is no moment": (["clock.start=2024-05-01"], "names no zone; write e.g. 2024-05-01T00:00:00Z"),
    "unit": (["carbon.unit=furlong"], "is not one of g/kWh, kg/kWh, kg/MWh, lb/MWh"),
    "live signals": (["clock.start=now"], "needs live signals"),
    "start outside the trace": (["clock.start=2020-01-01T00:00:00Z"], "outside"),
    "ring across hosts": (["sync.host=10.1.2.3"], "sync.trusted_network=true"),
    "ranks": (["sites.a.ranks=3"], "must divide the 4 rows"),
    "one rank cut": (["sites.a.parallel=fsdp", "sites.a.ranks=1"], "cuts the model over at least 2 ranks"),
    "auto without a link": (["sync.wire=auto"], "set sync.link_gbit"),
    "step longer than a round": (["sites.a.tokens_per_s=1"], "rounds.train_s=60 must be >= a step of site a, 128 s"),
    "heads": (["model.heads=3"], "model.heads=3"),
    "source": (["data.source=nowhere"], "neither `stdlib` nor a folder"),
    "not key=value": (["fresh"], "key=value"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(runner, name):
    changes, message = BAD[name]
    argv = runner.write({"a": {}, "b": {"region": "a"}} if "step" in name else {"a": {}})
    # what the config alone shows every program refuses alike; the simulator is the quickest of them to start
    script = "coordinator.py" if name in ("unknown key", "start outside the trace", "heads", "source") else "simulate.py"
    result = runner.call(script, *argv, *changes)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not runner.journal()


def test_what_is_advised_is_accepted(runner, monkeypatch):
    argv = runner.write({"a": {}, "b": {}})
    assert list(runner.load([*argv, "only=b", "clock.start=2026-01-11T17:00:00Z"]).sites) == ["b"]
    assert runner.load([*argv, "carbon.unit=lbs_co2_per_mwh"]).carbon.unit == "lb/MWh"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert runner.load(argv).wandb.mode == "online", "the environment goes over a file"
    assert runner.load([*argv, "wandb.mode=offline"]).wandb.mode == "offline", "and the command line over it"
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(config.BadInput, match="WANDB_MODE=sometimes"):
        runner.load(argv)


def test_a_config_that_is_missing_or_broken(runner):
    (runner.folder / "broken.yaml").write_text("run: [unclosed\n")
    for argv, message in (([], "no config"), (["nowhere.yaml"], "does not exist"), (["broken.yaml"], "broken.yaml")):
        result = runner.call("simulate.py", *argv)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_port_in_use_folder_in_use_other_config_and_finished_are_refused(runner):
    argv = runner.write({"a": {}}, budget={"tokens": 128 * 12})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = runner.call("coordinator.py", *argv, f"sync.port={port}")
        assert result.returncode == 2 and f"sync.port={port}" in result.stderr
    head = runner.start("coordinator.py", *argv, "fresh=true", log="coordinator")
    until(lambda: (runner.run_dir / "address").exists() and runner.journal())
    twice = runner.call("coordinator.py", *argv)
    assert twice.returncode == 2 and "in use by another coordinator" in twice.stderr
    site = runner.start("train.py", *argv, "site=a", log="a")
    assert head.wait(60) == 0 and site.wait(20) == 0
    other = runner.call("coordinator.py", *argv, "seed=2")
    assert other.returncode == 2 and "config_digest" in other.stderr
    done = runner.call("coordinator.py", *argv)
    assert done.returncode == 2 and "is finished" in done.stderr and "fresh=true" in done.stderr


def test_a_non_finite_loss_names_site_and_step_and_nothing_of_it_is_committed(runner):
    argv = runner.write(PAIR, budget={"tokens": 128 * 40})
    code = runner.run([*argv, "optim.embedding_lr=1e25", "optim.matrix_lr=1e25"], ["a", "b"])
    assert code == 2, runner.said()
    last = runner.said().strip().splitlines()[-1]
    assert "non-finite loss at" in last and "step" in last and "matrix_lr" in last
    assert not [r for r in runner.journal() if r["type"] == "commit"]


@pytest.mark.slow
def test_ctrl_c_on_the_launcher_leaves_no_process_and_a_resumable_run(runner):
    argv = runner.write(PAIR, budget={"tokens": 128 * 3000})
    launch = runner.start("launch.py", *argv, log="launch")
    until(committed(runner, 2))
    launch.send_signal(signal.SIGINT)
    assert launch.wait(40) == 130
    until(lambda: not processes_in(runner.folder), 10)
    assert runner.journal()[-1]["type"] == "end" and runner.journal()[-1]["reason"] == "interrupted"
    assert runner.summary()["tokens"] > 0
    all_hold(runner, argv)


def test_the_launchers_thread_settings_yield_to_a_persons(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cfg = config.load([str(REPO / "configs" / "demo.yaml")])
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    env = launch.Launch(cfg, []).env
    assert (env["OMP_NUM_THREADS"], env["GOMP_SPINCOUNT"]) == ("2", "3000")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    env = launch.Launch(cfg, []).env
    assert (env["OMP_NUM_THREADS"], env["GOMP_SPINCOUNT"]) == ("1", "7")


@pytest.mark.slow
def test_the_launcher_starts_again_what_is_killed(runner):
    argv = runner.write(PAIR, budget={"tokens": 128 * 1500})
    launch = runner.start("launch.py", *argv, log="launch")

    def kill(*words):
        children = psutil.Process(launch.pid).children(recursive=True)
        found = [
            p for p in children if all(any(w in arg for arg in p.cmdline()) for w in words) and "torch.distributed.run" not in p.cmdline()
        ]
        assert found, words
        found[0].kill()

    until(committed(runner, 2))
    kill("train.py", "site=a")
    until(lambda: "a               | process ended" in runner.said("launch"), 30)
    until(committed(runner, len([r for r in runner.journal() if r["type"] == "commit"]) + 2))
    kill("coordinator.py")
    assert launch.wait(200) == 0, runner.said("launch")[-3000:]
    assert "coordinator     | killed by signal 9; starting it again" in runner.said("launch")
    assert runner.summary()["tokens"] == 128 * 1500
    all_hold(runner, argv)


@pytest.mark.slow
def test_killing_the_launcher_outright_leaves_no_process_either(runner):
    argv = runner.write(PAIR, budget={"tokens": 128 * 3000})
    launch = runner.start("launch.py", *argv, log="launch")
    until(committed(runner, 1))
    launch.kill()
    launch.wait(5)
    until(lambda: not processes_in(runner.folder), 40)
    assert not processes_in(runner.folder)


def test_launch_runs_a_whole_day_draws_the_figure_and_ends_in_a_table(runner):
    argv = runner.write(PAIR, {"a": [CLEAN] * 6 + [DIRTY], "b": [DIRTY, CLEAN]}, budget={"tokens": 128 * 40})
    (scratch := runner.folder / "tmp").mkdir()
    runner.env |= {"TMPDIR": str(scratch)}
    result = runner.call("launch.py", *argv, "wandb.mode=offline")
    assert result.returncode == 0, result.stdout + result.stderr
    run_id = runner.journal()[0]["wall"]["run_id"]
    views = {p.name.split("-", 3)[-1] for p in (runner.run_dir / "wandb").glob("offline-run-*")}
    assert views == {f"{run_id}-{name}" for name in ("coordinator", "a", "b")}, "one view per site and one of the coordinator"
    for word in ("window open", "federated", "validation", "kgCO2, ours is", "floor by the same hour", "goodput"):
        assert word in result.stdout
    assert (runner.run_dir / "figures" / "timeline.png").stat().st_size > 10_000
    assert not processes_in(runner.folder)
    assert not list(scratch.iterdir()), "neither torchrun's nor wandb's folders stay"
    check_ = runner.call("coordinator.py", "check", "runs/tiny")
    assert check_.returncode == 0 and "BROKEN" not in check_.stdout


@pytest.mark.slow
def test_how_often_steps_are_logged_changes_no_figure_of_the_loss(runner):
    """Every step's loss is in SITE.jsonl, on a line of its own or on the next one."""
    argv, found = runner.write({"a": {}, "b": {}}, budget={"tokens": 128 * 24}), {}
    for every in (1, 5, 1000):
        assert runner.run([*argv, f"run=every{every}", f"log.every_steps={every}"], ["a", "b"]) == 0, runner.said()
        steps = report.load_steps(runner.folder / "runs" / f"every{every}", "ab")
        found[every] = report.all_losses(steps), report.train_ppl_best(steps), runner.summary(f"every{every}")["train_ppl_best"]
    assert found[1] == found[5] == found[1000]
    assert len(found[1][0]) == 24 and found[1][1] == found[1][2]
