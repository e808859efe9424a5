"""The two contexts of D-OPSD (arXiv 2605.05204, Eq. 4), the only thing in which teacher and student differ.

    c_s = f_text(y)       the student reads the prompt y
    c_t = f_mm(y, x0)     the teacher reads the prompt and the target image x0

f_text is the checkpoint's own text encoder (Qwen3). f_mm is a Qwen3-VL whose language model is that same text encoder:
its vision tower turns x0 into tokens that stand before the prompt. Both contexts are hidden states of this language
model, one vector per token, so the unchanged diffusion transformer reads either. `Style` is what each one expects:

    Z-Image         the last but one layer; no <think> block; no padding
    FLUX.2-klein    the layers at 1/4, 1/2 and 3/4 of the depth, side by side; an empty <think> block; padded to 512

FLUX.2-klein's teacher can also see x0 as a reference image; f_text then reads `reference_prompt`. How the teacher is
shown x0 is a `TeacherContext`, and `contexts` puts both sides together, for training, panels and sample.py.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3Model, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model import Z_IMAGE, Context, first
from plumbing.backbone import Backbone, TextStyle
from plumbing.files import InputError

TEXT_TOKENS = 512          # of the student's context, as in diffusers' ZImagePipeline and Flux2KleinPipeline
IMAGE_TEXT_TOKENS = 1024   # of the teacher's context, as in the official code
BATCH = 8                  # sequences per forward pass: at 1024 tokens of the 4B model about 1.5 GB of hidden states
IMAGE_TOKEN = "<|image_pad|>"


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
                 image_processor: Qwen2VLImageProcessorPil | None = None, style: TextStyle = Z_IMAGE.text_style):
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
        if self.vlm is None or self.image_processor is None:
            raise InputError("--vlm: not given; the teacher's context needs it, give a Qwen3-VL folder or hub id")
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
        _check_prompts(prompts, forbidden=IMAGE_TOKEN)
        contexts = []
        for start in range(0, len(prompts), BATCH):
            chosen, shown = prompts[start:start + BATCH], images[start:start + BATCH]
            try:
                pixels = self.image_processor(images=list(shown), return_tensors="pt")
            except ValueError as error:  # an aspect ratio beyond 200
                sizes = ", ".join(f"{image.width}x{image.height}" for image in shown)
                raise InputError(f"image (one of {sizes}): {error}; crop it") from None
            grids = pixels["image_grid_thw"]                                    # (B, 3): 1, rows, columns of patches
            counts = grids.prod(-1) // self.image_processor.merge_size ** 2     # (B,) image tokens
            tokens = []
            for prompt, image, count in zip(chosen, shown, counts.tolist()):
                chat = image_text_prompt(prompt, count, self.style.thought)
                tokens.append(self._tokens(chat, prompt, IMAGE_TEXT_TOKENS))
                if tokens[-1].count(self.vlm.config.image_token_id) < count:
                    raise InputError(f"image of {image.width}x{image.height} pixels: {count} image tokens, the "
                                     f"teacher's context holds {IMAGE_TEXT_TOKENS} in all; lower the largest number "
                                     "of pixels")
            contexts += self._features(self.vlm, tokens, **pixels.to(self.text.device))
        return contexts

    def teacher_texts(self, kind: str, prompts: Sequence[str], targets: Sequence[Image.Image], sources: Sequence[int]
                      ) -> list[Tensor]:
        """The texts of the teacher's contexts, (L_i, D) each. kind: of TEACHER_CONTEXTS.

        targets: x0 of each prompt; sources: how many source images each prompt has.
        """
        return TEACHER_CONTEXTS[kind].texts(self, prompts, targets, sources)

    def _tokens(self, chat: str, prompt: str, limit: int) -> list[int]:
        tokens = self.tokenizer(chat).input_ids
        if len(tokens) > limit:
            warnings.warn(f"prompt {_short(prompt)}: {len(tokens)} tokens, only the first {limit} are read")
        return tokens[:limit]

    def _features(self, model: Qwen3Model | Qwen3VLModel, tokens: list[list[int]], **inputs: Tensor) -> list[Tensor]:
        """The style's hidden states of token sequences, (L_i, D) each; the images of a batch come in its order."""
        lengths = [max(len(row), self.fewest) for row in tokens]
        pads = [[self.tokenizer.pad_token_id] * (max(lengths) - len(row)) for row in tokens]
        ids = torch.tensor([row + pad for row, pad in zip(tokens, pads)], device=self.text.device)           # (B, L)
        if isinstance(model, Qwen3VLModel):  # 1 on image tokens: they get two-dimensional rotary positions
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        if self.style.padded:  # padding that stays in the context sees the prompt, but no other padding
            inputs["attention_mask"] = first([len(row) for row in tokens], max(lengths), ids.device).long()  # (B, L)
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


# ---------------------------------------------------------------------------------------------------- Eq. 4
@dataclass(frozen=True)
class TeacherContext:
    """A way to show the teacher x0 beside the prompt y. A new one: an entry below, a choice of --teacher-context."""
    texts: Callable[[Encoder, Sequence[str], Sequence[Image.Image], Sequence[int]], list[Tensor]]  # see `teacher_texts`
    needs_vlm: bool
    adds_reference: bool    # x0's latents are the last reference image


TEACHER_CONTEXTS = {
    "vlm": TeacherContext(  # Z-Image's official one: a Qwen3-VL reads picture and prompt
        lambda reader, prompts, targets, sources: reader.image_text_context(prompts, targets),
        needs_vlm=True, adds_reference=False),
    "reference": TeacherContext(  # FLUX.2's official one: the transformer reads the latents beside the prompt
        lambda reader, prompts, targets, sources: reader.text_context(
            [reference_prompt(prompt, number) for prompt, number in zip(prompts, sources, strict=True)]),
        needs_vlm=False, adds_reference=True),
}


def contexts(student_text: Tensor, teacher_text: Tensor | None, sources: Sequence[Tensor] = (),
             x0: Tensor | None = None, kind: str = "") -> tuple[Context, Context | None]:
    """c_s = f_text(y) and c_t = f_mm(y, x0) of one pair (y, x0), the whole of Eq. 4; c_t is None without a teacher.

    student_text, teacher_text: (L, D), of `text_context` and `teacher_texts`. sources: for editing, the latents
    (C, h, w) of the pictures that y says how to change, which both sides see. x0: latents (C, h, w) of the target, if
    there is one. kind: of TEACHER_CONTEXTS.
    """
    student = Context(student_text, tuple(sources))
    if teacher_text is None:
        return student, None
    shown = (x0,) if x0 is not None and kind and TEACHER_CONTEXTS[kind].adds_reference else ()
    return student, Context(teacher_text, (*sources, *shown))


def check_references(backbone: Backbone, kind: str | None, sources: str) -> None:
    """Raises InputError when reference images are asked for and this backbone takes none.

    kind: of TEACHER_CONTEXTS, or nothing; sources: what asks for source images; "": nothing does.
    """
    asked = f"--teacher-context {kind}" if kind and TEACHER_CONTEXTS[kind].adds_reference else sources
    if asked and not backbone.takes_references:
        raise InputError(f"{asked}: {backbone.name} takes no reference images; use a FLUX.2 checkpoint, or leave this "
                         "out")
