"""Pictures: read any image as RGB, crop and resize it, write PNGs, and put many into one labelled table."""
import contextlib
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from plumbing.files import InputError, write_bytes

Shape = tuple[int, int]  # (height, width) in pixels
TILE = 320      # pixels: the widest tile of a panel
# Names by which Pillow finds them, "" is its own: for other letters, for Chinese, Japanese and Korean, for emoji.
FONTS = ("", "DejaVuSans.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
         "PingFang.ttc", "Hiragino Sans GB.ttc", "Arial Unicode.ttf", "msyh.ttc", "malgun.ttf", "seguiemj.ttf")
UNWRITTEN = 'numbers stand for captions that no font here can write; see "prompt" in the metadata'


# ------------------------------------------------------------------------------------------------------- in
def open_image(path: Path | str) -> Image.Image:
    """The image at `path` as RGB: upright by its EXIF orientation, transparency over white. Raises InputError."""
    try:
        with Image.open(path) as image:
            image.load()  # decodes every pixel, so that a truncated file shows here and not at step 700
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image of a known format; replace or remove it") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file that can") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more megapixels than Pillow reads, {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f}; "
                         "make it smaller, a few are enough") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types for broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a complete image ({reason}); replace or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # Pillow clips these at 255 instead of scaling them
        values = np.asarray(image).astype(np.float32)
        white = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop(image: Image.Image, shape: Shape) -> Image.Image:
    """Resize to cover `shape` (height, width) and cut out the centre, in one Lanczos resampling."""
    return ImageOps.fit(image, shape[::-1], Image.Resampling.LANCZOS)


def fit(image: Image.Image, multiple: int, area: int, path: Path | str) -> Image.Image:
    """A reference image in its own shape: at most `area` pixels, then the centre cut to multiples of `multiple`.

    Equal to what Flux2KleinPipeline does, where the area is 1024 * 1024. path: for the InputError on tiny images.
    """
    if image.width * image.height > area:
        scale = math.sqrt(area / (image.width * image.height))
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)
    width, height = image.width // multiple * multiple, image.height // multiple * multiple
    if not width * height:
        raise InputError(f"{path}: {image.width}x{image.height} pixels are too few for a reference image, which needs "
                         f"{multiple} or more on each side; use a larger picture")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (1, 3, H, W) float32 in [-1, 1], what the VAE encodes."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------- out
def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image. Raises InputError."""
    if not picture.isfinite().all():
        raise InputError("vae: what it draws is not finite; copy or download its weights again")
    array = ((picture.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(rearrange(array, "c h w -> h w c").numpy())


def font_of(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """A font that has every character of `text`: Pillow's own, else one of the system's, else None."""
    for name in FONTS:
        with contextlib.suppress(OSError):                              # it is not here, or in other sizes only
            font = ImageFont.truetype(name, 13) if name else ImageFont.load_default(13)
            if bytes(font.getmask("\U0010fffe")) not in {bytes(font.getmask(c)) for c in "".join(text.split())}:
                return font                                             # nothing looks like what is no character
    return None


def panel(columns: Mapping[str, Sequence[Image.Image | None]], rows: list[str], note: str = "",
          labels: Mapping[tuple[str, int], str] = {}) -> Image.Image:
    """Pictures in a labelled table: column name -> one picture per row (None stays empty), row captions on the left.

    A row has the shape of its last picture, a drawn one; others are fitted into it. A caption that no font here can
    write becomes the row's number. labels: (column, row) -> what stands on that picture.
    """
    drawn = [next(image for image in reversed(row) if image) for row in zip(*columns.values(), strict=True)]
    wide = TILE if any(image.width >= TILE // 2 for image in drawn) else TILE // 2
    tiles = [(wide, max(1, wide * image.height // image.width)) for image in drawn]
    plain, gap, left, line = ImageFont.load_default(13), 6, 190, 17
    tops = [26 + sum(height + gap for _, height in tiles[:i]) for i in range(len(rows) + 1)]
    if not all(map(font_of, [note, *rows])):
        note = f"{note}\n{UNWRITTEN}" if note and font_of(note) else UNWRITTEN
    foot = line * (note.count("\n") + 1) + 3 if note else 0
    sheet = Image.new("RGB", (left + len(columns) * (wide + gap), tops[-1] + foot), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (name, images) in enumerate(columns.items()):
        x = left + j * (wide + gap)
        pen.text((x + 2, 6), name, fill="black", font=font_of(name) or plain)
        for i, (image, tile, top) in enumerate(zip(images, tiles, tops)):
            if image is not None:
                smooth = Image.Resampling.NEAREST if image.width <= wide else Image.Resampling.LANCZOS
                sheet.paste(ImageOps.pad(image, tile, smooth, color="white"), (x, top))
            pen.text((x + 4, top + 2), labels.get((name, i), ""), "black", plain, stroke_width=2, stroke_fill="white")
    for i, caption in enumerate(rows):
        font, text = font_of(caption) or plain, caption if font_of(caption) else f"row {i + 1}"
        lines = next(lines for most in range(26, 0, -1)                 # those that fit beside the pictures
                     if max(map(font.getlength, lines := textwrap.wrap(text, most)), default=0) <= 180)
        text = "\n".join(lines[:tiles[i][1] // line or 1])
        pen.text((6, tops[i]), text, "black", font, spacing=line - font.getbbox("A")[3])
    pen.text((6, tops[-1] + 2), note, fill="gray", font=font_of(note) or plain)
    return sheet


def save_png(image: Image.Image, path: Path, facts: dict[str, str | int]) -> None:
    """Write a PNG, atomically, with `facts` (prompt, seed, ...) as text metadata."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())
