"""Stage 1: the autoencoder, from pictures of the world. `python -m tiny.making.train_vae` (about 14 minutes, one core)

f = 4, 8 latent channels, no attention. Most of the time it sees 32x32 crops (cheap), then whole pictures, so that the
borders are right. Loss: L1 + L1 of the differences between neighbours (edges) + a small KL term that keeps the latents
near unit scale. Afterwards the latents' mean and standard deviation become shift_factor and scaling_factor.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from networks.vae import DECODER_BLOCK, ENCODER_BLOCK, Autoencoder
from plumbing.files import write_json, write_tensors
from tiny.making.stage import Stage
from tiny.models import Z_IMAGE_FOLDER
from tiny.world import Renderer, draw_scenes, generator, grid

CONFIG = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.36.0", "act_fn": "silu", "in_channels": 3,
          "out_channels": 3, "latent_channels": 8, "block_out_channels": [16, 32, 48], "layers_per_block": 1,
          "norm_num_groups": 8, "sample_size": 64, "down_block_types": [ENCODER_BLOCK] * 3,
          "up_block_types": [DECODER_BLOCK] * 3, "mid_block_add_attention": False, "use_quant_conv": False,
          "use_post_quant_conv": False, "force_upcast": True, "latents_mean": None, "latents_std": None,
          "scaling_factor": 1.0, "shift_factor": 0.0}


def edges(picture: Tensor) -> Tensor:
    """Differences between neighbours, flattened: (B, 3, H, W) -> (n,)."""
    return torch.cat([picture.diff(dim=2).flatten(), picture.diff(dim=3).flatten()])


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (picture - truth).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tiny/vae"), help="folder of the state and the log")
    parser.add_argument("--model", type=Path, default=Z_IMAGE_FOLDER, help="checkpoint folder to write vae/ into")
    parser.add_argument("--steps", type=int, default=7000, help="training steps")
    parser.add_argument("--whole", type=float, default=0.25,
                        help="share of the steps, the last ones, that see whole pictures")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights, scenes and noise")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    render, model = Renderer(), Autoencoder(CONFIG)
    stage = Stage(model, options.out, options.steps, adam=3e-3, muon=0.02,
                  is_matrix=lambda name: ".conv" in name and "conv_in" not in name and "conv_out" not in name)
    held_out = render.draw(draw_scenes(64, generator(1, 0), held_out="object"), generator(1, 1))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(options.seed, step)
        picture = render.draw(draw_scenes(16, g, styled=0.5), g)
        if step < options.steps * (1 - options.whole):
            y, x = (int(torch.randint(9, (1,), generator=g)) * 4 for _ in range(2))
            picture = picture[:, :, y:y + 32, x:x + 32]
        mean, log_variance = model.posterior(picture)
        z = mean + torch.randn(mean.shape, generator=g) * (0.5 * log_variance).exp()
        decoded = model.reconstruct(z)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = (decoded - picture).abs().mean() + 0.5 * (edges(decoded) - edges(picture)).abs().mean() + 5e-4 * kl
        return loss, {"kl": kl.item(), "psnr": psnr(decoded.detach(), picture)}

    for step in stage.run(loss_of):
        vae = stage.averaged()
        decoded = vae.decode(vae.encode(held_out))
        print(f"\nstep {step}: {psnr(decoded, held_out):.2f} dB on 64 held-out pictures")
        grid(torch.cat([held_out[:12], decoded[:12]]), 12).save(options.out / "pictures.png")

    vae = stage.averaged()
    latents = vae.encode(render.draw(draw_scenes(2048, generator(2, 0)), generator(2, 1)))
    config = {**CONFIG, "scaling_factor": round(1 / float(latents.std()), 4),
              "shift_factor": round(float(latents.mean()), 4)}
    print("std of each channel:", [round(float(s), 2) for s in latents.std((0, 2, 3)) * config["scaling_factor"]])
    write_json(options.model / "vae" / "config.json", config)
    write_tensors(options.model / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict(), {"format": "pt"})


if __name__ == "__main__":
    main()
