"""Few steps from many: the method. `python -m tiny.making.lightning_stage` trains a stage of it.

SDXL-Lightning, progressive adversarial distillation (arXiv 2402.13929, Sections 2.3 and 3). A teacher crosses a segment
of the student's grid in n solver steps (Eq. 7 to 13), the student in one (Eq. 14, 15):
1. Without --teacher, the undistilled model teaches with classifier-free guidance, by MSE (Eq. 16).
2. With it, a discriminator D sees the pair (x_t, x_t-ns) and learns whether the teacher or the student went from one to
   the other (Eq. 17 to 20); the student learns to be taken for the teacher (Eq. 21). Where MSE would average what a
   single step cannot decide, the student has to decide, and because D sees x_t, to decide as the teacher does.
3. With --relaxed as well, D sees x_t-ns alone (Eq. 23): a student that cannot follow the teacher may go its own way.
Then the student is the next stage's teacher. Here t is sigma, t - n s is sigma', and everything is in v. The commands
that were run, and what came out, are in tiny/README.md.

Differs from the paper:
1. Captions suffice. States are those of the student's own walk, which it has in hand (`Walkers`); the paper adds noise
   to pictures (Eq. 6) and mixes in noise levels that are not on the grid (3.7.1). --linger repeats the last step, which
   on grids like this one's is the hardest, more often than the others.
2. D's backbone is the undistilled transformer up to two thirds of its depth, read at one and at two thirds, for want of
   an encoder and a middle block. It is trained, as published; `--critic heads` leaves it as it was, and then D sees
   hardly anything (tiny/README.md). A head judges each token of the image, and losses are means over tokens and depths:
   one value for each picture is too little to learn from when a batch has 16.
3. A small MSE stays beside the adversarial loss (--anchor; 0 is as published).
4. D is noised (Eq. 25, 26) where the paper's 1- and 2-step stages end, at x0, at its four levels in equal
   signal-to-noise; weighted 1:1:1:1 throughout. Real and fake get the same noise. --noised 0 leaves it out: at a batch
   of 16, D then learns far sooner.
5. Every stage predicts v, the one-step one too (3.7.3 turns SDXL's from eps into x0 because of a 1 / alpha at t = 1
   that v does not have). Pure noise is at sigma = 1 by definition (3.5).
6. D judges where sigma' is below --judge-below. Above, x_t-ns is nearly all noise on grids like this one's, D learns
   nothing there, and what the student has to learn is smooth: the MSE does.
7. Relaxed stages can take the teacher's own pictures for real, drawn once (lightning_pool.py).
8. Any network may teach, with any number of steps. Best was the student itself after MSE, in four times its own steps:
   it decides more than the model that taught it.
9. Learning rates are larger and batches smaller: 16 instead of 512. What is kept is an average of the weights.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Context, ZImageTransformer
from plumbing.backbone import Transformer
from rollout import Velocity, euler, sigma_grid
from tiny.making.material import pack, unpack
from tiny.world import generator

NOISED = (0.0895, 0.4103, 0.6181, 0.8039)   # sigma with the signal-to-noise of SDXL's t = 10, 250, 500, 750


# ---------------------------------------------------------------------------------------------------- segments
def segments(shift: float, steps: int, between: int) -> Tensor:
    """Noise levels (steps, between + 1) of the teacher's solver steps in each of the student's; row k starts where the
    student's step k starts, and ends where it ends."""
    return sigma_grid(shift, steps * between).unfold(0, between + 1, between)


