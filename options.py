"""What a run can be told: dataclass -> command line, defaults by checkpoint, one-line errors.

`Recipe` holds the values that belong to a checkpoint rather than to a user. A flag left out takes its recipe's value.
"""
import argparse
import dataclasses
import gc
import importlib.metadata
import math
import signal
import subprocess
import sys
import types
import typing
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Callable

import torch

import flux2
import model
from files import InputError, check_writable, checkpoint, read_json, tensors, transformer_class

TRAIN_WITH_LESS = "lower --batch-size, --size or --rank, raise --accumulate instead, or set --checkpointing"
ROOT = Path(__file__).resolve().parent
EMBEDDED = ROOT / "tiny" / "model"  # what `--model embedded`, the default, stands for


@dataclass(frozen=True)
class Recipe:
    """Defaults that fit one family of checkpoints."""
    name: str
    size: int                               # side of the square training picture, pixels
    inference_steps: int                    # solver steps of the sampler that the checkpoint was distilled for
    rollout_steps: int                      # K: solver steps of the student's rollout (Eq. 3)
    steps: int                              # optimizer steps
    lr: float
    rank: int
    alpha: float
    ema: float                              # m of thetabar <- m thetabar + (1 - m) theta
    loss: str
    batch_size: int
    accumulate: int
    checkpointing: bool
    save_every: int
    sample_every: int
    teacher_context: str                    # how the teacher is shown the target: vlm or reference (features.py)
    vlm: str                                # of the teacher's context; a name without "/" is a folder of the checkpoint
    image_pixels: tuple[int, int] | None    # fewest and most pixels that the teacher's picture is resized to
    new_object: str                         # panel prompts: the concept in a new picture, when captions name it "[V]"
    new_style: str                          # or "in [V] style",
    unrelated: str                          # and one that has nothing to do with the data


# Z-Image-Turbo: the values of the official release (effective batch 4, K = 4 on the grid 1, .9, .75, .5, x0 loss).
TURBO = Recipe("Z-Image-Turbo's official values", size=1024, inference_steps=8, rollout_steps=4, steps=2000, lr=1e-4,
               rank=64, alpha=128, ema=0.9999, loss="x0", batch_size=1, accumulate=4, checkpointing=True,
               save_every=100, sample_every=100, teacher_context="vlm", vlm="Qwen/Qwen3-VL-4B-Instruct",
               image_pixels=(512 * 512, 768 * 768), new_object="a [V] on a sandy beach at sunset",
               new_style="a lighthouse on a cliff in [V] style",
               unrelated="a red bicycle leaning against a white brick wall, morning light")
# FLUX.2-klein: the official values, too (3000 steps where the released script counts 3001). Its grid at 1024x1024 is 1,
# .967, .908, .767, that of inference; the official one is not.
KLEIN = replace(TURBO, name="FLUX.2-klein's official values", inference_steps=4, steps=3000, lr=2e-5,
                teacher_context="reference")
# Small models: fewer steps, so a faster EMA. Learning rates were tried in experiments/ on concepts apart, 150 steps of
# D-OPSD each: 1e-4, 3e-4, 1e-3 give concept fidelity .68, .98, 1.00 and ordinary prompts .978, .971, .955 (untuned
# .987). On examples/star 100 steps learn nearly as much as 150 and change ordinary prompts less.
SMALL = Recipe("embedded model", size=64, inference_steps=4, rollout_steps=4, steps=100, lr=3e-4, rank=16, alpha=16,
               ema=0.999, loss="x0", batch_size=4, accumulate=1, checkpointing=False, save_every=20, sample_every=25,
               teacher_context="vlm", vlm="vlm", image_pixels=None, new_object="a small [V] at the top on mint",
               new_style="a big plain yellow moon at the bottom on mint in [V] style",
               unrelated="a big striped yellow and blue circle on the left on wine")
SMALL_KLEIN = replace(SMALL, name="embedded FLUX.2 model", teacher_context="reference")
REAL_WIDTH = 3072  # of the narrowest transformer of the real checkpoints


def model_folder(name: str) -> Path:
    """The checkpoint folder behind `--model`; from the hub if it is not on disk. Raises InputError."""
    return EMBEDDED if name == "embedded" else checkpoint(name)


def vlm_of(folder: Path, recipe: Recipe, given: str | None) -> str:
    """The VLM of the teacher's context: what the user gave, else the recipe's (perhaps a part of the checkpoint)."""
    if given is not None:
        return given
    return recipe.vlm if "/" in recipe.vlm else str(folder / recipe.vlm)


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


def check_memory(folder: Path, device: torch.device, dtype: torch.dtype) -> float:
    """GB that the largest network of a checkpoint folder needs for its weights (they are never in memory together).

    Raises InputError when the GPU has less free memory. From the headers of the weight files alone.
    """
    width = torch.finfo(dtype).bits // 8
    need = max(sum(t.numel() for _, t in tensors(Path(folder) / part, only_shapes=True)) * width / 2 ** 30
               for part in ("transformer", "text_encoder"))
    free_gb = torch.cuda.mem_get_info(device)[0] / 2 ** 30 if device.type == "cuda" else math.inf
    if need > free_gb:
        raise InputError(f"{folder}: its weights need {need:.1f} GB in {str(dtype).removeprefix('torch.')}, {device} "
                         f"has {free_gb:.1f} GB free; use a smaller checkpoint, --dtype bfloat16 or a larger GPU")
    return need


