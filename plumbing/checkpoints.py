"""Which checkpoint a run is about: its folder, its kind of transformer, its recipe, and the shape of its latents."""
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

import model
from networks import flux2
from plumbing.files import ROOT, InputError, checkpoint, read_json, transformer_class
from plumbing.recipes import KLEIN, REAL_WIDTH, SMALL, SMALL_KLEIN, TURBO, Recipe

EMBEDDED = ROOT / "tiny" / "model"  # what `--model embedded`, the default, stands for


def model_folder(name: str) -> Path:
    """The checkpoint folder behind `--model`; from the hub if it is not on disk. Raises InputError."""
    return EMBEDDED if name == "embedded" else checkpoint(name)


def backbone_of(folder: Path) -> types.ModuleType:
    """model.py or flux2.py, by the class of the checkpoint's transformer. Raises InputError.

    Both have CLASS, KEYS, REFERENCES, check, load, patch_size, time_shift and draw_noise; all else is one code.
    """
    name = transformer_class(folder)
    for backbone in (model, flux2):
        if backbone.CLASS == name:
            return backbone
    raise InputError(f"{Path(folder) / 'transformer' / 'config.json'}: _class_name {name} is not supported; use a "
                     "checkpoint of Z-Image or FLUX.2-klein")


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a checkpoint folder, by the class and the width of its transformer. Raises InputError."""
    path = Path(folder) / "transformer" / "config.json"
    if backbone_of(folder) is flux2:
        config = read_json(path, "num_attention_heads", "attention_head_dim")
        is_small = config["num_attention_heads"] * config["attention_head_dim"] < REAL_WIDTH
        return SMALL_KLEIN if is_small else KLEIN
    return SMALL if read_json(path, "dim")["dim"] < REAL_WIDTH else TURBO


def check_references(backbone: types.ModuleType, teacher_context: str | None, sources: str) -> None:
    """Raises InputError when reference images are asked for and this backbone takes none.

    sources: what asks for source images; "": nothing does.
    """
    asked = "--teacher-context reference" if teacher_context == "reference" else sources
    if asked and not backbone.REFERENCES:
        raise InputError(f"{asked}: Z-Image takes no reference images; use a FLUX.2 checkpoint, or leave this out")


def warn_undistilled(folder: Path) -> None:
    """One line on stderr for FLUX.2-klein's base checkpoints, which are not made for few steps."""
    if read_json(Path(folder) / "model_index.json").get("is_distilled") is False:
        print(f"warning: {folder}: model_index.json says is_distilled false; D-OPSD needs a step-distilled model, this "
              "one draws badly in few steps, and so do its rollouts", file=sys.stderr)


def starting_noise(backbone: types.ModuleType, seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise at sigma = 1, (1, channels, height, width) in latent positions, from a CPU generator."""
    return backbone.draw_noise(torch.Generator("cpu").manual_seed(seed), *shape)


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
