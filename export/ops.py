"""The ops of domain `attnspan` as ONNX schemas. Those that a GPU plugin implements, too, come from the plugins' table."""

from __future__ import annotations

from onnx.defs import OpSchema, has, register_schema
from onnx.helper import make_attribute

from attnspan.plugins.trt_sparse_attn import schema as table
from attnspan.plugins.trt_sparse_attn.schema import ONNX_TYPES, Attribute, Op, Port, shape_text

DOMAIN = table.NAMESPACE
VERSION = int(table.VERSION)

# The newest versions that every ONNX Runtime from 1.25 on accepts, and the oldest that have Attention-24.
OPSET = 24
IR_VERSION = 12

_In = OpSchema.FormalParameter
_Option = OpSchema.FormalParameterOption
_AttrType = OpSchema.AttrType
_TENSOR = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float8_e4m3fn": "tensor(float8e4m3fn)",
    "int8": "tensor(int8)",
    "int32": "tensor(int32)",
}
_ONNX_OPTIONAL = {("LshHash", "mean")}
"""Inputs that nodes of ONNX Runtime may leave out; TensorRT plugins always have them."""
_TYPE_DOCS = {"T": "Activations.", "C": "Cache."}


def _default(name: str, value: int | float, doc: str) -> OpSchema.Attribute:
    return OpSchema.Attribute(name, make_attribute(name, value), doc)


def _schema(op: Op) -> OpSchema:
    """The ONNX schema of an op of the plugins' table."""

    def port(one: Port) -> OpSchema.FormalParameter:
        kind = one.type if len(one.type) == 1 else _TENSOR[one.type]
        optional = one.optional or (op.name, one.name) in _ONNX_OPTIONAL
        option = _Option.Optional if optional else _Option.Single
        return _In(one.name, kind, ", ".join(x for x in (shape_text(one), one.doc) if x), param_option=option)

    def attribute(one: Attribute) -> OpSchema.Attribute:
        if one.default is None:
            return OpSchema.Attribute(one.name, getattr(_AttrType, one.kind.upper()), one.doc, required=True)
        return _default(one.name, one.default, one.doc)

    letters = [x for x in ("T", "C") if any(x == port.type for port in op.inputs)]
    return OpSchema(
        op.name,
        DOMAIN,
        VERSION,
        doc=op.doc,
        inputs=[port(x) for x in op.inputs],
        outputs=[port(x) for x in op.outputs],
        type_constraints=[(x, [_TENSOR[kind] for kind in ONNX_TYPES[x]], _TYPE_DOCS[x]) for x in letters],
        attributes=[attribute(x) for x in op.attributes],
    )


SPAN_ATTENTION = _schema(table.SPAN_ATTENTION)
LSH_HASH = _schema(table.LSH_HASH)
MERGE_ATTENTION = _schema(table.MERGE_ATTENTION)

