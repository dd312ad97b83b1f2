"""What train_drafter.py trains drafters from and with: windows of text, a language model's hidden states, and losses."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedModel, Trainer

from hf_argen import Eagle, MedusaHeads

NOISE = 0.2  # width of the uniform noise on the features that EAGLE reads while it learns
DECAY = 0.8  # how much less each further step of its own weighs in EAGLE's loss


# Data


def read_ids(sources: list[str], model: str) -> np.ndarray:
    """All data as one row of token ids."""
    rows = []
    for source in sources:
        if source.endswith(".npy"):
            rows.append(np.load(source).reshape(-1))
            continue
        tokenizer = AutoTokenizer.from_pretrained(model)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for text in read_texts(source):
            rows.append(np.array(tokenizer(text)["input_ids"] + end))  # noqa: PERF401
    return np.concatenate(rows).astype(np.int64)


def read_texts(source: str) -> list[str]:
    """The texts of a file, or of a data set named `datasets:NAME` or `datasets:NAME/CONFIGURATION`."""
    if not source.startswith("datasets:"):
        return [Path(source).read_text(encoding="utf-8")]
    from datasets import load_dataset

    name, _, configuration = source.removeprefix("datasets:").rpartition("/")
    arguments = (name, configuration) if name else (configuration,)
    return [row["text"] for row in load_dataset(*arguments, split="train") if row["text"].strip()]


class Growing:
    """
    An array in a file that is computed a few rows at a time; a run that was killed goes on after the rows that are done.

    Args:
        folder: where the file is, with what it holds and how many rows are done.
        shape: of the array.
        dtype: of the array.
        about: what the rows depend on; a folder with anything else is refused.
        what: what the rows are, for messages.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: Any, about: dict[str, Any], what: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.state, self.what = folder / "done.json", what
        self.about = {"shape": list(shape), **about}
        found = json.loads(self.state.read_text(encoding="utf-8")) if self.state.is_file() else None
        if found is not None and found | {"done": 0} != self.about | {"done": 0}:
            name = next(key for key in self.about | found if found.get(key) != self.about.get(key))
            raise ValueError(
                f"{str(folder)!r} holds {what} of the {name} {found.get(name)}, this run has {self.about.get(name)}; give "
                "another --output, or the options of the run that began there."
            )
        mode = "w+" if found is None else "r+"
        self.rows = np.lib.format.open_memmap(folder / "rows.npy", mode=mode, dtype=dtype, shape=shape)
        self.finish(0 if found is None else found["done"])

    def finish(self, done: int) -> None:
        """Notes that so many rows are computed."""
        self.done = done
        self.rows.flush()
        self.state.write_text(json.dumps(self.about | {"done": done}), encoding="utf-8")

    def compute(self, rows: Callable[[slice], torch.Tensor], batch_size: int) -> None:
        """Computes what is missing, `rows` of a slice at a time."""
        with tqdm(total=len(self.rows), initial=self.done, desc=self.what, unit="window") as bar:
            while self.done < len(self.rows):
                part = slice(self.done, min(self.done + batch_size, len(self.rows)))
                self.rows[part] = rows(part).cpu().numpy()
                bar.update(part.stop - part.start)
                self.finish(part.stop)


@torch.no_grad()
def continuations(
    folder: Path, model: PreTrainedModel, prompts: np.ndarray, window: int, batch_size: int
) -> np.ndarray:
    """
    What the language model itself writes, greedily: what its drafters have to foresee.

    Args:
        folder: where they are kept.
        prompts: (windows, length) int64.
        window: tokens of prompt and continuation together.

    Returns:
        (windows, window) int64.
    """
    length = prompts.shape[1]
    grown = Growing(folder, (len(prompts), window), np.int64, {"prompt tokens": length}, "generated windows")
    options = {"max_new_tokens": window - length, "do_sample": False}
    model.generation_config = GenerationConfig(pad_token_id=0)  # without an end: another text may follow

    def rows(part: slice) -> torch.Tensor:
        ids = torch.from_numpy(prompts[part]).to(model.device)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    grown.compute(rows, batch_size)
    return np.array(grown.rows)


class HiddenStates(Growing):
    """
    Hidden states of a language model at windows of text.

    Args:
        folder: where they are kept.
        ids: (windows, length) int64.
        width: of all layers together.
        layers: which hidden states, as transformers counts them; -1 comes out of the last norm.
    """

    def __init__(self, folder: Path, ids: np.ndarray, width: int, layers: tuple[int, ...] = (-1,)):
        super().__init__(folder, (*ids.shape, width), np.float16, {"layers": list(layers)}, "hidden states")
        self.ids, self.layers = ids, layers

    def compute_from(self, model: PreTrainedModel, batch_size: int) -> None:
        """Computes what is missing."""

        @torch.no_grad()
        def rows(part: slice) -> torch.Tensor:
            ids = torch.from_numpy(self.ids[part]).to(model.device)
            states = model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
            return torch.cat([states[layer] for layer in self.layers], dim=-1).to(torch.float16)

        self.compute(rows, batch_size)


class Features(Dataset):
    """Windows with their hidden states."""

    def __init__(self, cached: HiddenStates, rows: list[int]):
        self.cached, self.rows = cached, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        states = torch.from_numpy(np.array(self.cached.rows[row])).float()
        return {"hidden_states": states, "labels": torch.from_numpy(self.cached.ids[row])}


# Training


