"""A run's model in Hugging Face's format and back: what transformers loads as NanoChatForCausalLM, and theta_0 from it.

    python export.py demo my-model --to hf                    the newest stored state of runs/demo
    python export.py runs/demo my-model --round 156           an older one that is still stored
    python export.py demo my-model --dtype bfloat16           half the size, weights rounded

    AutoModelForCausalLM.from_pretrained("my-model")          in transformers 5, without code of ours

DIR gets config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and a model card,
all at once or not at all. It needs the state, the run's config.yaml and its tokenizer, no corpus and no coordinator; a run
may go on meanwhile.

The way back: `model.init: DIR` makes the coordinator start from DIR's weights instead of the seed (vault.py), and
generate.py reads such a folder, too. Both want the very model of model.py; whatever differs is named.

`hf_names` and `FIELDS` are the only places that know how the two name things.
"""

import json
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import config
import data
import sync
from config import BadInput, Parser
from model import GPT, LOGIT_CAP, NORM_EPS, ROTARY_BASE, Shape, shape_of

FIELDS = {
    "depth": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size", "seq_len": "max_position_embeddings",
}  # fmt: skip
NEUTRAL = {"residual": 1.0, "x0": 0.0}  # the per-layer scalars, which transformers' model lacks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Stored(NamedTuple):
    """A model and all that is needed to run it. theta: flat fp32, as sync.Flat orders it; tokenizer: of the `tokenizers` library."""

    shape: Shape
    theta: Tensor
    tokenizer: object


# ---------------------------------------------------------------------------------------------------------------------
# Our names and theirs


def hf_names(depth: int) -> dict[str, str]:
    """Our parameter's name -> transformers' (NanoChatForCausalLM), all but the residual scalars."""
    layer = {
        "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.proj": "self_attn.o_proj",
        "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2",
    }  # fmt: skip
    blocks = {f"blocks.{i}.{our}.weight": f"model.layers.{i}.{their}.weight" for i in range(depth) for our, their in layer.items()}
    return {"embed.weight": "model.embed_tokens.weight"} | blocks | {"head.weight": "lm_head.weight"}


def must_agree(s: Shape) -> dict:
    """The keys of their config.json that fix what is computed. Of positions any number will do: rotation has no parameters."""
    return {their: getattr(s, our) for our, their in FIELDS.items() if our != "seq_len"} | {
        "model_type": "nanochat", "intermediate_size": 4 * s.width, "hidden_act": "relu2", "attention_bias": False,
        "tie_word_embeddings": False, "final_logit_softcapping": LOGIT_CAP,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(ROTARY_BASE)},
    }  # fmt: skip


def layout(shape: Shape) -> sync.Flat:
    with torch.device("meta"):
        return sync.Flat(GPT(shape))


def split(shape: Shape, theta: Tensor) -> dict[str, Tensor]:
    """Views of flat theta by our names."""
    items = layout(shape).items
    parts = theta.split([n for _, _, n in items])
    return {name: part.view(size) for (name, size, _), part in zip(items, parts)}


def to_hf(shape: Shape, theta: Tensor) -> dict[str, Tensor]:
    """Views of flat theta by their names. Raises BadInput if the residual scalars do anything."""
    tensors = split(shape, theta)
    for name, neutral in NEUTRAL.items():
        if name in tensors and not bool((tensors[name] == neutral).all()):
            raise BadInput(f"the model's {name} scalars are {tensors[name].tolist()}, transformers' NanoChat has none (as if all were "
                           f"{neutral:g}); train with model.residual_scalars=false to export")  # fmt: skip
    return {their: tensors[our] for our, their in hf_names(shape.depth).items()}