def free() -> None:
    """Give the memory of dropped models back."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def fill(cfg, recipe: Recipe):
    """The options of a run (a dataclass) with None replaced by the recipe's values."""
    defaults = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(cfg)
                if hasattr(recipe, f.name) and getattr(cfg, f.name) is None and f.name != "vlm"}
    return dataclasses.replace(cfg, **defaults)


# ---------------------------------------------------------------------------------------------------- runs
# Options that may differ when a run is resumed: they change the rounding at most.
FREE = ("out", "steps", "save_every", "sample_every", "resume", "panel_prompt", "cache", "compile", "checkpointing",
        "device")
STATE = "state.safetensors"


def names_of(sources: list[str]) -> list[str]:
    """A short name for each --data: its last part, numbered where two are alike."""
    paths = [Path(source).resolve() for source in sources]
    names = [path.stem if path.is_file() else path.name for path in paths]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]


def open_run(cfg, out: Path, fingerprint: str) -> None:
    """Check that `out` can become a run of these options, or is one to resume. Raises InputError; writes nothing."""
    state = out / STATE
    if cfg.resume:
        if not state.is_file():
            raise InputError(f"--resume: {out} holds no run ({STATE} is missing); leave --resume out to start one")
        if not (out / "config.json").is_file():
            raise InputError(f"{out / 'config.json'}: no such file; --resume needs it, restore it or start a new run "
                             "with another --out")
        config = read_json(out / "config.json", "options")
        before = config["options"]
        for name, value in dataclasses.asdict(cfg).items():
            if name not in FREE and before.get(name, value) != value:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {before[name]} and is now {value}; "
                                 "give the same value, or start a new run with another --out")
        if config.get("data") != fingerprint:
            raise InputError(f"--resume: the images or captions in {', '.join(cfg.data)} are not those that this run "
                             "began with; restore them, or start a new run with another --out")
        return
    if state.exists():
        raise InputError(f"--out {out}: holds another run; continue it with --resume, or choose another --out")
    if (out / "config.json").exists() and "options" not in read_json(out / "config.json"):
        raise InputError(f"--out {out}: holds something else (its config.json is not ours); choose another --out")
    check_writable(out, f"--out {out}")


# ---------------------------------------------------------------------------------------------------- command line
def option(default, text: str, **extra):
    """A dataclass field with one line of explanation; extra goes to argparse (choices, ...)."""
    if default is MISSING:
        return dataclasses.field(metadata={"help": text, **extra})
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text, **extra})
    return dataclasses.field(default=default, metadata={"help": text, **extra})


def parse(options: type, argv: list[str] | None, description: str):
    """An instance of the dataclass `options` from command line words: field `batch_size` is `--batch-size`.

    bool fields are switches, list fields repeatable flags (or, with nargs, flags that take several words), fields
    without a default required.
    """
    parser = argparse.ArgumentParser(description=description)
    for field in dataclasses.fields(options):
        extra = {key: value for key, value in field.metadata.items()}
        required = field.default is MISSING and field.default_factory is MISSING
        flag, kind = "--" + field.name.replace("_", "-"), _plain_type(field.type)
        of_recipe = field.name in Recipe.__dataclass_fields__ and field.default is None
        shown = "required" if required else "default: the recipe's" if of_recipe else f"default: {field.default}"
        if required or of_recipe or not (field.default in (None, False) or kind is list or field.default is MISSING):
            extra["help"] += f" ({shown})"
        if kind is bool:
            action = argparse.BooleanOptionalAction if field.default is None else "store_true"
            parser.add_argument(flag, action=action, default=field.default, **extra)
        elif "nargs" in extra:
            parser.add_argument(flag, required=required, default=[], **extra)
        elif typing.get_origin(kind) is list:
            parser.add_argument(flag, action="append", default=[], metavar="TEXT", **extra)
        else:
            default = None if required else field.default
            parser.add_argument(flag, type=kind, required=required, default=default, **extra)
    return options(**vars(parser.parse_args(argv)))


def _plain_type(annotation):
    """`float | None` -> float."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """"auto" is CUDA when there is one, and bfloat16 there, else CPU and float32. Raises InputError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {device}: not available here; use cpu, or cuda with a torch build for it") from None
    if dtype == "auto":
        dtype = "bfloat16" if found.type == "cuda" else "float32"
    return found, getattr(torch, dtype)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: of the GPU in use, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource                                                             # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)                     # bytes on macOS, kilobytes on Linux


def provenance() -> dict:
    """What a run was made with: versions of the packages, commit of this code."""
    packages = ("torch", "transformers", "safetensors", "einops", "pillow", "tqdm")
    try:
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"commit": commit, "versions": {name: importlib.metadata.version(name) for name in packages}}


def check_seed(seed: int) -> None:
    """Raises InputError on what torch's generators do not take."""
    if not 0 <= seed < 2 ** 63:
        raise InputError(f"--seed {seed}: out of range; give a number from 0 to 2**63 - 1")


class Interrupt:
    """Ctrl-C asks for a stop after the step under way, so that whole steps are saved; the second one stops at once."""

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.handle)
        return self

    def handle(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; Ctrl-C again stops at once, without saving", file=sys.stderr)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)


def run(main: Callable[[], int | None], less_memory: str = TRAIN_WITH_LESS) -> None:
    """Run a program: InputError becomes one line and exit status 2, Ctrl-C status 130, no tracebacks for either.

    less_memory: which of its options help when CUDA is out of memory.
    """
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        detail = ". ".join(str(error).splitlines()[0].split(". ")[1:3])  # how much was tried, how large the GPU is
        print(f"error: CUDA out of memory ({detail}); {less_memory}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
