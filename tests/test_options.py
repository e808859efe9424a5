"""The command lines that are made from dataclasses: what they refuse, and what their help says."""
import dataclasses
import re

import pytest

import sample
import train
from plumbing import train_options
from plumbing.options import option, parse

pytestmark = pytest.mark.quick
PROGRAMS = {train: ("data and model", "method", "optimisation", "output", "machine"),
            sample: ("what to draw", "model", "output", "machine")}             # and the headings of their help


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


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_help_has_every_option_under_a_heading(program, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    headings = [line[:-1] for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["options", *PROGRAMS[program]]                          # "options" has -h alone
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
