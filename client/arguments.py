"""Arguments of transformers' from_pretrained that a load into a cluster has no use for, or can't meet, each with why.

Those that are taken are parameters of ours. docs/loading.md has the whole list; tests/test_arguments.py holds both to
transformers' own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..proto.v1.errors import InvalidRequestError
from .outside import outside_level

# What they ask for is so in any case, or is of no meaning here.
IGNORED = frozenset(
    {
        "low_cpu_mem_usage",
        "resume_download",
        "offload_state_dict",
        "disable_mmap",
        "tqdm_class",
        "mirror",
        "from_tf",
        "from_flax",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
        "_commit_hash",
    }
)

# What they ask for doesn't happen, and changes no answer: why, for a warning.
WARNED: Mapping[str, str] = {
    "force_download": "files are read from where they are, and none is kept: pass part_cache=False to have nodes' "
    "quantized parts made anew",
    "offload_folder": "nothing is offloaded: what doesn't fit on the devices is refused",
    "offload_buffers": "nothing is offloaded: what doesn't fit on the devices is refused",
}

# What would change the outcome, and the way to it here.
REFUSED: Mapping[str, str] = {
    "proxies": "set HTTPS_PROXY where the gateway and the nodes' Ray run, who read the files",
    "output_loading_info": "from_pretrained has it, load and plan have not",
    "ignore_mismatched_sizes": "no weight is left to chance: correct the config, or the checkpoint",
    "state_dict": "save it into a folder with save_pretrained, and load that",
    "gguf_file": "load a checkpoint of safetensors",
    "tp_plan": "layers are laid over devices whole: num_stages and device_map say how",
    "tp_size": "layers are laid over devices whole: num_stages and device_map say how",
    "device_mesh": "layers are laid over devices whole: num_stages and device_map say how",
    "distributed_config": "layers are laid over devices whole: num_stages and device_map say how",
    "key_mapping": "rename the checkpoint's tensors",
    "generation_config": "from_pretrained has it; or set the handle's generation_config",
    "code_revision": "the code is that of `revision`",
    "use_kernels": "kernels are those that torch, transformers and bitsandbytes bring",
    "kernel_config": "kernels are those that torch, transformers and bitsandbytes bring",
    "allow_all_kernels": "kernels are those that torch, transformers and bitsandbytes bring",
    "fusion_config": "modules are loaded as the model's family has them",
    "output_attentions": "attentions stay on the workers",
    "output_hidden_states": "hidden states stay on the workers",
}


def without_others(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` but those of these tables. Warns of what doesn't happen.

    Raises InvalidRequestError, by name, for what is asked for and can't be.
    """
    left = {}
    for name, value in arguments.items():
        is_asked = value is not None and value is not False
        if name in REFUSED and is_asked:
            raise InvalidRequestError(
                f"{name} is not supported when loading into a cluster: leave it out ({REFUSED[name]})"
            )
        if name == "use_safetensors" and value is False:
            raise InvalidRequestError(
                "use_safetensors=False is not supported: only safetensors are read, which `shardlift convert` makes"
            )
        if name == "weights_only" and value is False:
            raise InvalidRequestError("weights_only=False is not supported: nothing is unpickled, so leave it out")
        if name == "return_dict" and value is False:
            raise InvalidRequestError("return_dict=False is not supported for a whole model: pass it to each call")
        if name == "adapter_name" and value not in (None, "default"):
            raise InvalidRequestError(
                f"adapter_name={value!r} is not supported when loading a model by its adapter, which is then "
                "'default': load the base, and model.load_adapter(path, name)"
            )
        if name in WARNED and is_asked:
            warnings.warn(f"{name} is ignored: {WARNED[name]}", UserWarning, stacklevel=outside_level())
        if not (name in REFUSED or name in WARNED or name in IGNORED or name in _OWN_RULES):
            left[name] = value
    return left


_OWN_RULES = frozenset({"use_safetensors", "weights_only", "return_dict", "adapter_name"})
