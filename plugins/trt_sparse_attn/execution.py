"""What a session needs of an engine: tensors, optimisation profiles, and calls by shape and address. No TensorRT, no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact

if TYPE_CHECKING:
    import torch

__all__ = ["Context", "Engine", "Profile", "Tensor", "check_tensors", "choose_profile"]


@dataclass(frozen=True)
class Tensor:
    """An input or output. dtype: as NumPy calls it; shape: -1 where it is dynamic; on_host: TensorRT reads it on the CPU."""

    dtype: str
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool = False


@dataclass(frozen=True)
class Profile:
    """Shapes that a context takes. batch, tokens, kept: least and most rows, new tokens of a row, positions with logits."""

    index: int
    batch: tuple[int, int]
    tokens: tuple[int, int]
    kept: tuple[int, int]

    def takes(self, batch: int, tokens: int, kept: int = 1) -> bool:
        """Whether a call of these sizes fits."""
        sizes = ((batch, self.batch), (tokens, self.tokens), (kept, self.kept))
        return all(low <= size <= high for size, (low, high) in sizes)


class Context(Protocol):
    """An engine under one profile. All tensors need a shape (inputs only) and an address before a call."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Shape of an input for the next call."""

    def set_address(self, name: str, address: int) -> None:
        """Where a tensor begins, in the memory of the device, or of the CPU for one that is read there."""

    def enqueue(self, stream: int) -> None:
        """Compute, in the order of a CUDA stream. RuntimeError with TensorRT's reason when it cannot."""


class Engine(Protocol):
    """An engine that was loaded. `label` tells it apart in reports, `plugin` says where its plugins are from."""

    label: str
    plugin: str
    device: torch.device
    tensors: Mapping[str, Tensor]
    profiles: Sequence[Profile]

    def context(self, profile: int) -> Context:
        """A context for a profile. Calls of all contexts of an engine must be in one stream: they share their memory."""


def choose_profile(engine: Engine, batch: int, tokens: int, kept: int = 1) -> Profile:
    """The tightest profile that a call fits in. UserError with what the engine was built for when there is none."""
    fitting = [profile for profile in engine.profiles if profile.takes(batch, tokens, kept)]
    if fitting:
        return min(fitting, key=lambda profile: (profile.tokens[1] * profile.batch[1], profile.index))
    most = max(profile.batch[1] for profile in engine.profiles)
    if batch > most:
        fix = f"lower it, or attnspan build --max-batch {batch}"
        raise UserError(f"batch is {batch}: {engine.label} was built for at most {most}; {fix}")
    longest = max((profile.tokens[1] for profile in engine.profiles if profile.takes(batch, profile.tokens[1])), default=tokens)
    if tokens > longest:
        raise UserError(
            f"chunk is {tokens}: {engine.label} was built for at most {longest} tokens; lower it, or "
            f"attnspan build --max-prompt-chunk {tokens}"
        )
    widest = max(profile.kept[1] for profile in engine.profiles)
    if kept > widest:
        fix = f"lower it, or attnspan build --max-logits {kept}"
        raise UserError(f"keep is {kept}: {engine.label} was built for logits of at most {widest} positions; {fix}")
    ranges = "; ".join(f"batch {p.batch[0]} to {p.batch[1]}, tokens {p.tokens[0]} to {p.tokens[1]}" for p in engine.profiles)
    raise UserError(f"{batch} rows of {tokens} tokens fit no profile of {engine.label} ({ranges}); make it again: attnspan build")


def check_tensors(engine: Engine, artefact: Artefact) -> None:
    """UserError when an engine does not have the inputs and outputs of an artefact, each of its type and shape."""
    cache, layers, heads = artefact.cache_dtype, artefact.layers, artefact.kv_heads
    wanted = {
        "input_ids": Tensor("int64", (-1, -1), True),
        "length": Tensor("int32", (-1,), True),
        "span": Tensor("int32", (layers, -1, heads), True),
        "logits_to_keep": Tensor("int64", (1,), True),
        "logits": Tensor("float32", (-1, -1, artefact.vocab_size), False),
    }
    for part in artefact.parts:
        shape = (-1, *part.cache_shape(artefact.head_dim))
        for kind in ("key", "value"):
            wanted[f"past_{kind}.{part.name}"] = Tensor(cache, shape, True)
            wanted[f"present_{kind}.{part.name}"] = Tensor(cache, shape, False)
    for name in sorted(wanted.keys() | engine.tensors.keys()):
        got, want = engine.tensors.get(name), wanted.get(name)
        if want is None or got is None or got.dtype != want.dtype or got.is_input != want.is_input or not _fits(got, want):
            raise UserError(
                f"{engine.label} does not belong to {artefact.folder}: {name} is {_text(got)}, must be {_text(want)}; "
                f"make it again with: attnspan build {artefact.folder}"
            )


def _fits(got: Tensor, want: Tensor) -> bool:
    # An engine for one row, or for one position with logits, has a 1 where others have -1.
    return len(got.shape) == len(want.shape) and all(b == -1 or a == b for a, b in zip(got.shape, want.shape, strict=True))


def _text(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} {'input' if tensor.is_input else 'output'}"
