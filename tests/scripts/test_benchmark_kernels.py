"""What the benchmark of kernels says without a GPU."""

import pytest

from hf_argen.kernels import OPERATIONS


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmark_kernels")


def test_every_operation_has_shapes(script):
    assert {shape.operation for shape in script.SHAPES} == set(OPERATIONS)


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
