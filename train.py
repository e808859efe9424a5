"""D-OPSD: teach a step-distilled diffusion model a new concept from a few images, and keep its few steps.

    python train.py --data examples/robot            # the embedded model, on a laptop
    python train.py --data DIR --model Tongyi-MAI/Z-Image-Turbo          # the real one, on a CUDA GPU

arXiv 2605.05204, Section 3. For every batch: the student walks the few-step sampler from pure noise (rollout.py, Eq. 3);
at each state it visits, the EMA teacher, shown the target image (encoder.py, Eq. 4), says which velocity it would take
(Eq. 6); the student learns that velocity (loss.py, Eq. 7). Then one optimizer step and one EMA step (lora.py).

Differs from the official code:
1. Backward at every state instead of once per rollout: the same gradient with one graph alive.
2. Latents and contexts are encoded once and cached; VAE and encoders are freed before the transformer is loaded.
3. Both losses: the paper's (`--loss v`) and the released code's (`--loss x0`).
4. `--resume` continues bit for bit: batches and noise are functions of (seed, step).
5. Panels use the same noise every time, and the first one is drawn before step 1.
"""
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import data
import encoder
import files
import lora
import loss as objectives
import model as transformer
import vae as autoencoder
from files import InputError, checkpoint, read_json
from options import EMBEDDED, ROOT, Recipe, device_and_dtype, option, parse, recipe_of, run
from rollout import rollout, scheduler_shift, sigma_grid
from sample import default_vlm, draw, latent_shape, panel, save_png, starting_noise, to_image


@dataclass
class Options:
    """None means: the value of the checkpoint's recipe in options.py."""
    data: str = option(dataclasses.MISSING, "folder with images and captions (see README), or a .jsonl file")
    model: str = option(EMBEDDED, "checkpoint folder in diffusers layout, or hub id")
    vlm: str | None = option(None, "Qwen3-VL folder or hub id for the teacher's context")
    out: str | None = option(None, "folder of the run; default out/<name of the data>")
    method: str = option("dopsd", "dopsd, or sft: vanilla flow-matching fine-tuning for comparison", choices=("dopsd", "sft"))
    loss: str | None = option(None, "v: Eq. 7 of the paper; x0: the released code", choices=tuple(objectives.LOSSES))
    steps: int | None = option(None, "optimizer steps")
    lr: float | None = option(None, "learning rate of AdamW, constant")
    rank: int | None = option(None, "rank of the LoRA")
    alpha: int | None = option(None, "the LoRA is scaled by alpha / rank")
    rollout_steps: int | None = option(None, "K: solver steps of the student's rollout")
    ema: float | None = option(None, "m of the teacher: theta_bar <- m theta_bar + (1 - m) theta")
    batch_size: int | None = option(None, "images per forward pass")
    accumulate: int | None = option(None, "forward passes per optimizer step")
    size: int | None = option(None, "side of the square training picture in pixels; other shapes have about its area")
    seed: int = option(0, "of LoRA, batch order, captions and noise")
    panel_prompt: list[str] = option([], "prompt of a panel row, drawn with the first image as the teacher's reference; repeatable")
    sample_every: int | None = option(None, "optimizer steps between panels; 0: none")
    save_every: int | None = option(None, "optimizer steps between saves")
    resume: bool = option(False, "continue the run in --out, bit for bit")
    teacher_rope: str = option("vlm", "rotary base of the teacher's language model: vlm (official) or text", choices=("vlm", "text"))
    checkpointing: bool | None = option(None, "recompute blocks in the backward pass: less memory, about a third slower")
    compile: bool = option(False, "torch.compile the transformer's block")
    cache: str | None = option(None, "folder of cached latents and contexts; default <out>/cache")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is one")
    dtype: str = option("auto", "of the frozen networks; auto is bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))


FREE = ("out", "steps", "save_every", "sample_every", "resume", "panel_prompt", "cache", "compile", "device")  # may differ on --resume
STATE = "state.safetensors"


# ------------------------------------------------------------------------------------------------------- set-up
def fill(cfg: Options, recipe: Recipe) -> Options:
    """The options with None replaced by the recipe's values. Raises InputError on values that cannot work."""
    defaults = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(cfg)
                if hasattr(recipe, f.name) and getattr(cfg, f.name) is None and f.name != "vlm"}
    cfg = dataclasses.replace(cfg, **defaults)
    for name, least in (("steps", 1), ("rollout_steps", 1), ("batch_size", 1), ("accumulate", 1), ("rank", 1), ("alpha", 1),
                        ("save_every", 1), ("sample_every", 0), ("lr", 0)):
        value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if not value >= least or not math.isfinite(value):
            raise InputError(f"{flag} {value}: too small; give {least} or more")
    if not 0 <= cfg.ema <= 1:
        raise InputError(f"--ema {cfg.ema}: not a fraction; give a number in [0, 1], the recipe has {recipe.ema}")
    return cfg


