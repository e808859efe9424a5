"""Stage 4: step distillation to four steps. `torchrun --nproc-per-node 2 -m tiny.distill`

The pre-trained model walks the sampler in 12 steps with classifier-free guidance 2 (24 forward passes). The student, a
copy of it, learns to do the same in 4 forward passes without guidance: for each segment [sigma_k, sigma_k+1] of its own
grid, the *average* velocity with which the teacher crossed it, (x_k+1 - x_k) / (sigma_k+1 - sigma_k). In
the second half of the training the states x_k are those of the student's own trajectory, and the teacher crosses the
segment from there: what a few-step model gets wrong early it then learns to live with.

Half of the contexts are text. The other half is image + text, and there the teacher reads the same in words alone ("a
striped orange and blue star" for [V]): words it reads best, and after stage 3 it still takes the backdrop from the
picture too often when the prompt says another one.
"""
import argparse
import copy
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import model as transformer
import vae as autoencoder
from files import write_json, write_tensors
from rollout import euler, sample, shifted, sigma_grid
from tiny.pretrain import CONFIG, SCHEDULER, Contexts, guided, is_matrix, load_features
from tiny.stage import Stage, generator, join
from tiny.train_vlm import draw_concepts
from tiny.world import Renderer, caption, draw_scenes, grid, random_tell

STEPS, GUIDANCE = 4, 2.0
SUBSTEPS = (2, 2, 2, 6)          # of the teacher in each segment; the marks on the backdrop are decided in the last one


@torch.no_grad()
def cross(teacher, x: Tensor, k: int) -> Tensor:
    """Where the teacher arrives from x (B, C, H, W) at the start of segment k, after SUBSTEPS[k] guided Euler steps."""
    u = torch.linspace(1 - k / STEPS, 1 - (k + 1) / STEPS, SUBSTEPS[k] + 1)
    sigmas = shifted(u, SCHEDULER["shift"])
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x = euler(x, teacher(x, float(sigma)), float(sigma), float(sigma_next))
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tiny/distill"), help="folder of the state and the log")
    parser.add_argument("--base", type=Path, default=Path("tiny/base"),
                        help="folder with the transformer/ of stage 3; is kept")
    parser.add_argument("--model", type=Path, default=Path("tiny/model"),
                        help="checkpoint folder: reads vae, vlm, ...; writes transformer/")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="pictures per process and step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks: needs a C++ compiler")
    options = parser.parse_args()

    rank, processes = join()
    torch.manual_seed(options.seed)
    render, features = Renderer(), load_features(options.model)
    vae, contexts = autoencoder.load(options.model, "cpu"), Contexts(features, render)
    teacher = transformer.load(options.base, "cpu", torch.float32)
    student = copy.deepcopy(teacher).requires_grad_(True)
    for network in (teacher, student) if options.compile else ():
        transformer.compile_blocks(network)
    stage = Stage(student, options.out, options.steps, adam=5e-4, muon=0.006, ema=0.97, warmup=20, is_matrix=is_matrix)
    sigmas = sigma_grid(SCHEDULER, STEPS)
    empty = features.contexts([""])

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(options.seed + 20, step * processes + rank)
        kind = ("text", "image", "text", "image", "text", "style", "text", "image", "text", "image")[step % 10]
        rows = draw_concepts(options.batch, g, "style") if kind == "style" else draw_scenes(options.batch, g)
        if kind == "text":
            context = told = contexts.text(rows, g)
        else:
            context, prompts = contexts.image(rows, "style" if kind == "style" else "object", g)
            told = features.contexts(prompts)
        guide = guided(teacher, told, empty * len(rows), GUIDANCE)
        own_states = step >= options.steps // 2
        x, errors = torch.randn(len(rows), CONFIG["in_channels"], 16, 16, generator=g), []
        for k, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
            arrived = cross(guide, x, k)
            v = student.velocity(x, sigma, context)
            errors.append((v - (arrived - x) / (sigma_next - sigma)).square().mean())
            x = euler(x, v.detach(), sigma, sigma_next) if own_states else arrived
        return sum(errors) / STEPS, {f"segment {k}": error.item() for k, error in enumerate(errors)}

    for step in stage.run(loss_of, save_every=50):
        averaged = stage.averaged()
        write_json(options.model / "transformer" / "config.json", CONFIG)
        write_tensors(options.model / "transformer" / "diffusion_pytorch_model.safetensors", averaged.state_dict(),
                      {"format": "pt"})
        show(options.out / f"samples_{step:06d}.png", teacher, averaged, vae, features, render)


@torch.no_grad()
def show(path: Path, base, student, vae, features, render: Renderer) -> None:
    """Rows: base at 4 steps, base at 4 and at 16 steps with guidance, student at 4; columns: prompts that leave much
    open."""
    g = generator(31, 0)
    rows = draw_scenes(12, g, held_out="object")
    context, empty = features.contexts([caption(row, random_tell(g)) for row in rows]), features.contexts([""] * 12)
    noise = torch.randn(12, CONFIG["in_channels"], 16, 16, generator=g)
    walks = [(guided(base, context, empty, 1.0), 4), (guided(base, context, empty, GUIDANCE), 4),
             (guided(base, context, empty, GUIDANCE), 16), (guided(student, context, empty, 1.0), 4)]
    grid(torch.cat([vae.decode(sample(walk, noise, sigma_grid(SCHEDULER, n))) for walk, n in walks]), 12).save(path)


if __name__ == "__main__":
    main()
