"""The shipped FLUX.2-klein, tiny/flux2: what is in the folder, that diffusers draws the same with it, and that it
draws, copies and edits what it is asked for."""
import json
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors import safe_open
from test_tiny import PROMPTS, WEIGHTS

from encoder import reference_prompt
from networks import flux2
from tiny.contexts import TOKENS
from tiny.edits import Edits, instruction
from tiny.making import klein
from tiny.metrics import accuracy, told_accuracy
from tiny.score import Judge
from tiny.score_edits import of_edits
from tiny.world import OBJECT_ATTRIBUTES, caption, draw_marks, draw_scenes, generator, other_view, random_tell, to_pil

MODEL, BASE = (Path(__file__).parents[1] / "tiny" / name for name in ("flux2", "flux2_base"))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(MODEL)


# -------------------------------------------------------------------------------------------------------- the folder
def test_the_folder_is_small_and_holds_no_pickles():
    found = {path.relative_to(MODEL).as_posix(): path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    assert sum(found.values()) <= 25e6
    assert {name for name in found if name.endswith(".safetensors")} == WEIGHTS
    assert {Path(name).suffix for name in found} <= {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_all_weights_are_finite(name):
    with safe_open(MODEL / name, "pt") as file:
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "vlm/model.safetensors", "tokenizer/tokenizer.json",
                                  "model_index.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_all_but_the_transformer_comes_from_klein_py(tiny_klein, name):
    assert (MODEL / name).read_bytes() == (tiny_klein / name).read_bytes()


def test_the_model_before_distillation_is_the_same_network():
    configs = [json.loads((folder / "transformer" / "config.json").read_text()) for folder in (MODEL, BASE)]
    assert configs[0] == configs[1] == klein.CONFIG
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 6e6
    assert flux2.KLEIN.load(BASE, "cpu", torch.float32)


# ---------------------------------------------------------------------------------------------------------- pictures
def test_diffusers_draws_the_same_pictures(judge):
    """The folder is a Flux2KleinPipeline: four steps, with and without a picture to edit, from the same noise."""
    pipeline = Flux2KleinPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    g = generator(4, 0)
    source = judge.reader.render.draw(draw_scenes(1, g), g)
    rounded = ((source + 1) * 127.5).round() / 127.5 - 1                           # what an 8-bit picture holds
    noise = judge.noise(1, g)
    for prompt, image in ((PROMPTS[0], None), ("move it to the left", to_pil(source[0]))):
        context = (judge.features.contexts([prompt]) if image is None
                   else judge.features.edits([prompt], judge.vae.encode(rounded)))
        theirs = pipeline(prompt=prompt, image=image, height=64, width=64, num_inference_steps=4, guidance_scale=1.0,
                          latents=flux2.to_tokens(noise).transpose(1, 2).unflatten(2, (8, 8)),
                          max_sequence_length=TOKENS, text_encoder_out_layers=(1, 2, 3), output_type="pt").images
        ours = judge.draw(context, noise)
        torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-3, rtol=0)


def test_it_draws_what_it_is_asked_for(judge):
    """A smoke bar like the next ones, no measurement: tiny.evaluate and tiny.score_edits measure."""
    g = generator(6, 0)
    rows = draw_scenes(24, g, held_out="object")
    told = [random_tell(g) for _ in rows]
    reading = judge.reader(judge.draw(judge.features.contexts([caption(row, tell) for row, tell in zip(rows, told)]),
                                      judge.noise(24, g)))
    assert told_accuracy(reading.rows, rows, told) >= .9 and reading.decided.mean() >= .7


def test_it_takes_a_concept_from_a_reference_picture(judge):
    g = generator(7, 0)
    rows = draw_scenes(24, g, held_out="object", styled=0.0)
    shown = judge.reader.render.draw(other_view(rows, "object", g), g)
    prompts, noise = [caption(row, concept="object") for row in rows], judge.noise(24, g)
    with_picture, without = (accuracy(judge.reader(judge.draw(context, noise)).rows, rows, OBJECT_ATTRIBUTES)["mean"]
                             for context in (judge.features.contexts(prompts, shown), judge.features.contexts(prompts)))
    assert with_picture >= .85 and without <= .5


def test_it_edits(judge):
    g = generator(8, 0)
    edits = Edits(24, ("place", "size", "backdrop", "paint"), g, held_out="object")
    marks, noise = draw_marks(24, g), judge.noise(24, g)
    z = judge.vae.encode(judge.reader.render(edits.sources, marks))
    prompts = [instruction(row, change) for row, change in zip(edits.targets, edits.changes)]
    scores = of_edits(judge.reader(judge.draw(judge.features.edits(prompts, z), noise)), edits.targets, marks,
                      edits.changes)
    assert scores["changed"] >= .8 and scores["kept"] >= .9 and scores["marks"] >= .7


def test_the_last_reference_shows_what_v_is(judge):
    """The teacher of an edit: "paint it [V]", a picture to paint, and a picture that has the paint."""
    g = generator(9, 0)
    edits = Edits(24, ("paint",), g, held_out="object")
    marks, noise = draw_marks(24, g), judge.noise(24, g)
    z, shown = (judge.vae.encode(judge.reader.render(rows, cells))
                for rows, cells in ((edits.sources, marks), (edits.shown, draw_marks(24, g))))
    context = judge.features.edits([reference_prompt("paint it [V]", 1)] * 24, z, shown)
    scores = of_edits(judge.reader(judge.draw(context, noise)), edits.targets, marks, edits.changes)
    assert scores["changed"] >= .8 and scores["kept"] >= .9
