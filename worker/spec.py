"""What the controller tells a worker to hold. Pure; goes through Ray and JSON.

Never contains a token: that is handed over with the call that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..proto.v1.tls import TLS
from .anatomy import Anatomy, Cut
from .code_spec import CodeSpec
from .packed import Packing
from .records import FileVersion, SourceSpec, TensorRecord
from .timeline import Phase

# However long a session asks to be kept without a word.
MOST_IDLE_S = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """What a model's last stage lets in.

    max_sessions run at a time, max_waiting wait for their turn, each for wait_s seconds at most. kv_tokens: tokens of
    all sessions together whose keys and values have room on every stage; 0 for no limit. idle_timeout_s: after which a
    session ends that nothing comes for; it gives up its place among those that run after idle_place_s. rooms: what each
    stage's device has for keys, values and computing, in bytes, and what a token's keys and values take there; none for
    no limit.
    """

    max_sessions: int = 64
    max_waiting: int = 256
    kv_tokens: int = 0
    idle_timeout_s: float = 600.0
    wait_s: float = 300.0
    idle_place_s: float = 1.0
    rooms: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """One stage of one load.

    load_id: unique to this load; tells a restarted controller which workers belong together.
    device: where the stage lives on its node: "cpu" or "cuda:<index as the worker sees it>". shares_cores: another
        stage of the model computes on the same machine's processors.
    config, generation_config, quantization: as JSON objects; dtype: a torch dtype's name.
    secret: shared by the stages of this load alone.
    budget_bytes: memory for checkpoint bytes that are fetched but not yet converted.
    quantize_experts: as for `skeleton.build_skeleton`. packing: how the checkpoint packs weights, which are unpacked
    before anything else; None where it doesn't, and where `config` says how it is quantized: by bitsandbytes, or, with
    keep_packing, by what transformers' quantizer for it then holds as it is.
    connections: reads at a time. use_cache: read and keep quantized parts on the node. trace: keep every span's times.
    limits: for sessions. use_batches: compute single-token steps of several sessions together.
    anatomy: of a family that isn't listed, as a self-check has found it. code: the checkpoint's own, with which
        the model was planned. trust_remote_code: whether its tokenizer's may run, too.
    tls: files on the node, the same paths on every one; None for plain text.
    log_format, log_level: of the worker's log lines (`worker.logs`).
    """

    model: str
    load_id: str
    index: int
    num_stages: int
    device: str
    cut: Cut
    source: SourceSpec
    records: tuple[TensorRecord, ...]
    versions: Mapping[str, FileVersion]
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    quantization: Mapping[str, Any] | None
    dtype: str
    attn_implementation: str | None
    secret: str
    shares_cores: bool = False
    budget_bytes: int = 512 << 20
    connections: int = 4
    use_cache: bool = True
    trace: bool = False
    quantize_experts: bool = False
    packing: Packing | None = None
    keep_packing: bool = False
    limits: SessionLimits = SessionLimits()
    use_batches: bool = True
    anatomy: Anatomy | None = None
    code: CodeSpec | None = None
    trust_remote_code: bool = False
    tls: TLS | None = None
    log_format: str = "text"
    log_level: str = "INFO"

    @property
    def fetch_bytes(self) -> int:
        return sum(record.size_bytes for record in self.records)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StageSpec:
        fields = dict(value)
        fields["cut"] = Cut(**fields["cut"])
        limits = fields["limits"]
        fields["limits"] = SessionLimits(**{**limits, "rooms": tuple(map(tuple, limits.get("rooms", ())))})
        if fields.get("anatomy") is not None:
            fields["anatomy"] = Anatomy.from_json(fields["anatomy"])
        if fields.get("code") is not None:
            fields["code"] = CodeSpec(**fields["code"])
        fields["tls"] = TLS(**fields["tls"]) if fields.get("tls") else None
        fields["source"] = SourceSpec(**fields["source"])
        fields["packing"] = Packing.from_json(fields["packing"]) if fields["packing"] else None
        fields["records"] = tuple(
            TensorRecord(**{**record, "shape": tuple(record["shape"])}) for record in fields["records"]
        )
        fields["versions"] = {name: FileVersion(**version) for name, version in fields["versions"].items()}
        return cls(**fields)

    def __repr__(self) -> str:
        # Not the records, of which there may be thousands, and not the secret.
        return f"StageSpec({self.model} stage {self.index} of {self.num_stages}, {self.cut}, {self.device})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleBytes:
    """What one module holds itself, without its children: `dtype` is "nf4", "fp4", "int8" or a torch dtype's name."""

    module: str
    dtype: str
    size_bytes: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a worker tells after its load.

    fetched_bytes: read from the source; 0 for a part that came from the node's cache, of which `cached_bytes` were
    read. link: what the bytes came over. bottleneck: the phase (`worker.timeline`) that the load waited for most.
    connections: reads at a time; "fetch" sums their seconds. pid: of the worker's process. parameter_bytes and
    buffer_bytes: as transformers counts a model's footprint.
    """

    address: str
    fetched_bytes: int
    cached_bytes: int
    modules: tuple[ModuleBytes, ...]
    seconds: float
    phases: tuple[Phase, ...]
    link: str
    bottleneck: str
    connections: int
    pid: int = 0
    parameter_bytes: int = 0
    buffer_bytes: int = 0

    @property
    def measured_bytes(self) -> int:
        return sum(module.size_bytes for module in self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """How far a load is.

    total_bytes: what will be fetched, or read from the cache if `is_cached`. loaded_bytes: of it, what is converted.
    """

    fetched_bytes: int
    total_bytes: int
    loaded_bytes: int
    tensors_loaded: int
    tensors: int
    is_cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPart:
    """A quantized part in a node's cache. used_s: when it was last used, in seconds since 1970. about: what it is."""

    key: str
    size_bytes: int
    used_s: float
    about: Mapping[str, Any]
