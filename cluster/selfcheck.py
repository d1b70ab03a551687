"""Whether a family that isn't listed can be cut into stages: tried out on a small model of its own config.

The small model (`cluster.shrink`) has random weights and everything else of the checkpoint's config. It is saved, cut
by the anatomy that its own forward pass has shown (`worker.dissection`), loaded as stages by the very code that loads
any model, and compared with transformers in one process: without a cache, prefilled whole and in chunks, decoded, with
and without left padding, over every cut in two and one in three. Any difference at all is a refusal.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ..proto.v1.errors import InvalidRequestError, ShardliftError, UnsupportedModelError, one_line
from ..worker.anatomy import FAMILIES, TEXT_PARTS, Anatomy, Cut
from ..worker.dissection import dissect, variants
from ..worker.kv import StageCache
from ..worker.loader import LoadProgress, load_stage
from ..worker.remote_code import ModelCode
from ..worker.skeleton import build_skeleton, causal_class, parse_config, quiet_transformers
from ..worker.spec import StageSpec
from ..worker.stage import ResidentStage, StepInput
from ..worker.tensors import dtype_by_name
from .checkpoint import Checkpoint, CheckpointRequest, read_checkpoint
from .layout import Layout, lay_out
from .shrink import shrink
from .sizes import ModelSizes

logger = logging.getLogger(__name__)

_ROWS, _LENGTH, _DECODED = 2, 21, 6
_PADDING = 7
_CHUNKS = ((_LENGTH,), (12, 7, 2))
_VOCABULARY_BEGINS = 3  # what is below may mean something
_MOST_PARAMETERS = 40_000_000
_REMEMBERED = 16
_known: dict[str, Anatomy] = {}

# A pass of a model: ids [B, T], mask [B, K], positions [B, T] or none, whether to keep a cache → logits [B, T, V].
_Pass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, bool], torch.Tensor]


def unlisted_anatomy(
    config: Mapping[str, Any], *, dtype: str, attn_implementation: str | None, code: ModelCode | None = None
) -> Anatomy | None:
    """None for a family that is listed; else, and for a checkpoint's own code, the anatomy by which slices equal the
    whole.

    Raises UnsupportedModelError, with what went wrong, where there is none.
    """
    model_type = str(config.get("model_type"))
    # How its weights lie in the files has no say in how its layers hang together.
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    if code is None and (model_type in FAMILIES or model_type in TEXT_PARTS):
        return None
    about = [dict(config), dtype, attn_implementation, None if code is None else code.spec.key]
    key = json.dumps(about, sort_keys=True, default=str)
    if key not in _known:
        parsed = parse_config(config, code)
        causal_class(parsed, code)
        try:
            found = _check(parsed, _Loading(dtype=dtype, attn_implementation=attn_implementation, code=code))
        except Exception as error:
            kind = "" if isinstance(error, ShardliftError) else f"{type(error).__name__}: "
            raise UnsupportedModelError(
                f"model type {model_type!r} has not been shown to come out right over several stages, and a small "
                f"model of this config doesn't ({kind}{one_line(error, 300)}); supported: {', '.join(sorted(FAMILIES))}"
            ) from error
        while len(_known) >= _REMEMBERED:
            del _known[next(iter(_known))]
        _known[key] = found
    return _known[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loading:
    """How the model is going to be loaded, as far as it changes what is computed."""

    dtype: str
    attn_implementation: str | None = None
    code: ModelCode | None = None


def _check(config: PreTrainedConfig, loading: _Loading) -> Anatomy:
    with tempfile.TemporaryDirectory(prefix="shardlift-check-") as scratch:
        folder = Path(scratch)
        whole = _save_small(config, folder, loading)
        checkpoint = read_checkpoint(CheckpointRequest(path=scratch), None)
        failures = []
        for anatomy in variants(whole, dissect(whole)):
            try:
                _compare(whole, checkpoint, anatomy, loading)
            except Exception as error:
                failures.append(error)
                logger.info("%s as %s: %s", config.model_type, anatomy, one_line(error))
            else:
                return anatomy
        raise failures[0]


def _save_small(config: PreTrainedConfig, folder: Path, loading: _Loading) -> PreTrainedModel:
    """Saves a small random model of `config` and gives it as transformers loads it."""
    whole = json.loads(config.to_json_string(use_diff=False))
    small = parse_config(shrink(whole, dict(config.attribute_map)), loading.code)
    model_class = causal_class(small, loading.code)
    dtype = dtype_by_name(loading.dtype)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in model_class(small).parameters())
    if parameters > _MOST_PARAMETERS:
        raise InvalidRequestError(
            f"a small model of it would still have {parameters} parameters, more than the {_MOST_PARAMETERS} to try"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(small).float()
        _randomize(model)
    attention = loading.attn_implementation
    arguments = {} if attention is None else {"attn_implementation": attention}
    with quiet_transformers():
        model.to(dtype).save_pretrained(folder)
        return model_class.from_pretrained(folder, config=small, dtype=dtype, **arguments).eval()


def _randomize(model: torch.nn.Module) -> None:
    """Weights that let every module be seen in the logits, whatever the family's own are like."""
    with torch.no_grad():
        for tensor in model.parameters():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn_like(tensor)
            if tensor.ndim > 1:
                tensor.copy_(noise * 1.3 * tensor.shape[-1] ** -0.5)
            else:
                tensor.add_(noise, alpha=0.1)


