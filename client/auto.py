"""`AutoModelForCausalLM`, as transformers spells it, for models that live in a cluster."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from .config_files import generation_config_of
from .connection import connect_or_start
from .handle import RemoteModel
from .outside import outside_level
from .values import LoadEvent, LoadWarning

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig


class AutoModelForCausalLM:
    """Loads a checkpoint into a cluster with `from_pretrained`, which returns the handle for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            "AutoModelForCausalLM is designed to be instantiated using the "
            "`AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        quantization_config: BitsAndBytesConfig | Mapping[str, Any] | None = None,
        device_map: str | int | torch.device | Mapping[str, str | int | torch.device] | None = "auto",
        max_memory: Mapping[str | int, str | int] | None = None,
        num_stages: int | None = None,
        dtype: str | torch.dtype | Mapping[str, Any] | None = "auto",
        revision: str = "main",
        subfolder: str | os.PathLike[str] = "",
        variant: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | Mapping[str, str] | None = None,
        adapter_kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
        address: str | None = None,
        local_files_only: bool = False,
        experts_implementation: str | None = None,
        quantize_experts: bool | None = None,
        requantize: bool = False,
        dequantize: bool = False,
        staging_budget: int | str | None = None,
        connections: int | None = None,
        part_cache: bool = True,
        reserve_tokens: int | None = None,
        max_sessions: int | None = None,
        max_waiting: int | None = None,
        idle_timeout_s: float | None = None,
        batching: bool = True,
        trace: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> RemoteModel:
        """Loads a checkpoint into the cluster and returns its handle once every stage is resident.

        Args:
            pretrained_model_name_or_path: "org/name", a local folder, or a URL such as "s3://bucket/prefix".
            config: a config in place of the checkpoint's own, or where one is.
            quantization_config: a BitsAndBytesConfig, or a dict of its fields.
            device_map: "auto", "balanced", "balanced_low_0", "sequential", "cpu", or a dict from module to device.
            max_memory: from device to bytes, or to a text such as "20GiB".
            num_stages: how many stages; by default as many as the plan needs.
            dtype: a torch dtype, its name, or "auto" for the checkpoint's. `torch_dtype` is its older name.
            experts_implementation: how a mixture's experts are computed: "eager", "grouped_mm" (transformers' choice
                wherever torch can), "batched_mm". Experts in 4 bits are always computed one by one, as "eager" does.
            token: Hub token. By default this environment's, for a gateway on this machine alone; False for none.
            local_files_only: ask no Hub: of a repository, what the Hub's cache on each node holds.
            quantize_experts: whether a mixture's experts, too, are quantized to 4 bits: each tensor by itself, where
                transformers leaves them, merged, in 16 bits. By default with load_in_4bit, as far as the family and the
                checkpoint allow it; True insists on it, False has transformers' own outcome.
            requantize: quantize what a checkpoint holds quantized already (GPTQ, AWQ, FP8, MXFP4, compressed-tensors)
                anew, as `quantization_config` says. Without, such weights stay packed where transformers' own quantizer
                for them can compute on every node, and are unpacked to 16 bits where it can't.
            dequantize: unpack such weights in any case.
            staging_budget: memory of each worker for bytes on their way: a number, or "512MiB", the default.
            connections: reads at a time of each worker; by default 4.
            part_cache: whether nodes may read, and keep, their quantized parts on disk.
            reserve_tokens: tokens, of all sequences together, whose keys and values the plan leaves room for.
            max_sessions: sequence batches that run at a time; by default 64. More wait for their turn.
            max_waiting: how many may wait, before ModelBusyError; by default 256.
            idle_timeout_s: seconds after which a session that nothing comes for ends; by default 600.
            batching: whether steps of several requests are computed together. Without, a request's logits are those of
                one process to the bit, whatever else runs.
            trace: a file to write the timeline of the load to, in Chrome's trace format.
            name: the model's name in the registry; by default derived from the path.
            address: the gateway; else $SHARDLIFT_ADDRESS, else the local instance, which is started if need be.
            progress: whether to show progress on stderr; by default where it is a terminal.
            kwargs: attributes of the config to override. `generation_config` is the handle's to begin with, and with
                `output_loading_info=True` the result is the handle and, as transformers has it, a dict of what was
                missing or left over: empty sets, for what doesn't fit is refused here. What becomes of transformers'
                other arguments: docs/loading.md. Any other name is refused, as by transformers.

        Raises:
            ShardliftError: one of its subclasses says what was wrong and what to do about it. For an argument that
                nothing has it is an UnknownArgumentError, which is a TypeError, too.
        """
        with_info = kwargs.pop("output_loading_info", None)
        generation_config = kwargs.pop("generation_config", None)
        if generation_config is not None:
            generation_config = generation_config_of(generation_config)
        client = connect_or_start(address)
        arguments = {
            "name": name,
            "token": token,
            "config": config,
            "quantization_config": quantization_config,
            "quantize_experts": quantize_experts,
            "requantize": requantize,
            "dequantize": dequantize,
            "device_map": device_map,
            "max_memory": max_memory,
            "num_stages": num_stages,
            "dtype": dtype,
            "revision": revision,
            "subfolder": subfolder,
            "variant": variant,
            "cache_dir": cache_dir,
            "trust_remote_code": trust_remote_code,
            "local_files_only": local_files_only,
            "attn_implementation": attn_implementation,
            "experts_implementation": experts_implementation,
            "adapter_kwargs": adapter_kwargs,
            "staging_budget": staging_budget,
            "connections": connections,
            "part_cache": part_cache,
            "reserve_tokens": reserve_tokens,
            "max_sessions": max_sessions,
            "max_waiting": max_waiting,
            "idle_timeout_s": idle_timeout_s,
            "batching": batching,
            "trace": trace,
            **kwargs,
        }
        try:
            if not (sys.stderr.isatty() if progress is None else progress):
                model = client.load(pretrained_model_name_or_path, on_event=_warn, **arguments)
            else:
                from .render import LoadProgress

                with LoadProgress() as display:
                    model = client.load(pretrained_model_name_or_path, on_event=display.show, **arguments)
        except BaseException:
            client.close()
            raise
        if generation_config is not None:
            model.generation_config = generation_config
        # The pair is for who asks for it; everybody else's type checker is to see a handle.
        return cast(RemoteModel, (model, _loading_info())) if with_info else model


def _loading_info() -> dict[str, Any]:
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def _warn(event: LoadEvent) -> None:
    if isinstance(event, LoadWarning):
        warnings.warn(event.message, UserWarning, stacklevel=outside_level())
