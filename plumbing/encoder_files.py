"""Text encoder, tokenizer and VLM of a checkpoint -> `Encoder` (encoder.py), checked to belong together."""
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from encoder import IMAGE_TOKEN, Encoder
from plumbing import files
from plumbing.backbone import TextStyle
from plumbing.checkpoints import backbone_of
from plumbing.files import OTHER, InputError, broken
from plumbing.quantized import FLOAT, INT8

VISUAL = ("model.visual.", "visual.")  # spellings of the vision tower's prefix in VLM checkpoints
VLM_JSON = [*files.NETWORK_JSON, files.INDEX]
SHARED_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "intermediate_size", "vocab_size", "attention_bias")


def load(folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32, vlm: str | Path | None = None,
         image_pixels: tuple[int, int] | None = None, teacher_rope: str = "vlm", style: TextStyle | None = None,
         quantize: str = FLOAT) -> Encoder:
    """Encoder of the checkpoint `folder` (text_encoder/, tokenizer/), with f_mm when `vlm` names a Qwen3-VL.

    vlm: folder or hub id; only its `visual.*` tensors are read. image_pixels: fewest and most pixels that f_mm resizes
    an image to, None as in the VLM's preprocessor_config.json; officially (512 * 512, 768 * 768) for Qwen3-VL-4B.
    teacher_rope: rotary base of f_mm, "vlm" (official) or "text" (the text encoder's, with which f_mm without an image
    would be f_text). style: None is that of the folder's transformer. quantize: int8 for the Linear weights of all
    layers. Raises InputError.
    """
    style = style or backbone_of(folder).text_style
    text_config, tokenizer = text_parts(folder)
    if min(style.layers(text_config.num_hidden_layers)) < 1:  # hidden state 0 is the embedding
        raise broken(folder / "text_encoder", f"num_hidden_layers {text_config.num_hidden_layers}, too few for the "
                     "features from inside a text encoder", OTHER)
    if vlm is not None:  # everything small is checked before gigabytes are read
        vlm_folder = find_vlm(vlm, text_config, tokenizer)
        vlm_config, image_processor = _vlm_parts(vlm_folder, text_config, tokenizer, teacher_rope, image_pixels)
        vision = vision_tensors(vlm_folder)

    text: Qwen3Model = _skeleton(Qwen3Model, text_config, device, folder / "text_encoder" / "config.json")
    weights = ((name.removeprefix("model."), tensor) for name, tensor in files.tensors(folder / "text_encoder"))
    int8 = ("layers.", "blocks.") if quantize == INT8 else ()           # of the text encoder, of the vision tower
    files.load_strictly(text, weights, folder / "text_encoder", device, dtype, ignore=("lm_head.",), int8=int8)
    if vlm is None:
        return Encoder(tokenizer, text, style=style)
    teacher: Qwen3VLModel = _skeleton(Qwen3VLModel, vlm_config, device, vlm_folder / "config.json")
    files.load_strictly(teacher.visual, vision, vlm_folder, device, dtype, int8=int8)
    for name, part in text.named_modules():  # the same modules, whatever has weights: the language model exists once
        if any(True for _ in part.parameters(recurse=False)):
            teacher.language_model.set_submodule(name, part)
    return Encoder(tokenizer, text, teacher, image_processor, style)


