"""encoder.py against diffusers' pipelines (f_text) and transformers' Qwen3-VL (f_mm), on a small random model."""
import gc
import inspect
import json
import shutil
import weakref
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import encoder
from networks.flux2 import KLEIN
from plumbing import encoder_files
from plumbing.files import InputError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PROMPTS = ["a red star", "ein großes Haus mit 3 Bäumen, 夜", "[V] in the snow  ", "a big blue blob on the left on mint"]
SIZES = [(64, 64), (100, 40), (33, 90), (200, 200)]  # width, height
NO_THOUGHT = "<think>\n\n</think>\n\n"
# What the checkpoints' own chat templates (Qwen3, Qwen3-VL) do for one user message.
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}")
IMAGE_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@dataclass
class World:
    """A checkpoint folder and the reference models whose weights it holds."""
    folder: Path
    vlm: Path
    tokenizer: PreTrainedTokenizerFast
    text: Qwen3ForCausalLM
    teacher: Qwen3VLForConditionalGeneration


def language_config(vocabulary: int, **extra) -> dict:
    return dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, initializer_range=0.2, max_position_embeddings=2048, **extra)


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(PROMPTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2],
                                   padding_side="right", chat_template=TEXT_TEMPLATE)


def write_preprocessor(folder: Path) -> None:
    content = {"size": {"shortest_edge": 4096, "longest_edge": 4096}, "patch_size": 8, "temporal_patch_size": 2,
               "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor",
               "image_processor_type": "Qwen2VLImageProcessorFast"}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')
    size = len(tokenizer)
    text = Qwen3ForCausalLM(Qwen3Config(**language_config(size, tie_word_embeddings=True),
                                        rope_parameters={"rope_type": "default", "rope_theta": 1e3})).eval()
    text.save_pretrained(folder / "text_encoder")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        text_config=language_config(size, rope_parameters=rope),
        vision_config=dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, out_hidden_size=32,
                           num_position_embeddings=64, deepstack_visual_indexes=[0, 1], initializer_range=0.2),
        image_token_id=ids["<|image_pad|>"], video_token_id=size + 1, vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"])
    teacher = Qwen3VLForConditionalGeneration(config).eval()
    teacher.save_pretrained(folder / "whole")  # all of the VLM, with a language model of its own
    teacher.model.language_model.load_state_dict(text.model.state_dict())
    vlm = folder / "vlm"
    vlm.mkdir()
    config.save_pretrained(vlm)
    visual = {f"model.visual.{name}": tensor for name, tensor in teacher.model.visual.state_dict().items()}
    save_file(visual, vlm / "model.safetensors")
    write_preprocessor(vlm)
    write_preprocessor(folder / "whole")
    return World(folder, vlm, tokenizer, text, teacher)


@pytest.fixture(scope="session")
def both(world) -> encoder.Encoder:
    return encoder_files.load(world.folder, "cpu", vlm=world.vlm)


@pytest.fixture(scope="session")
def klein(world) -> encoder.Encoder:
    return encoder_files.load(world.folder, "cpu", vlm=world.vlm, style=KLEIN.text_style)


@pytest.fixture(scope="session")
def short_klein(world, tmp_path_factory) -> encoder.Encoder:
    """Its tokenizer takes 64 tokens, as that of a small model does."""
    copy = copied_checkpoint(world, tmp_path_factory.mktemp("short"))
    change_json(copy / "tokenizer" / "tokenizer_config.json", model_max_length=64)
    return encoder_files.load(copy, "cpu", vlm=world.vlm, style=KLEIN.text_style)


