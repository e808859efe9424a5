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
from plumbing.backbone import Backbone, TextStyle, Transformer
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
# diffusers' values for what scheduler_config.json leaves out; others give another grid or another step than rollout.py.
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False,
             "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
             "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False}


@dataclass(frozen=True)
class Context:
    """What one sample is conditioned on, for every backbone (Eq. 4)."""
    text: Tensor                         # (L, D) features of the prompt; all L tokens are attended to
    references: tuple[Tensor, ...] = ()  # latents (C, h, w) of reference images, of any sizes (FLUX.2 only)

    def to(self, device: torch.device) -> "Context":
        text, *references = (part.to(device, non_blocking=True) for part in (self.text, *self.references))
        return Context(text, tuple(references))


# ---------------------------------------------------------------------------------------------------- facts
def check_scheduler(scheduler_config: dict, name: str, **needed) -> None:
    """Raises InputError unless a scheduler_config.json has the values of SCHEDULER, or those `needed` instead."""
    for key, value in (SCHEDULER | needed).items():
        found = (SCHEDULER | scheduler_config).get(key)
        if (found or None) != (value or None):
            raise InputError(f"scheduler_config.json: {key} = {found} is not supported with {name}; "
                             "use the scheduler of its checkpoint")


def scheduler_shift(scheduler_config: dict, *_: int) -> float:
    """The `shift` of a scheduler_config.json; the number of steps and the sides do not matter. Raises InputError."""
    check_scheduler(scheduler_config, "Z-Image")
    shift = scheduler_config.get("shift")
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < float("inf"):
        raise InputError(f"scheduler_config.json: shift = {shift} is not a positive number; "
                         "use the config that belongs to this checkpoint (Z-Image-Turbo has 3.0)")
    return float(shift)


def draw_noise(generator: torch.Generator, channels: int, height: int, width: int) -> Tensor:
    """x at sigma = 1, (1, channels, height, width), the numbers that diffusers' pipeline draws from this generator."""
    return torch.randn(1, channels, height, width, generator=generator)


