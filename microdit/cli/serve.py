"""The command for the web page and HTTP API: microdit app."""

from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import Device, Dtype, console, warn
from microdit.config.recipes import RECIPES
from microdit.errors import UserError, optional_package


def app(
    models: Annotated[list[str] | None, typer.Argument(help="Run folders or exported models. (default: the demo model)")] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. There is no password: every machine that can reach the address may use it."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    queue: Annotated[int, typer.Option(min=1, max=10_000, help="Most jobs that may wait; further ones are refused.")] = 32,
    recipes: Annotated[
        Path, typer.Option(help="Folder of recipes whose cost the page estimates. (default: the bundled ones)", show_default=False)
    ] = RECIPES,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a web page and OpenAI's images API (POST /v1/images/generations) on this machine. Nothing is sent elsewhere.

    Example: microdit app

    Example: microdit app runs/emoji runs/emoji-long --port 8000
    """
    import contextlib

    from microdit.devices import choose_device, choose_dtype, describe_device, device_errors_explained
    from microdit.pipelines.open_model import model_and_prompts, open_model

    with optional_package("The web page", "app"):
        from microdit.serve.endpoints import PageContent, web_app
        from microdit.serve.queue import WorkQueue
        from microdit.serve.server import Server, is_local, listen, url_of

    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    places = models or [model_and_prompts([])[0]]
    opened = [open_model(place, warn) for place in places]
    names = [Path(place).resolve().name for place in places]
    if len(set(names)) < len(names):
        names = places
    if len(set(names)) < len(names):
        raise UserError("A model is named twice: name each once. The page can compare settings of the same model, too.")
    runs = {name: Path(model.about["run"]) for name, model in zip(names, opened, strict=True) if "run" in model.about}
    prompts = {name: model.sample_prompts for name, model in zip(names, opened, strict=True)}
    with device_errors_explained("serve fewer models, take --dtype bfloat16 or --device cpu, or close other programs that use it"):
        for model in opened:
            model.pipeline.to(chosen_device, chosen_dtype)
    listener = listen(host, port)
    if not is_local(host):
        warn(f"Everybody who reaches {host}:{port} can generate images: there is no password. Without --host only this machine can.")
    work = WorkQueue({name: model.pipeline for name, model in zip(names, opened, strict=True)}, queue)
    console.print(describe_device(chosen_device, chosen_dtype))
    console.print(f"{url_of(listener)}  (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        Server(web_app(work, content=PageContent(runs, prompts, recipes), local=is_local(host))).run([listener])
