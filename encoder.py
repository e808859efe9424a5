"""The two contexts of D-OPSD (arXiv 2605.05204, Eq. 4), the only thing in which teacher and student differ.

    c_s = f_text(y)       the student reads the prompt y
    c_t = f_mm(y, x0)     the teacher reads the prompt and the target image x0

f_text is the checkpoint's own text encoder (Qwen3). f_mm is a Qwen3-VL whose language model is that same text encoder:
its vision tower turns x0 into tokens that stand before the prompt. Both contexts are hidden states of this language
model, one vector per token, so the unchanged diffusion transformer reads either. `Style` is what each one expects:

    Z-Image         the last but one layer; no <think> block; no padding
    FLUX.2-klein    the layers at 1/4, 1/2 and 3/4 of the depth, side by side; an empty <think> block; padded to 512

FLUX.2-klein's teacher can also see x0 as a reference image (flux2.py); f_text then reads `reference_prompt`.

Differs from the paper / the official code:
1. The teacher's prompt goes through the chat template once. Officially the student's encoder overwrites its input list,
   so the teacher's prompt is templated a second time around the first.
2. Language model weights are in memory once, shared by both readers, and the contexts are cached by the caller.
   Officially two copies stay on the GPU and encode the same images and captions at every step.
3. Officially the text encoder's weights (trained with rotary base 1e6) run with the VLM's 5e6, so a prompt without
   image would not give the student's features. That stays the default; `teacher_rope="text"` takes the text encoder's.
4. Rotary frequencies stay in float32, as transformers loads them; officially `.to(bfloat16)` rounds them too.
5. The image is resized as an 8-bit picture by Pillow, officially as a float tensor by torchvision.
6. Z-Image's prompts are padded to the longest of their batch, not to 512: attention is causal, so padding on the right
   is never seen.
7. f_mm serves FLUX.2-klein too, officially it sees x0 only as a reference; `reference_prompt` has its own wording.
"""
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from plumbing import files
from plumbing.files import InputError

TEXT_TOKENS = 512          # of the student's context, as in diffusers' ZImagePipeline and Flux2KleinPipeline
IMAGE_TEXT_TOKENS = 1024   # of the teacher's context, as in the official code
BATCH = 8                  # sequences per forward pass: at 1024 tokens of the 4B model about 1.5 GB of hidden states
IMAGE_TOKEN = "<|image_pad|>"
VISUAL = ("model.visual.", "visual.")  # spellings of the vision tower's prefix in VLM checkpoints
VLM_JSON = ["config.json", "preprocessor_config.json", "*.safetensors.index.json"]
SHARED_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "intermediate_size", "vocab_size", "attention_bias")


@dataclass(frozen=True)
class Style:
    """The features that a family of diffusion transformers was trained on."""
    thought: str                              # how the assistant's answer begins: "", or a <think> block that is empty
    layers: Callable[[int], tuple[int, ...]]  # number of layers -> indices of the hidden states that are concatenated
    padded: bool                              # short contexts are filled up with pad tokens, which are attended to


