"""How noisy is the gradient of the per-step KL: in closed form, and as PPO-style methods estimate it?

    python -m experiments.variance --lora out/star/student.safetensors --data examples/star

DiffusionOPD (arXiv 2605.15055) on the embedded model: at a state x of the student's stochastic rollout both sides take
a Gaussian step, N(mu_s, s^2) and N(mu_t, s^2) with the same s, and the student learns from KL(student || teacher). Its
gradient with respect to the student's LoRA is taken in three ways, each one backward from mu_s with another vector:

    closed form        d KL / d mu_s = (mu_s - mu_t) / s^2; the next state x' is never drawn
    score function     x' = mu_s + s eps,  R = log p_s(x') - log p_t(x'),  R * d log p_s(x') / d mu_s = R eps / s
    with a baseline    (R - KL) eps / s: the mean of R subtracted, the best constant for each state (derived)

All three have the same mean, because that of eps is 0. KL and log densities are sums over the elements of x; with means
over elements all gradients would be smaller by a constant, which cancels below.

Reported for each noise level, over starting noises (and captions, in turns): trace of the covariance of one sample's
gradient, divided by the squared norm of the mean gradient. One sample is one state, and for the last two one x' as
well; a batch of n divides all by n. The squared norm is that of the closed form for all three, less trace / n, because
the mean of n noisy gradients is longer than their expectation. It is nan where n samples do not tell it from 0.

Differs from the paper, which compares training curves: this is the variance itself, at one point of training. The
student is the untuned model with a new LoRA (B = 0), or what `--student` gives.
"""
if not __package__:
    import as_module  # noqa: F401

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
from experiments.figures import pyplot
from experiments.report import markdown
from plumbing import lora_files
from plumbing.checkpoints import backbone_of, model_folder, recipe_of
from plumbing.files import InputError, check_writable, read_json, write_bytes
from plumbing.options import option, parse
from plumbing.program import run as run_program
from rollout import rollout, sigma_grid, transition
from tiny.score import Judge

ESTIMATES = ("closed form", "score function", "score function with a baseline")
COLUMNS = ("sigma", "s", "KL", "squared norm of the mean", *ESTIMATES)


@dataclass
class Options:
    lora: str = option(dataclasses.MISSING, "the teacher: an adapter file")
    data: str = option(dataclasses.MISSING, "folder with captions; images are not needed")
    samples: int = option(64, "states, and as many gradients of each kind, at each noise level")
    noise: float = option(0.7, "a: of the rollout's steps; above 0, or there is no density")
    student: str | None = option(None, "adapter file of the student; default: the untuned model with a new LoRA")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded: tiny/model")
    seed: int = option(0, "of the starting noises, the steps and a new LoRA")
    out: str = option("out/variance", "folder for variance.md, variance.json and variance.png")


# ------------------------------------------------------------------------------------------------- the estimates
def kl(mean: Tensor, goal: Tensor, std: float) -> Tensor:
    """KL of N(mean, std^2) from N(goal, std^2), summed over all elements: scalar."""
    return (mean - goal).square().sum() / (2 * std ** 2)


def closed_form(mean: Tensor, goal: Tensor, std: float) -> Tensor:
    """d KL / d mean, like mean; goal: the teacher's mean."""
    return (mean - goal) / std ** 2


