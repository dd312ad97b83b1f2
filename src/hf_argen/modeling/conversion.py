"""The key-map engine: turns the authors' checkpoints into our models, and our tensors back into theirs.

Every family's `convert_<family>.py` states two things: which of the authors' keys become which of ours (a `KeyMap` per
role) and which configuration the shapes of the weights imply (a function that returns a `ConversionPlan`). Reading
files, checking, building and filling the model happen here.
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoints import ConversionError, read_checkpoint, tensors_at

StateDict = dict[str, torch.Tensor]


@cache
def _compiled(pattern: str) -> re.Pattern:
    """A key with placeholders as a regular expression: `{i}` (one letter) is a number, `{leaf}` a name without dot."""
    parts = re.split(r"\{(\w+)\}", pattern)
    literals = [re.escape(part) for part in parts[::2]]
    groups = [rf"(?P<{name}>{'[0-9]+' if len(name) == 1 else '[^.]+'})" for name in parts[1::2]] + [""]
    return re.compile("".join(literal + group for literal, group in zip(literals, groups, strict=True)))


class Rule:
    """
    What becomes of one of the authors' keys (a pattern such as `blocks.{i}.attn.proj.{leaf}`).

    Args:
        source: the authors' key.
        targets: our keys, with the same placeholders.
    """

    def __init__(self, source: str, *targets: str):
        self.source = source
        self.targets = targets

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The authors' tensor as ours, one for each target."""
        raise TypeError(f"{type(self).__name__} makes no tensors.")

    def backward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensors, one for each target, as the authors'."""
        raise TypeError(f"{type(self).__name__} makes no tensors.")

    def under(self, prefix: str) -> "Rule":
        """The same rule with `prefix` before each of our keys."""
        rule = copy.copy(self)
        rule.targets = tuple(prefix + target for target in self.targets)
        return rule


class Rename(Rule):
    """The same tensor under another name."""

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return (tensor,)

    def backward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0]


class Split(Rule):
    """A tensor cut into equal parts along its first dimension, for example query, key and value."""

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        if tensor.ndim == 0 or tensor.shape[0] % len(self.targets):
            raise ValueError(f"its first dimension must be a multiple of {len(self.targets)}")
        return tensor.chunk(len(self.targets))

    def backward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))


class Reshape(Rule):
    """The same numbers in another shape; `ours` and `theirs` may hold one -1 each."""

    def __init__(self, source: str, target: str, ours: tuple[int, ...], theirs: tuple[int, ...]):
        super().__init__(source, target)
        self.ours, self.theirs = ours, theirs

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        if tensor.ndim != len(self.theirs):
            raise ValueError(f"it must have {len(self.theirs)} dimensions")
        return (tensor.reshape(self.ours),)

    def backward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0].reshape(self.theirs)


class Drop(Rule):
    """A key that our model computes itself or does not need."""

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return ()


class KeyMap:
    """
    Ordered rules between the authors' keys and ours.

    Rules may be alternatives for one of our keys, when the authors store a thing under different names depending on
    its options. `narrowed` keeps those that a given checkpoint uses; otherwise `revert` takes the first.
    """

    def __init__(self, rules: Iterable[Rule]):
        self.rules = tuple(rules)

    def under(self, prefix: str) -> "KeyMap":
        """The same map for a model in which ours is the submodule `prefix` (with its dot)."""
        return KeyMap(rule.under(prefix) for rule in self.rules)

    def narrowed(self, keys: Iterable[str]) -> "KeyMap":
        """Only the rules that one of the authors' `keys` uses."""
        used = {id(rule) for key in keys for rule, _ in self._matches(key)}
        return KeyMap(rule for rule in self.rules if id(rule) in used)

    def unknown(self, keys: Iterable[str]) -> list[str]:
        """Those of the authors' `keys` that no rule covers."""
        return [key for key in keys if not self._matches(key)]

    def apply(self, state_dict: Mapping[str, torch.Tensor]) -> StateDict:
        """
        The authors' tensors under our names (views where possible).

        Raises:
            ConversionError: a key that no rule or more than one covers, or whose shape its rule cannot take.
        """
        ours: StateDict = {}
        for key, tensor in state_dict.items():
            matches = self._matches(key)
            if len(matches) != 1:
                raise ConversionError(
                    f"The key {key} is covered by {len(matches)} rules of the key map instead of one."
                )
            rule, groups = matches[0]
            try:
                parts = rule.forward(tensor)
            except (ValueError, RuntimeError) as error:
                raise ConversionError(f"The key {key} has the shape {tuple(tensor.shape)}, but {error}.") from error
            ours.update(zip((target.format(**groups) for target in rule.targets), parts, strict=True))
        return ours

    def revert(self, state_dict: Mapping[str, torch.Tensor]) -> StateDict:
        """
        Our tensors, or gradients and optimiser moments of the same names, under the authors' names.

        Raises:
            ConversionError: a key that no rule makes, or of which the other parts are missing.
        """
        theirs: StateDict = {}
        done: set[str] = set()
        for key in state_dict:
            if key in done:
                continue
            rule, groups = self._origin(key)
            targets = [target.format(**groups) for target in rule.targets]
            missing = [target for target in targets if target not in state_dict]
            if missing:
                raise ConversionError(f"{key} belongs together with {', '.join(missing)}, which is missing.")
            theirs[rule.source.format(**groups)] = rule.backward([state_dict[target] for target in targets])
            done.update(targets)
        return theirs

    def source_of(self, key: str) -> str:
        """The authors' name of one of our keys."""
        rule, groups = self._origin(key)
        return rule.source.format(**groups)

    def makes(self, key: str) -> bool:
        """Whether one of our keys comes from this map."""
        return any(_compiled(target).fullmatch(key) for rule in self.rules for target in rule.targets)

    def _matches(self, key: str) -> list[tuple[Rule, dict[str, str]]]:
        found = ((rule, _compiled(rule.source).fullmatch(key)) for rule in self.rules)
        return [(rule, match.groupdict()) for rule, match in found if match]

    def _origin(self, key: str) -> tuple[Rule, dict[str, str]]:
        for rule in self.rules:
            for target in rule.targets:
                match = _compiled(target).fullmatch(key)
                if match:
                    return rule, match.groupdict()
        raise ConversionError(f"No rule of the key map makes {key}.")


