"""`ardiff serve`: one page, many models, on Ray Serve (https://docs.ray.io/en/latest/serve).

Two deployments. `Page` has one replica, because gradio keeps its visitors, queue and streams in one process: the very page of
`ardiff demo`, whose session takes its steps from elsewhere. `Model` has one replica per GPU (or share of the CPUs), each with a
run at a time: a streaming call whose items are steps; closing the stream ends the run at the model's next iteration. The session
queues the runs, as many at once as there may be replicas, so places in the queue are those of the page; Ray starts replicas as
they are needed and replaces one that died, whose visitor keeps the finished frames and is told. Nobody else notices.

Ray is imported by the functions that need it, so that the rest of the package does without.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar

from ardiff.demo.models import ModelMenu, choose_models
from ardiff.demo.session import STOP_SECONDS, TICK, PreviewPace, Session
from ardiff.pipelines.loading import load_pipeline
from ardiff.serving.limits import read_accounts, read_limits
from ardiff.serving.remote import RemotePipeline, ReplicaLost, load_near_half, pack_step, unpack_arguments


APPLICATION = "ardiff"

PAGE_REQUESTS = 1000
"""Requests that the page's replica has at a time; every open page holds one or two."""

LONGEST_RUN = 3600.0
"""Seconds that a run may still take on a replica that is no longer needed, or that a newer one replaces."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What `ardiff serve` starts. Raises ValueError with one sentence.

    Attributes:
        models: what the menu offers: folders, Hub ids or names of bundled models, readable on every machine; none: all
            bundled models.
        replicas: models at once, at most; 0 = one for each GPU of the cluster, one where there is none.
        min_replicas: models that are kept while nobody asks for one.
        cpus: CPU cores and threads of a replica; 0 = an equal share of all that the cluster has, 1 beside a GPU.
        device: "auto" (cuda where the cluster has a GPU, else cpu) or a torch device.
        dtype: number format of the models, a name of torch's.
        accounts: lines of `user:password`, for who may sign in; None: everyone.
        address: of a Ray cluster to join, "auto" for the one of this machine; None starts one on this machine alone.
        grace: seconds that runs may still take after the request to stop.
    """

    models: tuple[str, ...] = ()
    replicas: int = 0
    min_replicas: int = 1
    cpus: int = 0
    device: str = "auto"
    dtype: str = "float32"
    accounts: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    address: str | None = None
    grace: float = 120.0

    def __post_init__(self) -> None:
        if self.replicas < 0 or self.cpus < 0 or self.grace < 0:
            raise ValueError(
                "`replicas`, `cpus` and `grace` must be at least 0 "
                f"but are {self.replicas}, {self.cpus} and {self.grace:g}."
            )
        if self.min_replicas < 1 or 0 < self.replicas < self.min_replicas:
            most = f" to {self.replicas}" if self.replicas else ""
            raise ValueError(f"`min_replicas` must be from 1{most} but is {self.min_replicas}.")


