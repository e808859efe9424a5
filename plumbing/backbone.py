"""What the rest of the project knows about a kind of diffusion transformer: one record, filled in once for each kind.

A new backbone is one file with a network and a `Backbone`, and one entry in `BACKBONES` of checkpoints.py.
"""
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from plumbing.files import InputError, load_strictly, read_json, tensors
from plumbing.quantized import FLOAT, INT8
from plumbing.recipes import Recipe

if TYPE_CHECKING:  # these files import this one
    from lora import Adapter
    from model import Context

RECOMPILE_LIMIT = 64  # grad or not, adapter or not, mask or not, a few shapes: torch's limit of 8 is soon reached


class Transformer(Protocol):
    """A diffusion transformer: what the other files use of an nn.Module that is one."""
    in_channels: int        # of the latents
    multiple: int           # the sides of the latents are multiples of this
    checkpointing: bool     # recompute each block in the backward pass

    def __init__(self, config: dict) -> None: ...           # content of transformer/config.json; raises InputError

    def velocity(self, x: Tensor, sigma: float | Tensor, context: "list[Context]", adapter: "Adapter | None" = None
                 ) -> Tensor: ...                           # v of Eq. 5 and 6, like x

    def blocks(self) -> Mapping[str, nn.Module]: ...        # name -> repeated block
    def lora_names(self) -> list[str]: ...                  # of the Linear layers that LoRA trains
    def adaptable_names(self) -> list[str]: ...             # of those that an adapter may change
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def get_parameter(self, target: str) -> nn.Parameter: ...


@dataclass(frozen=True)
class TextStyle:
    """The text features that a family of transformers was trained on; encoder.py makes them."""
    thought: str                              # how the assistant's answer begins: "", or a <think> block that is empty
    layers: Callable[[int], tuple[int, ...]]  # number of layers -> indices of the hidden states that are concatenated
    padded: bool                              # short contexts are filled up with pad tokens, which are attended to


@dataclass(frozen=True)
class Backbone:
    """A kind of diffusion transformer."""
    name: str                       # as people say it
    class_name: str                 # _class_name in transformer/config.json
    network: type[Transformer]
    keys: tuple[str, ...]           # what transformer/config.json must have
    width: Callable[[dict], int]    # content of that file -> dimension of the hidden states
    patch_size: Callable[[dict], int]                       # -> sides of the latents are multiples of this
    time_shift: Callable[[dict, int, int, int], float]      # scheduler config, steps, H, W of x -> grid's shift
    draw_noise: Callable[[torch.Generator, int, int, int], Tensor]  # generator, C, H, W -> diffusers' x at sigma = 1
    text_style: TextStyle
    takes_references: bool          # whether images can stand beside the text
    recipes: tuple[Recipe, Recipe]  # of the real checkpoints, and of small ones
    spec_ids: dict[int, str]        # width of the real ones -> ModelSpec's id, by which programs sort LoRA files
    layer_name: re.Pattern          # finds a layer of this transformer in a LoRA's key, in any spelling
    original_names: dict[str, str]  # our names of block groups and layers -> those of the original weights

    def check(self, folder: Path, transformer: str | None = None) -> Transformer:
        """The transformer without memory, on the meta device. Raises what `load` would, from the files' headers."""
        folder = Path(transformer or Path(folder) / "transformer")
        model = self._skeleton(folder)
        load_strictly(model, tensors(folder, only_shapes=True), folder, "meta", torch.float32)
        return model

    def load(self, folder: Path, device: torch.device | str, dtype: torch.dtype, compile: bool = False,
             quantize: str = FLOAT, transformer: str | None = None) -> Transformer:
        """The frozen transformer of a checkpoint folder in `dtype` on `device`, for the velocity of Eq. 5 and 6.

        compile: torch.compile the repeated block; quantize: int8 for the weights of the repeated blocks; transformer:
        another folder of weights, as full fine-tuning writes them. Raises InputError when files are missing or do not
        belong together.
        """
        folder = Path(transformer or Path(folder) / "transformer")
        model = self._skeleton(folder)
        int8 = tuple(model.blocks()) if quantize == INT8 else ()
        load_strictly(model, tensors(folder), folder, device, dtype, int8=int8)
        if compile:
            compile_blocks(model)
        return model.eval()

    def _skeleton(self, folder: Path):
        """An nn.Module that is a Transformer (no annotation says both), on the meta device."""
        config = read_json(folder / "config.json", *self.keys)
        try:
            with torch.device("meta"):
                return self.network(config)
        except InputError as error:
            raise InputError(f"{folder / 'config.json'}: {error}") from None


def compile_blocks(model: Transformer) -> None:
    """torch.compile of the repeated block, in place: a minute of work at the first steps, faster ever after."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for block in model.blocks().values():
        block.compile()
