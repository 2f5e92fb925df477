"""The ops of domain `attnspan`: one table of schemas that the exporter, the kernels and the documentation follow."""

from __future__ import annotations

from onnx.defs import OpSchema, has, register_schema
from onnx.helper import make_attribute

DOMAIN = "attnspan"
VERSION = 1

# The newest versions that every ONNX Runtime from 1.25 on accepts, and the oldest that have Attention-24.
OPSET = 24
IR_VERSION = 12

_In = OpSchema.FormalParameter
_Option = OpSchema.FormalParameterOption
_AttrType = OpSchema.AttrType
_TYPES = [
    ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations."),
    ("C", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int8)"], "Cache."),
]


def _default(name: str, value: int | float, doc: str) -> OpSchema.Attribute:
    return OpSchema.Attribute(name, make_attribute(name, value), doc)


SPAN_ATTENTION = OpSchema(
    "SpanAttention",
    DOMAIN,
    VERSION,
    doc="""Causal grouped-query attention in which every KV head keeps its first `sink` tokens and a window of its own.

Token i of the chunk in row b has position q = length[b] + i. In KV head h it sees position p iff p <= q and
(p < sink or q - p < span[b, h] - sink). A span is raised to sink + 1; a span over the head's capacity is an error
(the function body, which cannot raise one, cuts it to the capacity).

The cache of a row holds the KV heads one after another, head h in capacity[h] slots. Position p of a head is in its slot
p if p < sink, else in sink + (p - sink) mod (capacity[h] - sink). Keys are stored after RoPE. A chunk attends to the
cache as it was before the chunk and to itself, then it is written; all keys and values are seen in their stored form,
so that the result does not depend on how a prompt is cut. A past and its present may be the same buffer with the op library,
not with the function body.""",
    inputs=[
        _In("query", "T", "[batch, tokens, num_heads * dim], RoPE applied"),
        _In("key", "T", "[batch, tokens, kv_num_heads * dim], RoPE applied"),
        _In("value", "T", "[batch, tokens, kv_num_heads * dim]"),
        _In("past_key", "C", "[batch, slots, dim], slots = sum of capacity"),
        _In("past_value", "C", "[batch, slots, dim]"),
        _In("length", "tensor(int32)", "[batch], tokens of the row that were given before this chunk"),
        _In("span", "tensor(int32)", "[batch, kv_num_heads], tokens that a query sees, sinks included"),
        _In("key_scale", "tensor(float)", "[kv_num_heads], int8 cache only: key = scale * stored", param_option=_Option.Optional),
        _In("value_scale", "tensor(float)", "[kv_num_heads], int8 cache only", param_option=_Option.Optional),
    ],
    outputs=[
        _In("output", "T", "[batch, tokens, num_heads * dim]"),
        _In("present_key", "C", "[batch, slots, dim]"),
        _In("present_value", "C", "[batch, slots, dim]"),
        _In("lse", "tensor(float)", "[batch, num_heads, tokens], log of the sum of exp(score)", param_option=_Option.Optional),
    ],
    type_constraints=_TYPES,
    attributes=[
        OpSchema.Attribute("num_heads", _AttrType.INT, "Query heads, a multiple of kv_num_heads.", required=True),
        OpSchema.Attribute("kv_num_heads", _AttrType.INT, "KV heads.", required=True),
        OpSchema.Attribute("capacity", _AttrType.INTS, "Slots of each KV head, each more than sink.", required=True),
        _default("sink", 64, "First tokens that are always seen."),
        _default("scale", 0.0, "Factor of the scores; 0 means 1 / sqrt(dim)."),
        _default("softcap", 0.0, "score = softcap * tanh(score / softcap); 0: none."),
    ],
)

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

The caches hold every position: the KV heads of a row one after another, position p of a head in its slot p. Keys are stored after
RoPE. The state is the index of a row in one buffer without pointers, of fixed size: zeros are an empty index, a copy is an index
of equal content. A row of length 0 starts its index afresh. A state that does not belong to this node is an error. A past and its
present may be the same buffer.""",
    inputs=[
        _In("query", "T", "[batch, tokens, num_heads * dim], RoPE applied"),
        _In("key", "T", "[batch, tokens, kv_num_heads * dim], RoPE applied"),
        _In("value", "T", "[batch, tokens, kv_num_heads * dim]"),
        _In("past_key", "C", "[batch, kv_num_heads * capacity, dim]"),
        _In("past_value", "C", "[batch, kv_num_heads * capacity, dim]"),
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
    ],
    outputs=[
        _In("output", "T", "[batch, tokens, num_heads * dim]"),
        _In("present_key", "C", "[batch, kv_num_heads * capacity, dim]"),
        _In("present_value", "C", "[batch, kv_num_heads * capacity, dim]"),
        _In("present_state", "tensor(uint8)", "[batch, bytes]"),
        _In("lse", "tensor(float)", "[batch, num_heads, tokens], log of the sum of exp(score)", param_option=_Option.Optional),
    ],
    type_constraints=_TYPES,
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
        _default("min_collisions", 2, "tables: equal codes that draw a key, 1 to 4."),
        OpSchema.Attribute("signature_bits", _AttrType.INT, "signature: 64, 128 or 256.", required=False),
        OpSchema.Attribute("max_hamming", _AttrType.INTS, "signature: most bits that differ, of each KV head.", required=False),
        _default("dense_below", -1, "A row of fewer tokens is exact; -1: where the library measured sampling to win."),
        _default("layer", 0, "Layer of the model; a state remembers it."),
        _default("identity", 0, "Hash of model and plan; a state remembers it."),
    ],
)

SCHEMAS = (SPAN_ATTENTION, LSH_ATTENTION)


def register_schemas() -> None:
    """Make the ops known to onnx's checker and shape inference. Calling it again does nothing."""
    for schema in SCHEMAS:
        if not has(schema.name, schema.since_version, schema.domain):
            register_schema(schema)
