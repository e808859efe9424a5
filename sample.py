"""Prompt -> PNG: `python sample.py --prompt "a red star" --lora out/star/student.safetensors`.

At inference D-OPSD leaves nothing behind but a LoRA: the sampler is the checkpoint's own (Eq. 3 with the student's
velocity). `--compare` puts base and student side by side with the same noise. `--reference IMAGE` shows the teacher's
view, c_t = f_mm(prompt, image) of Eq. 4: where the base model cannot draw the concept from there, training cannot work.

The starting noise is drawn on the CPU in float32 from `--seed`, so a picture equals that of diffusers' ZImagePipeline
with generator=torch.Generator("cpu").manual_seed(seed), guidance 0 and the same number of steps.
"""
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

import data
import encoder
import lora
import model as transformer
import vae as autoencoder
from files import InputError, check_writable, read_json, write_bytes
from options import Recipe, check_seed, device_and_dtype, model_folder, option, parse, recipe_of, run, vlm_of
from rollout import sample, sigma_grid


@dataclass
class Options:
    prompt: list[str] = option([], "what to draw; may be given several times")
    prompts: str | None = option(None, "text file with one prompt per line")
    model: str = option("embedded", "checkpoint folder in diffusers layout, hub id, or embedded: tiny/model")
    lora: str | None = option(None, "adapter file, e.g. student.safetensors of a run")
    steps: int | None = option(None, "solver steps; default: as many as the checkpoint was distilled for")
    seed: int = option(0, "of the starting noise, the same for every prompt")
    height: int | None = option(None, "pixels; default: the recipe's size")
    width: int | None = option(None, "pixels; default: the recipe's size")
    out: str = option("out/sample.png", "PNG file; several prompts without --compare get a number each")
    compare: bool = option(False, "one panel: a row per prompt; base, student, and teacher's view with --reference")
    reference: str | None = option(None, "picture of the concept: draw what the teacher sees in it")
    vlm: str | None = option(None, "Qwen3-VL folder or hub id for --reference; default: the recipe's")
    teacher_rope: str = option("vlm", "rotary base of the teacher's language model: vlm (official) or text",
                               choices=("vlm", "text"))
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is one")
    dtype: str = option("auto", "of text encoder and transformer; auto is bfloat16 on CUDA",
                        choices=("auto", "float32", "bfloat16"))


# ------------------------------------------------------------------------------------------------------- pieces
def starting_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Noise at sigma = 1, (1, channels, height, width) in latent positions, from a CPU generator."""
    return torch.randn(1, channels, height, width, generator=torch.Generator("cpu").manual_seed(seed))


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    array = ((picture.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(rearrange(array, "c h w -> h w c").numpy())


def draw(model: transformer.ZImageTransformer, contexts: list[Tensor], noise: Tensor, sigmas: Tensor,
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
    patch = read_json(folder / "transformer" / "config.json", "all_patch_size")["all_patch_size"][0]
    return 2 ** (len(widths) - 1) * patch


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
    first = next(image for images in columns.values() for image in images if image is not None)
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


class Panels:
    """The panels of a training run: target, base, student, teacher; the same noise in every cell and every panel."""

    def __init__(self, folder: Path, model: transformer.ZImageTransformer, sigmas: Tensor, seed: int,
                 prompts: list[str], targets: list[Image.Image | None], student: list[Tensor],
                 teacher: list[Tensor]) -> None:
        """One row per prompt: its target picture, if it has one, and its two contexts (Eq. 4)."""
        self.folder, self.model, self.sigmas, self.seed = folder, model, sigmas, seed
        self.prompts, self.targets, self.student, self.teacher = prompts, targets, student, teacher
        first = next(image for image in targets if image is not None)
        self.noise = starting_noise(seed, *latent_shape(folder, first.height, first.width))
        self.base: list[Image.Image] = []

    def draw(self, path: Path, note: str, student: lora.Adapter, teacher: lora.Adapter | None) -> None:
        """Write the panel of two adapters; without a teacher there is no such column."""
        vae = autoencoder.load(self.folder, next(self.model.parameters()).device)  # small, not needed between panels

        def pictures(contexts: list[Tensor], adapter: lora.Adapter | None) -> list[Image.Image]:
            latents = draw(self.model, contexts, self.noise, self.sigmas, adapter)
            return [to_image(vae.decode(z[None])[0]) for z in latents]

        steps = len(self.sigmas) - 1
        self.base = self.base or pictures(self.student, None)
        columns = {"target": self.targets, "base": self.base, "student": pictures(self.student, student)}
        if teacher is not None:
            columns["teacher (sees the target)"] = pictures(self.teacher, teacher)
        save_png(panel(columns, self.prompts, f"{note}, {steps} solver steps, seed {self.seed}"), path,
                 {"prompt": "\n".join(self.prompts), "seed": self.seed, "steps": steps, "lora": note})


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


def contexts_of(cfg: Options, folder: Path, recipe: Recipe, prompts: list[str], shape: tuple[int, int],
                device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Student and teacher contexts (Eq. 4) on the CPU; the teacher's are empty without --reference."""
    picture = data.crop(data.open_image(cfg.reference), shape) if cfg.reference else None
    vlm = vlm_of(folder, recipe, cfg.vlm) if cfg.reference else None
    reader = encoder.load(folder, device, dtype, vlm, recipe.image_pixels, cfg.teacher_rope)
    student = [c.cpu() for c in reader.text_context(prompts)]
    teacher = [c.cpu() for c in reader.image_text_context(prompts, [picture] * len(prompts))] if cfg.reference else []
    return student, teacher


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Options, argv, "Draw pictures with a step-distilled model, optionally with a D-OPSD adapter.")
    check(cfg)
    prompts = read_prompts(cfg)
    device, dtype = device_and_dtype(cfg.device, cfg.dtype)
    folder = model_folder(cfg.model)
    recipe = recipe_of(folder)
    height, width = (recipe.size if side is None else side for side in (cfg.height, cfg.width))
    shape = latent_shape(folder, height, width)
    sigmas = sigma_grid(read_json(folder / "scheduler" / "scheduler_config.json"), cfg.steps or recipe.inference_steps)

    transformer.check(folder)                                       # before the larger work of encoding
    student, teacher = contexts_of(cfg, folder, recipe, prompts, (height, width), device, dtype)
    data.free()                                                     # the encoders are gone before the transformer comes
    net = transformer.load(folder, device, dtype)
    adapter = lora.load(cfg.lora, net) if cfg.lora else None
    noise = starting_noise(cfg.seed, *shape)
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
    data.free()
    vae = autoencoder.load(folder, device)
    images = {name: [to_image(vae.decode(z[None])[0]) for z in rows] for name, rows in latents.items()}

    facts = {"seed": cfg.seed, "steps": len(sigmas) - 1, "model": cfg.model,
             "lora": Path(cfg.lora).name if cfg.lora else "none"}
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
