"""What holds for every kernel, under Triton's interpreter where there is no GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from hf_argen.kernels import use

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


GUARD = 64  # elements around new memory that nobody may write to
MARK = 77


@contextmanager
def guarded_memory() -> Iterator[None]:
    """What operations allocate is full of NaN, or of the number 77, and lies between marks, which have to be there at the end."""
    allocated: list[tuple[torch.Tensor, int]] = []
    plain = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, **keywords: Any) -> torch.Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if isinstance(self, FakeTensor):
            return plain(self, shape, **keywords)
        whole = plain(self, shape.numel() + 2 * GUARD, **keywords).fill_(MARK)
        inner = whole[GUARD : GUARD + shape.numel()]
        if inner.is_floating_point():
            inner.fill_(torch.nan)
        allocated.append((whole, shape.numel()))
        return inner.view(shape)

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = plain
    for whole, size in allocated:
        assert (whole[:GUARD] == MARK).all() and (whole[GUARD + size :] == MARK).all(), (
            "written beyond the end"
        )


def assert_agree(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Integers equal; floats within the tolerance of their dtype, relative to the largest value."""
    if expected is None:
        assert found is None
        return
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        return
    if expected.numel() == 0:
        return
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    assert torch.equal(expected[~finite].nan_to_num(7.0), found[~finite].nan_to_num(7.0))
    size = expected[finite].abs().max().item() if finite.any() else 0.0
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(
        found[finite].float(), expected[finite].float(), rtol=tolerance, atol=tolerance * size
    )


class KernelTests:
    """
    Subclass it as `class TestX(KernelTests)`.

    Attributes:
        function: the public function, which picks reference or kernel.
        cases: name to a function that makes the keywords of a call; small, of odd shapes.
        differentiable: names of the inputs that have gradients.
        dtypes: of the floating-point inputs.
        operation: the registered operation.
    """

    function: ClassVar[Callable[..., Any]]
    cases: ClassVar[dict[str, Callable[[], dict[str, Any]]]]
    differentiable: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    in_float32: ClassVar[tuple[str, ...]] = ()  # inputs that keep their dtype
    operation: ClassVar[Any]

    def inputs(self, case: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        torch.manual_seed(0)
        made = self.cases[case]()
        for name, value in made.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in self.in_float32:
                made[name] = value.to(dtype)
        return made

    def outputs(self, inputs: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
        """All results of a call, those included that it writes into its inputs."""
        result = type(self).function(**inputs)
        return result if isinstance(result, tuple) else (result,)

    def tensors(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.cases))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", list(self.dtypes), ids=lambda one: str(one).removeprefix("torch."))

    def test_agrees_with_reference(self, case, dtype):
        self.check_agreement(case, dtype, "cpu")

    def check_agreement(self, case: str, dtype: torch.dtype, device: str) -> None:
        """With strides as they are made, into memory full of NaN."""

        def there() -> dict[str, Any]:
            made = self.inputs(case, dtype)
            return tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, made)

        with use("reference"):
            expected = self.outputs(there())
        inputs = there()
        with use("triton"), guarded_memory():
            found = self.outputs(inputs)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_agree(one, other)

    def test_strides(self):
        """Inputs of which no dimension is contiguous."""

        def strided(one: Any) -> Any:
            if not isinstance(one, torch.Tensor) or one.ndim < 1 or isinstance(one, torch.nn.Parameter):
                return one
            return torch.stack([one, one], dim=-1)[..., 0]

        inputs = self.inputs(next(iter(self.cases)))
        with use("reference"):
            expected = self.outputs(self.tensors(inputs))
        with use("triton"), guarded_memory():
            found = self.outputs({name: strided(value) for name, value in inputs.items()})
        for one, other in zip(found, expected, strict=True):
            assert_agree(one, other)

    def test_gradients(self, case):
        if not self.differentiable:
            return
        results = {}
        for mode in ("reference", "triton"):
            inputs = self.inputs(case)
            leaves = {
                name: inputs[name].detach().clone().requires_grad_()
                for name in self.differentiable
                if inputs.get(name) is not None
            }
            with use(mode), guarded_memory():
                outputs = [
                    one for one in self.outputs({**inputs, **leaves}) if one is not None and one.requires_grad
                ]
                torch.manual_seed(1)
                loss = sum((one.float() * torch.randn(one.shape)).sum() for one in outputs)
                results[mode] = torch.autograd.grad(loss, list(leaves.values()))
        for found, expected in zip(results["triton"], results["reference"], strict=True):
            assert_agree(found, expected)

    def operation_calls(self, inputs: dict[str, Any]) -> list[tuple[Any, tuple, dict]]:
        """The calls of registered operations that the function makes, with their arguments."""
        recorder = Recorder()
        with use("triton"), recorder, torch.no_grad():
            self.outputs(inputs)
        return recorder.calls

    def test_registration(self):
        """`torch.library.opcheck`: schema, autograd registration, fake outputs, and AOT dispatch."""
        calls = self.operation_calls(self.inputs(next(iter(self.cases))))
        assert calls, "the kernel did not run"
        for operation, arguments, keywords in calls:
            own = tuple(
                one.detach().clone().requires_grad_(bool(self.differentiable) and one.is_floating_point())
                if isinstance(one, torch.Tensor)
                else one
                for one in arguments
            )
            with use("triton"):
                torch.library.opcheck(operation, own, keywords)

    def test_compiled_graph_keeps_it_whole(self):
        """One graph, with the operation in it as one node."""
        graphs = []

        def backend(module, example_inputs):
            graphs.append(module)
            return module.forward

        inputs = self.inputs(next(iter(self.cases)))
        with use("triton"), torch.no_grad():
            expected = self.outputs(self.tensors(inputs))
            torch._dynamo.reset()
            run = torch.compile(lambda given: self.outputs(given), backend=backend, fullgraph=True)
            found = run(self.tensors(inputs))
        for one, other in zip(found, expected, strict=True):
            assert_agree(one, other)
        assert len(graphs) == 1
        targets = [str(node.target) for node in graphs[0].graph.nodes]
        assert any(target.startswith("hf_argen.") for target in targets), targets


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operations of this package, or of another namespace, that are called."""

    def __init__(self, namespace: str = "hf_argen"):
        super().__init__()
        self.namespace = namespace
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def refuses(function: Callable[..., Any], inputs: dict[str, Any], message: str) -> None:
    """The kernel refuses the inputs with this sentence."""
    with use("triton"), pytest.raises(ValueError, match=message):
        function(**inputs)
