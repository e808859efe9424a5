"""Full fine-tuning: all weights of the transformer, with the interface of `Tuned` in lora.py.

D-OPSD (arXiv 2605.05204), second half of its experiments: theta is the whole network, and theta_bar a second one, the
EMA of the first. What holds on to the untuned model (--keep, --teacher-weights frozen, pso) needs a third.

Weights, gradients, moments and the EMA are float32. The alternative, bfloat16 with stochastic rounding, halves the
weights, but its EMA stands still: 1 - m = 1e-4 of a change is below the 2^-9 that bfloat16 resolves (docs/full.md).
Forward and backward passes are in --dtype, and several GPUs share the weights (team.py).

Differs from the official code, which raises NotImplementedError here.
"""
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from baselines import Method
from lora import Tuned, velocity_of
from plumbing.backbone import Transformer
from plumbing.checkpoints import backbone_of
from plumbing.files import InputError, read_json, write_json, write_tensors
from plumbing.team import Team, whole
from plumbing.train_options import LORA, PRIOR, UNTUNED, sources_of
from rollout import Velocity

WEIGHTS = "diffusion_pytorch_model"


class Full:
    """What full fine-tuning changes: the network theta of the student, and theta_bar of the teacher."""
    saved = "student/transformer"

    def __init__(self, load: Callable[[torch.dtype], Transformer], config: dict, dtype: torch.dtype, team: Team,
                 teacher: str, needs_base: bool) -> None:
        """load: a frozen transformer in a precision. config: of its folder. dtype: of forward and backward passes.
        teacher: ema of the student, a live copy of it, or frozen as it was. needs_base: whether `base` is used."""
        def network(precision: torch.dtype, is_trained: bool = False) -> Transformer:
            model = load(precision)
            for parameter in model.parameters():
                parameter.requires_grad_(is_trained)
            team.shard(model, dtype)
            return model

        self.team, self.dtype, self.config = team, dtype, config
        self.model = network(torch.float32, is_trained=True)
        self.device = next(self.model.parameters()).device
        self.untuned = network(dtype) if needs_base or teacher == "frozen" else self.model
        self.slow = network(torch.float32) if teacher == "ema" else self.model if teacher == "copy" else self.untuned
        self.has_ema, self.draws, self.walkers = teacher == "ema", True, team.size  # each has a part of the weights
        # The parts that this process keeps; while a network is at work, its own attributes are whole blocks instead.
        self._theta, self._theta_bar = (dict[str, Tensor](part.named_parameters()) for part in (self.model, self.slow))

    def student(self, context: list) -> Velocity:
        return velocity_of(self.model, context, None)

    def teacher(self, context: list) -> Velocity:
        return velocity_of(self.slow, context, None)

    def base(self, context: list) -> Velocity:
        """Of the untuned model; without `needs_base` only before the first step."""
        return velocity_of(self.untuned, context, None)

    def parameters(self) -> dict[str, Tensor]:
        """What the optimizer changes, by name."""
        return self._theta

    def __str__(self) -> str:
        return f"{sum(tensor.numel() for tensor in self._theta.values()):,} weights, all of the transformer"

    def clip_(self, most: float) -> Tensor:
        """Clip the gradient's norm, and return what it was. Over processes, the backward pass has averaged it."""
        for weight in self._theta.values():                             # a pad token that no batch needed has none
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return whole(nn.utils.clip_grad_norm_(self._theta.values(), most))

    @torch.no_grad()
    def ema_(self, decay: float) -> None:
        """theta_bar <- m theta_bar + (1 - m) theta, where the teacher has weights of its own."""
        if self.has_ema:
            for name, slow in self._theta_bar.items():
                slow.lerp_(self._theta[name], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs; itself, not copies, and perhaps in parts."""
        teacher = self._theta_bar if self.has_ema else {}
        return {f"{side}.{name}": tensor for side, own in (("student", self._theta), ("teacher", teacher))
                for name, tensor in own.items()}

    def save(self, folder: Path, metadata: dict[str, str], with_teacher: bool) -> None:
        """student/transformer and teacher/transformer: folders for `sample.py --transformer` and diffusers."""
        for side, own in (("student", self._theta), ("teacher", self._theta_bar)):
            if side == "student" or with_teacher and self.has_ema:
                self._write(folder / side / "transformer", own, metadata)

    def _write(self, folder: Path, own: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """A transformer's folder, complete or as it was before. All processes ask for every tensor, one writes."""
        fresh, before = folder.with_name("transformer.new"), folder.with_name("transformer.old")
        shutil.rmtree(fresh, ignore_errors=True)
        files = split({name: tensor.numel() * self.dtype.itemsize for name, tensor in own.items()})
        for file, names in files.items():
            tensors = self.team.gathered({name: own[name] for name in names})
            if self.team.is_first:
                write_tensors(fresh / file, {name: part.to(self.dtype) for name, part in tensors.items()}, metadata)
        if self.team.is_first:
            if len(files) > 1:
                write_json(fresh / f"{WEIGHTS}.safetensors.index.json", {
                    "metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}})
            write_json(fresh / "config.json", self.config)
            shutil.rmtree(before, ignore_errors=True)
            if folder.exists():
                folder.rename(before)
            fresh.rename(folder)
            shutil.rmtree(before, ignore_errors=True)


def split(sizes: dict[str, int], most: int = 5 * 2 ** 30) -> dict[str, list[str]]:
    """File -> names of its tensors, in diffusers' layout: files of at most `most` bytes. sizes: of the tensors."""
    parts, room = list[list[str]]([[]]), most
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= size
    if len(parts) == 1:
        return {f"{WEIGHTS}.safetensors": parts[0]}
    return {f"{WEIGHTS}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def tuned_of(cfg, folder: Path, device: torch.device, dtype: torch.dtype, team: Team, method: Method) -> Tuned | Full:
    """What train.py trains, and with it the student and its teacher."""
    def network(precision: torch.dtype) -> Transformer:
        return backbone_of(folder).load(folder, device, precision, compile=cfg.compile, quantize=cfg.quantize)

    if cfg.tune == LORA:
        return Tuned(network(dtype), cfg.rank, cfg.alpha, cfg.seed, team, cfg.name)
    if cfg.method == PRIOR and not team.is_alone:                       # each would draw pictures at another time
        raise InputError(f"--method {PRIOR}: with --tune full not in several processes; leave one of them out")
    needs_base = "base" in method.needs or UNTUNED in [source.teacher for source in sources_of(cfg)]
    config = read_json(folder / "transformer" / "config.json")
    return Full(network, config, dtype, team, cfg.teacher_weights, needs_base)
