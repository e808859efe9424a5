"""The campaign against train.py: options, data folders, tables, captions, pictures, names. A row is an attack."""
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from campaign import (LONG, RAW, SAMPLE, TRAIN, TRANSFORMER, Place, either, folder_instead, lines, refused, said,
                      stopped, table, works)
from PIL import Image

from plumbing.files import ROOT

HALF = '"\\ud800"'      # half a character, as JSON can spell it
IS_ROOT = not hasattr(os, "geteuid") or os.geteuid() == 0


# ---------------------------------------------------------------------------------------------------- damages
def row(place: Place, text: object = "a star", name: object = "0.png", **more: object) -> None:
    """A table whose second line has these values; a string in quotes is JSON already."""
    shutil.copy(place.data / "0.png", place.data / "first.png")
    for path in place.data.glob("[0-9].png"):
        path.rename(place.data / f"{path.stem}.other") if path.name != "0.png" else None
    entry = {"file_name": name, "text": text} | more
    cells = (f'"{key}": {value if str(value).startswith(chr(34)) else json.dumps(value)}'
             for key, value in entry.items())
    table(place, '{"file_name": "first.png", "text": "a red star"}', "{" + ", ".join(cells) + "}")


def rename(place: Place, stem: str) -> None:
    """Picture 0 and its caption under another name."""
    for suffix in (".png", ".txt"):
        (place.data / f"0{suffix}").rename(place.data / f"{stem}{suffix}")


def bare(place: Place, stem: str) -> None:
    """The same, without the caption."""
    rename(place, stem)
    (place.data / f"{stem}.txt").unlink()


def caption(place: Place, text: str | bytes) -> None:
    (place.data / "0.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def folder_named(place: Place, name: str) -> None:
    """The data in a folder of another name, beside the one that is expected."""
    shutil.move(place.data, place.root / name)


def picture(place: Place, image: Image.Image, kind: str = "PNG", **options: object) -> None:
    """Picture 0 in any format; its name stays 0.png."""
    image.save(place.data / "0.png", kind, **options)


def chunk(place: Place, name: bytes, content: bytes, checked: bool = True) -> None:
    """One more chunk in a PNG, after its header of 33 bytes."""
    path = place.data / "0.png"
    found, check = path.read_bytes(), zlib.crc32(name + content) if checked else 0
    path.write_bytes(found[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)
                     + found[33:])


def header(place: Place, width: int, height: int) -> None:
    """A PNG that says how large it is, and has no pixels."""
    (place.data / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with open(place.data / "0.png", "ab") as file:
        for name, part in ((b"IHDR", content), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)))


def with_mode(path: Path, mode: int, look: Callable) -> dict[Path, bytes]:
    """look() while `path` has another mode."""
    now = path.stat().st_mode
    path.chmod(mode)
    found = look()
    path.chmod(now)
    return found


def frames(count: int = 3) -> dict:
    return {"save_all": True, "append_images": [Image.new("RGB", (40, 40), (60 * i, 9, 9)) for i in range(count)]}


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(dtype)


def rgb(width: int = 40, height: int = 40) -> Image.Image:
    return Image.fromarray(noise(height, width, 3))


def floats(hole: float = 0.0) -> Image.Image:
    pixels = noise(40, 40, dtype=np.float32)
    pixels[3, 3] = hole
    return Image.fromarray(pixels)


