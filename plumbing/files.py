"""Checkpoint folders and files: find them, read them strictly, write them atomically.

A checkpoint is a diffusers-style folder (model_index.json, transformer/, vae/, text_encoder/, ...) on disk or on the
Hugging Face hub. Weights are safetensors only, nothing is ever unpickled. Whatever a user can get wrong raises
`InputError` with one line that names the file, the value and the remedy; the two programs print it and exit with 2.
"""
import errno
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from plumbing.kinds import wrong
from plumbing.options import InputError as InputError
from plumbing.quantized import Int8Linear
from plumbing.recipes import ROOT as ROOT

NETWORK_JSON = ("config.json", "preprocessor_config.json")
PIPELINE = ["model_index.json", "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"]


# ---------------------------------------------------------------------------------------------------- finding
def real(path: Path | str) -> Path:
    """Where a path leads, through ~ and links. Unlike pathlib's own, it takes unknown users and links to themselves."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def checkpoint(name: str, marker: str = "model_index.json", patterns: list[str] = PIPELINE) -> Path:
    """Local folder of a checkpoint: `name` itself if it is a folder, else the hub repository of that name.

    marker: file that must be there (model_index.json of a pipeline, config.json of a VLM).
    patterns: hub files to download (globs). Raises InputError.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):                           # unlike Path's own, never fails
        if not (folder / marker).is_file():
            raise InputError(f"{folder}: no {marker} in this folder; give a checkpoint folder in "
                             "diffusers/transformers layout")
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
def read_json(path: Path, *needed: str) -> dict:
    """The JSON object in `path`, which must have the keys `needed`. Raises InputError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the checkpoint folder is incomplete, "
                         "copy or download it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error!s:.200}); copy or download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}; copy or download it again")
    for key in needed:
        if key not in content:
            raise InputError(f"{path}: the key {key!r} is missing; use the config that belongs to this checkpoint")
    if problem := wrong(content, needed):
        raise InputError(f"{path}: {problem}; use the file that belongs to this checkpoint")
    return content


def weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor -> file, of an index. Raises InputError."""
    content = read_json(index, "weight_map")["weight_map"]
    for name, file in content.items():
        if not isinstance(file, str) or not file or Path(file).name != file or len(file) > 200:
            raise InputError(f"{index}: {name} is in {file!r:.60}, which is no file of this folder; download it again")
    return content


def shards(folder: Path, prefix: str | tuple[str, ...] = "") -> dict[Path, list[str]]:
    """Weight file -> names of its tensors that start with `prefix`, for one model folder.

    Understands a single file or several with a `*.safetensors.index.json`. Raises InputError when a shard is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the checkpoint is incomplete, copy or download it again")
    index = sorted(folder.glob("*.safetensors.index.json"))
    found: dict[Path, list[str]] = {}
    if index:
        for name, file in weight_map(index[0]).items():
            if name.startswith(prefix):
                found.setdefault(folder / file, []).append(name)
        for path in found:
            if not path.is_file():
                raise InputError(f"{path}: this shard is listed in {index[0].name} but missing; download it again")
        return found
    for path in sorted(folder.glob("*.safetensors")):
        with open_safetensors(path) as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
        if names:
            found[path] = names
    if not found:
        what = f"tensors {prefix}* in .safetensors files" if prefix else ".safetensors weights"
        others = [path.name for path in visible_files(folder) if path.suffix in (".bin", ".pt", ".ckpt", ".gguf")]
        only = f" but {others[0]}, and neither pickle nor GGUF is read" if others else ""
        raise InputError(f"{folder}: no {what} here{only}; download the folder again")
    return found


@contextmanager
def open_safetensors(path: Path, device: str = "cpu"):
    """`safetensors.safe_open` whose failures are InputErrors."""
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); copy or download it again") from None


def tensors(folder: Path, prefix: str = "", only_shapes: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a model folder, one tensor in host memory at a time; meta tensors when only_shapes."""
    for path, names in shards(folder, prefix).items():
        with open_safetensors(path) as file:
            stored = set(file.keys())
            for name in names:
                if name not in stored:
                    raise InputError(f"{path}: tensor {name} is in the index but not in this shard; download it again")
                part = file.get_slice(name)
                kind = torch.float32 if "F" in part.get_dtype() else torch.int8     # floats, or not
                yield name, (torch.empty(part.get_shape(), dtype=kind, device="meta") if only_shapes
                             else file.get_tensor(name))


