"""The commands that look at a bundle on an NPU or bring it to one; `cli` adds them to its group."""

from __future__ import annotations

from pathlib import Path

import click

from potexport.cli_parts import as_json, print_json


@click.command(short_help="What an NPU makes of a bundle, and where precision is lost.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--soc", metavar="CHIP", help="To compile for. Default: the bundle's first.")
@click.option("--text", type=click.Path(), metavar="PATH",
              help="UTF-8 text that fills the pot. Default: random tokens.")  # fmt: skip
@click.option("--graph", "graphs", multiple=True, metavar="NAME",
              help="Look at this graph alone; may be given more than once.")  # fmt: skip
@as_json
def coverage(
    bundle: Path, soc: str | None, text: str | None, graphs: tuple[str, ...], json: bool
) -> None:
    """Compile BUNDLE's graphs for a chip, and compare each layer on its emulator with fp32.

    Exit code 1 if the chip refuses a node, or the error jumps behind a layer.
    """
    from potexport import coverage as coverages
    from potexport import progress, show_npu
    from potexport.runtime.reading import Document

    chip = coverages.chip(bundle, soc)
    content = None if text is None else "".join(Document.open(text).blocks())
    with progress.Stages(quiet=json) as stages:
        found = coverages.report(bundle, chip, text=content, graphs=graphs, on_stage=stages)
    print_json(found.to_json()) if json else show_npu.coverage(found)
    click.get_current_context().exit(0 if found.passed else 1)


@click.command(short_help="Copy a bundle to a phone and test it there.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--serial", metavar="ID", help="The device; `adb devices` lists them. "
              "Needed if there are several.")  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", "cpu", "npu"]), default="auto",
              help="Where the self-test runs; auto is both, if both do. [auto]")  # fmt: skip
@as_json
def push(bundle: Path, serial: str | None, backend: str, json: bool) -> None:
    """Copy BUNDLE and the runtime to an Android device by adb, and run the self-test there.

    Without adb or a device it prints the commands that do it. Exit code 1 if the test fails.
    """
    from potexport import progress, show_npu
    from potexport import push as pushing

    def tell(line: str) -> None:
        click.echo(line, err=json)  # stdout is for the one object

    with progress.Stages(quiet=json) as stages:
        done = pushing.push(bundle, serial=serial, backend=backend, tell=tell, on_stage=stages)
    print_json(done.to_json()) if json else show_npu.pushed(done)
    click.get_current_context().exit(0 if done.passed else 1)
