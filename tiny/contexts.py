"""Both contexts of Eq. 4 for the embedded models, from tensors and in large batches.

encoder.py gives the same for files. The small Z-Image reads captions and pictures through a Qwen3-VL of 1.5 M
parameters (`VlmFeatures`). The small FLUX.2-klein reads captions through the language model of that Qwen3-VL, and gets
pictures as reference images (`ReferenceFeatures`). `load_features` makes either from a checkpoint folder.
"""
from functools import lru_cache
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from encoder import image_text_prompt, reference_prompt, text_prompt
from model import Context
from networks import vae as autoencoder
from networks.flux2 import KLEIN
from plumbing import encoder_files
from plumbing.files import InputError, put, tensors
from plumbing.quantized import FLOAT, INT8
from tiny.models import is_flux2
from tiny.world import SIDE

PATCH, MERGE, WIDTH = 8, 2, 128               # pixels of a patch, patches along a merged token, width of the features
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
IN_LAYERS = ("model.language_model.layers.", "model.visual.blocks.")    # what --quantize rounds, as encoder_files does
TOKENS = 56                                   # of every text context of FLUX.2; the longest prompt has about 50


# ---------------------------------------------------------------------------------------------------- Z-Image
def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """Qwen3-VL with a 128 wide, 4 layer language model and a 96 wide, 3 layer vision tower with deepstack."""
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
                         tie_word_embeddings=True,
                         rope_parameters={**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True}),
        vision_config=dict(depth=3, hidden_size=96, intermediate_size=288, num_heads=3, patch_size=PATCH,
                           spatial_merge_size=MERGE, temporal_patch_size=2, out_hidden_size=WIDTH,
                           num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True)


def patches(pictures: Tensor) -> Tensor:
    """(B, 3, 64, 64) in [-1, 1] -> (B * 64, 384): what the image processor makes of them (a still image is two equal
    frames, patches of one merged token are neighbours)."""
    flat = rearrange(pictures, "b c (i m p) (j n q) -> (b i j m n) c (p q)", m=MERGE, n=MERGE, p=PATCH, q=PATCH)
    return flat.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1)


class VlmFeatures:
    """Z-Image's contexts, from one Qwen3-VL: padded features (B, L, 128) and lengths."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.image_token = model.config.image_token_id
        self.ids = lru_cache(maxsize=100_000)(lambda text: tuple(tokenizer(text).input_ids))

    def batch(self, prompts: list[str], with_image: bool, answers: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (B, L), padded on the right (causal attention needs no mask), and lengths (B,)."""
        rows = [self.ids(image_text_prompt(p, IMAGE_TOKENS) if with_image else text_prompt(p)) for p in prompts]
        if answers is not None:
            rows = [row + self.ids(f" {answer}<|im_end|>") for row, answer in zip(rows, answers)]
        lengths = torch.tensor([len(row) for row in rows])
        padding = self.tokenizer.pad_token_id
        return torch.tensor([row + (padding,) * (int(lengths.max()) - len(row)) for row in rows]), lengths

    def __call__(self, prompts: list[str], pictures: Tensor | None = None, answers: list[str] | None = None):
        """-> (all hidden states, each (B, L, 128), ids (B, L), lengths (B,)); the transformer reads hidden_states[-2].

        answers: what the assistant says after each prompt (only for the language modelling loss).
        """
        ids, lengths = self.batch(prompts, pictures is not None, answers)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures is not None:
            side = SIDE // PATCH
            inputs |= {"pixel_values": patches(pictures),
                       "image_grid_thw": torch.tensor([[1, side, side]] * len(prompts)),
                       "mm_token_type_ids": (ids == self.image_token).long()}
        out = self.model.model(**inputs, output_hidden_states=True, use_cache=False)
        return out.hidden_states, ids, lengths

    def contexts(self, prompts: list[str], pictures: Tensor | None = None) -> list[Tensor]:
        """What the transformer reads: one (L_i, 128) per prompt, without padding."""
        with torch.no_grad():
            states, _, lengths = self(prompts, pictures)
        return [f[:n] for f, n in zip(states[-2], lengths.tolist())]


# ----------------------------------------------------------------------------------------------------- FLUX.2
class ReferenceFeatures:
    """FLUX.2's contexts; equal to those of encoder.py, which refuses empty prompts."""

    def __init__(self, folder: Path, quantize: str = FLOAT) -> None:
        self.vae = autoencoder.load(folder, "cpu")
        self.reader = encoder_files.load(folder, "cpu", torch.float32, style=KLEIN.text_style, quantize=quantize)
        self.ids = lru_cache(maxsize=100_000)(lambda text: tuple(self.reader.tokenizer(text).input_ids))

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """(B, TOKENS, 3 * WIDTH)."""
        rows = [self.ids(text_prompt(prompt, KLEIN.text_style.thought)) for prompt in prompts]
        assert max(map(len, rows)) <= TOKENS, max(prompts, key=len)
        padding = self.reader.tokenizer.pad_token_id
        ids = torch.tensor([row + (padding,) * (TOKENS - len(row)) for row in rows])
        real = torch.tensor([[1] * len(row) + [0] * (TOKENS - len(row)) for row in rows])
        hidden = self.reader.text(input_ids=ids, attention_mask=real, use_cache=False,
                                  output_hidden_states=True).hidden_states
        return torch.cat([hidden[layer] for layer in self.reader.layers], dim=-1)

    def contexts(self, prompts: list[str], pictures: Tensor | None = None) -> list[Context]:
        """Of prompts alone, or as the teacher sees them, with pictures (B, 3, 64, 64) as reference images."""
        if pictures is None:
            return [Context(text) for text in self.texts(prompts)]
        return self.edits([reference_prompt(prompt, 0) for prompt in prompts], self.vae.encode(pictures))

    def edits(self, prompts: list[str], *references: Tensor) -> list[Context]:
        """Prompts as they are, each with a row of every one of `references`, latents (B, C, h, w), in this order."""
        return [Context(text, latents)
                for text, latents in zip(self.texts(prompts), zip(*references, strict=True), strict=True)]


# ------------------------------------------------------------------------------------------------------- either
def load_features(folder: Path, quantize: str = FLOAT) -> VlmFeatures | ReferenceFeatures:
    """What the transformer of an embedded model reads; the VLM is put together from text_encoder/ and vlm/, frozen.

    quantize: of train.py, for the encoders.
    """
    if is_flux2(folder):
        return ReferenceFeatures(folder, quantize)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    vlm = Qwen3VLForConditionalGeneration(build_config(tokenizer)).eval().requires_grad_(False)
    vlm.config._attn_implementation = "sdpa"
    weights = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors(folder / "text_encoder")}
    weights |= dict(tensors(folder / "vlm"))
    missing, unexpected = vlm.load_state_dict(weights, strict=False)
    if wrong := [*unexpected, *(set(missing) - {"lm_head.weight"})]:     # which is tied
        raise InputError(f"{folder}: tensor {wrong[0]} is unknown or missing; copy or download it again")
    if quantize == INT8:
        for name, tensor in weights.items():
            put(vlm, name, tensor, torch.float32, name.startswith(IN_LAYERS))
    return VlmFeatures(vlm, tokenizer)
