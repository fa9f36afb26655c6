"""What a family needs beyond the general path: a file each, named as transformers names its type.

`adapt(model)` of that file is called before the model's attention is replaced, and `kv_heads`, if
it has that, says how many there are where the config names them in its own way. Most families need
no file: their code calls attention through transformers' interface, and how they turn keys is
measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potexport import plugins

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKAGE = __name__


def names() -> list[str]:
    """The types that have a file."""
    return [name.replace("-", "_") for name in plugins.names(PACKAGE)]


def adapt(model: PreTrainedModel) -> None:
    """Change a model in place as its family's file says, if there is one."""
    file = _file(model.config.model_type)
    if file is not None:
        file.adapt(model)


def kv_heads(config: PreTrainedConfig) -> int:
    """Key/value heads of a model; as many as query heads where its config says nothing."""
    file = _file(config.model_type)
    if file is not None and hasattr(file, "kv_heads"):
        return int(file.kv_heads(config))
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _file(model_type: str) -> Any:
    return plugins.load(PACKAGE, model_type.replace("_", "-")) if model_type in names() else None
