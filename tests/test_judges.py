"""Networks that look at pictures: each score is what transformers says when it is called directly."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from test_encoder import IMAGE_TEMPLATE, ImageProcessor
from transformers import (BitImageProcessorPil, CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Config,
                          Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel, Qwen2VLImageProcessorPil,
                          Qwen3VLForConditionalGeneration)

from plumbing import judges
from plumbing.files import InputError
from plumbing.pictures import crop, to_tensor

CPU = torch.device("cpu"), torch.float32
PROMPTS = ["a red star on mint", "two blue circles", "a red star on mint"]
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    """Pictures of different shapes."""
    folder, generator, found = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(3), []
    for i, size in enumerate([(64, 64), (64, 64), (80, 48)]):
        pixels = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
        found.append(folder / f"{i}.png")
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(found[-1])
    return found


@pytest.fixture(scope="session")
def networks(world, tmp_path_factory) -> dict[str, Path]:
    """Folders of small random networks, as the hub has them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("judges")
    folders = {name: root / name for name in ("clip", "dinov2", "dinov3", "vlm")}
    size, end = len(world.tokenizer), world.tokenizer.eos_token_id
    text = dict(vocab_size=size, max_position_embeddings=12, eos_token_id=end, **SMALL)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(image_size=32, patch_size=8, **SMALL),
                                 projection_dim=16))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)           # a fresh one hardly tells pictures apart
    model.save_pretrained(folders["clip"])
    world.tokenizer.save_pretrained(folders["clip"])
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
                          ).save_pretrained(folders["clip"])
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
                ).save_pretrained(folders["dinov2"])
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
                         ).save_pretrained(folders["dinov2"])
    DINOv3ViTModel(DINOv3ViTConfig(image_size=32, patch_size=16, num_register_tokens=4, **SMALL)
                   ).save_pretrained(folders["dinov3"])
    (folders["dinov3"] / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "DINOv3ViTImageProcessorFast", "do_normalize": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2,
        "rescale_factor": 1 / 255, "size": {"height": 32, "width": 32}}))
    shutil.copytree(world.folder / "whole", folders["vlm"])
    world.tokenizer.save_pretrained(folders["vlm"])
    return folders


# ---------------------------------------------------------------------------------------------------- parity
def test_clip_scores_equal_clips_own(networks, paths, world):
    """logits_per_image of CLIPModel is the cosine times exp(logit_scale)."""
    ours = judges.clip_scores(networks["clip"], paths, PROMPTS, *CPU)
    model = CLIPModel.from_pretrained(networks["clip"]).requires_grad_(False).eval()
    process = CLIPImageProcessorPil.from_pretrained(networks["clip"])
    for score, path, prompt in zip(ours, paths, PROMPTS, strict=True):
        words = world.tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            theirs = model(input_ids=words.input_ids, attention_mask=words.attention_mask,
                           **process(images=Image.open(path), return_tensors="pt")).logits_per_image
        assert float(score) == pytest.approx(float(theirs / model.logit_scale.exp()), abs=1e-5)
    assert len({round(float(score), 4) for score in ours}) == 3


@pytest.mark.parametrize("name, others", [("dinov2", 1), ("dinov3", 5)])
def test_dino_features_are_mean_patch_tokens(networks, paths, name, others):
    """Not of the class, nor of registers. Two pictures' product is the cosine of DINO-D."""
    ours = judges.dino_features(networks[name], paths, *CPU)
    model = {"dinov2": Dinov2Model, "dinov3": DINOv3ViTModel}[name].from_pretrained(networks[name]).eval()
    tokens = []
    for path in paths:
        image = Image.open(path)
        if name == "dinov2":
            process = BitImageProcessorPil.from_pretrained(networks[name])
            pixels = process(images=image, return_tensors="pt").pixel_values
        else:
            image = (to_tensor(image.resize((32, 32), Image.Resampling.BILINEAR)) + 1) / 2
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            pixels = (image - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            tokens.append(model(pixels).last_hidden_state[0, others:].mean(0))
    for i, j in ((0, 1), (0, 2), (1, 1)):
        cosine = float(F.cosine_similarity(tokens[i], tokens[j], dim=0))
        assert float(ours[i] @ ours[j]) == pytest.approx(cosine, abs=1e-5)


def test_answers_equal_transformers_processor_and_model(networks, paths, world):
    """The likeliest token at each place, after the chat that transformers' processor makes of two pictures."""
    question = "are they the same?"
    ours = judges.Asked(networks["vlm"], *CPU)([Image.open(path) for path in paths[:2]], question, 6)
    model = Qwen3VLForConditionalGeneration.from_pretrained(networks["vlm"]).eval()
    processor = ImageProcessor(Qwen2VLImageProcessorPil.from_pretrained(networks["vlm"]), world.tokenizer, None,
                               chat_template=IMAGE_TEMPLATE)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}]}]
    chat = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[chat], images=[Image.open(path) for path in paths[:2]], return_tensors="pt")
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    kinds = inputs.pop("mm_token_type_ids")
    answer = []
    for _ in range(6):                                                  # without a cache of keys and values
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **inputs).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == world.tokenizer.eos_token_id:
            break
        ids, kinds = torch.cat([ids, torch.tensor([answer[-1:]])], 1), F.pad(kinds, (0, 1))
    assert ours == world.tokenizer.decode(answer, skip_special_tokens=True).strip() and ours


