"""A basic block as a Python function over arrays with an element for each thread."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import registers
from .blocks import AT_BARRIER, EXIT, Blocks, cut, ends_block, is_barrier
from .faults import KernelError
from .parse import Instruction, Program
from .registers import FLOAT, SIGNED, UNSIGNED, Array, is_type

# How an operand is viewed: its bits, a signed or floating-point number, or a float32 as a float64.
VIEWS = {"u": UNSIGNED, "i": SIGNED, "f": FLOAT}

NAMESPACE: dict[str, Any] = {"np": np, "KernelError": KernelError, **vars(registers)}


class Translation:
    """The blocks of a program as functions, each translated when it is first executed.

    Attributes:
        constants: values of the arrays that functions take constants from; it grows with each translation.
    """

    def __init__(self, program: Program):
        self.program: Program = program
        self.blocks: Blocks = cut(program)
        self.index = {name: i for i, name in enumerate(program.registers)}
        self.constants: list[np.generic] = []
        self._position: dict[tuple[type, bytes], int] = {}
        self._functions: dict[tuple[int, bool], Callable[..., tuple[Array | None, int, int]]] = {}

    def constant(self, value: np.generic) -> str:
        """The expression of an array that holds a constant."""
        key = (type(value), value.tobytes())  # for NaN is not itself, and -0.0 is 0.0
        if key not in self._position:
            self._position[key] = len(self.constants)
            self.constants.append(value)
        return f"K[{self._position[key]}]"

    def function(self, block: int, masked: bool) -> Callable[..., tuple[Array | None, int, int]]:
        """A block, to be called with a machine and a mask of threads."""
        if (block, masked) not in self._functions:
            source = BlockWriter(self, block, masked).source()
            file, space = f"<{self.program.name}, block {block}{', masked' if masked else ''}>", dict[str, Any]()
            linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
            exec(compile(source, file, "exec"), NAMESPACE, space)
            self._functions[block, masked] = space["block"]
        return self._functions[block, masked]


class BlockWriter:
    """Writes the Python source of a block.

    Masked, it writes to registers only for the threads of its mask `m`, and takes the mask to memory.
    """

    def __init__(self, translation: Translation, block: int, masked: bool):
        self.translation, self.program, self.block, self.masked = translation, translation.program, block, masked
        self.lines: list[str] = []
        self.views: dict[str, set[str]] = {}  # of each register that has a variable
        self.written: set[str] = set()
        self.temporaries = 0

    def source(self) -> str:
        from .instructions import HANDLERS

        last = None
        for instruction in self.program.instructions[slice(*self.translation.blocks.bounds[self.block])]:
            if ends_block(instruction):
                last = instruction
                break
            with self._refusing(instruction):
                if instruction.base not in HANDLERS:
                    raise KernelError("the instruction is not modelled")
                HANDLERS[instruction.base](self, instruction)
        following = self.block + 1 if self.block + 1 < len(self.translation.blocks.bounds) else EXIT
        condition, target = "None", following
        if last is not None:
            if last.base == "bra":
                target = self.translation.blocks.at[self.program.labels[last.operands[-1]]]
            elif is_barrier(last):
                target = AT_BARRIER
                if (
                    not re.match(r"(bar|barrier)\.(cta\.)?sync", last.opcode)
                    or last.operands != ("0",)
                    or last.predicate
                ):
                    self.refuse(last, "only bar.sync 0 is modelled")
            else:
                target = EXIT
            condition = self.condition(last) or "None"
        for name in sorted(self.written & self.translation.blocks.kept):
            at, value = self.translation.index[name], self.read(name)
            self.line(f"R[{at}] = np.where(m, {value}, R[{at}])" if self.masked else f"R[{at}] = {value}")
        self.line(f"return {condition}, {target}, {following}")
        names = ("R", "K", "special", "parameters", "memory", "warps", "units")
        opening = ["def block(machine, m):", *(f"{name} = machine.{name}" for name in names)]
        return "\n ".join([*opening, *self.lines]) + "\n"

    @contextmanager
    def _refusing(self, instruction: Instruction) -> Iterator[None]:
        """An instruction that cannot be translated is an error only where it is executed."""
        try:
            yield
        except (KernelError, KeyError, IndexError) as error:
            self.refuse(instruction, str(error))

    def refuse(self, instruction: Instruction, why: str) -> None:
        message = f"{instruction.where}: {why}"
        mask = self.mask(instruction)
        condition = "" if mask == "None" else f"if {mask}.any(): "
        self.line(f"{condition}raise KernelError({message!r})")

    # What instructions are written with

    def line(self, text: str) -> None:
        self.lines.append(text)

    def temporary(self, expression: str) -> str:
        """A variable that holds an expression."""
        self.temporaries += 1
        self.line(f"t{self.temporaries} = {expression}")
        return f"t{self.temporaries}"

    def read(self, operand: str, view: str = "u", width: int | None = None) -> str:
        """An expression of an operand's array.

        Args:
            view: of `VIEWS`, or "d" of a float32 as a float64.
            width: bits that the instruction takes; None of all that a register has.
        """
        if operand.startswith("!"):
            return f"(~{self.read(operand[1:])})"
        own = self.program.registers.get(operand)
        if own is None:
            return self._constant(operand, view, width or 32)
        if width is not None and width < own:
            return f"{self.read(operand)}.astype(UNSIGNED[{width}])" + self._viewed(view, width)
        return self._variable(operand, view, own)

    def _viewed(self, view: str, width: int) -> str:
        return "" if view == "u" else f".view(np.{VIEWS[view][width].__name__})"

    def _variable(self, name: str, view: str, width: int) -> str:
        views = self.views.setdefault(name, set())
        stem = f"r{self.translation.index[name]}"
        if not views:
            self.line(f"{stem}u = R[{self.translation.index[name]}]")
            views.add("u")
        if view not in views:
            if view == "d":
                self.line(f"{stem}d = {self._variable(name, 'f', width)}.astype(np.float64)")
            else:
                other = next(other for other in "ufi" if other in views)
                self.line(f"{stem}{view} = {stem}{other}.view(np.{VIEWS[view][width].__name__})")
            views.add(view)
        return f"{stem}{view}"

    def _constant(self, operand: str, view: str, width: int) -> str:
        if operand.startswith("%"):
            value = f"special[{operand!r}]"
            return value if width == 32 else f"{value}.astype(UNSIGNED[{width}])"
        if operand in self.program.symbols:
            place = self.program.symbols[operand]
            bits = self.program.static_shared if place is None else place
        elif re.fullmatch(r"0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}", operand):
            bits = int(operand[2:], 16)
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            bits = int(operand.rstrip("U"), 0)
        else:
            raise KernelError(f"the operand {operand!r} is not understood")
        if width == 1:
            return self.translation.constant(np.bool_(bits))
        number = UNSIGNED[width](bits & (2**width - 1))
        if view == "d":
            return self.translation.constant(np.float64(number.view(np.float32)))
        return self.translation.constant(number.view(VIEWS[view][width]))

    def condition(self, instruction: Instruction) -> str | None:
        """The threads that fulfil an instruction's predicate, or None of all."""
        if instruction.predicate is None:
            return None
        return ("~" if instruction.negated else "") + self.read(instruction.predicate)

    def mask(self, instruction: Instruction) -> str:
        """The threads that execute an instruction, or "None" of all."""
        condition = self.condition(instruction)
        if not self.masked:
            return f"({condition})" if condition else "None"
        return f"(m & {condition})" if condition else "m"

    def write(self, instruction: Instruction, register: str, expression: str, view: str = "u") -> None:
        """Set a register, where the instruction's predicate is true."""
        if register == "_":
            return
        condition = self.condition(instruction)
        if condition:
            old = self.read(register, view)
            expression = f"np.where({condition}, {expression}, {old})"
        self.line(f"r{self.translation.index[register]}{view} = {expression}")
        self.views[register] = {view}
        self.written.add(register)

    def write_all(self, instruction: Instruction, names: list[str], expression: str) -> None:
        """Set several registers to the bits of the arrays that an expression gives."""
        value = self.temporary(expression)
        for i, name in enumerate(names):
            self.write(instruction, name, f"{value}[{i}]")

    def address(self, operand: str, width: int = 64) -> str:
        """An address "[register+offset]"."""
        inside = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if inside is None:
            raise KernelError(f"the address {operand!r} is not understood")
        width = self.program.registers.get(inside[1], width)
        base, offset = self.read(inside[1], "u", width), int(inside[2] or "0", 0)
        if not offset:
            return base
        return self.temporary(f"{base} + {self.read(str(offset), 'u', width)}")


def vector(operand: str) -> list[str]:
    """The registers of "{a, b}", or of an operand that is one."""
    return [name.strip() for name in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def types_of(instruction: Instruction) -> list[str]:
    """Those of an instruction's modifiers that are types."""
    return [modifier for modifier in instruction.modifiers if is_type(modifier)]
