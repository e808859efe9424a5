"""Text encoder, tokenizer and VLM of a checkpoint -> `Encoder` (encoder.py), checked to belong together."""
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from encoder import IMAGE_TOKEN, Encoder
from plumbing import files
from plumbing.backbone import TextStyle
from plumbing.checkpoints import backbone_of
from plumbing.files import InputError
from plumbing.quantized import FLOAT, INT8

Model = TypeVar("Model", Qwen3Model, Qwen3VLModel)
VISUAL = ("model.visual.", "visual.")  # spellings of the vision tower's prefix in VLM checkpoints
VLM_JSON = ["config.json", "preprocessor_config.json", "*.safetensors.index.json"]
SHARED_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "intermediate_size", "vocab_size", "attention_bias")


def load(folder: Path, device: torch.device | str, dtype: torch.dtype | None = None, vlm: str | Path | None = None,
         image_pixels: tuple[int, int] | None = None, teacher_rope: str = "vlm", style: TextStyle | None = None,
         quantize: str = FLOAT) -> Encoder:
    """Encoder of the checkpoint `folder` (text_encoder/, tokenizer/), with f_mm when `vlm` names a Qwen3-VL.

    dtype: None is bfloat16 on CUDA and float32 elsewhere. vlm: folder or hub id; only its `visual.*` tensors are read.
    image_pixels: fewest and most pixels that f_mm resizes an image to, None as in the VLM's preprocessor_config.json;
    officially (512 * 512, 768 * 768) for Qwen3-VL-4B. teacher_rope: rotary base of f_mm, "vlm" (official) or "text"
    (the text encoder's, with which f_mm without an image would be f_text). style: None is that of the folder's
    transformer. quantize: int8 for the Linear weights of all layers. Raises InputError.
    """
    folder, device = Path(folder), torch.device(device)
    style = style or backbone_of(folder).text_style
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = _tokenizer(folder / "tokenizer")
    text_config = _text_config(folder)
    if max(tokenizer.get_vocab().values()) >= text_config.vocab_size:
        raise InputError(f"{folder / 'tokenizer'}: has more tokens than the text encoder's vocab_size "
                         f"{text_config.vocab_size}; give the tokenizer that belongs to this checkpoint")
    if min(style.layers(text_config.num_hidden_layers)) < 1:  # hidden state 0 is the embedding
        raise InputError(f"{folder / 'text_encoder'}: num_hidden_layers {text_config.num_hidden_layers}, too few to "
                         "take features from inside; give the text encoder that belongs to this checkpoint")
    if vlm is not None:  # everything small is checked before gigabytes are read
        vlm_folder = find_vlm(vlm, folder)
        vlm_config = _vlm_config(vlm_folder, text_config, tokenizer, teacher_rope)
        image_processor = _image_processor(vlm_folder, vlm_config, image_pixels)
        vision = vision_tensors(vlm_folder)

    text = _skeleton(Qwen3Model, text_config, device, folder / "text_encoder" / "config.json")
    weights = ((name.removeprefix("model."), tensor) for name, tensor in files.tensors(folder / "text_encoder"))
    in_layers, in_blocks = (("layers.",), ("blocks.",)) if quantize == INT8 else ((), ())
    files.load_strictly(text, weights, folder / "text_encoder", device, dtype, ignore=("lm_head.",), int8=in_layers)
    if vlm is None:
        return Encoder(tokenizer, text, style=style)
    teacher = _skeleton(Qwen3VLModel, vlm_config, device, vlm_folder / "config.json")
    files.load_strictly(teacher.visual, vision, vlm_folder, device, dtype, int8=in_blocks)
    for name, part in text.named_modules():  # the same modules, whatever has weights: the language model exists once
        if any(True for _ in part.parameters(recurse=False)):
            teacher.language_model.set_submodule(name, part)
    return Encoder(tokenizer, text, teacher, image_processor, style)


def find_vlm(name: str | Path, checkpoint: Path) -> Path:
    """Folder of a VLM. From the hub come its configs, its index and the shards with vision tensors, nothing else.

    Raises InputError, before the shards come, where it does not fit the text encoder of `checkpoint`.
    """
    folder = files.checkpoint(str(name), "config.json", VLM_JSON)
    config = _vlm_config(folder, _text_config(checkpoint), _tokenizer(checkpoint / "tokenizer"), "vlm")
    _image_processor(folder, config, None)
    index = sorted(folder.glob("*.safetensors.index.json"))
    wanted = {"*.safetensors"}  # a single file has no index
    if index:
        wanted = {file for tensor, file in files.weight_map(index[0]).items() if tensor.startswith(VISUAL)}
    folder = files.checkpoint(str(name), "config.json", VLM_JSON + sorted(wanted))
    vision_tensors(folder)                                              # whether there are any
    return folder


