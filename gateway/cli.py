"""The `cachewise` command."""

import errno
import functools
import gc
import io
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeAlias

import typer
import uvicorn

import gateway
from engine_patch.command import launch_line
from gateway import access, config, connect
from gateway.analyze_command import analyze
from gateway.config import ConfigError, Settings, Source
from gateway.forecast_commands import app as forecast_app
from gateway.logs import logging_to
from gateway.protocol import Protocol
from gateway.trace_commands import app as trace_app

#: Longer than clients and load balancers keep an idle connection, so that the gateway never closes
#: one that a request is just being sent on.
KEEP_ALIVE_S: Final = 75

app = typer.Typer(
    name="cachewise",
    help="Agent-aware gateway router for vLLM fleets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Check and show the configuration.", no_args_is_help=True)
engine_app = typer.Typer(help="vLLM pods with the engine patch.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys for clients.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(engine_app, name="engine")
app.add_typer(keys_app, name="keys")
app.add_typer(forecast_app, name="forecast")
app.add_typer(trace_app, name="trace")

Command: TypeAlias = Callable[[Settings, dict[str, Source]], None]
Text: TypeAlias = str | None


def main() -> None:
    """The console script. A configuration error is one line and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding may lack what is printed
    try:
        app()
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    print(f"cachewise: {message}", file=sys.stderr)
    sys.exit(2)


def _resolve(
    pod: Annotated[
        list[str] | None,
        typer.Option(help="Address of a pod; may be given again.", metavar="URL"),
    ] = None,
    discovery: Annotated[
        Text,
        typer.Option(help="static, dns or kubernetes: where pods come from besides --pod."),
    ] = None,
    discovery_dns_name: Annotated[
        Text, typer.Option(help="Name whose addresses are the pods.", metavar="NAME")
    ] = None,
    discovery_service: Annotated[
        Text, typer.Option(help="Kubernetes Service whose endpoints are the pods.", metavar="NAME")
    ] = None,
    discovery_selector: Annotated[
        Text, typer.Option(help="Label selector of the pods in Kubernetes.", metavar="SELECTOR")
    ] = None,
    model_alias: Annotated[
        list[str] | None,
        typer.Option(
            help="Model name A stands for served model B; '*' for every unknown name. "
            "May be given again.",
            metavar="A=B",
        ),
    ] = None,
    host: Annotated[Text, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[Text, typer.Option(help="Port to listen on; 0 for any free one.")] = None,
    routing_policy: Annotated[
        Text,
        typer.Option(help="expected_ttft, least_loaded, round_robin or session_hash."),
    ] = None,
    log_level: Annotated[Text, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[Text, typer.Option(help="plain or json.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings.", metavar="FILE")
    ] = None,
) -> tuple[Settings, dict[str, Source]]:
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "pods": pod or None,
        "discovery": {
            "kind": discovery,
            "dns_name": discovery_dns_name,
            "service": discovery_service,
            "selector": discovery_selector,
        },
        "models": {"aliases": ",".join(model_alias) if model_alias else None},
        "routing": {"policy": routing_policy},
        "log": {"level": log_level, "format": log_format},
    }
    return config.resolve(flags, config_file, os.environ)


def _with_settings(command: Command) -> Callable[..., None]:
    """Gives a command the options that make the settings."""

    @functools.wraps(_resolve)
    def run_command(**options: Any) -> None:
        command(*_resolve(**options))

    run_command.__doc__ = command.__doc__
    return run_command


@app.command("serve")
@_with_settings
def serve(settings: Settings, _: dict[str, Source]) -> None:
    """Start the gateway.

    Every setting can also stand in the file or the environment (docs/configuration.md). Keys and
    tokens can stand only there, as a command line is no place for secrets.
    """
    run(_keeping_state(settings))


def _keeping_state(settings: Settings) -> Settings:
    """The settings with the usual place for the forecast's state where none is set."""
    if settings.forecast.state_file is not None:
        return settings
    path = config.default_state_file(os.environ)
    forecast = settings.forecast.model_copy(update={"state_file": path})
    return settings.model_copy(update={"forecast": forecast})


@config_app.command("show")
@_with_settings
def show(settings: Settings, sources: dict[str, Source]) -> None:
    """Print every setting as it would be used, and where it comes from."""
    for path, field in config.leaves():
        value: Any = functools.reduce(getattr, path, settings)
        key = ".".join(path)
        print(f"{key:32} {config.shown(value, field):40} {sources[key]}")


@config_app.command("check")
def check(file: Annotated[Path, typer.Argument(help="YAML file of settings.")]) -> None:
    """Check a file of settings, and the files it names."""
    config.load_settings({}, file, {})
    print(f"{file}: ok")


@app.command("connect")
def connect_command(
    url: Annotated[str, typer.Option(help="The gateway.")] = "http://127.0.0.1:8080",
    model: Annotated[str, typer.Option(help="A model it serves.")] = "MODEL",
) -> None:
    """Print how to point agents and SDKs at the gateway."""
    print(connect.guide(url.rstrip("/").removesuffix("/v1"), model, "KEY"), end="")


@engine_app.command("command")
def engine_command(
    model: Annotated[str, typer.Argument(help="Model to serve.")],
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: flags for vLLM.", metavar="[-- FLAGS]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address the pod listens on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port the pod listens on.", min=1, max=65535)] = 8000,
) -> None:
    """Print the line that starts a vLLM pod with the patch (docs/engine-patch.md)."""
    print(launch_line(model, host=host, port=port, extra=extra or ()))


@keys_app.command("new")
def new_key(tenant: Annotated[str, typer.Argument(help="Who will use it.")]) -> None:
    """Make an API key and the line that admits it."""
    if not config.TENANT.fullmatch(tenant):
        fail(f"tenant: {tenant!r} is not a name; allowed: letters, digits and . _ - @ /")
    key, line = access.new_key(tenant)
    print(f"key, for the client:           {key}\nline, for access.api_keys_file: {line}")


@app.command(
    "replay",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def replay(context: typer.Context) -> None:
    """Replay your traces through vLLM's scheduler under each policy (docs/admission.md)."""
    try:
        from bench.replay.__main__ import run as replayer
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "bench":
            raise
        fail("replay: the replay is part of a clone of the repository, not of the package")
    replayer(context.args, "cachewise replay")


app.command("analyze")(analyze)


@app.command("version")
def version() -> None:
    """Print the version."""
    print(f"cachewise {gateway.__version__}")


def run(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM; SIGHUP, as of a terminal that closes, is one too."""
    listening = listen(settings)
    # uvicorn raises the signal that ended it once more; leave in order then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    print(banner(settings, listening.getsockname()[1]), flush=True)
    with logging_to(settings.log):
        from gateway.app import create_app  # takes a second; the other commands do without

        # Sessions live long and by the ten thousand: let full collections be rare, and leave what
        # the start made out of them.
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        server(settings, create_app(settings)).run(sockets=[listening])


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on. Raises `ConfigError` where there can be none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address, family=family, backlog=2048)
    except socket.gaierror as error:
        reason = error.strerror
    except UnicodeError:
        reason = "no host name"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port: {settings.port} is in use on {settings.host}; allowed: a free port, "
                "0 for any"
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"port: {settings.port} needs privileges; allowed: a port from 1024, 0 for any"
            ) from None
        reason = os.strerror(error.errno) if error.errno else str(error)
    raise ConfigError(
        f"host: {settings.host!r} cannot be listened on ({reason}); allowed: an address of this "
        "machine, 0.0.0.0 or :: for all"
    )


class _Server(uvicorn.Server):
    """Tells the gateway first that it shuts down: held turns would keep it from doing so."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app_gateway = getattr(getattr(self.config.app, "state", None), "gateway", None)
        if app_gateway is not None:
            app_gateway.shut_down()
        await super().shutdown(sockets)


def server(settings: Settings, asgi_app: Any) -> uvicorn.Server:
    """uvicorn, set up for `asgi_app`; its logs go where the gateway's go."""
    return _Server(
        uvicorn.Config(
            asgi_app,
            loop="uvloop",
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s),
            ssl_certfile=settings.tls.certfile,
            ssl_keyfile=settings.tls.keyfile,
        )
    )


def banner(settings: Settings, port: int) -> str:
    """What the operator reads at the start."""
    scheme = "https" if settings.tls.certfile else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    url = f"{scheme}://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{port}"
    if settings.discovery.kind != "static":
        where = settings.discovery.dns_name or settings.discovery.service
        where = where or settings.discovery.selector
        fleet, model = f"discovered by {settings.discovery.kind}: {where}", "MODEL"
    elif settings.pods:
        fleet, model = f"{_count(len(settings.pods), 'pod')}", "MODEL"
    else:
        fleet = (
            f"{_count(settings.embedded.pods, 'embedded pod')}: a stand-in that generates no real "
            "text (--pod URL for real ones)"
        )
        model = settings.embedded.model
    keyed = bool(settings.access.api_keys)
    if settings.loopback_only:
        reach = "loopback only: nothing but this machine can connect"
    elif keyed:
        reach = f"{settings.host}: clients need an API key"
    else:
        reach = f"{settings.host}: WITHOUT API keys, whoever reaches it can use it"
    key = "YOUR_KEY" if keyed else "any"
    return "\n".join(
        [
            f"CacheWise Gateway {gateway.__version__} on {url}",
            f"  pods     {fleet}",
            f"  listens  {reach}",
            f"  health   {url}/health   metrics  {url}/metrics",
            f"  inspect  {url}/ui",
            "",
            "Point agents at it:",
            connect.brief(url, model, key),
            "",
        ]
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    main()