# ---------------------------------------------------------------------------------------------------- answers
@pytest.mark.quick
@pytest.mark.parametrize("answer, kind, score", [
    ("same instance", judges.OBJECT, 4), ("Mostly same.", judges.OBJECT, 3),
    ("**different instance**", judges.OBJECT, 1),
    ("partly similar, not the same instance", judges.OBJECT, 2), ("yes", judges.OBJECT, None),
    ("Highly consistent", judges.STYLE, 4), ("not consistent", judges.STYLE, 1), ("same instance", judges.STYLE, None)])
def test_the_first_label_counts(answer, kind, score):
    assert judges.score_of(answer, kind) == score


def test_verdicts_show_the_reference_first(networks, paths, monkeypatch):
    """Cut to the candidate's shape; an answer without a label has no score."""
    seen, answers = [], ["same instance", "who knows"]

    def answer(self, pictures, question, most):
        seen.append((*pictures, question))
        return answers.pop(0)
    monkeypatch.setattr(judges.Asked, "__call__", answer)
    scores = judges.verdicts(networks["vlm"], [(paths[0], paths[2]), (paths[2], paths[1])], judges.OBJECT, "dog", *CPU)
    assert scores[0] == 4 and math.isnan(scores[1])
    assert seen[0][0].tobytes() == crop(Image.open(paths[0]), (48, 80)).tobytes()
    assert seen[0][1].tobytes() == Image.open(paths[2]).tobytes() and seen[1][0].size == (64, 64)
    assert "same instance, mostly same, partly similar, different instance." in seen[0][2] and "dog" in seen[0][2]


@pytest.mark.quick
def test_captions_of_an_answer():
    answer = '1. a [V] on a hill\n- "a [V] at night"\n\n* no name\n2) a [V] on a hill\na [V] in 3 parts\nHere is [V]'
    found = judges.captions_in(answer, "[V]", 4)
    assert found == ["a [V] on a hill", "a [V] at night", "a [V] in 3 parts", "Here is [V]"]
    assert judges.captions_in("3 cats\nmore", "", 1) == ["3 cats"] and judges.captions_in("no", "[V]", 1) == []


def test_written_prompts_keep_the_name(networks, paths, monkeypatch):
    answers = ["a [V] by the sea", "a [V] one\na [V] two", "without it", "a [V] two\nnothing"]
    monkeypatch.setattr(judges.Asked, "__call__", lambda self, pictures, question, most: answers.pop(0))
    pairs = [(paths[0], "a [V] at the sea"), (paths[1], "a [V] in town")]
    rewritten, new = judges.written_prompts(networks["vlm"], pairs, judges.OBJECT, "dog", *CPU)
    assert rewritten == ["a [V] by the sea", "a [V] in town"] and new == ["a [V] one", "a [V] two"]


# ---------------------------------------------------------------------------------------------------- bad networks
def test_networks_that_cannot_be_used(networks, tmp_path):
    for name, kinds, message in (
            ("nowhere/at/all", judges.CLIP, "--clip nowhere/at/all: no such folder; .* measure out: --clip none"),
            (networks["dinov2"], judges.CLIP, "has model_type 'dinov2', expected clip; give another one, or --clip "),
            (tmp_path, judges.CLIP, "no config.json in this folder; .* --clip none")):
        with pytest.raises(InputError, match=message):
            judges.find(str(name), kinds, "--clip")
    assert judges.find(str(networks["dinov3"]), judges.DINO, "--dino") == networks["dinov3"]
    bare = shutil.copytree(networks["clip"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(InputError, match="bare: no .safetensors weights here"):
        judges.find(str(bare), judges.CLIP, "--clip")


def test_missing_weights_are_not_drawn_at_random(networks, tmp_path):
    from safetensors.torch import load_file, save_file
    lacking = shutil.copytree(networks["clip"], tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacking: tensor visual_projection.weight is missing"):
        judges.load(CLIPModel, lacking, *CPU)


# ---------------------------------------------------------------------------------------------------- sharpness
def picture(image: Image.Image) -> torch.Tensor:
    return to_tensor(image)[0]


@pytest.mark.quick
def test_sharpness_has_a_closed_form():
    """Of single white pixels far apart on black: 255 * (4, 1, 1, 1, 1), against 5 times the clipped 4."""
    dots = torch.full((3, 34, 34), -1.0)
    dots[:, 5::8, 5::8] = 1
    assert judges.sharpness(dots) == pytest.approx(math.log2(255 * math.sqrt((16 + 4) / 5) / 4), abs=1e-4)
    faint = torch.full((3, 34, 34), -1.0)
    faint[:, 5::8, 5::8] += 2 / 255                                     # one grey level: nothing is clipped
    assert judges.sharpness(faint) == pytest.approx(0, abs=1e-4)


@pytest.mark.quick
def test_blur_is_less_sharp(render):
    """Monotone in the radius, on drawn scenes."""
    from tiny.world import draw_scenes, generator
    g = generator(7, 0)
    for scene in render.draw(draw_scenes(4, g), g):
        image = Image.fromarray(((scene / 2 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
        values = [judges.sharpness(picture(image.filter(ImageFilter.GaussianBlur(radius)) if radius else image))
                  for radius in (0, 0.5, 1, 2)]
        assert values == sorted(values, reverse=True) and values[0] - values[2] > 1


@pytest.mark.quick
def test_pixel_change_is_of_the_range():
    black, white = torch.full((3, 8, 8), -1.0), torch.ones(3, 8, 8)
    assert judges.pixel_change(black, white) == 1 and judges.pixel_change(black, black) == 0
    assert judges.pixel_change(torch.zeros(3, 8, 8), white) == 0.5
