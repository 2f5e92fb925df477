"""The TensorRT plugin in Python: SpanAttention, LshHash and MergeAttention as IPluginV3 over the Triton kernels.

`register(api)` puts the creators into TensorRT's registry; from then on its ONNX parser knows the ops and its runtime the plugins
in engines. The plugin in C++ has the same names and fields: an engine built with one runs with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar

import numpy as np

from attnspan.plugins.trt_sparse_attn.schema import NAMESPACE, OPS, VERSION, Op, SchemaError, Values, digest
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api

__all__ = ["SCRATCH_WORKERS", "Plugin", "collected", "new_plugin", "refusals", "register"]

SCRATCH_WORKERS = 576
"""Workers of a decode step that the workspace has room for: three a multiprocessor on a GPU of 192. An engine may be built on a
machine without a GPU, so the number does not ask for one."""

refusals: list[str] = []
"""What plugins refused since `collected` began last. TensorRT itself only says that a plugin failed."""
_collecting = False


@contextmanager
def collected() -> Iterator[None]:
    """Meanwhile plugins note what they refuse in `refusals`, and go on: who builds an engine says it once, in his own way.

    Otherwise they raise, and TensorRT prints a traceback.
    """
    global _collecting
    refusals.clear()
    _collecting = True
    try:
        yield
    finally:
        _collecting = False


_Call = TypeVar("_Call", bound=Callable[..., Any])


def _or(instead: Callable[..., Any]) -> Callable[[_Call], _Call]:
    """What a method that refuses returns while refusals are collected: `instead`, of its own arguments."""

    def decorate(call: _Call) -> _Call:
        @wraps(call)
        def refusing(*args: Any) -> Any:
            try:
                return call(*args)
            except SchemaError as error:
                if not _collecting:
                    raise
                node = args[1] if isinstance(args[1], str) else args[0].node
                refusals.append(f"node {node}: {error}")
                return instead(*args)

        return refusing  # type: ignore[return-value]

    return decorate


def _nothing(*_: Any) -> None:
    return None


def _some_types(self: Plugin, *_: Any) -> list[Any]:
    return [self.api.trt.float16] * len(self.op.outputs)


def _some_shapes(self: Plugin, inputs: Sequence[Any], *_: Any) -> list[Any]:
    return [inputs[0]] * len(self.op.outputs)


class Plugin:
    """One node. TensorRT calls the methods, under names of its own; `new_plugin` adds its base classes.

    values: all attributes of the op; building: whether it was made to build an engine, not to run one; node: its name.
    """

    def __init__(self, api: Api, op: Op, values: Values, building: bool, node: str = "") -> None:
        self.api, self.op, self.values, self.building, self.node = api, op, values, building, node
        self.kinds: list[str] = []
        self.layout: dict[Any, Any] = {}  # what kernels need on the device, made at the first call; clones share it
        self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
        self.num_outputs = len(op.outputs)
        self.timing_cache_id = f"{digest()[:12]} {sorted(values.items())}"

    def get_capability_interface(self, kind: Any) -> Any:
        """Core, build and runtime are one object."""
        return self

    def clone(self) -> Any:
        """A plugin of the same attributes and types."""
        twin = new_plugin(self.api, self.op, self.values, self.building, self.node)
        twin.kinds, twin.layout = self.kinds, self.layout
        return twin

    def get_fields_to_serialize(self) -> Any:
        """All attributes, those at their defaults, too."""
        trt = self.api.trt
        fields = []
        self.kept = [_array(value) for value in self.values.values()]  # TensorRT reads them after this call
        for name, array in zip(self.values, self.kept, strict=True):
            kind = trt.PluginFieldType.FLOAT32 if array.dtype == np.float32 else trt.PluginFieldType.INT32
            fields.append(trt.PluginField(name, array, kind))
        return trt.PluginFieldCollection(fields)

    @_or(_some_types)
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Types of the outputs. SchemaError for inputs that the op does not take."""
        kinds = [self.api.data_type(kind) for kind in input_types]
        outputs = self.op.types_of(kinds)
        self.kinds = [*kinds, *outputs]
        return [self.api.as_data_type(kind) for kind in outputs]

    @_or(_some_shapes)
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """Shapes of the outputs as expressions of the inputs'. SchemaError for shapes that cannot fit."""
        shapes = [[_size(dims[axis]) for axis in range(len(dims))] for dims in inputs]
        sizes = self.op.sizes_of(self.values, shapes)
        known = {axis: dims[j] for port, dims in zip(self.op.inputs, inputs, strict=False) for j, axis in enumerate(port.shape)}
        outputs = []
        for port in self.op.outputs:
            dims = self.api.trt.DimsExprs(len(port.shape))
            for j, axis in enumerate(port.shape):
                dims[j] = known[axis] if axis in known else builder.constant(sizes[axis])
            outputs.append(dims)
        return outputs

    def get_aliased_input(self, output: int) -> int:
        """Caches are updated in place."""
        return self.op.aliased_input(output)

    def supports_format_combination(self, position: int, tensors: Sequence[Any], num_inputs: int) -> bool:
        """Row-major tensors of the network's own types."""
        given = tensors[position].desc
        return given.format == self.api.trt.TensorFormat.LINEAR and self.api.data_type(given.type) == self.kinds[position]

    @_or(_nothing)
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Before the build. SchemaError when the largest shapes of the profile do not fit."""
        self.op.sizes_of(self.values, [list(x.max) for x in inputs])

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Before a run with new shapes. SchemaError when they do not fit."""
        self.kinds = [self.api.data_type(x.type) for x in (*inputs, *outputs)]
        self.op.sizes_of(self.values, [list(x.dims) for x in inputs])

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes for the parts of a decode step's workers, and for copies of the plugin in C++: each runs engines of the other."""
        if self.op.name != "SpanAttention":
            return 0
        batch, _, dim = (int(x) for x in inputs[3].max)
        return 4 * scratch_numbers(self.values, batch, dim) + 16 * batch * int(inputs[6].max[1]) + 4096

    def enqueue(
        self,
        inputs_desc: Sequence[Any],
        outputs_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launches the kernels on `stream`; inputs, outputs, workspace: addresses."""
        from attnspan.plugins.trt_sparse_attn import plugin_launch

        shapes = [tuple(int(size) for size in x.dims) for x in (*inputs_desc, *outputs_desc)]
        kinds = [self.api.data_type(x.type) for x in (*inputs_desc, *outputs_desc)]
        memory = list(zip((*inputs, *outputs), shapes, kinds, strict=True))
        plugin_launch.launch(self, memory[: len(inputs)], memory[len(inputs) :], workspace, stream)

    def attach_to_context(self, context: Any) -> Any:
        """A plugin for one execution context."""
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        """There is one."""


def scratch_numbers(values: Values, batch: int, dim: int) -> int:
    """Numbers in fp32 that a decode step of so many rows needs between its two launches."""
    heads, kv_heads = values["num_heads"], values["kv_num_heads"]
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    return (SCRATCH_WORKERS + batch * kv_heads) * (heads // kv_heads) * (dim + 1)


def _array(value: float | tuple[int, ...]) -> Any:
    return np.array([value], np.float32) if isinstance(value, float) else np.array(value, np.int32).reshape(-1)


def _size(dim: Any) -> int:
    return int(dim.get_constant_value()) if dim.is_constant() else -1


def _given(op: Op, fields: Any) -> dict[str, int | float | list[int]]:
    """Attributes as TensorRT hands them over."""
    kinds = {attribute.name: attribute.kind for attribute in op.attributes}
    given: dict[str, int | float | list[int]] = {}
    for field in fields:
        numbers = np.asarray(field.data).reshape(-1).tolist() if field.name in kinds else []
        if numbers or kinds.get(field.name) == "ints":
            given[field.name] = numbers if kinds[field.name] == "ints" else numbers[0]
    return given


@cache
def _bases(trt: Any) -> tuple[Any, ...]:
    return (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)


@cache
def _class(trt: Any) -> type:
    """`Plugin` with TensorRT's base classes."""

    def __init__(self: Any, *args: Any) -> None:  # noqa: N807
        for base in _bases(trt):
            base.__init__(self)
        Plugin.__init__(self, *args)

    return type("AttnspanPlugin", (Plugin, *_bases(trt)), {"__init__": __init__})


def new_plugin(api: Api, op: Op, values: Values, building: bool, node: str = "") -> Any:
    """A plugin that TensorRT can call; `values` as `Op.attributes_of` gives them."""
    return _class(api.trt)(api, op, values, building, node)


def _creator(api: Api, op: Op) -> Any:
    trt = api.trt

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            kinds = {"int": trt.PluginFieldType.INT32, "ints": trt.PluginFieldType.INT32, "float": trt.PluginFieldType.FLOAT32}
            empty = np.array([], np.int32)
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(attribute.name, empty, kinds[attribute.kind]) for attribute in op.attributes]
            )

        @_or(_nothing)
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return new_plugin(api, op, op.attributes_of(_given(op, fields)), phase == trt.TensorRTPhase.BUILD, name)

    return Creator()


@cache
def register(api: Api) -> None:
    """Makes the ops known to TensorRT in this process. A plugin library that was loaded before keeps its place."""
    registry = api.registry()
    known = {(creator.plugin_namespace, creator.name, creator.plugin_version) for creator in registry.all_creators}
    for op in OPS:
        if (NAMESPACE, op.name, VERSION) not in known:
            creator = _creator(api, op)
            _creators.append(creator)
            registry.register_creator(creator, NAMESPACE)


_creators: list[Any] = []
"""TensorRT does not keep them alive."""
