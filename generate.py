"""Text from a run's model, or from a folder in Hugging Face's format, printed as it comes.

    python generate.py demo --prompt "def main("               the newest stored state of runs/demo
    python generate.py runs/demo --round 156 --temperature 0   an older one; always the likeliest token
    python generate.py my-model --top-k 20 --seed 7            what export.py, or transformers, has written

Documents begin with the separator <|bos|>: a prompt is read behind one, and the next one ends the text. The same seed
gives the same text.

What the model has read stays as keys and values of each layer, so that a token costs one pass over one token, not over
all. It has seq_len positions: when they are full it reads the newer half of them anew, and goes on.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import config
import sync
from config import BadInput, Parser
from export import Stored, load_folder, load_run, run_folder, separator
from model import GPT, rms_norm, rotate


class Reader:
    """A model and what it has read. past: (L, 2, 1, KV heads, seq_len, D), keys and values, of which the first `num_read` count."""

    def __init__(self, model: GPT):
        s, like = model.shape, model.embed.weight
        self.model, self.num_read = model, 0
        self.past = like.new_zeros(s.depth, 2, 1, s.kv_heads, s.seq_len, s.width // s.heads)

    def read(self, ids: list[int]) -> Tensor:
        """Logits (V,) of the token after these: the first ones, as many as one likes, or one that follows on what was read."""
        m, T = self.model, len(ids)
        now = slice(self.num_read, self.num_read + T)
        cos, sin = m.cos[now], m.sin[now]
        x = x0 = rms_norm(m.embed(torch.tensor([ids], device=m.cos.device)))
        for i, block in enumerate(m.blocks):
            if m.residual is not None:
                x = m.residual[i] * x + m.x0[i] * x0
            a, h = block.attn, rms_norm(x)
            q = rms_norm(rotate(a.q(h).view(1, T, a.heads, a.head_width), cos, sin)).transpose(1, 2)
            k = rms_norm(rotate(a.k(h).view(1, T, a.kv_heads, a.head_width), cos, sin)).transpose(1, 2)
            keys, values = self.past[i]
            keys[:, :, now], values[:, :, now] = k, a.v(h).view(1, T, a.kv_heads, a.head_width).transpose(1, 2)
            keys, values = keys[:, :, : now.stop], values[:, :, : now.stop]
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=T > 1, enable_gqa=a.kv_heads != a.heads)
            x = x + a.proj(y.transpose(1, 2).reshape(1, T, -1))
            x = x + block.mlp(rms_norm(x))
        self.num_read = now.stop
        return m.head(rms_norm(x[0, -1]))


def choose(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """A token drawn from softmax(logits / temperature) among the top_k likeliest; at temperature 0 the likeliest."""
    logits = logits_V.cpu()  # so that a seed means the same on every device
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    return int(torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator))


@torch.inference_mode()
def sample(model: GPT, ids: list[int], temperature: float, top_k: int | None, seed: int) -> Iterator[int]:
    """The tokens that follow on ids, without end."""
    reader, generator, seq_len = Reader(model), torch.Generator().manual_seed(seed), model.shape.seq_len
    text, unread = list(ids), ids[-seq_len:]
    while True:
        if reader.num_read + len(unread) > seq_len:
            reader.num_read, unread = 0, text[-max(1, seq_len // 2) :]
        unread = [choose(reader.read(unread), temperature, top_k, generator)]
        text += unread
        yield unread[0]


def pieces(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as soon as it is certain: a character may take several of them. Together: tokenizer.decode(tokens)."""
    pending = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):  # else perhaps the beginning of a character
            yield text
            pending = []
    yield tokenizer.decode(pending)


def load(name: str, round_: int | None) -> Stored:
    """A run's model by the run's name or folder, or the model of a folder in Hugging Face's format."""
    if (Path(name) / "config.json").is_file():
        if round_ is not None:
            raise BadInput(f"--round {round_}: {name} is no run, it holds one model; leave --round out")
        return load_folder(Path(name))
    return load_run(run_folder(name), round_)[0]


def main(argv: list[str]) -> int:
    parser = Parser(prog="generate.py")
    parser.add_argument("run", metavar="RUN", help="a name in runs/, a run's folder, or a folder in Hugging Face's format")
    parser.add_argument("--prompt", default="", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many new ones")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from so many likeliest tokens; default: from all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, help="default: the newest that is stored")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    for key, least in (("tokens", 1), ("top_k", 1), ("temperature", 0), ("seed", 0)):
        value = getattr(args, key)
        if value is not None and not least <= value < 2**63:
            raise BadInput(f"--{key.replace('_', '-')} {value} must be a number from {least} to 2^63")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU here; take --device cpu")
    shape, theta, tokenizer = load(args.run, args.round)
    model = GPT(shape)
    sync.Flat(model).adopt(model, theta)
    tokens = sample(model.to(args.device), tokenizer.encode(args.prompt).ids, args.temperature, args.top_k, args.seed)
    document = itertools.takewhile(lambda token: token != separator(tokenizer), itertools.islice(tokens, args.tokens))
    print(args.prompt, end="", flush=True)
    for piece in pieces(tokenizer, document):
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    config.command(main, parses=True)
