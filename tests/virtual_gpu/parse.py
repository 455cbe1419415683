"""The text of a PTX kernel as instructions, registers, parameters and symbols (PTX ISA, chapters 4 and 5)."""

from __future__ import annotations

import re
from bisect import bisect
from dataclasses import dataclass, field

from .faults import KernelError

# A label, the brace of a scope, a line that ends without a semicolon, or a statement.
PIECE = re.compile(r"\s*(?:([\w$]+):(?!:)|([{}])|(\.(?:loc|file)\b[^\n]*)|([^;]+);)")
NAME = re.compile(r"[%\w$.]+")


@dataclass(frozen=True)
class Instruction:
    """An instruction and where it comes from (PTX ISA 4.3.2).

    Attributes:
        opcode: with all its modifiers, as "ld.global.b32".
        operands: as written; a vector "{a, b}", an address "[a+4]" or a pair "a|b" is one of them.
        predicate: register that says which threads execute it, or None.
        negated: whether those are the threads where the predicate is false.
        where: its text and its lines of PTX and of Python, for messages.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    where: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel; a "struct" is an array of bytes."""

    name: str
    kind: str
    bits: int


@dataclass
class Program:
    """A parsed kernel.

    Attributes:
        labels: where each leads, as the position of an instruction.
        registers: bits of each; 1 of a predicate.
        symbols: byte offset in shared memory of each variable; None of the one that is sized at launch.
        static_shared: bytes of shared memory that are not sized at launch.
    """

    name: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, int | None] = field(default_factory=dict)
    static_shared: int = 0


def parse(text: str) -> Program:
    """The kernel that a PTX module has.

    Raises:
        KernelError: the module has no kernel.
    """
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+([\w$]+)([^{]*)\{", text)
    if entry is None:
        raise KernelError("the PTX has no .entry")
    program = Program(entry[1])
    for declaration in re.findall(r"^\s*((?:\.\w+\s+)*\.shared\b[^;]*);", text[: entry.start()], re.MULTILINE):
        _declare_shared(program, declaration)
    for declaration in re.findall(r"\.param\s+([^,)]*)", entry[2]):
        kind = re.search(r"\.([busf])(\d+)\b.*?([\w$]+)(\[\d+\])?\s*$", declaration.strip())
        if kind is None:
            raise KernelError(f"the parameter {declaration.strip()!r} is not understood")
        bits = int(kind[2])
        if kind[4]:  # a float16 or a bfloat16 is written as two bytes
            program.parameters.append(Parameter(kind[3], *(("b", 16) if kind[4] == "[2]" else ("struct", bits))))
        else:
            program.parameters.append(Parameter(kind[3], kind[1], bits))
    _Body(program, text, entry.end()).parse()
    return program


def _declare_shared(program: Program, declaration: str) -> None:
    variable = re.search(r"\.[busf](\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*$", declaration)
    if variable is None:
        raise KernelError(f"the variable {declaration!r} is not understood")
    if ".extern" in declaration:
        program.symbols[variable[2]] = None
    else:
        program.symbols[variable[2]] = program.static_shared
        size = int(variable[1]) // 8 * int(variable[3] or 1)
        program.static_shared += -(-size // 16) * 16


class _Body:
    """Reads the statements between the braces of a kernel."""

    def __init__(self, program: Program, text: str, start: int):
        self.program, self.text, self.at = program, text, start
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.scopes: list[dict[str, str]] = [{}]  # the full name of each register that is declared there
        self.entered = 0
        self.python_line = "?"
        self.tables: dict[str, list[str]] = {}
        self.last_label = ""

    def parse(self) -> None:
        while self.scopes:
            piece = PIECE.match(self.text, self.at)
            if piece is None:
                raise KernelError(f"{self.program.name}: the PTX ends within the kernel")
            self.at = piece.end()
            label, brace, line, statement = piece.groups()
            if label:
                self.program.labels[label] = len(self.program.instructions)
                self.last_label = label
            elif brace == "{":
                self.scopes.append({})
                self.entered += 1
            elif brace == "}":
                self.scopes.pop()
            elif line:
                if line.startswith(".loc"):
                    self.python_line = line.split()[2]
            else:
                self._statement(" ".join(statement.split()), 1 + bisect(self.newlines, piece.start(4)))

    def _statement(self, statement: str, line: int) -> None:
        if statement.startswith(".reg"):
            self._declare_registers(statement)
        elif statement.startswith(".shared"):
            _declare_shared(self.program, statement)
        elif statement.startswith(".branchtargets"):
            self.tables[self.last_label] = _operands(statement.partition(" ")[2])
        elif not statement.startswith("."):
            self._instruction(statement, line)

    def _declare_registers(self, statement: str) -> None:
        _, kind, names = statement.split(" ", 2)
        bits = 1 if kind == ".pred" else int(kind.lstrip(".busf"))
        for declared in names.split(","):
            many = re.fullmatch(r"(.+)<(\d+)>", declared.strip())
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [declared.strip()]:
                full = name if len(self.scopes) == 1 else f"{name}.{self.entered}"
                self.scopes[-1][name] = full
                self.program.registers[full] = bits

    def _full(self, text: str) -> str:
        """The text with registers by their full names."""
        return NAME.sub(lambda name: next((s[name[0]] for s in reversed(self.scopes) if name[0] in s), name[0]), text)

    def _instruction(self, statement: str, line: int) -> None:
        where = f"PTX line {line} ({statement[:70]}; Python line {self.python_line})"
        guard = re.match(r"@(!?)([%\w$.]+) ", statement)
        predicate, negated = (self._full(guard[2]), bool(guard[1])) if guard else (None, False)
        opcode, _, rest = statement[guard.end() if guard else 0 :].partition(" ")
        operands = _operands(self._full(rest))
        if opcode.startswith("brx.idx") and predicate is None:
            self._jump(operands[0], self.tables[operands[1]], where)
        else:
            self.program.instructions.append(Instruction(opcode, tuple(operands), predicate, negated, where))

    def _jump(self, index: str, labels: list[str], where: str) -> None:
        """A jump table (PTX ISA 9.7.12.3) as a comparison and a branch for each of its labels but the last."""
        add = self.program.instructions.append
        for i, label in enumerate(labels[:-1]):
            test = f"%jump{len(self.program.instructions)}"
            self.program.registers[test] = 1
            add(Instruction("setp.eq.u32", (test, index, str(i)), None, False, where))
            add(Instruction("bra", (label,), test, False, where))
        add(Instruction("bra.uni", (labels[-1],), None, False, where))


def _operands(text: str) -> list[str]:
    """Split at commas that are in no bracket."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            found.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*found, last] if last else found
