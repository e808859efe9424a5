"""The FLUX.2-klein transformer, written out by hand: the second backbone, with the `velocity` of model.py.

D-OPSD (arXiv 2605.05204) trains it with an edit context: the teacher sees the target as a reference image, that is as
latents beside the text. A reader of the method can skip this file. Module and parameter names equal those of the
diffusers checkpoint, so that weights load strictly and without renaming.

Latents are (B, 32, H / 8, W / 8). The network's tokens are their 2x2 squares: 128 channels, in the order (channel, row,
column). That packing, position ids and padding stay inside this file. The VAE's BatchNorm has statistics of packed
channels, so the VAE side packs, normalises and unpacks before latents come here; noise needs none of it.

Differs from the official code:
1. LoRA reaches every block. The official list has FLUX.1's layer names, with which PEFT silently trains only the
   attention of the double-stream blocks, a small part of the intended parameters.
2. Training walks the grid of inference, `time_shift`: 1, .967, .908, .767 for four steps at 1024x1024. The official
   training grid forgets the pipeline's u: 1, .952, .832, .0098.
3. The adapter is an argument of `velocity`, handed down to each block, never the state of a module (see lora.py).
4. Each sample has its own references, in number and size; the pipeline repeats one set for its whole batch.
5. Latents and sigma are float32 up to the first Linear; in bf16 the pipeline rounds both at every step.
6. Only what klein uses: no guidance embedding, no cache of references. Other configurations are refused.
"""
import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora import Adapter, AdapterBlock, linear
from model import Context, attend, check_scheduler, contexts_of, padding_mask, rope_table, run, sinusoids
from networks.vae import SQUARE, named, unpack  # 2, the side of the squares of latents that are packed into tokens
from plumbing.backbone import Backbone, TextStyle
from plumbing.files import InputError
from plumbing.recipes import FLUX2, SMALL_FLUX2

KEYS = ("patch_size", "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps",
        "guidance_embeds")
# Linear layers of the embedded time, each shared by all blocks of a kind: how many vectors shift, scale and gate those.
MODULATIONS = {"double_stream_modulation_txt": 6, "double_stream_modulation_img": 6, "single_stream_modulation": 3,
               "norm_out": 2}
TIME_SCALE = 1000.0  # the network was trained on this times sigma
GAP = 10             # on the first position axis, reference image j is at 10 + 10 j and the image itself at 0


def check_config(config: dict) -> None:
    """Refuse, with an InputError, configurations that are not FLUX.2-klein's kind of transformer."""
    sides, head = list(config["axes_dims_rope"]), config["attention_head_dim"]
    channels, out, waves = config["in_channels"], config.get("out_channels"), config["timestep_guidance_channels"]
    for wrong, what in (
        (config["guidance_embeds"], f"guidance_embeds {config['guidance_embeds']} (false only)"),
        (config["patch_size"] != 1, f"patch_size {config['patch_size']} (1 only)"),
        (channels % SQUARE ** 2, f"in_channels {channels} (multiples of {SQUARE ** 2} only)"),
        (out not in (None, channels), f"out_channels {out} (null or equal to in_channels only)"),
        (waves % 2, f"timestep_guidance_channels {waves} (even numbers only)"),
        (len(sides) != 4 or any(side % 2 for side in sides) or sum(sides) != head,
         f"axes_dims_rope {sides} (four even numbers whose sum is attention_head_dim = {head} only)"),
    ):
        if wrong:
            raise InputError(f"transformer config: unsupported {what}; use a FLUX.2-klein checkpoint")


