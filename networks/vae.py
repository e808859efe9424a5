"""The autoencoders between pictures and latents, by hand, with the checkpoint's names: diffusers' AutoencoderKL
(Z-Image) and AutoencoderKLFlux2 (FLUX.2-klein).

D-OPSD happens in latent space; this file is only the way in (once per training image) and the way out (to look).
Both run in float32 always: Z-Image's checkpoint says force_upcast, and its activations overflow half precision. (On
CUDA torch lets convolutions use TF32.)
The networks are alike; `_class_name` in vae/config.json chooses how raw latents z become those of model space:
  AutoencoderKL       latents = (z - shift_factor) * scaling_factor, two numbers of the config
  AutoencoderKLFlux2  latents = unpack((pack(z) - running_mean) / sqrt(running_var + batch_norm_eps)), where pack turns
                      2x2 squares of positions into channels; the statistics of each such channel are in the weights
z is the mean of the posterior (not a sample of it, so that a picture has one latent and can be cached). Both give
unpacked latents (B, c, H/f, W/f).
"""
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plumbing.files import InputError, load_strictly, read_json, tensors

ENCODER_BLOCK, DECODER_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"
KL, FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"  # _class_name in vae/config.json
KEYS = ("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "in_channels", "out_channels")
KEYS_OF = {KL: ("scaling_factor",), FLUX2: ("batch_norm_eps", "patch_size")}
SQUARE = 2  # side of the squares of latents that FLUX.2 packs into channels


def named(**modules: nn.Module) -> nn.Sequential:
    """These modules, one after the other, with the checkpoint's names."""
    return nn.Sequential(OrderedDict(modules))


class ResnetBlock(nn.Module):
    """Two (GroupNorm, SiLU, 3x3 convolution) and a shortcut. (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """One head over all positions. (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """Residual block, attention (optional in the config), residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.Sequential(*([Attention(channels, groups)] if attention else []))
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def downsample(channels: int) -> nn.Sequential:
    """Stride-2 convolution, padded on the right and the bottom only. (B, c, H, W) -> (B, c, H/2, W/2)."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def upsample(channels: int) -> nn.Sequential:
    """Nearest neighbour, then a convolution. (B, c, H, W) -> (B, c, 2H, 2W)."""
    return named(twice=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))


def levels(widths: list[int], layers: int, groups: int, name: str, change: Callable[[int], nn.Module]) -> nn.Sequential:
    """For each width the residual blocks of one resolution and, but for the last, the change to the next, by `name`."""
    parts = []
    for i, width in enumerate(widths):
        changes = {name: nn.Sequential(change(width))} if i + 1 < len(widths) else {}
        blocks = (ResnetBlock(width if j else widths[max(i - 1, 0)], width, groups) for j in range(layers))
        parts.append(named(resnets=nn.Sequential(*blocks), **changes))
    return nn.Sequential(*parts)


def encoder(config: dict) -> nn.Sequential:
    """(B, 3, H, W) -> (B, 2 * latent channels, H/f, W/f): posterior mean and log variance."""
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    return named(
        conv_in=nn.Conv2d(config["in_channels"], widths[0], 3, padding=1),
        down_blocks=levels(widths, config["layers_per_block"], groups, "downsamplers", downsample),
        mid_block=Middle(widths[-1], groups, config.get("mid_block_add_attention", True)),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1))


def decoder(config: dict) -> nn.Sequential:
    """(B, latent channels, h, w) -> (B, 3, h * f, w * f)."""
    widths = (config.get("decoder_block_out_channels") or config["block_out_channels"])[::-1]
    groups = config["norm_num_groups"]
    return named(
        conv_in=nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1),
        mid_block=Middle(widths[0], groups, config.get("mid_block_add_attention", True)),
        up_blocks=levels(widths, config["layers_per_block"] + 1, groups, "upsamplers", upsample),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1))


