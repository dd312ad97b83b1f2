"""
Trains a drafter for a language model: Medusa's heads (arXiv 2401.10774) or EAGLE (arXiv 2401.15077).

The hidden states of the language model are computed once and kept on disk, so the training itself reads only these. Both
stages show their progress and go on where they were when the same command is given again after a kill.

    python scripts/train_drafter.py runs/small-lm/model --method eagle --data runs/small-lm/train.npy --output runs/eagle
    python scripts/train_drafter.py MODEL --method medusa --data text.txt more.txt --output runs/medusa
    python scripts/train_drafter.py MODEL --method eagle --data datasets:wikitext/wikitext-2-raw-v1 --output runs/eagle

Data: token ids of this model's tokenizer (.npy, one row of integers), text files, or a data set of `datasets` with a
column "text". The result is OUTPUT/drafter, for `SpeculativeDecoding`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_argen import Eagle, EagleConfig, MedusaHeads, MedusaHeadsConfig
from hf_argen.training import training_arguments

NOISE = 0.2  # width of the uniform noise on the features that EAGLE reads while it learns
TOKEN_WEIGHT = 0.1  # of the loss on tokens beside that on features


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


class HiddenStates:
    """
    Hidden states of the last layer after the last norm, of windows of text, in one file that grows window by window.

    Args:
        folder: where the file is, with the number of windows that are done.
        ids: (windows, length) int64.
        hidden_size: of the language model.
    """

    def __init__(self, folder: Path, ids: np.ndarray, hidden_size: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.ids, self.state = ids, folder / "done.json"
        shape = (*ids.shape, hidden_size)
        found = json.loads(self.state.read_text(encoding="utf-8")) if self.state.is_file() else None
        if found is not None and found["shape"] != list(shape):
            raise ValueError(
                f"{str(folder)!r} holds hidden states of the shape {found['shape']}, this run has {list(shape)}; give "
                "another --output, or the options of the run that began there."
            )
        self.done = 0 if found is None else found["done"]
        self.states = np.lib.format.open_memmap(
            folder / "states.npy", mode="r+" if found else "w+", dtype=np.float16, shape=shape
        )
        self._write(self.done)

    def _write(self, done: int) -> None:
        self.done = done
        self.states.flush()
        text = json.dumps({"shape": list(self.states.shape), "done": done})
        self.state.write_text(text, encoding="utf-8")

    @torch.no_grad()
    def compute(self, model: PreTrainedModel, batch_size: int) -> None:
        """Computes what is missing."""
        total = len(self.ids)
        with tqdm(total=total, initial=self.done, desc="hidden states", unit="window") as bar:
            while self.done < total:
                rows = slice(self.done, min(self.done + batch_size, total))
                ids = torch.from_numpy(self.ids[rows]).to(model.device)
                output = model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
                self.states[rows] = output.hidden_states[-1].to(torch.float16).cpu().numpy()
                bar.update(rows.stop - rows.start)
                self._write(rows.stop)


class Features(Dataset):
    """Windows with their hidden states."""

    def __init__(self, cached: HiddenStates, rows: range):
        self.cached, self.rows = cached, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        states = torch.from_numpy(np.array(self.cached.states[row])).float()
        return {"hidden_states": states, "labels": torch.from_numpy(self.cached.ids[row])}


# Training


class EagleTrainer(Trainer):
    """
    The drafted feature of the next position against the language model's, and the distribution that its head makes of
    one against that of the other.

    Args:
        target: the language model, whose embeddings and head are used and stay as they are.
    """

    def __init__(self, *args: Any, target: PreTrainedModel, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.embed = target.get_input_embeddings().float().requires_grad_(False)
        self.head = target.get_output_embeddings().float().requires_grad_(False)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        states, ids = inputs["hidden_states"], inputs["labels"]
        features = states[:, :-1]
        if model.training:
            features = features + NOISE * (torch.rand_like(features) - 0.5)
        output = model(features, inputs_embeds=self.embed(ids[:, 1:]))
        wanted, drafted = states[:, 1:], output.last_hidden_state
        with torch.no_grad():
            distribution = self.head(wanted).softmax(dim=-1)
        tokens = -(distribution * self.head(drafted).float().log_softmax(dim=-1)).sum(dim=-1).mean()
        loss = F.smooth_l1_loss(drafted, wanted) + TOKEN_WEIGHT * tokens
        return (loss, output) if return_outputs else loss


def new_heads(target: PreTrainedModel, options: argparse.Namespace) -> MedusaHeads:
    """Heads that begin as the language model's own."""
    config = target.config.get_text_config()
    heads = MedusaHeads(
        MedusaHeadsConfig(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            medusa_num_heads=options.heads,
            medusa_num_layers=1,
            base_model_name_or_path=target.name_or_path,
        )
    )
    for head in heads.heads:
        head.lm_head.weight.data.copy_(target.get_output_embeddings().weight)
    return heads


def new_eagle(target: PreTrainedModel, options: argparse.Namespace) -> Eagle:
    """One layer of the language model's sizes, which shares its embeddings."""
    config = target.config.get_text_config()
    heads = config.num_attention_heads
    return Eagle(
        EagleConfig(
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            has_embedding=False,
        )
    )


def train(options: argparse.Namespace) -> MedusaHeads | Eagle:
    """Both stages."""
    target = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target.to(device)
    ids = read_ids(options.data, options.model)
    number = min(len(ids) // options.window, options.windows or len(ids))
    if number < 2:
        raise ValueError(
            f"The data has {len(ids)} tokens; two windows of {options.window} are needed at least."
        )
    if ids.max() >= target.config.get_text_config().vocab_size:
        raise ValueError(f"The data has the token {ids.max()}, which {options.model!r} does not know.")
    windows = ids[: number * options.window].reshape(number, options.window)
    cached = HiddenStates(
        options.output / "hidden-states", windows, target.config.get_text_config().hidden_size
    )
    cached.compute(target, options.batch_size)

    torch.manual_seed(options.seed)
    held_out = max(1, int(0.02 * number))
    is_eagle = options.method == "eagle"
    model = (new_eagle if is_eagle else new_heads)(target, options)
    folder = options.output / "training"
    arguments = training_arguments(
        folder,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup_steps,
        max_grad_norm=0.5,
        bf16=options.bf16,
        use_cpu=device == "cpu",
        save_steps=options.save_steps,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=options.save_steps,
        logging_steps=min(50, options.save_steps),
        seed=options.seed,
        report_to="none",
    )
    datasets = {
        "train_dataset": Features(cached, range(number - held_out)),
        "eval_dataset": Features(cached, range(number - held_out, number)),
    }
    trainer = (
        EagleTrainer(model, arguments, target=target, **datasets)
        if is_eagle
        else Trainer(model, arguments, **datasets)
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    print(f"Held-out loss: {trainer.evaluate()['eval_loss']:.4f}")
    return model


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the language model, its folder or Hub repository")
    parser.add_argument("--method", choices=("eagle", "medusa"), required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=4, help="of Medusa")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="at most so many; default: all of the data")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--max-steps", type=int, default=-1, help="in place of epochs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--save-steps", type=int, default=200)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--dtype", default="float32", help="of the language model")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    model = train(options).to(torch.bfloat16).eval()
    folder = options.output / "drafter"
    model.save_pretrained(folder)
    print(f"Written: {folder} ({sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
