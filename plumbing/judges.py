"""Networks that look at pictures, for evaluate.py: CLIP, DINO, and a Qwen3-VL that is asked. All are transformers' own.

The measures of D-OPSD (arXiv 2605.05204, Section 4, and its released evaluation), as far as their networks are public:

    CLIP-S    cosine of a picture and its prompt                                                  `clip_scores`
    DINO-D    1 - cosine of two pictures' mean patch tokens                                       `dino_features`
    VLM-J     a VLM's verdict whether two pictures show the same object, or style: 4 ... 1        `verdicts`

and `sharpness`, which is ours.

Each function loads its network, uses it and drops it, so one is in memory at a time.

Differs from the paper / the released evaluation:
1. CLIP is the released script's (ViT-H-14, laion2B); the paper names DFN5B, which is published as pickle, and no pickle
   is read here. transformers computes what open_clip does there.
2. The questions have their own wording; the labels and their numbers are the published ones.
3. Pictures for DINOv3 are resized as 8-bit pictures by Pillow; transformers' own way needs torchvision.
"""
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import (AutoModel, AutoTokenizer, BitImageProcessorPil, CLIPImageProcessorPil, CLIPModel,
                          Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration)

from encoder import IMAGE_TOKEN, text_prompt
from plumbing import files
from plumbing.encoder_files import made
from plumbing.files import InputError, broken
from plumbing.machine import free
from plumbing.pictures import crop, open_image

CLIP, DINO, VLM = ("clip",), ("dinov3_vit", "dinov2", "dinov2_with_registers"), ("qwen3_vl",)   # model_type of each
FILES = ["*.json", "*.txt", "model*.safetensors"]       # of a hub repository, which may have other formats as well
WEAK = 4            # grey levels of 255: detail that is hardly seen
OBJECT, STYLE = "object", "style"
LABELS = {OBJECT: {"same instance": 4, "mostly same": 3, "partly similar": 2, "different instance": 1},
          STYLE: {"highly consistent": 4, "mostly consistent": 3, "slightly consistent": 2, "not consistent": 1}}
QUESTIONS = {
    OBJECT: "The first picture is a reference, the second one a candidate. Do both show one and the same {what}? Judge "
            "what makes it this one and no other: its shape, parts, colours, markings and material. Its pose and size, "
            "the place, the light and the view may differ. Answer with one of these labels and nothing else: {labels}.",
    STYLE: "The first picture is a reference, the second one a candidate. Are both in one and the same style? Judge "
           "the technique, the lines, the colours, the shading and the texture. What they show may differ. Answer with "
           "one of these labels and nothing else: {labels}."}
REWRITE = 'This picture has the caption "{caption}". Write it in other words: keep all that it says, and keep [V] as ' \
          "it is. Answer with the new caption alone, on one line."
INVENT = {
    OBJECT: "[V] is the name of the {what} in this picture. Write four captions for other pictures of it, one on each "
            "line: a new scene each time, in another light and from another side, two from everyday life and two "
            "imaginative ones. Each has [V] in it. Answer with the four captions alone.",
    STYLE: "[V] is the name of this picture's style. Write four captions for other pictures in it, one on each line: "
           "new subjects, composed in new ways, two from everyday life and two imaginative ones. Each has the words in "
           "[V] style in it. Answer with the four captions alone."}


# ---------------------------------------------------------------------------------------------------- loading
def find(name: str, kinds: tuple[str, ...], flag: str) -> Path:
    """The folder of a network, by a path or a hub id. kinds: model_type that will do. Raises InputError."""
    try:
        folder = files.checkpoint(name, "config.json", FILES)
    except InputError as error:
        raise InputError(f"{flag} {str(error).split('; ')[0]}; give a folder in transformers' layout or a hub id, or "
                         f"leave this measure out: {flag} none") from None
    found = files.read_json(folder / "config.json", "model_type")["model_type"]
    if found not in kinds:
        raise InputError(f"{flag} {name}: its config.json has model_type {found!r}, expected {' or '.join(kinds)}; "
                         f"give another one, or {flag} none")
    files.listing(folder)                                               # whether there are safetensors
    return folder


def load(kind, folder: Path, device: torch.device, dtype: torch.dtype):
    """A frozen network. Raises InputError also where weights are missing, which transformers would draw at random."""
    model, facts = made(folder, lambda: kind.from_pretrained(folder, dtype=dtype, local_files_only=True,
                                                             use_safetensors=True, output_loading_info=True))
    if facts["missing_keys"]:
        raise broken(folder, f"tensor {min(facts['missing_keys'])} is missing ({len(facts['missing_keys'])} in all)")
    return model.requires_grad_(False).eval().to(device)


# ---------------------------------------------------------------------------------------------------- without a network
def sharpness(picture: Tensor) -> float:
    """How much stronger clear detail is than faint detail, in powers of two. picture: (3, H, W) in [-1, 1].

    Detail is the Laplacian of the luminance, in grey levels; the figure is the root mean square of it over that of what
    is left when it is clipped at 4 levels. Blur weakens what is clear; haze, and marks that are half drawn, add what is
    faint. Only to compare pictures of the same prompts and noise.
    """
    grey = (picture.float().clamp(-1, 1) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0) * 127.5
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    detail = F.conv2d(grey[None, None], kernel[None, None]).abs()
    return float((detail.square().mean() / detail.clamp(max=WEAK).square().mean().clamp(min=1e-12)).log2() / 2)


def pixel_change(picture: Tensor, other: Tensor) -> float:
    """Root mean square difference of two pictures, of the range from black to white."""
    return float((picture - other).square().mean().sqrt() / 2)