def pack(z: Tensor) -> Tensor:
    """Squares of positions into channels, in the order (c, row, column): (B, c, h, w) -> (B, 4c, h/2, w/2)."""
    return rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=SQUARE, q=SQUARE)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return rearrange(packed, "b (c p q) h w -> b c (h p) (w q)", p=SQUARE, q=SQUARE)


class Autoencoder(nn.Module):
    """Pictures <-> latents in model space. `factor` is the side of the square of pixels behind one latent position."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.factor, self.channels = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.quant_conv, self.post_quant_conv = (
            nn.Conv2d(channels, channels, 1) if config.get(key, True) else nn.Identity()
            for key, channels in (("use_quant_conv", 2 * self.channels), ("use_post_quant_conv", self.channels)))
        if config.get("_class_name", KL) == FLUX2:  # mean and variance of packed channels, constants in train mode too
            self.bn, self.eps, packed = nn.Module(), config["batch_norm_eps"], self.channels * SQUARE ** 2
            self.bn.register_buffer("running_mean", torch.zeros(packed))
            self.bn.register_buffer("running_var", torch.ones(packed))
        else:
            self.scale = config["scaling_factor"]
            self.shift = config.get("shift_factor") or 0.0                  # null in the configs of older autoencoders

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1], H and W divisible by `factor` -> mean, log variance, each (B, c, H/f, W/f)."""
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Raw latents (B, c, h, w), before the normalisation of model space -> (B, 3, h * f, w * f), unclamped."""
        return self.decoder(self.post_quant_conv(z))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of FLUX.2's packed channels, (4c, 1, 1) each."""
        mean, variance = (rearrange(part, "c -> c 1 1") for part in self.bn.buffers())
        return mean, (variance + self.eps).sqrt()

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents (B, c, h, w) -> model space, the same shape. FLUX.2 needs even h and w."""
        if hasattr(self, "bn"):
            mean, deviation = self._statistics()
            return unpack((pack(z) - mean) / deviation)
        return (z - self.shift) * self.scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        if hasattr(self, "bn"):
            mean, deviation = self._statistics()
            return unpack(pack(latents) * deviation + mean)
        return latents / self.scale + self.shift

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) float32 in [-1, 1] -> latents in model space (B, c, H/f, W/f) float32."""
        return self.normalise(self.posterior(image.float())[0])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents in model space (B, c, h, w) -> image (B, 3, h * f, w * f) float32, clamped to [-1, 1]."""
        return self.reconstruct(self.denormalise(latents.float())).clamp(-1, 1)


def read_config(path: Path) -> dict:
    """The content of a vae/config.json that describes one of the two autoencoders. Raises InputError."""
    kind = read_json(path).get("_class_name", KL)
    if kind not in (KL, FLUX2):
        raise InputError(f"{path}: _class_name {kind!r} is not supported; use an {KL} or an {FLUX2}")
    config = read_json(path, *KEYS, *KEYS_OF[kind])
    for key, only in (("down_block_types", ENCODER_BLOCK), ("up_block_types", DECODER_BLOCK)):
        if not isinstance(config.get(key, []), list) or any(name != only for name in config.get(key, [])):
            raise InputError(f"{path}: {key} {config[key]} is not supported; use an {kind} of {only} only")
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    if any(width % groups for width in widths):
        raise InputError(f"{path}: norm_num_groups {groups} does not divide block_out_channels {widths}; use the file "
                         "that belongs to this checkpoint")
    if kind == FLUX2 and config["patch_size"] != [SQUARE, SQUARE]:
        raise InputError(f"{path}: patch_size {config['patch_size']} is not supported; "
                         f"use an {kind} with [{SQUARE}, {SQUARE}]")
    return config


def load(folder: Path, device: torch.device | str) -> Autoencoder:
    """The frozen autoencoder of a checkpoint folder, float32 on `device`. Raises InputError."""
    path = Path(folder) / "vae"
    config = read_config(path / "config.json")
    with torch.device("meta"):
        vae = Autoencoder(config)
    load_strictly(vae, tensors(path), path, device, torch.float32, ignore=("bn.num_batches_tracked",))  # never used
    return vae.eval()