def vision_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, tensor) of a VLM's vision tower; no other shard is opened. Raises InputError if none."""
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        names = list(files.weight_map(index[0]))
    else:
        names = [name for found in files.shards(folder).values() for name in found]
    prefix = next((prefix for prefix in VISUAL if any(name.startswith(prefix) for name in names)), None)
    if prefix is None:
        raise InputError(f"{folder}: no vision tensors ({VISUAL[0]}*) among its weights; give a Qwen3-VL checkpoint")
    return ((name.removeprefix(prefix), tensor) for name, tensor in files.tensors(folder, prefix))


def _made(path: Path, make: Callable):
    """What transformers makes of a file, or an InputError: it raises many unrelated types for what it cannot use."""
    try:
        return make()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: transformers cannot use it ({reason:.200}); copy or download it again") from None


def _skeleton(kind: type[Model], config, device: torch.device, path: Path) -> Model:
    """A model without weights: parameters on the meta device, rotary tables (in no checkpoint) computed."""
    with torch.device("meta"):
        model = _made(path, lambda: kind(config))
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            model.set_submodule(name, type(module)(module.config).to(device))
    return model.eval()


def _config(kind, path: Path, *keys: str):
    found = files.read_json(path, "model_type")["model_type"]
    if found != kind.model_type:
        raise InputError(f"{path}: model_type {found!r}, expected {kind.model_type!r}; give a checkpoint of that kind")
    content = files.read_json(path, *keys)
    return _made(path, lambda: kind.from_dict(content))


def _text_config(folder: Path) -> Qwen3Config:
    return _config(Qwen3Config, folder / "text_encoder" / "config.json", "hidden_size", "num_hidden_layers")


def _vlm_config(folder: Path, text: Qwen3Config, tokenizer, teacher_rope: str) -> Qwen3VLConfig:
    """The VLM's config, checked to fit the text encoder and its tokenizer, with the rotary base that was asked for."""
    config = _config(Qwen3VLConfig, folder / "config.json", "text_config", "vision_config", "image_token_id")
    for key in SHARED_SIZES:
        ours, theirs = getattr(text, key), getattr(config.text_config, key)
        if ours != theirs:
            raise InputError(f"{folder}: its language model has {key} {theirs}, the checkpoint's text encoder {ours}; "
                             "give --vlm the one that belongs to this checkpoint")
    width = config.vision_config.out_hidden_size
    if width != text.hidden_size:
        raise InputError(f"{folder}: vision out_hidden_size {width}, text encoder's hidden_size {text.hidden_size}; "
                         "give --vlm the one that belongs to this checkpoint")
    known = tokenizer.get_vocab()  # the embedding is the text encoder's, so its tokenizer is the one to use
    for token, id in (("<|vision_start|>", config.vision_start_token_id), (IMAGE_TOKEN, config.image_token_id),
                      ("<|vision_end|>", config.vision_end_token_id)):
        if known.get(token) != id:
            raise InputError(f"{folder}: {token} has id {id} here, {known.get(token)} in the checkpoint's tokenizer; "
                             "give --vlm the one that belongs to this checkpoint")
    if teacher_rope not in ("vlm", "text"):
        raise InputError(f"teacher_rope: {teacher_rope!r}; choose vlm or text")
    if teacher_rope == "text":
        theta = text.rope_parameters["rope_theta"]  # type: ignore[index]  # never None once made
        config.text_config.rope_parameters["rope_theta"] = theta
    return config


def _image_processor(folder: Path, config: Qwen3VLConfig, pixels: tuple[int, int] | None) -> Qwen2VLImageProcessorPil:
    path = folder / "preprocessor_config.json"
    content = files.read_json(path, "patch_size", "image_mean", "image_std")
    if pixels is not None:
        content.update(min_pixels=pixels[0], max_pixels=pixels[1])  # these win over the file's "size"
    processor = _made(path, lambda: Qwen2VLImageProcessorPil.from_dict(content))
    for key, name in (("patch_size", "patch_size"), ("temporal_patch_size", "temporal_patch_size"),
                      ("merge_size", "spatial_merge_size")):
        needed = getattr(config.vision_config, name)
        if getattr(processor, key) != needed:
            raise InputError(f"{path}: {key} {getattr(processor, key)}, config.json asks for {needed}; "
                             "use the file that belongs to this checkpoint")
    return processor


def _tokenizer(folder: Path):
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the checkpoint is incomplete, copy or download it again")
    tokenizer = _made(folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    if tokenizer.pad_token_id is None or not isinstance(tokenizer.model_max_length, int):
        raise InputError(f"{folder}: its tokenizer has no pad_token, or a model_max_length that is no number; use the "
                         "tokenizer that belongs to the checkpoint")
    return tokenizer
