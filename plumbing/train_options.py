"""The options of train.py: names, explanations, and what can be seen to be wrong without looking at any file."""
import os
import re
import sys
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from plumbing.options import InputError, check_seed, option
from plumbing.recipes import TURBO, Recipe

if TYPE_CHECKING:   # --help shall not wait for torch: so choices are literal, and a test compares them with the code
    from baselines import Method
    from data import Row

METHODS = ("dopsd", "off-policy", "sft-teacher", "sft", "dreambooth", "pso")    # the values of --method
DATA, METHOD, OPTIMISATION = "data and model", "method", "optimisation"     # headings of --help
OUTPUT, MACHINE = "output", "machine"
TARGET = "image"      # in the place of a teacher's file: the run's own teacher, which is shown the target image
UNTUNED = "untuned"   # and the model as it was: its prompts shall stay as they are
NONE, KEEP = "none", "keep"     # the value of --keep that switches it off; the name of its task
LORA, FULL = "lora", "full"     # the values of --tune
ONLY_LORA = ("rank", "alpha", "teacher_lora", "quantize", "compile", "name")    # what --tune full does not take
PRIOR = "dreambooth"            # the baseline that cannot do without --keep
LEAST = {"size": 1, "steps": 1, "rollout_steps": 1, "batch_size": 1, "accumulate": 1, "rank": 1, "alpha": 1, "beta": 0,
         "save_every": 1, "sample_every": 0, "lr": 0, "grad_states": 1, "noise": 0, "keep_weight": 0, "keep_batches": 1}
MOST = {"size": 8192, "rollout_steps": 1000, "batch_size": 4096, "rank": 4096, "accumulate": 4096, "keep_batches": 4096,
        "lr": 1e30, "noise": 100}                               # nobody means more; of others not more than 10^9
UNFIT = re.compile(r"""^$|^[. ]|[. ]$|[<>:"/\\|?*\x00-\x1f\x7f-\x9f]|\.safetensors$"""     # of --name, also on Windows
                   r"|^((con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])(\..*)?|state|teacher)$", re.IGNORECASE)


@dataclass
class Options:
    """None means: the value of the checkpoint's recipe, until `fill` puts it there (plumbing/recipes.py)."""
    data: list[str] = option(MISSING, "folder with images and captions, or a .jsonl file (see README); "
                             "several are learned in turns", DATA, nargs="+")
    config: list[str] = option([], "config.json of a run to repeat; flags beside it win", DATA, metavar="FILE")
    caption: str = option("", "caption of images without one of their own", DATA)
    model: str = option("embedded", "checkpoint to tune: a folder in diffusers layout, a hub id, or embedded, which is "
                        "tiny/model", DATA)
    vlm: str | None = option(None, "Qwen3-VL that shows the target to the teacher, folder or hub id", DATA)
    size: int = option(None, "side of a square training picture in pixels; other shapes have about its area", DATA)

    method: str = option("dopsd", "dopsd, or a method that it is compared with", METHOD, choices=METHODS)
    loss: str = option(None, "weight on the squared difference of velocities; v: Eq. 7 of the paper, x0: the "
                       "released code, kl: per-step KL (2605.15055)", METHOD, choices=("v", "x0", "kl"))
    rollout_steps: int = option(None, "K, the number of solver steps of the student's rollout", METHOD)
    grad_states: int | None = option(None, "number of the K states to learn at, in turns from batch to batch; all "
                                     "with --keep none", METHOD)
    noise: float = option(0.0, "a, the amount of noise in the rollout's steps; 0 walks the sampler's ODE", METHOD)
    teacher_context: str = option(None, "how the teacher is shown the target: vlm, or reference (FLUX.2)", METHOD,
                                  choices=("vlm", "reference"))
    tune: str = option(LORA, "what is trained: lora, or full, the whole transformer", METHOD, choices=(LORA, FULL))
    teacher_weights: str = option("ema", "the teacher's weights: ema of the student's, a live copy of them, or frozen "
                                  "as they were", METHOD, choices=("ema", "copy", "frozen"),
                                  old={"--teacher": "--teacher-weights", "base": "frozen"})
    ema: float = option(None, "m of the teacher's moving average, theta_bar <- m theta_bar + (1 - m) theta", METHOD)
    teacher_lora: list[str] = option([], "one teacher for each --data: a frozen adapter file, untuned for the model as "
                                     "it was, or image for the run's own teacher, which is shown the target image",
                                     METHOD, nargs="+", metavar="FILE", old={"base": UNTUNED})
    teacher_rope: str = option("vlm", "rotary base of the teacher's language model: vlm (official) or text", METHOD,
                               choices=("vlm", "text"))
    keep: str = option(None, "captions whose pictures shall stay as they are, a folder or a .jsonl file, taught "
                       "by the untuned model; or none, which all methods but dopsd and dreambooth start from", METHOD)
    keep_weight: float = option(None, "weight of the loss of --keep beside that of each --data", METHOD)
    keep_batches: int = option(1, "number of batches of --keep beside each batch of --data", METHOD)
    beta: float = option(10.0, "sharpness with which --method pso tells a pair apart", METHOD)

    steps: int = option(None, "number of optimizer steps", OPTIMISATION)
    lr: float = option(None, "learning rate of AdamW, constant", OPTIMISATION)
    batch_size: int = option(None, "number of images in a forward pass", OPTIMISATION)
    accumulate: int = option(None, "number of forward passes per optimizer step", OPTIMISATION)
    rank: int = option(None, "rank of the LoRA", OPTIMISATION)
    alpha: int = option(None, "numerator of the LoRA's scale, alpha / rank", OPTIMISATION)
    seed: int = option(0, "random seed for LoRA initialisation, batch order, captions and noise", OPTIMISATION)

    out: str | None = option(None, "folder of the run (default: out/NAME of the data)", OUTPUT)
    name: str = option("student", "name of the student's LoRA, for its file and inside, for other programs", OUTPUT)
    resume: bool = option(False, "continue the run in --out as if it had never stopped", OUTPUT)
    save_every: int = option(None, "number of optimizer steps between saves", OUTPUT)
    save_all: bool = option(False, "keep the adapters of every save, in OUT/step_N", OUTPUT)
    sample_every: int = option(None, "number of optimizer steps between panels; 0 draws none", OUTPUT)
    panel_prompt: list[str] = option([], "prompt of a further row of the panels, for which the teacher sees the first "
                                     "image; repeatable", OUTPUT)
    cache: str | None = option(None, "folder of cached latents and contexts (default: OUT/cache)", OUTPUT)

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is one", MACHINE)
    dtype: str = option("auto", "precision of the frozen networks; auto is bfloat16 on CUDA, else float32", MACHINE,
                        choices=("auto", "float32", "bfloat16"))
    quantize: str = option("none", "precision of the frozen weights in the networks' blocks: int8 halves the memory of "
                           "bfloat16, none is --dtype", MACHINE, choices=("none", "int8"))
    checkpointing: bool | None = option(None, "recompute blocks in the backward pass: less memory, more time (default: "
                                        "if a step does not fit otherwise)", MACHINE)
    compile: bool = option(False, "torch.compile the transformer's block: a slow start, then faster steps", MACHINE)