Z_IMAGE = Style(thought="", layers=lambda depth: (depth - 1,), padded=False)
KLEIN = Style(thought="<think>\n\n</think>\n\n", layers=lambda depth: (depth // 4, depth // 2, depth * 3 // 4),
              padded=True)
STYLES = {"ZImageTransformer2DModel": Z_IMAGE, "Flux2Transformer2DModel": KLEIN}  # by the class of the transformer


# ---------------------------------------------------------------------------------------------------- templates
def text_prompt(prompt: str, thought: str = "") -> str:
    """Qwen chat format: one user message and the start of the answer, of which `thought` is a part."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{thought}"


def image_text_prompt(prompt: str, image_tokens: int, thought: str = "") -> str:
    """The same chat with an image of `image_tokens` tokens before the text, and no system prompt."""
    return text_prompt(f"<|vision_start|>{IMAGE_TOKEN * image_tokens}<|vision_end|>{prompt}", thought)


def reference_prompt(prompt: str, sources: int) -> str:
    """The prompt of a teacher that sees the target as a reference image, the last one after `sources` source images."""
    if sources == 0:
        return f"{prompt}\nKeep the subject, the background and the composition of the reference image."
    return f"{prompt}\nThe last reference image, image {sources + 1}, shows the wanted result."


# ---------------------------------------------------------------------------------------------------- the two contexts
class Encoder:
    """f_text and, when a VLM was loaded, f_mm. Frozen; `del` gives the memory back."""

    def __init__(self, tokenizer, text: Qwen3Model, vlm: Qwen3VLModel | None = None,
                 image_processor: Qwen2VLImageProcessorPil | None = None, style: Style = Z_IMAGE):
        self.tokenizer, self.text, self.vlm, self.image_processor = tokenizer, text, vlm, image_processor
        self.style, self.layers = style, style.layers(text.config.num_hidden_layers)
        self.fewest = min(TEXT_TOKENS, tokenizer.model_max_length) if style.padded else 0  # rows of a context

    @torch.no_grad()
    def text_context(self, prompts: Sequence[str]) -> list[Tensor]:
        """c_s = f_text(y): for every prompt (L_i, D), D = hidden size * layers of the style, in the model's dtype.

        L_i <= 512; with a padded style all are 512, or the tokenizer's model_max_length if that is smaller. Equal to
        ZImagePipeline's or Flux2KleinPipeline's features. A longer prompt loses its end, as in those pipelines, with
        a warning. Raises InputError on an empty prompt.
        """
        _check_prompts(prompts)
        limit = self.fewest or TEXT_TOKENS
        tokens = [self._tokens(text_prompt(prompt, self.style.thought), prompt, limit) for prompt in prompts]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))  # similar lengths together: little padding
        contexts: dict[int, Tensor] = {}
        for start in range(0, len(order), BATCH):
            chosen = order[start:start + BATCH]
            contexts.update(zip(chosen, self._features(self.text, [tokens[i] for i in chosen])))
        return [contexts[i] for i in range(len(tokens))]

    @torch.no_grad()
    def image_text_context(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Tensor]:
        """c_t = f_mm(y, x0): for every pair (L_i, D), L_i <= 1024, in the model's dtype. images: RGB pictures.

        A padded style fills short ones up to the length of text_context. Equal to Qwen3VLForConditionalGeneration with
        the text encoder's weights as language model. A longer prompt loses its end, as in the official code, with a
        warning; the image comes first and is never cut. Raises InputError on an empty prompt or one with the image
        token in it, an image that alone fills the context, no VLM.
        """
        if self.vlm is None:
            raise InputError("--vlm: not given; the teacher's context needs it, give a Qwen3-VL folder or hub id")
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
        _check_prompts(prompts, forbidden=IMAGE_TOKEN)
        contexts = []
        for start in range(0, len(prompts), BATCH):
            contexts += self._image_text_batch(prompts[start:start + BATCH], images[start:start + BATCH])
        return contexts

    def teacher_texts(self, kind: str, prompts: Sequence[str], targets: Sequence[Image.Image], sources: Sequence[int]
                      ) -> list[Tensor]:
        """The texts of the teacher's contexts, (L_i, D) each, as `--teacher-context` says: `vlm` or `reference`.

        sources: how many source images each prompt has, which count when the target is to be named among them.
        """
        if kind == "vlm":
            return self.image_text_context(prompts, targets)
        return self.text_context([reference_prompt(p, n) for p, n in zip(prompts, sources, strict=True)])

    def _image_text_batch(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Tensor]:
        try:
            pixels = self.image_processor(images=list(images), return_tensors="pt")
        except ValueError as error:  # an aspect ratio beyond 200
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise InputError(f"image (one of {sizes}): {error}; crop it") from None
        grids = pixels["image_grid_thw"]                                  # (B, 3): 1, rows, columns of patches
        counts = grids.prod(-1) // self.image_processor.merge_size ** 2   # (B,) image tokens
        image_id = self.vlm.config.image_token_id
        tokens = []
        for prompt, image, count in zip(prompts, images, counts.tolist()):
            tokens.append(self._tokens(image_text_prompt(prompt, count, self.style.thought), prompt, IMAGE_TEXT_TOKENS))
            if tokens[-1].count(image_id) < count:
                raise InputError(f"image of {image.width}x{image.height} pixels: {count} image tokens, the teacher's "
                                 f"context holds {IMAGE_TEXT_TOKENS} in all; lower the largest number of pixels")
        return self._features(self.vlm, tokens, pixel_values=pixels["pixel_values"].to(self.text.device),
                              image_grid_thw=grids.to(self.text.device))

    def _tokens(self, chat: str, prompt: str, limit: int) -> list[int]:
        tokens = self.tokenizer(chat).input_ids
        if len(tokens) > limit:
            warnings.warn(f"prompt {_short(prompt)}: {len(tokens)} tokens, only the first {limit} are read")
        return tokens[:limit]

    def _features(self, model: nn.Module, tokens: list[list[int]], **inputs: Tensor) -> list[Tensor]:
        """The style's hidden states of token sequences, (L_i, D) each; the images of a batch come in its order."""
        lengths = [max(len(row), self.fewest) for row in tokens]
        gaps = [max(lengths) - len(row) for row in tokens]
        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [padding] * gap for row, gap in zip(tokens, gaps)], device=self.text.device)  # (B, L)
        if inputs:  # of images. 1 on image tokens: they get two-dimensional rotary positions
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        if self.style.padded:  # padding that stays in the context sees the prompt, but no other padding
            real = [[1] * len(row) + [0] * gap for row, gap in zip(tokens, gaps)]
            inputs["attention_mask"] = torch.tensor(real, device=self.text.device)                           # (B, L)
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True, **inputs).hidden_states
        joined = torch.cat([hidden[layer] for layer in self.layers], dim=-1)                                 # (B, L, D)
        return [features[:length].clone() for features, length in zip(joined, lengths)]


