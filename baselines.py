"""What the paper compares D-OPSD with (arXiv 2605.05204, tables and ablation (a)): each a generator of losses.

    off-policy    the teacher's states, the teacher's velocities
    sft           flow matching on the target images: vanilla fine-tuning
    sft-teacher   flow matching on pictures that the teacher samples
    dreambooth    sft, and sft on pictures that the untuned model draws of the captions of --keep (arXiv 2208.12242)
    pso           the target images preferred to the model's own samples (arXiv 2410.03190)

A generator gets velocities whose weights and contexts are bound, as `dopsd` in train.py does, and yields losses of one
batch; their sum is the batch's loss. A new method is a function, an entry in BASELINES and a choice of --method. What
it does with the captions of --keep is a method, too: `dopsd` learns them from the untuned model, `sft` from `Prior`.

Differs from the paper, which says little about its baselines:
1. SFT's noise levels are as dense as those of the checkpoint's own sampler (`draw_sigma`).
2. PSO compares at the noise levels of the K solver steps, and its own samples come from the student of the moment.
3. DreamBooth's prior pictures are of many captions, not of one class, and the few-step model draws them.
"""
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from data import Batch, Dataset, generator
from lora import Bound
from loss import Weight
from model import Context
from rollout import Velocity, rollout, sample, shifted, sigma_grid


@dataclass(frozen=True)
class Method:
    """A way to learn from one batch."""
    losses: Callable[..., Iterator[Tensor]]  # gets student, x and sigmas (`rollout`), and what it needs, by name
    needs: tuple[str, ...]                   # names of further arguments, of those that `bind` in train.py knows
    passes: Callable[[int, int], tuple[float, int]]     # K, number of learned states -> forward passes of a batch,
                                             # on average: those without and those with a gradient
    keeps: str = "dopsd"                     # name of the method that learns the captions of --keep; "": takes none

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher takes part, by default one that is shown the target image."""
        return "teacher" in self.needs

    @property
    def takes_noise(self) -> bool:
        """Whether its rollouts can be stochastic."""
        return "noise" in self.needs

    def __call__(self, **given) -> Iterator[Tensor]:
        return self.losses(**{name: given[name] for name in ("student", "x", "sigmas", *self.needs)})


# ---------------------------------------------------------------------------------------------------- distillation
def off_policy(student: Velocity, x: Tensor, sigmas: Tensor, teacher: Velocity, weight: Weight,
               learned: Collection[int], noise: float, rng: torch.Generator) -> Iterator[Tensor]:
    """Off-policy distillation: the loss of `dopsd`, at the states of the teacher's own trajectory."""
    for point in rollout(torch.no_grad()(teacher), x, sigmas, learned, noise, rng):
        v_student = student(point.x, point.sigma)
        yield weight(point) * (v_student - point.v).square().mean() / len(learned)


# ---------------------------------------------------------------------------------------------------- fine-tuning
def sft(student: Velocity, x: Tensor, sigmas: Tensor, x0: Tensor, shift: float, rng: torch.Generator
        ) -> Iterator[Tensor]:
    """Vanilla fine-tuning: || v - (eps - x0) ||^2 at a random noise level. x0: latents of the targets; x is eps."""
    yield denoising_error(student, x0, x, draw_sigma(rng, shift, len(x0)).to(x0.device)).mean()


def sft_teacher(student: Velocity, x: Tensor, sigmas: Tensor, teacher: Velocity, shift: float, rng: torch.Generator
                ) -> Iterator[Tensor]:
    """Vanilla fine-tuning on what the teacher samples from x."""
    x0 = sample(teacher, x, sigmas)
    eps = torch.randn(x.shape, generator=rng).to(x.device)
    return sft(student, eps, sigmas, x0, shift, rng)


def draw_sigma(generator: torch.Generator, shift: float, n: int) -> Tensor:
    """n training noise levels in (0, 1] for `sft`: (n,) float32 on the CPU, uniform u through the checkpoint's shift.

    A choice of ours (the paper only says that SFT draws random times): noise levels are then as dense as those that the
    checkpoint's own sampler uses. shift 1 gives the uniform draw.
    """
    u = 1 - torch.rand(n, generator=generator)  # (0, 1]: at sigma 0 there is nothing to learn
    return shifted(u, shift)


