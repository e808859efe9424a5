"""Stage 4: step distillation to four steps. `torchrun --nproc-per-node 2 -m tiny.making.distill [--backbone flux2]`

The pre-trained model walks the sampler in 12 steps with classifier-free guidance 2 (24 forward passes). The student, a
copy of it, learns to do the same in 4 forward passes without guidance: for each segment [sigma_k, sigma_k+1] of its own
grid, the *average* velocity with which the teacher crossed it, (x_k+1 - x_k) / (sigma_k+1 - sigma_k). In
the second half of the training the states x_k are those of the student's own trajectory, and the teacher crosses the
segment from there: what a few-step model gets wrong early it then learns to live with.

Half of the contexts are text. The other half is image + text, and there the teacher reads the same in words alone ("a
striped orange and blue star" for [V]): words it reads best, and after stage 3 it still takes the backdrop from the
picture too often when the prompt says another one. (For FLUX.2 the tasks are those of klein.py, in its proportions.)
"""
import copy
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from plumbing.backbone import compile_blocks
from plumbing.checkpoints import backbone_of
from plumbing.files import write_json, write_tensors
from rollout import euler, sample, shifted
from tiny.making.pretrain import Lessons, begin
from tiny.making.stage import Stage
from tiny.models import Z_IMAGE_SCHEDULER, guided
from tiny.world import caption, draw_scenes, generator, grid, random_tell

STEPS, GUIDANCE = 4, 2.0
SUBSTEPS = (2, 2, 2, 6)          # of the teacher in each segment; the marks on the backdrop are decided in the last one


@torch.no_grad()
def cross(teacher, x: Tensor, k: int, shift: float = Z_IMAGE_SCHEDULER["shift"]) -> Tensor:
    """Where the teacher arrives from x (B, C, H, W) at the start of segment k, after SUBSTEPS[k] guided Euler steps.

    shift: of the student's grid, whose segments are divided.
    """
    sigmas = shifted(torch.linspace(1 - k / STEPS, 1 - (k + 1) / STEPS, SUBSTEPS[k] + 1), shift)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x = euler(x, teacher(x, float(sigma)), float(sigma), float(sigma_next))
    return x


def main() -> None:
    options, rank, processes = begin(__doc__, "distill", steps=500, batch=16)
    folder, base, out = options.model, options.base, options.out
    lessons = options.lessons(folder, 0, options.seed + 20, rank)
    teacher = backbone_of(base).load(base, "cpu", torch.float32)
    student = copy.deepcopy(teacher).requires_grad_(True)
    for network in (teacher, student) if options.compile else ():
        compile_blocks(network)
    stage = Stage(student, out, options.steps, adam=5e-4, muon=0.006, ema=0.97, warmup=20, is_matrix=lessons.is_matrix,
                  pieces=lessons.pieces)
    sigmas = lessons.grid(STEPS)
    shift = float(sigmas[2] / (1 - sigmas[2]))                                          # u = 1/2 there
    empty = lessons.features.contexts([""])

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(options.seed + 20, step * processes + rank)
        context, told = lessons.pair(step, options.batch, g)
        guide = guided(teacher, told, empty * options.batch, GUIDANCE)
        own_states = step >= options.steps // 2
        x, errors = torch.randn(options.batch, lessons.vae.channels, 16, 16, generator=g), []
        for k, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
            arrived = cross(guide, x, k, shift)
            v = student.velocity(x, sigma, context)
            errors.append((v - (arrived - x) / (sigma_next - sigma)).square().mean())
            x = euler(x, v.detach(), sigma, sigma_next) if own_states else arrived
        return sum(errors) / STEPS, {f"segment {k}": error.item() for k, error in enumerate(errors)}

    for step in stage.run(loss_of, save_every=50):
        averaged = stage.averaged()
        write_json(folder / "transformer" / "config.json", lessons.config)
        write_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", averaged.state_dict(),
                      {"format": "pt"})
        show(out / f"samples_{step:06d}.png", teacher, averaged, lessons)


@torch.no_grad()
def show(path: Path, base, student, lessons: Lessons) -> None:
    """Rows: base at 4 steps, base at 4 and at 16 steps with guidance, student at 4; columns: prompts that leave much
    open."""
    g, features = generator(31, 0), lessons.features
    rows = draw_scenes(12, g, held_out="object")
    context, empty = features.contexts([caption(row, random_tell(g)) for row in rows]), features.contexts([""] * 12)
    noise = torch.randn(12, lessons.vae.channels, 16, 16, generator=g)
    walks = [(guided(base, context, empty, 1.0), 4), (guided(base, context, empty, GUIDANCE), 4),
             (guided(base, context, empty, GUIDANCE), 16), (guided(student, context, empty, 1.0), 4)]
    grid(torch.cat([lessons.vae.decode(sample(walk, noise, lessons.grid(n))) for walk, n in walks]), 12).save(path)


if __name__ == "__main__":
    main()
