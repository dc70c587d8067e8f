"""The command line: parses, calls the verbs, prints. Nothing heavy is imported before a command needs it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from handheld import cli_quantize
from handheld.errors import HandheldError
from handheld.options import (
    ArtifactPath,
    Artifacts,
    Bake,
    Calibrate,
    Checkpoint,
    DenoiserParts,
    DeploymentTarget,
    DryRun,
    FixedSchedule,
    FixedSteps,
    Folder,
    Input,
    Jobs,
    Json,
    Layout,
    Mean,
    Model,
    NeuralEngine,
    On,
    OneFormat,
    Out,
    PipelineCheckpoint,
    Profile,
    Quality,
    RecipeName,
    Std,
    Threads,
    Timeout,
    To,
    Trust,
    document,
    names_of,
    numbers_of,
    say,
    speaking,
)

app = typer.Typer(
    name="handheld",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Lands neural networks on phones: exports a model to Core ML, Core AI, LiteRT, ExecuTorch and ONNX, proves "
    "that every file computes what the model computes, measures it, and reports.",
    epilog="Start with: handheld ship efficientformerv2_s0",
)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld export efficientformerv2_s0\n"
    "  handheld export my_net.py:build --to coreml,litert --recipe fp16 --out out\n"
    "  handheld export timm:mobilenetv3_small_100 --to onnx --layout nhwc --bake-preprocessing"
)
def export(
    model: Model,
    to: To = "coreml,coreai,litert,executorch,onnx",
    recipe: RecipeName = "default",
    calibrate: Calibrate = None,
    out: Out = Path("out"),
    checkpoint: Checkpoint = None,
    inputs: Input = None,
    quality: Quality = None,
    layout: Layout = "nchw",
    bake_preprocessing: Bake = False,
    mean: Mean = None,
    std: Std = None,
    schedule: FixedSchedule = None,
    deployment_target: DeploymentTarget = "iOS17",
    neural_engine: NeuralEngine = False,
    jobs: Jobs = 2,
    timeout: Timeout = 3600,
    dry_run: DryRun = False,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Convert a model to each format.

    Each in a process of its own, with a manifest beside every file.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.export(
                model,
                to=names_of(to),
                recipe=recipe,
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
                deployment_target=deployment_target,
                neural_engine=neural_engine,
                jobs=jobs,
                timeout=timeout,
                dry_run=dry_run,
                trust=trust,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_export(console(), done)
        raise typer.Exit(done.exit_code)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld split sd15_unet --parts 2 --to coreml --out out\n"
    "  handheld split my_net.py:build --parts 3 && handheld check out"
)
def split(
    model: Model,
    parts: Annotated[int, typer.Option(min=2, help="How many, of about as many bytes of weights each.")] = 2,
    to: To = "coreml,coreai,litert,executorch,onnx",
    recipe: RecipeName = "default",
    calibrate: Calibrate = None,
    out: Out = Path("out"),
    checkpoint: Checkpoint = None,
    inputs: Input = None,
    schedule: FixedSchedule = None,
    deployment_target: DeploymentTarget = "iOS17",
    neural_engine: NeuralEngine = False,
    jobs: Jobs = 2,
    timeout: Timeout = 3600,
    dry_run: DryRun = False,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Cut a model into parts for phones whose memory is small.

    Each part is a model of its own, that takes by name what the parts before it gave; `handheld check` runs each, and
    all in sequence.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.split(
                model,
                parts,
                to=names_of(to),
                recipe=recipe,
                calibrate=calibrate,
                out=out,
                checkpoint=checkpoint,
                inputs=inputs or (),
                schedule=schedule,
                deployment_target=deployment_target,
                neural_engine=neural_engine,
                jobs=jobs,
                timeout=timeout,
                dry_run=dry_run,
                trust=trust,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_split(console(), done)
        raise typer.Exit(done.exit_code)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld ship efficientformerv2_s0\n"
    "  handheld ship my_net.py:build --recipe fp16 --out out --json"
)
def ship(
    model: Model,
    to: To = "coreml,coreai,litert,executorch,onnx",
    recipe: RecipeName = "default",
    calibrate: Calibrate = None,
    out: Out = Path("out"),
    checkpoint: Checkpoint = None,
    inputs: Input = None,
    quality: Quality = None,
    layout: Layout = "nchw",
    bake_preprocessing: Bake = False,
    mean: Mean = None,
    std: Std = None,
    schedule: FixedSchedule = None,
    deployment_target: DeploymentTarget = "iOS17",
    neural_engine: NeuralEngine = False,
    jobs: Jobs = 2,
    timeout: Timeout = 3600,
    trust: Trust = False,
    profile: Profile = "smoke",
    threads: Threads = 2,
    json: Json = False,
) -> None:
    """Export, check, bench, report: the main job."""
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.ship(
                model,
                to=names_of(to),
                recipe=recipe,
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
                deployment_target=deployment_target,
                neural_engine=neural_engine,
                jobs=jobs,
                timeout=timeout,
                trust=trust,
                profile=profile,
                threads=threads,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_ship(console(), done)
        raise typer.Exit(done.exit_code)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld check out\n"
    "  handheld check out --require coreml,litert,onnx --json\n"
    "  handheld check out --bisect\n"
    "  handheld check --zoo --tiny --to onnx,coreml\n"
    "  handheld check out --baseline baseline.json --update-baseline\n"
    "  handheld check out --baseline baseline.json --expected expected.toml --junit check.xml\n\n"
    "Exit codes: 0 every cell that ran passed or was expected to fail, and at least one ran; 1 a parity failure, a "
    "figure worse than the baseline's, or an expectation that was not met; 2 it could not be done."
)
def check(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A folder that `handheld export` or `ship` wrote; of --zoo, where to work."),
    ] = None,
    require: Annotated[str, typer.Option(help="Formats that must run, separated by commas.")] = "",
    on: On = "host",
    threads: Threads = 2,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until a conversion or a run is stopped: 600, with --zoo 7200.")
    ] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Find the operations that depart from the model.")] = False,
    baseline: Annotated[Path | None, typer.Option(help="A file of figures that none may be worse than.")] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write that file from this check, and compare nothing with it.")
    ] = False,
    expected: Annotated[
        Path | None, typer.Option(help="A TOML file of expected failures, each with an expiry.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    zoo: Annotated[
        bool,
        typer.Option(
            "--zoo", help="Export and check every network of the zoo, full size: hours. Goes on where it was."
        ),
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="With --zoo: the tiny twins instead.")] = False,
    models: Annotated[str, typer.Option(help="With --zoo: these networks only, separated by commas.")] = "",
    to: Annotated[str, typer.Option(help="With --zoo: these formats only, separated by commas.")] = "",
    recipe: Annotated[str, typer.Option(help="With --zoo: recipes, separated by commas; fp32,fp16 if left out.")] = "",
    json: Json = False,
) -> None:
    """Compare every artifact with the model's own outputs.

    Runs each on its golden inputs. Needs neither torch nor the model's source.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console
        from handheld.export.request import ALL

        if zoo and (require or on != "host" or bisect or baseline or update_baseline or expected or junit):
            raise HandheldError(
                "--zoo takes --tiny, --models, --to, --recipe, --threads, --timeout and --json, and nothing else."
            )
        if not zoo and (tiny or models or to or recipe):
            raise HandheldError("--tiny, --models, --to and --recipe go with --zoo.", hint="Type: handheld check --zoo")
        if zoo:
            with Progress(quiet=json) as progress:
                found = api.matrix(
                    folder or Path("out/zoo"),
                    models=names_of(models),
                    tiny=tiny,
                    to=names_of(to) or ALL,
                    recipes=names_of(recipe) or ("fp32", "fp16"),
                    threads=threads,
                    timeout=timeout or 7200,
                    progress=progress,
                )
            if json:
                document(found)
            else:
                views.show_matrix(console(), found)
            raise typer.Exit(found.exit_code)
        if folder is None:
            raise HandheldError("which folder?", hint="Type: handheld check DIR, or handheld check --zoo")
        with Progress(quiet=json) as progress:
            done = api.check(
                folder,
                require=names_of(require),
                on=names_of(on),
                threads=threads,
                timeout=timeout or 600,
                bisect=bisect,
                baseline=baseline,
                update_baseline=update_baseline,
                expected=expected,
                junit=junit,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_check(console(), done)
        raise typer.Exit(done.exit_code)


@app.command(epilog="\b\nExamples:\n  handheld bench out\n  handheld bench out --profile ci --threads 1 --threads 2")
def bench(
    folder: Folder,
    on: On = "host",
    profile: Profile = "ci",
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Threads; may be given several times.")] = None,
    timeout: Timeout = 1200,
    json: Json = False,
) -> None:
    """Measure the latency of every artifact.

    References (right numbers, meaningless speed) are refused. Every number says its basis.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.bench(
                folder,
                on=names_of(on),
                profile=profile,
                threads=tuple(threads or (2,)),
                timeout=timeout,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_bench(console(), done)
        raise typer.Exit(done.exit_code)


@app.command(epilog="\b\nExamples:\n  handheld report out --out report.md\n  handheld report out --out report.json")
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="A .md or .json file; both, in DIR, if left out.")] = None,
    json: Json = False,
) -> None:
    """Write what a folder's last check and bench found."""
    with speaking():
        from handheld import api

        written = api.report(folder, out=out)
        if json:
            document(written.summary)
        else:
            for path in written.files:
                say(str(path))


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld run out/efficientformerv2_s0/onnx-fp32 --input image=cat.png --top 5\n"
    "  handheld run model.tflite --input image=x.npy --output y.npz"
)
def run(
    artifact: ArtifactPath,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=FILE: an .npy, an .npz, or a picture (PNG, JPEG).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the outputs to this .npy or .npz.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Print the best classes of the first output.")] = 0,
    threads: Threads = 2,
    timeout: Timeout = 600,
    json: Json = False,
) -> None:
    """Run one artifact on inputs of yours."""
    with speaking():
        from handheld import api, views
        from handheld.console import console

        done = api.run(artifact, inputs or (), output=output, top=top, threads=threads, timeout=timeout)
        if json:
            document(done)
        else:
            views.show_run(console(), done)


