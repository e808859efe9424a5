"""The transformer against diffusers' ZImageTransformer2DModel on random small configurations, and its loading."""
import json

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import model as zimage
from plumbing.files import InputError

CONFIG = dict(all_patch_size=[2], all_f_patch_size=[1], in_channels=4, dim=48, n_layers=2, n_refiner_layers=2,
              n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=20, siglip_feat_dim=None,
              rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 6, 10], axes_lens=[160, 32, 32])
# height, width, caption lengths, sigma
CASES = {
    "square, 16 tokens": (8, 8, [5, 30], 0.5),
    "tall, 32 tokens, captions padded differently": (16, 8, [7, 40, 64], 0.9),
    "wide, 15 tokens, caption of 32": (6, 10, [32, 32], 1.0),
    "64 tokens, one sigma per sample": (16, 16, [33, 1, 70], torch.tensor([0.0, 0.3, 0.95])),
    "one token": (2, 2, [1], 0.25),
}


def reference(seed: int = 0, **changes) -> ZImageTransformer2DModel:
    """A diffusers model with every parameter random, so that gates, norms and pad tokens matter."""
    reference = ZImageTransformer2DModel(**CONFIG | changes).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2 and len(parameter) > 1:  # unit gain, or float32 noise grows from layer to layer
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        else:
            norm = "norm" in name or name == "cap_embedder.0.weight"
            parameter.copy_(float(norm) + (0.2 if norm else 0.5) * noise)
    return reference


def ours(theirs: ZImageTransformer2DModel, **changes) -> zimage.ZImageTransformer:
    """Our model with the same weights."""
    model = zimage.ZImageTransformer(CONFIG | changes).requires_grad_(False)
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def their_velocity(theirs, x, sigma, context, patch=2):
    """What ZImagePipeline does around its transformer. context: texts, or `Context`s without references."""
    context = [getattr(c, "text", c) for c in context]
    t = (1 - torch.as_tensor(sigma)).expand(len(x))
    out = theirs([latent.unsqueeze(1) for latent in x], t, context, patch_size=patch, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


def inputs(height=8, width=8, lengths=(5, 40), channels=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), channels, height, width, generator=generator)
    return x, [torch.randn(n, CONFIG["cap_feat_dim"], generator=generator) for n in lengths]


@pytest.fixture(scope="module")
def theirs():
    return reference()


@pytest.fixture(scope="module")
def model(theirs):
    return ours(theirs)


def difference(a, b) -> float:
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------------------------------------- parity
def assert_same_gradient(x, v, v_theirs, at_least: float) -> None:
    """Velocities and their gradients with respect to x agree to 1e-4; `at_least`: a gradient that is not nothing."""
    assert v.shape == x.shape and v.dtype == torch.float32 and v.abs().max() > 0.5
    assert difference(v, v_theirs) < 1e-4
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    gradient, = torch.autograd.grad((v * weight).sum(), x)
    gradient_theirs, = torch.autograd.grad((v_theirs * weight).sum(), x)
    assert gradient.abs().max() > at_least and difference(gradient, gradient_theirs) < 1e-4


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_velocity_and_gradient_equal_diffusers(case, theirs, model):
    height, width, lengths, sigma = CASES[case]
    x, context = inputs(height, width, lengths)
    x.requires_grad_()
    v, v_theirs = model.velocity(x, sigma, context), their_velocity(theirs, x, sigma, context)
    assert_same_gradient(x, v, v_theirs, at_least=0.5)


@pytest.mark.parametrize("changes, patch", [
    (dict(all_patch_size=[1], in_channels=3, dim=36, n_heads=3, n_kv_heads=3, axes_dims=[4, 4, 4]), 1),
    (dict(all_patch_size=[4], rope_theta=1000.0, t_scale=900.0, norm_eps=1e-3, n_layers=1), 4),
])
def test_other_configurations(changes, patch):
    theirs = reference(3, **changes)
    model = ours(theirs, **changes)
    x, context = inputs(8, 12, (9, 33), channels=model.in_channels)
    assert model.multiple == model.patch_size == patch
    assert difference(model.velocity(x, 0.7, context), their_velocity(theirs, x, 0.7, context, patch)) < 1e-4


@pytest.mark.quick
def test_every_parameter_gets_their_gradient(theirs):
    theirs, x_context = reference(), inputs(6, 6, (5, 40))
    model = ours(theirs)
    for network, velocity in ((theirs, their_velocity), (model, zimage.ZImageTransformer.velocity)):
        network.requires_grad_(True)
        velocity(network, x_context[0], 0.6, x_context[1]).square().mean().backward()
    mine = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert difference(mine[name].grad, parameter.grad) < 1e-4 * max(1, parameter.grad.abs().max()), name


