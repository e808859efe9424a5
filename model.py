"""The Z-Image transformer, written out by hand: the backbone whose velocity D-OPSD trains and evaluates.

D-OPSD (arXiv 2605.05204) leaves the network itself unchanged; this file is v_theta of its Eq. 5 and 6. Module and
parameter names equal those of the diffusers checkpoint, so that weights load strictly and without renaming.

Differs from the official code:
1. Time runs sigma 1 -> 0 and the result is v = eps - x0; the network itself counts t = 1 - sigma and predicts x0 - eps.
2. The adapter is an argument of `velocity`, handed down to each block, never the state of a module (see lora.py).
3. One batched tensor per sequence instead of lists; no attention mask whenever the padded captions are equally long.
4. Rotary embeddings in real arithmetic, which torch.compile can fuse; the same numbers as the complex form.
5. Only what Z-Image uses: one patch size, one frame, no SigLIP branch. Other configurations are refused.
"""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import Adapter, AdapterBlock, linear
from plumbing.backbone import Backbone, TextStyle
from plumbing.files import InputError
from plumbing.recipes import SMALL, TURBO

KEYS = ("all_patch_size", "all_f_patch_size", "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads",
        "n_kv_heads", "norm_eps", "qk_norm", "cap_feat_dim", "rope_theta", "t_scale", "axes_dims", "axes_lens")
LORA_TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
                "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
MODULATION = "adaLN_modulation.0"  # not trained by us, but adapter files of other trainers have it
SEQUENCE_MULTIPLE = 32  # caption and image are each padded to this with learned tokens, which are attended to
TIME_WIDTH = 256        # widest time embedding, and the number of its sinusoids
QK_EPS = 1e-5           # of the query and key norms, whatever norm_eps says
# Options of scheduler_config.json that would give another grid or another step than the one below.
UNSUPPORTED = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
               "invert_sigmas", "shift_terminal", "stochastic_sampling")


@dataclass(frozen=True)
class Context:
    """What one sample is conditioned on, for every backbone (Eq. 4)."""
    text: Tensor                         # (L, D) features of the prompt; all L tokens are attended to
    references: tuple[Tensor, ...] = ()  # latents (C, h, w) of reference images, of any sizes (FLUX.2 only)

    def to(self, device: torch.device) -> "Context":
        text, *references = (part.to(device, non_blocking=True) for part in (self.text, *self.references))
        return Context(text, tuple(references))


# ---------------------------------------------------------------------------------------------------- facts
def scheduler_shift(scheduler_config: dict) -> float:
    """The `shift` of a scheduler_config.json whose other options leave the plain grid as it is. Raises InputError."""
    name = scheduler_config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"scheduler_config.json: _class_name {name} is not supported; "
                         "use a checkpoint with FlowMatchEulerDiscreteScheduler")
    for key in UNSUPPORTED:
        if scheduler_config.get(key):
            raise InputError(f"scheduler_config.json: {key} = {scheduler_config[key]} is not supported; "
                             "use a checkpoint with a plain shift (Z-Image-Turbo has shift 3.0)")
    shift = scheduler_config.get("shift")
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < float("inf"):
        raise InputError(f"scheduler_config.json: shift = {shift} is not a positive number; "
                         "use the config that belongs to this checkpoint (Z-Image-Turbo has 3.0)")
    return float(shift)


def time_shift(scheduler_config: dict, steps: int, height: int, width: int) -> float:
    """The shift of the sampler's grid (rollout.py); here steps and sides of the latents do not matter."""
    return scheduler_shift(scheduler_config)


def draw_noise(generator: torch.Generator, channels: int, height: int, width: int) -> Tensor:
    """x at sigma = 1, (1, channels, height, width), the numbers that diffusers' pipeline draws from this generator."""
    return torch.randn(1, channels, height, width, generator=generator)


