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
import json
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.files import InputError, open_safetensors, read_json, write_tensors

AdapterBlock = dict[str, tuple[Tensor, Tensor, float]] | None  # layer name inside a block -> A, B, alpha / rank

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_")
# What the original weights, and so ComfyUI, kohya and ai-toolkit, call our groups of blocks and the layers inside them.
# Several layers with one name are the rows of one fused Linear, from top to bottom.
ORIGINAL = {
    # Z-Image
    "attention.to_q": "attention.qkv", "attention.to_k": "attention.qkv", "attention.to_v": "attention.qkv",
    "attention.to_out.0": "attention.out",
    # FLUX.2
    "transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks",
    "attn.to_q": "img_attn.qkv", "attn.to_k": "img_attn.qkv", "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv", "attn.add_k_proj": "txt_attn.qkv", "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2",
}
BACKBONES = {  # what tells whose layer a name means, in any spelling; FLUX.1 has some of FLUX.2's names
    "Z-Image": re.compile(r"(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward|adaLN)"),
    "FLUX.2": re.compile(r"transformer_blocks[._]\d+[._](attn[._](to|add)_|ff(_context)?[._]linear_)"
                         r"|(double|single)_blocks[._]\d"),
}
SIDES = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
KEY = re.compile(r"(?P<layer>.+?)\.(?:(?P<side>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
                 r"(?:\.default)?\.weight|(?P<alpha>alpha))")
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers looks for alpha; our own files must not have it


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

    @torch.no_grad()
    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Take over, in place, what `tensors` gave. Raises InputError unless names and shapes are the same."""
        own = self.tensors()
        if own.keys() != saved.keys():
            name = sorted(own.keys() ^ saved.keys())[0]
            raise InputError(f"saved adapter: tensor {name} is on one side only; resume with the options of that run")
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise InputError(f"saved adapter: {name} has shape {tuple(saved[name].shape)}, this run needs "
                                 f"{tuple(tensor.shape)}; resume with the rank of the run")
            tensor.copy_(saved[name])


# ---------------------------------------------------------------------------------------------------- use
def linear(layer: nn.Linear, x: Tensor, adapter: AdapterBlock, name: str) -> Tensor:
    """layer(x) + alpha / rank * B (A x): x (..., in) -> (..., out). The only place where LoRA meets a layer.

    A and B are cast to the dtype of x here. Keeping this product in float32 over a bf16 base would store a float32 copy
    of every activation for the backward pass and leave the tensor cores. The weights, their gradients, Adam and the EMA
    stay float32, so steps too small for bf16 are not lost.
    """
    y = layer(x)
    if adapter is None or name not in adapter:
        return y
    A, B, scale = adapter[name]
    return y + F.linear(scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def create(model: nn.Module, rank: int, alpha: float, seed: int, names: list[str] | None = None) -> Adapter:
    """A trainable adapter that changes nothing yet: A normal with std 1 / rank, B zero (the official initialisation).

    names: layers, default `model.lora_names()`. Drawn on the CPU, so the same on every device. Raises InputError.
    """
    if rank < 1:
        raise InputError(f"rank: {rank}; choose 1 or more")
    generator = torch.Generator("cpu").manual_seed(seed)
    device = next(model.parameters()).device
    weights = {}
    for name in model.lora_names() if names is None else names:
        layer = model.get_submodule(name)
        A = torch.randn(rank, layer.in_features, generator=generator) / rank
        B = torch.zeros(layer.out_features, rank)
        weights[name] = (A.to(device).requires_grad_(), B.to(device).requires_grad_())
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


def load(path: Path, model: nn.Module) -> Adapter:
    """The frozen adapter in a file, for `model` (which has `adaptable_names()`), on the model's device.

    Reads our own files and the spellings of PEFT, diffusers, ComfyUI, kohya, ai-toolkit, OneTrainer and LyCORIS; ranks
    may differ between layers and layers may be missing. The file's alpha is folded into B, so the result has scale 1.
    A file in PEFT's spelling keeps alpha in adapter_config.json beside it; without that file the scale is taken as 1,
    with a warning.
    Raises InputError on the other backbone's LoRA, unknown keys, incomplete pairs, wrong shapes, or no LoRA at all.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a LoRA in a .safetensors file")
    spellings = _spellings(model.adaptable_names())
    with open_safetensors(path) as file:
        keys = list(file.keys())
        _check_backbone(path, keys, model)
        config = _alpha_config(path, file.metadata() or {}, any(key.startswith("base_model.") for key in keys))
        found: dict[str, dict[str, Tensor]] = {}
        for key in keys:
            layer, part = _parse(path, key, spellings)
            found.setdefault(layer, {})[part] = file.get_tensor(key).float()
    device = next(model.parameters()).device
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, parts in found.items():
        for name, A, B in _pairs(path, layer, parts, spellings[layer], model, config):
            if name in weights:
                raise InputError(f"{path}: {name} occurs twice in different spellings; use a file with one of them")
            weights[name] = (A.to(device), B.to(device))
    if not weights:
        raise InputError(f"{path}: no LoRA in this file; give a LoRA made for this transformer")
    rank = max(len(A) for A, _ in weights.values())
    return Adapter(weights, rank, alpha=rank)


