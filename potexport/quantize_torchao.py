"""8da4w by torchao: weights of 4 bits in groups of 32, activations of 8 bits a token at run time.

Head and embedding included. What XNNPACK computes such a product with is `qd8-f32-qb4w`; the
embedding's rows are looked up and unpacked by ExecuTorch's `embedding_4bit`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from potexport.errors import PotexportError

GROUP = 32
LOWEST, HIGHEST = -8, 7
INT4: Any = getattr(torch, "int4")  # noqa: B009 - its stubs do not know it


def w4(model: nn.Module) -> None:
    """Quantize a transformers model in place, every product and the embedding.

    A product whose rows are no multiple of 32 long stays as it is: XNNPACK takes no other groups.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig as Dynamic

    wrapped: Any = model
    table, head = wrapped.get_input_embeddings(), wrapped.get_output_embeddings()
    if head is not None and head.weight is table.weight:  # they part: one is looked up, one packed
        head.weight = nn.Parameter(table.weight.detach(), requires_grad=False)
        wrapped.config.tie_word_embeddings = False
    wrapped.set_input_embeddings(PackedEmbedding(table))

    def whole_groups(module: nn.Module, _name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % GROUP == 0

    config = Dynamic(weight_dtype=INT4, weight_granularity=PerGroup(GROUP))
    quantize_(model, config, whole_groups)


class PackedEmbedding(nn.Module):
    """An embedding of 4 bits, two in a byte, the even column in the upper half.

    Codes and scales are torchao's, symmetric, in groups of 32, or of a whole row where its length
    is no multiple.
    """

    def __init__(self, table: nn.Embedding) -> None:
        # Registers the operator, which is Python's, and its out variant, which is C++'s.
        import executorch.exir.passes._quant_patterns_and_replacements
        import executorch.kernels.quantized  # noqa: F401
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup

        super().__init__()
        rows, columns = table.weight.shape
        if columns % 2:
            raise PotexportError(
                f"the embedding has {columns} columns; --precision w4 packs two into a byte and "
                "needs an even number: use --precision fp32"
            )
        group = GROUP if columns % GROUP == 0 else columns
        self.factor = _factor(table)
        plain = nn.Embedding(rows, columns, _weight=table.weight.detach())
        granularity = PerGroup(GROUP) if group == GROUP else PerAxis(0)
        config = IntxWeightOnlyConfig(weight_dtype=INT4, granularity=granularity)
        quantize_(plain, config, lambda module, _name: module is plain)
        made: Any = plain.weight
        codes = (made.qdata - LOWEST).to(torch.uint8)
        self.packed = nn.Buffer((codes[:, 0::2] << 4 | codes[:, 1::2]).contiguous())
        self.scales = nn.Buffer(made.scale.reshape(rows, -1).to(torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        """(1, T) int32 -> (1, T, E) float32."""
        lookup: Any = torch.ops.quantized_decomposed.embedding_4bit
        found: Tensor = lookup(self.packed, self.scales, None, LOWEST, HIGHEST, ids)
        return found if self.factor == 1.0 else found * self.factor


def _factor(table: nn.Embedding) -> float:
    """By what a model's own embedding multiplies rows, as Gemma's does, besides looking them up.

    Raises PotexportError for one that does something else.
    """
    largest = table.weight.float().norm(dim=-1).topk(min(8, table.weight.shape[0]))
    ids = largest.indices  # some rows are zeros
    plain, own = table.weight[ids].float(), table(ids).float()
    factor = float((own * plain).sum() / (plain * plain).sum())
    if not torch.allclose(own, plain * factor, rtol=1e-3, atol=1e-6):
        raise PotexportError(
            f"{type(table).__name__} does more than look rows up; --precision w4 cannot pack it: "
            "use --precision fp32"
        )
    return 1.0 if abs(factor - 1.0) < 1e-6 else factor
