"""`bench`: figures of bundles and peers side by side, and what is refused. No time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from potexport import peers
from potexport.benching.plot import draw
from tests.e2e.helpers import ROOT, Cli

NOVEL = ROOT / "data" / "pride-and-prejudice.txt"


@pytest.fixture(scope="session")
def measured(
    cli: Cli, bundle: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A bundle and transformers, at a prompt that is read anew and at one read by pieces."""
    folder = tmp_path_factory.mktemp("bench")
    result = cli(
        "bench", bundle, "--against", "transformers", "--model", model_folder,
        "--context", 40, "--context", 2100, "--read", 500, "--text", NOVEL, "--threads", 1,
        "--rounds", 1, "--cache", folder, "--output", folder / "new" / "bench.json", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert json.loads((folder / "new" / "bench.json").read_text()) == found
    return found


def test_all_take_the_same_turns(measured: dict[str, Any], bundle: Path) -> None:
    parties = measured["parties"]
    assert [each["name"] for each in parties] == [bundle.name, "transformers"]
    assert [each["kind"] for each in parties] == ["bundle", "peer"]
    for party in parties:
        short, long = party["readings"]
        assert (short["tokens"], long["tokens"]) == (40, 2100)
        assert (short["stopped"], long["stopped"]) == ("", "")
        assert short["open"]["count"] == long["open"]["count"] == 1
        assert [tokens for tokens, _ in short["curve"]] == [40]  # at once
        assert [tokens for tokens, _ in long["curve"]] == [1000, 2000, 2100]
        for reading in (short, long):
            assert reading["decode"]["count"] == 14 - 2
            assert reading["decode_tokens_per_second"] == 1 / reading["decode"]["median"]
            assert reading["peak"] > 0
            assert reading["copy"]["count"] == reading["products"]["count"] > 1


def test_a_share_is_of_what_the_machine_did_meanwhile(measured: dict[str, Any]) -> None:
    for party in measured["parties"]:
        reading = party["readings"][1]
        read = party["weights"] + party["pot"] + party["cache"] * reading["tokens"]
        took = reading["decode"]["median"] * reading["copy"]["median"]
        assert reading["bandwidth_share"] == pytest.approx(read / took)
        work = party["work"] * reading["tokens"]
        took = reading["prompt"]["median"] * reading["products"]["median"]
        assert reading["products_share"] == pytest.approx(work / took)


def test_only_a_bundle_compresses(measured: dict[str, Any]) -> None:
    ours, theirs = measured["parties"]
    short, long = ours["readings"]
    assert short["compressing"] == 0
    assert 0 < long["compressing"] < 1
    assert theirs["readings"][1]["compressing"] is None
    assert set(ours["graphs"]) == {"prefill", "decode", "observe", "compress"}
    assert ours["long"]["tokens"] <= 500
    assert ours["long"]["compressions"] >= 10
    assert ours["long"]["last_peak"] >= ours["long"]["first_peak"] > 0
    assert theirs["long"] is None


def test_the_page_says_what_was_reached(measured: dict[str, Any], tmp_path: Path) -> None:
    """By the figures of the file, what other programs added to it included."""
    peer = {**measured["parties"][1], "name": "onnxruntime-genai-int4"}
    reading = {**peer["readings"][1], "tokens": 1000}
    ours = {**measured["parties"][0], "precision": "w4"}
    mine = {**ours["readings"][1], "tokens": 1000, "peak": 10**9}
    reading["decode"] = {**mine["decode"], "median": 1.7 * mine["decode"]["median"]}
    document = {
        **measured,
        "parties": [{**ours, "readings": [mine]}, {**peer, "readings": [reading]}],
        "perplexity": [
            {"precision": "fp32", "perplexity": 20.0},
            {"precision": "w4-w8", "perplexity": 22.0},
        ],
        "builds": {"potexport": {"median": 5.0}, "onnxruntime-genai-int4": {"median": 6.0}},
    }
    source, page = tmp_path / "bench.json", tmp_path / "page.md"
    source.write_text(json.dumps(document))
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    command = [sys.executable, str(ROOT / "tools" / "performance_page.py"), str(source), str(page)]
    subprocess.run(command, check=True)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    decode = "decode against onnxruntime-genai-int4, 1,000 tokens read"
    assert table[decode] == ["1.6 ×", "1.70 ×", "yes"]
    assert table["perplexity of w4 against fp32, real prose"][1:] == [
        "+10.0% (22.00, fp32 20.00)", "**no**",
    ]  # fmt: skip
    assert table["build of a bundle against onnxruntime-genai's"][1:] == [
        "5.0 s, theirs 6.0 s", "yes",
    ]  # fmt: skip
    assert table["peak memory of a session"][1:] == ["1000 MB", "**no**"]
    missing = table["decode against llama-cpp, 32,000 tokens read"]
    assert missing == ["10 ×", "not measured: llama-cpp was not there", ""]


def test_the_same_figures_are_the_same_drawing(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    for name in ("a.svg", "b.svg"):
        draw(measured, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert "<dc:date>" not in drawn


def test_a_table_shows_ratios_to_the_first(cli: Cli, bundle: Path) -> None:
    shown = cli("bench", bundle, "--threads", 1, "--context", 40, "--rounds", 1).stdout
    assert "decode, tokens/s" in shown
    assert "1.00 x" in shown
    assert "one long reading" not in shown


def test_mistakes_are_one_line(cli: Cli, bundle: Path, tmp_path: Path, model_folder: Path) -> None:
    missing = [name for name in peers.names() if peers.version(name) is None]
    cases: list[tuple[tuple[object, ...], str]] = [
        ((bundle, "--quick", "--read", 60), "too few to tell the end"),
        ((bundle, "--against", "transformers"), "give --model"),
        ((bundle, "--against", "nobody"), "there is no 'nobody' among the peers"),
        ((tmp_path / "none",), "is not a folder"),
    ]
    cases += [
        ((bundle, "--against", name), f"install it with: pip install {peers.load(name).package}")
        for name in missing
    ]
    for arguments, words in cases:
        result = cli("bench", *arguments, "--context", 40, "--rounds", 1)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("potexport: ")
        assert words in result.stderr
