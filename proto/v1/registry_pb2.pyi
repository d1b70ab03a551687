from shardlift.proto.v1 import saving_pb2 as _saving_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_UNAVAILABLE: _ClassVar[ModelState]
    MODEL_STATE_UNLOADING: _ClassVar[ModelState]
    MODEL_STATE_RECOVERING: _ClassVar[ModelState]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_OK: _ClassVar[Verdict]
    VERDICT_WARN: _ClassVar[Verdict]
    VERDICT_FAIL: _ClassVar[Verdict]
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_UNAVAILABLE: ModelState
MODEL_STATE_UNLOADING: ModelState
MODEL_STATE_RECOVERING: ModelState
VERDICT_UNSPECIFIED: Verdict
VERDICT_OK: Verdict
VERDICT_WARN: Verdict
VERDICT_FAIL: Verdict

class ModelSource(_message.Message):
    __slots__ = ("path", "revision", "subfolder", "variant", "token", "hub_endpoint", "cache_dir", "trust_remote_code", "local_files_only")
    PATH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SUBFOLDER_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HUB_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    CACHE_DIR_FIELD_NUMBER: _ClassVar[int]
    TRUST_REMOTE_CODE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FILES_ONLY_FIELD_NUMBER: _ClassVar[int]
    path: str
    revision: str
    subfolder: str
    variant: str
    token: str
    hub_endpoint: str
    cache_dir: str
    trust_remote_code: bool
    local_files_only: bool
    def __init__(self, path: _Optional[str] = ..., revision: _Optional[str] = ..., subfolder: _Optional[str] = ..., variant: _Optional[str] = ..., token: _Optional[str] = ..., hub_endpoint: _Optional[str] = ..., cache_dir: _Optional[str] = ..., trust_remote_code: _Optional[bool] = ..., local_files_only: _Optional[bool] = ...) -> None: ...

class LoadOptions(_message.Message):
    __slots__ = ("quantization_config_json", "dtype", "attn_implementation", "config_json", "config_overrides_json", "device_map", "device_map_by_module", "max_memory", "num_stages", "staging_budget", "connections", "without_cache", "trace", "quantize_experts", "reserve_tokens", "link_speed", "max_sessions", "max_waiting", "idle_timeout_s", "without_batching", "without_quantized_experts", "requantize", "dequantize", "adapter")
    class DeviceMapByModuleEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MaxMemoryEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    QUANTIZATION_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ATTN_IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    CONFIG_OVERRIDES_JSON_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MAP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MAP_BY_MODULE_FIELD_NUMBER: _ClassVar[int]
    MAX_MEMORY_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    STAGING_BUDGET_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_CACHE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LINK_SPEED_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_BATCHING_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_QUANTIZED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    REQUANTIZE_FIELD_NUMBER: _ClassVar[int]
    DEQUANTIZE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    quantization_config_json: str
    dtype: str
    attn_implementation: str
    config_json: str
    config_overrides_json: str
    device_map: str
    device_map_by_module: _containers.ScalarMap[str, str]
    max_memory: _containers.ScalarMap[str, str]
    num_stages: int
    staging_budget: str
    connections: int
    without_cache: bool
    trace: bool
    quantize_experts: bool
    reserve_tokens: int
    link_speed: str
    max_sessions: int
    max_waiting: int
    idle_timeout_s: float
    without_batching: bool
    without_quantized_experts: bool
    requantize: bool
    dequantize: bool
    adapter: ModelSource
    def __init__(self, quantization_config_json: _Optional[str] = ..., dtype: _Optional[str] = ..., attn_implementation: _Optional[str] = ..., config_json: _Optional[str] = ..., config_overrides_json: _Optional[str] = ..., device_map: _Optional[str] = ..., device_map_by_module: _Optional[_Mapping[str, str]] = ..., max_memory: _Optional[_Mapping[str, str]] = ..., num_stages: _Optional[int] = ..., staging_budget: _Optional[str] = ..., connections: _Optional[int] = ..., without_cache: _Optional[bool] = ..., trace: _Optional[bool] = ..., quantize_experts: _Optional[bool] = ..., reserve_tokens: _Optional[int] = ..., link_speed: _Optional[str] = ..., max_sessions: _Optional[int] = ..., max_waiting: _Optional[int] = ..., idle_timeout_s: _Optional[float] = ..., without_batching: _Optional[bool] = ..., without_quantized_experts: _Optional[bool] = ..., requantize: _Optional[bool] = ..., dequantize: _Optional[bool] = ..., adapter: _Optional[_Union[ModelSource, _Mapping]] = ...) -> None: ...

