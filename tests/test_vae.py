"""vae.py against diffusers' AutoencoderKL and AutoencoderKLFlux2 on small random weights."""
import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline
from safetensors.torch import load_file

from networks import vae
from plumbing.files import InputError, write_tensors

pytestmark = pytest.mark.quick
CONFIGS = {
    "like Z-Image: no quant convs, attention, shift": dict(
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
    "embedded: no attention": dict(
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, shift_factor=None),
    "older: quant convs": dict(use_quant_conv=True, use_post_quant_conv=True, shift_factor=None),
}
FLUX2_CONFIGS = {
    "like klein": {},
    "narrow decoder, no quant convs": dict(
        decoder_block_out_channels=(4, 8, 16), use_quant_conv=False, use_post_quant_conv=False),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_reference(folder, kind=AutoencoderKL, **extra) -> AutoencoderKL | AutoencoderKLFlux2:
    torch.manual_seed(0)
    widths = (8, 16, 24)
    # the eps is much larger than klein's, so that a forgotten one shows
    extra |= {"scaling_factor": 0.3611} if kind is AutoencoderKL else {"batch_norm_eps": 0.3}
    reference = kind(block_out_channels=widths, latent_channels=4, layers_per_block=2, norm_num_groups=4,
                     down_block_types=("DownEncoderBlock2D",) * len(widths),
                     up_block_types=("UpDecoderBlock2D",) * len(widths), **extra)
    for parameter in reference.parameters():                       # norms and biases too, so that each one matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    for buffer in reference.buffers():                             # BatchNorm statistics, all different; not the count
        buffer += torch.rand_like(buffer) if buffer.is_floating_point() else 0
    reference.save_pretrained(folder / "vae")
    return reference


def edit_config(folder, **changes) -> None:
    """Change keys of vae/config.json; None removes one."""
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def drop_tensor(folder, name: str) -> None:
    path = folder / "vae" / WEIGHTS
    weights = load_file(path)
    del weights[name]
    write_tensors(path, weights)


def flux2_picture(reference: AutoencoderKLFlux2, packed: torch.Tensor) -> torch.Tensor:
    """What the end of Flux2KleinPipeline.__call__ does with the packed latents of the last step."""
    mean = reference.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(reference.bn.running_var.view(1, -1, 1, 1) + reference.config.batch_norm_eps)
    return reference.decode(Flux2KleinPipeline._unpatchify_latents(packed * std + mean)).sample.clamp(-1, 1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 24, 40)])
