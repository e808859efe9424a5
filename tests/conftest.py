"""What the tests of the two programs share: a small random checkpoint, training pictures, and ways to run train.py.

The checkpoint has the embedded model's own VAE, text encoder, tokenizer and VLM, and a tiny transformer whose weights
are all random, so that modulation, norms and pad tokens matter. Everything a test finds was made from seeds.
"""
import dataclasses
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from campaign import Campaign, Place, no_endless_run
from diffusers import AutoencoderKLFlux2
from PIL import Image, ImageDraw
from torch import Tensor

import encoder
import lora
import train
from model import ZImageTransformer
from plumbing import encoder_files, files
from plumbing.checkpoints import EMBEDDED
from plumbing.files import ROOT
from rollout import sigma_grid
from tiny.metrics import Reader
from tiny.world import Renderer

TRANSFORMER = {"_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0", "all_patch_size": [2],
               "all_f_patch_size": [1], "in_channels": 8, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
               "n_kv_heads": 2, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 128, "rope_theta": 256.0,
               "t_scale": 1000.0, "axes_dims": [4, 6, 6], "axes_lens": [1024, 64, 64], "siglip_feat_dim": None}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.36.0",
             "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
INDEX = {"_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0",
         "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
         "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
         "transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
KLEIN_INDEX = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0", "is_distilled": True,
               "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
               "text_encoder": ["transformers", "Qwen3ForCausalLM"],
               "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
               "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"]}
KLEIN_TOKENS = 96  # of text contexts: the tokenizer spells the teacher's long prompt with about 80
# What the chat template of Qwen3 does besides, and Flux2KleinPipeline asks for.
NO_THOUGHT = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
CAPTIONS = ("a red star", "a big blue circle on the left", "a small dotted heart", "a green [V] at the top",
            "a plain yellow moon on navy")


def random_transformer(seed: int = 0, **changes) -> ZImageTransformer:
    """Every parameter random with unit gain; a fresh model would have nearly constant norms and pad tokens."""
    model = ZImageTransformer(TRANSFORMER | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name or name == "cap_embedder.0.weight"
            if parameter.ndim == 2 and len(parameter) > 1:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(float(norm) + (0.2 if norm else 0.5) * noise)
    return model


def write_transformer(folder: Path, seed: int = 0, **changes) -> None:
    model = random_transformer(seed, **changes)
    files.write_json(folder / "transformer" / "config.json", TRANSFORMER | changes)
    files.write_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", model.state_dict())


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)            # pytest -n 2: two processes with one thread each, not with two,
    os.environ["OMP_NUM_THREADS"] = "1"  # and so the programs that they start


@pytest.fixture(scope="session", autouse=True)
def cheap_collections():
    """The programs collect garbage between models; unfrozen, all imported libraries would be searched each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def reader() -> Reader:
    """Reads every attribute back from pictures of the tiny models' world."""
    return Reader()


