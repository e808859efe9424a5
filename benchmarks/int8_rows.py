"""Stand-in for `--quantize int8`: a Linear with int8 weights and one scale per output row, by what it keeps in memory.

The weight in x's dtype is made where it is used, in forward and again in backward; neither keeps it.
"""
import torch
from torch import Tensor, nn


class Product(torch.autograd.Function):
    """x (..., in) -> (..., out), with gradient for x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ (weight * scale.to(x.dtype)).T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        return gradient @ (weight * scale.to(gradient.dtype)), None, None


class Int8Linear(nn.Module):
    """In the place of a frozen Linear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        device = layer.weight.device
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8, device=device), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(rows, 1, device=device), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


def quantize_blocks(model) -> None:
    """Every Linear of the model's blocks, in place; model: on the meta device."""
    for block in model.blocks().values():
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, Int8Linear(layer))
