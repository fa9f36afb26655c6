"""The command that measures; `cli` adds it to its group."""

from __future__ import annotations

from pathlib import Path

import click

from potexport.cli_parts import as_json, print_json


@click.command(short_help="What bundles cost, side by side.")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--read", type=click.IntRange(min=0), default=0, metavar="TOKENS",
              help="Also read so many tokens of --text: is it flat? [0]")  # fmt: skip
@click.option("--text", type=click.Path(), metavar="PATH", help="UTF-8 text for --read; repeated "
              "if it is short.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each core.")
@as_json
def bench(
    bundles: tuple[Path, ...], read: int, text: str | None, threads: int | None, json: bool
) -> None:
    """Measure BUNDLES, each in a process of its own and in turns; ratios are to the first."""
    from potexport import bench as benches
    from potexport import progress, show_bench
    from potexport.runtime.reading import Document

    content = "" if text is None else "".join(Document.open(text).blocks())
    with progress.Stages(quiet=json) as stages:
        found = benches.bench(
            list(bundles), read=read, text=content, threads=threads, on_stage=stages
        )
    print_json([costs.to_json() for costs in found]) if json else show_bench.costs(found)
