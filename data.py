"""Training data: a folder of images and captions -> buckets -> batches.

D-OPSD (arXiv 2605.05204), Section 3: a pair (x0 image, y prompt) gives latents of x0 and the two contexts of Eq. 4;
features.py encodes them once, here they are read back per batch. A row for editing also has source images.
Randomness is a function of (seed, step): order and captions of any step can be drawn without replaying earlier ones.

Differs from the paper / official code:
1. The official code swaps unreadable images for others and repeats the same order in every epoch; here a bad file stops
   the start with one line, and each epoch is a new permutation.
"""
import hashlib
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoder import IMAGE_TOKEN, contexts
from model import Context
from plumbing.files import InputError, open_safetensors, real, visible_files
from plumbing.options import is_text
from plumbing.pictures import Shape, crop, open_image

NO_IMAGE = (1, 1)  # the size of rows without an image: a square
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KINDS = "png, jpg, jpeg, webp, bmp"
OFFICIAL_PATHS = ("local_path_list", "local_paths", "image_path_list", "image_paths", "image_path", "path")
OFFICIAL_CAPTIONS = tuple(f"{kind}_{language}" for kind in ("short", "medium", "detailed", "user_prompt")
                          for language in ("en", "zh"))

# The paper's eleven shapes of about one megapixel, (height, width).
PAPER_SHAPES = ((1024, 1024), (896, 1152), (1152, 896), (864, 1152), (1152, 864), (832, 1248), (1248, 832),
                (720, 1280), (1280, 720), (576, 1344), (1344, 576))


@dataclass(frozen=True)
class Row:
    """One training image as the user gave it; or captions alone, where a teacher's adapter says what to draw."""
    image: Path | None
    captions: tuple[str, ...]   # one of them is drawn per step
    size: tuple[int, int]       # (width, height) in pixels, upright; (1, 1), a square, without an image
    sources: tuple[Path, ...] = ()  # for editing: the pictures that the caption says how to change into the image


