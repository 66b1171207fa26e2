"""What is on disk survives anything: torn and full journals, damaged states and manifests."""

import json
import os
import resource
import signal
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from conftest import Runner, examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import vault as vault_module
from config import BadInput
from journal import Journal, Unwritable, check, read
from sync import DTYPES, StateFolder, digest, save_file
from vault import Vault

records = st.lists(st.fixed_dictionaries({"t_s": st.just(0.0), "type": st.text(max_size=8), "x": st.integers() | st.text(max_size=30)}),
                   min_size=1, max_size=8)  # fmt: skip


def test_tokens_that_no_batch_holds_are_found_in_a_journal():
    def broken(tokens: int) -> list[str]:
        opened = {"t_s": 0.0, "type": "open", "round": 0, "mode": "local", "members": ["a"]}
        commit = {"t_s": 1.0, "type": "commit", "round": 0, "tokens": tokens, "batches": {"a": [[0, 3], [5, 6]]}}
        return [line for ok, line in check([{"n": n} | r for n, r in enumerate((opened, commit))], 6, 128) if not ok]

    assert not broken(4 * 128)
    assert broken(4 * 999) == ["committed tokens are the sum of the contributions"]


def test_ctrl_c_in_the_middle_of_a_write_writes_nothing_twice(tmp_path, monkeypatch):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    journal, fsync = Journal(tmp_path / "journal.jsonl"), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (signal.raise_signal(signal.SIGTERM), fsync(fd)))
    before = signal.signal(signal.SIGTERM, interrupt)
    journal.add([{"t_s": 0.0, "type": "a"}])
    try:
        with pytest.raises(KeyboardInterrupt):
            journal.flush()
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    journal.add([{"t_s": 1.0, "type": "b"}])
    journal.flush()
    assert [(r["n"], r["type"]) for r in read(journal.path)] == [(0, "a"), (1, "b")]
    journal.close()


@examples(150)
@given(records, st.data())
def test_a_journal_torn_at_any_byte_keeps_its_whole_records_and_goes_on_contiguously(tmp_path_factory, some, data):
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    for record in some:
        journal = Journal(path)
        journal.add([record])
        journal.flush()
        journal.close()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    journal = Journal(path)
    assert len(journal.records) == kept
    journal.add([{"t_s": 1.0, "type": "next"}])
    journal.flush()
    journal.close()
    assert [r["n"] for r in read(path)] == list(range(kept + 1)) and read(path)[-1]["type"] == "next"


def write_under(limit: int, path, pipe) -> None:
    """In a process whose files may have `limit` bytes: fill a journal, then go on without the limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    journal, refused = Journal(path), 0
    for i in range(40):
        journal.add([{"t_s": float(i), "type": "open", "i": i}])
        try:
            journal.flush()
        except Unwritable as error:
            refused += 1
            assert "journal.jsonl" in str(error) and "free space" in str(error)
            assert path.read_bytes().endswith(b"\n") or not path.read_bytes(), "whole records only"
            if refused == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.flush()
    pipe.send(refused)


@pytest.mark.parametrize("limit", [1, 500, 777])
def test_a_full_disk_tells_and_loses_nothing(tmp_path, limit):
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=write_under, args=(limit, tmp_path / "journal.jsonl", theirs))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and ours.recv() == 3
    assert [(r["n"], r["i"]) for r in read(tmp_path / "journal.jsonl")] == [(i, i) for i in range(40)], "each record once"


def test_a_journal_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises((Unwritable, OSError)):
        Journal(tmp_path / "journal.jsonl")


# -- states ----------------------------------------------------------------------------------------------------------

CFG = SimpleNamespace(sync=SimpleNamespace(chunk_mb=1))


def three_rounds(folder) -> dict[int, str]:
    """States of rounds 0 to 2 (two are kept); returns round -> digest, as a journal would know them."""
    states, known = StateFolder(folder), {}
    for r in range(3):
        theta, m = torch.full((500,), float(r)), torch.full((500,), -float(r))
        known[r] = digest(theta)
        states.save(r, theta, m, {"run_id": "x", "digest_theta": known[r], "digest_m": digest(m)})
    return known


def newest(folder):
    return max(folder.glob("round-*.safetensors"))


@examples(100)
@given(st.data())
def test_a_damaged_state_is_noticed_and_the_older_one_used(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("s")
    known = three_rounds(folder)
    path = newest(folder)
    good = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "gone"]))
    if kind == "cut":
        path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    elif kind == "flip":  # in the tensors: what the header says besides is not theirs
        at = data.draw(st.integers(8 + int.from_bytes(good[:8], "little"), len(good) - 1))
        path.write_bytes(good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :])
    else:
        path.unlink()
    vault = Vault(CFG, folder)
    assert vault.load(known, "x") == 1
    assert torch.equal(vault.theta, torch.full((500,), 1.0)) and torch.equal(vault.m, torch.full((500,), -1.0))
    assert vault.states.read(2, "theta", 0, 10) is None, "the damaged one is not served"
    assert vault.states.read(1, "theta", 0, 10) is not None


def test_when_both_are_damaged_one_line_says_so(tmp_path):
    known = three_rounds(tmp_path)
    for path in tmp_path.glob("round-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BadInput, match=r"round 2 is damaged .*round 1 is damaged .*fresh=true") as caught:
        Vault(CFG, tmp_path).load(known, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", '{"states": 5}', '{"states": [{}]}'])
def test_a_lost_manifest_is_made_again_from_the_files(tmp_path, text):
    known = three_rounds(tmp_path)
    before = json.loads((tmp_path / "manifest.json").read_text())["states"]
    (tmp_path / "manifest.json").unlink() if text is None else (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "round-000009.safetensors.tmp").write_bytes(b"half")
    assert StateFolder(tmp_path).manifest == before
    assert Vault(CFG, tmp_path).load(known, "x") == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_a_state_that_does_not_fit_leaves_the_old_ones_as_they_were(tmp_path, monkeypatch):
    known = three_rounds(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sync.save_file", full)
    vault = Vault(CFG, tmp_path)
    vault.load(known, "x")
    monkeypatch.setattr(vault_module.config, "train_digest", lambda cfg: "d")
    with pytest.raises(Unwritable, match="No space left on device; free space"):
        vault._save(3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@examples(40)
@given(st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=5))
def test_the_safetensors_library_reads_what_we_write(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    tensors = {f"t{i}": (torch.rand(shape) * 100).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    save_file(tensors, path, {"round": "7"})
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype and found[k].shape == t.shape for k, t in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"round": "7"}


def test_what_is_on_a_disk_is_never_unpickled():
    for name in os.listdir(Runner.__init__.__globals__["REPO"]):
        if name.endswith(".py"):
            text = (Runner.__init__.__globals__["REPO"] / name).read_text()
            assert "pickle" not in text.replace("unpickled", "").replace("never pickle", "") and "torch.load" not in text, name
