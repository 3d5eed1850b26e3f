"""The parameters of kernels, as the text of their C++ structs has them: how they are packed, and where each field is.

Every kernel takes one struct by value. Its text is read at the first use, so that importing costs nothing, and what
Python packs cannot disagree with what the kernel reads in number, order or type of the fields.
"""

import math
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from kvtoolkit.runtime.compiler import read_source

# of `struct`; pointers are packed as numbers, and Word is the 64-bit word of a pool
_CODES = {"int": "i", "unsigned": "I", "float": "f", "long long": "q", "Word": "Q"}
_FIELDS = re.compile(r"(?:const )?(?P<type>long long|\w+(?: char| short)?)\s*(?P<pointer>\*?)\s*(?P<names>[^;]+);")


class Field(NamedTuple):
    """One field of a struct."""

    name: str
    code: str
    """Of `struct`: ``"q"`` for pointers and 64 bits, ``"i"``, ``"I"``, ``"f"``, ``"Q"``."""
    length: int | None
    """Elements of an array; None for a single number."""
    is_pointer: bool
    offset: int
    """Bytes from the beginning."""

    @property
    def format(self) -> str:
        """The format of the field in the language of `struct`."""
        return f"{self.length or 1}{self.code}"


class ParameterStruct:
    """The struct that a kernel takes.

    Args:
        source: the kernel's source in ``cuda_src``.
        kernel: its name.
        since: `pack` begins with this field; the caller packs those before it.
        until: `pack` ends before this field; the caller appends the bytes of the rest.

    Attributes:
        name: of the struct.
        fields: `Field` by name, in order.
        nbytes: of the struct.
        format: what `pack` packs, for `struct`.
        pack: packs the values of the fields in order, those of an array one by one.
        word: the place of a field, by its name, in words of 8 bytes.
    """

    name: str
    fields: dict[str, Field]
    nbytes: int
    format: str
    pack: Callable[..., bytes]
    word: Callable[[str], int]

    def __init__(self, source: str, kernel: str, *, since: str | None = None, until: str | None = None) -> None:
        self.source, self.kernel = source, kernel
        self._since, self._until = since, until

    def __getattr__(self, attribute: str) -> Any:
        """Read the text at the first use of what it says."""
        if attribute not in ParameterStruct.__annotations__:
            raise AttributeError(attribute)
        source, headers = read_source(self.source)
        text = "\n".join([source, *headers.values()])
        found = re.search(rf"\b{self.kernel}\(\s*const __grid_constant__ (\w+)", text)
        if found is None:
            raise LookupError(f"{self.source}: expected a kernel {self.kernel} with one struct of parameters")
        fields = _fields(text, found[1])
        names = list(fields)
        begin = names.index(self._since) if self._since else 0
        end = names.index(self._until) if self._until else len(names)
        until_end = end == len(names)
        alignment = _alignment(text, found[1])
        self.format = _format([fields[name] for name in names[begin:end]], alignment if until_end else 8)
        self.pack = struct.Struct(self.format).pack
        self.word = {name: field.offset // 8 for name, field in fields.items()}.__getitem__
        self.nbytes = struct.calcsize(_format(list(fields.values()), alignment))
        self.name, self.fields = found[1], fields
        return getattr(self, attribute)

    def unpack(self, parameters: bytes) -> dict[str, Any]:
        """The value of each field of a packed struct, by name; of an array a tuple."""
        values = {}
        for name, field in self.fields.items():
            value = struct.unpack_from("=" + field.format, parameters, field.offset)
            values[name] = value[0] if field.length is None else value
        return values


def _fields(text: str, name: str) -> dict[str, Field]:
    """The fields of a struct, those of its base first."""
    found = re.search(rf"struct (?:alignas\(\d+\) )?{name}(?: : (?P<base>\w+))? {{(?P<body>[^}}]*)}};", text)
    if found is None:
        raise LookupError(f"expected struct {name} among the sources of its kernel")
    fields = _fields(text, found["base"]) if found["base"] else {}
    end = struct.calcsize(_format(list(fields.values())))
    for declared in _FIELDS.finditer(re.sub(r"//[^\n]*", "", found["body"])):
        code = "q" if declared["pointer"] else _CODES[declared["type"]]
        for part in declared["names"].split(","):
            field, _, size = part.strip().rstrip("]").partition("[")
            length = _number(text, size) if size else None
            size_of_one = struct.calcsize("=" + code)
            offset = -(-end // size_of_one) * size_of_one
            fields[field] = Field(field, code, length, bool(declared["pointer"]), offset)
            end = offset + (length or 1) * size_of_one
    return fields


def _alignment(text: str, name: str) -> int:
    """The alignment of a struct: 8 bytes, because all have pointers, or more if it asks for more."""
    found = re.search(rf"struct alignas\((\d+)\) {name}\b", text)
    return int(found[1]) if found else 8


def _format(fields: list[Field], alignment: int = 8) -> str:
    """What packs these fields, from the first on; a multiple of the alignment."""
    end = fields[0].offset if fields else 0
    layout = "="
    for field in fields:
        layout += "x" * (field.offset - end) + field.format
        end = field.offset + struct.calcsize("=" + field.format)
    return layout + "x" * (-end % alignment)


def _number(text: str, product: str) -> int:
    """A product of numbers and of constants that the text defines."""
    factors = []
    for factor in product.split("*"):
        name = factor.strip()
        found = re.search(rf"constexpr int {name} = (\d+);", text)
        factors.append(int(found[1] if found else name))
    return math.prod(factors)
