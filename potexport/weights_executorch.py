"""ExecuTorch's front end without its copies of the weights; what it writes is the same.

It copies each program whole before a delegate sees it, and again every weight that is read twice;
each method has its own copy of the bytes that a delegate stores, and the program of a tied
embedding one more: 5.4 times the fp32 weights of a model of 0.5 billion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn


@contextmanager
def weights_once() -> Iterator[None]:
    """Let copies of a program share its weights, which no pass writes into, and methods the bytes
    of them that are stored."""
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir.emit._emitter import _Emitter

    kept: dict[str, bytes] = {}
    add: Any = NamedDataStore.add_named_data
    save: Any = _Emitter._save_new_const_tensor

    def once(key: str, data: bytes) -> bytes:
        before = kept.setdefault(key, data)
        return before if before == data else data

    def add_once(store: Any, key: str, data: Any, *rest: Any, **named: Any) -> None:
        add(store, key, once(key, data) if isinstance(data, bytes) else data, *rest, **named)

    def save_once(emitter: Any, spec: Any, data: bytes, digest: str, *rest: Any) -> int:
        # XNNPACK's key is the digest as well: a tied embedding is the head.
        index: int = save(emitter, spec, once(digest, data), digest, *rest)
        return index

    with (
        mock.patch.object(torch.Tensor, "__deepcopy__", _tensor),
        mock.patch.object(nn.Parameter, "__deepcopy__", _parameter),
        mock.patch.object(NamedDataStore, "add_named_data", add_once),
        mock.patch.object(_Emitter, "_save_new_const_tensor", save_once),
    ):
        yield


COPY_TENSOR: Any = torch.Tensor.__deepcopy__
COPY_PARAMETER: Any = nn.Parameter.__deepcopy__


def _tensor(tensor: torch.Tensor, memo: dict[int, Any]) -> Any:
    """A tensor of its own over the same memory."""
    if type(tensor) is not torch.Tensor or not tensor.is_leaf or tensor.device.type != "cpu":
        return COPY_TENSOR(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach())


def _parameter(parameter: nn.Parameter, memo: dict[int, Any]) -> Any:
    if type(parameter) is not nn.Parameter or parameter.device.type != "cpu":
        return COPY_PARAMETER(parameter, memo)
    new = nn.Parameter(parameter.data, parameter.requires_grad)
    return memo.setdefault(id(parameter), new)
