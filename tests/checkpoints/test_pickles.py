"""A pickle's byte code is read, never run."""

import pickle as the_real_one
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguardd.checkpoints.pickles import Name, PickleError, dangerous, read_pickle


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + struct.pack("B", len(value)) + value.encode()


def imported(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'id'\ntR.",  # protocol 0, as every tutorial has it
        b"(S'id'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'id'\no.",  # OBJ
        opcodes(imported("posix", "system"), text("id"), b"\x85R"),
        opcodes(imported("builtins", "eval"), text("1"), b"\x85R"),
        opcodes(imported("torch", "os.system"), text("id"), b"\x85R"),  # through a harmless module
        opcodes(imported("builtins", "getattr"), imported("torch", "os"), text("system"), b"\x86R"),
        opcodes(imported("builtins", "getattr"), imported("collections", "abc"), text("sys"), b"\x86R"),
        opcodes(imported("builtins", "getattr"), b"N", text("system"), b"\x86R"),
        opcodes(imported("torch", "load"), text("x"), b"\x85R"),
        opcodes(imported("pickle", "loads"), text("x"), b"\x85R"),
        opcodes(imported("collections", "OrderedDict.__init_subclass__"), b")R"),
        opcodes(text("o"), text("s"), b"\x86", text("system"), b"\x93"),  # a module name that is no text
        opcodes(b"\x82\x05"),  # the extension registry
        opcodes(imported("types", "FunctionType"), b")R"),
    ],
)
def test_what_would_run_code_is_named(code: bytes) -> None:
    assert dangerous(read_pickle(code)) is not None


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_name_nothing(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True], ("b", 1): b"bytes", "c": {1, 2}, "d": frozenset({3}), "e": "x" * 300}
    contents = read_pickle(the_real_one.dumps(value, protocol))
    assert dangerous(contents) is None


def test_an_enum_by_getattr_is_no_alarm() -> None:
    """How some versions of Python pickle the members of an enum."""
    code = opcodes(imported("builtins", "getattr"), imported("signal", "Signals"), text("SIGTERM"), b"\x86R")
    contents = read_pickle(code)
    assert dangerous(contents) is None
    assert Name("signal", "Signals.SIGTERM") in contents.names


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: b"\x80\x04" + b + b"."))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        dangerous(read_pickle(data))
    except PickleError:
        return


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=20)
        | st.binary(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=15,
    ),
    st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_every_real_pickle_is_read(value: object, protocol: int) -> None:
    """Protocol 0 to 2 name `_codecs.encode` for bytes; nothing else is named by plain values."""
    contents = read_pickle(the_real_one.dumps(value, protocol))
    assert {str(name) for name in contents.names} <= {"_codecs.encode", "__builtin__.bytes"}
    assert dangerous(contents) is None
