"""What the values in a checkpoint's JSON files may be: one table, by the names of the keys, for all of them."""
import re
from collections.abc import Callable
from typing import Any

Kind = tuple[str, Callable[[Any], bool]]    # in words, and whether a value is one


def whole(least: int, most: int) -> Kind:
    return f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most


def is_pattern(text: str) -> bool:
    """Whether `re` takes it, and no time: without groups, nothing can be repeated in two ways."""
    try:
        return "(" not in text and bool(re.compile(text))
    except re.error:
        return False


SIZE, LAYERS = whole(1, 2 ** 20), whole(1, 1000)
SIZES: Kind = f"a list, each {SIZE[0]}", lambda value: type(value) is list and [] != value and all(map(SIZE[1], value))
EITHER: Kind = f"{SIZE[0]}, or {SIZES[0]}", lambda value: SIZE[1](value) or SIZES[1](value)
NUMBER: Kind = "a positive number", lambda value: type(value) in (int, float) and 0 < value < 1e30
OBJECT: Kind = "an object", lambda value: isinstance(value, dict)
ALPHAS: Kind = ("an object of patterns without groups and positive numbers", lambda value: OBJECT[1](value) and all(
    is_pattern(name) and NUMBER[1](alpha) for name, alpha in value.items()))
FLAG: Kind = "true or false", lambda value: isinstance(value, bool)
NAMES = (
    (LAYERS, "n_layers num_layers num_single_layers num_hidden_layers layers_per_block depth"),
    (whole(0, 1000), "n_refiner_layers"), (EITHER, "patch_size"), (ALPHAS, "alpha_pattern"),
    (SIZE, "dim in_channels out_channels n_heads n_kv_heads num_heads num_attention_heads num_key_value_heads head_dim "
           "attention_head_dim cap_feat_dim joint_attention_dim timestep_guidance_channels hidden_size out_hidden_size "
           "intermediate_size vocab_size latent_channels norm_num_groups spatial_merge_size temporal_patch_size"),
    (SIZES, "axes_dims axes_lens axes_dims_rope all_patch_size all_f_patch_size block_out_channels"),
    (NUMBER, "norm_eps rope_theta t_scale mlp_ratio eps rms_norm_eps scaling_factor batch_norm_eps lora_alpha"),
    (FLAG, "qk_norm guidance_embeds"), (OBJECT, "weight_map text_config vision_config options"))
KINDS = {name: kind for kind, names in NAMES for name in names.split()}


def wrong(content: dict, needed: tuple[str, ...]) -> str | None:
    """What is wrong with a file's values, one level of objects deep; null stands for a default where none is needed."""
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for name, value in part.items():
            if name in KINDS and not KINDS[name][1](value) and (value is not None or name in needed):
                return f"{name} = {value!r:.60}, expected {KINDS[name][0]}"
    return None
