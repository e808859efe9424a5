"""The two embedded models: their folders, their noise levels, classifier-free guidance.

model/ is a small Z-Image, flux2/ a small FLUX.2-klein. Beside each lies its transformer before step distillation.
"""
from pathlib import Path

import torch
from torch import Tensor

from model import ZImageTransformer
from networks import flux2
from plumbing.checkpoints import EMBEDDED, backbone_of
from plumbing.files import ROOT
from model import scheduler_shift
from rollout import sigma_grid
from tiny.world import SIDE

Z_IMAGE_FOLDER, Z_IMAGE_BASE = EMBEDDED, ROOT / "tiny" / "base"
FLUX2_FOLDER, FLUX2_BASE = ROOT / "tiny" / "flux2", ROOT / "tiny" / "flux2_base"

# What scheduler/scheduler_config.json of each model says.
Z_IMAGE_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.36.0",
                     "num_train_timesteps": 1000, "shift": 10.0, "use_dynamic_shifting": False}
FLUX2_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.37.0",
                   "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
                   "time_shift_type": "exponential", "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
                   "max_image_seq_len": 4096}


def is_flux2(folder: Path) -> bool:
    """Whether a checkpoint folder of the embedded kind holds a FLUX.2; else it is a Z-Image. Raises InputError."""
    return backbone_of(folder) is flux2.KLEIN


def base_of(folder: Path) -> Path:
    """The folder of the transformer before distillation that belongs to an embedded model of this kind."""
    return FLUX2_BASE if is_flux2(folder) else Z_IMAGE_BASE


def z_image_grid(steps: int) -> Tensor:
    """Noise levels (steps + 1,) of the small Z-Image's sampler."""
    return sigma_grid(scheduler_shift(Z_IMAGE_SCHEDULER), steps)


def flux2_grid(steps: int) -> Tensor:
    """Noise levels (steps + 1,) of the small FLUX.2's sampler, for pictures of this world."""
    return sigma_grid(flux2.time_shift(FLUX2_SCHEDULER, steps, SIDE // 4, SIDE // 4), steps)


def grid_of(net: torch.nn.Module, steps: int) -> Tensor:
    """Noise levels (steps + 1,) of the sampler that belongs to an embedded transformer."""
    return z_image_grid(steps) if isinstance(net, ZImageTransformer) else flux2_grid(steps)


def guided(net: torch.nn.Module, context: list, empty: list, guidance: float, adapter=None):
    """velocity(x, sigma) with classifier-free guidance: v_empty + guidance (v - v_empty).

    context, empty: contexts of the prompts and of the empty prompt, one per row of x.
    """
    def velocity(x: Tensor, sigma: float) -> Tensor:
        v = net.velocity(x, sigma, context, adapter)
        if guidance == 1:
            return v
        v_empty = net.velocity(x, sigma, empty, adapter)
        return v_empty + guidance * (v - v_empty)
    return velocity