def copied_checkpoint(world: World, folder: Path) -> Path:
    return shutil.copytree(world.folder, folder / "copy", ignore=shutil.ignore_patterns("vlm", "whole"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def images() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    small = [torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy() for _ in SIZES]
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels, size in zip(small, SIZES)]


def pipeline_context(world: World, prompts: list[str]) -> list[torch.Tensor]:
    pipeline = ZImagePipeline(None, None, world.text, world.tokenizer, None)
    with torch.no_grad():
        return pipeline.encode_prompt(list(prompts), "cpu", do_classifier_free_guidance=False)[0]


def klein_context(world: World, prompts: list[str], length: int = 512) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(Flux2KleinPipeline._get_qwen3_prompt_embeds(
            world.text, world.tokenizer, prompts, max_sequence_length=length, hidden_states_layers=(1, 2, 3)))


class ImageProcessor(Qwen3VLProcessor):
    """transformers' processor without its video half, which insists on torchvision."""
    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def read_with_qwen3_vl(world: World, prompt: str, image: Image.Image, pixels: tuple[int, int] = (4096, 4096),
                       thought: str = "", **padding) -> tuple[torch.Tensor, ...]:
    """All hidden states of one chat, by transformers' processor and model."""
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                                               min_pixels=pixels[0], max_pixels=pixels[1])
    processor = ImageProcessor(image_processor, world.tokenizer, None, chat_template=IMAGE_TEMPLATE)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    chat = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + thought
    inputs = processor(text=[chat], images=[image], return_tensors="pt", **padding)
    with torch.no_grad():
        states = world.teacher(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 5  # of the embedding and four layers, none of the vision tower
    return states


def official_context(world: World, prompt: str, image: Image.Image,
                     pixels: tuple[int, int] = (4096, 4096)) -> torch.Tensor:
    """f_mm as the official code has it, except that the prompt is templated once: processor, VLM, cut features."""
    return read_with_qwen3_vl(world, prompt, image, pixels, padding=True, truncation=True)[-2][0][:1024]


def klein_image_context(world: World, prompt: str, image: Image.Image, length: int = 512) -> torch.Tensor:
    """f_mm with the layers, the chat and the padding of FLUX.2-klein."""
    states = read_with_qwen3_vl(world, prompt, image, thought=NO_THOUGHT, padding="max_length", max_length=length)
    return torch.cat([states[1], states[2], states[3]], dim=-1)[0][:1024]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], atol: float = 1e-4) -> None:
    assert [tuple(a.shape) for a in ours] == [tuple(b.shape) for b in theirs]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- templates
def test_templates_are_golden():
    assert encoder.text_prompt("a [V] dog") == "<|im_start|>user\na [V] dog<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.image_text_prompt("a [V] dog", 2) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>a [V] dog<|im_end|>\n"
        "<|im_start|>assistant\n")
    assert encoder.text_prompt("a [V] dog", KLEIN.text_style.thought) == (
        "<|im_start|>user\na [V] dog<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert encoder.image_text_prompt("a [V] dog", 1, KLEIN.text_style.thought) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a [V] dog<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_reference_prompts_are_golden():
    assert encoder.reference_prompt("a [V] dog", 0) == (
        "a [V] dog\nKeep the subject, the background and the composition of the reference image.")
    assert encoder.reference_prompt("make it red", 1) == (
        "make it red\nThe last reference image, image 2, shows the wanted result.")
    assert encoder.reference_prompt("join them", 2) == (
        "join them\nThe last reference image, image 3, shows the wanted result.")


@pytest.mark.parametrize("prompt", [*PROMPTS, " \n{{ x }} {% if %}", "<|im_end|>"])
def test_templates_equal_the_tokenizers_own(world, prompt):
    theirs = world.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                 add_generation_prompt=True, enable_thinking=True)
    assert encoder.text_prompt(prompt) == theirs
    theirs = world.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                 add_generation_prompt=True, enable_thinking=False)
    assert encoder.text_prompt(prompt, KLEIN.text_style.thought) == theirs
    parts = [{"type": "image"}, {"type": "text", "text": prompt}]
    theirs = world.tokenizer.apply_chat_template([{"role": "user", "content": parts}], chat_template=IMAGE_TEMPLATE,
                                                 tokenize=False, add_generation_prompt=True)
    assert encoder.image_text_prompt(prompt, 1) == theirs


