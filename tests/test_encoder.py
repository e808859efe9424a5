"""encoder.py against diffusers' pipelines (f_text) and transformers' Qwen3-VL (f_mm), on a small random model."""
import inspect

import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from PIL import Image
from test_encoder_files import PROMPTS, World, assert_close, change_json, copied_checkpoint, fails
from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import encoder
from networks.flux2 import KLEIN
from plumbing import encoder_files

pytestmark = pytest.mark.quick
NO_THOUGHT = "<think>\n\n</think>\n\n"
# What the own chat template of Qwen3-VL does for one user message.
IMAGE_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@pytest.fixture(scope="session")
def klein(world) -> encoder.Encoder:
    return encoder_files.load(world.folder, "cpu", vlm=world.vlm, style=KLEIN.text_style)


@pytest.fixture(scope="session")
def short_klein(world, tmp_path_factory) -> encoder.Encoder:
    """Its tokenizer takes 64 tokens, as that of a small model does."""
    copy = copied_checkpoint(world, tmp_path_factory.mktemp("short"))
    change_json(copy / "tokenizer" / "tokenizer_config.json", model_max_length=64)
    return encoder_files.load(copy, "cpu", vlm=world.vlm, style=KLEIN.text_style)


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


# ---------------------------------------------------------------------------------------------------- Eq. 4
@pytest.mark.parametrize("sources", [0, 1, 2])
def test_contexts_of_a_pair(sources):
    """Both sides see the sources in their order; x0 is the teacher's last reference, if its kind has it so."""
    y, y_teacher, x0 = torch.zeros(3, 4), torch.ones(5, 4), torch.full((2, 6, 6), 9.0)
    given = [torch.full((2, 4, 4 + i), float(i)) for i in range(sources)]
    for kind, shown, extra in (("vlm", x0, []), ("reference", x0, [x0]), ("reference", None, []), ("", x0, [])):
        student, teacher = encoder.contexts(y, y_teacher, given, shown, kind)
        assert student.text is y and teacher.text is y_teacher
        assert isinstance(student.references, tuple) and isinstance(teacher.references, tuple)
        assert len(student.references) == sources and len(teacher.references) == sources + len(extra)
        assert all(a is b for a, b in zip(student.references, given, strict=True))
        assert all(a is b for a, b in zip(teacher.references, [*given, *extra], strict=True))
        student, teacher = encoder.contexts(y, None, given, shown, kind)
        assert teacher is None and student.text is y
        assert all(a is b for a, b in zip(student.references, given, strict=True))
    student, teacher = encoder.contexts(y, y_teacher)
    assert student.references == teacher.references == ()


# ---------------------------------------------------------------------------------------------------- bad input


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
