from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SaveWay(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAVE_WAY_UNSPECIFIED: _ClassVar[SaveWay]
    SAVE_WAY_FOLDER: _ClassVar[SaveWay]
    SAVE_WAY_STREAM: _ClassVar[SaveWay]
SAVE_WAY_UNSPECIFIED: SaveWay
SAVE_WAY_FOLDER: SaveWay
SAVE_WAY_STREAM: SaveWay

class SaveModelRequest(_message.Message):
    __slots__ = ("name", "folder", "save_id", "probe", "way", "max_shard_size", "variant", "keep_quantized_experts", "adapter")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    SAVE_ID_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    WAY_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARD_SIZE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    KEEP_QUANTIZED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    folder: str
    save_id: str
    probe: bytes
    way: SaveWay
    max_shard_size: str
    variant: str
    keep_quantized_experts: bool
    adapter: str
    def __init__(self, name: _Optional[str] = ..., folder: _Optional[str] = ..., save_id: _Optional[str] = ..., probe: _Optional[bytes] = ..., way: _Optional[_Union[SaveWay, str]] = ..., max_shard_size: _Optional[str] = ..., variant: _Optional[str] = ..., keep_quantized_experts: _Optional[bool] = ..., adapter: _Optional[str] = ...) -> None: ...

class SaveModelResponse(_message.Message):
    __slots__ = ("planned", "data", "progress", "warning", "finished")
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    planned: SavePlanned
    data: SaveData
    progress: SaveProgress
    warning: str
    finished: SaveFinished
    def __init__(self, planned: _Optional[_Union[SavePlanned, _Mapping]] = ..., data: _Optional[_Union[SaveData, _Mapping]] = ..., progress: _Optional[_Union[SaveProgress, _Mapping]] = ..., warning: _Optional[str] = ..., finished: _Optional[_Union[SaveFinished, _Mapping]] = ...) -> None: ...

class SavePlanned(_message.Message):
    __slots__ = ("stages_write", "files", "parameters")
    STAGES_WRITE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    stages_write: bool
    files: _containers.RepeatedCompositeFieldContainer[SaveFile]
    parameters: int
    def __init__(self, stages_write: _Optional[bool] = ..., files: _Optional[_Iterable[_Union[SaveFile, _Mapping]]] = ..., parameters: _Optional[int] = ...) -> None: ...

class SaveFile(_message.Message):
    __slots__ = ("name", "bytes", "weights")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    weights: bool
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ..., weights: _Optional[bool] = ...) -> None: ...

class SaveData(_message.Message):
    __slots__ = ("file", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: int
    data: bytes
    def __init__(self, file: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class SaveProgress(_message.Message):
    __slots__ = ("file", "bytes")
    FILE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    file: int
    bytes: int
    def __init__(self, file: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class SaveFinished(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("begin", "write", "commit")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    begin: SaveBegin
    write: SaveWrite
    commit: SaveCommit
    def __init__(self, begin: _Optional[_Union[SaveBegin, _Mapping]] = ..., write: _Optional[_Union[SaveWrite, _Mapping]] = ..., commit: _Optional[_Union[SaveCommit, _Mapping]] = ...) -> None: ...

class SaveBegin(_message.Message):
    __slots__ = ("folder", "save_id", "probe", "max_shard_bytes", "keep_quantized_experts")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    SAVE_ID_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEEP_QUANTIZED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    folder: str
    save_id: str
    probe: bytes
    max_shard_bytes: int
    keep_quantized_experts: bool
    def __init__(self, folder: _Optional[str] = ..., save_id: _Optional[str] = ..., probe: _Optional[bytes] = ..., max_shard_bytes: _Optional[int] = ..., keep_quantized_experts: _Optional[bool] = ...) -> None: ...

class SaveWrite(_message.Message):
    __slots__ = ("names", "to_folder")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TO_FOLDER_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    to_folder: bool
    def __init__(self, names: _Optional[_Iterable[str]] = ..., to_folder: _Optional[bool] = ...) -> None: ...

class SaveCommit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SaveResponse(_message.Message):
    __slots__ = ("part", "data", "progress", "written", "committed")
    PART_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    part: SavePart
    data: SaveData
    progress: SaveProgress
    written: SaveFinished
    committed: SaveFinished
    def __init__(self, part: _Optional[_Union[SavePart, _Mapping]] = ..., data: _Optional[_Union[SaveData, _Mapping]] = ..., progress: _Optional[_Union[SaveProgress, _Mapping]] = ..., written: _Optional[_Union[SaveFinished, _Mapping]] = ..., committed: _Optional[_Union[SaveFinished, _Mapping]] = ...) -> None: ...

class SavePart(_message.Message):
    __slots__ = ("file_bytes", "sees_folder", "parameters", "config_json", "generation_config_json")
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEES_FOLDER_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    GENERATION_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    file_bytes: _containers.RepeatedScalarFieldContainer[int]
    sees_folder: bool
    parameters: int
    config_json: bytes
    generation_config_json: bytes
    def __init__(self, file_bytes: _Optional[_Iterable[int]] = ..., sees_folder: _Optional[bool] = ..., parameters: _Optional[int] = ..., config_json: _Optional[bytes] = ..., generation_config_json: _Optional[bytes] = ...) -> None: ...