@pytest.mark.quick
def test_mask_only_when_padded_lengths_differ(model, monkeypatch):
    masks = []
    attention = zimage.F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attention(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(zimage.F, "scaled_dot_product_attention", record)
    model.velocity(inputs()[0], 0.5, inputs(lengths=(5, 30))[1])
    assert masks == [None] * 6
    masks.clear()
    model.velocity(inputs()[0], 0.5, inputs(lengths=(5, 40))[1])
    assert masks == [None] * 2 + [(2, 1, 1, 64)] * 2 + [(2, 1, 1, 96)] * 2


@pytest.mark.quick
def test_a_sample_does_not_see_its_batch(model):
    x, context = inputs(8, 6, (3, 70, 33))
    sigma = torch.tensor([0.2, 0.9, 0.5])
    together = model.velocity(x, sigma, context)
    for i in range(3):
        assert difference(together[i], model.velocity(x[i:i + 1], sigma[i].item(), context[i:i + 1])[0]) < 2e-5


@pytest.mark.quick
def test_checkpointing_keeps_gradients(theirs):
    x, context = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = ours(theirs).requires_grad_(True)
        model.checkpointing = checkpointing
        model.velocity(x, 0.4, context).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_compiled_blocks_share_code_and_keep_values(tmp_path, monkeypatch):
    """Graph capture without code generation, which would take minutes here; the GPU test runs the real thing."""
    compiled, graphs = nn.Module.compile, []

    def capture(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled(block, backend=capture, fullgraph=True))
    reference(n_layers=6).save_pretrained(tmp_path / "transformer")
    fast = zimage.Z_IMAGE.load(tmp_path, "cpu", torch.float32, compile=True)
    fast.checkpointing = True
    plain = zimage.Z_IMAGE.load(tmp_path, "cpu", torch.float32)
    x, context = inputs(lengths=(5, 5))
    student = lora.create(fast, 2, 2, seed=0)
    assert difference(fast.velocity(x, 0.5, context, student), plain.velocity(x, 0.5, context)) < 1e-5
    assert len(graphs) == 5 < len(fast.blocks())  # image and caption, each without and with a gradient; joint sequence


# ---------------------------------------------------------------------------------------------------- loading
@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer")
    return tmp_path


def rewrite(folder, change):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_loads_what_diffusers_saves(theirs, tmp_path, shard):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "100KB")
    model = zimage.Z_IMAGE.load(tmp_path, "cpu", torch.float32)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    x, context = inputs()
    assert difference(model.velocity(x, 0.5, context), their_velocity(theirs, x, 0.5, context)) < 1e-4


@pytest.mark.quick
def test_bfloat16_inside_float32_outside(folder, model):
    half = zimage.Z_IMAGE.load(folder, "cpu", torch.bfloat16)
    half.checkpointing = True
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    x, context = inputs()
    v, exact = half.velocity(x, 0.5, context), model.velocity(x, 0.5, context)
    assert v.dtype == torch.float32 and v.isfinite().all()
    assert (v - exact).norm() < 0.05 * exact.norm()


@pytest.mark.quick
@pytest.mark.parametrize("change, message", [
    (lambda weights: weights.pop("layers.1.attention.to_k.weight"), "to_k.weight is missing"),
    (lambda weights: weights.update(extra=torch.zeros(1)), "unknown tensor extra"),
    (lambda weights: weights.update(x_pad_token=torch.zeros(1, 47)), "x_pad_token has shape"),
])
def test_weights_load_strictly(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        zimage.Z_IMAGE.load(folder, "cpu", torch.float32)


def test_missing_shard(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    lost = sorted((tmp_path / "transformer").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=lost.name):
        zimage.Z_IMAGE.load(tmp_path, "cpu", torch.float32)


@pytest.mark.quick
@pytest.mark.parametrize("key, value", [
    ("n_layers", None), ("axes_lens", None), ("all_patch_size", [2, 4]), ("all_f_patch_size", [2]), ("qk_norm", False),
    ("siglip_feat_dim", 16), ("n_kv_heads", 1), ("axes_dims", [8, 8, 10]), ("axes_dims", [7, 7, 10]),
])
def test_config_is_checked(folder, key, value):
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    if value is None:
        del config[key]
    else:
        config[key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=key) as error:
        zimage.Z_IMAGE.load(folder, "cpu", torch.float32)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- limits
def test_position_tables_end_where_diffusers_tables_end():
    """A caption padded to 64 puts the image at 65: a table of 66 positions is the smallest that will do."""
    x, context = inputs(8, 6, (40,))
    for axes_lens in ([65, 4, 3], [66, 3, 3], [66, 4, 2]):
        theirs = reference(axes_lens=axes_lens)
        with pytest.raises(IndexError):
            their_velocity(theirs, x, 0.5, context)
        with pytest.raises(InputError, match="at most|fewer than"):
            ours(theirs, axes_lens=axes_lens).velocity(x, 0.5, context)
    theirs = reference(axes_lens=[66, 4, 3])
    v = ours(theirs, axes_lens=[66, 4, 3]).velocity(x, 0.5, context)
    assert difference(v, their_velocity(theirs, x, 0.5, context)) < 1e-4


@pytest.mark.quick
@pytest.mark.parametrize("x, lengths, width, message", [
    (torch.zeros(1, 3, 8, 8), [5], 20, "3 channels"),
    (torch.zeros(1, 4, 8, 7), [5], 20, "8x7"),
    (torch.zeros(2, 4, 8, 8), [5], 20, "1 for 2"),
    (torch.zeros(1, 4, 8, 8), [5], 21, "expected .tokens, 20"),
    (torch.zeros(1, 4, 8, 8), [0], 20, "expected .tokens, 20"),
])
def test_wrong_inputs(model, x, lengths, width, message):
    with pytest.raises(InputError, match=message):
        model.velocity(x, 0.5, [torch.zeros(n, width) for n in lengths])


# ---------------------------------------------------------------------------------------------------- CUDA
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_bfloat16_and_compile(folder, model, compile):
    half = zimage.Z_IMAGE.load(folder, "cuda", torch.bfloat16, compile=compile)
    half.checkpointing = True
    student = lora.create(half, 4, 8, seed=0)
    for height, width, lengths in ((8, 8, (5, 5)), (16, 8, (5, 40)), (12, 12, (70, 3))):
        x, context = inputs(height, width, lengths)
        exact = model.velocity(x, 0.5, context)
        v = half.velocity(x.cuda(), torch.tensor(0.5), [c.cuda() for c in context], student)
        assert v.dtype == torch.float32 and (v.cpu() - exact).norm() < 0.05 * exact.norm()
        v.square().mean().backward()
    assert all(B.grad is not None and B.grad.isfinite().all() for _, B in student.weights.values())
