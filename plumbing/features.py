"""What VAE and encoders contribute, computed once: latents and the two contexts of every image, kept on disk.

D-OPSD (arXiv 2605.05204), Eq. 4: a pair (x0 image, y prompt) gives the student's context from y alone, and the
teacher's from y and x0; how the teacher is shown x0 is `--teacher-context` (encoder.py). For editing, a row has source
images too; student and teacher both get their latents as references, the target last.
VAE and encoders are gone before the transformer is loaded.

Differs from the official code:
1. It re-encodes images and captions at every step with all encoders on the GPU; here they run once.
2. A target that serves as reference is the training crop itself, so it is encoded once, as x0.
"""
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import data
from data import Example, Row, nearest_shape
from encoder import TEACHER_CONTEXTS
from networks import vae as autoencoder
from plumbing import encoder_files, files
from plumbing.checkpoints import backbone_of, pixels_per_patch
from plumbing.files import InputError
from plumbing.machine import free
from plumbing.panels import PanelRow
from plumbing.pictures import Shape, fit, open_image, save_png, to_tensor
from plumbing.quantized import FLOAT
from plumbing.recipes import Recipe, vlm_of

CACHE_FORMAT = 2  # part of every cache key: raise it when cropping or encoding changes


class Features:
    """The data set and the panel's contexts of a run; when it is made it says what it will be, `encode` then writes."""

    def __init__(self, cfg, rows: list[Row], folder: Path, recipe: Recipe, kind: str, cache: Path,
                 device: torch.device, dtype: torch.dtype, in_panels: bool = True) -> None:
        """cfg: of train.py; kind: of the teacher's context, "" where no teacher is shown the target; cache: folder of
        the features; in_panels: whether panels show its prompts. Raises InputError."""
        self.cfg, self.folder, self.recipe, self.cache = cfg, folder, recipe, cache
        files.check_ours(cache, f"--cache {cache}")
        if photos := [row.image for row in rows if max(row.size) > 1000 and cfg.size < 256]:
            print(f"warning: photographs: {len(photos)} of {len(rows)} images, first {photos[0]}; this model draws "
                  f"{cfg.size} pixels of a toy world; give --model Tongyi-MAI/Z-Image-Turbo", file=sys.stderr)
        if in_panels and kind and not any("[" in text or row.sources for row in rows for text in row.captions):
            print("note: no caption says [V]; a concept is learned best under a word that means nothing else, in all "
                  "captions", file=sys.stderr)
        self.device, self.dtype, self.in_panels = device, dtype, in_panels
        self.multiple, self.area, self.kind = pixels_per_patch(folder), cfg.size ** 2, kind
        self.shapes = data.bucket_shapes(cfg.size, self.multiple)
        needs_vlm = kind and TEACHER_CONTEXTS[kind].needs_vlm
        self.vlm = encoder_files.find_vlm(vlm_of(folder, recipe, cfg.vlm),
                                          *encoder_files.text_parts(folder)) if needs_vlm else None
        self.key = "/".join([files.model_key(folder, "vae", "text_encoder", "tokenizer"),
                             backbone_of(folder).class_name, kind,
                             files.model_key(self.vlm, prefix=encoder_files.VISUAL) if self.vlm else "-", str(dtype),
                             cfg.teacher_rope, str(recipe.image_pixels), *[cfg.quantize] * (cfg.quantize != FLOAT)])
        self.rows, self.examples = rows, place(rows, self.shapes, self.area, cache, self.key, kind)

    def encode(self, with_unrelated: bool = True, kept: Sequence[Path] = ()) -> None:
        """Fill the cache with what is missing there; then everything below is known. Raises InputError.

        with_unrelated: whether the panel ends with a prompt that has nothing to do with the data. kept: other sources.
        """
        rows = self.panel_rows(with_unrelated, kept)
        prepare(self.examples + rows, self.multiple, self.area, lambda: autoencoder.load(self.folder, self.device),
                lambda: encoder_files.load(self.folder, self.device, self.dtype, self.vlm, self.recipe.image_pixels,
                                           self.cfg.teacher_rope, quantize=self.cfg.quantize), self.device)
        self.dataset, self.panel = data.Dataset(self.examples, self.cfg.batch_size, self.cfg.seed), []
        for example in rows:
            _, student, teacher = example.read(0)
            source = open_image(example.row.sources[0]) if example.row.sources else None
            label = "new for this prompt" if not example.row.image else "shown to the teacher" if self.kind else \
                "the first image"
            label *= example not in self.examples and (source or example.row.image) is not None
            self.panel.append(PanelRow(example.row.captions[0], example.target(), student, teacher or student,
                                       example.shape, source, label))

    def panel_rows(self, with_unrelated: bool, kept: Sequence[Path]) -> list[Example]:
        """Two training pairs; new prompts, for which the teacher is shown the first target; for editing a new source;
        and a prompt that has nothing to do with the data."""
        if not self.in_panels:
            return []
        first, caption = self.examples[0].row, self.examples[0].row.captions[0]
        prompts = list(self.cfg.panel_prompt)
        if "[V]" in caption and not first.sources:
            prompts.insert(0, self.recipe.new_style if "[V] style" in caption else self.recipe.new_object)
        shown = [replace(first, captions=(prompt,)) for prompt in prompts]
        alone = [Row(None, (self.recipe.unrelated,), first.size)] if with_unrelated else []
        if first.sources:       # training has none with this caption: a kept one, another caption's, the last mirrored
            edits = [example.row for example in self.examples if example.row.sources]
            paired = {files.real(path) for row in edits if caption in row.captions for path in row.sources}
            others = (*kept, *(row.sources[0] for row in edits))
            source = next((path for path in others if files.real(path) not in paired), None)
            if source is None:
                self.scratch = tempfile.TemporaryDirectory()            # is gone when this object is
                source = Path(self.scratch.name) / "mirrored.png"
                save_png(ImageOps.mirror(open_image(others[-1])), source, {})
            alone.insert(0, Row(None, (caption,), open_image(source).size, (source, *first.sources[1:])))
        return self.examples[:2] + place(shown, self.shapes, self.area, self.cache, self.key, self.kind) + \
            place(alone, self.shapes, self.area, self.cache, self.key, "")


