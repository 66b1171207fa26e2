"""What every entry point says of itself: --help, and the list of all keys."""

import re
import subprocess
import sys

import pytest
from conftest import REPO
from omegaconf import OmegaConf

import config

SCRIPTS = sorted(
    path.name for path in REPO.glob("*.py") if "config.command(" in path.read_text() or "    command(main)" in path.read_text()
)
BENCHES = sorted(f"bench/{path.name}" for path in (REPO / "bench").glob("*.py") if "config.command(" in path.read_text())


def helped(script: str, flag: str) -> str:
    done = subprocess.run([sys.executable, str(REPO / script), flag], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_all_entry_points_are_known():
    assert {"train.py", "coordinator.py", "launch.py", "simulate.py", "carbon.py", "figures.py", "data.py", "export.py", "generate.py",
            "config.py", "provision.py", "footprint.py", "doctor.py"} <= set(SCRIPTS)  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_it_does_three_examples_and_where_the_keys_are(script):
    said = helped(script, "--help")
    examples = re.findall(rf"^ +(?:python|torchrun)\b.* {script}\b.*$|^ +python coordinator.py .*$|^ +python launch.py .*$", said, re.M)
    assert len(set(examples)) >= 3, said
    assert "python config.py SECTION" in said and "Exit codes" in said


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHES)
def test_benches_answer_too(script):
    assert f"python {script}" in helped(script, "-h")


def test_the_listing_has_every_key_with_its_default_and_what_it_means(runner):
    lines = {line.split()[0]: line for line in config.listing([]).splitlines()}
    sites = OmegaConf.structured(config.Config(sites={"NAME": config.Site}))

    def keys(node, at=""):
        for name, value in node.items_ex(resolve=False):
            if OmegaConf.is_dict(value) and at + name != "sites.NAME.provision":
                yield from keys(value, f"{at}{name}.")
            else:
                yield at + name

    assert set(lines) == set(keys(sites))
    for key, line in lines.items():
        assert len(line.split()) > 2, f"{key}: what does it mean?"
    assert lines["rounds.train_s"].split()[1] == "570.0" and "> 0" in lines["rounds.train_s"]
    assert "none | nesterov" in lines["rounds.outer"] or "nesterov" in lines["rounds.outer"]
    assert runner.call("config.py", "clock", "log").stdout.count("\n") == 4
    refused = runner.call("config.py", "rownds")
    assert refused.returncode == 2 and "no section 'rownds'; sections: " in refused.stderr
