"""Adapters on a model, or on one stage of it. The one file that touches peft.

What an adapter is, where it goes, and what its file's tensors become is peft's to say: it is asked on the whole model,
on the meta device (`outline_adapter`), and a stage injects just what was found there (`StageAdapters`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from torch import nn

from ..proto.v1.errors import (
    InvalidRequestError,
    ShardliftError,
    TensorMismatchError,
    UnsupportedModelError,
    one_line,
)
from .adapter_spec import AdapterSpec
from .anatomy import Anatomy, Cut, Place, place_of
from .records import DTYPES, TensorRecord
from .spec import ModuleBytes
from .tensors import dtype_by_name, dtype_name

if TYPE_CHECKING:
    from .skeleton import Skeleton

logger = logging.getLogger(__name__)

# Kinds that come out on stages as peft has them on the whole model, to the bit: tests/test_adapters.py.
KINDS = frozenset(
    {
        *("LORA", "ADALORA", "LOHA", "LOKR", "GLORA", "GRALORA", "HIRA", "DELORA", "MISS"),
        *("BOFT", "OFT", "HRA", "IA3", "BEFT", "LN_TUNING", "C3A", "FOURIERFT", "TRAINABLE_TOKENS"),
    }
)

# As peft's own prefix of an adapter's keys.
_PREFIX = "base_model.model."
# Ways to begin LoRA that take something out of the base's weights, and do it again when they are loaded.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# What peft then does at each pass, or to the model, that a stage by itself can't.
_UNSUPPORTED_FIELDS = ("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config")
# Rows of an embedding, or a head, that are trained, by module.
_TOKENS = "trainable_token_indices"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def check_adapter_name(name: str) -> str:
    """`name`, if peft can call an adapter that. Raises InvalidRequestError."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:80]!r} can't be an adapter's name: use up to 63 letters, digits, '_' and '-', beginning with a "
            "letter or digit"
        )
    if hasattr(nn.ModuleDict(), name) or "weight".startswith(name) or name == "bias":
        raise InvalidRequestError(f"{name!r} can't be an adapter's name: torch has something else of that name")
    return name


def check_adapter_config(config: Mapping[str, Any], path: str) -> str:
    """The adapter's kind. Raises UnsupportedModelError, by name, for what stages can't have."""
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{path} is an adapter of kind {kind[:40]}, which can't be attached to the stages of a model; those that "
            f"can: {', '.join(sorted(KINDS))}"
        )
    for name in _UNSUPPORTED_FIELDS:
        if config.get(name):
            raise UnsupportedModelError(f"{path} is an adapter with {name}, which can't be attached to stages")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UnsupportedModelError(
            f"{path} is an adapter with init_lora_weights={start!r}, which changes the base's own weights: save it "
            "with path_initial_model_for_weight_conversion, as peft's documentation has it, and load what comes out"
        )
    return kind


