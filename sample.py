"""Prompt -> PNG: `python sample.py --prompt "a red star" --lora out/star/student.safetensors`.

At inference D-OPSD leaves nothing behind but a LoRA: the sampler is the checkpoint's own (Eq. 3 with the student's
velocity). `--compare` puts base and student side by side with the same noise. `--reference IMAGE` shows the teacher's
view, c_t = f_mm(prompt, image) of Eq. 4: where the base model cannot draw the concept from there, training cannot work.
`--source IMAGE` edits a picture (FLUX.2): the prompt then says what to change.

The starting noise is drawn on the CPU in float32 from `--seed`, so a picture equals that of diffusers' ZImagePipeline
or Flux2KleinPipeline with generator=torch.Generator("cpu").manual_seed(seed), no guidance and as many steps.
"""
import dataclasses
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Callable

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

import data
import encoder
import lora
import vae as autoencoder
from files import InputError, check_writable, read_json, write_bytes
from model import Context
from options import (Recipe, backbone_of, check_memory, check_references, check_seed, device_and_dtype, free,
                     model_folder, option, parse, recipe_of, run, vlm_of)
from rollout import sample, time_grid

Shift = Callable[[int, int, int], float]  # solver steps, height and width of latents -> time shift of the grid


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
def starting_noise(backbone: ModuleType, seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise at sigma = 1, (1, channels, height, width) in latent positions, from a CPU generator."""
    return backbone.draw_noise(torch.Generator("cpu").manual_seed(seed), *shape)


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    array = ((picture.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(rearrange(array, "c h w -> h w c").numpy())


def draw(model: torch.nn.Module, contexts: list[Context], noise: Tensor, sigmas: Tensor,
         adapter: lora.Adapter | None = None) -> Tensor:
    """Latents (n, C, h, w) of n prompts, one after the other, each from the same noise (1, C, h, w)."""
    device = next(model.parameters()).device
    latents = []
    for context in contexts:
        context = [context.to(device)]
        latents.append(sample(lambda x, sigma: model.velocity(x, sigma, context, adapter), noise.to(device), sigmas))
    return torch.cat(latents)


def pixels_per_patch(folder: Path) -> int:
    """What a picture's sides must be divisible by: VAE factor times patch size; from configs alone."""
    widths = read_json(folder / "vae" / "config.json", "block_out_channels")["block_out_channels"]
    backbone, path = backbone_of(folder), folder / "transformer" / "config.json"
    return 2 ** (len(widths) - 1) * backbone.patch_size(read_json(path, *backbone.KEYS))


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a picture. Raises InputError on sides that are not divisible."""
    config = read_json(folder / "vae" / "config.json", "block_out_channels", "latent_channels")
    multiple = pixels_per_patch(folder)
    for name, side in (("--height", height), ("--width", width)):
        if side < 1 or side % multiple:
            raise InputError(f"{name} {side}: not a positive multiple of {multiple}, which this model needs; "
                             f"try {max(1, round(side / multiple)) * multiple}")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return config["latent_channels"], height // factor, width // factor


# ------------------------------------------------------------------------------------------------------- panels
def panel(columns: dict[str, list[Image.Image | None]], rows: list[str], note: str = "") -> Image.Image:
    """Pictures in a labelled table: column name -> one picture per row (None stays empty), row captions on the left."""
    last = reversed(columns.values())  # drawn pictures, all of one shape; sources and targets are fitted into it
    first = next(image for images in last for image in images if image is not None)
    tile = (160, max(1, 160 * first.height // first.width)) if first.width < 160 else \
        (320, max(1, 320 * first.height // first.width))
    font, gap, left, top = ImageFont.load_default(13), 6, 190, 26
    size = (left + len(columns) * (tile[0] + gap), top + len(rows) * (tile[1] + gap) + (20 if note else 0))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for j, (name, images) in enumerate(columns.items()):
        x = left + j * (tile[0] + gap)
        pen.text((x + 2, 6), name, fill="black", font=font)
        for i, image in enumerate(images):
            if image is not None:
                smooth = Image.Resampling.NEAREST if image.width <= tile[0] else Image.Resampling.LANCZOS
                sheet.paste(ImageOps.pad(image, tile, smooth, color="white"), (x, top + i * (tile[1] + gap)))
    for i, caption in enumerate(rows):
        pen.text((6, top + i * (tile[1] + gap)), "\n".join(textwrap.wrap(caption, 26)[:9]), fill="black", font=font)
    if note:
        pen.text((6, size[1] - 18), note, fill="gray", font=font)
    return sheet


def save_png(image: Image.Image, path: Path, facts: dict[str, str | int]) -> None:
    """Write a PNG, atomically, with `facts` (prompt, seed, ...) as text metadata."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())


@dataclass(frozen=True)
class PanelRow:
    """One prompt of a training run's panels."""
    prompt: str
    target: Image.Image | None
    student: Context                        # Eq. 4
    teacher: Context
    source: Image.Image | None = None       # for editing: the (first) picture that the prompt says how to change


class Panels:
    """The panels of a training run: target, base, student, teacher; the same noise in every cell and every panel."""

    def __init__(self, folder: Path, model: torch.nn.Module, shift_of: Shift, steps: int, seed: int,
                 size: data.Shape, rows: list[PanelRow]) -> None:
        """size: (height, width) of every picture."""
        self.folder, self.model, self.seed, self.rows = folder, model, seed, rows
        shape = latent_shape(folder, *size)
        self.noise = starting_noise(backbone_of(folder), seed, shape)
        self.sigmas = time_grid(shift_of(steps, *shape[1:]), steps)
        self.base: list[Image.Image] = []

    def draw(self, path: Path, note: str, student: lora.Adapter, teacher: lora.Adapter | None,
             others: dict[str, lora.Adapter] | None = None) -> None:
        """Write the panel of a student and its teachers: one that is shown the target, and others that read the prompt,
        by the titles of their columns; all of them optional."""
        vae = autoencoder.load(self.folder, next(self.model.parameters()).device)  # small, not needed between panels

        def pictures(contexts: list[Context], adapter: lora.Adapter | None) -> list[Image.Image]:
            latents = draw(self.model, contexts, self.noise, self.sigmas, adapter)
            return [to_image(vae.decode(z[None])[0]) for z in latents]

        steps, prompts = len(self.sigmas) - 1, [row.prompt for row in self.rows]
        texts = [row.student for row in self.rows]
        self.base = self.base or pictures(texts, None)
        given = {"source": [row.source for row in self.rows], "target": [row.target for row in self.rows]}
        columns = {name: images for name, images in given.items() if any(images)}
        columns |= {"base": self.base, "student": pictures(texts, student)}
        if teacher is not None:
            columns["teacher (sees the target)"] = pictures([row.teacher for row in self.rows], teacher)
        columns |= {title: pictures(texts, adapter) for title, adapter in (others or {}).items()}
        save_png(panel(columns, prompts, f"{note}, {steps} solver steps, seed {self.seed}"), path,
                 {"prompt": "\n".join(prompts), "seed": self.seed, "steps": steps, "lora": note})


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
    return [vae.encode(data.to_tensor(picture).to(device))[0].cpu() for picture in pictures]


def contexts_of(cfg: Options, folder: Path, recipe: Recipe, prompts: list[str], sources: list[Image.Image],
                shape: tuple[int, int], device: torch.device, dtype: torch.dtype
                ) -> tuple[list[Context], list[Context]]:
    """Student and teacher contexts (Eq. 4) on the CPU; the teacher's are empty without --reference.

    sources: fitted pictures to edit; shape: (height, width) of the picture to draw.
    """
    kind = cfg.teacher_context if cfg.reference else ""
    seen = [data.crop(data.open_image(cfg.reference), shape)] if cfg.reference else []
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
    sources = [data.fit(data.open_image(path), multiple, recipe.size ** 2, path) for path in cfg.source]
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
