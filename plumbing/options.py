"""A dataclass -> a command line: every field is an option, with one phrase that says what it is."""
import argparse
import dataclasses
import json
import typing
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from plumbing.recipes import Recipe, table

RECIPES, REQUIRED = " (default: the recipe's)", " (required)"     # in the help; below it stands what the recipes' are


class InputError(Exception):
    """A mistake in what the user gave us; the message is one line: file, value, remedy."""


def is_text(words: str) -> bool:
    """Whether UTF-8 can spell it; bytes of another encoding on a command line become characters that it cannot."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in words)


def option(default, text: str, group: str = "", old: dict[str, str] | None = None, **extra) -> Any:
    """A dataclass field with one phrase of explanation.

    group: heading of the help under which it stands. old: earlier spellings that still work, flags (with their dashes)
    and values, and what they are called now. extra: for argparse (choices, ...).
    """
    metadata = {"help": text, "group": group, "old": old or {}, "extra": extra}
    values = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata=metadata, **values)


def parse(options: type, argv: list[str] | None, about: str):
    """An instance of the dataclass `options` from command line words: field `batch_size` is `--batch-size`.

    bool fields are switches, list fields repeatable flags (or, with nargs, flags that take several words), fields
    without a default required. about: what the program does, a line or a docstring in which examples come next.
    A field `config` names the config.json of a run, whose options are the values of all flags that are not given.
    """
    description, examples, *_ = *about.split("\n\n"), ""
    of_recipes = [field.name for field in dataclasses.fields(options) if _default_of(field) == RECIPES]
    epilog = (table(of_recipes) if of_recipes else "") + (f"examples:\n{examples}" if examples else "")
    parser, groups = argparse.ArgumentParser(usage="%(prog)s --option value ...; --help explains them", epilog=epilog,
                                             description=description, argument_default=argparse.SUPPRESS,
                                             formatter_class=argparse.RawDescriptionHelpFormatter), {}
    for field in dataclasses.fields(options):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if title else parser
        old, extra = field.metadata["old"], dict(field.metadata["extra"])
        kind = next(iter(typing.get_args(field.type)), field.type)      # of `float | None` and `list[float]`: float
        if typing.get_origin(field.type) is list:
            extra = ({"action": "extend"} if "nargs" in extra else {"action": "append", "metavar": "TEXT"}) | extra
        extra |= {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": (lambda word, old=old: old.get(word, word)) if old else kind}
        flags = ["--" + field.name.replace("_", "-"), *(name for name in old if name.startswith("--"))]
        groups[title].add_argument(*flags, dest=field.name, help=field.metadata["help"] + _default_of(field), **extra)
    given = vars(parser.parse_args(argv))
    if "config" in given:
        given = _of_config(parser, *given["config"]) | given
    for field in dataclasses.fields(options):
        if _default_of(field) == REQUIRED and field.name not in given:
            parser.error(f"the following arguments are required: --{field.name.replace('_', '-')}")
    for name, value in given.items():
        if not all(map(is_text, map(str, value if isinstance(value, list) else [value]))):
            parser.error(f"--{name.replace('_', '-')} {value!a}: not UTF-8; give a name or text in UTF-8")
    return options(**given)


def _of_config(parser: argparse.ArgumentParser, path: str, *others: str) -> dict[str, Any]:
    """The options of a run, from its config.json: read as words of a command line, so that they are checked as such."""
    if others:
        parser.error("--config: given twice; give one, and flags for what shall be different")
    parser.prog, parser.allow_abbrev = f"{parser.prog} --config {path!r}", False       # what is said begins with it
    try:
        found = {**json.loads(Path(path).read_text(encoding="utf-8"))["options"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        parser.error(f"not the config.json of a run ({type(error).__name__}: {error!s:.200}); give one")
    parts = [(name.replace("_", "-"), part) for name, value in found.items() if name not in ("config", "resume")
             for part in (value if isinstance(value, list) else [value]) if part is not None]
    read, unknown = parser.parse_known_args([f"--no-{flag}" if part is False else f"--{flag}" if part is True
                                             else f"--{flag}={part}" for flag, part in parts])
    if wrong := unknown + [name for name, value in found.items()
                           if type(value) in (list, dict) and type(getattr(read, name, [])) is not list]:
        parser.error(f"{wrong[0]:.60}: not an option of this version, or not with such a value; correct it in a copy")
    return vars(read)


def _default_of(field: dataclasses.Field) -> str:
    """What the help says about the value of a flag that is left out."""
    if field.default is MISSING and field.default_factory is MISSING:
        return REQUIRED
    if field.default is None and "(default" not in field.metadata["help"]:
        return RECIPES if field.name in Recipe.__dataclass_fields__ else ""
    return "" if field.default in (MISSING, None, "") or field.type is bool else f" (default: {field.default})"


def check_seed(seed: int) -> None:
    """Raises InputError on what torch's generators do not take."""
    if not 0 <= seed < 2 ** 63:
        raise InputError(f"--seed {seed}: out of range; give a number from 0 to 2**63 - 1")
