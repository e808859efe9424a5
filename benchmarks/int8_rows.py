"""Stand-in for `Int8Linear` of plumbing/quantized.py, by what it keeps in memory, until that can be imported here.

Int8 weights and one scale per output row. The weight in x's dtype is made where it is used, in forward and again in
backward; neither keeps it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Product(torch.autograd.Function):
    """x (..., in) -> (..., out), with gradient for x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight * scale, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        return gradient @ (weight * scale), None, None, None


class Int8Linear(nn.Linear):
    """In the place of a frozen Linear."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(*weight.shape[::-1], bias=False, device="meta")
        self.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(weight[:, :1].to(dtype), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.scale, self.bias)


def quantize_blocks(model, dtype: torch.dtype) -> None:
    """Every Linear of the model's blocks, in place, for inputs in dtype."""
    for block in model.blocks().values():
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, Int8Linear(layer.weight.detach(), layer.bias, dtype))
