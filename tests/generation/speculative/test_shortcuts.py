"""What is computed in fewer operations where a request allows it is the same as in general."""

import math
from collections import Counter

import pytest
import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from hf_argen import SearchTree
from hf_argen.generation.cache import PreallocatedCache
from hf_argen.generation.decoding.speculative import acceptance
from hf_argen.generation.decoding.speculative.draft_tree import DraftTree
from hf_argen.generation.decoding.speculative.ngram import Occurrences
from hf_argen.generation.predictors.masks import Pattern, View, additive, additive_of_nodes, additive_on_host
from hf_argen.generation.predictors.tree import NodeTree, closure
from hf_argen.generation.transcript import Transcript


def random_tree(generator, batch, n, vocab):
    tokens = torch.randint(vocab, (batch, n), generator=generator)
    parents = torch.stack(
        [
            torch.randint(-1, i, (batch,), generator=generator) if i else torch.full((batch,), -1)
            for i in range(n)
        ],
        dim=1,
    )
    return DraftTree(tokens, n, parents, branching=n)


def test_what_the_model_has_chosen_is_followed_alike():
    generator = torch.Generator().manual_seed(0)
    lengths = Counter()
    for n in (1, 5, 12) * 20:
        tree = random_tree(generator, 3, n, 3)
        chosen = torch.randint(3, (3, n + 1), generator=generator)
        passes = chosen.gather(1, tree.parent_nodes()) == tree.tokens
        length = tree.reached(passes).max(dim=1).values
        verdict = acceptance.matching(chosen, tree)
        assert verdict.count == length.tolist()
        lengths.update(verdict.count)
        for row, count in enumerate(verdict.count):
            path = verdict.nodes[row, :count].tolist()
            before = [0, *tree.parent_nodes()[row].tolist()]
            assert path[0] == 0 and [before[node] for node in path[1:]] == path[:-1]
            assert (
                tree.tokens[row, [node - 1 for node in path[1:]]].tolist()
                == verdict.tokens[row, : count - 1].tolist()
            )
        assert verdict.nodes.shape == (3, n + 1) and torch.equal(
            verdict.tokens, chosen.gather(1, verdict.nodes)
        )
        stay = all(
            verdict.nodes[row, :count].tolist() == list(range(count))
            for row, count in enumerate(verdict.count)
        )
        assert verdict.in_place == stay
        assert (verdict.kept_nodes() is None) == (stay or max(verdict.count) == 1)
    assert min(lengths) == 1 and max(lengths) > 3


