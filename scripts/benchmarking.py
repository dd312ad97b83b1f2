"""
What the benchmarks of speed share: the rates of the machine, runs in turn, peak memory of a process, and where the
time goes.

A *side* is one way of drawing a picture: ours or the authors', with its dtype. Sides are compared by runs in turn, by
the median of the ratios within a round.
"""

import argparse
import contextlib
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.utils import logging as transformers_logging

from hf_argen.modeling.layers import linear

REST = "head and sampling"
KINDS = {  # of operations, by what their name contains; the first that fits
    "convolutions": ("convolution", "conv2d"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "matrix products": (
        "addmm",
        "aten::mm",
        "bmm",
        "mkldnn_linear",
        "linear_pointwise",
        "aten::mv",
        "addmv",
        "aten::dot",
    ),
    "sampling": ("exponential_", "sort", "topk", "multinomial", "argmax", "cumsum", "scatter", "masked_fill"),
}
MATRIX_KINDS = ("matrix products", "attention", "convolutions")
# What one token's matrix work calls.
PRODUCTS = [(F, "linear"), (torch, "bmm"), (F, "scaled_dot_product_attention")]
if linear.HAS_ONEDNN:
    PRODUCTS.append((torch.ops.mkldnn, "_linear_pointwise"))
PRODUCT = "matrix work"
OTHER = "norms, activations, copies"
OUTSIDE = "Python, between operations"


def attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
):
    """Of the CPU's attention."""
    return sdpa_flop_count(query, key, value)


def linear_flops(states: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of oneDNN's product of states (..., inputs) and weights (outputs, inputs)."""
    return 2 * math.prod(states) * weight[0]


# What torch's counter does not know.
UNKNOWN_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops
}
if linear.HAS_ONEDNN:
    UNKNOWN_FLOPS[torch.ops.mkldnn._linear_pointwise] = linear_flops


def row(*cells: Any) -> None:
    """Prints one line of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a Markdown table."""
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))
    for cells in rows:
        row(*cells)


def synchronize() -> None:
    """Waits for a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


@dataclass
class Rates:
    """
    What the machine gives at best.

    Attributes:
        products: dtype -> operations per second of products of square matrices (a multiply-add is two).
        copy: bytes per second of a copy, read and written ones together.
        read: bytes per second of a sum.
    """

    products: dict[torch.dtype, float]
    copy: float
    read: float

    @classmethod
    def measure(cls, device: str, dtypes: Sequence[torch.dtype], size: int = 2048) -> "Rates":
        """The best of a few runs, since the machine's rate is what bounds the others; `size` is that of the matrices."""
        products = {}
        for dtype in dtypes:
            matrix = torch.randn(size, size, device=device).to(dtype)
            products[dtype] = 2 * size**3 / cls._best(lambda matrix=matrix: matrix @ matrix)
        source = torch.ones(size**2 * 16, device=device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / cls._best(lambda: target.copy_(source))
        return cls(products, copied, source.nbytes / cls._best(source.sum))

    def renew(self, device: str) -> None:
        """Measures again and keeps the better, since another program may have run beside the first time."""
        again = Rates.measure(device, list(self.products))
        self.products = {dtype: max(rate, again.products[dtype]) for dtype, rate in self.products.items()}
        self.copy, self.read = max(self.copy, again.copy), max(self.read, again.read)

    @staticmethod
    def _best(call: Callable[[], Any], runs: int = 10) -> float:
        return min(seconds(call) for _ in range(runs))

    def report(self) -> None:
        products = ", ".join(f"{_name(dtype)} {rate / 1e9:.0f}" for dtype, rate in self.products.items())
        print(
            f"\nMatrix products in Gflop/s: {products}; GB/s: copy {self.copy / 1e9:.1f}, read {self.read / 1e9:.1f}"
        )


@dataclass
class Side:
    """
    One way of drawing.

    Args:
        name: as the tables call it.
        dtype: of the matrix products.
        draw: (class labels (batch,), seed) to pictures (batch, 3, height, width) in [0, 1].
        parts: name -> the methods (object, attribute) whose time makes up that part; what is left is `REST`.
        weights: bytes that are read for each token of a next-token model.
        step: (class labels, number) to the first so many tokens, or a picture of so many steps, without pixels; it warms up,
            and see [`step_table`].
    """

    name: str
    dtype: torch.dtype
    draw: Callable[[torch.Tensor, int], torch.Tensor]
    parts: dict[str, list[tuple[Any, str]]]
    weights: int = 0
    step: Callable[[torch.Tensor, int], Any] | None = None


@dataclass
class Timing:
    """Of every round: seconds of the whole and of each part."""

    total: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def part(self, name: str) -> float:
        """Median seconds of a part."""
        return statistics.median(one[name] for one in self.parts)

    def over(self, other: "Timing") -> float:
        """Median ratio to the other side's time in the same round."""
        return statistics.median(a / b for a, b in zip(self.total, other.total, strict=True))


@contextlib.contextmanager
def wrapped(functions: Sequence[tuple[Any, str, Callable[[Any], Any]]]) -> Iterator[None]:
    """Within the `with` block, each (owner, name, wrap) is what `wrap` makes of what the owner has under that name."""
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in functions]
    for owner, name, wrap in functions:
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, own in kept:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


