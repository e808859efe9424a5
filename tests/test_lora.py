"""LoRA against PEFT and diffusers: gradients, the EMA teacher's formula, the state of a run, and our files."""

import pytest
import torch
from conftest import fill_b
from diffusers import ZImagePipeline
from peft import LoraConfig
from safetensors import safe_open
from test_model import difference, inputs, ours, reference, their_velocity

import lora
from plumbing import lora_files
from plumbing.files import InputError
from plumbing.team import put

pytestmark = pytest.mark.quick
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


def test_rank_is_checked(model):
    with pytest.raises(InputError, match="rank"):
        lora.create(model, 0, 1, seed=0)


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
    for name, tensor in fresh.tensors().items():
        put(tensor, adapter.tensors()[name])
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), adapter.parameters()))
    assert torch.equal(velocity(model, fresh), velocity(model, adapter))  # blocks see the new values


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
