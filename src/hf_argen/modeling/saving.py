"""`save_pretrained` and `push_to_hub`, shared by the families and the visual tokenizers."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo, ModelCard
from transformers import GenerationConfig

from ..hub import CARD, push_folder, text_in
from ..storage import final_name, merged_folder
from . import cards

CONFIG = "config.json"
PUSHING = (
    "private",
    "revision",
    "commit_message",
    "commit_description",
    "token",
    "create_pr",
)


class WholeSavingMixin:
    """Saves a model with its card, whole or not at all, and pushes both."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`] (`max_shard_size`, `variant`, `state_dict`, ...), and
        writes a model card, unless there is one that somebody edited.

        The folder is written beside its place and moved there. A process that is killed leaves the folder as it was,
        or, in the moment of moving, without `config.json`; never one that loads and is half new. Weights that an
        earlier saving left in another number of shards are removed.

        Raises:
            ValueError: `save_directory` is a file.
        """
        if kwargs.get(
            "distributed_checkpoint"
        ):  # many processes write to one folder, which is theirs to order
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        pushing = {name: kwargs.pop(name) for name in ("repo_id", "tags", *PUSHING) if name in kwargs}
        if "token" in pushing:
            kwargs["token"] = pushing["token"]
        name = final_name(save_directory)
        with model_folder(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)
            if (folder / CONFIG).is_file():
                self.model_card(name).save(folder / CARD)
                if kwargs.get("variant") and (Path(save_directory) / CONFIG).is_file():
                    _keep_dtype(folder, (Path(save_directory) / CONFIG).read_text(encoding="utf-8"))
        if getattr(self.config, "distributed_config", None) and torch.distributed.is_initialized():
            torch.distributed.barrier()  # no process may read before the one that writes has moved the files
        if push_to_hub:
            kept = {name: kwargs[name] for name in ("max_shard_size", "variant") if name in kwargs}
            self.push_to_hub(pushing.pop("repo_id", name), **kept, **pushing)
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tags: Sequence[str] | str | None = None,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """
        Pushes weights, configuration and model card in one commit. A card that somebody edited there stays.

        Args:
            repo_id: repository, with or without the name of an owner; made if there is none.
            tags: for the Hub, beside those of the family.
            max_shard_size, variant: as in `save_pretrained`.
            kwargs: `private`, `revision`, `commit_message`, `commit_description`, `token`, `create_pr`, as in
                [`~transformers.PreTrainedModel.push_to_hub`].

        Raises:
            ValueError: the Hub refuses, or cannot be reached.
        """
        tags = [*(self.model_tags or ()), *([tags] if isinstance(tags, str) else tags or ())]
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
            there = text_in(repo_id, CONFIG, kwargs.get("revision"), kwargs.get("token")) if variant else None
            if there is not None:
                _keep_dtype(Path(folder), there)
            return push_with_card(folder, self.model_card(repo_id, tags), repo_id, **kwargs)

    def model_card(self, name: str, tags: Sequence[str] = ()) -> ModelCard:
        """The card of this model under a name, see [`~hf_argen.modeling.cards.model_card`]."""
        options = getattr(self, "generation_config", None) or GenerationConfig()
        return cards.model_card(
            type(self), self.config, options.to_diff_dict(), self.num_parameters(), name, tags
        )

    def train(self, mode: bool = True) -> Self:
        """As in torch; from here on the model is not the released checkpoint any more, see `mark_as_trained`."""
        if mode:
            cards.mark_as_trained(self.config)
        return super().train(mode)


@contextmanager
def model_folder(target: str | os.PathLike) -> Iterator[Path]:
    """As [`~hf_argen.storage.merged_folder`]; a model card in `target` that somebody edited stays."""
    with merged_folder(target) as folder:
        yield folder
        if _edited(Path(target)) is not None:
            (folder / CARD).unlink(missing_ok=True)


def push_with_card(folder: str | os.PathLike, card: ModelCard, repo_id: str, **options: Any) -> CommitInfo:
    """
    Pushes a folder, see [`~hf_argen.hub.push_folder`], with the model card that somebody edited, in the folder or else
    in the repository; where nobody did, with `card`.
    """
    text = _edited(Path(folder))
    if text is None:
        there = text_in(repo_id, CARD, options.get("revision"), options.get("token"))
        if there is not None and not cards.is_generated(there):
            edited = ModelCard(there)
            edited.data.tags = list(dict.fromkeys([*(edited.data.tags or ()), *card.data.tags]))
            card = edited
        text = str(card)
    return push_folder(folder, repo_id, card=text, **options)


def _keep_dtype(folder: Path, earlier: str) -> None:
    """
    Variants share one configuration, whose dtype is the one that weights are loaded in: saving a variant in half
    precision must not halve the weights that were there before.
    """
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    fields["dtype"] = json.loads(earlier).get("dtype", fields.get("dtype"))
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _edited(folder: Path) -> str | None:
    """The model card of a folder, if there is one that was edited."""
    if not (folder / CARD).is_file():
        return None
    text = (folder / CARD).read_text(encoding="utf-8")
    return None if cards.is_generated(text) else text