def check_config(config: dict) -> None:
    """Refuse, with an InputError, configurations that are not Z-Image's kind of transformer."""
    head, sides = config["dim"] // config["n_heads"], list(config["axes_dims"])
    for wrong, what in (
        (len(config["all_patch_size"]) != 1, f"all_patch_size {config['all_patch_size']} (one size only)"),
        (list(config["all_f_patch_size"]) != [1], f"all_f_patch_size {config['all_f_patch_size']} ([1] only)"),
        (config.get("siglip_feat_dim") is not None, f"siglip_feat_dim {config.get('siglip_feat_dim')} (null only)"),
        (config["n_kv_heads"] != config["n_heads"], f"n_kv_heads {config['n_kv_heads']} (equal to n_heads only)"),
        (not config["qk_norm"], f"qk_norm {config['qk_norm']} (true only)"),
        (len(sides) != 3 or len(config["axes_lens"]) != 3, f"axes_dims {sides} (three axes only)"),
        (any(side % 2 for side in sides), f"axes_dims {sides} (even numbers only)"),
        (sum(sides) != head or head * config["n_heads"] != config["dim"],
         f"axes_dims {sides} (they must sum to dim / n_heads = {config['dim'] / config['n_heads']:g})"),
    ):
        if wrong:
            raise InputError(f"transformer config: unsupported {what}; use a text-to-image Z-Image checkpoint")


# ---------------------------------------------------------------------------------------------------- pieces
def rope_table(ids: Tensor, axes: list[int], theta: float) -> Tensor:
    """Rotary cosines and sines for position ids.

    ids: (b, N, 3) integers; axes: channels per axis; returns (b, N, 1, sum(axes) / 2, 2) in float32.
    """
    def frequencies(side: int) -> Tensor:
        return theta ** -(torch.arange(0, side, 2, dtype=torch.float64, device=ids.device) / side)

    # angles in float64: at position 1000 a float32 product would be off by 1e-4
    angles = torch.cat([ids[..., i, None] * frequencies(side) for i, side in enumerate(axes)], dim=-1)
    angles = angles.float().unsqueeze(2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring channel pairs (2i, 2i + 1) of x (B, N, heads, D) by the angles of `rope`, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))                                            # (B, N, heads, D / 2, 2)
    if torch.compiler.is_compiling():                       # which fuses these, and cannot fuse complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).type_as(x)


def first(lengths: list[int], longest: int, device: torch.device) -> Tensor:
    """(B, longest) bool: True at the first `lengths[i]` places of row i. The host does not wait for the GPU."""
    return torch.tensor(lengths).to(device, non_blocking=True)[:, None] > torch.arange(longest, device=device)