def stored_dtypes(folder: Path) -> set[str]:
    """safetensors' names of the dtypes in a model folder, from the headers of its files."""
    found: set[str] = set()
    for path, names in shards(folder).items():
        with open_safetensors(path) as file:
            found |= {file.get_slice(name).get_dtype() for name in names}
    return found


def load_strictly(model: torch.nn.Module, weights: Iterator[tuple[str, torch.Tensor]], source: Path,
                  device: torch.device | str, dtype: torch.dtype, ignore: tuple[str, ...] = (),
                  int8: tuple[str, ...] = ()) -> None:
    """Put `weights` into a model built on the meta device, tensor by tensor, on `device` in `dtype`.

    Peak host memory is one shard above the model. Every parameter and persistent buffer must come, and nothing else,
    except names that start with one of `ignore`. Linear layers whose names start with one of `int8` become Int8Linear.
    Raises InputError on missing, unknown or misshapen tensors.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights:
        if name not in expected:
            if name.startswith(ignore):
                continue
            raise InputError(f"{source}: unknown tensor {name}; weights and config.json do not belong together")
        shape = expected.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{source}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}; "
                             "weights and config do not belong together")
        if not tensor.is_floating_point():
            raise InputError(f"{source}: tensor {name} holds no floats; give a checkpoint in bfloat16 or float32")
        put(model, name, tensor.to(device), dtype, name.startswith(int8))
    if expected:
        raise InputError(f"{source}: tensor {next(iter(expected))} is missing ({len(expected)} in all); "
                         "download the folder again")


def put(model: torch.nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype, int8: bool = False) -> None:
    """Replace the meta tensor called `name` by a frozen real one in `dtype`, or a Linear layer's weight by int8."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if int8 and leaf == "weight" and isinstance(module, torch.nn.Linear):
        model.set_submodule(path, Int8Linear(tensor, module.bias, dtype))
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor.to(dtype)
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor.to(dtype), requires_grad=False)


def read_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """All tensors of a safetensors file; None if it is absent or broken."""
    try:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (InputError, OSError):
        return None


def transformer_class(folder: Path) -> str:
    """Kind of transformer of a checkpoint folder; a config that does not say is Z-Image's. Raises InputError."""
    return read_json(Path(folder) / "transformer" / "config.json").get("_class_name", "ZImageTransformer2DModel")


def visible_files(folder: Path) -> list[Path]:
    """Files of a folder in order of name, without hidden ones. Raises InputError."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be listed ({error.strerror}); check its permissions") from None


def model_key(folder: Path, *subfolders: str, prefix: str | tuple[str, ...] = "") -> str:
    """Identity of model folders by the content that is read, wherever they lie. Raises InputError.

    Configs, and the weight files that have tensors that start with `prefix`; all of a tokenizer.
    """
    digest = hashlib.sha256()
    for subfolder in subfolders or (".",):
        path = Path(folder) / subfolder
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; the checkpoint is incomplete, copy or download it again")
        is_network = any(path.glob("*.safetensors"))
        used = shards(path, prefix) if is_network else {}
        for file in visible_files(path):
            is_config = file.name in NETWORK_JSON or file.name.endswith(".safetensors.index.json")
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


def check_writable(folder: Path, what: str) -> None:
    """Raises InputError, beginning with `what`, unless `folder` can be made or written to; makes nothing."""
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise InputError(f"{what}: longer than a name may be; choose another")
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{what}: not writable, because of {nearest}; choose a folder you can write to")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename. Raises InputError when that fails."""
    path = Path(path)
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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose a folder you can write to"
        raise InputError(f"{path}: could not be written ({error.strerror}); {remedy}, the previous file is "
                         "unchanged") from None


def write_json(path: Path, content: dict) -> None:
    """Write JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
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
    """Drop the other lines of a .jsonl file, and half a line at its end. Raises InputError for what is no line of ours.
    """
    if path.is_file():
        *whole, _ = path.read_bytes().split(b"\n")
        try:
            kept = [line + b"\n" for line in whole if wanted(json.loads(line))]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}: has lines that are not of this run; mend it or move it away") from None
        write_bytes(path, b"".join(kept))
