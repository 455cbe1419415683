"""Each instruction that Triton emits, as Python over arrays (PTX ISA, chapter 9.7).

Single-precision arithmetic rounds to nearest, an fma once. Approximations (`.approx`, `.full`) are NumPy's float32
functions, and `.ftz` is ignored. An instruction that is not here is an error where it is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .faults import KernelError
from .parse import Instruction
from .registers import bits_of
from .translate import BlockWriter, types_of, vector

Handler = Callable[[BlockWriter, Instruction], None]
HANDLERS: dict[str, Handler] = {}


def handles(*bases: str) -> Callable[[Handler], Handler]:
    """Register a function for instructions by the first word of their opcode."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(bases, handler))
        return handler

    return register


@handles("membar", "fence", "griddepcontrol", "bar")
def _nothing(writer: BlockWriter, instruction: Instruction) -> None:
    """Orders what happens in order here anyway; `bar` is `bar.warp.sync`, for others end a block."""


@handles("call")
def _call(writer: BlockWriter, instruction: Instruction) -> None:
    failed = any("__assertfail" in operand for operand in instruction.operands)
    writer.refuse(instruction, "device_assert failed" if failed else "calls are not modelled")


# Moves and comparisons


@handles("mov")
def _mov(writer: BlockWriter, instruction: Instruction) -> None:
    to, source = instruction.operands
    width = bits_of(instruction.modifiers[-1])
    if to.startswith("{"):
        parts = vector(to)
        writer.write_all(instruction, parts, f"split({writer.read(source, 'u', width)}, {len(parts)})")
    elif source.startswith("{"):
        names = vector(source)
        parts = [writer.read(name, "u", width // len(names)) for name in names]
        writer.write(instruction, to, f"joined([{', '.join(parts)}])")
    else:
        # As it is viewed already.
        view = next((view for view in "ufi" if view in writer.views.get(source, ())), "u")
        writer.write(instruction, to, writer.read(source, view, width), view)


@handles("selp")
def _selp(writer: BlockWriter, instruction: Instruction) -> None:
    to, if_true, if_false, predicate = instruction.operands
    kind = types_of(instruction)[-1]
    view, width = ("f" if kind in ("f32", "f64") else "u"), bits_of(kind)
    choices = f"{writer.read(if_true, view, width)}, {writer.read(if_false, view, width)}"
    writer.write(instruction, to, f"np.where({writer.read(predicate)}, {choices})", view)


# Unordered comparisons, which are true of NaN, are the opposite of an ordered one.
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


@handles("setp")
def _setp(writer: BlockWriter, instruction: Instruction) -> None:
    to, a, b, *third = instruction.operands
    comparison, kind = instruction.modifiers[0], types_of(instruction)[-1]
    floating, width = kind.startswith("f"), bits_of(kind)
    view = {"f": "f", "s": "i"}.get(kind[0], "u")
    if kind == "bf16" or kind.endswith("x2"):
        raise KernelError(f"comparisons of {kind} are not modelled")
    x, y = writer.read(a, view, width), writer.read(b, view, width)
    if comparison in COMPARISONS and not (floating and comparison == "ne"):
        found = f"{x} {COMPARISONS[comparison]} {y}"
    elif comparison in UNORDERED:
        found = f"~({x} {UNORDERED[comparison]} {y})"
    else:
        either = f"({x} < {y}) | ({x} > {y})"
        nan = f"np.isnan({x}) | np.isnan({y})"
        found = {"ne": either, "neu": f"{x} != {y}", "equ": f"~({either})", "nan": nan, "num": f"~({nan})"}[comparison]
    value = writer.temporary(found)
    combined = next((word for word in ("and", "or", "xor") if word in instruction.modifiers), None)
    for i, predicate in enumerate(to.split("|")):
        own = f"(~{value})" if i else value
        if combined:
            own = f"{own} {LOGIC[combined]} {writer.read(third[0])}"
        writer.write(instruction, predicate.strip(), own)


# Conversions (PTX ISA 9.7.9.22)


@handles("cvt")
def _cvt(writer: BlockWriter, instruction: Instruction) -> None:
    to, *sources = instruction.operands
    target, source = types_of(instruction)[-2:]
    words = set(instruction.modifiers) - {"ftz", target, source}
    rounding = next((word for word in words if re.fullmatch(r"r[nzmp]i?|rna", word)), "rn")
    if words - {rounding, "relu"} or rounding in ("rz", "rm", "rp"):
        raise KernelError("the conversion is not modelled")
    if target.endswith("x2"):
        if source != "f32":
            raise KernelError("the conversion is not modelled")
        upper, lower = (_rectified(writer.read(name, "f"), words) for name in sources)
        writer.write(instruction, to, f"joined([to_half({lower}, {target!r}), to_half({upper}, {target!r})])")
    elif target == "tf32":
        writer.write(instruction, to, f"to_tf32({writer.read(sources[0])}, {rounding == 'rna'})")
    elif source[0] in "us" or (source[0] == "b" and source != "bf16"):
        _from_integer(writer, instruction, target, source)
    else:
        half = source in ("bf16", "f16")
        value = writer.read(sources[0], "u" if half else "f", bits_of(source))
        value = _rectified(f"from_half({value}, {source!r})" if half else value, words)
        if target[0] in "us":
            width, signed = bits_of(target), target[0] == "s"
            whole = f"to_integer({value}, {width}, {signed}, {rounding!r})"
            writer.write(instruction, to, _extended(writer, to, whole, width, signed))
            return
        if rounding.endswith("i"):
            value = f"ROUNDINGS[{rounding!r}]({value})"
        _write_real(writer, instruction, value, target)


def _rectified(value: str, words: set[str]) -> str:
    return f"np.fmax({value}, 0)" if "relu" in words else value


def _write_real(writer: BlockWriter, instruction: Instruction, value: str, target: str) -> None:
    """Set the first operand to numbers as floating-point ones of a type."""
    to = instruction.operands[0]
    if target in ("bf16", "f16"):
        writer.write(instruction, to, f"to_half({value}.astype(np.float32), {target!r})")
    else:
        writer.write(instruction, to, f"{value}.astype(np.float{bits_of(target)})", "f")


def _from_integer(writer: BlockWriter, instruction: Instruction, target: str, source: str) -> None:
    to, name = instruction.operands
    width, signed = bits_of(source), source[0] == "s"
    value = writer.read(name, "i" if signed else "u", width)
    if target in ("f16", "bf16", "f32", "f64"):
        _write_real(writer, instruction, value, target)
    else:
        narrow = bits_of(target)
        found = f"resized(unsigned({value}), {narrow}, {signed})"
        writer.write(instruction, to, _extended(writer, to, found, narrow, target[0] == "s"))


def _extended(writer: BlockWriter, register: str, value: str, width: int, signed: bool) -> str:
    """A value as wide as its register, which may be wider (PTX ISA 9.4.1)."""
    own = writer.program.registers[register]
    return value if own == width else f"resized({value}, {own}, {signed})"


# Arithmetic

LOGIC = {"and": "&", "or": "|", "xor": "^"}
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
REAL = {
    "abs": "np.abs({0})",
    "neg": "-{0}",
    "sqrt": "np.sqrt({0})",
    "rcp": "np.reciprocal({0})",
    "rsqrt": "reciprocal_root({0})",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
    "sin": "np.sin({0})",
    "cos": "np.cos({0})",
    "tanh": "np.tanh({0})",
    "copysign": "np.copysign({1}, {0})",
    **{name: f"{{0}} {sign} {{1}}" for name, sign in BINARY.items()},
}
HALF = {name: f"np.{word}" for name, word in {"add": "add", "sub": "subtract", "mul": "multiply"}.items()}
HALF |= {"neg": "np.negative", "abs": "np.abs", "ex2": "np.exp2", "tanh": "np.tanh", "fma": "multiply_add"}
# The operands' views ("x" as the type says, "w" 32 bits, which have no sign), and an expression of bits.
INTEGER = {
    "div": ("xx", "quotient({0}, {1})"),
    "rem": ("xx", "remainder({0}, {1})"),
    "min": ("xx", "unsigned(np.minimum({0}, {1}))"),
    "max": ("xx", "unsigned(np.maximum({0}, {1}))"),
    "abs": ("i", "unsigned(np.abs({0}))"),
    "neg": ("i", "unsigned(-{0})"),
    "not": ("u", "~{0}"),
    "add": ("uu", "{0} + {1}"),
    "sub": ("uu", "{0} - {1}"),
    "shl": ("uw", "shifted({0}, {1}, True)"),
    "shr": ("xw", "unsigned(shifted({0}, {1}, False))"),
    "bfe": ("xww", "extracted({0}, {1}, {2})"),
    "prmt": ("www", "permuted({0}, {1}, {2})"),
    "popc": ("u", "np.bitwise_count({0}).astype(np.uint32)"),
    "clz": ("u", "leading_zeros({0})"),
    **{name: ("uu", f"{{0}} {sign} {{1}}") for name, sign in LOGIC.items()},
}
# Modifiers that change nothing here.
PLAIN = {"rn", "ftz", "approx", "full", "lo", "NaN", "relaxed"}


@handles(*REAL, *HALF, *INTEGER)
def _arithmetic(writer: BlockWriter, instruction: Instruction) -> None:
    base, (to, *operands) = instruction.base, instruction.operands
    kinds = types_of(instruction)
    kind = kinds[-1] if kinds else "pred"
    unknown = set(instruction.modifiers) - PLAIN - {kind, "wide", "hi"}
    if unknown:
        raise KernelError(f"the modifiers {', '.join(sorted(unknown))} are not modelled")
    width = bits_of(kind)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        operation = _extremum(base, instruction) if base in ("min", "max") else HALF[base]
        values = ", ".join(writer.read(operand, "u", width) for operand in operands)
        writer.write(instruction, to, f"half_operation({operation}, {kind!r}, {values})")
    elif kind in ("f32", "f64"):
        reals = [writer.read(operand, "f", width) for operand in operands]
        if base in ("min", "max"):
            writer.write(instruction, to, f"{_extremum(base, instruction)}({', '.join(reals)})", "f")
        elif base == "fma":
            _fma(writer, instruction)
        else:
            writer.write(instruction, to, REAL[base].format(*reals), "f")
    elif base == "mul":
        writer.write(instruction, to, _product(writer, instruction, kind))
    else:
        views, expression = INTEGER[base]
        own = "i" if kind[0] == "s" else "u"
        integers = [
            writer.read(operand, {"x": own, "w": "u"}.get(view, view), 32 if view == "w" else width)
            for view, operand in zip(views, operands, strict=False)
        ]
        writer.write(instruction, to, expression.format(*integers))


def _extremum(base: str, instruction: Instruction) -> str:
    """With `.NaN`, NaN if one operand is; else the other operand."""
    return f"np.{base}imum" if "NaN" in instruction.modifiers else f"np.f{base}"


def _fma(writer: BlockWriter, instruction: Instruction) -> None:
    """Of float32 numbers in float64, rounded once; twice in rare ties."""
    to, *operands = instruction.operands
    single = types_of(instruction)[-1] == "f32"
    values = ", ".join(writer.read(operand, *("d", 32) if single else ("f", 64)) for operand in operands)
    writer.write(instruction, to, f"multiply_add({values})" + (".astype(np.float32)" if single else ""), "f")


def _product(writer: BlockWriter, instruction: Instruction, kind: str) -> str:
    """The lower half of an integer product, the upper half, or all of it."""
    width, signed = bits_of(kind), kind[0] == "s"
    a, b = (writer.read(operand, "i" if signed else "u", width) for operand in instruction.operands[1:3])
    if "wide" in instruction.modifiers:
        wide = f"np.{'' if signed else 'u'}int{2 * width}"
        return f"unsigned({a}.astype({wide}) * {b})"
    return f"high_product({a}, {b})" if "hi" in instruction.modifiers else f"unsigned({a} * {b})"


@handles("mad")
def _mad(writer: BlockWriter, instruction: Instruction) -> None:
    kind = types_of(instruction)[-1]
    if kind[0] == "f":
        _fma(writer, instruction)
        return
    if set(instruction.modifiers) - {kind, "lo", "hi", "wide"}:
        raise KernelError("the modifiers are not modelled")
    width = bits_of(kind) * (2 if "wide" in instruction.modifiers else 1)
    added = writer.read(instruction.operands[3], "u", width)
    writer.write(instruction, instruction.operands[0], f"{_product(writer, instruction, kind)} + {added}")


@handles("shf")
def _shf(writer: BlockWriter, instruction: Instruction) -> None:
    to, *operands = instruction.operands
    side, wraps = instruction.modifiers[0], "wrap" in instruction.modifiers
    values = ", ".join(writer.read(operand, "u", 32) for operand in operands)
    writer.write(instruction, to, f"funnel({values}, {side == 'l'}, {wraps})")


@handles("lop3")
def _lop3(writer: BlockWriter, instruction: Instruction) -> None:
    to, *operands, table = instruction.operands
    values = ", ".join(writer.read(operand, "u", 32) for operand in operands)
    writer.write(instruction, to, f"logic3({values}, {int(table, 0)})")


# Memory (PTX ISA 9.7.9)


@handles("ld")
def _ld(writer: BlockWriter, instruction: Instruction) -> None:
    to, source = instruction.operands
    kind = types_of(instruction)[-1]
    width, space = bits_of(kind), _space(instruction)
    if space == "param":
        name = source.strip("[] ")
        if all(parameter.name != name for parameter in writer.program.parameters):
            raise KernelError(f"the parameter {name} is not modelled")
        # It may be wider than what is loaded of it.
        value = f"parameters[{name!r}].astype(UNSIGNED[{width}])"
        writer.write(instruction, to, _extended(writer, to, value, width, kind[0] == "s"))
        return
    names = vector(to)
    place = f"{space!r}, {writer.address(source)}, {width // 8}, {len(names)}"
    value = writer.temporary(f"memory.load({place}, {writer.mask(instruction)}, {instruction.where!r})")
    for i, name in enumerate(names):
        if name != "_":
            writer.write(instruction, name, _extended(writer, name, f"{value}[{i}]", width, kind[0] == "s"))


@handles("st")
def _st(writer: BlockWriter, instruction: Instruction) -> None:
    to, source = instruction.operands
    space = _space(instruction)
    if space == "param":  # of a call
        return
    width = bits_of(types_of(instruction)[-1])
    values = ", ".join(writer.read(name, "u", width) for name in vector(source))
    where = f"{writer.mask(instruction)}, {instruction.where!r}"
    writer.line(f"memory.store({space!r}, {writer.address(to)}, [{values}], {where})")


def _space(instruction: Instruction) -> str:
    space = instruction.modifiers[0].partition("::")[0]
    if space not in ("global", "shared", "param"):
        raise KernelError("accesses of other memory than global and shared are not modelled")
    return space


@handles("cp")
def _cp(writer: BlockWriter, instruction: Instruction) -> None:
    words, mask = instruction.modifiers, writer.mask(instruction)
    if words[0] != "async" or "bulk" in words or "mbarrier" in words:
        raise KernelError("the copy is not modelled")
    if words[1] == "commit_group":
        writer.line(f"memory.commit({mask})")
    elif words[1] == "wait_group":
        writer.line(f"memory.wait({int(instruction.operands[0], 0)}, {mask})")
    elif words[1] == "wait_all":
        writer.line(f"memory.commit({mask})")
        writer.line(f"memory.wait(0, {mask})")
    else:
        to, source, size, *taken = instruction.operands
        if "L2::cache_hint" in words:
            taken = taken[:-1]
        given = writer.read(taken[0], "u", 32) if taken else "None"
        addresses = f"{writer.address(to)}, {writer.address(source)}"
        writer.line(f"memory.copy({addresses}, {int(size, 0)}, {given}, {mask}, {instruction.where!r})")


# What the threads of a warp do together


@handles("shfl")
def _shfl(writer: BlockWriter, instruction: Instruction) -> None:
    to, source, amount, bounds, *_ = instruction.operands
    arguments = f"{instruction.modifiers[1]!r}, {writer.read(amount, 'u', 32)}, {writer.read(bounds, 'u', 32)}"
    lanes = writer.temporary(f"warps.shuffled({arguments})")
    value, *valid = to.split("|")
    writer.write(instruction, value.strip(), f"{writer.read(source, 'u', 32)}[{lanes}[0]]")
    if valid:
        writer.write(instruction, valid[0].strip(), f"{lanes}[1]")


@handles("redux")
def _redux(writer: BlockWriter, instruction: Instruction) -> None:
    to, source, *_ = instruction.operands
    view = "i" if types_of(instruction)[-1][0] == "s" else "u"
    operation = instruction.modifiers[1]
    arguments = f"{operation!r}, {writer.read(source, view, 32)}, {writer.mask(instruction)}"
    writer.write(instruction, to, f"warps.reduced({arguments})")


@handles("vote")
def _vote(writer: BlockWriter, instruction: Instruction) -> None:
    to, source, *_ = instruction.operands
    arguments = f"{instruction.modifiers[1]!r}, {writer.read(source, 'u', 1)}, {writer.mask(instruction)}"
    writer.write(instruction, to, f"warps.voted({arguments})")


@handles("ldmatrix")
def _ldmatrix(writer: BlockWriter, instruction: Instruction) -> None:
    to, source = instruction.operands
    arguments = f"{writer.address(source)}, {_matrices(instruction)}, {'trans' in instruction.modifiers}"
    call = f"units.load({arguments}, {writer.mask(instruction)}, {instruction.where!r})"
    writer.write_all(instruction, vector(to), call)


@handles("stmatrix")
def _stmatrix(writer: BlockWriter, instruction: Instruction) -> None:
    to, source = instruction.operands
    _matrices(instruction)
    values = ", ".join(writer.read(name) for name in vector(source))
    arguments = f"{writer.address(to)}, [{values}], {'trans' in instruction.modifiers}"
    writer.line(f"units.store({arguments}, {writer.mask(instruction)}, {instruction.where!r})")


def _matrices(instruction: Instruction) -> int:
    words = instruction.modifiers
    if "m8n8" not in words or "b16" not in words:
        raise KernelError("the shape of the matrix is not modelled")
    return next(int(word[1:]) for word in words if re.fullmatch(r"x[124]", word))


@handles("mma")
def _mma(writer: BlockWriter, instruction: Instruction) -> None:
    to, *operands = instruction.operands
    shape = next(word for word in instruction.modifiers if re.fullmatch(r"m\d+n\d+k\d+", word))
    sums, a, b, _ = types_of(instruction)
    if sums != "f32" or a != b or a not in ("tf32", "f16", "bf16"):
        raise KernelError("the types of the product are not modelled")
    fragments = ", ".join(f"[{', '.join(writer.read(name) for name in vector(operand))}]" for operand in operands)
    writer.write_all(instruction, vector(to), f"units.mma({shape!r}, {a!r}, {fragments})")


@handles("wgmma")
def _wgmma(writer: BlockWriter, instruction: Instruction) -> None:
    words = instruction.modifiers
    if words[0] == "fence":
        return
    if words[0] == "commit_group":
        writer.line("units.commit()")
        return
    if words[0] == "wait_group":
        writer.line(f"units.wait({int(instruction.operands[0], 0)})")
        return
    to, a, b, scale, *immediates = instruction.operands
    shape = next(word for word in words if re.fullmatch(r"m64n\d+k\d+", word))
    sums, kind, other = types_of(instruction)
    if sums != "f32" or kind != other or kind not in ("tf32", "f16", "bf16"):
        raise KernelError("the types of the product are not modelled")
    left = f"[{', '.join(map(writer.read, vector(a)))}]" if a.startswith("{") else writer.read(a, "u", 64)
    operands = f"{left}, {writer.read(b, 'u', 64)}, [{', '.join(map(writer.read, vector(to)))}]"
    flags = f"{writer.read(scale, 'u', 1)}, {[int(value, 0) for value in immediates]}"
    call = f"units.wgmma({shape!r}, {kind!r}, {operands}, {flags}, {writer.mask(instruction)}, {instruction.where!r})"
    writer.write_all(instruction, vector(to), call)
