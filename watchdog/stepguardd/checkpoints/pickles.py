"""
Reading what a pickle says without running it.

It promises that nothing named in a pickle is ever imported, called or built: the byte code is disassembled by
`pickletools`, and names, tuples, numbers and texts are put together as inert values. From them come the three
things that vetting needs: which names the pickle would import, which storages a `.pt` file holds and of which
type, and which byte ranges a torch distributed checkpoint refers to. What cannot be understood becomes
`Opaque`, never a guess.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

# A .metadata of a very large sharded model has a few million operations; more is no metadata.
OPERATIONS_MAX = 20_000_000


class PickleError(Exception):
    """The bytes are no well-formed pickle."""


@dataclass(frozen=True, slots=True)
class Name:
    """A global that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """What calling `maker` would have made; `state` is what it would have been given afterwards."""

    maker: Any
    arguments: Any
    state: Any = None


@dataclass(slots=True, eq=False)
class Opaque:
    """A value that is of no interest here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """One storage of a `.pt` file: the key of its zip entry, and its element type where that is known."""

    key: str
    dtype: str | None
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """One item of a torch distributed checkpoint: a file beside the .metadata, and where it lies in it."""

    path: str
    offset: int
    length: int


@dataclass(slots=True, kw_only=True)
class Contents:
    """What a pickle says."""

    names: set[Name] = field(default_factory=set)
    storages: dict[str, Storage] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)
    dynamic_names: bool = False  # a global whose name is computed: it could be anything


# Names that no checkpoint needs and that run code, open files or reach the network when they are called.
_DANGEROUS_MODULES = frozenset(
    {
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "socket",
        "shutil",
        "runpy",
        "importlib",
        "pty",
        "code",
        "codeop",
        "commands",
        "ctypes",
        "multiprocessing",
        "webbrowser",
        "pip",
        "ensurepip",
        "venv",
        "asyncio",
        "requests",
        "urllib",
        "http",
        "ftplib",
        "smtplib",
        "telnetlib",
        "paramiko",
        "bdb",
        "pdb",
        "trace",
        "timeit",
        "cProfile",
        "profile",
        "pydoc",
        "marshal",
        "imp",
        "zipimport",
        "pkgutil",
        "idlelib",
        "distutils",
        "setuptools",
        "_posixsubprocess",
        "_winapi",
        "antigravity",
        "pickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
    }
)
_DANGEROUS_BUILTINS = frozenset(
    {
        "eval",
        "exec",
        "compile",
        "open",
        "__import__",
        "setattr",
        "delattr",
        "globals",
        "locals",
        "vars",
        "input",
        "breakpoint",
        "execfile",
        "apply",
        "map",
        "filter",
    }
)
_DANGEROUS = frozenset(
    {
        "operator.methodcaller",
        "types.FunctionType",
        "types.CodeType",
        "torch.load",
        "torch.serialization.load",
        "torch.hub.load",
        "torch.utils.collect_env.run",
        "numpy.testing._private.utils.runstring",
        "pathlib.Path.unlink",
    }
)
_BUILTINS = frozenset({"builtins", "__builtin__", "__builtins__"})


def dangerous(contents: Contents) -> str | None:
    """The first name that would run code on loading, for a person; None when there is none."""
    for name in sorted(contents.names, key=str):
        attributes = name.name.split(".")
        root = name.module.partition(".")[0]
        # A dotted name reaches through a harmless module into what that module imported: `torch`,
        # `os.system`.
        if root in _DANGEROUS_MODULES or _DANGEROUS_MODULES & set(attributes) or str(name) in _DANGEROUS:
            return str(name)
        if root in _BUILTINS and _DANGEROUS_BUILTINS & set(attributes):
            return str(name)
        if any(part.startswith("__") for part in attributes) and attributes[-1] not in _HARMLESS_DUNDERS:
            return str(name)
    return "a name computed while loading" if contents.dynamic_names else None


_HARMLESS_DUNDERS = frozenset({"__newobj__", "__newobj_ex__"})


def read_pickle(data: bytes | IO[bytes]) -> Contents:
    """
    What the first pickle in `data` says.

    Args:
        data: a pickle of any protocol; what follows its STOP is not looked at, and a stream is left there.

    Raises:
        PickleError: malformed, or longer than any checkpoint's.
    """
    return _run(data).finish()


def read_value(data: bytes | IO[bytes]) -> Any:
    """
    What the first pickle in `data` would make, of inert parts: an object is its `Made`.

    Of dicts only what stands under text keys is kept.

    Raises:
        PickleError: malformed, or longer than any checkpoint's.
    """
    return _run(data).value()


def _run(data: bytes | IO[bytes]) -> _Machine:
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            machine.step(opcode.name, argument)
            if count > OPERATIONS_MAX:
                raise PickleError("has too many operations")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # pickletools answers malformed bytes with any of these.
        raise PickleError(f"is not a well-formed pickle: {error}") from error
    return machine


class _Mark:
    """The stack's mark object."""