class OriginalArguments:
    """
    The authors' constructor arguments of one role, as far as the caller gave them.

    Every name that the constructor has is asked for once, by `get`, `agree` or `ignore`; `finish` then refuses the
    names that it does not have.
    """

    def __init__(self, role: str, given: Mapping[str, Any] | None):
        if given is not None and not isinstance(given, Mapping):
            raise ConversionError(f"original_config[{role!r}] must be a dict of arguments, not {given!r}.")
        self.role = role
        self.given = dict(given or {})
        self.known: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """What was given for `name`, otherwise `default`."""
        self.known.add(name)
        return self.given.get(name, default)

    def agree(self, name: str, found: Any) -> Any:
        """`found`, which the weights tell; an error if something else was given."""
        given = self.get(name, found)
        if _plain(given) != _plain(found):
            self.contradiction(name, found)
        return found

    def contradiction(self, name: str, found: Any) -> None:
        """Raises the error that the given `name` is not what the weights tell."""
        raise ConversionError(
            f"original_config[{self.role!r}] says {name}={self.given[name]}, but the weights say {found}; "
            f"correct {name} or leave it out."
        )

    def ignore(self, *names: str) -> None:
        """Arguments that change nothing in the converted model."""
        self.known.update(names)

    def finish(self) -> None:
        """Refuses arguments that were never asked for."""
        for name in self.given:
            if name not in self.known:
                raise ConversionError(
                    f"original_config[{self.role!r}] has the unknown argument {name!r}{_closest(name, self.known)}; "
                    f"the arguments are {', '.join(sorted(self.known))}."
                )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shape_of(state_dict: Mapping[str, torch.Tensor], key: str, role: str, ndim: int) -> tuple[int, ...]:
    """The shape of one of the authors' tensors, from which a configuration is inferred."""
    if key not in state_dict:
        raise ConversionError(f"The {role} lacks the key {key}; the file is incomplete or of another family.")
    shape = tuple(state_dict[key].shape)
    if len(shape) != ndim:
        raise ConversionError(f"The key {key} of the {role} has the shape {shape}; it must have {ndim} dimensions.")
    return shape


