"""How noisy is the gradient of the per-step KL: in closed form, and as PPO-style methods estimate it?

    python -m experiments.variance --lora out/star/student.safetensors --data examples/star

DiffusionOPD (arXiv 2605.15055) on the embedded model: at a state x of the student's stochastic rollout both sides take
a Gaussian step, N(mu_s, s^2) and N(mu_t, s^2) with the same s, and the student learns from KL(student || teacher). Its
gradient with respect to the student's LoRA is taken in three ways, each one backward from mu_s with another vector:

    closed form        d KL / d mu_s = (mu_s - mu_t) / s^2; the next state x' is never drawn
    score function     x' = mu_s + s eps,  R = log p_s(x') - log p_t(x'),  R * d log p_s(x') / d mu_s = R eps / s
    with a baseline    (R - KL) eps / s: the mean of R subtracted, the best constant for each state (derived)

KL and log densities are sums over the elements of x. What is reported is in experiments/README.md; one sample is one
state, with its own starting noise (captions take turns), and for the last two one x' as well. The squared norm is that
of the closed form for all three, less trace / n, because the mean of n noisy gradients is longer than their
expectation. It is nan where n samples do not tell it from 0.

A second table is about `--grad-states 1`: an optimizer step of K batches, each with one learned state, and the gradient
of Eq. 7. Where the states are drawn independently, the noise is what one state has, and how far the K states' mean
gradients are from each other; where they take turns, as `draw_states` in train.py has it, the second part is gone.

Differs from the paper, which compares training curves: this is the variance itself, at one point of training.
"""
if not __package__:
    import as_module  # noqa: F401

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
from plumbing import lora_files
from plumbing.checkpoints import model_folder, recipe_of, shift_rule
from plumbing.files import InputError, check_writable, write_bytes, write_json
from plumbing.options import option, parse
from plumbing.program import run as run_program
from rollout import coefficients, rollout, sigma_grid, transition
from tiny.comparison import markdown
from tiny.score import Judge

ESTIMATES = ("closed form", "score function", "score function with a baseline")
DRAWS = ("all states of one batch", "one state each, drawn independently", "one state each, in turns")
COLUMNS = ("sigma", "s", "KL", "squared norm of the mean", *ESTIMATES)


@dataclass
class Options:
    lora: str = option(dataclasses.MISSING, "adapter file that is the teacher")
    data: str = option(dataclasses.MISSING, "folder with captions; images are not needed")
    samples: int = option(64, "number of states, and of gradients of each kind, at each noise level")
    noise: float = option(0.7, "a, the amount of noise in the rollout's steps; above 0, or there is no density")
    student: str | None = option(None, "adapter file of the student (default: the untuned model with a new LoRA)")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded, which is tiny/model")
    seed: int = option(0, "random seed for the starting noises, the steps and a new LoRA")
    out: str = option("out/variance", "folder for variance.md and variance.json")


