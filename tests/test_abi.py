# SPDX-License-Identifier: Apache-2.0
"""The C header, the op table and the ctypes structs say the same, field by field."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from edgecascade.backends import _lib
from edgecascade.ops import OPS, Kind
from edgecascade.tensors import PAGE_TOKENS

HEADER = Path(__file__).parent.parent / "plugins" / "include" / "edgecascade.h"
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "ec_weight": _lib.Weight,
    "ec_norm": _lib.NormArgs,
    "ec_step": _lib.Step,
    "ec_sampling": _lib.Sampling,
    "ec_call": _lib.Call,
    "ec_device": _lib.Device,
    "ec_pack": _lib.Pack,
    "ec_api": _lib.Api,
    **{f"ec_{name}": struct for name, struct in _lib.ARGS.items()},
}
C_TYPES = {  # what a field of each kind is in the header
    Kind.INPUT: "const float*",
    Kind.OUTPUT: "float*",
    Kind.TOKENS: "const int32_t*",
    Kind.WEIGHT: "ec_weight",
    Kind.VECTOR: "const float*",
    Kind.NORM: "ec_norm",
    Kind.INT: "int32_t",
    Kind.FLOAT: "float",
}


def header_structs() -> dict[str, list[tuple[str, str]]]:
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    found = {}
    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", text, re.S):
        lines = [" ".join(line.split()) for line in body.split(";") if line.strip()]
        found[name] = [_field(line) for line in lines]
    return found


def _field(line: str) -> tuple[str, str]:
    """("const float*", "x") of a declaration; a function pointer's type is "function"."""
    pointer = re.search(r"\(\*(\w+)\)", line)
    if pointer:
        return "function", pointer[1]
    kind, name = re.fullmatch(r"(.*?)(\w+)(?:\[\w+\])?", line).groups()
    return kind.strip(), name


def test_every_struct_of_the_header_is_bound() -> None:
    assert header_structs().keys() == STRUCTS.keys()


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_have_the_names_and_order_of_the_header(name: str) -> None:
    assert [field for _, field in header_structs()[name]] == [f[0] for f in STRUCTS[name]._fields_]


@pytest.mark.parametrize("name", OPS)
def test_op_table_kinds_agree_with_the_header(name: str) -> None:
    declared = {field: kind for kind, field in header_structs()[f"ec_{name}"]}
    for field in OPS[name].fields:
        expected = C_TYPES.get(field.kind)
        if name == "sample" and field.name == "token":
            expected = "int32_t*"
        if expected:
            assert declared[field.name] == expected, field.name


def test_op_codes_are_the_headers() -> None:
    body = re.search(r"typedef enum ec_op \{(.*?)\}", HEADER.read_text(), re.S)[1]
    names = re.findall(r"EC_OP_(\w+)", re.sub(r"//[^\n]*", "", body))
    codes = {name.lower(): i for i, name in enumerate(names)}
    assert codes["count"] == _lib.OP_COUNT
    phases = {"mamba": ("_step", "_prefill"), "attention": ("_decode", "_prefill")}
    for name, op in OPS.items():
        assert op.codes == tuple(codes[name + phase] for phase in phases.get(name, ("", "")))


def test_layout_is_the_compilers(tmp_path: Path) -> None:
    """Sizes and offsets as a C compiler sees them."""
    prints = []
    for name, fields in header_structs().items():
        prints.append(f'printf("{name} %zu\\n", sizeof({name}));')
        prints += [f'printf("{name}.{f} %zu\\n", offsetof({name}, {f}));' for _, f in fields]
    source = tmp_path / "layout.cpp"
    source.write_text(
        f'#include <cstdio>\n#include "{HEADER}"\nint main() {{ {" ".join(prints)} }}\n'
    )
    program = tmp_path / "layout"
    subprocess.run(["c++", "-std=c++17", str(source), "-o", str(program)], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    for line in output.splitlines():
        where, value = line.split()
        struct, _, field = where.partition(".")
        bound = STRUCTS[struct]
        actual = getattr(bound, field).offset if field else ctypes.sizeof(bound)
        assert actual == int(value), where


def test_header_is_plain_c(tmp_path: Path) -> None:
    source = tmp_path / "plain.c"
    source.write_text(f'#include "{HEADER}"\nint main(void) {{ return EC_OK; }}\n')
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
    subprocess.run(command, check=True)


def test_abi_version_and_page_size_are_the_headers() -> None:
    text = HEADER.read_text()
    assert int(re.search(r"EC_ABI_VERSION (\d+)", text)[1]) == _lib.ABI_VERSION
    assert int(re.search(r"EC_PAGE_TOKENS (\d+)", text)[1]) == PAGE_TOKENS
