"""ZeroGPU: a function gets the GPU for as long as it runs, in a process of its own that is forked for it.

Its arguments, what it yields and what it returns are pickled, and the GPU's seconds are asked for before (and are the
visitor's). https://huggingface.co/docs/hub/spaces-zerogpu. Everywhere else the functions run as they are.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any


class GpuError(RuntimeError):
    """What went wrong on the GPU, in a sentence: of an exception ZeroGPU itself hands on only the type's name."""


class _Broken:
    """An exception on its way out of the GPU's process."""

    def __init__(self, message: str) -> None:
        self.message = message


def on_zero_gpu() -> bool:
    """Whether this is a Space with ZeroGPU."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def with_gpu(
    task: Callable[..., Any], seconds: Callable[..., float], describe: Callable[[BaseException], str]
) -> Callable[..., Any]:
    """`task`, a function or a generator function with plain arguments, so that it has the GPU on ZeroGPU.

    Args:
        seconds: how long it takes, from the same arguments.
        describe: an exception in words.

    Raises:
        GpuError: from the returned function: the task broke off on ZeroGPU.
    """
    if not on_zero_gpu():
        return task
    gpu = importlib.import_module("spaces").GPU

    if inspect.isgeneratorfunction(task):

        @gpu(duration=seconds)
        @wraps(task)
        def yields(*args: Any) -> Iterator[Any]:
            try:
                yield from task(*args)
            except Exception as error:
                yield _Broken(describe(error))

        @wraps(task)
        def iterate(*args: Any) -> Iterator[Any]:
            results = yields(*args)
            try:
                for result in results:
                    yield _unbroken(result)
            finally:
                results.close()

        return iterate

    @gpu(duration=seconds)
    @wraps(task)
    def returns(*args: Any) -> Any:
        try:
            return task(*args)
        except Exception as error:
            return _Broken(describe(error))

    return wraps(task)(lambda *args: _unbroken(returns(*args)))


def _unbroken(result: Any) -> Any:
    if isinstance(result, _Broken):
        raise GpuError(result.message)
    return result
