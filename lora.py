"""LoRA on named Linear layers, the EMA teacher, and adapter files that other tools load.

D-OPSD (arXiv 2605.05204), method with LoRA: student theta and teacher thetabar are two adapters of the same shape on
one frozen base. An adapter is a set of plain float32 tensors that travels as an argument down to `linear`, the only
place where it meets a layer; no layer is wrapped and nothing is switched on or off. With gradient checkpointing this
keeps gradients right: the backward pass recomputes each block with the tensors that the forward pass was given.

Differs from the official code:
1. Adapters are arguments instead of PEFT's active-adapter state.
2. Files have alpha / rank folded into B and diffusers' key names; the official code saves raw PEFT keys, which
   diffusers silently ignores and ComfyUI does not know.
"""
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.backbone import Transformer
from plumbing.files import InputError, write_tensors
from plumbing.team import ALONE, Team
from rollout import Velocity

Bound = Callable[[list], Velocity]      # contexts -> velocity: a network with its weights
TITLES = ("modelspec.title", "ss_output_name")  # in a file's metadata, where other programs look for its name
AdapterBlock = dict[str, tuple[Tensor, Tensor, float]] | None  # layer name inside a block -> A, B, alpha / rank


class Adapter:
    """One LoRA: per layer a pair A (rank, in), B (out, rank), float32, meaning W + alpha / rank * B A."""

    def __init__(self, weights: dict[str, tuple[Tensor, Tensor]], rank: int, alpha: float):
        self.weights, self.rank, self.alpha = weights, rank, alpha
        self.scale = alpha / rank
        self._blocks: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        for name, (A, B) in weights.items():  # "layers.0.attention.to_q" belongs to block "layers.0"
            group, index, local = name.split(".", 2)
            self._blocks.setdefault(f"{group}.{index}", {})[local] = (A, B, self.scale)

    def block(self, prefix: str) -> AdapterBlock:
        """What `linear` needs inside the block called `prefix` ("layers.0"); None if this adapter leaves it alone."""
        return self._blocks.get(prefix)

    def parameters(self) -> list[Tensor]:
        """All A and B, in a fixed order."""
        return [tensor for pair in self.weights.values() for tensor in pair]

    def tensors(self) -> dict[str, Tensor]:
        """Flat, unscaled: "<layer>.A" and "<layer>.B"; what a resumed run needs."""
        return {f"{name}.{side}": tensor for name, pair in self.weights.items() for side, tensor in zip("AB", pair)}


# ---------------------------------------------------------------------------------------------------- use
def linear(layer: nn.Module, x: Tensor, adapter: AdapterBlock, name: str) -> Tensor:
    """layer(x) + alpha / rank * B (A x): x (..., in) -> (..., out). The only place where LoRA meets a layer.

    layer: a Linear, or a Sequential of one.
    A and B are cast to the dtype of x here. Keeping this product in float32 over a bf16 base would store a float32 copy
    of every activation for the backward pass and leave the tensor cores. The weights, their gradients, Adam and the EMA
    stay float32, so steps too small for bf16 are not lost.
    """
    y = layer(x)
    if adapter is None or name not in adapter:
        return y
    A, B, scale = adapter[name]
    inner = F.linear(x, A.to(x.dtype)).flatten(0, -2)                   # (all but the last, rank)
    return torch.addmm(y.flatten(0, -2), inner, B.to(x.dtype).t(), alpha=scale).view_as(y)


def create(model: Transformer, rank: int, alpha: float, seed: int, names: list[str] | None = None) -> Adapter:
    """A trainable adapter that changes nothing yet: A normal with std 1 / rank, B zero (the official initialisation).

    names: layers, default `model.lora_names()`. Drawn on the CPU, so the same on every device. Raises InputError.
    """
    if rank < 1:
        raise InputError(f"rank: {rank}; choose 1 or more")
    generator = torch.Generator("cpu").manual_seed(seed)
    device = next(model.parameters()).device
    weights = {}
    for name in model.lora_names() if names is None else names:
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        A = (torch.randn(rank, inputs, generator=generator) / rank).to(device)
        weights[name] = A.requires_grad_(), torch.zeros(outputs, rank, device=device, requires_grad=True)
    return Adapter(weights, rank, alpha)