def check_values(cfg: Options, method: "Method") -> None:
    """Raises InputError on numbers and combinations that cannot work, and notes useless flags; None is the recipe's."""
    for name, least in LEAST.items():
        value, flag, most = getattr(cfg, name), "--" + name.replace("_", "-"), MOST.get(name, 10 ** 9)
        if value is not None and not least <= value <= most:
            raise InputError(f"{flag} {value!s:.40}: not a usable number; give {least} or more, {most} or less")
    if cfg.ema is not None and not 0 <= cfg.ema <= 1:
        raise InputError(f"--ema {cfg.ema}: not a fraction; give a number in [0, 1], the paper has 0.9999")
    keeps = cfg.keep not in (None, NONE)
    if cfg.config:          # it has all values of the recipe, also those that this run has no use for: no mistakes
        filled = vars(cfg).keys() & vars(TURBO).keys() - {"keep", "name"}
        cfg = Options(**vars(cfg) | dict.fromkeys(filled))
    if cfg.grad_states is not None and "learned" not in method.needs and not (keeps and method.keeps == "dopsd"):
        raise InputError(f"--grad-states {cfg.grad_states}: only for --method dopsd, off-policy and for --keep, not "
                         f"{cfg.method}; leave it out")
    if UNFIT.search(cfg.name) or len(cfg.name.encode()) > 200:
        raise InputError(f"--name {cfg.name!r:.60}: no name for a file on every system; give letters, digits, - and "
                         "_, up to 200 bytes, without .safetensors; state and teacher are other files of a run")
    if not all(prompt.strip() for prompt in cfg.panel_prompt):
        raise InputError("--panel-prompt: empty; write what the picture shows")
    for name in ONLY_LORA if cfg.tune == FULL else ():
        if getattr(cfg, name) != getattr(Options(cfg.data), name):
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: belongs to --tune lora; with --tune "
                             "full, which takes every other option, leave it out")
    teachers = cfg.teacher_lora
    if teachers and len(teachers) != len(cfg.data):
        raise InputError(f"--teacher-lora: {len(teachers)} for {len(cfg.data)} --data; give one for each, a file or "
                         f"a word, {TARGET} or {UNTUNED}")
    if teachers and not method.has_teacher:
        raise InputError(f"--teacher-lora {teachers[0]}: --method {cfg.method} has no teacher; leave one of them out")
    if keeps and not method.keeps:
        others = ", ".join(name for name in METHODS if name != cfg.method)
        raise InputError(f"--keep {cfg.keep}: not with --method {cfg.method}, whose loss holds on to the untuned model "
                         f"by itself; leave it out, or take --method {others}")
    if cfg.noise and not method.takes_noise:
        raise InputError(f"--noise {cfg.noise}: only for rollouts, --method {cfg.method} has none; leave it out")
    check_seed(cfg.seed)
    if flags := unused(cfg, method):
        print(f"note: --method {cfg.method} has no use here for {', '.join(flags)}", file=sys.stderr)


