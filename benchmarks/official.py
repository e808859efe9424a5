"""The released algorithm of D-OPSD on diffusers and PEFT, as velocities for `train.dopsd`: what we measure us against.

What it does that we do not: student and teacher are two PEFT adapters that are switched on and off; all K graphs stay
alive until one backward; text encoder, VLM and VAE stay on the GPU (`resident_bytes`). Assumed, since its code is not
here: adapters in float32, as PEFT makes them on a bf16 network, with their product in bf16 by autocast; for FLUX.2 the
layers that were meant (its own list matches a tenth of them).
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model import LORA_TARGETS, ZImageTransformer
from networks.flux2 import grid_ids, to_tokens
from networks.vae import unpack
from plumbing.backbone import Transformer

SIDES = ("student", "teacher")


def network(ours: Transformer, config: dict, rank: int, alpha: float, checkpointing: bool) -> nn.Module:
    """diffusers' transformer of this config with two adapters, on torch's default device. ours: the same, for names."""
    from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
    from peft import LoraConfig, get_peft_model
    is_z_image = isinstance(ours, ZImageTransformer)
    base = (ZImageTransformer2DModel if is_z_image else Flux2Transformer2DModel)(**config).requires_grad_(False)
    if checkpointing:
        base.enable_gradient_checkpointing()
        base.train()                                                    # diffusers checkpoints nothing in eval mode
    targets = LORA_TARGETS if is_z_image else ours.lora_names()
    lora = LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=list(targets), init_lora_weights="gaussian")
    model = get_peft_model(base, lora, adapter_name=SIDES[0])
    model.add_adapter(SIDES[1], lora)
    return model


def parameters(model: nn.Module, side: str) -> list[nn.Parameter]:
    """Of one adapter."""
    return [parameter for name, parameter in model.named_parameters() if f".{side}." in name]


def velocity(model: nn.Module, side: str, context: Sequence, dtype: torch.dtype) -> Callable[[Tensor, float], Tensor]:
    """(x, sigma) -> v in our convention, with one adapter switched on. context: of `Context`s."""
    z_image = type(model.get_base_model()).__name__ == "ZImageTransformer2DModel"

    def call(x: Tensor, sigma: float) -> Tensor:
        model.set_adapter(side)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return (z_image_velocity if z_image else klein_velocity)(model, x.to(dtype), sigma, context)
    return call


def z_image_velocity(model: nn.Module, x: Tensor, sigma: float, context: Sequence) -> Tensor:
    time = torch.full((len(x),), 1 - sigma, device=x.device)
    texts = [c.text.to(x.dtype) for c in context]
    return -torch.stack(model(list(x.unsqueeze(2)), time, texts, return_dict=False)[0]).squeeze(2).float()


def klein_velocity(model: nn.Module, x: Tensor, sigma: float, context: Sequence) -> Tensor:
    """All samples with as many words, and references of the same sizes."""
    text = torch.stack([c.text.to(x.dtype) for c in context])
    references = [torch.stack(parts).to(x.dtype) for parts in zip(*(c.references for c in context))]
    tokens = torch.cat([to_tokens(part) for part in (x, *references)], dim=1)
    ids = torch.cat([grid_ids(10 * j, part, x.device) for j, part in enumerate((x, *references))])
    words = nn.functional.pad(torch.arange(text.shape[1], device=x.device)[:, None], (3, 0))
    time = torch.full((len(x),), sigma, device=x.device)
    v = model(hidden_states=tokens, encoder_hidden_states=text, timestep=time, img_ids=ids, txt_ids=words,
              return_dict=False)[0][:, :x.shape[2] * x.shape[3] // 4]
    return unpack(v.unflatten(1, (x.shape[2] // 2, x.shape[3] // 2)).permute(0, 3, 1, 2)).float()


@torch.no_grad()
def ema(model: nn.Module, decay: float) -> None:
    """theta_bar <- m theta_bar + (1 - m) theta."""
    for fast, slow in zip(*(parameters(model, side) for side in SIDES), strict=True):
        slow.lerp_(fast, 1 - decay)


def resident_bytes(backbone: str) -> int:
    """Of text encoder, VLM (Z-Image) and VAE in bf16, from their sizes, which the released program never frees."""
    from transformers import Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel
    wide = backbone == "klein-9b"
    text = dict(hidden_size=4096 if wide else 2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                head_dim=128, intermediate_size=12288 if wide else 9728, vocab_size=151936)
    vision = dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, out_hidden_size=2560, patch_size=16,
                  deepstack_visual_indexes=[5, 11, 17], num_position_embeddings=2304)
    with torch.device("meta"):
        models: list[nn.Module] = [Qwen3Model(Qwen3Config(**text))]
        if backbone == "zimage":
            models.append(Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)))
    vae = 84_000_000
    return 2 * (vae + sum(parameter.numel() for model in models for parameter in model.parameters()))
