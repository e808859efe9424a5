"""Memory and work of a program that is never run: live storages of fake tensors, and the FLOP of what they go through.

Under `torch._subclasses.FakeTensorMode` tensors have shapes and no numbers, so a step of a 6B network takes seconds and
megabytes. Every storage is counted from the call that returned it until Python and autograd let go of it.

What it leaves out: the inside of a kernel, an allocator's rounding and fragments, cuBLAS' workspace and CUDA's context
(together perhaps 1 GiB on a card). Fake tensors go through a CPU's operators, which keep as much as CUDA's do but for
one: see `FusedNorm`.
"""
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

GIB = 2 ** 30
aten = torch.ops.aten


def attention(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    """As a CPU spells it, for which torch has no formula."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# torch's formulas; a multiplication and an addition are two FLOP. (Its FlopCounterMode would not do here: its hooks on
# modules keep what a checkpointed block recomputes alive until the backward pass is over.)
FLOP = flop_registry | {aten._scaled_dot_product_flash_attention_for_cpu: attention,
                        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward}


class Live(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, `now` and at the `peak`; FLOP of matrix products so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flop = 0
        self.seen: dict[int, weakref.ref] = {}
        self.sizes: dict[int, int] = {}                                 # of the same

    def count(self, tensor: Tensor) -> None:
        """A tensor that is one process's part of a whole counts as that part."""
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = id(storage)
        if key in self.seen:
            return

        def gone(_: weakref.ref) -> None:
            del self.seen[key]
            self.now -= self.sizes.pop(key)

        self.seen[key], self.sizes[key] = weakref.ref(storage, gone), 0
        self.resize(storage, storage.nbytes())

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """A storage that is counted has `size` bytes from now on: a fake one does not show that it was resized."""
        self.now += size - self.sizes[id(storage)]
        self.sizes[id(storage)] = size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        formula: Callable | None = FLOP.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **kwargs, out_val=result)
        return result


class FusedNorm(torch.autograd.Function):
    """CUDA's rms_norm by its storages: one operator, which keeps its input. A CPU's is several, in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], device=x.device))    # the last: 1 / rms
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight = ctx.saved_tensors[1] if ctx.needs_input_grad[1] else None      # with --tune full
        return torch.empty_like(gradient), None if weight is None else torch.empty_like(weight)


@contextmanager
def fused_norms() -> Iterator[None]:
    """Put FusedNorm in the place of F.rms_norm."""
    before = F.rms_norm
    F.rms_norm = lambda x, shape, weight=None, eps=None: FusedNorm.apply(x, weight)
    try:
        yield
    finally:
        F.rms_norm = before


class Grid(list):
    """A sigma grid as `rollout` reads it. Fake tensors have no numbers, so none of them could be the grid."""

    def __getitem__(self, part):
        found = super().__getitem__(part)
        return Grid(found) if isinstance(part, slice) else found

    def tolist(self) -> list[float]:
        return list(self)
