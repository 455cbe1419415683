"""Watches what interpreted kernels do to memory: what goes well in an interpreter, and wrong on a device.

The interpreter runs one program after another, each in one thread, and takes any address; so races give right numbers
there. Its pointers do not know their tensor: an access that leaves its argument and lands in another one passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

Integers = NDArray[np.int64]
Lanes = NDArray[np.bool_]
Verb = Literal["loads", "stores", "updates"]  # an update is atomic
Kind = Literal[
    "outside",  # of every argument, each taken from its first element to its last
    "misaligned",  # to the size of the element
    "write-write race",  # two programs store one element
    "read-write race",  # a program loads what another one stores, before it or after it
    "atomic and plain",  # one program updates an element, another one loads or stores it
    "contradiction",  # one instruction stores different values to one element
    "no barrier",  # a program loads what it stored, maybe in another of its threads, with no barrier between
]
# What a program does, what another one did to the same element, and which fault that is.
CONFLICTS: dict[Verb, dict[Verb, Kind]] = {
    "loads": {"stores": "read-write race", "updates": "atomic and plain"},
    "stores": {"stores": "write-write race", "loads": "read-write race", "updates": "atomic and plain"},
    "updates": {"stores": "atomic and plain", "loads": "atomic and plain"},
}
NOBODY, SEVERAL = -1, -2  # in place of the number of a program


class AccessError(Exception):
    """A kernel did to memory what no kernel may."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@contextmanager
def watch(raising: bool = True) -> Iterator[list[AccessError]]:
    """Watch every interpreted launch inside. A fault ends its launch and is raised.

    If not `raising`, launches go on, without the lanes that are outside, and the list that is yielded has the faults.
    """
    watcher = _Watcher(raising)
    operations, launches = _watched_operations(watcher), _watched_launches(watcher)
    with patch.multiple(InterpreterBuilder, **operations), patch.multiple(GridExecutor, **launches):
        yield watcher.faults


@dataclass(frozen=True)
class Argument:
    """Where a tensor lies, in bytes from its first element to its last."""

    name: str
    start: int
    stop: int
    itemsize: int


@dataclass(frozen=True)
class Access:
    """What one instruction does, in those of its lanes that take part: to which addresses, with which values."""

    verb: Verb
    program: int
    itemsize: int
    addresses: Integers
    stored: NDArray[Any] | None

    def only(self, lanes: Lanes) -> Access:
        stored = None if self.stored is None else self.stored[lanes]
        return Access(self.verb, self.program, self.itemsize, self.addresses[lanes], stored)


class Launch:
    """The arguments of a launch, and which program did what to each of their elements.

    An element is known by its first byte, so that arguments may overlap.
    """

    def __init__(self, kernel: str, arguments: list[Argument]) -> None:
        self.kernel, self.arguments = kernel, [Argument("null", 0, 0, 1), *arguments]
        self.starts, self.stops = np.array(_spans(arguments)).T
        lengths = self.stops - self.starts
        self.shifts = np.cumsum(lengths) - lengths - self.starts  # from addresses to indices into the following
        self.programs = {verb: np.full(lengths.sum(), NOBODY, np.int32) for verb in CONFLICTS}
        self.barriers = 0
        self.barriers_at_store = np.zeros(lengths.sum(), np.int32)

    def take(self, access: Access) -> tuple[Lanes, list[AccessError]]:
        """Which lanes are inside of the arguments, and the faults, given all accesses before; this one is the next."""
        span = np.searchsorted(self.starts, access.addresses, side="right") - 1
        inside = (self.starts[span] <= access.addresses) & (access.addresses + access.itemsize <= self.stops[span])
        faults = [] if inside.all() else [self._fault("outside", access.only(~inside), "an element it does not have")]
        elements, access = (access.addresses + self.shifts[span])[inside], access.only(inside)
        faults += [self._fault(kind, access.only(lanes), why) for kind, lanes, why in self._checks(access, elements)]
        programs = self.programs[access.verb]
        alone = (programs[elements] == NOBODY) | (programs[elements] == access.program)
        programs[elements] = np.where(alone, access.program, SEVERAL)
        if access.verb == "stores":
            self.barriers_at_store[elements] = self.barriers
        return inside, faults

    def _checks(self, access: Access, elements: Integers) -> Iterator[tuple[Kind, Lanes, str]]:
        """Each check that fails: in which lanes, and why in the first of them."""
        if (lanes := access.addresses % access.itemsize != 0).any():
            yield "misaligned", lanes, f"at no multiple of {access.itemsize} bytes"
        for verb, kind in CONFLICTS[access.verb].items():
            programs = self.programs[verb][elements]
            if (lanes := (programs != NOBODY) & (programs != access.program)).any():
                yield kind, lanes, f"which {_name(programs[lanes][0])} {verb}"
        if access.verb == "loads":
            own = self.programs["stores"][elements] == access.program
            if (lanes := own & (self.barriers_at_store[elements] == self.barriers)).any():
                yield "no barrier", lanes, "which it stored, with no tl.debug_barrier() since"
        if access.stored is not None and (lanes := _contradicting(access.addresses, access.stored)).any():
            yield "contradiction", lanes, "with two values in one instruction"

    def _fault(self, kind: Kind, access: Access, why: str) -> AccessError:
        """The fault of the first lane of an access; its element by the name that each argument there gives it."""
        address = int(access.addresses[0])
        nearest = min(self.arguments, key=lambda a: max(a.start - address, address - a.stop))
        there = [a for a in self.arguments if a.start <= address < a.stop] or [nearest]
        names = " = ".join(f"{a.name}[{(address - a.start) // a.itemsize}]" for a in there)
        return AccessError(kind, f"{self.kernel}: {_name(access.program)} {access.verb} {names}, {why}")