def check_peft() -> None:
    """Raises UnsupportedModelError where peft isn't installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UnsupportedModelError(
            f"adapters need peft on every node, and here it can't be imported ({one_line(error, 200)}): "
            "pip install 'shardlift[adapters]'"
        ) from None


# ---- on the whole model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOutline:
    """What an adapter becomes on the whole model: the fields of AdapterSpec of the same names, and the bytes of each
    parameter with its place, and whether what is tied to that has them, too."""

    patterns: Mapping[str, Any]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    tied: Mapping[str, str]
    sizes: tuple[tuple[Place, int, bool], ...]

    def bytes_of(self, cut: Cut) -> int:
        """Device bytes on the stage of `cut`."""
        return sum(size for place, size, tied in self.sizes if place.held_by(cut, tied=tied))


def outline_adapter(
    skeleton: Skeleton, name: str, config: Mapping[str, Any], records: Sequence[TensorRecord], path: str
) -> AdapterOutline:
    """Injects the adapter into `skeleton`, the whole model on the meta device and not quantized, which is used up.

    Raises InvalidRequestError for a config that doesn't go with the model, TensorMismatchError for tensors that it
    lacks, has too many, or wants in another shape.
    """
    model, anatomy = skeleton.model, skeleton.anatomy
    if config.get("ensure_weight_tying") and skeleton.head_is_tied:
        raise UnsupportedModelError(f"{path} is an adapter with ensure_weight_tying, which stages can't keep")
    tensors = {
        record.key: torch.empty(record.shape, dtype=dtype_by_name(DTYPES[record.dtype][0]), device="meta")
        for record in records
    }
    before = {id(tensor) for _, tensor in _all_tensors(model)}
    own, others = _apart(model, tensors, config.get("modules_to_save") or ())
    for key, parameter in own.items():
        if tensors[key].shape != parameter.shape:
            raise TensorMismatchError(
                f"{path} holds {key} of shape {list(tensors[key].shape)}, the base has {list(parameter.shape)}: an "
                "adapter of another base, or of one whose vocabulary was resized"
            )
    parsed = _parse(config, path)
    with _peft_errors(f"{path} doesn't go with this model"):
        tuner = _inject(model, parsed, name, is_empty=True)
        _set_tensors(model, name, others, path)
    modules = tuple(dict.fromkeys(tuner.targeted_module_names))
    new = [(each, tensor) for each, tensor in _all_tensors(model) if id(tensor) not in before]
    layers = dict(_token_layers(model, name))
    tied = {
        source: path
        for path, layer in layers.items()
        for source, other in layers.items()
        if layer.tied_adapter is other
    }
    sizes = [
        (
            place_of(_clean(each), anatomy),
            tensor.numel() * tensor.element_size(),
            any(each.startswith(f"{source}.") for source in tied),
        )
        for each, tensor in new
    ]
    sizes += [
        (place_of(_strip(key), anatomy), parameter.numel() * parameter.element_size(), False)
        for key, parameter in own.items()
        if key.endswith(".bias")
    ]
    patterns = {
        each: getattr(parsed, each) for each in ("rank_pattern", "alpha_pattern") if getattr(parsed, each, None)
    }
    if getattr(parsed, _TOKENS, None) is not None:
        patterns[_TOKENS] = {
            path: list(layer.token_indices[name]) for path, layer in layers.items() if not layer.tied_adapter
        }
    return AdapterOutline(
        patterns=patterns,
        modules=modules,
        parameters=tuple(dict.fromkeys(tuner.targeted_parameter_names)),
        saved=tuple(_saved(model, name, whole=True)),
        tied=tied,
        sizes=tuple(sizes),
    )


# ---- on a stage ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Override:
    """A bias of the base's that an adapter has trained: in its place while the adapter is active."""

    module: nn.Module
    name: str
    base: nn.Parameter
    own: nn.Parameter

    def put(self, *, own: bool) -> None:
        self.module._parameters[self.name] = self.own if own else self.base


@dataclass(slots=True)
class _Loaded:
    prefix: str
    saved: tuple[str, ...] = ()
    overrides: list[_Override] = field(default_factory=list)


