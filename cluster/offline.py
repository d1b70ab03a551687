"""`python -m shardlift.cluster.offline`: a plan for devices that are only named, without any cluster.

Reads {"source": ModelSource, "options": LoadOptions, "devices": "8x80GiB" or a topology} as JSON from stdin, and prints
the plan, or {"error", "message"} and exits with 1.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InternalError
from ..proto.v1.status import to_error
from . import requests
from .devices import parse_devices, parse_topology
from .planning import plan_model


def plan_json(request: dict[str, Any]) -> dict[str, Any]:
    """A `Plan` message in protobuf's JSON form."""
    source = ParseDict(request["source"], registry_pb2.ModelSource())
    options = ParseDict(request["options"], registry_pb2.LoadOptions())
    devices = request["devices"]
    planned = plan_model(
        requests.checkpoint_request(source),
        requests.access_token(source),
        requests.model_options(options),
        requests.plan_options(options),
        parse_devices(devices) if isinstance(devices, str) else parse_topology(devices),
    )
    plan = planned.plan.to_message(requests.given_speeds(options))
    answer: dict[str, Any] = MessageToDict(plan, preserving_proto_field_name=True)
    return answer


def main() -> int:
    try:
        print(json.dumps(plan_json(json.load(sys.stdin))))
    except Exception as error:
        ours = to_error(error)
        if isinstance(ours, InternalError):
            import traceback

            traceback.print_exc()
        print(json.dumps({"error": type(ours).__name__, "message": str(ours)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