def unrolled_mask(length: int, step: int, like: torch.Tensor) -> torch.Tensor:
    """
    What a position sees on one of the drafter's own steps, additive (1, 1, length, (step + 1) * length): of the features
    of the language model those that were known `step` positions before, then what was drafted on every step since.
    """
    query = torch.arange(length, device=like.device)[:, None]
    key = torch.arange(length, device=like.device)[None]
    seen = [key <= query - step, *(key == query - step + i for i in range(1, step + 1))]
    mask = torch.zeros(1, 1, length, (step + 1) * length, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~torch.cat(seen, dim=1), torch.finfo(like.dtype).min)


def unrolled(
    model: Eagle, features: torch.Tensor, embeds: torch.Tensor, steps: int
) -> Iterator[torch.Tensor]:
    """
    What EAGLE drafts when its own drafts take the place of the language model's features, as they will (training-time
    test of EAGLE-3, arXiv 2503.01840; for the features of EAGLE, HASS, arXiv 2408.15766).

    Args:
        features: (batch, length, features) of the language model.
        embeds: (batch, length, hidden_size) of the token after each.

    Yields:
        (batch, length, hidden_size), the features drafted on each step; those of the first `step` positions have no
        meaning.
    """
    length = features.shape[1]
    cache = DynamicCache()
    for step in range(steps):
        output = model(
            features,
            inputs_embeds=embeds,
            attention_mask=unrolled_mask(length, step, embeds),
            past_key_values=cache,
            with_logits=False,
        ).last_hidden_state
        yield output
        features = F.pad(output[:, :-1], (0, 0, 1, 0))


class EagleTrainer(Trainer):
    """
    The distribution that follows each drafted feature against the language model's, on several steps of the drafter's
    own; for version 1 also the drafted features against the language model's.

    Args:
        target: the language model, whose embeddings and head are used and stay as they are.
        steps: of the drafter's own.
        token_weight: of the loss on tokens beside that on features, version 1.
    """

    def __init__(
        self, *args: Any, target: PreTrainedModel, steps: int = 1, token_weight: float = 1.0, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.embed = target.get_input_embeddings().float().requires_grad_(False)
        self.head = target.get_output_embeddings().float().requires_grad_(False)
        self.steps, self.token_weight = steps, token_weight

    def drafts(
        self, model: Eagle, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]]:
        """The language model's last hidden states after each pair of feature and token, its logits, and the drafts."""
        states, ids = inputs["hidden_states"], inputs["labels"]
        own = model.config
        features = states[:, :-1, : own.num_features * own.target_hidden_size]
        wanted = states[:, 1:, -own.target_hidden_size :]
        if model.training and own.version == 1:
            features = features + NOISE * (torch.rand_like(features) - 0.5)
        with torch.no_grad():
            logits = self.head(wanted)
        # Without gradient where they are the language model's.
        embeds = (model.embed_tokens or self.embed)(ids[:, 1:])
        return wanted, logits.float(), unrolled(model, features, embeds, self.steps)

    def logits(self, model: Eagle, drafted: torch.Tensor) -> torch.Tensor:
        """(batch, length, draft_vocab_size) float32."""
        return (self.head(drafted) if model.config.version == 1 else model.logits_of(drafted)).float()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        eagle = self.accelerator.unwrap_model(model)
        wanted, logits, drafts = self.drafts(eagle, inputs)
        counts = torch.ones_like(logits[..., 0])
        if eagle.draft_ids is not None:  # where the next token cannot be drafted there is nothing to learn
            counts = torch.isin(logits.argmax(dim=-1), eagle.draft_ids).float()
            logits = logits[..., eagle.draft_ids]
        distribution = logits.softmax(dim=-1)
        loss = logits.new_zeros(())
        for step, drafted in enumerate(drafts):
            entropy = -(distribution * self.logits(eagle, drafted).log_softmax(dim=-1)).sum(dim=-1)
            own = (entropy * counts)[:, step:].sum() / counts[:, step:].sum().clamp(min=1)
            if eagle.config.version == 1:
                own = self.token_weight * own + F.smooth_l1_loss(drafted[:, step:], wanted[:, step:])
            loss = loss + DECAY**step * own
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def agreement(self) -> list[float]:
        """Of each step the share of held-out positions at which the drafter's best token is the language model's."""
        model = self.accelerator.unwrap_model(self.model).eval()
        hits, seen = [0] * self.steps, [0] * self.steps
        for batch in self.get_eval_dataloader():
            _, logits, drafts = self.drafts(model, batch)
            best = logits.argmax(dim=-1)
            for step, drafted in enumerate(drafts):
                own = self.logits(model, drafted).argmax(dim=-1)
                own = own if model.draft_ids is None else model.draft_ids[own]
                same = (own == best)[:, step:]
                hits[step] += int(same.sum())
                seen[step] += same.numel()
        return [hit / of for hit, of in zip(hits, seen, strict=True)]


class MedusaTrainer(Trainer):
    """Every head against the tokens that follow."""

    @torch.no_grad()
    def agreement(self) -> list[float]:
        """Of each head the share of held-out positions at which its best token is the one that follows."""
        model: MedusaHeads = self.accelerator.unwrap_model(self.model).eval()
        number = model.config.medusa_num_heads
        hits, seen = [0] * number, [0] * number
        for batch in self.get_eval_dataloader():
            for i, logits in enumerate(model(batch["hidden_states"]).logits):
                same = logits[:, : -2 - i].argmax(dim=-1) == batch["labels"][:, 2 + i :]
                hits[i] += int(same.sum())
                seen[i] += same.numel()
        return [hit / max(of, 1) for hit, of in zip(hits, seen, strict=True)]
