"""`python -m potexport.htp_worker JOB REPORT`: the process that may crash.

JOB is a JSON file made by `potexport.htp`; REPORT gets a JSON line for each thing that happened,
because what Qualcomm's libraries print goes to stdout and stderr. The last line is
`{"finished": true}` if all went well.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from potexport.errors import PotexportError

Say = Callable[..., None]
NO_FALLBACK = "fallback to CPU EP has been explicitly disabled"


def main(order: str, report: str) -> None:
    job = json.loads(Path(order).read_text())
    with Path(report).open("a") as file:

        def say(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        try:
            work = {"compile": _compile, "run": _run, "read": _read, "place": _place, "tap": _tap}
            if work[job["do"]](job, say):
                say(finished=True)
        except PotexportError as error:
            say(mistake=str(error))
    # Not sys.exit: taking the libraries down is one more chance to crash, after all is done.
    os._exit(0)


def _compile(job: dict[str, Any], say: Say) -> bool:
    """False if it failed, and said why."""
    import onnx_ir as ir

    from potexport import progress
    from potexport.lower_htp import lower

    sessions = []
    for graph in job["graphs"]:
        say(graph=graph)
        model = ir.load(Path(job["bundle"], f"{graph}.onnx"))
        lowered = lower(model)
        # A file and not bytes: from those, the second graph of a shared context does not compile.
        # In the bundle, for the weights must lie beside it, and be no link.
        path = Path(job["bundle"], f"{job['prefix']}{graph}.onnx")
        ir.save(model, path)
        started = perf_counter()
        session = _session(job, graph, path, say)
        if session is None:
            return False
        sessions.append(session)  # those that share weights must live until the last is made
        say(
            graph=graph,
            seconds=perf_counter() - started,
            peak_memory=progress.peak_memory() or 0,
            nodes=dict(Counter(kind for _, kind in _placed(session, on_htp=True))),
            rewrites=lowered.fired,
            embedding=lowered.embedding,
        )
    return True


def _session(job: dict[str, Any], graph: str, path: Path, say: Say) -> Any:
    """A session that compiled the graph and wrote its context; None, after saying why, if not."""
    import onnxruntime

    name, arch, model = job["soc"]
    options = _options(strict=True)
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": str(Path(job["output"], f"{graph}.{name}.onnx")),
        "ep.context_embed_mode": "0",
        "ep.context_node_name_prefix": f"{graph}_",
    }
    if job["shared"]:
        entries["ep.share_ep_contexts"] = "1"
        if graph == job["graphs"][-1]:
            entries["ep.stop_share_ep_contexts"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    sharing = {"enable_htp_weight_sharing": "1"} if job["shared"] else {}
    provider = {"backend_type": "htp", "htp_arch": str(arch), "soc_model": str(model), **sharing}
    _provide(options, provider)
    try:
        return onnxruntime.InferenceSession(str(path), options)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        if NO_FALLBACK not in str(error):
            say(graph=graph, failed=str(error).splitlines()[0][:300])
            return None
    options = _options(strict=False)
    _provide(options, provider)
    session = onnxruntime.InferenceSession(str(path), options)
    say(graph=graph, refused=_placed(session, on_htp=False))
    return None


def _options(*, strict: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    entries = {
        "session.record_ep_graph_assignment_info": "1",
        "session.disable_cpu_ep_fallback": "1" if strict else "0",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _provide(options: Any, provider: dict[str, str]) -> None:
    from potexport.runtime.qnn_backend import qnn_devices

    options.add_provider_for_devices(qnn_devices(), provider)


def _placed(session: Any, *, on_htp: bool) -> list[tuple[str, str]]:
    """Name and operator of the nodes that the HTP took, or did not take."""
    from potexport.runtime.qnn_backend import PROVIDER

    return [
        (node.name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        if (part.ep_name == PROVIDER) == on_htp
        for node in part.get_nodes()
    ]


def _backend(job: dict[str, Any]) -> Any:
    from potexport import bundle
    from potexport.runtime.qnn_backend import QnnBackend

    manifest = bundle.read(job["bundle"])
    contexts = {name: Path(path) for name, path in job["contexts"].items()}
    return QnnBackend(
        job["bundle"], manifest, contexts, embedding=job["embedding"], shared=False, threads=1
    )


def _run(job: dict[str, Any], say: Say) -> bool:
    """Each graph once, over given inputs."""
    import numpy as np

    from potexport.runtime.qnn_backend import Contexts

    with np.load(job["inputs"]) as file:
        given = {name: file[name] for name in file.files}
    made: dict[str, Any] = {}
    contexts = {name: Path(path) for name, path in job["contexts"].items()}
    runner = Contexts(list(contexts.values()), shared=False)
    for graph, path in contexts.items():
        say(graph=graph)
        loaded = runner.load(path)
        binding = loaded.binding()
        for name in loaded.inputs:
            binding.bind_input(name, given[f"{graph}/{name}"])
        for name, (dtype, shape) in loaded.outputs.items():
            made[f"{graph}/{name}"] = np.zeros(shape, dtype)
            binding.bind_output(name, made[f"{graph}/{name}"])
        binding.run()
    np.savez(job["result"], **made)
    return True


def _read(job: dict[str, Any], say: Say) -> bool:
    import numpy as np

    from potexport.recording import record
    from potexport.runtime.session import Session
    from potexport.runtime.text import Text

    backend = _backend(job)
    session = Session(backend.manifest, backend, Text.open(job["bundle"]))

    def tell(read: int, of: int) -> None:
        say(read=read, of=of)

    made = record(
        session,
        np.array(job["ids"], np.int32),
        forced=None if job["forced"] is None else np.array(job["forced"], np.int32),
        steps=job["steps"],
        catalyst=job["catalyst"],
        on_progress=tell,
    )
    made.save(Path(job["result"]))
    return True


def _place(job: dict[str, Any], say: Say) -> bool:
    from potexport import htp_taps

    return htp_taps.place(job, say)


def _tap(job: dict[str, Any], say: Say) -> bool:
    from potexport import htp_taps

    return htp_taps.tap(job, say)


if __name__ == "__main__":
    main(*sys.argv[1:])
