"""A dataclass -> a command line: every field is an option, with one phrase that says what it is."""
import argparse
import dataclasses
import types
import typing
from dataclasses import MISSING
from typing import Any

from plumbing.recipes import Recipe, table

RECIPES = " (default: the recipe's)"    # in the help of an option; below all options it says what they are


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
    """
    description, examples, *_ = *about.split("\n\n"), ""
    of_recipes = [field.name for field in dataclasses.fields(options) if _default_of(field, required=False) == RECIPES]
    epilog = (table(of_recipes) if of_recipes else "") + (f"examples:\n{examples}" if examples else "")
    parser, groups = argparse.ArgumentParser(usage="%(prog)s --option value ...; --help explains them", epilog=epilog,
                                             description=description, argument_default=argparse.SUPPRESS,
                                             formatter_class=argparse.RawDescriptionHelpFormatter), {}
    for field in dataclasses.fields(options):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if title else parser
        _add(groups[title], field)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if not all(map(is_text, map(str, value if isinstance(value, list) else [value]))):
            parser.error(f"--{name.replace('_', '-')} {value!a}: not UTF-8; give a name or text in UTF-8")
    return options(**given)


def _add(parser, field: dataclasses.Field) -> None:
    """One field's flag."""
    old, extra, kind = field.metadata["old"], dict(field.metadata["extra"]), field.type
    if isinstance(kind, types.UnionType):                               # `float | None`: float
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    flags = ["--" + field.name.replace("_", "-"), *(name for name in old if name.startswith("--"))]
    required = field.default is MISSING and field.default_factory is MISSING
    if typing.get_origin(kind) is list:
        extra = {"action": "extend"} | extra if "nargs" in extra else extra | {"action": "append", "metavar": "TEXT"}
        kind = str
    if kind is bool:
        extra["action"] = argparse.BooleanOptionalAction if field.default is None else "store_true"
    else:
        extra["type"] = (lambda word: old.get(word, word)) if old else kind
    parser.add_argument(*flags, dest=field.name, required=required,
                        help=field.metadata["help"] + _default_of(field, required), **extra)


def _default_of(field: dataclasses.Field, required: bool) -> str:
    """What the help says about the value of a flag that is left out."""
    if required:
        return " (required)"
    if field.default is None and "(default" not in field.metadata["help"]:
        return RECIPES if field.name in Recipe.__dataclass_fields__ else ""
    return "" if field.default in (MISSING, None, "") or field.type is bool else f" (default: {field.default})"


def check_seed(seed: int) -> None:
    """Raises InputError on what torch's generators do not take."""
    if not 0 <= seed < 2 ** 63:
        raise InputError(f"--seed {seed}: out of range; give a number from 0 to 2**63 - 1")
