"""LoRA against PEFT and diffusers: gradients, the EMA teacher's formula, and files in every spelling."""
import json
import warnings

import pytest
import torch
from conftest import fill_b
from diffusers import ZImagePipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import difference, inputs, ours, reference, their_velocity

import lora
from plumbing import lora_files
from plumbing.files import InputError

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
RANK, ALPHA = 3, 6


@pytest.fixture(scope="module")
def theirs():
    return reference()


@pytest.fixture(scope="module")
def model(theirs):
    return ours(theirs)


def random_adapter(model, seed=0, names=None, scale=0.1):
    """An adapter whose B is not zero."""
    return fill_b(lora.create(model, RANK, ALPHA, seed, names), seed + 100, scale)


def velocity(model, adapter, sigma=0.6):
    x, context = inputs()
    return model.velocity(x, sigma, context, adapter)


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model)


# ---------------------------------------------------------------------------------------------------- values
def test_equals_merged_weights(model, adapter):
    merged = reference()
    for name, (A, B) in adapter.weights.items():
        merged.get_submodule(name).weight += ALPHA / RANK * (B @ A).detach()
    x, context = inputs()
    assert difference(velocity(model, adapter), velocity(model, None)) > 0.1
    assert difference(velocity(model, adapter), their_velocity(merged, x, 0.6, context)) < 1e-4


def test_new_adapter_changes_nothing_and_is_reproducible(model):
    new = lora.create(model, 16, 32, seed=5)
    assert list(new.weights) == model.lora_names() and new.scale == 2
    assert torch.equal(velocity(model, new), velocity(model, None))
    assert all(tensor.requires_grad and tensor.dtype == torch.float32 for tensor in new.parameters())
    values = torch.cat([A.flatten() for A, _ in new.weights.values()])
    assert abs(values.std() * 16 - 1) < 0.02 and abs(values.mean()) < 1e-3
    again, other = lora.create(model, 16, 32, seed=5), lora.create(model, 16, 32, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters()))
    assert not torch.equal(new.parameters()[0], other.parameters()[0])


def test_sum_and_average_against_dense_matrices(model):
    first, second = fill_b(lora.create(model, 3, 6, seed=1), 1), fill_b(lora.create(model, 2, 1, seed=2), 2)
    missing = next(iter(first.weights))
    second = lora.Adapter({name: pair for name, pair in second.weights.items() if name != missing}, 2, 1)

    def change(adapter: lora.Adapter, name: str):
        A, B = adapter.weights[name]
        return adapter.scale * B @ A
    for weight in (1.0, 0.5):
        found = lora_files.combined([first, second], weight)
        assert found.weights.keys() == first.weights.keys() and found.scale == 1
        for name in found.weights:
            dense = change(first, name) + (change(second, name) if name != missing else 0)
            torch.testing.assert_close(change(found, name), weight * dense)
    assert not any(tensor.requires_grad for tensor in found.parameters())
    doubled = lora.Adapter({name: (A, 2 * B) for name, (A, B) in first.weights.items()}, 3, 6)
    torch.testing.assert_close(velocity(model, lora_files.combined([first, first])), velocity(model, doubled),
                               rtol=1e-4, atol=1e-4)


def test_every_gradient_equals_peft(model, adapter):
    theirs = reference()
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    parameters = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    mine = {}
    for name, (A, B) in adapter.weights.items():
        mine[f"{name}.lora_A.default.weight"], mine[f"{name}.lora_B.default.weight"] = A, B
    assert parameters.keys() == mine.keys()  # the same layers are trained
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(mine[name])
    x, context = inputs()
    goal = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    gradients_theirs = torch.autograd.grad((their_velocity(theirs, x, 0.6, context) * goal).sum(), parameters.values())
    gradients = torch.autograd.grad((velocity(model, adapter) * goal).sum(), [mine[name] for name in parameters])
    for name, a, b in zip(parameters, gradients, gradients_theirs, strict=True):
        assert a.abs().max() > 1e-3 and difference(a, b) < 1e-4, name


