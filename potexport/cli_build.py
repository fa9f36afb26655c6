"""The command that makes a bundle, and the one that lists what a compression can keep."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from potexport.cli_parts import adapter, as_json, print_json, trust
from potexport.coding import POT_DTYPES
from potexport.spec import PRECISIONS


@click.command(short_help="Make a bundle from a model.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the new bundle.")
@adapter
@click.option("--target", default="cpu", help="Where it is to run; `potexport targets`. [cpu]")
@click.option("--runtime", type=click.Choice(["onnxruntime", "executorch"]), help="What is to run "
              "it there. Default: onnxruntime, where it has such a target.")  # fmt: skip
@click.option("--soc", multiple=True, metavar="CHIP", help="Chip to compile for, by name; may be "
              "given more than once. For NPU targets.")  # fmt: skip
@click.option("--compress-on", type=click.Choice(["npu", "cpu"]), help="Where compressions run. "
              "Default: the NPU, if its emulator keeps the CPU's slots.")  # fmt: skip
@click.option("--pot", type=int, metavar="SLOTS", help="Slots of the pot, one token each. "
              "Default: an eighth of the model's context, from 512 to 2,048.")  # fmt: skip
@click.option("--keep", type=int, metavar="SLOTS", help="Slots that a compression keeps, if the "
              "runtime does not say otherwise. Default: half of the pot.")  # fmt: skip
@click.option("--keep-max", type=int, metavar="SLOTS", help="The most that the runtime may keep. "
              "Default: the pot less a chunk.")  # fmt: skip
@click.option("--chunk", type=int, metavar="TOKENS", help="Tokens read in one pass. "
              "Default: 64, at most a quarter of the pot.")  # fmt: skip
@click.option("--catalyst-width", type=int, metavar="TOKENS", help="Most tokens of the question or "
              "instruction that scores the pot. Default: 32.")  # fmt: skip
@click.option("--positions", type=int, metavar="COUNT", help="Where tokens may stand: kept ones "
              "stay at their place until it ends, and then move to the front. Default: four "
              "pots, or the model's context if that is less.")  # fmt: skip
@click.option("--pot-shape", metavar="SHAPE", help="Slots of the layers, --pot on average: "
              "uniform, pyramid, or a JSON file with a list of them. [uniform]")  # fmt: skip
@click.option("--policy", multiple=True, metavar="NAME[:SETTINGS]", help="What a compression "
              "keeps; `potexport policies`. May be given more than once: the first is used unless "
              "another is asked for. Default: the best measured for the model's size.")  # fmt: skip
@click.option("--alpha", type=float, metavar="SHARE", help="Setting of a policy: the share, 0 to "
              "1, of kept slots that go to novel tokens. Default: the policy's.")  # fmt: skip
@click.option("--pool", type=int, metavar="SLOTS", help="Setting of a policy: scores are pooled "
              "over this many slots, an odd number. Default: the policy's.")  # fmt: skip
@click.option("--sink", type=int, metavar="SLOTS",
              help="First slots that are always kept. Default: 4.")  # fmt: skip
@click.option("--recent", type=int, metavar="SLOTS",
              help="Last slots that are always kept. Default: 16.")  # fmt: skip
@click.option("--precision", type=click.Choice(list(PRECISIONS)),
              help="Of weights and pot. Default: the target's.")  # fmt: skip
@click.option("--pot-dtype", type=click.Choice(list(POT_DTYPES)), help="Of the pot alone; int8 and "
              "int4 keep sinks and the newest slots in full precision. For --target cpu. Default: "
              "the precision's.")  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE", help="Text, some "
              "pages of the kind that will be read; for --precision a16w8, the policy "
              "expected-attention, and better int8 and int4 pots.")  # fmt: skip
@click.option("--opset", type=int, metavar="VERSION",
              help="ONNX operator set, 18 to 23. Default: 23.")  # fmt: skip
@click.option("--catalyst", metavar="TEXT", help="Instruction that scores the pot where there is "
              "no question. Default: to summarize what matters, for policies that "
              "need one; the others do without.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the bundle, once the new one is complete.")
@trust
@click.option("--dry-run", is_flag=True,
              help="Print shapes, file sizes and memory; do and write nothing.")  # fmt: skip
@as_json
def build(
    output: Path | None,
    force: bool,
    dry_run: bool,
    json: bool,
    alpha: float | None,
    pool: int | None,
    **given: Any,
) -> None:
    """Make a bundle from MODEL: a Hugging Face folder, a .gguf file, or a hub id (org/name)."""
    from potexport import folders, pipeline, progress, show

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output': the folder of the new bundle.")
    chosen = {name: value for name, value in given.items() if value is not None}
    options = pipeline.Options(settings={"alpha": alpha, "pool": pool}, **chosen)
    if dry_run:
        if output:
            folders.refuse_existing(output, force=force)
        decided = pipeline.plan(options)
        print_json(show.plan_json(decided)) if json else show.plan(decided)
        return
    assert output is not None
    started = perf_counter()
    with progress.Stages(quiet=json) as stages:
        manifest = pipeline.build(options, output, force=force, stage=stages)
    seconds = perf_counter() - started
    if json:
        print_json(show.built_json(output, manifest, seconds, stages.seconds))
    else:
        show.built(output, manifest, seconds)


@click.command()
@as_json
def policies(json: bool) -> None:
    """List the policies: what a compression keeps, and what each costs."""
    from potexport import pipeline, plugins, show_policies

    pipeline.require_export_packages()
    from potexport.graphs.policies import _find

    found: dict[str, dict[str, Any]] = {}
    for name in plugins.names(_find.PACKAGE):
        kind = _find.policy_class(name)
        policy = kind()
        found[name] = {
            "summary": show_policies.summary(kind.__module__),
            "source": show_policies.source(kind),
            "needs": sorted(policy.needs),
            "window": policy.observed,
            "can_be_blind": policy.can_be_blind,
            "costs": show_policies.costs(policy.needs),
            "settings": {setting.name: setting.default for setting in fields(kind)},
        }
    print_json(found) if json else show_policies.policies(found)
