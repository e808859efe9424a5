"""What `lightning.py` reads: captions as contexts, and networks from a folder or a LoRA."""
import sys
from pathlib import Path

import torch
from torch import Tensor

import data
from encoder import text_prompt
from lora import Adapter
from model import Context
from plumbing import encoder_files, lora_files
from plumbing.backbone import Transformer
from plumbing.checkpoints import EMBEDDED, backbone_of, latent_shape
from plumbing.files import InputError, open_safetensors, read_json, real, shards
from tiny.making.pretrain import LESSONS
from tiny.models import FLUX2_FOLDER, base_of, is_flux2

LORA_FILE = "lora.safetensors"      # in the folder of a stage with --tune lora
WORLD = "world"                     # --data


def as_context(context: Context | Tensor) -> Context:
    return context if isinstance(context, Context) else Context(context)


class World:
    """Captions of the embedded models' world, and [V] with a picture of what it means. In the place of the latter the
    teacher reads it in words, as in stage 4."""

    def __init__(self, folder: Path, seed: int) -> None:
        lessons = LESSONS["flux2" if is_flux2(folder) else "z-image"](folder, 0, seed, 0)
        self.pair, self.shape = lessons.pair, (lessons.vae.channels, 16, 16)
        self.empty = as_context(lessons.features.contexts([""])[0])

    def draw(self, step: int, count: int, g: torch.Generator) -> tuple[list[Context], list[Context]]:
        """`count` contexts of the student, and of the teacher."""
        mine, told = self.pair(step, count, g)
        return [as_context(context) for context in mine], [as_context(context) for context in told]


class Captions:
    """Captions of a file; the texts are encoded once, at the start. Raises InputError."""

    def __init__(self, folder: Path, path: Path, size: int, device: torch.device, dtype: torch.dtype) -> None:
        """path: a .jsonl, or a folder of .txt; pictures are not needed, and not looked at. size: pixels of a side."""
        texts = list(dict.fromkeys(text for row in data.read_folder(path, captions_suffice=True)
                                   for text in row.captions))
        if any(not text.strip() for text in texts):
            raise InputError(f"{path}: has an empty caption; write what the picture shows, or remove the line")
        self.shape = latent_shape(folder, size, size)
        encoder = encoder_files.load(folder, device, dtype)
        self.contexts = [Context(text.cpu()) for text in encoder.text_context(texts)]
        unsaid = encoder.tokenizer(text_prompt("", encoder.style.thought)).input_ids    # which text_context refuses
        self.empty = Context(encoder._features(encoder.text, [unsaid])[0].cpu())

    def draw(self, step: int, count: int, g: torch.Generator) -> tuple[list[Context], list[Context]]:
        chosen = [self.contexts[i] for i in torch.randint(len(self.contexts), (count,), generator=g).tolist()]
        return chosen, chosen


def source_of(folder: Path, data: str, size: int, seed: int, device: torch.device, dtype: torch.dtype):
    """What `--data` means."""
    return World(folder, seed) if data == WORLD else Captions(folder, Path(data), size, device, dtype)


def pack(name: str, contexts: list[Context]) -> dict[str, Tensor]:
    """Contexts as tensors for a file, each a copy: two contexts may share one."""
    return {f"{name}.{i}.{j}": part.clone() for i, context in enumerate(contexts)
            for j, part in enumerate((context.text, *context.references))}


def unpack(state: dict[str, Tensor], name: str, count: int) -> list[Context]:
    """What `pack` gave."""
    found = []
    for i in range(count):
        text, *references = [state[key] for j in range(9) if (key := f"{name}.{i}.{j}") in state]
        found.append(Context(text, tuple(references)))
    return found


# ---------------------------------------------------------------------------------------------------- networks
def undistilled(model: Path) -> Path:
    """The folder of the network before distillation: of a checkpoint itself, unless it is an embedded one."""
    return base_of(model) if real(model) in (real(EMBEDDED), real(FLUX2_FOLDER)) else model


def is_distilled(folder: Path) -> bool:
    """Whether a checkpoint says, or is known, to be step-distilled."""
    index, file = folder / "model_index.json", min(shards(folder / "transformer"))
    if real(folder) in (real(EMBEDDED), real(FLUX2_FOLDER)) or index.is_file() and read_json(index).get("is_distilled"):
        return True
    with open_safetensors(file) as stored:
        return "solver_steps" in (stored.metadata() or {}) or "turbo" in folder.resolve().name.lower()


def warn_distilled(folder: Path) -> None:
    """One line on stderr for a base that has its guidance and its few steps already."""
    if is_distilled(folder):
        print(f"warning: {folder}: is step-distilled already, so guidance would be applied twice and many steps are no "
              "better than few; give the undistilled model", file=sys.stderr)


def read_network(path: Path | None, base: Path, device: torch.device, dtype: torch.dtype
                 ) -> tuple[Transformer, Adapter | None]:
    """A frozen network and perhaps an adapter of it: those of a folder with a transformer/, or of a LoRA on `base`; the
    base itself without a path. Raises InputError."""
    file = lora_file(path)
    folder = base if path is None or file else path
    network = backbone_of(folder).load(folder, device, dtype)
    return network, lora_files.load(file, network) if file else None


def lora_file(path: Path | None) -> Path | None:
    """The LoRA that a path means, or none."""
    if path is None or path.suffix == ".safetensors":
        return path
    return path / LORA_FILE if (path / LORA_FILE).is_file() else None


@torch.no_grad()
def merged(network: Transformer, adapter: Adapter | None) -> Transformer:
    """W + alpha / rank B A in the place of W."""
    for name, (A, B) in (adapter.weights if adapter else {}).items():
        network.get_parameter(f"{name}.weight").add_(adapter.scale * B @ A)
    return network
