"""Python values as JSON has them: what crosses the wire as JSON text or as a `google.protobuf.Struct`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

from google.protobuf import struct_pb2

from ..proto.v1.errors import InvalidRequestError


def jsonable(value: Any, name: str) -> Any:
    """`value` with enums, tuples, dtypes, and numpy's or torch's scalars and rows of ids made plain.

    Raises InvalidRequestError, naming `name`, for what JSON can't say: tensors, callables, objects.
    """
    if isinstance(value, Enum):
        return jsonable(value.value, name)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item, name) for item in value]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a numpy or torch scalar
        return jsonable(value.item(), name)
    if hasattr(value, "tolist") and len(getattr(value, "shape", ())) == 1 and "int" in str(value.dtype):
        return jsonable(value.tolist(), name)  # ids
    raise InvalidRequestError(
        f"{name} is a {type(value).__name__}, which can't be sent to the gateway: "
        "only numbers, strings, lists and dicts of them can"
    )


def to_struct(values: Mapping[str, Any], name: str) -> struct_pb2.Struct:
    """`values` as a Struct. Its numbers are doubles: whole floats arrive as integers do."""
    struct = struct_pb2.Struct()
    plain = jsonable(values, name)
    try:
        struct.update(plain)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"{name} can't be sent to the gateway: {error}") from None
    return struct


def to_json(values: Mapping[str, Any], name: str) -> str:
    """`values` as JSON text, in which 6 and 6.0 stay apart."""
    return json.dumps(jsonable(values, name), sort_keys=True)