class _Machine:
    """A pickle machine that only moves inert values about."""

    def __init__(self) -> None:
        self.contents = Contents()
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._infos: list[Made] = []
        self._persistent: dict[str, tuple[Any, int]] = {}
        self._rebuilt: dict[str, str] = {}

    def finish(self) -> Contents:
        for key, (kind, elements) in self._persistent.items():
            dtype = _storage_dtype(kind) or self._rebuilt.get(key)
            self.contents.storages[key] = Storage(key=key, dtype=dtype, elements=elements)
        self.contents.ranges.extend(_ranges(self._infos))
        return self.contents

    def value(self) -> Any:
        if not self._stack or self._stack[-1] is _Mark:
            raise PickleError("makes nothing")
        return self._stack[-1]

    def step(self, name: str, argument: Any) -> None:
        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(self, argument)
        elif name in _PUSHES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name not in _IGNORED:
            raise PickleError(f"uses the unknown operation {name}")

    # Each handler below is one operation (or a family of them) of the pickle machine.

    def _mark(self, argument: Any) -> None:
        self._stack.append(_Mark)

    def _pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while at >= 0 and self._stack[at] is not _Mark:
            at -= 1
        if at < 0:
            raise PickleError("closes a mark that was never set")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _pop(self, argument: Any) -> None:
        self._stack.pop()

    def _drop_to_mark(self, argument: Any) -> None:
        self._pop_mark()

    def _duplicate(self, argument: Any) -> None:
        self._stack.append(self._stack[-1])

    def _tuple_of(self, count: int) -> None:
        items = tuple(self._stack[len(self._stack) - count :]) if count else ()
        if count:
            del self._stack[len(self._stack) - count :]
        self._stack.append(items)

    def _tuple(self, argument: Any) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _opaque_from_mark(self, argument: Any) -> None:
        self._pop_mark()
        self._stack.append(Opaque())

    def _list(self, argument: Any) -> None:
        self._stack.append(self._pop_mark())

    def _append(self, argument: Any) -> None:
        value = self._stack.pop()
        self._extend(self._stack[-1], [value])

    def _appends(self, argument: Any) -> None:
        items = self._pop_mark()
        self._extend(self._stack[-1], items)

    def _extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)

    def _dict(self, argument: Any) -> None:
        made: dict[Any, Any] = {}
        self._fill(made, self._pop_mark())
        self._stack.append(made)

    def _set_item(self, argument: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill(self._stack[-1], [key, value])

    def _set_items(self, argument: Any) -> None:
        items = self._pop_mark()
        self._fill(self._stack[-1], items)

    def _fill(self, target: Any, items: list[Any]) -> None:
        # Only text keys are ever asked for; others may be unhashable here.
        if isinstance(target, dict):
            target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=False) if isinstance(k, str))

    def _name(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._import(module, name)

    def _name_from_stack(self, argument: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if isinstance(name, str) and isinstance(module, str):
            self._import(module, name)
        else:
            self.contents.dynamic_names = True
            self._stack.append(Opaque())

    def _import(self, module: str, name: str) -> None:
        found = Name(module, name)
        self.contents.names.add(found)
        self._stack.append(found)

    def _extension(self, argument: Any) -> None:
        # The extension registry maps numbers to any global: what it would import is not in the file.
        self.contents.dynamic_names = True
        self._stack.append(Opaque())

    def _instance(self, argument: Any) -> None:
        arguments = tuple(self._pop_mark())
        self._name(argument)
        self._make(self._stack.pop(), arguments)

    def _object(self, argument: Any) -> None:
        maker, *arguments = self._pop_mark()
        self._make(maker, tuple(arguments))

    def _reduce(self, argument: Any) -> None:
        arguments, maker = self._stack.pop(), self._stack.pop()
        self._make(maker, arguments)

    def _new_object_kw(self, argument: Any) -> None:
        self._stack.pop()
        self._reduce(argument)

    def _make(self, maker: Any, arguments: Any) -> None:
        made: Any = Made(maker, arguments)
        if isinstance(maker, Name):
            if maker.name == "_StorageInfo" or _newobj_of(maker, arguments) == "_StorageInfo":
                self._infos.append(made)
            elif maker.name == "_rebuild_tensor_v3" and isinstance(arguments, tuple) and len(arguments) > 6:
                self._remember_dtype(arguments[0], arguments[6])
            elif maker.name == "OrderedDict":
                made = {}
            elif maker.name == "getattr" and maker.module in _BUILTINS:
                made = self._attribute(arguments)
        self._stack.append(made)

    def _attribute(self, arguments: Any) -> Any:
        """`getattr(Class, "MEMBER")` is how some Pythons pickle an enum; any other use could be anything."""
        match arguments:
            case (Name(module=module, name=name), str(attribute)):
                found = Name(module, f"{name}.{attribute}")
                self.contents.names.add(found)
                return found
            case _:
                self.contents.dynamic_names = True
                return Opaque()

    def _remember_dtype(self, storage: Any, dtype: Any) -> None:
        if isinstance(storage, _Persistent) and isinstance(dtype, Name):
            self._rebuilt[storage.key] = dtype.name

    def _build(self, argument: Any) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Made):
            self._stack[-1].state = state

    def _persistent_id(self, argument: Any) -> None:
        identity = self._stack.pop()
        if isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage":
            key, elements = str(identity[2]), identity[4]
            self._persistent[key] = (identity[1], elements if isinstance(elements, int) else 0)
            self._stack.append(_Persistent(key))
        else:
            self._stack.append(Opaque())

    def _text_persistent_id(self, argument: Any) -> None:
        self._stack.append(Opaque())

    def _put(self, argument: Any) -> None:
        self._memo[int(argument)] = self._stack[-1]

    def _memoize(self, argument: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, argument: Any) -> None:
        self._stack.append(self._memo[int(argument)])

    def _fresh_list(self, argument: Any) -> None:
        self._stack.append([])

    def _fresh_dict(self, argument: Any) -> None:
        self._stack.append({})

    def _opaque(self, argument: Any) -> None:
        self._stack.append(Opaque())


@dataclass(slots=True, eq=False)
class _Persistent:
    """A reference to a storage."""

    key: str


_PUSHES = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    }
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP", "READONLY_BUFFER", "ADDITEMS_DONE"})
_HANDLERS: dict[str, Any] = {
    "MARK": _Machine._mark,
    "POP": _Machine._pop,
    "POP_MARK": _Machine._drop_to_mark,
    "DUP": _Machine._duplicate,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "EMPTY_LIST": _Machine._fresh_list,
    "LIST": _Machine._list,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "EMPTY_DICT": _Machine._fresh_dict,
    "DICT": _Machine._dict,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "EMPTY_SET": _Machine._opaque,
    "ADDITEMS": _Machine._drop_to_mark,
    "FROZENSET": _Machine._opaque_from_mark,
    "NEXT_BUFFER": _Machine._opaque,
    "GLOBAL": _Machine._name,
    "STACK_GLOBAL": _Machine._name_from_stack,
    "EXT1": _Machine._extension,
    "EXT2": _Machine._extension,
    "EXT4": _Machine._extension,
    "INST": _Machine._instance,
    "OBJ": _Machine._object,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,
    "NEWOBJ_EX": _Machine._new_object_kw,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent_id,
    "PERSID": _Machine._text_persistent_id,
    "PUT": _Machine._put,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "GET": _Machine._get,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
}


def _newobj_of(maker: Name, arguments: Any) -> str | None:
    """The class behind copyreg's `__newobj__(cls, …)` and `_reconstructor(cls, …)`."""
    if maker.module not in {"copyreg", "copy_reg"} or not isinstance(arguments, tuple) or not arguments:
        return None
    return arguments[0].name if isinstance(arguments[0], Name) else None


def _storage_dtype(kind: Any) -> str | None:
    """`torch.BFloat16Storage` -> bfloat16; None for an untyped storage."""
    return _STORAGE_DTYPES.get(kind.name) if isinstance(kind, Name) else None


_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


def _ranges(infos: list[Made]) -> Iterator[Range]:
    for info in infos:
        state = info.state
        if not isinstance(state, dict):
            continue
        path, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
        if isinstance(path, str) and isinstance(offset, int) and isinstance(length, int):
            yield Range(path=path, offset=offset, length=length)
