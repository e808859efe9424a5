"""Loading of the encoders: what is held, which files are read, and what is wrong with them; on a small random model."""
import gc
import json
import shutil
import weakref
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)

from networks.flux2 import KLEIN
from plumbing import encoder_files
from plumbing.files import InputError

pytestmark = pytest.mark.quick
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PROMPTS = ["a red star", "ein großes Haus mit 3 Bäumen, 夜", "[V] in the snow  ", "a big blue blob on the left on mint"]
# What the own chat template of Qwen3 does for one user message.
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}")


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


def make_world(folder: Path) -> World:
    torch.manual_seed(0)
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


def copied_checkpoint(world: World, folder: Path) -> Path:
    return shutil.copytree(world.folder, folder / "copy", ignore=shutil.ignore_patterns("vlm", "whole"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], atol: float = 1e-4) -> None:
    assert [tuple(a.shape) for a in ours] == [tuple(b.shape) for b in theirs]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def fails(message: str, call, *arguments, **options) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


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


def test_official_limits_of_the_real_model(world):
    limits = (512 * 512, 768 * 768)
    processor = encoder_files.load(world.folder, "cpu", vlm=world.vlm, image_pixels=limits).image_processor
    processor.patch_size = 16  # as in Qwen3-VL-4B
    sizes = [(1024, 1024), (1344, 576), (720, 1280), (64, 64)]
    grids = processor(images=[Image.new("RGB", size) for size in sizes], return_tensors="pt")["image_grid_thw"]
    assert grids.tolist() == [[1, 48, 48], [1, 30, 72], [1, 64, 36], [1, 32, 32]]


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
    fails("tokenizer: transformers cannot use it", encoder_files.load, copy, "cpu")
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
