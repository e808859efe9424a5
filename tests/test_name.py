"""--name: the student's file, what its header says to other programs, and that nothing else changes."""
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KLEIN_TOKENS
from diffusers import Flux2KleinPipeline, ZImagePipeline
from PIL import Image
from safetensors import safe_open

import lora
import train
from benchmarks.real_size import KLEIN_4B, KLEIN_9B, Z_CONFIG
from model import Z_IMAGE
from networks.flux2 import KLEIN
from plumbing import lora_files, one_step
from plumbing.files import InputError
from plumbing.train_options import Options
from sample import main as draw

TURBO = "Tongyi-MAI/Z-Image-Turbo"
REAL = {"z-image": ("z_image", Z_IMAGE, Z_CONFIG), "flux.2-klein-4b": ("flux_2_klein_4b", KLEIN, KLEIN_4B),
        "flux.2-klein-9b": ("flux_2_klein_9b", KLEIN, KLEIN_9B)}


def facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def without_metadata(path: Path) -> tuple[dict, bytes]:
    """Names, types, shapes and places of the tensors, and all their bytes."""
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    header.pop("__metadata__")
    return header, content[8 + length:]


def header(backbone, config: dict, captions: tuple[str, ...] = (), **changes) -> dict[str, str]:
    with torch.device("meta"):
        model = backbone.network(config)
    return lora_files.header(Options(["photos"], **{"model": TURBO, "rank": 64, "size": 1024} | changes), model,
                             list(captions))


# ---------------------------------------------------------------------------------------------------- the header
@pytest.mark.quick
@pytest.mark.parametrize("name", REAL)
def test_the_real_models_have_the_names_that_others_use(name):
    """Those of SwarmUI and, with capitals, of musubi-tuner: Z-Image/lora, Flux.2-klein-4b/lora."""
    version, backbone, config = REAL[name]
    found = header(backbone, config)
    assert found["modelspec.architecture"] == f"{name}/lora" and found["ss_base_model_version"] == version


@pytest.mark.quick
def test_all_fields():
    found = header(Z_IMAGE, Z_CONFIG, ("a red ball", "a [V] dog"), name="mydog")
    assert found == {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "z-image/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "mydog", "modelspec.resolution": "1024x1024",
        "modelspec.trigger_phrase": "[V]", "ss_output_name": "mydog", "ss_sd_model_name": TURBO,
        "ss_base_model_version": "z_image", "ss_network_dim": "64", "ss_network_alpha": "64"}
    bare = header(Z_IMAGE, Z_CONFIG, ("a red ball", "a [v] dog", "V"))
    assert "modelspec.trigger_phrase" not in bare and bare["modelspec.title"] == bare["ss_output_name"] == "photos"


@pytest.mark.quick
def test_a_small_model_is_not_taken_for_a_real_one(tmp_path):
    """And a folder's name says nothing of where it is."""
    (tmp_path / "my turbo").mkdir()
    found = header(Z_IMAGE, Z_CONFIG | {"dim": 96, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [16, 16, 16]},
                   model=str(tmp_path / "my turbo"))
    assert found["modelspec.architecture"] == "z-image-96/lora" and found["ss_base_model_version"] == "z_image_96"
    assert found["ss_sd_model_name"] == "my turbo" and str(tmp_path) not in str(found)


# ---------------------------------------------------------------------------------------------------- runs
def test_a_name_changes_the_file_s_name_and_its_metadata(run, tmp_path, capsys):
    plain, named = run("plain", "--steps", 2), run("named", "--steps", 2, "--name", "my dog", "--save-all")
    assert f"done     {named / 'my dog.safetensors'}" in capsys.readouterr().out
    assert {path.name for path in named.glob("*.safetensors")} == {
        "my dog.safetensors", "teacher.safetensors", "state.safetensors"}
    assert {path.name for path in (named / "step_000002").iterdir()} == {"my dog.safetensors", "teacher.safetensors"}
    assert json.loads((named / "config.json").read_text())["options"]["name"] == "my dog"
    assert json.loads((plain / "config.json").read_text())["options"]["name"] == "student"
    for one, other in (("student", "my dog"), ("teacher", "teacher"), ("state", "state")):
        assert without_metadata(plain / f"{one}.safetensors") == without_metadata(named / f"{other}.safetensors")
    ours, teacher = facts(named / "my dog.safetensors"), facts(named / "teacher.safetensors")
    assert {key: ours[key] for key in ("method", "base", "quantize", "step")} == {
        "method": "dopsd", "base": "checkpoint", "quantize": "none", "step": "2"}
    assert ours["modelspec.title"] == "my dog" and teacher["modelspec.title"] == "teacher of my dog"
    assert {key for key in ours if ours[key] != teacher[key]} == set(lora.TITLES)
    assert facts(plain / "student.safetensors") == ours | dict.fromkeys(lora.TITLES, "photos")
    assert (ours["ss_network_dim"], ours["modelspec.resolution"]) == ("3", "32x32")
    assert lora_files.DIFFUSERS_METADATA not in ours and facts(named / "state.safetensors") == {"step": "2"}


