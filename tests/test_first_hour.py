"""docs/first_hour.md: its commands and its Python run, on a small checkpoint in the place of the real one."""
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_readme import commands

import sample
import train
from plumbing import run_folder
from plumbing.checkpoints import recipe_of
from plumbing.files import ROOT
from plumbing.options import parse
from plumbing.panels import Panels
from plumbing.recipes import TURBO, fill

PAGE = (ROOT / "docs" / "first_hour.md").read_text(encoding="utf-8")
DOCUMENTED = [words for words in map(shlex.split, commands(ROOT / "docs" / "first_hour.md")) if words[0] == "python"]
SMALL = {"--size": "32", "--rank": "3", "--alpha": "6"}     # where a small checkpoint needs other values


def command(program: str, data: str = "") -> list[str]:
    """The words after `python PROGRAM` of the one such command, of train.py with this data."""
    found, = [words[2:] for words in DOCUMENTED if words[1] == program and (not data or words[3] == data)]
    return found


def smaller(words: list[str], model: Path) -> list[str]:
    """The same command for a small checkpoint; every option stays, some with other values."""
    changes = SMALL | {"--model": str(model)}
    return [changes.get(before, word) for before, word in zip(["", *words], words)]


@pytest.fixture
def at_home(tmp_path, monkeypatch, photos):
    """A folder with photos/ that have no captions, and nothing else."""
    (tmp_path / "photos").mkdir()
    for i, path in enumerate(photos.glob("*.png"), 1):
        shutil.copy(path, tmp_path / "photos" / f"IMG_{i:02d}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hour(at_home, checkpoint):
    """What the page's command leaves behind, after four steps."""
    words = smaller(command("train.py", "photos"), checkpoint)
    assert train.main([*words, "--steps", "4", "--save-every", "2", "--lr", "0.05", "--device", "cpu"]) == 0
    return at_home


# ---------------------------------------------------------------------------------------------------- its form
@pytest.mark.quick
def test_one_page_of_short_lines():
    lines = PAGE.splitlines()
    assert len(lines) <= 150 and [line for line in lines if len(line) > 120] == []
    sections = [int(number) for number in re.findall(r"^## (\d+)\.", PAGE, re.M)]
    assert sections == [*range(1, 10)]
    assert "6. says when to stop" in " ".join(lines) and "look at the teacher (5.)" in " ".join(PAGE.split())
    assert "## 5. The first panel" in PAGE and "## 6. When to stop" in PAGE


@pytest.mark.quick
def test_every_python_command_parses():
    """In blocks and in the text: the programs know all flags that the page has, also those named alone."""
    inline = [shlex.split(text) for text in re.findall(r"`(python [^`]+)`", PAGE)]
    programs = {"train.py": train, "sample.py": sample}
    found = [words for words in [*DOCUMENTED, *inline] if words[1] in programs]
    assert len(found) >= 4 and {words[1] for words in found} == set(programs)
    for words in found:
        parse(programs[words[1]].Options, words[2:], "")
    others = {words[1] for words in [*DOCUMENTED, *inline]} - set(programs)
    assert others == {"-c", "evaluate.py"}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - {"--run", "--version", "--list"}
    fields = {f"--{name.replace('_', '-')}" for program in programs.values()
              for name in program.Options.__dataclass_fields__}
    assert len(flags) > 15 and not flags - fields


@pytest.mark.quick
def test_the_values_that_it_calls_official_are_the_recipe_s():
    cfg = fill(train.Options(["photos"]), TURBO)
    assert f"official `--size {cfg.size} --rank {cfg.rank} --alpha {cfg.alpha}`" in PAGE
    assert f"The official recipe has {cfg.steps} steps" in PAGE and f"every {cfg.sample_every} steps" in PAGE
    words = parse(train.Options, command("train.py", "photos"), "")
    assert words.alpha / words.rank == cfg.alpha / cfg.rank             # the LoRA's scale stays
    assert cfg.keep == "none"                                           # so --keep captions/general.jsonl is more work
    assert cfg.ema == 0.9999 and cfg.ema ** cfg.steps > 0.8             # "less than a fifth of the way"
    assert f"num_inference_steps={TURBO.inference_steps}" in PAGE


# ---------------------------------------------------------------------------------------------------- its claims
def test_the_command_leaves_what_the_page_says(hour, checkpoint, capsys):
    out = hour / "out" / "mydog"
    for name in re.findall(r"^- `(\w+\.safetensors)`", PAGE, re.M):
        assert (out / name).is_file(), name
    assert {path.name for path in (out / "step_000002").iterdir()} == {"mydog.safetensors", "teacher.safetensors"}
    assert (out / "samples" / "step_000000.png").is_file()
    options = json.loads((out / "config.json").read_text())["options"]
    assert options["caption"] in PAGE and options["name"] == "mydog"
    words = smaller(command("train.py", "photos"), checkpoint)
    assert train.main([*words, "--steps", "5", "--save-every", "2", "--lr", "0.05", "--device", "cpu", "--resume"]) == 0
    with pytest.raises(run_folder.InputError, match="holds another run"):
        train.main([*words, "--steps", "5", "--save-every", "2", "--lr", "0.05", "--device", "cpu"])


def test_the_rows_of_the_first_panel(at_home, checkpoint, monkeypatch):
    """Two captions, new prompts with [V] for which the first photo by name is shown, and an unrelated one."""
    seen = []
    monkeypatch.setattr(Panels, "draw", lambda panels, path, note, *rest: seen.append((path.name, panels.rows)))
    words = smaller(command("train.py", "photos"), checkpoint)
    assert train.main([*words, "--steps", "1", "--device", "cpu"]) == 0
    name, rows = seen[0]
    recipe = recipe_of(checkpoint)
    assert name == "step_000000.png" and [row.prompt for row in rows] == [
        "a photo of a [V] dog", "a photo of a [V] dog", recipe.new_object, "a [V] dog on a sandy beach",
        recipe.unrelated]
    first = Image.open(at_home / "photos" / "IMG_01.png").convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
    for row in rows[2:4]:
        assert np.array_equal(np.asarray(row.target), np.asarray(first)) and row.label == "shown to the teacher"


def test_the_python_draws_what_the_sample_command_draws(hour, checkpoint, capsys):
    """The page's block in diffusers, in float32 and small; equal to sample.py with the same file."""
    out, code = hour / "out", re.findall(r"```python\n(.*?)```", PAGE, re.S)
    changes = {'"Tongyi-MAI/Z-Image-Turbo"': repr(str(checkpoint)), "torch.bfloat16": "torch.float32", "1024": "32",
               "torch.cuda.is_available()": "False"}
    assert len(code) == 1 and all(old in code[0] for old in changes)
    for old, new in changes.items():
        code[0] = code[0].replace(old, new)
    exec(compile(code[0], "docs/first_hour.md", "exec"), {})
    theirs = np.asarray(Image.open(hour / "beach.png")).astype(int)
    words = ["--model", str(checkpoint), "--prompt", "a [V] dog on a sandy beach", "--height", "32", "--width", "32",
             "--steps", "8", "--device", "cpu"]
    pictures = {}
    for name, flags in (("base", []), ("mydog", ["--lora", str(out / "mydog" / "mydog.safetensors")])):
        sample.main([*words, "--out", str(out / f"{name}.png"), *flags])
        pictures[name] = np.asarray(Image.open(out / f"{name}.png")).astype(int)
    assert np.abs(pictures["mydog"] - theirs).max() <= 2 < np.abs(pictures["base"] - theirs).max()


def test_the_sample_command(hour, checkpoint):
    words = [*smaller(command("sample.py"), checkpoint), "--height", "32", "--width", "32", "--device", "cpu"]
    sample.main(words)
    assert Image.open(hour / "out" / "sample.png").width > 64           # base and student side by side


@pytest.mark.parametrize("way", ["one for all", "one for each", "several for each"])
def test_the_three_ways_of_captions(way, at_home, checkpoint, capsys):
    words = smaller(command("train.py", "photos"), checkpoint)
    rows = [json.loads(line) for line in re.findall(r"```json\n(.*?)```", PAGE, re.S)[0].splitlines()]
    if way == "one for each":
        (at_home / "photos" / "IMG_01.txt").write_text("a [V] dog asleep")
    if way == "several for each":
        rows += [{"file_name": f"IMG_{i:02d}.png", "text": "a [V] dog"} for i in (2, 3)]
        rows[0]["file_name"] = "IMG_01.png"
        (at_home / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = {"one for all": {"a photo of a [V] dog"}, "one for each": {"a photo of a [V] dog", "a [V] dog asleep"},
                "several for each": {"a [V] dog", rows[0]["text"][1]}}
    found = train.read([*words, "--device", "cpu"])[3][0]
    assert len(found) == 3 and {caption for row in found for caption in row.captions} == expected[way]
