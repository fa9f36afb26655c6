"""`bench`: figures of bundles side by side, and what is refused. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.helpers import ROOT, Cli

NOVEL = ROOT / "data" / "pride-and-prejudice.txt"


def test_bundles_are_measured_in_turns(cli: Cli, bundle: Path, copy: Path) -> None:
    result = cli("bench", bundle, copy, "--threads", 1, "--read", 400, "--text", NOVEL, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [each["bundle"] for each in found] == [bundle.name, copy.name]
    for each in found:
        assert set(each["seconds"]) == {"prefill", "decode", "observe", "compress"}
        assert all(seconds > 0 for seconds in each["seconds"].values())
        assert each["tokens_per_second"]["prefill"] == 8 / each["seconds"]["prefill"]
        assert each["weights"] == (bundle / "weights.safetensors").stat().st_size
        read = each["read"]
        # What is fed waits for the token after it, so that the last chunk is not counted.
        assert 392 <= read["tokens"] <= 400
        assert read["compressions"] >= 10
        assert read["last_peak"] >= read["first_peak"] > 0


def test_a_table_shows_ratios_to_the_first(cli: Cli, bundle: Path, copy: Path) -> None:
    shown = cli("bench", bundle, copy, "--threads", 1).stdout
    assert "decode, tokens/s" in shown
    assert "1.00 x" in shown
    assert "compressions" not in shown  # nothing was read


def test_mistakes_are_one_line(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((bundle, "--read", 100), "needs a text"),
        ((bundle, "--read", 20, "--text", NOVEL), "never fill the pot of 48 slots"),
        ((tmp_path / "none",), "is not a folder"),
    ):
        result = cli("bench", *arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("potexport: ")
        assert words in result.stderr
