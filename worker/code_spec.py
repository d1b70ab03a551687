"""What code of its own a checkpoint's model needs. Pure; goes through Ray and JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeSpec:
    """Code that a model needs, and nothing but that.

    classes: "AutoModelForCausalLM" and perhaps "AutoConfig" -> "module.Class". files: name -> SHA-256, in hexadecimal.
    """

    classes: Mapping[str, str]
    files: Mapping[str, str]

    @property
    def key(self) -> str:
        text = "\n".join([*sorted(f"{name} {digest}" for name, digest in self.files.items()), str(dict(self.classes))])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has code of its own for a causal model."""
    references = config.get("auto_map")
    return isinstance(references, dict) and isinstance(references.get(MODEL), str)