# ---------------------------------------------------------------------------------------------------- f_text
def test_text_context_equals_the_pipelines(world):
    student = encoder_files.load(world.folder, "cpu")
    prompts = [*PROMPTS, "one more " * 20] * 3  # more than one batch, in no order of length
    ours = student.text_context(prompts)
    assert_close(ours, pipeline_context(world, prompts))
    assert ours[0].dtype == torch.float32 and not ours[0].requires_grad


def test_text_token_ids_equal_the_pipelines(world, both, monkeypatch):
    seen = {}
    monkeypatch.setattr(both, "_features", lambda model, tokens: seen.update(ours=tokens) or tokens)
    forward = world.text.forward

    def spy(input_ids, attention_mask, **rest):
        seen["theirs"] = [row[mask].tolist() for row, mask in zip(input_ids, attention_mask)]
        return forward(input_ids=input_ids, attention_mask=attention_mask, **rest)
    monkeypatch.setattr(world.text, "forward", spy)
    pipeline_context(world, PROMPTS)
    assert both.text_context(PROMPTS) == seen["theirs"]


def test_long_prompt_is_cut_as_in_the_pipeline(world, both):
    prompts = ["word " * 400, "short"]
    with pytest.warns(UserWarning, match="only the first 512"):
        ours = both.text_context(prompts)
    assert len(ours[0]) == 512
    assert_close(ours, pipeline_context(world, prompts))


def test_klein_takes_the_layers_of_the_pipeline():
    signature = inspect.signature(Flux2KleinPipeline._get_qwen3_prompt_embeds)
    assert KLEIN.text_style.layers(36) == signature.parameters["hidden_states_layers"].default == (9, 18, 27)
    assert KLEIN.text_style.layers(4) == (1, 2, 3)


def test_kleins_text_context_equals_the_pipelines(world, klein):
    prompts = [*PROMPTS, "one more " * 20, "padding <|endoftext|> inside", "word " * 80] * 2  # more than one batch
    ours = klein.text_context(prompts)
    assert_close(ours, klein_context(world, prompts), atol=1e-5)
    assert {tuple(context.shape) for context in ours} == {(512, 3 * 32)} and not ours[0].requires_grad


def test_long_prompt_is_cut_as_in_kleins_pipeline(world, klein):
    prompts = ["word " * 400, "short"]
    with pytest.warns(UserWarning, match="only the first 512"):
        ours = klein.text_context(prompts)
    assert_close(ours, klein_context(world, prompts), atol=1e-5)


