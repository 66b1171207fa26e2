"""A rehearsal of full scale, in its short form: the shipped d20 config, scaled down, and a rank killed."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import REPO

pytestmark = pytest.mark.slow


def test_the_shipped_d20_config_runs_scaled_down_survives_a_killed_rank_and_its_model_speaks():
    command = [sys.executable, str(REPO / "bench/rehearsal.py"), "--short", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(done.stdout.splitlines()) == 1, "one JSON object, all else on stderr"
    facts = json.loads(done.stdout)
    assert facts["held"] and not facts["why"] and facts["left_behind"] == []
    scaled = {key: (was, now) for key, (was, now) in facts["scaled"].items()}
    kept = {"model.dtype", "model.compile", "data.source", "sync.wire", "sync.dead_s", "policy.name"}
    assert not kept & set(scaled) and scaled["model.depth"] == ("20", "2"), "what is scaled is sizes and pace"
    assert facts["faults"] >= 1 and facts["tokens"] == int(scaled["budget.tokens"][1]) and facts["rounds"] > 1
    killed = next(s for s in facts["stages"] if s["name"] == "kill -9, rank 1 of south_australia")
    for words in ("in federated round", "back after"):
        assert any(words in said for said in killed["facts"]), killed
    assert facts["transformers"] is None or facts["transformers"] < 1e-4
    scratch = Path(scaled["carbon.trace"][1]).parent
    left = [p for p in psutil.process_iter(["cwd"]) if (p.info["cwd"] or "").startswith(str(scratch))]
    assert not scratch.exists() and not left, "no file and no process stays behind"
