"""A language model that is a table: its next token depends on the last two. As fast as exact enumeration needs."""

from types import SimpleNamespace

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hf_argen.generation.decoding import Decoding, Request
from hf_argen.generation.guidance import PairedLogits

from .enumerator import Distribution, Enumerator


class TableModel(torch.nn.Module):
    """Logits (vocab, vocab, vocab) of what follows two tokens."""

    predictor_class = None

    def __init__(self, vocab: int, seed: int, spread: float = 1.5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(vocab, vocab, vocab, generator=generator)
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=vocab))


class TablePredictor:
    """What a decoding drives; it knows every node by the sequence that ends there."""

    def __init__(self, model: TableModel):
        self.model, self.calls, self.num_tokens = model, 0, 0

    def reserve(self, tokens: int, is_static: bool = False) -> None:
        self.capacity, self.is_static = tokens, is_static

    def for_model(self, model: TableModel) -> "TablePredictor":
        return TablePredictor(model)

    def context_left(self) -> None:
        return None

    def prefill(self, inputs) -> torch.Tensor:
        self.rows = [row.tolist() for row in inputs["input_ids"]]
        self.nodes = [[] for _ in self.rows]
        self.calls += 1
        return torch.stack([self._after(row) for row in self.rows])

    def _after(self, ids: list[int]) -> torch.Tensor:
        return self.model.table[ids[-2], ids[-1]]

    def predict(self, tokens, parents=None) -> torch.Tensor:
        self.calls += 1
        logits = []
        for row, nodes, ids in zip(self.rows, self.nodes, range(len(tokens)), strict=True):
            for i, token in enumerate(tokens[ids].tolist()):
                parent = len(nodes) - 1 if parents is None else int(parents[ids, i])
                nodes.append([*(row if parent < 0 else nodes[parent]), token])
                logits.append(self._after(nodes[-1]))
        return torch.stack(logits).view(*tokens.shape, -1)

    def prefill_paired(self, inputs) -> PairedLogits:
        return PairedLogits(self.prefill(inputs)[:, None])

    def predict_paired(self, tokens) -> PairedLogits:
        return PairedLogits(self.predict(tokens))

    def commit(self, keep=None, count=None) -> None:
        for row, number in enumerate(count or [len(nodes) for nodes in self.nodes]):
            if number:
                last = number - 1 if keep is None else int(keep[row, number - 1])
                path = self.nodes[row][last]
                assert len(path) == len(self.rows[row]) + number and path[:-number] == self.rows[row]
                self.rows[row] = path
        self.nodes = [[] for _ in self.rows]


def run(
    decoding: Decoding, model: TableModel, prompt: list[list[int]], tokens: int, do_sample=True, processors=()
):
    """The decoding's output for a prompt, as a `DecodingResult`."""
    ids = torch.tensor(prompt)
    config = GenerationConfig(do_sample=do_sample, max_length=ids.shape[1] + tokens, pad_token_id=0)
    return decoding.run(
        Request(
            model=model,
            predictor=TablePredictor(model),
            inputs={"input_ids": ids},
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(),
            prompt_ids=ids,
            wants_details=True,
        )
    )


def distribution(
    decoding: Decoding, model: TableModel, prompt: list[list[int]], tokens: int, processors=()
) -> Distribution:
    """The probability of every output, rows one after another."""
    return Enumerator(60_000).distribution(
        lambda: tuple(run(decoding, model, prompt, tokens, True, processors).sequences.flatten().tolist())
    )
