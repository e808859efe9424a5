"""The machine: which device and precision, whether a run fits its memory, how much memory was used."""
import dataclasses
import gc
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from encoder import TEACHER_CONTEXTS
from plumbing.backbone import Transformer
from plumbing.checkpoints import pixels_per_patch
from plumbing.files import InputError, check_writable, tensors
from plumbing.quantized import FLOAT, INT8
from plumbing.train_options import FULL, LORA, NONE, ONLY_LORA

TEXT, PICTURE = 512, 576    # most tokens of a prompt, and of the picture that a VLM shows to the teacher
IN_BLOCK = re.compile(r"(layers|blocks|refiner)\.\d.*weight")     # what --quantize is for
SMALL, IN_8_BITS = {"size": 768, "rank": 16}, {"quantize": INT8}
LESS = [less | {"checkpointing": True} for less in ({}, IN_8_BITS, SMALL, SMALL | IN_8_BITS,
                                                    SMALL | IN_8_BITS | {"size": 512, "batch_size": 1})]


# ---------------------------------------------------------------------------------------------------- how much
def weights_gb(network: Path, dtype: torch.dtype, quantize: str = FLOAT) -> float:
    """GB of the weights in a checkpoint's folder of one network, from the headers of their files alone."""
    def size(name: str, weight: torch.Tensor) -> int:
        in_8_bits = quantize == INT8 and weight.ndim == 2 and IN_BLOCK.search(name)
        return weight.numel() * (1 if in_8_bits else dtype.itemsize)

    return sum(size(*named) for named in tensors(network, only_shapes=True)) / 2 ** 30


def trained(cfg, model: Transformer) -> int:
    """How many numbers theta has."""
    if cfg.tune == FULL:
        return sum(parameter.numel() for parameter in model.parameters())
    return cfg.rank * sum(sum(model.get_parameter(f"{name}.weight").shape) for name in model.lora_names())


def trained_gb(cfg, dtype: torch.dtype, model: Transformer, processes: int) -> float:
    """GB of what is trained and all that belongs to it: theta, theta_bar, gradient and Adam's two moments, in float32.

    With --tune full, processes share it, and the untuned model where one is needed; each has a whole block twice.
    """
    weights = trained(cfg, model) / 2 ** 30
    if cfg.tune == LORA:
        return 5 * 4 * weights
    has_base = cfg.keep != NONE or cfg.method == "pso" or cfg.teacher_weights == "frozen"
    shared = weights * (4 * (4 + (cfg.teacher_weights == "ema")) + dtype.itemsize * has_base)
    return shared / processes + 2 * weights * dtype.itemsize / len(model.blocks())