# ---------------------------------------------------------------------------------------------------- with one
@torch.no_grad()
def clip_scores(folder: Path, pictures: Sequence[Path], prompts: Sequence[str], device: torch.device,
                dtype: torch.dtype) -> Tensor:
    """CLIP-S (n,): the cosine of each picture with its prompt. A long prompt loses its end, as CLIP reads few words."""
    model = load(CLIPModel, folder, device, dtype)
    process = made(folder, lambda: CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True))
    tokenizer = made(folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    most, scores = model.config.text_config.max_position_embeddings, []
    texts = {}
    for prompt in dict.fromkeys(prompts):
        words = tokenizer(prompt, truncation=True, max_length=most, return_tensors="pt").to(device)
        texts[prompt] = model.get_text_features(words.input_ids, words.attention_mask).pooler_output
    for path, prompt in zip(tqdm(pictures, desc="CLIP", disable=None), prompts, strict=True):
        pixels = process(images=open_image(path), return_tensors="pt").pixel_values.to(device, dtype)
        picture = model.get_image_features(pixels).pooler_output
        scores.append(F.cosine_similarity(picture.float(), texts[prompt].float()))
    del model
    free()
    return torch.cat(scores).cpu()


@torch.no_grad()
def dino_features(folder: Path, pictures: Iterable[Path], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Mean patch tokens (n, D), of length 1: DINO-D of two pictures is 1 - their product."""
    model = load(AutoModel, folder, device, dtype)
    content = files.read_json(folder / "preprocessor_config.json", "image_mean", "image_std")
    process = made(folder, lambda: BitImageProcessorPil.from_dict({"do_center_crop": False} | content))
    others = 1 + getattr(model.config, "num_register_tokens", 0)        # of the class, and registers
    found = []
    for path in tqdm(pictures, desc="DINO", disable=None):
        pixels = process(images=open_image(path), return_tensors="pt").pixel_values.to(device, dtype)
        tokens = model(pixels).last_hidden_state[:, others:]                                                # (1, L, D)
        found.append(F.normalize(tokens.float().mean(1), dim=-1))
    del model
    free()
    return torch.cat(found).cpu()


class Asked:
    """A Qwen3-VL that answers questions about pictures, always in the same way."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer = made(folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
        self.process = made(folder, lambda: Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True))
        self.model = load(Qwen3VLForConditionalGeneration, folder, device, dtype)
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], question: str, most: int) -> str:
        """The answer, of at most `most` tokens: the likeliest one at each place."""
        pixels = self.process(images=list(pictures), return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(-1) // self.process.merge_size ** 2).tolist()
        shown = "".join(f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>" for count in counts)
        ids = self.tokenizer(text_prompt(shown + question), return_tensors="pt").input_ids
        answer = self.model.generate(
            input_ids=ids.to(self.device), attention_mask=torch.ones_like(ids).to(self.device),
            mm_token_type_ids=(ids == self.model.config.image_token_id).int().to(self.device),
            pixel_values=pixels["pixel_values"].to(self.device, self.dtype),
            image_grid_thw=pixels["image_grid_thw"].to(self.device), do_sample=False, temperature=None, top_p=None,
            top_k=None, max_new_tokens=most, pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id)
        return self.tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True).strip()


def score_of(answer: str, kind: str) -> int | None:
    """The number of the label that an answer names first; None if it names none."""
    places = {answer.lower().find(label): score for label, score in LABELS[kind].items() if label in answer.lower()}
    return places[min(places)] if places else None


def verdicts(folder: Path, pairs: Sequence[tuple[Path, Path]], kind: str, what: str, device: torch.device,
             dtype: torch.dtype) -> Tensor:
    """VLM-J (n,) of pairs (reference, candidate): 4 (the same) ... 1; not a number where no label was the answer.

    The reference is cut to the shape of the candidate. kind: OBJECT or STYLE; what: the word for the object.
    """
    asked, scores = Asked(folder, device, dtype), []
    question = QUESTIONS[kind].format(what=what, labels=", ".join(LABELS[kind]))
    for reference, candidate in tqdm(pairs, desc="VLM", disable=None):
        picture = open_image(candidate)
        shown = crop(open_image(reference), (picture.height, picture.width))
        scores.append(score_of(asked([shown, picture], question, 16), kind))
    del asked
    free()
    return torch.tensor([float("nan") if score is None else score for score in scores])


# ---------------------------------------------------------------------------------------------------- prompts
def captions_in(answer: str, needs: str, most: int) -> list[str]:
    """At most so many captions, one on each line of an answer, without numbers, bullets and quotes.

    needs: a word that each must have, such as [V].
    """
    lines = (re.sub(r"^\s*(?:\d+[.)]|[-*•])?\s*", "", line).strip(' \t"“”') for line in answer.splitlines())
    return [line for line in dict.fromkeys(lines) if line and needs in line][:most]


def written_prompts(folder: Path, pairs: Sequence[tuple[Path, str]], kind: str, what: str, device: torch.device,
                    dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """For pairs (picture, caption): each caption in other words, and new prompts, up to four for each picture.

    A caption that the VLM does not rewrite, or without its [V], stays as it is.
    """
    asked, rewritten, new = Asked(folder, device, dtype), list[str](), list[str]()
    needs = "[V] style" if kind == STYLE else "[V]"
    for path, caption in tqdm(pairs, desc="VLM writes prompts", disable=None):
        answer = asked([open_image(path)], REWRITE.format(caption=caption), 256)
        rewritten += captions_in(answer, needs if needs in caption else "", 1) or [caption]
        new += captions_in(asked([open_image(path)], INVENT[kind].format(what=what), 512), needs, 4)
    del asked
    free()
    return rewritten, list(dict.fromkeys(new))
