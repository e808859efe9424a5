"""Adapters added up: what distilling several into one (arXiv 2605.15055) is compared with, in experiments/merge.py."""
import torch

from lora import Adapter


def combined(adapters: list[Adapter], weight: float = 1.0) -> Adapter:
    """The adapter whose change of every layer is `weight` times the sum of theirs; its rank is the sum of the ranks.

    sum_i s_i B_i A_i = [s_1 B_1 | s_2 B_2 | ...] [A_1; A_2; ...]: exact, nothing is truncated. A layer may be missing
    in some.
    """
    weights = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.weights):
        parts = [(*adapter.weights[name], adapter.scale) for adapter in adapters if name in adapter.weights]
        weights[name] = (torch.cat([A.detach() for A, _, _ in parts]),                       # (sum of ranks, in)
                         torch.cat([weight * scale * B.detach() for _, B, scale in parts], 1))  # (out, sum of ranks)
    rank = max(len(A) for A, _ in weights.values())
    return Adapter(weights, rank, alpha=rank)                                                # scale 1
