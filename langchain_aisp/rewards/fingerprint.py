"""Names for functions: the same name promises the same scores, in any process; what cannot be described gets none."""

from __future__ import annotations

import builtins
import dis
import functools
import hashlib
import inspect
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

_GLOBAL_READS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_GLOBAL_WRITES = ("STORE_GLOBAL", "DELETE_GLOBAL")


class Indescribable(Exception):
    """The function depends on something whose value has no stable description."""


def digest(*parts: str) -> str:
    """A short hash of some texts; their borders count."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()[:32]


def describe(value: Any, seen: tuple[int, ...] = ()) -> str:
    """A text that two values share only when they behave alike.

    Args:
        value: A plain function, partial, class or module of the standard library or an installed package, or a
            simple value (number, string, bytes, None, tuple or frozenset of such).
        seen: Ids of the functions that are being described, so that recursion ends.

    Raises:
        Indescribable: For anything else; a list or an object may change, and its description with it.
    """
    if isinstance(value, tuple):
        return f"({','.join(describe(item, seen) for item in value)})"
    if isinstance(value, frozenset):
        return f"frozenset({','.join(sorted(describe(item, seen) for item in value))})"
    if value is None or value is Ellipsis or type(value) in (bool, int, float, complex, str, bytes):
        return f"{type(value).__name__} {value!a}"
    if isinstance(value, CodeType):
        return _describe_code(value, seen)
    if isinstance(value, functools.partial):
        return f"partial{describe((value.func, value.args, tuple(value.keywords.items())), seen)}"
    if isinstance(value, FunctionType):
        return "recursion" if id(value) in seen else _describe_function(value, (*seen, id(value)))
    return _describe_library(value)


def _describe_function(function: FunctionType, seen: tuple[int, ...]) -> str:
    """Code, defaults, closure, attributes, and every global value and module that the code reads."""
    parts = [
        function.__code__,
        function.__defaults__,
        tuple((function.__kwdefaults__ or {}).items()),
        tuple(sorted(vars(function).items())),
        tuple(_content(cell) for cell in function.__closure__ or ()),
        tuple((name, _global(function, name)) for name in sorted(_globals_read(function.__code__))),
        _imports(function.__code__),
    ]
    return f"function{describe(tuple(parts), seen)}"


def _describe_code(code: CodeType, seen: tuple[int, ...]) -> str:
    """What a code object does; not its file, line numbers or annotations. Bytecode differs between Pythons."""
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return f"code{describe((_python(), code.co_code, code.co_exceptiontable, code.co_consts, shape, names), seen)}"


def _describe_library(value: Any) -> str:
    """Modules, classes and built-in functions by name, where a version says what is behind the name."""
    if isinstance(value, ModuleType):
        return f"module {value.__name__} {_version(value.__name__)}"
    if isinstance(value, type | BuiltinFunctionType) and isinstance(value.__module__, str):
        if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, ModuleType | None):
            raise Indescribable("a bound built-in method")
        return f"{value.__module__}.{value.__qualname__} {_version(value.__module__)}"
    raise Indescribable(f"a value of type {type(value).__name__}")


def _version(module: str) -> str:
    """Version of an installed package or the standard library; user code is Indescribable, it changes unseen."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return _python()
    package = sys.modules.get(top)
    version, file = getattr(package, "__version__", None), getattr(package, "__file__", None) or ""
    if isinstance(version, str) and {"site-packages", "dist-packages"} & set(PurePath(file).parts):
        return version
    raise Indescribable(f"module {module}, which has no version")


def _python() -> str:
    return f"{sys.implementation.name} {platform.python_version()}"


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "an empty cell"


def _global(function: FunctionType, name: str) -> Any:
    """The value a global name has now, as the function would find it."""
    return function.__globals__.get(name, vars(builtins).get(name, "an undefined name"))


def _globals_read(code: CodeType) -> set[str]:
    """Global names that a code object reads."""
    instructions = list(_instructions(code))
    for instruction in instructions:
        if instruction.opname in _GLOBAL_WRITES:
            raise Indescribable(f"a function that changes the global {instruction.argval}")
    return {instruction.argval for instruction in instructions if instruction.opname in _GLOBAL_READS}


def _imports(code: CodeType) -> tuple[tuple[str, str], ...]:
    """Modules that a code object imports when it runs, with their versions."""
    names = {instruction.argval for instruction in _instructions(code) if instruction.opname == "IMPORT_NAME"}
    return tuple((name, _version(name)) for name in sorted(names))


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """Instructions of a code object and of those inside it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def stable_fingerprint(fn: Callable[..., Any]) -> str | None:
    """The function's own ``fingerprint`` attribute, else a hash of its description, else None."""
    own = getattr(fn, "fingerprint", None)
    if isinstance(own, str):
        return own
    if inspect.ismethod(fn):
        return None  # the object behind it may change
    try:
        return digest(describe(fn))
    except Indescribable:
        return None
