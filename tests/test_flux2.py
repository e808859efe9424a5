"""FLUX.2-klein's transformer on small random configurations against diffusers and PEFT, and its loading."""
import json

import pytest
import torch
from conftest import fill_b
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_model import assert_same_gradient, difference
from torch import nn

import lora
from networks import flux2
from networks.flux2 import Context
from plumbing import lora_files
from plumbing.files import InputError

CONFIG = dict(patch_size=1, in_channels=16, out_channels=None, num_layers=2, num_single_layers=2, attention_head_dim=16,
              num_attention_heads=3, joint_attention_dim=20, timestep_guidance_channels=32, mlp_ratio=2.5,
              axes_dims_rope=[2, 6, 4, 4], rope_theta=2000, eps=1e-6, guidance_embeds=False)
# height, width, words of each sample, sizes of its references, sigma
CASES = {
    "square": (8, 8, [7, 7], [[], []], 0.5),
    "tall, one reference": (12, 4, [5], [[(6, 10)]], 0.9),
    "wide, two references": (4, 12, [6, 6], [[(8, 8), (2, 6)]] * 2, 1.0),
    "as many tokens in other shapes": (8, 8, [6, 6], [[(4, 8)], [(8, 4)]], 0.7),
    "other numbers of words": (6, 8, [3, 30], [[], []], 0.3),
    "mixed, one sigma per sample": (8, 6, [40, 3, 9], [[], [(6, 10)], [(2, 2), (8, 4), (4, 4)]], (0.0, 0.3, 0.95)),
    "one token": (2, 2, [1], [[]], 0.25),
    "far positions": (2, 64, [512], [[(64, 2), (2, 2)]], 0.6),
}
SCHEDULER = dict(_class_name="FlowMatchEulerDiscreteScheduler", base_image_seq_len=256, base_shift=0.5,
                 invert_sigmas=False, max_image_seq_len=4096, max_shift=1.15, num_train_timesteps=1000, shift=3.0,
                 shift_terminal=None, stochastic_sampling=False, time_shift_type="exponential", use_beta_sigmas=False,
                 use_dynamic_shifting=True, use_exponential_sigmas=False, use_karras_sigmas=False)
RANK, ALPHA = 3, 6


def reference(seed: int = 0, **changes) -> Flux2Transformer2DModel:
    """A diffusers model with every parameter random and unit gain, so that modulation and norms matter."""
    reference = Flux2Transformer2DModel(**CONFIG | changes).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 1 + 0.2 * noise)
    return reference


def ours(theirs: Flux2Transformer2DModel, **changes) -> flux2.Flux2Transformer:
    """Our model with the same weights."""
    model = flux2.Flux2Transformer(CONFIG | changes).requires_grad_(False)
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def their_velocity(theirs, x, sigma, context):
    """What Flux2KleinPipeline does around its transformer, sample by sample: it has one set of references per batch."""
    pipeline, out = Flux2KleinPipeline, []
    for latent, s, c in zip(x, torch.as_tensor(sigma).expand(len(x)), context):
        square = pipeline._patchify_latents(latent[None])
        ids, tokens = pipeline._prepare_latent_ids(square), pipeline._pack_latents(square)
        all_ids, all_tokens = ids, tokens
        if c.references:
            references = [pipeline._patchify_latents(r[None]) for r in c.references]
            all_ids = torch.cat([ids, pipeline._prepare_image_ids(references)], dim=1)
            all_tokens = torch.cat([tokens, *map(pipeline._pack_latents, references)], dim=1)
        v = theirs(hidden_states=all_tokens, timestep=s[None], encoder_hidden_states=c.text[None], img_ids=all_ids,
                   txt_ids=pipeline._prepare_text_ids(c.text[None]), guidance=None, return_dict=False)[0]
        v = pipeline._unpack_latents_with_ids(v[:, :tokens.shape[1]], ids, *square.shape[2:])
        out.append(pipeline._unpatchify_latents(v))
    return torch.cat(out)


def inputs(case="mixed, one sigma per sample", channels=4, seed=1):
    """x, sigma and contexts of a case."""
    height, width, words, sizes, sigma = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(words), channels, height, width, generator=generator)
    context = [Context(torch.randn(n, CONFIG["joint_attention_dim"], generator=generator),
                       tuple(torch.randn(channels, *size, generator=generator) for size in part))
               for n, part in zip(words, sizes)]
    return x, torch.tensor(sigma), context