def test_teacher_between_forward_and_backward_under_checkpointing(theirs):
    """The recomputation in the backward pass must see the student, though the teacher ran last."""
    gradients = []
    for checkpointing, teacher_between in ((False, False), (True, True)):
        model = ours(theirs)
        model.checkpointing = checkpointing
        student, teacher = random_adapter(model, 0), lora.copy(random_adapter(model, 9, scale=0.5))
        x, context = inputs()
        v = model.velocity(x, 0.6, context, student)
        if teacher_between:
            with torch.no_grad():
                v_teacher = model.velocity(x, 0.6, context, teacher)
            assert difference(v, v_teacher) > 0.1
        v.square().mean().backward()
        gradients.append([tensor.grad for tensor in student.parameters()])
        assert not any(tensor.requires_grad for tensor in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_float32_adapter_over_bfloat16_base(theirs):
    half = ours(theirs).bfloat16()
    student = random_adapter(half)
    v = velocity(half, student)
    v.square().mean().backward()
    assert v.dtype == torch.float32
    assert all(t.dtype == t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in student.parameters())


# ---------------------------------------------------------------------------------------------------- EMA
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_ema_closed_form(model, decay):
    """thetabar_n = decay^n theta_0 + (1 - decay) sum_k decay^(n - k) theta_k, in float64."""
    names, steps = model.lora_names()[:2], 20
    students = [random_adapter(model, seed, names) for seed in range(steps + 1)]
    teacher = lora.copy(students[0])
    for student in students[1:]:
        lora.ema_(teacher, student, decay)
    for i, tensor in enumerate(teacher.parameters()):
        history = [student.parameters()[i].detach().double() for student in students]
        expected = decay ** steps * history[0]
        for k in range(1, steps + 1):
            expected = expected + (1 - decay) * decay ** (steps - k) * history[k]
        assert tensor.dtype == torch.float32 and difference(tensor, expected) < 1e-6
    assert students[0].parameters()[0].requires_grad and not teacher.parameters()[0].requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.001, float("nan")])
def test_ema_decay_is_checked(model, adapter, decay):
    with pytest.raises(InputError, match="EMA"):
        lora.ema_(lora.copy(adapter), adapter, decay)


# ---------------------------------------------------------------------------------------------------- state
def test_state_round_trip(model, adapter):
    fresh = lora.create(model, RANK, ALPHA, seed=1)
    fresh.load_tensors({name: tensor.detach().clone() for name, tensor in adapter.tensors().items()})
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), adapter.parameters()))
    assert torch.equal(velocity(model, fresh), velocity(model, adapter))  # blocks see the new values
    with pytest.raises(InputError, match="one side only"):
        fresh.load_tensors({})
    with pytest.raises(InputError, match="shape"):
        fresh.load_tensors(lora.create(model, RANK + 1, ALPHA, seed=1).tensors())


# ---------------------------------------------------------------------------------------------------- our files
def test_file_content(model, adapter, tmp_path):
    lora.save(adapter, tmp_path / "a.safetensors", {"step": "7"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"step": "7"}
        names = model.lora_names()
        assert set(file.keys()) == {f"transformer.{name}.lora_{side}.weight" for name in names for side in "AB"}
    loaded = lora_files.load(tmp_path / "a.safetensors", model)
    assert (loaded.rank, loaded.scale) == (RANK, 1) and not loaded.parameters()[0].requires_grad
    assert difference(velocity(model, loaded), velocity(model, adapter)) < 1e-5


def test_diffusers_loads_our_file(model, adapter, tmp_path):
    theirs = reference()
    pipeline = ZImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=theirs)
    lora.save(adapter, tmp_path / "student.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="student.safetensors")
    x, context = inputs()
    assert difference(their_velocity(theirs, x, 0.6, context), velocity(model, adapter)) < 1e-4
    assert difference(their_velocity(theirs, x, 0.6, context), velocity(model, None)) > 0.1


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


def test_rank_is_checked(model):
    with pytest.raises(InputError, match="rank"):
        lora.create(model, 0, 1, seed=0)
