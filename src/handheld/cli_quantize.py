"""The commands that look for a recipe, and pack what it stores."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from handheld.errors import HandheldError
from handheld.options import (
    Bake,
    Calibrate,
    Checkpoint,
    FixedSchedule,
    Input,
    Json,
    Layout,
    Mean,
    Model,
    Out,
    Quality,
    RecipeName,
    Std,
    Timeout,
    Trust,
    document,
    names_of,
    numbers_of,
    speaking,
)

app = typer.Typer()

Candidates = Annotated[
    str,
    typer.Option(help="Recipes that layers are tried in, separated by commas: w8,w4,lut6,lut4,levels1,… if left out."),
]


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld sensitivity my_net.py:build --calibrate pictures\n"
    "  handheld sensitivity efficientformerv2_s0 --calibrate drawn:4 --candidates w8,w4c,lut4"
)
def sensitivity(
    model: Model,
    calibrate: Calibrate = None,
    candidates: Candidates = "",
    out: Out = Path("out"),
    checkpoint: Checkpoint = None,
    inputs: Input = None,
    quality: Quality = None,
    layout: Layout = "nchw",
    bake_preprocessing: Bake = False,
    mean: Mean = None,
    std: Std = None,
    schedule: FixedSchedule = None,
    timeout: Timeout = 3600,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """How much the outputs suffer if one layer alone is stored in fewer bits.

    Layer by layer and width by width, with a plot. Goes on where it was; without --calibrate, by the weights alone.
    """
    with speaking():
        from handheld import api, views_quantize
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            found = api.sensitivity(
                model,
                candidates=names_of(candidates),
                calibrate=calibrate,
                out=out,
                checkpoint=checkpoint,
                inputs=inputs or (),
                quality=quality,
                layout=layout,
                bake_preprocessing=bake_preprocessing,
                mean=numbers_of(mean, "mean"),
                std=numbers_of(std, "std"),
                schedule=schedule,
                timeout=timeout,
                trust=trust,
                progress=progress,
            )
        if json:
            document(found.sensitivity)
        else:
            views_quantize.show_sensitivity(console(), found)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld search my_net.py:build --calibrate pictures --size 3MB --recipe-out three.toml\n"
    "  handheld export my_net.py:build --recipe three.toml --to coreml,coreai,onnx\n"
    "  handheld search my_net.py:build --calibrate pictures --latency 3 --to litert --recipe-out quick.toml"
)
def search(
    model: Model,
    calibrate: Calibrate = None,
    size: Annotated[str | None, typer.Option(help="At most this much for all constants, such as 220MB.")] = None,
    bits: Annotated[float | None, typer.Option(help="At most so many per weight, on average.")] = None,
    psnr: Annotated[
        float | None, typer.Option(help="At least this many dB of the outputs, in as few bytes as that takes.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="At most so many ms for an inference of a file, which is made and timed: with --to."),
    ] = None,
    to: Annotated[str, typer.Option(help="Of --latency: which format's file.")] = "",
    on: Annotated[str, typer.Option(help="Of --latency: where it is timed, as of handheld bench.")] = "host",
    threads: Annotated[int, typer.Option(help="Of --latency: of the runtime.")] = 2,
    strategy: Annotated[
        Literal["greedy", "bitsfusion"], typer.Option(help="handheld's own, or BitsFusion's (arXiv 2406.04333, §3.3).")
    ] = "greedy",
    floats: Annotated[Literal["fp32", "fp16"], typer.Option(help="What the rest is stored in, for sizes.")] = "fp32",
    recipe_out: Annotated[Path, typer.Option(help="The .toml or .yaml to write.")] = Path("mixed.toml"),
    candidates: Candidates = "",
    out: Out = Path("out"),
    checkpoint: Checkpoint = None,
    inputs: Input = None,
    quality: Quality = None,
    layout: Layout = "nchw",
    bake_preprocessing: Bake = False,
    mean: Mean = None,
    std: Std = None,
    schedule: FixedSchedule = None,
    timeout: Timeout = 3600,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Find the recipe that fits a budget: a form for each layer, written to a file for --recipe.

    By each layer's sensitivity, measured first or read from where `handheld sensitivity` left it. For a latency, by
    what each layer costs in integers, and by files that are exported and timed.
    """
    with speaking():
        from handheld import api, views_quantize
        from handheld.console import Progress, console
        from handheld.export import recipe as recipes

        if recipes.is_file(out.name):
            raise HandheldError(f"--out {out}: the recipe goes elsewhere.", hint=f"Type: --recipe-out {out}")
        if sum(given is not None for given in (size, bits, psnr, latency)) != 1:
            hint = "Type: --size 220MB, --bits 4, --psnr 30, or --latency 5 --to litert"
            raise HandheldError("expected one budget.", hint=hint)
        if latency is None and (to or on != "host"):
            raise HandheldError("--to and --on go with --latency: other budgets are of no one format.")
        asked = api.ExportOptions(
            calibrate=calibrate,
            out=out,
            checkpoint=checkpoint,
            inputs=inputs or (),
            quality=quality,
            layout=layout,
            bake_preprocessing=bake_preprocessing,
            mean=numbers_of(mean, "mean"),
            std=numbers_of(std, "std"),
            schedule=schedule,
            timeout=timeout,
            trust=trust,
        )
        with Progress(quiet=json) as progress:
            if latency is not None:
                asked["to"] = names_of(to)
                fitted = api.fit(
                    model, latency_ms=latency, on=on, threads=threads, recipe_out=recipe_out, progress=progress, **asked
                )
            else:
                found = api.search(
                    model,
                    size=size,
                    bits=bits,
                    psnr=psnr,
                    strategy=strategy,
                    floats=floats,
                    recipe_out=recipe_out,
                    candidates=names_of(candidates),
                    progress=progress,
                    **asked,
                )
        if json:
            document(found if latency is None else fitted)
        elif latency is None:
            views_quantize.show_search(console(), found)
        else:
            views_quantize.show_fitted(console(), fitted)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld pack sd15_unet --recipe bitsfusion --schedule timestep=981,961,941 --out unet.safetensors\n"
    "  handheld pack examples/efficientnet_lite0.py:trained --recipe levels2 --out lite0.safetensors"
)
def pack(
    model: Model,
    recipe: RecipeName = "levels2",
    calibrate: Calibrate = None,
    out: Annotated[Path, typer.Option(help="The .safetensors to write.")] = Path("packed.safetensors"),
    checkpoint: Checkpoint = None,
    inputs: Input = None,
    schedule: FixedSchedule = None,
    timeout: Timeout = 3600,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Write what a recipe stores in as few bytes as it needs: 2^b + 1 levels in log2(2^b + 1) bits.

    Phones' formats store whole bits. The file holds constants, and no graph; it is read back before its size is told.
    """
    with speaking():
        from handheld import api, views_quantize
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.pack(
                model,
                destination=out,
                recipe=recipe,
                calibrate=calibrate,
                checkpoint=checkpoint,
                inputs=inputs or (),
                schedule=schedule,
                timeout=timeout,
                trust=trust,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views_quantize.show_packed(console(), done)
