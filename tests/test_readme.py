"""The README against the code: its table of equations, its excerpt, its commands, its size."""
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

import evaluate
import sample
import train
from plumbing.files import ROOT
from plumbing.options import parse

README = (ROOT / "README.md").read_text()
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "experiments", "tiny"))]


def equations() -> list[tuple[str, str, str]]:
    """(row, file, function) of the table of equations."""
    found = []
    table = README.split("| equation | what | where |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        row, _, where = (cell.strip() for cell in line.replace("\\|", "").strip("|").split("|"))
        for part in where.split(";"):
            file, *names = re.findall(r"`([^`]+)`", part)
            found += [(row, file, name) for name in names]
    return found


def called(base: list[str], out: Path, *flags: str) -> set[tuple[str, str]]:
    """(file, function) of all Python functions that one training step and what comes before it call."""
    seen = set()

    def profile(frame, event, _):
        if event == "call":
            seen.add((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        assert train.main([*base, "--steps", "1", "--out", str(out), *flags]) == 0
    finally:
        sys.setprofile(None)
    return {(Path(file).name, name) for file, name in seen if Path(file).is_relative_to(ROOT)}


def test_every_function_of_the_equation_table_is_called_in_a_step(base, tmp_path):
    """D-OPSD's in one step of D-OPSD; noise, KL and the baselines in one step that asks for them."""
    table = equations()
    assert len(table) > 15 and {"Eq. 3", "Eq. 4", "Eq. 5, 6", "Eq. 7", "EMA"} <= {row for row, _, _ in table}
    steps = {"": called(base, tmp_path / "dopsd", "--cache", str(tmp_path / "cache")),
             "2605.15055": called(base, tmp_path / "kl", "--loss", "kl", "--noise", "0.5")}
    steps["baselines"] = set().union(*(called(base, tmp_path / name, "--method", name) for name in train.BASELINES
                                         if name != "dreambooth"))      # which is `sft`, and needs captions
    for row, file, name in table:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        owners = [module, *vars(module).values()]                       # a function of the module or of a class in it
        assert any(inspect.isfunction(getattr(owner, name, None)) for owner in owners), f"{file} has no {name}"
        assert (file, name) in steps.get(row, steps[""]), f"{file}: {name} is not called"


def test_a_wrong_table_would_be_noticed(base, tmp_path):
    assert ("rollout.py", "rollout") in called(base, tmp_path / "a")
    assert ("rollout.py", "transition") not in called(base, tmp_path / "b")


def test_the_excerpt_is_the_code():
    """Its two parts are consecutive lines of `dopsd` and `train`."""
    parts = README.split("```python\n")[1].split("```")[0].split("\n\n")
    for part, function in zip(parts, (train.dopsd, train.train), strict=True):
        code = "\n".join(line.strip() for line in inspect.getsource(function).splitlines())
        assert "\n".join(line.strip() for line in part.strip().splitlines()) in code


def test_size_and_width():
    lines = README.splitlines()
    assert len(lines) <= 160 and len(README.split()) <= 1800
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "python3 -m venv"))] == []


def commands(path: Path) -> list[str]:
    """The shell commands of a document, continued lines joined, one for each program."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("#")[0].split("&&") if part.strip()]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_what_is_there_or_what_an_earlier_one_writes(path):
    """Programs and data exist; adapters are those of a run that an earlier command in the document starts."""
    made = set()
    for command in commands(path):
        words = shlex.split(command)
        if words[0] == "python" and words[1] == "-m" and words[2] != "pytest":
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), command
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), command
        if words[:2] == ["python", "train.py"]:
            if "--config" in words:                                     # a run that is repeated
                assert str(Path(words[words.index("--config") + 1]).parent) in made and "--out" in words, command
            data = Path(words[words.index("--data") + 1]).name if "--data" in words else ""
            assert data or "--config" in words, command
            made.add(words[words.index("--out") + 1] if "--out" in words else f"out/{data}")
        for word in words:
            word = word.split("=", 1)[-1]
            if word.startswith("out/") and word.endswith(".safetensors"):
                run = str(Path(word).parent)
                assert run in made or (run == "out/star" and path.parent != ROOT), f"{command}: no command makes {word}"
            elif word.startswith(("examples/", "tiny/", "captions/", "docs/")):
                assert (ROOT / word).exists(), f"{command}: {word} does not exist"


@pytest.mark.parametrize("path", [path for path in DOCS if path.name != "research.md"],     # tests/test_research.py
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_the_programs_parse(path):
    """Flags that are gone, values that are none of the choices, a value too few."""
    programs = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}
    for words in map(shlex.split, commands(path)):
        name = next((word for word in words if word in programs), None)
        if words[0] in ("python", "torchrun") and name:
            parse(programs[name].Options, words[words.index(name) + 1:], "")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)                          # code has such brackets, too
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
