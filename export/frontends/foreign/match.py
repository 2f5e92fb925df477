"""Attention in foreign graphs, recognised: one `Core` per layer, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from attnspan.export.frontends.foreign.core import Core, MatchError
from attnspan.export.frontends.foreign.fused import Fused
from attnspan.export.frontends.foreign.parts import Parts
from attnspan.export.frontends.foreign.probe import BlockedError

MICROSOFT = "com.microsoft"
UNSUPPORTED = {"PagedAttention", "SparseAttention", "LinearAttention", "DecoderMaskedMultiHeadAttention", "QAttention"}


@dataclass
class Matcher(Fused, Parts):
    """Finds the attentions of a graph."""

    problems: list[tuple[ir.Node, str]] = field(default_factory=list)

    def cores(self) -> list[Core]:
        """The attentions in the order of the layers. What looks like attention and cannot be lifted is in `problems`."""
        found = []
        for node in self.probe.graph:
            match = self._matching(node)
            if match is None:
                continue
            try:
                core = match(node)
            except (MatchError, BlockedError) as error:
                self.problems.append((node, str(error)))
            else:
                if core is not None:
                    found.append(core)
        return found

    def _matching(self, node: ir.Node) -> Callable[[ir.Node], Core | None] | None:
        if node.domain == MICROSOFT and node.op_type == "GroupQueryAttention":
            return self.group_query
        if node.domain == MICROSOFT and node.op_type == "MultiHeadAttention":
            return self.multi_head
        if node.domain == "" and node.op_type == "Attention":
            return self.attention
        if node.domain == "" and node.op_type == "Softmax":
            return self.parts
        if node.op_type in UNSUPPORTED or (node.domain == MICROSOFT and node.op_type == "Attention"):
            return self._unsupported
        return None

    def _unsupported(self, node: ir.Node) -> None:
        raise MatchError("this op cannot be lifted")
