"""The conversion engine: turns the authors' checkpoints into our models.

Every family's `convert_<family>.py` states two things: which of the authors' keys become which of ours (a
`KeyMap` per role) and which configuration the shapes of the weights imply (a function that returns a
`ConversionPlan`). Reading files, checking, building and filling the model, and fetching the checkpoints that
the authors released (the family's `presets.json`), happen here.
"""

import difflib
import importlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..hub import fetch_file
from .cards import provenance
from .checkpoints import ConversionError, read_checkpoint, tensors_at
from .key_map import KeyMap, StateDict

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PERMISSIVE_LICENCES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause")


class OriginalArguments:
    """
    The authors' constructor arguments of one role, as far as the caller gave them.

    Every name that the constructor has is asked for once, by `get`, `agree` or `ignore`; `finish` then
    refuses the names that it does not have.
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

    def contradiction(self, name: str, found: Any) -> NoReturn:
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
                    f"original_config[{self.role!r}] has the unknown argument "
                    f"{name!r}{_closest(name, self.known)}; the arguments are "
                    f"{', '.join(sorted(self.known))}."
                )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_codes(transformer: int, tokenizer: int) -> None:
    """Refuses a tokenizer with another number of codes than the transformer was trained on."""
    if tokenizer != transformer:
        raise ConversionError(
            f"The transformer was trained on {transformer} codes, but the tokenizer has {tokenizer}; give the tokenizer "
            "that belongs to it."
        )


def shape_of(state_dict: Mapping[str, torch.Tensor], key: str, role: str, ndim: int) -> tuple[int, ...]:
    """The shape of one of the authors' tensors, from which a configuration is inferred."""
    if key not in state_dict:
        raise ConversionError(f"The {role} lacks the key {key}; the file is incomplete or of another family.")
    shape = tuple(state_dict[key].shape)
    if len(shape) != ndim:
        raise ConversionError(
            f"The key {key} of the {role} has the shape {shape}; it must have {ndim} dimensions."
        )
    return shape


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
        plan: from the weights (role -> state dict, which it may complete) and the authors' constructor
            arguments (role -> dict) to the plan of the conversion.
        containers: role of a file that nests several state dicts -> which role lies at which path inside it.
            A file given for a role of its own takes precedence.
        nestings: role of a file that holds plain tensors -> where in the file they may lie; the first place that it
            has counts, and the top if it has none of them.
        allowed_globals: classes that the authors' trainers pickle beside the tensors.
        config_roles: blocks of the authors' configuration that `original_config` may hold although no file belongs to
            them.
        hub_roles: roles of which the authors have a class on huggingface_hub's mixin; it saves a folder whose
            config.json holds the constructor's arguments.
    """

    family: str
    roles: Mapping[str, KeyMap]
    plan: Callable[[dict[str, StateDict], Mapping[str, Mapping[str, Any]]], ConversionPlan]
    containers: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    nestings: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    allowed_globals: Sequence[Callable] = ()
    config_roles: Sequence[str] = ()
    hub_roles: Sequence[str] = ()


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
        if role not in known and not (role in converter.config_roles and role not in files):
            raise ConversionError(
                f"Unknown role {role!r}{_closest(role, known)}; the roles of {converter.family} are "
                f"{', '.join(known)}."
            )
    for role in converter.hub_roles:
        stored = _stored_arguments(files, role)
        if stored and isinstance(original_config.get(role, {}), Mapping):
            original_config[role] = {**stored, **original_config.get(role, {})}
    return convert_weights(converter, _read_weights(converter, files), original_config)


def _stored_arguments(files: Mapping[str, str | Path], role: str) -> dict[str, Any]:
    """The constructor's arguments that the authors' Hub class has saved beside the weights of a role."""
    path = Path(files[role]) / CONFIG_NAME if role in files else None
    if path is None or not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"{str(path)!r} of the {role} is not JSON ({error}); fetch it again."
        ) from error
    return stored if isinstance(stored, dict) else {}


def convert_weights(
    converter: Converter, weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]
) -> PreTrainedModel:
    """As [`convert`], from role -> state dict; empties `weights` on the way, to hold nothing twice."""
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
        raise ConversionError(
            f"No files given; the roles of {converter.family} are {', '.join(converter.roles)}."
        )
    weights: dict[str, StateDict] = {}
    for role, file in files.items():
        content = read_checkpoint(file, role, converter.allowed_globals)
        places = converter.containers.get(role, {role: _nesting(converter, role, content)})
        for inner, path in places.items():
            if inner == role or inner not in files:
                weights[inner] = tensors_at(content, path, role, file)
                _check_keys(converter, inner, weights[inner], file)
    return weights


def _nesting(converter: Converter, role: str, content: Mapping[str, Any]) -> Sequence[str]:
    """Where in the content of a file the tensors of a role lie."""
    for path in converter.nestings.get(role, ()):
        if isinstance(content.get(path[0]), Mapping):
            return path
    return ()


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
    dtypes = {tensor.dtype for tensor in state.values()} & set(WEIGHT_DTYPES)
    if len(dtypes) < 2:
        return state
    dtype = reduce(torch.promote_types, dtypes)
    return {key: tensor.to(dtype) if tensor.dtype in dtypes else tensor for key, tensor in state.items()}


def _build(plan: ConversionPlan) -> PreTrainedModel:
    with torch.device("meta"):
        return plan.model_class(plan.config)


def _check_fit(model: PreTrainedModel, state: StateDict, plan: ConversionPlan) -> None:
    """Raises unless the state dict has exactly the keys and shapes of the model."""

    def name(key: str) -> str:
        maps = [key_map for key_map in plan.key_maps.values() if key_map.makes(key)]
        return f"{maps[0].source_of(key)} (our {key})" if maps else f"our {key}"

    expected = model.state_dict()
    for kind, keys in (
        ("missing", expected.keys() - state.keys()),
        ("superfluous", state.keys() - expected.keys()),
    ):
        if keys:
            listed = ", ".join(name(key) for key in sorted(keys)[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ConversionError(
                f"The checkpoint does not fill {plan.model_class.__name__}: {kind} {listed}{more}; the file "
                "is incomplete, or of a variant that this family does not have."
            )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise ConversionError(
                f"{name(key)} has the shape {tuple(state[key].shape)}; ours has {tuple(tensor.shape)}."
            )
        if tensor.is_floating_point() and state[key].dtype not in WEIGHT_DTYPES:
            raise ConversionError(
                f"{name(key)} has the dtype {state[key].dtype}; give a checkpoint in floating point of 16 bits or more."
            )


def converter_of(family_package: str) -> Converter:
    """The converter of the family in a package such as `hf_argen.modeling.var`."""
    return importlib.import_module(f"{family_package}.convert_{family_package.rsplit('.', 1)[1]}").CONVERTER


def load_presets(family_package: str) -> dict[str, dict[str, Any]]:
    """The released checkpoints of a family by name: its `presets.json`, empty without one."""
    file = resources.files(family_package).joinpath("presets.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def convert_from_hub(
    family_package: str, source: str, variant: str | None = None, **hub_kwargs: Any
) -> PreTrainedModel:
    """
    Fetches a released checkpoint and converts it.

    Args:
        family_package: for example `hf_argen.modeling.var`.
        source: the authors' repository, a folder that holds its files, or the name of a preset.
        variant: the preset's name with or without the family's, for example `"d16"`.
        hub_kwargs: `cache_dir`, `token`, `local_files_only`, `force_download`, `revision` (of `source`, not
            of other repositories that the checkpoint needs).

    Raises:
        ConversionError: no such preset (the message lists those there are); a file cannot be fetched or
            converted.
    """
    presets = load_presets(family_package)
    folder = Path(source) if Path(source).is_dir() else None
    family = family_package.rsplit(".", 1)[1]
    wanted = source if source in presets else variant and variant.removeprefix(f"{family}-")
    found = [
        name
        for name, preset in presets.items()
        if (source == name or folder or source == preset["repository"])
        and (wanted is None or wanted in (name, name.removeprefix(f"{family}-")))
    ]
    if len(found) != 1:
        known = ", ".join(
            f"{preset['repository']} {name.removeprefix(f'{family}-')}" for name, preset in presets.items()
        )
        raise ConversionError(
            f"{source!r} with variant={variant!r} is not one of the released checkpoints of {family}; they are "
            f"{known}."
        )
    return convert_preset(family_package, found[0], folder, **hub_kwargs)


def convert_preset(
    family_package: str, name: str, folder: Path | None = None, **hub_kwargs: Any
) -> PreTrainedModel:
    """Converts the preset `name` from `folder`, or from the Hub; logs a licence with conditions."""
    preset = load_presets(family_package)[name]
    if preset["licence"] not in PERMISSIVE_LICENCES:
        logger.warning("Licence of %s: %s", name, preset["licence_note"])
    files = {}
    for role, file in preset["files"].items():
        if folder is not None:
            files[role] = folder / file["file"]
        else:
            files[role] = _fetch(file["repository"], file["file"], preset["repository"], hub_kwargs)
    model = convert(converter_of(family_package), files, preset["original_config"])
    for option, value in preset.get("generation_config", {}).items():
        setattr(model.generation_config, option, value)
    model.config.original_checkpoint = provenance(name, preset)
    return model


def _fetch(repository: str, file: str, source: str, hub_kwargs: Mapping[str, Any]) -> str:
    kwargs = {k: v for k, v in hub_kwargs.items() if k != "revision" or repository == source}
    try:
        return fetch_file(repository, file, **kwargs)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConversionError(
            f"{file} of the Hub repository {repository} cannot be fetched "
            f"({str(error).strip().splitlines()[0]}); check the connection, or give the files that you have "
            "by role."
        ) from error
