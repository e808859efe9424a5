"""The machine: which device and precision, whether a run fits its memory, how much memory was used."""
import gc
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from encoder import TEACHER_CONTEXTS
from plumbing.backbone import Transformer
from plumbing.checkpoints import pixels_per_patch
from plumbing.files import InputError, tensors

TEXT, PICTURE = 512, 576    # most tokens of a prompt, and of the picture that a VLM shows to the teacher
IN_BLOCK = re.compile(r"(layers|blocks|refiner)\.\d.*weight")     # what --quantize is for
SMALL, INT8, CHECKPOINTING = {"size": 768, "rank": 16}, {"quantize": "int8"}, {"checkpointing": True}
REMEDIES = (CHECKPOINTING, INT8, INT8 | CHECKPOINTING, SMALL, SMALL | CHECKPOINTING, SMALL | INT8 | CHECKPOINTING,
            SMALL | INT8 | CHECKPOINTING | {"size": 512, "batch_size": 1})


def weights_gb(folder: Path, dtype: torch.dtype, quantize="none", parts=("transformer", "text_encoder")) -> float:
    """GB of the weights of the largest of a checkpoint's networks, from the headers of their files alone."""
    def size(name: str, weight: torch.Tensor) -> int:
        is_row = quantize != "none" and weight.ndim == 2 and IN_BLOCK.search(name)
        return weight.numel() * (1 if is_row else dtype.itemsize)

    return max(sum(size(*w) for w in tensors(Path(folder) / part, only_shapes=True)) for part in parts) / 2 ** 30


def step_gb(model: Transformer, rank: int, checkpointing: bool, student: int, teacher: int, dtype: torch.dtype):
    """GB of a training step beside the weights of the model; student, teacher: numbers of tokens in their batches.

    theta, theta_bar, gradient and Adam's two moments are float32. Each block's input is kept, without checkpointing 23
    tensors as large: 12, and 4 as wide as the feed-forward. The block at work has up to 30, gradients included.
    """
    shapes = [model.get_parameter(f"{name}.weight").shape for name in model.lora_names()]
    kept = student * len(model.blocks()) * (1 if checkpointing else 23) + 30 * max(student, teacher)
    return (5 * 4 * rank * sum(map(sum, shapes)) + kept * shapes[0][1] * dtype.itemsize) / 2 ** 30


def check_memory(folder: Path, device: torch.device, dtype: torch.dtype, cfg=None, model: Transformer | None = None
                 ) -> float:
    """GB of the largest phase: the networks are never in memory together. cfg: options; model: only if it is trained.

    Raises InputError when the GPU has less free memory, with up to three ways to need less.
    """
    def needed(cfg) -> float:                                           # also of other options
        quantize = getattr(cfg, "quantize", "none")
        if model is None:
            return weights_gb(folder, dtype, quantize)
        image, context = (cfg.size // pixels_per_patch(folder)) ** 2, TEACHER_CONTEXTS[cfg.teacher_context]
        shown = PICTURE * context.needs_vlm + image * context.adds_reference
        student, teacher = (cfg.batch_size * (TEXT + image + more) for more in (0, shown))
        encoder, transformer = (weights_gb(folder, dtype, quantize, [part]) for part in ("text_encoder", "transformer"))
        step = step_gb(model, cfg.rank, cfg.checkpointing, student, teacher, dtype)
        return max(1.15 * encoder, transformer + step)                  # .15: vision tower and activations

    need, left = needed(cfg), free_gb(device)
    ways: list[str] = []
    for remedy in REMEDIES if model and need > left else ():
        changes = {name: value for name, value in remedy.items() if getattr(cfg, name, None) != value}
        words = " ".join(f"--{name.replace('_', '-')} {value}".removesuffix(" True") for name, value in changes.items())
        gb = needed(SimpleNamespace(**vars(cfg) | changes))
        ways += [f"{words} ({gb:.1f} GB)"] if gb <= left and words not in " ".join(ways) else []
    if need > left:
        raise InputError(f"{folder}: needs {need:.1f} GB in {str(dtype).removeprefix('torch.')}, {device} has "
                         f"{left:.1f} GB free; use {', or '.join(ways[:3] or ['a smaller checkpoint'])}, or a larger "
                         "GPU")
    return need


def free() -> None:
    """Give the memory of dropped models back."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def free_gb(device: torch.device) -> float:
    """Unused memory of a GPU; the computer's may swap."""
    return torch.cuda.mem_get_info(device)[0] / 2 ** 30 if device.type == "cuda" else math.inf


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
