"""The configuration is the algorithm: frozen dataclasses that check themselves, and their form as plain JSON.

An algorithm is written `{"algorithm": "dgc", "density": 0.001}`, a part of it (a warm-up, say) with a tag of its own:
`{"schedule": "paper", "stage": 500}`, or as a name alone where its defaults will do. Unknown names and keys are errors
that list the known ones.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from distopt.errors import ConfigError


class FrozenMapping(Mapping[str, Any]):
    """A mapping that cannot change and can be hashed. Unlike a dict it is not equal to one in another order."""

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return list(self.items()) == list(other.items()) if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._items)


class Configurable:
    """A dataclass that can be written as a mapping `{tag: name, field: value, ...}` and made from one.

    A direct subclass is a kind of thing (`tag` names the key it is chosen by); the subclasses below it register
    themselves under the name given in their class statement: `class DGC(Algorithm, name="dgc")`. A name belongs to one
    class of its kind, another one raises `ConfigError`; the class statement may run again, as on a reload.
    """

    tag: ClassVar[str]
    name: ClassVar[str]
    _known: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, *, tag: str | None = None, name: str | None = None) -> None:
        super().__init_subclass__()
        if tag is not None:
            cls.tag = tag
            cls._known = {}
        if name is not None:
            before = cls._known.get(name, cls)
            own = before.__module__.startswith("distopt.") and before.__module__ != cls.__module__
            if own or before.__qualname__ != cls.__qualname__:
                raise ConfigError(
                    f"the name of a class must be new among those of {cls.tag!r}, got {name!r} for {cls.__qualname__}, "
                    f"which is {before.__module__}.{before.__qualname__}'s; choose another name"
                )
            cls.name = name
            cls._known[name] = cls

    @classmethod
    def settings(cls) -> tuple[dataclasses.Field[Any], ...]:
        """What can be set: the fields of this dataclass."""
        return dataclasses.fields(cls)  # type: ignore[arg-type]  # every subclass is a dataclass

    def to_dict(self) -> dict[str, Any]:
        """This configuration as plain values that JSON and TOML can hold; `from_dict` makes an equal object of it.

        A field that is None, as it is by default, is left out: TOML has no null.
        """
        plain: dict[str, Any] = {self.tag: self.name}
        for field in self.settings():
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                plain[field.name] = _to_plain(value)
        return plain

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """The object that `mapping` describes.

        Raises:
            ConfigError: The tag is missing, its name is unknown, a key is unknown or a value breaks its rule.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"a configuration must be a mapping with the key {cls.tag!r}, got {mapping!r}")
        rest = dict(mapping)
        name = rest.pop(cls.tag, None)
        known: dict[str, Any] = {key: made for key, made in cls._known.items() if issubclass(made, cls)}
        if not isinstance(name, str) or name not in known:
            names = ", ".join(sorted(known))
            remedy = _perhaps(name, known) or "add it to the configuration"
            raise ConfigError(f"{cls.tag!r} must be one of {names}, got {name!r}; {remedy}")
        made = known[name]
        fields = {field.name: field for field in made.settings()}
        if unknown := sorted(str(key) for key in rest if key not in fields):
            raise ConfigError(
                f"unknown key {', '.join(map(repr, unknown))} for {_called(cls.tag, name)}; known keys are "
                f"{', '.join(fields)}{'; ' + close if (close := _perhaps(unknown[0], fields)) else ''}"
            )
        try:
            configured: Self = made(**{key: _from_plain(value, fields[key]) for key, value in rest.items()})
        except TypeError as error:  # a field without a default is missing
            raise ConfigError(f"{_called(cls.tag, name)}: {error}; add the missing key") from error
        return configured


def _called(tag: str, name: str) -> str:
    return tag if tag == name else f"{tag} {name!r}"  # where there is but one of a kind, it is called after the kind


def _perhaps(written: object, known: Iterable[str]) -> str:
    """A remedy for a misspelt name; empty where none is close."""
    close = difflib.get_close_matches(written, known, n=1) if isinstance(written, str) else []
    return f"perhaps {close[0]!r} is meant" if close else ""


def _to_plain(value: Any) -> Any:
    if isinstance(value, Configurable):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def _from_plain(value: Any, field: dataclasses.Field[Any]) -> Any:
    kind: type[Configurable] | None = field.metadata.get("configurable")
    if kind is not None and isinstance(value, str):  # a name stands for the thing with its defaults
        return kind.from_dict({kind.tag: value})
    if kind is not None and isinstance(value, Mapping):
        return kind.from_dict(value)
    return tuple(value) if isinstance(value, list) else value


def check_number(field: str, value: object, *, rule: str, remedy: str, low: float, high: float) -> None:
    """Raises `ConfigError` unless value is a finite number (not a bool) in (low, high]."""
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    if valid:
        assert isinstance(value, int | float)
        valid = low < value <= high and value < math.inf
    if not valid:
        raise ConfigError(f"{field} must be {rule}, got {value!r}; {remedy}")


def check_density(field: str, value: object) -> None:
    """Raises `ConfigError` unless value is a fraction of entries to send, in (0, 1]."""
    remedy = "use 0.001 to send 0.1% of the gradient"
    check_number(field, value, rule="a number in (0, 1]", remedy=remedy, low=0.0, high=1.0)


def check_count(field: str, value: object, *, low: int, remedy: str) -> None:
    """Raises `ConfigError` unless value is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{field} must be an integer of at least {low}, got {value!r}; {remedy}")


def check_seconds(field: str, value: object) -> None:
    """Raises `ConfigError` unless value is a positive number of seconds, of at most 1e6."""
    rule, remedy = "a positive number of seconds", "leave it out for the default"
    check_number(field, value, rule=rule, remedy=remedy, low=0.0, high=1e6)


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises `ConfigError` unless value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_switch(field: str, value: object) -> None:
    """Raises `ConfigError` unless value is True or False: "no" and 0.0 would count as something."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field} must be True or False, got {value!r}; write it without quotes")


class Algorithm(Configurable, tag="algorithm"):
    """Base of what `distopt.from_config` makes: configurations that users attach, or give to a simulation."""