def from_hf(folder: Path, shape: Shape) -> Tensor:
    """Flat fp32 theta of a folder's model.safetensors, whole or in shards with an index. Raises BadInput for a tensor that is
    missing, unknown, of another shape or not finite."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and not whole.is_file():
        file_of = read_json(index).get("weight_map", {})
    else:
        with opened(whole) as file:
            file_of = dict.fromkeys(file.keys(), whole.name)
    names = hf_names(shape.depth)
    for tensors, other in ((set(names.values()) - set(file_of), "lacks"), (set(file_of) - set(names.values()), "has an unknown")):
        if tensors:
            raise BadInput(f"{folder}: {other} tensor {min(tensors)}; it must have the {len(names)} of a NanoChat of depth {shape.depth}")
    theta = torch.empty(layout(shape).numel)
    for name, tensor in split(shape, theta).items():
        if name in NEUTRAL:
            tensor.fill_(NEUTRAL[name])
            continue
        their = names[name]
        with opened(folder / file_of[their]) as file:
            found = file.get_tensor(their)
        if found.shape != tensor.shape:
            raise BadInput(f"{folder}: {their} is {list(found.shape)}, config.json means {list(tensor.shape)}; fetch or export it again")
        tensor.copy_(found)
        if not sync.all_finite(tensor.reshape(-1)):
            raise BadInput(f"{folder}: {their} holds numbers that are not finite; take a model that learnt")
    return theta


@contextmanager
def opened(path: Path):
    """A safetensors file. Raises BadInput, also for what goes wrong while it is read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({str(error).splitlines()[0]}); fetch or export it again") from None


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path} cannot be read ({error}); give a folder in Hugging Face's format, such as export.py writes") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def bytes_tokenizer():
    """`bytes` as a byte-level BPE without merges: a token is a byte, and 0, which data.py takes out of texts, is the separator."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # printable bytes stand for themselves, the others follow in order
    others = (c for c in alphabet if ord(c) > 255)
    letters = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate([data.SEPARATOR, *letters[1:]])}, merges=[]))
    tokenizer.add_special_tokens([data.SEPARATOR])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_of(path: Path | None):
    """The `tokenizers` library's tokenizer of a tokenizer.json, or of `bytes` (None). It gives data.py's ids, behind the separator
    that every document starts with."""
    from tokenizers import Tokenizer, processors

    separator_id = data.open_tokenizer(path).separator  # and refuses what training would refuse
    tokenizer = bytes_tokenizer() if path is None else Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # as in training: a text that spells <|bos|> does not end there
    bos = tokenizer.id_to_token(separator_id)
    tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, separator_id)])
    return tokenizer


def separator(tokenizer) -> int:
    return tokenizer.encode("").ids[0]


def vocabulary(tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def run_tokenizer(cfg):
    """A run's tokenizer, which is never trained here."""
    path = data.tokenizer_path(cfg)
    if path is not None and not path.is_file():
        raise BadInput(f"data.tokenizer={cfg.data.tokenizer}: {path} does not exist; start this in the folder the run was started in, or "
                       "copy it from where data.py made it")  # fmt: skip
    return tokenizer_of(path)


# ---------------------------------------------------------------------------------------------------------------------
# What there is to load


def run_folder(name: str) -> Path:
    for folder in (Path("runs") / name, Path(name)):
        if (folder / "config.yaml").is_file():
            return folder
    known = ", ".join(sorted(path.parent.name for path in Path("runs").glob("*/config.yaml")))
    raise BadInput(f"{name!r} is no run: neither runs/{name} nor {name} has a config.yaml; runs here: {known or 'none'}")


def stored_theta(run: Path, round_: int | None) -> tuple[int, Tensor]:
    """(round, theta) of the newest stored state, or of this round's, checked by its digest. Only reads: the run may be alive."""
    files = {int(path.stem.removeprefix("round-")): path for path in sorted((run / "state").glob("round-*.safetensors"))}
    if not files:
        raise BadInput(f"{run}/state has no stored state; start the run's coordinator first")
    if round_ not in (None, *files):
        raise BadInput(f"--round {round_} is not stored; {run}/state has {', '.join(map(str, files))}")
    round_ = max(files) if round_ is None else round_
    try:
        with safe_open(files[round_], framework="pt") as file:
            theta, digest = file.get_tensor("theta"), (file.metadata() or {}).get("digest_theta")
        why = "" if sync.digest(theta) == digest else f"theta has digest {sync.digest(theta)[:12]}, not {str(digest)[:12]}"
    except (OSError, SafetensorError) as error:
        why = str(error).splitlines()[0]
    if why:
        others = " or ".join(f"--round {r}" for r in files if r != round_)
        raise BadInput(f"{files[round_]} is damaged ({why}); {f'take {others}' if others else 'no other round is stored'}")
    return round_, theta


def load_run(run: Path, round_: int | None = None) -> tuple[Stored, int, config.Config]:
    """A run's stored model, of which round, and the run's config."""
    cfg = config.load([str(run / "config.yaml")])
    tokenizer = run_tokenizer(cfg)
    shape = shape_of(cfg.model, vocabulary(tokenizer))
    round_, theta = stored_theta(run, round_)
    if theta.numel() != (numel := layout(shape).numel):
        raise BadInput(f"{run}: the state has {theta.numel():,} parameters, config.yaml with {shape.vocab} tokens means {numel:,}; "
                       "put the tokenizer back that the run was started with")  # fmt: skip
    return Stored(shape, theta, tokenizer), round_, cfg


def load_folder(folder: Path) -> Stored:
    """The model of a folder in Hugging Face's format."""
    there = read_json(folder / "config.json")
    for their in FIELDS.values():
        if not (isinstance(there.get(their), int) and there[their] > 0):
            raise BadInput(f"{folder}/config.json: {their}={there.get(their)!r} must be a number > 0; give the folder of a NanoChat model")
    shape = Shape(**{our: there[their] for our, their in FIELDS.items()})
    agree(folder, there, shape)
    return Stored(shape, from_hf(folder, shape), tokenizer_of(folder / "tokenizer.json"))


