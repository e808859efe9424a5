"""The command lines that are made from dataclasses: what they refuse, and what their help says."""
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train
from encoder import TEACHER_CONTEXTS
from loss import WEIGHTS
from plumbing import recipes, train_options
from plumbing.checkpoints import BACKBONES
from plumbing.files import ROOT, InputError
from plumbing.options import option, parse
from plumbing.quantized import FLOAT, INT8

pytestmark = pytest.mark.quick
PROGRAMS = {train: ("data and model", "method", "optimisation", "output", "machine"),
            sample: ("what to draw", "model", "output", "machine")}             # and the headings of their help
BELOW = ["the recipes' values", "examples"]                                     # which come after those of options
HEAVY = {"torch", "numpy", "transformers", "PIL", "safetensors", "tqdm"}


def help_of(program, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        program.main(["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_unknown_methods_and_teachers_are_refused(capsys):
    for words in (["--method", "dpo"], ["--teacher-weights", "student"]):
        with pytest.raises(SystemExit) as caught:
            train.main(["--data", "photos", *words])
        assert caught.value.code == 2
        assert re.search(f"argument {words[0]}.*: invalid choice: '{words[1]}'", capsys.readouterr().err)


def test_data_is_required(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([])
    assert caught.value.code == 2 and "--data" in capsys.readouterr().err


def test_fields_become_flags(capsys):
    @dataclasses.dataclass
    class Options:
        name: str = option(dataclasses.MISSING, "name of the thing", "things")
        count: int | None = option(3, "number of the things", "things")
        tag: list[str] = option([], "word about it; repeatable", "words")
        pair: list[str] = option([], "two or more words", "words", nargs="+", old={"one": "1"})
        is_new: bool = option(False, "whether it is new", "words", old={"--fresh": "--is-new"})
        maybe: bool | None = option(None, "yes or no, or neither", "words")

    assert parse(Options, ["--name", "a"], "") == Options("a", 3, [], [], False, None)
    words = "--name a --count 4 --tag x --tag y --pair one two --fresh --no-maybe".split()
    assert parse(Options, words, "") == Options("a", 4, ["x", "y"], ["1", "two"], True, False)
    with pytest.raises(SystemExit):
        parse(Options, ["--help"], "What it does.")
    shown = " ".join(capsys.readouterr().out.split())
    assert "What it does." in shown and "things: --name" in shown and "words: --tag" in shown
    assert "name of the thing (required)" in shown and "number of the things (default: 3)" in shown


@pytest.mark.parametrize("words, flags", [
    ("", []), ("--method off-policy --loss v --rollout-steps 2 --ema .9", []), ("--method pso --beta 3", []),
    ("--method sft --loss kl --teacher-weights copy --ema .9 --beta 3 --rollout-steps 2 --vlm x",
     ["--loss", "--beta", "--rollout-steps", "--ema", "--teacher-weights", "--vlm"]),
    ("--method sft --keep k --loss kl --rollout-steps 2 --keep-weight 2", []),
    ("--method sft --keep-weight 2", ["--keep-weight"]), ("--beta 3", ["--beta"]), ("--keep-batches 2", []),
    ("--keep none --keep-batches 2", ["--keep-batches"]), ("--teacher-weights frozen --ema .9", ["--ema"]),
    ("--teacher-lora untuned --teacher-weights copy --vlm x", ["--teacher-weights", "--vlm"]),
    ("--teacher-lora image --keep-weight 2", ["--keep-weight"]), ("--teacher-lora image --ema .9", []),
    ("--method dreambooth --keep-weight 2", []),
])
def test_flags_that_a_run_has_no_use_for(words, flags):
    cfg = parse(train.Options, ["--data", "a", *words.split()], "")
    assert train_options.unused(cfg, train.METHODS[cfg.method]) == flags


def test_data_and_teachers_add_up():
    """`--data a --data b` is `--data a b`."""
    one, other = (parse(train.Options, words.split(), "") for words in (
        "--data a b c --teacher-lora x y z", "--data a --data b c --teacher-lora x --teacher-lora y z"))
    assert one == other and one.data == ["a", "b", "c"] and one.teacher_lora == ["x", "y", "z"]
    assert parse(train.Options, ["--data", "a"], "").teacher_lora == []


# ------------------------------------------------------------------------------------------- --config
def config(folder: Path, **options) -> str:
    """The path of a run's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({"recipe": "some", "options": options}))
    return str(path)


def test_a_file_has_the_values_of_flags_that_are_not_given(tmp_path):
    words = ["--data", "a", "b", "--method", "sft", "--lr", "1e-5", "--caption", "- a [V] dog, = 1", "--compile",
             "--no-checkpointing", "--panel-prompt", "x y", "--panel-prompt=-z", "--noise", "0.5", "--out", "here",
             "--save-all", "--teacher-lora", "image", "untuned"]
    first = parse(train.Options, words, "")
    path = config(tmp_path, **dataclasses.asdict(first))
    again = parse(train.Options, ["--config", path], "")
    assert again == dataclasses.replace(first, config=[path]) and again.panel_prompt == ["x y", "-z"]
    changed = parse(train.Options, ["--data", "c", "--config", path, "--lr", "2", "--no-compile", "--checkpointing",
                                    "--method", "pso", "--panel-prompt", "w"], "")
    assert changed == dataclasses.replace(first, config=[path], data=["c"], lr=2.0, compile=False, checkpointing=True,
                                          method="pso", panel_prompt=["w"])


def test_what_a_file_does_not_have_or_is_not_taken_over(tmp_path):
    """None is what the recipe fills in; a repeated run is no continued one; earlier spellings are understood."""
    path = config(tmp_path, data=["a"], lr=None, teacher_lora=[], resume=True, config=["other"], teacher="base")
    found = parse(train.Options, ["--config", path], "")
    assert found == train.Options(["a"], config=[path], teacher_weights="frozen")
    assert parse(train.Options, ["--config", path, "--resume"], "").resume


@pytest.mark.parametrize("options, said", [
    ({}, "the following arguments are required: --data"),
    ({"momentum": 3}, "--momentum=3: not an option of this version"), ({"mode": "x"}, "--mode=x: not an option"),
    ({"steps": "many"}, "argument --steps: invalid int value: 'many'"), ({"steps": 1.5}, "--steps: invalid int"),
    ({"steps": True}, "argument --steps: expected one argument"), ({"steps": False}, "--no-steps: not an option"),
    ({"size": [64, 32]}, "size: not an option of this version, or not with such a value"),
    ({"model": {"a": 1}}, "model: not an option of this version, or not with such a value"),
    ({"compile": "yes"}, "argument --compile/--no-compile: ignored explicit argument 'yes'"),
    ({"method": "dpo"}, "argument --method: invalid choice: 'dpo'"), ({"caption": "a\udcff"}, "--caption.*not UTF-8"),
])
def test_wrong_options_in_a_file_name_it(tmp_path, capsys, options, said):
    path = config(tmp_path, **(options and {"data": ["a"]} | options))
    with pytest.raises(SystemExit) as caught:
        parse(train.Options, ["--config", path], "")
    usage, line = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and re.search(f"--config {path!r}: error: .*{said}", line) and "usage" in usage


def test_values_of_the_recipe_in_a_file_are_no_mistakes(tmp_path, capsys):
    """A file has all of them, so it may be repeated with another method; what is given is still looked at."""
    filled = recipes.fill(train.Options(["a"], keep="none"), recipes.SMALL)
    path = config(tmp_path, **dataclasses.asdict(filled))
    for words in (["--method", "sft"], ["--method", "pso"], ["--tune", "full"]):
        cfg = parse(train.Options, ["--config", path, *words], "")
        train_options.check_values(cfg, train.METHODS[cfg.method])
        assert cfg.rank == 16 and cfg.grad_states == 1 and capsys.readouterr().err == ""
    for words, said in ((["--lr", "-1"], "--lr -1.0"), (["--tune", "full", "--quantize", "int8"], "--quantize int8")):
        with pytest.raises(InputError, match=said):
            train_options.check_values(parse(train.Options, ["--config", path, *words], ""), train.METHODS["dopsd"])


# ------------------------------------------------------------------------------------------- --help
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_help_has_every_option_under_a_heading(program, capsys):
    shown = help_of(program, capsys)
    headings = [line[:-1] for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["options", *PROGRAMS[program], *BELOW]                  # "options" has -h alone
    fields, flat = dataclasses.fields(program.Options), " ".join(shown.split())
    parts = dict(zip(headings, re.split(r"(?m)^(?=\S.*:$)", shown)[1:], strict=True))
    for field in fields:
        assert field.metadata["group"] in PROGRAMS[program], field.name
        assert re.search(rf"--{field.name.replace('_', '-')}\b", parts[field.metadata["group"]]), field.name
        assert field.metadata["help"] in flat, field.name
    assert re.findall(r"(?m)^  (-\S+)", parts["options"]) == ["-h,"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_help_is_a_phrase_that_stands_alone(program):
    for field in dataclasses.fields(program.Options):
        text = field.metadata["help"]
        assert not text.startswith("of ") and len(text.split()) >= 3, field.name
        assert text == text.strip() and not text.endswith("."), field.name


def test_headings_are_those_of_train_options():
    constants = (train_options.DATA, train_options.METHOD, train_options.OPTIMISATION, train_options.OUTPUT,
                 train_options.MACHINE)
    assert constants == PROGRAMS[train]


# ------------------------------------------------------------------------------------- before torch is imported
def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words, status", [("train.py --help", 0), ("train.py --data photos --bach-size 2", 2),
                                           ("train.py --data photos --method dpo", 2), ("sample.py --help", 0),
                                           ("train.py --config nowhere.json", 2),
                                           ("sample.py --promt star", 2)])
def test_the_command_line_is_read_before_what_is_slow_to_import(words, status):
    """In a new process, as a program: at its end no large package was imported."""
    file, *words = shlex.split(words)
    done = python(f"import runpy, sys; sys.argv = {[file, *words]}\n"
                  f"try: runpy.run_path({str(ROOT / file)!r}, run_name='__main__')\n"
                  f"finally: print('heavy:', *{HEAVY} & set(sys.modules))")
    assert done.returncode == status and done.stdout.splitlines()[-1] == "heavy:", done.stderr
    wrong = r"error: .*(--bach-size|dpo|--promt|nowhere)"
    assert ("usage:" in done.stdout) if status == 0 else re.search(wrong, done.stderr)


def test_who_imports_a_program_is_not_asked_for_words():
    done = python("import sys; sys.argv = ['x', '--nonsense']; import train, sample; print(train.Options.steps)")
    assert done.returncode == 0 and done.stdout == "None\n", done.stderr


def test_choices_are_the_names_of_what_they_choose():
    """They are written out, because what they choose stands beside torch."""
    choices = {(program, field.name): field.metadata["extra"].get("choices")
               for program in PROGRAMS for field in dataclasses.fields(program.Options)}
    assert choices[train, "method"] == tuple(train.METHODS) and choices[train, "loss"] == tuple(WEIGHTS)
    for program in PROGRAMS:
        assert choices[program, "teacher_context"] == tuple(TEACHER_CONTEXTS)
        assert choices[program, "quantize"] == (FLOAT, INT8) and program.Options.quantize == FLOAT


# ------------------------------------------------------------------------------------------- below the options
def names_that_recipes_fill() -> list[str]:
    """Fields of both, but for `name`: a recipe's is not that of --name, which has a default of its own."""
    common = [field for field in dataclasses.fields(train.Options) if hasattr(recipes.SMALL, field.name)]
    assert {field.name for field in common if field.default is not None} == {"name"}
    assert recipes.fill(train.Options(["photos"]), recipes.TURBO).name == "student"
    return [field.name for field in common if field.name != "name"]


def test_help_shows_the_recipes_values(capsys):
    """A row for each option that recipes fill in, with the values that `fill` takes, in aligned columns."""
    shown = help_of(train, capsys)
    head, *lines = shown.split(f"{BELOW[0]}:\n")[1].split(f"{BELOW[1]}:\n")[0].splitlines()
    rows = {cells[0]: cells[1:] for cells in (re.split(r"  +", line.strip()) for line in lines) if len(cells) == 4}
    names = {"--" + name.replace("_", "-"): name for name in names_that_recipes_fill()}
    assert rows.keys() == names.keys() and len(rows) > 15
    assert re.split(r"  +", head.strip()) == ["embedded", "Z-Image-Turbo", "FLUX.2-klein"]
    for column, recipe in enumerate((recipes.SMALL, recipes.TURBO, recipes.FLUX2)):
        for flag, name in names.items():
            value = getattr(recipe, name)
            assert rows[flag][column] == ("all" if value is None else str(value).replace(f"{ROOT}/", "")), flag
    starts = [head.index(title) for title in ("embedded", "Z-Image-Turbo", "FLUX.2-klein")]
    for line in lines[:len(rows)]:
        assert all(line[start - 2:start] == "  " and line[start] != " " for start in starts), line


def test_what_the_help_says_about_the_recipe_without_a_column(capsys):
    names = names_that_recipes_fill()
    small, flux2 = recipes.SMALL, recipes.SMALL_FLUX2
    assert [name for name in names if getattr(small, name) != getattr(flux2, name)] == ["teacher_context"]
    assert flux2.teacher_context == "reference" and flux2.keep_edits == str(ROOT / "examples" / "edits")
    shown = " ".join(help_of(train, capsys).split())
    assert "tiny/flux2: as embedded, but --teacher-context reference; for editing, --keep examples/edits" in shown
    assert {(recipes.TURBO, small), (recipes.FLUX2, flux2)} == {backbone.recipes for backbone in BACKBONES}


def test_a_program_without_recipes_or_examples_says_nothing_below(capsys):
    @dataclasses.dataclass
    class Options:
        tag: str | None = option(None, "word about the thing")

    with pytest.raises(SystemExit):
        parse(Options, ["--help"], "What it does.")
    assert capsys.readouterr().out.rstrip().endswith("word about the thing")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_examples_of_the_help_are_command_lines(program, capsys):
    shown = help_of(program, capsys).split("examples:\n")[1].splitlines()
    lines = [words for words in (shlex.split(line, comments=True) for line in shown) if words]
    assert len(lines) >= 3
    for line in lines:
        file = line.index(f"{program.__name__}.py")
        words = line[file + 1:]
        assert line[:file] == ["python"] or line[0] == "torchrun"
        assert parse(program.Options, words, "")
        for word in words:
            assert not word.startswith(("examples/", "tiny/")) or (ROOT / word).exists(), word
