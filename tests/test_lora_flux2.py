"""LoRA files for FLUX.2 in every spelling, against diffusers' own conversion, and files of the other backbone.

test_flux2.py has the gradients of every matrix against PEFT and our file in Flux2KleinPipeline.
"""
import pytest
import test_flux2
import test_model
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file
from test_lora import ALPHA, RANK, random_adapter
from test_lora_files import spelled
from test_model import difference

import lora
from model import ZImageTransformer
from networks import flux2
from plumbing import lora_files
from plumbing.files import InputError

DOUBLE, SINGLE = 11, 12  # so that a block's number can be the beginning of another one's
DIM, HIDDEN = 48, 120
STREAM = {"attn.qkv": (DIM, 3 * DIM), "attn.proj": (DIM, DIM), "mlp.0": (DIM, 2 * HIDDEN), "mlp.2": (HIDDEN, DIM)}
ORIGINAL = {             # layers of the original weights: inputs, outputs
    "double_blocks": {f"{stream}_{layer}": shape for stream in ("img", "txt") for layer, shape in STREAM.items()},
    "single_blocks": {"linear1": (DIM, 3 * DIM + 2 * HIDDEN), "linear2": (DIM + HIDDEN, DIM)},
}


@pytest.fixture(scope="module")
def model():
    return flux2.Flux2Transformer(test_flux2.CONFIG | dict(num_layers=DOUBLE, num_single_layers=SINGLE))


@pytest.fixture(scope="module")
def zimage():
    return ZImageTransformer(test_model.CONFIG)


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model)


