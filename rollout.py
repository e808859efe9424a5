"""The sampler: sigma grid, Euler step, stochastic step, and the student's trajectory as a generator.

D-OPSD (arXiv 2605.05204), Section 3: Eq. 3 is `rollout`, the detached states of Eq. 5 are its points.
One time convention in the whole project: sigma runs 1 -> 0, x_sigma = (1 - sigma) x0 + sigma eps and
v = dx/dsigma = eps - x0. The same step moves the student in training and the sampler at inference, so that training
visits exactly the states of inference with as many steps. Everything is float32.

With noise a > 0 a step is a Gaussian transition instead, which keeps the marginals of the ODE: Flow-GRPO's sampler
(arXiv 2505.05470), on which DiffusionOPD (arXiv 2605.15055) defines its per-step KL, see `transition` and loss.py.

Differs from the paper / official code:
1. The paper counts t = 1 - sigma with velocity x0 - eps; we keep sigma and eps - x0 everywhere.
2. The official code walks all K steps and then calls backward once, with K graphs alive. Here a generator hands out one
   point at a time, and the caller calls backward before asking for the next. States are detached: same gradient.
3. The official grid for Z-Image, sigma = 1, .9, .75, .5, is a list in its options; here it is `sigma_grid(config, 4)`.
   FLUX.2's shift depends on the size of the picture; `time_shift` of flux2.py says it, `time_grid` makes the grid.
4. Like the formulas of Flow-GRPO, every step has noise, that to sigma = 0 too: x0 of `sample` with a > 0 is noisy.
"""
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Callable, Iterator

import torch
from torch import Tensor

from plumbing.files import InputError

Velocity = Callable[[Tensor, float], Tensor]  # (x (B, C, H, W), sigma) -> v (B, C, H, W)

# Options of scheduler_config.json that would give another grid or another step than the one below.
UNSUPPORTED = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
               "invert_sigmas", "shift_terminal", "stochastic_sampling")


def shifted(u: Tensor, shift: float) -> Tensor:
    """Time shift sigma(u) = shift u / (1 + (shift - 1) u) of [0, 1]; a shift above 1 spends more time at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def scheduler_shift(scheduler_config: dict) -> float:
    """The `shift` of a scheduler_config.json whose other options leave the plain grid as it is. Raises InputError."""
    name = scheduler_config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"scheduler_config.json: _class_name {name} is not supported; "
                         "use a checkpoint with FlowMatchEulerDiscreteScheduler")
    for key in UNSUPPORTED:
        if scheduler_config.get(key):
            raise InputError(f"scheduler_config.json: {key} = {scheduler_config[key]} is not supported; "
                             "use a checkpoint with a plain shift (Z-Image-Turbo has shift 3.0)")
    shift = scheduler_config.get("shift")
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < float("inf"):
        raise InputError(f"scheduler_config.json: shift = {shift} is not a positive number; "
                         "use the config that belongs to this checkpoint (Z-Image-Turbo has 3.0)")
    return float(shift)


def time_grid(shift: float, steps: int) -> Tensor:
    """Noise levels of `steps` solver steps: (steps + 1,) float32, from 1 down to exactly 0; u goes from 1 to 1/steps.

    Source: ZImagePipeline and Flux2KleinPipeline of diffusers 0.42.1 (in older releases u itself reached 0, so the last
    step did nothing). Raises InputError for steps < 1.
    """
    if steps < 1:
        raise InputError(f"steps = {steps}: a sampler needs at least one step; give 1 or more")
    u = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float32)
    return torch.cat([torch.ones(1), shifted(u[1:], shift), torch.zeros(1)])  # (steps + 1,)


def sigma_grid(scheduler_config: dict, steps: int) -> Tensor:
    """`time_grid` of a scheduler_config.json with a plain shift, such as Z-Image's. Raises InputError for others."""
    return time_grid(scheduler_shift(scheduler_config), steps)


