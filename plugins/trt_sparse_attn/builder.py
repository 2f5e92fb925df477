"""One TensorRT build: parser, network, configuration, progress, and what TensorRT says when it refuses."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import plugin
from attnspan.plugins.trt_sparse_attn.progress import monitor
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api

if TYPE_CHECKING:
    from attnspan.plugins.trt_sparse_attn.engine import Profile

__all__ = ["Built", "serialize"]

_PLUGIN = "attnspan: "
"""What messages of the plugin in C++ begin with."""
_LINES = 6
"""Lines of TensorRT's own messages that an error repeats."""


@dataclass(frozen=True)
class Built:
    """Bytes of an engine, and the timings of its tactics (empty where TensorRT keeps none)."""

    engine: memoryview
    timings: bytes


def serialize(
    api: Api,
    model: Path,
    wanted: Sequence[Profile],
    *,
    layers: int,
    arch: str | None = None,
    timings: bytes = b"",
    weight_streaming: bool = False,
    workspace: int | None = None,
) -> Built:
    """Build an engine of an ONNX file under optimisation profiles. layers: what the axis of that name counts.

    UserError with the reason when the parser, a plugin or the builder refuses. KeyboardInterrupt ends it between two steps.
    """
    trt = api.trt
    said: list[str] = []
    logger = api.logger(lambda severity, text: said.append(text) if severity.endswith("error") else None)
    builder = trt.Builder(logger)
    network = builder.create_network(api.network_flags())
    parser = trt.OnnxParser(network, logger)
    with plugin.collected():
        parsed = parser.parse_from_file(str(model))
    if not parsed or plugin.refusals:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = [f"node {e.node_name() or e.node()}: {e.desc()}" for e in errors]
        raise _refusal(api, f"{model} cannot be parsed", said, told)
    api.allow_decomposition(network)
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if arch is not None:
        api.set_arch(config, arch)
    if weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    for one in wanted:
        config.add_optimization_profile(_profile(builder, network, one, layers))
    cache = None if api.is_rtx else _timing_cache(config, timings)
    with plugin.collected():
        data = _run(builder, network, config, monitor(trt))
    if data is None or plugin.refusals:
        raise _refusal(api, f"no engine of {model} could be built", said, said)
    return Built(memoryview(data), bytes(memoryview(cache.serialize())) if cache is not None else b"")


def _profile(builder: Any, network: Any, wanted: Profile, layers: int) -> Any:
    """Ranges of all dynamic inputs, by the names of their axes."""
    profile = builder.create_optimization_profile()
    ranges = {"batch": wanted.batch, "sequence": wanted.sequence, "layers": (layers,) * 3}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.is_shape_tensor:
            if tensor.name != "logits_to_keep":
                raise UserError(f"input {tensor.name} is read as a shape: only logits_to_keep may be; export the model again")
            profile.set_shape_input(tensor.name, *([bound] for bound in wanted.logits_to_keep))
            continue
        axes = [(size,) * 3 if size >= 0 else ranges.get(tensor.get_dimension_name(j)) for j, size in enumerate(tensor.shape)]
        if None in axes:
            names = [tensor.get_dimension_name(j) or "?" for j in range(len(tensor.shape))]
            allowed = f"{', '.join(ranges)} or numbers"
            raise UserError(f"input {tensor.name} has axes {names}: must be {allowed}; export the model again")
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *(tuple(axis[bound] for axis in axes if axis) for bound in range(3)))
    return profile


def _timing_cache(config: Any, timings: bytes) -> Any:
    """The configuration's cache of timings; an empty one when the file is another TensorRT's or GPU's."""
    cache = config.create_timing_cache(timings) or config.create_timing_cache(b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return config.get_timing_cache()


def _run(builder: Any, network: Any, config: Any, progress: Any) -> Any:
    """Builds in a thread of its own, so that Ctrl-C and SIGTERM reach this one; they stop the build at its next step."""
    config.progress_monitor = progress
    result: list[Any] = []
    failed: list[BaseException] = []
    done = threading.Event()  # Thread.join, when interrupted, takes a thread that runs for one that has ended (Python 3.11)

    def build() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=build, name="build")
    thread.start()
    try:
        while not done.wait(0.2):
            pass
    except BaseException:
        progress.stopped = True
        done.wait()
        raise
    finally:
        thread.join()
        progress.close()
    if failed:
        raise failed[0]
    return result[0]


def _refusal(api: Api, what: str, said: Sequence[str], told: Sequence[str]) -> UserError:
    """The plugin's own words where it has any, which the one in C++ says to the logger; else TensorRT's."""
    own = plugin.refusals or [line.removeprefix(_PLUGIN) for line in said if line.startswith(_PLUGIN)]
    reasons = list(dict.fromkeys(" ".join(line.split()) for line in own or told))[:_LINES] or ["no reason was given"]
    return UserError(f"{what}: {'; '.join(reasons)} ({api.product})")
