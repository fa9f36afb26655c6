"""What a Gemma 3 GGUF says, and means by saying nothing, where transformers takes its own defaults.

Decides windows, the two rotary bases and the scale of attention. The oracle is llama.cpp, which
writes these files and reads them (`src/llama-model.cpp`, LLM_ARCH_GEMMA3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potexport.errors import PotexportError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PATTERN, LOCAL_BASE = 6, 10000.0  # every sixth layer sees all; windows have a base of their own
LAYERS_OF_27B = 62  # whose queries are scaled by another size than their own


def mend(config: PreTrainedConfig, facts: dict[str, Any], name: str) -> None:
    """Put into the config, in place, what the conversion left out.

    Raises PotexportError for a rotary scaling that transformers has no word for.
    """
    own = {key.removeprefix("gemma3."): value for key, value in facts.items()}
    layers, wide = own["block_count"], own["embedding_length"]
    pattern = own.get("attention.sliding_window_pattern", PATTERN)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)] if pattern else []
    kinds = [("full_attention", "sliding_attention")[bool(slides)] for slides in pattern]
    config.layer_types = kinds or ["full_attention"] * layers
    heads = own["attention.head_count"]
    config.query_pre_attn_scalar = (
        wide // heads if layers == LAYERS_OF_27B else own["attention.key_length"]
    )
    config.final_logit_softcapping = own.get("final_logit_softcapping")
    whole = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 1000000.0)}
    scaling, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 1.0)
    if scaling == "linear":
        whole |= {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise PotexportError(
            f"{name}: rotary scaling {scaling!r} of a Gemma 3 is not supported; expected linear or"
            f" none: pass the model's Hugging Face folder instead"
        )
    local = own.get("rope.freq_base_swa", LOCAL_BASE)
    config.rope_parameters = {
        "full_attention": whole,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
