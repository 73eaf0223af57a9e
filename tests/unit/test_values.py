"""Our ``dataclass`` beside the standard library's, which is the oracle."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
import sys
from dataclasses import field
from typing import Any, ClassVar

import pytest

import stowray.pipeline
from stowray.pipeline.values import dataclass as ours

MAKERS = [ours, dataclasses.dataclass]
OPTIONS = [
    {},
    {"slots": True},
    {"frozen": True},
    {"frozen": True, "slots": True},
]


def plain(maker: Any, **options: Any) -> Any:
    @maker(**options)
    class Plain:
        """A class with all that ours use."""

        first: int
        second: str = "two"
        third: list[int] = field(default_factory=list)
        hidden: str = field(default="", repr=False)
        ignored: int = field(default=0, compare=False)
        unhashed: tuple[int, ...] = field(default=(), hash=False)
        SHARED: ClassVar[int] = 7

        @property
        def double(self) -> int:
            return 2 * self.first

        @classmethod
        def of(cls, number: int) -> Any:
            return cls(number)

    return Plain


def outcome(work: Any) -> Any:
    """What a call gives, or the kind and text of its error."""
    try:
        return work()
    except (TypeError, ValueError, AttributeError) as error:
        return type(error), str(error).replace("test_values.", "")


QUESTIONS: dict[str, Any] = {
    "made": lambda kind: vars_of(kind(1)),
    "all given": lambda kind: vars_of(kind(1, "x", [3], "h", 5, (6,))),
    "by name": lambda kind: vars_of(kind(second="x", first=2)),
    "too few": lambda kind: kind(),
    "too many": lambda kind: kind(1, "x", [3], "h", 5, (6,), 7),
    "unknown": lambda kind: kind(1, fourth=2),
    "twice": lambda kind: kind(1, first=2),
    "shown": lambda kind: repr(kind(1, hidden="secret")),
    "equal": lambda kind: kind(1) == kind(1),
    "not equal": lambda kind: kind(1) == kind(2),
    "equal but for what is ignored": lambda kind: kind(1, ignored=1) == kind(1, ignored=2),
    "other kind": lambda kind: kind(1) == (1, "two", [], "", 0, ()),
    "hash": lambda kind: hash(kind(1, third=())) == hash(kind(1, third=())),  # type: ignore[arg-type]
    "hash of what cannot be hashed": lambda kind: hash(kind(1)),
    "unhashed": lambda kind: hash(kind(1, third=(), unhashed=(1,))) == hash(kind(1, third=())),
    "nothing shared": lambda kind: kind(1).third is kind(1).third,
    "assigned": lambda kind: assign(kind(1), "first", 9),
    "assigned anew": lambda kind: assign(kind(1), "other", 9),
    "deleted": lambda kind: delete(kind(1), "first"),
    "replaced": lambda kind: vars_of(dataclasses.replace(kind(1), second="y")),
    "replaced wrongly": lambda kind: dataclasses.replace(kind(1), fourth=1),
    "as a dictionary": lambda kind: dataclasses.asdict(kind(1, third=[1, 2])),
    "as a tuple": lambda kind: dataclasses.astuple(kind(1, third=[1, 2])),
    "fields": lambda kind: [
        (one.name, one.type, one.repr, one.compare, one.hash, one.init, one.kw_only)
        for one in dataclasses.fields(kind)
    ],
    "is one": lambda kind: (dataclasses.is_dataclass(kind), dataclasses.is_dataclass(kind(1))),
    "matched": lambda kind: kind.__match_args__,
    "slots": lambda kind: getattr(kind, "__slots__", None),
    "has a dictionary": lambda kind: hasattr(kind(1), "__dict__"),
    "class attribute": lambda kind: kind.SHARED,
    "default on the class": lambda kind: (
        None if "__slots__" in vars(kind) else (kind.second, hasattr(kind, "first"), kind.ignored)
    ),
    "factory on the class": lambda kind: "__slots__" in vars(kind) or hasattr(kind, "third"),
    "property": lambda kind: kind(4).double,
    "class method": lambda kind: vars_of(kind.of(3)),
    "copied": lambda kind: copy.copy(kind(1)) == kind(1),
    "copied deeply": lambda kind: copy.deepcopy(kind(1)) == kind(1),
    "names": lambda kind: (kind.__name__, kind.__doc__, kind.__module__),
    "signature": lambda kind: (kind(1), list(inspect.signature(kind).parameters))[1],
}


def vars_of(made: Any) -> list[tuple[str, Any]]:
    return [(one.name, getattr(made, one.name)) for one in dataclasses.fields(made)]


def assign(made: Any, name: str, value: Any) -> Any:
    setattr(made, name, value)
    return getattr(made, name)


def delete(made: Any, name: str) -> bool:
    delattr(made, name)
    return hasattr(made, name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("question", QUESTIONS)
def test_it_does_what_the_standard_library_does(question: str, options: dict[str, Any]) -> None:
    if question == "assigned anew" and options == {"frozen": True, "slots": True}:
        # The standard library's fails in its own super() there, with a TypeError.
        with pytest.raises(dataclasses.FrozenInstanceError):
            QUESTIONS[question](plain(ours, **options))
        return
    answers = []
    for maker in MAKERS:
        kind = plain(maker, **options)
        answers.append(outcome(lambda kind=kind: QUESTIONS[question](kind)))
    assert answers[0] == answers[1]


def test_after_init() -> None:
    def kind(maker: Any) -> Any:
        @maker(frozen=True, slots=True)
        class Checked:
            """Refuses some values."""

            number: int

            def __post_init__(self) -> None:
                if self.number < 0:
                    raise ValueError("negative")

        return Checked

    for maker in MAKERS:
        assert kind(maker)(1).number == 1
        with pytest.raises(ValueError, match="negative"):
            kind(maker)(-1)


def test_a_class_of_ours_can_be_derived_from() -> None:
    for options in OPTIONS:

        def derived(maker: Any, options: dict[str, Any] = options) -> Any:
            @dataclasses.dataclass(**options)
            class Derived(plain(maker, **options)):  # type: ignore[misc]
                """More of it."""

                last: int = 1

            return Derived

        mine, theirs = derived(ours), derived(dataclasses.dataclass)
        assert vars_of(mine(1, last=3)) == vars_of(theirs(1, last=3))
        assert outcome(lambda kind=mine: assign(kind(1), "first", 2)) == outcome(
            lambda kind=theirs: assign(kind(1), "first", 2)
        )


@ours(frozen=True, slots=True)
class Sent:
    """Goes through a pickle."""

    number: int
    words: tuple[str, ...] = ()


@ours(slots=True)
class Kept:
    """Goes through a pickle and can be changed."""

    number: int


def test_pickles() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(Sent(1, ("a",)), protocol)) == Sent(1, ("a",))
        assert pickle.loads(pickle.dumps(Kept(1), protocol)) == Kept(1)


@pytest.mark.parametrize(
    "source",
    [
        "@maker(order=True)\nclass A:\n 'doc'\n a: int",
        "@maker(kw_only=True)\nclass A:\n 'doc'\n a: int",
        "@maker(eq=False)\nclass A:\n 'doc'\n a: int",
        "@maker\nclass A:\n 'doc'\n a: int = 1\n b: int",
        "@maker\nclass A:\n 'doc'\n a: list = []",
        "@maker(slots=True)\nclass A:\n 'doc'\n __slots__ = ('a',)\n a: int",
        "@maker\nclass A:\n a: int",
        "@maker\nclass A(Exception):\n 'doc'\n a: int",
        "@maker\nclass A:\n 'doc'\n a: int\n def __hash__(self): return 1",
        "@maker\nclass A:\n 'doc'\n a: int\n def __repr__(self): return 'mine'",
        "@maker\nclass A:\n 'doc'\n",
    ],
)
def test_what_is_unusual_is_left_to_the_standard_library(source: str) -> None:
    def made(maker: Any) -> Any:
        names: dict[str, Any] = {"maker": maker, "__name__": __name__}
        exec("from __future__ import annotations\n" + source, names)
        return names["A"]

    def answer(maker: Any) -> Any:
        kind = made(maker)
        one = kind(a=1) if kind.__annotations__ else kind()
        two = kind(a=2) if kind.__annotations__ else kind()
        return (
            kind.__doc__,
            repr(one),
            outcome(lambda: one < two)[0] if "order" not in source else one < two,
            one == two,
            outcome(lambda: hash(one)) if "__hash__" in source else None,
        )

    assert outcome(lambda: answer(ours)) == outcome(lambda: answer(dataclasses.dataclass))


def test_every_value_of_the_pipeline_can_be_made_and_shown() -> None:
    """Fields whose names or defaults our source of ``__init__`` cannot spell would fail here."""
    seen = 0
    for module in pkgutil.iter_modules(stowray.pipeline.__path__, "stowray.pipeline."):
        found = sys.modules.get(module.name) or importlib.import_module(module.name)
        for kind in vars(found).values():
            if not (inspect.isclass(kind) and dataclasses.is_dataclass(kind)):
                continue
            if kind.__module__ != module.name or issubclass(kind, BaseException):
                continue
            seen += 1
            needed = {
                one.name: "x"
                for one in dataclasses.fields(kind)
                if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
            }
            if not hasattr(kind, "__post_init__"):
                assert kind(**needed) is not None
    assert seen > 50
