"""A dataclass -> a command line: every field is an option, with one phrase that says what it is."""
import argparse
import dataclasses
import types
import typing
from dataclasses import MISSING

from plumbing.files import InputError
from plumbing.recipes import Recipe


def option(default, text: str, **extra):
    """A dataclass field with one line of explanation; extra goes to argparse (choices, ...)."""
    if default is MISSING:
        return dataclasses.field(metadata={"help": text, **extra})
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text, **extra})
    return dataclasses.field(default=default, metadata={"help": text, **extra})


def parse(options: type, argv: list[str] | None, description: str):
    """An instance of the dataclass `options` from command line words: field `batch_size` is `--batch-size`.

    bool fields are switches, list fields repeatable flags (or, with nargs, flags that take several words), fields
    without a default required.
    """
    parser = argparse.ArgumentParser(description=description)
    for field in dataclasses.fields(options):
        extra = {key: value for key, value in field.metadata.items()}
        required = field.default is MISSING and field.default_factory is MISSING
        flag, kind = "--" + field.name.replace("_", "-"), _plain_type(field.type)
        of_recipe = field.name in Recipe.__dataclass_fields__ and field.default is None
        shown = "required" if required else "default: the recipe's" if of_recipe else f"default: {field.default}"
        if required or of_recipe or not (field.default in (None, False) or kind is list or field.default is MISSING):
            extra["help"] += f" ({shown})"
        if kind is bool:
            action = argparse.BooleanOptionalAction if field.default is None else "store_true"
            parser.add_argument(flag, action=action, default=field.default, **extra)
        elif "nargs" in extra:
            parser.add_argument(flag, required=required, default=[], **extra)
        elif typing.get_origin(kind) is list:
            parser.add_argument(flag, action="append", default=[], metavar="TEXT", **extra)
        else:
            default = None if required else field.default
            parser.add_argument(flag, type=kind, required=required, default=default, **extra)
    return options(**vars(parser.parse_args(argv)))


def _plain_type(annotation):
    """`float | None` -> float."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def check_seed(seed: int) -> None:
    """Raises InputError on what torch's generators do not take."""
    if not 0 <= seed < 2 ** 63:
        raise InputError(f"--seed {seed}: out of range; give a number from 0 to 2**63 - 1")
