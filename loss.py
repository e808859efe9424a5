"""The objectives, each a weight on the same squared difference of velocities, in float32.

D-OPSD (arXiv 2605.05204), Eq. 7: student and teacher are compared at the student's own states x_k,
    loss = mean over k of  w(k) * || v_student - stopgrad(v_teacher) ||^2.
The norm is averaged over all elements, so a loss does not depend on resolution or batch size; the mean over k is the
caller's (divide by the number of steps), because the caller calls backward once per step.

Differs from the paper / official code:
1. Eq. 7 has weight 1 (`--loss v`). The released code instead minimises the squared difference of the clean estimates
   x0_hat = x - sigma v. Both sides share x, so this is the same difference with weight sigma^2 (`--loss x0`).
2. The official code adds up the K losses and calls backward once; one backward per step gives the same gradient.

DiffusionOPD (arXiv 2605.15055) instead takes KL(student || teacher) of the two Gaussian steps to sigma' from the same x
(`--loss kl`). Both have the std s and a mean p x + q v, `coefficients` in rollout.py, so x cancels and
|| mu_s - mu_t ||^2 = q^2 || v_s - v_t ||^2. With d = sigma' - sigma and noise a:

    objective                      weight w
    v                              1
    x0                             sigma^2
    kl, a = 0, the ODE             q^2 / 2 = d^2 / 2, the surrogate 1/2 || mu_s - mu_t ||^2
    kl, a > 0, the SDE             q^2 / (2 s^2) = (1 + a^2/2)^2 |d| (1 - sigma) / (2 a^2 sigma)    for sigma < 1
                                                 = d^2 / (2 a^2)    at sigma = 1, where q = d and s = a

The ODE's row is no limit of the SDE's, which grows like 1 / a^2 for small a. As for all objectives here, our KL is
the mean over elements, not the sum. Released frameworks average too, but drop |d| from s^2: ours times |d| is theirs.
"""
import math
from typing import Callable

import torch
from torch import Tensor

from plumbing.files import InputError
from rollout import Point, coefficients, shifted


def kl_weight(point: Point) -> float:
    """The last rows of the table above. Raises InputError where the step has no density to compare."""
    _, q, s = coefficients(point.sigma, point.sigma_next, point.noise)
    if point.noise == 0:
        return q ** 2 / 2
    if not 0 < s < math.inf:
        raise InputError(f"--loss kl: the step from sigma = {point.sigma} to {point.sigma_next} has std {s}, so its "
                         "KL is not defined; use --noise 0 or another --loss")
    return q ** 2 / (2 * s ** 2)


# Name of an objective -> its weight at a point.
LOSSES: dict[str, Callable[[Point], float]] = {
    "v": lambda point: 1.0,                 # paper, Eq. 7
    "x0": lambda point: point.sigma ** 2,   # released code: || x0_hat_student - x0_hat_teacher ||^2
    "kl": kl_weight,                        # DiffusionOPD: KL of the two steps
}


def dopsd(point: Point, v_teacher: Tensor, kind: str) -> Tensor:
    """D-OPSD's loss at one point of the rollout (one term of Eq. 7): scalar float32, mean over all elements.

    v_teacher: (B, C, H, W), the teacher's velocity at the same x and sigma; no gradient reaches it.
    kind: a key of LOSSES. Raises InputError for any other.
    """
    if kind not in LOSSES:
        raise InputError(f"--loss {kind}: no such objective; choose one of {', '.join(LOSSES)}")
    difference = point.v_student.float() - v_teacher.detach().float()  # (B, C, H, W)
    return LOSSES[kind](point) * difference.square().mean()


def draw_sigma(generator: torch.Generator, shift: float, n: int) -> Tensor:
    """n training noise levels in (0, 1] for `sft`: (n,) float32 on the CPU, uniform u through the checkpoint's shift.

    A choice of ours (the paper only says that SFT draws random times): noise levels are then as dense as those that the
    checkpoint's own sampler uses. shift 1 gives the uniform draw.
    """
    u = 1 - torch.rand(n, generator=generator)  # (0, 1]: at sigma 0 there is nothing to learn
    return shifted(u, shift)


def denoising_error(velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """|| v - (eps - x0) ||^2 of each image: (B,) float32, mean over its elements.

    velocity: (x, sigma (B,)) -> v. x0: (B, C, H, W) latents. eps: noise of the same shape. sigma: (B,), `draw_sigma`.
    """
    x0, eps = x0.float(), eps.float()
    s = sigma.to(x0).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    x = (1 - s) * x0 + s * eps          # (B, C, H, W)
    v = velocity(x, sigma.to(x0)).float()
    return (v - (eps - x0)).square().mean((1, 2, 3))


def sft(velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Vanilla fine-tuning, the baseline of `--method sft`, and with the teacher's pictures as x0 of `sft-teacher`."""
    return denoising_error(velocity, x0, eps, sigma).mean()


def pso(velocity: Callable, reference: Callable, x_win: Tensor, x_lose: Tensor, eps: Tensor, sigma: Tensor,
        beta: float) -> Tensor:
    """Pairwise Sample Optimization (arXiv 2410.03190), the baseline of `--method pso`: scalar float32, mean over pairs,

        -log sigmoid(beta [(l_ref(x_win) - l_ref(x_lose)) - (l(x_win) - l(x_lose))]),    l = denoising_error.

    velocity: the student; reference: the untuned model. x_win: target images; x_lose: the model's own samples of the
    same prompts. eps and sigma, one of the few noise levels that the model was distilled for, are shared by the pair.
    """
    with torch.no_grad():
        gap_reference = denoising_error(reference, x_win, eps, sigma) - denoising_error(reference, x_lose, eps, sigma)
    gap = denoising_error(velocity, x_win, eps, sigma) - denoising_error(velocity, x_lose, eps, sigma)
    return -torch.nn.functional.logsigmoid(beta * (gap_reference - gap)).mean()
