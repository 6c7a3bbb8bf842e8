"""Settings of any dataclass: `a.b=value` from the command line, and checks of values against annotations.

Every mistake is a ValueError with a message of one line.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from typing import Annotated, Any

from fastssl.parsing import did_you_mean


def names(target: Any) -> list[str]:
    """The fields of a dataclass, given as a class or an instance."""
    return [f.name for f in dataclasses.fields(target)]


def unknown(target: Any, name: str, key: str) -> ValueError:
    """The error about a name that is not a field of the dataclass `target`, with the field that was meant."""
    known = names(target)
    groups = [group for group in known if dataclasses.is_dataclass(getattr(target, group, None))]
    below = next((f"{group}.{name}" for group in groups if name in names(getattr(target, group))), None)
    meant = f"; did you mean {below!r}?" if below else did_you_mean(name, known)  # lr -> optim.lr
    return ValueError(f"{key}: unknown setting {name!r}{meant} ({type(target).__name__} has {', '.join(known)})")


def assign(target: Any, text: str) -> None:
    """Apply one `a.b=value` to the dataclass `target`.

    Each part of the name is a field, a key of a dictionary, or for a tuple a number from 0 or "all".  Values of fields
    annotated as text are taken literally, others are Python literals.  ValueError with the most similar name, or with
    the type that the field needs.
    """
    key, eq, value = text.partition("=")
    if not eq:
        raise ValueError(f"override {text!r} is not of the form a.b=value")
    _set(target, key.split("."), value, key)


def _set(target: Any, path: list[str], value: Any, key: str) -> Any:
    """`target` with the setting at `path` changed: in place if it is mutable, else a copy."""
    name, *rest = path
    if isinstance(target, dict):
        if rest and name not in target:
            raise ValueError(f"{key}: there is no {name!r} yet{did_you_mean(name, target)}")
        target[name] = _set(target[name], rest, value, key) if rest else parse(value, Any, key)
        return target
    if isinstance(target, tuple | list):
        if name != "all" and (not name.isdecimal() or int(name) >= len(target)):
            last = len(target) - 1
            raise ValueError(f"{key}: {name!r} is not one of its {len(target)} places: 0 to {last}, or all")
        positions = range(len(target)) if name == "all" else [int(name)]
        new = [
            (_set(item, rest, value, key) if rest else parse(value, type(item), key)) if i in positions else item
            for i, item in enumerate(target)
        ]
        return type(target)(new)
    if not dataclasses.is_dataclass(target) or isinstance(target, type):
        raise ValueError(f"{key}: {type(target).__name__} has no settings below it")
    if name not in names(target):
        raise unknown(target, name, key)
    new = _set(getattr(target, name), rest, value, key) if rest else parse(value, field_types(type(target))[name], key)
    if type(target).__dataclass_params__.frozen:  # type: ignore[attr-defined]  # typeshed does not declare it
        try:
            return dataclasses.replace(target, **{name: new})
        except (TypeError, AttributeError, ValueError) as error:  # from __post_init__
            raise ValueError(f"{key}: {error}") from error
    setattr(target, name, new)
    return target


def field_types(kind: type) -> dict[str, Any]:
    """Annotations by field; Any where one names something that the config file does not import."""
    try:
        found = typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError):
        found = {}
    return {f.name: found.get(f.name, Any) for f in dataclasses.fields(kind)}


def choices(kind: type, name: str) -> tuple:
    """The values of a field whose type is a `Literal`."""
    return typing.get_args(field_types(kind)[name])


def parse(value: Any, kind: Any, key: str) -> Any:
    """Text from the command line as a value of type `kind`; a value that is not text is only checked."""
    if not isinstance(value, str):
        return coerce(value, kind, key)
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        literal = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
        return value
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if str in options and not isinstance(literal, str) and not (literal is None and type(None) in options):
        for other in options:  # 3 is a number if the field takes numbers, else the text "3"
            if other is not str:
                try:
                    return coerce(literal, other, key)
                except ValueError:
                    continue
        return value
    return coerce(literal, kind, key)


def coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as type `kind`: an int becomes a float, a list a tuple.  ValueError for anything else."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        number = coerce(value, args[0], key)
        for bounds in args[1:]:
            bounds.check(number, key)
        return number
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return coerce(value, option, key)
            except ValueError:
                continue
    elif kind is type(None) and value is None:
        return None
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{key}: an integer too large for a float") from None
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise ValueError(f"{key}: a number of more than 64 bits")
        return value
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    elif (origin or kind) is tuple and isinstance(value, list | tuple):
        if args and args[-1] is not Ellipsis and len(args) != len(value):
            raise ValueError(f"{key}: expected {len(args)} values, got {value!r:.80}")
        element = (lambda i: args[0 if args[-1] is Ellipsis else i]) if args else (lambda i: Any)
        return tuple(coerce(v, element(i), key) for i, v in enumerate(value))
    elif (origin or kind) is dict and isinstance(value, dict):
        for part in value.values() if args and args[1] is not Any else ():
            coerce(part, args[1], key)
        return value
    elif isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool):  # a bool is an int
        return value
    elif origin is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            name = ("off", "on")[value] if isinstance(value, bool) else value
            raise ValueError(f"{key}={value!r:.80} is not one of {', '.join(map(str, args))}{did_you_mean(name, args)}")
        return value
    raise ValueError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r:.80}")