@pytest.fixture(scope="module")
def theirs():
    return reference()


@pytest.fixture(scope="module")
def model(theirs):
    return ours(theirs)


@pytest.fixture(scope="module")
def adapter(model):
    return fill_b(lora.create(model, RANK, ALPHA, seed=0), seed=100)


# ---------------------------------------------------------------------------------------------------- parity
@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_velocity_and_gradient_equal_diffusers(case, theirs, model):
    x, sigma, context = inputs(case)
    x.requires_grad_()
    v, v_theirs = model.velocity(x, sigma, context), their_velocity(theirs, x, sigma, context)
    assert_same_gradient(x, v, v_theirs, at_least=0.1)


@pytest.mark.parametrize("changes", [
    dict(in_channels=12, attention_head_dim=8, num_attention_heads=5, axes_dims_rope=[2, 2, 2, 2], eps=1e-3),
    dict(num_layers=1, num_single_layers=3, mlp_ratio=1.0, rope_theta=100, timestep_guidance_channels=16),
])
def test_other_configurations(changes):
    theirs = reference(3, **changes)
    model = ours(theirs, **changes)
    x, sigma, context = inputs(channels=model.in_channels)
    assert model.multiple == 2 and 4 * model.in_channels == theirs.config.in_channels
    assert difference(model.velocity(x, sigma, context), their_velocity(theirs, x, sigma, context)) < 1e-4


@pytest.mark.quick
def test_every_parameter_gets_their_gradient():
    theirs, (x, sigma, context) = reference().requires_grad_(True), inputs()
    model = ours(theirs).requires_grad_(True)
    their_velocity(theirs, x, sigma, context).square().sum().backward()
    model.velocity(x, sigma, context).square().sum().backward()
    mine = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        largest = parameter.grad.abs().max()
        assert largest > 1e-2 and difference(mine[name].grad, parameter.grad) < 1e-5 * max(1, largest), name


def test_text_alone_and_sigma_as_a_number(model):
    x, _, context = inputs("other numbers of words")
    v = model.velocity(x, 0.3, context)
    assert torch.equal(v, model.velocity(x, torch.tensor(0.3), [c.text for c in context]))
    assert difference(v, model.velocity(x, torch.tensor([0.3, 0.3]), context)) < 1e-5


@pytest.mark.quick
def test_references_count_in_their_order(model):
    x, sigma, (context, _) = inputs("wide, two references")
    v = model.velocity(x[:1], sigma, [context])
    for references in ((), context.references[:1], context.references[::-1]):
        assert difference(v, model.velocity(x[:1], sigma, [Context(context.text, references)])) > 0.05


# ---------------------------------------------------------------------------------------------------- padding
def test_a_sample_does_not_see_its_batch(model):
    x, sigma, context = inputs()
    together = model.velocity(x, sigma, context)
    for i in range(len(x)):
        assert difference(together[i], model.velocity(x[i:i + 1], sigma[i].item(), context[i:i + 1])[0]) < 2e-5


def test_padding_is_never_seen(model, monkeypatch):
    x, sigma, context = inputs()
    together, padded = model.velocity(x, sigma, context), []

    def garbage(rows, batch_first):
        padded.append(len({len(row) for row in rows}) > 1)
        return nn.utils.rnn.pad_sequence(rows, batch_first, padding_value=33)

    monkeypatch.setattr(flux2, "pad_sequence", garbage)
    assert torch.equal(model.velocity(x, sigma, context), together) and all(padded) and len(padded) == 3