@app.command(
    epilog="\b\nExamples:\n"
    '  handheld generate "a fox in the snow" --model snapfusion --checkpoint weights --to coreml\n'
    '  handheld generate "a fox in the snow" --model sd15_tiny --steps 20 --seed 7 --trace latents.npz\n'
    '  handheld generate "a fox in the snow" --bundle bundle\n'
    '  handheld generate "a fox that runs" --model snapgenv_tiny --out fox.mp4\n\n'
    "A checkpoint is a folder in diffusers' layout (text_encoder, unet, vae). Without one the weights are probe "
    "weights, and the picture is noise: for comparing runtimes."
)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.")],
    model: Annotated[
        str | None, typer.Option(metavar="PIPELINE", help="sd15, snapfusion or snapgenv, or one of them with _tiny.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A folder that `handheld bundle` wrote, instead of --model.")
    ] = None,
    to: OneFormat = "onnx",
    recipe: RecipeName = "default",
    steps: Annotated[int | None, typer.Option(help="Of the sampler; the pipeline's own number if left out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise: the same on every machine.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="Strength of guidance; the pipeline's own if left out.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What the picture shall not show.")] = "",
    sampler: Annotated[
        str | None, typer.Option(help="ddim or pndm (snapgenv: flow); the pipeline's own if left out.")
    ] = None,
    fixed_steps: FixedSteps = False,
    parts: DenoiserParts = 1,
    out: Annotated[Path, typer.Option(help="A .png, or a .mp4 or .gif for a video.")] = Path("picture.png"),
    artifacts: Artifacts = Path("out"),
    checkpoint: PipelineCheckpoint = None,
    trace: Annotated[Path | None, typer.Option(help="Write all latents, step by step, to this .npz.")] = None,
    threads: Threads = 2,
    timeout: Timeout = 3600,
    json: Json = False,
) -> None:
    """Make a picture of a prompt with exported networks.

    In any runtime, without torch: tokenizer, text encoder, denoiser step by step, decoder.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.generate(
                prompt,
                model,
                bundle=bundle,
                to=to,
                recipe=recipe,
                steps=steps,
                seed=seed,
                guidance=guidance,
                negative=negative,
                sampler=sampler,
                fixed_steps=fixed_steps,
                parts=parts,
                out=out,
                artifacts=artifacts,
                checkpoint=checkpoint,
                trace=trace,
                threads=threads,
                timeout=timeout,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_generate(console(), done)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld bundle snapfusion --to coreml --checkpoint weights --zip\n"
    "  handheld bundle out --to litert --steps 8 --steps 20"
)
def bundle(
    model: Annotated[
        str, typer.Argument(metavar="DIR_OR_PIPELINE", help="A pipeline, or a folder with the artifacts of one.")
    ],
    out: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("bundle"),
    to: OneFormat = "onnx",
    recipe: RecipeName = "default",
    steps: Annotated[
        list[int] | None, typer.Option(help="Put in the schedule of so many steps; may be given several times.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim or pndm (snapgenv: flow); the pipeline's own if left out.")
    ] = None,
    fixed_steps: FixedSteps = False,
    parts: DenoiserParts = 1,
    artifacts: Artifacts = Path("out"),
    checkpoint: PipelineCheckpoint = None,
    zip: Annotated[bool, typer.Option("--zip", help="Also as one file, OUT.zip.")] = False,
    timeout: Timeout = 3600,
    json: Json = False,
) -> None:
    """Put all that an app needs of a pipeline into one folder.

    Graphs, tokenizer, schedules, the contract between them (bundle.json), licences.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.bundle(
                model,
                out=out,
                to=to,
                recipe=recipe,
                steps=steps or (),
                sampler=sampler,
                fixed_steps=fixed_steps,
                parts=parts,
                artifacts=artifacts,
                checkpoint=checkpoint,
                archive=zip,
                timeout=timeout,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_bundle(console(), done)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld render out/mobiler2l_tiny_camera --pose 30,-25 --on onnx --out view.png\n"
    "  handheld render out/mobiler2l_tiny_camera --pose 0,-25,4 --frames 36 --on litert --out orbit.gif\n"
    "  handheld render out/camera --truth out/light_field/truth --out views.png\n\n"
    "A pose is THETA,PHI[,RADIUS] (degrees around, degrees above as a negative number, distance: 4), or a .json or "
    ".npy with a 3x4 or 4x4 camera-to-world matrix. Views of several formats come as one labelled sheet."
)
def render(
    artifact: Annotated[Path, typer.Argument(metavar="DIR_OR_ARTIFACT", help="A camera, or the folder of a model's.")],
    pose: Annotated[
        list[str] | None,
        typer.Option(help="From where; may be given several times. Left out: as the model was exported with."),
    ] = None,
    on: Annotated[
        str, typer.Option(help="Formats or runtimes, separated by commas; all that are there if left out.")
    ] = "",
    frames: Annotated[int, typer.Option(min=1, help="Go around the scene in so many views.")] = 1,
    out: Annotated[Path, typer.Option(help="A .png, or a .gif for an animation.")] = Path("view.png"),
    truth: Annotated[Path | None, typer.Option(help="A folder of .png to compare with, one for each pose.")] = None,
    threads: Threads = 2,
    timeout: Timeout = 600,
    json: Json = False,
) -> None:
    """Render views of a scene from exported cameras.

    In any runtime, without torch: a camera takes a pose and gives a picture.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.render(
                artifact,
                pose or (),
                on=names_of(on),
                frames=frames,
                out=out,
                truth=truth,
                threads=threads,
                timeout=timeout,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_render(console(), done)
        raise typer.Exit(done.exit_code)


@app.command(
    epilog="\b\nExamples:\n  handheld show out/efficientformerv2_s0/executorch-fp32\n  handheld show model.onnx"
)
def show(artifact: ArtifactPath, json: Json = False) -> None:
    """What an artifact is and holds.

    Inputs, outputs, operators with counts, what stays outside the delegate, weights by dtype and each with its bits,
    size, versions, fingerprint.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import console

        shown = api.show(artifact, layers=True)
        if json:
            document(shown)
        else:
            views.show_artifact(console(), shown)


@app.command(
    epilog="\b\nExamples:\n"
    "  handheld fuzz --seed 7 --count 50\n"
    "  handheld fuzz --minutes 10 --to litert,onnx --out findings\n"
    "  handheld fuzz --only conv_transpose2d,bilinear_scale --to litert\n\n"
    "Exit codes: 0 nothing was found; 1 something was; 2 it could not be done."
)
def fuzz(
    seed: Annotated[int, typer.Option(help="The same seed gives the same networks on every machine.")] = 0,
    count: Annotated[int | None, typer.Option(min=1, help="How many networks: 20, unless --minutes is given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="For how long, instead of --count.")] = None,
    to: To = "coreml,coreai,litert,executorch,onnx",
    recipe: RecipeName = "fp32",
    only: Annotated[str, typer.Option(help="Of these operators of the fuzzer's only, separated by commas.")] = "",
    out: Annotated[Path, typer.Option(help="Where the findings go.")] = Path("fuzz"),
    timeout: Annotated[float, typer.Option(help="Seconds until a conversion and its run are stopped.")] = 120,
    json: Json = False,
) -> None:
    """Look for converter faults with random networks.

    Small random networks go to every format; what computes something else than PyTorch, crashes or hangs is shrunk,
    and left as a spec, a model.py and a README.
    """
    with speaking():
        from handheld import api, views
        from handheld.console import Progress, console

        with Progress(quiet=json) as progress:
            done = api.fuzz(
                seed=seed,
                count=count,
                minutes=minutes,
                to=names_of(to),
                recipe=recipe,
                only=names_of(only),
                out=out,
                timeout=timeout,
                progress=progress,
            )
        if json:
            document(done)
        else:
            views.show_fuzz(console(), done)
        raise typer.Exit(done.exit_code)


@app.command(epilog="\b\nExamples:\n  handheld models\n  handheld models --json")
def models(json: Json = False) -> None:
    """The zoo, and what its papers published.

    Parameters, MACs, inputs, papers, and published latencies with their sources.
    """
    with speaking():
        from handheld import catalogue
        from handheld.console import console

        if json:
            say(catalogue.models_json())
        else:
            catalogue.show_models(console())


@app.command(epilog="\b\nExamples:\n  handheld recipes\n  handheld recipes w8a8 lut4g16 my_recipe.toml")
def recipes(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="What each format makes of these.")
    ] = None,
    deployment_target: DeploymentTarget = "iOS17",
    json: Json = False,
) -> None:
    """The recipes, and what each format makes of them.

    Natively, by an equivalent, or not at all.
    """
    with speaking():
        from handheld import views_quantize
        from handheld.console import console
        from handheld.export.formats.base import Options

        options = Options(deployment_target=deployment_target)
        if json:
            say(views_quantize.recipes_json(names or (), options))
        else:
            views_quantize.show_recipes(console(), names or (), options)


@app.command(epilog="\b\nExample:\n  handheld devices")
def devices(json: Json = False) -> None:
    """The targets that execute artifacts from here.

    And the basis of the numbers that each gives.
    """
    with speaking():
        from handheld import views
        from handheld.console import console

        if json:
            say(views.devices_json())
        else:
            views.show_devices(console())


@app.command(epilog="\b\nExample:\n  handheld doctor")
def doctor(json: Json = False) -> None:
    """What this environment can do.

    Which formats and runtimes it has, at which versions, and what to type for the rest.
    """
    with speaking():
        from handheld import views
        from handheld.console import console
        from handheld.doctor import examine

        found = examine()
        if json:
            document(found)
        else:
            views.show_doctor(console(), found)


@app.command(epilog="\b\nExamples:\n  handheld cache\n  handheld cache --prune --unused-days 30")
def cache(
    prune: Annotated[bool, typer.Option("--prune", help="Remove entries.")] = False,
    unused_days: Annotated[float, typer.Option(min=0, help="Only those not used for so many days.")] = 0,
    json: Json = False,
) -> None:
    """List or prune finished conversions."""
    with speaking():
        from handheld import views
        from handheld.console import console
        from handheld.export.cache import Cache

        store = Cache()
        entries = store.prune(unused_seconds=unused_days * 86400) if prune else store.entries()
        if json:
            say(views.cache_json(store, entries))
        else:
            views.show_cache(console(), store, entries, pruned=prune)


def _version(asked: bool) -> None:
    if asked:
        from handheld import __version__

        say(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print handheld's version.")
    ] = False,
) -> None:
    pass


app.add_typer(cli_quantize.app)


def main() -> Any:
    """The `handheld` command."""
    return app()


if __name__ == "__main__":
    main()