LSH_ATTENTION = OpSchema(
    "LshAttention",
    DOMAIN,
    VERSION,
    doc="""Causal grouped-query attention that samples the context: by sketches of the keys, or by locality-sensitive hashing.

With more than one token a row, attention is exact: causal, over everything. With one token a row, at position n = length[b],
it is exact over the first `sink` positions, the last `window` and all that is not indexed yet, and sampled elsewhere: a key is
drawn when the index says so, and enters the softmax with its score less log u, where u is the probability that it is drawn.
The function body does not sample: it is exact throughout, and passes the state through.

Keys are indexed less a mean of the row's keys, which the state holds. index `sketch`: a key is turned at random, by the signs in
projection and Hadamard transforms, and kept as two bits a dimension and a factor. From these a query estimates its scores, and
draws a key with probability u = min(1, max(floor, e^(0.85 * estimate + c))): the floor is a small part of `fraction`, and c such
that about this fraction of the keys is drawn. The others hash (MagicPIG, arXiv 2410.16179): bit j of a vector is
x . projection[:, j] > 0, and u is the probability that a key at this angle to the query is drawn. index `signature`: a key is
drawn when at most max_hamming[h] of its signature_bits differ from the query's. index `tables`: the bits are the codes of
`tables` hash tables, `bits` each; a key is drawn when at least min_collisions codes are equal. index `exact`: every key.

The cache holds every position: the KV heads of a row one after another, position p of a head in its slot p, its key (after RoPE)
before its value, so that a drawn token is read from one place. The state is the index of a row in one buffer without pointers, of
fixed size: zeros are an empty index, a copy is an index of equal content. A row of length 0 starts its index afresh. A state that
does not belong to this node is an error. A past and its present may be the same buffer.

With `span`, positions that SpanAttention attends to under it (p < sink or q - p < span - sink, for a query at position q) are
left out of the sums, all others are as without it: exact, or drawn. Where nothing is left, output is zeros and lse -inf (the
body: anything, and below -1e29). With `query_codes` queries are not hashed again.""",
    inputs=[
        _In("query", "T", "[batch, tokens, num_heads * dim], RoPE applied"),
        _In("key", "T", "[batch, tokens, kv_num_heads * dim], RoPE applied"),
        _In("value", "T", "[batch, tokens, kv_num_heads * dim]"),
        _In("past_kv", "C", "[batch, kv_num_heads * capacity, 2 * dim]"),
        _In("past_state", "tensor(uint8)", "[batch, bytes]"),
        _In("length", "tensor(int32)", "[batch], tokens of the row that were given before this chunk"),
        _In(
            "projection",
            "tensor(float)",
            "[dim, bits of a key]; sketch: [dim, 4] of +1 and -1; a constant, absent for index exact",
            param_option=_Option.Optional,
        ),
        _In("key_scale", "tensor(float)", "[kv_num_heads], int8 cache only: key = scale * stored", param_option=_Option.Optional),
        _In("value_scale", "tensor(float)", "[kv_num_heads], int8 cache only", param_option=_Option.Optional),
        _In("span", "tensor(int32)", "[batch, kv_num_heads], what another op attends to", param_option=_Option.Optional),
        _In(
            "query_codes",
            "tensor(int32)",
            "[batch, 1, num_heads, words], LshHash of the last token's query: signature, or tables of an even number",
            param_option=_Option.Optional,
        ),
    ],
    outputs=[
        _In("output", "T", "[batch, tokens, num_heads * dim]"),
        _In("present_kv", "C", "[batch, kv_num_heads * capacity, 2 * dim]"),
        _In("present_state", "tensor(uint8)", "[batch, bytes]"),
        _In("lse", "tensor(float)", "[batch, num_heads, tokens], log of the sum of exp(score)", param_option=_Option.Optional),
    ],
    type_constraints=[
        ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations."),
        ("C", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int8)"], "Cache."),
    ],
    attributes=[
        OpSchema.Attribute("num_heads", _AttrType.INT, "Query heads, a multiple of kv_num_heads.", required=True),
        OpSchema.Attribute("kv_num_heads", _AttrType.INT, "KV heads.", required=True),
        OpSchema.Attribute("index", _AttrType.STRING, "sketch, signature, tables or exact.", required=True),
        _default("sink", 64, "First tokens that are always exact."),
        _default("window", 64, "Most recent tokens that are always exact, the current one included."),
        _default("scale", 0.0, "Factor of the scores; 0 means 1 / sqrt(dim)."),
        _default("softcap", 0.0, "score = softcap * tanh(score / softcap); 0: none."),
        OpSchema.Attribute("bits", _AttrType.INT, "tables: bits of a code, 1 to 15.", required=False),
        OpSchema.Attribute("tables", _AttrType.INT, "tables: codes of a key, 1 to 1024.", required=False),
        _default("fraction", 0.02, "sketch: share of the indexed keys that a query draws, above 0 and at most 0.5."),
        _default("min_inclusion", 0.0, "signature, tables: least u that a drawn key is weighted by; 0: u as it is."),
        _default("guard", 0.0, "A KV head's step is exact where its relative standard error is above; 0: never."),
        _default("min_collisions", 2, "tables: equal codes that draw a key, 1 to 4."),
        OpSchema.Attribute("signature_bits", _AttrType.INT, "signature: 64, 128 or 256.", required=False),
        OpSchema.Attribute("max_hamming", _AttrType.INTS, "signature: most bits that differ, of each KV head.", required=False),
        _default("dense_below", -1, "A row of fewer tokens is exact; -1: where the library measured sampling to win."),
        _default("layer", 0, "Layer of the model; a state remembers it."),
        _default("identity", 0, "Hash of model and plan; a state remembers it."),
    ],
)

SCHEMAS = (SPAN_ATTENTION, LSH_ATTENTION, LSH_HASH, MERGE_ATTENTION)


def register_schemas() -> None:
    """Make the ops known to onnx's checker and shape inference. Calling it again does nothing."""
    for schema in SCHEMAS:
        if not has(schema.name, schema.since_version, schema.domain):
            register_schema(schema)
