"""Frozen Linear layers in 8 bits: `--quantize int8` halves the memory of weights in bfloat16.

D-OPSD (arXiv 2605.05204) trains a LoRA beside frozen weights, so these can be rounded once, while they are loaded:
W = scale * q with integers q in -127..127 and one scale for each output row. Adapters stay in float32.

Differs from the paper / official code: there the frozen weights are in bfloat16. `--quantize none` is that.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT, INT8 = "none", "int8"    # values of --quantize


class Product(torch.autograd.Function):
    """x W^T + bias with W = scale * q: x (..., in), q (out, in), scale (out, 1) -> (..., out); only x has a gradient.

    W lives inside `forward` and again inside `backward`. What is kept in between is alive anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        return F.linear(x, q * scale, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        q, scale = ctx.saved_tensors
        # gradient W, by way of W^T: torch.compile would take a second q * scale for the first one, and keep that
        return F.linear(gradient, q.t() * scale.t()), None, None, None


class Int8Linear(nn.Linear):
    """A frozen Linear whose `weight` q is in int8, with a `scale` (out, 1) in the precision of its input."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype):
        """weight: (out, in) in any floating dtype; scale * q is half a scale away at most. bias: stays as it is."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        weight = weight.float()
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(dtype).tiny).to(dtype)
        q = (weight / scale).round().to(torch.int8)     # by the scale as it is stored: its own rounding does no harm
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in (q, scale))
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.scale, self.bias)
