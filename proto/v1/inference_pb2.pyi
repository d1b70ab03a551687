from google.protobuf import struct_pb2 as _struct_pb2
from shardlift.proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("model", "input_ids", "prompt", "conversation", "attention_mask", "generation", "seed", "output_logits", "output_scores", "generated", "generator_state", "adapters")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_LOGITS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SCORES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_STATE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    input_ids: _tensor_pb2.Tensor
    prompt: str
    conversation: Conversation
    attention_mask: _tensor_pb2.Tensor
    generation: _struct_pb2.Struct
    seed: int
    output_logits: bool
    output_scores: bool
    generated: _tensor_pb2.Tensor
    generator_state: bytes
    adapters: AdapterChoice
    def __init__(self, model: _Optional[str] = ..., input_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., prompt: _Optional[str] = ..., conversation: _Optional[_Union[Conversation, _Mapping]] = ..., attention_mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., generation: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., seed: _Optional[int] = ..., output_logits: _Optional[bool] = ..., output_scores: _Optional[bool] = ..., generated: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., generator_state: _Optional[bytes] = ..., adapters: _Optional[_Union[AdapterChoice, _Mapping]] = ...) -> None: ...

class AdapterChoice(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "step", "finished", "more")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    accepted: PromptAccepted
    step: GeneratedStep
    finished: GenerationFinished
    more: bytes
    def __init__(self, accepted: _Optional[_Union[PromptAccepted, _Mapping]] = ..., step: _Optional[_Union[GeneratedStep, _Mapping]] = ..., finished: _Optional[_Union[GenerationFinished, _Mapping]] = ..., more: _Optional[bytes] = ...) -> None: ...

class PromptAccepted(_message.Message):
    __slots__ = ("batch", "prompt_tokens", "prompt_ids")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    batch: int
    prompt_tokens: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, batch: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GeneratedStep(_message.Message):
    __slots__ = ("token_ids", "text", "logits", "scores")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logits: _tensor_pb2.Tensor
    scores: _tensor_pb2.Tensor
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logits: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., scores: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class GenerationFinished(_message.Message):
    __slots__ = ("new_tokens", "reason", "generator_state", "row_tokens")
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_STATE_FIELD_NUMBER: _ClassVar[int]
    ROW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    new_tokens: int
    reason: str
    generator_state: bytes
    row_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, new_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., generator_state: _Optional[bytes] = ..., row_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("model", "input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache", "without_logits", "one_by_one", "adapters")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_TO_KEEP_FIELD_NUMBER: _ClassVar[int]
    USE_CACHE_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_LOGITS_FIELD_NUMBER: _ClassVar[int]
    ONE_BY_ONE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    input_ids: _tensor_pb2.Tensor
    attention_mask: _tensor_pb2.Tensor
    position_ids: _tensor_pb2.Tensor
    logits_to_keep: int
    use_cache: bool
    without_logits: bool
    one_by_one: bool
    adapters: AdapterChoice
    def __init__(self, model: _Optional[str] = ..., input_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., position_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., logits_to_keep: _Optional[int] = ..., use_cache: _Optional[bool] = ..., without_logits: _Optional[bool] = ..., one_by_one: _Optional[bool] = ..., adapters: _Optional[_Union[AdapterChoice, _Mapping]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("model", "idle_timeout_s", "keep", "rows", "forward", "generate", "reserve_tokens", "adapters")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    idle_timeout_s: float
    keep: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    forward: ForwardRequest
    generate: GenerateRequest
    reserve_tokens: int
    adapters: AdapterChoice
    def __init__(self, model: _Optional[str] = ..., idle_timeout_s: _Optional[float] = ..., keep: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., forward: _Optional[_Union[ForwardRequest, _Mapping]] = ..., generate: _Optional[_Union[GenerateRequest, _Mapping]] = ..., reserve_tokens: _Optional[int] = ..., adapters: _Optional[_Union[AdapterChoice, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("forward", "generate", "done", "refused")
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    forward: ForwardResponse
    generate: GenerateResponse
    done: SessionState
    refused: SessionRefusal
    def __init__(self, forward: _Optional[_Union[ForwardResponse, _Mapping]] = ..., generate: _Optional[_Union[GenerateResponse, _Mapping]] = ..., done: _Optional[_Union[SessionState, _Mapping]] = ..., refused: _Optional[_Union[SessionRefusal, _Mapping]] = ...) -> None: ...

class SessionRefusal(_message.Message):
    __slots__ = ("code", "message", "reason", "retry_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_S_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    reason: str
    retry_s: float
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ..., retry_s: _Optional[float] = ...) -> None: ...

class SessionState(_message.Message):
    __slots__ = ("length", "rows")
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    length: int
    rows: int
    def __init__(self, length: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("logits", "more")
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    logits: _tensor_pb2.Tensor
    more: bytes
    def __init__(self, logits: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., more: _Optional[bytes] = ...) -> None: ...
