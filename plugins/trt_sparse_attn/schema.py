"""The ops that a TensorRT plugin implements: one table of inputs, outputs, attributes, types and aliases, in plain data.

`export/ops.py` makes the ONNX schemas of it, `plugin.py` the plugin in Python, `schema_header.py` a header for the one in C++.
Imports no library, so that a machine that only runs engines can read it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

__all__ = ["HEAD_DIMS", "LSH_HASH", "MARGIN", "MERGE_ATTENTION", "NAMESPACE", "ONNX_TYPES", "OPS", "PLUGIN_TYPES",
           "SIGNATURE_BITS", "SPAN_ATTENTION", "VERSION", "Attribute", "Op", "Port", "SchemaError", "Values", "digest",
           "shape_text"]  # fmt: skip

NAMESPACE = "attnspan"
"""Namespace of the plugins, and domain of the ONNX nodes: TensorRT finds a plugin by either."""
VERSION = "1"
ONNX_TYPES = {
    "T": ("float32", "float16", "bfloat16"),
    "C": ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn"),
    "int32": ("int32",),
    "float32": ("float32",),
}
"""Types of a port in ONNX, by its letter: T of activations, C of a cache."""
PLUGIN_TYPES = {"T": ("float16", "bfloat16"), "C": ("T", "float8_e4m3fn"), "int32": ("int32",), "float32": ("float32",)}
"""Those that the plugins take, all in row-major order. C is T, or e4m3 together with the optional scales."""
HEAD_DIMS = (64, 80, 96, 128, 256)
MARGIN = 64
"""Slots that a head has besides its sinks, at least."""
SIGNATURE_BITS = (64, 128, 256)

Values = Mapping[str, int | float | tuple[int, ...]]
"""Attributes by name."""


class SchemaError(ValueError):
    """Inputs or attributes that an op does not take: what was got, and what is allowed."""


@dataclass(frozen=True)
class Port:
    """An input or output. shape: of each axis a product of symbols, such as `num_heads*dim`; alias: of an output, the input that
    it is written into."""

    name: str
    type: str
    shape: tuple[str, ...]
    doc: str = ""
    optional: bool = False
    alias: str | None = None


@dataclass(frozen=True)
class Attribute:
    """kind: int, ints or float. default None: it must be given."""

    name: str
    kind: str
    doc: str
    default: int | float | None = None


@dataclass(frozen=True)
class Op:
    """One op. The plugin always has all outputs; a node may leave optional ones out."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    doc: str = ""

    @property
    def required_inputs(self) -> int:
        """How many inputs there are at least."""
        return sum(not port.optional for port in self.inputs)

    def aliased_input(self, output: int) -> int:
        """The input whose memory output number `output` is; -1 for memory of its own."""
        names = [port.name for port in self.inputs]
        alias = self.outputs[output].alias
        return -1 if alias is None else names.index(alias)

    def attributes_of(self, given: Mapping[str, int | float | Sequence[int]]) -> dict[str, int | float | tuple[int, ...]]:
        """All attributes: those given, checked, and the defaults of the others. SchemaError for what is not allowed."""
        values: dict[str, int | float | tuple[int, ...]] = {}
        for attribute in self.attributes:
            value = given.get(attribute.name, attribute.default)
            if value is None:
                what = attribute.doc.rstrip(".")
                raise SchemaError(f"{self.name}: attribute {attribute.name} is missing: must be given ({what})")
            if isinstance(value, Sequence) != (attribute.kind == "ints"):
                raise SchemaError(f"{self.name}: attribute {attribute.name} is {value!r}: must be of kind {attribute.kind}")
            if isinstance(value, Sequence):
                values[attribute.name] = tuple(int(x) for x in value)
            else:
                values[attribute.name] = float(value) if attribute.kind == "float" else int(value)
        for name in given:
            if name not in values:
                raise SchemaError(f"{self.name}: attribute {name} is unknown: must be one of {', '.join(values)}")
        _check(self, values)
        return values

    def types_of(self, inputs: Sequence[str]) -> list[str]:
        """Types of the outputs for inputs of these types (NumPy's names). SchemaError for inputs that are not allowed."""
        counts = sorted({self.required_inputs, len(self.inputs)})
        if len(inputs) not in counts:
            raise SchemaError(f"{self.name}: {len(inputs)} inputs are given: must be {' or '.join(map(str, counts))}")
        letters: dict[str, str] = {}
        for port, got in zip(self.inputs, inputs, strict=False):
            allowed = PLUGIN_TYPES[port.type]
            if port.type == "C":
                scaled = len(inputs) == len(self.inputs)
                allowed = (allowed[1],) if scaled else (letters["T"],)
            if port.type in letters:
                allowed = (letters[port.type],)
            if got not in allowed:
                why = " beside key_scale and value_scale" if port.type == "C" and allowed[0] == PLUGIN_TYPES["C"][1] else ""
                raise SchemaError(f"{self.name}: {port.name} is {got}: must be {' or '.join(allowed)}{why}")
            if len(port.type) == 1:
                letters[port.type] = got
        return [letters.get(port.type, port.type) for port in self.outputs]

    def sizes_of(self, attributes: Values, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Size of each symbol, from the attributes and the inputs' shapes; -1 is a size that is not known yet.

        SchemaError for a shape that does not fit the attributes or the shapes before it.
        """
        sizes = _symbols(self, attributes)
        for port, shape in zip(self.inputs, shapes, strict=False):
            if len(shape) != len(port.shape):
                raise SchemaError(f"{self.name}: {port.name} has {len(shape)} dimensions: must be {shape_text(port)}")
            for axis, size in zip(port.shape, shape, strict=True):
                if size >= 0 and not _solve(axis, size, sizes):
                    known = ", ".join(f"{name} = {sizes[name]}" for name in dict.fromkeys(_names(port)) if name in sizes)
                    raise SchemaError(f"{self.name}: {port.name} has shape {_dims(shape)}: must be {shape_text(port)}, {known}")
            if sizes.get("dim", HEAD_DIMS[0]) not in HEAD_DIMS:
                raise SchemaError(f"{self.name}: a head has {sizes['dim']} elements: must be {', '.join(map(str, HEAD_DIMS))}")
        return sizes


def _dims(shape: Sequence[int]) -> str:
    return f"[{', '.join('?' if size < 0 else str(size) for size in shape)}]"


def _names(port: Port) -> Iterator[str]:
    return (name for axis in port.shape for name in axis.split("*"))


def _solve(axis: str, size: int, sizes: dict[str, int]) -> bool:
    """Whether an axis can have that size; its one unknown symbol is then known."""
    names = axis.split("*")
    unknown = [name for name in names if name not in sizes]
    known = math.prod(sizes[name] for name in names if name in sizes)
    if not unknown:
        return known == size
    if known == 0 or size % known:
        return False
    sizes[unknown[0]] = size // known
    return True


def _symbols(op: Op, attributes: Values) -> dict[str, int]:
    """Sizes that the attributes give."""
    sizes = {name: value for name, value in attributes.items() if isinstance(value, int)}
    capacity = attributes.get("capacity")
    if isinstance(capacity, tuple):
        sizes["slots"] = sum(capacity)
    if op.name == "LshHash":
        bits = sizes["signature_bits"]
        sizes |= {"columns": bits or sizes["bits"] * sizes["tables"], "words": bits // 32 or sizes["tables"] // 2}
    return sizes


def _check(op: Op, values: Values) -> None:
    """What attributes must be together."""

    def refuse(name: str, allowed: str) -> None:
        raise SchemaError(f"{op.name}: attribute {name} is {values[name]}: must be {allowed}")

    heads = values["num_heads"]
    assert isinstance(heads, int)
    if heads < 1:
        refuse("num_heads", "1 or more")
    if op.name == "SpanAttention":
        kv_heads, capacity, sink = values["kv_num_heads"], values["capacity"], values["sink"]
        assert isinstance(kv_heads, int)
        assert isinstance(capacity, tuple)
        assert isinstance(sink, int)
        if kv_heads < 1 or heads % kv_heads:
            refuse("kv_num_heads", f"a divisor of num_heads, {heads}")
        if sink < 0:
            refuse("sink", "0 or more")
        if len(capacity) != kv_heads or min(capacity) < sink + MARGIN:
            refuse("capacity", f"{kv_heads} numbers (kv_num_heads), each {sink + MARGIN} or more (sink + {MARGIN})")
        for name in ("scale", "softcap"):
            value = values[name]
            assert isinstance(value, float)
            if not 0 <= value < math.inf:
                refuse(name, "0 or more")
    if op.name == "LshHash":
        bits, tables, signature = values["bits"], values["tables"], values["signature_bits"]
        assert isinstance(bits, int)
        assert isinstance(tables, int)
        if signature:
            if signature not in SIGNATURE_BITS:
                refuse("signature_bits", f"{', '.join(map(str, SIGNATURE_BITS))}, or 0 with bits and tables")
            for name in ("bits", "tables"):
                if values[name]:
                    refuse(name, "0 where signature_bits is given")
        elif not 1 <= bits <= 15:
            refuse("bits", "1 to 15, or 0 with signature_bits")
        elif tables % 2 or not 2 <= tables <= 1024:
            refuse("tables", "an even number from 2 to 1024")


_HEADS = Attribute("num_heads", "int", "Query heads, a multiple of kv_num_heads.")

SPAN_ATTENTION = Op(
    "SpanAttention",
    inputs=(
        Port("query", "T", ("batch", "tokens", "num_heads*dim"), "RoPE applied"),
        Port("key", "T", ("batch", "tokens", "kv_num_heads*dim"), "RoPE applied"),
        Port("value", "T", ("batch", "tokens", "kv_num_heads*dim")),
        Port("past_key", "C", ("batch", "slots", "dim"), "slots = sum of capacity"),
        Port("past_value", "C", ("batch", "slots", "dim")),
        Port("length", "int32", ("batch",), "tokens of the row that were given before this chunk"),
        Port("span", "int32", ("batch", "kv_num_heads"), "tokens that a query sees, sinks included"),
        Port("key_scale", "float32", ("kv_num_heads",), "8-bit caches only: key = scale * stored", optional=True),
        Port("value_scale", "float32", ("kv_num_heads",), "8-bit caches only", optional=True),
    ),
    outputs=(
        Port("output", "T", ("batch", "tokens", "num_heads*dim")),
        Port("present_key", "C", ("batch", "slots", "dim"), alias="past_key"),
        Port("present_value", "C", ("batch", "slots", "dim"), alias="past_value"),
        Port("lse", "float32", ("batch", "num_heads", "tokens"), "log of the sum of exp(score)", optional=True),
    ),
    attributes=(
        _HEADS,
        Attribute("kv_num_heads", "int", "KV heads."),
        Attribute("capacity", "ints", "Slots of each KV head, each more than sink."),
        Attribute("sink", "int", "First tokens that are always seen.", 64),
        Attribute("scale", "float", "Factor of the scores; 0 means 1 / sqrt(dim).", 0.0),
        Attribute("softcap", "float", "score = softcap * tanh(score / softcap); 0: none.", 0.0),
    ),
    doc="""Causal grouped-query attention in which every KV head keeps its first `sink` tokens and a window of its own.

Token i of the chunk in row b has position q = length[b] + i. In KV head h it sees position p iff p <= q and
(p < sink or q - p < span[b, h] - sink). A span is raised to sink + 1; a span over the head's capacity is an error
(the function body, which cannot raise one, cuts it to the capacity) once tokens have left the ring: length[b] > capacity[h].

The cache of a row holds the KV heads one after another, head h in capacity[h] slots. Position p of a head is in its slot
p if p < sink, else in sink + (p - sink) mod (capacity[h] - sink). Keys are stored after RoPE. A chunk attends to the
cache as it was before the chunk and to itself, then it is written; all keys and values are seen in their stored form,
so that the result does not depend on how a prompt is cut. A past and its present may be the same buffer with the op library,
not with the function body.""",
)

LSH_HASH = Op(
    "LshHash",
    inputs=(
        Port("x", "T", ("batch", "tokens", "num_heads*dim")),
        Port("projection", "float32", ("dim", "columns"), "columns = signature_bits, or tables * bits"),
        Port("mean", "float32", ("batch", "num_heads", "dim"), "subtracted from x before it is hashed; zeros for none"),
    ),
    outputs=(
        Port("codes", "int32", ("batch", "tokens", "num_heads", "words"), "words = signature_bits / 32, or tables / 2"),
    ),
    attributes=(
        Attribute("num_heads", "int", "Heads of x."),
        Attribute("bits", "int", "Bits of a table's code, 1 to 15; 0 with signature_bits.", 0),
        Attribute("tables", "int", "Codes of a vector, even, 2 to 1024; 0 with signature_bits.", 0),
        Attribute("signature_bits", "int", "64, 128 or 256; 0 with bits and tables.", 0),
    ),
    doc="""Hashes of vectors by signs of random projections: bit j is (x - mean) . projection[:, j] > 0, both as bfloat16.

With `signature_bits`, bit j of a vector is bit j % 32 of word j // 32. With `bits` K and `tables` L, bit j of code l is that of
column l * K + j; codes are int16 one after another: code l is the lower half of word l // 2 where l is even, else the upper.""",
)