def generator(seed: int, *where: int | str) -> torch.Generator:
    """CPU generator, a hash of (seed, where), e.g. generator(seed, "noise", step): neighbours are unrelated."""
    digest = hashlib.sha256("/".join(map(str, (seed, *where))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ------------------------------------------------------------------------------------------------------ reading
def read_folder(data: Path | str, captions_suffice: bool = False, caption: str = "") -> list[Row]:
    """The rows of `--data`, every image opened and decoded once. Raises InputError; nothing is skipped silently.

    data: a folder with (a) images and same-stem .txt captions, or (b) a metadata.jsonl with file_name and text, or (c)
    a .jsonl of the official D-OPSD code; or the path of such a .jsonl. Hidden files and subfolders are not searched. A
    line may have `source`, one path or several: images that the caption says how to change. captions_suffice: .txt
    files without images and lines without file_name are rows, too. caption: of images in (a) without one of their own.
    """
    data = Path(os.path.expanduser(data))
    is_table = os.path.isfile(data) and data.suffix.lower() == ".jsonl"
    if not is_table and not os.path.isdir(data):                        # unlike Path's own, these never fail
        raise InputError(f"{data}: no such folder; give a folder of images with captions, or a .jsonl file")
    files = [data] if is_table else visible_files(data)
    tables = [path for path in files if path.suffix.lower() == ".jsonl"]
    if len(tables) > 1:
        raise InputError(f"{data}: several .jsonl files ({', '.join(path.name for path in tables)}); "
                         "give --data the path of the one to use")
    rows = read_jsonl(tables[0], captions_suffice) if tables else read_sidecars(data, files, captions_suffice, caption)
    pictures = [path for row in rows for path in (row.image, *row.sources) if path]
    if not is_table:
        say_unused(data, [*pictures, *(tables or (path for path in files if path.suffix.lower() == ".txt"))])
    for row in rows:
        if any(IMAGE_TOKEN in text or not is_text(text) for text in row.captions):
            raise InputError(f"{row.image or data}: its caption has {IMAGE_TOKEN}, the mark of an image, or what UTF-8 "
                             "cannot spell; remove it")
    return rows


def say_unused(folder: Path, used: list[Path]) -> None:
    """One line on stderr for the files of a folder that are not read."""
    known = {real(path) for path in used}
    left = [path for path in sorted(folder.iterdir())
            if real(path) not in known and not path.is_dir() and not path.name.startswith(".")]
    kinds = Counter((path.suffix.lower() or "without a suffix") if path.exists() else "broken link" for path in left)
    if left:
        print(f"note: {folder}: not used: {', '.join(f'{count} {kind}' for kind, count in kinds.items())} (first "
              f"{left[0].name}); pictures are read as {KINDS}", file=sys.stderr)


def read_sidecars(folder: Path, files: list[Path], captions_suffice: bool, caption: str) -> list[Row]:
    """Layout (a): a.jpg with its caption in a.txt, or `caption` for all without one. Raises InputError."""
    images, texts = dict[str, Path](), dict[str, Path]()                # stem -> file
    for path in files:
        suffix = path.suffix.lower()
        alike = images if suffix in IMAGE_SUFFIXES else texts if suffix == ".txt" else {}
        if path.stem in alike:
            raise InputError(f"{path}: {alike[path.stem].name} has the same name, so their captions cannot be told "
                             "apart; rename one of them")
        alike[path.stem] = path
    if not images and not texts:
        raise InputError(f"{folder}: no images here (subfolders are not searched); "
                         f"add {KINDS} files with same-stem .txt captions, or a metadata.jsonl")
    found = []
    for stem in images | texts:                                         # all captions, before the pictures are decoded
        image, file = images.get(stem), texts.get(stem)
        if not image and not captions_suffice:
            raise InputError(f"{file}: a caption without an image; add {stem}.png ({KINDS}) or remove the caption")
        if not file and not caption:
            raise InputError(f"{image}: an image without a caption, {len(images.keys() - texts)} of {len(images)} have "
                             f"none; write one into {stem}.txt beside it, or give --caption TEXT for all of them")
        text = read_text(file).strip() if file else caption
        if not text:
            raise InputError(f"{file}: the caption is empty; write what the image shows")
        found.append((image, text))
    return [Row(image, (text,), open_image(image).size if image else NO_IMAGE) for image, text in found]


def read_jsonl(path: Path, captions_suffice: bool = False) -> list[Row]:
    """Layouts (b) and (c), told apart by each line's fields. Images are relative to the file. Raises InputError."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error}); correct or remove this line") from None
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object {{...}}, found {type(entry).__name__}; correct this line")
        is_official = "file_name" not in entry and any(key in entry for key in OFFICIAL_PATHS)
        if captions_suffice and not is_official:
            entry = {"file_name": "", **entry}
        name, captions, beside = (read_official if is_official else read_imagefolder)(entry, where)
        if not name and not captions_suffice:
            raise InputError(f"{where}: file_name is empty; write the image's path there")
        image, sources = find(name, path, is_official) if name else None, [find(n, path, is_official) for n in beside]
        for file in sources + ([image] if image else []):
            if not os.path.isfile(file):
                raise InputError(f"{where}: {file}: no such file; correct the path or add the image")
            size = open_image(file).size                # unreadable ones show here; the image is the last
        rows.append(Row(image, captions, size if image else NO_IMAGE, tuple(sources)))
    if not rows:
        raise InputError(f"{path}: no rows; write one JSON object per image and line")
    if path.name == "metadata.jsonl":
        listed = {real(file) for row in rows for file in (row.image, *row.sources) if file}
        for image in visible_files(path.parent):
            if image.suffix.lower() in IMAGE_SUFFIXES and real(image) not in listed:
                raise InputError(f"{image}: an image without a caption; add a line for it to {path.name}, or remove it")
    return rows


def find(name: str, path: Path, is_official: bool) -> Path:
    """A picture named in the file at `path`: beside that, or, in a release, below the project folder above it."""
    folders = (path.parent, *real(path).parent.parents) if is_official else (path.parent,)
    return next((folder / name for folder in folders if os.path.isfile(folder / name)), path.parent / name)


def read_imagefolder(entry: dict, where: str) -> tuple[str, tuple[str, ...], list[str]]:
    """(image, captions, sources) of a Hugging Face imagefolder line: file_name, text and source, one or several."""
    for field in ("file_name", "text"):
        if field not in entry:
            raise InputError(f"{where}: the field {field!r} is missing; write file_name and text into each line")
    texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
    if not isinstance(texts, list) or not all(isinstance(value, str) for value in (entry["file_name"], *texts)):
        raise InputError(f"{where}: file_name must be a string, text a string or a list of strings; correct this line")
    if not texts or not all(text.strip() for text in texts):
        raise InputError(f"{where}: 'text' holds an empty caption; write what the image shows")
    sources = entry.get("source", [])
    sources = [sources] if isinstance(sources, str) else sources
    if not isinstance(sources, list) or not all(isinstance(name, str) and name for name in sources):
        raise InputError(f"{where}: 'source' must be a path or a list of paths; correct this line")
    return entry["file_name"], tuple(text.strip() for text in texts), sources


def read_official(entry: dict, where: str) -> tuple[str, tuple[str, ...], list[str]]:
    """(image, captions, sources) of an official line: of the paths the last is the target, others are references."""
    key = next(key for key in OFFICIAL_PATHS if key in entry)
    paths = [entry[key]] if isinstance(entry[key], str) else entry[key]
    if not isinstance(paths, list) or not paths or not all(isinstance(name, str) and name for name in paths):
        raise InputError(f"{where}: {key!r} must be a path or a list of paths; correct this line")
    texts = [entry.get(field) or "" for field in OFFICIAL_CAPTIONS]     # may be empty; h*w is not used
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: captions must be strings; correct this line")
    if not any(text.strip() for text in texts):
        raise InputError(f"{where}: no caption; fill in at least one of {', '.join(OFFICIAL_CAPTIONS)}")
    return paths[-1], tuple(text.strip() for text in texts if text.strip()), paths[:-1]


def read_text(path: Path) -> str:
    """Content of a UTF-8 text file, with or without a byte order mark. Raises InputError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text ({error}); save it as UTF-8") from None


# ------------------------------------------------------------------------------------------------------- images
def bucket_shapes(size: int, multiple: int) -> list[Shape]:
    """Training shapes (height, width) for a square side of `size` pixels; (size, size) comes first.

    The paper's eleven at 1024; the same ratios scaled and rounded to `multiple` otherwise, without doubles.
    Raises InputError when `size` is not divisible by `multiple` (pixels per latent patch of the model).
    """
    if size < multiple or size % multiple:
        raise InputError(f"--size {size}: not a positive multiple of {multiple}, which this model needs; "
                         f"try {max(multiple, round(size / multiple) * multiple)}")
    units = [[max(1, math.floor(side * size / (1024 * multiple) + 0.5)) for side in shape] for shape in PAPER_SHAPES]
    return list(dict.fromkeys((rows * multiple, columns * multiple) for rows, columns in units))


def nearest_shape(size: tuple[int, int], shapes: list[Shape]) -> Shape:
    """The shape whose aspect ratio is nearest, in log, to an image of `size` (width, height); the first if several."""
    return min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] * size[1] / size[0])))


