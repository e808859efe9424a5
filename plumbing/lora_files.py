"""LoRA files as people have them: one `load` for the spellings of PEFT, diffusers, ComfyUI, kohya and others.

Our own files are written by `lora.save`, in diffusers' spelling.
"""
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

from torch import Tensor

from lora import TITLES, Adapter
from plumbing.backbone import Transformer
from plumbing.checkpoints import BACKBONES
from plumbing.files import InputError, broken, open_safetensors, read_json, real
from plumbing.kinds import wrong
from plumbing.quantized import FLOAT
from plumbing.train_options import names_of

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_")
SIDES = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
KEY = re.compile(rf"(?:{'|'.join(map(re.escape, PREFIXES))})*(?P<layer>.+?)\."
                 rf"(?:(?P<side>{'|'.join(map(re.escape, SIDES))})(?:\.default)?\.weight|alpha)")
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers looks for alpha; our own files must not have it


def load(path: Path | str, model: Transformer) -> Adapter:
    """The frozen adapter in a file, for `model`, on the model's device.

    Reads our own files and the spellings of PEFT, diffusers, ComfyUI, kohya, ai-toolkit, OneTrainer and LyCORIS; ranks
    may differ between layers and layers may be missing. The file's alpha is folded into B, so the result has scale 1.
    PEFT's files have alpha in adapter_config.json beside them; without that the scale is 1, with a warning. Raises
    InputError on the other backbone's LoRA, unknown keys, incomplete pairs, wrong shapes, or no LoRA at all.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; give a LoRA in a .safetensors file")
    own = next(backbone for backbone in BACKBONES if isinstance(model, backbone.network))
    spellings = _spellings(model.adaptable_names(), own.original_names)
    with open_safetensors(path) as file:
        keys = list(file.keys())
        other = next((backbone for backbone in BACKBONES if any(map(backbone.layer_name.search, keys))), own)
        if other is not own:
            raise InputError(f"{path}: this is a LoRA for {other.name}, the model is {own.name}; give a LoRA made for "
                             f"{own.name} or a {other.name} model")
        config = _alpha_config(path, file.metadata() or {}, any(key.startswith("base_model.") for key in keys))
        found: dict[str, dict[str, Tensor]] = {}
        for key in keys:
            match = KEY.fullmatch(key)
            if match is None or match["layer"] not in spellings:
                raise InputError(f"{path}: unknown key {key}; give a LoRA made for this transformer")
            parts, part = found.setdefault(match["layer"], {}), SIDES.get(match["side"], "alpha")
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise broken(path, f"{key} ({tensor.dtype}) has values that are not finite, or no floats at all")
            if part in parts:
                raise InputError(f"{path}: {key} occurs twice in different spellings; use a file with one of them")
            parts[part] = tensor.float()
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


def header(cfg, model: Transformer, captions: list[str]) -> dict[str, str]:
    """What other programs show of a run's LoRA: the fields of ModelSpec 1.0.1 (modelspec) and of kohya's trainers (ss).

    Sources: Stability-AI/ModelSpec; sai_model_spec.py of kohya-ss/sd-scripts and musubi-tuner, which write such files;
    T2IModelClassSorter.cs of SwarmUI, which sorts by them. No date: repeated and resumed runs say the same. No
    prediction_type: its "v" is Stable Diffusion's. ss_network_alpha is the file's: alpha / rank is in B already.
    """
    kind = next(backbone for backbone in BACKBONES if isinstance(model, backbone.network))
    width = model.get_parameter(f"{model.lora_names()[0]}.weight").shape[1]
    base = kind.spec_ids.get(width, f"{kind.name.lower()}-{width}")     # no real one: not to be taken for it
    trigger = {"modelspec.trigger_phrase": "[V]"} if any("[V]" in text for text in captions) else {}
    named = dict.fromkeys(TITLES, "+".join(names_of(cfg.data)) if cfg.name == "student" else cfg.name)
    return {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": f"{base}/lora", **named, **trigger,
            "modelspec.implementation": "diffusers", "modelspec.resolution": f"{cfg.size}x{cfg.size}",
            "ss_sd_model_name": real(cfg.model).name if real(cfg.model).exists() else cfg.model,    # not its place
            "ss_base_model_version": re.sub("[.-]", "_", base),
            "ss_network_dim": str(cfg.rank), "ss_network_alpha": str(cfg.rank)}


def warn_other_weights(path: Path | str, quantize: str) -> None:
    """One line on stderr for an adapter that was trained with another --quantize; a file that does not say: none."""
    with open_safetensors(Path(path)) as file:
        trained = (file.metadata() or {}).get("quantize", FLOAT)
    if trained != quantize:
        print(f"warning: {path}: trained with --quantize {trained}, used with {quantize}; pictures differ a little",
              file=sys.stderr)


def _spellings(names: list[str], originals: dict[str, str]) -> dict[str, list[str]]:
    """Spelling of a layer, without prefix -> the layers meant: three, in the order of `names`, for fused q, k and v.

    originals: what the original weights, and so ComfyUI, kohya and ai-toolkit, call our groups of blocks and the layers
    inside them. Several layers with one name are the rows of one fused Linear, from top to bottom.
    """
    table: dict[str, list[str]] = {}
    for name in names:
        group, index, local = name.split(".", 2)
        original = f"{originals.get(group, group)}.{index}.{originals.get(local, local)}"
        dotted = {name, original}               # a set: some layers of Z-Image have one name only
        for spelling in dotted | {spelling.replace(".", "_") for spelling in dotted}:       # kohya writes no dots
            table.setdefault(spelling, []).append(name)
    return table


def _pairs(path: Path, layer: str, parts: dict[str, Tensor], names: list[str], model: Transformer, config: dict
           ) -> list[tuple[str, Tensor, Tensor]]:
    """(layer name, A, B with the scale folded in) for one layer of the file; a fused one gives three that share A."""
    if "A" not in parts or "B" not in parts:
        raise broken(path, f"{layer} has no matrix {'B (up)' if 'A' in parts else 'A (down)'}")
    A, B = parts["A"], parts["B"]
    shapes = [model.get_parameter(f"{name}.weight").shape for name in names]
    inner, sizes = shapes[0][1], [shape[0] for shape in shapes]
    rank = len(A) if A.ndim == 2 else 0
    if rank < 1 or tuple(A.shape) != (rank, inner) or tuple(B.shape) != (sum(sizes), rank):
        raise InputError(f"{path}: {layer} has shapes {tuple(A.shape)} and {tuple(B.shape)}, expected (rank, {inner}) "
                         f"and ({sum(sizes)}, rank); give a LoRA made for this transformer")
    if "alpha" in parts and not (parts["alpha"].numel() == 1 and parts["alpha"].item() >= 0):
        raise InputError(f"{path}: {layer} has alpha {parts['alpha'].tolist()}, expected one number; save it again")
    scale = parts["alpha"].item() / rank if "alpha" in parts else _config_scale(config, layer, rank)
    return [(name, A.clone(), scale * rows) for name, rows in zip(names, B.split(sizes))]


def _alpha_config(path: Path, metadata: dict[str, str], raw_peft: bool) -> dict:
    """Where PEFT and diffusers write alpha, with PEFT's field names; {} if the file says nothing about it."""
    if DIFFUSERS_METADATA in metadata:
        try:
            fields = json.loads(metadata[DIFFUSERS_METADATA])
            fields = {key.removeprefix("transformer."): value for key, value in fields.items()}
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{path}: metadata {DIFFUSERS_METADATA} is no JSON object; save the file again") from None
        if problem := wrong(fields, ("lora_alpha",)):
            raise InputError(f"{path}: metadata {DIFFUSERS_METADATA} has {problem}; save the file again")
        return fields
    config = path.with_name("adapter_config.json")
    if raw_peft and config.is_file():
        return read_json(config, "lora_alpha")
    if raw_peft:
        warnings.warn(f"{path}: PEFT keys without adapter_config.json beside them, alpha is unknown; loaded at scale 1")
    return {}


def _config_scale(config: dict, layer: str, rank: int) -> float:
    """PEFT's alpha / rank, or alpha / sqrt(rank) with use_rslora; alpha_pattern overrides alpha for matching layers."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
