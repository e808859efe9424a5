"""Which checkpoint a run is about: its folder, its kind of transformer, its recipe, and the shape of its latents."""
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model import Z_IMAGE
from networks.flux2 import KLEIN
from plumbing.backbone import Backbone
from plumbing.files import ROOT, InputError, checkpoint, open_safetensors, read_json, shards
from plumbing.quantized import FLOAT
from plumbing.recipes import Recipe

BACKBONES = (Z_IMAGE, KLEIN)
REAL_WIDTH = 3072  # of the narrowest transformer of the real checkpoints
WIDE = 512         # below this, weights are a small part of the memory
EIGHT_BITS = {"I8", "U8", "F8_E4M3", "F8_E5M2"}  # in safetensors' words; four bits come as U8
EMBEDDED = ROOT / "tiny" / "model"  # what `--model embedded`, the default, stands for


def model_folder(name: str) -> Path:
    """The checkpoint folder behind `--model`; from the hub if it is not on disk. Raises InputError."""
    return EMBEDDED if name == "embedded" else checkpoint(name)


def backbone_of(folder: Path) -> Backbone:
    """The record of a checkpoint's kind of transformer; a config that does not say is Z-Image's. Raises InputError."""
    path = Path(folder) / "transformer" / "config.json"
    name = read_json(path).get("_class_name", Z_IMAGE.class_name)
    for backbone in BACKBONES:
        if backbone.class_name == name:
            return backbone
    raise InputError(f"{path}: _class_name {name} is not supported; use a checkpoint of Z-Image or FLUX.2-klein")


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a checkpoint folder, by the class and the width of its transformer. Raises InputError."""
    backbone = backbone_of(folder)
    of_real, of_small = backbone.recipes
    config = read_json(Path(folder) / "transformer" / "config.json", *backbone.keys)
    return of_small if backbone.width(config) < REAL_WIDTH else of_real


def warn_undistilled(folder: Path) -> None:
    """One line on stderr for FLUX.2-klein's base checkpoints, which are not made for few steps."""
    if read_json(Path(folder) / "model_index.json").get("is_distilled") is False:
        print(f"warning: {folder}: model_index.json says is_distilled false; D-OPSD needs a step-distilled model, this "
              "one draws badly in few steps, and so do its rollouts", file=sys.stderr)


def check_quantize(folder: Path, quantize: str) -> None:
    """Raises InputError for weights that are quantised already; one line on stderr where it saves next to nothing."""
    if quantize == FLOAT:
        return
    for part in (folder / "transformer", folder / "text_encoder"):
        found = {"quantization_config"} if read_json(part / "config.json").get("quantization_config") else set()
        for path, names in shards(part).items():
            with open_safetensors(path) as file:
                found |= EIGHT_BITS & {file.get_slice(name).get_dtype() for name in names}
        if found:
            raise InputError(f"--quantize {quantize}: {part} has {', '.join(sorted(found))}, so it is quantised "
                             "already; give the checkpoint in bfloat16 or float32")
    backbone = backbone_of(folder)
    width = backbone.width(read_json(folder / "transformer" / "config.json", *backbone.keys))
    if width < WIDE:
        print(f"note: --quantize {quantize}: {folder} is {width} wide, so this saves next to nothing", file=sys.stderr)


def starting_noise(backbone: Backbone, seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise at sigma = 1, (1, channels, height, width) in latent positions, from a CPU generator."""
    return backbone.draw_noise(torch.Generator("cpu").manual_seed(seed), *shape)


def pixels_per_patch(folder: Path) -> int:
    """What a picture's sides must be divisible by: VAE factor times patch size; from configs alone."""
    widths = read_json(folder / "vae" / "config.json", "block_out_channels")["block_out_channels"]
    backbone, path = backbone_of(folder), folder / "transformer" / "config.json"
    return 2 ** (len(widths) - 1) * backbone.patch_size(read_json(path, *backbone.keys))


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a picture. Raises InputError on sides that are not divisible."""
    vae = read_json(folder / "vae" / "config.json", "block_out_channels", "latent_channels")
    multiple, factor = pixels_per_patch(folder), 2 ** (len(vae["block_out_channels"]) - 1)
    for name, side in (("--height", height), ("--width", width)):
        if side < 1 or side % multiple:
            raise InputError(f"{name} {side}: not a positive multiple of {multiple}, which this model needs; "
                             f"try {max(1, round(max(side, 1) / multiple)) * multiple}")
    return vae["latent_channels"], height // factor, width // factor


def shift_rule(folder: Path) -> Callable[[int, int, int], float]:
    """(solver steps, height and width of x) -> time shift of a checkpoint's grid. Raises InputError on other grids."""
    rule = functools.partial(backbone_of(folder).time_shift, read_json(folder / "scheduler" / "scheduler_config.json"))
    rule(4, 2, 2)
    return rule
