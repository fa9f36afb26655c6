"""Load a decoder and its tokenizer from a Hugging Face folder, a GGUF file or the hub.

Decides what is accepted, what is refused and with which words. Does not decide geometry, nor what
a GGUF means (`gguf_source`), and never loads a pickle.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib import parse, request

from potexport import gguf_source, kinds
from potexport.errors import PotexportError
from potexport.runtime.quiet import quietly

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# The first is read as it is; transformers can convert the others to a fast tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
UNREADABLE = (OSError, ValueError, TypeError, KeyError)
SILENT = 100  # above logging.CRITICAL
ACCEPTED = "expected a decoder with a key/value cache (llama, qwen2, …): choose another checkpoint"


@dataclass(frozen=True)
class Source:
    """Where a model comes from; `location` is an absolute path or a hub id."""

    kind: Literal["folder", "gguf", "hub"]
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.location}@{self.revision}" if self.revision else self.location

    @property
    def name(self) -> str:
        """Without the folders of this machine."""
        return str(self) if self.kind == "hub" else Path(self.location).name


def resolve(source: str) -> Source:
    """Tell a folder, a .gguf file and a hub id apart, and refuse what could never load."""
    path = Path(source).expanduser()
    if path.is_file():
        if not gguf_source.is_gguf(path):
            raise PotexportError(
                f"{source} is not a GGUF file; expected one, or the Hugging Face folder of a model"
            )
        return Source("gguf", str(path.resolve()))
    found = None if source.endswith(".gguf") else place(source)
    if found is None:
        raise PotexportError(
            f"{source} does not exist; expected a folder, a .gguf file or a hub id (org/name)"
        )
    config = fetch(found, "config.json", needed=True)
    # Where peft is installed, transformers would leave such an adapter in the model, unmerged.
    if fetch(found, "adapter_config.json") is not None:
        raise PotexportError(
            f"{source} holds an adapter; give the model it was trained on, and the adapter's own "
            f"folder with --adapter"
        )
    if found.kind == "folder":
        _check_folder(path)
    elif config is None:
        raise PotexportError(f"{found} has no config.json on the hub; choose a model repository")
    return found


def place(given: str) -> Source | None:
    """The folder or the hub's repository, whatever it holds; None for neither."""
    path = Path(given).expanduser()
    if path.is_dir():
        return Source("folder", str(path.resolve()))
    hub = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", given, re.ASCII)
    return Source("hub", hub[1], hub[2]) if hub else None