def _check_backbone(path: Path, keys: list[str], model: nn.Module) -> None:
    """Raises InputError for a LoRA of the other backbone."""
    def backbone(names: list[str]) -> str | None:
        return next((name for name, layers in BACKBONES.items() if any(map(layers.search, names))), None)

    own, other = backbone(model.adaptable_names()), backbone(keys)
    if other not in (own, None):
        raise InputError(f"{path}: this is a LoRA for {other}, the model is {own}; give a LoRA made for {own} "
                         f"or a {other} model")


def _spellings(names: list[str]) -> dict[str, list[str]]:
    """Spelling of a layer, without prefix -> the layers meant: three, in the order of `names`, for fused q, k and v."""
    table: dict[str, list[str]] = {}
    for name in names:
        group, index, local = name.split(".", 2)
        original = f"{ORIGINAL.get(group, group)}.{index}.{ORIGINAL.get(local, local)}"
        for spelling in {name, original}:  # a set: some layers of Z-Image have one name only
            table.setdefault(spelling, []).append(name)
            table.setdefault(spelling.replace(".", "_"), []).append(name)  # kohya writes no dots
    return table


def _parse(path: Path, key: str, spellings: dict[str, list[str]]) -> tuple[str, str]:
    """A key of the file -> (spelling of its layer without prefix, "A" | "B" | "alpha")."""
    match = KEY.fullmatch(key)
    layer = match["layer"] if match else ""
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer = layer.removeprefix(prefix)
    if layer not in spellings:
        raise InputError(f"{path}: unknown key {key}; give a LoRA made for this transformer")
    return layer, SIDES[match["side"]] if match["side"] else "alpha"


def _pairs(path: Path, layer: str, parts: dict[str, Tensor], names: list[str], model: nn.Module, config: dict
           ) -> list[tuple[str, Tensor, Tensor]]:
    """(layer name, A, B with the scale folded in) for one layer of the file; a fused one gives three that share A."""
    if "A" not in parts or "B" not in parts:
        missing = "A (down)" if "A" not in parts else "B (up)"
        raise InputError(f"{path}: {layer} has no matrix {missing}; the file is incomplete, copy or download it again")
    A, B = parts["A"], parts["B"]
    inner = model.get_submodule(names[0]).in_features
    sizes = [model.get_submodule(name).out_features for name in names]
    rank = len(A) if A.ndim == 2 else 0
    if rank < 1 or tuple(A.shape) != (rank, inner) or tuple(B.shape) != (sum(sizes), rank):
        raise InputError(f"{path}: {layer} has shapes {tuple(A.shape)} and {tuple(B.shape)}, expected (rank, {inner}) "
                         f"and ({sum(sizes)}, rank); give a LoRA made for this transformer")
    scale = parts["alpha"].item() / rank if "alpha" in parts else _config_scale(config, layer, rank)
    return [(name, A.clone(), scale * rows) for name, rows in zip(names, B.split(sizes))]


def _alpha_config(path: Path, metadata: dict[str, str], raw_peft: bool) -> dict:
    """Where PEFT and diffusers write alpha, with PEFT's field names; {} if the file says nothing about it."""
    if DIFFUSERS_METADATA in metadata:
        try:
            fields = json.loads(metadata[DIFFUSERS_METADATA])
            return {key.removeprefix("transformer."): value for key, value in fields.items()}
        except (json.JSONDecodeError, AttributeError):
            raise InputError(f"{path}: metadata {DIFFUSERS_METADATA} is no JSON object; save the file again") from None
    if not raw_peft:
        return {}
    config = path.with_name("adapter_config.json")
    if config.is_file():
        return read_json(config, "lora_alpha")
    warnings.warn(f"{path}: PEFT keys without adapter_config.json beside them, so alpha is unknown; loaded at scale 1")
    return {}


def _config_scale(config: dict, layer: str, rank: int) -> float:
    """PEFT's alpha / rank, or alpha / sqrt(rank) with use_rslora; alpha_pattern overrides alpha for matching layers."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
