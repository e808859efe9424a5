"""Prompt -> PNG, with a step-distilled model and perhaps a D-OPSD adapter.

    python sample.py --prompt "a big [V] on the right on mint" --lora out/star/student.safetensors --compare
    python sample.py --prompt "a big [V] on the right on mint" --reference examples/star/1.png     # the teacher's view
    python sample.py --prompt "move it to the left" --source examples/paint/1_before.png --model tiny/flux2    # an edit

At inference D-OPSD leaves nothing behind but a LoRA: the sampler is the checkpoint's own (Eq. 3 with the student's
velocity). `--compare` puts base and student side by side with the same noise. `--reference IMAGE` shows the teacher's
view, c_t = f_mm(prompt, image) of Eq. 4: where the base model cannot draw the concept from there, training cannot work.
`--source IMAGE` edits a picture (FLUX.2): the prompt then says what to change.

The starting noise is drawn on the CPU in float32 from `--seed`, so a picture equals that of diffusers' ZImagePipeline
or Flux2KleinPipeline with generator=torch.Generator("cpu").manual_seed(seed), no guidance and as many steps.
"""
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from plumbing.options import InputError, check_seed, option, parse

PROMPT, MODEL, OUTPUT, MACHINE = "what to draw", "model", "output", "machine"  # headings of --help


@dataclass
class Options:
    """teacher_context is None until `main` puts the recipe's value there."""
    prompt: list[str] = option([], "prompt of a picture; repeatable", PROMPT)
    prompts: str | None = option(None, "text file with one prompt per line", PROMPT)
    source: list[str] = option([], "picture to edit; repeatable (FLUX.2)", PROMPT)
    reference: str | None = option(None, "picture of the concept: draws the teacher's view of it", PROMPT)
    seed: int = option(0, "random seed for the starting noise, which is the same for every prompt", PROMPT)
    steps: int | None = option(None, "number of solver steps (default: as many as the checkpoint was distilled for)",
                               PROMPT)
    height: int | None = option(None, "height in pixels (default: the first source's, else the recipe's size)", PROMPT)
    width: int | None = option(None, "width in pixels (default: the first source's, else the recipe's size)", PROMPT)

    model: str = option("embedded", "checkpoint to draw with: a folder in diffusers layout, a hub id, or embedded, "
                        "which is tiny/model", MODEL)
    transformer: str | None = option(None, "folder of other weights for it, which --tune full wrote", MODEL)
    lora: str | None = option(None, "adapter file, such as student.safetensors of a run", MODEL)
    teacher_context: str = option(None, "how the teacher is shown --reference: vlm, or reference (FLUX.2)", MODEL,
                                  choices=("vlm", "reference"))
    vlm: str | None = option(None, "Qwen3-VL that reads --reference, folder or hub id", MODEL)
    teacher_rope: str = option("vlm", "rotary base of the teacher's language model: vlm (official) or text", MODEL,
                               choices=("vlm", "text"))

    out: str = option("out/sample.png", "PNG file; several prompts without --compare get a number each", OUTPUT)
    compare: bool = option(False, "draw one panel, a row per prompt: base, student, and with --reference the teacher's "
                           "view", OUTPUT)

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is one", MACHINE)
    dtype: str = option("auto", "precision of text encoder and transformer; auto is bfloat16 on CUDA, else float32",
                        MACHINE, choices=("auto", "float32", "bfloat16"))
    quantize: str = option("none", "precision of the weights in their blocks: int8, or none, which is --dtype", MACHINE,
                           choices=("none", "int8"))


if __name__ == "__main__":
    parse(Options, None, __doc__)   # --help and misspelt words are answered here, before torch takes seconds to load

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import lora
from data import read_text
from encoder import TEACHER_CONTEXTS, check_references, contexts
from model import Context
from networks import vae as autoencoder
from plumbing import encoder_files, lora_files
from plumbing.checkpoints import (backbone_of, check_quantize, latent_shape, model_folder, pixels_per_patch, recipe_of,
                                  shift_rule, starting_noise)
