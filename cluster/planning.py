"""Checkpoint + devices + options → plan and the specs of its stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..proto.v1.errors import InvalidRequestError, TensorMismatchError, UnsupportedModelError, one_line
from ..proto.v1.tls import TLS
from ..worker.code_spec import CodeSpec, needs_code
from ..worker.generation_config import generation_config_of
from ..worker.own_form import Question
from ..worker.records import HubToken
from ..worker.remote_code import find_code, import_code
from ..worker.spec import SessionLimits, StageSpec
from .checkpoint import Checkpoint, CheckpointRequest, read_checkpoint
from .config_limits import check_config
from .devices import Device, as_seen_by_worker
from .layout import Layout, attention_to_plan_with, lay_out, resolve_dtype
from .overrides import override
from .plan import Plan, PlanOptions, make_plan
from .quantized import Quantized, kept, own_form, settle, unpacked
from .selfcheck import unlisted_anatomy

# Whether a packed model can stay packed wherever it may be placed: "" for yes, else why not. `cluster.own_forms` asks
# nodes.
CanKeep = Callable[[Question], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How the user wants the model itself: the arguments of `from_pretrained` that change what is computed.

    quantize_experts: None to decide by the model. requantize: quantize anew what is quantized in the checkpoint.
    dequantize: unpack what the checkpoint has packed, whether or not it could stay so.
    """

    dtype: str = "auto"
    quantization: Mapping[str, Any] | None = None
    quantize_experts: bool | None = None
    requantize: bool = False
    dequantize: bool = False
    attn_implementation: str | None = None
    config: Mapping[str, Any] | None = None
    config_overrides: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """How workers bring their parts in; what comes out is the same. As in StageSpec."""

    budget_bytes: int = 512 << 20
    connections: int = 4
    use_cache: bool = True
    trace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How sessions are let in and computed, as in SessionLimits and StageSpec."""

    max_sessions: int = SessionLimits().max_sessions
    max_waiting: int = SessionLimits().max_waiting
    idle_timeout_s: float = SessionLimits().idle_timeout_s
    use_batches: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlinedModel:
    """A checkpoint's outline: all that can be known without knowing the devices."""

    request: CheckpointRequest
    checkpoint: Checkpoint
    layout: Layout
    options: ModelOptions
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    quantized: Quantized
    code: CodeSpec | None = None

    def spread(self, options: PlanOptions, devices: Sequence[Device]) -> PlannedModel:
        """Lays the model over `devices`. Raises InvalidRequestError, InvalidDeviceMapError and OutOfMemoryError."""
        if not devices:
            raise InvalidRequestError("the cluster has no device to load onto")
        commit = self.checkpoint.source.commit
        return PlannedModel(
            outlined=self, plan=make_plan(self.request.path, commit, self.layout.outline, devices, options)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A plan with all that its workers need to be told."""

    outlined: OutlinedModel
    plan: Plan

    def specs(
        self,
        name: str,
        load_id: str,
        secret: str,
        transfer: TransferOptions | None = None,
        serving: ServingOptions | None = None,
        tls: TLS | None = None,
    ) -> list[StageSpec]:
        """One spec for each stage, in order."""
        model = self.outlined
        transfer = transfer or TransferOptions()
        serving = serving or ServingOptions()
        limits = SessionLimits(
            max_sessions=serving.max_sessions,
            max_waiting=serving.max_waiting,
            kv_tokens=self.plan.kv_tokens,
            idle_timeout_s=serving.idle_timeout_s,
            rooms=tuple((stage.room_bytes, stage.kv_bytes_per_token) for stage in self.plan.stages),
        )
        specs = []
        on_processors = Counter(_machine(stage.device) for stage in self.plan.stages if stage.device.kind == "cpu")
        for index, stage in enumerate(self.plan.stages):
            records = model.layout.records_of(stage.cut, model.checkpoint.records)
            specs.append(
                StageSpec(
                    model=name,
                    load_id=load_id,
                    index=index,
                    num_stages=len(self.plan.stages),
                    device=as_seen_by_worker(stage.device.kind),
                    shares_cores=on_processors[_machine(stage.device)] > 1,
                    cut=stage.cut,
                    source=model.checkpoint.source,
                    records=records,
                    versions={record.file: model.checkpoint.versions[record.file] for record in records},
                    config=model.config,
                    generation_config=model.generation_config,
                    quantization=model.quantized.quantization,
                    dtype=self.plan.outline.dtype,
                    attn_implementation=model.options.attn_implementation,
                    secret=secret,
                    budget_bytes=transfer.budget_bytes,
                    connections=transfer.connections,
                    use_cache=transfer.use_cache,
                    trace=transfer.trace,
                    quantize_experts=model.layout.quantize_experts,
                    packing=model.quantized.packing,
                    keep_packing=model.quantized.keep_packing,
                    limits=limits,
                    use_batches=serving.use_batches,
                    anatomy=model.layout.anatomy if model.layout.is_unlisted else None,
                    code=model.code,
                    trust_remote_code=model.request.trust_remote_code,
                    tls=tls,
                )
            )
        return specs


def _machine(device: Device) -> str:
    return device.host or device.node


def outline_model(
    request: CheckpointRequest, token: HubToken, options: ModelOptions, can_keep: CanKeep | None = None
) -> OutlinedModel:
    """Reads config and headers. Raises whatever of shardlift's errors stands against the checkpoint.

    can_keep: None to unpack whatever is packed.
    """
    checkpoint = read_checkpoint(request, token)
    generation = generation_config_of(checkpoint.generation_config, checkpoint.config)
    config = dict(options.config if options.config else checkpoint.config)
    check_config({**config, **(options.config_overrides or {})})
    code = None
    if request.trust_remote_code and needs_code(config):
        found = find_code(checkpoint.source, token, config)
        code = import_code(found, checkpoint.source, token)
    config = override(config, options.config_overrides or {}, code)
    dtype = resolve_dtype(options.dtype, config, checkpoint.records)
    attention = attention_to_plan_with(options.attn_implementation)
    unlisted = unlisted_anatomy(config, dtype=dtype, attn_implementation=attention, code=code)
    quantized = settle(config, options.quantization, requantize=options.requantize, dequantize=options.dequantize)
    if options.dequantize and quantized.packing is None:
        raise InvalidRequestError(
            "dequantize=True unpacks GPTQ, AWQ, FP8, MXFP4 and compressed-tensors, but the checkpoint is none of them: "
            "leave it out"
        )

    def laid_out(settled: Quantized) -> Layout:
        return lay_out(
            settled.config,
            checkpoint.records,
            dtype=dtype,
            quantization=settled.quantization,
            attn_implementation=options.attn_implementation,
            quantize_experts=options.quantize_experts,
            packing=settled.packing,
            anatomy=unlisted,
            code=code,
            keep_packing=settled.keep_packing,
        )

    own = own_form(config, options.quantization, dequantize=options.dequantize)
    layout = None
    if own is not None and can_keep is not None and quantized.packing is not None and not options.quantize_experts:
        why_not = "the model is one of the checkpoint's own code" * (code is not None) or can_keep(
            Question(config=own, dtype=dtype, attn_implementation=attention, device="")
        )
        if not why_not:
            try:
                layout = laid_out(kept(quantized, own))
            except (InvalidRequestError, TensorMismatchError, UnsupportedModelError) as error:
                # What transformers itself couldn't load whole: a mixture's experts in GPTQ, say.
                why_not = f"transformers' quantizer has no place for them: {one_line(error)}"
        quantized = unpacked(quantized, why_not) if layout is None else kept(quantized, own)
    layout = layout or laid_out(quantized)
    layout = replace(layout, outline=replace(layout.outline, notes=(*quantized.notes, *layout.outline.notes)))
    return OutlinedModel(
        request=request,
        checkpoint=checkpoint,
        layout=layout,
        options=options,
        config=quantized.config,
        generation_config=generation,
        quantized=quantized,
        code=None if code is None else code.spec,
    )


def plan_model(
    request: CheckpointRequest,
    token: HubToken,
    options: ModelOptions,
    spread: PlanOptions,
    devices: Sequence[Device],
    can_keep: CanKeep | None = None,
) -> PlannedModel:
    """A plan, from headers to stages, for devices that are known beforehand."""
    return outline_model(request, token, options, can_keep).spread(spread, devices)