def test_mask_only_when_lengths_differ(model, monkeypatch):
    masks, attention = [], flux2.F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attention(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(flux2.F, "scaled_dot_product_attention", record)
    for case, mask in (("wide, two references", None), ("as many tokens in other shapes", None),
                       ("other numbers of words", (2, 1, 1, 30 + 12)),
                       ("mixed, one sigma per sample", (3, 1, 1, 40 + 12 + 15))):
        masks.clear()
        model.velocity(*inputs(case))
        assert masks == [mask] * 4, case


# ---------------------------------------------------------------------------------------------------- LoRA
def test_adapter_equals_merged_weights(model, adapter):
    merged, (x, sigma, context) = reference(), inputs()
    for name, (A, B) in adapter.weights.items():
        merged.get_submodule(name).weight += ALPHA / RANK * (B @ A).detach()
    v = model.velocity(x, sigma, context, adapter)
    assert difference(v, model.velocity(x, sigma, context)) > 0.1
    assert difference(v, their_velocity(merged, x, sigma, context)) < 1e-4
    new = lora.create(model, RANK, ALPHA, seed=1)
    assert torch.equal(model.velocity(x, sigma, context, new), model.velocity(x, sigma, context))


@pytest.mark.quick
def test_lora_reaches_all_of_every_block_as_in_peft(model, adapter):
    """Every matrix has PEFT's gradient; the layers are all Linears of the blocks, the embedders and modulation none."""
    theirs, (x, sigma, context) = reference(), inputs()
    linears = {name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linears if "transformer_blocks." in name}
    assert set(model.lora_names()) == set(model.adaptable_names()) == inside and len(inside) == 2 * 12 + 2 * 2
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sorted(inside)))
    parameters = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    mine = {}
    for name, (A, B) in adapter.weights.items():
        mine[f"{name}.lora_A.default.weight"], mine[f"{name}.lora_B.default.weight"] = A, B
    assert parameters.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(mine[name])
    goal = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    v_theirs = their_velocity(theirs, x, sigma, context)
    gradients_theirs = torch.autograd.grad((v_theirs * goal).sum(), parameters.values())
    gradients = torch.autograd.grad((model.velocity(x, sigma, context, adapter) * goal).sum(),
                                    [mine[name] for name in parameters])
    for name, a, b in zip(parameters, gradients, gradients_theirs, strict=True):
        assert a.abs().max() > 0.1 and difference(a, b) < 1e-4, name


