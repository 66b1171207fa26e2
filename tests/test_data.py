"""Text, tokenizers, token shards, batches: the same bits however they were made, and a name for what is wrong."""

import errno
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import processes_in
from hypothesis import given
from hypothesis import strategies as st

import config
import data
from bench.hub import Hub
from config import BadInput


def cfg_of(runner, **changes):
    return runner.load(runner.write({"a": {}}, **changes))


def own(runner, **changes) -> dict:
    """`data` section of a corpus that no other test uses."""
    return {"dir": str(runner.folder / "own"), **changes}


def write_parquet(folder, num_files: int, num_docs: int, words_per_doc: int = 60) -> list[str]:
    """Text shards of made-up words; returns all documents."""
    rng, documents = random.Random(1), []
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(300)]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_files):
        texts = [" ".join(rng.choices(words, k=words_per_doc)) for _ in range(num_docs)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet", row_group_size=50)
        documents += texts
    return documents


def held(corpus: data.Corpus, split: str) -> list[bytes]:
    """The documents of a split, as they were tokenized by `bytes`."""
    return [d for shard in corpus._shards[split] for d in bytes(shard.astype("uint8")).split(b"\0")[1:]]


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in (".lock", "verified.json")}


# -- batches ------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_and_batches_do_not_depend_on_ranks(runner):
    corpus = data.Corpus(cfg_of(runner))
    total = corpus.train_tokens // corpus.seq_len
    order = [int(corpus._order(0)[i]) for i in range(total)]
    assert sorted(order) == list(range(total)) and order != sorted(order)
    assert not (corpus._order(0) == corpus._order(1)).all()
    whole = corpus.batch(3)
    halves = [corpus.batch(3, first, 2) for first in (0, 2)]
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([h[i] for h in halves]))
    assert torch.equal(whole[0][:, 1:], whole[1][:, :-1]), "targets are inputs shifted by one"
    again = data.Corpus(cfg_of(runner, seed=2))
    assert not torch.equal(again.batch(3)[0], whole[0])


