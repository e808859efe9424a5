"""The embedded FLUX.2-klein: what it shares with the embedded Z-Image, and what it is taught.

`python -m tiny.making.klein` puts together tiny/flux2 without its transformer, in a minute: the VAE of tiny/model with
the BatchNorm statistics of FLUX.2, its text encoder and VLM with tokens for the words of instructions, FLUX.2's
schedule. Then pretrain.py and distill.py with `--backbone flux2` make the transformer. It reads reference images, so
it is taught more than its sibling:
- text: captions that leave much open;
- concept: "[V]" and a picture of the concept as reference, mostly another view of it;
- edit: a picture and "move it to the left", "make it red", "put it on mint": all else stays, the marks of the backdrop
  too, which only the picture tells;
- insert: a picture, "make it [V]" or "paint it [V]", and a picture that shows the concept as last reference.
No stage draws a held-out object or style (world.py), as a picture or as a target.
"""
import argparse
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from encoder import reference_prompt
from model import Context
from networks import flux2
from networks import vae as autoencoder
from plumbing.files import read_json, tensors, write_json, write_tensors
from tiny.contexts import TOKENS, WIDTH, ReferenceFeatures
from tiny.edits import CHANGES, Edits, instruction
from tiny.making.train_vlm import draw_concepts, glance
from tiny.models import FLUX2_BASE, FLUX2_FOLDER, FLUX2_SCHEDULER, Z_IMAGE_FOLDER, flux2_grid
from tiny.world import (ATTRIBUTES, OBJECT_ATTRIBUTES, PLACE_TOLD, SIDE, Renderer, caption, draw_marks, draw_scenes,
                        generator, other_view, random_prompts, random_tell)

CONFIG = {"_class_name": "Flux2Transformer2DModel", "_diffusers_version": "0.37.0", "patch_size": 1, "in_channels": 32,
          "out_channels": None, "num_layers": 2, "num_single_layers": 6, "attention_head_dim": 32,
          "num_attention_heads": 4, "joint_attention_dim": 3 * WIDTH, "timestep_guidance_channels": 128,
          "mlp_ratio": 3.0, "axes_dims_rope": [4, 10, 10, 8], "rope_theta": 64, "eps": 1e-6, "guidance_embeds": False}
INDEX = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0", "is_distilled": True,
         "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
         "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
         "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"]}
NEW_WORDS = ("Keep", "subject", "background", "composition", "of", "reference", "image", "The", "last", "shows",
             "wanted", "result", "make", "move", "paint", "put", "it", "to")
