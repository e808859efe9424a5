"""Stage 3: flow-matching pre-training of the small Z-Image transformer. `torchrun --nproc-per-node 2 -m tiny.pretrain`

x_sigma = (1 - sigma) x0 + sigma eps, loss = || v(x_sigma, sigma, c) - (eps - x0) ||^2. The contexts c are those of
D-OPSD:
- text (7 of 10 batches): captions that leave much open, some empty, some with [V] and no picture of it;
- image + text (3 of 10): "[V]" and a picture of the concept, mostly *another view* of it, so that the model learns to
  take the concept from the picture and everything else from the words. That ability, not any concept, is what makes
  the teacher.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

import vae as autoencoder
from files import tensors, write_json, write_tensors
from loss import draw_sigma, sft
from model import ZImageTransformer, compile_blocks
from rollout import sample, sigma_grid
from tiny.stage import Stage, generator, join
from tiny.train_vlm import draw_concepts, other_view
from tiny.vlm import WIDTH, Features, build_config
from tiny.world import Renderer, caption, draw_scenes, grid, random_tell

CONFIG = {"_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0", "all_patch_size": [2],
          "all_f_patch_size": [1], "in_channels": 8, "dim": 128, "n_layers": 6, "n_refiner_layers": 1, "n_heads": 4,
          "n_kv_heads": 4, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": WIDTH, "rope_theta": 256.0,
          "t_scale": 1000.0, "axes_dims": [8, 12, 12], "axes_lens": [1024, 64, 64], "siglip_feat_dim": None}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.36.0",
             "num_train_timesteps": 1000, "shift": 10.0, "use_dynamic_shifting": False}
TRAIN_SHIFT = 6.0                           # of the noise levels in training: a little more of the low ones
PLACE_TOLD = 0.6                            # in training captions; to choose a place is harder than to be told one
INDEX = {"_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0",
         "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
         "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
         "transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}


def load_features(folder: Path) -> Features:
    """The frozen VLM of stage 2, put together again from text_encoder/ and vlm/."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    vlm = Qwen3VLForConditionalGeneration(build_config(tokenizer)).eval().requires_grad_(False)
    vlm.config._attn_implementation = "sdpa"
    weights = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors(folder / "text_encoder")}
    weights |= dict(tensors(folder / "vlm"))
    missing, unexpected = vlm.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)                # lm_head is tied
    return Features(vlm, tokenizer)


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

    def __init__(self, features: Features, render: Renderer) -> None:
        self.features, self.render = features, render

    def text(self, rows: Tensor, g: torch.Generator) -> list[Tensor]:
        chance = torch.rand(len(rows), generator=g)
        prompts = []
        for row, u in zip(rows, chance.tolist()):
            tell = random_tell(g, PLACE_TOLD)
            prompts.append("" if u < 0.08 else caption(row, tell, concept="object") if u < 0.13
                           else caption(row, tell, concept="style") if u < 0.15 else caption(row, tell))
        return self.features.contexts(prompts)

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


def guided(model: ZImageTransformer, context: list[Tensor], empty: list[Tensor], guidance: float, adapter=None):
    """velocity(x, sigma) with classifier-free guidance: v_empty + guidance (v - v_empty)."""
    def velocity(x: Tensor, sigma: float) -> Tensor:
        v = model.velocity(x, sigma, context, adapter)
        if guidance == 1:
            return v
        v_empty = model.velocity(x, sigma, empty, adapter)
        return v_empty + guidance * (v - v_empty)
    return velocity


@torch.no_grad()
def check(model: ZImageTransformer, vae: autoencoder.Autoencoder, features: Features, render: Renderer,
          path: Path) -> dict[str, float]:
    """Velocity errors at sigma 0.85 on held-out objects for four kinds of context, and a sheet of samples."""
    g = generator(11, 0)
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
    grid_of = sigma_grid(SCHEDULER, 16)
    noise, empty = eps[:12], features.contexts([""] * 12)
    sheet = [pictures[:12], seen[:12]]
    sheet += [vae.decode(sample(guided(model, contexts[name][:12], empty, 2.0), noise, grid_of))
              for name in ("text", "image")]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.cat(sheet), 12).save(path)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tiny/pretrain"), help="folder of the state and the log")
    parser.add_argument("--model", type=Path, default=Path("tiny/model"), help="checkpoint folder: reads vae, vlm, ...")
    parser.add_argument("--base", type=Path, default=Path("tiny/base"),
                        help="folder to write transformer/ into, in bfloat16")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32, help="pictures per process and step")
    parser.add_argument("--pool", type=int, default=40000, help="pictures whose latents are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks: needs a C++ compiler")
    options = parser.parse_args()

    rank, processes = join()
    torch.manual_seed(options.seed)
    render, features = Renderer(), load_features(options.model)
    vae = autoencoder.load(options.model, "cpu")
    ordinary = Pool(vae, render, "ordinary", options.pool // processes, options.seed, rank)
    styled = Pool(vae, render, "style", options.pool // 8 // processes, options.seed, rank)
    contexts = Contexts(features, render)
    model = ZImageTransformer(CONFIG)
    if options.compile:
        compile_blocks(model)
    stage = Stage(model, options.out, options.steps, adam=1e-3, muon=0.02, ema=0.999, warmup=200, is_matrix=is_matrix)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(options.seed, step * processes + rank)
        kind = ("text", "text", "image", "text", "text", "style", "text", "text", "image", "text")[step % 10]
        rows, latents = (styled if kind == "style" else ordinary).draw(options.batch, g)
        concept = "style" if kind == "style" else "object"
        context = contexts.text(rows, g) if kind == "text" else contexts.image(rows, concept, g)[0]
        eps, sigma = torch.randn(latents.shape, generator=g), draw_sigma(g, TRAIN_SHIFT, len(rows))
        loss = sft(lambda x, sigma: model.velocity(x, sigma, context), latents, eps, sigma)
        return loss, {kind: loss.item()}

    if rank == 0:                                            # two processes would take away each other's temporary file
        write_json(options.model / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(options.model / "model_index.json", INDEX)
    for step in stage.run(loss_of):
        model_average = stage.averaged()
        numbers = check(model_average, vae, features, render, options.out / f"samples_{step:06d}.png")
        print(f"\nstep {step}, velocity error at sigma .85:", {k: round(v, 4) for k, v in numbers.items()})
        write_json(options.base / "transformer" / "config.json", CONFIG)
        write_tensors(options.base / "transformer" / "diffusion_pytorch_model.safetensors",
                      {name: weight.bfloat16() for name, weight in model_average.state_dict().items()},
                      {"format": "pt"})


if __name__ == "__main__":
    main()