def test_diffusers_and_we_load_our_file(model, adapter, tmp_path):
    theirs, (x, sigma, context) = reference(), inputs()
    pipeline = Flux2KleinPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=theirs)
    lora.save(adapter, tmp_path / "student.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="student.safetensors")
    v = model.velocity(x, sigma, context, adapter)
    assert difference(v, their_velocity(theirs, x, sigma, context)) < 1e-4
    ours = lora_files.load(tmp_path / "student.safetensors", model)
    assert difference(v, model.velocity(x, sigma, context, ours)) < 1e-5


@pytest.mark.quick
def test_teacher_between_forward_and_backward_under_checkpointing(theirs):
    """The backward pass recomputes each block with the student's adapter and text, though the teacher ran last."""
    gradients = []
    for checkpointing, teacher_between in ((False, False), (True, False), (True, True)):
        model, (x, sigma, context) = ours(theirs), inputs()
        model.checkpointing = checkpointing
        student = fill_b(lora.create(model, RANK, ALPHA, seed=0), seed=100)
        teacher = lora.copy(fill_b(lora.create(model, RANK, ALPHA, seed=9), seed=109, scale=0.5))
        v = model.velocity(x, sigma, [c.text for c in context], student)
        if teacher_between:
            with torch.no_grad():
                assert difference(v, model.velocity(x, sigma, context, teacher)) > 0.1
        v.square().mean().backward()
        gradients.append([tensor.grad for tensor in student.parameters()])
        assert not any(tensor.requires_grad for tensor in teacher.parameters())
    assert all(a.any() and torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_checkpointing_stores_less(model, adapter):
    """With checkpointing, the graph keeps the inputs of the blocks and not what is inside them."""
    stored = []
    for checkpointing in (False, True):
        sizes, (x, sigma, context) = [], inputs()
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.velocity(x, sigma, context, adapter)
        model.checkpointing = False
        stored.append(sum(sizes))
    assert stored[1] < stored[0] / 3


def test_compiled_blocks_share_code_and_keep_values(tmp_path, monkeypatch):
    """Graph capture without code generation, which would take minutes here."""
    compiled, graphs = nn.Module.compile, []

    def capture(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled(block, backend=capture, fullgraph=True))
    reference(num_layers=4, num_single_layers=4).save_pretrained(tmp_path / "transformer")
    fast = flux2.KLEIN.load(tmp_path, "cpu", torch.float32, compile=True)
    fast.checkpointing = True
    plain = flux2.KLEIN.load(tmp_path, "cpu", torch.float32)
    x, sigma, context = inputs("wide, two references")
    student = lora.create(fast, 2, 2, seed=0)
    assert difference(fast.velocity(x, sigma, context, student), plain.velocity(x, sigma, context)) < 1e-5
    assert len(graphs) == 3 < len(fast.blocks())  # double without and with a gradient on its inputs, single


# ---------------------------------------------------------------------------------------------------- loading
@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer")
    return tmp_path


def fails(folder, message):
    """Both `check` and `load` say so, in one line that names the folder."""
    for act in (flux2.KLEIN.check, lambda folder: flux2.KLEIN.load(folder, "cpu", torch.float32)):
        with pytest.raises(InputError, match=message) as error:
            act(folder)
        assert str(folder / "transformer") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_loads_what_diffusers_saves(theirs, tmp_path, shard):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "100KB")
    flux2.KLEIN.check(tmp_path)
    model, (x, sigma, context) = flux2.KLEIN.load(tmp_path, "cpu", torch.float32), inputs()
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert difference(model.velocity(x, sigma, context), their_velocity(theirs, x, sigma, context)) < 1e-4


def test_bfloat16_inside_float32_outside(folder, model, adapter):
    half, (x, sigma, context) = flux2.KLEIN.load(folder, "cpu", torch.bfloat16), inputs()
    half.checkpointing = True
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    v, exact = half.velocity(x, sigma, context, adapter), model.velocity(x, sigma, context, adapter)
    assert v.dtype == torch.float32 and (v - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("change, message", [
    (lambda weights: weights.pop("single_transformer_blocks.1.attn.norm_k.weight"), "norm_k.weight is missing"),
    (lambda weights: weights.update(extra=torch.zeros(1)), "unknown tensor extra"),
    (lambda weights: weights.update({"proj_out.weight": torch.zeros(16, 47)}), "proj_out.weight has shape .16, 47."),
])
def test_weights_load_strictly(folder, change, message):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    fails(folder, message)


def test_missing_shard(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    lost = sorted((tmp_path / "transformer").glob("*.safetensors"))[1]
    lost.unlink()
    fails(tmp_path, lost.name)


def test_guidance_embedding_is_refused(tmp_path):
    reference(guidance_embeds=True).save_pretrained(tmp_path / "transformer")
    fails(tmp_path, "guidance_embeds True .false only.")


@pytest.mark.parametrize("key, value", [
    *((key, None) for key in flux2.KEYS), ("patch_size", 2), ("in_channels", 18), ("out_channels", 32),
    ("timestep_guidance_channels", 31), ("axes_dims_rope", [8, 4, 4]), ("axes_dims_rope", [1, 7, 4, 4]),
    ("axes_dims_rope", [4, 4, 4, 8]),
])
def test_config_is_checked(folder, key, value):
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {key: value}
    if value is None:
        del config[key]
    path.write_text(json.dumps(config))
    fails(folder, key)


@pytest.mark.parametrize("x, context, message", [
    (torch.zeros(1, 3, 8, 8), Context(torch.zeros(5, 20)), "latents: shape .3, 8, 8."),
    (torch.zeros(1, 4, 8, 7), Context(torch.zeros(5, 20)), "latents: shape .4, 8, 7."),
    (torch.zeros(2, 4, 8, 8), Context(torch.zeros(5, 20)), "1 for 2"),
    (torch.zeros(1, 4, 8, 8), torch.zeros(5, 21), "expected .tokens, 20"),
    (torch.zeros(1, 4, 8, 8), torch.zeros(0, 20), "expected .tokens, 20"),
    (torch.zeros(1, 4, 8, 8), Context(torch.zeros(5, 20), (torch.zeros(4, 6, 5),)), "reference: shape .4, 6, 5."),
    (torch.zeros(1, 4, 8, 8), Context(torch.zeros(5, 20), (torch.zeros(1, 4, 6, 6),)), "reference: shape .1, 4, 6, 6."),
])
def test_wrong_inputs(model, x, context, message):
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        model.velocity(x, 0.5, [context])