def read_config(source: Source, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config, without its weights; refuses what the exporter cannot take."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    own_code = False
    if source.kind != "gguf":
        raw = _raw_config(source)
        model_type = raw["model_type"]
        own_code = "auto_map" in raw and (model_type not in CAUSAL or trust_remote_code)
        if own_code and not trust_remote_code:
            raise PotexportError(
                f"{source}: model_type '{model_type}' is code in the repository, which is not run"
                f" unasked; read that code, then pass --trust-remote-code"
            )
        if model_type not in CONFIG_MAPPING and not own_code:
            raise PotexportError(
                f"{source}: model_type '{model_type}' is unknown to transformers; {ACCEPTED}"
            )
    with _quiet(), _opened(source) as where:
        try:
            config = AutoConfig.from_pretrained(**where, trust_remote_code=trust_remote_code)
        except (*UNREADABLE, ImportError, StrictDataclassError) as error:
            raise PotexportError(
                f"{source}: its configuration cannot be read ({first_line(error)}); {ACCEPTED}"
            ) from error
        if source.kind == "gguf":
            gguf_source.mend_config(Path(source.location), config)
        unfit = kinds.unfit(config, own_code=own_code)
    if unfit:
        raise PotexportError(f"{source}: model_type '{config.model_type}' {unfit}; {ACCEPTED}")
    return cast("PreTrainedConfig", config)


def load_model(
    source: Source,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The model in eval mode, without gradients, dense, every weight present and finite.

    config: as `read_config` gave it, if it was read before.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    auto: Any = AutoModelForCausalLM
    if config is None:
        config = read_config(source, trust_remote_code=trust_remote_code)
    config = copy.deepcopy(config)  # the model changes it
    wanted: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    bad: tuple[type[Exception], ...] = (OSError, RuntimeError, ImportError, SafetensorError)
    if source.kind == "gguf":
        gguf_source.check_rope(Path(source.location), config)
        wanted["quantization_config"] = GgufConfig(dequantize=True)
        bad += (ValueError,)
    else:
        wanted |= {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    with _quiet(), _opened(source) as where:
        try:
            model, report = auto.from_pretrained(
                **where, **wanted, config=config, output_loading_info=True
            )
        except bad as error:
            raise PotexportError(
                f"{source}: the weights cannot be loaded ({first_line(error)}); expected whole"
                f" .safetensors files or one .gguf: download the checkpoint again"
            ) from error
    kinds.refuse_codes(str(source), report["unexpected_keys"])
    if report["missing_keys"]:
        raise PotexportError(
            f"{source}: tensor {min(report['missing_keys'])} is missing from the weights; expected"
            f" every tensor of a {config.model_type}: download the checkpoint again"
        )
    check_finite(source, model)
    if source.kind == "gguf":
        gguf_source.make_plain(model, Path(source.location))
    return cast("PreTrainedModel", model.requires_grad_(False).eval())


def check_finite(source: Source, model: PreTrainedModel) -> None:
    """Refuse a model one of whose numbers is none, or too large for its type."""
    import torch

    for name, parameter in model.named_parameters():
        # Both ends of the range are NaN when any value is; 20 times faster than isfinite().all().
        if not torch.isfinite(torch.stack(torch.aminmax(parameter))).all():
            raise PotexportError(
                f"{source}: tensor {name} holds NaN or infinity in {parameter.dtype}; expected"
                f" finite weights: use --precision fp32 or download the checkpoint again"
            )


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The tokenizer: `tokenizer.json` as it stands, else converted; from a GGUF, repaired."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.kind == "gguf":
        with _quiet(), _opened(source) as where:
            return gguf_source.load_tokenizer(Path(source.location), where)
    # AutoTokenizer may rebuild the pre-tokenizer from a Python class; the file is the truth.
    loader = PreTrainedTokenizerFast if fetch(source, "tokenizer.json") else AutoTokenizer
    with _quiet(), _opened(source) as where:
        try:
            tokenizer = loader.from_pretrained(**where)
            if not isinstance(tokenizer, PreTrainedTokenizerFast):
                raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer")
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise PotexportError(
                f"{source}: the tokenizer cannot be loaded ({first_line(error)}); expected a"
                f" tokenizer.json: save one with the tokenizer's save_pretrained"
            ) from error
    return tokenizer


def tokenizer_matches(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer that can produce an id the model has no embedding for."""
    ids = max(tokenizer.get_vocab().values()) + 1
    rows = config.get_text_config().vocab_size
    if ids > rows:
        raise PotexportError(
            f"the tokenizer has {ids} ids and the model {rows} embeddings; expected no more ids"
            f" than embeddings: use the tokenizer the model was trained with"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[str]:
    """Write the tokenizer's files into `folder`; return their names within it, sorted."""
    with _quiet():
        written = tokenizer.save_pretrained(folder)
    # Templates beside the default one are not for this runtime, and a bundle has no folders.
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    return sorted({os.path.relpath(path, folder) for path in written if os.path.isfile(path)})


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write a plain Hugging Face folder: all of it or, on any failure, none of it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PotexportError(f"{folder} exists and is not empty; remove it or name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        with _quiet():
            model.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise PotexportError(
            f"{path} has no config.json; name the folder that has, or a .gguf file"
        )
    if not any(path.glob("*.safetensors")):
        pickle = next((file.name for kind in PICKLES for file in path.glob(kind)), None)
        has = f"only pickle weights ({pickle}), and no pickle is ever loaded" if pickle else "none"
        raise PotexportError(
            f"{path}: expected .safetensors weights, found {has}; save the model again with"
            f" save_pretrained, or download its safetensors"
        )
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise PotexportError(
            f"{path} has no tokenizer; expected tokenizer.json or a file that converts to it"
            f" ({', '.join(TOKENIZER_FILES[1:])}): copy the tokenizer's files into the folder"
        )


def fetch(source: Source, name: str, *, needed: bool = False) -> Path | None:
    """One file of a folder or of a hub repository; None when the source has no such file.

    needed: whether every source of its kind has it, so that offline its absence proves nothing.
    """
    if source.kind == "folder":
        path = Path(source.location, name)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError as Unreachable

    offline = _offline()
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": offline}
    try:
        with _quiet():
            return Path(hf_hub_download(source.location, name, **where))
    except (OSError, EntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        unreachable = isinstance(error, Unreachable)
        absent = isinstance(error, EntryNotFoundError) and not unreachable
        # Offline, a repository whose configuration is in the cache has there all it ever had.
        if absent or (unreachable and offline and not needed):
            return None
        why = "no network, and not in the cache" if unreachable else first_line(error)
        raise PotexportError(
            f"{source} is no local path, and the hub did not give its {name} ({why}); check the"
            f" spelling and the network, or pass a local folder"
        ) from error


def _offline() -> bool:
    """Whether the hub is out of reach; asked of the name server, to save 24 s of retries."""
    from huggingface_hub import constants

    try:
        host = parse.urlsplit(constants.ENDPOINT).hostname
        reach: object = request.getproxies() or socket.getaddrinfo(host, 443)
    except OSError:
        reach = None
    return constants.HF_HUB_OFFLINE or not reach


def _raw_config(source: Source) -> dict[str, Any]:
    """config.json as written, refused when it is no model's or a quantized model's."""
    path = fetch(source, "config.json", needed=True)
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path else {}
        _ = raw["model_type"]
    except UNREADABLE as error:
        raise PotexportError(f"{source}: config.json names no model_type; {ACCEPTED}") from error
    kinds.refuse_quantized(str(source), raw)
    return raw


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers and the hub client off the terminal, then give them back as they were."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as its_logging

    own: Any = its_logging
    levels = own.get_verbosity(), hub_logging.get_verbosity()
    bars = own.is_progress_bar_enabled()
    # The GGUF reader's bar is tqdm's own: only a redirected stream stops it.
    # And it imports torchao where that is installed, which logs what this machine lacks.
    with quietly(), contextlib.redirect_stderr(io.StringIO()):
        own.set_verbosity(SILENT)
        hub_logging.set_verbosity(SILENT)
        own.disable_progress_bar()
        try:
            yield
        finally:
            own.set_verbosity(levels[0])
            hub_logging.set_verbosity(levels[1])
            if bars:
                own.enable_progress_bar()


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[dict[str, Any]]:
    """Arguments that lead `from_pretrained` to the source."""
    if source.kind == "folder":
        yield {"pretrained_model_name_or_path": source.location, "local_files_only": True}
    elif source.kind == "gguf":
        with gguf_source.opened(Path(source.location)) as where:
            yield where
    else:
        hub = {"revision": source.revision or "main", "local_files_only": _offline()}
        yield {"pretrained_model_name_or_path": source.location, **hub}