# ---------------------------------------------------------------------------------------------------- schedule
def empirical_mu(tokens: int, steps: int) -> float:
    """log of the time shift: fits to the number of image tokens at 10 and at 200 steps, and a line between the two."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > 4300 else at_10 + (at_200 - at_10) * (steps - 10) / 190


def time_shift(scheduler_config: dict, steps: int, height: int, width: int) -> float:
    """The shift of the sampler's grid, which depends on the number of steps and on the sides of the latents.

    scheduler_config: content of scheduler/scheduler_config.json; height, width: of latents x (128 for 1024 pixels).
    Source: Flux2KleinPipeline of diffusers 0.42.1. Raises InputError.
    """
    kind = {"time_shift_type": "exponential"}                           # diffusers' choice, too, if it is missing
    check_scheduler(kind | scheduler_config, "FLUX.2-klein", use_dynamic_shifting=True, **kind)
    return math.exp(empirical_mu((height // SQUARE) * (width // SQUARE), steps))


def draw_noise(generator: torch.Generator, channels: int, height: int, width: int) -> Tensor:
    """x at sigma = 1, (1, channels, height, width), the numbers that Flux2KleinPipeline draws: packed ones."""
    return unpack(torch.randn(1, channels * SQUARE ** 2, height // SQUARE, width // SQUARE, generator=generator))


# ---------------------------------------------------------------------------------------------------- pieces
def to_tokens(x: Tensor) -> Tensor:
    """Latents (..., C, H, W) -> tokens (..., H W / 4, 4 C)."""
    return rearrange(x, "... c (h p) (w q) -> ... (h w) (c p q)", p=SQUARE, q=SQUARE)


def grid_ids(t: int, latents: Tensor, device: torch.device) -> Tensor:
    """Positions (H W / 4, 4) of the tokens of latents (..., H, W): the square in row r and column c is (t, r, c, 0)."""
    rows, columns = (torch.arange(side // SQUARE, device=device) for side in latents.shape[-2:])
    return F.pad(F.pad(torch.cartesian_prod(rows, columns), (1, 0), value=t), (0, 1))


def modulated(x: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then scale and shift (b, 1, dim)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def swiglu(layers: nn.ModuleDict, x: Tensor, adapter: AdapterBlock, name: str) -> Tensor:
    """The feed-forward called `name` in its block: two inner projections in one Linear, the first gates the second."""
    gate, value = linear(layers["linear_in"], x, adapter, f"{name}.linear_in").chunk(2, dim=-1)
    return linear(layers["linear_out"], F.silu(gate) * value, adapter, f"{name}.linear_out")


class DoubleBlock(nn.Module):
    """Two streams, text and image, with weights of their own; they meet in the attention."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim, bias=False) for name in (
            "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")})
        self.attn["to_out"] = nn.Sequential(nn.Linear(dim, dim, bias=False))  # the checkpoint says to_out.0
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            self.attn[name] = nn.RMSNorm(dim // heads, eps=eps)
        self.ff, self.ff_context = (nn.ModuleDict({"linear_in": nn.Linear(dim, 2 * hidden, bias=False),
                                                   "linear_out": nn.Linear(hidden, dim, bias=False)}) for _ in range(2))

    def forward(self, streams: tuple[Tensor, Tensor], rope: Tensor, mask: Tensor | None, of_text: tuple[Tensor, ...],
                of_image: tuple[Tensor, ...], adapter: AdapterBlock) -> tuple[Tensor, Tensor]:
        """streams: text (B, L, dim) and image (B, N, dim); mask (B, 1, 1, L + N) bool with True = attend, or None.

        of_text, of_image: shift, scale, gate of the attention, then of the feed-forward; (b, 1, dim), b = 1 or B.
        """
        def heads(x: Tensor, name: str) -> Tensor:
            return linear(attn[name], x, adapter, f"attn.{name}").unflatten(-1, (self.heads, -1))

        (text, image), attn, eps = streams, self.attn, self.eps
        t, i = modulated(text, eps, *of_text[:2]), modulated(image, eps, *of_image[:2])
        q = torch.cat([attn["norm_added_q"](heads(t, "add_q_proj")), attn["norm_q"](heads(i, "to_q"))], dim=1)
        k = torch.cat([attn["norm_added_k"](heads(t, "add_k_proj")), attn["norm_k"](heads(i, "to_k"))], dim=1)
        v = torch.cat([heads(t, "add_v_proj"), heads(i, "to_v")], dim=1)                # (B, L + N, heads, D)
        t, i = attend(q, k, v, rope, mask).split([text.shape[1], image.shape[1]], dim=1)
        text = text + of_text[2] * linear(attn["to_add_out"], t, adapter, "attn.to_add_out")
        image = image + of_image[2] * linear(attn["to_out"], i, adapter, "attn.to_out.0")
        text = text + of_text[5] * swiglu(self.ff_context, modulated(text, eps, *of_text[3:5]), adapter, "ff_context")
        return text, image + of_image[5] * swiglu(self.ff, modulated(image, eps, *of_image[3:5]), adapter, "ff")


class SingleBlock(nn.Module):
    """One stream for text and image; attention and SwiGLU side by side, one Linear into both and one out of both."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.eps, self.heads, self.widths = eps, heads, [dim, dim, dim, hidden, hidden]
        self.attn = nn.ModuleDict({"to_qkv_mlp_proj": nn.Linear(dim, sum(self.widths), bias=False),
                                   "to_out": nn.Linear(dim + hidden, dim, bias=False),
                                   "norm_q": nn.RMSNorm(dim // heads, eps=eps),
                                   "norm_k": nn.RMSNorm(dim // heads, eps=eps)})

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, of_both: tuple[Tensor, ...],
                adapter: AdapterBlock) -> Tensor:
        """x (B, S, dim), mask (B, 1, 1, S) or None; of_both: shift, scale, gate."""
        y = linear(self.attn["to_qkv_mlp_proj"], modulated(x, self.eps, *of_both[:2]), adapter, "attn.to_qkv_mlp_proj")
        q, k, v, gate, value = y.split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))          # (B, S, heads, D) each
        y = attend(self.attn["norm_q"](q), self.attn["norm_k"](k), v, rope, mask)       # (B, S, dim)
        y = torch.cat([y, F.silu(gate) * value], dim=-1)                                # (B, S, dim + hidden)
        return x + of_both[2] * linear(self.attn["to_out"], y, adapter, "attn.to_out")


# ---------------------------------------------------------------------------------------------------- the network
class Flux2Transformer(nn.Module):
    """Diffusion transformer over [text, image, references]: double-stream blocks, then single-stream blocks."""

    def __init__(self, config: dict):
        """config: the content of transformer/config.json (other keys are ignored). Raises InputError."""
        super().__init__()
        check_config(config)
        packed, self.eps, heads = config["in_channels"], config["eps"], config["num_attention_heads"]
        dim = heads * config["attention_head_dim"]
        sizes = (dim, heads, int(dim * config["mlp_ratio"]), self.eps)
        self.in_channels, self.multiple = packed // SQUARE ** 2, SQUARE  # of latents; their sides are multiples of it
        self.axes, self.theta = list(config["axes_dims_rope"]), config["rope_theta"]
        self.checkpointing = False
        self.x_embedder = nn.Linear(packed, dim, bias=False)
        self.context_embedder = nn.Linear(config["joint_attention_dim"], dim, bias=False)
        self.waves = config["timestep_guidance_channels"]
        self.time_guidance_embed = named(timestep_embedder=named(
            linear_1=nn.Linear(self.waves, dim, bias=False), silu=nn.SiLU(), linear_2=nn.Linear(dim, dim, bias=False)))
        for name, parts in MODULATIONS.items():
            self.add_module(name, named(silu=nn.SiLU(), linear=nn.Linear(dim, parts * dim, bias=False)))
        self.transformer_blocks = nn.ModuleList(DoubleBlock(*sizes) for _ in range(config["num_layers"]))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*sizes) for _ in range(config["num_single_layers"]))
        self.proj_out = nn.Linear(dim, packed, bias=False)

    def blocks(self) -> dict[str, nn.Module]:
        """Name -> block, for all repeated blocks."""
        return {f"{group}.{i}": block for group in ("transformer_blocks", "single_transformer_blocks")
                for i, block in enumerate(getattr(self, group))}

    def lora_names(self) -> list[str]:
        """Full names of the Linear layers that LoRA trains: all of every block, attention and feed-forward."""
        return [f"{name}.{part}" for name, block in self.blocks().items() for part, layer in block.named_modules()
                if isinstance(layer, nn.Linear)]

    adaptable_names = lora_names  # all that an adapter may change: modulation belongs to no block here

    def velocity(self, x: Tensor, sigma: float | Tensor, context: Sequence[Context | Tensor],
                 adapter: Adapter | None = None) -> Tensor:
        """v = eps - x0 at noise level sigma (the convention of this project; Eq. 5 and 6 up to its time direction).

        x: (B, C, H, W) float32, H and W even; sigma: float, () or (B,) in [0, 1]; context: B `Context`s, or text
        tensors alone, with any numbers of tokens and references, of any float dtype; adapter: LoRA or None.
        Returns (B, C, H, W) float32; inside, everything runs in the weights' dtype. Raises InputError.
        """
        contexts = contexts_of(x, context, self.context_embedder.in_features)
        self._check(x, contexts)
        dtype, length = self.proj_out.weight.dtype, max(len(c.text) for c in contexts)
        rope, mask = self._layout(x, contexts)

        sigma = torch.as_tensor(sigma, dtype=torch.float32).to(x.device, non_blocking=True).reshape(-1)  # (1 or B,)
        time = self.time_guidance_embed(sinusoids(sigma * TIME_SCALE, self.waves).to(dtype))        # (1 or B, dim)
        of_text, of_image, of_both, (scale, shift) = (                                      # scale first in norm_out
            getattr(self, name)(time).unsqueeze(1).chunk(parts, dim=-1)                     # (1 or B, 1, dim) each
            for name, parts in MODULATIONS.items())

        text = pad_sequence([c.text.to(x.device, dtype) for c in contexts], batch_first=True)
        text = self.context_embedder(text)                                                  # (B, L, dim)
        squares = to_tokens(x)                                                              # (B, h w, 4 C)
        references = [torch.cat([squares[0, :0], *(to_tokens(r.to(x)) for r in c.references)]) for c in contexts]
        image = self.x_embedder(torch.cat([squares, pad_sequence(references, batch_first=True)], dim=1).to(dtype))

        streams = run(self, "transformer_blocks", (text, image), rope, mask, of_text, of_image, adapter=adapter)
        y = run(self, "single_transformer_blocks", torch.cat(streams, dim=1), rope, mask, of_both, adapter=adapter)
        y = y[:, length:length + squares.shape[1]]                                          # references are dropped
        y = self.proj_out(modulated(y, self.eps, shift, scale))                             # (B, h w, 4 C)
        y = rearrange(y, "b (h w) (c p q) -> b c (h p) (w q)", h=x.shape[2] // SQUARE, p=SQUARE, q=SQUARE)
        return y.float()                                                                    # already eps - x0

    def _layout(self, x: Tensor, context: list[Context]) -> tuple[Tensor, Tensor | None]:
        """Rotary tables and mask of [text, image, references], text and references padded to the longest of the batch.

        The former is (B, S, 1, D / 2, 2), the latter (B, 1, 1, S) or None, when nothing is padded.
        """
        device = x.device
        word = torch.arange(max(len(c.text) for c in context), device=device)
        text, image = F.pad(word[:, None], (3, 0)), grid_ids(0, x, device)              # word i is (0, 0, 0, i)
        references = [torch.cat([image[:0], *(grid_ids(GAP + GAP * j, r, device) for j, r in enumerate(c.references))])
                      for c in context]
        ids = torch.cat([text, image]).expand(len(x), -1, -1)
        ids = torch.cat([ids, pad_sequence(references, batch_first=True)], dim=1)       # (B, S, 4)
        rope = rope_table(ids, self.axes, self.theta)
        lengths = [[len(c.text) for c in context], [len(image)] * len(x), [len(r) for r in references]]
        return rope, padding_mask(lengths, device)

    def _check(self, x: Tensor, context: list[Context]) -> None:
        for name, latents in [("latents", x[0])] + [("reference", r) for c in context for r in c.references]:
            shape, C = tuple(latents.shape), self.in_channels
            if len(shape) != 3 or shape[0] != C or any(side % SQUARE for side in shape[1:]) or not latents.numel():
                raise InputError(f"{name}: shape {shape}, expected ({C}, even height, even width); crop images to "
                                 "multiples of 16 pixels and use the VAE and the transformer of one checkpoint")


# ---------------------------------------------------------------------------------------------------- the record
KLEIN = Backbone(
    name="FLUX.2", class_name="Flux2Transformer2DModel", network=Flux2Transformer, keys=KEYS,
    width=lambda config: config["num_attention_heads"] * config["attention_head_dim"],
    patch_size=lambda config: SQUARE, time_shift=time_shift, draw_noise=draw_noise, takes_references=True,
    recipes=(FLUX2, SMALL_FLUX2), spec_ids={3072: "flux.2-klein-4b", 4096: "flux.2-klein-9b"},
    text_style=TextStyle(thought="<think>\n\n</think>\n\n", padded=True,
                         layers=lambda depth: (depth // 4, depth // 2, depth * 3 // 4)),
    layer_name=re.compile(r"transformer_blocks[._]\d+[._](attn[._](to|add)_|ff(_context)?[._]linear_)"
                          r"|(double|single)_blocks[._]\d"),  # not FLUX.1's, some of whose names are the same
    original_names={
        "transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks",
        "attn.to_q": "img_attn.qkv", "attn.to_k": "img_attn.qkv", "attn.to_v": "img_attn.qkv",
        "attn.add_q_proj": "txt_attn.qkv", "attn.add_k_proj": "txt_attn.qkv", "attn.add_v_proj": "txt_attn.qkv",
        "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
        "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"})