class StageAdapters:
    """The adapters of one stage's model, and which of them compute. All methods are for the thread that computes.

    Without an adapter the model is as it was loaded; peft is not even imported.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, cut: Cut, device: torch.device) -> None:
        self._model, self._anatomy, self._cut, self._device = model, anatomy, cut, device
        self._loaded: dict[str, _Loaded] = {}
        # Each layer of peft's with the adapters that it has.
        self._layers: list[tuple[Any, frozenset[str]]] = []
        self.active: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def check(self, names: Sequence[str]) -> None:
        """Raises InvalidRequestError for a choice of adapters that can't be met."""
        if unknown := [name for name in names if name not in self._loaded]:
            raise InvalidRequestError(
                f"the model has no adapter {unknown[0]!r}; loaded: {', '.join(self._loaded) or 'none'}"
            )
        if len(set(names)) < len(names):
            raise InvalidRequestError(f"adapters {list(names)}: name each once")
        changing = [name for name in names if self._loaded[name].overrides]
        if len(changing) > 1:
            raise InvalidRequestError(
                f"adapters {changing} each bring biases of their own, of which one can count: use them one at a time"
            )
        saved = Counter(path for name in names for path in self._loaded[name].saved)
        if twice := [path for path, count in saved.items() if count > 1]:
            raise InvalidRequestError(
                f"adapters {list(names)} each bring a whole {twice[0]}, of which one can count: use them one at a time"
            )

    def use(self, names: tuple[str, ...]) -> None:
        """Has what follows computed with these adapters, in this order; with none, by the base alone."""
        if names == self.active:
            return
        self.check(names)
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer, has in self._layers:
            own = [name for name in names if name in has]
            if isinstance(layer, BaseTunerLayer):
                # A layer that these leave alone computes what the base computes, whatever its kind makes of nothing.
                layer.enable_adapters(bool(own))
            if own or not isinstance(layer, BaseTunerLayer):
                layer.set_adapter(own, inference_mode=True)
        for name in self.active:
            for override in self._loaded[name].overrides if name in self._loaded else ():
                override.put(own=False)
        for name in names:
            for override in self._loaded[name].overrides:
                override.put(own=True)
        self.active = names

    def records(self, spec: AdapterSpec) -> tuple[TensorRecord, ...]:
        """Those of the adapter's tensors that belong to this stage."""
        alone = self._tied_alone(spec)
        return tuple(
            record
            for record in spec.records
            if self._holds(_strip(record.key)) or _tied_key(record.key, alone) is not None
        )

    def load(self, spec: AdapterSpec, tensors: Mapping[str, torch.Tensor]) -> tuple[ModuleBytes, ...]:
        """Attaches the stage's part of an adapter; gives what it holds. What fails leaves nothing behind.

        tensors: those of `records`, by their keys, in host memory.
        """
        assert spec.name not in self._loaded
        check_peft()
        self.use(())
        before = {id(tensor) for _, tensor in _all_tensors(self._model)}
        try:
            loaded = self._inject(spec, tensors)
            self._loaded[spec.name] = loaded
            self._note_layers()
            # peft has made it the active one.
            self.active = (spec.name,)
            self.use(())
        except BaseException:
            self._take_off(spec.name)
            raise
        new = [(name, tensor) for name, tensor in _all_tensors(self._model) if id(tensor) not in before]
        new += [(f"{spec.name}.{each.name}", each.own) for each in loaded.overrides]
        return tuple(
            ModuleBytes(
                module=name.removesuffix(".weight"),
                dtype=dtype_name(tensor.dtype),
                size_bytes=tensor.untyped_storage().nbytes(),
                device=str(tensor.device),
            )
            for name, tensor in new
        )

    def remove(self, name: str) -> None:
        """Takes an adapter off, and what peft has put around the base's modules where none is left. Twice is as good
        as once."""
        if name in self._loaded:
            if name in self.active:
                self.use(())
            self._take_off(name)

    def base_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As the model's `named_modules` without adapters: each module of the base by its path there."""
        if not self._loaded:
            return self._model.named_modules()
        return _base_modules("", self._model)

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Within it, the base's modules hold nothing but the base's own."""
        overrides = [override for name in self.active for override in self._loaded[name].overrides]
        for override in overrides:
            override.put(own=False)
        try:
            yield
        finally:
            for override in overrides:
                override.put(own=True)

    def _holds(self, path: str) -> bool:
        return place_of(path, self._anatomy).held_by(self._cut, tied=False)

    def _tied_alone(self, spec: AdapterSpec) -> dict[str, str]:
        """Of `spec.tied` what this stage has without what it is tied to: it gets a copy."""
        return {source: path for source, path in spec.tied.items() if self._holds(path) and not self._holds(source)}

    def _inject(self, spec: AdapterSpec, tensors: Mapping[str, torch.Tensor]) -> _Loaded:
        model, alone = self._model, self._tied_alone(spec)
        tensors = {_tied_key(key, alone) or key: tensor for key, tensor in tensors.items()}
        own, others = _apart(model, tensors, spec.saved)
        loaded = _Loaded(prefix="", overrides=list(self._overrides(own, tensors, spec)))
        config = _parse({**spec.config, **spec.patterns}, spec.path)
        modules = {path for path in spec.modules if self._holds(path)}
        modules |= {path for source, path in alone.items() if source in spec.modules}
        parameters = {path for path in spec.parameters if self._holds(path)}
        saved = [path for path in spec.saved if self._holds(path)]
        for path in saved:
            weight = getattr(model.get_submodule(path), "weight", None)
            if isinstance(weight, (Params4bit, Int8Params)):
                raise UnsupportedModelError(
                    f"{spec.path} brings a whole {path}, which is quantized here: load the base with {path} in "
                    "llm_int8_skip_modules"
                )
        rows: dict[str, Any] = getattr(config, _TOKENS, None) or {}
        places = {path: alone.get(path, path) for path in rows}
        tokens = {place: rows[path] for path, place in places.items() if self._holds(place)}
        if not (modules or parameters or saved or tokens):
            return loaded
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
        from peft.utils.constants import DUMMY_TARGET_MODULES

        loaded.prefix, loaded.saved = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type], tuple(saved)
        # Found on the whole model: nothing is left to choose.
        config.target_modules = modules if modules or parameters else DUMMY_TARGET_MODULES
        for name, value in (
            ("target_parameters", sorted(parameters) or None),
            ("layers_to_transform", None),
            ("layers_pattern", None),
            ("exclude_modules", None),
            ("modules_to_save", saved or None),
        ):
            if hasattr(config, name):
                setattr(config, name, value)
        if hasattr(config, _TOKENS):
            setattr(config, _TOKENS, tokens or None)
        with _peft_errors(f"{spec.path} can't be attached"), _unsaved(model), self._untied():
            _inject(model, config, spec.name, is_empty=False)
            _set_tensors(model, spec.name, others, spec.path)
        # What peft adds begins in training mode, with its dropout.
        model.train(model.training)
        return loaded

    @contextlib.contextmanager
    def _untied(self) -> Iterator[None]:
        """Within it, peft doesn't tie what it puts on the embedding to a head that isn't here, or the other way."""
        config: Any = self._model.config
        tied = getattr(config, "tie_word_embeddings", False)
        if tied and not (self._cut.is_first and self._cut.is_last):
            config.tie_word_embeddings = False
        try:
            yield
        finally:
            if tied:
                config.tie_word_embeddings = tied

    def _overrides(
        self, own: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor], spec: AdapterSpec
    ) -> Iterator[_Override]:
        for key, parameter in own.items():
            if isinstance(parameter, (Params4bit, Int8Params)):
                raise UnsupportedModelError(f"{spec.path} holds {key}, which is quantized here and can't be compared")
            value = tensors[key].to(device=self._device, dtype=parameter.dtype)
            if torch.equal(value, parameter.detach()):
                continue  # peft saves some of the base's tensors just in case
            if not key.endswith(".bias"):
                raise TensorMismatchError(
                    f"{spec.path} holds {key} other than the base has it: an adapter of another base, or one that "
                    "would change this one for everybody"
                )
            path, _, name = _strip(key).rpartition(".")
            module = self._model.get_submodule(path)
            base_layer = getattr(module, "get_base_layer", None)
            if base_layer is not None:
                module = base_layer()
            yield _Override(module, name, parameter, nn.Parameter(value, requires_grad=False))

    def _note_layers(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self._layers = [
            (module, frozenset(module._get_available_adapters()))
            for module in self._model.modules()
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]

    def _take_off(self, name: str) -> None:
        loaded = self._loaded.pop(name, None)
        self.active = ()
        if loaded is not None and not loaded.prefix:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        configs: dict[str, Any] = getattr(self._model, "peft_config", {})
        configs.pop(name, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in list(self._model.modules()):
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(name)
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    module.delete_adapter(name, new_active_adapters=None)
        _unwrap(self._model)
        if not configs and hasattr(self._model, "peft_config"):
            del self._model.peft_config
        self._note_layers()
        # peft chooses another one to be active; here requests do.
        self.active = ("",)
        self.use(())


def _base_modules(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_submodule("base_layer")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.get_submodule("original_module")
        else:
            break
    yield path, module
    for name, child in module.named_children():
        yield from _base_modules(f"{path}.{name}" if path else name, child)


def _unwrap(model: nn.Module) -> None:
    """Puts the base's modules back where no adapter is left around them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def inner(module: nn.Module) -> nn.Module:
        while True:
            if isinstance(module, BaseTunerLayer) and not module._get_available_adapters():
                module = module.get_submodule("base_layer")
            elif isinstance(module, AuxiliaryTrainingWrapper) and not module._get_available_adapters():
                module = module.get_submodule("original_module")
            else:
                return module

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (base := inner(child)) is not child:
                setattr(parent, name, base)


