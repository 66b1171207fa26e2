"""The model: nanochat's base transformer, from its public description, in one file.

What is in it:
- rotary position embeddings, no learned positions
- RMSNorm without weights, also right after the embedding and on queries and keys
- relu^2 MLP, no biases anywhere
- untied input and output embeddings, logits capped softly at +-15
- grouped-query attention when kv_heads < heads
- per-layer residual and x0 scalars by switch (`residual_scalars`)

`depth` fixes the shape unless told otherwise: width 64 x depth, one head per 128 of width. d20 with a
vocabulary of 65,536 has 560,988,160 parameters (560,988,200 with the scalars), as in arXiv:2602.22760.

Letters: B batch, T sequence, C width, H heads, D head width, V vocabulary.
Knows nothing of sites, rounds or files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_CAP = 15.0
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Shape:
    """Everything that fixes a model's parameters. See `shape_of` for the defaults that depth implies."""

    depth: int
    width: int
    heads: int
    kv_heads: int
    seq_len: int
    vocab: int
    residual_scalars: bool = False


def shape_of(model, vocab: int) -> Shape:
    """The shape a config's `model` section means; raises ValueError when the numbers do not fit together."""
    width = model.width or 64 * model.depth
    heads = model.heads or max(1, width // 128)
    kv_heads = model.kv_heads or heads
    if width % heads or (width // heads) % 2:
        raise ValueError(f"model.width={width} must be an even multiple of model.heads={heads}")
    if heads % kv_heads:
        raise ValueError(f"model.kv_heads={kv_heads} must divide model.heads={heads}")
    return Shape(model.depth, width, heads, kv_heads, model.seq_len, vocab, model.residual_scalars)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(seq_len: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, 1, D/2), fp32."""
    inv_freq = ROTARY_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), inv_freq)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = s.heads, s.kv_heads, s.width // s.heads
        self.q = nn.Linear(s.width, s.heads * self.head_width, bias=False)
        self.k = nn.Linear(s.width, s.kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(s.width, s.kv_heads * self.head_width, bias=False)
        self.proj = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q = self.q(x_BTC).view(B, T, self.heads, self.head_width)
        k = self.k(x_BTC).view(B, T, self.kv_heads, self.head_width)
        v = self.v(x_BTC).view(B, T, self.kv_heads, self.head_width)
        q, k = rms_norm(rotate(q, cos, sin)), rms_norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.kv_heads != self.heads
        )
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.fc = nn.Linear(s.width, 4 * s.width, bias=False)
        self.proj = nn.Linear(4 * s.width, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.attn, self.mlp = Attention(s), MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(rms_norm(x), cos, sin)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        self.embed = nn.Embedding(s.vocab, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.depth))
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        self.residual = nn.Parameter(torch.ones(s.depth)) if s.residual_scalars else None
        self.x0 = nn.Parameter(torch.zeros(s.depth)) if s.residual_scalars else None
        cos, sin = rotary_tables(s.seq_len, s.width // s.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "GPT":
        """theta_0: a function of the shape and the seed alone (on CPU, fp32). nanochat's initialisation."""
        g = torch.Generator().manual_seed(seed)
        bound = (3.0 / self.shape.width) ** 0.5
        self.embed.weight.normal_(0.0, 1.0, generator=g)
        self.head.weight.normal_(0.0, 0.001, generator=g)
        for block in self.blocks:
            for layer in (block.attn.q, block.attn.k, block.attn.v, block.mlp.fc):
                layer.weight.uniform_(-bound, bound, generator=g)
            block.attn.proj.weight.zero_()
            block.mlp.proj.weight.zero_()
        return self

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per token when targets are given, else logits (B, T, V) in fp32."""
        T = ids_BT.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        x = x0 = rms_norm(self.embed(ids_BT))
        for i, block in enumerate(self.blocks):
            if self.residual is not None:
                x = self.residual[i] * x + self.x0[i] * x0
            x = block(x, cos, sin)
        logits = self.head(rms_norm(x)).float()
        logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        if targets_BT is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(s: Shape) -> int:
    """Training FLOPs per token, nanochat's count: 6 (N - embedding - scalars) + 12 L C T."""
    head_width = s.width // s.heads
    matrices = s.depth * (2 * s.width * s.width + 2 * s.width * s.kv_heads * head_width + 8 * s.width * s.width)
    return 6 * (matrices + s.width * s.vocab) + 12 * s.depth * s.width * s.seq_len
