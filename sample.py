"""Prompt -> PNG: `python sample.py --prompt "a red star" --lora out/star/student.safetensors`.

At inference D-OPSD leaves nothing behind but a LoRA: the sampler is the checkpoint's own (Eq. 3 with the student's
velocity). `--compare` puts base and student side by side with the same noise. `--reference IMAGE` shows the teacher's
view, c_t = f_mm(prompt, image) of Eq. 4: where the base model cannot draw the concept from there, training cannot work.
`--source IMAGE` edits a picture (FLUX.2): the prompt then says what to change.

The starting noise is drawn on the CPU in float32 from `--seed`, so a picture equals that of diffusers' ZImagePipeline
or Flux2KleinPipeline with generator=torch.Generator("cpu").manual_seed(seed), no guidance and as many steps.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import encoder
import lora
from model import Context
from networks import vae as autoencoder
from plumbing.checkpoints import (
    backbone_of,
    check_references,
    latent_shape,
    model_folder,
    pixels_per_patch,
    recipe_of,
    starting_noise,
)
from plumbing.files import InputError, check_writable, read_json
from plumbing.machine import check_memory, device_and_dtype, free
from plumbing.options import check_seed, option, parse
from plumbing.pictures import crop, fit, open_image, panel, save_png, to_image, to_tensor
from plumbing.program import run
from plumbing.recipes import Recipe, vlm_of
from rollout import sample, time_grid


@dataclass
class Options:
    prompt: list[str] = option([], "what to draw; may be given several times")
    prompts: str | None = option(None, "text file with one prompt per line")
    model: str = option("embedded", "checkpoint folder in diffusers layout, hub id, or embedded: tiny/model")
    lora: str | None = option(None, "adapter file, e.g. student.safetensors of a run")
    steps: int | None = option(None, "solver steps; default: as many as the checkpoint was distilled for")
    seed: int = option(0, "of the starting noise, the same for every prompt")
    height: int | None = option(None, "pixels; default: the first source's, else the recipe's size")
    width: int | None = option(None, "pixels; default: the first source's, else the recipe's size")
    out: str = option("out/sample.png", "PNG file; several prompts without --compare get a number each")
    compare: bool = option(False, "one panel: a row per prompt; base, student, and teacher's view with --reference")
    source: list[str] = option([], "picture to edit; may be given several times (FLUX.2)")
    reference: str | None = option(None, "picture of the concept: draw what the teacher sees in it")
    teacher_context: str | None = option(None, "how --reference is shown: vlm, or as reference (FLUX.2)",
                                         choices=("vlm", "reference"))
    vlm: str | None = option(None, "Qwen3-VL folder or hub id for --reference; default: the recipe's")
    teacher_rope: str = option("vlm", "rotary base of the teacher's language model: vlm (official) or text",
                               choices=("vlm", "text"))
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is one")
    dtype: str = option("auto", "of text encoder and transformer; auto is bfloat16 on CUDA",
                        choices=("auto", "float32", "bfloat16"))


# ------------------------------------------------------------------------------------------------------- pieces
def draw(model: torch.nn.Module, contexts: list[Context], noise: Tensor, sigmas: Tensor,
         adapter: lora.Adapter | None = None) -> Tensor:
    """Latents (n, C, h, w) of n prompts, one after the other, each from the same noise (1, C, h, w)."""
    device = next(model.parameters()).device
    latents = []
    for context in contexts:
        context = [context.to(device)]
        latents.append(sample(lambda x, sigma: model.velocity(x, sigma, context, adapter), noise.to(device), sigmas))
    return torch.cat(latents)


# ------------------------------------------------------------------------------------------------------- program
def read_prompts(cfg: Options) -> list[str]:
    prompts = list(cfg.prompt)
    if cfg.prompts is not None:
        try:
            lines = Path(cfg.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {cfg.prompts}: not readable as text ({error}); "
                             "give a UTF-8 text file") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError("--prompt: nothing to draw; give --prompt TEXT or --prompts FILE with one prompt per line")
    return prompts


def check(cfg: Options) -> None:
    """Mistakes that need no checkpoint to be seen."""
    check_seed(cfg.seed)
    if cfg.steps is not None and cfg.steps < 1:
        raise InputError(f"--steps {cfg.steps}: a sampler needs at least one step; give 1 or more")
    if cfg.compare and cfg.lora is None and cfg.reference is None:
        raise InputError("--compare: nothing to compare the base with; give --lora FILE or --reference IMAGE")
    if cfg.lora is not None and not Path(cfg.lora).is_file():
        raise InputError(f"--lora {cfg.lora}: no such file; give an adapter such as out/NAME/student.safetensors")
    if Path(cfg.out).suffix.lower() != ".png":
        raise InputError(f"--out {cfg.out}: not a .png file; give a name that ends in .png")
    check_writable(Path(cfg.out).parent, f"--out {cfg.out}")


def encode_pictures(folder: Path, pictures: list[Image.Image], device: torch.device) -> list[Tensor]:
    """Latents (C, h, w) on the CPU, one per picture; without pictures no VAE is loaded."""
    vae = autoencoder.load(folder, device) if pictures else None
    return [vae.encode(to_tensor(picture).to(device))[0].cpu() for picture in pictures]


def contexts_of(cfg: Options, folder: Path, recipe: Recipe, prompts: list[str], sources: list[Image.Image],
                shape: tuple[int, int], device: torch.device, dtype: torch.dtype
                ) -> tuple[list[Context], list[Context]]:
    """Student and teacher contexts (Eq. 4) on the CPU; the teacher's are empty without --reference.

    sources: fitted pictures to edit; shape: (height, width) of the picture to draw.
    """
    kind = cfg.teacher_context if cfg.reference else ""
    seen = [crop(open_image(cfg.reference), shape)] if cfg.reference else []
    latents = encode_pictures(folder, sources + (seen if kind == "reference" else []), device)
    free()
    vlm = vlm_of(folder, recipe, cfg.vlm) if kind == "vlm" else None
    reader = encoder.load(folder, device, dtype, vlm, recipe.image_pixels, cfg.teacher_rope)
    student = [Context(text.cpu(), tuple(latents[:len(sources)])) for text in reader.text_context(prompts)]
    if not kind:
        return student, []
    texts = reader.teacher_texts(kind, prompts, seen * len(prompts), [len(sources)] * len(prompts))
    return student, [Context(text.cpu(), tuple(latents)) for text in texts]


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Options, argv, "Draw pictures with a step-distilled model, optionally with a D-OPSD adapter.")
    check(cfg)
    prompts = read_prompts(cfg)
    device, dtype = device_and_dtype(cfg.device, cfg.dtype)
    folder = model_folder(cfg.model)
    recipe, backbone = recipe_of(folder), backbone_of(folder)
    cfg = dataclasses.replace(cfg, teacher_context=cfg.teacher_context or recipe.teacher_context)
    check_references(backbone, cfg.teacher_context, f"--source {cfg.source[0]}" if cfg.source else "")
    multiple = pixels_per_patch(folder)
    sources = [fit(open_image(path), multiple, recipe.size ** 2, path) for path in cfg.source]
    width, height = sources[0].size if sources else (recipe.size, recipe.size)
    height, width = height if cfg.height is None else cfg.height, width if cfg.width is None else cfg.width
    shape, steps = latent_shape(folder, height, width), cfg.steps or recipe.inference_steps
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    sigmas = time_grid(backbone.time_shift(scheduler, steps, *shape[1:]), steps)

    skeleton = backbone.check(folder)                               # before the larger work of encoding
    if cfg.lora:
        lora.load(cfg.lora, skeleton)
    check_memory(folder, device, dtype)
    student, teacher = contexts_of(cfg, folder, recipe, prompts, sources, (height, width), device, dtype)
    free()                                                          # the encoders are gone before the transformer comes
    net = backbone.load(folder, device, dtype)
    adapter = lora.load(cfg.lora, net) if cfg.lora else None
    noise = starting_noise(backbone, cfg.seed, shape)
    wanted = {}                                                     # column -> contexts, adapter
    if cfg.compare or not (adapter or teacher):
        wanted["base"] = (student, None)
    if adapter and (cfg.compare or not teacher):
        wanted["student"] = (student, adapter)
    if teacher:
        wanted["teacher's view"] = (teacher, adapter)
    latents = {name: draw(net, tqdm(contexts, desc=name, disable=None), noise, sigmas, with_adapter)
               for name, (contexts, with_adapter) in wanted.items()}
    del net
    free()
    vae = autoencoder.load(folder, device)
    images = {name: [to_image(vae.decode(z[None])[0]) for z in rows] for name, rows in latents.items()}

    facts = {"seed": cfg.seed, "steps": len(sigmas) - 1, "model": cfg.model,
             "lora": Path(cfg.lora).name if cfg.lora else "none"}
    if sources:
        facts["source"] = ", ".join(Path(path).name for path in cfg.source)
    if cfg.reference:
        facts["reference"] = Path(cfg.reference).name
    out = Path(cfg.out)
    if cfg.compare:
        save_png(panel(images, prompts), out, {"prompt": "\n".join(prompts), **facts})
        print(out)
        return
    (pictures,) = images.values()
    for i, (prompt, picture) in enumerate(zip(prompts, pictures), 1):
        path = out if len(prompts) == 1 else out.with_name(f"{out.stem}_{i:03d}{out.suffix}")
        save_png(picture, path, {"prompt": prompt, **facts})
        print(path)


if __name__ == "__main__":
    run(main, less_memory="lower --height and --width, or use --dtype bfloat16")
