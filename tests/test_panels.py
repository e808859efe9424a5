"""The panels of a training run: when they are drawn, and that each cell is what sample.py draws."""
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, fill_b, on_each_loss, write_pictures
from PIL import Image, ImageOps
from test_sample import difference, pixels, tiles, tiles_of

import lora
import model as zimage
import sample
from plumbing import pictures, recipes
from plumbing.panels import PanelRow, Panels


@pytest.mark.quick
def test_first_panel_is_drawn_before_step_1(run, tmp_path, monkeypatch):
    present = []
    panel = tmp_path / "real" / "samples" / "step_000000.png"
    on_each_loss(monkeypatch, lambda loss: present.append(panel.is_file()) or loss)
    run("real", "--steps", 1, "--sample-every", 1)
    assert present == [True, True]


def test_panel_cells_are_what_sample_draws(run, checkpoint, photos, tmp_path):
    out = run("real", "--steps", 4, "--sample-every", 4, "--seed", 6, "--panel-prompt", "a [V] on mint")
    first, last = (tiles(pixels(out / "samples" / f"step_00000{n}.png"), 4, 4, (32, 32)) for n in (0, 4))
    prompts = [CAPTIONS[0], CAPTIONS[1], "a [V] on mint", recipes.SMALL.unrelated]

    def cell(*flags) -> np.ndarray:
        words = ["--model", checkpoint, "--height", 32, "--width", 32, "--seed", 6, "--out", tmp_path / "cell.png"]
        sample.main([str(word) for word in (*words, *flags)])
        picture = Image.open(tmp_path / "cell.png").resize((160, 160), Image.Resampling.NEAREST)
        return np.asarray(picture).astype(int)

    for i, prompt in enumerate(prompts):
        target, base, student, teacher = last[i]
        assert difference(first[i][1], base) == 0 and difference(first[i][2], base) == 0       # B = 0 at the start
        assert difference(cell("--prompt", prompt), base) <= 1                 # encoded alone here, together there
        assert difference(cell("--prompt", prompt, "--lora", out / "student.safetensors"), student) <= 2
        shown = ("--reference", photos / ("1.png" if i == 1 else "0.png")) if i < 3 else ()    # none for the unrelated
        assert difference(cell("--prompt", prompt, "--lora", out / "teacher.safetensors", *shown), teacher) <= 2
        if i < 2:
            crop = pictures.crop(pictures.open_image(photos / f"{i}.png"), (32, 32))
            enlarged = crop.resize((160, 160), Image.Resampling.NEAREST)
            assert difference(target, np.asarray(enlarged).astype(int)) == 0
    assert (last[3][0] == 255).all() and difference(last[0][1], last[0][2]) > 2
    assert difference(last[2][0][20:], last[0][0][20:]) == 0       # the first target, with a label above
    assert difference(last[2][0][:20], last[0][0][:20]) > 100


def test_a_target_that_is_not_the_prompts_own_says_so(run, prepare):
    """Its own caption needs no label, and who is not shown the target is not said to be."""
    flags = ("--panel-prompt", CAPTIONS[0], "--panel-prompt", "a moon")
    for more, word in (((), "shown to the teacher"), (("--method", "sft"), "the first image")):
        rows = prepare(*flags, *more).panels.rows
        assert [row.label for row in rows] == ["", "", "", word, ""] and rows[-1].target is None
        assert rows[3].target.tobytes() == rows[0].target.tobytes()


