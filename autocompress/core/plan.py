"""What to do to a network: the one output of every search."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autocompress.core.graph import Bits, LayerGraph


@dataclass(frozen=True)
class Plan:
    """Choices for architecture, channels and bits; what is not named stays as it is.

    Args:
        arch: architecture knob -> choice.
        channels: channel group -> number of units kept.
        bits: layer -> bit-widths.

    Example:
        >>> Plan(channels={"conv1": 8}).to_json()
        '{"arch":{},"bits":{},"channels":{"conv1":8}}'
    """

    arch: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, int] = field(default_factory=dict)
    bits: Mapping[str, Bits] = field(default_factory=dict)

    def apply(self, graph: LayerGraph) -> LayerGraph:
        """The graph this plan makes of ``graph``; the empty plan changes nothing.

        Raises:
            ValueError: the plan names a group or layer the graph lacks, or a size it cannot have.
        """
        if self.channels:
            graph = graph.with_channels(self.channels)
        if self.bits:
            graph = graph.with_bits(self.bits)
        return graph

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, so equal plans give equal text."""
        data = {
            "arch": dict(self.arch),
            "channels": dict(self.channels),
            "bits": {name: [b.weight, b.act] for name, b in self.bits.items()},
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan written by :meth:`to_json`.

        Raises:
            ValueError: the text is not a plan.
        """
        try:
            data: Any = json.loads(text)
            unknown = set(data) - {"arch", "channels", "bits"}
            if unknown:
                raise ValueError(f"unknown keys {sorted(unknown)}")
            arch = {str(k): str(v) for k, v in data.get("arch", {}).items()}
            channels = {str(k): int(v) for k, v in data.get("channels", {}).items()}
            bits = {str(k): Bits(int(w), int(a)) for k, (w, a) in data.get("bits", {}).items()}
        except (TypeError, ValueError, AttributeError) as fault:
            raise ValueError(f"a plan is JSON with the keys arch, channels and bits: {fault}") from fault
        return cls(arch, channels, bits)

    @cached_property
    def digest(self) -> str:
        """Hash of the canonical JSON; equal plans have equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()
