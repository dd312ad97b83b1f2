"""Key maps: which of the authors' tensors become which of ours, readable in both directions."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import torch

from .checkpoints import ConversionError

StateDict = dict[str, torch.Tensor]


@cache
def _compiled(pattern: str) -> re.Pattern:
    """A key as a regular expression: a placeholder of one letter is a number, `{leaf}` a name without dot."""
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


class Unbatched(Rule):
    """A table (rows, dim) that the authors hold as a batch of one, (1, rows, dim)."""

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        if tensor.ndim != 3 or len(tensor) != 1:
            raise ValueError("it must be (1, rows, dim)")
        return (tensor[0],)

    def backward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0][None]


class Transposed(Rule):
    """A matrix with rows and columns exchanged."""

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        if tensor.ndim != 2:
            raise ValueError("it must be a matrix")
        return (tensor.t(),)

    def backward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0].t()


class Rows(Rule):
    """
    A table of which our models have only some rows, each range of them as a table of its own. The other rows are never
    read; on the way back they are zeros.

    Args:
        source: the authors' table, (rows, dim), or (1, rows, dim) with `is_batched`.
        rows: of the authors' table.
        ranges: our table -> the first of its rows and the one after its last.
    """

    def __init__(
        self, source: str, rows: int, ranges: Mapping[str, tuple[int, int]], is_batched: bool = False
    ):
        super().__init__(source, *ranges)
        self.rows, self.ranges, self.is_batched = rows, tuple(ranges.values()), is_batched

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.is_batched and tensor.shape[:1] == (1,):
            tensor = tensor[0]
        if tensor.ndim != 2 or tensor.shape[0] != self.rows:
            raise ValueError(f"it must have {self.rows} rows")
        return tuple(tensor[start:stop] for start, stop in self.ranges)

    def backward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        table = tensors[0].new_zeros(self.rows, tensors[0].shape[-1])
        for tensor, (start, stop) in zip(tensors, self.ranges, strict=True):
            table[start:stop] = tensor
        return table[None] if self.is_batched else table


class Drop(Rule):
    """A key that our model computes itself or does not need."""

    def forward(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return ()


class KeyMap:
    """
    Ordered rules between the authors' keys and ours.

    Rules may be alternatives for one of our keys, when the authors store a thing under different names
    depending on its options. `narrowed` keeps those that a given checkpoint uses; otherwise `revert` takes
    the first.
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
                raise ConversionError(
                    f"The key {key} has the shape {tuple(tensor.shape)}, but {error}."
                ) from error
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


def count(state_dict: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many numbers `{i}` a pattern such as `blocks.{i}.attn.proj.weight` matches, counted from 0."""
    matches = (_compiled(pattern).fullmatch(key) for key in state_dict)
    return max((int(match["i"]) + 1 for match in matches if match), default=0)