class Model:
    """One replica: the models of the menu, as many as fit loaded, and one run at a time on the thread that owns them."""

    def __init__(self, names: Sequence[str], device: str, dtype: str, threads: int) -> None:
        disable_progress_bar()
        # One thread for all of torch: loading, stepping and closing.
        self._thread = ThreadPoolExecutor(1, "ardiff-model", torch.set_num_threads, (threads,))
        sources = {name: partial(load_pipeline, name, device=device, dtype=getattr(torch, dtype)) for name in names}
        self._menu = ModelMenu(sources, on_load=lambda model: None)
        self._thread.submit(self._menu.get).result()

    async def steps(self, name: str, arguments: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Run model `name` and give its packed steps; raises what the model raises. Ends when the caller closes it."""
        loop, steps = asyncio.get_running_loop(), self._run(name, arguments)
        try:
            while (step := await loop.run_in_executor(self._thread, next, steps, None)) is not None:
                yield step
        finally:
            # After the iteration that may still be under way there, and before the next run.
            self._thread.submit(steps.close)

    def _run(self, name: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        model = self._menu.get(name)
        arguments = unpack_arguments(arguments)
        stream = model.pipeline.stream(**arguments)
        pace, started, ticked = PreviewPace(model.cost.preview), time.monotonic(), float("-inf")
        try:
            for step in stream:
                guesses, now = (), time.monotonic()
                if now - ticked >= TICK:
                    guesses, ticked = pace.decode(step, arguments["num_inference_steps"], now - started), now
                yield pack_step(step, guesses)
        finally:
            model.cost.preview = pace.each
            stream.close()


class Page:
    """The one replica of the page.

    Args:
        model: handle of the `Model` deployment.
        menu: the models by name, and what each name stands for on the replicas.
        workers: runs at a time.
        device: what the page says of where the models run.
        accounts: who may sign in; None: everyone.
    """

    def __init__(
        self,
        model: Any,
        menu: Mapping[str, str],
        workers: int,
        device: str,
        accounts: Sequence[tuple[str, str]] | None,
    ) -> None:
        disable_progress_bar()
        steps = partial(remote_steps, model.options(method_name="steps", stream=True))
        sources = {name: partial(RemotePipeline, source, steps, device) for name, source in menu.items()}
        self.accounts = accounts
        self.session = Session(sources, workers=workers, limits=read_limits())

    def __serve_build_asgi_app__(self) -> Any:
        from ardiff.demo.ui import mounted

        return mounted(self.session, self.accounts)

    async def drain(self, seconds: float) -> bool:
        """As `Session.drain`; the page goes on answering meanwhile."""
        return await asyncio.to_thread(self.session.drain, seconds)

    def __del__(self) -> None:
        if hasattr(self, "session"):
            self.session.close()


def remote_steps(steps: Any, name: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Packed steps of a run on whichever replica is free first. Raises `ReplicaLost`, and what the model raised."""
    from ray.exceptions import RayActorError, RayTaskError

    response = steps.remote(name, arguments)
    try:
        yield from response
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise ReplicaLost from error
    finally:
        response.cancel()


def build(cluster: Cluster, resources: Mapping[str, float]) -> Any:
    """The Serve application for a cluster with these resources (`CPU`, `GPU`: how many)."""
    from ray import serve

    num_gpus = int(resources.get("GPU", 0))
    device = ("cuda" if num_gpus else "cpu") if cluster.device == "auto" else cluster.device
    on_gpu = device.startswith("cuda")
    replicas = max(cluster.replicas or num_gpus, cluster.min_replicas)
    cpus = cluster.cpus or (1 if on_gpu else max(int(resources.get("CPU", 1)) // replicas, 1))
    if not on_gpu and replicas * cpus > resources.get("CPU", 0):
        raise ValueError(
            f"{replicas} replicas of {cpus} CPU cores need {replicas * cpus}, but the cluster has "
            f"{resources.get('CPU', 0):g}."
        )
    # What the operator set by environment variables holds on every machine.
    ours = {name: value for name, value in os.environ.items() if name.startswith("ARDIFF_")}
    everywhere = {"runtime_env": {"env_vars": ours}} if ours else {}
    model = serve.deployment(
        Model,
        max_ongoing_requests=1,
        autoscaling_config={
            "min_replicas": cluster.min_replicas,
            "initial_replicas": cluster.min_replicas,
            "max_replicas": replicas,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 2,
        },
        ray_actor_options={"num_cpus": cpus, "num_gpus": int(on_gpu), **everywhere},
        graceful_shutdown_timeout_s=LONGEST_RUN,
        health_check_period_s=5,
    )
    page = serve.deployment(
        serve.ingress()(Page),
        name="Page",
        num_replicas=1,
        max_ongoing_requests=PAGE_REQUESTS,
        ray_actor_options={"num_cpus": 0, **everywhere},
        graceful_shutdown_timeout_s=STOP_SECONDS,
    )
    words = f"{replicas} replica{'s' if replicas > 1 else ''} on {device}"
    menu = choose_models(cluster.models, read_limits())
    accounts = None if cluster.accounts is None else read_accounts(cluster.accounts)
    return page.bind(model.bind(list(menu.values()), device, cluster.dtype, cpus), menu, replicas, words, accounts)


def serve_studio(cluster: Cluster, say: Callable[[str], Any]) -> None:
    """Serve until SIGTERM or SIGINT; then runs end on their own within the grace, and new ones are refused.

    Raises ValueError with one sentence when Ray is not installed, a model is not there or the cluster is too small.
    """
    disable_progress_bar()
    for name in cluster.models:
        load_near_half(name)  # a wrong name is told here, before anything is started
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ValueError('`ardiff serve` needs Ray: python -m pip install -e ".[serve]".') from error

    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ray.init(address=cluster.address, namespace="serve", include_dashboard=False, logging_level="WARNING")
    try:
        application = build(cluster, ray.cluster_resources())
        serve.start(http_options={"host": cluster.host, "port": cluster.port}, logging_config=quiet)
        handle = serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
        asked = threading.Event()
        before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGINT)}
        say(f"http://{cluster.host}:{cluster.port}")
        while not asked.wait(1.0):
            pass
        for number, handler in before.items():
            signal.signal(number, handler)  # asked a second time, it ends at once
        say(f"stopping: runs may take {cluster.grace:g} s more, new ones are refused")
        ended = handle.drain.remote(cluster.grace).result(timeout_s=cluster.grace + 3 * STOP_SECONDS)
        say("every run came to its end" if ended else "runs were ended; what had finished was kept")
        serve.delete(APPLICATION)
    finally:
        if cluster.address is None:
            serve.shutdown()
        ray.shutdown()