def agree(folder: Path, there: dict, shape: Shape) -> None:
    """Raises BadInput for a config.json that means another model than this shape's."""
    keys = {"vocab_size": "data.tokenizer"} | {their: f"model.{our}" for our, their in FIELDS.items() if our != "vocab"}
    for key, value in must_agree(shape).items():
        if there.get(key) != value:
            raise BadInput(f"{folder}/config.json: {key}={there.get(key)!r}, ours is {value!r}; "
                           f"{f'change {keys[key]}' if key in keys else 'model.py computes nothing else'}")  # fmt: skip


def initial_theta(cfg, shape: Shape) -> Tensor:
    """theta_0 from the folder model.init, relative to where the coordinator was started. Raises BadInput unless its model has this
    shape and, where the folder says how it reads text, the same tokens."""
    folder = Path(cfg.model.init)
    agree(folder, read_json(folder / "config.json"), shape)
    path = folder / "tokenizer.json"
    if path.is_file() and tokenizer_of(path).get_vocab() != run_tokenizer(cfg).get_vocab():
        raise BadInput(f"{path} has other tokens than data.tokenizer={cfg.data.tokenizer}; set data.tokenizer={path}")
    return from_hf(folder, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_folder(folder: Path, stored: Stored, dtype: str, card: str) -> None:
    """All files of a model, in fp32 or bfloat16."""
    s, tokenizer, bos = stored.shape, stored.tokenizer, separator(stored.tokenizer)
    tensors = {name: t.to(DTYPES[dtype]) for name, t in to_hf(s, stored.theta).items()}
    sync.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # safetensors' own writer lets nobody else read it
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token_id": bos, "eos_token_id": bos}  # what begins the next document ends this one
    write_json = partial(json.dumps, indent=2)
    (folder / "config.json").write_text(write_json(must_agree(s) | tokens | {
        "architectures": ["NanoChatForCausalLM"], "dtype": dtype, FIELDS["seq_len"]: s.seq_len, "pad_token_id": None,
        "rms_norm_eps": NORM_EPS,
    }))  # fmt: skip
    (folder / "generation_config.json").write_text(write_json(tokens | {"pad_token_id": bos}))
    (folder / "tokenizer_config.json").write_text(write_json({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.id_to_token(bos), "eos_token": tokenizer.id_to_token(bos),
        "model_max_length": s.seq_len, "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells <|bos|> is text
    }))  # fmt: skip
    (folder / "README.md").write_text(card)


def model_card(stored: Stored, round_: int, run: Path, cfg) -> str:
    s, path = stored.shape, run / "summary.json"
    lines = [f"These weights are those of round {round_}."]
    if path.is_file():
        total = json.loads(path.read_text())
        loss = "not measured" if total["val_loss"] is None else f"{total['val_loss']:.4f} nats/token, {total['val_bpb']:.4f} bits/byte"
        lines += [
            "", f"| the run, over its {total['rounds']} rounds | |", "| --- | ---: |", f"| training tokens | {total['tokens']:,} |",
            f"| validation loss | {loss} |", f"| energy | {total['energy_kwh']:.4g} kWh |",
            f"| emissions | {total['emissions_kg']:.4g} kgCO2 |",
            *([] if total.get("cost") is None else [f"| cost of the energy | {total['cost']:.4g} {total['currency']} |"]), "",
            f"Energy and emissions are as the run accounted them ({cfg.clock.mode} clock, carbon trace `{Path(cfg.carbon.trace).name}`).",
        ]  # fmt: skip
    else:
        lines.append("The run had not ended when they were exported.")
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {cfg.run}", "",
        f"A base language model of {stored.theta.numel():,} parameters (nanochat's architecture: depth {s.depth}, width {s.width}, "
        f"{s.heads} heads, {s.kv_heads} KV heads, {s.seq_len} tokens of context, vocabulary {s.vocab}), pretrained with Curtail. "
        f"Sites: {', '.join(cfg.sites)}; policy: {cfg.policy.name}.", "", *lines, "",
        f"Trained on `{cfg.data.source}`, tokenizer `{cfg.data.tokenizer}`. The licence of that text, and so of this model, is for whoever "
        "publishes it to state here.", "",
    ])  # fmt: skip


def main(argv: list[str]) -> int:
    parser = Parser(prog="export.py")
    parser.add_argument("run", metavar="RUN", help="a name in runs/, or a run's folder")
    parser.add_argument("dir", metavar="DIR", type=Path, help="does not exist yet, or is empty")
    parser.add_argument("--to", choices=["hf"], default="hf", help="the format")
    parser.add_argument("--round", type=int, help="default: the newest that is stored")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    args = parser.parse_args(argv)
    folder, run = args.dir, run_folder(args.run)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is no empty folder; remove it or name another")
    stored, round_, cfg = load_run(run, args.round)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.tmp-") as tmp:
            made = Path(tmp) / "model"
            made.mkdir()
            write_folder(made, stored, args.dtype, model_card(stored, round_, run, cfg))
            made.rename(folder)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{folder} cannot be written ({error}); name another folder or make room") from None
    print(f"{folder}: round {round_} of {cfg.run}, {stored.theta.numel():,} parameters in {args.dtype}")
    return 0


if __name__ == "__main__":
    config.command(main, parses=True)
