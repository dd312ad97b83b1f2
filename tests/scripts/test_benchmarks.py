"""The benchmarks of speed, at the smallest size that their models allow, without the authors' code."""

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_argen.generation import compilation
from hf_argen.modeling.layers import linear

from ..helpers.tiny import tiny_llamagen, tiny_mar, tiny_var

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("benchmarking", "benchmark_var", "benchmark_llamagen", "benchmark_mar", "benchmark_compiled")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import benchmark_compiled
        import benchmark_llamagen
        import benchmark_mar
        import benchmark_var
        import benchmarking

        yield SimpleNamespace(
            common=benchmarking,
            var=benchmark_var,
            llamagen=benchmark_llamagen,
            mar=benchmark_mar,
            compiled=benchmark_compiled,
        )
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def own_switches():
    """Threads and gradients, which the scripts set for the whole process."""
    threads, has_gradients = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(has_gradients)


def tiny(scripts, monkeypatch, name: str, *more: str) -> None:
    """Runs a script in this process, but for the processes that it starts itself."""
    script = SCRIPTS / f"benchmark_{name}.py"
    arguments = [
        "--rounds",
        "1",
        "--batch",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *more,
    ]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    rates = scripts.common.Rates({torch.float32: 1e11}, 1e10, 1e10)
    monkeypatch.setattr(scripts.common.Rates, "measure", lambda *args: rates)
    getattr(scripts, name).main()


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of all tables that begin with this cell."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line
    ]
    return [row for row in rows if row[0] == first]


def number(cell: str) -> float:
    return float(cell.split()[0].rstrip("%"))


def test_var(scripts, monkeypatch, capfd):
    tiny(scripts, monkeypatch, "var", "--depth", "1", "--base-channels", "32")
    peak, timed, kinds = cells(capfd.readouterr().out, "ours, float32")
    assert peak[1] == "1" and number(peak[2]) > 0.1 and peak[3] == "1.00"
    total, *parts = map(number, [timed[1], *timed[3:6]])
    assert timed[2] == "1.00" and abs(sum(parts) - total) < 0.02
    assert len(kinds) == 7 and number(kinds[3]) > 0


def test_llamagen(scripts, monkeypatch, capfd, tmp_path):
    more = ("--layers", "1", "--no-memory", "--no-kinds", "--folder", str(tmp_path))
    tiny(scripts, monkeypatch, "llamagen", *more)
    timed, step = cells(capfd.readouterr().out, "ours, float32")
    total, *parts = map(number, [timed[1], *timed[3:6]])
    assert abs(sum(parts) - total) < 0.02
    weights = 4 * (4 * 768**2 + 3 * 768 * 2048 + 3 * 768 + 768 * 16384)  # what one layer and the head hold
    assert step[2] == f"{weights / 1e6:.0f} MB"
    assert 0 < number(step[4]) <= number(step[5])


def test_mar(scripts, monkeypatch, capfd, tmp_path):
    more = ("--layers", "1", "--steps", "2", "--head-steps", "2", "--no-memory", "--no-kinds")
    seen, product = [], linear.onednn_product
    noted = lambda *given: seen.append(linear.HAS_ONEDNN) or product(*given)  # noqa: E731
    monkeypatch.setattr(linear, "onednn_product", noted)
    monkeypatch.setattr(linear, "HAS_ONEDNN", True)
    tiny(scripts, monkeypatch, "mar", *more, "--folder", str(tmp_path), "--mkl")
    printed = capfd.readouterr().out
    (timed,), (by_mkl,) = cells(printed, "ours, float32"), cells(printed, "ours, float32 by MKL")
    total, *parts = map(number, [timed[1], *timed[3:7]])
    assert timed[2] == "1.00" and abs(sum(parts) - total) < 0.03 and min(parts[:3]) > 0
    assert number(by_mkl[1]) > 0 and set(seen) == {True, False} and linear.HAS_ONEDNN


def test_compiled(scripts, monkeypatch, capfd):
    """Every family, of models smaller than theirs; each step is compiled once."""
    made = {"var": tiny_var, "llamagen": tiny_llamagen, "mar": tiny_mar}
    for name, make in made.items():
        prepare = lambda shape, folder, make=make: make(num_hidden_layers=1).save_pretrained(folder)  # noqa: E731
        monkeypatch.setattr(getattr(scripts, name), "prepare", prepare)
    monkeypatch.setitem(scripts.var.SAMPLING, "top_k", 8)
    monkeypatch.setattr(scripts.llamagen, "TOP_K", 8)
    steps = []
    monkeypatch.setattr(compilation, "with_own_code", lambda step: steps.append(step.__name__) or step)
    tiny(scripts, monkeypatch, "compiled", "--layers", "1", "--steps", "2", "--backend", "eager")
    printed = capfd.readouterr().out
    eager, compiled = cells(printed, "1")[::2], cells(printed, "1")[1::2]
    assert [one[1:4:2] for one in eager] == [["eager", "1.00"]] * 4
    assert all(one[1] == "compiled" and number(one[2]) > 0 and number(one[3]) > 0 for one in compiled)
    assert all(len(one) == 4 for one in eager) and all(one[4].endswith(" s") for one in compiled)
    # Two scales behind the first; two sets of tokens; a model that drafts feeds one token, or two.
    expected = {"scale_step": 2, "masked_step": 2, "token_step": 1 + 1 + 2}
    assert Counter(steps) == expected


@pytest.mark.parametrize("least_weights", [0, linear.LEAST_WEIGHTS])
def test_operations_are_counted_by_part_and_kind(scripts, monkeypatch, least_weights):
    """Those of oneDNN, too."""
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", least_weights)
    layer = torch.nn.Linear(8, 16)

    class Model:
        def inner(self):
            return linear.linear(layer, torch.ones(4, 8))

        def draw(self, labels, seed):
            query = torch.ones(1, 1, 4, 8)
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
            return self.inner()

    model = Model()
    side = scripts.common.Side("one", torch.float32, model.draw, {"inner": [(model, "inner")]})
    with torch.no_grad():
        parts, kinds = scripts.common.count_operations(side, torch.arange(1))
    product, attention = 2 * 4 * 8 * 16, 2 * 2 * 4 * 4 * 8
    assert parts == {"inner": product, scripts.common.REST: attention}
    assert kinds == {"matrix products": product, "attention": attention}
    assert "inner" not in vars(model)  # the method is its own again


def test_ratios_are_those_within_a_round(scripts):
    one = scripts.common.Timing(total=[1.0, 10.0, 2.0])
    other = scripts.common.Timing(total=[2.0, 20.0, 2.0])
    assert one.over(other) == 0.5
