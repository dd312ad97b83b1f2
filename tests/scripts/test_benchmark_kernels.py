"""What the benchmark of kernels says without a GPU."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_argen.kernels import OPERATIONS
from hf_argen.kernels.bounds import PATH, SIZES, holds
from hf_argen.kernels.dispatch import HAS_TRITON


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmark_kernels")


def test_every_operation_has_shapes(script):
    assert {shape.operation for shape in script.SHAPES} == set(OPERATIONS)
    assert all(tuple(shape.sizes) == SIZES[shape.operation] for shape in script.SHAPES)


def test_floors(script):
    """By hand: a layer of VAR-d30 reads two rows and writes two, in bfloat16; one step of a tree reads the cache once."""
    adaln = next(one for one in script.SHAPES if one.operation == "adaln" and "VAR-d30" in one.label)
    assert adaln.moved == 2 * (4 * 8 * 256 * 1920 + 3 * 8 * 1920)
    seconds, bound = adaln.floor(script.CHIPS["H100 SXM"])
    assert bound == "memory" and seconds == adaln.moved / 3.35e12
    tree = next(one for one in script.SHAPES if "EAGLE tree" in one.label)
    assert tree.moved == 2 * (2 * 8 * (8192 + 64) * 128 + 2 * 32 * 64 * 128)
    assert tree.matrix == 4 * 32 * 64 * (8192 + 64) * 128


def test_table(script, capsys):
    script.print_floors()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(script.SHAPES)
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def flash_attn_func(query, keys, values, causal):
    """As flash-attn has it: (batch, length, heads, head_dim), the last query sees the last key."""
    rows, columns = query.shape[1], keys.shape[1]
    seen = torch.ones(rows, columns, dtype=torch.bool)
    query, keys, values = (one.transpose(1, 2) for one in (query, keys, values))
    mask = seen.tril(columns - rows) if causal else seen
    return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.skipif(not HAS_TRITON, reason="kernels need Triton")
@pytest.mark.parametrize(
    "name, arguments, others",
    [
        ("adaln", ("", 2, 3, 16, True), []),
        ("qk", ("", 1, 2, 3, 16, "l2", True), []),
        ("sample", ("", 2, 50, True), []),
        ("attention", ("", 1, 4, 2, 3, 9, 16, True), ["sdpa", "FlexAttention", "flash-attn"]),
        ("attention", ("", 1, 4, 2, 3, 9, 16, False), ["sdpa", "FlexAttention", "flash-attn"]),
        ("quantize", ("", 5, 20, 8), []),
        ("verify", ("", 2, 3, 20), []),
    ],
)
def test_all_ways_compute_the_same(script, monkeypatch, name, arguments, others):
    """What is timed on a GPU, at small sizes under the interpreter."""
    monkeypatch.setattr(script, "DEVICE", "cpu")
    plain = torch.compile  # FlexAttention asks for the back end "eager" itself
    monkeypatch.setattr(torch, "compile", lambda one, **options: plain(one, **options) if options else one)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    ways = getattr(script, f"{name}_shape")(*arguments).make()
    assert list(ways) == ["kernel", *script.REFERENCES.values(), *others]
    expected = ways["reference"]()
    for way in ways.values():
        found = way()
        one, other = (found, expected) if isinstance(expected, tuple) else ((found,), (expected,))
        for got, wanted in zip(one, other, strict=True):
            if wanted is not None:
                torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@pytest.fixture
def measured(script):
    """Of three shapes of one operation: the kernel wins, loses, and loses against the compiled reference alone."""
    shapes = [one for one in script.SHAPES if one.operation == "adaln"]
    assert len(shapes) == 3
    times = [(1.0, 1.04, 0.97), (1.0, 0.9, 0.8), (1.0, 1.5, 0.9)]  # kernel, reference, compiled reference
    names = ("kernel", *script.REFERENCES.values())
    return [
        script.Measured(shape, dict(zip(names, one, strict=True)))
        for shape, one in zip(shapes, times, strict=True)
    ]


def test_bounds_hold_what_was_lost_and_nothing_that_was_won(script, measured):
    winner, loser, other = (one.shape.sizes for one in measured)
    plain = script.losing_bounds(measured, "reference")
    assert plain == {"adaln": [{name: [size // 2 + size % 2, 2 * size] for name, size in loser.items()}]}
    compiled = script.losing_bounds(measured, "compiled reference")["adaln"]
    assert [any(holds(box, one) for box in compiled) for one in (winner, loser, other)] == [False, True, True]


def test_a_winner_close_by_narrows_the_bounds(script, measured, capsys):
    winner, loser, _ = measured
    near = script.Shape(
        "adaln", "near", {**loser.shape.sizes, "rows": loser.shape.sizes["rows"] + 1}, 0, 0, 0, None
    )
    found = script.losing_bounds([loser, script.Measured(near, winner.times)], "reference")
    assert found == {"adaln": [{name: [size, size] for name, size in loser.shape.sizes.items()}]}
    same = script.Measured(loser.shape, winner.times)
    assert script.losing_bounds([loser, same], "reference") == {}
    assert "another form of these sizes takes the kernel" in capsys.readouterr().out


def test_bounds_of_other_chips_stay(script, measured, tmp_path):
    path = tmp_path / "bounds.json"
    path.write_text(json.dumps({"sm_80": {"plain": {}}, "sm_90": {"plain": {"adaln": []}}}))
    script.write_bounds(measured, "sm_90", {"device": "a GPU"}, path)
    table = json.loads(path.read_text())
    assert list(table) == ["sm_80", "sm_90"] and table["sm_80"] == {"plain": {}}
    assert table["sm_90"]["measured"] == {"device": "a GPU"}
    assert table["sm_90"]["plain"] == script.losing_bounds(measured, "reference")
    assert len(table["sm_90"]["compiled"]["adaln"]) == 2
    assert [one.name for one in tmp_path.iterdir()] == ["bounds.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_nothing_is_written_without_a_gpu(script):
    before = PATH.read_text()
    with pytest.raises(SystemExit, match="torch finds no GPU; run it on a machine that has one"):
        script.main(["--write-dispatch"])
    assert PATH.read_text() == before