# ---- peft ------------------------------------------------------------------------------------------------------------


def _parse(config: Mapping[str, Any], path: str) -> Any:
    """peft's config object, for inference, which leaves the base's biases and weights alone."""
    check_peft()
    from peft import PeftConfig

    fields = {key: value for key, value in config.items() if key not in ("runtime_config", "loftq_config")}
    with _peft_errors(f"{path}/adapter_config.json is not valid"):
        parsed = PeftConfig.from_peft_type(**fields)
        parsed.inference_mode = True
        # What is trained of the base is this file's to put in place, and to take away again.
        for name, value in (("bias", "none"), ("init_lora_weights", False)):
            if hasattr(parsed, name):
                setattr(parsed, name, value)
        return parsed


def _inject(model: nn.Module, config: Any, name: str, *, is_empty: bool) -> Any:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype

    # `inject_adapter_in_model` does this, and keeps the tuner to itself, which knows what was targeted.
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name=name, low_cpu_mem_usage=is_empty)
    # As a PeftModel has it: adapters compute in 32 bits.
    cast_adapter_dtype(model, name)
    return tuner


@contextlib.contextmanager
def _unsaved(model: nn.Module) -> Iterator[None]:
    """Within it, the model's state dict has no 4-bit weights.

    On a CPU bitsandbytes keeps a weight repacked once it has computed with it, and would unpack it to save it, in
    place and not to the same values.
    """
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in packed:
        module.__dict__["_save_to_state_dict"] = lambda *arguments: None
    try:
        yield
    finally:
        for module in packed:
            del module.__dict__["_save_to_state_dict"]


