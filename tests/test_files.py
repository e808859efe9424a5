"""Checkpoint folders and atomic files; and that the programs import nothing but what requirements.txt brings."""
import ast
import errno
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing import files
from plumbing.files import ROOT, InputError

pytestmark = pytest.mark.quick


def fails(call, *expected) -> None:
    """call() raises one line with all of `expected`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in expected), message


# ---------------------------------------------------------------------------------------------------- writing
WRITERS = {"bytes": lambda path: files.write_bytes(path, b"new"),
           "json": lambda path: files.write_json(path, {"new": 1}),
           "tensors": lambda path: files.write_tensors(path, {"new": torch.ones(3)})}


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_make_folders_and_replace(tmp_path, writer):
    path = tmp_path / "a" / "b" / "file"
    WRITERS[writer](path)
    first = path.read_bytes()
    path.write_bytes(b"old")
    WRITERS[writer](path)
    assert path.read_bytes() == first and [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("code, remedy", [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"),
                                          (errno.EACCES, "choose a folder"), (errno.EROFS, "choose a folder")])
def test_failed_writes_keep_the_old_file(tmp_path, monkeypatch, writer, where, code, remedy):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(*_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(files.os, where, broken)
    fails(lambda: WRITERS[writer](path), path, os.strerror(code), remedy)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    fails(lambda: WRITERS[writer](tmp_path / "new"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_shows_before_the_rename(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    fails(lambda: files.write_bytes(path, b"x" * 100_000), path, "free some space")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "deep" / "below", tmp_path / "folder"):
        fails(lambda: files.write_bytes(path, b"x"), path, "choose a folder you can write to")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_tensors_keep_values_and_metadata(tmp_path):
    path = tmp_path / "weights.safetensors"
    transposed = torch.arange(6.0).view(2, 3).T
    weights = {"a": transposed, "b": torch.tensor(3.0), "c": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    files.write_tensors(path, weights, {"step": "7"})
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"step": "7"}
    stored = load_file(path)
    assert stored.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype


def test_json_is_utf8(tmp_path):
    files.write_json(tmp_path / "a.json", {"prompt": "ein Stern, 夜"})
    assert "夜" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "a.json", "prompt") == {"prompt": "ein Stern, 夜"}


# ---------------------------------------------------------------------------------------------------- reading
def test_read_json_errors(tmp_path):
    path = tmp_path / "config.json"
    fails(lambda: files.read_json(path), path, "no such file", "download")
    for content, word in ((b"", "JSON"), (b'{"a": 1', "JSON"), (b"\xff\xfe", "JSON"), (b"[1]", "list"),
                          (b'{"a": 1}', "'b'")):
        path.write_bytes(content)
        fails(lambda: files.read_json(path, "a", "b"), path, word)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards with an index."""
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"visual.a": torch.ones(2), "text.b": torch.zeros(3)}, folder / "model-1.safetensors")
    save_file({"text.c": torch.full((1,), 5.0)}, folder / "model-2.safetensors")
    weight_map = {"visual.a": "model-1.safetensors", "text.b": "model-1.safetensors", "text.c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_and_tensors(folder, indexed):
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    found = {path.name: sorted(names) for path, names in files.shards(folder).items()}
    assert found == {"model-1.safetensors": ["text.b", "visual.a"], "model-2.safetensors": ["text.c"]}
    read = {name: tensor.tolist() for name, tensor in files.tensors(folder, "text.")}
    assert read == {"text.b": [0, 0, 0], "text.c": [5]}


def test_only_the_wanted_shards_are_needed(folder):
    (folder / "model-2.safetensors").unlink()
    assert dict(files.tensors(folder, "visual.")).keys() == {"visual.a"}
    fails(lambda: files.shards(folder), folder / "model-2.safetensors", "model.safetensors.index.json", "missing")
    save_file({"other": torch.ones(1)}, folder / "model-2.safetensors")
    fails(lambda: dict(files.tensors(folder)), folder / "model-2.safetensors", "text.c", "not in this shard")


def test_no_weights(tmp_path):
    fails(lambda: files.shards(tmp_path), tmp_path, "no .safetensors weights")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    fails(lambda: files.shards(tmp_path, "visual."), tmp_path, "visual.*")


def test_broken_safetensors(folder):
    (folder / "model.safetensors.index.json").unlink()
    path = folder / "model-1.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], whole[:4], b"", b"pickled" * 99):
        path.write_bytes(content)
        fails(lambda: dict(files.tensors(folder)), path, "not a complete safetensors file")


def build() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def load_into(model: nn.Module, weights: dict, dtype=torch.float32, **extra) -> nn.Module:
    files.load_strictly(model, iter(weights.items()), Path("here"), "cpu", dtype, **extra)
    return model


def test_load_strictly():
    reference = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = {name: torch.randn(tensor.shape) for name, tensor in reference.state_dict().items()}
    model = load_into(build(), weights, torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16()), name
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    extra = {**weights, "lm_head.weight": torch.ones(1)}
    load_into(build(), extra, ignore=("lm_head.",))
    fails(lambda: load_into(build(), extra), "here", "lm_head.weight")
    fails(lambda: load_into(build(), {**weights, "0.bias": torch.ones(4)}), "here", "0.bias", "(4,)", "(3,)")
    few = {name: tensor for name, tensor in weights.items() if name != "1.running_mean"}
    fails(lambda: load_into(build(), few), "here", "1.running_mean")


# ---------------------------------------------------------------------------------------------------- finding
def test_checkpoint_folders(tmp_path, monkeypatch):
    fails(lambda: files.checkpoint(str(tmp_path), "config.json"), tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{}")
    assert files.checkpoint(str(tmp_path), "config.json") == tmp_path
    for name in ("nowhere", "./nowhere", "/no/where", "a/b/c", "~/nowhere-at-all", "owner/"):
        fails(lambda: files.checkpoint(name, "config.json"), name, "hub id")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **how: asked.append((name, how)) or str(tmp_path))
    assert files.checkpoint("owner/name", "config.json", ["*.json"]) == tmp_path
    assert asked == [("owner/name", {"allow_patterns": ["*.json"]})]


# ---------------------------------------------------------------------------------------------------- imports
ALLOWED = {"torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "safetensors", "einops", "tqdm", "PIL"}


def imported(path: Path) -> set[str]:
    """Top-level names of all imports of a file, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_run_time_imports():
    folders = ("networks", "plumbing", "tiny", "tiny/making")
    modules = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).glob("*.py"))]
    own = {path.stem for path in ROOT.glob("*.py")} | {"networks", "plumbing", "tiny"}
    assert {"train", "sample", "model", "encoder"} <= own and len(modules) > 30
    for path in modules:
        foreign = imported(path) - own - ALLOWED - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_imports_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import a.b as c\ndef f():\n    from d.e import g\n    import os, h\n")
    assert imported(path) == {"a", "d", "os", "h"}


# ---------------------------------------------------------------------------------------------------- identity
def test_model_key(tmp_path):
    def model(name: str, scale: float, width: int = 4) -> Path:
        folder = tmp_path / name / "vae"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"width": width}))
        save_file({"w": torch.full((4, 4), scale)}, folder / "model.safetensors")
        (tmp_path / name / "vae" / "README.md").write_text(name)
        return tmp_path / name

    first = files.model_key(model("one", 1.0), "vae")
    assert first == files.model_key(model("copy", 1.0), "vae") == files.model_key(tmp_path / "one", "vae")
    keys = {first, files.model_key(model("trained", 2.0), "vae"), files.model_key(model("config", 1.0, 8), "vae"),
            files.model_key(tmp_path / "one" / "vae")}
    assert len(keys) == 4  # same header and size, other weights: another model
    for other in ("generation_config.json", "chat_template.jinja", "notes.txt", "README.md"):     # nobody reads these
        (tmp_path / "one" / "vae" / other).write_text("{}")
    assert files.model_key(tmp_path / "one", "vae") == first
    (tmp_path / "one" / "tokenizer").mkdir()
    for text in ("{}", "{ }"):
        (tmp_path / "one" / "tokenizer" / "tokenizer.json").write_text(text)
        keys.add(files.model_key(tmp_path / "one", "tokenizer"))
    assert len(keys) == 6
    with pytest.raises(InputError, match="text_encoder: no such folder"):
        files.model_key(tmp_path / "one", "vae", "text_encoder")


def test_key_of_some_weights(tmp_path):
    """Of a VLM, the shards of the vision tower count, and the others may as well be absent."""
    for name in ("visual", "language"):
        save_file({f"{name}.w": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"visual.w": "visual.safetensors", "language.w": "language.safetensors"}}))
    whole, part = files.model_key(tmp_path), files.model_key(tmp_path, prefix=("model.visual.", "visual."))
    (tmp_path / "language.safetensors").unlink()
    assert files.model_key(tmp_path, prefix=("model.visual.", "visual.")) == part != whole
    save_file({"visual.w": torch.ones(2)}, tmp_path / "visual.safetensors")
    assert files.model_key(tmp_path, prefix=("model.visual.", "visual.")) != part


def test_large_files_are_sampled(tmp_path):
    big = tmp_path / "a.safetensors"
    content = np.random.default_rng(0).bytes(100_000)
    hashes = set()
    for change in (None, 0, len(content) - 1):
        edited = bytearray(content)
        if change is not None:
            edited[change] ^= 1
        big.write_bytes(edited)
        hashes.add(files.sampled_hash(big, samples=8, length=1000))
        assert files.sampled_hash(big, samples=8, length=1000) in hashes
    assert len(hashes) == 3
