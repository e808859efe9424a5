"""--quantize int8: numbers against Linears of the same rounded weights, what is kept and when, and both programs."""
import copy
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, fill_b
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_resume import assert_same_run
from test_sample import difference, pixels
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import lora
import sample
import train
from plumbing import encoder_files, one_step
from plumbing.backbone import Backbone
from plumbing.checkpoints import backbone_of, check_quantize
from plumbing.files import InputError
from plumbing.quantized import INT8, Int8Linear
from tiny.contexts import load_features

INT8_FLAG = ("--quantize", INT8)
BACKENDS = ("eager", "aot_eager", "aot_eager_decomp_partition")     # the last one chooses what to keep as on a GPU


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantised(model: nn.Module) -> nn.Module:
    """The same numbers, every weight in full."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = nn.Parameter(layer.scale * layer.weight, requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    return model


def kept(act) -> tuple[object, list[torch.Tensor]]:
    """What act() gives, and the tensors that it saves for the backward pass."""
    found: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        return act(), found


def has_weight(found: list[torch.Tensor], model: nn.Module) -> bool:
    """Whether one of the tensors is a weight that `model` has in int8, in full, or its transpose."""
    weights = [layer.scale * layer.weight for layer in model.modules() if isinstance(layer, Int8Linear)]
    return any(torch.equal(weight, way) for weight in weights for tensor in found if tensor.ndim == 2
               for way in (tensor, tensor.t()) if weight.shape == way.shape)


# ---------------------------------------------------------------------------------------------------- one layer
@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_half_a_step_away_at_most(dtype):
    weight = drawn(40, 24) * torch.logspace(-6, 3, 40)[:, None]
    weight[3], weight[4], weight[5] = 0, 1e-42, torch.eye(24)[7]        # nothing, nearly nothing, one outlier
    layer = Int8Linear(weight, None, dtype)
    assert layer.weight.dtype == torch.int8 and layer.weight.element_size() == 1 and layer.weight.shape == (40, 24)
    assert layer.scale.dtype == dtype and layer.scale.shape == (40, 1) and layer.weight.abs().max() == 127
    step = layer.scale.double()
    assert ((step * layer.weight - weight).abs() <= step * 0.50001).all()
    assert not layer.weight[3].any() and (step[:3] < weight[:3].abs().amax(1, keepdim=True) / 126).all()


@pytest.mark.quick
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_equals_a_linear_of_the_rounded_weight(dtype, bias):
    layer = Int8Linear(drawn(40, 24), nn.Parameter(drawn(40).to(dtype), requires_grad=False) if bias else None, dtype)
    plain, results = dequantised(nn.Sequential(layer))[0], []
    assert type(plain) is nn.Linear
    for one in (layer, plain):
        x = drawn(2, 7, 24, seed=1).to(dtype).requires_grad_()
        y = one(x)
        y.backward(drawn(2, 7, 40, seed=2).to(dtype))
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].dtype == dtype
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.quick
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_no_weight_in_full_is_kept(backend):
    """Not even where a compiler sees forward and backward at once, and could compute the weight once for both."""
    net = nn.Sequential(Int8Linear(drawn(40, 24), None, torch.float32), nn.SiLU(),
                        Int8Linear(drawn(24, 40), None, torch.float32))
    x = drawn(7, 24).requires_grad_()
    torch._dynamo.reset()
    y, found = kept(lambda: (torch.compile(net, backend=backend) if backend else net)(x))
    assert found and not has_weight(found, net)
    plain, of_plain = kept(lambda: dequantised(net)(x))
    assert has_weight(of_plain, net)                               # this test can fail
    (ours,), (theirs,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, plain))
    torch.testing.assert_close(y, plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- transformers
@pytest.fixture(params=["checkpoint", "klein"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


def load(folder: Path, dtype: torch.dtype = torch.float32, **options):
    return backbone_of(folder).load(folder, "cpu", dtype, quantize=INT8, **options)


def learn(model, dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The velocity and its gradients for x and for every A and B; and what was kept."""
    adapter = fill_b(lora.create(model, rank=2, alpha=4, seed=3), seed=4)
    width = getattr(model, "caption_channels", 3 * 128)
    context = [drawn(length, width, seed=5).to(dtype) for length in (9, 12)]
    x = drawn(2, model.in_channels, 8, 6, seed=6).requires_grad_()
    v, found = kept(lambda: model.velocity(x, 0.7, context, adapter))
    (v * drawn(*v.shape, seed=7)).sum().backward()
    gradients = {name: tensor.grad for name, tensor in adapter.tensors().items()}
    return {"v": v.detach(), "x": x.grad, **gradients}, found