def sinusoids(t: Tensor, width: int) -> Tensor:
    """t (b,) float32, already scaled -> its cosines and sines at width / 2 frequencies (b, width)."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float32, device=t.device)
                            / (width // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """Sinusoids of the time, then two Linears."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, 1024), nn.SiLU(), nn.Linear(1024, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (b,) float32, already scaled -> (b, width) in the weights' dtype."""
        return self.mlp(sinusoids(t, TIME_WIDTH).to(next(self.mlp.parameters()).dtype))


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])  # a list because the checkpoint says to_out.0
        self.norm_q = nn.RMSNorm(dim // heads, eps=QK_EPS)
        self.norm_k = nn.RMSNorm(dim // heads, eps=QK_EPS)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, adapter: AdapterBlock) -> Tensor:
        q = linear(self.to_q, x, adapter, "attention.to_q").unflatten(-1, (self.heads, -1))  # (B, N, heads, D)
        k = linear(self.to_k, x, adapter, "attention.to_k").unflatten(-1, (self.heads, -1))
        v = linear(self.to_v, x, adapter, "attention.to_v").unflatten(-1, (self.heads, -1))
        q, k = rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        y = y.transpose(1, 2).flatten(2)                                                # (B, N, dim)
        return linear(self.to_out[0], y, adapter, "attention.to_out.0")


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor, adapter: AdapterBlock) -> Tensor:
        gate = F.silu(linear(self.w1, x, adapter, "feed_forward.w1"))
        return linear(self.w2, gate * linear(self.w3, x, adapter, "feed_forward.w3"), adapter, "feed_forward.w2")


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; scaled and gated by the time unless `modulated` is off."""

    def __init__(self, config: dict, modulated: bool):
        super().__init__()
        dim, eps = config["dim"], config["norm_eps"]
        self.attention = Attention(dim, config["n_heads"])
        self.feed_forward = FeedForward(dim, int(dim / 3 * 8))
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.modulated = modulated
        if modulated:
            self.adaLN_modulation = nn.ModuleList([nn.Linear(min(dim, TIME_WIDTH), 4 * dim)])

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, time: Tensor | None,
                adapter: AdapterBlock) -> Tensor:
        """x (B, N, dim), mask (B, 1, 1, N) bool with True = attend, or None; time (b, width) with b = 1 or B."""
        if time is None:                                                                # not modulated
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, mask, adapter))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x), adapter))
        modulation = linear(self.adaLN_modulation[0], time, adapter, MODULATION).unsqueeze(1)
        scale_a, gate_a, scale_f, gate_f = modulation.chunk(4, dim=-1)                  # (b, 1, dim) each
        y = self.attention(self.attention_norm1(x) * (1 + scale_a), rope, mask, adapter)
        x = x + gate_a.tanh() * self.attention_norm2(y)
        y = self.feed_forward(self.ffn_norm1(x) * (1 + scale_f), adapter)
        return x + gate_f.tanh() * self.ffn_norm2(y)


class FinalLayer(nn.Module):
    """Tokens to patches, scaled by the time."""

    def __init__(self, dim: int, patch_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, TIME_WIDTH), dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(time).unsqueeze(1)))


# ---------------------------------------------------------------------------------------------------- the network
class ZImageTransformer(nn.Module):
    """Single-stream diffusion transformer over [image tokens, caption tokens]."""

    def __init__(self, config: dict):
        """config: the content of transformer/config.json (other keys are ignored). Raises InputError."""
        super().__init__()
        check_config(config)
        dim, refiners = config["dim"], config["n_refiner_layers"]
        self.in_channels = config["in_channels"]
        self.patch_size = self.multiple = config["all_patch_size"][0]  # latent sides must be multiples of this
        self.caption_channels = config["cap_feat_dim"]
        self.t_scale, self.theta = config["t_scale"], config["rope_theta"]
        self.axes_dims, self.axes_lens = list(config["axes_dims"]), list(config["axes_lens"])
        self.checkpointing = False
        self.key = f"{self.patch_size}-1"
        patch_channels = self.patch_size ** 2 * self.in_channels

        self.all_x_embedder = nn.ModuleDict({self.key: nn.Linear(patch_channels, dim)})
        self.all_final_layer = nn.ModuleDict({self.key: FinalLayer(dim, patch_channels)})
        self.noise_refiner = nn.ModuleList([Block(config, modulated=True) for _ in range(refiners)])
        self.context_refiner = nn.ModuleList([Block(config, modulated=False) for _ in range(refiners)])
        self.layers = nn.ModuleList([Block(config, modulated=True) for _ in range(config["n_layers"])])
        self.t_embedder = TimeEmbedder(min(dim, TIME_WIDTH))
        self.cap_embedder = nn.Sequential(nn.RMSNorm(self.caption_channels, eps=config["norm_eps"]),
                                          nn.Linear(self.caption_channels, dim))
        self.x_pad_token = nn.Parameter(0.02 * torch.randn(1, dim))
        self.cap_pad_token = nn.Parameter(0.02 * torch.randn(1, dim))

    # ------------------------------------------------------------------------------------------------ names
    def blocks(self) -> dict[str, Block]:
        """Name -> block, for all repeated blocks."""
        return {f"{group}.{i}": block for group in ("noise_refiner", "context_refiner", "layers")
                for i, block in enumerate(getattr(self, group))}

    def lora_names(self) -> list[str]:
        """Full names of the Linear layers that LoRA trains: attention and feed-forward of every block."""
        return [f"{block}.{target}" for block in self.blocks() for target in LORA_TARGETS]

    def adaptable_names(self) -> list[str]:
        """Full names of the Linear layers that an adapter may change: those we train and the blocks' modulation."""
        return self.lora_names() + [f"{name}.{MODULATION}" for name, block in self.blocks().items() if block.modulated]

    # ------------------------------------------------------------------------------------------------ forward
    def velocity(self, x: Tensor, sigma: float | Tensor, context: Sequence[Context | Tensor],
                 adapter: Adapter | None = None) -> Tensor:
        """v = eps - x0 at noise level sigma (the convention of this project; Eq. 5 and 6 up to its time direction).

        x: (B, C, H, W) float32, H and W multiples of the patch; sigma: float, () or (B,) in [0, 1];
        context: B `Context`s or their texts (L_i, cap_feat_dim), of any float dtype; adapter: LoRA or None.
        Returns (B, C, H, W) float32; inside, everything runs in the weights' dtype. Raises InputError.
        """
        if any(isinstance(c, Context) and c.references for c in context):
            raise InputError("context: Z-Image takes no reference images; use a FLUX.2 checkpoint for them")
        captions = [c.text if isinstance(c, Context) else c for c in context]
        self._check(x, captions)
        dtype, (height, width) = self.x_pad_token.dtype, (side // self.patch_size for side in x.shape[2:])
        lengths = [-(-len(c) // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE for c in captions]
        self._check_axes(max(lengths), height, width)
        image_rope, caption_rope = self._rope(lengths, height, width, x.device)
        mask = self._mask(lengths, x.device)

        sigma = torch.as_tensor(sigma, dtype=torch.float32).to(x.device, non_blocking=True).reshape(-1)  # (1 or B,)
        time = self.t_embedder((1 - sigma) * self.t_scale)                                  # (1 or B, time width)

        tokens = rearrange(x.to(dtype), "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch_size, q=self.patch_size)
        tokens = self.all_x_embedder[self.key](tokens)                                      # (B, h w, dim)
        pads = -tokens.shape[1] % SEQUENCE_MULTIPLE
        if pads:
            tokens = torch.cat([tokens, self.x_pad_token.expand(len(x), pads, -1)], dim=1)  # (B, N, dim)
        tokens = self._run("noise_refiner", tokens, image_rope, None, time, adapter)

        caption = self._embed_caption(captions, max(lengths), dtype)                        # (B, L, dim)
        caption = self._run("context_refiner", caption, caption_rope, mask, None, adapter)

        if mask is not None:                                                                # all image tokens count
            mask = F.pad(mask, (tokens.shape[1], 0), value=True)                            # (B, 1, 1, N + L)
        rope = torch.cat([image_rope, caption_rope], dim=1)
        y = self._run("layers", torch.cat([tokens, caption], dim=1), rope, mask, time, adapter)
        y = self.all_final_layer[self.key](y[:, :height * width], time)                     # (B, h w, p q c)
        y = rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=self.patch_size, q=self.patch_size)
        return -y.float()                                                                   # the network says x0 - eps

    def _run(self, group: str, x: Tensor, rope: Tensor, mask: Tensor | None, time: Tensor | None,
             adapter: Adapter | None) -> Tensor:
        """All blocks of one group. The adapter's tensors are arguments, so a recomputation sees the same ones."""
        for i, block in enumerate(getattr(self, group)):
            part = adapter.block(f"{group}.{i}") if adapter is not None else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, time, part, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, mask, time, part)
        return x

    def _embed_caption(self, captions: list[Tensor], longest: int, dtype: torch.dtype) -> Tensor:
        """(B, longest, dim): embedded captions, each followed by pad tokens.

        A caption shorter than the longest one gets more pad tokens than its own 32-multiple asks for; the mask
        hides the surplus.
        """
        device = self.cap_pad_token.device
        rows = nn.utils.rnn.pad_sequence([c.to(device, dtype) for c in captions], batch_first=True)
        rows = F.pad(self.cap_embedder(rows), (0, 0, 0, longest - rows.shape[1]))
        return torch.where(first([len(c) for c in captions], longest, device)[..., None], rows, self.cap_pad_token)

    def _mask(self, lengths: list[int], device: torch.device) -> Tensor | None:
        """(B, 1, 1, L) bool, True = attend; None when all lengths agree, so that flash kernels apply."""
        if min(lengths) == max(lengths):
            return None
        return first(lengths, max(lengths), device)[:, None, None, :]

    def _rope(self, lengths: list[int], height: int, width: int, device: torch.device):
        """Rotary tables of image and caption; leading size 1 when all captions have one length.

        Positions (axis 0, row, column): caption token i is (1 + i, 0, 0), its pads count on; patch (r, c) comes after
        the padded caption, (length + 1, r, c); pads of the image are (0, 0, 0).
        """
        if min(lengths) == max(lengths):
            lengths = lengths[:1]
        caption = torch.zeros(1, max(lengths), 3, dtype=torch.long, device=device)
        caption[..., 0] = torch.arange(1, max(lengths) + 1, device=device)
        patches = height * width
        image = torch.zeros(len(lengths), patches + -patches % SEQUENCE_MULTIPLE, 3, dtype=torch.long, device=device)
        image[:, :patches, 0] = torch.tensor(lengths).to(device, non_blocking=True)[:, None] + 1
        image[:, :patches, 1] = torch.arange(height, device=device).repeat_interleave(width)
        image[:, :patches, 2] = torch.arange(width, device=device).repeat(height)
        tables = [rope_table(ids, self.axes_dims, self.theta) for ids in (image, caption)]
        return tables[0], tables[1].expand(len(lengths), -1, -1, -1, -1)

    def _check(self, x: Tensor, captions: list[Tensor]) -> None:
        batch, channels, height, width = x.shape
        if channels != self.in_channels:
            raise InputError(f"latents: {channels} channels, the transformer has {self.in_channels}; "
                             "use the VAE and the transformer of one checkpoint")
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise InputError(f"latents: {height}x{width} is not divisible by the patch size {self.patch_size}; "
                             "choose another height or width")
        if len(captions) != batch:
            raise InputError(f"contexts: {len(captions)} for {batch} latents; give one context per latent")
        for c in captions:
            if c.ndim != 2 or c.shape[1] != self.caption_channels or not len(c):
                raise InputError(f"context: shape {tuple(c.shape)}, expected (tokens, {self.caption_channels}); "
                                 "use the text encoder and the transformer of one checkpoint")

    def _check_axes(self, caption: int, height: int, width: int) -> None:
        """The checkpoint was trained for positions below axes_lens only."""
        if caption + 1 >= self.axes_lens[0]:
            raise InputError(f"caption: {caption} tokens after padding, the transformer takes fewer than "
                             f"{self.axes_lens[0] - 1}; shorten the prompt")
        for side, patches, limit in (("height", height, self.axes_lens[1]), ("width", width, self.axes_lens[2])):
            if patches > limit:
                raise InputError(f"{side}: {patches} patches, the transformer takes at most {limit}; "
                                 f"choose a smaller {side}")


# ---------------------------------------------------------------------------------------------------- the record
Z_IMAGE = Backbone(
    name="Z-Image", class_name="ZImageTransformer2DModel", network=ZImageTransformer, keys=KEYS,
    width=lambda config: config["dim"], patch_size=lambda config: config["all_patch_size"][0], time_shift=time_shift,
    draw_noise=draw_noise, takes_references=False, recipes=(TURBO, SMALL),
    text_style=TextStyle(thought="", layers=lambda depth: (depth - 1,), padded=False),
    layer_name=re.compile(r"(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward|adaLN)"),
    original_names={"attention.to_q": "attention.qkv", "attention.to_k": "attention.qkv",
                    "attention.to_v": "attention.qkv", "attention.to_out.0": "attention.out"})