@contextlib.contextmanager
def metered(
    parts: dict[str, list[tuple[Any, str]]], meter: Callable[[], float]
) -> Iterator[dict[str, float]]:
    """Within the `with` block, what `meter` advances in each part: seconds, or operations."""
    spent = dict.fromkeys(parts, 0.0)

    def counting(part: str, call: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = meter()
            result = call(*args, **kwargs)
            spent[part] += meter() - start
            return result

        return wrapper

    with wrapped([(*one, partial(counting, part)) for part, owned in parts.items() for one in owned]):
        yield spent


def clock() -> float:
    synchronize()
    return time.perf_counter()


def in_turn(sides: Sequence[Side], labels: torch.Tensor, rounds: int) -> dict[str, Timing]:
    """Draws by every side in every round, after a run of each that does not count."""
    timings = {side.name: Timing() for side in sides}
    for side in sides:
        if side.step is not None:
            side.step(labels, 4)
        else:  # a compiled model has to see all shapes, otherwise one picture is enough
            side.draw(labels if labels.is_cuda else labels[:1], 0)
    for turn in range(rounds):
        for side in sides:
            with metered(side.parts, clock) as spent:
                total = seconds(lambda side=side, turn=turn: side.draw(labels, turn))
            spent[REST] = total - sum(spent.values())
            timings[side.name].total.append(total)
            timings[side.name].parts.append(spent)
    return timings


def count_operations(side: Side, labels: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Multiplications and additions of one drawing, by part and by kind (see `KINDS`)."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_FLOPS) as counter:
        with metered(side.parts, counter.get_total_flops) as spent:
            side.draw(labels, 0)
        spent[REST] = counter.get_total_flops() - sum(spent.values())
        kinds: dict[str, float] = {}
        for operation, flops in counter.get_flop_counts()["Global"].items():
            kind = kind_of(str(operation).replace("aten.", "aten::"))
            kinds[kind] = kinds.get(kind, 0) + flops
    return spent, kinds


def kind_of(operation: str) -> str:
    """The kind of an operation of torch, by its name."""
    return next((kind for kind, names in KINDS.items() if any(name in operation for name in names)), OTHER)


def time_by_kind(call: Callable[[], Any], total: float) -> dict[str, float]:
    """
    Seconds of a call by kind of operation, from a profiled run; `total` is what the call takes without profiler, of
    which the part outside all operations is Python.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    spent = dict.fromkeys([*MATRIX_KINDS, "sampling", OTHER], 0.0)
    for event in profiled.key_averages():
        if event.key.startswith(("aten::", "mkldnn")):
            spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    spent[OUTSIDE] = max(total - sum(spent.values()), 0.0)
    return spent


def measure_peaks(options: argparse.Namespace, folder: Path, names: Sequence[str]) -> None:
    """Prints the peak memory of each side at each batch, each in a process of its own; the first side is the base."""
    rows = []
    for batch in options.batch:
        found = {name: peak_of_child(folder, name, batch) for name in names}
        base = found[names[0]]
        for name, one in found.items():
            rows.append([name, batch, f"{one:.2f} GB", f"{one / base:.2f}"])
    table(
        "Peak memory of a process that loads the model and draws once.",
        ["side", "pictures", "peak", f"of {names[0]}"],
        rows,
    )


def peak_of_child(folder: Path, name: str, batch: int) -> float:
    """Runs this script once more, where [`run`] ends with [`report_peak`]."""
    own = ["--folder", str(folder), "--peak", name, "--batch", str(batch)]
    finished = subprocess.run(
        [sys.executable, *sys.argv, *own], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(finished.stdout.splitlines()[-1])


def peak_memory() -> float:
    """The most memory that this process ever held, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # there `ru_maxrss` may be that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def report_peak(load: Callable[[], Side], batch: int) -> None:
    """Loads, draws once, and prints the peak memory for [`peak_of_child`]."""
    load().draw(torch.arange(batch), 0)
    print(peak_memory())


def run(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, Path], None],
    measure: Callable[[argparse.Namespace, Path], None],
    sides: Callable[[argparse.Namespace], list[tuple[str, Callable[[Path], Side]]]],
) -> None:
    """Writes the model and measures, or as a child of that measures the memory of one side."""
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    transformers_logging.disable_progress_bar()
    if options.peak is not None:
        load = dict(sides(options))[options.peak]
        report_peak(lambda: load(options.folder), options.batch[0])
        return
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        # In a process of its own, so that the models it makes do not count as memory of this one.
        if "--prepare" not in sys.argv:
            own = ["--folder", str(folder), "--prepare"]
            subprocess.run([sys.executable, *sys.argv, *own], check=True)
            report_machine(options)
            measure(options, folder)
        else:
            prepare(options, folder)


