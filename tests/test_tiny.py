"""The shipped model, tiny/model: what is in the folder, that our loaders and diffusers read it and agree, that training
and inference feed it the same contexts, and that it draws what it is asked for."""
import ast
import json
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors import safe_open
from torch import Tensor

import encoder
import model as transformer
from networks import vae as autoencoder
from plumbing import encoder_files
from plumbing.files import read_json
from model import scheduler_shift
from rollout import sample, sigma_grid
from tiny import contexts, evaluate
from tiny.making.tokenizer import build_tokenizer
from tiny.metrics import told_accuracy
from tiny.world import caption, draw_scenes, other_view, random_tell, to_pil

ROOT = Path(__file__).parents[1]
MODEL, BASE = (ROOT / "tiny" / name for name in ("model", "base"))
WEIGHTS = {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors", "vlm/model.safetensors"}
PROMPTS = ["a big plain red star on the left on mint", "a circle", "a small [V] at the top in ink ruled style"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def features() -> contexts.VlmFeatures:
    return contexts.load_features(MODEL)


@pytest.fixture(scope="module")
def encoders() -> encoder.Encoder:
    return encoder_files.load(MODEL, "cpu", torch.float32, vlm=MODEL / "vlm")


@pytest.fixture(scope="module")
def net() -> transformer.ZImageTransformer:
    return transformer.Z_IMAGE.load(MODEL, "cpu", torch.float32)


@pytest.fixture(scope="module")
def vae() -> autoencoder.Autoencoder:
    return autoencoder.load(MODEL, "cpu")


# -------------------------------------------------------------------------------------------------------- the folder
def test_the_folder_is_small_and_holds_no_pickles():
    found = {path.relative_to(MODEL).as_posix(): path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    assert sum(found.values()) <= 25e6
    assert {name for name in found if name.endswith(".safetensors")} == WEIGHTS
    assert {Path(name).suffix for name in found} <= {".json", ".jinja", ".txt", ".md", ".safetensors"}


def test_model_index_names_what_is_there():
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "ZImagePipeline"
    parts = {name for name in index if not name.startswith("_")}
    assert parts == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert all((MODEL / part).is_dir() for part in parts | {"vlm"})
    assert json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())["shift"] == 10.0


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_all_weights_are_finite_float32(name):
    with safe_open(MODEL / name, "pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.float32 and tensor.isfinite().all(), key


def test_the_vlm_folder_holds_the_vision_tower_only():
    with safe_open(MODEL / "vlm" / "model.safetensors", "pt") as file:
        assert all(key.startswith("model.visual.") for key in file.keys())


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(encoders):
    built = build_tokenizer()
    assert encoders.tokenizer.get_vocab() == built.get_vocab()
    for prompt in (*PROMPTS, "an elephant, 夜"):
        assert encoders.tokenizer(prompt).input_ids == built(prompt).input_ids


def test_the_model_before_distillation_is_the_same_network():
    theirs = json.loads((BASE / "transformer" / "config.json").read_text())
    assert theirs == json.loads((MODEL / "transformer" / "config.json").read_text())
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 6e6
    assert transformer.Z_IMAGE.load(BASE, "cpu", torch.float32)


@pytest.mark.quick
def test_what_is_used_does_not_need_how_it_was_made():
    """No file in tiny/*.py imports from tiny/making, wherever the import stands."""
    files = sorted((ROOT / "tiny").glob("*.py"))
    assert {"world.py", "models.py", "score.py"} <= {path.name for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}:{node.lineno}"
                names = [f"{node.module}.{name}" for name in names]
            found = [name for name in names if f"{name}.".startswith("tiny.making.")]
            assert not found, f"{path.name}:{node.lineno} imports {found}"


# -------------------------------------------------------------------------------------------- the contexts of training
def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest relative error of a context."""
    assert [tuple(c.shape) for c in ours] == [tuple(c.shape) for c in theirs]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs))


def test_training_and_inference_read_the_same_text(features, encoders):
    rows = draw_scenes(6, seeded(0), styled=.5)
    prompts = [*PROMPTS, *(caption(row, concept=concept) for row, concept in zip(rows, ("", "object", "style") * 2))]
    assert worst(features.contexts(prompts), encoders.text_context(prompts)) < 1e-4


def test_training_and_inference_see_the_same_picture(features, encoders, render):
    """Training reads pictures from tensors, inference as 8-bit pictures: rounding them first leaves no difference."""
    rows = draw_scenes(8, seeded(1), styled=.5)
    prompts, pictures = [caption(row, concept="object") for row in rows], render.draw(rows, seeded(8))
    theirs = encoders.image_text_context(prompts, [to_pil(picture) for picture in pictures])
    assert worst(features.contexts(prompts, pictures), theirs) < 1e-2
    rounded = ((pictures + 1) * 127.5).round() / 127.5 - 1
    assert worst(features.contexts(prompts, rounded), theirs) < 1e-4


def test_the_context_of_v_comes_from_its_picture(features, render):
    """The features of the words and of [V] after another view of the same unseen object resemble each other."""
    rows = draw_scenes(64, seeded(2), styled=0.0, held_out="object")
    views = other_view(rows, "object", seeded(3))
    token = features.tokenizer.convert_tokens_to_ids("<V1>")
    prompts = [caption(row, ("size",), "object") for row in rows]
    at = [features.ids(encoder.image_text_prompt(prompt, contexts.IMAGE_TOKENS)).index(token) for prompt in prompts]

    def concept(pictures: Tensor) -> Tensor:
        found = torch.stack([c[i:i + 4] for c, i in zip(features.contexts(prompts, pictures), at)])   # (64, 4, 128)
        return (found / found.square().mean(-1, keepdim=True).sqrt()).flatten(1)

    seen, again = concept(render.draw(rows, seeded(9))), concept(render.draw(views, seeded(10)))
    nearest = torch.cdist(again, seen).argmin(1)
    same = rows[:, (0, 3, 4, 5)][nearest] == rows[:, (0, 3, 4, 5)]
    assert float(same.all(1).float().mean()) > .8


# --------------------------------------------------------------------------------------------------------- pictures
def test_diffusers_draws_the_same_pictures(net, vae, encoders):
    """The folder is a ZImagePipeline: four steps without guidance, from the same noise."""
    pipeline = ZImagePipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(len(PROMPTS), vae.channels, 16, 16, generator=seeded(4))
    theirs = pipeline(list(PROMPTS), height=64, width=64, num_inference_steps=4, guidance_scale=0.0,
                      latents=noise.clone(), output_type="pt").images                  # in [0, 1]; writes into its list
    context = encoders.text_context(PROMPTS)
    sigmas = sigma_grid(scheduler_shift(read_json(MODEL / "scheduler" / "scheduler_config.json")), 4)
    with torch.no_grad():
        ours = vae.decode(sample(lambda x, sigma: net.velocity(x, sigma, context), noise, sigmas))
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-3, rtol=0)


def test_the_autoencoder_keeps_every_attribute(vae, render, reader):
    rows = draw_scenes(48, seeded(5), styled=.5, held_out="object")
    reading = reader(vae.decode(vae.encode(render.draw(rows, seeded(7)))))
    assert float((reading.rows == rows).float().mean()) > .98 and reading.distance.mean() < .06


@pytest.mark.quick
def test_the_shipped_model_draws_what_it_is_asked_for(net, vae, features, reader):
    """A smoke bar, no measurement: 24 prompts have a standard error of about 4 points. tiny.evaluate measures."""
    g = seeded(6)
    rows = draw_scenes(24, g, held_out="object")
    told = [random_tell(g) for _ in rows]
    context = features.contexts([caption(row, tell) for row, tell in zip(rows, told)])
    noise = torch.randn(24, vae.channels, 16, 16, generator=g)
    pictures = evaluate.draw(net, vae, context, noise, steps=4)
    assert pictures.shape == (24, 3, 64, 64)
    reading = reader(pictures)
    assert told_accuracy(reading.rows, rows, told) >= .9 and reading.decided.mean() >= .7
