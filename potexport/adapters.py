"""LoRA adapters, merged into the weights before anything is traced.

Decides what an adapter may be, and whether it fits the model; the arithmetic is peft's. After the
merge the model is of transformers' own class again: nothing that follows knows of adapters.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport import loader
from potexport.errors import PotexportError
from potexport.loader import Source
from potexport.runtime.quiet import quietly

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the model's own name of a module, in an adapter's file
# Settings of LoRA that change how the model runs, or import what the file names.
UNMERGED = ("layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config")
Shape = tuple[int, ...]


def find(given: Sequence[str]) -> tuple[Source, ...]:
    """Where each adapter is; PotexportError for what is no LoRA adapter in safetensors."""
    if given and importlib.util.find_spec("peft") is None:
        raise PotexportError("this needs peft; install with: pip install 'potexport[adapters]'")
    return tuple(map(_find, given))


def fit(adapters: Sequence[Source], model: PreTrainedModel) -> None:
    """PotexportError unless each fits the model, which may be without storage, and stays as is."""
    for adapter in adapters:
        _wrap(adapter, model, initial=False).unload()


def load_model(
    source: Source,
    adapters: Sequence[Source],
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """`loader.load_model`, with these adapters merged in their order."""
    import torch

    load = partial(
        loader.load_model,
        source,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        config=config,
    )
    model = load(dtype=dtype)
    if not adapters:
        return model
    # In fp32 and rounded once, so that `verify`, whose model is in fp32, finds the same weights.
    merged = model if dtype == torch.float32 else load(dtype=torch.float32)
    for adapter in adapters:
        merged = _merge(adapter, merged)
    if merged is not model:
        model.load_state_dict(merged.state_dict())
    loader.check_finite(source, model)
    model.requires_grad_(False).train(False)
    return model


def _find(given: str) -> Source:
    adapter = loader.place(given)
    config = adapter and loader.fetch(adapter, CONFIG, needed=True)
    if not adapter or not config:
        raise PotexportError(
            f"{given} is no adapter; expected a folder, or a hub id (org/name), with {CONFIG}"
        )
    if loader.fetch(adapter, WEIGHTS) is None:
        raise PotexportError(
            f"{given} has no {WEIGHTS}; save the adapter again with peft's save_pretrained (no "
            f"pickle is ever loaded)"
        )
    try:
        raw: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        kind = raw["peft_type"]
    except loader.UNREADABLE as error:
        raise PotexportError(
            f"{config} names no peft_type; save the adapter again with peft's save_pretrained"
        ) from error
    if kind != "LORA":
        raise PotexportError(f"the adapter {given} is of the kind {kind}; only LORA can be merged")
    for setting in UNMERGED:
        if raw.get(setting):
            raise PotexportError(
                f"the adapter {given} has {setting}, which is more than a change of weights; "
                f"choose a LoRA adapter without"
            )
    return adapter


def _merge(adapter: Source, model: PreTrainedModel) -> PreTrainedModel:
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(str(loader.fetch(adapter, WEIGHTS)))
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise PotexportError(
                f"the adapter {adapter} holds NaN or infinity in {name}; train or download it again"
            )
    wrapped = _wrap(adapter, model)
    with quietly():
        set_peft_model_state_dict(wrapped, weights)
        try:
            merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise PotexportError(
                f"the adapter {adapter} cannot be merged ({loader.first_line(error)}); merge it "
                f"with peft, save the model, and build that"
            ) from error
    return merged


def _wrap(adapter: Source, model: PreTrainedModel, *, initial: bool = True) -> Any:
    """The model within peft's, changed in place, the adapter's weights still to come.

    initial: whether to begin as the adapter's training did, which some kinds count on (PiSSA).
    """
    import peft

    shapes = _shapes(adapter)
    _check_tables(adapter, shapes, model)
    with quietly():
        try:
            folder = Path(str(loader.fetch(adapter, CONFIG))).parent
            config: Any = peft.LoraConfig.from_pretrained(str(folder))
            config.inference_mode = True
            config.init_lora_weights = config.init_lora_weights if initial else False
            wrapped = peft.PeftModelForCausalLM(model, config, autocast_adapter_dtype=False)
        except (*loader.UNREADABLE, AttributeError) as error:
            raise PotexportError(
                f"the adapter {adapter} does not fit a {model.config.model_type} "
                f"({loader.first_line(error)}); choose the model it was trained on"
            ) from error
        needed = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        own = {**needed, **peft.get_peft_model_state_dict(wrapped, save_embedding_layers=True)}
    _check_shapes(adapter, shapes, {name: tuple(own[name].shape) for name in own}, set(needed))
    return wrapped


def _shapes(adapter: Source) -> dict[str, Shape]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(loader.fetch(adapter, WEIGHTS)), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PotexportError(
            f"the weights of the adapter {adapter} cannot be read "
            f"({loader.first_line(error)}); download it again"
        ) from error


def _check_tables(adapter: Source, shapes: dict[str, Shape], model: Any) -> None:
    """Refuse new rows of the embedding or the head, and any change where the two are one."""
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    tables: dict[str, Any] = {name: each for name, each in model.named_modules() if each in ends}
    tied = len({id(table.weight) for table in tables.values()}) < len(tables)
    for key, shape in shapes.items():
        table, _, part = key.removeprefix(PREFIX).rpartition(".")
        while part and table not in tables:
            table, _, part = table.rpartition(".")
        if table not in tables:
            continue
        rows = tables[table].weight.shape[0]
        some = "trainable_tokens" in key
        if some or (key.endswith(".weight") and "lora_" not in key and shape[0] != rows):
            what = f"trained {shape[0]} rows" if some else f"has {shape[0]} rows"
            raise PotexportError(
                f"the adapter {adapter} {what} of {table}, which has {rows} in the model, and a "
                f"bundle keeps the model's vocabulary; merge it with peft, save model and "
                f"tokenizer, and build that"
            )
        if tied:
            raise PotexportError(
                f"the adapter {adapter} changes {table}, which is embedding and head of this model "
                f"at once; merge it with peft, save the model, and build that"
            )


def _check_shapes(
    adapter: Source, shapes: dict[str, Shape], own: dict[str, Shape], needed: set[str]
) -> None:
    """Refuse what peft would pass over, or say in many lines."""
    for name in sorted(set(shapes) | needed):
        if name not in shapes or name not in own:
            why = "this model has no place for" if name in shapes else "it lacks, for this model,"
            raise PotexportError(
                f"the adapter {adapter} does not fit: {why} {name}; choose the model it was "
                f"trained on"
            )
        if shapes[name] != own[name]:
            raise PotexportError(
                f"the adapter {adapter} does not fit: {name} is {list(shapes[name])}, for this "
                f"model it must be {list(own[name])}; choose the model it was trained on"
            )