def is_prepared(options: argparse.Namespace, folder: Path) -> bool:
    """Whether the random model is there: ours, and with --reference the same weights in the authors' format."""
    has_theirs = options.reference is None or (folder / "transformer.pth").exists()
    return (folder / "config.json").exists() and has_theirs


def save_theirs(models: Sequence[torch.nn.Module], folder: Path, key: str | None = None) -> dict[str, Path]:
    """Writes the authors' tokenizer and transformer, their weights under `key` where one is named; role -> file."""
    files = {name: folder / f"{name}.pth" for name in ("tokenizer", "transformer")}
    for model, path in zip(models, files.values(), strict=True):
        weights = model.state_dict()
        torch.save(weights if key is None else {key: weights}, path)
    return files


def report_machine(options: argparse.Namespace) -> None:
    """Prints what the numbers below were measured on and with."""
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = (
            f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        )
    print(f"{device}, torch {torch.__version__}\n\n    {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")


def report(
    title: str,
    sides: Sequence[Side],
    labels: torch.Tensor,
    rates: Rates,
    options: argparse.Namespace,
) -> None:
    """Times the sides in turn and prints ratios, parts, and where the time goes; the first side is the base."""
    timings = in_turn(sides, labels, options.rounds)
    rates.renew(labels.device.type)
    rates.report()
    operations, by_kind = (
        {name: len(labels) * count for name, count in counts.items()}
        for counts in count_operations(sides[-1], labels[:1])
    )
    base, names = timings[sides[0].name], [*sides[0].parts, REST]
    rows = []
    for side in sides:
        timing = timings[side.name]
        total = statistics.median(timing.total)
        share = sum(operations.values()) / total / rates.products[side.dtype]
        parts = [f"{timing.part(name):.2f} s" for name in names]
        rows.append([side.name, f"{total:.2f} s", f"{timing.over(base):.2f}", *parts, f"{share:.0%}"])
    whole = sum(operations.values()) / 1e9
    table(
        f"{title}: {len(labels)} pictures, median of {options.rounds} rounds; {whole:.0f} Gflop.",
        ["side", "time", f"of {sides[0].name}", *names, "share of the matrix rate"],
        rows,
    )
    if labels.device.type == "cpu" and not options.no_kinds:
        kinds_table(sides, labels, rates, timings, by_kind)


def kinds_table(
    sides: Sequence[Side],
    labels: torch.Tensor,
    rates: Rates,
    timings: dict[str, Timing],
    by_kind: dict[str, float],
) -> None:
    """Prints seconds per kind of operation, and for products the share of the machine's rate that they reach."""
    rows = []
    for side in sides:
        total = statistics.median(timings[side.name].total)
        cells = []
        for kind, spent in time_by_kind(lambda side=side: side.draw(labels, 0), total).items():
            rate = by_kind.get(kind, 0) / spent / rates.products[side.dtype] if spent else 0
            cells.append(f"{spent:.2f} s" + (f" ({rate:.0%})" if kind in MATRIX_KINDS else ""))
        rows.append([side.name, *cells])
    table(
        "Where the time goes; in brackets the share of the matrix rate that these operations reach.",
        ["side", *MATRIX_KINDS, "sampling", OTHER, OUTSIDE],
        rows,
    )


def time_outside_products(call: Callable[[], Any]) -> float:
    """Seconds of the operations of a call that are no part of `PRODUCTS`, from a profiled run."""
    # Every call becomes an event of that name, which holds those within.
    marks = [(*one, record_function(PRODUCT)) for one in PRODUCTS]
    with wrapped(marks), profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    spent = 0.0
    for event in profiled.events():
        parent = event
        while parent is not None and parent.name != PRODUCT:
            parent = parent.cpu_parent
        if parent is None and event.name.startswith("aten::"):
            spent += event.self_cpu_time_total / 1e6
    return spent