def find_vlm(name: str | Path, text: Qwen3Config, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Folder of a VLM. From the hub come its configs, its index and the shards with vision tensors, nothing else.

    text, tokenizer: of `text_parts`. Raises InputError, before the shards come, where the VLM does not fit them.
    """
    folder = files.checkpoint(str(name), "config.json", VLM_JSON)
    _vlm_parts(folder, text, tokenizer)
    wanted = {"*.safetensors"}                                          # a single file has no index
    if any(folder.glob(files.INDEX)):
        wanted = {file for tensor, file in files.listing(folder) if tensor.startswith(VISUAL)}
    folder = files.checkpoint(str(name), "config.json", VLM_JSON + sorted(wanted))
    vision_tensors(folder)                                              # whether there are any
    return folder


def vision_tensors(folder: Path) -> files.Weights:
    """(name without prefix, tensor) of a VLM's vision tower; no other shard is opened. Raises InputError if none."""
    if not any(name.startswith(VISUAL) for name, _ in files.listing(folder)):
        raise InputError(f"{folder}: no vision tensors ({VISUAL[0]}*) among its weights; give a Qwen3-VL checkpoint")
    return ((name.split("visual.", 1)[1], tensor) for name, tensor in files.tensors(folder, VISUAL))


def made(path: Path, make: Callable):
    """What transformers makes of a file, or an InputError: it raises many unrelated types for what it cannot use."""
    try:
        return make()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise broken(path, f"transformers cannot use it ({reason:.200})") from None


def _skeleton(kind: Callable, config, device: torch.device | str, path: Path):
    """A model without weights: parameters on the meta device, rotary tables (in no checkpoint) computed."""
    with torch.device("meta"):
        model = made(path, lambda: kind(config))
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            model.set_submodule(name, type(module)(module.config).to(device))
    return model.eval()


def _config(kind, path: Path, *keys: str):
    found = files.read_json(path, "model_type")["model_type"]
    if found != kind.model_type:
        raise InputError(f"{path}: model_type {found!r}, expected {kind.model_type!r}; give a checkpoint of that kind")
    content = files.read_json(path, *keys)
    return made(path, lambda: kind.from_dict(content))


def text_parts(folder: Path) -> tuple[Qwen3Config, PreTrainedTokenizerBase]:
    """Config of the text encoder of a checkpoint, and the tokenizer that fits it."""
    path = folder / "tokenizer"
    files.visible_files(path)                                           # whether there is a folder
    tokenizer = made(path, lambda: AutoTokenizer.from_pretrained(path, local_files_only=True))
    if tokenizer.pad_token_id is None or not isinstance(tokenizer.model_max_length, int):
        raise broken(path, "its tokenizer has no pad_token, or a model_max_length that is no number", OTHER)
    config = _config(Qwen3Config, folder / "text_encoder" / "config.json", "hidden_size", "num_hidden_layers")
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise broken(path, f"has more tokens than the text encoder's vocab_size {config.vocab_size}", OTHER)
    return config, tokenizer


def _vlm_parts(folder: Path, text: Qwen3Config, tokenizer: PreTrainedTokenizerBase, teacher_rope: str = "vlm",
               pixels: tuple[int, int] | None = None) -> tuple[Qwen3VLConfig, Qwen2VLImageProcessorPil]:
    """Config and image processor of a VLM that fits the text encoder and its tokenizer, as `load` was asked for."""
    config = _config(Qwen3VLConfig, folder / "config.json", "text_config", "vision_config", "image_token_id")
    sizes = [(key, getattr(config.text_config, key), getattr(text, key)) for key in SHARED_SIZES]
    problems = [f"its language model has {key} {theirs}, the checkpoint's text encoder {ours}"
                for key, theirs, ours in sizes if theirs != ours]
    if (width := config.vision_config.out_hidden_size) != text.hidden_size:
        problems.append(f"vision out_hidden_size {width}, text encoder's hidden_size {text.hidden_size}")
    known = tokenizer.get_vocab()  # the embedding is the text encoder's, so its tokenizer is the one to use
    ids = {"<|vision_start|>": config.vision_start_token_id, IMAGE_TOKEN: config.image_token_id,
           "<|vision_end|>": config.vision_end_token_id}
    problems += [f"{token} has id {id} here, {known.get(token)} in the checkpoint's tokenizer"
                 for token, id in ids.items() if known.get(token) != id]
    if problems:
        raise InputError(f"{folder}: {problems[0]}; give --vlm the one that belongs to this checkpoint")
    if teacher_rope not in ("vlm", "text"):
        raise InputError(f"teacher_rope: {teacher_rope!r}; choose vlm or text")
    if teacher_rope == "text":
        config.text_config.rope_parameters["rope_theta"] = text.rope_parameters["rope_theta"]  # type: ignore[index]
    path = folder / "preprocessor_config.json"
    content = files.read_json(path, "patch_size", "image_mean", "image_std")
    if pixels is not None:
        content.update(min_pixels=pixels[0], max_pixels=pixels[1])  # these win over the file's "size"
    processor = made(path, lambda: Qwen2VLImageProcessorPil.from_dict(content))
    for key in ("patch_size", "temporal_patch_size", "merge_size"):
        needed = getattr(config.vision_config, "spatial_merge_size" if key == "merge_size" else key)
        if getattr(processor, key) != needed:
            raise broken(path, f"{key} {getattr(processor, key)}, config.json asks for {needed}", OTHER)
    return config, processor
