"""The command that measures; `cli` adds it to its group."""

from __future__ import annotations

import os
from pathlib import Path

import click

from potexport.cli_parts import COUNT, as_json, print_json

QUICK = (1_000,)
SECONDS = click.FloatRange(min=0, min_open=True)


@click.command(short_help="What bundles cost, beside each other and beside other programs.")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", multiple=True, metavar="PEER", help="Another program, by name; "
              "repeatable; all: those that are installed.")  # fmt: skip
@click.option("--model", help="What the bundles were built from, for --against.")
@click.option("--context", multiple=True, type=COUNT, metavar="TOKENS", help="Amount of text read "
              "before a token is generated; repeatable. [1000 8000 32000 100000]")  # fmt: skip
@click.option("--quick", is_flag=True, help="The first amount of text alone.")
@click.option("--read", type=click.IntRange(min=0), default=0, metavar="TOKENS",
              help="Also read so many with each bundle: does it slow down? [0]")  # fmt: skip
@click.option("--text", type=click.Path(), metavar="PATH", help="UTF-8 text to read; repeated if "
              "it is short. Default: random tokens.")  # fmt: skip
@click.option("--rounds", type=COUNT, default=5, help="Turns of each. [5]")
@click.option("--patience", type=SECONDS, default=300.0, metavar="SECONDS", help="That a peer may "
              "take to read one text. [300]")  # fmt: skip
@click.option("--threads", type=COUNT, help="Of each. Default: one for each core.")
@click.option("--cache", type=click.Path(path_type=Path), metavar="FOLDER", help="Where peers keep "
              "what they build. Default: the user's cache folder.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Also write the "
              "JSON there.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Also draw memory "
              "and time a token against tokens read, as SVG.")  # fmt: skip
@as_json
def bench(
    bundles: tuple[Path, ...],
    against: tuple[str, ...],
    model: str | None,
    context: tuple[int, ...],
    quick: bool,
    read: int,
    text: str | None,
    rounds: int,
    patience: float,
    threads: int | None,
    cache: Path | None,
    output: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    """Measure BUNDLES of one model, each in a process of its own and in turns, beside each other
    and beside other programs; ratios are to the first.

    \b
    potexport bench a.bundle b.bundle
    potexport bench a.bundle --against all --model model.gguf --quick
    """
    from potexport import peers, progress, show_bench
    from potexport.benching import run
    from potexport.benching.plot import draw, require
    from potexport.runtime.provider import cores
    from potexport.runtime.reading import Document

    if plot:
        require()
    settings = run.Settings(
        bundles=bundles,
        peers=peers.chosen(against),
        model=model,
        cache=cache or _cache(),
        contexts=context or (QUICK if quick else run.CONTEXTS),
        read=read,
        text="" if text is None else "".join(Document.open(text).blocks()),
        threads=threads or cores(),
        rounds=rounds,
        patience=patience,
    )
    with progress.Stages(quiet=json) as stages:
        found = run.bench(settings, on_stage=stages)
    document = found.to_json()
    if output:
        show_bench.write(output, document)
    if plot:
        draw(document, plot)
    print_json(document) if json else show_bench.tables(found)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "potexport"
