"""Three ratios of D-OPSD on the embedded model: `python -m benchmarks.step` (CPU, about a minute).

1. Time: one D-OPSD step (K = 4 states, teacher and student) against one vanilla fine-tuning step on the same batch.
2. Time: the student's forward pass with its backward pass against one without, the unit of cost in experiments/.
3. Memory: bytes that autograd keeps at once, backward at every state (train.py) against one backward after the rollout.
Both sides of a ratio alternate in one run; printed are the median and the extremes.
"""
import statistics
import time

import torch

import lora
from baselines import denoising_error
from loss import weight_of
from plumbing.checkpoints import EMBEDDED, backbone_of, shift_rule
from rollout import sigma_grid
from train import dopsd

BATCH, K, SIDE, ROUNDS = 4, 4, 16, 22


class Kept:
    """Counts the bytes of tensors that autograd holds for the backward pass, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hold(self, tensor: torch.Tensor) -> "Held":
        return Held(self, tensor)

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.hold, lambda held: held.tensor)
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
    net = backbone_of(EMBEDDED).load(EMBEDDED, "cpu", torch.float32)
    student = lora.create(net, 16, 16, seed=0)
    sigmas = sigma_grid(shift_rule(EMBEDDED)(K, SIDE, SIDE), K)
    c_s, c_t = [torch.randn(22, net.caption_channels)] * BATCH, [torch.randn(40, net.caption_channels)] * BATCH
    x0, eps = torch.randn(2, BATCH, net.in_channels, SIDE, SIDE)
    sigma, velocity = torch.rand(BATCH), lora.velocity_of(net, c_s, student)
    teacher = lora.velocity_of(net, c_t, lora.copy(student))

    def dopsd_step(at_every_state: bool) -> None:
        losses = dopsd(velocity, teacher, eps, sigmas, weight_of("v"), range(K))
        if at_every_state:
            for loss in losses:
                loss.backward()
        else:
            sum(losses).backward()

    def sft_step() -> None:
        denoising_error(velocity, x0, eps, sigma).mean().backward()

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    @torch.no_grad()
    def forward() -> None:
        velocity(eps, sigma)

    for what, one, other in (("D-OPSD step / SFT step", lambda: dopsd_step(True), sft_step),
                             ("forward + backward / forward", lambda: velocity(eps, sigma).sum().backward(), forward)):
        ratios = sorted([seconds(one) / seconds(other) for _ in range(ROUNDS)][2:])     # 2 warm up
        print(f"time, {what}: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    peaks = []
    for at_every_state in (True, False):
        with Kept() as kept:
            dopsd_step(at_every_state)
        peaks.append(kept.peak)
    print(f"memory kept for backward, one backward after the rollout / at every state: {peaks[1] / peaks[0]:.2f} "
          f"({peaks[1] / 2 ** 20:.0f} MB / {peaks[0] / 2 ** 20:.0f} MB)")


if __name__ == "__main__":
    main()