def denoising_error(velocity: Velocity, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """|| v - (eps - x0) ||^2 of each image: (B,) float32, mean over its elements.

    velocity: (x, sigma (B,)) -> v. x0: (B, C, H, W) latents. eps: noise of the same shape. sigma: (B,), `draw_sigma`.
    """
    x0, eps = x0.float(), eps.float()
    s = sigma.to(x0).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    x = (1 - s) * x0 + s * eps          # (B, C, H, W)
    v = velocity(x, sigma.to(x0)).float()
    return (v - (eps - x0)).square().mean((1, 2, 3))


class Prior(Dataset):
    """Captions with pictures that the untuned model draws, each once: the prior preservation of `dreambooth`."""

    def __init__(self, captions: Dataset, base: Bound, device: torch.device,
                 shift_of: Callable[[int, int, int], float], steps: int) -> None:
        """base: the untuned model. shift_of: solver steps, height and width of latents -> time shift. steps: of the
        model's own sampler."""
        super().__init__(captions.examples, captions.batch_size, captions.seed)
        self.base, self.device, self.shift_of, self.steps = base, device, shift_of, steps
        self.drawn: dict[tuple[int, str], Tensor] = {}

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        pictures = [self.picture(*parts) for parts in zip(batch.indices, batch.captions, batch.student_context,
                                                          batch.latents)]
        return replace(batch, latents=torch.stack(pictures))

    @torch.no_grad()
    def picture(self, index: int, caption: str, context: Context, like: Tensor) -> Tensor:
        """Latents (C, h, w) on the CPU, from noise that follows from (seed, caption). like: of their shape."""
        if (index, caption) not in self.drawn:
            x = torch.randn(1, *like.shape, generator=generator(self.seed, "prior", index, caption)).to(self.device)
            sigmas = sigma_grid(self.shift_of(self.steps, *like.shape[1:]), self.steps)
            self.drawn[index, caption] = sample(self.base([context.to(self.device)]), x, sigmas)[0].cpu()
        return self.drawn[index, caption]


# ---------------------------------------------------------------------------------------------------- preference
def pso(student: Velocity, x: Tensor, sigmas: Tensor, x0: Tensor, base: Velocity, beta: float, rng: torch.Generator
        ) -> Iterator[Tensor]:
    """Pairwise Sample Optimization: the target x0 is preferred to what the student samples from x by now."""
    own = sample(student, x, sigmas)
    k = torch.randint(len(sigmas) - 1, (len(own),), generator=rng)  # one of the noise levels of its own sampler
    eps = torch.randn(x.shape, generator=rng).to(x.device)
    yield preference(student, base, x0, own, eps, sigmas[k].to(x.device), beta)


def preference(velocity: Velocity, base: Velocity, x_win: Tensor, x_lose: Tensor, eps: Tensor, sigma: Tensor,
               beta: float) -> Tensor:
    """The loss of PSO (arXiv 2410.03190): scalar float32, mean over pairs,

        -log sigmoid(beta [(l_base(x_win) - l_base(x_lose)) - (l(x_win) - l(x_lose))]),    l = denoising_error.

    base: the untuned model. x_win, x_lose: (B, C, H, W) of the same prompts; each pair shares its eps and sigma.
    """
    with torch.no_grad():
        gap_base = denoising_error(base, x_win, eps, sigma) - denoising_error(base, x_lose, eps, sigma)
    gap = denoising_error(velocity, x_win, eps, sigma) - denoising_error(velocity, x_lose, eps, sigma)
    return -logsigmoid(beta * (gap_base - gap)).mean()


def passes_of_rollout(K: int, learned: int) -> tuple[float, int]:
    """Of `dopsd` and `off_policy`. The rollout ends at the last of the n learned states, on average the n (K + 1) /
    (n + 1)th; at each of the n both sides are asked, one of them with a gradient."""
    return learned * (K + 1) / (learned + 1), learned


BASELINES = {
    "off-policy": Method(off_policy, ("teacher", "weight", "learned", "noise", "rng"), passes_of_rollout),
    "sft-teacher": Method(sft_teacher, ("teacher", "shift", "rng"), lambda K, learned: (K, 1)),
    "sft": Method(sft, ("x0", "shift", "rng"), lambda K, learned: (0, 1)),
    "dreambooth": Method(sft, ("x0", "shift", "rng"), lambda K, learned: (0, 1), keeps="sft"),
    "pso": Method(pso, ("x0", "base", "beta", "rng"), lambda K, learned: (K + 2, 2), keeps=""),  # 2 sides, 2 pictures
}
