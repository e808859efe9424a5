"""Stage 3: flow-matching pre-training of the small transformer. `torchrun --nproc-per-node 2 -m tiny.making.pretrain`

x_sigma = (1 - sigma) x0 + sigma eps, loss = || v(x_sigma, sigma, c) - (eps - x0) ||^2. The contexts c are those of
D-OPSD:
- text (7 of 10 batches): captions that leave much open, some empty, some with [V] and no picture of it;
- image + text (3 of 10): "[V]" and a picture of the concept, mostly *another view* of it, so that the model learns to
  take the concept from the picture and everything else from the words. That ability, not any concept, is what makes
  the teacher.
`--backbone flux2` trains the small FLUX.2-klein instead, on the tasks of klein.py. It has no VLM that recognises shapes
for it, so it is asked what its references show (`glance`).
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from baselines import denoising_error, draw_sigma
from model import ZImageTransformer
from networks import vae as autoencoder
from plumbing.backbone import compile_blocks
from plumbing.files import write_json, write_tensors
from rollout import sample
from tiny.contexts import WIDTH, VlmFeatures, load_features
from tiny.making import klein
from tiny.making.stage import Stage, join, one_matrix
from tiny.making.train_vlm import draw_concepts
from tiny.models import Z_IMAGE_BASE, Z_IMAGE_FOLDER, Z_IMAGE_SCHEDULER, guided, z_image_grid
from tiny.world import Renderer, caption, draw_scenes, generator, grid, other_view, random_prompts, random_tell

CONFIG = {"_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0", "all_patch_size": [2],
          "all_f_patch_size": [1], "in_channels": 8, "dim": 128, "n_layers": 6, "n_refiner_layers": 1, "n_heads": 4,
          "n_kv_heads": 4, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": WIDTH, "rope_theta": 256.0,
          "t_scale": 1000.0, "axes_dims": [8, 12, 12], "axes_lens": [1024, 64, 64], "siglip_feat_dim": None}
TRAIN_SHIFT = 6.0                           # of the noise levels in training: a little more of the low ones
GLANCE = 0.3                                # weight of what klein.py's heads see in references
INDEX = {"_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0",
         "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
         "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
         "transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}


class Pool:
    """Many scenes with their latents, encoded once: (N, 9) and (N, 8, 16, 16); each process has its own."""

    def __init__(self, vae: autoencoder.Autoencoder, render: Renderer, kind: str, count: int, seed: int,
                 rank: int) -> None:
        g = generator(seed, 77 + rank)
        self.rows = draw_concepts(count, g, "style") if kind == "style" else draw_scenes(count, g)
        chunks = tqdm(self.rows.split(64), desc=f"encode {kind} pictures", disable=rank > 0, mininterval=5)
        self.latents = torch.cat([vae.encode(render.draw(rows, g)) for rows in chunks])

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.randint(len(self.rows), (count,), generator=g)
        return self.rows[pick], self.latents[pick]


class Contexts:
    """Random contexts for scenes: `text` and `image` of the docstring above."""

    def __init__(self, features: VlmFeatures, render: Renderer) -> None:
        self.features, self.render = features, render

    def text(self, rows: Tensor, g: torch.Generator) -> list[Tensor]:
        return self.features.contexts(random_prompts(rows, g))

    def image(self, rows: Tensor, kind: str, g: torch.Generator) -> tuple[list[Tensor], list[str]]:
        """Contexts, and for each a prompt that says the same in words alone: the concept's words instead of [V]."""
        views = other_view(rows, kind, g)
        named = torch.rand(len(rows), generator=g) < 0.15                       # the words are told as well
        tells = [random_tell(g) for _ in rows]
        words = ("main", "pattern") if kind == "object" else ()
        prompts, told = [], []
        for row, tell, known in zip(rows, tells, named.tolist()):
            prompts.append(caption(row, tell, concept="" if known else kind))
            told.append(prompts[-1] if known else caption(row, (*tell, *words)))
        return self.features.contexts(prompts, self.render.draw(views, g)), told


def is_matrix(name: str) -> bool:
    """Weights that Muon trains: attention and feed-forward of all blocks."""
    return ".attention.to_" in name or ".feed_forward." in name