MERGE_ATTENTION = Op(
    "MergeAttention",
    inputs=(
        Port("output_a", "T", ("batch", "tokens", "num_heads*dim")),
        Port("lse_a", "float32", ("batch", "num_heads", "tokens"), "log of the sum of exp(score), -inf where there are no keys"),
        Port("output_b", "T", ("batch", "tokens", "num_heads*dim")),
        Port("lse_b", "float32", ("batch", "num_heads", "tokens")),
    ),
    outputs=(
        Port("output", "T", ("batch", "tokens", "num_heads*dim")),
        Port("lse", "float32", ("batch", "num_heads", "tokens"), optional=True),
    ),
    attributes=(Attribute("num_heads", "int", "Query heads."),),
    doc="""Attention over all keys from attention over two parts of them, by log-sum-exp, in fp32.

A part whose lse is -inf has no keys, and its output may hold anything. Where neither has any, zeros and -inf.""",
)

OPS = (SPAN_ATTENTION, LSH_HASH, MERGE_ATTENTION)


def shape_text(port: Port) -> str:
    """The shape as documentation writes it: `[batch, tokens, num_heads * dim]`."""
    return f"[{', '.join(axis.replace('*', ' * ') for axis in port.shape)}]"


def digest() -> str:
    """SHA-256 of the table, less its words. An engine runs with plugins of the same table only."""
    ports = [(op.name, *((*astuple(port)[:3], port.optional, port.alias) for port in (*op.inputs, *op.outputs))) for op in OPS]
    attributes = [(op.name, x.name, x.kind, x.default) for op in OPS for x in op.attributes]
    table = [NAMESPACE, VERSION, ports, attributes, PLUGIN_TYPES, HEAD_DIMS, MARGIN, SIGNATURE_BITS]
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()