def test_an_epoch_reads_every_token_of_every_shard_once(runner):
    write_parquet(runner.folder / "text", 3, 60)
    corpus = data.Corpus(cfg_of(runner, data=own(runner, source=str(runner.folder / "text"))))
    windows = corpus.train_tokens // corpus.seq_len
    read = torch.cat([corpus.batch(b)[0] for b in range(windows // corpus.rows)])
    read = torch.cat([read, corpus.batch(windows // corpus.rows, 0, windows % corpus.rows)[0]])
    shards = [np.asarray(s[: (len(s) - 1) // corpus.seq_len * corpus.seq_len]) for s in corpus._shards["train"]]
    assert len(shards) == 3 and sorted(read.tolist()) == sorted(np.concatenate(shards).reshape(-1, corpus.seq_len).tolist())


def test_a_batch_across_two_epochs_is_whole(runner):
    corpus = data.Corpus(cfg_of(runner))
    total = corpus.train_tokens // corpus.seq_len
    ids, _ = corpus.batch(total // corpus.rows)
    assert ids.shape == (corpus.rows, corpus.seq_len)


# -- sources ------------------------------------------------------------------------------------------------------------


def test_held_out_documents_are_never_trained_on(runner):
    corpus = data.Corpus(cfg_of(runner))
    val, train = held(corpus, "val"), set(held(corpus, "train"))
    assert val and train and train.isdisjoint(val)


def test_parquet_in_place_holds_the_same_documents_as_text_files(runner):
    texts = write_parquet(runner.folder / "parquet", 2, 60)
    (runner.folder / "text").mkdir()
    for i, text in enumerate(texts):
        (runner.folder / "text" / f"{i:04d}.txt").write_text(text)
    corpora = [data.Corpus(cfg_of(runner, data=own(runner, source=str(runner.folder / s), val_tokens=64))) for s in ("parquet", "text")]
    for corpus in corpora:
        assert sorted(held(corpus, "train") + held(corpus, "val")) == sorted(t.encode() for t in texts)
        assert held(corpus, "val") and held(corpus, "train")
    assert not list((runner.folder / "own").glob("parquet-*/text")), "no copy of the text"


def test_the_last_of_many_parquet_files_is_held_out(runner):
    texts = write_parquet(runner.folder / "text", data.LAST_HELD_OUT_ABOVE + 1, 5)
    corpus = data.Corpus(cfg_of(runner, data=own(runner, source=str(runner.folder / "text"))))
    assert held(corpus, "val") == [t.encode() for t in texts[-5:]] and held(corpus, "train") == [t.encode() for t in texts[:-5]]


@pytest.mark.parametrize("damage", ["cut short", "overwritten", "another column", "numbers"])
def test_a_damaged_text_shard_is_named(runner, damage):
    write_parquet(runner.folder / "text", 3, 400)
    path = runner.folder / "text" / "shard_00001.parquet"
    raw = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(raw[:-100])
    elif damage == "overwritten":
        path.write_bytes(raw[:1000] + b"\xff" * 5000 + raw[6000:])
    else:
        pq.write_table(pa.table({"body": ["a"]} if damage == "another column" else {"text": [1, 2]}), path)
    cfg = cfg_of(runner, data=own(runner, source=str(runner.folder / "text")))
    with pytest.raises(BadInput, match=r"shard_00001\.parquet cannot be read"):
        data.prepare(cfg)
    write_parquet(runner.folder / "text", 3, 400)
    assert data.Corpus(cfg).train_tokens > 0, "goes on once the file is good"


# -- tokenizers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("bpe")
    source = {"source": str(corpus), "dir": str(folder), "tokenizer": "bpe-400"}
    (folder / "c.yaml").write_text(json.dumps({"data": source, "sites": {"a": dict.fromkeys(("tokens_per_s", "idle_kw", "train_kw"), 1e4)
                                                                         | {"region": "a"}}}))  # fmt: skip
    return data.make_tokenizer(config.load([str(folder / "c.yaml")]))


@given(st.lists(st.text() | st.sampled_from(["<|bos|>", "a<|bos|>b", "naïve 日本 🙂\r\n"]), max_size=4))
def test_decoding_undoes_encoding(bpe, texts):
    for tokenizer, expected in ((bpe, texts), (data.Bytes(), [t.replace("\0", "") for t in texts])):
        tokens, sizes = tokenizer.encode(texts), tokenizer.token_bytes()
        assert [tokenizer.decode(t.tolist()) for t in tokens] == expected
        assert [int(sizes[t].sum()) for t in tokens] == [len(e.encode()) for e in expected], "bits per byte counts these"
        assert all(tokenizer.separator not in t and (t < tokenizer.vocab).all() for t in tokens)


def test_a_tokenizer_of_ones_own_makes_the_same_tokens(runner):
    trained = cfg_of(runner, data=own(runner, tokenizer="bpe-400", val_tokens=256))
    first = data.Corpus(trained)
    path = shutil.copy(data.tokenizer_path(trained), runner.folder / "mine.json")
    second = data.Corpus(cfg_of(runner, data=own(runner, tokenizer=str(path), val_tokens=256)))
    assert (second.digest, second.tokenizer_digest, second.vocab) == (first.digest, first.tokenizer_digest, 400)


def test_a_bpe_reads_no_more_text_than_it_is_allowed(runner, capsys):
    data.make_tokenizer(cfg_of(runner, data=own(runner, tokenizer="bpe-300", tokenizer_chars=12345)))
    assert "300 tokens trained on 12,345 characters" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_had_is_refused(runner):
    with pytest.raises(BadInput, match=r"bpe-60000: .* characters of text give only \d+ tokens; ask for bpe-\d+ or less"):
        data.prepare(cfg_of(runner, data=own(runner, tokenizer="bpe-60000")))
    (runner.folder / "broken.json").write_text("{}")
    for name, said in (("bpe-70000", "300 to 65536"), ("nowhere.json", "neither"), (str(runner.folder / "broken.json"), "cannot be read")):
        with pytest.raises(BadInput, match=said):
            data.prepare(cfg_of(runner, data=own(runner, tokenizer=name)))


def test_another_tokenizer_or_vocabulary_than_the_shards_were_made_with_is_refused(runner):
    cfg = cfg_of(runner, data=own(runner, tokenizer="bpe-400", val_tokens=256))
    data.Corpus(cfg)
    with pytest.raises(BadInput, match=r"model.vocab=256 is not the 400 tokens"):
        data.Corpus(cfg_of(runner, data=own(runner, tokenizer="bpe-400", val_tokens=256), model={"vocab": 256}))
    path = data.tokenizer_path(cfg)
    path.write_text(path.read_text() + " ")
    with pytest.raises(BadInput, match=f"{path} is not the tokenizer"):
        data.Corpus(cfg)
    data.tokenize(cfg)
    assert data.Corpus(cfg).tokenizer_digest == data.file_digest(path)


# -- token shards -------------------------------------------------------------------------------------------------------


def damage(path, how: str) -> None:
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(raw[:-10] if how == "not .* bytes long" else raw[:500] + bytes([raw[500] ^ 1]) + raw[501:])


@pytest.mark.parametrize("how", ["missing", "not .* bytes long", "damaged"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_token_shard_is_named_and_can_be_made_again(runner, how, split):
    cfg = cfg_of(runner, data=own(runner))
    before = contents(data.prepare(cfg))
    shard = next(data.tokens_dir(cfg).glob(f"{split}_*.bin"))
    damage(shard, how)
    with pytest.raises(BadInput, match=f"{shard} is .*{how}.*remove it and run data.py tokenize"):
        data.Corpus(cfg)
    shard.unlink(missing_ok=True)
    data.tokenize(cfg)
    data.Corpus(cfg)
    assert contents(data.tokens_dir(cfg)) == before


def test_of_a_large_corpus_only_what_changed_is_read_again(runner, monkeypatch):
    monkeypatch.setattr(data, "HASHED_AT_EVERY_START_BYTES", 0)
    cfg = cfg_of(runner, data=own(runner))
    data.Corpus(cfg)
    shard = next(data.tokens_dir(cfg).glob("train_*.bin"))
    with monkeypatch.context() as m:
        m.setattr(data, "blake3", None)
        data.Corpus(cfg)
    damage(shard, "damaged")
    with pytest.raises(BadInput, match=f"{shard} is damaged"):
        data.Corpus(cfg)


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_that_looks_done(runner, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    argv = runner.write({"a": {}}, data=own(runner))
    with monkeypatch.context() as m:
        m.setattr(data.Part, "write", full)
        with pytest.raises(BadInput, match=r"no space left in data\.dir=.*run the same command again"):
            data.main(["tokenize", *argv])
    folder = data.tokens_dir(runner.load(argv))
    assert not list(folder.glob("*.json")) and not list(folder.glob("*.bin"))
    assert data.main(["tokenize", *argv]) == 0 and not list(folder.glob("*.tmp"))


def test_ids_beyond_the_vocabulary_are_refused(runner):
    cfg = cfg_of(runner, data=own(runner))
    meta = data.prepare(cfg) / "meta.json"
    facts = json.loads(meta.read_text())
    meta.write_text(json.dumps(facts | {"vocab": 100}))
    highest = max(s["highest"] for s in facts["shards"] if s["file"].startswith("train"))
    with pytest.raises(BadInput, match=f"train_00000.bin holds id {highest}, the vocabulary ends at 99"):
        data.Corpus(cfg)


@pytest.mark.slow
def test_two_workers_make_what_one_makes(runner):
    write_parquet(runner.folder / "text", 5, 100)
    made = []
    for workers in (1, 2):
        cfg = cfg_of(runner, data={"dir": str(runner.folder / f"own{workers}"), "source": str(runner.folder / "text"), "workers": workers,
                                   "tokenizer": "bpe-400"})  # fmt: skip
        made.append(contents(data.prepare(cfg)))
    assert made[0] == made[1] and len(made[0]) == 5 * 3 + 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_tokenizing_broken_off_goes_on_and_ends_in_the_same_bits(runner, how):
    write_parquet(runner.folder / "text", 12, 1500, words_per_doc=150)
    source = str(runner.folder / "text")
    argv = runner.write({"a": {}}, data=own(runner, source=source, tokenizer="bpe-400", tokenizer_chars=100_000, workers=2))
    folder = data.tokens_dir(runner.load(argv))
    first = runner.start("data.py", "tokenize", *argv, log="first")
    deadline = time.monotonic() + 60
    while len(list(folder.glob("both_*.json"))) < 2:
        assert first.poll() is None and time.monotonic() < deadline, runner.said("first")
        time.sleep(0.01)
    (first.kill if how == signal.SIGKILL else lambda: os.killpg(first.pid, how))()
    assert first.wait(20) == (-9 if how == signal.SIGKILL else 130)
    while processes_in(runner.folder):
        assert time.monotonic() < deadline, "workers die with their parent"
        time.sleep(0.05)
    done = {p.name: p.stat().st_mtime_ns for p in folder.glob("both_*.json")}
    assert 2 <= len(done) < 12 and not (folder / "meta.json").exists()
    second = runner.call("data.py", "tokenize", *argv)
    assert second.returncode == 0, second.stderr
    assert f"tokenized {12 - len(done)}/{12 - len(done)} files" in second.stderr
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done, "what was done is not done again"
    calm = {"dir": str(runner.folder / "calm"), "source": source, "tokenizer": "bpe-400", "tokenizer_chars": 100_000, "workers": 1}
    assert contents(folder) == contents(data.prepare(cfg_of(runner, data=calm)))


# -- Hugging Face hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    write_parquet(tmp_path / "on_the_hub", 6, 40)
    server = Hub({p.name: p.read_bytes() for p in sorted((tmp_path / "on_the_hub").glob("*.parquet"))})
    yield server
    server.close()


HF = {"source": "hf://me/text", "shards": 4}
CHOSEN = [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 5)]


@pytest.mark.slow
def test_a_download_broken_off_goes_on_and_gives_the_corpus_of_its_files(runner, hub):
    argv = runner.write({"a": {}}, data=own(runner, **HF))
    cfg = runner.load(argv)
    text = data.source_dir(cfg) / "text"
    with pytest.raises(BadInput, match=r"run data\.py download CONFIG"):
        data.Corpus(cfg)
    runner.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(runner.folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    hub.slow = CHOSEN[2]
    killed = runner.start("data.py", "download", *argv, log="killed")
    deadline = time.monotonic() + 30
    while len(list(text.glob("*.parquet"))) < 3 or hub.slow not in hub.gets:
        assert killed.poll() is None and time.monotonic() < deadline, runner.said("killed")
        time.sleep(0.01)
    killed.kill()
    killed.wait(10)
    with pytest.raises(BadInput, match=f"{CHOSEN[2]} first, are not in .*run data.py download CONFIG"):
        data.Corpus(cfg)

    hub.slow, hub.cut = None, CHOSEN[2]
    again = runner.call("data.py", "prepare", *argv)
    assert again.returncode == 0, again.stderr
    assert "4 of 6 files, 1 to download" in again.stderr and "downloaded 1/1 files" in again.stderr
    asked = len(hub.gets)
    assert sorted(hub.gets) == sorted([*CHOSEN, *[CHOSEN[2]] * 2]), "only the file that was cut off, twice, is asked for again"
    assert {p.name: p.read_bytes() for p in text.glob("*.parquet")} == {name: hub.files[name] for name in CHOSEN}
    assert not list(text.rglob("*.incomplete"))

    idle = runner.call("data.py", "download", *argv)
    assert idle.returncode == 0 and "0 to download" in idle.stderr and len(hub.gets) == asked
    corpus = data.Corpus(cfg)
    expected = {n: [t.encode() for t in pq.read_table(text / n)["text"].to_pylist()] for n in CHOSEN}
    assert held(corpus, "val") == expected[CHOSEN[-1]] and held(corpus, "train") == [d for n in CHOSEN[:-1] for d in expected[n]]


def test_offline_is_one_line_and_exit_code_2(runner):
    argv = runner.write({"a": {}}, data=own(runner, **HF))
    runner.env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(runner.folder / "hf")}
    result = runner.call("data.py", "download", *argv)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "http://127.0.0.1:9 failed" in result.stderr and "check the network, HF_ENDPOINT" in result.stderr


@pytest.mark.parametrize("status, headers, said", [
    (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "the hub answers 401; set HF_TOKEN"),
    (401, {"X-Error-Code": "RepoNotFound"}, "no such dataset, or a private one"),
    (403, {}, "the hub answers 403; set HF_TOKEN"),
    (403, {"X-Error-Code": "GatedRepo"}, "accept its terms"),
    (404, {"X-Error-Code": "RepoNotFound"}, "no such dataset"),
    (404, {"X-Error-Code": "RevisionNotFound"}, "no data.revision=v9"),
])  # fmt: skip
def test_what_the_hub_refuses_is_said_in_one_line(runner, hub, monkeypatch, status, headers, said):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.refusal = status, headers
    with pytest.raises(BadInput, match=said) as caught:
        data.download(cfg_of(runner, data=own(runner, **HF, revision="v9")))
    assert "\n" not in str(caught.value) and not hub.gets


def test_a_download_that_cannot_fit_or_asks_for_too_much_does_not_begin(runner, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    with pytest.raises(BadInput, match=r"data\.shards=7 exceeds the 6 parquet files"):
        data.download(cfg_of(runner, data=own(runner, **HF | {"shards": 7})))
    hub.sizes[CHOSEN[0]] = 10**18
    with pytest.raises(BadInput, match=r"the download needs 1,000,000,000.00 GB, .* free space"):
        data.download(cfg_of(runner, data={"dir": str(runner.folder / "other"), **HF}))
    assert not hub.gets


def test_commands_are_named():
    with pytest.raises(BadInput, match="prepare, download, tokenizer, tokenize"):
        data.main(["upload"])
