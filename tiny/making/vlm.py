"""The embedded model's small Qwen3-VL: tokenizer, configuration, and the two contexts in batches for training.

Same classes as the real thing (transformers' Qwen3-VL), 1.5 M parameters. "[V]" becomes four tokens, one for each word
that describes a concept: an object has (pattern, main colour, second colour, shape), a style has (line, texture).
encoder.py gives the same features from files; here they come from tensors, in large batches.
"""
from functools import lru_cache

import torch
from einops import rearrange
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from encoder import image_text_prompt, text_prompt
from tiny.making.stage import generator
from tiny.world import ATTRIBUTES, SIDE, caption, draw_scenes

PATCH, MERGE, WIDTH = 8, 2, 128
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
CONCEPT = ("<V1>", "<V2>", "<V3>", "<V4>")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on captions: every word of the world becomes one token, other words fall into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("[V]", "".join(CONCEPT))])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [caption(row) for row in draw_scenes(4096, generator(5, 0), styled=0.5)]
    texts += ["user\n", "assistant\n", *(f" {word}" for words in ATTRIBUTES.values() for word in words)] * 200
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, min_frequency=50, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([AddedToken(token, normalized=True, lstrip=token == CONCEPT[0]) for token in CONCEPT])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=1024, padding_side="right", chat_template=CHAT_TEMPLATE)


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


class Features:
    """Both contexts of Eq. 4 for training batches, from one Qwen3-VL: padded features (B, L, 128) and lengths."""

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