@pytest.fixture(scope="module")
def original():
    """An adapter of all layers of all blocks of the original weights, by their names."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for group, count in (("double_blocks", DOUBLE), ("single_blocks", SINGLE)):
        for index in range(count):
            for layer, (inner, outer) in ORIGINAL[group].items():
                weights[f"{group}.{index}.{layer}"] = (torch.randn(RANK, inner, generator=generator),
                                                       torch.randn(outer, RANK, generator=generator))
    return lora.Adapter(weights, RANK, ALPHA)


def changes(weights, scale=1.0):
    """What (A, B) per layer, or lora_A and lora_B keys of diffusers, add to the weight of each layer."""
    if not isinstance(next(iter(weights.values())), tuple):
        names = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
        assert len(weights) == 2 * len(names)
        weights = {name.removeprefix("transformer."): tuple(weights[f"{name}.lora_{side}.weight"] for side in "AB")
                   for name in names}
    return {name: scale * (B @ A).detach() for name, (A, B) in weights.items()}


def assert_same(found, expected, names):
    assert found.keys() == expected.keys() == set(names)
    for name in names:
        largest = expected[name].abs().max()
        assert largest > 0.1 and difference(found[name], expected[name]) < 1e-5 * max(1, largest), name


# ---------------------------------------------------------------------------------------------------- the adapter
def test_blocks_get_their_layers(model, adapter):
    names = model.lora_names()
    assert len(names) == 12 * DOUBLE + 2 * SINGLE and list(adapter.weights) == names
    seen = []
    for prefix in model.blocks():
        for local, (A, B, scale) in adapter.block(prefix).items():
            name = f"{prefix}.{local}"
            layer = model.get_submodule(name)
            assert (A is adapter.weights[name][0]) and (B is adapter.weights[name][1]) and scale == ALPHA / RANK
            assert A.shape == (RANK, layer.in_features) and B.shape == (layer.out_features, RANK)
            seen.append(name)
    assert sorted(seen) == sorted(names)
    assert adapter.block(f"transformer_blocks.{DOUBLE}") is None
    assert {"attn.to_q", "attn.to_out.0", "ff_context.linear_in"} < adapter.block("transformer_blocks.1").keys()
    assert adapter.block("single_transformer_blocks.3").keys() == {"attn.to_qkv_mlp_proj", "attn.to_out"}


def test_copy_and_ema(model, adapter):
    teacher, student = lora.copy(adapter), random_adapter(model, 5)
    lora.ema_(teacher, student, 0.75)
    for name, (A, B) in teacher.weights.items():
        for side, tensor in enumerate((A, B)):
            expected = 0.75 * adapter.weights[name][side] + 0.25 * student.weights[name][side]
            assert not tensor.requires_grad and difference(tensor, expected) < 1e-6
            assert difference(tensor, adapter.weights[name][side]) > 1e-3


def test_our_file(model, adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    lora.save(adapter, path)
    file = load_file(path)
    assert file.keys() == {f"transformer.{name}.lora_{side}.weight" for name in model.lora_names() for side in "AB"}
    expected = changes(adapter.weights, ALPHA / RANK)
    assert_same(changes(lora_files.load(path, model).weights), expected, model.lora_names())
    assert_same(changes(Flux2KleinPipeline.lora_state_dict(dict(file))), expected, model.lora_names())


# ---------------------------------------------------------------------------------------------------- others' files
def underscores(name):
    return name.replace(".", "_")


DOWN_UP = dict(down="lora_down", up="lora_up")
KOHYA = dict(prefix="lora_unet_", alpha=True, rename=underscores, **DOWN_UP)
AI_TOOLKIT = dict(prefix="diffusion_model.")
PEFT = dict(prefix="base_model.model.")
SPELLINGS = {  # the file, and the spelling in which diffusers reads the same
    "ai-toolkit": (AI_TOOLKIT, AI_TOOLKIT),
    "kohya": (KOHYA, KOHYA),
    "PEFT": (PEFT, PEFT),
    "no prefix": (dict(), AI_TOOLKIT),
    "underscores without prefix": (dict(rename=underscores), AI_TOOLKIT),
    "ComfyUI": (dict(prefix="diffusion_model.", alpha=True, **DOWN_UP), KOHYA),
    "ComfyUI in PEFT's words": (dict(prefix="diffusion_model.", alpha=True), KOHYA),
}


@pytest.mark.filterwarnings("ignore:.*alpha is unknown")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_original_names(model, original, tmp_path, spelling):
    """Fused q, k and v among them."""
    options, known = SPELLINGS[spelling]
    save_file(spelled(original, **options), tmp_path / "a.safetensors")
    expected = changes(Flux2KleinPipeline.lora_state_dict(spelled(original, **known)))
    assert_same(changes(lora_files.load(tmp_path / "a.safetensors", model).weights), expected, model.lora_names())


@pytest.mark.filterwarnings("ignore:.*alpha is unknown")
@pytest.mark.parametrize("options", [
    AI_TOOLKIT, KOHYA, PEFT, dict(), dict(alpha=True, rename=underscores),
    dict(prefix="transformer.", down="lora.down", up="lora.up", alpha=True),
    KOHYA | dict(prefix="lora_transformer_"), KOHYA | dict(prefix="lycoris_")],
    ids=["ComfyUI", "kohya", "PEFT", "DiffSynth", "underscores", "old diffusers", "OneTrainer", "LyCORIS"])
def test_split_names(model, adapter, tmp_path, options):
    """The names of diffusers, where q, k and v are Linears of their own."""
    save_file(spelled(adapter, **options), tmp_path / "a.safetensors")
    expected = changes(adapter.weights, ALPHA / RANK)
    assert_same(changes(lora_files.load(tmp_path / "a.safetensors", model).weights), expected, model.lora_names())


# ---------------------------------------------------------------------------------------------------- errors
def pair(layer, inner=DIM, outer=DIM):
    return {f"{layer}.lora_A.weight": torch.zeros(RANK, inner), f"{layer}.lora_B.weight": torch.zeros(outer, RANK)}


def fails(path, weights, model, message):
    save_file(weights, path)
    with pytest.raises(InputError, match=message) as error:
        lora_files.load(path, model)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("weights, message", [
    (pair("double_blocks.0.img_attn.qkv", DIM, 3 * DIM) | pair("transformer.transformer_blocks.0.attn.to_k"),
     "transformer_blocks.0.attn.to_k occurs twice"),
    (pair("diffusion_model.double_blocks.0.txt_attn.qkv"), r"expected .rank, 48. and .144, rank."),
    (pair("diffusion_model.single_blocks.0.linear1", 32, 256), r"expected .rank, 48. and .384, rank."),
    (pair(f"diffusion_model.double_blocks.{DOUBLE}.img_attn.proj"), "unknown key .*double_blocks.11"),
    (pair("diffusion_model.double_blocks.0.img_attn.to_q"), "unknown key .*img_attn.to_q"),
    (pair("transformer.single_transformer_blocks.0.attn.to_q"), "unknown key .*attn.to_q"),  # FLUX.1
    (pair("diffusion_model.img_in", 16), "unknown key .*img_in"),
    (pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"), "unknown key .*down_blocks"),
    (pair("text_encoder.model.layers.0.self_attn.q_proj"), "unknown key text_encoder"),
])
def test_wrong_files(model, tmp_path, weights, message):
    fails(tmp_path / "a.safetensors", weights, model, message)


def test_another_size(model, tmp_path):
    other = flux2.Flux2Transformer(test_flux2.CONFIG | dict(num_attention_heads=2))
    lora.save(random_adapter(other), tmp_path / "a.safetensors")
    fails(tmp_path / "a.safetensors", load_file(tmp_path / "a.safetensors"), model, r"has shapes .*32.*expected .*48")


@pytest.mark.parametrize("options", [dict(prefix="transformer."), KOHYA, AI_TOOLKIT, PEFT],
                         ids=["ours", "kohya", "ai-toolkit", "PEFT"])
def test_other_backbone(model, zimage, original, tmp_path, options):
    """Any single layer tells, also when layers that nobody knows stand before it."""
    def alone(name):
        return lora.Adapter({name: (torch.zeros(RANK, 2), torch.zeros(2, RANK))}, RANK, ALPHA)

    message = ": this is a LoRA for {0}, the model is {1}; give a LoRA made for {1} or a {0} model$"
    fused = ["layers.0.attention.qkv", "noise_refiner.1.attention.out"]
    for made_for, names, network, own in (
        ("Z-Image", zimage.adaptable_names() + fused, model, "FLUX.2"),
        ("FLUX.2", model.adaptable_names() + list(original.weights), zimage, "Z-Image"),
    ):
        for name in {name.split(".", 2)[0] + name.split(".", 2)[2]: name for name in names}.values():
            weights = pair("a.first") | spelled(alone(name), **options)
            fails(tmp_path / "a.safetensors", weights, network, message.format(made_for, own))


@pytest.mark.parametrize("layer", [
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",  # Stable Diffusion
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "transformer.context_embedder",
])
def test_nobodys_layers_are_unknown(model, zimage, tmp_path, layer):
    for network in (model, zimage):
        fails(tmp_path / "a.safetensors", pair(layer), network, f"unknown key {layer}")
