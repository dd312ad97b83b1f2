"""The next-token predictor against plain forward passes: trees, unequal rows, windows, padding, guidance."""

import pytest
import torch

from hf_argen.generation.predictors.language_model import LanguageModelPredictor

from ..helpers.language_models import KINDS, VOCAB, language_model, prompts

IMPLEMENTATIONS = ["sdpa", "eager"]


@torch.no_grad()
def after(model, ids: list[int], guidance: float = 1.0, last: int | None = None) -> torch.Tensor:
    """Logits (vocab,) of what follows `ids`, without cache, padding or batch; guided against the rest after `last`."""
    logits = model(torch.tensor([ids])).logits[0, -1].float()
    if guidance == 1.0:
        return logits
    other = model(torch.tensor([ids[last:]])).logits[0, -1].float().log_softmax(-1)
    return guidance * (logits.log_softmax(-1) - other) + other


class Sequences:
    """A predictor beside the plain lists of ids that it stands for."""

    def __init__(self, model, guidance=1.0, room=40, is_static=False):
        inputs = prompts()
        self.model, self.guidance = model, guidance
        self.rows = [
            ids[mask == 1].tolist()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        self.starts = [len(row) - 1 for row in self.rows]
        self.predictor = LanguageModelPredictor(model, guidance)
        self.predictor.reserve(room, is_static)
        with torch.no_grad():
            logits = self.predictor.prefill(inputs)
        self.check(logits[:, None], [[row] for row in self.rows])

    def check(self, logits, paths):
        """Logits (batch, n, vocab) of what follows each path (a list per row of lists of ids)."""
        for row, path_of_row in enumerate(paths):
            for node, ids in enumerate(path_of_row):
                expected = after(self.model, ids, self.guidance, self.starts[row])
                assert torch.allclose(logits[row, node], expected, atol=5e-4), (row, node)

    def predict(self, tokens, parents=None, nodes=()):
        """Feeds and checks; returns the paths of all nodes, `nodes` being those of earlier calls."""
        nodes = [list(row) for row in nodes] or [[] for _ in self.rows]
        before = len(nodes[0])
        for row, own in enumerate(tokens.tolist()):
            for i, token in enumerate(own):
                parent = before + i - 1 if parents is None else int(parents[row, i])
                nodes[row].append([*(self.rows[row] if parent < 0 else nodes[row][parent]), token])
        with torch.no_grad():
            logits = self.predictor.predict(tokens, parents)
        self.check(logits, [row[before:] for row in nodes])
        return nodes

    def commit(self, nodes, keep, count):
        self.predictor.commit(keep, count)
        order = torch.arange(len(nodes[0])).repeat(len(nodes), 1) if keep is None else keep
        before = [len(row) for row in self.rows]
        lengths = self.predictor.length.tolist()
        for row, number in enumerate(count.tolist()):
            if number:
                self.rows[row] = nodes[row][int(order[row, number - 1])]
            assert len(self.rows[row]) == before[row] + number
        starts = zip(self.rows, self.starts, strict=True)
        assert lengths == [len(row) - start - 1 for row, start in starts]


def draw(*shape):
    return torch.randint(4, VOCAB, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_chains_of_unequal_rows(kind, implementation):
    sequences = Sequences(language_model(kind, implementation))
    for count in ([4, 4, 4], [1, 3, 0], [2, 2, 4], [4, 0, 1]):
        nodes = sequences.predict(draw(3, 4))
        sequences.commit(nodes, None, torch.tensor(count))
    assert sequences.predictor.calls == 5


TREE = torch.tensor([[-1, 0, 0, 2, -1, 4], [-1, -1, 1, 1, 3, 0], [-1, 0, 1, 2, 3, 4]])
KEEP = torch.tensor([[0, 2, 3], [1, 3, 4], [0, 1, 2]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_trees(kind, implementation):
    """Another tree in each row; of each one path is kept, of unequal length; and once more from there."""
    sequences = Sequences(language_model(kind, implementation))
    for count in ([3, 3, 3], [3, 1, 2], [0, 2, 3]):
        nodes = sequences.predict(draw(3, 6), TREE)
        sequences.commit(nodes, KEEP, torch.tensor(count))
    sequences.predict(draw(3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_that_grows_by_several_calls(kind):
    """First a chain, then children of any of its nodes, then a chain from the last one."""
    sequences = Sequences(language_model(kind))
    for _ in range(2):
        nodes = sequences.predict(draw(3, 2))
        nodes = sequences.predict(draw(3, 3), torch.tensor([[1, 0, 3], [-1, 2, 2], [1, 1, 0]]), nodes)
        nodes = sequences.predict(draw(3, 1), None, nodes)
        keep = torch.tensor([[0, 3, 4], [2, 3, 0], [0, 1, 3]])
        sequences.commit(nodes, keep, torch.tensor([3, 2, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_runs_as_paired_rows(kind):
    sequences = Sequences(language_model(kind), guidance=1.7)
    nodes = sequences.predict(draw(3, 3))
    sequences.commit(nodes, None, torch.tensor([3, 1, 2]))
    nodes = sequences.predict(draw(3, 6), TREE)
    sequences.commit(nodes, KEEP, torch.tensor([1, 3, 2]))
    sequences.predict(draw(3, 2))
    assert sequences.predictor.calls == 4


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_fork_and_drop(guidance):
    """Rows are repeated side by side and removed, in the middle of a tree."""
    sequences = Sequences(language_model("gemma3"), guidance=guidance)
    nodes = sequences.predict(draw(3, 6), TREE)
    sequences.commit(nodes, KEEP, torch.tensor([1, 3, 2]))
    nodes = sequences.predict(draw(3, 6), TREE)
    sequences.predictor.fork(2)
    sequences.predictor.drop(torch.tensor([1, 2]))
    rows = [0, 1, 2, 2]
    sequences.rows, sequences.starts, nodes = (
        [part[row] for row in rows] for part in (sequences.rows, sequences.starts, nodes)
    )
    sequences.commit(nodes, KEEP[rows], torch.tensor([3, 2, 0, 1]))
    sequences.predict(draw(4, 2))
    assert len(sequences.predictor.length) == 4


def test_static_memory_keeps_its_address():
    sequences = Sequences(language_model(), room=16, is_static=True)
    memory = sequences.predictor._cache.layers[0].keys.data_ptr()
    for count in ([4, 4, 4], [1, 3, 0], [2, 2, 4]):
        nodes = sequences.predict(draw(3, 4))
        sequences.commit(nodes, None, torch.tensor(count))
    assert sequences.predictor._cache.layers[0].keys.data_ptr() == memory
    sequences.predict(draw(3, 4))
    with pytest.raises(ValueError, match="The cache holds 23 positions, 24 are needed"):
        sequences.predict(draw(3, 4))


def test_memory_grows_when_it_may():
    sequences = Sequences(language_model(), room=2)
    for _ in range(4):
        nodes = sequences.predict(draw(3, 4))
        sequences.commit(nodes, None, torch.tensor([4, 2, 3]))
    assert sequences.predictor._cache.capacity >= 7 + 16


def test_nothing_is_read_from_beyond_a_row():
    """What a longer row leaves beside a shorter one has no weight, whatever it holds."""
    sequences = Sequences(language_model())
    nodes = sequences.predict(draw(3, 4))
    sequences.commit(nodes, None, torch.tensor([4, 0, 1]))
    for layer in sequences.predictor._cache.layers:
        for row, end in ((1, 7), (2, 8)):
            layer.keys[row, :, end:], layer.values[row, :, end:] = 1e4, 1e4
    sequences.predict(draw(3, 2))