def assert_equal_numbers(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        assert theirs[name].abs().max() > 0
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5 * float(theirs[name].abs().max()), rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_rounded_weights_in_float(folder, checkpointing):
    model = load(folder)
    model.checkpointing = checkpointing
    plain = dequantised(model)
    (ours, found), (theirs, of_plain) = learn(model), learn(plain)
    assert_equal_numbers(ours, theirs)
    assert not has_weight(found, model)
    assert has_weight(of_plain, model) != checkpointing               # plain Linears keep theirs, unless recomputed


def test_what_becomes_int8(folder):
    """The Linears of the blocks do, nothing else does, and layers keep their names."""
    model, plain = load(folder, torch.bfloat16), backbone_of(folder).load(folder, "cpu", torch.bfloat16)
    blocks = tuple(f"{name}." for name in model.blocks())
    for (name, ours), theirs in zip(model.named_modules(), plain.modules(), strict=True):
        is_quantised = isinstance(theirs, nn.Linear) and name.startswith(blocks)
        assert type(ours) is (Int8Linear if is_quantised else type(theirs)), name
    others = {name: tensor for name, tensor in model.named_parameters() if tensor.dtype != torch.int8}
    assert {tensor.dtype for tensor in others.values()} == {torch.bfloat16}
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in model.parameters())
    assert model.lora_names() == plain.lora_names() and model.adaptable_names() == plain.adaptable_names()
    adapter = fill_b(lora.create(model, 2, 2, 0), 1)
    assert {name: A.shape for name, (A, _) in adapter.weights.items()} == {
        name: A.shape for name, (A, _) in lora.create(plain, 2, 2, 0).weights.items()}
    numbers, _ = learn(model, torch.bfloat16)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in numbers.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same(checkpoint, checkpointing):
    torch._dynamo.reset()
    model = load(checkpoint)
    model.checkpointing = checkpointing
    plain, _ = learn(model)
    for block in model.blocks().values():
        block.compile(backend="aot_eager")
    assert_equal_numbers(learn(model)[0], plain)


# ---------------------------------------------------------------------------------------------------- loading
class Live(TorchDispatchMode):
    """The largest sum of bytes of storages that were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, (args, result))
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if not tensor.is_meta and id(storage) not in self.seen:
            self.seen.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, id(storage), storage.nbytes())

    def drop(self, key: int, count: int) -> None:
        self.seen.remove(key)
        self.now -= count


@pytest.mark.parametrize("kind", ["transformer", "text encoder"])
def test_the_full_model_is_never_in_memory(kind):
    def act(quantize: str) -> nn.Module:
        if kind == "transformer":
            return backbone_of(EMBEDDED).load(EMBEDDED, "cpu", torch.bfloat16, quantize=quantize)
        return encoder_files.load(EMBEDDED, "cpu", torch.bfloat16, quantize=quantize).text

    with Live() as live:
        full = sum(2 * tensor.numel() for tensor in act("none").parameters())
    assert live.peak >= full                                            # it counts
    with Live() as live:
        model = act(INT8)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    largest = 4 * max(tensor.numel() for tensor in model.parameters())
    assert size < 0.65 * full and live.peak <= size + 4 * largest       # one tensor is being rounded, in float32


def test_encoders(both_kinds):
    """Layers of the language model, blocks of the vision tower; the former are there once for both readers."""
    ours, plain = both_kinds
    for model, prefix in ((ours.text, "layers."), (ours.vlm, ("language_model.layers.", "visual.blocks."))):
        for name, layer in model.named_modules():
            assert not isinstance(layer, nn.Linear) or isinstance(layer, Int8Linear) == name.startswith(prefix), name
    for name, layer in ours.text.named_modules():
        assert not isinstance(layer, Int8Linear) or ours.vlm.language_model.get_submodule(name) is layer
    student, teacher = dict(ours.text.named_parameters()), dict(ours.vlm.language_model.named_parameters())
    assert student.keys() == teacher.keys() and all(student[name] is teacher[name] for name in student)


@pytest.fixture(scope="module")
def both_kinds():
    """The embedded model's readers, in int8 and in float32."""
    return [encoder_files.load(EMBEDDED, "cpu", torch.float32, EMBEDDED / "vlm", quantize=quantize)
            for quantize in (INT8, "none")]


