from shardlift.proto.v1 import saving_pb2 as _saving_pb2
from shardlift.proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepRequest(_message.Message):
    __slots__ = ("step", "more", "end", "group")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    step: Step
    more: bytes
    end: SessionEnd
    group: StepGroup
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., more: _Optional[bytes] = ..., end: _Optional[_Union[SessionEnd, _Mapping]] = ..., group: _Optional[_Union[StepGroup, _Mapping]] = ...) -> None: ...

class StepGroup(_message.Message):
    __slots__ = ("steps", "input")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    input: _tensor_pb2.Tensor
    def __init__(self, steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class StepKey(_message.Message):
    __slots__ = ("session", "epoch", "number")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    number: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("key", "input", "attention_mask", "position_ids", "use_cache", "reset_cache", "keep", "rows", "one_by_one", "adapters")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    USE_CACHE_FIELD_NUMBER: _ClassVar[int]
    RESET_CACHE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ONE_BY_ONE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    key: StepKey
    input: _tensor_pb2.Tensor
    attention_mask: _tensor_pb2.Tensor
    position_ids: _tensor_pb2.Tensor
    use_cache: bool
    reset_cache: bool
    keep: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    one_by_one: bool
    adapters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[_Union[StepKey, _Mapping]] = ..., input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., position_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., use_cache: _Optional[bool] = ..., reset_cache: _Optional[bool] = ..., keep: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., one_by_one: _Optional[bool] = ..., adapters: _Optional[_Iterable[str]] = ...) -> None: ...

class SessionEnd(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("key", "code", "message", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: StepKey
    code: int
    message: str
    reason: str
    def __init__(self, key: _Optional[_Union[StepKey, _Mapping]] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
