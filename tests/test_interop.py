"""To Hugging Face's format and back: the same weights, the same logits, the same tokens, the same text."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, examples
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import config
import data
import export
import generate
from config import BadInput
from model import GPT, Shape, shape_of
from sync import StateFolder, digest, zeros
from vault import Vault

PROMPT = "seh naé <|bos|>"
TOKENIZERS = ("bytes", "bpe-300")
shapes = st.builds(
    lambda depth, heads, kv_heads, half, seq_len, vocab, scalars: Shape(
        depth, 2 * half * heads * kv_heads, heads * kv_heads, kv_heads, seq_len, vocab, scalars
    ),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(2, 40), st.booleans(),
)  # fmt: skip


def theta_of(shape: Shape, seed: int = 0) -> torch.Tensor:
    """Random numbers as a model's parameters, its residual scalars neutral."""
    theta = 0.5 * torch.randn(export.layout(shape).numel, generator=torch.Generator().manual_seed(seed))
    for name, part in export.split(shape, theta).items():
        if name in export.NEUTRAL:
            part.fill_(export.NEUTRAL[name])
    return theta


def model_of(shape: Shape, theta: torch.Tensor) -> GPT:
    model = GPT(shape)
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    return model


def stored_run(runner, name: str = "tiny", tokenizer: str = "bytes", rounds=(4, 5), **model):
    """The folder of a run as if it had stored these rounds, and its config."""
    cfg = config.load(runner.write({"a": {}}, run=name, data={"tokenizer": tokenizer}, model=model))
    folder = runner.folder / "runs" / name
    folder.mkdir(parents=True)
    states, shape = StateFolder(folder / "state"), shape_of(cfg.model, data.make_tokenizer(cfg).vocab)
    for round_ in rounds:
        theta = theta_of(shape, round_)
        states.save(round_, theta, zeros(len(theta)), {"run_id": "x", "digest_theta": digest(theta)})
    OmegaConf.save(cfg, folder / "config.yaml")
    return folder, cfg, shape


