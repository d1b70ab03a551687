"""An adapter as the controller tells the workers of it. Pure; goes through Ray and JSON.

Never contains a token: that is handed over with the call that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .records import FileVersion, SourceSpec, TensorRecord
from .spec import ModuleBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """An adapter for the whole model, whose targets were found on the whole model; each stage takes its own part.

    path: as its user wrote it. kind: peft's name for it, "LORA". config: its adapter_config.json. modules, parameters:
    paths of the modules, and of the parameters of three dimensions, that it is injected into. saved: paths of modules
    that it has a copy of its own of. patterns: fields of the config that peft has written anew for this model. tied:
    from the path of a module some of whose rows it has trained, to that of the one that is tied to it.
    """

    name: str
    path: str
    kind: str
    config: Mapping[str, Any]
    patterns: Mapping[str, Any]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    source: SourceSpec
    records: tuple[TensorRecord, ...]
    versions: Mapping[str, FileVersion]
    tied: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AdapterSpec:
        fields = dict(value)
        for name in ("modules", "parameters", "saved"):
            fields[name] = tuple(fields[name])
        fields["source"] = SourceSpec(**fields["source"])
        fields["records"] = tuple(
            TensorRecord(**{**record, "shape": tuple(record["shape"])}) for record in fields["records"]
        )
        fields["versions"] = {name: FileVersion(**version) for name, version in fields["versions"].items()}
        return cls(**fields)

    def __repr__(self) -> str:
        return f"AdapterSpec({self.name}: {self.kind} from {self.path}, {len(self.records)} tensors)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedAdapter:
    """An adapter on a resident model. stages: what it holds on each, as measured."""

    spec: AdapterSpec
    stages: tuple[tuple[ModuleBytes, ...], ...]

    @property
    def stage_bytes(self) -> tuple[int, ...]:
        return tuple(sum(module.size_bytes for module in modules) for modules in self.stages)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return {"spec": self.spec.to_json(), "stages": [[asdict(module) for module in each] for each in self.stages]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AttachedAdapter:
        return cls(
            spec=AdapterSpec.from_json(value["spec"]),
            stages=tuple(tuple(ModuleBytes(**module) for module in each) for each in value["stages"]),
        )
