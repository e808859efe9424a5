"""The panels of a training run: when they are drawn, and that each cell is what sample.py draws."""
import numpy as np
from conftest import CAPTIONS, on_each_loss, write_pictures
from PIL import Image
from test_sample import difference, pixels, tiles

import sample
from plumbing import pictures, recipes


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
