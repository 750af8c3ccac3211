"""Parses PTX as Triton emits it and turns each basic block into a Python function over numpy arrays of all threads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

COMMENT = re.compile(r"//[^\n]*")
STATEMENT = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):|(?P<text>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
WIDTH = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "u32": 32, "u64": 64, "u16": 16}


@dataclass
class Instruction:
    op: str
    args: list[str]
    predicate: str | None  # "%p1" or "!%p1"
    text: str


@dataclass
class Kernel:
    """A parsed kernel. Basic blocks end before a label and after a branch, a barrier or a return."""

    name: str
    params: list[tuple[str, str, int]] = field(default_factory=list)  # name, type, bytes
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → index, bits
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # → block
    shared: dict[str, int] = field(default_factory=dict)  # symbol → offset
    static_shared: int = 0


def split_operands(text: str) -> list[str]:
    if not any(c in text for c in "{[("):
        return [part.strip() for part in text.split(",") if part.strip()]
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def parse(source: str) -> Kernel:
    """The one kernel of a module."""
    source = COMMENT.sub("", source)
    head = re.search(r"\.visible \.entry (\w+)\((.*?)\)", source, re.S)
    kernel = Kernel(head[1])
    for declaration in head[2].split(","):
        if words := declaration.split():
            kind = next(
                w[1:] for w in words[1:] if w[1:] in ("u64", "u32", "f32", "f64", "u16", "u8", "b8", "b64", "b32")
            )
            name, _, count = words[-1].partition("[")
            size = int(count.rstrip("]")) if count else int(kind[1:]) // 8
            kernel.params.append((name, kind, size))
    for match in re.finditer(r"\.shared (?:\.align (\d+) )?\.b8 (\w+)\[(\d*)\]", source):
        align = int(match[1] or 1)
        kernel.static_shared = -(-kernel.static_shared // align) * align
        kernel.shared[match[2]] = kernel.static_shared
        kernel.static_shared += int(match[3] or 0)
    body = source[source.index("{", head.end()) + 1 :]
    body = "\n".join(line for line in body.splitlines() if not line.lstrip().startswith((".loc", ".section", ".file")))
    block: list[Instruction] = []
    kernel.blocks.append(block)
    scopes: list[dict[str, str]] = []  # local names of inline assembly
    position = scope_count = 0

    def rename(text: str) -> str:
        for scope in scopes:
            for old, new in scope.items():
                text = re.sub(rf"(?<![\w%$.]){re.escape(old)}(?![\w])", new, text)
        return text

    while True:
        match = STATEMENT.match(body, position)
        position = match.end()
        if match["open"]:
            scope_count += 1
            # labels and registers declared up to the closing brace
            inside = body[
                position : body.index("\n}", position) if "\n}" in body[position:] else body.index("}", position)
            ]
            names = re.findall(r"^\s*(\w+):", inside, re.M)
            names += [n for d in re.findall(r"\.reg \.\w+\s+([^;<]+);", inside) for n in re.split(r"[,\s]+", d) if n]
            scopes.append({n: f"{n.lstrip('%')}__{scope_count}" for n in names})
        elif match["close"]:
            if not scopes:
                return kernel
            scopes.pop()
        elif match["label"]:
            if block:
                block = []
                kernel.blocks.append(block)
            kernel.labels[rename(match["label"])] = len(kernel.blocks) - 1
        else:
            text = rename(" ".join(match["text"].split()))
            if text.startswith(".reg"):
                _, kind, names = text.split(None, 2)
                for name in split_operands(names):
                    base, _, count = name.partition("<")
                    every = [f"{base}{i}" for i in range(int(count[:-1]))] if count else [base]
                    for n in every:
                        kernel.registers[n] = (len(kernel.registers), WIDTH[kind[1:]])
                continue
            if not text or text.startswith("."):
                continue
            predicate = None
            if text[0] == "@":
                predicate, text = text[1:].split(None, 1)
            op, _, rest = text.partition(" ")
            block.append(Instruction(op, split_operands(rest), predicate, text))
            if op.split(".")[0] in ("bra", "ret", "exit") or op.startswith(("bar.sync", "barrier.sync")):
                block = []
                kernel.blocks.append(block)


# ---------------------------------------------------------------------------------------------------------------------

NUMPY = {
    "u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2", "u32": "u4", "s32": "i4", "b32": "u4",
    "u64": "u8", "s64": "i8", "b64": "u8", "f32": "f4", "f64": "f8", "f16": "f2", "tf32": "f4",
}  # fmt: skip
BITS = {t: int(n[1:]) * 8 for t, n in NUMPY.items()} | {"bf16": 16, "pred": 1, "bf16x2": 32, "f16x2": 32}
COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


PARAMETER_BASE = 0x70000000  # address of kernel parameters that are passed by address


class UnknownError(NotImplementedError):
    """An instruction that the emulator does not know."""


class Generator:
    """Python source of the blocks of a kernel. `masked` blocks do not change the registers of inactive threads."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.constants: dict[tuple[int, str], int] = {}
        self.parameters = {name: i for i, (name, *_) in enumerate(kernel.params)}

    # operands

    def constant(self, value: int, dtype: str) -> str:
        value &= (1 << int(dtype[1]) * 8) - 1
        return f"K[{self.constants.setdefault((value, 'u' + dtype[1]), len(self.constants))}]"

    def bits(self, operand: str, bits: int, signed: bool = False) -> str:
        """An operand as an array of unsigned integers of `bits`."""
        u = f"u{bits // 8}"
        if operand.startswith("0f"):
            return self.constant(int(operand[2:], 16), u)
        if operand.startswith("0d"):
            return self.constant(int(operand[2:], 16), u)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return self.constant(int(operand.rstrip("U"), 0), u)
        if operand in self.kernel.shared:
            return self.constant(self.kernel.shared[operand], u)
        if operand in self.parameters:
            return self.constant(PARAMETER_BASE + 256 * self.parameters[operand], u)
        if operand in self.kernel.registers:
            index, width = self.kernel.registers[operand]
            if width == bits:
                return f"R[{index}]"
            if width == 1:
                return f"R[{index}].astype({u})"
            if width < bits and signed:
                return f"R[{index}].view(i{width // 8}).astype(i{bits // 8}).view({u})"
            return f"R[{index}].astype({u})"
        if operand.startswith("%"):
            return f"M.special[{operand!r}].astype({u})"
        raise UnknownError(f"operand {operand}")

    def value(self, operand: str, t: str) -> str:
        """An operand as an array of its type; halves as float32."""
        if t == "pred":
            if operand in ("0", "1"):
                return f"M.bools[{operand}]"
            if operand.startswith("!"):
                return f"~R[{self.kernel.registers[operand[1:]][0]}]"
            return f"R[{self.kernel.registers[operand][0]}]"
        expression = self.bits(operand, BITS[t], t[0] == "s")
        if t == "bf16":
            return f"from_bf16({expression})"
        if t == "f16":
            return f"{expression}.view(f2).astype(f4)"
        return expression if t[0] in "ub" else f"{expression}.view({NUMPY[t]})"

    def address(self, operand: str) -> tuple[str, int]:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        if not offset and re.search(r".-\d+$", base):
            base, _, offset = base.partition("-")
            offset = "-" + offset
        return base, int(offset or "0", 0)

    def store(self, operand: str, expression: str, t: str) -> str:
        """Assignment of a value of a type to a register."""
        if operand == "_":
            return expression
        index, width = self.kernel.registers[operand]
        u = f"u{width // 8}"
        if t == "pred":
            pass
        elif t == "bf16":
            expression = f"to_bf16({expression})"
        elif t == "f16":
            expression = f"({expression}).astype(f2).view(u2)"
        elif BITS[t] == width:
            expression = expression if t[0] in "ub" else f"({expression}).view({u})"
        elif t[0] == "s":
            expression = f"({expression}).astype(i{width // 8}).view({u})"
        else:
            expression = f"({expression}).astype({u})"
        if self.mask is None:
            return f"R[{index}] = {expression}"
        return f"R[{index}] = where({self.mask}, {expression}, R[{index}])"

    # blocks

    def block(self, number: int, masked: bool) -> str:
        lines = ["def block(M, R, K, m):"]
        for instruction in self.kernel.blocks[number]:
            self.mask = "m" if masked else None
            predicate = None
            if instruction.predicate:
                predicate = self.value(instruction.predicate, "pred")
                if not instruction.op.startswith("bra"):
                    lines.append(f"  e = {predicate} & m" if masked else f"  e = {predicate}")
                    self.mask = "e"
            if instruction.op.split(".")[0] in ("ld", "st", "cp", "ldmatrix", "stmatrix", "wgmma", "mbarrier", "shfl"):
                lines.append(f"  M.at = {instruction.text[:90]!r}")
            for line in self.instruction(instruction, predicate):
                lines.append("  " + line)
        lines.append("  return None")
        return "\n".join(lines)

    def instruction(self, i: Instruction, predicate: str | None) -> list[str]:
        root, *suffixes = i.op.split(".")
        handler = getattr(self, f"op_{root}", None)
        if handler is None:
            raise UnknownError(i.text)
        try:
            if root == "bra":
                return handler(i, predicate)
            made = handler(suffixes, i.args, i)
        except (KeyError, IndexError, StopIteration) as error:
            raise UnknownError(f"{i.text}: {error!r}") from error
        return [made] if isinstance(made, str) else made

    def op_bra(self, i: Instruction, predicate: str | None) -> list[str]:
        return [f"return ('bra', {self.kernel.labels[i.args[-1]]}, {predicate})"]

    def op_ret(self, *_):
        return f"return ('ret', {self.mask})"

    op_exit = op_ret

    def op_bar(self, suffixes, args, i):
        if suffixes[0] == "warp":
            return "pass"
        if args[0] != "0" or len(args) > 1:
            raise UnknownError(i.text)
        return "return ('bar',)"

    op_barrier = op_bar

    # arithmetic

    def floats(self, t, out, args, expression):
        """`expression` with {0}, {1}.. for the operands; 16-bit floats are computed in float32, pairs by halves."""
        if t.endswith("x2"):
            half, parts = t[:-2], []
            get = "from_bf16" if half == "bf16" else "from_f16"
            put = "to_bf16" if half == "bf16" else "to_f16"
            for which in ("low", "high"):
                parts.append(f"{put}({expression.format(*(f'{get}({which}({self.bits(a, 32)}))' for a in args))})")
            return self.store(out, f"pack({parts[0]}, {parts[1]})", "b32")
        return self.store(out, expression.format(*(self.value(a, t) for a in args)), t)

    def binary(self, symbol):
        def handler(suffixes, args, i):
            t = suffixes[-1]
            if "sat" in suffixes or "cc" in suffixes:
                raise UnknownError(i.text)
            if t in FLOATS:
                return self.floats(t, args[0], args[1:], f"({{0}} {symbol} {{1}})")
            return self.store(args[0], f"{self.value(args[1], t)} {symbol} {self.value(args[2], t)}", t)

        return handler

    def op_add(self, *a):
        return self.binary("+")(*a)

    def op_sub(self, *a):
        return self.binary("-")(*a)

    def op_and(self, *a):
        return self.binary("&")(*a)

    def op_or(self, *a):
        return self.binary("|")(*a)

    def op_xor(self, *a):
        return self.binary("^")(*a)

    def op_not(self, suffixes, args, i):
        return self.store(args[0], f"~{self.value(args[1], suffixes[-1])}", suffixes[-1])

    def op_neg(self, suffixes, args, i):
        return self.floats(suffixes[-1], args[0], args[1:], "-{0}")

    def op_abs(self, suffixes, args, i):
        return self.floats(suffixes[-1], args[0], args[1:], "np.abs({0})")

    def op_mul(self, suffixes, args, i):
        t = suffixes[-1]
        if t in FLOATS:
            return self.binary("*")(suffixes, args, i)
        a, b = self.value(args[1], t), self.value(args[2], t)
        if suffixes[0] == "lo":
            return self.store(args[0], f"{a} * {b}", t)
        if suffixes[0] == "hi":
            return self.store(args[0], f"mul_hi({a}, {b})", t)
        wide = f"{t[0]}{2 * BITS[t]}"
        return self.store(args[0], f"{a}.astype({NUMPY[wide]}) * {b}.astype({NUMPY[wide]})", wide)

    def op_mad(self, suffixes, args, i):
        t = suffixes[-1]
        if t in FLOATS:
            return self.op_fma(suffixes, args, i)
        a, b = self.value(args[1], t), self.value(args[2], t)
        if suffixes[0] == "wide":
            t = f"{t[0]}{2 * BITS[t]}"
            a, b = f"{a}.astype({NUMPY[t]})", f"{b}.astype({NUMPY[t]})"
        product = f"mul_hi({a}, {b})" if suffixes[0] == "hi" else f"{a} * {b}"
        return self.store(args[0], f"{product} + {self.value(args[3], t)}", t)

    def op_fma(self, suffixes, args, i):
        return self.floats(suffixes[-1], args[0], args[1:], "fma({0}, {1}, {2})")

    def op_div(self, suffixes, args, i):
        t = suffixes[-1]
        if t in FLOATS:
            return self.binary("/")(suffixes, args, i)
        f = "truncated_div" if t[0] == "s" else "np.floor_divide"
        return self.store(args[0], f"{f}({self.value(args[1], t)}, {self.value(args[2], t)})", t)

    def op_rem(self, suffixes, args, i):
        t = suffixes[-1]
        return self.store(args[0], f"np.fmod({self.value(args[1], t)}, {self.value(args[2], t)})", t)

    def extremum(self, name, suffixes, args):
        t = suffixes[-1]
        f = f"np.f{name[:3]}" if t in FLOATS and "NaN" not in suffixes else f"np.{name}"
        return self.floats(t, args[0], args[1:], f + "({0}, {1})")

    def op_min(self, suffixes, args, i):
        return self.extremum("minimum", suffixes, args)

    def op_max(self, suffixes, args, i):
        return self.extremum("maximum", suffixes, args)

    def op_shl(self, suffixes, args, i):
        t = "u" + suffixes[-1][1:]
        return self.store(args[0], f"{self.value(args[1], t)} << {self.value(args[2], 'u32')}.astype({NUMPY[t]})", t)

    def op_shr(self, suffixes, args, i):
        t = suffixes[-1]
        return self.store(args[0], f"{self.value(args[1], t)} >> {self.value(args[2], 'u32')}.astype({NUMPY[t]})", t)

    def op_shf(self, suffixes, args, i):
        low, high, by = (self.value(a, "u32") for a in args[1:])
        return self.store(args[0], f"funnel({low}, {high}, {by}, {suffixes[0]!r}, {suffixes[1]!r})", "u32")

    def op_bfe(self, suffixes, args, i):
        t = suffixes[-1]
        at, count = (self.value(a, "u32") for a in args[2:])
        return self.store(args[0], f"bit_field({self.value(args[1], t)}, {at}, {count})", t)

    def op_prmt(self, suffixes, args, i):
        a, b, c = (self.value(a, "u32") for a in args[1:])
        return self.store(args[0], f"permute_bytes({a}, {b}, {c})", "u32")

    def op_lop3(self, suffixes, args, i):
        a, b, c = (self.value(a, "u32") for a in args[1:4])
        return self.store(args[0], f"lop3({a}, {b}, {c}, {int(args[4], 0)})", "u32")

    def unary(self, f):
        return lambda suffixes, args, i: self.store(args[0], f"{f}({self.value(args[1], suffixes[-1])})", suffixes[-1])

    def op_sqrt(self, *a):
        return self.unary("np.sqrt")(*a)

    def op_rsqrt(self, *a):
        return self.unary("1 / np.sqrt")(*a)

    def op_rcp(self, *a):
        return self.unary("np.reciprocal")(*a)

    def op_ex2(self, *a):
        return self.unary("np.exp2")(*a)

    def op_lg2(self, *a):
        return self.unary("np.log2")(*a)

    # moves

    def op_mov(self, suffixes, args, i):
        t = suffixes[-1]
        if args[0].startswith("{"):  # unpack
            parts = args[0].strip("{} ").split(",")
            size = BITS[t] // len(parts)
            source = self.bits(args[1], BITS[t])
            lines = [f"t = {source}"]
            for k, part in enumerate(parts):
                lines.append(
                    self.store(
                        part.strip(), f"(t >> u{BITS[t] // 8}.type({k * size})).astype(u{size // 8})", f"b{size}"
                    )
                )
            return lines
        if args[1].startswith("{"):  # pack
            parts = [p.strip() for p in args[1].strip("{} ").split(",")]
            size = BITS[t] // len(parts)
            wide = f"u{BITS[t] // 8}"
            terms = [f"({self.bits(p, size)}.astype({wide}) << {wide}.type({k * size}))" for k, p in enumerate(parts)]
            return self.store(args[0], " | ".join(terms), t)
        if t == "pred":
            one = args[1] in ("-1", "1")
            known = args[1] in ("-1", "0", "1")
            return self.store(args[0], f"M.bools[{int(one)}]" if known else self.value(args[1], t), t)
        return self.store(args[0], self.bits(args[1], BITS[t]), f"b{BITS[t]}")

    def op_cvta(self, suffixes, args, i):
        if suffixes[0] == "param":
            return self.store(args[0], self.bits(args[1], 64), "b64")
        if args[1] in self.kernel.shared or "to" in suffixes:
            return self.store(args[0], self.bits(args[1], 64), "b64")
        raise UnknownError(i.text)

    def op_selp(self, suffixes, args, i):
        t = f"b{BITS[suffixes[-1]]}"
        a, b, p = self.value(args[1], t), self.value(args[2], t), self.value(args[3], "pred")
        return self.store(args[0], f"where({p}, {a}, {b})", t)

    def op_setp(self, suffixes, args, i):
        t, compare = suffixes[-1], suffixes[0]
        a, b = self.value(args[1], t), self.value(args[2], t)
        if compare in ("num", "nan"):
            expression = f"{'~' if compare == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
        elif compare in COMPARE:
            expression = f"({a} {COMPARE[compare]} {b})"
            if compare == "ne" and t in FLOATS:  # ordered
                expression = f"({expression} & ~np.isnan({a}) & ~np.isnan({b}))"
        else:
            if not compare.endswith("u") or t not in FLOATS:
                raise UnknownError(i.text)
            expression = f"({a} {COMPARE[compare[:-1]]} {b}) | np.isnan({a}) | np.isnan({b})"
        if len(suffixes) > 2 and suffixes[1] in ("and", "or", "xor"):
            symbol = {"and": "&", "or": "|", "xor": "^"}[suffixes[1]]
            expression = f"({expression}) {symbol} {self.value(args[3], 'pred')}"
        out, _, second = args[0].partition("|")
        if second:
            raise UnknownError(i.text)
        return self.store(out, expression, "pred")

    def op_cvt(self, suffixes, args, i):
        rounding = [s for s in suffixes if s in ("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi")]
        if any(s in ("sat", "satfinite", "rm", "rp") for s in suffixes):
            raise UnknownError(i.text)
        to, source = suffixes[-2], suffixes[-1]
        if to in ("bf16x2", "f16x2") and source == "f32":
            if rounding != ["rn"]:
                raise UnknownError(i.text)
            put = "to_bf16" if to == "bf16x2" else "to_f16"
            high, low = (f"{put}({self.value(a, 'f32')})" for a in args[1:3])
            return self.store(args[0], f"pack({low}, {high})", "b32")
        if to == "tf32":
            if rounding != ["rna"]:
                raise UnknownError(i.text)
            return self.store(args[0], f"to_tf32({self.bits(args[1], 32)})", "b32")
        value = self.value(args[1], source)
        if to in FLOATS:
            if to in ("bf16", "f16") and rounding != ["rn"] and source in FLOATS:
                raise UnknownError(i.text)
            if source not in FLOATS and to != "f64" and rounding != ["rn"]:
                raise UnknownError(i.text)
            return self.store(args[0], f"{value}.astype({NUMPY.get(to, 'f4') if to != 'f16' else 'f4'})", to)
        if source in FLOATS:
            f = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}[rounding[0]]
            return self.store(args[0], f"to_integer({f}({value}.astype(f8)), {NUMPY[to]})", to)
        return self.store(args[0], f"{value}.astype({NUMPY[to]})", to)

    # memory

    def vector(self, operand: str) -> list[str]:
        return [p.strip() for p in operand.strip("{} ").split(",")]

    def op_ld(self, suffixes, args, i):
        t = suffixes[-1]
        space = next((s.split("::")[0] for s in suffixes if s.split("::")[0] in ("global", "shared", "param")), None)
        parts = self.vector(args[0])
        if space == "param":
            base, offset = self.address(args[1])
            if base in self.parameters:
                return self.store(args[0], f"M.param({base!r}, {offset}, {NUMPY[t]})", t)
            return self.store(args[0], f"M.param_at({self.bits(base, 32)}, {offset}, {NUMPY[t]})", t)
        if space not in ("global", "shared"):
            raise UnknownError(i.text)
        base, offset = self.address(args[1])
        lines = [f"t = M.load_{space}({self.bits(base, 64)}, {offset}, {BITS[t] // 8}, {len(parts)}, {self.mask})"]
        u = f"b{BITS[t]}"
        for k, part in enumerate(parts):
            value = f"t[{k}]" if t[0] != "s" else f"t[{k}].view({NUMPY[t]})"
            lines.append(self.store(part, value, t if t[0] == "s" else u))
        return lines

    def op_st(self, suffixes, args, i):
        t = suffixes[-1]
        space = next((s.split("::")[0] for s in suffixes if s.split("::")[0] in ("global", "shared")), None)
        if space is None:
            raise UnknownError(i.text)
        base, offset = self.address(args[0])
        values = ", ".join(self.bits(p, BITS[t]) for p in self.vector(args[1]))
        return f"M.store_{space}({self.bits(base, 64)}, {offset}, {BITS[t] // 8}, [{values}], {self.mask})"

    def op_cp(self, suffixes, args, i):
        if suffixes[0] != "async":
            raise UnknownError(i.text)
        kind = suffixes[1]
        if kind == "bulk":
            return self.bulk(suffixes[2:], args, i)
        if kind == "commit_group":
            return f"M.commit({self.mask})"
        if kind == "wait_group":
            return f"M.wait({int(args[0])}, {self.mask})"
        if kind == "wait_all":
            return [f"M.commit({self.mask})", f"M.wait(0, {self.mask})"]
        if kind not in ("ca", "cg"):
            raise UnknownError(i.text)
        (to, to_offset), (source, offset) = self.address(args[0]), self.address(args[1])
        size = int(args[2], 0)
        length = self.bits(args[3], 32) if len(args) > 3 else self.constant(size, "u4")
        return (
            f"M.copy_async({self.bits(to, 64)}, {to_offset}, {self.bits(source, 64)}, {offset}, {size}, {length}, "
            f"{self.mask})"
        )

    def op_ldmatrix(self, suffixes, args, i):
        count = next(int(s[1:]) for s in suffixes if s in ("x1", "x2", "x4"))
        base, offset = self.address(args[1])
        if "m8n8" not in suffixes or suffixes[-1] != "b16":
            raise UnknownError(i.text)
        lines = [f"t = M.load_matrices({self.bits(base, 64)}, {offset}, {count}, {'trans' in suffixes}, {self.mask})"]
        return lines + [self.store(part, f"t[{k}]", "b32") for k, part in enumerate(self.vector(args[0]))]

    def op_stmatrix(self, suffixes, args, i):
        base, offset = self.address(args[0])
        if "m8n8" not in suffixes or suffixes[-1] != "b16":
            raise UnknownError(i.text)
        values = ", ".join(self.bits(p, 32) for p in self.vector(args[1]))
        return f"M.store_matrices({self.bits(base, 64)}, {offset}, [{values}], {'trans' in suffixes}, {self.mask})"

    # across the threads of a warp

    def op_mma(self, suffixes, args, i):
        shape = next(s for s in suffixes if re.fullmatch(r"m\d+n\d+k\d+", s))
        to, a_type, b_type, c_type = suffixes[-4:]
        if not shape.startswith("m16n8") or not (
            to == c_type == "f32" and a_type == b_type and suffixes[-6:-4] == ["row", "col"]
        ):
            raise UnknownError(i.text)
        regs = [[self.bits(r, 32) for r in self.vector(a)] for a in args[1:4]]
        lists = ", ".join(f"[{', '.join(r)}]" for r in regs)
        lines = [f"t = M.mma({shape!r}, {a_type!r}, {lists}, {self.mask})"]
        return lines + [self.store(part, f"t[{k}]", "b32") for k, part in enumerate(self.vector(args[0]))]

    def op_shfl(self, suffixes, args, i):
        out, _, ok = args[0].partition("|")
        a, b, c = (self.bits(x, 32) for x in args[1:4])
        lines = [f"t, ok = M.shuffle({suffixes[1]!r}, {a}, {b}, {c}, {self.mask})", self.store(out, "t", "b32")]
        return lines + ([self.store(ok, "ok", "pred")] if ok else [])

    def op_redux(self, suffixes, args, i):
        t = suffixes[-1]
        value = f"M.reduce({suffixes[1]!r}, {self.value(args[1], t)}, {self.mask})"
        return self.store(args[0], value, t)

    def op_vote(self, suffixes, args, i):
        value = f"M.vote({suffixes[1]!r}, {self.value(args[1], 'pred')}, {self.mask})"
        return self.store(args[0], value, "b32" if suffixes[1] == "ballot" else "pred")

    def op_elect(self, suffixes, args, i):
        out, _, chosen = args[0].partition("|")
        lines = [] if out == "_" else [self.store(out, self.constant(0, "u4"), "b32")]
        return [*lines, self.store(chosen, "M.lane == 0", "pred")]

    # Hopper

    def op_fence(self, suffixes, args, i):
        return f"M.fence({'.'.join(suffixes)!r}, {self.mask})"

    def op_membar(self, suffixes, args, i):
        return "pass"

    def op_griddepcontrol(self, suffixes, args, i):
        return "pass"

    def op_mbarrier(self, suffixes, args, i):
        kind = suffixes[0]
        if kind in ("init", "inval"):
            base, offset = self.address(args[0])
            count = self.bits(args[1], 32) if kind == "init" else "None"
            return f"M.barrier_{kind}({self.bits(base, 64)}, {offset}, {count}, {self.mask})"
        if kind == "arrive":
            if args[0] != "_":
                raise UnknownError(i.text)
            base, offset = self.address(args[1])
            expected = self.bits(args[2], 32) if "expect_tx" in suffixes else "None"
            return f"M.barrier_arrive({self.bits(base, 64)}, {offset}, {expected}, {self.mask})"
        if kind in ("try_wait", "test_wait"):
            base, offset = self.address(args[1])
            value = f"M.barrier_done({self.bits(base, 64)}, {offset}, {self.bits(args[2], 32)}, {self.mask})"
            return self.store(args[0], value, "pred")
        raise UnknownError(i.text)

    def bulk(self, suffixes, args, i):
        kind = suffixes[0]
        if kind == "commit_group":
            return f"M.bulk_commit({self.mask})"
        if kind == "wait_group":
            return f"M.bulk_wait({int(args[0])}, {'read' in suffixes}, {self.mask})"
        if kind != "tensor":
            raise UnknownError(i.text)
        if suffixes[2].startswith("shared"):
            to, to_offset = self.address(args[0])
            descriptor, coordinates = args[1].strip("[] ").split(",", 1)
            barrier, _ = self.address(args[2])
            where_to = f"{self.bits(to, 64)}, {self.bits(barrier, 64)}"
            load = True
        else:
            descriptor, coordinates = args[0].strip("[] ").split(",", 1)
            to, to_offset = self.address(args[1])
            where_to = f"{self.bits(to, 64)}, None"
            load = False
        at = ", ".join(f"{self.bits(c, 32)}.view(i4)" for c in self.vector(coordinates.strip()))
        return f"M.bulk_copy({load}, {self.bits(descriptor.strip(), 64)}, [{at}], {where_to}, {to_offset}, {self.mask})"

    def op_wgmma(self, suffixes, args, i):
        kind = suffixes[0]
        if kind in ("fence", "commit_group"):
            return f"M.wgmma_{kind}({self.mask})"
        if kind == "wait_group":
            return f"M.wgmma_wait(R, {int(args[0])}, {self.mask})"
        shape = next(s for s in suffixes if re.fullmatch(r"m\d+n\d+k\d+", s))
        a_type = suffixes[-2]
        out = self.vector(args[0])
        a = self.vector(args[1])
        a_regs = [self.bits(r, 32) for r in a] if args[1].startswith("{") else None
        a_text = f"[{', '.join(a_regs)}]" if a_regs else self.bits(args[1], 64)
        keeps = self.value(args[3], "pred")
        flags = [int(x) for x in args[4:]]
        indices = [self.kernel.registers[r][0] for r in out]
        b = self.bits(args[2], 64)
        return f"M.wgmma(R, {shape!r}, {a_type!r}, {indices}, {a_text}, {b}, {keeps}, {flags}, {self.mask})"

    def op_setmaxnreg(self, *_):
        return "pass"

    def op_trap(self, suffixes, args, i):
        return f"M.trap({self.mask})"