class Lessons:
    """Batches for stages 3 and 4; klein.py has the same for FLUX.2."""

    config, scheduler, index = CONFIG, Z_IMAGE_SCHEDULER, INDEX
    folder, base, grid = Z_IMAGE_FOLDER, Z_IMAGE_BASE, staticmethod(z_image_grid)
    network, is_matrix = staticmethod(lambda: ZImageTransformer(CONFIG)), staticmethod(is_matrix)
    pieces = staticmethod(one_matrix)

    def __init__(self, folder: Path, pool: int, seed: int, rank: int) -> None:
        """pool: pictures whose latents are kept; 0 for stage 4, which needs none."""
        self.render, self.features, self.vae = Renderer(), load_features(folder), autoencoder.load(folder, "cpu")
        self.contexts = Contexts(self.features, self.render)
        if pool:
            self.ordinary = Pool(self.vae, self.render, "ordinary", pool, seed, rank)
            self.styled = Pool(self.vae, self.render, "style", pool // 8, seed, rank)

    def batch(self, step: int, count: int, g: torch.Generator) -> klein.Lesson:
        """Stage 3."""
        kind = ("text", "text", "image", "text", "text", "style", "text", "text", "image", "text")[step % 10]
        rows, latents = (self.styled if kind == "style" else self.ordinary).draw(count, g)
        if kind == "text":
            return klein.Lesson(kind, latents, self.contexts.text(rows, g))
        return klein.Lesson(kind, latents, self.contexts.image(rows, "style" if kind == "style" else "object", g)[0])

    def pair(self, step: int, count: int, g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Stage 4: contexts, and contexts that say the same in words alone."""
        kind = ("text", "image", "text", "image", "text", "style", "text", "image", "text", "image")[step % 10]
        rows = draw_concepts(count, g, "style") if kind == "style" else draw_scenes(count, g)
        if kind == "text":
            context = self.contexts.text(rows, g)
            return context, context
        context, prompts = self.contexts.image(rows, "style" if kind == "style" else "object", g)
        return context, self.features.contexts(prompts)


@torch.no_grad()
def check(model: torch.nn.Module, lessons: Lessons, path: Path) -> dict[str, float]:
    """Velocity errors at sigma 0.85 on held-out objects for four kinds of context, and a sheet of samples."""
    g, vae, features, render = generator(11, 0), lessons.vae, lessons.features, lessons.render
    rows = draw_scenes(64, g, held_out="object")
    views = other_view(rows, "object", g)
    full, concept = [caption(row) for row in rows], [caption(row, concept="object") for row in rows]
    pictures, seen = render.draw(rows, g), render.draw(views, g)
    latents = vae.encode(pictures)
    eps = torch.randn(latents.shape, generator=g)
    x = 0.15 * latents + 0.85 * eps
    contexts = {"text": features.contexts(full), "image": features.contexts(concept, seen),
                "no image": features.contexts(concept),
                "wrong image": features.contexts(concept, seen.roll(1, 0))}
    errors = {name: float((model.velocity(x, 0.85, c) - (eps - latents)).square().mean())
              for name, c in contexts.items()}
    noise, empty = eps[:12], features.contexts([""] * 12)
    sheet = [pictures[:12], seen[:12]]
    sheet += [vae.decode(sample(guided(model, contexts[name][:12], empty, 2.0), noise, lessons.grid(16)))
              for name in ("text", "image")]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.cat(sheet), 12).save(path)
    return errors


LESSONS = {"z-image": Lessons, "flux2": klein.Lessons}


def begin(description: str, name: str, steps: int, batch: int, pool: int | None = None
          ) -> tuple[argparse.Namespace, int, int]:
    """Stages 3 and 4: their options, of which `lessons` is a class and the folders are filled in, rank and processes.

    name: of the stage; steps, batch, pool: defaults, None for what a stage does not have.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--backbone", choices=tuple(LESSONS), default="z-image", help="which transformer to train")
    parser.add_argument("--model", type=Path, help="checkpoint folder that is read (vae/, text_encoder/, ...) and "
                        "added to; default tiny/model or tiny/flux2")
    parser.add_argument("--base", type=Path, help="folder of transformer/ before distillation, in bfloat16; default "
                        "tiny/base or tiny/flux2_base")
    parser.add_argument("--out", type=Path, help=f"folder of the state and the log; default out/tiny/BACKBONE-{name}")
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--batch", type=int, default=batch, help="pictures per process and step")
    if pool is not None:
        parser.add_argument("--pool", type=int, default=pool, help="pictures whose latents are kept")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights, scenes and noise")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks: needs a C++ compiler")
    options = parser.parse_args()
    options.lessons = LESSONS[options.backbone]
    options.model, options.base = options.model or options.lessons.folder, options.base or options.lessons.base
    options.out = options.out or Path("out/tiny") / f"{options.backbone}-{name}"
    rank, processes = join()
    torch.manual_seed(options.seed)
    return options, rank, processes


def main() -> None:
    options, rank, processes = begin(__doc__, "pretrain", steps=8000, batch=32, pool=40000)
    folder, base, out = options.model, options.base, options.out
    lessons = options.lessons(folder, options.pool // processes, options.seed, rank)
    model = lessons.network()
    if options.compile:
        compile_blocks(model)
    stage = Stage(model, out, options.steps, adam=1e-3, muon=0.02, ema=0.999, warmup=200, is_matrix=lessons.is_matrix,
                  pieces=lessons.pieces)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(options.seed, step * processes + rank)
        lesson = lessons.batch(step, options.batch, g)
        eps, sigma = torch.randn(lesson.x0.shape, generator=g), draw_sigma(g, TRAIN_SHIFT, len(lesson.x0))
        loss = denoising_error(lambda x, sigma: model.velocity(x, sigma, lesson.context), lesson.x0, eps, sigma).mean()
        numbers = {lesson.kind: loss.item()}
        if lesson.rows is not None:
            seen, shape = lessons.glance(model, lesson.rows)
            loss, numbers = loss + GLANCE * seen, {**numbers, "seen": seen.item(), "shape seen": shape}
        return loss, numbers

    if rank == 0:                                            # two processes would take away each other's temporary file
        write_json(folder / "scheduler" / "scheduler_config.json", lessons.scheduler)
        write_json(folder / "model_index.json", lessons.index)
    for step in stage.run(loss_of):
        model_average = stage.averaged()
        numbers = check(model_average, lessons, out / f"samples_{step:06d}.png")
        print(f"\nstep {step}, velocity error at sigma .85:", {k: round(v, 4) for k, v in numbers.items()})
        write_json(base / "transformer" / "config.json", lessons.config)
        write_tensors(base / "transformer" / "diffusion_pytorch_model.safetensors",
                      {name: weight.bfloat16() for name, weight in model_average.state_dict().items()
                       if not name.startswith("glances.")},
                      {"format": "pt"})


if __name__ == "__main__":
    main()