def _spans(arguments: list[Argument]) -> list[tuple[int, int]]:
    """Where the memory of all arguments starts and stops, in order, what overlaps in one; the first span is empty."""
    spans = [(0, 0)]
    for argument in sorted(arguments, key=lambda argument: argument.start):
        if argument.start < spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], argument.stop)
        else:
            spans.append((argument.start, argument.stop))
    return spans


def _contradicting(addresses: Integers, stored: NDArray[Any]) -> Lanes:
    """Lanes that store something else than another lane at the same address."""
    lanes = np.zeros(addresses.shape, bool)
    order = np.argsort(addresses, kind="stable")
    # By their bytes, for a NaN does not contradict itself.
    addresses, stored = addresses[order], stored[order].view(f"u{stored.itemsize}")
    lanes[order[1:]] = (addresses[1:] == addresses[:-1]) & (stored[1:] != stored[:-1])
    return lanes


def _name(program: int) -> str:
    if program == SEVERAL:
        return "more than one program"
    return f"program {tuple(int(i) for i in np.unravel_index(program, interpreter_builder.grid_dim))}"


def _arguments(name: str, value: Any) -> Iterator[Argument]:
    """The tensors in what a kernel is given under a name: a tensor, a tuple, or anything else."""
    if isinstance(value, tuple):
        for i, entry in enumerate(value):
            yield from _arguments(f"{name}[{i}]", entry)
    tensor = getattr(value, "base", value)  # of a descriptor, or of a tensor to be read as another dtype
    if isinstance(tensor, torch.Tensor) and tensor.numel():
        start, itemsize = tensor.data_ptr(), tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield Argument(name, start, start + (last + 1) * itemsize, itemsize)


class _Watcher:
    def __init__(self, raising: bool) -> None:
        self.raising = raising
        self.faults: list[AccessError] = []
        self.launch = Launch("", [])

    def access(self, verb: Verb, pointers: TensorHandle, mask: Any, stored: TensorHandle | None) -> TensorHandle:
        """Check what an instruction is about to do; its mask without the lanes that are outside."""
        enabled = np.array(np.broadcast_to(mask, pointers.data.shape))
        program = int(np.ravel_multi_index(interpreter_builder.grid_idx, interpreter_builder.grid_dim))
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        values = None if stored is None else np.broadcast_to(stored.data, enabled.shape)[enabled]
        access = Access(verb, program, itemsize, pointers.data[enabled].astype(np.int64), values)
        inside, faults = self.launch.take(access)
        self.faults += faults
        if faults and self.raising:
            raise faults[0]
        enabled[enabled] = inside
        return TensorHandle(enabled, tl.int1)


def _watched_operations(watcher: _Watcher) -> dict[str, Any]:
    def masked(name: str, verb: Verb, *, pointers: int, mask: int, stored: int | None = None) -> Callable[..., Any]:
        """An operation that has these operands at these positions."""
        upstream = getattr(InterpreterBuilder, name)

        def operation(builder: Any, *operands: Any, **options: Any) -> Any:
            inside = watcher.access(verb, operands[pointers], operands[mask].data, stored and operands[stored])
            return upstream(builder, *operands[:mask], inside, *operands[mask + 1 :], **options)

        return operation

    upstream_cas, upstream_barrier = InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_barrier

    def cas(builder: Any, pointers: Any, expected: Any, *rest: Any) -> Any:
        inside = watcher.access("updates", pointers, True, None)
        return upstream_cas(builder, pointers, expected, *rest) if inside else expected  # it takes no mask

    def barrier(builder: Any) -> Any:
        watcher.launch.barriers += 1
        return upstream_barrier(builder)

    return {
        "create_masked_load": masked("create_masked_load", "loads", pointers=0, mask=1),
        "create_masked_store": masked("create_masked_store", "stores", pointers=0, mask=2, stored=1),
        "create_atomic_rmw": masked("create_atomic_rmw", "updates", pointers=1, mask=3),
        "create_atomic_cas": cas,
        "create_barrier": barrier,
    }


def _watched_launches(watcher: _Watcher) -> dict[str, Any]:
    upstream_run, upstream_to_host = GridExecutor.__call__, GridExecutor._init_args_hst

    def to_host(executor: Any, values: Any, options: Any) -> Any:
        values, options = upstream_to_host(executor, values, options)
        named = {**dict(zip(executor.arg_names, values, strict=False)), **options}
        arguments = [argument for name, value in named.items() for argument in _arguments(name, value)]
        watcher.launch = Launch(executor.fn.__name__, arguments)
        return values, options

    def run(executor: Any, *values: Any, **options: Any) -> Any:
        try:
            return upstream_run(executor, *values, **options)
        except InterpreterError as error:  # which wraps whatever a kernel raises
            if isinstance(error.__cause__, AccessError):
                raise error.__cause__ from None
            raise

    return {"_init_args_hst": to_host, "__call__": run}
