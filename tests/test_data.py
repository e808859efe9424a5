"""Data folders, buckets and the order of batches, with tiny images and fake encoders."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_features import FakeEncoder, Loader, picture, sidecars, table

from data import OFFICIAL_PATHS, Dataset, Row, bucket_shapes, generator, nearest_shape, read_folder
from plumbing.files import InputError

pytestmark = pytest.mark.quick


def fails(path: Path, message: str) -> None:
    """`read_folder(path)` raises one line that matches `message`, in which PATH stands for the path."""
    with pytest.raises(InputError) as caught:
        read_folder(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text, text
    assert re.fullmatch(message.replace("PATH", re.escape(str(path))), text), text


# ----------------------------------------------------------------------------------------------------- layouts
def test_sidecar_layout(tmp_path):
    for name in ("a.png", "b.JPG", "c.jpeg", "d.webp", "e.bmp"):
        picture(tmp_path / name, (10, 6))
        (tmp_path / name).with_suffix(".txt").write_text(f"  a picture called {name[0]}\n", encoding="utf-8-sig")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "._a.png").write_bytes(b"\0")
    (tmp_path / "more").mkdir()
    rows = read_folder(str(tmp_path))
    assert [row.image.name for row in rows] == ["a.png", "b.JPG", "c.jpeg", "d.webp", "e.bmp"]
    assert rows[0] == Row(tmp_path / "a.png", ("a picture called a",), (10, 6))
    assert rows[1].captions == ("a picture called b",)


def test_metadata_layout(tmp_path):
    (tmp_path / "sub").mkdir()
    picture(tmp_path / "a.png"), picture(tmp_path / "sub" / "b.png")
    table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "one \u2028 line"}, "",
          {"file_name": "sub/b.png", "text": ["first", " second "], "extra": 1})
    rows = read_folder(tmp_path)
    assert [(row.image, row.captions) for row in rows] == [
        (tmp_path / "a.png", ("one \u2028 line",)), (tmp_path / "sub" / "b.png", ("first", "second"))]
    assert read_folder(tmp_path / "metadata.jsonl") == rows


def test_official_layout(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    picture(images / "a.png"), picture(images / "b.png")
    table(tmp_path / "train.jsonl",
          {"local_path_list": ["images/a.png"], "h*w": "1024*1024", "short_en": "a dog", "medium_en": "",
           "detailed_en": "a small dog", "user_prompt_en": None, "user_prompt_zh": "狗"},
          {"local_path_list": [str(images / "b.png")], "short_zh": "猫"})
    rows = read_folder(tmp_path)
    assert [row.image for row in rows] == [images / "a.png", images / "b.png"]
    assert [row.captions for row in rows] == [("a dog", "a small dog", "狗"), ("猫",)]
    assert read_folder(tmp_path / "train.jsonl") == rows


@pytest.mark.parametrize("key", OFFICIAL_PATHS)
def test_released_layout(tmp_path, monkeypatch, key):
    """PROJECT/dataset/NAME/data.jsonl, paths from PROJECT; for editing the references come first, the target last."""
    folder = tmp_path / "project" / "dataset" / "cat"
    (folder / "images").mkdir(parents=True)
    a, b, c = (picture(folder / "images" / f"{name}.png") for name in "abc")
    monkeypatch.chdir(tmp_path)
    first, last = "dataset/cat/images/a.png", "dataset/cat/images/c.png"
    for names, image, sources in (([first], a, ()), (first, a, ()), ([first, "images/b.png", last], c, (a, b))):
        table(folder / "data.jsonl", {key: names, "h*w": ["8*8"], "short_en": "a cat", "class_name": "cat"})
        for path in (folder, folder / "data.jsonl", "project/dataset/cat"):
            row, = read_folder(path)
            assert (row.image.resolve(), row.captions) == (image, ("a cat",))
            assert tuple(source.resolve() for source in row.sources) == sources


def test_a_line_with_file_name_is_no_official_one(tmp_path):
    """Whatever else it has."""
    picture(tmp_path / "a.png")
    table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "one", "path": "/elsewhere/b.png"})
    row, = read_folder(tmp_path)
    assert (row.image, row.captions, row.sources) == (tmp_path / "a.png", ("one",), ())


# --------------------------------------------------------------------------------------------------- bad input
def test_missing_and_empty_folders(tmp_path):
    fails(tmp_path / "none", r"PATH: no such folder; give a folder of images with captions, or a .jsonl file")
    fails(picture(tmp_path / "a.png"), r"PATH: no such folder; .*")
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    fails(empty, r"PATH: no images here \(subfolders are not searched\); add png, jpg, .* or a metadata.jsonl")
    table(tmp_path / "x.jsonl", "", " ")
    fails(tmp_path / "x.jsonl", r"PATH: no rows; write one JSON object per image and line")
    table(tmp_path / "y.jsonl")
    fails(tmp_path, r"PATH: several .jsonl files \(x.jsonl, y.jsonl\); give --data the path of the one to use")


def test_a_caption_for_images_without_one(tmp_path):
    folder = sidecars(tmp_path)
    (folder / "b.txt").unlink(), (folder / "d.txt").unlink()
    before = read_folder(sidecars(tmp_path / "whole"))
    rows = read_folder(folder, caption="a [V] cat")
    assert [row.captions for row in rows] == [before[0].captions, ("a [V] cat",), before[2].captions, ("a [V] cat",)]
    assert [row.image.name for row in rows] == ["a.png", "b.png", "c.png", "d.png"]


def test_names_that_two_files_share(tmp_path):
    """One caption for two images, or two for one: nobody knows which is meant."""
    for one, other in (("b.png", "b.jpg"), ("b.txt", "b.TXT")):
        folder = sidecars(tmp_path / other)
        (folder / other).write_bytes((folder / one).read_bytes())
        fails(folder, r"PATH/b.\w+: b.\w+ has the same name, so their captions cannot be told apart; rename one .*")


def test_files_that_are_not_used_are_said(tmp_path, capsys):
    folder = sidecars(tmp_path / "photos")
    (folder / "sub").mkdir(), (folder / ".hidden").touch()
    assert len(read_folder(folder)) == 4 and capsys.readouterr().err == ""
    for name in ("x.heic", "y.HEIC", "z.gif", "readme"):
        (folder / name).touch()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    assert len(read_folder(folder)) == 4
    assert capsys.readouterr().err == (f"note: {folder}: not used: 1 broken link, 1 without a suffix, 2 .heic, 1 .gif "
                                       "(first gone.png); pictures are read as png, jpg, jpeg, webp, bmp\n")
    lines = [{"file_name": f"{name}.png", "text": "x"} for name in "abc"]
    folder = sidecars(tmp_path / "table")
    table(folder / "some.jsonl", *lines)
    assert len(read_folder(folder)) == 3 and "not used: 4 .txt, 1 .png (first a.txt)" in capsys.readouterr().err


def test_incomplete_pairs(tmp_path):
    folder = sidecars(tmp_path / "one")
    (folder / "b.txt").unlink()
    fails(folder, r"PATH/b.png: an image without a caption, 1 of 4 have none; write one into b.txt beside "
                  r"it, or give --caption TEXT for all of them")
    folder = sidecars(tmp_path / "two")
    (folder / "c.png").unlink()
    fails(folder, r"PATH/c.txt: a caption without an image; add c.png \(png, .*\) or remove the caption")
    folder = sidecars(tmp_path / "three")
    (folder / "d.txt").write_text(" \n")
    fails(folder, r"PATH/d.txt: the caption is empty; write what the image shows")
    (folder / "d.txt").write_bytes(b"\xff\xfe\x00")
    fails(folder, r"PATH/d.txt: not readable as UTF-8 text \(.*\); save it as UTF-8")


def test_an_image_token_in_a_caption_names_its_file(tmp_path):
    """The encoder would find it after everything was loaded, and could not say where."""
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a <|image_pad|> star")
    fails(tmp_path, r"PATH/a\.png: its caption has <\|image_pad\|>, the mark of an image, or what UTF-8 cannot spell; "
          "remove it")
    table(tmp_path / "t.jsonl", {"file_name": "a.png", "text": ["fine", "a <|image_pad|>"]})
    with pytest.raises(InputError, match=r"a\.png: its caption has"):
        read_folder(tmp_path / "t.jsonl")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_broken_images(tmp_path, suffix):
    folder = sidecars(tmp_path / "data")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    bad = folder / f"e.{suffix}"
    Image.fromarray(noise).save(bad)
    (folder / "e.txt").write_text("noise")
    assert len(read_folder(folder)) == 5
    bad.write_bytes(bad.read_bytes()[:-1000])
    fails(folder, rf"PATH/e.{suffix}: not (a complete image \(.*\)|an image of a known format); replace or remove it")
    bad.write_bytes(b"<html>404</html>")
    fails(folder, rf"PATH/e.{suffix}: not an image of a known format; replace or remove it")
    bad.write_bytes(b"")
    fails(folder, rf"PATH/e.{suffix}: not an image of a known format; replace or remove it")


@pytest.mark.parametrize("line, message", [
    ('{"file_name": "a.png", ', r"not valid JSON \(.*\); correct or remove this line"),
    ('["a.png"]', r"expected an object \{...\}, found list; correct this line"),
    ({"text": "x"}, r"the field 'file_name' is missing; write file_name and text into each line"),
    ({"file_name": "a.png"}, r"the field 'text' is missing; write file_name and text into each line"),
    ({"file_name": "a.png", "text": 3}, r"file_name must be a string, .*; correct this line"),
    ({"file_name": "a.png", "text": [3]}, r"file_name must be a string, .*; correct this line"),
    ({"file_name": None, "text": "x"}, r"file_name must be a string, .*; correct this line"),
    ({"file_name": "a.png", "text": " "}, r"'text' holds an empty caption; write what the image shows"),
    ({"file_name": "a.png", "text": []}, r"'text' holds an empty caption; write what the image shows"),
    ({"file_name": "a.png", "text": ["x", ""]}, r"'text' holds an empty caption; write what the image shows"),
    ({"file_name": "z.png", "text": "x"}, r".*/z.png: no such file; correct the path or add the image"),
    ({"local_path_list": [], "short_en": "x"}, r"'local_path_list' must be a path or a list of paths; .*"),
    ({"image_path_list": ["a.png", 3], "short_en": "x"}, r"'image_path_list' must be a path or a list of paths; .*"),
    ({"path": {"a": 1}, "short_en": "x"}, r"'path' must be a path or a list of paths; .*"),
    ({"local_path_list": ["z.png"], "short_en": "x"}, r".*/z.png: no such file; correct the path or add the image"),
    ({"local_path_list": ["a.png"], "short_en": " "}, r"no caption; fill in at least one of short_en, .*_zh"),
    ({"local_path_list": ["a.png"], "short_en": ["x"]}, r"captions must be strings; correct this line"),
    ({"file_name": "a.png", "text": "x", "source": "z.png"}, r".*/z.png: no such file; correct the path or add the .*"),
    ({"file_name": "a.png", "text": "x", "source": ["a.png", 3]}, r"'source' must be a path or a list of paths; .*"),
    ({"file_name": "a.png", "text": "x", "source": {"a": 1}}, r"'source' must be a path or a list of paths; .*"),
])
def test_bad_jsonl_lines(tmp_path, line, message):
    picture(tmp_path / "a.png")
    table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "fine"}, "", line)
    fails(tmp_path / "metadata.jsonl", rf"PATH, line 3: {message}")


def test_other_bad_tables(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    path = table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "x"})
    fails(tmp_path, r"PATH/b.png: an image without a caption; add a line for it to metadata.jsonl, or remove it")
    path.rename(tmp_path / "other.jsonl")  # another table names what it uses; the rest of the folder is not its own
    assert len(read_folder(tmp_path)) == 1
    (tmp_path / "a.png").write_bytes(b"x")
    fails(tmp_path, r"PATH/a.png: not an image of a known format; replace or remove it")
    (tmp_path / "other.jsonl").write_bytes(b"\xff\n")
    fails(tmp_path / "other.jsonl", r"PATH: not readable as UTF-8 text \(.*\); save it as UTF-8")


# ----------------------------------------------------------------------------------------------------- sources
def test_sources_of_editing_rows(tmp_path):
    for name in "abcst":
        picture(tmp_path / f"{name}.png")
    table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "x", "source": "s.png"},
          {"file_name": "b.png", "text": "x", "source": ["t.png", "s.png"]}, {"file_name": "c.png", "text": "x"})
    assert [[path.name for path in row.sources] for row in read_folder(tmp_path)] == [["s.png"], ["t.png", "s.png"], []]
    (tmp_path / "s.png").write_bytes((tmp_path / "s.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"s\.png: not "):
        read_folder(tmp_path)


# ----------------------------------------------------------------------------------------------------- buckets
def test_bucket_shapes():
    paper = {(1024, 1024), (1152, 896), (896, 1152), (1152, 864), (864, 1152), (1248, 832), (832, 1248), (1280, 720),
             (720, 1280), (1344, 576), (576, 1344)}
    for multiple in (8, 16):
        shapes = bucket_shapes(1024, multiple)
        assert shapes[0] == (1024, 1024) and len(shapes) == 11 and set(shapes) == paper
    for size, multiple in ((64, 8), (64, 16), (96, 8), (512, 16), (768, 16), (1024, 32), (16, 16)):
        shapes = bucket_shapes(size, multiple)
        assert shapes[0] == (size, size) and len(set(shapes)) == len(shapes)
        assert {(width, height) for height, width in shapes} == set(shapes)
        assert all(side % multiple == 0 and side > 0 for shape in shapes for side in shape)
    # sides at 64: 896 -> 56, 1152 -> 72, 864 -> 54 -> 56 (a double), 832 -> 52 -> 56, 1248 -> 78 -> 80, 720 -> 45 -> 48
    assert bucket_shapes(64, 8) == [(64, 64), (56, 72), (72, 56), (56, 80), (80, 56), (48, 80), (80, 48), (40, 88),
                                    (88, 40)]


@pytest.mark.parametrize("size, near", [(100, 96), (4, 8), (0, 8), (-8, 8)])
def test_size_must_be_divisible(size, near):
    with pytest.raises(InputError, match=rf"^--size {size}: not a positive multiple of 8, .* try {near}$"):
        bucket_shapes(size, 8)


def test_nearest_shape():
    shapes = bucket_shapes(1024, 16)
    for size, shape in (((500, 500), (1024, 1024)), ((1920, 1080), (720, 1280)), ((1080, 1920), (1280, 720)),
                        ((3000, 2000), (832, 1248)), ((4000, 3000), (864, 1152)), ((9000, 100), (576, 1344)),
                        ((1, 500), (1344, 576)), ((1152, 896), (896, 1152))):
        assert nearest_shape(size, shapes) == shape
    # in log, 1.15 is a little nearer to 1.286 than to 1: sqrt(1 * 1152 / 896) = 1.134
    assert nearest_shape((1130, 1000), shapes) == (1024, 1024) and nearest_shape((1140, 1000), shapes) == (896, 1152)


# ------------------------------------------------------------------------------------------------------- order
@pytest.fixture
def mixed(tmp_path):
    """Ten images in three buckets (5 square, 3 wide, 2 tall); the wide ones have three captions."""
    lines = []
    for i, size in enumerate([(16, 16)] * 5 + [(36, 16)] * 3 + [(16, 36)] * 2):
        picture(tmp_path / f"{i}.png", size, (10 * i, 0, 0))
        text = [f"{i} one", f"{i} two", f"{i} three"] if size == (36, 16) else f"{i} only"
        lines.append({"file_name": f"{i}.png", "text": text})
    table(tmp_path / "metadata.jsonl", *lines)
    return Loader().prepare(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("batch_size, per_epoch", [(1, 10), (2, 3 + 2 + 1), (3, 2 + 1 + 1), (4, 2 + 1 + 1), (100, 3)])
def test_every_image_once_per_epoch(mixed, batch_size, per_epoch):
    dataset = Dataset(mixed, batch_size, seed=5)
    assert sorted(dataset.buckets.values()) == [2, 3, 5] and dataset.batches_per_epoch == per_epoch
    for epoch in range(3):
        batches = [dataset.batch(epoch * per_epoch + i) for i in range(per_epoch)]
        assert sorted(index for batch in batches for index in batch.indices) == list(range(10))
        for batch in batches:
            assert 1 <= len(batch.indices) <= batch_size
            assert len({mixed[index].shape for index in batch.indices}) == 1
            height, width = mixed[batch.indices[0]].shape
            assert batch.latents.shape == (len(batch.indices), 3, height // 4, width // 4)


def test_batch_contents_and_captions(mixed):
    dataset, drawn = Dataset(mixed, 3, seed=0), set()
    for step in range(40):
        batch = dataset.batch(step)
        assert batch.latents.dtype == torch.float32
        for i, index in enumerate(batch.indices):
            caption = batch.captions[i]
            assert caption in mixed[index].row.captions
            student, teacher = batch.student_context[i], batch.teacher_context[i]
            assert torch.equal(student.text, FakeEncoder().text_context([caption])[0])
            assert float(teacher.text[0, 0]) == 10.0 * index
            assert torch.equal(teacher.text[1:], student.text) and student.references == teacher.references == ()
            assert torch.allclose(batch.latents[i, 0], torch.tensor(10 * index / 127.5 - 1), atol=0.02)
            drawn.add(caption)
    assert len(drawn) == 7 + 3 * 3  # every caption gets its turn


def test_order_is_a_function_of_seed_and_step(mixed):
    def run(seed: int, steps) -> list:
        dataset = Dataset(mixed, 2, seed)
        return [(batch.indices, batch.captions) for batch in map(dataset.batch, steps)]

    forward = run(1, range(18))
    assert run(1, reversed(range(18))) == forward[::-1]  # no hidden state: any step, in any order
    assert run(1, range(7, 18)) == forward[7:]
    assert run(2, range(18)) != forward
    assert len({str(forward[i:i + 6]) for i in (0, 6, 12)}) == 3  # epochs differ


def test_small_data_sets(tmp_path):
    examples = Loader().prepare(sidecars(tmp_path / "data", size=(16, 16)), tmp_path / "cache")
    for batch_size in (4, 9):
        dataset = Dataset(examples, batch_size, 0)
        assert dataset.batches_per_epoch == 1
        assert all(sorted(dataset.batch(step).indices) == [0, 1, 2, 3] for step in range(3))
    with pytest.raises(InputError, match="^--batch-size 0: "):
        Dataset(examples, 0, 0)


def test_generator():
    def draw(*numbers):
        return torch.randn(4, generator=generator(*numbers)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3) and generator(0).device.type == "cpu"
    streams = [draw(1, 2, 3), draw(1, 3, 2), draw(12, 3), draw(1, 23), draw(1, 2), draw(1, "noise", 2), draw(-1, 2)]
    assert len({str(stream) for stream in streams}) == len(streams)
    first = np.array([draw(0, "noise", step)[0] for step in range(2000)])  # neighbouring steps are unrelated
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.08
