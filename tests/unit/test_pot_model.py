"""Wrapping a model: what looks odd and is right, and what is refused with its place named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from potexport import pipeline
from potexport.errors import PotexportError
from potexport.facts import model_facts, most_positions, windows
from potexport.geometry import PotGeometry, default_geometry
from potexport.graphs.model import PotModel
from tests import tiny
from tests.parity.conftest import POT

SIZES = {**POT, "slots": POT["pot"]}
del SIZES["pot"]


def geometry(model: Any, **changes: Any) -> PotGeometry:
    return default_geometry(
        model_facts(model.config),
        windows=windows(model.config),
        most_positions=most_positions(model.config),
        **{**SIZES, **changes},
    )


def test_a_row_of_zeros_is_not_what_tells_how_keys_turn() -> None:
    """Transformers makes the row of the padding token one."""
    model = tiny.model("llama")
    table: Any = model.get_input_embeddings()
    table.weight[1] = 0
    assert PotModel(model, model_facts(model.config), geometry(model)).turns.alike


def test_a_pot_with_fewer_positions_than_are_compared() -> None:
    model = tiny.model("gemma3")
    changes = {"slots": 8, "chunk": 2, "keep": 5, "keep_max": 6, "catalyst_width": 4}
    pot = geometry(model, **changes, positions=16)
    assert PotModel(model, model_facts(model.config), pot).turns.count == 2


def _doge() -> Any:
    return transformers.DogeForCausalLM(transformers.DogeConfig(**tiny.SIZES, vocab_size=300))


def _gpt_neo() -> Any:
    config = transformers.GPTNeoConfig(
        hidden_size=60, num_layers=2, num_heads=6, attention_types=[[["global"], 2]], vocab_size=300
    )
    return transformers.GPTNeoForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_doge, "has a mask of its own"),
        (_gpt_neo, "0 of 2 layers of gpt_neo call attention through transformers' interface"),
    ],
)
def test_attention_that_is_not_plain_is_refused(make: Any, message: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with pytest.raises(PotexportError, match=message):
        PotModel(model, model_facts(model.config), geometry(model))


def test_a_config_that_differs_from_the_code_is_named() -> None:
    model = tiny.model("ministral")
    facts, pot = model_facts(model.config), geometry(model)
    with pytest.raises(PotexportError, match="layer 0 tells attention to look back 13, and the"):
        PotModel(model, facts, replace(pot, windows=(0, 0, 13)))
    model = tiny.model("llama")
    with pytest.raises(PotexportError, match=r"makes 2 key/value heads of 10, and .* says 3 of 10"):
        PotModel(model, replace(facts, kv_heads=3), geometry(model))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "no model can be"),
        ("llama", {"hidden_act": "nosuch"}, "no model can be made of its config"),
        ("llama", {"num_key_value_heads": 0}, "no model can be made of its config"),
        ("mistral", {"sliding_window": -1}, "sliding_window of the model's config is -1"),
        ("llama", {"quantization_config": "int8"}, r"is quantized already \(int8\)"),
    ],
)
def test_a_mistake_in_a_config_is_one_line(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = tiny.save(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(PotexportError, match=message):
        pipeline.plan(pipeline.Options(model=str(folder), **POT))


def test_layers_with_keys_of_different_sizes_are_refused() -> None:
    config = transformers.Gemma4TextConfig(num_hidden_layers=2)
    with pytest.raises(PotexportError, match="its layers have keys of different sizes"):
        model_facts(config)
