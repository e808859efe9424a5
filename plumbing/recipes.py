"""Recipes: values that belong to a checkpoint rather than to a user. An option left out takes its recipe's value."""
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of this repository


@dataclass(frozen=True)
class Recipe:
    """Defaults that fit one family of checkpoints."""
    name: str
    size: int                               # side of the square training picture, pixels
    inference_steps: int                    # solver steps of the sampler that the checkpoint was distilled for
    rollout_steps: int                      # K: solver steps of the student's rollout (Eq. 3)
    steps: int                              # optimizer steps
    lr: float
    full_steps: int                         # the same two with --tune full
    full_lr: float
    rank: int
    alpha: float
    ema: float                              # m of thetabar <- m thetabar + (1 - m) theta
    loss: str
    batch_size: int
    accumulate: int
    keep: str                               # captions whose pictures shall stay as they are, or "none"
    keep_edits: str                         # the same where --data is for editing: captions with sources
    keep_weight: float                      # of their loss
    grad_states: int | None                 # number of the K states to learn at, beside --keep; None: all
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
               full_steps=2000, full_lr=1e-5,   # these two are ours, untested
               rank=64, alpha=128, ema=0.9999, loss="x0", batch_size=1, accumulate=4,
               keep="none", keep_edits="none", keep_weight=1.0, grad_states=None, save_every=100, sample_every=100,
               teacher_context="vlm", vlm="Qwen/Qwen3-VL-4B-Instruct", image_pixels=(512 * 512, 768 * 768),
               new_object="a [V] on a sandy beach at sunset",
               new_style="a lighthouse on a cliff in [V] style",
               unrelated="a red bicycle leaning against a white brick wall, morning light")
# FLUX.2-klein: the official values, too; 3000 steps where the released script counts 3001.
FLUX2 = replace(TURBO, name="FLUX.2-klein's official values", inference_steps=4, steps=3000, lr=2e-5,
                teacher_context="reference")
# Small models: fewer steps, so a faster EMA. Where other captions are kept, two pictures and one learned state a batch
# are enough, at a learning rate that would spoil other prompts without. Found on three concepts apart: "How the recipe
# was found" in experiments/README.md.
SMALL = Recipe("embedded model", size=64, inference_steps=4, rollout_steps=4, steps=100, lr=2e-3,
               full_steps=150, full_lr=1e-4, rank=16, alpha=16, ema=0.999, loss="x0", batch_size=2, accumulate=1,
               keep=str(ROOT / "examples" / "ordinary"), keep_edits=str(ROOT / "examples" / "edits"), keep_weight=2.0,
               grad_states=1, save_every=20, sample_every=25,
               teacher_context="vlm", vlm="vlm", image_pixels=None,
               new_object="a big [V] on the right on mint",
               new_style="a big plain yellow moon at the bottom on mint in [V] style",
               unrelated="a big striped yellow and blue circle on the left on wine")
SMALL_FLUX2 = replace(SMALL, name="embedded FLUX.2 model", teacher_context="reference")


def fill(cfg, recipe: Recipe):
    """The options of a run (a dataclass) with None replaced by the recipe's values."""
    defaults = {f.name: getattr(recipe, f.name) for f in fields(cfg)
                if hasattr(recipe, f.name) and getattr(cfg, f.name) is None and f.name != "vlm"}
    return replace(cfg, **defaults)


def vlm_of(folder: Path, recipe: Recipe, given: str | None) -> str:
    """The VLM of the teacher's context: what the user gave, else the recipe's (perhaps a part of the checkpoint)."""
    if given is not None:
        return given
    return recipe.vlm if "/" in recipe.vlm else str(folder / recipe.vlm)


def table(options: list[str]) -> str:
    """For --help: what the recipes have for these options, a row for each."""
    rows = [["", "embedded", "Z-Image-Turbo", "FLUX.2-klein"]]
    for name in options:
        values = [getattr(recipe, name) for recipe in (SMALL, TURBO, FLUX2)]
        shown = ["all" if value is None else str(value).removeprefix(f"{ROOT}/") for value in values]
        rows.append(["--" + name.replace("_", "-"), *shown])
    return "\n".join(["the recipes' values:", *("  {:17}  {:17}  {:25}  {}".format(*row) for row in rows),
                      "  tiny/flux2: as embedded, but --teacher-context reference; for editing, --keep",
                      "  examples/edits. The embedded models' vlm is a folder of the checkpoint.", "", ""])
