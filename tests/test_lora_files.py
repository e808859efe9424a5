"""LoRA files in every spelling, against PEFT and diffusers, and files that are no LoRA for this network."""
import json
import warnings

import pytest
import torch
from conftest import fill_b
from diffusers import ZImagePipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_lora import ALPHA, RANK, random_adapter, velocity
from test_model import difference, inputs, ours, reference, their_velocity

import lora
from plumbing import lora_files
from plumbing.files import InputError
from tiny.adapters import combined

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model():
    return ours(reference())


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model)


# ---------------------------------------------------------------------------------------------------- others' files
def spelled(adapter, prefix="", down="lora_A", up="lora_B", alpha=False, rename=lambda name: name):
    """The adapter's tensors under another tool's keys; alpha as its own key or folded in."""
    weights = {}
    for name, (A, B) in adapter.weights.items():
        key = prefix + rename(name)
        weights[f"{key}.{down}.weight"] = A.detach().clone()
        weights[f"{key}.{up}.weight"] = B.detach().clone() if alpha else adapter.scale * B.detach()
        if alpha:
            weights[f"{key}.alpha"] = torch.tensor(float(adapter.alpha))
    return weights


SPELLINGS = {
    "ours": dict(prefix="transformer."),
    "PEFT": dict(prefix="base_model.model."),
    "PEFT in memory": dict(prefix="base_model.model.", down="lora_A.default", up="lora_B.default"),
    "old diffusers": dict(prefix="transformer.", down="lora.down", up="lora.up", alpha=True),
    "ComfyUI, our names": dict(prefix="diffusion_model.", alpha=True),
    "ComfyUI, its output name": dict(prefix="diffusion_model.", down="lora_down", up="lora_up", alpha=True,
                                     rename=lambda name: name.replace("to_out.0", "out")),
    "kohya": dict(prefix="lora_unet_", down="lora_down", up="lora_up", alpha=True,
                  rename=lambda name: name.replace(".", "_")),
    "no prefix": dict(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(model, adapter, tmp_path, spelling):
    path = tmp_path / "a.safetensors"
    save_file(spelled(adapter, **SPELLINGS[spelling]), path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = lora_files.load(path, model)
    assert [str(w.message) for w in caught if "alpha is unknown" in str(w.message)] == [
        str(w.message) for w in caught] and bool(caught) == spelling.startswith("PEFT")
    assert difference(velocity(model, loaded), velocity(model, adapter)) < 1e-5


def test_fused_qkv(model, tmp_path):
    """The original weights have one Linear for q, k, v; an adapter of it is three that share A."""
    generator = torch.Generator().manual_seed(4)
    A, B = torch.randn(2, 48, generator=generator) / 2, torch.randn(144, 2, generator=generator) / 5
    prefix = "diffusion_model.layers.1.attention.qkv"
    save_file({f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B, f"{prefix}.alpha": torch.tensor(1.0)},
              tmp_path / "a.safetensors")
    merged = reference()
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        merged.get_submodule(f"layers.1.attention.{name}").weight += 0.5 * B[48 * i:48 * (i + 1)] @ A
    x, context = inputs()
    v = velocity(model, lora_files.load(tmp_path / "a.safetensors", model))
    assert difference(v, their_velocity(merged, x, 0.6, context)) < 1e-4
    assert difference(v, velocity(model, None)) > 1e-3


@pytest.mark.parametrize("options", [
    dict(), dict(use_rslora=True), dict(rank_pattern={"to_k": 5}),
    dict(alpha_pattern={"to_q": 1, r"layers\.\d+\.feed_forward\.w1": 9}),
])
@pytest.mark.parametrize("tool", ["peft", "diffusers"])
def test_reads_alpha_that_peft_and_diffusers_save(model, tmp_path, tool, options):
    theirs, file = reference(), "adapter_model.safetensors"
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=model.adaptable_names(), init_lora_weights=False,
                        **options)
    torch.manual_seed(0)
    if tool == "peft":
        get_peft_model(theirs, config).save_pretrained(tmp_path)
    else:
        theirs.add_adapter(config)
        metadata = theirs.peft_config["default"].to_dict()
        ZImagePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(theirs), weight_name=file,
                                         transformer_lora_adapter_metadata=metadata)
    x, context = inputs()
    v = velocity(model, lora_files.load(tmp_path / file, model))
    expected = their_velocity(theirs, x, 0.6, context)
    assert difference(v, expected) < 1e-4 * max(1, expected.abs().max())
    assert difference(v, velocity(model, None)) > 0.1


def test_some_layers_and_several_ranks(model, adapter, tmp_path):
    names = ["layers.0.attention.to_q", "context_refiner.1.feed_forward.w2"]
    first, second = random_adapter(model, 1, names[:1]), lora.create(model, 5, 5, 2, names[1:])
    lora.save(lora.Adapter({**first.weights, **second.weights}, 1, 1), tmp_path / "a.safetensors")
    loaded = lora_files.load(tmp_path / "a.safetensors", model)
    assert set(loaded.weights) == set(names) and loaded.rank == 5
    assert loaded.block("layers.1") is None and set(loaded.block("layers.0")) == {"attention.to_q"}
    first = lora.Adapter(first.weights, 1, 1)
    assert difference(velocity(model, loaded), velocity(model, first)) < 1e-5  # the second one's B is zero


# ---------------------------------------------------------------------------------------------------- errors
KEY = "transformer.layers.0.attention.to_q"


@pytest.mark.parametrize("change, message", [
    (lambda w: w.update({"transformer.layers.9.attention.to_q.lora_A.weight": torch.zeros(3, 48)}), "unknown key"),
    (lambda w: w.update({"text_encoder.layers.0.lora_A.weight": torch.zeros(3, 48)}), "unknown key text_encoder"),
    (lambda w: w.update({f"{KEY}.lora_magnitude_vector": torch.zeros(48)}), "unknown key .*magnitude"),
    (lambda w: w.pop(f"{KEY}.lora_A.weight"), "no matrix A"),
    (lambda w: w.pop(f"{KEY}.lora_B.weight"), "no matrix B"),
    (lambda w: w.update({f"{KEY}.lora_A.weight": torch.zeros(3, 64)}), "shapes .3, 64."),
    (lambda w: w.update({f"{KEY}.lora_B.weight": torch.zeros(48, 4)}), "shapes .*48, 4"),
    (lambda w: w.update({f"{KEY}.lora_A.weight": torch.zeros(3)}), "shapes .3,."),
    (lambda w: w.update({"diffusion_model.layers_0_attention_to_q.lora_A.weight": torch.zeros(3, 48),
                         "diffusion_model.layers_0_attention_to_q.lora_B.weight": torch.zeros(48, 3)}), "twice"),
    (lambda w: w[f"{KEY}.lora_A.weight"].fill_(float("nan")), "lora_A.weight .torch.float32. has values that are not"),
    (lambda w: w.update({f"{KEY}.lora_B.weight": torch.zeros(48, 3, dtype=torch.int8)}), "torch.int8. .*no floats"),
    (lambda w: w.update({f"{KEY}.alpha": torch.ones(3)}), r"alpha \[1.0, 1.0, 1.0\], expected one number"),
    (lambda w: w.clear(), "no LoRA"),
])
def test_wrong_files(model, adapter, tmp_path, change, message):
    weights = spelled(adapter, prefix="transformer.")
    change(weights)
    path = tmp_path / "a.safetensors"
    save_file(weights, path)
    with pytest.raises(InputError, match=message) as error:
        lora_files.load(path, model)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files(model, adapter, tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(InputError, match="no such file"):
            lora_files.load(path, model)
    path = tmp_path / "a.safetensors"
    lora.save(adapter, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a complete safetensors"):
        lora_files.load(path, model)
    save_file(load_file(saved(adapter, tmp_path)), path, {"lora_adapter_metadata": json.dumps([1])})
    with pytest.raises(InputError, match="metadata"):
        lora_files.load(path, model)


def saved(adapter, folder):
    lora.save(adapter, folder / "whole.safetensors")
    return folder / "whole.safetensors"


def test_sum_and_average_against_dense_matrices(model):
    first, second = fill_b(lora.create(model, 3, 6, seed=1), 1), fill_b(lora.create(model, 2, 1, seed=2), 2)
    missing = next(iter(first.weights))
    second = lora.Adapter({name: pair for name, pair in second.weights.items() if name != missing}, 2, 1)

    def change(adapter: lora.Adapter, name: str):
        A, B = adapter.weights[name]
        return adapter.scale * B @ A
    for weight in (1.0, 0.5):
        found = combined([first, second], weight)
        assert found.weights.keys() == first.weights.keys() and found.scale == 1
        for name in found.weights:
            dense = change(first, name) + (change(second, name) if name != missing else 0)
            torch.testing.assert_close(change(found, name), weight * dense)
    assert not any(tensor.requires_grad for tensor in found.parameters())
    doubled = lora.Adapter({name: (A, 2 * B) for name, (A, B) in first.weights.items()}, 3, 6)
    torch.testing.assert_close(velocity(model, combined([first, first])), velocity(model, doubled),
                               rtol=1e-4, atol=1e-4)