def _check_prompts(prompts: Sequence[str], forbidden: str | None = None) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {number} of {len(prompts)}: empty; write what the picture shows")
        if forbidden and forbidden in prompt:
            raise InputError(f"prompt {_short(prompt)}: contains {forbidden}, the mark of an image; remove it")


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:60] + "...")


# ---------------------------------------------------------------------------------------------------- loading
def load(folder: Path, device: torch.device | str, dtype: torch.dtype | None = None, vlm: str | Path | None = None,
         image_pixels: tuple[int, int] | None = None, teacher_rope: str = "vlm", style: Style | None = None) -> Encoder:
    """Encoder of the checkpoint `folder` (text_encoder/, tokenizer/), with f_mm when `vlm` names a Qwen3-VL.

    dtype: None is bfloat16 on CUDA and float32 elsewhere. vlm: folder or hub id; only its `visual.*` tensors are read.
    image_pixels: fewest and most pixels that f_mm resizes an image to, None as in the VLM's preprocessor_config.json;
    officially (512 * 512, 768 * 768) for Qwen3-VL-4B. teacher_rope: rotary base of f_mm, "vlm" (official) or "text"
    (the text encoder's, with which f_mm without an image would be f_text). style: None is that of the folder's
    transformer. Raises InputError.
    """
    folder, device = Path(folder), torch.device(device)
    style = style or STYLES[files.transformer_class(folder)]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = _tokenizer(folder / "tokenizer")
    text_config = _config(Qwen3Config, folder / "text_encoder" / "config.json", "hidden_size", "num_hidden_layers")
    if min(style.layers(text_config.num_hidden_layers)) < 1:  # hidden state 0 is the embedding
        raise InputError(f"{folder / 'text_encoder'}: num_hidden_layers {text_config.num_hidden_layers}, too few to "
                         "take features from inside; give the text encoder that belongs to this checkpoint")
    if vlm is not None:  # everything small is checked before gigabytes are read
        vlm_folder = find_vlm(vlm)
        vlm_config = _vlm_config(vlm_folder, text_config, tokenizer, teacher_rope)
        image_processor = _image_processor(vlm_folder, vlm_config, image_pixels)
        vision = vision_tensors(vlm_folder)

    text = _skeleton(Qwen3Model, text_config, device)
    weights = ((name.removeprefix("model."), tensor) for name, tensor in files.tensors(folder / "text_encoder"))
    files.load_strictly(text, weights, folder / "text_encoder", device, dtype, ignore=("lm_head.",))
    if vlm is None:
        return Encoder(tokenizer, text, style=style)
    teacher = _skeleton(Qwen3VLModel, vlm_config, device)
    files.load_strictly(teacher.visual, vision, vlm_folder, device, dtype)
    for name, parameter in text.named_parameters():  # the same Parameter objects: the language model exists once
        owner, _, leaf = name.rpartition(".")
        setattr(teacher.language_model.get_submodule(owner), leaf, parameter)
    return Encoder(tokenizer, text, teacher, image_processor, style)