def copy(adapter: Adapter) -> Adapter:
    """A frozen copy: the teacher at step 0."""
    weights = {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in adapter.weights.items()}
    return Adapter(weights, adapter.rank, adapter.alpha)


@torch.no_grad()
def ema_(teacher: Adapter, student: Adapter, decay: float) -> None:
    """thetabar <- decay * thetabar + (1 - decay) * theta, in place and in float32. Raises InputError.

    lerp_ computes thetabar + (1 - decay) (theta - thetabar): exact at decay 0 and 1.
    """
    if not 0 <= decay <= 1:
        raise InputError(f"EMA decay: {decay}; choose a number in [0, 1]")
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


# ---------------------------------------------------------------------------------------------------- both sides
def velocity_of(model: Transformer, context: list, adapter: Adapter | None) -> Velocity:
    """(x, sigma) -> v with context and weights bound: the student's of Eq. 5, the teacher's of Eq. 6."""
    return lambda x, sigma: model.velocity(x, sigma, context, adapter)


class Tuned:
    """What training changes: the adapter theta of the student and theta_bar of the teacher, on one frozen network.

    `Full` in plumbing/full.py is the same for all weights.
    """
    walkers = 1                                                         # processes whose rollouts must be equally long

    def __init__(self, model: Transformer, rank: int, alpha: float, seed: int, team: Team = ALONE,
                 name: str = "student"):
        self.model, self.device, self.team = model, next(model.parameters()).device, team
        self.saved = f"{name}.safetensors"                              # the student
        self.theta = create(model, rank, alpha, seed)
        self.theta_bar = copy(self.theta)                               # the teacher starts as the student
        self.draws = team.is_first                                      # panels

    def student(self, context: list) -> Velocity:
        return velocity_of(self.model, context, self.theta)

    def teacher(self, context: list) -> Velocity:
        return velocity_of(self.model, context, self.theta_bar)

    def base(self, context: list) -> Velocity:
        """Of the untuned model."""
        return velocity_of(self.model, context, None)

    def parameters(self) -> dict[str, Tensor]:
        """What the optimizer changes, by name."""
        return self.theta.tensors()

    def __str__(self) -> str:
        return f"{sum(map(torch.numel, self.theta.parameters())):,} LoRA parameters in {len(self.theta.weights)} layers"

    def clip_(self, most: float) -> Tensor:
        """Average the gradient over processes, clip its norm, and return what that was."""
        self.team.mean_(tensor.grad for tensor in self.parameters().values())
        return torch.nn.utils.clip_grad_norm_(self.parameters().values(), most)

    def ema_(self, decay: float) -> None:
        """theta_bar <- m theta_bar + (1 - m) theta."""
        ema_(self.theta_bar, self.theta, decay)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs; itself, not copies."""
        return {f"{side}.{name}": tensor for side, adapter in (("student", self.theta), ("teacher", self.theta_bar))
                for name, tensor in adapter.tensors().items()}

    def save(self, folder: Path, metadata: dict[str, str], with_teacher: bool) -> None:
        """The student's file and, on demand, teacher.safetensors, for `sample.py` and other programs."""
        if self.team.is_first:
            save(self.theta, folder / self.saved, metadata)
        if self.team.is_first and with_teacher:
            titles = {field: f"teacher of {metadata[field]}" for field in TITLES if field in metadata}
            save(self.theta_bar, folder / "teacher.safetensors", metadata | titles)


# ---------------------------------------------------------------------------------------------------- files
def save(adapter: Adapter, path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file for diffusers, ComfyUI and `load`: float32, alpha / rank folded into B, no alpha keys.

    metadata: plain strings about the run. Raises InputError when the file cannot be written.
    """
    weights = {}
    for name, (A, B) in adapter.weights.items():
        weights[f"transformer.{name}.lora_A.weight"] = A
        weights[f"transformer.{name}.lora_B.weight"] = adapter.scale * B.detach()
    write_tensors(path, weights, metadata)