def check_config(config: dict) -> None:
    """Refuse, with an InputError, configurations that are not Z-Image's kind of transformer."""
    head, sides = config["dim"] / config["n_heads"], list(config["axes_dims"])
    for wrong, what in (
        (len(config["all_patch_size"]) != 1, f"all_patch_size {config['all_patch_size']} (one size only)"),
        (list(config["all_f_patch_size"]) != [1], f"all_f_patch_size {config['all_f_patch_size']} ([1] only)"),
        (config.get("siglip_feat_dim") is not None, f"siglip_feat_dim {config.get('siglip_feat_dim')} (null only)"),
        (config["n_kv_heads"] != config["n_heads"], f"n_kv_heads {config['n_kv_heads']} (equal to n_heads only)"),
        (not config["qk_norm"], f"qk_norm {config['qk_norm']} (true only)"),
        (len(config["axes_lens"]) != 3, f"axes_lens {config['axes_lens']} (three numbers only)"),
        (len(sides) != 3 or any(side % 2 for side in sides) or sum(sides) != head,
         f"axes_dims {sides} (three even numbers whose sum is dim / n_heads = {head:g} only)"),
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


def padding_mask(parts: list[list[int]], device: torch.device) -> Tensor | None:
    """(B, 1, 1, S) bool, True = attend; None when nothing is padded, so that flash kernels apply.

    parts: B lengths for each part of the sequence; in a batch, each part is padded to the longest of them.
    """
    if all(min(lengths) == max(lengths) for lengths in parts):
        return None
    return torch.cat([first(lengths, max(lengths), device) for lengths in parts], dim=1)[:, None, None]


def sinusoids(t: Tensor, width: int) -> Tensor:
    """t (b,) float32, already scaled -> its cosines and sines at width / 2 frequencies (b, width)."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float32, device=t.device)
                            / (width // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q, k, v (B, N, heads, D), with q and k turned by their positions -> (B, N, heads * D)."""
    q, k, v = (part.transpose(1, 2) for part in (rotate(q, rope), rotate(k, rope), v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])  # a list because the checkpoint says to_out.0
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads, eps=QK_EPS), nn.RMSNorm(dim // heads, eps=QK_EPS)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, adapter: AdapterBlock) -> Tensor:
        q = linear(self.to_q, x, adapter, "attention.to_q").unflatten(-1, (self.heads, -1))  # (B, N, heads, D)
        k = linear(self.to_k, x, adapter, "attention.to_k").unflatten(-1, (self.heads, -1))
        v = linear(self.to_v, x, adapter, "attention.to_v").unflatten(-1, (self.heads, -1))
        y = attend(self.norm_q(q), self.norm_k(k), v, rope, mask)                           # (B, N, dim)
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
def contexts_of(x: Tensor, context: Sequence[Context | Tensor], width: int) -> list[Context]:
    """A `Context` for each row of x, with features (tokens, width); a text alone becomes one. Raises InputError."""
    contexts = [c if isinstance(c, Context) else Context(c) for c in context]
    if len(contexts) != len(x):
        raise InputError(f"contexts: {len(contexts)} for {len(x)} latents; give one context per latent")
    for shape in (tuple(c.text.shape) for c in contexts):
        if len(shape) != 2 or shape[1] != width or not shape[0]:
            raise InputError(f"context: shape {shape}, expected (tokens, {width}); "
                             "use the text encoder and the transformer of one checkpoint")
    return contexts


def run(model: Transformer, group: str, x, *inputs, adapter: Adapter | None):
    """x, a tensor or several, through all blocks of one group: block(x, *inputs, its part of the adapter) -> x.

    The adapter's tensors are arguments, so a recomputation sees the same ones.
    """
    for i, block in enumerate(getattr(model, group)):
        arguments = (x, *inputs, adapter.block(f"{group}.{i}") if adapter is not None else None)
        if model.checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(*arguments)
    return x


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
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Linear(TIME_WIDTH, 1024), nn.SiLU(), nn.Linear(1024, min(dim, TIME_WIDTH)))})
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
        contexts = contexts_of(x, context, self.caption_channels)
        if any(c.references for c in contexts):
            raise InputError("context: Z-Image takes no reference images; use a FLUX.2 checkpoint for them")
        lengths = [-(-len(c.text) // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE for c in contexts]
        self._check(x, max(lengths))
        dtype, (height, width) = self.x_pad_token.dtype, (side // self.patch_size for side in x.shape[2:])

        sigma = torch.as_tensor(sigma, dtype=torch.float32).to(x.device, non_blocking=True).reshape(-1)  # (1 or B,)
        time = self.t_embedder["mlp"](sinusoids((1 - sigma) * self.t_scale, TIME_WIDTH).to(dtype))  # (1 or B, width)

        tokens = rearrange(x.to(dtype), "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch_size, q=self.patch_size)
        tokens = self.all_x_embedder[self.key](tokens)                                      # (B, h w, dim)
        pads = -tokens.shape[1] % SEQUENCE_MULTIPLE
        if pads:
            tokens = torch.cat([tokens, self.x_pad_token.expand(len(x), pads, -1)], dim=1)  # (B, N, dim)
        caption = self._embed_caption([c.text for c in contexts], max(lengths), dtype)      # (B, L, dim)

        image_rope, caption_rope = self._rope(lengths, height, width, x.device)
        tokens = run(self, "noise_refiner", tokens, image_rope, None, time, adapter=adapter)
        mask = padding_mask([lengths], x.device)
        caption = run(self, "context_refiner", caption, caption_rope, mask, None, adapter=adapter)
        mask = padding_mask([[tokens.shape[1]] * len(x), lengths], x.device)                # all image tokens count
        y, rope = torch.cat([tokens, caption], dim=1), torch.cat([image_rope, caption_rope], dim=1)
        y = run(self, "layers", y, rope, mask, time, adapter=adapter)                       # (B, N + L, dim)
        y = self.all_final_layer[self.key](y[:, :height * width], time)                     # (B, h w, p q c)
        y = rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=self.patch_size, q=self.patch_size)
        return -y.float()                                                                   # the network says x0 - eps

    def _embed_caption(self, captions: list[Tensor], longest: int, dtype: torch.dtype) -> Tensor:
        """(B, longest, dim): embedded captions, each followed by pad tokens.

        A caption shorter than the longest one gets more pad tokens than its own 32-multiple asks for; the mask
        hides the surplus.
        """
        device = self.cap_pad_token.device
        rows = nn.utils.rnn.pad_sequence([c.to(device, dtype) for c in captions], batch_first=True)
        rows = F.pad(self.cap_embedder(rows), (0, 0, 0, longest - rows.shape[1]))
        return torch.where(first([len(c) for c in captions], longest, device)[..., None], rows, self.cap_pad_token)

    def _rope(self, lengths: list[int], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables of image and caption; leading size 1 when all captions have one length.

        Positions (axis 0, row, column): caption token i is (1 + i, 0, 0), its pads count on; patch (r, c) comes after
        the padded caption, (length + 1, r, c); pads of the image are (0, 0, 0).
        """
        if min(lengths) == max(lengths):
            lengths = lengths[:1]
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        image = F.pad(torch.cartesian_prod(rows, columns), (1, 0)).repeat(len(lengths), 1, 1)       # (b, h w, 3)
        image[..., 0] = torch.tensor(lengths).to(device, non_blocking=True)[:, None] + 1
        image = F.pad(image, (0, 0, 0, -height * width % SEQUENCE_MULTIPLE))                        # (b, N, 3)
        caption = F.pad(torch.arange(1, max(lengths) + 1, device=device)[None, :, None], (0, 2))    # (1, L, 3)
        tables = [rope_table(ids, self.axes_dims, self.theta) for ids in (image, caption)]
        return tables[0], tables[1].expand(len(lengths), -1, -1, -1, -1)

    def _check(self, x: Tensor, longest: int) -> None:
        """Refuse other latents, and positions for which the checkpoint was not trained; longest: of padded captions."""
        _, channels, height, width = x.shape
        if channels != self.in_channels:
            raise InputError(f"latents: {channels} channels, the transformer has {self.in_channels}; "
                             "use the VAE and the transformer of one checkpoint")
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise InputError(f"latents: {height}x{width} is not divisible by the patch size {self.patch_size}; "
                             "choose another height or width")
        for what, count, limit, remedy in (
            ("caption: {} tokens after padding", longest, self.axes_lens[0] - 2, "shorten the prompt"),
            ("height: {} patches", height // self.patch_size, self.axes_lens[1], "choose a smaller height"),
            ("width: {} patches", width // self.patch_size, self.axes_lens[2], "choose a smaller width"),
        ):
            if count > limit:
                raise InputError(f"{what.format(count)}, the transformer takes at most {limit}; {remedy}")


# ---------------------------------------------------------------------------------------------------- the record
Z_IMAGE = Backbone(
    name="Z-Image", class_name="ZImageTransformer2DModel", network=ZImageTransformer, keys=KEYS,
    width=lambda config: config["dim"], patch_size=lambda config: config["all_patch_size"][0],
    time_shift=scheduler_shift, draw_noise=draw_noise, takes_references=False, recipes=(TURBO, SMALL),
    text_style=TextStyle(thought="", layers=lambda depth: (depth - 1,), padded=False), spec_ids={3840: "z-image"},
    layer_name=re.compile(r"(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward|adaLN)"),
    original_names={"attention.to_q": "attention.qkv", "attention.to_k": "attention.qkv",
                    "attention.to_v": "attention.qkv", "attention.to_out.0": "attention.out"})
