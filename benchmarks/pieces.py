"""Two pieces of a block beside the forms that they replaced: `python -m benchmarks.pieces` (CPU, one thread, seconds).

Forward and backward pass, both forms in turns; printed are the median of the ratios and their extremes.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import seconds, spread
from lora import linear
from model import rotate

ROUNDS, WARM = 25, 3


def product_and_sum(layer: torch.nn.Module, x: Tensor, adapter: dict, name: str) -> Tensor:
    """What `lora.linear` gives, as a product and a sum."""
    A, B, scale = adapter[name]
    return layer(x) + F.linear(scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def rotate_by_parts(x: Tensor, rope: Tensor) -> Tensor:
    """What `model.rotate` gives, as four real products."""
    (even, odd), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rope.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def compare(what: str, now: Callable[..., Tensor], before: Callable[..., Tensor], *arguments) -> None:
    torch.testing.assert_close(now(*arguments), before(*arguments), rtol=0.05, atol=0.05)
    ratios = [seconds(lambda: now(*arguments).sum().backward()) / seconds(lambda: before(*arguments).sum().backward())
              for _ in range(ROUNDS)]
    print(f"{what}: {spread(ratios[WARM:])}")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        width = 1024
        layer = torch.nn.Linear(width, width, bias=False).to(dtype).requires_grad_(False)
        A, B = (torch.randn(shape, requires_grad=True) for shape in ((64, width), (width, 64)))
        x = (torch.randn(1, width, width) / width).to(dtype).requires_grad_()
        compare(f"Linear with LoRA, {dtype}, one operation / product and sum", linear, product_and_sum,
                layer, x, {"layer": (A, B, 0.01)}, "layer")
        angles = torch.randn(1, width, 1, 64)
        q = torch.randn(1, width, 8, 128, dtype=dtype, requires_grad=True)
        compare(f"rotation, {dtype}, complex / by parts", rotate, rotate_by_parts, q,
                torch.stack([angles.cos(), angles.sin()], dim=-1))


if __name__ == "__main__":
    main()
