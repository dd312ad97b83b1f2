"""
What quantization by bitsandbytes costs and gives, and which layers are worth keeping in full precision.

Two tables in Markdown. The first quantizes one kind of layer at a time to nf4 and shows what it saves and what it does
to the logits; it is the evidence for `_keep_in_fp32_modules` of a family. The second compares whole choices: size,
time of `generate` against float32 in the same run, logits, and with `--emoji` the accuracy of the yardstick.

    python scripts/benchmark_quantization.py MODEL [--emoji 300] [--keep head,norm] [--no-kinds]

MODEL is the folder of a saved model, or a released checkpoint in the authors' format that was converted before.
"""

import argparse
import contextlib
import logging
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarking import row, seconds
from torch import nn
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from hf_argen import AutoModelForImageGeneration
from hf_argen.data.emoji import emoji_list

ALWAYS_KEPT = ["image_tokenizer"]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BITS = {"8-bit": {"load_in_8bit": True}, "nf4": NF4}


@dataclass(frozen=True)
class Choice:
    """
    One way of holding the weights.

    Attributes:
        name: as the table calls it.
        bits: options of `BitsAndBytesConfig`, `None` for a model that is not quantized.
        kept: parts of module names that stay in full precision; `None` for what the family itself keeps.
        dtype: of everything that is not quantized.
    """

    name: str
    bits: dict[str, Any] | None = None
    kept: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.bfloat16

    def load(self, folder: str) -> Any:
        """The model, held this way."""
        if self.bits is None:
            return AutoModelForImageGeneration.from_pretrained(folder, dtype=self.dtype).eval()
        quantization = BitsAndBytesConfig(**self.bits)
        with keeping(folder, self.kept):
            return AutoModelForImageGeneration.from_pretrained(
                folder, dtype=self.dtype, quantization_config=quantization
            ).eval()


@contextlib.contextmanager
def keeping(folder: str, names: Sequence[str] | None) -> Iterator[None]:
    """Within the `with` block the model's family keeps other modules than it does by itself."""
    # The parts of a model are classes of the family too, and transformers joins what they keep: change the common base.
    mro = type(skeleton(folder)).__mro__
    base = next(one for one in mro if "_keep_in_fp32_modules" in vars(one))
    own = base._keep_in_fp32_modules
    try:
        if names is not None:
            base._keep_in_fp32_modules = [*ALWAYS_KEPT, *names]
        yield
    finally:
        base._keep_in_fp32_modules = own


def skeleton(folder: str) -> Any:
    """The model without weights."""
    from transformers import AutoConfig

    with torch.device("meta"):
        return AutoModelForImageGeneration.from_config(AutoConfig.from_pretrained(folder))


def kinds_of(folder: str) -> dict[str, int]:
    """Linear layers that can be quantized, by name with `*` for the layer's number: parameters of all of a kind."""
    kinds: dict[str, int] = {}
    for name, module in skeleton(folder).named_modules():
        if type(module) is nn.Linear and not name.startswith(tuple(ALWAYS_KEPT)):
            kind = re.sub(r"\.\d+\.", ".*.", name)
            kinds[kind] = kinds.get(kind, 0) + module.weight.numel()
    return kinds


def size_of(model: Any) -> int:
    """Bytes of everything that is saved."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


class Probe:
    """The inputs on which the models are compared: pictures that the float32 model drew, and their conditions."""

    def __init__(self, model: Any, processor: Any, count: int):
        if model.config.condition_type == "class":
            classes = model.config.num_classes
            labels = torch.arange(count) * classes // count
            self.conditions = {"class_labels": labels}
        else:
            names = [one.name for one in emoji_list()]
            prompts = [names[i * len(names) // count] for i in range(count)]
            self.conditions = dict(processor(prompts))
        self.options = {"do_sample": True}
        self.ids = self.draw(model)
        self.expected = self.logits(model)

    def draw(self, model: Any) -> torch.Tensor:
        """Ids (count, tokens), each picture with a generator of its own."""
        count = len(next(iter(self.conditions.values())))
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return model.generate(**self.conditions, **self.options, generator=generators)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        """Teacher-forced logits (count, tokens, vocab_size)."""
        return model(input_ids=self.ids, **self.conditions).logits

    def compare(self, model: Any) -> tuple[float, float]:
        """Cosine with the float32 logits, mean and smallest over the tokens."""
        found = self.logits(model).double()
        expected = self.expected.double()
        cosines = nn.functional.cosine_similarity(
            found - found.mean(-1, True), expected - expected.mean(-1, True), dim=-1
        )
        return cosines.mean().item(), cosines.min().item()

    def seconds(self, model: Any, reference: Any, rounds: int) -> tuple[float, float]:
        """Median time of drawing one batch, and its median ratio to the reference's in the same round."""
        times, ratios = [], []
        for one in (model, reference):
            self.draw(one)  # first calls allocate and pack
        for _ in range(rounds):
            own, other = (seconds(lambda one=one: self.draw(one)) for one in (model, reference))
            times.append(own)
            ratios.append(own / other)
        return statistics.median(times), statistics.median(ratios)


