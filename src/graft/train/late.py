"""A class whose framework is imported when the first object is made, not when the class is."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ..errors import StateError

if TYPE_CHECKING:
    from typing_extensions import Self


class Late:
    """Objects of a subclass are objects of its framework's class too.

    The framework is the one that the program has imported already (both, if it has imported both), else the
    first one that is installed.
    """

    #: the framework's modules that have the class, the most usual first
    _homes: ClassVar[tuple[str, ...]] = ()
    _base: ClassVar[str] = ""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        return cast("Self", object.__new__(_joined(cls, _bases(cls._homes, cls._base))))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class made at run time has no name that pickle could import; the written one has
        written = type(self).__mro__[1] if "_made" in vars(type(self)) else type(self)
        return _blank, (written,), dict(self.__dict__)


def _bases(homes: tuple[str, ...], name: str) -> tuple[type, ...]:
    used = [home for home in homes if home in sys.modules]
    used = used or [home for home in homes if find_spec(home.partition(".")[0])][:1]
    if not used:
        package = homes[0].partition(".")[0]
        raise StateError(f"this callback is for {package}, which is not installed: pip install {package}")
    return tuple(getattr(import_module(home), name) for home in used)


@cache
def _joined(cls: type[Any], bases: tuple[type, ...]) -> type[Any]:
    if issubclass(cls, bases):
        return cls
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, *bases), {**own, "_made": True})


def _blank(cls: type[Late]) -> Late:
    return cls.__new__(cls)
