"""Mixtures of experts with constant shapes: all of them compute, and who was not asked weighs 0.

Transformers' own ways gather tokens by expert, or an expert's weights by token: shapes that depend
on the data, or a copy of the weights a step. All experts at once are one batched product, which
every runtime and NPU takes; a decode step then reads all of their weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from potexport.errors import PotexportError

NAME = "potexport"


def all_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of one layer, as transformers calls them.

    Args:
        hidden_states: (T, E). top_k_index: (T, k), experts of each token. top_k_weights: (T, k).

    Returns: (T, E).
    """
    number = torch.arange(module.num_experts, dtype=top_k_index.dtype)
    chosen = top_k_index[None] == number[:, None, None]  # (experts, T, k)
    weights = torch.where(chosen, top_k_weights[None], 0.0).sum(dim=-1, keepdim=True)
    first = module.gate_up_proj if module.has_gate else module.up_proj
    each = hidden_states.expand(module.num_experts, -1, -1)  # ExecuTorch's products broadcast none
    inner = _product(module, each, first, "gate_up_proj", "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _product(module, inner, module.down_proj, "down_proj")
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    return (out * weights).sum(dim=0).to(hidden_states.dtype)


def _product(module: Any, x: Tensor, weight: Tensor, *names: str) -> Tensor:
    """x (experts, T, in) by each expert's weight -> (experts, T, out)."""
    out = x @ (weight if module.is_transposed else weight.transpose(1, 2))
    if not module.has_bias:
        return out
    bias: Tensor = next(
        getattr(module, f"{name}_bias") for name in names if hasattr(module, f"{name}_bias")
    )
    return out + bias[:, None]


def mixtures(model: PreTrainedModel) -> list[nn.Module]:
    """The experts of each layer that has some."""
    return [each for each in model.modules() if _is_mixture(each)]


def one_by_one(model: PreTrainedModel) -> None:
    """Let a model's experts compute as its own code says, which any machine can."""
    if mixtures(model):
        model.set_experts_implementation("eager")


def use(model: PreTrainedModel) -> None:
    """Let a model's experts compute all at once; nothing where it has none.

    Raises PotexportError for experts that transformers does not let anybody compute otherwise.
    """
    found = mixtures(model)
    if not found:
        return
    fixed = next((each for each in found if not hasattr(each, "is_transposed")), None)
    if fixed is not None:
        raise PotexportError(
            f"{type(fixed).__name__} routes tokens to experts by itself, with shapes that depend "
            "on the text; choose a model whose experts transformers lets be replaced"
        )
    ALL_EXPERTS_FUNCTIONS.register(NAME, all_experts)
    model.set_experts_implementation(NAME)


def _is_mixture(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts") and hasattr(module, "num_experts")