from plumbing.files import check_writable
from plumbing.machine import check_memory, device_and_dtype, free, sampling_gb
from plumbing.pictures import crop, fit, open_image, panel, save_png, to_image, to_tensor
from plumbing.program import run
from plumbing.recipes import Recipe, vlm_of
from rollout import sample, sigma_grid


# ------------------------------------------------------------------------------------------------------- pieces
def draw(network: lora.Bound, contexts: Iterable[Context], noise: Tensor, sigmas: Tensor, name: str) -> Tensor:
    """Latents (n, C, h, w) of n prompts, one after the other, each from the same noise (1, C, h, w).

    network: contexts -> velocity, with its weights. noise: on its device. name: of the network, for the InputError.
    """
    latents = torch.cat([sample(network([context.to(noise.device)]), noise, sigmas) for context in contexts])
    if not latents.isfinite().all():
        raise InputError(f"--model: the {name} draws what is not finite; copy or download the weights again, or use "
                         "--dtype float32")
    return latents


# ------------------------------------------------------------------------------------------------------- program
def read_prompts(cfg: Options) -> list[str]:
    prompts = list(cfg.prompt)
    if cfg.prompts is not None:
        prompts += [line.strip() for line in read_text(Path(cfg.prompts)).splitlines() if line.strip()]
    if not prompts:
        raise InputError("--prompt: nothing to draw; give --prompt TEXT or --prompts FILE with one prompt per line")
    return prompts


def check(cfg: Options) -> None:
    """Mistakes that need no checkpoint to be seen."""
    check_seed(cfg.seed)
    if cfg.steps is not None and not 1 <= cfg.steps <= 1000:
        raise InputError(f"--steps {cfg.steps}: not a usable number of solver steps; give 1 to 1000")
    if max(cfg.height or 0, cfg.width or 0) > 8192:
        raise InputError(f"--height {cfg.height} --width {cfg.width}: more than can be meant; give 8192 or less")
    if cfg.compare and cfg.lora is None and cfg.reference is None:
        raise InputError("--compare: nothing to compare the base with; give --lora FILE or --reference IMAGE")
    if cfg.reference == "":
        raise InputError("--reference: empty; give a picture, or leave it out")
    if cfg.lora is not None and not os.path.isfile(cfg.lora):
        raise InputError(f"--lora {cfg.lora}: no such file; give an adapter such as out/NAME/student.safetensors")
    if Path(cfg.out).suffix.lower() != ".png" or os.path.isdir(cfg.out) or len(os.fsencode(Path(cfg.out).name)) > 255:
        raise InputError(f"--out {cfg.out}: not a .png file; give a name of one that ends in .png, of up to 255 bytes")
    check_writable(Path(cfg.out).parent, f"--out {cfg.out}")


def encode_pictures(folder: Path, pictures: list[Image.Image], device: torch.device) -> list[Tensor]:
    """Latents (C, h, w) on the CPU, one per picture; without pictures no VAE is loaded."""
    if not pictures:
        return []
    vae = autoencoder.load(folder, device)
    return [vae.encode(to_tensor(picture).to(device))[0].cpu() for picture in pictures]