@pytest.fixture(scope="session")
def render(reader) -> Renderer:
    return reader.render


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder, to be read only; `copied` gives one that may be damaged."""
    folder = tmp_path_factory.mktemp("models") / "checkpoint"
    for part in ("vae", "text_encoder", "tokenizer", "vlm"):
        shutil.copytree(EMBEDDED / part, folder / part)
    write_transformer(folder)
    files.write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    files.write_json(folder / "model_index.json", INDEX)
    return folder


@pytest.fixture(scope="session")
def klein(tmp_path_factory) -> Path:
    """A FLUX.2-klein checkpoint, to be read only: two random blocks of each kind, a random VAE of factor 4."""
    import test_flux2  # not at the top, because these import this file
    import test_vae
    folder = tmp_path_factory.mktemp("models") / "klein"
    for part in ("text_encoder", "tokenizer", "vlm"):
        shutil.copytree(EMBEDDED / part, folder / part)
    config = files.read_json(folder / "tokenizer" / "tokenizer_config.json")
    files.write_json(folder / "tokenizer" / "tokenizer_config.json", config | {"model_max_length": KLEIN_TOKENS})
    with open(folder / "tokenizer" / "chat_template.jinja", "a") as template:
        template.write(NO_THOUGHT)
    width = files.read_json(folder / "text_encoder" / "config.json")["hidden_size"]
    transformer = test_flux2.reference(joint_attention_dim=3 * width)
    for name, parameter in transformer.named_parameters():
        if "norm_q" in name or "norm_added_q" in name:
            parameter.mul_(4)  # sharper attention, so that words and references change pictures visibly
    transformer.save_pretrained(folder / "transformer")
    test_vae.random_reference(folder, AutoencoderKLFlux2)
    files.write_json(folder / "scheduler" / "scheduler_config.json", test_flux2.SCHEDULER)
    files.write_json(folder / "model_index.json", KLEIN_INDEX)
    return folder


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory) -> Path:
    """What tiny/making/klein.py makes of the embedded Z-Image: all but a transformer. To be read only."""
    from plumbing.checkpoints import EMBEDDED
    from tiny.making.klein import assemble

    folder = tmp_path_factory.mktemp("models") / "flux2"
    assemble(EMBEDDED, folder, pictures=64)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint without a transformer, and the models of transformers whose weights it holds. To be read only."""
    import test_encoder_files
    return test_encoder_files.make_world(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def both(world) -> encoder.Encoder:
    """Both readers of that checkpoint."""
    return encoder_files.load(world.folder, "cpu", vlm=world.vlm)


@pytest.fixture
def images() -> list[Image.Image]:
    """Four smooth random pictures of different shapes."""
    generator = torch.Generator().manual_seed(1)
    small = [torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy() for _ in range(4)]
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            for pixels, size in zip(small, [(64, 64), (100, 40), (33, 90), (200, 200)])]      # width, height


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def draw_picture(path: Path, size: tuple[int, int], seed: int) -> None:
    """A disc and a bar whose colours and places depend on the seed."""
    colour = [tuple(torch.randint(256, (3,), generator=torch.Generator().manual_seed(10 * seed + i)).tolist())
              for i in range(3)]
    image = Image.new("RGB", size, colour[0])
    pen = ImageDraw.Draw(image)
    pen.ellipse([4 + seed, 3, size[0] // 2 + 4 * seed, size[1] // 2 + 2 * seed], fill=colour[1])
    pen.rectangle([0, size[1] - 8, size[0], size[1] - 5], fill=colour[2])
    image.save(path)


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir(parents=True)
    for i, size in enumerate(sizes):
        draw_picture(folder / f"{i}.png", size, i)
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three square pictures with captions."""
    return write_pictures(tmp_path_factory.mktemp("data") / "photos", [(40, 40)] * 3)


@pytest.fixture(scope="session")
def base(checkpoint, photos, tmp_path_factory) -> list[str]:
    """Arguments of a short run. The features are encoded once for all tests that share them."""
    return ["--data", str(photos), "--model", str(checkpoint), "--device", "cpu", "--size", "32", "--rank", "3",
            "--alpha", "6", "--rollout-steps", "2", "--batch-size", "2", "--sample-every", "0", "--lr", "1e-2",
            "--ema", "0.7", "--loss", "v", "--keep", "none", "--cache", str(tmp_path_factory.mktemp("features"))]


@pytest.fixture
def run(base, tmp_path):
    """run("name", "--steps", 3) trains into tmp_path / "name" and returns that folder; later flags win, also --data."""
    def start(name: str, *flags, status: int = 0) -> Path:
        out = tmp_path / name
        others = base[2:] if "--data" in flags else base                # which adds to what was given before
        assert train.main([*others, "--out", str(out), *map(str, flags)]) == status
        return out
    return start


@pytest.fixture
def prepare(run, monkeypatch):
    """prepare(flags, ...) -> what train.main hands to its loop, which is not run; dataset: of the first task."""
    names = ("cfg", "run", "tasks", "panels", "shift_of")

    def start(*flags) -> SimpleNamespace:
        caught = []
        with monkeypatch.context() as patch:
            patch.setattr(train, "train", lambda *parts: caught.extend(parts) or 0)
            run("prepared", *flags)
        parts = SimpleNamespace(**dict(zip(names, caught, strict=True)))
        parts.model, parts.dataset = parts.run.tuned.model, parts.tasks[0].dataset
        return parts
    return start


def learn(parts: SimpleNamespace, **changes) -> float:
    """Add the gradient of the first batch, as `train` does; returns the loss. changes: of what `bind` gives."""
    given = train.bind(parts.cfg, parts.run.tuned, parts.tasks[0], 0, parts.shift_of)
    value = 0.0
    for loss in train.METHODS[parts.cfg.method](**given | changes):
        loss.backward()
        value += loss.item()
    return value


@pytest.fixture
def filled(prepare):
    """filled(flags, ...) -> parts with a student and a teacher that are not the base, the first batch, its noise."""
    def start(*flags) -> SimpleNamespace:
        parts = prepare(*flags)
        fill_b(parts.run.tuned.theta, seed=1), fill_b(parts.run.tuned.theta_bar, seed=2)
        parts.batch, parts.sigmas = parts.dataset.batch(0), sigma_grid(SCHEDULER["shift"], 2)
        return parts
    return start


def on_each_loss(monkeypatch, change, name: str = "dopsd") -> None:
    """Every loss that a method yields goes through `change` before the loop gets it."""
    method = train.METHODS[name]
    monkeypatch.setitem(train.METHODS, name, dataclasses.replace(
        method, losses=lambda **given: map(change, method.losses(**given))))


@pytest.fixture
def place(tmp_path, checkpoint, photos, adapter_file) -> Place:
    """A checkpoint, data and an adapter that may be damaged."""
    return Place.copies(tmp_path, photos, checkpoint, adapter_file)


@pytest.fixture(scope="session")
def features(tmp_path_factory) -> Path:
    """A cache for runs that are about something else."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def campaign(tmp_path, checkpoint, photos, adapter_file, features, monkeypatch) -> Iterator[Campaign]:
    """campaign(program, damage, flags, end) is one attack, of at most a minute."""
    with no_endless_run():
        yield Campaign(Place.at(tmp_path, photos, checkpoint, adapter_file, features), monkeypatch)


@pytest.fixture(autouse=True)
def interrupts():
    """train.main takes over Ctrl-C; pytest wants it back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def adapter_file(tmp_path_factory) -> Path:
    """A LoRA for the checkpoint that changes its pictures: B is not zero, alpha is not the rank."""
    adapter = lora.create(random_transformer(), rank=3, alpha=6, seed=1)
    fill_b(adapter, seed=2)
    path = tmp_path_factory.mktemp("adapters") / "strong.safetensors"
    lora.save(adapter, path, {"method": "dopsd"})
    return path


def fill_b(adapter: lora.Adapter, seed: int, scale: float = 0.1) -> lora.Adapter:
    """Give the zero matrices of a new adapter random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, B in adapter.weights.values():
            B.copy_(scale * torch.randn(B.shape, generator=generator))
    return adapter


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "gradient_norm")} for line in lines]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def program(name: str) -> list[str]:
    """The first words of a command line that runs a program in a process of its own."""
    return [sys.executable, str(ROOT / name)]
