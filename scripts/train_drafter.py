"""
Trains a drafter for a language model: Medusa's heads (arXiv 2401.10774), EAGLE (arXiv 2401.15077) or EAGLE-3 (arXiv
2503.01840).

The hidden states of the language model are computed once and kept on disk, so the training itself reads only these. With
--generate the language model also continues windows of the text itself, greedily: a drafter is to foresee what the model
writes, which is not what people wrote. EAGLE learns on several of its own steps (--steps), as it will draft. All stages
show their progress and go on where they were when the same command is given again after a kill.

    python scripts/train_drafter.py runs/small-lm/model --method eagle --data runs/small-lm/train.npy --generate 2000 \\
        --output runs/eagle
    python scripts/train_drafter.py MODEL --method medusa --data text.txt more.txt --output runs/medusa
    python scripts/train_drafter.py MODEL --method eagle3 --data datasets:wikitext/wikitext-2-raw-v1 --output runs/eagle3

Data: token ids of this model's tokenizer (.npy, one row of integers), text files, or a data set of `datasets` with a
column "text". The result is OUTPUT/drafter, for `SpeculativeDecoding`; with --speculators also OUTPUT/speculators, EAGLE-3
as the library speculators and vLLM read it. The defaults suit a model of ten million
parameters on two CPU cores; a larger one wants --dtype bfloat16, --learning-rate 1e-4, and all of its own writing.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drafter_training import EagleTrainer, Features, HiddenStates, MedusaTrainer, continuations, read_ids
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_argen import Eagle, EagleConfig, MedusaHeads, MedusaHeadsConfig
from hf_argen.training import MuonWithAdamW, training_arguments

HELD_OUT = 0.02  # share of the windows
MOST_DRAFT_TOKENS = 32000  # that EAGLE-3 drafts unless told otherwise, as the authors'


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


def narrow_sizes(width: int, target_width: int, sizes: dict[str, int]) -> dict[str, int]:
    """Sizes of a narrower drafter, in the language model's proportions."""
    heads = max(width // (target_width // sizes["num_attention_heads"]), 1)
    if not 0 < width < target_width or width % (2 * heads):
        raise ValueError(
            f"--hidden-size is {width}; it must be below that of the language model, {target_width}, and a multiple of "
            f"{2 * heads}, twice the number of heads."
        )
    return {
        "hidden_size": width,
        "intermediate_size": sizes["intermediate_size"] * width // target_width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def main_components(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Rows (n, size) in the `width` directions in which they differ most, (n, width), as far apart as before."""
    weight = weight.float()
    return (weight @ torch.linalg.svd(weight, full_matrices=False).Vh[:width].T).contiguous()


def new_eagle(target: PreTrainedModel, options: argparse.Namespace, ids: np.ndarray) -> Eagle:
    """
    Layers of the language model's sizes, which share its embeddings; version 1 its head too. A narrower EAGLE-3 has
    embeddings and a head of its own, which begin as the main components of the language model's.
    """
    config = target.config.get_text_config()
    heads = config.num_attention_heads
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    is_third = options.method == "eagle3"
    is_narrow = is_third and options.hidden_size not in (None, config.hidden_size)
    if is_narrow:
        sizes = narrow_sizes(options.hidden_size, config.hidden_size, sizes)
    draft_vocab = min(options.draft_vocab or MOST_DRAFT_TOKENS, config.vocab_size) if is_third else None
    eagle = Eagle(
        EagleConfig(
            version=3 if is_third else 1,
            num_hidden_layers=1 if is_third else options.layers,
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            draft_vocab_size=draft_vocab,
            target_hidden_size=config.hidden_size,
            feature_layers=options.feature_layers if is_third else None,
            base_model_name_or_path=target.name_or_path,
            has_embedding=is_narrow,
            **sizes,
        )
    )
    if is_third:
        weight = target.get_output_embeddings().weight.data
        if is_narrow:
            eagle.embed_tokens.weight.data.copy_(
                main_components(target.get_input_embeddings().weight.data, options.hidden_size)
            )
            weight = main_components(weight, options.hidden_size)
        if eagle.draft_ids is not None:
            frequent = np.bincount(ids.reshape(-1), minlength=config.vocab_size).argsort()[::-1]
            chosen = torch.from_numpy(np.sort(frequent[:draft_vocab]))
            eagle.d2t.copy_(chosen - torch.arange(draft_vocab))
            weight = weight[chosen.to(weight.device)]
        eagle.lm_head.weight.data.copy_(weight)
    return eagle


def read_windows(target: PreTrainedModel, options: argparse.Namespace) -> tuple[np.ndarray, list[int]]:
    """(windows, length) int64: those of the text, then those that the model wrote; and which are held out."""
    ids = read_ids(options.data, options.model)
    number = min(len(ids) // options.window, options.windows or len(ids))
    if number < 2:
        raise ValueError(
            f"The data has {len(ids)} tokens; two windows of {options.window} are needed at least."
        )
    if ids.max() >= target.config.get_text_config().vocab_size:
        raise ValueError(f"The data has the token {ids.max()}, which {options.model!r} does not know.")
    windows = ids[: number * options.window].reshape(number, options.window)
    held_out = max(1, int(HELD_OUT * number))
    if not options.generate:
        return windows, list(range(number - held_out, number))
    length = options.prompt or max(options.window // 3, 1)
    if not 1 <= length < options.window:
        raise ValueError(f"--prompt is {length}; it must be at least 1 and below --window, {options.window}.")
    # Prompts begin where no window of the text does, all over the data, the held-out ones in its held-out end.
    starts = np.linspace(0, len(ids) - length, options.generate).astype(np.int64)
    prompts = np.stack([ids[start : start + length] for start in starts])
    own = continuations(
        options.output / "generated", target, prompts, options.window, options.generate_batch_size
    )
    kept = windows[: number - held_out]
    both = np.concatenate([kept, own])
    return both, list(range(len(both) - max(1, int(HELD_OUT * len(own))), len(both)))


def train(options: argparse.Namespace) -> MedusaHeads | Eagle:
    """All stages."""
    target = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target.to(device)
    windows, held_out = read_windows(target, options)
    torch.manual_seed(options.seed)
    model: MedusaHeads | Eagle
    if options.method == "medusa":
        model, layers = new_heads(target, options), ()
    else:
        model = new_eagle(target, options, windows)
        layers = model.config.read_layers(target.config.get_text_config().num_hidden_layers)
    layers = layers if layers[-1:] == (-1,) else (*layers, -1)
    width = len(layers) * target.config.get_text_config().hidden_size
    cached = HiddenStates(options.output / "hidden-states", windows, width, layers)
    cached.compute_from(target, options.batch_size)
    folder = options.output / "training"
    trainer = trainer_of(model, target, cached, held_out, arguments_of(folder, device, options), options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    print(f"Held-out loss: {trainer.evaluate()['eval_loss']:.4f}")
    shares = ", ".join(f"{share:.3f}" for share in trainer.agreement())
    print(f"Held-out drafts that are right, the first, the second, ...: {shares}")
    if options.speculators:
        whole = copy.deepcopy(model).to(torch.bfloat16)
        whole.save_speculators(options.output / "speculators", target)
    return model


def arguments_of(folder: Path, device: str, options: argparse.Namespace) -> Any:
    """For `Trainer`."""
    return training_arguments(
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


def trainer_of(
    model: MedusaHeads | Eagle,
    target: PreTrainedModel,
    cached: HiddenStates,
    held_out: list[int],
    arguments: Any,
    options: argparse.Namespace,
) -> Trainer:
    """The trainer of a network on cached hidden states."""
    datasets = {
        "train_dataset": Features(cached, sorted(set(range(len(cached.ids))) - set(held_out))),
        "eval_dataset": Features(cached, held_out),
    }
    heads = [name for name, _ in model.named_modules() if name.endswith("lm_head")]
    optimizer = MuonWithAdamW(model, options.learning_rate, output_layers=heads)
    common = {**datasets, "optimizers": (optimizer, None)}
    if options.method == "medusa":
        return MedusaTrainer(model, arguments, **common)
    weights = {"steps": options.steps, "token_weight": options.token_weight}
    return EagleTrainer(model, arguments, target=target, **weights, **common)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the language model, its folder or Hub repository")
    parser.add_argument("--method", choices=("eagle", "eagle3", "medusa"), required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=4, help="of Medusa")
    parser.add_argument("--layers", type=int, default=1, help="of EAGLE; EAGLE-3 has one")
    parser.add_argument("--steps", type=int, default=3, help="of its own that EAGLE learns on")
    parser.add_argument("--token-weight", type=float, default=1.0, help="beside the features of EAGLE")
    parser.add_argument("--draft-vocab", type=int, help="tokens that EAGLE-3 drafts, the most frequent ones")
    parser.add_argument(
        "--feature-layers", type=int, nargs=3, help="that EAGLE-3 reads; default: 2, L/2, L-3"
    )
    parser.add_argument("--hidden-size", type=int, help="of EAGLE-3; default: the language model's")
    parser.add_argument("--window", type=int, default=384)
    parser.add_argument("--windows", type=int, help="of the text, at most; default: all of the data")
    parser.add_argument("--generate", type=int, default=0, help="windows that the model writes itself")
    parser.add_argument("--prompt", type=int, help="tokens of text that it continues; default: a third")
    parser.add_argument("--generate-batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--max-steps", type=int, default=-1, help="in place of epochs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--save-steps", type=int, default=200)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--dtype", default="float32", help="of the language model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculators", action="store_true", help="EAGLE-3 in speculators' form, too")
    options = parser.parse_args(arguments)
    if options.hidden_size is not None and options.method != "eagle3":
        parser.error(f"--hidden-size is for EAGLE-3; --method is {options.method}")
    if options.speculators and options.method != "eagle3":
        parser.error(f"--speculators writes EAGLE-3; --method is {options.method}")
    return options


def main() -> None:
    options = parse()
    model = train(options).to(torch.bfloat16).eval()
    folder = options.output / "drafter"
    model.save_pretrained(folder)
    print(f"Written: {folder} ({sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
