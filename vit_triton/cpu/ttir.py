"""Parse the text of a TTIR module into operations, values and types, without their semantics.

The text comes from ``module.str_nodebug()``: one operation per line; the operations of a region are on separate lines
between braces.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class Unsupported(NotImplementedError):
    """An operation, or a type or form of it, is not supported by the CPU backend."""


@dataclass(frozen=True)
class Type:
    """``shape`` is () for a scalar; ``elem`` is "f32", "i64", ... or "ptr" with the element type ``pointee``."""

    shape: tuple[int, ...]
    elem: str
    pointee: str | None = None

    @property
    def is_tile(self) -> bool:
        return bool(self.shape)

    def with_elem(self, elem: str) -> "Type":
        return Type(self.shape, elem)

    def with_shape(self, shape: tuple[int, ...]) -> "Type":
        return Type(shape, self.elem, self.pointee)


@dataclass(eq=False, repr=False)
class Value:
    """An SSA value, defined by ``op``; None for an argument of a function or region."""

    type: Type
    op: "Op | None" = None
    index: int = 0
    users: list["Op"] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Op:
    name: str
    operands: list[Value]
    results: list[Value]
    attrs: dict
    regions: list["Region"] = field(default_factory=list)
    parent: "Region | None" = None
    line: str = ""


@dataclass(eq=False, repr=False)
class Region:
    arguments: list[Value]
    ops: list[Op] = field(default_factory=list)
    parent: Op | None = None

    @property
    def yielded(self) -> list[Value]:
        """The operands of scf.yield, which is optional in a region without results."""
        return self.ops[-1].operands if self.ops and self.ops[-1].name == "scf.yield" else []


def walk(region: Region) -> Iterator[Op]:
    """All operations in order; nested operations follow the operation that contains them."""
    for op in region.ops:
        yield op
        for nested in op.regions:
            yield from walk(nested)


@dataclass
class Function:
    name: str
    arguments: list[Value]
    body: Region


_TYPE = re.compile(
    r"tensor<(?P<dims>(?:\d+x)+)(?P<inner>!tt\.ptr<\w+>|\w+)>|!tt\.ptr<(?P<ptr>\w+)>|(?P<scalar>[a-z]+\d+)"
)
_VALUE = re.compile(r"%[\w.-]+(?:#\d+)?")


def parse_type(text: str) -> Type:
    match = _TYPE.fullmatch(text.strip())
    if match is None:
        raise Unsupported(f"type {text.strip()}")
    if match["dims"]:
        shape = tuple(int(n) for n in match["dims"].split("x")[:-1])
        if match["inner"].startswith("!"):
            return Type(shape, "ptr", match["inner"][8:-1])
        return Type(shape, match["inner"])
    return Type((), "ptr", match["ptr"]) if match["ptr"] else Type((), match["scalar"])


def _types(text: str) -> list[Type]:
    return [parse_type(match[0]) for match in _TYPE.finditer(text)]


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.at = 0
        self.scopes: list[dict[str, Value]] = []

    def function(self) -> Function:
        found = None
        while self.at < len(self.lines):
            line = self.lines[self.at]
            self.at += 1
            if line.startswith("tt.func"):
                if found is not None:
                    raise Unsupported("a function that is not inlined (noinline)")
                found = self._function(line)
        if found is None:
            raise Unsupported("a module without a kernel")
        return found

    def _function(self, line: str) -> Function:
        name = re.search(r"@([\w.$-]+)\(", line)
        assert name is not None
        arguments, scope = [], {}
        for argument in re.finditer(r"(%[\w.-]+): (!tt\.ptr<\w+>|!\w+\.\w+<.*?>|\w+)(?: \{(.*?)\})?", line):
            value = Value(parse_type(argument[2]))
            divisibility = re.search(r"tt\.divisibility = (\d+)", argument[3] or "")
            value.index = int(divisibility[1]) if divisibility else 1
            arguments.append(value)
            scope[argument[1]] = value
        self.scopes.append(scope)
        region = self._region([])
        self.scopes.pop()
        return Function(name[1], arguments, region)

    def _region(self, arguments: list[Value], names: list[str] = []) -> Region:  # noqa: B006
        """Parse operations up to the closing brace, which remains the current line."""
        region = Region(arguments)
        self.scopes.append(dict(zip(names, arguments, strict=True)))
        while not self.lines[self.at].startswith("}"):
            line = self.lines[self.at]
            self.at += 1
            if line.startswith("^"):
                for name, type_text in re.findall(r"(%[\w.-]+): ([^,)]+)", line):
                    region.arguments.append(Value(parse_type(type_text)))
                    self.scopes[-1][name] = region.arguments[-1]
                continue
            op = self._op(line)
            op.parent = region
            for nested in op.regions:
                nested.parent = op
            region.ops.append(op)
        self.scopes.pop()
        return region

    def _value(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise Unsupported(f"an undefined value: {name}")

    def _values(self, text: str) -> list[Value]:
        return [self._value(name) for name in _VALUE.findall(text)]

    def _define(self, names: str, op: Op, types: list[Type]) -> None:
        if not names:
            return
        name, _, count = names.partition(":")
        op.results = [Value(t, op, i) for i, t in enumerate(types)]
        self.scopes[-1][name] = op.results[0]
        for i, value in enumerate(op.results):
            self.scopes[-1][f"{name}#{i}"] = value
        assert len(op.results) == int(count or 1), op.line

    def _op(self, line: str) -> Op:
        names, rest = "", line
        match = re.match(r"(%[\w.-]+(?::\d+)?) = (.*)", line)
        if match:
            names, rest = match[1], match[2]
        name_match = re.match(r'"?([\w.]+)"?\s*(.*)', rest)
        assert name_match is not None, line
        name, rest = name_match[1], name_match[2]
        op = Op(name, [], [], {}, line=line)
        if name == "scf.for":
            self._for(op, names, rest)
        elif name == "scf.if":
            self._if(op, names, rest)
        elif name == "arith.constant":
            self._constant(op, names, rest)
        elif name == "tt.reduce":
            self._reduce(op, names, rest)
        elif rest.endswith("{") or rest.endswith("({"):
            raise Unsupported(f"operation {name}")
        else:
            self._plain(op, names, rest)
        for value in op.operands:
            value.users.append(op)
        return op

    def _plain(self, op: Op, names: str, rest: str) -> None:
        body, _, signature = (
            rest.rpartition(" : ") if " : " in re.sub(r"\{.*?\}|<\{.*?\}>", "", rest) else (rest, "", "")
        )
        attributes = re.search(r"\{(.*)\}", body)
        if attributes:
            op.attrs["text"] = attributes[1]
            for key, value in re.findall(r"(\w+) = (?:array<i\d+: )?([-\w, ]+?)(?: : \w+)?(?=>|,|$)", attributes[1]):
                op.attrs[key] = value
            order = re.search(r"order = array<i32: ([\d, ]+)>", attributes[1])
            if order:
                op.attrs["order"] = tuple(int(i) for i in order[1].split(","))
        plain = re.sub(r"\{.*\}", "", body)
        words = re.sub(r"%[\w.#-]+|,", " ", plain).split()
        op.attrs["words"] = words
        op.operands = self._values(plain)
        types = _types(signature)
        if not names:
            return
        if op.name.startswith("arith.cmp"):
            result = types[0].with_elem("i1")
        elif op.name == "tt.load":
            result = Type(types[0].shape, types[0].pointee or "")
        elif op.name == "tt.addptr":
            result = types[0]
        elif types:
            result = types[-1]
        else:
            raise Unsupported(f"operation {op.name}: {op.line}")
        self._define(names, op, [result])

    def _constant(self, op: Op, names: str, rest: str) -> None:
        text, _, type_text = rest.rpartition(" : ")
        if not text:  # true and false have no type
            text, type_text = rest, "i1"
        dense = re.fullmatch(r"dense<(.*)>", text)
        op.attrs["value"] = _number(dense[1] if dense else text, parse_type(type_text).elem)
        self._define(names, op, [parse_type(type_text)])

    def _for(self, op: Op, names: str, rest: str) -> None:
        head = re.match(r"(%[\w.-]+) = (%[\w.#-]+) to (%[\w.#-]+) step (%[\w.#-]+)(.*)\{$", rest)
        if head is None:
            raise Unsupported(f"scf.for: {op.line}")
        induction, tail = head[1], head[5]
        op.operands = [self._value(head[i]) for i in (2, 3, 4)]
        carried = re.search(r"iter_args\((.*?)\) -> \((.*)\)", tail)
        region_names, types = [induction], []
        if carried:
            pairs = re.findall(r"(%[\w.-]+) = (%[\w.#-]+)", carried[1])
            region_names += [name for name, _ in pairs]
            op.operands += [self._value(init) for _, init in pairs]
            types = _types(carried[2])
        arguments = [Value(t) for t in (op.operands[0].type, *types)]
        op.regions = [self._region(arguments, region_names)]
        self.at += 1
        self._define(names, op, types)

    def _if(self, op: Op, names: str, rest: str) -> None:
        head = re.match(r"(%[\w.#-]+)(?: -> \((.*)\))? \{$", rest)
        if head is None:
            raise Unsupported(f"scf.if: {op.line}")
        op.operands = [self._value(head[1])]
        op.regions = [self._region([])]
        if self.lines[self.at].startswith("} else {"):
            self.at += 1
            op.regions.append(self._region([]))
        self.at += 1
        self._define(names, op, _types(head[2] or ""))

    def _reduce(self, op: Op, names: str, rest: str) -> None:
        op.operands = self._values(rest.split("<{")[0])
        axis = re.search(r"axis = (\d+)", rest)
        assert axis is not None
        op.attrs["axis"] = int(axis[1])
        op.regions = [self._region([])]
        closing = self.lines[self.at]
        self.at += 1
        self._define(names, op, _types(closing.split("->")[1]))


def _number(text: str, elem: str) -> int | float | bool:
    if text in ("true", "false"):
        return text == "true"
    if elem[0] in "fb":
        if not text.startswith("0x"):
            return float(text)
        import struct

        bits = int(text, 16)
        if elem == "bf16":
            return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
        code = {"f16": ("<H", "<e"), "f32": ("<I", "<f"), "f64": ("<Q", "<d")}[elem]
        return struct.unpack(code[1], struct.pack(code[0], bits))[0]
    if "," in text or "[" in text:
        raise Unsupported(f"a non-uniform constant tile: {text}")
    return int(text, 0)


def parse(text: str) -> Function:
    """Parse the single function of a TTIR module.

    Raises:
        Unsupported: if an operation or type is not supported; the message contains it.
    """
    return _Parser(text).function()