# ------------------------------------------------------------------------------------------------- the estimates
def estimates(mean: Tensor, goal: Tensor, std: float, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """KL of N(mean, std^2) from N(goal, std^2), and each of ESTIMATES of d KL / d mean, like mean; eps: of x'."""
    x = mean + std * eps
    kl = (mean - goal).square().sum() / (2 * std ** 2)
    ratio = ((x - goal).square().sum() - (x - mean).square().sum()) / (2 * std ** 2)        # R: the constants cancel
    return kl, dict(zip(ESTIMATES, ((mean - goal) / std ** 2, ratio * eps / std, (ratio - kl) * eps / std)))


def moments(sums: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Trace of the covariance and squared norm of the expectation (...) of `count` gradients, both unbiased: the norm
    can be negative where the noise is too large. From their sum (..., P) and the sum of their squared norms (...)."""
    trace = (squares - sums.square().sum(-1) / count) / (count - 1)
    return trace, (sums / count).square().sum(-1) - trace / count


# ------------------------------------------------------------------------------------------------- measuring
def measure(net: torch.nn.Module, contexts: list[Tensor], noises: Tensor, sigmas: Tensor, teacher: lora.Adapter,
            student: lora.Adapter, noise: float, seed: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """One row of COLUMNS for each noise level, and the relative variance of each of DRAWS. contexts: of the captions;
    noises: (samples, C, H, W) at sigma = 1."""
    parameters, rows = student.parameters(), [{"sigma": sigma, "s": 0.0, "KL": 0.0} for sigma in sigmas[:-1].tolist()]
    squares = torch.zeros(len(rows), len(ESTIMATES), dtype=torch.float64)           # sums over samples
    sums = torch.zeros(*squares.shape, sum(part.numel() for part in parameters), dtype=torch.float64)
    steps = torch.tensor([coefficients(*pair, noise) for pair in pairwise(sigmas.tolist())], dtype=torch.float64)
    to_eq7 = (steps[:, 2] / steps[:, 1]).square()       # KL = q^2 / s^2 || v_s - v_t ||^2 / 2; the factor 2 is for all
    mean_sum, mean_square = torch.zeros_like(sums[0, 0]), torch.zeros((), dtype=torch.float64)      # over states
    for number, x in enumerate(noises):
        context, rng = [contexts[number % len(contexts)]], data.generator(seed, "steps", number)
        mean_gradient = torch.zeros_like(mean_sum)
        points = rollout(lora.velocity_of(net, context, student), x[None], sigmas, None, noise, rng)
        for level, point in enumerate(points):
            with torch.no_grad():
                v_teacher = net.velocity(point.x, point.sigma, context, teacher).float()
            step = point.sigma, point.sigma_next, noise
            mean, std = transition(point.x, point.v, *step)                         # carries the graph
            goal, _ = transition(point.x, v_teacher, *step)
            kl, vectors = estimates(mean.detach(), goal, std, torch.randn(mean.shape, generator=rng))
            rows[level] |= {"s": std, "KL": rows[level]["KL"] + float(kl) / len(noises)}
            for i, vector in enumerate(vectors.values()):
                parts = torch.autograd.grad(mean, parameters, vector, retain_graph=True, materialize_grads=True)
                gradient = torch.cat([part.flatten() for part in parts]).double()
                sums[level, i] += gradient
                squares[level, i] += gradient.square().sum()
                mean_gradient += gradient * to_eq7[level] / len(rows) if i == 0 else 0
            del mean, point                                                         # one graph alive at a time
        mean_sum += mean_gradient
        mean_square += mean_gradient.square().sum()
    traces, norms = moments(sums, squares, len(noises))
    draws = of_draws(*(part[:, 0] * to_eq7.square() for part in (traces, norms)),
                     *moments(mean_sum, mean_square, len(noises)))
    for row, of_row, norm in zip(rows, traces.tolist(), norms[:, 0].tolist()):      # the norm of the closed form
        row |= {"squared norm of the mean": norm,
                **{name: trace / norm if norm > 0 else math.nan for name, trace in zip(ESTIMATES, of_row)}}
    return rows, draws


def of_draws(traces: Tensor, norms: Tensor, trace: Tensor, norm: Tensor) -> dict[str, float]:
    """Relative variance of a gradient, of DRAWS: of one batch at all K states, of K batches at one state each.

    traces, norms: (K,) of the gradient at each state; trace, norm: of its mean over the states of one rollout.
    """
    between = norms.mean() - norm                                                   # of the states' expectations
    found = trace, (traces.mean() + between) / len(traces), traces.mean() / len(traces)
    return {name: float(value / norm) if norm > 0 else math.nan for name, value in zip(DRAWS, found)}


def table(rows: list[dict[str, float]], draws: dict[str, float], options: Options) -> str:
    about = ("Relative variance of one sample's gradient: trace of the covariance / squared norm of the mean, "
             f"{options.samples} samples at each noise level, a = {options.noise:g}. KL and gradients are sums over "
             "elements.")
    states = (f"Eq. 7, relative variance of the gradient of {len(rows)} forward passes with a gradient.",
              markdown(DRAWS, [[f"{draws[name]:.3g}" for name in DRAWS]]))
    return "\n\n".join([about, markdown(COLUMNS, [[f"{row[name]:.3g}" for name in COLUMNS] for row in rows]), *states
                        ]) + "\n"


def main(argv: list[str] | None = None) -> int:
    options = parse(Options, argv, "Variance of two estimates of the per-step KL's gradient, on the embedded model.")
    if options.samples < 2:
        raise InputError(f"--samples {options.samples}: no variance of so few; give 2 or more")
    if not 0 < options.noise < math.inf:
        raise InputError(f"--noise {options.noise}: the steps have no density to draw from; give a number above 0")
    out, folder = Path(options.out), model_folder(options.model)
    check_writable(out, f"--out {out}")
    texts = [row.captions[0] for row in data.read_folder(options.data, captions_suffice=True)]
    judge, recipe = Judge(folder), recipe_of(folder)
    teacher = lora_files.load(Path(options.lora), judge.net)
    student = lora.create(judge.net, recipe.rank, recipe.alpha, options.seed) if options.student is None else \
        lora_files.load(Path(options.student), judge.net)
    for tensor in student.parameters():
        tensor.requires_grad_()
    noises = judge.noise(options.samples, data.generator(options.seed, "noise"))
    sigmas = sigma_grid(shift_rule(folder)(recipe.rollout_steps, *noises.shape[2:]), recipe.rollout_steps)
    rows, draws = measure(judge.net, judge.features.contexts(texts), noises, sigmas, teacher, student, options.noise,
                   options.seed)
    files, text = [out / "variance.md", out / "variance.json"], table(rows, draws, options)
    write_bytes(files[0], text.encode())
    write_json(files[1], {"options": dataclasses.asdict(options), "rows": rows, "draws": draws})
    print(text, *files, sep="\n")
    return 0


if __name__ == "__main__":
    run_program(main)