def unused(cfg: Options, method: "Method") -> list[str]:
    """The flags that were given and that this run has no use for."""
    keeps, is_shown = cfg.keep not in (None, NONE), shows_target(cfg, method)
    used = {"loss": keeps or "weight" in method.needs, "beta": "beta" in method.needs,
            "rollout_steps": keeps or method.passes(1, 1) != method.passes(2, 1),
            "ema": is_shown and cfg.teacher_weights == "ema",
            **dict.fromkeys(("teacher_weights", "teacher_context", "teacher_rope", "vlm"), is_shown),
            **dict.fromkeys(("keep_weight", "keep_batches"), keeps or keeps_by_default(cfg))}
    return ["--" + name.replace("_", "-") for name, is_used in used.items()
            if not is_used and getattr(cfg, name) != getattr(Options, name)]


def keeps_by_default(cfg: Options) -> bool:
    """As the recipe says: only D-OPSD, and DreamBooth which needs it, and not beside teachers that were named."""
    return cfg.keep is None and cfg.method in ("dopsd", PRIOR) and not cfg.teacher_lora


def what_is_kept(cfg: Options, recipe: Recipe, edits: bool) -> Recipe:
    """The recipe with what this run keeps by default, and with all states where nothing is kept: the published method.

    edits: whether the data is for editing.
    """
    keep = NONE if cfg.keep is None else cfg.keep
    if keeps_by_default(cfg):
        keep = recipe.keep_edits if edits else recipe.keep
    if cfg.tune == FULL:
        recipe = replace(recipe, lr=recipe.full_lr, steps=recipe.full_steps)
    return replace(recipe, keep=keep, grad_states=None if keep == NONE else recipe.grad_states)


def check_filled(cfg: Options) -> None:
    """The same for numbers that the recipe has filled in."""
    if (cfg.grad_states or 1) > cfg.rollout_steps:
        raise InputError(f"--grad-states {cfg.grad_states}: the rollout has {cfg.rollout_steps} states; give 1 to "
                         f"{cfg.rollout_steps}")
    if cfg.keep == NONE and cfg.method == PRIOR:
        raise InputError(f"--keep none: --method {PRIOR} needs captions whose pictures it preserves; give --keep a "
                         "file of them, or take --method sft")


@dataclass(frozen=True)
class Source:
    """Something to learn from: every --data, and then --keep."""
    name: str
    path: str
    teacher: str            # TARGET, UNTUNED or an adapter file
    weight: float = 1.0     # of its loss
    batches: int = 1        # beside one of each other source
    is_kept: bool = False   # whether it is --keep


def names_of(sources: list[str]) -> list[str]:
    """A short name for each --data: its last part, numbered where two are alike."""
    paths = [Path(os.path.realpath(source)) for source in sources]
    names = [path.stem if path.is_file() else path.name for path in paths]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]


def sources_of(cfg: Options) -> list[Source]:
    """All sources, by different names."""
    teachers = cfg.teacher_lora or [TARGET] * len(cfg.data)
    names = names_of(cfg.data if cfg.keep in (None, NONE) else [*cfg.data, KEEP])
    found = [Source(*parts) for parts in zip(names, cfg.data, teachers)]
    if len(names) > len(found):
        found.append(Source(names[-1], cfg.keep, UNTUNED, cfg.keep_weight, cfg.keep_batches, is_kept=True))
    return found


def shows_target(cfg: Options, method: "Method") -> bool:
    """Whether there is a teacher that is shown the target image."""
    return method.has_teacher and (not cfg.teacher_lora or TARGET in cfg.teacher_lora)


def read_source(source: Source, caption: str = "") -> "list[Row]":
    """Its rows; captions suffice where the teacher is not shown the target. caption: of images without one of their
    own. Raises InputError."""
    from data import read_folder    # here, not above: it imports torch
    if not source.is_kept:
        return read_folder(source.path, source.teacher != TARGET, caption)
    try:
        rows = read_folder(source.path, captions_suffice=True)
    except InputError as error:
        raise InputError(f"--keep {error}") from None
    marked = sum("[V]" in caption for row in rows for caption in row.captions)
    if marked:
        print(f"warning: --keep {source.path}: {marked} captions say [V], the concept that is to be learned; kept as "
              "they are, their pictures work against it, so remove them", file=sys.stderr)
    return rows
