"""The feature cache: what is encoded, when, and what a batch then holds; with tiny images and fake encoders."""
import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import encoder
from data import Dataset, bucket_shapes, read_folder
from plumbing import features
from plumbing.files import InputError

pytestmark = pytest.mark.quick


def picture(path: Path, size: tuple[int, int] = (8, 8), color="red", mode: str = "RGB") -> Path:
    Image.new(mode, size, color).save(path)
    return path


def sidecars(folder: Path, names: str = "abcd", size: tuple[int, int] = (8, 8)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        picture(folder / f"{name}.png", size, (20 * i, 100, 200))
        (folder / f"{name}.txt").write_text(f"caption {name}\n")
    return folder


def table(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


class FakeVae:
    """Mean over 4 x 4 pixels, so that latents tell which image they came from."""

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled() and image.shape[0] == 1 and image.abs().max() <= 1
        return torch.nn.functional.avg_pool2d(image, 4)


class FakeEncoder:
    """Contexts whose length and values follow from the prompt, and for the teacher from the image's first pixel."""

    def text_context(self, prompts: list[str]) -> list[torch.Tensor]:
        batch = torch.zeros(len(prompts), 64, 5, dtype=torch.bfloat16)  # views of one tensor, as real encoders return
        for row, prompt in zip(batch, prompts):
            row[:] = sum(prompt.encode()) % 97
        return [row[:len(prompt)] for row, prompt in zip(batch, prompts)]

    def teacher_texts(self, kind: str, prompts: list[str], images: list[Image.Image], sources: list[int]):
        return encoder.Encoder.teacher_texts(self, kind, prompts, images, sources)

    def image_text_context(self, prompts: list[str], images: list[Image.Image]) -> list[torch.Tensor]:
        return [torch.cat([torch.full((1, 5), float(image.getpixel((0, 0))[0])).bfloat16(), context])
                for image, context in zip(images, FakeEncoder.text_context(self, prompts), strict=True)]


class Loader:
    """Callables for `prepare` that count loads and watch that two models never live at once."""

    def __init__(self):
        self.loads, self.alive, self.encoded = [], weakref.WeakSet(), []  # encoded: the prompts that were asked for

    def load(self, kind):
        assert len(self.alive) == 0, "two models in memory at once"
        self.loads.append(kind.__name__)
        model = kind()
        encode = getattr(model, "text_context", None)
        if encode:
            model.text_context = lambda prompts: self.encoded.append(tuple(prompts)) or encode(prompts)
            model.itself = model  # a cycle, as in real modules with hooks: dropping the name alone does not free it
        self.alive.add(model)
        return model

    def prepare(self, folder, cache, key="model", size=16, **options):
        area = size ** 2
        examples = features.place(read_folder(folder), bucket_shapes(size, 8), area, cache, key, **options)
        features.prepare(examples, 8, area, lambda: self.load(FakeVae), lambda: self.load(FakeEncoder))
        return examples


def test_cache_is_filled_once(tmp_path, capsys):
    folder, loader = sidecars(tmp_path / "data", size=(16, 16)), Loader()
    gc.disable()
    try:
        examples = loader.prepare(folder, tmp_path / "cache")
        assert loader.loads == ["FakeVae", "FakeEncoder"] and len(loader.alive) == 0  # freed before it returned
    finally:
        gc.enable()
    assert len(list((tmp_path / "cache").iterdir())) == 4
    stored = load_file(examples[1].file)
    assert set(stored) == {"latents", "student.0", "teacher.0"}
    assert stored["latents"].shape == (3, 4, 4) and stored["latents"].dtype == torch.float32
    assert stored["student.0"].shape == (9, 5) and stored["student.0"].dtype == torch.bfloat16
    assert stored["teacher.0"].shape == (10, 5) and float(stored["teacher.0"][0, 0]) == 20.0
    assert torch.allclose(stored["latents"][:, 0, 0], torch.tensor([20, 100, 200]) / 127.5 - 1)

    again = Loader()
    assert again.prepare(folder, tmp_path / "cache") == examples and again.loads == []
    moved = shutil.copytree(folder, tmp_path / "moved")  # content counts, not the place
    assert [example.file for example in again.prepare(moved, tmp_path / "cache")] == [e.file for e in examples]
    assert again.loads == []
    assert capsys.readouterr().err == ""


def test_only_what_changed_is_encoded_again(tmp_path):
    folder, cache = sidecars(tmp_path / "data", size=(16, 16)), tmp_path / "cache"
    Loader().prepare(folder, cache)

    def encoded(**options) -> list[str]:
        loader = Loader()
        loader.prepare(folder, cache, **options)
        return [prompts[0] for prompts in loader.encoded]

    (folder / "b.txt").write_text("another caption")
    assert encoded() == ["another caption"] and encoded() == []
    picture(folder / "c.png", (16, 16), "blue")
    assert encoded() == ["caption c"] and encoded() == []
    assert len(encoded(key="other model")) == 4 and encoded(key="other model") == []
    assert len(encoded(size=32)) == 4 and encoded() == []


def test_broken_cache_files_are_encoded_again(tmp_path):
    folder, cache = sidecars(tmp_path / "data", size=(16, 16)), tmp_path / "cache"
    examples = Loader().prepare(folder, cache)
    whole = [example.file.read_bytes() for example in examples]
    examples[0].file.write_bytes(whole[0][:-20])
    examples[1].file.write_bytes(b"")
    examples[2].file.write_bytes(b"garbage" * 100)
    save_file({"student.0": torch.zeros(3, 5)}, examples[3].file)
    loader = Loader()
    loader.prepare(folder, cache)
    assert len(loader.encoded) == 4
    assert [example.file.read_bytes() for example in examples] == whole


def test_latents_are_written_as_they_are_encoded(tmp_path, monkeypatch):
    """What ends between VAE and encoder, or between two pictures, has not worked for nothing."""
    folder, cache = sidecars(tmp_path / "data", size=(16, 16)), tmp_path / "cache"
    whole = [example.file.read_bytes() for example in Loader().prepare(folder, tmp_path / "other")]
    encode, done = FakeVae.encode, []

    def fails_at_the_third(self, image):
        done.append(1 / (2 - len(done)))
        return encode(self, image)

    monkeypatch.setattr(FakeVae, "encode", fails_at_the_third)
    with pytest.raises(ZeroDivisionError):
        Loader().prepare(folder, cache)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(FakeVae, "encode", lambda self, image: done.append(0) or encode(self, image))
    monkeypatch.setattr(FakeEncoder, "text_context", lambda self, prompts: 1 / 0)
    loader = Loader()
    with pytest.raises(ZeroDivisionError):
        loader.prepare(folder, cache)
    assert len(done) == 2 + 2 and loader.loads == ["FakeVae", "FakeEncoder"]
    monkeypatch.undo()
    loader = Loader()
    examples = loader.prepare(folder, cache)
    assert loader.loads == ["FakeEncoder"] and [example.file.read_bytes() for example in examples] == whole


def test_without_teacher(tmp_path):
    folder, cache = sidecars(tmp_path / "data", size=(16, 16)), tmp_path / "cache"
    examples = Loader().prepare(folder, cache, kind="")
    batch = Dataset(examples, 2, 0).batch(0)
    assert batch.teacher_context == [] and len(batch.student_context) == 2
    loader = Loader()
    loader.prepare(folder, cache)  # now the teacher is wanted: the same files are completed
    assert len(loader.encoded) == 4
    assert Loader().prepare(folder, cache, kind="") == examples and len(list(cache.iterdir())) == 4


def test_enlarged_images_warn_once(tmp_path, capsys):
    folder = sidecars(tmp_path / "data", "abc", (16, 16))
    picture(folder / "b.png", (8, 8))
    for _ in range(2):
        Loader().prepare(folder, tmp_path / "cache")
        warning = capsys.readouterr().err
        assert warning.count("warning:") == 1 and warning.count("\n") == 1
        assert "1 of 3 images are enlarged" in warning and "b.png (2.00x)" in warning


def test_cache_that_cannot_be_written(tmp_path):
    folder = sidecars(tmp_path / "data", size=(16, 16))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        Loader().prepare(folder, tmp_path / "file" / "cache")


# ------------------------------------------------------------------------------------------------------- references
def test_reference_teacher_sees_the_target_as_latents(tmp_path):
    folder = sidecars(tmp_path / "data", size=(16, 16))
    examples = Loader().prepare(folder, tmp_path / "cache", kind="reference")
    batch = Dataset(examples, 4, 0).batch(0)
    for x0, caption, student, teacher in zip(batch.latents, batch.captions, batch.student_context,
                                             batch.teacher_context, strict=True):
        assert student.references == () and len(teacher.references) == 1
        assert torch.equal(teacher.references[0], x0)
        assert torch.equal(teacher.text, FakeEncoder().text_context([encoder.reference_prompt(caption, 0)])[0])


@pytest.mark.parametrize("teacher", ["vlm", "reference", ""])
def test_sources_reach_both_sides_and_the_target_comes_last(tmp_path, teacher):
    lines = []
    for i, size in enumerate([(16, 16)] * 3 + [(40, 20)]):                  # a target, its sources in other shapes
        picture(tmp_path / f"{i}.png", (16, 16), (10 * i, 0, 0)), picture(tmp_path / f"s{i}.png", size, (0, 10 * i, 0))
        source = ["s1.png", picture(tmp_path / "second.png", (16, 24), (0, 0, 10)).name] if i == 1 else f"s{i}.png"
        lines.append({"file_name": f"{i}.png", "text": f"change {i}", "source": source})
    table(tmp_path / "metadata.jsonl", *lines)
    examples = Loader().prepare(tmp_path, tmp_path / "cache", kind=teacher)
    dataset = Dataset(examples, 4, 0)
    assert dict(dataset.buckets) == {(16, 16, 1): 3, (16, 16, 2): 1} and dataset.batches_per_epoch == 2
    for batch in map(dataset.batch, range(2)):
        for row, index in enumerate(batch.indices):
            student = batch.student_context[row]
            assert [float(r[1, 0, 0]) for r in student.references][0] == pytest.approx(10 * index / 127.5 - 1)
            if index == 1:
                assert float(student.references[1][2, 0, 0]) == pytest.approx(10 / 127.5 - 1)
            if index == 3:      # 40x20 is more than 16 * 16 pixels: made smaller, cut to multiples of 8
                assert student.references[0].shape == (3, 2, 4)
            if not teacher:
                assert batch.teacher_context == []
                continue
            extra = batch.teacher_context[row].references[len(student.references):]
            assert all(torch.equal(a, b) for a, b in zip(batch.teacher_context[row].references, student.references))
            assert len(extra) == (teacher == "reference") and all(torch.equal(e, batch.latents[row]) for e in extra)
            prompt, count = batch.captions[row], len(student.references)
            text = FakeEncoder().text_context([encoder.reference_prompt(prompt, count)])[0]
            assert torch.equal(batch.teacher_context[row].text, text) == (teacher == "reference")


def test_a_new_teacher_context_is_one_entry(tmp_path, monkeypatch):
    """Here the teacher reads the prompt backwards; the cache and `contexts` take it as they take the others."""
    backwards = encoder.TeacherContext(
        lambda reader, prompts, targets, sources: reader.text_context([prompt[::-1] + "!" for prompt in prompts]),
        needs_vlm=False, adds_reference=False)
    monkeypatch.setitem(encoder.TEACHER_CONTEXTS, "backwards", backwards)
    folder = sidecars(tmp_path / "data", size=(16, 16))
    batch = Dataset(Loader().prepare(folder, tmp_path / "cache", kind="backwards"), 4, 0).batch(0)
    assert len(batch.teacher_context) == 4
    for caption, student, teacher in zip(batch.captions, batch.student_context, batch.teacher_context, strict=True):
        assert torch.equal(student.text, FakeEncoder().text_context([caption])[0])
        assert torch.equal(teacher.text, FakeEncoder().text_context([caption[::-1] + "!"])[0])
        assert teacher.references == student.references == ()
    x0 = torch.ones(3, 4, 4)
    student, teacher = encoder.contexts(torch.zeros(2, 5), torch.ones(3, 5), (), x0, "backwards")
    assert teacher.references == () and torch.equal(teacher.text, torch.ones(3, 5))
    monkeypatch.setitem(encoder.TEACHER_CONTEXTS, "backwards", dataclasses.replace(backwards, adds_reference=True))
    batch = Dataset(Loader().prepare(folder, tmp_path / "other cache", kind="backwards"), 4, 0).batch(0)
    assert all(torch.equal(*context.references, x0) for context, x0 in zip(batch.teacher_context, batch.latents))


def test_a_changed_source_is_encoded_again(tmp_path):
    picture(tmp_path / "a.png", (16, 16)), picture(tmp_path / "s.png", (16, 16), "blue")
    table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "change", "source": "s.png"})
    (before,) = Loader().prepare(tmp_path, tmp_path / "cache")
    picture(tmp_path / "s.png", (16, 16), "green")
    (after,) = Loader().prepare(tmp_path, tmp_path / "cache")
    assert before.file != after.file


@pytest.mark.parametrize("kind", [FakeVae, FakeEncoder])
def test_what_is_not_finite_is_not_cached(tmp_path, monkeypatch, kind):
    """One line that names the picture, and no file."""
    name = "encode" if kind is FakeVae else "image_text_context"
    whole = getattr(kind, name)
    spoiled = (lambda self, image: whole(self, image) / 0) if kind is FakeVae else (
        lambda self, prompts, images: [c * float("nan") for c in whole(self, prompts, images)])
    monkeypatch.setattr(kind, name, spoiled)
    what = "latents" if kind is FakeVae else "teacher.0"
    with pytest.raises(InputError, match=rf"a\.png: its {what} has values that are not finite; copy or download"):
        Loader().prepare(sidecars(tmp_path / "data"), tmp_path / "cache")
    for file in (tmp_path / "cache").glob("*"):                         # latents that are good may stay
        assert kind is FakeEncoder and load_file(file).keys() == {"latents"}