def test_klein_pads_to_a_smaller_limit_of_the_tokenizer(world, short_klein, images):
    assert_close(short_klein.text_context(PROMPTS[:2]), klein_context(world, PROMPTS[:2], length=64), atol=1e-5)
    long = "word " * 20
    with pytest.warns(UserWarning, match="only the first 64"):
        ours = short_klein.text_context([long])
    assert_close(ours, klein_context(world, [long], length=64), atol=1e-5)
    ours = short_klein.image_text_context(["a", long], images[:2])
    assert len(ours[0]) == 64 < len(ours[1])
    theirs = [klein_image_context(world, prompt, image, 64) for prompt, image in zip(["a", long], images)]
    assert_close(ours, theirs, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- f_mm
def test_image_text_context_equals_qwen3_vl(world, both, images):
    ours = both.image_text_context(PROMPTS, images)  # one batch of different grids and lengths
    assert_close(ours, [official_context(world, prompt, image) for prompt, image in zip(PROMPTS, images)])
    assert len({len(context) for context in ours}) > 1 and not ours[0].requires_grad


def test_kleins_image_text_context_equals_qwen3_vl(world, klein, images):
    prompts = [*PROMPTS[:3], "word " * 150]
    ours = klein.image_text_context(prompts, images)  # one batch; the short ones are padded beyond what they keep
    assert [len(context) for context in ours[:3]] == [512] * 3 and 512 < len(ours[3]) < 1024
    assert_close(ours, [klein_image_context(world, prompt, image) for prompt, image in zip(prompts, images)], atol=1e-5)


def test_image_text_context_in_several_batches(both, images):
    one_by_one = [both.image_text_context([prompt], [image])[0] for prompt, image in zip(PROMPTS, images)]
    assert_close(both.image_text_context(PROMPTS * 3, images * 3), one_by_one * 3)


def test_context_depends_on_the_image(both):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first, second = both.image_text_context(PROMPTS[:1] * 2, [red, blue])
    assert (first[-5:] - second[-5:]).abs().max() > 1e-2  # the text behind the image has seen it


def test_image_pixels_replace_the_folders_limits(world, images):
    ours = encoder_files.load(world.folder, "cpu", vlm=world.vlm, image_pixels=(32 * 32, 80 * 80))
    contexts = ours.image_text_context(PROMPTS, images)
    assert_close(contexts, [official_context(world, prompt, image, pixels=(32 * 32, 80 * 80))
                            for prompt, image in zip(PROMPTS, images)])


def test_official_limits_of_the_real_model(world, both):
    processor = encoder_files._image_processor(world.vlm, both.vlm.config, (512 * 512, 768 * 768))
    processor.patch_size = 16  # as in Qwen3-VL-4B
    sizes = [(1024, 1024), (1344, 576), (720, 1280), (64, 64)]
    grids = processor(images=[Image.new("RGB", size) for size in sizes], return_tensors="pt")["image_grid_thw"]
    assert grids.tolist() == [[1, 48, 48], [1, 30, 72], [1, 64, 36], [1, 32, 32]]


def test_long_prompt_beside_an_image_is_cut_behind(world, both, images):
    prompt = "word " * 400
    with pytest.warns(UserWarning, match="only the first 1024"):
        ours = both.image_text_context([prompt], images[:1])
    assert len(ours[0]) == 1024
    assert_close(ours, [official_context(world, prompt, images[0])])


def test_long_prompt_beside_kleins_image_is_cut_behind(world, klein, images):
    prompt = "word " * 400
    with pytest.warns(UserWarning, match="only the first 1024"):
        ours = klein.image_text_context([prompt], images[:1])
    assert len(ours[0]) == 1024
    assert_close(ours, [klein_image_context(world, prompt, images[0])], atol=1e-5)


def test_teacher_rope_of_klein(world, klein):
    same = encoder_files.load(world.folder, "cpu", vlm=world.vlm, teacher_rope="text", style=KLEIN.text_style)
    tokens = [world.tokenizer(encoder.text_prompt(prompt, NO_THOUGHT)).input_ids for prompt in PROMPTS]
    with torch.no_grad():
        assert_close(same._features(same.vlm.language_model, tokens), klein.text_context(PROMPTS))


def test_teacher_rope(world, both):
    tokens = [world.tokenizer(encoder.text_prompt(prompt)).input_ids for prompt in PROMPTS]
    student = both.text_context(PROMPTS)
    same = encoder_files.load(world.folder, "cpu", vlm=world.vlm, teacher_rope="text")
    with torch.no_grad():
        assert_close(same._features(same.vlm.language_model, tokens), student)
        official = both._features(both.vlm.language_model, tokens)
    assert max((a - b).abs().max() for a, b in zip(official, student)) > 1e-2
    assert both.vlm.config.text_config.rope_parameters["rope_theta"] == 1e4


# ---------------------------------------------------------------------------------------------------- loading
def test_language_model_is_held_once_and_frozen(both):
    student, teacher = dict(both.text.named_parameters()), dict(both.vlm.language_model.named_parameters())
    assert student.keys() == teacher.keys()
    assert all(student[name] is teacher[name] and not teacher[name].requires_grad for name in student)
    assert not any(tensor.is_meta for tensor in [*both.vlm.parameters(), *both.vlm.buffers(), *both.text.buffers()])


def test_del_frees_the_weights(world):
    loaded = encoder_files.load(world.folder, "cpu", vlm=world.vlm)
    kept = weakref.ref(loaded.text.embed_tokens.weight)
    del loaded
    gc.collect()
    assert kept() is None


def test_bfloat16_keeps_rotary_tables_in_float32(world, images):
    half = encoder_files.load(world.folder, "cpu", torch.bfloat16, vlm=world.vlm)
    assert half.text_context(PROMPTS[:1])[0].dtype == torch.bfloat16
    assert half.image_text_context(PROMPTS[:1], images[:1])[0].dtype == torch.bfloat16
    assert {buffer.dtype for buffer in [*half.text.buffers(), *half.vlm.buffers()]} == {torch.float32}


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_other_shards_of_the_vlm_are_never_opened(world, both, images, tmp_path, prefix):
    sharded_vlm(world, tmp_path, prefix)
    (tmp_path / "language.safetensors").write_bytes(b"poison")
    ours = encoder_files.load(world.folder, "cpu", vlm=tmp_path).image_text_context(PROMPTS, images)
    assert_close(ours, both.image_text_context(PROMPTS, images))
    (tmp_path / "language.safetensors").unlink()
    encoder_files.load(world.folder, "cpu", vlm=tmp_path)


def test_whole_vlm_in_one_file_keeps_its_language_model_out(world, both, images):
    whole = encoder_files.load(world.folder, "cpu", vlm=world.folder / "whole")
    assert_close(whole.image_text_context(PROMPTS, images), both.image_text_context(PROMPTS, images))


def test_text_encoder_without_prefix_and_with_head(world, both, tmp_path):
    copy = copied_checkpoint(world, tmp_path)
    weights = {name.removeprefix("model."): tensor for name, tensor in
               load_file(copy / "text_encoder" / "model.safetensors").items()}
    save_file({**weights, "lm_head.weight": torch.zeros(3, 3)}, copy / "text_encoder" / "model.safetensors")
    assert_close(encoder_files.load(copy, "cpu").text_context(PROMPTS), both.text_context(PROMPTS))


def sharded_vlm(world: World, folder: Path, prefix: str = "model.visual.") -> None:
    """A VLM in the hub's layout: language model and vision tower in shards of their own, an index, other files."""
    visual = {prefix + name: tensor for name, tensor in world.teacher.model.visual.state_dict().items()}
    save_file(visual, folder / "vision.safetensors")
    save_file({"model.language_model.norm.weight": torch.zeros(1)}, folder / "language.safetensors")
    weight_map = {**{name: "vision.safetensors" for name in visual},
                  "model.language_model.norm.weight": "language.safetensors", "lm_head.weight": "language.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(world.vlm / "config.json", folder)
    write_preprocessor(folder)
    (folder / "merges.txt").write_text("not needed")


def fake_hub(monkeypatch, remote: Path, cache: Path) -> None:
    def snapshot_download(name, allow_patterns=None):
        cache.mkdir(exist_ok=True)
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns or ["*"]):
                shutil.copy(file, cache)
        return str(cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_hub_gives_only_what_vision_needs(world, monkeypatch, tmp_path):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()
    sharded_vlm(world, remote)
    fake_hub(monkeypatch, remote, cache)
    encoder_files.load(world.folder, "cpu", vlm="Qwen/Qwen3-VL-4B-Instruct")
    assert {file.name for file in cache.iterdir()} == {"config.json", "preprocessor_config.json", "vision.safetensors",
                                                       "model.safetensors.index.json"}


def test_hub_repository_of_one_file(world, monkeypatch, tmp_path):
    fake_hub(monkeypatch, world.vlm, tmp_path / "cache")
    encoder_files.load(world.folder, "cpu", vlm="owner/tiny")
    assert (tmp_path / "cache" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------- bad input
def fails(message: str, call, *arguments, **options) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_bad_prompts_and_images(world, both, images):
    fails("prompt 2 of 2: empty", both.text_context, ["a", " \n"])
    fails("prompt 1 of 1: empty", both.image_text_context, [""], images[:1])
    fails("contains <|image_pad|>".replace("|", r"\|"), both.image_text_context, ["a <|image_pad|>"], images[:1])
    fails("aspect ratio", both.image_text_context, ["a"], [Image.new("RGB", (2010, 10))])
    fails("--vlm: not given", encoder_files.load(world.folder, "cpu").image_text_context, ["a"], images[:1])
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        both.image_text_context(["a", "b"], images[:1])


def test_image_that_fills_the_context(world):
    large = encoder_files.load(world.folder, "cpu", vlm=world.vlm, image_pixels=(4096, 10 ** 6))
    with pytest.warns(UserWarning):
        fails("image of 600x600 pixels: 1444 image tokens", large.image_text_context, ["a"],
              [Image.new("RGB", (600, 600))])


def test_bad_vlm_folders(world, monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)

    def load(vlm, **options):
        encoder_files.load(world.folder, "cpu", vlm=vlm, **options)
    fails("/nowhere/at/all: no such folder", load, "/nowhere/at/all")
    fails("owner/vlm: not a local folder, and the hub did not give it .no route.", load, "owner/vlm")
    fails("no config.json", load, tmp_path)
    fails("model_type 'qwen3', expected 'qwen3_vl'", load, world.folder / "text_encoder")
    fails("teacher_rope: 'both'", load, world.vlm, teacher_rope="both")
    shutil.copy(world.vlm / "config.json", tmp_path)
    fails("preprocessor_config.json: no such file", load, tmp_path)
    write_preprocessor(tmp_path)
    fails("no .safetensors", load, tmp_path)
    save_file({"model.language_model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    fails("no vision tensors", load, tmp_path)


@pytest.mark.parametrize("section, key, value, message", [
    ("text_config", "hidden_size", 64, "hidden_size 64, the checkpoint's text encoder 32"),
    ("text_config", "num_hidden_layers", 5, "num_hidden_layers 5, the checkpoint's text encoder 4"),
    ("vision_config", "out_hidden_size", 48, "out_hidden_size 48, text encoder's hidden_size 32"),
    ("vision_config", "patch_size", 4, "preprocessor_config.json: patch_size 8, config.json asks for 4"),
    (None, "image_token_id", 7, r"<\|image_pad\|> has id 7 here, 5 in the checkpoint's tokenizer"),
])
def test_vlm_of_another_model(world, tmp_path, section, key, value, message):
    vlm = shutil.copytree(world.vlm, tmp_path / "vlm")
    content = json.loads((vlm / "config.json").read_text())
    (content[section] if section else content)[key] = value
    (vlm / "config.json").write_text(json.dumps(content))
    fails(message, encoder_files.load, world.folder, "cpu", vlm=vlm)


def test_bad_checkpoint_folders(world, tmp_path):
    copy = copied_checkpoint(world, tmp_path)
    (copy / "text_encoder" / "config.json").rename(tmp_path / "config.json")
    fails("text_encoder.config.json: no such file", encoder_files.load, copy, "cpu")
    (tmp_path / "config.json").rename(copy / "text_encoder" / "config.json")
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    fails("tokenizer: not readable as a tokenizer", encoder_files.load, copy, "cpu")
    shutil.rmtree(copy / "tokenizer")
    fails("tokenizer: no such folder", encoder_files.load, copy, "cpu")


def test_too_few_layers_for_klein(world, tmp_path):
    copy = copied_checkpoint(world, tmp_path)
    change_json(copy / "text_encoder" / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    fails("text_encoder: num_hidden_layers 3, too few", encoder_files.load, copy, "cpu", style=KLEIN.text_style)


def test_tokenizer_without_padding(world, tmp_path):
    copy = copied_checkpoint(world, tmp_path)
    change_json(copy / "tokenizer" / "tokenizer_config.json", pad_token=None)
    fails("tokenizer: its tokenizer has no pad_token", encoder_files.load, copy, "cpu")