def _compare(whole: PreTrainedModel, checkpoint: Checkpoint, anatomy: Anatomy, loading: _Loading) -> None:
    layout = lay_out(
        checkpoint.config,
        checkpoint.records,
        dtype=loading.dtype,
        quantization=None,
        attn_implementation=loading.attn_implementation,
        anatomy=anatomy,
        code=loading.code,
    )
    layers = len(layout.outline.sizes.layers)
    skeleton = build_skeleton(
        parse_config(checkpoint.config, loading.code),
        dtype=dtype_by_name(loading.dtype),
        anatomy=anatomy,
        code=loading.code,
    )
    states = skeleton.state_bytes_per_row()
    expected: list[tuple[str, torch.Tensor]] | None = None
    cuts = [[end] for end in range(1, layers)] + ([[1, layers - 1]] if layers > 2 else [])
    for ends in cuts or [[]]:
        stages = _load(checkpoint, layout, ends, loading)
        if expected is None:
            expected = list(_runs(partial(_one_process, whole), stages[0]))
        runs = _runs(partial(_Chain, stages, layout.outline.sizes, states), stages[0])
        for (name, theirs), (_, ours) in zip(expected, runs, strict=True):
            if not torch.equal(ours, theirs):
                most = float((ours.float() - theirs.float()).abs().max())
                raise InvalidRequestError(
                    f"cut before layer{'s' * (len(ends) > 1)} {' and '.join(map(str, ends))}, {name}: logits differ by "
                    f"up to {most:.2g} from one process"
                )


def _load(checkpoint: Checkpoint, layout: Layout, ends: Sequence[int], loading: _Loading) -> list[ResidentStage]:
    layers = len(layout.outline.sizes.layers)
    stages = []
    for index, (first, end) in enumerate(zip([0, *ends], [*ends, layers], strict=True)):
        cut = Cut(first=first, end=end, num_layers=layers)
        records = layout.records_of(cut, checkpoint.records)
        spec = StageSpec(
            model="self-check",
            load_id="self-check",
            index=index,
            num_stages=len(ends) + 1,
            device="cpu",
            cut=cut,
            source=checkpoint.source,
            records=records,
            versions={record.file: checkpoint.versions[record.file] for record in records},
            config=checkpoint.config,
            generation_config=None,
            quantization=None,
            dtype=loading.dtype,
            attn_implementation=loading.attn_implementation,
            secret="",
            use_cache=False,
            anatomy=layout.anatomy,
            code=None if loading.code is None else loading.code.spec,
        )
        stages.append(load_stage(spec, None, LoadProgress()).stage)
    return stages


# ---- what is compared ------------------------------------------------------------------------------------------------


def _runs(open_session: Callable[[], _Pass], stage: ResidentStage) -> Iterator[tuple[str, torch.Tensor]]:
    """What each pass is called, and its logits."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = stage.vocabulary
    ids = torch.randint(_VOCABULARY_BEGINS, vocabulary, (_ROWS, _LENGTH + _DECODED), generator=generator)
    for padding in (0, _PADDING):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        padded = ", left-padded" if padding else ""
        yield f"without a cache{padded}", open_session()(ids[:, :_LENGTH], mask[:, :_LENGTH], None, False)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        for chunks in _CHUNKS:
            session, past = open_session(), 0
            for tokens in (*chunks, *[1] * _DECODED):
                end = past + tokens
                name = f"prefilled in {len(chunks)}, positions {past} to {end - 1}{padded}"
                yield name, session(ids[:, past:end], mask[:, :end], positions[:, past:end], True)
                past = end


def _one_process(whole: PreTrainedModel) -> _Pass:
    cache = DynamicCache(config=whole.config)

    def run(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None, use_cache: bool) -> torch.Tensor:
        arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": use_cache}
        if positions is not None:
            arguments["position_ids"] = positions
        if use_cache:
            arguments["past_key_values"] = cache
        with torch.inference_mode():
            logits: torch.Tensor = whole(ids, **arguments).logits
        return logits

    return run


class _Chain:
    """A session over stages in this process. Raises InvalidRequestError for a cache that outgrows what is planned."""

    def __init__(self, stages: Sequence[ResidentStage], sizes: ModelSizes, states: Sequence[int]) -> None:
        """states: bytes that each layer keeps for a row however long it is."""
        self._stages, self._sizes, self._states = stages, sizes, states
        self._caches: list[StageCache] = []

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None, use_cache: bool
    ) -> torch.Tensor:
        if use_cache and not self._caches:
            self._caches = [stage.new_cache() for stage in self._stages]
        caches: list[StageCache | None] = [*self._caches] or [None] * len(self._stages)
        if positions is None:
            positions = self._stages[-1].positions(mask, 0, ids.shape[1])
        passed = ids
        for stage, cache in zip(self._stages, caches, strict=True):
            step = StepInput(input=passed, attention_mask=mask, position_ids=positions, use_cache=use_cache)
            passed = stage.forward(step, cache)
        self._weigh()
        return passed

    def _weigh(self) -> None:
        for stage, cache in zip(self._stages, self._caches, strict=False):
            planned = self._sizes.kv_bytes(stage.cut.first, stage.cut.end, _ROWS * cache.length)
            planned += _ROWS * sum(self._states[stage.cut.first : stage.cut.end])
            if cache.size_bytes > planned:
                raise InvalidRequestError(
                    f"its cache of {_ROWS} rows of {cache.length} tokens has {cache.size_bytes} bytes, planned are "
                    f"{planned}"
                )
