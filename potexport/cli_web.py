"""The command that serves a bundle to a browser; `cli` adds it to its group."""

from __future__ import annotations

from pathlib import Path

import click

from potexport.cli_parts import as_json, print_json


@click.command(short_help="Run a bundle in a browser on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="PORT",
              help="On 127.0.0.1. Default: any that is free.")  # fmt: skip
@click.option("--ort", type=click.Path(path_type=Path), metavar="PATH",
              help="The package of onnxruntime-web from npm. Default: fetched once with npm, and "
              "kept.")  # fmt: skip
@click.option("--no-check", is_flag=True,
              help="Compare the files' sizes only, not their SHA-256.")  # fmt: skip
@as_json
def web(bundle: Path, port: int, ort: Path | None, no_check: bool, json: bool) -> None:
    """Serve a page on this machine that runs BUNDLE in the browser: it reads a text file of any
    length, answers, and shows the pot. Ends with Ctrl-C.

    \b
    potexport build MODEL --target web -o smol.bundle
    potexport web smol.bundle
    """
    from potexport import bundle as bundles
    from potexport.web import ort_web, serve

    manifest = bundles.read(bundle)
    serve.check(manifest)
    bundles.check_files(bundle, manifest, digests=not no_check)
    served = serve.files(bundle, manifest, ort_web.find(ort))
    with serve.Server(served, port=port) as server:
        if json:
            print_json({"url": server.url, "bundle": str(bundle)}, indent=None)
        else:
            click.echo(f"{server.url} runs {bundle.name} in a browser; Ctrl-C ends it")
        server.serve_forever()
