"""What is known of a checkpoint from its folder's small files: kind of transformer, recipe, shapes, noise, grid."""
import dataclasses
import shutil

import pytest
import torch
from conftest import SCHEDULER, write_transformer

from model import Z_IMAGE
from networks.flux2 import KLEIN
from plumbing import checkpoints, files
from plumbing.backbone import Backbone
from plumbing.files import InputError
from plumbing.recipes import SMALL, TURBO, fill, vlm_of

pytestmark = pytest.mark.quick
FLUX2 = checkpoints.EMBEDDED.parent / "flux2"


@pytest.mark.parametrize("folder, backbone, multiple, shape", [(checkpoints.EMBEDDED, Z_IMAGE, 8, (8, 16, 24)),
                                                               (FLUX2, KLEIN, 8, (8, 16, 24))])
def test_the_embedded_checkpoints(folder, backbone, multiple, shape):
    assert checkpoints.backbone_of(folder) is backbone and checkpoints.recipe_of(folder) is backbone.recipes[1]
    assert checkpoints.pixels_per_patch(folder) == multiple
    assert checkpoints.latent_shape(folder, 64, 96) == shape
    noise = checkpoints.starting_noise(backbone, 5, shape)
    assert noise.shape == (1, *shape) and noise.dtype == torch.float32
    assert torch.equal(noise, checkpoints.starting_noise(backbone, 5, shape))
    assert not torch.equal(noise, checkpoints.starting_noise(backbone, 6, shape))
    skeleton = backbone.check(folder)
    assert isinstance(skeleton, backbone.network) and all(p.is_meta for p in skeleton.parameters())
    assert checkpoints.model_folder("embedded") == checkpoints.EMBEDDED


@pytest.mark.parametrize("height, width, message", [(60, 64, "^--height 60: .* multiple of 8, .* try 64$"),
                                                    (64, 3, "^--width 3: .* try 8$"), (0, 64, "^--height 0: ")])
def test_sides_must_be_divisible(height, width, message):
    with pytest.raises(InputError, match=message):
        checkpoints.latent_shape(checkpoints.EMBEDDED, height, width)


def test_a_new_backbone_is_one_record(tmp_path, monkeypatch):
    write_transformer(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    files.write_json(config, files.read_json(config) | {"_class_name": "NewTransformer"})
    files.write_json(tmp_path / "scheduler" / "scheduler_config.json", SCHEDULER)
    with pytest.raises(InputError, match="_class_name NewTransformer is not supported"):
        checkpoints.backbone_of(tmp_path)
    new = dataclasses.replace(Z_IMAGE, name="New", class_name="NewTransformer",
                              time_shift=lambda config, steps, height, width: config["shift"] + steps + height / width)
    monkeypatch.setattr(checkpoints, "BACKBONES", (*checkpoints.BACKBONES, new))
    found = checkpoints.backbone_of(tmp_path)
    assert isinstance(found, Backbone) and found is new and checkpoints.recipe_of(tmp_path) is SMALL
    assert checkpoints.shift_rule(tmp_path)(4, 6, 3) == SCHEDULER["shift"] + 4 + 2
    model = found.load(tmp_path, "cpu", torch.bfloat16)
    assert not model.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())


def test_wide_transformers_get_the_official_recipe(tmp_path):
    shutil.copytree(checkpoints.EMBEDDED / "transformer", tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    for width, recipe in ((3840, TURBO), (checkpoints.REAL_WIDTH, TURBO), (checkpoints.REAL_WIDTH - 1, SMALL)):
        files.write_json(config, files.read_json(config) | {"dim": width})
        assert checkpoints.recipe_of(tmp_path) is recipe


def test_a_recipe_fills_what_was_left_out(tmp_path):
    @dataclasses.dataclass
    class Options:
        steps: int | None = None
        lr: float | None = 0.5
        vlm: str | None = None
        name: str = "mine"

    assert fill(Options(), TURBO) == Options(2000, 0.5, None, "mine")
    assert vlm_of(tmp_path, TURBO, None) == "Qwen/Qwen3-VL-4B-Instruct"
    assert vlm_of(tmp_path, SMALL, None) == str(tmp_path / "vlm") and vlm_of(tmp_path, SMALL, "other") == "other"