def test_contexts_of_rounded_encoders(both_kinds, images):
    (ours, plain), prompts = both_kinds, ["a red star", "a big dotted heart on the left on mint"]
    exact = copy.copy(ours)
    exact.text, exact.vlm = dequantised(ours.text), dequantised(ours.vlm)
    for read in (lambda reader: reader.text_context(prompts),
                 lambda reader: reader.image_text_context(prompts, images[:2])):
        for a, b, c in zip(read(ours), read(exact), read(plain), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            assert 1e-4 < float((a - c).norm() / c.norm()) < 0.1        # rounded, and hardly another context
    for a, b in zip(ours.text_context(prompts), load_features(EMBEDDED, INT8).contexts(prompts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)          # what tiny.score reads


# ---------------------------------------------------------------------------------------------------- programs
def says(out: Path) -> str | None:
    with safe_open(out / "student.safetensors", "pt") as file:
        return file.metadata().get("quantize")


def test_training(run, base, capsys):
    cache = Path(base[base.index("--cache") + 1])
    plain, before = run("plain", "--steps", 4), set(cache.iterdir())
    assert "saves next to nothing" not in capsys.readouterr().err
    whole = run("whole", "--steps", 4, *INT8_FLAG)
    assert "is 32 wide, so this saves next to nothing" in capsys.readouterr().err
    assert len(set(cache.iterdir()) - before) >= 3                      # features of other encoders are other features
    run("parts", "--steps", 2, *INT8_FLAG)
    assert_same_run(run("parts", "--steps", 4, *INT8_FLAG, "--resume", "--checkpointing"), whole)
    assert (says(plain), says(whole)) == ("none", "int8")
    a, b = (load_file(out / "student.safetensors") for out in (plain, whole))
    assert a.keys() == b.keys() and any(not torch.equal(a[name], b[name]) for name in a)


def test_quantize_must_not_change(run):
    refused = "--resume: --quantize was {} and is now {}; give the same value"
    out = run("plain", "--steps", 1)
    config = json.loads((out / "config.json").read_text())
    del config["options"]["quantize"]                                   # of a version that did not have it
    for content in (None, config):
        if content:
            (out / "config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=refused.format("none", "int8")):
            run("plain", "--steps", 2, "--resume", *INT8_FLAG)
    run("plain", "--steps", 2, "--resume")
    run("rounded", "--steps", 1, *INT8_FLAG)
    with pytest.raises(InputError, match=refused.format("int8", "none")):
        run("rounded", "--steps", 2, "--resume")


def test_training_of_klein_and_its_picture(run, klein, tmp_path, monkeypatch):
    out, seen = run("klein", "--model", klein, "--steps", 2, *INT8_FLAG), []
    assert says(out) == "int8"
    assert all(tensor.isfinite().all() for tensor in load_file(out / "student.safetensors").values())
    loaded = Backbone.load
    monkeypatch.setattr(Backbone, "load", lambda *args, **options: seen.append(loaded(*args, **options)) or seen[-1])
    assert one_step.main(["--run", str(out), "--out", str(tmp_path / "step.png")]) == 0
    assert any(isinstance(layer, Int8Linear) for layer in seen[0].modules())


def test_sampling_with_its_lora(run, checkpoint, adapter_file, photos, tmp_path, capsys):
    def draw(*flags) -> tuple[object, str]:
        words = ["--model", checkpoint, "--device", "cpu", "--height", 32, "--width", 32, "--prompt", "a red star",
                 "--steps", 2, "--out", tmp_path / "picture.png", *flags]
        capsys.readouterr()
        sample.main([*map(str, words)])
        return pixels(tmp_path / "picture.png"), capsys.readouterr().err

    own = run("rounded", "--steps", 2, *INT8_FLAG) / "student.safetensors"
    for file, flags, warning in (
            (own, INT8_FLAG, ""), (own, (), f"{own}: trained with --quantize int8, used with none"),
            (adapter_file, (), ""), (adapter_file, INT8_FLAG, f"{adapter_file}: trained with --quantize none, used w")):
        errors = draw("--lora", file, *flags)[1]
        assert errors.count("warning") == bool(warning) and warning in errors
    plain, rounded = draw("--lora", adapter_file)[0], draw("--lora", adapter_file, *INT8_FLAG)[0]
    assert 0 < difference(plain, rounded) and abs(plain - rounded).mean() < 8
    assert draw("--reference", photos / "0.png", *INT8_FLAG)[0].std() > 5


# ---------------------------------------------------------------------------------------------------- bad input
def store(folder: Path, dtype: torch.dtype) -> None:
    """One weight of a model folder in another dtype."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.0" in name and tensors[name].ndim == 2)
    save_file({**tensors, name: tensors[name].to(dtype)}, path)


def configure(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("damage, value", [
    (configure, "quantization_config"), (lambda folder: store(folder, torch.int8), "I8"),
    (lambda folder: store(folder, torch.float8_e4m3fn), "F8_E4M3")], ids=["config", "int8", "float8"])
def test_checkpoints_that_are_quantised_already(run, copied, tmp_path, part, damage, value):
    damage(copied / part)
    words = ("--model", str(copied), *INT8_FLAG)
    for act in (lambda: run("bad", *words),
                lambda: sample.main(["--prompt", "a star", "--out", str(tmp_path / "bad" / "a.png"), *words])):
        with pytest.raises(InputError) as caught:
            act()
        message = str(caught.value)
        assert message.startswith(f"--quantize int8: {copied / part} has {value}, ") and "\n" not in message
        assert message.endswith("give the checkpoint in bfloat16 or float32") and not (tmp_path / "bad").exists()


def test_other_values_are_refused(base, capsys):
    for main, words in ((train.main, base), (sample.main, ["--prompt", "a star"])):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--quantize", "nf4"])
        assert caught.value.code == 2 and "nf4" in capsys.readouterr().err


def test_wide_models_save_something(checkpoint, tmp_path, capsys):
    check_quantize(checkpoint, INT8)
    check_quantize(checkpoint, "none")
    assert capsys.readouterr().err.count("\n") == 1
    wide = Path(shutil.copytree(checkpoint, tmp_path / "wide"))
    path = wide / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dim": 512}))
    check_quantize(wide, INT8)
    assert capsys.readouterr().err == ""