def test_who_sees_whom_grows_level_by_level():
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3):
        nodes, parents = NodeTree(), []
        nodes.grow(2, None, batch, torch.device("cpu"))  # a chain before
        parents.append(torch.tensor([[-1, 0]]).expand(batch, -1))
        for n in (3, 1, 4, 9, 2):
            new = torch.randint(-1, nodes.size, (batch, n), generator=generator)
            nodes.grow(n, new, batch, torch.device("cpu"))
            parents.append(new)
            expected = closure(torch.cat(parents, dim=1))
            assert torch.equal(nodes.ancestors(nodes.size, torch.device("cpu")), expected)
            assert torch.equal(nodes.depths(n, torch.device("cpu")), expected[:, -n:].sum(dim=-1) - 1)
        rows = torch.tensor([batch - 1, 0])
        nodes.select_rows(rows)
        chain = torch.tensor([[nodes.size - 1, nodes.size]] * 2)  # after
        nodes.grow(2, None, 2, torch.device("cpu"))
        expected = closure(torch.cat([torch.cat(parents, dim=1)[rows], chain], dim=1))
        assert torch.equal(nodes.ancestors(nodes.size, torch.device("cpu")), expected)
    within = torch.tensor([[-1, 0, 1]])  # nodes that continue each other
    tree = NodeTree()
    tree.grow(3, within, 1, torch.device("cpu"))
    assert torch.equal(tree.ancestors(3, torch.device("cpu"))[0], torch.ones(3, 3).tril().bool())


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_of_even_rows(batch, rows):
    ancestors = torch.rand(batch, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    view = View(torch.full((2,), 7), 12, ancestors)
    expected = additive(view.visible(Pattern(), rows), torch.bfloat16)
    found = additive_of_nodes(7, ancestors, rows, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [12, 15])  # 15: static memory is seen whole
@pytest.mark.parametrize("starts", [[7, 7], [7, 4]])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("batch, rows", [(1, 2), (2, 2), (2, 4)])
def test_masks_on_a_cpu(batch, rows, is_padded, starts, columns, dtype):
    generator = torch.Generator().manual_seed(3)
    ancestors = torch.rand(batch, 3, 5, generator=generator) < 0.5
    hidden = torch.rand(rows, 4, generator=generator) < 0.5 if is_padded else None
    view = View(torch.tensor(starts), columns, ancestors, hidden)
    expected = additive(view.visible(Pattern(), rows), dtype)
    found = additive_on_host(starts, columns, ancestors, hidden, rows, dtype)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("own", [False, True])
def test_positions_that_are_moved_together(own):
    torch.manual_seed(0)
    keys = torch.randn(3, 4, 2, 9, 4)  # of three layers, two rows and their unconditional ones
    caches = [PreallocatedCache(3, 9 if own else 12) for _ in range(2)]
    for cache in caches:
        for i, layer in enumerate(keys):
            cache.update(layer[:, :, :8], -layer[:, :, :8], i)
            cache.update(layer[:, :, 8:], -layer[:, :, 8:], i)
        if own:  # a layer that has grown has memory of its own
            cache.layers[1]._grow(20)
        assert (cache._as_one() is None) == own
    places = [[4, 6, 7], [5, 6, 8]]
    for row, source in enumerate(places):
        caches[0].pack(torch.tensor(source), 4, row, every=2)
    caches[1].move(torch.tensor(places * 2), torch.tensor([[4, 5, 6]] * 4))
    for row in range(4):
        keys[:, row, :, 4:7] = keys[:, row][:, :, places[row % 2]]
    for cache in caches:
        for layer, expected in zip(cache.layers, keys, strict=True):
            assert torch.equal(layer.keys[:, :, :9], expected)
            assert torch.equal(layer.values[:, :, :9], -expected)
    assert (cache._as_one() is None) == own


def test_layers_of_several_widths_have_memory_of_their_own():
    cache = PreallocatedCache(2, 5)
    for i, heads in enumerate((2, 3)):
        states = torch.randn(1, heads, 5, 4)
        cache.update(states, states, i)
        cache.layers[i].expected = states
    cache.pack(torch.tensor([4]), 2)
    assert cache._as_one() is None
    for layer in cache.layers:
        layer.expected[:, :, 2] = layer.expected[:, :, 4]
        assert torch.equal(layer.keys, layer.expected) and torch.equal(layer.values, layer.expected)


def test_a_layer_that_begins_after_a_move_shares_no_memory():
    torch.manual_seed(0)
    states = torch.randn(2, 1, 2, 5, 4)
    cache = PreallocatedCache(2, 5)
    cache.update(states[0], states[0], 0)
    cache.pack(torch.tensor([4]), 2)
    cache.update(states[1], states[1], 1)
    cache.pack(torch.tensor([3]), 0)
    states[0][:, :, 2] = states[0][:, :, 4]
    states[..., 0, :] = states[..., 3, :]
    for layer, expected in zip(cache.layers, states, strict=True):
        assert torch.equal(layer.keys[:, :, :5], expected)


class Never(StoppingCriteria):
    """Ends nothing, but has to be asked."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("limit", [None, 7])
def test_rows_end_alike_token_by_token(limit):
    generator = torch.Generator().manual_seed(3)
    ended = 0
    for _ in range(30):
        made = [EosTokenCriteria([0, 9]), MaxLengthCriteria(9)]
        prompt = torch.randint(1, 6, (3, 2), generator=generator)
        pair = [
            Transcript(prompt, [], StoppingCriteriaList(made + more), limit, pad_token_id=8)
            for more in ([], [Never()])
        ]
        assert pair[0]._ends is not None and pair[1]._ends is None
        while not pair[0].is_done:
            tokens = torch.randint(0, 12, (3, 4), generator=generator)
            counts = torch.randint(0, 5, (3,), generator=generator).tolist()
            taken = [one.append(tokens, counts) for one in pair]
            assert taken[0] == taken[1] and pair[0].finished == pair[1].finished
            assert pair[0].lengths == pair[1].lengths
            assert torch.equal(pair[0].sequences(), pair[1].sequences())
        ended += sum(length < 7 for length in pair[0].lengths)
    assert ended > 20
    longest = Transcript(prompt, [], StoppingCriteriaList([MaxLengthCriteria(9, 5)]), limit)
    assert longest._ends is None  # such a criterion warns


def searched(tree, row, depth):
    """The search as in the paper: a record for each place, what a visit gains computed anew."""
    places = [
        {"token": -1, "prior": 0.0, "parent": None, "path": [], "visits": 0, "gain": 0.0, "children": None}
    ]

    def worth(child, here):
        rate = tree.exploration + math.log((here["visits"] + tree.scale + 1) / tree.scale)
        gained = child["gain"] / child["visits"] if child["visits"] else 0.0
        return gained + rate * child["prior"] * math.sqrt(here["visits"]) / (1 + child["visits"])

    def best(path):
        return max(row.following(path).items(), key=lambda item: (item[1], -item[0]))

    for _ in range(tree.iterations):
        here = places[0]
        while here["children"] and len(here["path"]) < depth:
            here = max(here["children"], key=lambda child, here=here: worth(child, here))
        if here["children"] is None and len(here["path"]) < depth:
            found = sorted(row.following(here["path"]).items(), key=lambda item: (-item[1], item[0]))
            here["children"] = [
                {"token": token, "prior": weight, "parent": here, "path": [*here["path"], token]}
                | {"visits": 0, "gain": 0.0, "children": None}
                for token, weight in found
            ]
            places += here["children"]
            here = here["children"][0]
        gain, at, path = 1.0, here, list(here["path"])
        while at["parent"] is not None:
            gain, at = gain + at["prior"], at["parent"]
        while len(path) < depth:
            token, weight = best(path)
            gain, path = gain + weight, [*path, token]
        while here is not None:
            here["visits"], here["gain"], here = here["visits"] + 1, here["gain"] + gain, here["parent"]
    order = sorted(range(1, len(places)), key=lambda i: (-places[i]["visits"], -places[i]["prior"], i))
    return [tuple(places[i]["path"]) for i in sorted(order[: tree.nodes])]


def test_the_search_is_that_of_the_paper():
    ids = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    row, tree = Occurrences(2, ids), SearchTree(nodes=14, depth=3, iterations=50, exploration=4.0)
    tokens, parents = tree.search(row, 3)
    paths = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert paths == searched(tree, row, 3) and len(set(paths)) > 8
