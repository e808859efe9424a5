"""Three ratios of D-OPSD on the embedded model: `python -m benchmarks.step` (CPU, about a minute).

`--official` instead: one step of ours beside the released algorithm (official.py) on one small random network.

1. Time: one D-OPSD step (K = 4 states, teacher and student) against one vanilla fine-tuning step on the same batch.
2. Time: the student's forward pass with its backward pass against one without, the unit of cost in experiments/.
3. Memory: bytes that autograd keeps at once, backward at every state (train.py) against one backward after the rollout.
Both sides of a ratio alternate in one run; printed are the median and the extremes.
"""
import statistics
import sys
import time
from collections.abc import Callable

import torch

import lora
from baselines import denoising_error
from benchmarks.real_size import Z_CONFIG, Options, Program, draws
from loss import weight_of
from model import Context
from plumbing.checkpoints import EMBEDDED, backbone_of, shift_rule
from rollout import sigma_grid
from train import dopsd

BATCH, K, SIDE, ROUNDS = 4, 4, 16, 22
SMALL = Z_CONFIG | {"dim": 192, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
                    "axes_dims": [16, 16, 16]}


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


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(ratios: list[float]) -> str:
    ratios = sorted(ratios)
    return f"median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def kept(work: Callable[[], None]) -> int:
    """Most bytes that autograd holds at once."""
    with Kept() as counted:
        work()
    return counted.peak


def beside_official(rounds: int = 3) -> None:
    """Ours / released, of an optimizer step of four batches (one round of stratified states), with and without
    checkpointing; the first round warms up."""
    sigmas = sigma_grid(3.0, K)
    for checkpointing in (True, False):
        both = [Program(Options(size=128, rank=8, grad_states=1, checkpointing=checkpointing), SMALL, released,
                        torch.float32, torch.device("cpu")) for released in (False, True)]

        for program in both:                                            # as short as the rest
            program.c_s, program.c_t = ([Context(torch.randn(words, 2560))] for words in (22, 40))

        def step(program: Program, states: list[list[int]]) -> None:
            for learned in states:
                program.gradient(sigmas, learned)
            program.update()

        every = draws(both[1].cfg, 4, released=True)
        for name, states in (("all states", every), ("one state per rollout", draws(both[0].cfg, 4, released=False))):
            works = [lambda: step(both[0], states), lambda: step(both[1], every)]
            ratios = [seconds(works[0]) / seconds(works[1]) for _ in range(rounds + 1)][1:]
            peaks = [kept(work) for work in works]
            print(f"{name}, {'with' if checkpointing else 'without'} checkpointing, ours / released: time "
                  f"{spread(ratios)}, kept for backward {peaks[0] / peaks[1]:.2f} "
                  f"({peaks[0] / 2 ** 20:.1f} MB / {peaks[1] / 2 ** 20:.1f} MB)", flush=True)


def main() -> None:
    torch.manual_seed(0)
    if "--official" in sys.argv[1:]:
        beside_official()
        return
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

    @torch.no_grad()
    def forward() -> None:
        velocity(eps, sigma)

    for what, one, other in (("D-OPSD step / SFT step", lambda: dopsd_step(True), sft_step),
                             ("forward + backward / forward", lambda: velocity(eps, sigma).sum().backward(), forward)):
        print(f"time, {what}: {spread([seconds(one) / seconds(other) for _ in range(ROUNDS)][2:])}")    # 2 warm up
    peaks = [kept(lambda: dopsd_step(at_every_state)) for at_every_state in (True, False)]
    print(f"memory kept for backward, one backward after the rollout / at every state: {peaks[1] / peaks[0]:.2f} "
          f"({peaks[1] / 2 ** 20:.0f} MB / {peaks[0] / 2 ** 20:.0f} MB)")


if __name__ == "__main__":
    main()