@examples(20)
@given(shape=shapes, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_exported_comes_back_bit_for_bit(tmp_path_factory, shape, dtype):
    folder, theta = tmp_path_factory.mktemp("hf"), theta_of(shape)
    tensors = {name: tensor.to(dtype) for name, tensor in export.to_hf(shape, theta).items()}
    save_file(tensors, folder / "model.safetensors")
    assert digest(export.from_hf(folder, shape)) == digest(theta.to(dtype).float())


@examples(30)
@given(shape=shapes, seed=st.integers(0, 99), data=st.data())
@torch.inference_mode()
def test_reading_token_by_token_is_the_plain_forward(shape, seed, data):
    model = model_of(shape, 0.5 * torch.randn(export.layout(shape).numel, generator=torch.Generator().manual_seed(seed)))
    ids = data.draw(st.lists(st.integers(0, shape.vocab - 1), min_size=1, max_size=shape.seq_len))
    first = data.draw(st.integers(1, len(ids)))
    reader = generate.Reader(model)
    logits = [reader.read(ids[:first])] + [reader.read([token]) for token in ids[first:]]
    torch.testing.assert_close(torch.stack(logits), model(torch.tensor([ids]))[0, first - 1 :], atol=1e-4, rtol=1e-4)


@examples(15)
@given(shape=shapes, num_prompt=st.integers(1, 20))
def test_past_seq_len_the_newer_half_is_read_anew(shape, num_prompt):
    model = model_of(shape, theta_of(shape))
    text = [i % shape.vocab for i in range(num_prompt)]
    window = text[-shape.seq_len :]
    for token in itertools.islice(generate.sample(model, text, 0.0, None, 0), 3 * shape.seq_len):
        with torch.inference_mode():
            logits = model(torch.tensor([window]))[0, -1]
        assert logits[token] >= logits.max() - 1e-4, "the likeliest, but for rounding"
        text.append(token)
        window = [*window, token] if len(window) < shape.seq_len else text[-max(1, shape.seq_len // 2) :]


@given(seed=st.integers(0, 2**32), temperature=st.floats(0.1, 3.0), top_k=st.integers(1, 60))
@examples(30)
def test_draws_follow_seed_temperature_and_top_k(seed, temperature, top_k):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    drawn = [[generate.choose(logits, temperature, top_k, g) for _ in range(20)]
             for g in (torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed))]  # fmt: skip
    assert drawn[0] == drawn[1], "the same seed, the same tokens"
    assert set(drawn[0]) <= set(logits.topk(min(top_k, 50)).indices.tolist())
    assert generate.choose(logits, 0.0, None, None) == int(logits.argmax())


def test_draws_have_the_softmax_frequencies():
    p, g = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.Generator().manual_seed(0)
    count = torch.bincount(torch.tensor([generate.choose(2.0 * p.log(), 2.0, None, g) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(count / 4000, p, atol=0.03, rtol=0)


@pytest.fixture(scope="module")
def tokenizers(corpus, tmp_path_factory):
    """name -> (data.py's tokenizer, the exported one)."""
    cfg = OmegaConf.structured(config.Config)
    cfg.data.source, cfg.data.dir = str(corpus), str(tmp_path_factory.mktemp("data"))
    made = {}
    for cfg.data.tokenizer in TOKENIZERS:
        made[cfg.data.tokenizer] = data.make_tokenizer(cfg), export.run_tokenizer(cfg)
    return made


@pytest.mark.parametrize("name", TOKENIZERS)
@examples(100)
@given(text=st.text(max_size=40) | st.text("ae <|bos|>\0é€🙂\n", max_size=40))
def test_the_exported_tokenizer_is_the_one_of_training_behind_a_separator(tokenizers, name, text):
    ours, theirs = tokenizers[name]
    ids, kept = theirs.encode(text).ids, text.replace("\0", "") if name == "bytes" else text
    assert ids == [ours.separator, *ours.encode([text])[0].tolist()] and export.separator(theirs) == ours.separator
    assert theirs.decode(ids) == ours.decode(ids) == kept
    pieces = list(generate.pieces(theirs, ids))
    assert "".join(pieces) == kept and ("\ufffd" in text or "\ufffd" not in "".join(pieces)), "no character is torn"


@pytest.mark.parametrize("name", TOKENIZERS)
@examples(100)
@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_pieces_of_any_tokens_are_their_text(tokenizers, name, ids):
    assert "".join(generate.pieces(tokenizers[name][1], ids)) == tokenizers[name][1].decode(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refused(main, *argv) -> str:
    with pytest.raises(BadInput) as error:
        main([str(a) for a in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_export_refuses_what_it_cannot_export(runner, monkeypatch):
    monkeypatch.chdir(runner.folder)
    run, _, _ = stored_run(runner)
    (target := runner.folder / "hf").mkdir()
    (target / "mine").touch()
    assert "'nobody' is no run" in (said := refused(export.main, "nobody", "x")) and "tiny" in said
    assert "is no empty folder; remove it" in refused(export.main, "tiny", target)
    assert "--round 3 is not stored" in (said := refused(export.main, run, "x", "--round", 3)) and "4, 5" in said
    assert "--to" in refused(export.main, "tiny", "x", "--to", "onnx")
    newest = run / "state/round-000005.safetensors"
    whole = newest.read_bytes()
    for broken in (whole[:5000] + b"\1\2\3\4" + whole[5004:], whole[:100], b""):
        newest.write_bytes(broken)
        assert "is damaged" in (said := refused(export.main, "tiny", "x")) and "take --round 4" in said
    assert export.main(["tiny", "older", "--round", "4"]) == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("older").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "whoever may read one of its files may read all"
    (bare := runner.folder / "runs/bare").mkdir()
    (bare / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "has no stored state" in refused(export.main, "bare", "x")
    assert not (runner.folder / "x").exists() and not list(runner.folder.glob("*.tmp*")), "all or nothing"
    done = runner.call("export.py", "nobody", "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("export.py: 'nobody' is no run")


def test_a_tokenizer_that_is_gone_is_named(runner):
    run, cfg, _ = stored_run(runner, tokenizer="bpe-300")
    path = data.tokenizer_path(cfg)
    away = path.rename(path.with_suffix(".away"))
    try:
        assert str(path) in refused(export.main, run, runner.folder / "x")
    finally:
        away.rename(path)


def test_residual_scalars_that_do_something_cannot_be_exported(runner):
    run, _, shape = stored_run(runner, residual_scalars=True)
    assert export.main([str(run), str(runner.folder / "hf")]) == 0, "neutral ones are as if there were none"
    theta = theta_of(shape)
    export.split(shape, theta)["x0"][0] = 0.1
    StateFolder(run / "state").save(6, theta, zeros(len(theta)), {"digest_theta": digest(theta)})
    assert "x0" in (said := refused(export.main, run, runner.folder / "x")) and "residual_scalars=false" in said


def test_generate_refuses_what_makes_no_sense(runner):
    run, _, _ = stored_run(runner)
    assert export.main([str(run), str(runner.folder / "hf")]) == 0
    assert "--temperature -1.0 must be" in refused(generate.main, run, "--temperature", "-1")
    assert "--temperature nan must be" in refused(generate.main, run, "--temperature", "nan")
    assert "--top-k 0 must be" in refused(generate.main, run, "--top-k", 0)
    assert "--tokens 0 must be" in refused(generate.main, run, "--tokens", 0)
    assert "--seed -1 must be" in refused(generate.main, run, "--seed", -1)
    assert "leave --round out" in refused(generate.main, runner.folder / "hf", "--round", 4)
    assert "'nobody' is no run" in refused(generate.main, "nobody")
    changed_json("config.json", num_attention_heads=None)(runner.folder / "hf")
    assert "num_attention_heads=None must be" in refused(generate.main, runner.folder / "hf")


def changed_json(name: str, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def changed_tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def other_tokens(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"a"', '"§"', 1))


DAMAGES = [
    (changed_json("config.json", num_hidden_layers=2), "num_hidden_layers=2, ours is 1; change model.depth"),
    (changed_json("config.json", hidden_size=32), "hidden_size=32, ours is 16; change model.width"),
    (changed_json("config.json", num_attention_heads=4), "num_attention_heads=4, ours is 2; change model.heads"),
    (changed_json("config.json", num_key_value_heads=2), "num_key_value_heads=2, ours is 1; change model.kv_heads"),
    (changed_json("config.json", vocab_size=257), "vocab_size=257, ours is 256; change data.tokenizer"),
    (changed_json("config.json", model_type="llama"), "model_type='llama', ours is 'nanochat'"),
    (changed_json("config.json", final_logit_softcapping=None), "final_logit_softcapping=None, ours is 15.0"),
    (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors cannot be read"),
    (changed_tensors(lambda t: t.pop("lm_head.weight")), "lacks tensor lm_head.weight"),
    (changed_tensors(lambda t: t.update(extra=torch.ones(1))), "has an unknown tensor extra"),
    (changed_tensors(lambda t: t.update({"lm_head.weight": torch.ones(255, 16)})), "[255, 16], config.json means [256, 16]"),
    (changed_tensors(lambda t: t["lm_head.weight"][3].fill_(torch.nan)), "lm_head.weight holds numbers that are not finite"),
    (other_tokens, "has other tokens than data.tokenizer=bytes; set data.tokenizer="),
]  # fmt: skip


def test_another_model_is_no_theta_0(runner):
    run, _, shape = stored_run(runner)
    assert export.main([str(run), str(runner.folder / "whole")]) == 0
    folder = runner.folder / "hf"
    vault = Vault(config.load(runner.write({"a": {}}, model={"init": str(folder)})), runner.folder / "vault")
    for change, said in [(lambda folder: None, ""), *DAMAGES]:
        shutil.copytree(runner.folder / "whole", folder)
        change(folder)
        if said:
            with pytest.raises(BadInput) as error:
                vault.genesis(shape, "x")
            assert said in str(error.value) and "\n" not in str(error.value)
        else:
            vault.genesis(shape, "x")
            assert vault.digests[0][0] == digest(theta_of(shape, 5)), "undamaged, it is theta_0"
        shutil.rmtree(folder)


def test_more_positions_than_the_folder_knows_are_fine(runner):
    run, _, shape = stored_run(runner)
    assert export.main([str(run), str(runner.folder / "hf")]) == 0
    cfg = config.load(runner.write({"a": {}}, model={"init": str(runner.folder / "hf"), "seq_len": 64}))
    assert digest(export.initial_theta(cfg, shape_of(cfg.model, 256))) == digest(theta_of(shape, 5))


# ---------------------------------------------------------------------------------------------------------------------
# With transformers, and as theta_0 of a run


@pytest.mark.slow
def test_transformers_computes_what_we_compute_and_a_run_starts_from_it(runner, monkeypatch, capsys):
    """Two real runs, one a tokenizer, exported; all of transformers' answers come from one process."""

    def text(*argv: str) -> str:
        capsys.readouterr()
        assert generate.main([*argv, "--prompt", PROMPT, "--tokens", "32"]) == 0
        return capsys.readouterr().out

    monkeypatch.chdir(runner.folder)
    for name in TOKENIZERS:
        argv = runner.write({"a": {}}, run=name, data={"tokenizer": name}, model={"depth": 2, "seq_len": 64}, budget={"tokens": 128 * 10})
        assert runner.run(argv, ["a"]) == 0
        assert export.main([name, f"hf-{name}", "--to", "hf"]) == 0
        assert f"| training tokens | {128 * 10:,} |" in (runner.folder / f"hf-{name}/README.md").read_text()
    folders = [f"hf-{name}" for name in TOKENIZERS]
    environment = [sys.executable, REPO / "bench/environments.py", "transformers"]
    python = subprocess.run(environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip() + "/python"
    env = runner.env | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(runner.folder)}
    subprocess.run([python, "-P", REPO / "bench/in_transformers.py", PROMPT, *folders], cwd=runner.folder, env=env, check=True, timeout=300)
    results = json.loads((runner.folder / "results.json").read_text())
    for name, folder in zip(TOKENIZERS, folders):
        shape, theta, tokenizer = generate.load(str(runner.folder / "runs" / name), None)
        theirs, ids, model = results[folder], tokenizer.encode(PROMPT).ids, model_of(shape, theta)
        assert theirs["class"] == "NanoChatForCausalLM" and theirs["ids"] == ids and theirs["prompt"] == PROMPT
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(theirs["logits"]), model(torch.tensor([ids]))[0], atol=1e-4, rtol=0)
        greedy = list(itertools.islice(generate.sample(model, ids, 0.0, None, 0), 32))
        assert greedy[: len(theirs["tokens"])] == theirs["tokens"]
        assert len(theirs["tokens"]) == 32 or theirs["tokens"][-1] == ids[0], "or up to the end of the document"
        for source in (name, folder, f"{folder}-saved"):
            assert text(source, "--temperature", "0") == theirs["text"] + "\n"
        assert len({text(name, "--seed", seed) for seed in ("1", "1", "2")}) == 2, "a text for each seed"
        saved = export.load_folder(runner.folder / f"{folder}-saved")
        assert digest(saved.theta) == digest(theta) and len(list((runner.folder / f"{folder}-saved").glob("*.safetensors"))) > 1
    again = runner.write({"a": {}}, run="again", data={"tokenizer": "hf-bpe-300/tokenizer.json"}, budget={"tokens": 128 * 10},
                         model={"depth": 2, "seq_len": 64, "init": "hf-bpe-300-saved"})  # fmt: skip
    assert runner.run(again, ["a"]) == 0
    assert runner.journal("again")[0]["digest"] == digest(runner.theta("bpe-300")) != runner.journal("bpe-300")[0]["digest"]
    wrong = runner.call("coordinator.py", *again, "run=wrong", "model.depth=3")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "num_hidden_layers=2, ours is 3" in wrong.stderr