def emoji_accuracy(model: Any, processor: Any, count: int, font: str | None) -> str:
    """Accuracy by Unicode name and by held-out caption."""
    from evaluate_emoji import draw

    from hf_argen.data.emoji import EmojiSet, accuracy

    emoji = EmojiSet.load(processor.image_size[0], font=font)
    shares = []
    for held_out in (False, True):
        targets, prompts = emoji.prompts(held_out=held_out, count=count)
        shares.append(accuracy(draw(model, processor, prompts), targets, emoji.font))
    return " / ".join(f"{share:.1%}" for share in shares)


def kinds_table(folder: str, probe: Probe, full: int) -> None:
    """One kind of layer in nf4, all others in bfloat16."""
    kinds = kinds_of(folder)
    baseline = Choice("bfloat16").load(folder)
    size, (mean, _) = size_of(baseline), probe.compare(baseline)
    print(f"\nOne kind of layer in nf4, the others in bfloat16 (cosine {mean:.5f} without any)\n")
    row("layers", "parameters", "size saved", "cosine of logits", "smallest", "lost per % saved")
    row(*["---"] * 6)
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1]):
        others = tuple(pattern(other) for other in kinds if other != kind)
        model = Choice(kind, NF4, others).load(folder)
        saved = 100 * (size - size_of(model)) / size
        found, smallest = probe.compare(model)
        lost = (mean - found) / saved if saved > 0 else float("nan")
        row(
            f"`{kind}`",
            f"{count / full:.1%}",
            f"{saved:.1f} %",
            f"{found:.5f}",
            f"{smallest:.4f}",
            f"{lost:.1e}",
        )
        del model


def pattern(kind: str) -> str:
    """The regular expression by which transformers is told to leave a kind of layer alone."""
    return re.escape(kind).replace(r"\*", r"\d+") + "$"


def choices_table(
    folder: str, probe: Probe, choices: list[Choice], arguments: argparse.Namespace, processor: Any
) -> None:
    """Whole choices against float32."""
    reference = Choice("float32", dtype=torch.float32).load(folder)
    print(f"\nWhole choices; {len(probe.ids)} pictures a batch, median of {arguments.rounds} rounds\n")
    columns = [
        "weights",
        "size",
        "of float32",
        "time of a batch",
        "of float32",
        "cosine of logits",
        "smallest",
    ]
    columns += ["emoji by name / held-out"] if arguments.emoji else []
    row(*columns)
    row(*["---"] * len(columns))
    full = size_of(reference)
    for choice in choices:
        model = reference if choice.name == "float32" else choice.load(folder)
        size = size_of(model)
        taken, ratio = probe.seconds(model, reference, arguments.rounds)
        mean, smallest = probe.compare(model)
        cells = [
            choice.name,
            f"{size / 1e6:.1f} MB",
            f"{size / full:.2f}",
            f"{taken:.2f} s",
            f"{ratio:.2f}",
        ]
        cells += [f"{mean:.5f}", f"{smallest:.4f}"]
        if arguments.emoji:
            cells.append(emoji_accuracy(model, processor, arguments.emoji, arguments.font))
        row(*cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="NAME,NAME", help="one more choice of kept modules"
    )
    parser.add_argument("--bits", choices=["8-bit", "nf4"], action="append", help="only these; default: both")
    parser.add_argument("--batch", type=int, default=8, help="pictures that are compared and timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--emoji",
        type=int,
        default=0,
        metavar="COUNT",
        help="prompts of the emoji yardstick, 300 in the docs",
    )
    parser.add_argument("--font", help="NotoColorEmoji.ttf, where it is not found by itself")
    parser.add_argument("--no-kinds", action="store_true", help="only the table of whole choices")
    arguments = parser.parse_args()

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every multiplication
    torch.set_num_threads(arguments.threads)
    reference = Choice("float32", dtype=torch.float32).load(arguments.model)
    processor = None
    if reference.config.condition_type == "text":
        processor = AutoProcessor.from_pretrained(arguments.model)
    probe = Probe(reference, processor, arguments.batch)
    full = sum(parameter.numel() for parameter in reference.parameters())
    print(
        f"`{arguments.model}`: {full / 1e6:.1f} million parameters, {arguments.threads} threads, torch {torch.__version__}"
    )
    del reference
    if not arguments.no_kinds:
        kinds_table(arguments.model, probe, full)
    choices = [Choice("float32", dtype=torch.float32), Choice("bfloat16")]
    for name in arguments.bits or BITS:
        bits = BITS[name]
        choices.append(Choice(f"{name}, all layers", bits, ()))
        choices += [Choice(f"{name}, {kept} kept", bits, tuple(kept.split(","))) for kept in arguments.keep]
        choices.append(Choice(f"{name}, as the family keeps", bits))
    choices_table(arguments.model, probe, choices, arguments, processor)


if __name__ == "__main__":
    main()
