"""Pictures: every file format and mode to upright RGB, crops, reference images."""
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from test_features import picture

from data import read_folder
from plumbing import pictures
from plumbing.files import InputError
from plumbing.pictures import crop, fit, open_image

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.new("RGB", (16, 8), "white")
    upright.paste("red", (0, 0, 4, 4))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # how a camera that was held so stores the upright picture
    stored = upright.transpose(getattr(Image.Transpose, undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("a corner")
    assert np.array_equal(open_image(tmp_path / "a.png"), upright)
    assert read_folder(tmp_path)[0].size == (16, 8)


def test_transparency_over_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 255, 128))
    rgba.save(tmp_path / "rgba.png")
    assert np.array(open_image(tmp_path / "rgba.png")).tolist() == [[[255, 255, 255], [127, 127, 255]]]
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "la.png")
    assert open_image(tmp_path / "la.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.array(open_image(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert open_image(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)


def test_modes(tmp_path):
    grey16 = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(grey16).save(tmp_path / "wide.png")
    assert np.array(open_image(tmp_path / "wide.png"))[0, :, 1].tolist() == [0, 1, 128, 255]
    for values in ([[0.0, 0.5, 1.0]], [[0.0, 127.6, 300.0]]):
        Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "float.tif")
        assert np.array(open_image(tmp_path / "float.tif"))[0, :, 2].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "int.tif")
    assert np.array(open_image(tmp_path / "int.tif"))[0, :, 0].tolist() == [0, 255]
    for mode, color, expected in (("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("RGB", (1, 2, 3), (1, 2, 3))):
        picture(tmp_path / "a.png", (2, 2), color, mode)
        image = open_image(tmp_path / "a.png")
        assert image.mode == "RGB" and image.getpixel((0, 0)) == expected
    picture(tmp_path / "cmyk.jpg", (8, 8), (0, 255, 255, 0), "CMYK")  # ink: no cyan, all magenta and yellow
    red, green, blue = open_image(tmp_path / "cmyk.jpg").getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15
    with pytest.raises(InputError, match="none.png: no such file"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(64, 64), (70, 100), (1024, 1024), (1030, 1030), (2000, 700), (333, 3000)])
def test_fit_is_the_pipelines_preprocessing(size):
    image = Image.effect_noise(size, 60).convert("RGB")
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    theirs = image if size[0] * size[1] <= 1024 ** 2 else processor._resize_to_target_area(image, 1024 ** 2)
    width, height = (side // 16 * 16 for side in theirs.size)
    theirs = processor.preprocess(theirs, height=height, width=width, resize_mode="crop")
    ours = pictures.to_tensor(fit(image, 16, 1024 ** 2, "x.png"))
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-6


def test_too_small_a_reference():
    with pytest.raises(InputError, match=r"^x\.png: 64x15 pixels are too few for a reference image, which needs 16 "):
        fit(Image.new("RGB", (64, 15)), 16, 1024 ** 2, "x.png")


def test_crop_geometry():
    ramp = np.zeros((20, 60, 3), dtype=np.uint8)
    ramp[:, :20, 0], ramp[:, 20:40, 1], ramp[:, 40:, 2] = 255, 255, 255  # red, green, blue thirds
    middle = np.array(crop(Image.fromarray(ramp), (20, 20)))
    assert middle.shape == (20, 20, 3) and np.array_equal(middle, ramp[:, 20:40])
    tall = np.array(crop(Image.fromarray(ramp.transpose(1, 0, 2).copy()), (40, 40)))  # enlarged: the middle third
    assert tall.shape == (40, 40, 3) and (tall[..., 1] > 200).all() and (tall[8:-8, :, 1] == 255).all()
    same = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    assert np.array_equal(crop(same, (16, 24)), same)
    assert crop(same, (8, 24)).size == (24, 8) and np.array_equal(crop(same, (8, 24)), np.array(same)[4:12])
    odd = Image.fromarray(np.random.default_rng(1).integers(0, 255, (37, 53, 3), dtype=np.uint8))
    flipped = crop(odd.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (16, 16)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(np.array(flipped, dtype=int) - np.array(crop(odd, (16, 16)), dtype=int)).max() <= 1  # truly centred
    assert crop(Image.new("RGB", (9000, 3)), (16, 32)).size == (32, 16)


def test_to_tensor():
    image = Image.new("RGB", (4, 2), (0, 255, 51))
    tensor = pictures.to_tensor(image)
    assert tensor.shape == (1, 3, 2, 4) and tensor.dtype == torch.float32
    assert torch.allclose(tensor[0, :, 1, 2], torch.tensor([-1.0, 1.0, -0.6]))


def test_why_a_picture_cannot_be_read(tmp_path, monkeypatch):
    """Not every picture that cannot be opened is broken."""
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"folder\.png: cannot be read \(Is a directory\); give a file that can"):
        open_image(tmp_path / "folder.png")
    picture(tmp_path / "large.png", (50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"large\.png: more megapixels than Pillow reads, 0; make it smaller"):
        open_image(tmp_path / "large.png")

    def locked(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Image, "open", locked)
    with pytest.raises(InputError, match=r"large\.png: cannot be read \(Permission denied\)"):
        open_image(tmp_path / "large.png")


# ---------------------------------------------------------------------------------------------------- panels
@pytest.fixture
def fonts(monkeypatch):
    """Pillow's own font, which has ASCII letters, and one with those of more languages, but not Chinese."""
    more = str(Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    monkeypatch.setattr(pictures, "FONTS", ("", "no such font.ttf", more))


def red(height: int = 32, width: int = 32) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def test_a_font_has_all_letters_or_is_not_used(fonts):
    names = {text: font and font.getname()[0] for text in ("a red star, [V]", "", "красная звезда", "a [V] — é", "夜",
                                                           "a star, 夜", "красная 夜", "\U0010fffe")
             for font in [pictures.font_of(text)]}
    assert set(list(names.values())[:2]) == {"Aileron"} and set(list(names.values())[2:4]) == {"DejaVu Sans"}
    assert list(names.values())[4:] == [None] * 4


def test_rows_that_no_font_can_write_are_numbered(fonts):
    columns, captions = {"base": [red(), red()], "student": [red(), None]}, ["a red star", "夜の星"]
    sheet, numbered, plain = (np.asarray(pictures.panel(columns, [captions[0], text], "note"))
                              for text in (captions[1], "row 2", "another"))
    assert len(sheet) == len(plain) + 17                                        # one more line says why
    last = len(plain) - 2
    assert np.array_equal(sheet[:last], numbered[:last]) and not np.array_equal(sheet[:last], plain[:last])
    assert np.array_equal(sheet[:190], plain[:190]) and (sheet[last:] < 200).any()
    assert (np.asarray(pictures.panel(columns, captions))[-17:] < 200).any()    # also without a note
    own = np.asarray(pictures.panel(columns, captions[:1] * 2, "夜"))            # nor a note that it cannot write
    assert np.array_equal(own, np.asarray(pictures.panel(columns, captions[:1] * 2, pictures.UNWRITTEN)))


def test_captions_stay_beside_the_pictures(fonts):
    """Wide letters, and words without spaces: in lines that fit, and not below the row."""
    for caption in ("Щ" * 200, "Широкая " * 40, "m" * 200):
        sheet = np.asarray(pictures.panel({"student": [red(), red(16, 32)]}, [caption, caption]))
        assert (sheet[26:, 186:190] == 255).all() and (sheet[26:, 190:350] == [255, 0, 0]).sum() > 3 * 160 * 200
        ink = (sheet[:, :186] < 128).all(2).any(1)
        assert ink[26:186].sum() > 60 and not ink[187:192].any() and ink[192:272].any() and not ink[272:].any()


def test_rows_have_their_own_shapes():
    """That of the picture drawn last; what is given is fitted into it, and nothing changes where shapes are equal."""
    blue = Image.new("RGB", (32, 32), "blue")
    sheet = np.asarray(pictures.panel({"target": [blue, blue], "student": [red(32, 16), red(16, 32)]}, ["a", "b"]))
    assert sheet.shape == (26 + 320 + 6 + 80 + 6, 190 + 2 * 166, 3)
    assert (sheet[26:346, 356:516] == [255, 0, 0]).all() and (sheet[352:432, 356:516] == [255, 0, 0]).all()
    assert (sheet[106:266, 190:350] == [0, 0, 255]).all() and (sheet[26:106, 190:350] == 255).all()
    assert (sheet[352:432, 230:310] == [0, 0, 255]).all() and (sheet[352:432, 190:230] == 255).all()
    large = np.asarray(pictures.panel({"student": [red(160, 160), red(16, 32)]}, ["a", "b"]))
    assert large.shape == (26 + 320 + 6 + 160 + 6, 190 + 326, 3)


def test_a_label_stands_on_its_picture():
    columns = {"target": [red(), red()], "student": [red(), red()]}
    plain, labelled = (np.asarray(pictures.panel(columns, ["a", "b"], "", labels)).astype(int)
                       for labels in ({}, {("target", 1): "a label", ("student", 0): ""}))
    rows, places = np.nonzero(np.abs(plain - labelled).max(2))
    assert 192 <= rows.min() and rows.max() < 215 and 190 <= places.min() and places.max() < 350
