"""How an average looks on the wire: fp32, bf16, or int8 with a scale per block.

    format = FORMATS["int8"]
    format.encode(values, data, scratch)    fp32 elements -> bytes, into `data`; scratch: as large as values
    format.decode(data, values)             and back: the same bits on every host

A vector travels in chunks, a chunk in blocks of BLOCK elements (the last one padded with zeros), so that any range of
blocks is a message of its own: members of a ring cut a chunk into one range of blocks each. What is agreed on, hashed,
stored and sent again later are these bytes; everyone decodes them alike.

int8 takes the largest magnitude of a block as 127. What a lossy format leaves out is not lost: `sync.py` adds it to the
next average (error feedback, as in arXiv:1809.07599 and 1901.09847). All tensors are contiguous CPU tensors.
"""

import torch
from torch import Tensor

BLOCK = 512  # elements that share a scale
WIRE_SHARE = 0.01  # `auto`: the most exact format that keeps the wire busy for at most this share of a round's training time


class Cast:
    """Each element in another floating-point type."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.name, self.dtype, self.lossy, self.block_bytes = name, dtype, dtype != torch.float32, dtype.itemsize * BLOCK

    def encode(self, values: Tensor, data: Tensor, scratch: Tensor) -> None:
        data.view(self.dtype).copy_(values)

    def decode(self, data: Tensor, values: Tensor) -> None:
        values.copy_(data.view(self.dtype))


class INT8:
    """A block: its scale as fp32 (magnitude / 127), then one int8 per element."""

    name, lossy, block_bytes = "int8", True, 4 + BLOCK

    def encode(self, values: Tensor, data: Tensor, scratch: Tensor) -> None:
        blocks, rows, scratch = data.view(-1, self.block_bytes), values.view(-1, BLOCK), scratch.view(-1, BLOCK)
        scales = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_()).abs_().div_(127.0)  # never -0.0
        blocks[:, :4].view(torch.float32).copy_(scales)
        inverse = scales.reciprocal_().nan_to_num_(0.0, 0.0, 0.0)  # a block of zeros, or of numbers too small to count
        blocks[:, 4:].view(torch.int8).copy_(torch.mul(rows, inverse, out=scratch).round_())

    def decode(self, data: Tensor, values: Tensor) -> None:
        blocks = data.view(-1, self.block_bytes)
        values.view(-1, BLOCK).copy_(blocks[:, 4:].view(torch.int8)).mul_(blocks[:, :4].view(torch.float32))


FORMATS = {f.name: f for f in (Cast("fp32", torch.float32), Cast("bf16", torch.bfloat16), INT8())}  # from exact to small


def num_bytes(wire: str, numel: int) -> int:
    """Bytes of `numel` elements on the wire."""
    return -(-numel // BLOCK) * FORMATS[wire].block_bytes


def choose(numel: int, bytes_per_s: float, train_s: float, took_s: dict[str, float] | None = None) -> str:
    """What `auto` means for a model of `numel` parameters in rounds of `train_s`: formats already tried are judged by the seconds
    an average took in them, others by a link of `bytes_per_s`."""
    for name in FORMATS:
        if (took_s or {}).get(name, num_bytes(name, numel) / bytes_per_s) <= WIRE_SHARE * train_s:
            return name
    return name


def add_up(wire: str, parts: list[Tensor], out: Tensor, scratch: list[Tensor], more: Tensor | None = None) -> Tensor | None:
    """The sum of encoded `parts`, added in fp32 in the order given, encoded into `out` (which may be one of them). Returns
    what a lossy encoding left out (a view of scratch), else None.

    scratch: two fp32 tensors of as many elements or more. more: added to the sum, if the wire is lossy.
    """
    format_ = FORMATS[wire]
    total, one = (s[: len(out) // format_.block_bytes * BLOCK] for s in scratch)
    if not format_.lossy:
        numbers, total_bytes = [p.view(torch.float32) for p in parts], out.view(torch.float32)
        if len(parts) == 2:
            torch.add(*numbers, out=total_bytes)
            return None
        torch.add(numbers[0], numbers[1], out=total) if len(parts) > 1 else total.copy_(numbers[0])
        for part in numbers[2:]:
            total.add_(part)
        total_bytes.copy_(total)
        return None
    format_.decode(parts[0], total)
    for part in parts[1:]:
        format_.decode(part, one)
        total.add_(one)
    if more is not None:
        total.add_(more)
    format_.encode(total, out, one)
    format_.decode(out, one)
    return total.sub_(one)
