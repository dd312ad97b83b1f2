"""Trees against those that the authors' code built: OPT-Tree, Medusa and EAGLE; and what makes the best tree."""

import itertools

import pytest
import torch

from hf_argen import Chain, DynamicTree, IndependentSequences, OptTree, StaticTree
from hf_argen.generation.decoding.speculative.draft_tree import DraftContext, DraftTree, Nodes
from hf_argen.generation.decoding.speculative.trees import Tree
from hf_argen.generation.predictors.tree import NodeTree
from hf_argen.generation.transcript import Transcript

from ...helpers.goldens import golden


class Recorded(Nodes):
    """A drafter whose distributions were recorded: one tensor (batch, nodes, vocab_size) of logits a call."""

    def __init__(self, *logits):
        self.logits, self.calls = list(logits), []

    def root(self):
        return self.logits[0][:, 0]

    def expand(self, tokens, parents):
        self.calls.append((tokens, parents))
        return self.logits[len(self.calls)]


class Table(Nodes):
    """A drafter that knows the distribution after every path of tokens: a table of what follows the last one."""

    def __init__(self, batch, vocab, seed=0, spread=2.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(batch, vocab + 1, vocab, generator=generator)

    def root(self):
        return self.table[:, -1]

    def expand(self, tokens, parents):
        return self.table[torch.arange(len(tokens))[:, None], tokens]


def context(batch=1, do_sample=False):
    return DraftContext(Transcript(torch.zeros(batch, 1, dtype=torch.long), [], []), do_sample)


def mask_of(tree: DraftTree) -> torch.Tensor:
    """(batch, n + 1, n + 1) bool: what the model lets each node see of the others."""
    nodes = NodeTree()
    nodes.grow(tree.size + 1, tree.fed_parents(), len(tree.tokens), tree.tokens.device)
    return nodes.ancestors(tree.size + 1, tree.tokens.device)


def paths_of(tree: DraftTree) -> set[tuple[int, ...]]:
    """The paths from the row's end to every leaf of the first row, as nodes."""
    before = [0, *tree.parent_nodes()[0].tolist()]
    leaves = set(range(tree.size + 1)) - set(before[1:])

    def path(node):
        return (*path(before[node]), node) if node else (0,)

    return {path(leaf) for leaf in leaves}


def recorded_paths(indices: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(node for node in row if node >= 0) for row in indices.tolist()}


# OPT-Tree


@pytest.mark.parametrize("trial", [0, 1, 2])
def test_opt_tree_as_recorded(trial):
    case = golden("opt_tree", "tree_a")
    tensors = {
        name.partition("/")[2]: value
        for name, value in case.tensors.items()
        if name.startswith(f"trial{trial}/")
    }
    calls = sum(name.endswith("draft_probs") for name in tensors)
    options = {name: case.case["trials"][trial][name] for name in ("nodes", "threshold", "max_depth")}
    drafter = Recorded(*(tensors[f"call{i}_draft_probs"].log() for i in range(calls)))
    tree = OptTree(**options).grow(drafter, context(), 99)
    for i, (tokens, _) in enumerate(drafter.calls):
        assert torch.equal(tokens[0], tensors[f"call{i}_input_ids"])
    last = f"call{calls - 1}_"
    # The authors draft one level more, to see what it would add, and leave it out.
    assert (
        tensors[f"{last}is_final"] and len(drafter.calls) == calls - 2 and tree.depth == tensors["depth"] - 1
    )
    assert torch.equal(tree.tokens[0], tensors[f"{last}input_ids"])
    own = torch.arange(tree.size)
    assert torch.equal(torch.where(tree.parents[0] < 0, own, tree.parents[0]), tensors[f"{last}parent_last"])
    mask = mask_of(tree)[0]
    assert torch.equal(mask[1:, 1:].long(), tensors[f"{last}attention_mask"])
    assert torch.equal(mask.sum(dim=1)[1:] - 1, tensors[f"{last}position_ids"])


def likely(tree: DraftTree, table: torch.Tensor) -> torch.Tensor:
    """(n,) the probability of the path to every draft of the first row."""
    weights = [1.0]
    tokens, before = tree.tokens[0].tolist(), tree.parent_nodes()[0].tolist()
    for token, parent in zip(tokens, before, strict=True):
        above = -1 if parent == 0 else tokens[parent - 1]
        weights.append(weights[parent] * float(table[0, above].softmax(-1)[token]))
    return torch.tensor(weights[1:])


def test_no_tree_of_as_many_nodes_is_expected_to_be_accepted_further():
    """Against all connected sets of paths, by brute force: the likeliest paths of the whole tree of depth 3."""
    drafter = Table(1, 4)
    tree = OptTree(nodes=4, threshold=0.0, max_depth=4).grow(drafter, context(), 9)
    every = []
    for depth in (1, 2, 3):
        for path in itertools.product(range(4), repeat=depth):
            steps = zip((-1, *path), path, strict=False)
            every.append(torch.stack([drafter.table[0, a].softmax(-1)[b] for a, b in steps]).prod())
    best = torch.stack(every).topk(4).values.sum()
    assert torch.allclose(likely(tree, drafter.table).sum(), best)


def test_opt_tree_grows_each_row_for_itself():
    """A row of a batch gets the tree that it gets alone, with confident and doubtful rows together."""
    drafter = Table(3, 12)
    drafter.table *= torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    options = OptTree(nodes=6, threshold=0.3, max_depth=6)
    together = options.grow(drafter, context(3), 99)
    depths = []
    for row in range(3):
        alone = Table(1, 12)
        alone.table = drafter.table[row : row + 1]
        tree = options.grow(alone, context(), 99)
        assert torch.equal(tree.tokens[0], together.tokens[row])
        assert torch.equal(tree.parents[0], together.parents[row])
        depths.append(tree.depth)
    assert len(set(depths)) > 1


# Medusa and EAGLE


@pytest.mark.parametrize(
    "family, name, key",
    [
        ("medusa", "medusa1_a", "medusa"),
        ("medusa", "medusa2_a", "medusa"),
        ("eagle", "eagle1_static_a", "tree"),
    ],
)
def test_static_trees_as_recorded(family, name, key):
    case = golden(family, name)
    choices = case.case.get("medusa_choices") or case.case["tree_choices"]
    drafter = Table(1, 40)
    tree = StaticTree(choices).grow(drafter, context(), 99)
    buffers = case.tensors
    mask = mask_of(tree)
    mask_name = f"buffers/{key}_attn_mask"
    assert torch.equal(mask.float()[None], buffers[mask_name])
    assert torch.equal(mask[0].sum(dim=1) - 1, buffers[f"buffers/{key}_position_ids"])
    assert paths_of(tree) == recorded_paths(buffers["buffers/retrieve_indices"])


@pytest.mark.parametrize("name", ["medusa1_a", "medusa2_a"])
def test_candidates_of_medusa(name):
    """The heads' best tokens on the tree, from the recorded logits of the heads."""
    case = golden("medusa", name)
    heads = case.tensors["forward/medusa_logits"][:, 0, -1]

    class Heads(Nodes):
        depth = 0

        def root(self):
            return heads[:1]

        def expand(self, tokens, parents):
            self.depth += 1
            return heads[self.depth].expand(1, tokens.shape[1], -1)

    tree = StaticTree(case.case["medusa_choices"]).grow(Heads(), context(), 99)
    assert torch.equal(tree.tokens[0], case.tensors["candidates/tree_candidates"][0, 1:])


def test_dynamic_tree_as_recorded():
    """From the recorded log-probabilities of the beams, of which the k best are known."""
    case = golden("eagle", "eagle2_a")
    tensors, settings = case.tensors, case.case["settings"]
    k, vocab = settings["top_k"], tensors["tree/depth0_logprobs"].shape[1]
    logits = [tensors["tree/depth0_logprobs"][None]]
    for level in range(1, settings["depth"] + 1):
        known = torch.full((1, k, vocab), -60.0)
        index, values = (tensors[f"tree/level{level}_topk_{name}"][None] for name in ("index", "logprob"))
        known.scatter_(2, index, values)
        rest = (1 - values.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-30) / (vocab - k)
        logits.append(torch.where(known > -60, known, rest.log().expand_as(known)))
    drafter = Recorded(*logits)
    options = {name: settings[name] for name in ("total_token", "depth", "top_k")}
    tree = DynamicTree(**options).grow(drafter, context(), 99)
    assert torch.equal(tree.tokens[0], tensors["tree/draft_tokens"][0, 1:])
    assert torch.equal(mask_of(tree).float()[None], tensors["tree/tree_mask"])
    assert paths_of(tree) == recorded_paths(tensors["tree/retrieve_indices"])


# What holds for all of them

TREES = {
    "chain": Chain(4),
    "chains": IndependentSequences(3, 3),
    "static": StaticTree(),
    "dynamic": DynamicTree(20, 3, 4),
    "opt": OptTree(12, 0.1, 5),
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_depth_is_kept_to(name, do_sample):
    """Paths are no longer than asked, children come after their parents, and siblings differ where nothing is drawn."""
    shape = TREES[name]
    assert Tree.from_dict(shape.to_dict()) == shape
    for depth in (1, 2, 9):
        torch.manual_seed(0)
        tree = shape.grow(Table(2, 24), context(2, do_sample), depth)
        most = int(mask_of(tree).sum(dim=-1).max()) - 1
        assert most <= min(depth, shape.most_depth) and tree.depth >= most
        assert tree.size <= shape.most_drafts
        assert (tree.parent_nodes() <= torch.arange(tree.size)).all()
        if not do_sample:
            pairs = torch.stack([tree.parent_nodes(), tree.tokens], dim=-1).tolist()
            assert all(len({tuple(pair) for pair in row}) == tree.size for row in pairs)


def test_a_chain_ends_with_its_first_doubtful_draft():
    """The third draft of the first row is doubtful, the second of the other: the third is that with which all end."""
    peak, flat = [9.0, 0.0, 0.0], [0.1, 0.0, 0.0]
    drafter = Recorded(
        torch.tensor([[peak], [peak]]),
        torch.tensor([[peak], [flat]]),
        torch.tensor([[flat], [peak]]),
        torch.tensor([[peak], [peak]]),
    )
    tree = Chain(4, confidence=0.5).grow(drafter, context(2), 9)
    assert tree.tokens.shape == (2, 3) and tree.depth == 3
    again = Recorded(torch.tensor([[peak]]), torch.tensor([[peak]]), torch.tensor([[flat]]))
    assert Chain(2, confidence=0.5).grow(again, context(), 9).size == 2


def test_paths_and_reach():
    tree = DraftTree(torch.tensor([[5, 6, 7, 8]]), 3, torch.tensor([[-1, -1, 0, 2]]), branching=2)
    passes = torch.tensor([[True, False, True, False]])
    assert tree.reached(passes).tolist() == [[1, 2, 0, 3, 0]]
    assert tree.path(torch.tensor([4]), torch.tensor([4])).tolist() == [[0, 1, 3, 4]]
    assert tree.path(torch.tensor([2]), torch.tensor([2])).tolist() == [[0, 2, 0, 0]]
    assert tree.trials().tolist() == [[[1, 2], [3, 0], [0, 0], [4, 0], [0, 0]]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Chain(0), "length of Chain is 0"),
        (lambda: Chain(confidence=1.0), "confidence of Chain is 1"),
        (lambda: IndependentSequences(k=0), "k of IndependentSequences is 0"),
        (lambda: OptTree(nodes=0), "nodes of OptTree is 0"),
        (lambda: OptTree(max_depth=1), "max_depth of OptTree is 1"),
        (lambda: OptTree(threshold=-1.0), "threshold of OptTree is -1"),
        (lambda: DynamicTree(total_token=1), "total_token of DynamicTree is 1"),
        (lambda: DynamicTree(depth=-1), "depth of DynamicTree is -1"),
        (lambda: StaticTree([]), "node budget is 0"),
        (lambda: StaticTree([[0, 1]]), r"path \[0, 1\] but not \[0\]"),
        (lambda: StaticTree([[-1]]), r"path \[-1\]"),
        (lambda: StaticTree("mine"), "no tree 'mine'; known are mc_sim_7b_63"),
        (lambda: Tree.from_dict({"type": "bush"}), "no tree 'bush'; known are chain"),
        (lambda: Tree.from_dict({"type": "chain", "k": 1}), "Chain has no option k; it has length"),
    ],
)
def test_bad_trees(make, message):
    with pytest.raises(ValueError, match=message):
        make()
