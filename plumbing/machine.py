"""The machine: which device and precision, whether the weights fit, how much memory was used."""
import gc
import math
import sys
from pathlib import Path

import torch

from plumbing.files import InputError, tensors


def weights_gb(folder: Path, dtype: torch.dtype) -> float:
    """GB that the largest network of a checkpoint folder needs for its weights (they are never in memory together).

    From the headers of the weight files alone.
    """
    width = torch.finfo(dtype).bits // 8
    return max(sum(t.numel() for _, t in tensors(Path(folder) / part, only_shapes=True)) * width / 2 ** 30
               for part in ("transformer", "text_encoder"))


def check_memory(folder: Path, device: torch.device, dtype: torch.dtype) -> float:
    """`weights_gb`. Raises InputError when the GPU has less free memory."""
    need = weights_gb(folder, dtype)
    free_gb = torch.cuda.mem_get_info(device)[0] / 2 ** 30 if device.type == "cuda" else math.inf
    if need > free_gb:
        raise InputError(f"{folder}: its weights need {need:.1f} GB in {str(dtype).removeprefix('torch.')}, {device} "
                         f"has {free_gb:.1f} GB free; use a smaller checkpoint, --dtype bfloat16 or a larger GPU")
    return need


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
