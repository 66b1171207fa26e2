"""What is shipped works as it says: configs parse, the README names real files, the journal reader is strict."""

import json
import re
import subprocess
import sys

import pytest
from conftest import REPO

import config
import journal
from config import BadInput

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_parse(path):
    cfg = config.load([str(path)])
    assert cfg.run and cfg.sites


def test_the_readme_names_only_files_that_exist():
    text = (REPO / "README.md").read_text()
    for name in set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.(?:py|yaml|md|txt))`", text)):
        assert (REPO / name).exists(), name
    for target in set(re.findall(r"`make ([a-z-]+)`", text)):
        assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.M), target
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (REPO / image).exists(), image


def test_every_dependency_is_pinned_and_explained():
    readme = (REPO / "README.md").read_text()
    for line in (REPO / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert version and f"`{name}`" in readme, name


@pytest.mark.parametrize("argv", [
    ["simulate.py", "configs/demo.yaml", "--json"], ["carbon.py", "describe", "traces/paper_day.csv", "--json"],
], ids=["simulate", "describe"])  # fmt: skip
def test_json_prints_exactly_one_object(argv):
    result = subprocess.run([sys.executable, *argv], cwd=REPO, capture_output=True, text=True, check=True)
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    if argv[0] == "simulate.py":
        assert set(value["decisions"][0]) == {"t_s", "site", "event", "reason"} and value["starts"] == 4
        assert value["val_loss"] is None and value["floor_kg"]["lp"] < value["emissions_kg"]


def test_the_simulated_demo_keeps_the_papers_shape():
    """Phases of the published run: local, pause, local, two together, local, two together, within the day."""
    result = subprocess.run([sys.executable, "simulate.py", "configs/demo.yaml", "--json"], cwd=REPO, capture_output=True, check=True)
    value = json.loads(result.stdout)
    teams = [d["reason"] for d in value["decisions"] if d["event"] == "open"]
    phases = [t for i, t in enumerate(teams) if i == 0 or t != teams[i - 1]]
    assert phases == ["local: california", "federated: california + south_australia", "local: south_australia",
                      "federated: texas + south_australia"]  # fmt: skip
    assert value["steps"] == 1200 and value["runtime_h"] < 18 and value["goodput"] > 0.85
    shares = [value["emissions_kg"] / kg for kg in value["baselines"].values()]
    assert min(shares) > 0.03 and max(shares) < 0.14


def test_nothing_unpickles():
    sources = subprocess.run(["git", "ls-files", "*.py"], cwd=REPO, capture_output=True, text=True).stdout.split()
    for name in sources or [str(p.relative_to(REPO)) for p in REPO.glob("*.py")]:
        if not name.startswith("tests/"):
            assert not re.search(r"\bpickle\b\.|torch\.load\(|_object_list\(|_objects\(", (REPO / name).read_text()), name


def test_config_digests_ignore_machines_and_see_the_model():
    path = str(REPO / "configs/demo.yaml")
    base = config.load([path])
    same = ("sites.texas.device=cuda", "data.dir=elsewhere", "log.every_steps=1", "sync.port=4000", "wandb.mode=disabled")
    other = ("model.depth=5", "optim.matrix_lr=0.1", "rounds.outer_lr=0.5", "budget.tokens=2048", "seed=9", "data.tokenizer=bpe-512")
    assert {config.train_digest(config.load([path, c])) for c in same} == {config.train_digest(base)}
    assert len({config.train_digest(config.load([path, c])) for c in other} | {config.train_digest(base)}) == len(other) + 1
    assert config.schedule_digest(config.load([path, "policy.off_delay_s=0"])) != config.schedule_digest(base)


def test_a_torn_last_line_is_cut_off_and_damage_elsewhere_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = [json.dumps({"n": i, "t_s": float(i), "type": "site"}) for i in range(3)]
    path.write_text("\n".join(lines) + '\n{"n": 3, "t_')
    assert [r["n"] for r in journal.read(path)] == [0, 1, 2]
    assert path.read_text().endswith('"t_'), "a reader changes nothing: a writer may be at work"
    assert len(journal.Journal(path).records) == 3 and path.read_text() == "\n".join(lines) + "\n"
    path.write_text(lines[0] + "\n{broken\n" + lines[2] + "\n")
    with pytest.raises(BadInput, match="damaged"):
        journal.read(path)


def test_records_of_one_moment_are_ordered_and_numbered(tmp_path):
    j = journal.Journal(tmp_path / "journal.jsonl")
    j.add([{"t_s": 5.0, "type": "site", "site": "b"}, {"t_s": 5.0, "type": "site", "site": "a"}, {"t_s": 9.0, "type": "open"},
           {"t_s": 5.0, "type": "commit"}])  # fmt: skip
    j.flush(5.0)
    j.add([{"t_s": 9.0, "type": "end"}, {"t_s": 9.0, "type": "store"}])
    j.flush()
    got = [(r["n"], r["t_s"], r["type"], r.get("site")) for r in journal.read(j.path)]
    assert got == [(0, 5.0, "commit", None), (1, 5.0, "site", "a"), (2, 5.0, "site", "b"), (3, 9.0, "open", None),
                   (4, 9.0, "store", None), (5, 9.0, "end", None)]  # fmt: skip


def test_check_finds_what_is_broken():
    good = [
        {"n": 0, "t_s": 0.0, "type": "genesis"},
        {"n": 1, "t_s": 0.0, "type": "open", "round": 0, "mode": "local", "members": ["a"]},
        {"n": 2, "t_s": 9.0, "type": "commit", "round": 0, "tokens": 20, "batches": {"a": [[0, 2]]}},
        {"n": 3, "t_s": 9.0, "type": "store", "round": 1},
    ]
    assert all(ok for ok, _ in journal.check(good, 10, 10))
    twice = good + [good[1] | {"n": 4, "t_s": 9.0, "round": 1}, good[2] | {"n": 5, "round": 1}]
    assert [line for ok, line in journal.check(twice, 10, 10) if not ok]
    for change in ({"round": 5}, {"batches": {"b": [[0, 2]]}}, {"t_s": -1.0}, {"n": 7}):
        assert not all(ok for ok, _ in journal.check([*good[:2], good[2] | change, good[3]], 10, 10)), change
    assert not all(ok for ok, _ in journal.check([*good, {"n": 4, "t_s": 9.0, "type": "end", "reason": "budget"}], 10, 10))
