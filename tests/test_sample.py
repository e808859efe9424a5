"""sample.py against diffusers' ZImagePipeline, with and without LoRA; panels, the teacher's view, metadata."""
import gc
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import SCHEDULER
from diffusers import ZImagePipeline
from PIL import Image

import model as zimage
import sample
from networks import vae
from plumbing import encoder_files, lora_files, pictures
from plumbing.backbone import Backbone
from plumbing.files import read_json
from model import scheduler_shift
from rollout import sigma_grid

SIZES = [(32, 32), (24, 48)]  # height, width


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    pipeline = ZImagePipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline, prompt: str, seed: int, steps: int, size: tuple[int, int]) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(seed)
    picture = pipeline(prompt, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=0.0,
                       generator=generator).images[0]
    return np.asarray(picture).astype(int)


@pytest.fixture
def ours(checkpoint, tmp_path):
    """ours(flags, ...) -> pixels of the picture that sample.py writes."""
    def draw(*flags, out: str = "picture.png", size: tuple[int, int] = (32, 32)) -> np.ndarray:
        words = ["--model", checkpoint, "--device", "cpu", "--height", size[0], "--width", size[1], *flags]
        sample.main([*map(str, words), "--out", str(tmp_path / out)])
        return pixels(tmp_path / out) if (tmp_path / out).is_file() else np.zeros(0)
    return draw


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return np.abs(a - b).max()


# ---------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed, steps", [(0, 4), (7, 1), (123456, 9)])
def test_equals_the_pipeline(pipeline, ours, size, seed, steps):
    prompt = "a big striped yellow and blue circle on the left"
    mine = ours("--prompt", prompt, "--seed", seed, "--steps", steps, "--dtype", "float32", size=size)
    assert mine.shape == (*size, 3) and mine.std() > 20
    assert difference(mine, theirs(pipeline, prompt, seed, steps, size)) <= 2


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_pipeline_with_lora(pipeline, ours, adapter_file, size):
    words = ("--prompt", "a red star", "--seed", 5, "--steps", 4)
    base, mine = ours(*words, size=size), ours(*words, "--lora", adapter_file, size=size)
    assert difference(base, mine) > 40
    pipeline.load_lora_weights(adapter_file)
    try:
        assert difference(mine, theirs(pipeline, "a red star", 5, 4, size)) <= 2
    finally:
        pipeline.unload_lora_weights()
    assert difference(base, theirs(pipeline, "a red star", 5, 4, size)) <= 2


@pytest.mark.quick
def test_defaults_come_from_the_recipe(ours, checkpoint, tmp_path):
    sample.main(["--prompt", "a red star", "--model", str(checkpoint), "--out", str(tmp_path / "default.png")])
    picture = Image.open(tmp_path / "default.png")
    assert picture.size == (64, 64) and picture.text["steps"] == "4" and picture.text["seed"] == "0"
    explicit = ours("--prompt", "a red star", "--steps", 4, size=(64, 64))
    assert difference(pixels(tmp_path / "default.png"), explicit) == 0


# ---------------------------------------------------------------------------------------------------- files
def test_metadata(ours, adapter_file, tmp_path):
    prompt = "ein großer roter Stern,\n夜 and \"quotes\""
    ours("--prompt", prompt, "--seed", 11, "--steps", 2, "--lora", adapter_file, out="with.png")
    text = Image.open(tmp_path / "with.png").text
    assert {"prompt": prompt, "seed": "11", "steps": "2", "lora": "strong.safetensors"}.items() <= text.items()
    ours("--prompt", prompt, "--steps", 2, out="without.png")
    assert Image.open(tmp_path / "without.png").text["lora"] == "none"


def test_several_prompts_equal_single_ones(ours, tmp_path, capsys):
    prompts = ["a red star", "a big plain pink circle on the left on mint", "moon"]
    (tmp_path / "prompts.txt").write_text(f"{prompts[1]}  \n\n{prompts[2]}\n", encoding="utf-8-sig")  # with a mark
    ours("--prompt", prompts[0], "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--seed", 3, out="deep/many.png")
    names = [f"many_{i:03d}.png" for i in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == names
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "deep" / name) for name in names]
    for prompt, name in zip(prompts, names):
        single = ours("--prompt", prompt, "--steps", 2, "--seed", 3)
        assert difference(single, pixels(tmp_path / "deep" / name)) == 0
        assert Image.open(tmp_path / "deep" / name).text["prompt"] == prompt
    assert difference(single, ours("--prompt", prompts[0], "--steps", 2, "--seed", 3)) > 2


def tiles(sheet: np.ndarray, columns: int, rows: int, size: tuple[int, int]) -> list[list[np.ndarray]]:
    """The pictures of a panel whose rows have one shape."""
    return tiles_of(sheet, columns, [size] * rows)