def step_table(sides: Sequence[Side], labels: torch.Tensor, tokens: int, rates: Rates, runs: int = 5) -> None:
    """
    Prints what one token costs: bandwidth of reading the weights, and what is not matrix work.

    A run and its matrix work are timed together, without profiler, since the rate of the memory changes from run to run by
    more than all that is between operations. The profiler only says what the other operations take; it lengthens each by a
    fraction of a microsecond, and what is between them seems shorter by as much.
    """
    rows = []
    for side in sides:
        if side.step is None:
            continue
        call = lambda side=side: side.step(labels, tokens)  # noqa: E731
        call()
        timed = []
        for _ in range(runs):
            with metered({PRODUCT: PRODUCTS}, time.perf_counter) as spent:
                total = seconds(call)
            timed.append((total, spent[PRODUCT]))
        total, work = sorted(timed)[runs // 2]
        other = time_outside_products(call)
        bandwidth = side.weights * tokens / total
        rows.append(
            [
                side.name,
                f"{1e3 * total / tokens:.1f} ms",
                f"{side.weights / 1e6:.0f} MB",
                f"{bandwidth / 1e9:.1f} GB/s",
                f"{bandwidth / rates.read:.0%}",
                f"{side.weights * tokens / work / rates.read:.0%}",
                f"{work / total:.0%}",
                f"{other / total:.0%}",
                f"{(total - work - other) / total:.0%}",
            ]
        )
    table(
        f"One token of {len(labels)} pictures, the first {tokens}.",
        [
            "side",
            "step",
            "weights",
            "weights / step",
            "of the read rate",
            "the same in matrix work alone",
            PRODUCT,
            "other operations",
            OUTSIDE,
        ],
        rows,
    )


def sides(
    options: argparse.Namespace,
    theirs: Callable[[argparse.Namespace, Path], Side],
    ours: Callable[[argparse.Namespace, Path, torch.dtype], Side],
) -> list[tuple[str, Callable[[Path], Side]]]:
    """Name and loader of every side, the authors' first where there is a reference."""
    found: list[tuple[str, Callable[[Path], Side]]] = []
    if options.reference is not None:
        found.append(("authors", lambda folder: theirs(options, folder)))
    for name in options.dtype:
        dtype = getattr(torch, name)
        found.append((f"ours, {name}", lambda folder, dtype=dtype: ours(options, folder, dtype)))
    return found + mkl_sides(options, ours)


def mkl_sides(
    options: argparse.Namespace, ours: Callable[[argparse.Namespace, Path, torch.dtype], Side]
) -> list[tuple[str, Callable[[Path], Side]]]:
    """With --mkl, name and loader of our float32 without oneDNN's products."""
    if not options.mkl:
        return []
    return [("ours, float32 by MKL", lambda folder: by_mkl(ours(options, folder, torch.float32)))]


def by_mkl(side: Side) -> Side:
    """The side without oneDNN's products of large layers in float32."""

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        with wrapped([(linear, "HAS_ONEDNN", lambda _: False)]):
            return side.draw(labels, seed)

    return replace(side, name=f"{side.name} by MKL", draw=draw, step=None)


def same_pictures(base: Side, other: Side, labels: torch.Tensor) -> None:
    """Prints how far the pictures of two sides differ."""
    largest = (base.draw(labels, 0).cpu() - other.draw(labels, 0).cpu()).abs().max().item()
    print(f"\nLargest difference of a pixel between {base.name} and {other.name}: {largest:.1e}")


def parser(description: str, batches: Sequence[int]) -> argparse.ArgumentParser:
    """The options that the benchmarks have in common."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--reference", type=Path, metavar="PATH", help="checkout of the authors' repository")
    made.add_argument(
        "--batch", type=int, nargs="+", default=list(batches), help="pictures that are drawn at once"
    )
    made.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    made.add_argument(
        "--mkl", action="store_true", help="also our float32 without oneDNN's products of large layers"
    )
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    made.add_argument(
        "--folder", type=Path, help="where the models are kept, to go on with them; default: temporary"
    )
    made.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    made.add_argument("--no-kinds", action="store_true", help="leave out the time by kind of operation")
    made.add_argument("--no-time", action="store_true", help="only the peak memory")
    made.add_argument("--prepare", action="store_true", help="only write the models to FOLDER")
    made.add_argument(
        "--peak", help=argparse.SUPPRESS
    )  # a child of this script: the side whose memory is asked for
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        lines = listing.read_text().splitlines()
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return platform.processor() or platform.machine()
