"""A campaign against a checkpoint's JSON files: every value, damaged in many ways, ends in one line or does no harm."""
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from networks import vae
from plumbing import encoder_files, files, kinds
from plumbing.checkpoints import backbone_of, pixels_per_patch, recipe_of, shift_rule
from plumbing.files import InputError

SOME = (None, "x", -1, 10 ** 9, [])
VALUES = (*SOME, 0, 0.5, 1e9, True, [0], ["x"], {}, float("nan"))


def transformer(folder: Path) -> None:
    recipe_of(folder), backbone_of(folder).check(folder)


def autoencoder(folder: Path) -> None:
    pixels_per_patch(folder), vae.load(folder, "cpu")


def encoders(folder: Path) -> None:
    encoder_files.load(folder, "cpu", torch.float32, folder / "vlm")


READERS = {"transformer/config.json": transformer, "vae/config.json": autoencoder,
           "text_encoder/config.json": encoders, "vlm/config.json": encoders, "vlm/preprocessor_config.json": encoders,
           "scheduler/scheduler_config.json": shift_rule}


def damaged(content: dict) -> Iterator[tuple[str, object, dict]]:
    """(key, value, content with it): every key of the file, and of the objects in it."""
    for outer in (None, *(name for name, value in content.items() if isinstance(value, dict))):
        for key in content if outer is None else content[outer]:
            for value in VALUES if outer is None else SOME:
                spoiled = copy.deepcopy(content)
                (spoiled if outer is None else spoiled[outer])[key] = value
                yield key, value, spoiled


@pytest.mark.quick
def test_kinds():
    """By name, one object deep; null only where a default may stand for it."""
    for content, words in (({"dim": 0}, "dim = 0, expected a whole number from 1 to 1048576"),
                           ({"dim": True}, "dim = True, expected a whole"), ({"dim": 3.0}, "dim = 3.0, expected a"),
                           ({"n_layers": 10 ** 9}, "from 1 to 1000"), ({"axes_dims": [4, -4]}, "expected a list, each"),
                           ({"axes_dims": []}, "axes_dims = []"), ({"rope_theta": float("nan")}, "a positive number"),
                           ({"qk_norm": 1}, "qk_norm = 1, expected true or false"), ({"weight_map": []}, "an object"),
                           ({"patch_size": "2"}, "patch_size = '2', expected a whole number from 1 to 1048576, or"),
                           ({"text_config": {"hidden_size": -1}}, "hidden_size = -1, expected a whole number")):
        assert words in kinds.wrong(content, ()) and "\n" not in kinds.wrong(content, ())
    assert kinds.wrong({"dim": None}, ()) is None and "dim = None" in kinds.wrong({"dim": None}, ("dim",))
    assert kinds.wrong({"dim": 8, "other": "x", "patch_size": [2, 2], "qk_norm": False, "eps": 1}, ("dim",)) is None


@pytest.mark.quick
def test_damaged_indices(tmp_path):
    """A shard that is a number, a path out of the folder or a folder; JSON that is a thousand objects deep."""
    path = tmp_path / "model.safetensors.index.json"
    for shard in (3, None, "../a.safetensors", "/etc/passwd", "sub/a.safetensors", ["a"], ""):
        path.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(InputError, match=rf"^{path}: a is in .*, which is no file of this folder; download it"):
            files.shards(tmp_path)
    for content in ('{"a":' * 100_000, '{"a": ' * 2000 + "1" + "}" * 2000, '{"weight_map": 3}', "[1]", "\x00"):
        path.write_text(content)
        with pytest.raises(InputError, match=str(path)):
            files.shards(tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_values(checkpoint, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    path, wrong, refused = folder / name, [], 0
    for key, value, content in damaged(json.loads(path.read_text())):
        path.write_text(json.dumps(content))
        try:
            READERS[name](folder)
        except InputError as error:
            refused += 1
            if "\n" in str(error) or str(folder) not in str(error) and path.name not in str(error):
                wrong.append((key, value, str(error)))
        except Exception as error:
            wrong.append((key, value, repr(error)))
    assert not wrong, f"{len(wrong)} wrong: " + "\n".join(map(str, wrong))
    assert refused >= 10