def test_encode_and_decode_equal_diffusers(tmp_path, name, shape):
    reference = random_reference(tmp_path, **CONFIGS[name])
    ours = vae.load(tmp_path, "cpu")
    shift = reference.config.shift_factor or 0.0
    image = torch.rand(shape) * 2 - 1
    with torch.no_grad():
        expected = (reference.encode(image).latent_dist.mode() - shift) * reference.config.scaling_factor
        latents = torch.randn_like(expected)
        picture = reference.decode(latents / reference.config.scaling_factor + shift).sample.clamp(-1, 1)
    assert ours.encode(image).shape == (shape[0], 4, shape[2] // ours.factor, shape[3] // ours.factor)
    assert (ours.encode(image) - expected).abs().max() < 1e-4
    assert (ours.decode(latents) - picture).abs().max() < 1e-4


@pytest.mark.parametrize("name", FLUX2_CONFIGS)
def test_flux2_encode_and_decode_equal_diffusers(tmp_path, name):
    reference = random_reference(tmp_path, AutoencoderKLFlux2, **FLUX2_CONFIGS[name])
    pipeline = Flux2KleinPipeline(scheduler=None, vae=reference, text_encoder=None, tokenizer=None, transformer=None)
    ours = vae.load(tmp_path, "cpu")
    image = torch.rand(2, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        packed = pipeline._encode_vae_image(image, generator=None)
        expected = pipeline._unpatchify_latents(packed)
        latents = torch.randn_like(expected)
        picture = flux2_picture(reference, pipeline._patchify_latents(latents))
    assert expected.shape == (2, ours.channels, 24 // ours.factor, 40 // ours.factor) == (2, 4, 6, 10)
    assert ours.encode(image).dtype == ours.decode(latents).dtype == torch.float32
    assert (ours.encode(image) - expected).abs().max() < 1e-4
    assert (ours.decode(latents) - picture).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderKLFlux2])
def test_denormalise_inverts_normalise(tmp_path, kind):
    random_reference(tmp_path, kind)
    ours = vae.load(tmp_path, "cpu")
    z = torch.randn(2, 4, 6, 10)
    latents = ours.normalise(z)
    assert (latents - z).abs().max() > 0.1
    assert (ours.denormalise(latents) - z).abs().max() < 1e-5


def test_posterior_variance_equals_diffusers(tmp_path):
    reference = random_reference(tmp_path, **CONFIGS["older: quant convs"])
    ours = vae.load(tmp_path, "cpu")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = reference.encode(image).latent_dist
        mean, log_variance = ours.posterior(image)
    assert (mean - expected.mean).abs().max() < 1e-4
    assert (log_variance - expected.logvar).abs().max() < 1e-4


def test_loads_strictly(tmp_path):
    random_reference(tmp_path, **CONFIGS["embedded: no attention"])
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "latent_channels": 6}))
    with pytest.raises(InputError, match="shape"):
        vae.load(tmp_path, "cpu")
    path.write_text(json.dumps({**config, "use_quant_conv": True}))
    with pytest.raises(InputError, match="quant_conv.*missing"):
        vae.load(tmp_path, "cpu")
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "scaling_factor"}))
    with pytest.raises(InputError, match="'scaling_factor' is missing"):
        vae.load(tmp_path, "cpu")
    path.write_text(json.dumps({**config, "up_block_types": ["AttnUpDecoderBlock2D"] * 3}))
    with pytest.raises(InputError, match="up_block_types"):
        vae.load(tmp_path, "cpu")


def test_flux2_loads_strictly(tmp_path):
    random_reference(tmp_path, AutoencoderKLFlux2)
    assert "bn.num_batches_tracked" in load_file(tmp_path / "vae" / WEIGHTS)
    image = torch.rand(1, 3, 16, 24)
    latents = vae.load(tmp_path, "cpu").encode(image)
    drop_tensor(tmp_path, "bn.num_batches_tracked")                # a count of training steps, which nothing here needs
    assert torch.equal(vae.load(tmp_path, "cpu").encode(image), latents)
    path = tmp_path / "vae" / WEIGHTS
    write_tensors(path, load_file(path) | {"bn.weight": torch.ones(16)})
    with pytest.raises(InputError, match="unknown tensor bn.weight"):
        vae.load(tmp_path, "cpu")
    drop_tensor(tmp_path, "bn.weight")
    drop_tensor(tmp_path, "bn.running_var")
    with pytest.raises(InputError, match="bn.running_var is missing.*download"):
        vae.load(tmp_path, "cpu")


REFUSED = {
    "patch": ({"patch_size": [2, 1]}, r"patch_size \[2, 1\] is not supported; use .*\[2, 2\]"),
    "no patch": ({"patch_size": None}, "'patch_size' is missing"),
    "no eps": ({"batch_norm_eps": None}, "'batch_norm_eps' is missing"),
    "blocks": ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types .*use an AutoencoderKLFlux2"),
    "class": ({"_class_name": "AutoencoderKLWan"},
              "_class_name 'AutoencoderKLWan' is not supported; use an AutoencoderKL or an AutoencoderKLFlux2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flux2_refuses_other_configs(tmp_path, name):
    changes, message = REFUSED[name]
    random_reference(tmp_path, AutoencoderKLFlux2)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=r"vae/config\.json: .*" + message) as error:
        vae.load(tmp_path, "cpu")
    assert "\n" not in str(error.value)


def test_a_config_without_class_is_an_autoencoder_kl(tmp_path):
    random_reference(tmp_path)
    image = torch.rand(1, 3, 16, 24)
    latents = vae.load(tmp_path, "cpu").encode(image)
    edit_config(tmp_path, _class_name=None)
    assert torch.equal(vae.load(tmp_path, "cpu").encode(image), latents)