def fingerprint_of(features: list[Features]) -> dict[str, str]:
    """Hashes of all that a run learns from: images, captions, and the networks and options that encode them."""
    return {"images": hash_of([[(e.content, e.shape) for e in part.examples] for part in features]),
            "captions": hash_of([[row.captions for row in part.rows] for part in features]),
            "VAE, text encoder or VLM": hash_of([part.key for part in features])}


def hash_of(content) -> str:
    """Of what JSON can say."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]


# ------------------------------------------------------------------------------------------------------- encoding
def place(rows: list[Row], shapes: list[Shape], area: int, cache: Path, key: str, kind: str = "vlm"
          ) -> list[Example]:
    """Every row in its bucket, with the name of its file in the folder `cache`, which follows from all content.

    shapes, area: `data.bucket_shapes`, and of `fit` for source images. key: names all else that the features
    depend on: `files.model_key` of VAE, text encoder and VLM, dtype, prompt and pixel options. kind: of the teacher's
    contexts, "" leaves them out (`--method sft`).
    """
    found = []
    for row in rows:
        shape, content = nearest_shape(row.size, shapes), content_of(row)
        name = hash_of([CACHE_FORMAT, key, content, shape, area if row.sources else 0, row.captions])
        found.append(Example(row, shape, Path(cache) / f"{name}.safetensors", kind, content))
    return found


def prepare(examples: list[Example], multiple: int, area: int, load_vae: Callable, load_encoder: Callable,
            device: torch.device | str = "cpu") -> None:
    """Make sure that the features of all examples are in their files. Raises InputError.

    multiple, area: of `fit`. load_vae() -> object with encode((1, 3, H, W) in [-1, 1] on `device`) -> (1, C, h,
    w). load_encoder() -> object with text_context(prompts) and teacher_texts(kind, prompts, targets, sources) -> list
    of (L, D). Both are called only if something is missing, one after the other; what they return is freed before the
    next and before this returns.
    """
    warn_enlarged(examples)
    missing = {example.file: example for example in examples if not example.has(example.pictures() + example.texts())}
    if bare := [example for example in missing.values() if not example.has(example.pictures())]:
        for path in (path for example in bare for path in example.row.sources):
            fit(open_image(path), multiple, area, path)                 # may be too small: said before any is written
        encode_latents(bare, multiple, area, load_vae(), device)
        free()
    if missing:
        encode_contexts(list(missing.values()), load_encoder())
        free()


@torch.no_grad()
def encode_latents(examples: list[Example], multiple: int, area: int, vae, device: torch.device | str) -> None:
    """Latents (C, h, w) float32 of each target and its sources, written one example after the other."""
    def encode(image: Image.Image) -> Tensor:
        return vae.encode(to_tensor(image).to(device))[0].float()

    for example in tqdm(examples, desc="encoding images", disable=None):
        target, row = example.target(), example.row
        latents = encode(target) if target else torch.zeros(vae.channels, *(side // vae.factor
                                                                            for side in example.shape))
        sources = [encode(fit(open_image(path), multiple, area, path)) for path in row.sources]
        write(example, dict(zip(example.pictures(), [latents, *sources], strict=True)))


@torch.no_grad()
def encode_contexts(examples: list[Example], reader) -> None:
    """Both contexts of Eq. 4 for every caption, written beside the latents."""
    for example in tqdm(examples, desc="encoding captions", disable=None):
        prompts = list(example.row.captions)
        contexts = list(reader.text_context(prompts))                   # c_s = f_text(y)
        if example.kind:
            contexts += reader.teacher_texts(example.kind, prompts, [example.target()] * len(prompts),
                                             [len(example.row.sources)] * len(prompts))  # c_t = f_mm(y, x0)
        with files.open_safetensors(example.file) as stored:
            pictures = {name: stored.get_tensor(name) for name in example.pictures()}
        write(example, pictures | dict(zip(example.texts(), contexts, strict=True)))


def write(example: Example, encoded: dict[str, Tensor]) -> None:
    """An example's file. Raises InputError where values are not finite."""
    if broken := [name for name, tensor in encoded.items() if not tensor.isfinite().all()]:
        raise InputError(f"{example.row.image or example.row.captions[0]}: its {broken[0]} has values that are not "
                         "finite; copy or download VAE, text encoder and VLM again, or use --dtype float32")
    # Copies: safetensors refuses tensors that share memory, as rows of one encoder batch do.
    files.write_tensors(example.file, {name: tensor.detach().cpu().clone() for name, tensor in encoded.items()})


def warn_enlarged(examples: list[Example]) -> None:
    """One line on stderr if any image has fewer pixels than its training shape."""
    examples = list({example.row.image: example for example in examples if example.row.image}.values())
    scales = [max(e.shape[0] / e.row.size[1], e.shape[1] / e.row.size[0]) for e in examples]
    worst = max(scales, default=0)
    if worst > 1:
        print(f"warning: {sum(scale > 1 for scale in scales)} of {len(examples)} images are enlarged to their training "
              f"shape, most of all {examples[scales.index(worst)].row.image} ({worst:.2f}x); "
              "larger images or a smaller --size look sharper", file=sys.stderr)


def content_of(row: Row) -> str:
    """A hash of the images' bytes."""
    paths = (row.image, *row.sources)
    return hash_of([hashlib.sha256(path.read_bytes()).hexdigest() if path else "" for path in paths])