def contexts_of(cfg: Options, folder: Path, recipe: Recipe, prompts: list[str], sources: list[Image.Image],
                shape: tuple[int, int], device: torch.device, dtype: torch.dtype
                ) -> tuple[list[Context], list[Context]]:
    """Student and teacher contexts (Eq. 4) on the CPU; the teacher's are empty without --reference.

    sources: fitted pictures to edit; shape: (height, width) of the picture to draw.
    """
    kind = cfg.teacher_context if cfg.reference else ""
    seen = [crop(open_image(cfg.reference), shape)] if cfg.reference else []
    how = TEACHER_CONTEXTS.get(kind)
    latents = encode_pictures(folder, sources + (seen if how and how.adds_reference else []), device)
    free()
    vlm = vlm_of(folder, recipe, cfg.vlm) if how and how.needs_vlm else None
    reader = encoder_files.load(folder, device, dtype, vlm, recipe.image_pixels, cfg.teacher_rope,
                                quantize=cfg.quantize)
    texts = [text.cpu() for text in reader.text_context(prompts)]
    count, x0 = len(sources), latents[len(sources)] if len(latents) > len(sources) else None
    if not kind:
        return [contexts(text, None, latents)[0] for text in texts], []
    teacher_texts = reader.teacher_texts(kind, prompts, seen * len(prompts), [count] * len(prompts))
    pairs = [contexts(text, teacher_text.cpu(), latents[:count], x0, kind)
             for text, teacher_text in zip(texts, teacher_texts, strict=True)]
    return [student for student, _ in pairs], [teacher for _, teacher in pairs if teacher]


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Options, argv, __doc__)
    check(cfg)
    prompts = read_prompts(cfg)
    device, dtype = device_and_dtype(cfg.device, cfg.dtype)
    folder = model_folder(cfg.model)
    recipe, backbone = recipe_of(folder), backbone_of(folder)
    cfg = replace(cfg, teacher_context=cfg.teacher_context or recipe.teacher_context)
    check_references(backbone, cfg.teacher_context, f"--source {cfg.source[0]}" if cfg.source else "")
    sources = [fit(open_image(path), pixels_per_patch(folder), recipe.size ** 2, path) for path in cfg.source]
    width, height = sources[0].size if sources else (recipe.size, recipe.size)
    height, width = height if cfg.height is None else cfg.height, width if cfg.width is None else cfg.width
    shape, steps = latent_shape(folder, height, width), cfg.steps or recipe.inference_steps
    sigmas = sigma_grid(shift_rule(folder)(steps, *shape[1:]), steps)

    check_quantize(folder, cfg.quantize)
    skeleton = backbone.check(folder, cfg.transformer)              # before the larger work of encoding
    if cfg.lora:
        lora_files.load(cfg.lora, skeleton)
        lora_files.warn_other_weights(cfg.lora, cfg.quantize)
    check_memory(cfg, folder, device, lambda cfg: sampling_gb(cfg, folder, dtype))
    student, teacher = contexts_of(cfg, folder, recipe, prompts, sources, (height, width), device, dtype)
    free()                                                          # the encoders are gone before the transformer comes
    net = backbone.load(folder, device, dtype, quantize=cfg.quantize, transformer=cfg.transformer)
    adapter = lora_files.load(cfg.lora, net) if cfg.lora else None
    noise = starting_noise(backbone, cfg.seed, shape).to(device)
    wanted: dict[str, tuple[list[Context], lora.Adapter | None]] = {}   # column -> contexts, adapter
    if cfg.compare or not (adapter or teacher):
        wanted["base"] = (student, None)
    if adapter and (cfg.compare or not teacher):
        wanted["student"] = (student, adapter)
    if teacher:
        wanted["teacher's view"] = (teacher, adapter)
    latents = {name: draw(partial(lora.velocity_of, net, adapter=with_adapter), tqdm(contexts, desc=name, disable=None),
                          noise, sigmas, name) for name, (contexts, with_adapter) in wanted.items()}
    del net
    free()
    vae = autoencoder.load(folder, device)
    images = {name: [to_image(vae.decode(z[None])[0]) for z in rows] for name, rows in latents.items()}

    facts = {"seed": cfg.seed, "steps": len(sigmas) - 1, "model": cfg.model, "lora": "none"}
    files = {"transformer": [cfg.transformer], "lora": [cfg.lora], "source": cfg.source, "reference": [cfg.reference]}
    facts |= {name: ", ".join(Path(path).name for path in paths if path) for name, paths in files.items() if any(paths)}
    out = Path(cfg.out)
    given = {f"source {i}" if sources[1:] else "source": [it] * len(prompts) for i, it in enumerate(sources, 1)}
    drawn = [(panel(given | images, prompts), "\n".join(prompts))] if cfg.compare else [*zip(*images.values(), prompts)]
    for i, (picture, prompt) in enumerate(drawn, 1):
        path = out if len(drawn) == 1 else out.with_name(f"{out.stem}_{i:03d}{out.suffix}")
        save_png(picture, path, {"prompt": prompt, **facts})
        print(path)


if __name__ == "__main__":
    run(main, less_memory="lower --height and --width, or use --dtype bfloat16")