# ---------------------------------------------------------------------------------------------------- tables
OPTIONS = {  # flags: the end
    "--steps 1e6": refused("--steps", "1e6"), "--steps HUGE": refused("--steps"),
    "--size 1e3": refused("--size"), "--size -32": refused("--size -32"), "--size nan": refused("--size"),
    "--size 4": refused("--size 4", "multiple of 8"), "--rank HUGE": refused("--rank"),
    "--alpha HUGE": refused("--alpha"), "--alpha -2": refused("--alpha -2"),
    "--batch-size 1000000": refused("--batch-size 1000000", "4096"),
    "--accumulate 1000000000": refused("--accumulate 1000000000"),
    "--rollout-steps 4.5": refused("--rollout-steps"), "--grad-states -1": refused("--grad-states -1"),
    "--lr 1e400": refused("--lr"), "--lr -inf": refused("--lr"), "--lr 1e39": stopped("--lr"),
    "--noise inf": refused("--noise inf"), "--noise 1e300": stopped("--noise"), "--ema inf": refused("--ema inf"),
    "--beta inf --method pso": refused("--beta inf"), "--beta nan --method pso": refused("--beta nan"),
    "--seed -1": refused("--seed -1"), "--seed HUGE": refused("--seed"), "--seed 1.5": refused("--seed"),
    "--keep ROOT/data --keep-weight nan": refused("--keep-weight nan"),
    "--keep ROOT/data --keep-batches 0": refused("--keep-batches 0"),
    "--keep ROOT/data --keep-batches 1000000000": refused("--keep-batches 1000000000"),
    "--keep ROOT/nowhere": refused("--keep", "ROOT/nowhere", "no such"),
    "--keep ROOT/data/0.png": refused("--keep", "ROOT/data/0.png"),
    "--device cuda:-1": refused("--device cuda:-1", "use cpu"), "--device ": refused("--device", "use cpu"),
    "--dtype bfloat16": works(), "--quantize int8": said("note: --quantize int8", "next to nothing"),
    "--method sft --ema 0.5": said("note: --method sft", "--ema"),
    "--model ": refused("model_index.json"), "--model ROOT/data": refused("ROOT/data", "model_index.json"),
    "--model https://huggingface.co/Tongyi-MAI/Z-Image-Turbo": refused("huggingface.co", "no such folder", "hub id"),
    "--model ROOT/model/transformer": refused("ROOT/model/transformer", "model_index.json"),
    "--vlm ROOT/model": refused("ROOT/model", "config.json"), "--vlm ROOT/data/0.png": refused("ROOT/data/0.png"),
    "--teacher-lora ROOT/data": refused("ROOT/data", "no such file"),
    "--teacher-lora ROOT/model/vae/diffusion_pytorch_model.safetensors": refused("unknown key"),
    "--teacher-context reference": refused("--teacher-context reference", "FLUX.2"),
    "--data ROOT/data/0.png": refused("ROOT/data/0.png", "folder"),
    "--data ROOT/data/ ROOT/data": works(), "--out ROOT/data": refused("--out", "--data"),
    "--out ROOT/data/below": works("data/below/student.safetensors"),
    "--out ROOT/a/../b": works("b/student.safetensors"),
    "--cache ROOT/data/0.png": refused("--cache", "ROOT/data/0.png"),
    "--panel-prompt <|image_pad|>": refused("<|image_pad|>"), "--panel-prompt RAW": refused("prompt"),
    "--data ~nobody-here/data": refused("~nobody-here"), "--model ~nobody-here/model": refused("~nobody-here"),
    "--data LONG": refused("xxx"), "--data ROOT/LONG.jsonl": refused("xxx"), "--out ROOT/LONG": refused("--out"),
    "--cache ROOT/LONG": refused("--cache"), "--model ROOT/LONG": refused("xxx"), "--vlm ROOT/LONG": refused("xxx"),
    "--keep ROOT/LONG": refused("--keep"), "--teacher-lora ROOT/LONG": refused("xxx"),
    "--data ROOT/RAW": refused("--data"), "--model ROOT/RAW": refused("--model"),
    "--out ROOT/RAW": either("--out", result="RAW/student.safetensors"), "--cache ROOT/RAW": either("--cache"),
    "--out ROOT/星/🌸": works("星/🌸/student.safetensors"), "--cache ROOT/星": works(),
    "--out ROOT/a\nb": works("a\nb/student.safetensors"), "--data ROOT/a\nb": refused("no such folder"),
    "--model ROOT/a\nb": refused("no such folder"), "--panel-prompt 星🌸": works(),
    "--name RAW": refused("--name", "not UTF-8"), "--name LONG": refused("--name", "200 bytes"),
    "--name dog --tune full": refused("--name dog", "--tune lora"),
}
BAD_NAMES = ("", " ", ".", "..", "...", ".hidden", "dog.", "dog ", " dog", "a/b", "/tmp/dog", "../dog", "a\\b",
             "C:dog", "a<b", "a>b", 'a"b', "a|b", "a?b", "a*", "a\nb", "a\tb", "dog\n", "\x1b[2J", "\x7f", "\x85",
             "state", "STATE", "teacher", "Teacher", "con", "NUL", "aux.v2", "COM1", "lpt9.dog", "com²", "CONIN$",
             "dog.safetensors", "dog.SafeTensors", ".safetensors", 51 * "🌸")
