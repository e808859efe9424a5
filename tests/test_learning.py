"""Both embedded models learn what examples/ shows: train.py from end to end, in fewer and larger steps than its recipe.

Smoke bars; tiny.score and tiny.score_edits measure.
"""
from pathlib import Path

import pytest

import lora
from plumbing import lora_files
import train
from tiny.edits import changed
from tiny.metrics import fidelity
from tiny.score import Judge, concept_of, concept_prompts
from tiny.score_edits import edit_of, of_edits
from tiny.world import draw_marks, draw_scenes, generator

ROOT = Path(__file__).parents[1]
STEPS = 16


def trained(judge: Judge, data: str, model: Path, out: Path) -> lora.Adapter:
    arguments = {"--data": data, "--model": model, "--out": out, "--steps": STEPS, "--lr": 4e-3,
                 "--sample-every": STEPS, "--save-every": STEPS}
    assert train.main([str(word) for pair in arguments.items() for word in pair]) == 0
    return lora_files.load(out / "student.safetensors", judge.net)


@pytest.mark.parametrize("name", ["model", "flux2"])
def test_a_concept(tmp_path, name):
    data, model = str(ROOT / "examples" / "star"), ROOT / "tiny" / name
    judge, g = Judge(model), generator(3, 0)
    kind, concept, _ = concept_of(data, judge.reader)
    prompts, noise = concept_prompts(kind, concept, 24, g), judge.noise(24, g)
    contexts = judge.features.contexts(prompts.captions)
    base, student = (fidelity(judge.reader(judge.draw(contexts, noise, adapter)).rows, prompts.rows, kind)
                     for adapter in (None, trained(judge, data, model, tmp_path / "run")))
    assert base <= .3 and student >= .5, (base, student)


def test_an_edit(tmp_path):
    data, model = str(ROOT / "examples" / "paint"), ROOT / "tiny" / "flux2"
    judge, g = Judge(model), generator(3, 0)
    instruction, concept, _ = edit_of(data, judge)
    sources, marks, noise = draw_scenes(24, g), draw_marks(24, g), judge.noise(24, g)
    targets = changed(sources, concept.expand_as(sources), "paint")
    contexts = judge.features.edits([instruction] * 24, judge.vae.encode(judge.reader.render(sources, marks)))
    base, student = (of_edits(judge.reader(judge.draw(contexts, noise, adapter)), targets, marks, ["paint"] * 24)
                     for adapter in (None, trained(judge, data, model, tmp_path / "run")))
    assert base["changed"] <= .3 and student["changed"] >= .5 and student["kept"] >= .9, (base, student)