def score_function(mean: Tensor, goal: Tensor, std: float, eps: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """(log p_s(x') - log p_t(x') - baseline) d log p_s(x') / d mean at x' = mean + std eps, like mean.

    REINFORCE's estimate of d KL / d mean. log p_s is differentiated at a fixed x', so d log p_s / d mean is
    (x' - mean) / std^2 = eps / std. log p_t and the baseline do not depend on the student.
    """
    x = mean + std * eps
    ratio = ((x - goal).square().sum() - (x - mean).square().sum()) / (2 * std ** 2)        # the constants cancel
    return (ratio - baseline) * eps / std


class Spread:
    """Mean and variance of gradients (P,), of which only two sums are kept, in float64."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, gradient: Tensor) -> None:
        self.count, self.sum = self.count + 1, self.sum + gradient.double()
        self.squares += float(gradient.double().square().sum())

    def trace(self) -> float:
        """Trace of the covariance, unbiased."""
        return (self.squares - float(self.sum.square().sum()) / self.count) / (self.count - 1)

    def norm(self) -> float:
        """Squared norm of the expectation, unbiased; it can come out negative where the noise is too large."""
        return float((self.sum / self.count).square().sum()) - self.trace() / self.count


# ------------------------------------------------------------------------------------------------- measuring
def measure(net: torch.nn.Module, contexts: list[Tensor], noises: Tensor, sigmas: Tensor, teacher: lora.Adapter,
            student: lora.Adapter, noise: float, seed: int) -> list[dict[str, float]]:
    """One row of COLUMNS for each noise level. contexts: of the captions; noises: (samples, C, H, W) at sigma = 1."""
    parameters = student.parameters()
    spreads = [{name: Spread() for name in ESTIMATES} for _ in sigmas[1:]]
    rows = [{"sigma": sigma, "s": 0.0, "KL": 0.0} for sigma in sigmas[:-1].tolist()]
    for number, x in enumerate(noises):
        context, rng = [contexts[number % len(contexts)]], data.generator(seed, "steps", number)
        points = rollout(lambda x, sigma: net.velocity(x, sigma, context, student), x[None], sigmas, None, noise, rng)
        for row, spread, point in zip(rows, spreads, points):
            with torch.no_grad():
                v_teacher = net.velocity(point.x, point.sigma, context, teacher)
            step = point.sigma, point.sigma_next, noise
            mean, std = transition(point.x, point.v, *step)                         # carries the graph
            goal, fixed = transition(point.x, v_teacher.float(), *step)[0], mean.detach()
            eps = torch.randn(mean.shape, generator=rng)
            row["s"], row["KL"] = std, row["KL"] + float(kl(fixed, goal, std)) / len(noises)
            vectors = (closed_form(fixed, goal, std), score_function(fixed, goal, std, eps),
                       score_function(fixed, goal, std, eps, kl(fixed, goal, std)))
            for name, vector in zip(ESTIMATES, vectors):
                parts = torch.autograd.grad(mean, parameters, vector, retain_graph=True, materialize_grads=True)
                spread[name].add(torch.cat([part.flatten() for part in parts]))
            del mean, point                                                                 # one graph alive at a time
    for row, spread in zip(rows, spreads):
        norm = spread["closed form"].norm()
        row["squared norm of the mean"] = norm
        row |= {name: spread[name].trace() / norm if norm > 0 else math.nan for name in ESTIMATES}
    return rows


def table(rows: list[dict[str, float]], samples: int, noise: float) -> str:
    cells = [[f"{row[name]:.3g}" for name in COLUMNS] for row in rows]
    return "\n\n".join([
        f"Relative variance of one sample's gradient: trace of the covariance / squared norm of the mean, {samples} "
        f"samples at each noise level, a = {noise:g}. KL and gradients are sums over elements.",
        markdown(COLUMNS, cells)]) + "\n"


def draw(rows: list[dict[str, float]], path: Path) -> bool:
    """The same as bars on a logarithmic scale; whether there is matplotlib to draw them."""
    plt = pyplot(path)
    if plt is None:
        return False
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for number, name in enumerate(ESTIMATES):
        axis.bar([k + 0.27 * (number - 1) for k in range(len(rows))], [row[name] for row in rows], 0.25, label=name)
    axis.set_yscale("log")
    axis.set_xticks(range(len(rows)), [f"{row['sigma']:.3g}" for row in rows])
    axis.set_xlabel("sigma")
    axis.set_ylabel("relative variance")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


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
    student = lora.create(judge.net, recipe.rank, recipe.alpha, options.seed)
    if options.student:
        student = lora_files.load(Path(options.student), judge.net)
        for tensor in student.parameters():
            tensor.requires_grad_()
    noises = judge.noise(options.samples, data.generator(options.seed, "noise"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")                   # the grid of train.py
    shift = backbone_of(folder).time_shift(scheduler, recipe.rollout_steps, *noises.shape[2:])
    sigmas = sigma_grid(shift, recipe.rollout_steps)
    rows = measure(judge.net, judge.features.contexts(texts), noises, sigmas, teacher, student, options.noise,
                   options.seed)
    text = table(rows, options.samples, options.noise)
    write_bytes(out / "variance.md", text.encode())
    write_bytes(out / "variance.json", (json.dumps({"options": dataclasses.asdict(options), "rows": rows}, indent=1)
                                        + "\n").encode())
    drawn = draw(rows, out / "variance.png")
    print(f"{text}\n" + "\n".join(str(out / f"variance.{kind}") for kind in ("md", "json", *(["png"] * drawn))))
    return 0


if __name__ == "__main__":
    run_program(main)