def column(sigma: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return sigma.view(-1, 1, 1, 1)


@torch.no_grad()
def cross(teacher: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """Where the teacher arrives from x (B, C, H, W) over the noise levels (B, n + 1) of each row (Eq. 7 to 13)."""
    for sigma, sigma_next in pairwise(sigmas.t()):
        x = euler(x, teacher(x, sigma), column(sigma), column(sigma_next))
    return x


class Walkers:
    """Trajectories of the student from pure noise, each at its own point of the grid.

    A student's prediction of x_t-ns is also its next state, so walking costs nothing: the states of inference with the
    weights of the last few steps. A row that has arrived repeats its last step `linger` times, from the teacher's
    picture with new noise (Eq. 6). Then it begins anew, with new noise and a new caption: row i at steps i,
    i + K + linger, i + 2 (K + linger), ...
    """

    def __init__(self, source, batch: int, grid: Tensor, seed: int, linger: int = 0) -> None:
        """source: of captions, `World` or `Captions`. batch: number of trajectories. grid: `segments`."""
        self.source, self.seed = source, seed
        self.steps, self.period, self.last = len(grid), len(grid) + linger, float(grid[-1, 0])
        self.x, self.k = torch.zeros(batch, *source.shape), torch.zeros(batch, dtype=torch.long)
        self.contexts: list[list[Context]] = [[], []]               # the student's, and what the teacher reads instead

    def begin(self, step: int) -> None:
        """Give new noise and captions to the rows whose turn it is."""
        g, batch = generator(self.seed, step), len(self.x)
        rows = range(batch) if step == 0 else range(step % self.period, batch, self.period)
        if not rows:
            return
        noise = torch.randn(len(rows), *self.x.shape[1:], generator=g)
        drawn = self.source.draw(step, len(rows), g)
        for side, contexts in enumerate(drawn):
            by_row = dict(enumerate(self.contexts[side])) | dict(zip(rows, contexts))
            self.contexts[side] = [by_row[i] for i in range(batch)]
        self.x, self.k = self.x.clone(), self.k.clone()
        self.x[list(rows)], self.k[list(rows)] = noise, 0

    def advance(self, fake: Tensor, real: Tensor, noise: Tensor) -> None:
        """Go to the student's predictions, or from its last one to where the last step starts; all (B, C, H, W)."""
        again = (1 - self.last) * real + self.last * noise                                                      # Eq. 6
        self.x = torch.where(column(self.k == self.steps - 1), again, fake)
        self.k = (self.k + 1).clamp(max=self.steps - 1)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        mine, told = self.contexts
        return {"walkers.x": self.x, "walkers.k": self.k, **pack("walkers.mine", mine), **pack("walkers.told", told)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.x, self.k = state["walkers.x"], state["walkers.k"]
        self.contexts = [unpack(state, f"walkers.{side}", len(self.x)) for side in ("mine", "told")]


# ---------------------------------------------------------------------------------------------------- discriminator
def head(width: int) -> nn.Module:
    """Features of a token (..., width) -> logit (..., 1)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 1))


class Discriminator(nn.Module):
    """Logits of "the teacher made this": D of Eq. 22, or D' of Eq. 23 without x_t."""

    def __init__(self, backbone: Transformer, width: int, sees_x_t: bool, learns: bool) -> None:
        """backbone: a copy of the pre-trained network, `width` wide; what lies behind two thirds of its depth is cut
        off. learns: whether it is trained, or the heads alone."""
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.backbone, self.sees_x_t, self.learns = backbone.requires_grad_(learns), sees_x_t, learns
        group = list(backbone.blocks())[-1].rpartition(".")[0]                          # the main blocks
        depth = len(getattr(backbone, group))
        depths = sorted({max(depth // 3, 1), max(2 * depth // 3, 1)})
        setattr(backbone, group, getattr(backbone, group)[:depths[-1]])
        self.read = [f"{group}.{depth - 1}" for depth in depths]
        self.heads = nn.ModuleList([head(width * (1 + sees_x_t)) for _ in self.read])

    def features(self, x: Tensor, sigma: Tensor, context: list) -> list[Tensor]:
        """d(x, sigma, c): the image's tokens (B, N, width) after each of the blocks that are read."""
        seen: list[Tensor] = []
        blocks = self.backbone.blocks()
        hooks = [blocks[name].register_forward_hook(lambda block, given, out: seen.append(out)) for name in self.read]
        try:
            self.backbone.velocity(x, sigma, context)
        finally:
            for hook in hooks:
                hook.remove()
        count = x[0, 0].numel() // self.backbone.multiple ** 2
        first = 0 if isinstance(self.backbone, ZImageTransformer) else max(len(c.text) for c in context)
        return [tokens[:, first:first + count] for tokens in seen]

    def forward(self, after: list[Tensor], before: list[Tensor]) -> Tensor:
        """Features of x_t-ns and of x_t -> logits (B, 2 N); D' does not look at the latter."""
        pairs = [torch.cat(pair, dim=-1) if self.sees_x_t else pair[0] for pair in zip(after, before or after)]
        return torch.cat([judge(pair).squeeze(-1) for judge, pair in zip(self.heads, pairs)], dim=1)


@contextmanager
def fixed(network: nn.Module) -> Iterator[None]:
    """No gradient for what it has learned so far, only through it."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------- losses
def loss_of_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-log p - log(1 - p^) with p = sigmoid(logit), Eq. 20; scalar, the mean over pictures and tokens."""
    return (F.softplus(-real) + F.softplus(fake)).mean()


def loss_of_student(fake: Tensor) -> Tensor:
    """-log p^, Eq. 21, non-saturating; scalar."""
    return F.softplus(-fake).mean()


class Lesson:
    """One batch: states of the student, and where the teacher and the student go from there."""

    def __init__(self, x: Tensor, sigmas: Tensor, student: Velocity, teacher: Velocity, noise: Tensor,
                 levels: Tensor) -> None:
        """x: (B, C, H, W). sigmas: (B, n + 1), `segments` of each row. noise: like x; levels (B,): how much of it D
        is shown at x0 (Eq. 25, 26), 0 for none."""
        self.x, self.sigma, self.sigma_next = x, sigmas[:, 0], sigmas[:, -1]
        self.real, v = cross(teacher, x, sigmas), student(x, self.sigma)                # x_t-ns; Eq. 14
        length = column(self.sigma_next - self.sigma)
        self.fake = x + length * v                                                      # Eq. 15
        self.mse = (v - (self.real - x) / length).square().mean()                       # Eq. 16 / (sigma' - sigma)^2
        self.noise, is_x0 = noise, self.sigma_next == 0
        self.level = torch.where(is_x0, levels, torch.zeros_like(levels))
        self.seen_at = torch.where(is_x0, levels, self.sigma_next)

    def losses(self, critic: Discriminator, context: list, below: float = 1.0,
               pool: tuple[Tensor, list] | None = None) -> Iterator[Tensor]:
        """That of D, whose gradient reaches D alone; when it is asked for the next, that of the student.

        below: rows with a larger sigma' are not judged, if there are others. pool: x0 of the teacher's own walks (B, C,
        H, W) and their contexts, which D' takes for real instead of where the teacher went from the student's states.
        """
        rows = (self.sigma_next < below).nonzero().flatten().tolist() or list(range(len(self.x)))

        def features(x: Tensor, context: list) -> list[Tensor]:
            level = column(self.level)[rows]
            return critic.features((1 - level) * x[rows] + level * self.noise[rows], self.seen_at[rows],    # Eq. 25, 26
                                   [context[row] for row in rows])

        before = critic.features(self.x[rows], self.sigma[rows], [context[row] for row in rows]
                                 ) if critic.sees_x_t else []
        if pool is None:
            real = features(self.real, context)
        else:
            sigma = column(self.sigma_next)
            real = features((1 - sigma) * pool[0] + sigma * self.noise, pool[1])
        yield loss_of_discriminator(critic(real, before), critic(features(self.fake.detach(), context), before))
        before = [tokens.detach() for tokens in before]                 # of D before its step: a pass less
        with fixed(critic):
            loss = loss_of_student(critic(features(self.fake, context), before))        # Eq. 21
        yield loss