def count(state_dict: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many numbers `{i}` a pattern such as `blocks.{i}.attn.proj.weight` matches, counted from 0."""
    matches = (_compiled(pattern).fullmatch(key) for key in state_dict)
    return max((int(match["i"]) + 1 for match in matches if match), default=0)


@dataclass(frozen=True)
class ConversionPlan:
    """
    What a checkpoint becomes.

    Attributes:
        model_class: class of the converted model.
        config: its configuration.
        key_maps: role -> from the authors' keys to those of `model_class`.
        generation: values for the model's `generation_config`.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    key_maps: Mapping[str, KeyMap]
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converter:
    """
    What a `convert_<family>.py` states, under the name `CONVERTER`.

    Attributes:
        family: name of the family.
        roles: role of a file that holds plain tensors -> the keys it may have.
        plan: from the weights (role -> state dict, which it may complete) and the authors' constructor arguments
            (role -> dict) to the plan of the conversion.
        containers: role of a file that nests several state dicts -> which role lies at which path inside it. A file
            given for a role of its own takes precedence.
        allowed_globals: classes that the authors' trainers pickle beside the tensors.
    """

    family: str
    roles: Mapping[str, KeyMap]
    plan: Callable[[dict[str, StateDict], Mapping[str, Mapping[str, Any]]], ConversionPlan]
    containers: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    allowed_globals: Sequence[Callable] = ()


def convert(
    converter: Converter,
    files: Mapping[str, str | Path],
    original_config: Mapping[str, Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """
    Converts the authors' files.

    Args:
        converter: the family's `CONVERTER`.
        files: role -> file or folder.
        original_config: role -> the authors' constructor arguments, complete, partial or absent.

    Returns:
        The model in evaluation mode on the CPU, every weight filled from the files, in the files' dtype.

    Raises:
        ConversionError: see [`hf_argen.convert_original`].
    """
    original_config = dict(original_config or {})
    known = [*converter.roles, *converter.containers]
    for role in [*files, *original_config]:
        if role not in known:
            raise ConversionError(
                f"Unknown role {role!r}{_closest(role, known)}; the roles of {converter.family} are {', '.join(known)}."
            )
    weights = _read_weights(converter, files)
    plan = converter.plan(weights, original_config)
    state: StateDict = {}
    for role in list(weights):
        state |= _one_dtype(plan.key_maps[role].apply(weights.pop(role)))
    model = _build(plan)
    _check_fit(model, state, plan)
    # One tensor at a time: what was mapped from disk is copied, what was read into memory is released.
    owned = {key: state.pop(key).detach().clone(memory_format=torch.contiguous_format) for key in list(state)}
    model.load_state_dict(owned, strict=True, assign=True)
    for name, value in plan.generation.items():
        setattr(model.generation_config, name, value)
    return model.eval()


def _read_weights(converter: Converter, files: Mapping[str, str | Path]) -> dict[str, StateDict]:
    if not files:
        raise ConversionError(f"No files given; the roles of {converter.family} are {', '.join(converter.roles)}.")
    weights: dict[str, StateDict] = {}
    for role, file in files.items():
        content = read_checkpoint(file, role, converter.allowed_globals)
        for inner, path in converter.containers.get(role, {role: ()}).items():
            if inner == role or inner not in files:
                weights[inner] = tensors_at(content, path, role, file)
                _check_keys(converter, inner, weights[inner], file)
    return weights


def _check_keys(converter: Converter, role: str, state_dict: StateDict, file: str | Path) -> None:
    foreign = converter.roles[role].unknown(state_dict)
    if not foreign:
        return
    fits = [other for other, key_map in converter.roles.items() if not key_map.unknown(state_dict)]
    hint = f"it fits the role {fits[0]!r}" if fits else "it is damaged or of another family"
    more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    raise ConversionError(
        f"The file {str(file)!r} does not look like the {role} of {converter.family}: foreign keys "
        f"{', '.join(foreign[:3])}{more} ({len(foreign)} of {len(state_dict)}); {hint}."
    )


def _one_dtype(state: StateDict) -> StateDict:
    """A part in one floating dtype, the widest that its file holds."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) < 2:
        return state
    dtype = reduce(torch.promote_types, dtypes)
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _build(plan: ConversionPlan) -> PreTrainedModel:
    with torch.device("meta"):
        return plan.model_class(plan.config)


def _check_fit(model: PreTrainedModel, state: StateDict, plan: ConversionPlan) -> None:
    """Raises unless the state dict has exactly the keys and shapes of the model."""

    def name(key: str) -> str:
        maps = [key_map for key_map in plan.key_maps.values() if key_map.makes(key)]
        return f"{maps[0].source_of(key)} (our {key})" if maps else f"our {key}"

    expected = model.state_dict()
    for kind, keys in (("missing", expected.keys() - state.keys()), ("superfluous", state.keys() - expected.keys())):
        if keys:
            listed = ", ".join(name(key) for key in sorted(keys)[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ConversionError(
                f"The checkpoint does not fill {plan.model_class.__name__}: {kind} {listed}{more}; the file is "
                "incomplete, or of a variant that this family does not have."
            )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise ConversionError(
                f"{name(key)} has the shape {tuple(state[key].shape)} instead of {tuple(tensor.shape)} of ours."
            )
        if tensor.is_floating_point() and not state[key].is_floating_point():
            raise ConversionError(
                f"{name(key)} has the dtype {state[key].dtype}; give a checkpoint in floating point."
            )
