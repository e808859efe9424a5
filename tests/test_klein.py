"""A whole FLUX.2-klein checkpoint: pictures of sample.py against Flux2KleinPipeline, and what both programs refuse."""
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KLEIN_TOKENS, draw_picture, fill_b
from diffusers import Flux2KleinPipeline
from PIL import Image, ImageOps
from test_bad_input import Place, edit_json, refused, sample_words, table, train_words
from test_sample import difference, pixels, tiles

import encoder
import lora
import sample
import train
from networks import flux2
from networks.flux2 import KLEIN
from plumbing import checkpoints, encoder_files, machine
from plumbing.files import InputError
from plumbing.pictures import crop, fit, open_image
from plumbing.program import run as run_program

SIZES = [(32, 32), (24, 48)]                                                        # height, width
SOURCES = {"square": (64, 64), "wide": (104, 70), "tall": (64, 93)}                 # width, height
LAYERS = (1, 2, 3)                                                                  # of the text encoder's four
PROMPT = "a big striped yellow and blue circle on the left"


@pytest.fixture(scope="module")
def pipeline(klein):
    pipeline = Flux2KleinPipeline.from_pretrained(klein, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Pictures to edit: at least 64 pixels on each side, which the pipeline asks for."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate(SOURCES.items()):
        draw_picture(folder / f"{name}.png", size, seed)
    return {name: folder / f"{name}.png" for name in SOURCES}


@pytest.fixture(scope="module")
def strong(klein, tmp_path_factory) -> Path:
    """A LoRA that changes pictures: B is not zero, alpha is not the rank."""
    adapter = fill_b(lora.create(flux2.KLEIN.load(klein, "cpu", torch.float32), rank=3, alpha=6, seed=1), seed=2)
    path = tmp_path_factory.mktemp("adapters") / "klein.safetensors"
    lora.save(adapter, path, {"method": "dopsd"})
    return path


@pytest.fixture
def area_of_the_pipeline(monkeypatch):
    """Source pictures of up to 1024 * 1024 pixels stay as they are; small checkpoints have a lower limit."""
    large = dataclasses.replace(KLEIN.recipes[1], size=1024)
    monkeypatch.setattr(checkpoints, "BACKBONES", (dataclasses.replace(KLEIN, recipes=(KLEIN.recipes[0], large)),))


def theirs(pipeline, seed: int, steps: int, size: tuple[int | None, int | None], **what) -> np.ndarray:
    """what: prompt or prompt_embeds, image."""
    picture = pipeline(height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=1.0,
                       generator=torch.Generator("cpu").manual_seed(seed), max_sequence_length=KLEIN_TOKENS,
                       text_encoder_out_layers=LAYERS, **what).images[0]
    return np.asarray(picture).astype(int)


@pytest.fixture
def ours(klein, tmp_path):
    """ours(flags, ...) -> pixels of the picture that sample.py writes."""
    def draw(*flags, size: tuple[int, int] | None = (32, 32)) -> np.ndarray:
        sides = ("--height", size[0], "--width", size[1]) if size else ()
        sample.main([*map(str, ("--model", klein, "--device", "cpu", *sides, *flags)), "--out",
                     str(tmp_path / "picture.png")])
        return pixels(tmp_path / "picture.png")
    return draw


def with_flag(flag: str, paths) -> list:
    return [word for path in paths for word in (flag, path)]


# ---------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed, steps", [(0, 4), (7, 1), (123456, 9)])
def test_equals_the_pipeline(pipeline, ours, size, seed, steps):
    mine = ours("--prompt", PROMPT, "--seed", seed, "--steps", steps, "--dtype", "float32", size=size)
    assert mine.shape == (*size, 3) and mine.std() > 20
    assert difference(mine, theirs(pipeline, seed, steps, size, prompt=PROMPT)) <= 2
    assert difference(mine, ours("--prompt", "a heart", "--seed", seed, "--steps", steps, size=size)) > 10


@pytest.mark.parametrize("names, size, seed, steps", [
    (["wide"], (32, 32), 0, 4), (["tall", "wide"], (24, 48), 7, 3), (["square", "tall"], None, 123456, 1),
    (["wide"], None, 5, 4),
])
def test_editing_equals_the_pipelines(pipeline, ours, pictures, area_of_the_pipeline, tmp_path, names, size, seed,
                                      steps):
    files = [pictures[name] for name in names]
    words = ("--prompt", PROMPT, "--seed", seed, "--steps", steps)
    mine = ours(*words, *with_flag("--source", files), size=size)
    first = (side // 8 * 8 for side in SOURCES[names[0]][::-1])                     # without --height and --width
    assert mine.shape == (*(size or first), 3)
    assert difference(mine, theirs(pipeline, seed, steps, size or (None, None), prompt=PROMPT,
                                   image=[Image.open(file) for file in files])) <= 2
    assert Image.open(tmp_path / "picture.png").text["source"] == ", ".join(f"{name}.png" for name in names)
    assert difference(mine, ours(*words, size=mine.shape[:2])) > 10


def test_order_of_the_sources_counts(ours, pictures):
    both = [pictures["wide"], pictures["tall"]]
    one, other = (ours("--prompt", "a red star", *with_flag("--source", files)) for files in (both, both[::-1]))
    assert difference(one, other) > 10


def test_large_sources_are_made_as_small_as_the_recipe(ours, pictures, tmp_path):
    """104 x 70 pixels are more than 64 * 64: 78 x 52 fit, then the middle in multiples of 8 is cut out."""
    open_image(pictures["wide"]).resize((78, 52), Image.Resampling.LANCZOS).crop((3, 2, 75, 50)).save(
        tmp_path / "small.png")
    mine = ours("--prompt", "a red star", "--source", pictures["wide"], size=None)
    assert mine.shape == (48, 72, 3)
    assert difference(mine, ours("--prompt", "a red star", "--source", tmp_path / "small.png", size=None)) == 0


@pytest.mark.parametrize("edits", [False, True])
def test_equals_the_pipeline_with_lora(pipeline, ours, strong, pictures, area_of_the_pipeline, edits):
    words = ("--prompt", "a red star", "--seed", 5, "--steps", 4, *(("--source", pictures["tall"]) if edits else ()))
    image = {"image": [Image.open(pictures["tall"])]} if edits else {}
    base, mine = ours(*words), ours(*words, "--lora", strong)
    assert difference(base, mine) > 40
    pipeline.load_lora_weights(strong)
    try:
        assert difference(mine, theirs(pipeline, 5, 4, (32, 32), prompt="a red star", **image)) <= 2
    finally:
        pipeline.unload_lora_weights()
    assert difference(base, theirs(pipeline, 5, 4, (32, 32), prompt="a red star", **image)) <= 2


def test_defaults_come_from_the_recipe(ours, tmp_path):
    mine, text = ours("--prompt", "a red star", size=None), Image.open(tmp_path / "picture.png").text
    assert mine.shape == (64, 64, 3) and text["steps"] == "4" and "source" not in text and "reference" not in text
    assert difference(mine, ours("--prompt", "a red star", "--steps", 4, "--seed", 0, size=(64, 64))) == 0


# ---------------------------------------------------------------------------------------------------- teacher's view
@pytest.mark.parametrize("names", [[], ["tall"], ["wide", "square"]])
@pytest.mark.parametrize("explicit", [False, True])
def test_reference_is_the_last_picture_of_an_edit(pipeline, ours, strong, pictures, area_of_the_pipeline, names,
                                                  explicit):
    """With `reference`, klein's default, the teacher is the pipeline itself with an instruction and one more image."""
    size, files = (64, 72), [pictures[name] for name in names]
    flags = ("--teacher-context", "reference", "--lora", strong) if explicit else ()
    mine = ours("--prompt", PROMPT, "--steps", 2, "--reference", pictures["wide"], *flags,
                *with_flag("--source", files), size=size)
    shown = [*(Image.open(file) for file in files), crop(open_image(pictures["wide"]), size)]
    prompt = encoder.reference_prompt(PROMPT, len(names))
    if explicit:
        pipeline.load_lora_weights(strong)
    try:
        assert difference(mine, theirs(pipeline, 0, 2, size, prompt=prompt, image=shown)) <= 2
    finally:
        pipeline.unload_lora_weights()
    assert difference(mine, ours("--prompt", prompt, "--steps", 2, *flags[2:], *with_flag("--source", files),
                                 size=size)) > 10


@pytest.mark.parametrize("names", [[], ["tall", "wide"]])
def test_vlm_reads_the_reference(pipeline, ours, klein, pictures, area_of_the_pipeline, names):
    """With `vlm` the picture reaches the transformer in the text alone; sources stay references."""
    size, files = (24, 48), [pictures[name] for name in names]
    mine = ours("--prompt", "a red star", "--steps", 3, "--seed", 2, "--reference", pictures["square"],
                "--teacher-context", "vlm", *with_flag("--source", files), size=size)
    reader = encoder_files.load(klein, "cpu", torch.float32, klein / "vlm", None, "vlm")
    text, = reader.image_text_context(["a red star"], [crop(open_image(pictures["square"]), size)])
    image = {"image": [Image.open(file) for file in files]} if files else {}
    assert difference(mine, theirs(pipeline, 2, 3, size, prompt_embeds=text[None], **image)) <= 2
    assert difference(mine, ours("--prompt", "a red star", "--steps", 3, "--seed", 2, *with_flag("--source", files),
                                 size=size)) > 10


def test_compare_puts_source_base_student_and_teacher_side_by_side(ours, strong, pictures):
    words = ("--prompt", "a red star", "--steps", 2, "--source", pictures["tall"])
    shown = ("--reference", pictures["wide"])
    sheet = ours(*words, *shown, "--lora", strong, "--compare")
    singles = [ours(*words), ours(*words, "--lora", strong), ours(*words, *shown, "--lora", strong)]
    source, *drawn = tiles(sheet, 4, 1, (32, 32))[0]
    for tile, single in zip(drawn, singles, strict=True):
        enlarged = Image.fromarray(single.astype(np.uint8)).resize((160, 160), Image.Resampling.NEAREST)
        assert difference(np.asarray(enlarged).astype(int), tile) <= 1
    assert min(difference(a, b) for a, b in zip(singles, singles[1:])) > 10
    assert difference(source, in_a_tile(pictures["tall"])) == 0


def in_a_tile(path: Path) -> np.ndarray:
    """A picture to edit as a panel of square pictures shows it: in the size that the model is given."""
    return np.asarray(ImageOps.pad(fit(open_image(path), 8, 64 ** 2, path), (160, 160), Image.Resampling.NEAREST,
                                   color="white")).astype(int)


def test_compare_has_a_column_for_each_source(ours, strong, pictures):
    """Both are shown beside each prompt; without --compare there is no panel, and without --source no column."""
    words = ("--prompt", "a red star", "--prompt", "a heart", "--steps", 1, "--lora", strong, "--compare")
    sheet = ours(*words, "--source", pictures["tall"], "--source", pictures["square"])
    table = tiles(sheet, 4, 2, (32, 32))
    for row in table:
        for tile, name in zip(row, ("tall", "square")):
            assert difference(tile, in_a_tile(pictures[name])) == 0
    assert difference(table[0][2], table[1][2]) > 10
    assert sheet.shape[1] == ours(*words).shape[1] + 2 * 166


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def place(tmp_path, klein, photos, strong) -> Place:
    return Place.copies(tmp_path, photos, klein, strong)


@pytest.fixture
def zimage(place, checkpoint) -> Place:
    """The same place with a Z-Image checkpoint."""
    shutil.rmtree(place.model)
    shutil.copytree(checkpoint, place.model)
    return place


def edits(place: Place, *sources) -> None:
    """Three rows for editing; 1.png has the field `source` as given."""
    rows = [{"file_name": f"{i}.png", "text": "make it red", "source": source}
            for i, source in enumerate(["0.png", *sources, "0.png"])]
    table(place, *map(json.dumps, rows))


def cut_source(place: Place) -> None:
    (place.data / "s.png").write_bytes((place.data / "0.png").read_bytes()[:60])
    edits(place, "s.png")


def tiny_source(place: Place) -> None:
    Image.new("RGB", (64, 7)).save(place.data / "s.png")
    edits(place, "s.png")


EDITS = {  # case: damage, words of the message
    "source missing": (lambda p: edits(p, "none.png"),
                       ("ROOT/data/metadata.jsonl, line 2", "ROOT/data/none.png", "no such file")),
    "second source missing": (lambda p: edits(p, ["0.png", "none.png"]), ("line 2", "none.png", "no such file")),
    "source cut": (cut_source, ("ROOT/data/s.png", "not a complete image", "replace")),
    "source of another kind": (lambda p: edits(p, 7), ("line 2", "'source'", "path")),
    "empty name": (lambda p: edits(p, [""]), ("line 2", "'source'", "path")),
    "source too small": (tiny_source, ("ROOT/data/s.png: 64x7 pixels", "8 or more")),
}


@pytest.mark.parametrize("case", EDITS)
def test_sources_of_train(place, case):
    damage, expected = EDITS[case]
    damage(place)
    refused(place, train.main, train_words(place), expected)


def unknown(place: Place) -> None:
    edit_json(place.model / "transformer" / "config.json", _class_name="FluxTransformer2DModel")


@pytest.mark.parametrize("damage, expected", [
    (unknown, ("transformer/config.json: _class_name FluxTransformer2DModel", "use a checkpoint of Z-Image or FLUX.2")),
    (lambda p: edit_json(p.model / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False),
     ("scheduler_config.json: use_dynamic_shifting = False", "use the scheduler of its checkpoint")),
    (lambda p: edit_json(p.model / "transformer" / "config.json", guidance_embeds=True), ("guidance_embeds True",)),
    (lambda p: shutil.rmtree(p.model / "text_encoder"), ("ROOT/model/text_encoder", "no such folder")),
])
def test_checkpoints_of_another_kind(place, damage, expected):
    damage(place)
    refused(place, train.main, train_words(place), expected)
    refused(place, sample.main, sample_words(place, "--prompt", "a red star"), expected)


@pytest.mark.parametrize("flags, expected", [
    (("--height", 36), ("--height 36", "multiple of 8", "try 32")), (("--width", 0), ("--width 0", "multiple of 8")),
    (("--source", "ROOT/none.png"), ("ROOT/none.png", "no such file")),
    (("--source", "ROOT/data/0.png", "--source", "ROOT/data/0.txt"), ("ROOT/data/0.txt", "not an image")),
    (("--reference", "ROOT/data/0.png", "--teacher-context", "vlm", "--vlm", "ROOT/nowhere"),
     ("ROOT/nowhere", "no such folder")),
])
def test_values_of_sample(place, flags, expected):
    refused(place, sample.main, sample_words(place, "--prompt", "a red star", *flags), expected)


def test_size_of_train(place):
    refused(place, train.main, train_words(place, "--size", 36), ("--size 36", "multiple of 8", "try 32"))


def test_z_image_takes_no_references(zimage):
    context = ("--teacher-context reference", "Z-Image", "use a FLUX.2 checkpoint")
    refused(zimage, train.main, train_words(zimage, "--teacher-context", "reference"), context)
    drawn = ("--prompt", "a red star", "--reference", "ROOT/data/0.png", "--teacher-context", "reference")
    refused(zimage, sample.main, sample_words(zimage, *drawn), context)
    refused(zimage, sample.main, sample_words(zimage, "--prompt", "a red star", "--source", "ROOT/data/0.png"),
            ("--source ROOT/data/0.png", "Z-Image", "use a FLUX.2 checkpoint"))
    edits(zimage, "0.png")
    for method in ("dopsd", "sft"):
        refused(zimage, train.main, train_words(zimage, "--method", method),
                ("source images in ROOT/data", "Z-Image", "use a FLUX.2 checkpoint"))


def test_lora_of_the_other_backbone(place, adapter_file, checkpoint):
    words = sample_words(place, "--prompt", "a red star", "--lora")
    refused(place, sample.main, [*words, str(adapter_file)], (str(adapter_file), "LoRA for Z-Image", "model is FLUX.2"))
    shutil.rmtree(place.model)
    shutil.copytree(checkpoint, place.model)
    refused(place, sample.main, [*words, str(place.root / "adapter.safetensors")],
            ("ROOT/adapter.safetensors", "LoRA for FLUX.2", "model is Z-Image"))


# ---------------------------------------------------------------------------------------------------- memory, warnings
def test_weights_must_fit_the_gpu(place, klein, pipeline, monkeypatch, capsys):
    """Before anything is written, and from the larger of the two networks that are in memory one after the other."""
    check, cuda = machine.check_memory, torch.device("cuda")
    count = max(net.num_parameters() for net in (pipeline.transformer, pipeline.text_encoder))
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        need = machine.sampling_gb(sample.Options(), klein, dtype)
        assert need == pytest.approx(count * width / 2 ** 30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (count * width, 2 ** 40))
        check(sample.Options(), klein, cuda, lambda _: need)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (count * width - 1, 2 ** 40))
        with pytest.raises(InputError, match=f"{klein}: needs about .* GB, cuda has .* GB free"):
            check(sample.Options(), klein, cuda, lambda _: need)
    for program, words in ((train, train_words(place)), (sample, sample_words(place, "--prompt", "a red star"))):
        where = machine if program is train else sample
        monkeypatch.setattr(where, "check_memory", lambda cfg, folder, _, needed: check(cfg, folder, cuda, needed))
        refused(place, program.main, words, ("ROOT/model", "GB", "free", "larger machine"))
    monkeypatch.setattr("sys.argv", ["train.py", *train_words(place)])
    with pytest.raises(SystemExit) as caught:
        run_program(train.main)
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1


def test_base_checkpoints_warn_and_go_on(place, capsys):
    for caption in place.data.glob("*.txt"):
        caption.write_text("a [V] star")                                # needs no advice
    assert train.main(train_words(place, "--out", "ROOT/distilled")) == 0
    assert capsys.readouterr().err == ""
    edit_json(place.model / "model_index.json", is_distilled=False)
    assert train.main(train_words(place)) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {place.model}: ") and "is_distilled false" in warning
    assert warning.count("\n") == 1 and (place.run / "student.safetensors").is_file()