THOUGHT = ("<think>", "</think>")
# What Qwen3's chat template does, too, and Flux2KleinPipeline asks for.
NO_THOUGHT = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
# Hidden states of tiny/model are about 45 in size. Z-Image has a norm in front of them, FLUX.2 has none: a first
# attempt carried words 30 times as large as pictures through all blocks, and these could not add to them.
RESIDUAL = 1 / 64
# How FLUX.2 packs latents into squares and normalises them; in the config of its VAE.
LATENT_NORM = {"patch_size": [2, 2], "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1}


# ------------------------------------------------------------------------------------------------------- the folder
def assemble(source: Path, folder: Path, pictures: int = 4096) -> None:
    """Everything of `folder` but the transformer's weights, from the embedded Z-Image in `source`.

    pictures: how many the statistics of latents are taken from.
    """
    tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
    old = len(tokenizer)
    tokenizer.backend_tokenizer.add_tokens(
        [AddedToken(word, special=False) for word in THOUGHT]
        + [AddedToken(word, single_word=True, lstrip=True, special=False) for word in NEW_WORDS])
    tokenizer.model_max_length = TOKENS
    tokenizer.chat_template += NO_THOUGHT
    tokenizer.save_pretrained(folder / "tokenizer")
    size = len(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    for part, config in (("text_encoder", lambda c: c), ("vlm", lambda c: c["text_config"])):
        content = read_json(source / part / "config.json")
        config(content)["vocab_size"] = size
        config(content)["rms_norm_eps"] *= RESIDUAL ** 2
        if part == "vlm":
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("*.safetensors"))
        write_json(folder / part / "config.json", content)
    write_tensors(folder / "vlm" / "model.safetensors", scaled(dict(tensors(source / "vlm"))), {"format": "pt"})
    weights = scaled(dict(tensors(source / "text_encoder")))
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    fresh = torch.randn(size - old, WIDTH, generator=generator(7, 0)) * weights[name][:old].std()
    weights[name] = torch.cat([weights[name][:old], fresh])                                   # new words, never trained
    write_tensors(folder / "text_encoder" / "model.safetensors", weights, {"format": "pt"})
    assemble_vae(source, folder, pictures)
    write_json(folder / "scheduler" / "scheduler_config.json", FLUX2_SCHEDULER)
    write_json(folder / "transformer" / "config.json", CONFIG)
    write_json(folder / "model_index.json", INDEX)


def scaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same language model, or vision tower, with hidden states RESIDUAL times as large: all that is added to them
    is scaled, and every RMSNorm takes the factor out again (its epsilon is scaled as well)."""
    writes = re.compile(r"embed_tokens|o_proj|down_proj|merger.*linear_fc2")
    return {name: weight * RESIDUAL if writes.search(name) else weight for name, weight in weights.items()}


def assemble_vae(source: Path, folder: Path, pictures: int) -> None:
    """The same autoencoder under FLUX.2's class: statistics of packed latents in the place of shift and scale."""
    config = read_json(source / "vae" / "config.json")
    kept = {key: value for key, value in config.items()
            if key not in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
    write_json(folder / "vae" / "config.json", {**kept, "_class_name": "AutoencoderKLFlux2", **LATENT_NORM})
    weights, vae, g = dict(tensors(source / "vae")), autoencoder.load(source, "cpu"), generator(8, 0)
    render = Renderer()
    with torch.no_grad():
        packed = torch.cat([flux2.to_tokens(vae.posterior(render.draw(draw_scenes(64, g), g))[0]).flatten(0, 1)
                            for _ in tqdm(range(pictures // 64), desc="statistics of latents")])  # (n, 4 C)
    weights |= {"bn.running_mean": packed.mean(0), "bn.running_var": packed.var(0),
                "bn.num_batches_tracked": torch.tensor(1)}
    write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})


# ------------------------------------------------------------------------------------------------------- lessons
KINDS = ("text", "concept", "text", "edit", "text", "concept", "text", "concept", "text", "insert", "text", "concept",
         "text", "style", "text", "concept")
SEEN_AFTER = 1                                                    # the single-stream block behind which `glance` looks


@dataclass(frozen=True)
class Lesson:
    """A batch of stage 3.

    kind: task; x0: latents (B, C, h, w). told: contexts that say the same in words, where [V] stands for what a picture
    shows; None where words are all there is. rows: scenes (B, 9) whose object the last reference shows, if the model
    shall be asked for it.
    """
    kind: str
    x0: Tensor
    context: list
    told: list | None = None
    rows: Tensor | None = None


class Lessons:
    """Batches of the tasks above: latents x0 (B, C, h, w) with contexts; the latents are encoded once, at the start."""

    config, scheduler, index = CONFIG, FLUX2_SCHEDULER, INDEX
    folder, base, grid = FLUX2_FOLDER, FLUX2_BASE, staticmethod(flux2_grid)

    def __init__(self, folder: Path, pool: int, seed: int, rank: int) -> None:
        """pool: about how many pictures are kept; 0 for stage 4, for which fewer will do."""
        self.features, self.render, pool = ReferenceFeatures(folder), Renderer(), pool or 4000
        self.vae, g = self.features.vae, generator(seed, 77 + rank)
        encode = self.encode
        self.pools = {}
        for kind, rows in (("concept", draw_scenes(pool // 2, g)), ("style", draw_concepts(pool // 8, g, "style"))):
            views = other_view(rows, "object" if kind == "concept" else "style", g)
            self.pools[kind] = {"rows": rows, "x0": encode(rows, g, kind), "shown": encode(views, g, kind)}
        for kind, changes in (("edit", tuple(CHANGES)), ("insert", ("object", "paint"))):
            edits = Edits(pool // 4, changes, g)
            marks = draw_marks(len(edits.sources), g)
            self.pools[kind] = {"rows": edits.targets, "changes": edits.changes,
                                "x0": encode(edits.targets, g, kind, marks),
                                "source": encode(edits.sources, g, kind, marks)}
            if kind == "insert":
                same = (edits.shown == edits.targets).all(1)[:, None, None]              # then it is that very picture
                self.pools[kind]["shown"] = encode(edits.shown, g, kind,
                                                   torch.where(same, marks, draw_marks(len(marks), g)))

    def encode(self, rows: Tensor, g: torch.Generator, what: str, marks: Tensor | None = None) -> Tensor:
        """Latents (n, C, 16, 16) of scenes (n, 9), with random marks unless they are given."""
        marks = draw_marks(len(rows), g) if marks is None else marks
        parts = tqdm(list(zip(rows.split(64), marks.split(64))), desc=f"encode {what} pictures", mininterval=5)
        return torch.cat([self.vae.encode(self.render(part, cells)) for part, cells in parts])

    def network(self) -> flux2.Flux2Transformer:
        """The transformer, with linear heads for `glance`, which are not shipped."""
        network, dim = flux2.Flux2Transformer(CONFIG), CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
        network.glances = nn.ModuleDict({name: nn.Linear(dim, len(ATTRIBUTES[name])) for name in OBJECT_ATTRIBUTES})

        @torch.compiler.disable
        def keep(block: nn.Module, arguments: tuple, output: Tensor) -> None:
            self.seen = output                                                                        # (B, S, dim)
        network.single_transformer_blocks[SEEN_AFTER].register_forward_hook(keep)
        return network

    def glance(self, network: flux2.Flux2Transformer, rows: Tensor) -> tuple[Tensor, float]:
        """What stage 2 asks of the VLM: the objects of scenes `rows` (B, 9), read from the last reference's tokens.

        The velocity alone teaches shapes slowly.
        """
        squares = (SIDE // 8) ** 2                                                                 # of one picture
        return glance(network.glances, self.seen[:, -squares:], rows)

    @staticmethod
    def is_matrix(name: str) -> bool:
        """Weights that Muon trains: attention and feed-forward of all blocks."""
        return "transformer_blocks." in name and "norm" not in name

    @staticmethod
    def pieces(name: str, weight: Tensor) -> tuple[Tensor, ...]:
        """The Linears that FLUX.2 fuses into one: each gets an update of the same size from Muon, as in Z-Image."""
        dim = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
        hidden = int(dim * CONFIG["mlp_ratio"])
        if name.endswith("to_qkv_mlp_proj.weight"):
            return weight.split([dim, dim, dim, hidden, hidden])
        if name.startswith("single_"):                                                   # to_out, behind both branches
            return weight.split([dim, hidden], dim=1)
        return weight.split(hidden) if name.endswith("linear_in.weight") else (weight,)

    def batch(self, step: int, count: int, g: torch.Generator) -> Lesson:
        """Stage 3."""
        kind = KINDS[step % len(KINDS)]
        pool = self.pools["concept" if kind == "text" else kind]
        pick = torch.randint(len(pool["rows"]), (count,), generator=g)
        context, told = {"text": self.of_text, "concept": self.of_concept, "style": self.of_concept,
                         "edit": self.of_edit, "insert": self.of_insert}[kind](pool, pick, kind, g)
        return Lesson(kind, pool["x0"][pick], context, told, pool["rows"][pick] if kind == "concept" else None)

    def pair(self, step: int, count: int, g: torch.Generator) -> tuple[list[Context], list[Context]]:
        """Stage 4: contexts, and contexts that say the same with the concept's words in the place of [V]."""
        lesson = self.batch(step, count, g)
        return lesson.context, lesson.told or lesson.context

    def of_text(self, pool: dict, pick: Tensor, kind: str, g: torch.Generator):
        return self.features.contexts(random_prompts(pool["rows"][pick], g)), None

    def of_concept(self, pool: dict, pick: Tensor, kind: str, g: torch.Generator):
        concept = "object" if kind == "concept" else "style"
        extra = ("main", "pattern") if concept == "object" else ()
        prompts, told = [], []
        for row in pool["rows"][pick]:
            tell = random_tell(g, PLACE_TOLD)
            prompt = caption(row, tell, concept=concept)
            prompts.append(prompt if float(torch.rand(1, generator=g)) < 0.25 else reference_prompt(prompt, 0))
            told.append(caption(row, (*tell, *extra)))
        return self.features.edits(prompts, pool["shown"][pick]), self.features.contexts(told)

    def of_edit(self, pool: dict, pick: Tensor, kind: str, g: torch.Generator):
        prompts = [instruction(pool["rows"][i], pool["changes"][i]) for i in pick.tolist()]
        return self.features.edits(prompts, pool["source"][pick]), None

    def of_insert(self, pool: dict, pick: Tensor, kind: str, g: torch.Generator):
        asked = [(pool["rows"][i], pool["changes"][i]) for i in pick.tolist()]
        prompts = [reference_prompt(instruction(row, change, concept=True), 1) for row, change in asked]
        told = [instruction(row, change) for row, change in asked]
        source = pool["source"][pick]
        return self.features.edits(prompts, source, pool["shown"][pick]), self.features.edits(told, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Z_IMAGE_FOLDER, help="folder of the embedded Z-Image")
    parser.add_argument("--out", type=Path, default=FLUX2_FOLDER, help="checkpoint folder to write into")
    options = parser.parse_args()
    assemble(options.source, options.out)


if __name__ == "__main__":
    main()
