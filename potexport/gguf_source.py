"""What a GGUF file says, and the mending of what transformers' conversion of it loses.

Decides how a GGUF's tokenizer, stop tokens and rotary scaling are read; the weights are
transformers' to convert. The oracle is the file's own arrays, read by llama.cpp's `gguf` package.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from potexport import gguf_gemma3
from potexport.errors import PotexportError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# `tokenizer.ggml.pre`, read in llama.cpp's src/llama-vocab.cpp (llm_tokenizer_bpe, load).
# The first: every `\p{N}` alone, then GPT-2's regex. transformers 5.24 leaves out the former.
DIGITS_APART = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
GPT2_REGEX = frozenset(
    {"gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais"}
)
# A word that is in the vocabulary is never cut, and BOS is added unless the file says otherwise.
WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
    | {"jina-v5-nano", "tekken"}
)
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # `tokenizer.ggml.model`
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # `tokenizer.ggml.token_type`
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # our name: GGUF's
# What gguf raises of a file that is none.
DAMAGED = (OSError, ValueError, IndexError, KeyError, OverflowError, TypeError, RecursionError)
MOST_ELEMENTS = 1 << 22  # of one list: a vocabulary, its merges
ADVICE = "pass the model's Hugging Face folder, or convert it again with a current llama.cpp"


def _line(error: Exception) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else "?" for c in line)


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF does."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def metadata(path: Path) -> dict[str, Any]:
    """Every key of the file, with "tensors" and "elements" (their names, their sizes' sum)."""
    stat = path.stat()
    return _metadata(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _reader(path: Path, modified: int, size: int) -> Any:
    try:
        return _quick_reader()(path)
    except DAMAGED as error:
        raise PotexportError(
            f"{path.name} is cut short or damaged ({_line(error)}); expected a whole"
            f" GGUF of version 2 or 3: download it again"
        ) from error


@functools.cache
def _quick_reader() -> type[Any]:
    """gguf's reader makes five arrays of a mapped file for each length and each text; this one
    makes one, of plain memory. A vocabulary of 49k tokens: 0.4 s in place of 1.7."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    kind = functools.cache(lambda dtype, order: np.dtype(dtype).newbyteorder(order))

    class Reader(GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

        def _get(
            self, offset: int, dtype: Any, count: Any = 1, override_order: str | None = None
        ) -> Any:
            wanted = kind(dtype, override_order or self.byte_order)
            first, size = int(offset), wanted.itemsize * int(count)
            if not 0 <= size <= self._data.size - first:  # a list of numbers would go on
                raise IndexError(f"it has no {size} bytes at {first}")
            return self._data[first : first + size].view(wanted)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:  # its kind in 4 bytes, its length in 8
                length = int(self._get(int(orig_offs) + 4, np.uint64)[0])
                if length > MOST_ELEMENTS:
                    raise ValueError(f"it has a list of {length}")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader


@functools.lru_cache(maxsize=1)
def _metadata(path: Path, modified: int, size: int) -> dict[str, Any]:
    reader = _reader(path, modified, size)
    try:
        facts: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
    except DAMAGED as error:
        raise PotexportError(
            f"{path.name} is cut short or damaged ({_line(error)}); expected a whole GGUF of "
            "version 2 or 3: download it again"
        ) from error
    facts["tensors"] = frozenset(tensor.name for tensor in reader.tensors)
    facts["elements"] = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return facts


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, Any]]:
    """Arguments that lead `from_pretrained` to the file, and to nothing that lies beside it."""
    import gguf

    stat = path.stat()
    reader = _reader(path, stat.st_mtime_ns, stat.st_size)  # refuses a damaged file
    # transformers builds the same name map for every module: 5 of the 11 s that SmolLM2 takes; and
    # reads the file anew for config, weights and tokenizer.
    once = functools.cache(gguf.get_tensor_name_map)
    with (
        mock.patch.object(gguf, "get_tensor_name_map", once),
        mock.patch.object(gguf, "GGUFReader", return_value=reader),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as alone,
    ):
        try:
            Path(alone, path.name).symlink_to(path)
        except OSError:  # Windows, without the right to make links
            alone = str(path.parent)
        yield {"pretrained_model_name_or_path": alone, "gguf_file": path.name}


def mend_config(path: Path, config: PreTrainedConfig) -> None:
    """Put into the config, in place, what the file says and transformers' conversion leaves out."""
    facts = metadata(path)
    if facts["general.architecture"] == "gemma3":
        gguf_gemma3.mend(config, facts, path.name)


def check_rope(path: Path, config: PreTrainedConfig) -> None:
    """Refuse a rotary scaling that the file holds and transformers' conversion drops."""
    facts = metadata(path)
    if facts["general.architecture"] == "gemma3":  # `mend_config` saw to it
        return
    kind = facts.get(f"{facts['general.architecture']}.rope.scaling.type", "none")
    scaled = kind != "none" or any(name.startswith("rope_f") for name in facts["tensors"])
    read = config.to_dict().get("rope_parameters") or {}
    if scaled and read.get("rope_type", "default") == "default":
        raise PotexportError(
            f"{path.name}: its rotary scaling is lost when transformers converts it; expected a"
            f" model without: pass the model's Hugging Face folder instead"
        )


def make_plain(model: PreTrainedModel, path: Path) -> None:
    """Forget that the model was a GGUF, keep its stop tokens, and check no weight was left out."""
    facts = metadata(path)
    room = sum(parameter.numel() for parameter in model.parameters())
    if facts["elements"] > room:
        raise PotexportError(
            f"{path.name} holds {facts['elements']} weights and a {model.config.model_type} has"
            f" room for {room}: transformers would drop some; pass the Hugging Face folder instead"
        )
    for holder, state in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        vars(holder).pop(state, None)  # left behind by some of transformers' GGUF paths
    model.config.name_or_path = path.name
    ids = {name: facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    # A chat ends at eot or eom, where the file has them, as much as at eos.
    stops = [ids["eos"], *(facts.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    eos = list(dict.fromkeys(stop for stop in stops if stop is not None))
    generation = model.generation_config
    assert generation is not None  # every causal model of transformers has one
    generation._from_model_config = False  # or it would be derived from the config again
    generation.bos_token_id, generation.pad_token_id = ids["bos"], ids["pad"]
    generation.eos_token_id = eos[0] if len(eos) == 1 else eos or None


def load_tokenizer(path: Path, where: dict[str, Any]) -> PreTrainedTokenizerFast:
    """transformers' conversion, mended, then compared with the file's own arrays.

    Args:
        where: the arguments of `from_pretrained` that lead to the file.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    facts = metadata(path)
    model, pre = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise PotexportError(
            f"{path.name}: tokenizer model {model!r} is not supported; expected gpt2 (byte-level"
            f" BPE) or llama (SentencePiece): pass the model's Hugging Face folder"
        )
    converted = fast.from_pretrained(**where)
    state = json.loads(converted.backend_tokenizer.to_str())
    if model == BYTE_LEVEL:
        _mend_byte_level(state, facts, path.name)
    else:
        _mend_sentencepiece(state, facts)
    tokens = facts["tokenizer.ggml.tokens"]
    unsaid = converted.add_bos_token or pre in WHOLE_WORDS
    named = {name: facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{f"{name}_token": None if id is None else tokens[id] for name, id in named.items()},
        add_bos_token=facts.get("tokenizer.ggml.add_bos_token", unsaid),
        add_eos_token=facts.get("tokenizer.ggml.add_eos_token", False),
        chat_template=converted.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=facts[f"{facts['general.architecture']}.context_length"],
    )
    _check(tokenizer, facts, path.name)
    return tokenizer


def _mend_byte_level(state: dict[str, Any], facts: dict[str, Any], name: str) -> None:
    """Split as `tokenizer.ggml.pre` says; take vocabulary and special tokens from the file."""
    pre = facts.get("tokenizer.ggml.pre")
    if pre in DIGITS_APART:
        digits = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [digits, state["pre_tokenizer"]],
        }
    elif pre not in GPT2_REGEX and state["pre_tokenizer"]["type"] == "ByteLevel":
        # Neither known here, nor to transformers, which would have put its regex before ByteLevel.
        raise PotexportError(
            f"{name}: tokenizer.ggml.pre {pre!r} names no known pre-tokenizer, and a guess would"
            f" split text wrongly; {ADVICE}"
        )
    if facts.get("tokenizer.ggml.add_space_prefix", False):
        raise PotexportError(
            f"{name}: add_space_prefix has no agreed meaning for a byte-level tokenizer; expected"
            f" false: pass the model's Hugging Face folder"
        )
    tokens = facts["tokenizer.ggml.tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    state["added_tokens"] = [
        {"id": id, "content": token, "special": kind == CONTROL, **plain}
        for id, (token, kind) in enumerate(
            zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
        )
        if kind in (CONTROL, USER_DEFINED)
    ]
    state["model"]["vocab"] = {token: id for id, token in enumerate(tokens)}
    state["model"]["ignore_merges"] = pre in WHOLE_WORDS


def _mend_sentencepiece(state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Drop tokens that transformers' Llama class invents, and the space prefix if so told."""
    size = len(facts["tokenizer.ggml.tokens"])
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    _add_user_defined(state, facts)
    scores = _scores(facts)  # transformers ranks Gemma's merges by id, which need not be the same
    # What is user-defined has none, and is never merged.
    state["model"]["merges"].sort(key=lambda pair: -scores.get("".join(pair), math.inf))
    if facts.get("tokenizer.ggml.add_space_prefix", True):
        return
    if (state["pre_tokenizer"] or {}).get("type") == "Metaspace":
        state["pre_tokenizer"]["prepend_scheme"] = "never"
    for part, key, drop in (
        ("normalizer", "normalizers", "Prepend"),
        ("decoder", "decoders", "Strip"),
    ):
        steps = (state[part] or {}).get(key)
        if steps:
            state[part][key] = [step for step in steps if step["type"] != drop]


def _add_user_defined(state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Take every user-defined token out of a text before anything is merged, as SentencePiece does.

    transformers leaves Gemma's runs of spaces to merges, which cut 36 into 16 and 20, not 31 and 5.
    """
    known, model = {token["id"] for token in state["added_tokens"]}, state["model"]
    tokens, types = facts["tokenizer.ggml.tokens"], facts.get("tokenizer.ggml.token_type", ())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    new = {id for id, kind in enumerate(types) if kind == USER_DEFINED and id not in known}
    if not new:
        return
    names = {token: id for token, id in model["vocab"].items() if id in new}
    model["merges"] = [
        merge for merge in model["merges"] if not {*merge, "".join(merge)} & names.keys()
    ]
    rest = {token: id for token, id in model["vocab"].items() if id not in new}
    model["vocab"] = rest | {tokens[id].replace("▁", " "): id for id in new}
    state["added_tokens"] += [
        {"id": id, "content": tokens[id].replace("▁", " "), "special": False, **plain} for id in new
    ]
    state["added_tokens"].sort(key=lambda token: token["id"])


def _check(tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], name: str) -> None:
    """Compare the finished tokenizer with the file's arrays; name the first difference."""
    for what, found, expected in _compared(tokenizer, facts):
        if found != expected:
            raise PotexportError(
                f"{name}: the converted tokenizer differs in {what}: found {found!r}, expected"
                f" {expected!r}; {ADVICE}"
            )


def _compared(
    tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any]
) -> Iterator[tuple[str, object, object]]:
    """What is compared, as the tokenizer has it, and as the file says it should be."""
    byte_level = facts["tokenizer.ggml.model"] == BYTE_LEVEL
    tokens = facts["tokenizer.ggml.tokens"]
    found = {id: token for token, id in tokenizer.get_vocab().items()}
    yield "the number of ids", max(found) + 1, len(tokens)
    for id, token in enumerate(tokens):
        if byte_level:
            yield f"token {id}", found.get(id), token
        else:  # SentencePiece files write runs of spaces either way
            yield f"token {id}", found.get(id, "").replace(" ", "▁"), token.replace(" ", "▁")
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    if "tokenizer.ggml.merges" in facts:
        yield "the number of merges", len(merges), len(facts["tokenizer.ggml.merges"])
        for rank, merge in enumerate(facts["tokenizer.ggml.merges"]):
            yield f"merge {rank}", " ".join(merges[rank]), merge
    elif not byte_level and "tokenizer.ggml.scores" in facts:
        yield "the order of merges", _first_out_of_order(merges, facts), None
    added = tokenizer.added_tokens_decoder
    for id, kind in enumerate(facts.get("tokenizer.ggml.token_type", ())):
        if kind == CONTROL:
            yield f"special token {id}", id in added and added[id].special, True
    ids = {ours: facts.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in SPECIAL.items()}
    for name, special in ids.items():
        yield f"the {name} token", getattr(tokenizer, f"{name}_token_id"), special
    bare = tokenizer.encode("a", add_special_tokens=False)
    bos = [ids["bos"]] if facts.get("tokenizer.ggml.add_bos_token", tokenizer.add_bos_token) else []
    eos = [ids["eos"]] if facts.get("tokenizer.ggml.add_eos_token", False) else []
    yield "what it adds to a text", tokenizer.encode("a"), [*bos, *bare, *eos]
    if not byte_level and "tokenizer.ggml.add_space_prefix" in facts:
        prefixed = found[bare[0]].startswith("▁")
        yield "its space prefix", prefixed, facts["tokenizer.ggml.add_space_prefix"]


def _first_out_of_order(merges: list[list[str]], facts: dict[str, Any]) -> str | None:
    """The first merge that SentencePiece, which goes by scores, would make before the one ahead."""
    scores = _scores(facts)
    made = [token for pair in merges if (token := "".join(pair)) in scores]
    pairs = itertools.pairwise(made)
    return next((after for before, after in pairs if scores[after] > scores[before]), None)


def _scores(facts: dict[str, Any]) -> dict[str, float]:
    """Of the tokens that SentencePiece merges others to."""
    names = ("tokens", "scores", "token_type")
    tokens, scores, types = (facts.get(f"tokenizer.ggml.{name}", ()) for name in names)
    rows = zip(tokens, scores, types, strict=False)
    return {token.replace(" ", "▁"): score for token, score, kind in rows if kind == NORMAL}
