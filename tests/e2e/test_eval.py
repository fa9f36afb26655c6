"""`eval`: every task on a tiny model, what each reader is given, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.helpers import ROOT, Cli, assert_refused

NOVEL = ROOT / "data" / "pride-and-prejudice.txt"
POLICIES = ("infinipot", "snapkv", "h2o", "keydiff", "blend:keydiff + 2*catalyst", "random")
LABELS = ["infinipot", "snapkv", "h2o", "keydiff", "blend", "random"]
DEPENDING = {"infinipot", "blend"}
# Room for the needles of the tiny tokenizer among what is kept, for the oracle.
POT = {"pot": 384, "keep": 200, "chunk": 16, "catalyst-width": 56, "sink": 2, "recent": 8}
LENGTH = 900
RECORD = {
    "input": "Who minds the dog?",
    "context": "The dog, who is called Rex, does not mind at all. " * 20,
    "answers": ["nobody"],
    "dataset": "hotpotqa",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    folder = tmp_path_factory.mktemp("model") / "tiny llama"
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 2048}
    return tiny.save(folder, "llama-tied", vocab_size=307, **sizes)


@pytest.fixture(scope="module")
def pots(cli: Cli, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of several policies that look at different things."""
    folder = tmp_path_factory.mktemp("bundle") / "pots.bundle"
    options = [word for name, value in POT.items() for word in (f"--{name}", value)]
    asked = [word for policy in POLICIES for word in ("--policy", policy)]
    result = cli("build", model, "-o", folder, *options, *asked)
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(NOVEL.read_text(encoding="utf-8")[2000:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    report = {**RECORD, "dataset": "gov_report", "input": ""}
    records = (RECORD, {**RECORD, "answers": ["the dog"]}, report)
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(cli: Cli, pots: Path, model: Path, novel: Path, data: Path) -> dict[str, Any]:
    """Everything at once."""
    result = cli("eval", pots, "--text", novel, "--data", data, "--model", model, "--threads", 1,
                 "--documents", 2, "--length", LENGTH, "--length", 150 + LENGTH,
                 "--max-new-tokens", 4, "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_document_says_what_was_measured(found: dict[str, Any], pots: Path) -> None:
    assert (found["kind"], found["format"]) == ("potexport-eval", 1)
    assert list(found["tasks"]) == ["needle", "hit-rate", "perplexity", "qa", "summary"]
    assert (found["bundle"], found["untouched"]) == (pots.name, "tiny llama")
    assert (found["text"]["name"], len(found["text"]["sha256"])) == ("novel.txt", 64)
    assert (found["pot"]["slots"], found["pot"]["keep"]) == (384, 200)
    assert [each["label"] for each in found["policies"]] == LABELS
    # Unknown means what the policy has alone in a bundle: no catalyst, if it can do without.
    blind = {each["label"] for each in found["policies"] if not each["catalyst"]}
    assert blind == set(LABELS) - {"infinipot"}
    assert set(found["protocol"]) >= {"needle", "equal_memory", "oracle", "truncation", "question"}
    assert found["notes"] == []
    assert str(pots.parent) not in json.dumps(found)
    assert found["command"] == (
        "potexport eval pots.bundle --text novel.txt --data records.jsonl --model 'tiny llama' "
        "--length 900 --length 1050 --documents 2 --max-new-tokens 4 --seed 0"
    )


def test_every_reader_has_a_row_that_states_the_question(found: dict[str, Any]) -> None:
    readers = ["full", "oracle", *LABELS, "truncation"]
    without = {"hit-rate": {"full", "oracle"}, "perplexity": {"oracle"}}
    for task, entry in found["tasks"].items():
        rows = entry["rows"]
        asked = ["unknown"] if task == "perplexity" else ["unknown", "known"]
        wanted = [each for each in readers if each not in without.get(task, ())]
        if task in ("qa", "summary"):
            wanted.remove("oracle")
            lengths: list[int | None] = [None]
        else:
            lengths = [LENGTH, 150 + LENGTH]
            assert entry["lengths"] == lengths
        assert [(r["policy"], r.get("length"), r["question"]) for r in rows] == [
            (policy, length, mode) for policy in wanted for length in lengths for mode in asked
        ]
        for row in rows:
            depends = row["policy"] in DEPENDING and task != "perplexity"
            assert row["same_either_way"] is not depends


def test_needles_at_equal_memory(found: dict[str, Any]) -> None:
    entry = found["tasks"]["needle"]
    assert (entry["documents"], entry["questions"]) == (2, 8)
    assert entry["unit"] == "token"  # the tiny tokenizer has tokens of two digits
    for row in entry["rows"]:
        policy = row["policy"]
        if policy == "truncation":  # the whole pot less a question and its answer
            assert 200 < row["held"] < 384
        else:
            assert row["held"] == (row["length"] if policy == "full" else 200)
        assert (row["compressions"] > 2) == (policy in LABELS)
        assert 0 <= row["exact"]["low"] <= row["exact"]["value"] <= row["exact"]["high"] <= 1
        assert np.mean(row["per_document"]["exact"]) == pytest.approx(row["exact"]["value"])
        assert len(row["by_kind"]) == 4
        assert sum(cell["count"] for cell in row["cells"]) == row["questions"] == 8
        mean = sum(cell["exact"] * cell["count"] for cell in row["cells"]) / 8
        assert mean == pytest.approx(row["exact"]["value"])


def test_a_known_question_changes_only_what_looks_at_it(found: dict[str, Any]) -> None:
    nats = {
        (row["policy"], row["question"]): row["nats"]
        for row in found["tasks"]["needle"]["rows"]
        if row["length"] == LENGTH
    }
    for label in LABELS:
        differs = nats[label, "known"] != nats[label, "unknown"]
        assert differs == (label in DEPENDING), label


def test_costs_are_those_of_reading(found: dict[str, Any]) -> None:
    assert list(found["costs"]) == LABELS
    for cost in found["costs"].values():
        assert cost["tokens"] > 0
        assert cost["compressions"] > 0
        assert 0 < cost["share"] < 1


def test_scores_of_records(found: dict[str, Any]) -> None:
    for row in found["tasks"]["qa"]["rows"]:
        # Both records are about one document: there is nothing to draw again.
        assert (row["metric"], row["records"], row["documents"]) == ("f1", 2, 1)
        assert row["score"]["low"] == row["score"]["high"] == np.mean(row["per_record"])
    for row in found["tasks"]["summary"]["rows"]:
        assert (row["metric"], row["dataset"], row["records"]) == ("rouge-l", "gov_report", 1)


def test_what_fits_the_pot_is_what_the_untouched_model_knows(
    cli: Cli, pots: Path, model: Path, tmp_path: Path
) -> None:
    """One oracle for all: nothing was dropped, so every policy answers as PyTorch does."""
    tale = tmp_path / "tale.txt"
    tale.write_text("".join(f"Line {n} of the tale. " for n in range(99)), encoding="utf-8")
    result = cli("eval", pots, "--text", tale, "--model", model, "--task", "needle,hit-rate",
                 "--documents", 1, "--length", 260, "--question", "known", "--threads", 1,
                 "--json")  # fmt: skip
    found = json.loads(result.stdout)
    rows = {row["policy"]: row for row in found["tasks"]["needle"]["rows"]}
    for label in LABELS:
        assert (rows[label]["held"], rows[label]["compressions"]) == (260, 0)
        assert rows[label]["nats"]["value"] == pytest.approx(
            rows["full"]["nats"]["value"], abs=1e-3
        )
    for row in found["tasks"]["hit-rate"]["rows"]:
        if row["policy"] in LABELS:
            assert row["rate"]["value"] == 1


@pytest.mark.parametrize("label", LABELS)
def test_sharing_the_beginning_changes_nothing(pots: Path, novel: Path, label: str) -> None:
    """Against a session of its own that reads the document from its first token."""
    from potexport.evaluation.loop import Loop
    from potexport.runtime.session import Session

    session = Session.open(pots, threads=1, check=False, policy=LABELS)
    content = novel.read_text(encoding="utf-8")[:6000]
    ids, question = session.text.encode(content)[:LENGTH], "Whom does she marry?"
    loop = Loop(session, keep=150, catalysts=dict.fromkeys(LABELS, "Summarize."))
    beginning = loop.begin(ids)
    for other in LABELS[::-1]:  # whoever read before leaves no trace
        loop.read(beginning, ids, other, question)
    held = loop.read(beginning, ids, label, question)

    alone = Session.open(pots, threads=1, check=False, policy=label)
    alone.keep = 150
    alone.set_catalyst(question)
    alone.feed(ids)
    alone.logits()
    alone.compress(150)
    assert [each.shape for each in held.tokens] == [(2, 150)] * 2
    assert held.compressions == alone.stats.compressions > 2
    for each in (session, alone):
        each.feed(question)
    assert np.array_equal(session.logits(), alone.logits())


def test_held_tokens_are_those_in_the_pot(pots: Path, novel: Path) -> None:
    """Values of the first layer depend on their token alone: they tell which tokens are there."""
    from potexport.evaluation.loop import Loop
    from potexport.runtime.session import Session

    session = Session.open(pots, threads=1, check=False, policy=LABELS)
    ids = session.text.encode(novel.read_text(encoding="utf-8")[:6000])[:LENGTH]
    loop = Loop(session, keep=200, catalysts=dict.fromkeys(LABELS, "Summarize."))
    held = loop.read(loop.begin(ids), ids, "keydiff").tokens[0]
    values = session.backend.pot.values[0][0, :, :200].copy()  # (Hkv, 200, D)
    session.reset()
    words = np.unique(ids)
    session.feed(words[:380])
    session.logits()
    own = session.backend.pot.values[0][0]
    for head in range(2):
        for slot, token in enumerate(held[head]):
            place = np.flatnonzero(words == ids[token])[0]
            assert np.allclose(values[head, slot], own[head, place], atol=1e-4)


@pytest.mark.parametrize("by_prefill", [True, False])
def test_perplexity_of_what_is_kept_by_either_way(
    cli: Cli, pots: Path, model: Path, novel: Path, by_prefill: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A bundle without novelty is measured token by token."""
    folder = pots
    if not by_prefill:
        folder = tmp_path / "keys.bundle"
        result = cli("build", model, "-o", folder, "--pot", 64, "--chunk", 16, "--keep", 32,
                     "--policy", "keydiff", "--policy", "streaming")  # fmt: skip
        assert result.exit_code == 0, result.stderr
    result = cli("eval", folder, "--text", novel, "--model", model, "--task", "perplexity",
                 "--documents", 2, "--length", 700, "--threads", 1, "--json")  # fmt: skip
    entry = json.loads(result.stdout)["tasks"]["perplexity"]
    assert entry["scored_by"] == ("prefill" if by_prefill else "decode")
    assert len({row["tokens"] for row in entry["rows"]}) == 1
    nats = {row["policy"]: row["nats"]["value"] for row in entry["rows"]}
    if by_prefill:  # without a question the blend has one term left
        assert nats.pop("blend") == nats["keydiff"]
    assert len(set(nats.values())) == len(nats)
    for row in entry["rows"]:
        assert row["perplexity"]["value"] == pytest.approx(np.exp(row["nats"]["value"]))
        assert row["nats"]["value"] == pytest.approx(nats["full"], rel=0.1)
        above = row["nats"]["value"] - nats["full"]
        assert row["above_full"]["value"] == pytest.approx(above, abs=1e-9)


def test_people_get_tables_and_a_file(cli: Cli, pots: Path, novel: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    result = cli("eval", pots, "--text", novel, "--documents", 1, "--length", LENGTH,
                 "--policy", "keydiff", "--threads", 1, "--output", output)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for words in ("needle, 900 tokens, question unknown", "question known", "perplexity",
                  "equal memory:", "note: full is missing", "keydiff", "truncation"):  # fmt: skip
        assert words in result.stdout
    written = json.loads(output.read_text(encoding="utf-8"))
    assert {row["policy"] for row in written["tasks"]["needle"]["rows"]} == {
        "oracle", "keydiff", "truncation"
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_a_seed_gives_the_same_figures(cli: Cli, pots: Path, novel: Path) -> None:
    def run(seed: int) -> object:
        result = cli("eval", pots, "--text", novel, "--task", "needle", "--documents", 1,
                     "--length", LENGTH, "--policy", "keydiff", "--seed", seed, "--threads", 1,
                     "--json")  # fmt: skip
        return json.loads(result.stdout)["tasks"]

    assert run(1) == run(1) != run(2)


def test_mistakes_are_one_line(cli: Cli, pots: Path, novel: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(RECORD) + "\n{\n", encoding="utf-8")
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("One sentence. " * 20, encoding="utf-8")
    empty.write_text(" \n", encoding="utf-8")
    text = ("--text", novel)
    for arguments, *words in (
        ((), "nothing to evaluate on"),
        ((*text, "--task", "needles"), "no task 'needles'", "perplexity"),
        ((*text, "--task", "qa"), "needs records"),
        (("--data", bad, "--task", "needle"), "needs prose"),
        ((*text, "--task", "hit-rate"), "--model"),
        ((*text, "--policy", "nobody"), "no policy 'nobody'", "infinipot, snapkv"),
        (("--data", bad), "line 2 of bad.jsonl"),
        (("--data", tmp_path / "none.jsonl"), "cannot be read"),
        (("--text", tmp_path / "none.txt"), "cannot be read"),
        (("--text", empty), "empty"),
        (("--text", short), "short.txt has some"),
        ((*text, "--length", 60), "too short for 4 needles"),
        ((*text, "--task", "perplexity", "--length", 300), "fill the pot", "401"),
        ((*text, "--keep", 380), "keep is 380"),
        ((*text, "--output", tmp_path), "cannot write"),
        ((*text, "--output", tmp_path / "none" / "a.json"), "cannot write"),
        ((*text, "--question", "maybe"), "--question"),
    ):
        assert_refused(cli("eval", pots, *arguments), *words)
    assert_refused(cli("eval", tmp_path / "none", *text), "is not a folder")


def test_another_model_is_refused(cli: Cli, pots: Path, novel: Path, tmp_path: Path) -> None:
    from tests import tiny

    other = tiny.save(tmp_path / "other", "llama-tied", vocab_size=307, seed=1,
                      num_hidden_layers=2, max_position_embeddings=2048)  # fmt: skip
    assert_refused(cli("eval", pots, "--text", novel, "--model", other), "another model")
