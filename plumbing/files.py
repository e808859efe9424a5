"""Checkpoint folders and files: find them, read them strictly, write them atomically.

A checkpoint is a diffusers-style folder (model_index.json, transformer/, vae/, text_encoder/, ...) on disk or on the
Hugging Face hub. Weights are safetensors only, nothing is ever unpickled. Whatever a user can get wrong raises
`InputError` with one line that names the file, the value and the remedy; the two programs print it and exit with 2.
"""
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from plumbing.kinds import wrong
from plumbing.options import InputError as InputError
from plumbing.quantized import Int8Linear
from plumbing.recipes import ROOT as ROOT

INDEX = "*.safetensors.index.json"
Weights = Iterator[tuple[str, Tensor]]     # name, tensor
AGAIN, OTHER = "copy or download it again", "use the one that belongs to this checkpoint"
NETWORK_JSON = ("config.json", "preprocessor_config.json")
PIPELINE = ["model_index.json", "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"]


# ---------------------------------------------------------------------------------------------------- finding
def real(path: Path | str) -> Path:
    """Where a path leads, through ~ and links. Unlike pathlib's own, it takes unknown users and links to themselves."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def checkpoint(name: str, marker: str = "model_index.json", patterns: list[str] = PIPELINE) -> Path:
    """Local folder of a checkpoint: `name` itself if it is a folder, else the hub repository of that name.

    marker: a file that must be there, of a VLM config.json. patterns: hub files to download (globs). Raises InputError.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):                           # unlike Path's own, never fails
        if not (folder / marker).is_file():
            raise InputError(f"{folder}: no {marker} in this folder; give one in diffusers' or transformers' layout")
        return folder
    if os.path.exists(folder) or name.count("/") != 1 or name.startswith((".", "/", "~")) or not all(name.split("/")):
        what = "a single file, which is not read" if os.path.exists(folder) else "no such folder"
        raise InputError(f"{name}: {what}; give a checkpoint folder or a hub id such as Tongyi-MAI/Z-Image-Turbo")
    from huggingface_hub import snapshot_download  # imported here: local folders need no hub client
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types for "unreachable", "gated", "not found"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: not a local folder, and the hub did not give it ({reason:.300}); "
                         "check the name and the network, or give the path of a downloaded folder") from None


# ---------------------------------------------------------------------------------------------------- reading
def broken(path: Path, what: str, remedy: str = AGAIN) -> InputError:
    """What to raise about a file or folder of a checkpoint that is not whole, or is another's (OTHER)."""
    return InputError(f"{path}: {what}; {remedy}")


def read_json(path: Path, *needed: str) -> dict:
    """The JSON object in `path`, which must have the keys `needed`. Raises InputError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise broken(path, "no such file, the checkpoint is incomplete") from None
    except (OSError, ValueError, RecursionError) as error:
        raise broken(path, f"not readable as JSON ({error!s:.200})") from None
    if not isinstance(content, dict):
        raise broken(path, f"expected a JSON object, found {type(content).__name__}")
    missing = [f"the key {key!r} is missing" for key in needed if key not in content]
    if problem := missing[0] if missing else wrong(content, needed):
        raise broken(path, problem, OTHER)
    return content


def listing(folder: Path) -> list[tuple[str, str]]:
    """Names of (tensor, file) in a model folder: from its index, or else from its files' headers. Raises InputError."""
    index = min(folder.glob(INDEX), default=None)
    found = [*read_json(index, "weight_map")["weight_map"].items()] if index else []
    for name, file in found:
        if not isinstance(file, str) or not file or Path(file).name != file or len(file) > 200:
            raise InputError(f"{index}: {name} is in {file!r:.60}, which is no file of this folder; download it again")
    for path in () if index else sorted(folder.glob("*.safetensors")):
        with open_safetensors(path) as stored:
            found += [(name, path.name) for name in stored.keys()]
    if not found and not index:
        others = [path.name for path in visible_files(folder) if path.suffix in (".bin", ".pt", ".ckpt", ".gguf")]
        only = f" but {others[0]}, and neither pickle nor GGUF is read" if others else ""
        raise broken(folder, f"no .safetensors weights here{only}")
    return found


def shards(folder: Path, prefix: str | tuple[str, ...] = "") -> dict[Path, list[str]]:
    """Weight file -> names of its tensors that start with `prefix`, for one model folder. Raises InputError."""
    found: dict[Path, list[str]] = {}
    for name, file in listing(folder):
        if name.startswith(prefix):
            found.setdefault(folder / file, []).append(name)
    for path in found:
        if not path.is_file():
            raise broken(path, f"this shard is listed in {min(folder.glob(INDEX)).name} but missing")
    if not found:
        raise broken(folder, f"all tensors {prefix}* are missing from its weights")
    return found


