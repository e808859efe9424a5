"""Two ratios of D-OPSD on the embedded model: `python benchmarks/step.py` (CPU, about a minute).

1. Time: one D-OPSD step (K = 4 states, teacher and student) against one vanilla fine-tuning step on the same batch.
2. Memory: bytes that autograd keeps at once, backward at every state (train.py) against one backward after the rollout.
Both sides of a ratio alternate in one run; printed are the median and the extremes.
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import lora
import loss as objectives
import model as transformer
from plumbing.checkpoints import EMBEDDED
from plumbing.files import read_json
from rollout import rollout, sigma_grid

BATCH, ROUNDS = 4, 12


class Kept:
    """Counts the bytes of tensors that autograd holds for the backward pass, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> "Held":
        return Held(self, tensor)

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


class Held:
    """One saved tensor; when autograd lets go of it, it is no longer counted."""

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self.kept, self.tensor, self.size = kept, tensor, tensor.numel() * tensor.element_size()
        kept.now += self.size
        kept.peak = max(kept.peak, kept.now)

    def __del__(self) -> None:
        self.kept.now -= self.size


def main() -> None:
    torch.manual_seed(0)
    folder = EMBEDDED
    net = transformer.load(folder, "cpu", torch.float32)
    student = lora.create(net, 16, 16, seed=0)
    teacher = lora.copy(student)
    sigmas = sigma_grid(read_json(folder / "scheduler" / "scheduler_config.json"), 4)
    c_s, c_t = [torch.randn(22, net.caption_channels)] * BATCH, [torch.randn(40, net.caption_channels)] * BATCH
    x0, eps, sigma = torch.randn(BATCH, net.in_channels, 16, 16), torch.randn(BATCH, net.in_channels, 16, 16), torch.rand(BATCH)

    def velocity(x, s):
        return net.velocity(x, s, c_s, student)

    def dopsd(at_every_state: bool) -> None:
        total = 0.0
        for point in rollout(velocity, eps, sigmas):
            with torch.no_grad():
                v_teacher = net.velocity(point.x, point.sigma, c_t, teacher)
            loss = objectives.dopsd(point, v_teacher, "v")
            if at_every_state:
                loss.backward()
            else:
                total = total + loss
        if not at_every_state:
            total.backward()

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    ratios = []
    for _ in range(ROUNDS):
        ratios.append(seconds(lambda: dopsd(True)) / seconds(lambda: objectives.sft(velocity, x0, eps, sigma).backward()))
    ratios = sorted(ratios[2:])                                          # the first rounds warm up
    print(f"time, D-OPSD step / SFT step: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    peaks = []
    for at_every_state in (True, False):
        with Kept() as kept:
            dopsd(at_every_state)
        peaks.append(kept.peak)
    print(f"memory kept for backward, one backward after the rollout / at every state: {peaks[1] / peaks[0]:.2f} "
          f"({peaks[1] / 2 ** 20:.0f} MB / {peaks[0] / 2 ** 20:.0f} MB)")


if __name__ == "__main__":
    main()