GOOD_NAMES = ("student", "my dog", "dog.v2", "-v2", "犬🌸", "कुत्ता", "state2", "teachers", "console", "a" * 200, "[V]",
              "$(dog)", "%PATH%", "a'b", "config", "step_000001")
FOLDERS = {  # attack: damage, flags, the end
    "out, a link to nowhere": (lambda p: p.link.symlink_to(p.nowhere), "--out ROOT/link", refused("ROOT/link")),
    "out, a link to itself": (lambda p: p.link.symlink_to(p.link), "--out ROOT/link", refused("ROOT/link")),
    "cache, a link to itself": (lambda p: p.link.symlink_to(p.link), "--cache ROOT/link", refused("ROOT/link")),
    "cache, a part of the checkpoint": (lambda p: p.own_model(), "--cache ROOT/model/transformer", refused("--cache")),
    "data, a link to itself": (lambda p: p.link.symlink_to(p.link), "--data ROOT/link", refused("ROOT/link")),
    "data, a link to a folder": (lambda p: p.link.symlink_to(p.data), "--data ROOT/link", works()),
    "data, another alphabet": (lambda p: folder_named(p, "星 🌸"), ("--data", "ROOT/星 🌸"), works()),
    "data, a name of two lines": (lambda p: folder_named(p, "a\nb"), ("--data", "ROOT/a\nb"), works()),
    "data, a name of raw bytes": (lambda p: folder_named(p, RAW), ("--data", "ROOT/RAW"), either("--data")),
    "captions alone": (lambda p: [path.unlink() for path in p.data.glob("*.png")], "", refused("without an image")),
    "a link to nowhere": (lambda p: (p.data / "z.png").symlink_to(p.nowhere), "", said("broken link", "z.png")),
    "a link to itself": (lambda p: (p.data / "z.png").symlink_to("z.png"), "", said("broken link", "z.png")),
    "a picture that is a pipe": (lambda p: os.mkfifo(p.data / "z.png"), "", said("not used", "z.png")),
    "a picture that is a folder": (lambda p: folder_instead(p.data / "0.png"), "", refused("0.txt", "image")),
    "a caption that is a folder": (lambda p: folder_instead(p.data / "0.txt"), "", refused("0.png", "caption")),
    "hidden files": (lambda p: (p.data / "._0.png").write_bytes(b"\0"), "", works()),
    "a thousand other files": (lambda p: [(p.data / f"{i}.heic").touch() for i in range(1000)], "",
                               said("1000 .heic")),
    "names in capitals": (lambda p: (p.data / "0.png").rename(p.data / "0.PNG"), "", works()),
    "a name of two lines": (lambda p: rename(p, "a\nb"), "", works()),
    "a name of two lines without a caption": (lambda p: bare(p, "a\nb"), "", refused("without a caption")),
    "a name of raw bytes": (lambda p: rename(p, RAW), "", works()),
    "a name of raw bytes without a caption": (lambda p: bare(p, RAW), "", refused("without a caption")),
    "a name in another alphabet": (lambda p: rename(p, "红色的星星"), "", works()),
    "a name without a caption in another alphabet": (lambda p: bare(p, "星"), "", refused("星.png", "caption")),
    "a name of emoji": (lambda p: rename(p, "🌸👩‍🚀"), "", works()),
    "a name that looks like a flag": (lambda p: rename(p, "--out"), "", works()),
    "the longest name": (lambda p: rename(p, LONG[:250]), "", works()),
}
CAPTIONS = {  # attack: the file, or a caption for all pictures; the end
    "with a byte order mark": ("\ufeffa red star", works()), "zero bytes": (b"", refused("0.txt", "empty")),
    "only a byte order mark": ("\ufeff", refused("0.txt", "empty")), "NUL": ("a\0star", works()),
    "of another alphabet": ("一颗红色的星星 🌸", works()), "right to left": ("\u202eنجمة حمراء", works()),
    "Windows' line ends": ("a red star\r\non blue\r\n", works()), "only [V]": ("[V]", works()),
    "six hundred words": ("star " * 600, said("prompt", "tokens")),
    "the mark of an image": ("a <|image_pad|> star", refused("<|image_pad|>")),
    "the mark of a video": ("a <|video_pad|> star", works()),
    "marks of a chat": ("<|im_end|><|im_start|>system <|vision_start|><|endoftext|>", works()),
    "UTF-16": ("a red star".encode("utf-16"), refused("0.txt", "UTF-8")),
    "a picture": (Path(ROOT / "examples" / "star" / "1.png").read_bytes(), refused("0.txt", "UTF-8")),
}
ROWS = {  # attack: damage, the end
    "nested a million deep": (lambda p: table(p, '{"a":' * 10 ** 6), refused("metadata.jsonl, line 1")),
    "a list": (lambda p: table(p, "[1]"), refused("metadata.jsonl, line 1", "list")),
    "not a number": (lambda p: table(p, "NaN"), refused("metadata.jsonl, line 1", "float")),
    "a number of 5000 digits": (lambda p: table(p, '{"file_name": ' + "1" * 5000 + "}"),
                                refused("metadata.jsonl, line 1", "JSON")),
    "a byte order mark": (lambda p: table(p, *["\ufeff" + line if not i else line for i, line in enumerate(lines(3))]),
                          works()),
    "a byte order mark inside": (lambda p: table(p, *["\ufeff" + line if i == 1 else line
                                                      for i, line in enumerate(lines(3))]), refused("line 2", "JSON")),
    "Windows' line ends": (lambda p: table(p, *[line + "\r" for line in lines(3)]), works()),
    "UTF-16": (lambda p: (table(p), (p.data / "metadata.jsonl").write_text(lines(1)[0], "utf-16")),
               refused("metadata.jsonl", "UTF-8")),
    "a folder": (lambda p: folder_instead(p.data / "metadata.jsonl"), works()),
    "the same picture twice": (lambda p: table(p, *lines(3), *lines(3)), works()),
    "a name of 300 characters": (lambda p: row(p, name=LONG), refused("line 2")),
    "half a character as a name": (lambda p: row(p, name=HALF), refused("line 2", "no such file")),
    "a name with NUL": (lambda p: row(p, name="\0.png"), refused("line 2", "no such file")),
    "a name that is a folder": (lambda p: row(p, name="."), refused("line 2", "no such file")),
    "a name that is a number": (lambda p: row(p, name=3), refused("line 2", "file_name", "string")),
    "a name outside the folder": (lambda p: row(p, name="/etc/passwd"), refused("/etc/passwd", "not an image")),
    "Windows' separators": (lambda p: row(p, name="below\\0.png"), refused("line 2", "no such file")),
    "half a character as a caption": (lambda p: row(p, HALF), refused(".png", "UTF-8")),
    "no caption": (lambda p: row(p, None), refused("line 2", "text")),
    "a caption that is a number": (lambda p: row(p, 3), refused("line 2", "text")),
    "a list without captions": (lambda p: row(p, []), refused("line 2", "empty caption")),
    "a list with a number": (lambda p: row(p, ["a star", 3]), refused("line 2", "list of strings")),
    "two captions": (lambda p: row(p, ["a star", "一颗星"]), works()),
    "a source for Z-Image": (lambda p: row(p, source="first.png"), refused("ROOT/data", "FLUX.2")),
    "a source that is missing": (lambda p: row(p, source=["first.png", "no.png"]), refused("line 2", "no.png")),
    "a source that is a number": (lambda p: row(p, source=3), refused("line 2", "'source'")),
    "official, no paths": (lambda p: table(p, '{"image_path": [], "short_en": "a"}'), refused("line 1", "image_path")),
    "official, no captions": (lambda p: table(p, '{"image_path": "0.png"}'), refused("line 1", "no caption")),
    "official, a number": (lambda p: table(p, '{"path": "0.png", "short_en": 3}'), refused("line 1", "captions")),
}
PICTURES = {  # attack: damage, the end
    "225 million pixels": (lambda p: header(p, 15_000, 15_000), refused("0.png", "pixels")),
    "2 thousand million columns": (lambda p: header(p, 2 ** 31 - 1, 1), refused("0.png")),
    "no rows": (lambda p: header(p, 40, 0), refused("0.png")),
    "pixels missing": (lambda p: header(p, 400, 400), refused("0.png", "not a complete image")),
    "a moving GIF": (lambda p: picture(p, rgb(), "GIF", **frames()), works()),
    "a moving WebP": (lambda p: picture(p, rgb(), "WEBP", **frames()), works()),
    "a TIFF of several pages": (lambda p: picture(p, rgb(), "TIFF", **frames()), works()),
    "four inks": (lambda p: picture(p, Image.fromarray(noise(40, 40, 4), "CMYK"), "JPEG"), works()),
    "16 bits": (lambda p: picture(p, Image.fromarray(noise(40, 40, dtype=np.uint16) * 250)), works()),
    "floats": (lambda p: picture(p, floats(), "TIFF"), works()),
    "a float that is none": (lambda p: picture(p, floats(float("nan")), "TIFF"), either("0.png")),
    "one bit": (lambda p: picture(p, rgb().convert("1")), works()),
    "palette with holes": (lambda p: picture(p, rgb().convert("P"), transparency=b"\0\x80" * 20), works()),
    "one pixel": (lambda p: picture(p, rgb(1, 1)), said("enlarged", "0.png")),
    "1x5000": (lambda p: picture(p, rgb(1, 5000)), said("enlarged", "0.png")),
    "5000x1": (lambda p: picture(p, rgb(5000, 1)), said("enlarged", "0.png")),
    "PostScript": (lambda p: (p.data / "0.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(x) (w) file\n"), refused("0.png")),
    "a drawing": (lambda p: (p.data / "0.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
                  refused("0.png", "not an image")),
    "a JPEG cut short": (lambda p: (picture(p, rgb(), "JPEG"), os.truncate(p.data / "0.png", 700)), refused("0.png")),
    "a chunk that does not check": (lambda p: chunk(p, b"IDAT", b"x", checked=False), refused("0.png")),
    "a text of a hundred million letters": (lambda p: chunk(p, b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10 ** 8, 1)),
                                            either("0.png")),
    "a broken profile": (lambda p: picture(p, rgb(), icc_profile=b"garbage"), works()),
    "broken EXIF": (lambda p: chunk(p, b"eXIf", b"garbage"), refused("0.png", "not a complete image")),
    "EXIF with a wild orientation": (lambda p: picture(p, rgb(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0"
                                                       b"\0\0\x01\0\x63\0\0\0\0\0\0"), works()),
}

PERMISSIONS = {  # attack: what is closed, its mode, the program, flags, the end
    "data": ("data", 0, TRAIN, "", refused("ROOT/data", "permission")),
    "a picture": ("data/0.png", 0, TRAIN, "", refused("0.png", "ermission")),
    "a caption": ("data/0.txt", 0, TRAIN, "", refused("0.txt", "ermission")),
    "the pipeline": ("model/model_index.json", 0, TRAIN, "", refused("model_index.json")),
    "the transformer": ("model/transformer", 0, TRAIN, "", refused("ROOT/model/transformer")),
    "its weights": ("model/" + TRANSFORMER, 0, TRAIN, "", refused("transformer")),
    "the tokenizer": ("model/tokenizer/tokenizer.json", 0, TRAIN, "", refused("tokenizer")),
    "the VLM": ("model/vlm/model.safetensors", 0, TRAIN, "", refused("vlm")),
    "an adapter": ("adapter.safetensors", 0, SAMPLE, "--lora ROOT/adapter.safetensors", refused("adapter")),
    "a reference": ("data/0.png", 0, SAMPLE, "--reference ROOT/data/0.png", refused("0.png", "ermission")),
    "prompts": ("data/0.txt", 0, SAMPLE, "--prompts ROOT/data/0.txt", refused("0.txt", "ermission")),
    "out": ("closed", 0, TRAIN, "--out ROOT/closed/run", refused("--out", "not writable")),
    "out, to be read only": ("closed", 0o555, TRAIN, "--out ROOT/closed/run", refused("--out", "not writable")),
    "out, itself": ("closed", 0, TRAIN, "--out ROOT/closed", refused("--out", "not writable")),
    "cache": ("closed", 0, TRAIN, "--cache ROOT/closed", refused("--cache", "not writable")),
    "cache, deeper": ("closed", 0, TRAIN, "--cache ROOT/closed/a/b", refused("--cache", "not writable")),
    "a picture's folder": ("closed", 0, SAMPLE, "--out ROOT/closed/a.png", refused("--out", "not writable")),
}


# ---------------------------------------------------------------------------------------------------- the attacks
@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_of_files(campaign, name):
    campaign(TRAIN, None, (f"--name={name}",), refused("--name", "no name for a file on every system"))


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names_of_files(campaign, name):
    campaign(TRAIN, None, (f"--name={name}",), works(f"run/{name}.safetensors"))


@pytest.mark.parametrize("flags", OPTIONS)
def test_options(campaign, flags):
    campaign(TRAIN, None, flags, OPTIONS[flags])


@pytest.mark.parametrize("attack", FOLDERS)
def test_folders(campaign, attack):
    campaign(TRAIN, *FOLDERS[attack])


@pytest.mark.parametrize("attack", CAPTIONS)
def test_captions(campaign, attack):
    content, end = CAPTIONS[attack]
    campaign(TRAIN, lambda place: caption(place, content), "", end)


@pytest.mark.parametrize("text, end", [(" ", refused("empty")), (RAW, refused("caption")), ("星 🌸", works()),
                                       ("a\nstar", works()), ("<|image_pad|>", refused("<|image_pad|>"))])
def test_caption_of_all(campaign, text, end):
    campaign(TRAIN, lambda place: [path.unlink() for path in place.data.glob("*.txt")], ("--caption", text), end)


@pytest.mark.parametrize("attack", ROWS)
def test_rows(campaign, attack):
    damage, end = ROWS[attack]
    campaign(TRAIN, damage, "", end)


@pytest.mark.parametrize("attack", PICTURES)
def test_pictures(campaign, attack):
    damage, end = PICTURES[attack]
    campaign(TRAIN, damage, "--method sft", end)                        # which loads no VLM


@pytest.mark.skipif(IS_ROOT, reason="root may read and write everything")
@pytest.mark.parametrize("attack", PERMISSIONS)
def test_permissions(campaign, attack):
    name, mode, program, flags, end = PERMISSIONS[attack]
    campaign.place.own_model(), (campaign.place.root / "closed").mkdir()
    path = campaign.place.root / name
    before, snapshot = path.stat().st_mode, campaign.place.snapshot
    campaign.place.snapshot = lambda: with_mode(path, before, snapshot)        # which cannot look inside otherwise
    path.chmod(mode)
    try:
        campaign(program, None, flags, end)
    finally:
        path.chmod(before)
