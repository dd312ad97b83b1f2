"""Compiled steps: a predictor's step as one graph of static shapes, compiled once for all requests of a model."""

import types
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from transformers import CompileConfig

from .cache import PreallocatedCache


def check_compile_config(config: Any) -> None:
    """
    Raises:
        ValueError: not a `CompileConfig` of transformers, or one that `torch.compile` or static shapes rule out.
    """
    if not isinstance(config, CompileConfig):
        raise ValueError(
            f"compile_config is a {type(config).__name__}; give a CompileConfig of transformers: "
            "compile_config=CompileConfig()."
        )
    if config.dynamic:
        raise ValueError(
            "compile_config has dynamic=True, but steps are compiled for static shapes, one graph for each; leave dynamic out."
        )
    try:
        torch.compile(check_compile_config, **_options(config))  # refuses at once, and compiles nothing yet
    except Exception as error:
        raise ValueError(f"compile_config is refused by torch.compile: {error}") from error


def _options(config: CompileConfig) -> dict[str, Any]:
    """Keywords of `torch.compile`. A mode is a set of Inductor's options: other backends, and options, take none."""
    options: dict[str, Any] = {"backend": config.backend, "fullgraph": True, "dynamic": False}
    if config.options is not None:
        options["options"] = config.options
    elif config.backend == "inductor":
        options["mode"] = config.mode
    return options


class KeptSteps(list):
    """All [`CompiledSteps`] of a model. A copy of the model starts without: they hold graphs of its weights."""

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class CompiledSteps:
    """
    The compiled steps of one model under one `CompileConfig`, which stay with the model from request to request.

    Every shape has a graph of its own, so a step whose shapes were met before is never compiled again, however many others
    there are. Caches are lent to one request at a time and come back, so that their addresses stay, too: CUDA graphs,
    which `mode="reduce-overhead"` records, write where they wrote when they were recorded.

    Args:
        config: backend, mode and options; there is one graph for each step (`fullgraph`) in any case.
    """

    def __init__(self, config: CompileConfig):
        self.config = config
        self._given = config.to_dict()
        self._options = _options(config)
        self._functions: dict[tuple, Callable] = {}
        self._caches: dict[tuple, list[PreallocatedCache]] = {}

    @classmethod
    def of(cls, model: torch.nn.Module, config: CompileConfig) -> Self:
        """Those of an earlier request of the model with an equal configuration, or new ones."""
        kept = model.__dict__.setdefault("_compiled_steps", KeptSteps())
        for steps in kept:
            if steps._given == config.to_dict():
                return steps
        kept.append(cls(config))
        return kept[-1]

    def __call__(self, step: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """
        `step(*arguments)` by the graph of their shapes, which is compiled when they are new.

        Args:
            step: a function of a module that gives one tensor.
            arguments: tensors, dicts of tensors, the model and its cache; all others are constants of the graph.
        """
        key = self._key(step, arguments)
        if key not in self._functions:
            self._functions[key] = torch.compile(with_own_code(step), **self._options)
        is_recorded = any(isinstance(one, torch.Tensor) and one.is_cuda for one in arguments)
        if is_recorded:
            torch.compiler.cudagraph_mark_step_begin()
        result = self._functions[key](*arguments)
        # The next replay of a CUDA graph overwrites what this one gave.
        return result.clone() if is_recorded else result

    def knows(self, step: Callable[..., torch.Tensor], *arguments: Any) -> bool:
        """Whether there is a graph for these shapes."""
        return self._key(step, arguments) in self._functions

    @staticmethod
    def _key(step: Callable[..., torch.Tensor], arguments: tuple) -> tuple:
        return step.__qualname__, torch.is_inference_mode_enabled(), *map(signature, arguments)

    def lend_cache(
        self,
        borrower: Any,
        num_layers: int,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PreallocatedCache:
        """An empty cache of fixed capacity, which comes back when `borrower` is no more."""
        free = self._caches.setdefault((num_layers, rows, capacity, dtype, device), [])
        cache = free.pop() if free else PreallocatedCache(num_layers, capacity, fixed=True)
        cache.clear()
        weakref.finalize(borrower, _take_back, free, cache, rows).atexit = False
        return cache


def _take_back(free: list[PreallocatedCache], cache: PreallocatedCache, rows: int) -> None:
    """Unless its rows were dropped or repeated meanwhile."""
    if cache.rows in (None, rows):
        free.append(cache)


def with_own_code(function: Callable) -> Callable:
    """The same function with a code object of its own: torch counts graphs, up to a limit, by the code they come from."""
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def signature(argument: Any) -> Any:
    """What a graph depends on."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, dict):
        return tuple((name, signature(value)) for name, value in argument.items())
    if isinstance(argument, PreallocatedCache):
        return argument.rows, argument.capacity
    if isinstance(argument, torch.nn.Module):
        return type(argument)
    return argument