def find_vlm(name: str | Path) -> Path:
    """Folder of a VLM. From the hub come its configs, its index and the shards with vision tensors, nothing else."""
    folder = files.checkpoint(str(name), "config.json", VLM_JSON)
    index = sorted(folder.glob("*.safetensors.index.json"))
    wanted = {"*.safetensors"}  # a single file has no index
    if index:
        weight_map = files.read_json(index[0], "weight_map")["weight_map"]
        wanted = {file for tensor, file in weight_map.items() if tensor.startswith(VISUAL)}
    return files.checkpoint(str(name), "config.json", VLM_JSON + sorted(wanted))


def vision_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, tensor) of a VLM's vision tower; no other shard is opened. Raises InputError if none."""
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        names = list(files.read_json(index[0], "weight_map")["weight_map"])
    else:
        names = [name for found in files.shards(folder).values() for name in found]
    prefix = next((prefix for prefix in VISUAL if any(name.startswith(prefix) for name in names)), None)
    if prefix is None:
        raise InputError(f"{folder}: no vision tensors ({VISUAL[0]}*) among its weights; give a Qwen3-VL checkpoint")
    return ((name.removeprefix(prefix), tensor) for name, tensor in files.tensors(folder, prefix))


def _skeleton(kind: type[nn.Module], config, device: torch.device) -> nn.Module:
    """A model without weights: parameters on the meta device, rotary tables (in no checkpoint) computed."""
    with torch.device("meta"):
        model = kind(config)
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            model.set_submodule(name, type(module)(module.config).to(device))
    return model.eval()


def _config(kind, path: Path, *keys: str):
    found = files.read_json(path, "model_type")["model_type"]
    if found != kind.model_type:
        raise InputError(f"{path}: model_type {found!r}, expected {kind.model_type!r}; give a checkpoint of that kind")
    return kind.from_dict(files.read_json(path, *keys))


def _vlm_config(folder: Path, text: Qwen3Config, tokenizer, teacher_rope: str) -> Qwen3VLConfig:
    """The VLM's config, checked to fit the text encoder and its tokenizer, with the rotary base that was asked for."""
    config = _config(Qwen3VLConfig, folder / "config.json", "text_config", "vision_config", "image_token_id")
    for key in SHARED_SIZES:
        ours, theirs = getattr(text, key), getattr(config.text_config, key)
        if ours != theirs:
            raise InputError(f"{folder}: its language model has {key} {theirs}, the checkpoint's text encoder {ours}; "
                             "give the VLM that belongs to this checkpoint")
    width = config.vision_config.out_hidden_size
    if width != text.hidden_size:
        raise InputError(f"{folder}: vision out_hidden_size {width}, text encoder's hidden_size {text.hidden_size}; "
                         "give the VLM that belongs to this checkpoint")
    known = tokenizer.get_vocab()  # the embedding is the text encoder's, so its tokenizer is the one to use
    for token, id in (("<|vision_start|>", config.vision_start_token_id), (IMAGE_TOKEN, config.image_token_id),
                      ("<|vision_end|>", config.vision_end_token_id)):
        if known.get(token) != id:
            raise InputError(f"{folder}: {token} has id {id} here, {known.get(token)} in the checkpoint's tokenizer; "
                             "give the VLM that belongs to this checkpoint")
    if teacher_rope not in ("vlm", "text"):
        raise InputError(f"teacher_rope: {teacher_rope!r}; choose vlm or text")
    if teacher_rope == "text":
        config.text_config.rope_parameters["rope_theta"] = text.rope_parameters["rope_theta"]
    return config


def _image_processor(folder: Path, config: Qwen3VLConfig, pixels: tuple[int, int] | None) -> Qwen2VLImageProcessorPil:
    path = folder / "preprocessor_config.json"
    content = files.read_json(path, "patch_size", "image_mean", "image_std")
    if pixels is not None:
        content.update(min_pixels=pixels[0], max_pixels=pixels[1])  # these win over the file's "size"
    processor = Qwen2VLImageProcessorPil.from_dict(content)
    vision = config.vision_config
    for key, needed in (("patch_size", vision.patch_size), ("temporal_patch_size", vision.temporal_patch_size),
                        ("merge_size", vision.spatial_merge_size)):
        if getattr(processor, key) != needed:
            raise InputError(f"{path}: {key} {getattr(processor, key)}, config.json asks for {needed}; "
                             "use the file that belongs to this checkpoint")
    return processor


def _tokenizer(folder: Path):
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the checkpoint is incomplete, copy or download it again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many unrelated types for an unreadable folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: not readable as a tokenizer ({reason}); copy or download it again") from None
    if tokenizer.pad_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no pad_token; use the tokenizer that belongs to the checkpoint")
    return tokenizer
