"""Configs against the upstream code that will read them: all unknown keys and wrong types at once.

Upstream tools ignore a misspelt key (torchtune), stop at the first (torchtitan, lm-eval), or fail
an hour in.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from scripts.run.errors import InputError, nearest

REFUSES = "refuses ARGS or what the model sets"


def unknown(key: str, known: Iterable[str]) -> str:
    """Return what to say of a key that upstream does not have, with the nearest that it has."""
    return f"unknown key {key}; {nearest(key, sorted(known))}"


def wrong_type(value: Any, annotation: Any) -> str:
    """Return how a value misfits an annotation, "" if it fits.

    A whole number is a fine float, a string never a number.
    """
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    if isinstance(annotation, str):
        annotation = getattr(builtins, annotation, Any)
    if annotation is inspect.Parameter.empty:
        return ""
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        return error.errors()[0]["msg"]
    except PydanticSchemaGenerationError:  # upstream's own type: no YAML value can be compared
        return ""
    return ""


def against_dataclass(kind: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the problems of a config that will become the dataclass `kind`, nested or not."""
    types, found = typing.get_type_hints(kind), []
    for key, value in values.items():
        if key not in types:
            found.append(unknown(prefix + key, [prefix + name for name in types]))
        elif dataclasses.is_dataclass(types[key]) and isinstance(value, Mapping):
            found += against_dataclass(types[key], value, f"{prefix}{key}.")
        elif problem := wrong_type(value, types[key]):
            found.append(f"{prefix}{key} = {value!r}: {problem}")
    return found


def against_signature(
    component: Callable, values: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Return the problems of keyword arguments that will be given to `component`."""
    parameters = inspect.signature(component).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found = []
    for key, value in values.items():
        if key not in parameters:
            known = [prefix + name for name in parameters]
            found += [] if open_ended else [unknown(prefix + key, known)]
        elif parameters[key].annotation in (int, float, bool, str, "int", "float", "bool", "str"):
            problem = wrong_type(value, parameters[key].annotation)
            found += [f"{prefix}{key} = {value!r}: {problem}"] if problem else []
    return found


@contextlib.contextmanager
def refusals(tool: str) -> Iterator[None]:
    """Raise InputError, in the words of upstream's parser and with the nearest of its options,
    where argparse would end the process with 2."""

    def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        wrong = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        near = difflib.get_close_matches(wrong[1], _options(parser), 1) if wrong else []
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{tool} {REFUSES}: {message}{meant}")

    upstream = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = upstream  # type: ignore[method-assign]


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Name the options of a parser and of its commands."""
    found = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [name for command in action.choices.values() for name in _options(command)]
    return found
