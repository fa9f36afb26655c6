"""What a transformers config says of a model, in the project's words."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from potexport.errors import PotexportError
from potexport.geometry import ModelFacts
from potexport.loader import first_line
from potexport.runtime.quiet import quietly
from potexport.spec import ITEM_BYTES, QUANTIZED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def model_facts(config: PreTrainedConfig) -> ModelFacts:
    """The graph-relevant numbers of a transformers config."""
    from potexport.graphs import adapters

    try:
        heads = config.num_attention_heads
        return ModelFacts(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            query_heads=heads,
            kv_heads=adapters.kv_heads(config),
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
        )
    except RuntimeError as error:  # transformers' own, of numbers that differ from layer to layer
        raise PotexportError(
            f"model type {config.model_type!r} is not supported: its layers have keys of different "
            f"sizes ({first_line(error)}); choose a decoder whose layers are alike"
        ) from error
    except AttributeError as error:
        raise PotexportError(
            f"model type {config.model_type!r} is not supported: its config lacks {error.name}; "
            "expected a decoder with rotary positions (llama, qwen2, …)"
        ) from error


def windows(config: PreTrainedConfig) -> tuple[int, ...]:
    """Of each layer how many tokens a query sees, itself included, 0 for all; empty where no layer
    has a sliding window. What a config leaves open is checked when the model runs
    (`graphs.attention`)."""
    size = getattr(config, "sliding_window", None)
    if size in (None, 0):
        return ()
    if type(size) is not int or size < 1:
        raise PotexportError(
            f"sliding_window of the model's config is {size!r}; it must be a whole number above 0, "
            "or null"
        )
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    found = tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
    return found if any(found) else ()


def most_positions(config: PreTrainedConfig) -> int | None:
    """Beyond how many positions the model turns keys by other frequencies (long RoPE, arXiv
    2402.13753); None where it never does."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    limits = [
        each["original_max_position_embeddings"]
        for each in kinds
        if each.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def weight_bytes(model: Any, precision: str, dtype: str, *, packed_tables: bool) -> int:
    """About how many bytes all weights take, from an instance without storage.

    dtype: of what is not quantized. packed_tables: whether embeddings are quantized as well.
    """
    table = model.get_input_embeddings().weight
    sizes = [
        weight.numel() for weight in model.parameters() if weight is not table
    ]  # tied ones once
    if precision not in QUANTIZED:
        return int(ITEM_BYTES[dtype] * (table.numel() + sum(sizes)))
    head = model.get_output_embeddings()
    own = table.numel() if head is not None and head.weight is table else 0
    if packed_tables:  # looked up by 4 bits and a float for 32; the head is one more product
        return int(0.625 * table.numel() + QUANTIZED[precision] * (own + sum(sizes)))
    return int(2 * table.numel() + own + QUANTIZED[precision] * sum(sizes))


def without_storage(config: PreTrainedConfig, *, trust_remote_code: bool) -> Any:
    """The model with every shape and no number in it."""
    import torch

    with quietly():  # transformers imports torchao where it is installed, which is not quiet
        from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config may be wrong in as many ways as there are models
        raise PotexportError(
            f"model type {config.model_type!r}: no model can be made of its config "
            f"({type(error).__name__}: {first_line(error)}); compare it with the original model's"
        ) from error


def parameters(model: PreTrainedModel) -> int:
    """How many numbers the model was trained to, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())


def end_tokens(generation: Any) -> tuple[int, ...]:
    """The tokens that end an answer, of a generation config."""
    end = generation.eos_token_id
    return tuple(end) if isinstance(end, list) else () if end is None else (end,)


def weights_sha256(model: PreTrainedModel) -> str:
    """Of all weights in fp32, by name: which model a program was made from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy())
    return digest.hexdigest()