def test_the_trigger_is_that_of_the_data_and_not_of_what_is_kept(run, photos, tmp_path):
    """The fixture's captions have no [V]; those that are kept do."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "metadata.jsonl").write_text('{"text": "a [V]"}\n')
    found = facts(run("kept", "--steps", 1, "--keep", tmp_path / "kept") / "student.safetensors")
    assert "modelspec.trigger_phrase" not in found
    (tmp_path / "more").mkdir()
    for path in photos.glob("*.png"):
        (tmp_path / "more" / path.name).symlink_to(path)
    out = run("marked", "--steps", 1, "--data", tmp_path / "more", "--caption", "a [V] dog")
    assert facts(out / "student.safetensors")["modelspec.trigger_phrase"] == "[V]"


def test_resume_keeps_the_name(run, tmp_path):
    whole, out = run("whole", "--steps", 3, "--name", "dog"), run("parts", "--steps", 1, "--name", "dog")
    before = (out / "dog.safetensors").read_bytes()
    for flags, now in (((), "student"), (("--name", "cat"), "cat")):
        with pytest.raises(InputError, match=f"^--resume: --name was dog and is now {now}; give the same value"):
            run("parts", "--steps", 3, "--resume", *flags)
    assert (out / "dog.safetensors").read_bytes() == before
    run("parts", "--steps", 3, "--resume", "--name", "dog")
    for name in ("dog.safetensors", "teacher.safetensors"):
        assert without_metadata(whole / name) == without_metadata(out / name)
        assert facts(whole / name) == facts(out / name)
    assert not (out / "student.safetensors").exists()


def test_a_run_of_an_earlier_version_is_called_student(run):
    """Its config.json says no name: it goes on as it is, and not under another one beside the old file."""
    out = run("old", "--steps", 1)
    config = json.loads((out / "config.json").read_text())
    del config["options"]["name"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="^--resume: --name was student and is now dog"):
        run("old", "--steps", 2, "--resume", "--name", "dog")
    run("old", "--steps", 2, "--resume")
    assert facts(out / "student.safetensors")["step"] == "2"


def test_trained_weights_of_that_name_are_not_overwritten(run):
    out = run("first", "--steps", 1, "--name", "dog", "--method", "sft")
    (out / "state.safetensors").unlink()
    before = (out / "dog.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"^--out .*first: holds another run \(dog.safetensors\); its state"):
        run("first", "--steps", 1, "--name", "dog", "--method", "sft")
    assert (out / "dog.safetensors").read_bytes() == before


def test_the_picture_of_one_step_finds_it(run, tmp_path):
    out = run("taught", "--steps", 1, "--name", "dog")
    assert one_step.main(["--run", str(out), "--out", str(tmp_path / "one.png")]) == 0
    assert Image.open(tmp_path / "one.png").width > 300


# ---------------------------------------------------------------------------------------------------- other programs
@pytest.mark.parametrize("kind", [ZImagePipeline, Flux2KleinPipeline])
def test_diffusers_loads_it_at_full_strength(kind, request, base, tmp_path):
    """The header has nothing that diffusers takes for alpha: its picture is that of sample.py, and not the base's."""
    folder = request.getfixturevalue("checkpoint" if kind is ZImagePipeline else "klein")
    words = [*base[:base.index("--cache")], "--model", str(folder), "--steps", "2", "--name", "dog", "--lr", "0.05"]
    assert train.main([*words, "--out", str(tmp_path / "run")]) == 0
    pictures = {}
    for name, flags in {"base": [], "dog": ["--lora", str(tmp_path / "run" / "dog.safetensors")]}.items():
        draw(["--model", str(folder), "--prompt", "a red star", "--height", "32", "--width", "32", "--device", "cpu",
              "--out", str(tmp_path / f"{name}.png"), *flags])
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "run", weight_name="dog.safetensors")
    more = {} if kind is ZImagePipeline else {"max_sequence_length": KLEIN_TOKENS, "text_encoder_out_layers": (1, 2, 3)}
    theirs = pipeline(prompt="a red star", height=32, width=32, num_inference_steps=4, **more,
                      guidance_scale=0.0 if kind is ZImagePipeline else 1.0,
                      generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(pictures["dog"] - np.asarray(theirs).astype(int)).max() <= 2
    assert np.abs(pictures["dog"] - pictures["base"]).max() > 10
