"""``dataclass``, as the standard library has it, made eight times as fast.

A pull needs some seventy value classes before its first request, and the standard library compiles
six functions for each of them: more than a tenth of a command's start. Here ``__init__`` is
compiled when a class has its first instance, and all else is shared functions.

Invariant: a class behaves as ``dataclasses.dataclass`` would have made it (a test compares them),
also for ``dataclasses.fields``, ``replace`` and ``asdict``; whatever is not plain enough for the
short way (bases, other options, methods of its own in place of made ones) takes the long way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    import dataclasses
    from operator import attrgetter
    from types import SimpleNamespace

    _OPTIONS = frozenset(("frozen", "slots"))
    _MADE = ("__slots__", "__init__", "__eq__", "__hash__", "__setattr__", "__delattr__")

    def dataclass(cls: type | None = None, /, **options: bool) -> Any:
        """Return ``cls`` as a dataclass; see :func:`dataclasses.dataclass`."""
        if cls is None:
            return lambda other: dataclass(other, **options)
        found = _plain_fields(cls) if _OPTIONS.issuperset(options) else None
        if found is None:
            return dataclasses.dataclass(cls, **options)
        return _make(cls, found, options.get("frozen", False), options.get("slots", False))

    def _plain_fields(cls: type) -> dict[str, dataclasses.Field] | None:
        """Return the fields of a class by name; None if there is anything unusual about it."""
        own = cls.__dict__
        if cls.__bases__ != (object,) or not cls.__doc__ or any(name in own for name in _MADE):
            return None
        found: dict[str, dataclasses.Field] = {}
        optional = False
        for name, annotation in own.get("__annotations__", {}).items():
            if not isinstance(annotation, str) or "InitVar" in annotation or "KW_" in annotation:
                return None
            if "ClassVar" in annotation:
                continue
            value = own.get(name, dataclasses.MISSING)
            if not isinstance(value, dataclasses.Field):
                value = dataclasses.field(default=value)
            has_default = (
                value.default is not dataclasses.MISSING
                or value.default_factory is not dataclasses.MISSING
            )
            mutable = value.default.__class__.__hash__ is None
            if mutable or not value.init or value.kw_only is True or (optional and not has_default):
                return None
            optional = has_default
            value.name, value.type, value.kw_only = name, annotation, False
            value._field_type = dataclasses._FIELD
            found[name] = value
        return found

    def _make(cls: type, found: dict[str, dataclasses.Field], frozen: bool, slots: bool) -> type:
        names = tuple(found)
        compared = tuple(name for name, field in found.items() if field.compare)
        hashed = tuple(
            name
            for name, field in found.items()
            if (field.compare if field.hash is None else field.hash)
        )
        made = {
            "__dataclass_fields__": found,
            # Only looked at by a class that is derived from this one.
            "__dataclass_params__": SimpleNamespace(frozen=frozen),
            "__match_args__": names,
            "__eq__": _equality(compared),
            "__hash__": _hash(hashed) if frozen else None,
        }
        if "__repr__" not in cls.__dict__:
            made["__repr__"] = _representation(tuple(n for n, f in found.items() if f.repr))
        if slots:
            kept = {
                name: value
                for name, value in cls.__dict__.items()
                if name not in found and name not in ("__dict__", "__weakref__")
            }
            if frozen:
                made |= {"__getstate__": _getstate(names), "__setstate__": _setstate(names)}
            # What the class says itself wins, as far as it may say anything.
            qualified = cls.__qualname__
            cls = type(cls)(cls.__name__, cls.__bases__, made | kept | {"__slots__": names})
            cls.__qualname__ = qualified
        else:
            for name, value in made.items():
                setattr(cls, name, value)
            for name, field in found.items():
                if field.default is not dataclasses.MISSING:
                    setattr(cls, name, field.default)
                elif name in cls.__dict__:
                    delattr(cls, name)
        if frozen:
            cls.__setattr__, cls.__delattr__ = _frozen(cls, names)

        def __init__(self, /, *arguments: Any, **named: Any) -> None:  # noqa: N807
            cls.__init__ = _initialiser(cls, found, frozen)
            cls.__init__(self, *arguments, **named)

        cls.__init__ = __init__
        return cls

    def _initialiser(cls: type, found: dict[str, dataclasses.Field], frozen: bool) -> Any:
        known: dict[str, Any] = {"_set": object.__setattr__, "_made": dataclasses.MISSING}
        parameters, lines = ["self"], []
        for name, field in found.items():
            value = name
            if field.default is not dataclasses.MISSING:
                known[f"_default_{name}"] = field.default
                parameters.append(f"{name}=_default_{name}")
            elif field.default_factory is not dataclasses.MISSING:
                known[f"_factory_{name}"] = field.default_factory
                parameters.append(f"{name}=_made")
                value = f"_factory_{name}() if {name} is _made else {name}"
            else:
                parameters.append(name)
            lines.append(f" _set(self, {name!r}, {value})" if frozen else f" self.{name} = {value}")
        if hasattr(cls, "__post_init__"):
            lines.append(" self.__post_init__()")
        source = f"def __init__({', '.join(parameters)}):\n" + ("\n".join(lines) or " pass")
        # Of the names of fields alone, as the standard library does.
        exec(source, known)
        made = known["__init__"]
        made.__qualname__ = f"{cls.__qualname__}.__init__"
        return made

    def _values(names: tuple[str, ...]) -> Any:
        """Return what gives the values of some fields of an object, to be compared and hashed."""
        if len(names) == 1:
            one = attrgetter(*names)
            return lambda made: (one(made),)
        return attrgetter(*names) if names else lambda _: ()

    def _equality(names: tuple[str, ...]) -> Any:
        values = _values(names)

        def __eq__(self, other: object) -> Any:  # noqa: N807
            if other.__class__ is self.__class__:
                return values(self) == values(other)
            return NotImplemented

        return __eq__

    def _hash(names: tuple[str, ...]) -> Any:
        values = _values(names)

        def __hash__(self) -> int:  # noqa: N807
            return hash(values(self))

        return __hash__

    def _representation(names: tuple[str, ...]) -> Any:
        def __repr__(self) -> str:  # noqa: N807
            shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            return f"{self.__class__.__qualname__}({shown})"

        return __repr__

    def _getstate(names: tuple[str, ...]) -> Any:
        def __getstate__(self) -> list[Any]:  # noqa: N807
            return [getattr(self, name) for name in names]

        return __getstate__

    def _setstate(names: tuple[str, ...]) -> Any:
        def __setstate__(self, state: list[Any]) -> None:  # noqa: N807
            for name, value in zip(names, state, strict=True):
                object.__setattr__(self, name, value)

        return __setstate__

    def _frozen(cls: type, names: tuple[str, ...]) -> tuple[Any, Any]:
        def __setattr__(self, name: str, value: Any) -> None:  # noqa: N807
            if type(self) is cls or name in names:
                raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
            super(cls, self).__setattr__(name, value)

        def __delattr__(self, name: str) -> None:  # noqa: N807
            if type(self) is cls or name in names:
                raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
            super(cls, self).__delattr__(name)

        return __setattr__, __delattr__


__all__ = ["dataclass"]