def test_rows_have_the_shapes_of_their_own_pictures(run, checkpoint, tmp_path):
    mixed = write_pictures(tmp_path / "mixed", [(40, 80), (80, 40), (40, 40)])
    out = run("real", "--data", mixed, "--steps", 1, "--sample-every", 1, "--panel-prompt", "a moon")
    shapes, prompts = [(40, 24), (24, 40), (40, 24), (40, 24)], [*CAPTIONS[:2], "a moon", recipes.SMALL.unrelated]
    sheet = pixels(out / "samples" / "step_000001.png")
    assert sheet.shape[0] == 26 + sum(160 * height // width + 6 for height, width in shapes) + 20
    table = tiles_of(sheet, 4, shapes)
    for prompt, (height, width), row in zip(prompts, shapes, table, strict=True):
        sample.main(["--model", str(checkpoint), "--prompt", prompt, "--height", str(height), "--width", str(width),
                     "--out", str(tmp_path / "cell.png"), "--lora", str(out / "student.safetensors")])
        picture = Image.open(tmp_path / "cell.png")
        enlarged = picture.resize((160, 160 * height // width), Image.Resampling.NEAREST)
        assert difference(np.asarray(enlarged).astype(int), row[2]) <= 2
    for i, shape in enumerate(shapes[:2]):
        crop = pictures.crop(pictures.open_image(mixed / f"{i}.png"), shape)
        enlarged = crop.resize((160, 160 * shape[0] // shape[1]), Image.Resampling.NEAREST)
        assert difference(np.asarray(enlarged).astype(int), table[i][0]) == 0


def test_panel_contexts_belong_to_the_pictures(run, tmp_path):
    """Two data sets with the same captions and one cache: neither may show the other's teacher, now or later."""
    other = write_pictures(tmp_path / "other", [(40, 40)] * 5)
    for i in (0, 1, 2):
        (other / f"{i}.png").write_bytes((other / f"{4 - i}.png").read_bytes())
    for i in (3, 4):
        (other / f"{i}.png").unlink()
        (other / f"{i}.txt").unlink()
    flags = ("--steps", 1, "--sample-every", 1, "--cache", tmp_path / "shared")
    runs = [run(f"run{i}", *flags, *(("--data", other) if i % 2 else ())) for i in range(4)]
    first, second, third, fourth = (pixels(out / "samples" / "step_000001.png") for out in runs)
    assert difference(first, second) > 10
    assert difference(first, third) == 0 and difference(second, fourth) == 0


@pytest.mark.quick
def test_a_panel_by_itself(checkpoint, tmp_path, monkeypatch):
    """One column for everything that is there, the base drawn once; another student changes its own column only."""
    net = zimage.Z_IMAGE.load(checkpoint, "cpu", torch.float32)
    draw = torch.Generator().manual_seed(1)
    student, teacher = (zimage.Context(torch.randn(9, 128, generator=draw)) for _ in range(2))
    target = Image.new("RGB", (32, 32), "red")
    rows = [PanelRow(prompt, image, student, teacher, (32, 32)) for prompt, image in (("one", target), ("two", None))]
    panels, drawn = Panels(checkpoint, torch.device("cpu"), lambda *_: 3.0, 2, 5, rows), []
    monkeypatch.setattr("plumbing.panels.draw", lambda *given: drawn.append(given[-1]) or sample.draw(*given))
    base, first, second = (partial(lora.velocity_of, net, adapter=seed and fill_b(lora.create(net, 2, 2, 0), seed))
                           for seed in (None, 1, 2))
    panels.draw_base(base)
    panels.draw(tmp_path / "1.png", "a note", first, first, {"another": second})
    panels.draw(tmp_path / "2.png", "a note", second, None)
    panels.draw(tmp_path / "3.png", "a note", second, None, writes=False)
    names = ["base", "student", "teacher", "another", "student", "student"]
    assert drawn == [name for name in names for _ in rows] and not (tmp_path / "3.png").exists()   # each row by itself
    text = Image.open(tmp_path / "1.png").text
    assert {"prompt": "one\ntwo", "seed": "5", "steps": "2", "lora": "a note"}.items() <= text.items()
    (wide, narrow) = (tiles(pixels(tmp_path / f"{i}.png"), columns, 2, (32, 32)) for i, columns in ((1, 5), (2, 3)))
    assert (wide[0][0] == [255, 0, 0]).all() and (wide[1][0] == 255).all()
    for row, again in zip(wide, narrow, strict=True):
        assert difference(row[1], again[1]) == 0 and difference(row[4], again[2]) == 0
        assert min(difference(row[1], row[2]), difference(row[2], row[3]), difference(row[2], row[4])) > 2


@pytest.mark.quick
def test_pictures_that_a_panel_shrinks_are_beside_it(checkpoint, tmp_path):
    """At full size and with their prompts, in row order; those that it shows as they are need no file."""
    net = zimage.Z_IMAGE.load(checkpoint, "cpu", torch.float32)
    context = zimage.Context(torch.randn(9, 128, generator=torch.Generator().manual_seed(1)))
    shapes = [(8, 320), (16, 328), (32, 32), (8, 328)]
    rows = [PanelRow(f"prompt {i}", None, context, context, shape) for i, shape in enumerate(shapes, 1)]
    student = partial(lora.velocity_of, net, adapter=fill_b(lora.create(net, 2, 2, 0), 1))
    panels = Panels(checkpoint, torch.device("cpu"), lambda *_: 3.0, 1, 5, rows)
    panels.draw_base(student)
    panels.draw(tmp_path / "step_000100.png", "a note", student, None)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["step_000100.png", "step_000100_2.png", "step_000100_4.png"]
    sheet = pixels(tmp_path / "step_000100.png")
    for i in (2, 4):
        picture = Image.open(tmp_path / f"step_000100_{i}.png")
        assert picture.size == shapes[i - 1][::-1]
        assert {"prompt": f"prompt {i}", "seed": "5", "steps": "1", "lora": "a note"}.items() <= picture.text.items()
        shrunk = ImageOps.pad(picture, (320, 320 * picture.height // picture.width), Image.Resampling.LANCZOS,
                              color="white")
        assert difference(np.asarray(shrunk).astype(int), tiles_of(sheet, 2, shapes, 320)[i - 1][1]) == 0
