"""An adapter's tensors, read by range into host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .adapter_spec import AdapterSpec
from .fetch import RecordStream
from .records import DTYPES, HubToken, TensorRecord
from .sources import Cancel, open_source
from .staging import HostStaging
from .tensors import dtype_by_name


def fetch_tensors(
    spec: AdapterSpec, records: Sequence[TensorRecord], token: HubToken, cancel: Cancel | None = None
) -> Mapping[str, torch.Tensor]:
    """The tensors of `records` by their keys. Raises the errors of sources, and LoadCancelledError after a `cancel`."""
    if not records:
        return {}
    cancel = cancel or Cancel()
    ordered = sorted(records, key=lambda record: (record.file, record.start))
    source = open_source(spec.source, token)
    tensors = {}
    try:
        stream: RecordStream[memoryview] = RecordStream(source, ordered, spec.versions, HostStaging())
        with stream, cancel.calling(stream.close):
            cancel.check(ordered[0].file)
            for record in ordered:
                data, dtype = stream.take(record.key), dtype_by_name(DTYPES[record.dtype][0])
                flat = torch.frombuffer(data, dtype=dtype) if record.numel else torch.empty(0, dtype=dtype)
                tensors[record.key] = flat.reshape(record.shape)
        for file in {record.file for record in ordered}:
            source.verify(file, spec.versions[file])
    finally:
        source.close()
    return tensors
