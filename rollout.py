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
3. The official grid for Z-Image, sigma = 1, .9, .75, .5, is a list in its options; here it is `sigma_grid(3.0, 4)`.
   The shift comes from the checkpoint; FLUX.2's depends on the size of the picture, too (`Backbone.time_shift`).
4. Like the formulas of Flow-GRPO, every step has noise, that to sigma = 0 too: x0 of `sample` with a > 0 is noisy.
"""
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from plumbing.files import InputError

Velocity = Callable[[Tensor, float | Tensor], Tensor]  # (x (B, C, H, W), sigma or B of them) -> v (B, C, H, W)


# ---------------------------------------------------------------------------------------------------- the grid
def shifted(u: Tensor, shift: float) -> Tensor:
    """Time shift sigma(u) = shift u / (1 + (shift - 1) u) of [0, 1]; a shift above 1 spends more time at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def sigma_grid(shift: float, steps: int) -> Tensor:
    """Noise levels of `steps` solver steps: (steps + 1,) float32, from 1 down to exactly 0; u goes from 1 to 1/steps.

    Source: ZImagePipeline and Flux2KleinPipeline of diffusers 0.42.1 (in older releases u itself reached 0, so the last
    step did nothing). Raises InputError for steps < 1.
    """
    if steps < 1:
        raise InputError(f"steps = {steps}: a sampler needs at least one step; give 1 or more")
    u = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float32)
    return torch.cat([torch.ones(1), shifted(u[1:], shift), torch.zeros(1)])  # (steps + 1,)


# ---------------------------------------------------------------------------------------------------- the trajectory
def euler(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One ODE step from sigma to sigma_next along v, x' = x + (sigma' - sigma) v (Eq. 3). Shapes (B, C, H, W)."""
    return x + (sigma_next - sigma) * v


@dataclass(frozen=True)
class Point:
    """One state of a trajectory, and the velocity there."""
    x: Tensor           # (B, C, H, W) float32, detached: no gradient crosses solver steps (Eq. 5)
    sigma: float        # noise level of x
    sigma_next: float   # noise level of the next state; 0 at the last point
    v: Tensor           # (B, C, H, W) float32; carries the graph of this one forward, if the velocity has one
    noise: float = 0.0  # a of the transition to the next state; 0 is the ODE


def rollout(velocity: Velocity, x: Tensor, sigmas: Tensor, learned: Collection[int] | None = None, noise: float = 0.0,
            rng: torch.Generator | None = None) -> Iterator[Point]:
    """The trajectory of `velocity` from noise, one `Point` per state. With the student's it is Eq. 3.

    x: (B, C, H, W) noise at sigmas[0]. sigmas: (K + 1,), `sigma_grid`.
    learned: numbers of the states that are handed out, by default all of 0 ... K - 1. Those between are only walked,
    and after the last one the walk ends.
    noise: a of `transition`, which draws from rng, a generator on the CPU, one eps like x per step, learned or not.
    Call backward on each point before asking for the next: one graph is alive at a time, whatever K is. The last state,
    x0, is not handed out, because no loss is defined there.
    """
    x = x.detach().float()
    last = len(sigmas) - 2 if learned is None else max(learned, default=-1)
    for k, (sigma, sigma_next) in enumerate(pairwise(sigmas[:last + 2].tolist())):
        is_learned = learned is None or k in learned
        with torch.set_grad_enabled(is_learned and torch.is_grad_enabled()):
            v = velocity(x, sigma).float()
        if is_learned:
            yield Point(x, sigma, sigma_next, v, noise)
        if k == last:
            return
        x = advance(x, v.detach(), sigma, sigma_next, noise, rng)
        del v  # and with it this state's graph, before the next one is built


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


# ---------------------------------------------------------------------------------------------------- the SDE
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
    """The next state (B, C, H, W): Euler's, or with noise a > 0 drawn from `transition`, eps from rng."""
    if noise == 0:
        return euler(x, v, sigma, sigma_next)
    if rng is None:  # never torch's global generator: randomness is a function of (seed, step)
        raise ValueError(f"noise = {noise} needs rng, a CPU generator")
    mean, std = transition(x, v, sigma, sigma_next, noise)
    return mean + std * torch.randn(x.shape, generator=rng).to(x.device)  # drawn on the CPU: the same on every device
