"""A dataclass -> a command line: every field is an option, with one phrase that says what it is."""
import argparse
import dataclasses
import types
import typing
from dataclasses import MISSING
from typing import Any

from plumbing.files import InputError
from plumbing.recipes import Recipe


def option(default, text: str, group: str = "", old: dict[str, str] | None = None, **extra) -> Any:
    """A dataclass field with one phrase of explanation.

    group: heading of the help under which it stands. old: earlier spellings that still work, flags (with their dashes)
    and values, and what they are called now. extra: for argparse (choices, ...).
    """
    metadata = {"help": text, "group": group, "old": old or {}, "extra": extra}
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(options: type, argv: list[str] | None, description: str):
    """An instance of the dataclass `options` from command line words: field `batch_size` is `--batch-size`.

    bool fields are switches, list fields repeatable flags (or, with nargs, flags that take several words), fields
    without a default required.
    """
    parser, groups = argparse.ArgumentParser(description=description), {}
    for field in dataclasses.fields(options):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if title else parser
        _add(groups[title], field)
    return options(**vars(parser.parse_args(argv)))


def _add(parser, field: dataclasses.Field) -> None:
    """One field's flag."""
    old, extra, kind = field.metadata["old"], dict(field.metadata["extra"]), _plain_type(field.type)
    flags = ["--" + field.name.replace("_", "-"), *(name for name in old if name.startswith("--"))]
    required = field.default is MISSING and field.default_factory is MISSING
    is_list = typing.get_origin(kind) is list
    extra |= {"dest": field.name, "help": field.metadata["help"] + _default_of(field, required, kind)}
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default is None else "store_true"
        parser.add_argument(*flags, action=action, default=field.default, **extra)
        return
    if is_list:
        extra = {"action": "extend"} | extra if "nargs" in extra else extra | {"action": "append", "metavar": "TEXT"}
    extra["type"] = (lambda word: old.get(word, word)) if old else str if is_list else kind
    parser.add_argument(*flags, required=required, default=[] if is_list else None if required else field.default,
                        **extra)


def _default_of(field: dataclasses.Field, required: bool, kind: type) -> str:
    """What the help says about the value of a flag that is left out."""
    if required:
        return " (required)"
    if field.default is None and "(default" not in field.metadata["help"]:
        return " (default: the recipe's)" if field.name in Recipe.__dataclass_fields__ else ""
    return "" if field.default in (MISSING, None, "") or kind is bool else f" (default: {field.default})"


def _plain_type(annotation):
    """`float | None` -> float."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def check_seed(seed: int) -> None:
    """Raises InputError on what torch's generators do not take."""
    if not 0 <= seed < 2 ** 63:
        raise InputError(f"--seed {seed}: out of range; give a number from 0 to 2**63 - 1")