def euler(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One ODE step from sigma to sigma_next along v, x' = x + (sigma' - sigma) v (Eq. 3). Shapes (B, C, H, W)."""
    return x + (sigma_next - sigma) * v


def coefficients(sigma: float, sigma_next: float, noise: float) -> tuple[float, float, float]:
    """(p, q, s) of the Gaussian step x' = p x + q v + s eps from sigma down to sigma_next; noise is a, 0 is Euler's.

    Flow-GRPO, arXiv 2505.05470, in our notation, with g = a sqrt(sigma / (1 - sigma)) and d = sigma' - sigma:
        p = 1 + g^2 d / (2 sigma),    q = (1 + g^2 (1 - sigma) / (2 sigma)) d,    s = g sqrt(-d).
    At sigma = 1 the denominator of g has sigma' instead, as published. Then s = a however short the step is, and the
    variance of x' is too large by a^4 / 4 even as d -> 0 (derived): finer grids do not remove it, later steps damp it.
    From 1 to 1 the numbers are not finite. Raises InputError for a noise that is negative or not finite.
    """
    if not 0 <= noise < math.inf:
        raise InputError(f"--noise {noise}: not a noise of the sampler; give 0 (none) or more (Flow-GRPO has 0.7)")
    d = sigma_next - sigma
    if noise == 0:
        return 1.0, d, 0.0  # exactly `euler`, on every grid
    room = 1 - (sigma if sigma < 1 else sigma_next)
    pull = noise ** 2 / (2 * room) if room > 0 else math.inf  # g^2 / (2 sigma)
    return 1 + pull * d, (1 + pull * (1 - sigma)) * d, math.sqrt(2 * sigma * pull * -d)


def transition(x: Tensor, v: Tensor, sigma: float, sigma_next: float, noise: float) -> tuple[Tensor, float]:
    """Mean (like x) and standard deviation of the next state, given x and v (B, C, H, W); see `coefficients`.

    Raises InputError also where the grid leaves no finite step.
    """
    of_x, of_v, std = coefficients(sigma, sigma_next, noise)
    if not math.isfinite(std):
        raise InputError(f"--noise {noise}: no finite noise for the step from sigma = {sigma} to {sigma_next}; use a "
                         "grid whose second point is below 1, or --noise 0")
    return of_x * x + of_v * v, std


def advance(x: Tensor, v: Tensor, sigma: float, sigma_next: float, noise: float, rng: torch.Generator | None) -> Tensor:
    """The next state (B, C, H, W), drawn from `transition`; with noise 0 nothing is drawn from rng."""
    mean, std = transition(x, v, sigma, sigma_next, noise)
    if noise == 0:
        return mean
    if rng is None:  # never torch's global generator: randomness is a function of (seed, step)
        raise ValueError(f"noise = {noise} needs rng, a CPU generator")
    return mean + std * torch.randn(x.shape, generator=rng).to(x.device)  # drawn on the CPU: the same on every device


@dataclass(frozen=True)
class Point:
    """One state of the student's trajectory, and what the student predicts there."""
    x: Tensor           # (B, C, H, W) float32, detached: no gradient crosses solver steps (Eq. 5)
    sigma: float        # noise level of x
    sigma_next: float   # noise level of the next state; 0 at the last point
    v_student: Tensor   # (B, C, H, W) float32, carries the graph of this one forward
    noise: float = 0.0  # a of the transition to the next state, 0 is the ODE
    course: list[Tensor] = field(default_factory=list)  # [the velocity along which the rollout goes on], without graph

    def follow(self, v: Tensor) -> None:
        """Go on along v (B, C, H, W) instead of the student's velocity: off-policy, if v is the teacher's."""
        self.course[:] = [v.detach().float()]


def rollout(velocity: Velocity, x: Tensor, sigmas: Tensor, learned: set[int] | None = None, noise: float = 0.0,
            rng: torch.Generator | None = None) -> Iterator[Point]:
    """The student's own trajectory (Eq. 3), one `Point` per step.

    velocity: the student, called with gradients on. x: (B, C, H, W) noise at sigmas[0]. sigmas: (K + 1,), `sigma_grid`.
    learned: numbers of the states that are handed out, by default all of 0 ... K - 1; the others are only walked.
    noise: a of `transition`, which draws from rng, a generator on the CPU, one eps like x per step, learned or not.
    Call backward on each point before asking for the next: one graph is alive at a time, whatever K is. The last state,
    x0, is not handed out, because no loss is defined there.
    """
    x = x.detach().float()
    for k, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        if learned is not None and k not in learned:
            x = sample(velocity, x, sigmas[k:k + 2], noise, rng)
            continue
        v_student = velocity(x, sigma).float()
        course = [v_student.detach()]
        point = Point(x, sigma, sigma_next, v_student, noise, course)
        # The generator sleeps inside `yield` and then runs the next forward: a local reference left here would keep
        # this point's graph alive beside the next one. So hand over the only reference.
        handover = [point]
        del point, v_student
        yield handover.pop()
        x = advance(x, course[0], sigma, sigma_next, noise, rng)


@torch.no_grad()
def sample(velocity: Velocity, x: Tensor, sigmas: Tensor, noise: float = 0.0,
           rng: torch.Generator | None = None) -> Tensor:
    """x0 (B, C, H, W) float32 from noise x at sigmas[0]: the states of `rollout`, without gradients.

    noise, rng: as for `rollout`; few steps and noise > 0 leave much of it in x0 (a = 0.7, last step from 0.5: std 0.5).
    """
    x = x.float()
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        x = advance(x, velocity(x, sigma).float(), sigma, sigma_next, noise, rng)
    return x
