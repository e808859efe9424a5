"""vae.py against diffusers' AutoencoderKL on small random weights."""
import json

import pytest
import torch
from diffusers import AutoencoderKL

import vae
from files import InputError

CONFIGS = {
    "like Z-Image: no quant convs, attention, shift": dict(
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
    "embedded: no attention": dict(
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, shift_factor=None),
    "older: quant convs": dict(use_quant_conv=True, use_post_quant_conv=True, shift_factor=None),
}


def random_reference(folder, **extra) -> AutoencoderKL:
    torch.manual_seed(0)
    widths = extra.pop("block_out_channels", (8, 16, 24))
    reference = AutoencoderKL(block_out_channels=widths, latent_channels=4, layers_per_block=2, norm_num_groups=4,
                              down_block_types=("DownEncoderBlock2D",) * len(widths),
                              up_block_types=("UpDecoderBlock2D",) * len(widths), scaling_factor=0.3611, **extra)
    for parameter in reference.parameters():                       # norms and biases too, so that each one matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    reference.save_pretrained(folder / "vae")
    return reference


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