# ------------------------------------------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Example:
    """One row in its bucket, with its features in `file`."""
    row: Row
    shape: Shape            # (height, width) of the training crop
    file: Path              # safetensors: latents (C, h, w), source.j; per caption i student.i, teacher.i (L_i, D)
    kind: str               # of the teacher's context (encoder.TEACHER_CONTEXTS); "": no teacher is shown the target
    content: str = ""       # hash of the images' bytes

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Height, width, number of sources: equal for all examples of a batch."""
        return *self.shape, len(self.row.sources)

    def pictures(self) -> list[str]:
        """Names of the tensors that come from the VAE."""
        return ["latents"] + [f"source.{j}" for j in range(len(self.row.sources))]

    def texts(self, *captions: int) -> list[str]:
        """Names of those that come from the encoder, of these captions or of all: the student's, then the teacher's."""
        sides = ("student", "teacher") if self.kind else ("student",)
        return [f"{side}.{i}" for side in sides for i in captions or range(len(self.row.captions))]

    def has(self, names: list[str]) -> bool:
        """Whether these are in its file. Where not, or where the file is broken, they are encoded again."""
        try:
            with open_safetensors(self.file) as stored:
                sizes = {name: len(stored.get_slice(name).get_shape()) for name in stored.keys()}
            return all(sizes.get(name) == (3 if name in self.pictures() else 2) for name in names)
        except (InputError, OSError):
            return False

    def target(self) -> Image.Image | None:
        """The training crop: what the VAE encodes and what the teacher is shown; None for captions alone."""
        return crop(open_image(self.row.image), self.shape) if self.row.image else None

    def read(self, caption: int) -> tuple[Tensor, Context, Context | None]:
        """x0 (C, h, w), and the student's and the teacher's context (Eq. 4) with one of the captions."""
        with open_safetensors(self.file) as stored:
            x0, *sources = map(stored.get_tensor, self.pictures())
            student, *teacher = map(stored.get_tensor, self.texts(caption))
        return x0, *contexts(student, teacher[0] if teacher else None, sources, x0, self.kind)


@dataclass(frozen=True)
class Batch:
    """B examples of one bucket, on the CPU."""
    latents: Tensor                 # (B, C, h, w) float32; zeros where there is no image, and only the shape counts
    student_context: list[Context]  # B of them: c_s = f_text(y), Eq. 4; for editing with the sources
    teacher_context: list[Context]  # B of them: c_t = f_mm(y, x0), Eq. 4; empty if prepared without
    captions: list[str]             # the B prompts y
    indices: list[int]              # positions in the data set


class Dataset:
    """Batches by step number. Features are read from the cache when needed: memory does not grow with the data."""

    def __init__(self, examples: list[Example], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: a batch holds at least one image; give 1 or more")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.buckets = Counter(example.bucket for example in examples)  # -> number of images
        self.batches_per_epoch = sum(math.ceil(count / batch_size) for count in self.buckets.values())

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: every image exactly once, one bucket per batch, order drawn from (seed, epoch).

        A bucket that `batch_size` does not divide is cut as evenly as possible (5 by 4: 3 + 2); none is filled up.
        """
        rng = generator(self.seed, "order", epoch)
        members: dict[tuple[int, int, int], list[int]] = {bucket: [] for bucket in self.buckets}
        for index in torch.randperm(len(self.examples), generator=rng).tolist():
            members[self.examples[index].bucket].append(index)
        batches = [part.tolist() for indices in members.values()
                   for part in np.array_split(indices, math.ceil(len(indices) / self.batch_size))]
        return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]

    def batch(self, step: int) -> Batch:
        """The batch of `step` (0, 1, ...), a function of (seed, step). With accumulation, count micro-batches."""
        epoch, position = divmod(step, self.batches_per_epoch)
        indices, captions, contents = self.order(epoch)[position], [], []
        for index in indices:
            example, rng = self.examples[index], generator(self.seed, "caption", step, index)
            drawn = int(torch.randint(len(example.row.captions), (), generator=rng))
            captions.append(example.row.captions[drawn])
            contents.append(example.read(drawn))
        x0, c_s, c_t = zip(*contents)
        return Batch(torch.stack(x0), list(c_s), [context for context in c_t if context], captions, indices)
