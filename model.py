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

Full speed without other kernels than PyTorch's own: the loss goes over the tokens in chunks and never holds all logits;
what a step does between its matrix products has its gradient written out by hand, in few passes over memory;
`compile_` fuses the rest. In fp32, or in bfloat16 under torch.autocast, where the residual stream is bfloat16 too.

Letters: B batch, T sequence, N tokens (B x T), C width, H heads, D head width, V vocabulary.
Knows nothing of sites, rounds or files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

LOGIT_CAP = 15.0
ROTARY_BASE = 10_000.0
NORM_EPS = torch.finfo(torch.float32).eps  # F.rms_norm's in fp32, kept in bfloat16, whose own would be 0.008
# Logits held at a time. On a GPU 8,192 tokens of a vocabulary of 65,536 keep it busy; a CPU's come to 4 MB and stay in its cache.
GPU_CHUNK, CPU_CHUNK, MIN_CHUNK_TOKENS = 1 << 29, 1 << 20, 128

SHORT, BLOCK = 512, 128  # up to so many positions all probabilities of a batch may be kept; queries at a time


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


class RMSNorm(Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in fp32. Keeps its result, which the next layer keeps anyway, and not x.

    What is bfloat16 is made fp32 before it meets an fp32 tensor: on a CPU an operation on two types takes three times as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.size(-1) + NORM_EPS) + 0 * norm  # an overflow must end as NaN, not as zeros
        y = wide * scale if wide is x else wide.mul_(scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (y, scale), wide = ctx.saved_tensors, dy.float()
        y = y.float()
        along = (wide * y).mean(-1, keepdim=True)
        return torch.addcmul(wide, y, along, value=-1).mul_(scale).to(dy.dtype)


rms_norm = RMSNorm.apply


def rotary_tables(seq_len: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos, and sin with the sign of its half, each (T, 1, D), fp32; made on the CPU: on the meta device, where parameters are only
    counted, arange imports torch._dynamo, which costs the coordinator 70 MiB and 2 s."""
    inv_freq = ROTARY_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32, device="cpu"), inv_freq)[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


class Rotate(Function):
    """Each pair (x[i], x[i + D/2]) turned by its position's angle; the gradient is turned back."""

    @staticmethod
    def forward(ctx, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x_BTHD * cos).addcmul_(x_BTHD.roll(x_BTHD.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (dy * cos).addcmul_(dy.roll(dy.size(-1) // 2, -1), sin, value=-1), None, None


rotate = Rotate.apply


class SquaredReLU(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (dy * x).mul_(2)


class ShortAttention(Function):
    """Causal attention over (B, H, T, D) that keeps its probabilities, BLOCK queries at a time with the keys before them. Quicker than
    PyTorch's where that has no kernel of its own, in bfloat16 on CPUs: more than twice at T = 256, most of it backward."""

    @staticmethod
    def forward(ctx, *qkv: Tensor) -> Tensor:
        (B, H, T, D), (q, k, v) = qkv[0].shape, (x.flatten(0, 1) for x in qkv)
        later = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        y, kept = torch.empty_like(q), []
        for a in range(0, T, BLOCK):
            b = min(a + BLOCK, T)
            kept.append(torch.baddbmm(later[a:b, :b], q[:, a:b], k[:, :b].mT, alpha=D**-0.5).softmax(-1))
            y[:, a:b] = kept[-1] @ v[:, :b]
        ctx.save_for_backward(q, k, v, *kept)
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *kept = ctx.saved_tensors
        d, scale, dq, dk, dv = dy.flatten(0, 1), dy.size(-1) ** -0.5, torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for a, p in zip(range(0, q.size(1), BLOCK), kept):
            b = a + p.size(1)
            ds = torch._softmax_backward_data(d[:, a:b] @ v[:, :b].mT, p, -1, p.dtype).mul_(scale)
            dq[:, a:b] = ds @ k[:, :b]
            dk[:, :b] += ds.mT @ q[:, a:b]
            dv[:, :b] += p.mT @ d[:, a:b]
        return tuple(x.view(dy.shape) for x in (dq, dk, dv))


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
        q, k, v, grouped = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.kv_heads != self.heads
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT and not grouped and not torch.compiler.is_compiling():
            y = ShortAttention.apply(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.fc = nn.Linear(s.width, 4 * s.width, bias=False)
        self.proj = nn.Linear(4 * s.width, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(SquaredReLU.apply(self.fc(x)))


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.attn, self.mlp = Attention(s), MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(rms_norm(x), cos, sin)
        return x + self.mlp(rms_norm(x))


def chunk_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of a chunk of tokens, (N,) fp32, and with `gradient` its derivative by the logits before the cap, (N, V) fp32."""
    tanh = (x_NC @ w_VC.t()).float().div_(LOGIT_CAP).tanh_()
    log_p = torch.log_softmax(LOGIT_CAP * tanh, dim=-1)
    of_target = log_p.gather(1, targets_N[:, None])
    if not gradient:
        return -of_target[:, 0], None
    d = log_p.exp_().scatter_(1, targets_N[:, None], of_target.expm1())  # p, and p - 1 for the target
    return -of_target[:, 0], d.addcmul_(d * tanh, tanh, value=-1)


class MeanLoss(Function):
    """Mean of `chunk_loss` over all tokens. The gradients are made at once, chunk by chunk while its logits are there, so that
    nothing is computed twice and backward only scales them (Liger's fused linear cross-entropy, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx, x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, size: int, kernel) -> Tensor:
        w, loss = w_VC.to(x_NC.dtype), torch.zeros((), device=x_NC.device)
        dx, dw = torch.empty_like(x_NC), torch.zeros_like(w_VC, dtype=torch.float32)
        for x, targets, dx_chunk in zip(x_NC.split(size), targets_N.split(size), dx.split(size)):
            losses, d = kernel(x, w, targets, True)
            loss += losses.sum()
            d = d.div_(len(x_NC)).to(x.dtype)
            torch.mm(d, w, out=dx_chunk)
            dw.addmm_(d.t(), x) if x.dtype == dw.dtype else dw.add_(d.t() @ x)
        ctx.save_for_backward(dx, dw.to(w_VC.dtype))
        return loss / len(x_NC)

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return dx * d_loss, dw * d_loss, None, None, None


class Head(nn.Linear):
    """Width to vocabulary, and the loss on it."""

    def __init__(self, s: Shape):
        super().__init__(s.width, s.vocab, bias=False)
        self.kernel = chunk_loss  # or compiled

    def forward(self, x_BTC: Tensor, targets_BT: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """See GPT.forward."""
        if targets_BT is None:
            return LOGIT_CAP * torch.tanh(super().forward(x_BTC).float() / LOGIT_CAP)
        x, targets = x_BTC.flatten(0, 1), targets_BT.flatten()
        size = max(MIN_CHUNK_TOKENS, (CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK) // self.out_features)
        if torch.is_grad_enabled() and reduction == "mean":
            return MeanLoss.apply(x, self.weight, targets, size, self.kernel)
        with torch.no_grad():
            w = self.weight.to(x.dtype)
            losses = torch.cat([self.kernel(a, w, b, False)[0] for a, b in zip(x.split(size), targets.split(size))])
        return losses.mean() if reduction == "mean" else losses.view_as(targets_BT)


class GPT(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        self.checkpointing = False  # recompute each block in the backward pass, instead of keeping what it computed
        # Drawn by init_weights: a draw of nn.Embedding's own would import torch._dynamo on the meta device.
        self.embed = nn.Embedding.from_pretrained(torch.empty(s.vocab, s.width), freeze=False)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.depth))
        self.head = Head(s)
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

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V) in fp32; with targets the mean cross-entropy in nats per token; with reduction="none" each token's,
        (B, T) fp32, for evaluation: it carries no gradient."""
        T, kind = ids_BT.size(1), ids_BT.device.type
        x = rms_norm(self.embed(ids_BT))
        x = x0 = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        for i, block in enumerate(self.blocks):
            if self.residual is not None:
                x = self.residual[i] * x + self.x0[i] * x0
            if self.checkpointing:
                x = checkpoint(block, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin)
        return self.head(rms_norm(x), targets_BT, reduction)


def compile_(model: GPT) -> None:
    """torch.compile in place: the blocks, which share one compilation, and the head's chunk kernel. Parameters, their names and
    the hooks around a block stay as they are; call it before DDP or fully_shard, so that theirs stay outside what is compiled."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
    model.head.kernel = torch.compile(model.head.kernel, fullgraph=True)


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(s: Shape) -> int:
    """Training FLOPs per token, nanochat's count: 6 (N - embedding - scalars) + 12 L C T."""
    head_width = s.width // s.heads
    matrices = s.depth * (2 * s.width * s.width + 2 * s.width * s.kv_heads * head_width + 8 * s.width * s.width)
    return 6 * (matrices + s.width * s.vocab) + 12 * s.depth * s.width * s.seq_len