def step_gb(cfg, folder: Path, dtype: torch.dtype, model: Transformer) -> float:
    """GB of a training step's activations, by the options of train.py and for prompts of full length."""
    return activations_gb(cfg, (cfg.size // pixels_per_patch(folder)) ** 2, dtype, model)


def activations_gb(cfg, image: int, dtype: torch.dtype, model: Transformer) -> float:
    """The same for `image` tokens of the picture.

    Each block's input is kept, without checkpointing 23 tensors as large: 12, and 4 as wide as the feed-forward. The
    block at work has 28, gradients included, or, without gradients, 20 of the teacher's, whose context is longer.
    """
    context = TEACHER_CONTEXTS[cfg.teacher_context]
    student, teacher = TEXT + image, TEXT + image + PICTURE * context.needs_vlm + image * context.adds_reference
    width = model.get_parameter(f"{model.lora_names()[0]}.weight").shape[1]
    kept = student * len(model.blocks()) * (23 if cfg.checkpointing is False else 1) + max(28 * student, 20 * teacher)
    return cfg.batch_size * kept * width * dtype.itemsize / 2 ** 30


def training_gb(cfg, folder: Path, dtype: torch.dtype, model: Transformer, processes: int = 1) -> float:
    """GB of the larger phase, encoding or training. model: the transformer, for its shapes alone."""
    encoder, frozen = (weights_gb(folder / part, dtype, cfg.quantize) for part in ("text_encoder", "transformer"))
    step = trained_gb(cfg, dtype, model, processes) + step_gb(cfg, folder, dtype, model)
    return max(1.15 * encoder, step + frozen * (cfg.tune == LORA))      # .15: vision tower, activations


def sampling_gb(cfg, folder: Path, dtype: torch.dtype) -> float:
    """GB of the larger network's weights: the two are never in memory together."""
    return max(weights_gb(folder / part, dtype, cfg.quantize) for part in ("text_encoder", "transformer"))


# ---------------------------------------------------------------------------------------------------- whether it fits
def free_gb(device: torch.device) -> float:
    """Unused memory of a GPU; of a computer all it has, as it may swap, or infinity if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2 ** 30
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    except (AttributeError, ValueError, OSError):                       # Windows has no sysconf
        return math.inf


def check_memory(cfg, folder: Path, device: torch.device, needed: Callable[..., float]) -> None:
    """Compare needed(cfg) GB with what is free. Raises InputError for a GPU, and warns for a computer's memory.

    The message has up to three ways to need less: options of cfg for which `needed` says so.
    """
    need, left = needed(cfg), free_gb(device)
    if need <= left:
        return
    ways: list[str] = []
    is_full = getattr(cfg, "tune", LORA) == FULL                        # sample.py tunes nothing
    for less in LESS:
        changes = {name: value for name, value in less.items() if getattr(cfg, name, value) not in (value, None)
                   and not (name in ONLY_LORA and is_full)}
        gb = needed(dataclasses.replace(cfg, **changes))
        words = (f"--{name.replace('_', '-')} {value}".removesuffix(" True") for name, value in changes.items())
        way = f"{' '.join(words)} ({gb:.1f} GB)"
        ways += [way] if gb <= left and way not in ways else []
    larger = "more GPUs (torchrun)" if is_full else "a larger machine"
    message = (f"{folder}: needs about {need:.1f} GB, {device} has {left:.1f} GB free; use "
               f"{', or '.join(ways[:3] or ['a smaller checkpoint'])}, or {larger}")
    if device.type == "cuda":
        raise InputError(message)
    print(f"warning: {message}", file=sys.stderr)


def disk_gb(cfg, dtype: torch.dtype, model: Transformer) -> float:
    """GB of a run's files while they are saved: the state, 16 bytes a number, twice; student, teacher, and one anew."""
    return trained(cfg, model) * (2 * 16 + 3 * (dtype.itemsize if cfg.tune == FULL else 4)) / 2 ** 30


def check_room(cfg, folder: Path, out: Path, device: torch.device, dtype: torch.dtype, model: Transformer,
               processes: int) -> None:
    """Compare what a run needs with free memory and with the free part of the disk of `out`. Raises InputError."""
    check_memory(cfg, folder, device, lambda cfg: training_gb(cfg, folder, dtype, model, processes))
    need, left = disk_gb(cfg, dtype, model), shutil.disk_usage(check_writable(out, f"--out {out}")).free / 2 ** 30
    if need > left:
        raise InputError(f"--out {out}: needs about {in_words(need)} on disk, {in_words(left)} are free; choose "
                         "a larger one")


def recomputes(cfg, folder: Path, dtype: torch.dtype, model: Transformer, processes: int = 1) -> bool:
    """Whether blocks are recomputed in the backward pass: if the user says so, or if a step does not fit otherwise.

    model: loaded, so what is free is for gradient, moments and the step; a tenth of it is left for what sums miss.
    """
    if cfg.checkpointing is not None:
        return cfg.checkpointing
    device = next(model.parameters()).device
    step = step_gb(dataclasses.replace(cfg, checkpointing=False), folder, dtype, model)
    return step + 0.6 * trained_gb(cfg, dtype, model, processes) > 0.9 * free_gb(device)


def in_words(gb: float) -> str:
    """Memory for people."""
    return f"{gb:.1f} GB" if gb >= 1 else f"{1024 * gb:.0f} MB"


def free() -> None:
    """Give the memory of dropped models back."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


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
    if found.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--dtype {dtype}: {torch.cuda.get_device_name(found)} has no such type; use --dtype float32")
    return found, getattr(torch, dtype)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: of the GPU in use, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)                     # bytes on macOS, kilobytes on Linux
