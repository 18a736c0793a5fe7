"""Verbs that serve the studio: demo, serve, deploy."""

import argparse
import dataclasses
import functools
import os
from pathlib import Path

from ardiff.cli.options import DTYPES, Verb, add_device_option


# --- demo -------------------------------------------------------------------------------------------------------


def add_page_options(parser: argparse.ArgumentParser, host: str = "127.0.0.1", port: int = 7860) -> None:
    parser.add_argument(
        "--model",
        action="append",
        dest="models",
        help="a model of the menu: folder, Hub id or bundled model's name; repeatable; default: all bundled models",
    )
    add_device_option(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="number format of the models; default: float32"
    )
    parser.add_argument(
        "--auth",
        metavar="FILE",
        help="lines of user:password, for who may sign in; default: ARDIFF_ACCOUNTS, else all",
    )
    parser.add_argument("--host", default=host, help=f"address to serve on; default: {host}")
    parser.add_argument("--port", type=int, default=port, help=f"port to serve on; default: {port}")


def add_demo_options(parser: argparse.ArgumentParser, host: str = "127.0.0.1", port: int = 7860) -> None:
    add_page_options(parser, host, port)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="models come to the device when they are needed: less of its memory, slower",
    )
    parser.add_argument("--json-log", action="store_true", help="log as JSON lines, without personal data")


def read_accounts_file(path: str | None) -> str | None:
    return os.environ.get("ARDIFF_ACCOUNTS") if path is None else Path(path).read_text(encoding="utf-8")


def run_demo(args: argparse.Namespace) -> None:
    from ardiff.demo.ui import launch

    launch(
        models=args.models,
        device=args.device,
        dtype=args.dtype,
        offload=args.offload,
        host=args.host,
        port=args.port,
        accounts=read_accounts_file(args.auth),
        json_log=args.json_log,
    )


# --- serve ------------------------------------------------------------------------------------------------------


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    add_page_options(parser)
    parser.add_argument(
        "--replicas", type=int, default=0, metavar="N", help="models at once, at most; default: one per GPU, or one"
    )
    parser.add_argument(
        "--min-replicas", type=int, default=1, metavar="N", help="models kept while nobody asks; default: 1"
    )
    parser.add_argument(
        "--cpus",
        type=int,
        default=0,
        metavar="N",
        help="CPU cores, and threads, of a replica; default: 1 with a GPU, else an equal share of all cores",
    )
    parser.add_argument(
        "--address", metavar="RAY", help="a Ray cluster to join, auto for this machine's; default: start one here"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="that runs may still take after SIGTERM; default: 120",
    )


def run_serve(args: argparse.Namespace) -> None:
    from ardiff.serving.cluster import Cluster, serve_studio

    options = vars(args) | {"models": tuple(args.models or ()), "accounts": read_accounts_file(args.auth)}
    options = {field.name: options[field.name] for field in dataclasses.fields(Cluster)}
    serve_studio(Cluster(**options), say=functools.partial(print, flush=True))


# --- deploy -----------------------------------------------------------------------------------------------------


def add_deploy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repo-id", metavar="ID", help="the Space, an account and a name: me/ardiff")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end; needs no network and no token")
    parser.add_argument("--folder", type=Path, default=Path(), help="with spaces.yaml; default: where you are")
    parser.add_argument(
        "--prune", action="store_true", help="delete variables, secrets and volumes that spaces.yaml does not name"
    )
    parser.add_argument("--update-secrets", action="store_true", help="send secrets again that the Space has already")
    parser.add_argument(
        "--write-header", action="store_true", help="write the header of README.md from spaces.yaml and end"
    )


def run_deploy(args: argparse.Namespace) -> None:
    from ardiff.serving.space import deploy, write_header

    if args.write_header:
        print(f"README.md: {'header written' if write_header(args.folder) else 'nothing to change'}")
        return
    deploy(
        args.folder,
        args.repo_id,
        say=functools.partial(print, flush=True),
        dry_run=args.dry_run,
        prune=args.prune,
        update_secrets=args.update_secrets,
    )


# --- the verbs --------------------------------------------------------------------------------------------------


VERBS = {
    "demo": Verb("serve the studio", add_demo_options, run_demo),
    "serve": Verb(
        "serve the studio with a model on every GPU, of one machine or a Ray cluster", add_serve_options, run_serve
    ),
    "deploy": Verb("create or update a Space", add_deploy_options, run_deploy),
}