def _set_tensors(model: nn.Module, name: str, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Raises TensorMismatchError unless every tensor has its place, and every place its tensor."""
    from peft import set_peft_model_state_dict

    saved = tuple(f"{each}." for each in _saved(model, name))
    # peft looks these up by their module's path.
    given = {key.removeprefix(_PREFIX) if _strip(key).startswith(saved) else key: tensors[key] for key in tensors}
    try:
        result: Any = set_peft_model_state_dict(model, given, adapter_name=name)
    except KeyError as error:
        raise TensorMismatchError(f"{path} has no tensor for {one_line(error)}") from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TensorMismatchError(f"{path} doesn't fit this model: {one_line(error)}") from None
    if result.unexpected_keys:
        raise TensorMismatchError(f"{path} holds {_some(result.unexpected_keys)}, which this model has no place for")
    # AdaLoRA's number of ranks follows from its config; peft doesn't save it.
    tied = tuple(f"{path}." for path, layer in _token_layers(model, name) if layer.tied_adapter)
    needed = [key for key in result.missing_keys if ".ranknum." not in key and not key.startswith(tied)]
    if missing := [key for key in needed if f".{name}." in key or key.endswith(f".{name}")]:
        raise TensorMismatchError(f"{path} has no tensor for {_some(missing)}")


def _saved(model: nn.Module, name: str, *, whole: bool = False) -> Iterator[str]:
    """Paths of the modules that the adapter has a copy of, `whole`, or of some of their rows too."""
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    kind = ModulesToSaveWrapper if whole else AuxiliaryTrainingWrapper
    for path, module in model.named_modules():
        if isinstance(module, kind) and name in module._get_available_adapters():
            yield path


def _token_layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The layers in which the adapter has trained some rows, by the path of the base's module."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for path, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer) and name in module.token_indices:
            yield path.removesuffix(".token_adapter"), module


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _apart(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], saved: Collection[str]
) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """Of an adapter's tensors those that are for a parameter of the base's own, with that; and the others.

    saved: modules, by path or the end of it, that the adapter has whole copies of.
    """
    base = {_clean(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    own, others = {}, {}
    for key, tensor in tensors.items():
        path = _strip(key)
        if any(f".{each}." in f".{path}" for each in saved):
            others[key] = tensor
        elif path in base and (".base_layer." in key or key.endswith(".bias")):
            own[key] = base[path]
        else:
            others[key] = tensor
    return own, others


def _strip(key: str) -> str:
    """The path in the base that a key of an adapter's file begins with."""
    return _clean(key.removeprefix(_PREFIX))


def _tied_key(key: str, tied: Mapping[str, str]) -> str | None:
    """The key with the path that is tied to its own; None for a key of nothing that is in `tied`."""
    path = key.removeprefix(_PREFIX)
    for source, other in tied.items():
        if path.startswith(f"{source}."):
            return key.removesuffix(path) + other + path.removeprefix(source)
    return None


def _clean(name: str) -> str:
    """A parameter's name as it was before peft put layers around its module."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


@contextlib.contextmanager
def _peft_errors(what: str) -> Iterator[None]:
    """peft's complaints in one line; what it warns of is nobody's to read here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ShardliftError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, re.error) as error:
        raise InvalidRequestError(f"{what}: {one_line(error)}") from error


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{ordered[0]} (and {len(ordered) - 1} more)" if len(ordered) > 1 else ordered[0]