@contextmanager
def open_safetensors(path: Path):
    """`safetensors.safe_open` whose failures are InputErrors."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (SafetensorError, OSError) as error:
        raise broken(path, f"not a complete safetensors file ({error})") from None


def tensors(folder: Path, prefix: str | tuple[str, ...] = "", only_shapes: bool = False) -> Weights:
    """(name, tensor) of a model folder, one tensor in host memory at a time; meta tensors when only_shapes."""
    for path, names in shards(folder, prefix).items():
        with open_safetensors(path) as file:
            if absent := set(names).difference(file.keys()):
                raise broken(path, f"tensor {min(absent)} is in the index but not in this shard")
            for name in names:
                part = file.get_slice(name)
                kind = torch.float32 if "F" in part.get_dtype() else torch.int8     # floats, or not
                yield name, (torch.empty(part.get_shape(), dtype=kind, device="meta") if only_shapes
                             else file.get_tensor(name))


def load_strictly(model: torch.nn.Module, weights: Weights, source: Path, device: torch.device | str,
                  dtype: torch.dtype, ignore: tuple[str, ...] = (), int8: tuple[str, ...] = ()) -> None:
    """Put `weights` into a model built on the meta device, tensor by tensor, on `device` in `dtype`.

    Peak host memory is one shard above the model. Raises InputError on missing, unknown or misshapen tensors, but skips
    unknown names that start with one of `ignore`. Linear layers below those of `int8` become Int8Linear.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights:
        if name not in expected:
            if name.startswith(ignore):
                continue
            raise broken(source, f"unknown tensor {name}, config.json has none of that name", OTHER)
        shape = expected.pop(name)
        if tuple(tensor.shape) != shape:
            raise broken(source, f"{name} has shape {tuple(tensor.shape)}, config.json asks for {shape}", OTHER)
        if not tensor.is_floating_point():
            raise InputError(f"{source}: tensor {name} holds no floats; give a checkpoint in bfloat16 or float32")
        put(model, name, tensor.to(device), dtype, name.startswith(int8))
    if expected:
        raise broken(source, f"tensor {next(iter(expected))} is missing ({len(expected)} in all)")


def put(model: torch.nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, int8: bool = False) -> None:
    """Replace the meta tensor called `name` by a frozen real one in `dtype`, or a Linear layer's weight by int8."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if int8 and leaf == "weight" and isinstance(module, torch.nn.Linear):
        model.set_submodule(path, Int8Linear(tensor, module.bias, dtype))
    else:
        value = tensor.to(dtype)
        setattr(module, leaf, value if leaf in module._buffers else torch.nn.Parameter(value, requires_grad=False))


def visible_files(folder: Path) -> list[Path]:
    """Files of a folder in order of name, without hidden ones. Raises InputError."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        raise broken(folder, "no such folder, the checkpoint is incomplete") from None
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be listed ({error.strerror}); check its permissions") from None


def model_key(folder: Path, *subfolders: str, prefix: str | tuple[str, ...] = "") -> str:
    """Identity of model folders by the content that is read, wherever they lie. Raises InputError.

    Configs, and the weight files that have tensors that start with `prefix`; all of a tokenizer.
    """
    digest = hashlib.sha256()
    for subfolder in subfolders or (".",):
        path = Path(folder) / subfolder
        is_network = any(path.glob("*.safetensors"))
        used = shards(path, prefix) if is_network else {}
        for file in visible_files(path):
            is_config = any(map(file.match, (*NETWORK_JSON, INDEX)))
            if file in used or (is_config if is_network else file.suffix in (".json", ".txt", ".jinja")):
                digest.update(f"{subfolder}/{file.name}:{file.stat().st_size}:".encode() + sampled_hash(file))
    return digest.hexdigest()[:40]


def sampled_hash(path: Path, samples: int = 256, length: int = 65536) -> bytes:
    """Hash of a file, or of evenly spaced pieces of a large one, where reading 12 GB at each start would take long."""
    digest, last = hashlib.sha256(), path.stat().st_size - length
    if last < 4 * samples * length:
        return hashlib.sha256(path.read_bytes()).digest()
    with open(path, "rb") as file:
        for i in range(samples):
            file.seek(i * last // (samples - 1))
            digest.update(file.read(length))
    return digest.digest()


# ---------------------------------------------------------------------------------------------------- writing
def check_ours(folder: Path, what: str) -> None:
    """Raises InputError, beginning with `what`, unless a run can write into `folder`; makes nothing."""
    if os.path.exists(folder / "config.json") and "options" not in read_json(folder / "config.json"):
        raise InputError(f"{what}: holds something else (its config.json is not ours); choose another folder")
    check_writable(folder, what)


def check_writable(folder: Path, what: str) -> Path:
    """Raises InputError, `what` first, unless `folder` can be made or written to. Returns the nearest that exists."""
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise InputError(f"{what}: longer than a name may be; choose another")
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{what}: not writable, because of {nearest}; choose a folder you can write to")
    return nearest


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename. Raises InputError when that fails."""
    temporary = path.with_name(path.stem[:40] + ".tmp")     # no longer than a name may be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        remedy = "free some space" if error.errno in (ENOSPC, EDQUOT) else "choose a folder you can write to"
        raise InputError(f"{path}: could not be written ({error.strerror}); {remedy}, the old file stays") from None


def write_json(path: Path, content: dict) -> None:
    """Write JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_bytes(path, to_bytes(on_cpu, metadata))


def append_json_line(path: Path, content: dict) -> None:
    """One more line of a .jsonl file. Raises InputError when it cannot be written."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error.strerror}); free some space, then continue") from None


def keep_json_lines(path: Path, wanted: Callable[[dict], bool]) -> None:
    """Drop the other lines of a .jsonl file, and half a line at its end. Raises InputError for lines not of ours."""
    if path.is_file():
        *whole, _ = path.read_bytes().split(b"\n")
        try:
            kept = [line + b"\n" for line in whole if wanted(json.loads(line))]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}: has lines that are not of this run; mend it or move it away") from None
        write_bytes(path, b"".join(kept))
