"""The objectives, each a weight on the same squared difference of velocities.

D-OPSD (arXiv 2605.05204), Eq. 7: student and teacher are compared at the student's own states x_k,
    loss = mean over k of  w(k) * || v_student - stopgrad(v_teacher) ||^2.
The norm is averaged over all elements, so a loss does not depend on resolution or batch size. `dopsd` in train.py is
this sum, in float32; here are the weights.

Differs from the paper / official code:
1. Eq. 7 has weight 1 (`--loss v`). The released code instead minimises the squared difference of the clean estimates
   x0_hat = x - sigma v. Both sides share x, so this is the same difference with weight sigma^2 (`--loss x0`).

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
from collections.abc import Callable

from plumbing.files import InputError
from rollout import Point, coefficients

Weight = Callable[[Point], float]


def kl_weight(point: Point) -> float:
    """The last rows of the table above. Raises InputError where the step has no density to compare."""
    _, q, s = coefficients(point.sigma, point.sigma_next, point.noise)
    if point.noise == 0:
        return q ** 2 / 2
    if not 0 < s < math.inf:
        raise InputError(f"--loss kl: the step from sigma = {point.sigma} to {point.sigma_next} has std {s}, so its "
                         "KL is not defined; use --noise 0 or another --loss")
    return q ** 2 / (2 * s ** 2)


# Name of an objective -> its weight at a point. A new objective is one entry here and a choice of --loss.
WEIGHTS: dict[str, Weight] = {
    "v": lambda point: 1.0,                 # paper, Eq. 7
    "x0": lambda point: point.sigma ** 2,   # released code: || x0_hat_student - x0_hat_teacher ||^2
    "kl": kl_weight,                        # DiffusionOPD: KL of the two steps
}


def weight_of(kind: str) -> Weight:
    """The weight of `--loss`. Raises InputError for anything but a key of WEIGHTS."""
    if kind not in WEIGHTS:
        raise InputError(f"--loss {kind}: no such objective; choose one of {', '.join(WEIGHTS)}")
    return WEIGHTS[kind]