def tiles_of(sheet: np.ndarray, columns: int, sizes: list[tuple[int, int]], wide: int = 160) -> list[list[np.ndarray]]:
    """The pictures of a panel, found by its layout: 190 pixels of captions, 26 of names, tiles of one width.

    sizes: (height, width) of each row.
    """
    heights = [wide * height // width for height, width in sizes]
    tops = [26 + sum(heights[:i]) + 6 * i for i in range(len(sizes))]
    return [[sheet[top:, 190 + j * (wide + 6):][:height, :wide] for j in range(columns)]
            for top, height in zip(tops, heights)]


@pytest.mark.parametrize("size", SIZES)
def test_compare(ours, adapter_file, size, tmp_path):
    prompts = ["a red star", "a heart"]
    words = ["--prompt", prompts[0], "--prompt", prompts[1], "--steps", 2, "--lora", adapter_file]
    sheet = ours(*words, "--compare", out="panel.png", size=size)
    assert sheet.shape == (26 + 2 * (160 * size[0] // size[1] + 6), 190 + 2 * 166, 3)
    assert (sheet[:26, 190:350] < 128).any() and (sheet[:26, 356:] < 128).any()              # the columns have names
    assert (sheet[26:40, :190] < 128).any()                                                  # the rows have captions
    text = Image.open(tmp_path / "panel.png").text
    assert text["prompt"] == "a red star\na heart" and text["lora"] == "strong.safetensors"
    table = tiles(sheet, 2, 2, size)
    for row, prompt in zip(table, prompts):
        for tile, flags in zip(row, ((), ("--lora", adapter_file))):
            single = ours("--prompt", prompt, "--steps", 2, *flags, size=size).astype(np.uint8)
            enlarged = Image.fromarray(single).resize((160, len(tile)), Image.Resampling.NEAREST)
            # one of 255 levels: prompts are encoded together for a panel and alone here, which rounds differently
            assert difference(np.asarray(enlarged).astype(int), tile) <= 1


# ---------------------------------------------------------------------------------------------------- teacher's view
@pytest.mark.quick
@pytest.mark.parametrize("with_lora", [False, True])
def test_reference_draws_from_the_image_text_context(ours, checkpoint, photos, adapter_file, with_lora):
    flags = ("--lora", adapter_file) if with_lora else ()
    words = ("--prompt", "a red star", "--steps", 3, "--seed", 2, *flags)
    mine = ours(*words, "--reference", photos / "1.png", size=(24, 48))
    picture = pictures.crop(pictures.open_image(photos / "1.png"), (24, 48))
    reader = encoder_files.load(checkpoint, "cpu", torch.float32, checkpoint / "vlm", None, "vlm")
    context = reader.image_text_context(["a red star"], [picture])
    net = zimage.Z_IMAGE.load(checkpoint, "cpu", torch.float32)
    adapter = lora_files.load(adapter_file, net) if with_lora else None
    x = torch.randn(1, 8, 6, 12, generator=torch.Generator().manual_seed(2))
    sigmas = sigma_grid(scheduler_shift(SCHEDULER), 3).tolist()
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:]):
            x = x + (following - sigma) * net.velocity(x, sigma, context, adapter)
    decoded = ((vae.load(checkpoint, "cpu").decode(x)[0] + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)
    assert difference(mine, decoded) <= 1
    assert difference(mine, ours(*words, size=(24, 48))) > 10


def test_compare_with_reference_has_a_teacher_column(ours, photos, adapter_file):
    words = ("--prompt", "a red star", "--steps", 1, "--compare", "--reference", photos / "0.png")
    assert ours(*words, out="two.png").shape[1] == 190 + 2 * 166
    sheet = ours(*words, "--lora", adapter_file, out="three.png")
    assert sheet.shape[1] == 190 + 3 * 166
    (base, student, teacher), = tiles(sheet, 3, 1, (32, 32))
    assert min(difference(base, student), difference(student, teacher), difference(base, teacher)) > 10


def test_teacher_rope_is_passed_on(ours, photos, copied):
    """With another rotary base in the VLM's config, `text` and `vlm` differ; here both are the checkpoint's own."""
    config = read_json(copied / "vlm" / "config.json")
    config["text_config"]["rope_parameters"]["rope_theta"] = 50.0
    (copied / "vlm" / "config.json").write_text(json.dumps(config))
    words = ("--prompt", "a red star", "--steps", 2, "--reference", photos / "0.png")
    own, other = ours(*words), ours(*words, "--vlm", copied / "vlm")
    assert difference(own, other) > 2
    assert difference(own, ours(*words, "--vlm", copied / "vlm", "--teacher-rope", "text")) == 0


def test_the_encoders_are_gone_before_the_transformer_comes(ours, monkeypatch, photos):
    alive = []
    loaded = encoder_files.load

    def load_encoder(*args, **kwargs):
        reader = loaded(*args, **kwargs)
        alive.append(weakref.ref(reader.text))
        alive.append(weakref.ref(reader.vlm))
        return reader

    def load_transformer(*args, load=Backbone.load, **kwargs):
        gc.collect()
        assert len(alive) == 2 and all(ref() is None for ref in alive)
        alive.append(None)
        return load(*args, **kwargs)

    monkeypatch.setattr(encoder_files, "load", load_encoder)
    monkeypatch.setattr(Backbone, "load", load_transformer)
    ours("--prompt", "a red star", "--steps", 1, "--reference", photos / "0.png")
    assert len(alive) == 3