class PlanModelRequest(_message.Message):
    __slots__ = ("source", "options")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    source: ModelSource
    options: LoadOptions
    def __init__(self, source: _Optional[_Union[ModelSource, _Mapping]] = ..., options: _Optional[_Union[LoadOptions, _Mapping]] = ...) -> None: ...

class PlanModelResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("name", "source", "options")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: ModelSource
    options: LoadOptions
    def __init__(self, name: _Optional[str] = ..., source: _Optional[_Union[ModelSource, _Mapping]] = ..., options: _Optional[_Union[LoadOptions, _Mapping]] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("started", "planned", "placed", "progress", "ready", "warning", "trace")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    started: LoadStarted
    planned: Plan
    placed: StagePlaced
    progress: StageProgress
    ready: ModelInfo
    warning: str
    trace: LoadTrace
    def __init__(self, started: _Optional[_Union[LoadStarted, _Mapping]] = ..., planned: _Optional[_Union[Plan, _Mapping]] = ..., placed: _Optional[_Union[StagePlaced, _Mapping]] = ..., progress: _Optional[_Union[StageProgress, _Mapping]] = ..., ready: _Optional[_Union[ModelInfo, _Mapping]] = ..., warning: _Optional[str] = ..., trace: _Optional[_Union[LoadTrace, _Mapping]] = ...) -> None: ...

class LoadTrace(_message.Message):
    __slots__ = ("stage", "json", "last")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    stage: int
    json: bytes
    last: bool
    def __init__(self, stage: _Optional[int] = ..., json: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class LoadStarted(_message.Message):
    __slots__ = ("name", "commit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    commit: str
    def __init__(self, name: _Optional[str] = ..., commit: _Optional[str] = ...) -> None: ...

class StagePlaced(_message.Message):
    __slots__ = ("stage", "node", "device")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    stage: int
    node: str
    device: str
    def __init__(self, stage: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class StageProgress(_message.Message):
    __slots__ = ("stage", "fetched_bytes", "fetch_bytes", "tensors_loaded", "tensors", "resident_bytes", "done", "bytes_per_second", "seconds_left", "cached")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_LOADED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    stage: int
    fetched_bytes: int
    fetch_bytes: int
    tensors_loaded: int
    tensors: int
    resident_bytes: int
    done: bool
    bytes_per_second: float
    seconds_left: float
    cached: bool
    def __init__(self, stage: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., fetch_bytes: _Optional[int] = ..., tensors_loaded: _Optional[int] = ..., tensors: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., done: _Optional[bool] = ..., bytes_per_second: _Optional[float] = ..., seconds_left: _Optional[float] = ..., cached: _Optional[bool] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("model", "quantization", "total_resident_bytes", "total_fetch_bytes", "stages", "dtype", "commit", "devices", "predicted_load_seconds", "load_bottleneck", "load_bottleneck_stage", "link_bytes_per_second", "link_is_measured", "kv_tokens", "notes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FETCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_BOTTLENECK_FIELD_NUMBER: _ClassVar[int]
    LOAD_BOTTLENECK_STAGE_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    LINK_IS_MEASURED_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    quantization: str
    total_resident_bytes: int
    total_fetch_bytes: int
    stages: _containers.RepeatedCompositeFieldContainer[StagePlan]
    dtype: str
    commit: str
    devices: _containers.RepeatedCompositeFieldContainer[DeviceCapacity]
    predicted_load_seconds: float
    load_bottleneck: str
    load_bottleneck_stage: int
    link_bytes_per_second: float
    link_is_measured: bool
    kv_tokens: int
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., quantization: _Optional[str] = ..., total_resident_bytes: _Optional[int] = ..., total_fetch_bytes: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[StagePlan, _Mapping]]] = ..., dtype: _Optional[str] = ..., commit: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[DeviceCapacity, _Mapping]]] = ..., predicted_load_seconds: _Optional[float] = ..., load_bottleneck: _Optional[str] = ..., load_bottleneck_stage: _Optional[int] = ..., link_bytes_per_second: _Optional[float] = ..., link_is_measured: _Optional[bool] = ..., kv_tokens: _Optional[int] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class DeviceCapacity(_message.Message):
    __slots__ = ("node", "device", "capacity_bytes")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    node: str
    device: str
    capacity_bytes: int
    def __init__(self, node: _Optional[str] = ..., device: _Optional[str] = ..., capacity_bytes: _Optional[int] = ...) -> None: ...

class StagePlan(_message.Message):
    __slots__ = ("index", "node", "device", "first_layer", "last_layer", "resident_bytes", "fetch_bytes", "kv_bytes_per_token", "capacity_bytes", "modules", "workspace_bytes", "kv_bytes", "predicted_load_seconds", "kv_budget_bytes")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    index: int
    node: str
    device: str
    first_layer: int
    last_layer: int
    resident_bytes: int
    fetch_bytes: int
    kv_bytes_per_token: int
    capacity_bytes: int
    modules: _containers.RepeatedScalarFieldContainer[str]
    workspace_bytes: int
    kv_bytes: int
    predicted_load_seconds: float
    kv_budget_bytes: int
    def __init__(self, index: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., fetch_bytes: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., modules: _Optional[_Iterable[str]] = ..., workspace_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., predicted_load_seconds: _Optional[float] = ..., kv_budget_bytes: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "state", "plan", "residency", "config_json", "generation_config_json", "path", "reason", "load_seconds", "recoveries", "recovery_seconds", "adapters", "default_adapters", "moves", "drained_nodes", "quantization_config_json", "footprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    GENERATION_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    DRAINED_NODES_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    FOOTPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: ModelState
    plan: Plan
    residency: _containers.RepeatedCompositeFieldContainer[StageResidency]
    config_json: str
    generation_config_json: str
    path: str
    reason: str
    load_seconds: float
    recoveries: int
    recovery_seconds: float
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    default_adapters: _containers.RepeatedScalarFieldContainer[str]
    moves: int
    drained_nodes: _containers.RepeatedScalarFieldContainer[str]
    quantization_config_json: str
    footprint: Footprint
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., residency: _Optional[_Iterable[_Union[StageResidency, _Mapping]]] = ..., config_json: _Optional[str] = ..., generation_config_json: _Optional[str] = ..., path: _Optional[str] = ..., reason: _Optional[str] = ..., load_seconds: _Optional[float] = ..., recoveries: _Optional[int] = ..., recovery_seconds: _Optional[float] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., default_adapters: _Optional[_Iterable[str]] = ..., moves: _Optional[int] = ..., drained_nodes: _Optional[_Iterable[str]] = ..., quantization_config_json: _Optional[str] = ..., footprint: _Optional[_Union[Footprint, _Mapping]] = ...) -> None: ...

class Footprint(_message.Message):
    __slots__ = ("parameter_bytes", "buffer_bytes")
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUFFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    parameter_bytes: int
    buffer_bytes: int
    def __init__(self, parameter_bytes: _Optional[int] = ..., buffer_bytes: _Optional[int] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "path", "commit", "kind", "config_json", "stage_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    commit: str
    kind: str
    config_json: str
    stage_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., commit: _Optional[str] = ..., kind: _Optional[str] = ..., config_json: _Optional[str] = ..., stage_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("info", "source", "options", "seats", "adapters_json", "spec_json")
    INFO_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_JSON_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    info: ModelInfo
    source: ModelSource
    options: LoadOptions
    seats: _containers.RepeatedCompositeFieldContainer[StageSeat]
    adapters_json: _containers.RepeatedScalarFieldContainer[str]
    spec_json: str
    def __init__(self, info: _Optional[_Union[ModelInfo, _Mapping]] = ..., source: _Optional[_Union[ModelSource, _Mapping]] = ..., options: _Optional[_Union[LoadOptions, _Mapping]] = ..., seats: _Optional[_Iterable[_Union[StageSeat, _Mapping]]] = ..., adapters_json: _Optional[_Iterable[str]] = ..., spec_json: _Optional[str] = ...) -> None: ...

class StageSeat(_message.Message):
    __slots__ = ("placement_group", "bundle", "node", "node_id", "device", "gpus")
    PLACEMENT_GROUP_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    placement_group: str
    bundle: int
    node: str
    node_id: str
    device: str
    gpus: int
    def __init__(self, placement_group: _Optional[str] = ..., bundle: _Optional[int] = ..., node: _Optional[str] = ..., node_id: _Optional[str] = ..., device: _Optional[str] = ..., gpus: _Optional[int] = ...) -> None: ...

class StageResidency(_message.Message):
    __slots__ = ("stage", "measured_bytes", "modules", "fetched_bytes", "load")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MEASURED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    stage: int
    measured_bytes: int
    modules: _containers.RepeatedCompositeFieldContainer[ModuleResidency]
    fetched_bytes: int
    load: StageLoad
    def __init__(self, stage: _Optional[int] = ..., measured_bytes: _Optional[int] = ..., modules: _Optional[_Iterable[_Union[ModuleResidency, _Mapping]]] = ..., fetched_bytes: _Optional[int] = ..., load: _Optional[_Union[StageLoad, _Mapping]] = ...) -> None: ...

class StageLoad(_message.Message):
    __slots__ = ("seconds", "cached_bytes", "phases", "bottleneck", "link", "connections")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    BOTTLENECK_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    cached_bytes: int
    phases: _containers.RepeatedCompositeFieldContainer[PhaseTime]
    bottleneck: str
    link: str
    connections: int
    def __init__(self, seconds: _Optional[float] = ..., cached_bytes: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[PhaseTime, _Mapping]]] = ..., bottleneck: _Optional[str] = ..., link: _Optional[str] = ..., connections: _Optional[int] = ...) -> None: ...

class PhaseTime(_message.Message):
    __slots__ = ("name", "seconds", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    bytes: int
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ..., bytes: _Optional[int] = ...) -> None: ...

class ModuleResidency(_message.Message):
    __slots__ = ("module", "dtype", "bytes", "device")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    module: str
    dtype: str
    bytes: int
    device: str
    def __init__(self, module: _Optional[str] = ..., dtype: _Optional[str] = ..., bytes: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("model", "name", "source")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    source: ModelSource
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., source: _Optional[_Union[ModelSource, _Mapping]] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...

class DeleteAdapterRequest(_message.Message):
    __slots__ = ("model", "name")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class DeleteAdapterResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...

class CachedPart(_message.Message):
    __slots__ = ("node", "key", "bytes", "used_unix_s", "about_json", "quantization")
    NODE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    ABOUT_JSON_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    node: str
    key: str
    bytes: int
    used_unix_s: float
    about_json: str
    quantization: str
    def __init__(self, node: _Optional[str] = ..., key: _Optional[str] = ..., bytes: _Optional[int] = ..., used_unix_s: _Optional[float] = ..., about_json: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class ListCachedPartsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCachedPartsResponse(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[CachedPart]
    def __init__(self, parts: _Optional[_Iterable[_Union[CachedPart, _Mapping]]] = ...) -> None: ...

class ClearCachedPartsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClearCachedPartsResponse(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class DescribeClusterRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class DescribeClusterResponse(_message.Message):
    __slots__ = ("cluster",)
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    cluster: ClusterView
    def __init__(self, cluster: _Optional[_Union[ClusterView, _Mapping]] = ...) -> None: ...

class WatchClusterRequest(_message.Message):
    __slots__ = ("model", "interval_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    interval_s: float
    def __init__(self, model: _Optional[str] = ..., interval_s: _Optional[float] = ...) -> None: ...

class WatchClusterResponse(_message.Message):
    __slots__ = ("cluster",)
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    cluster: ClusterView
    def __init__(self, cluster: _Optional[_Union[ClusterView, _Mapping]] = ...) -> None: ...

class ClusterView(_message.Message):
    __slots__ = ("unix_s", "nodes", "models", "events")
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    nodes: _containers.RepeatedCompositeFieldContainer[NodeView]
    models: _containers.RepeatedCompositeFieldContainer[ModelView]
    events: _containers.RepeatedCompositeFieldContainer[ClusterEvent]
    def __init__(self, unix_s: _Optional[float] = ..., nodes: _Optional[_Iterable[_Union[NodeView, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelView, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[ClusterEvent, _Mapping]]] = ...) -> None: ...

class NodeView(_message.Message):
    __slots__ = ("node", "alive", "devices", "is_head")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    IS_HEAD_FIELD_NUMBER: _ClassVar[int]
    node: str
    alive: bool
    devices: _containers.RepeatedCompositeFieldContainer[DeviceView]
    is_head: bool
    def __init__(self, node: _Optional[str] = ..., alive: _Optional[bool] = ..., devices: _Optional[_Iterable[_Union[DeviceView, _Mapping]]] = ..., is_head: _Optional[bool] = ...) -> None: ...

class DeviceView(_message.Message):
    __slots__ = ("device", "total_bytes", "free_bytes", "name")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    device: str
    total_bytes: int
    free_bytes: int
    name: str
    def __init__(self, device: _Optional[str] = ..., total_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class ModelView(_message.Message):
    __slots__ = ("name", "state", "reason", "path", "quantization", "stages", "recoveries", "recovery_seconds", "load_seconds", "sessions_running", "sessions_waiting", "max_sessions", "reserved_tokens", "kv_tokens", "generated_tokens", "tokens_per_second")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: ModelState
    reason: str
    path: str
    quantization: str
    stages: _containers.RepeatedCompositeFieldContainer[StageView]
    recoveries: int
    recovery_seconds: float
    load_seconds: float
    sessions_running: int
    sessions_waiting: int
    max_sessions: int
    reserved_tokens: int
    kv_tokens: int
    generated_tokens: int
    tokens_per_second: float
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., reason: _Optional[str] = ..., path: _Optional[str] = ..., quantization: _Optional[str] = ..., stages: _Optional[_Iterable[_Union[StageView, _Mapping]]] = ..., recoveries: _Optional[int] = ..., recovery_seconds: _Optional[float] = ..., load_seconds: _Optional[float] = ..., sessions_running: _Optional[int] = ..., sessions_waiting: _Optional[int] = ..., max_sessions: _Optional[int] = ..., reserved_tokens: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ...) -> None: ...

class StageView(_message.Message):
    __slots__ = ("index", "node", "device", "first_layer", "last_layer", "resident_bytes", "workspace_bytes", "kv_bytes", "kv_budget_bytes", "sessions", "answers", "progress")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    index: int
    node: str
    device: str
    first_layer: int
    last_layer: int
    resident_bytes: int
    workspace_bytes: int
    kv_bytes: int
    kv_budget_bytes: int
    sessions: int
    answers: bool
    progress: StageProgress
    def __init__(self, index: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., workspace_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_budget_bytes: _Optional[int] = ..., sessions: _Optional[int] = ..., answers: _Optional[bool] = ..., progress: _Optional[_Union[StageProgress, _Mapping]] = ...) -> None: ...

class ClusterEvent(_message.Message):
    __slots__ = ("unix_s", "kind", "model", "text", "count")
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    kind: str
    model: str
    text: str
    count: int
    def __init__(self, unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNodesResponse(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeInfo]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeInfo, _Mapping]]] = ...) -> None: ...

class NodeInfo(_message.Message):
    __slots__ = ("name", "node_id", "hostname", "drained", "by_ray", "stages")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    BY_RAY_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    name: str
    node_id: str
    hostname: str
    drained: bool
    by_ray: bool
    stages: _containers.RepeatedCompositeFieldContainer[StageAt]
    def __init__(self, name: _Optional[str] = ..., node_id: _Optional[str] = ..., hostname: _Optional[str] = ..., drained: _Optional[bool] = ..., by_ray: _Optional[bool] = ..., stages: _Optional[_Iterable[_Union[StageAt, _Mapping]]] = ...) -> None: ...

class StageAt(_message.Message):
    __slots__ = ("model", "stage", "node", "device")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    model: str
    stage: int
    node: str
    device: str
    def __init__(self, model: _Optional[str] = ..., stage: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class DrainNodeRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class DrainNodeResponse(_message.Message):
    __slots__ = ("moving", "moved", "drained")
    MOVING_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    moving: StageMove
    moved: StageMove
    drained: NodeInfo
    def __init__(self, moving: _Optional[_Union[StageMove, _Mapping]] = ..., moved: _Optional[_Union[StageMove, _Mapping]] = ..., drained: _Optional[_Union[NodeInfo, _Mapping]] = ...) -> None: ...

class StageMove(_message.Message):
    __slots__ = ("model", "stage", "from_node", "from_device", "to_node", "to_device", "seconds", "pause_seconds")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FROM_NODE_FIELD_NUMBER: _ClassVar[int]
    FROM_DEVICE_FIELD_NUMBER: _ClassVar[int]
    TO_NODE_FIELD_NUMBER: _ClassVar[int]
    TO_DEVICE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    stage: int
    from_node: str
    from_device: str
    to_node: str
    to_device: str
    seconds: float
    pause_seconds: float
    def __init__(self, model: _Optional[str] = ..., stage: _Optional[int] = ..., from_node: _Optional[str] = ..., from_device: _Optional[str] = ..., to_node: _Optional[str] = ..., to_device: _Optional[str] = ..., seconds: _Optional[float] = ..., pause_seconds: _Optional[float] = ...) -> None: ...

class UndrainNodeRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class UndrainNodeResponse(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: NodeInfo
    def __init__(self, node: _Optional[_Union[NodeInfo, _Mapping]] = ...) -> None: ...

class DiagnoseClusterRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DiagnoseClusterResponse(_message.Message):
    __slots__ = ("version", "findings")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    version: str
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    def __init__(self, version: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("check", "node", "verdict", "finding", "remedy")
    CHECK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    FINDING_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    check: str
    node: str
    verdict: Verdict
    finding: str
    remedy: str
    def __init__(self, check: _Optional[str] = ..., node: _Optional[str] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., finding: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...
