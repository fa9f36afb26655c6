"""Which kinds of model can be exported, and what is said of the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from potexport.errors import PotexportError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
STATES = frozenset({"linear_attention", "conv", "mamba", "recurrent", "hybrid"})
# What quantized weights bring along, where the config does not speak of them.
CODES = (".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax", "_blocks")


def refuse_quantized(source: str, raw: dict[str, Any]) -> None:
    """By the config as it is written."""
    for part in (raw, raw.get("text_config") or {}):
        said = isinstance(part, dict) and (
            part.get("quantization_config") or part.get("compression_config")
        )
        if said and not isinstance(said, dict):
            _refuse(source, str(said))
        if said:
            small = said.get("load_in_8bit") or said.get("load_in_4bit")
            _refuse(source, said.get("quant_method") or ("bitsandbytes" if small else "no name"))


def refuse_codes(source: str, unexpected: Iterable[str]) -> None:
    """By tensors that the model has no place for."""
    for name in sorted(unexpected):
        if name.endswith(CODES):
            _refuse(source, f"it has {name}")


def _refuse(source: str, how: str) -> NoReturn:
    raise PotexportError(
        f"{source} is quantized already ({how}); expected float weights: choose the unquantized"
        f" checkpoint"
    )


def unfit(config: PreTrainedConfig, *, own_code: bool) -> str:
    """Why the exporter cannot take this kind of model; empty when it can."""
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder:
        return "is an encoder-decoder"
    text = config.get_text_config()
    strange = set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS
    if strange:
        kinds = ", ".join(sorted(strange))
        if strange == {"chunked_attention"}:
            return f"has layers that see the tokens of their own chunk alone ({kinds})"
        if strange <= STATES:
            return f"has layers that keep a state in place of keys and values ({kinds})"
        return f"has layers of a kind that no pot holds ({kinds})"
    if text is not config or hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        alone = causal.get(text.model_type) if text is not config else None
        if alone is None or alone.endswith("ForConditionalGeneration"):
            return "is multimodal, and transformers has no class for its text decoder alone"
        return (
            f"is multimodal; its text decoder alone, a {text.model_type}, may do: save it as a"
            f" {alone}, as docs/build.md shows"
        )
    if own_code:
        return ""
    if config.model_type not in causal:
        return "is not a causal language model in transformers"
    bidirectional = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if bidirectional and not getattr(config, "is_decoder", False):
        return "is a bidirectional encoder"
    decoder: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if decoder._is_stateful:
        return "keeps a recurrent state (a state-space model)"
    return ""