def open_run(cfg: Options, out: Path) -> None:
    """Make `out` a run of these options, or check that it is one to resume. Raises InputError, writes nothing then."""
    state, config = out / STATE, out / "config.json"
    if cfg.resume:
        if not state.is_file() or not config.is_file():
            raise InputError(f"--resume: {out} holds no run ({STATE} is missing); leave --resume out to start one")
        before = read_json(config, "options")["options"]
        for name, value in asdict(cfg).items():
            if name not in FREE and before.get(name, value) != value:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {before[name]} and is now {value}; "
                                 "give the same value, or start a new run with another --out")
        return
    if state.exists() or config.exists():
        raise InputError(f"--out {out}: holds another run; continue it with --resume, or choose another --out")
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: not writable ({error.strerror}); choose a folder you can write to") from None


def describe(cfg: Options, recipe: Recipe) -> dict:
    """What config.json keeps: options, versions and the commit of this code."""
    packages = ("torch", "transformers", "safetensors", "einops", "pillow", "tqdm")
    try:
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"recipe": recipe.name, "options": asdict(cfg), "commit": commit,
            "versions": {name: importlib.metadata.version(name) for name in packages}}


# ------------------------------------------------------------------------------------------------------- features
class Features:
    """Everything that VAE and encoders contribute: the data set and the panel's contexts. Both are gone afterwards."""

    def __init__(self, cfg: Options, folder: Path, recipe: Recipe, out: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = data.read_folder(cfg.data)
        latent_shape(folder, cfg.size, cfg.size)                                    # says so if --size cannot work
        multiple = cfg.size // latent_shape(folder, cfg.size, cfg.size)[1]
        multiple *= read_json(folder / "transformer" / "config.json", "all_patch_size")["all_patch_size"][0]
        self.vlm = default_vlm(folder, recipe, cfg.vlm) if cfg.method == "dopsd" else None
        open_run(cfg, out)
        cache = Path(cfg.cache) if cfg.cache else out / "cache"
        found = encoder.find_vlm(self.vlm) if self.vlm else None
        key = "/".join([data.model_key(folder, "vae", "text_encoder", "tokenizer"), data.model_key(found) if found else "-",
                        str(dtype), cfg.teacher_rope, str(recipe.image_pixels)])
        prompts = self.panel_rows(cfg, recipe)
        panel_file = cache / f"panel-{hashlib.sha256(f'{key}{prompts}'.encode()).hexdigest()[:40]}.safetensors"

        def load_encoder() -> encoder.Encoder:
            reader = encoder.load(folder, device, dtype, found, recipe.image_pixels, cfg.teacher_rope)
            self.encode_panel(reader, prompts, panel_file)                          # while it is in memory
            return reader

        examples = data.prepare(self.rows, cfg.size, multiple, cache, key, lambda: autoencoder.load(folder, device),
                                load_encoder, want_teacher=found is not None, device=device)
        self.dataset = data.Dataset(examples, cfg.batch_size, cfg.seed)
        self.examples = examples
        if not panel_file.is_file():
            load_encoder()
            data.free()
        contexts = load_file(panel_file)
        self.prompts = [prompt for prompt, _ in prompts]
        self.targets = [None if index is None else examples[index].target() for _, index in prompts]
        self.student = [contexts[f"student.{i}"] for i in range(len(prompts))]
        self.teacher = [contexts.get(f"teacher.{i}", contexts[f"student.{i}"]) for i in range(len(prompts))]

    def panel_rows(self, cfg: Options, recipe: Recipe) -> list[tuple[str, int | None]]:
        """(prompt, image that the teacher is shown): two training pairs, the user's prompts, one unrelated prompt."""
        pairs = [(self.rows[i].captions[0], i) for i in range(min(2, len(self.rows)))]
        return pairs + [(prompt, 0) for prompt in cfg.panel_prompt] + [(recipe.unrelated, None)]

    def encode_panel(self, reader: encoder.Encoder, prompts: list[tuple[str, int | None]], path: Path) -> None:
        contexts = {f"student.{i}": c for i, c in enumerate(reader.text_context([prompt for prompt, _ in prompts]))}
        if self.vlm:
            shown = [(i, prompt, self.rows[index]) for i, (prompt, index) in enumerate(prompts) if index is not None]
            shapes = data.bucket_shapes
            pictures = [data.open_image(row.image) for _, _, row in shown]
            features = reader.image_text_context([prompt for _, prompt, _ in shown], pictures)
            contexts |= {f"teacher.{i}": c for (i, _, _), c in zip(shown, features)}
        files.write_tensors(path, contexts)
