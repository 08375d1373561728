# SPDX-License-Identifier: Apache-2.0
"""Every op in standard ONNX operators: with these functions a graph runs wherever ONNX runs.

`with_functions(model)` gives each node a model-local function for its attributes and inputs. Slow
and plain on purpose: experts are all computed, keys of all sequences are scored and masked. Letters
as in edgecascade/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from build_engine.graph import OPSET
from build_engine.onnx_body import Body
from edgecascade.nodes import BY_TYPE, DOMAIN
from edgecascade.ops import Activation
from edgecascade.tensors import BLOCK_BYTES, BLOCK_ROWS, GROUP_SIZE, PAGE_TOKENS, Codec

if TYPE_CHECKING:
    import onnx

Attributes = Mapping[str, Any]
WORDS = {Codec.U4_64: BLOCK_BYTES["u4_64"] // 4, Codec.I8_64: BLOCK_BYTES["i8_64"] // 4}
SCALE_WORDS = BLOCK_ROWS // 2  # two float16 scales in each
CODECS = {codec.ec_type: codec for codec in Codec}


def with_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each of our nodes calls a function that says what it means.

    Functions of one op differ by attributes and by which inputs are there, so they are numbered:
    EcLinear_0, EcLinear_1. Nothing else about a node changes.
    """
    from onnx import helper

    made = type(model)()
    made.CopyFrom(model)
    functions: dict[tuple[Any, ...], onnx.FunctionProto] = {}
    for node in made.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        key = (node.op_type, *sorted(attributes.items()))
        if key not in functions:
            functions[key] = _function(f"{node.op_type}_{len(functions)}", node.op_type, attributes)
        node.op_type = functions[key].name
    made.functions.extend(functions.values())
    return made


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph of `with_functions` as it was before."""
    made = type(model)()
    made.CopyFrom(model)
    del made.functions[:]
    for node in made.graph.node:
        node.op_type = node.op_type.partition("_")[0]
    return made


def _function(name: str, op_type: str, attributes: Attributes) -> onnx.FunctionProto:
    from onnx import helper

    spec = BY_TYPE[op_type]
    inputs = [port.name for port in spec.present(attributes)]
    outputs = [port.name + "_out" for port in spec.outputs]
    body = Body()
    results = DECOMPOSITIONS[spec.op.name](body, attributes)
    for result, output in zip(results, outputs, strict=True):
        body.give(result, output)
    return helper.make_function(
        DOMAIN,
        name,
        inputs,
        outputs,
        body.nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=list(attributes),
    )


def _embed(b: Body, a: Attributes) -> list[str]:
    table = b.Squeeze(matrices(b, a, "table"), [0])
    return [b.Gather(table, "tokens", axis=0)]


def _linear(b: Body, a: Attributes) -> list[str]:
    y = b.MatMul(norm(b, a, "x", a["w_k"]), _transposed(b, a, "w"))
    y = relu2(b, y) if a["act"] == Activation.RELU2 else y
    return [b.Add(y, "residual") if a["has_residual"] else y]


def _head(b: Body, a: Attributes) -> list[str]:
    rows = b.Gather("x", "out_row", axis=0)
    return [b.MatMul(norm(b, a, rows, a["w_k"]), _transposed(b, a, "w"))]


def _moe(b: Body, a: Attributes) -> list[str]:
    h = norm(b, a, "x", a["up_k"])
    weights = _route(b, a, h)  # [T, E], zero for experts that were not chosen
    up = relu2(b, b.MatMul(b.Unsqueeze(h, [0]), _transposed(b, a, "up")))  # [E, T, F]
    down = b.MatMul(up, _transposed(b, a, "down"))
    by_expert = b.Unsqueeze(b.Transpose(weights, perm=[1, 0]), [2])
    y = b.ReduceSum(b.Mul(down, by_expert), [0], keepdims=0)
    if a["has_shared_up"]:
        shared = relu2(b, b.MatMul(h, _transposed(b, a, "shared_up")))
        y = b.Add(y, b.MatMul(shared, _transposed(b, a, "shared_down")))
    return [b.Add(y, "x")]


def _route(b: Body, a: Attributes, h: str) -> str:
    """Weights [T, E] of DeepSeek-V3's router; TopK gives ties to the lower expert."""
    experts, groups = a["up_experts"], a["n_group"]
    scores = b.Sigmoid(b.MatMul(h, b.Transpose("router", perm=[1, 0])))
    choice = b.Add(scores, "bias")
    if groups > 1:
        grouped = b.Reshape(choice, [0, groups, experts // groups])
        best, _ = b.node("TopK", [grouped, [min(2, experts // groups)]], 2, {})
        allowed = _chosen(b, b.ReduceSum(best, [2], keepdims=0), a["topk_group"], groups)
        kept = b.Where(b.Unsqueeze(allowed, [2]), grouped, np.float32(-np.inf))
        choice = b.Reshape(kept, [0, experts])
    chosen = _chosen(b, choice, a["top_k"], experts)
    weights = b.Where(chosen, scores, 0.0)
    if a["normalize"]:
        weights = b.Div(weights, b.Add(b.ReduceSum(weights, [1]), 1e-20))
    return b.Mul(weights, float(a["scale"]))


def _chosen(b: Body, values: str, count: int, columns: int) -> str:
    """bool [T, columns]: the `count` largest of each row."""
    _, ids = b.node("TopK", [values, [count]], 2, {})
    hits = b.Equal(b.Unsqueeze(ids, [2]), np.arange(columns).reshape(1, 1, -1))
    return b.cast(b.ReduceMax(b.cast(hits, "int32"), [1], keepdims=0), "bool")


def _mamba(b: Body, a: Attributes) -> list[str]:
    heads, head_dim, groups, n = a["heads"], a["head_dim"], a["groups"], a["state"]
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * n
    parts = [inner, channels, heads]
    z, xbc, dt = b.node("Split", ["zxbcdt", parts], 3, {"axis": 1})
    owner, position = _places(b, xbc)
    convolved, conv = _convolve(b, a, xbc, owner, position)
    bias = b.Add(convolved, "conv_bias") if a["has_conv_bias"] else convolved
    x, *bc = b.node("Split", [silu(b, bias), [inner, groups * n, groups * n]], 3, {"axis": 1})
    x = b.Reshape(x, [0, heads, head_dim])
    per_head = np.arange(heads) // (heads // groups)
    bt, ct = (b.Gather(b.Reshape(m, [0, groups, n]), per_head, axis=1) for m in bc)
    dt = b.Softplus(b.Add(dt, "dt_bias"))
    ssm, y = _scan(b, a, b.Exp(b.Mul(dt, "a")), b.Mul(b.Unsqueeze(dt, [2]), x), bt, ct, owner)
    y = b.Add(y, b.Mul(b.Unsqueeze("d", [1]), x))
    return [b.Mul(b.Reshape(y, [0, inner]), silu(b, z)), conv, ssm]


def _places(b: Body, rows: str) -> tuple[str, str]:
    """For each row of the step: its sequence, and its position in it, int64 [T]."""
    count = b.Squeeze(b.dim(rows, 0), [0])
    row = b.Range(np.int64(0), count, np.int64(1))
    start = b.cast("start", "int64")
    ends = b.Slice(start, [1], [np.iinfo(np.int64).max], [0])
    over = b.GreaterOrEqual(b.Unsqueeze(row, [1]), b.Unsqueeze(ends, [0]))
    owner = b.ReduceSum(b.cast(over, "int64"), [1], keepdims=0)
    past = b.cast("past", "int64")
    held = b.Sub(b.Gather(past, owner), b.Gather(start, owner))
    return owner, b.Add(row, held)


def _convolve(b: Body, a: Attributes, xbc: str, owner: str, position: str) -> tuple[str, str]:
    """The causal convolution [T, C], and the ring with the last positions of each sequence.

    One table holds the step's rows and below them every row of every ring; a tap, or a row of the
    new ring, is the row of the position that it stands for.
    """
    kernel, channels = a["kernel"], a["heads"] * a["head_dim"] + 2 * a["groups"] * a["state"]
    table = b.Concat(xbc, b.Reshape("conv", [-1, channels]), axis=0)
    start, past, slot = (b.cast(name, "int64") for name in ("start", "past", "slot"))
    begin = b.Slice(start, [0], [-1], [0])
    end = b.Slice(start, [1], [np.iinfo(np.int64).max], [0])

    def row_of(sequence: dict[str, str], wanted: str) -> str:
        """Where the table holds a position of a sequence."""
        in_ring = b.Add(b.Mul(sequence["slot"], kernel), b.Mod(wanted, kernel))
        here = b.Add(b.Sub(wanted, sequence["past"]), sequence["start"])
        is_old = b.Less(wanted, sequence["past"])
        return b.Where(is_old, b.Add(in_ring, b.dim(xbc, 0)), here)

    each = {"slot": slot, "past": past, "start": begin}
    by_row = {name: b.Unsqueeze(b.Gather(value, owner), [1]) for name, value in each.items()}
    taps = b.Add(b.Unsqueeze(position, [1]), np.arange(kernel).reshape(1, -1) - kernel + 1)
    window = b.Gather(table, row_of(by_row, taps), axis=0)  # [T, K, C]
    convolved = b.ReduceSum(b.Mul(window, "conv_weight"), [1], keepdims=0)

    last = b.Unsqueeze(b.Sub(b.Add(past, b.Sub(end, begin)), 1), [1])
    ring = np.arange(kernel).reshape(1, -1)
    newest = b.Sub(last, b.Mod(b.Sub(last, ring), kernel))  # the last position of each ring row
    by_sequence = {name: b.Unsqueeze(value, [1]) for name, value in each.items()}
    rows = b.Gather(table, row_of(by_sequence, newest), axis=0)
    return convolved, b.ScatterND("conv", b.Unsqueeze(slot, [1]), rows)


def _scan(
    b: Body, a: Attributes, decay: str, dtx: str, bt: str, ct: str, owner: str
) -> tuple[str, str]:
    """S = decay S + dtx B^T and y = S C, token after token, in the slot of the token's sequence."""
    from onnx import TensorProto, helper

    dims = a["heads"], a["head_dim"], a["state"]
    slots = b.Squeeze(b.dim("ssm", 0), [0])
    slot = b.Unsqueeze(b.Gather(b.cast("slot", "int64"), owner), [1])
    mine = b.Equal(slot, b.Unsqueeze(b.Range(np.int64(0), slots, np.int64(1)), [0]))
    mask = b.Unsqueeze(mine, [2, 3, 4])  # [T, slots, 1, 1, 1]

    s = Body("scan_")
    before = s.ReduceSum(s.Where("at_mask", "at_ssm", 0.0), [0], keepdims=0)
    added = s.Mul(s.Unsqueeze("at_dtx", [2]), s.Unsqueeze("at_b", [1]))
    after = s.Add(s.Mul(s.Unsqueeze("at_decay", [1, 2]), before), added)
    s.give(s.Where("at_mask", s.Unsqueeze(after, [0]), "at_ssm"), "next_ssm")
    s.give(s.ReduceSum(s.Mul(after, s.Unsqueeze("at_c", [1])), [2], keepdims=0), "at_y")
    heads, head_dim, n = dims
    shapes: dict[str, list[Any]] = {
        "at_ssm": [None, *dims],
        "at_mask": [None, 1, 1, 1],
        "at_decay": [heads],
        "at_dtx": [heads, head_dim],
        "at_b": [heads, n],
        "at_c": [heads, n],
    }
    types = {"at_mask": TensorProto.BOOL}
    graph = helper.make_graph(
        s.nodes,
        "token",
        [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape)
            for name, shape in shapes.items()
        ],
        [
            helper.make_tensor_value_info("next_ssm", TensorProto.FLOAT, [None, *dims]),
            helper.make_tensor_value_info("at_y", TensorProto.FLOAT, [heads, head_dim]),
        ],
    )
    scanned = [mask, decay, dtx, bt, ct]
    ssm, y = b.node("Scan", ["ssm", *scanned], 2, {"body": graph, "num_scan_inputs": len(scanned)})
    return ssm, y


def _attention(b: Body, a: Attributes) -> list[str]:
    heads, groups, head_dim = a["heads"], a["kv_heads"], a["head_dim"]
    owner, position = _places(b, "qkv")
    split = b.Reshape("qkv", [0, heads + 2 * groups, head_dim])
    q, new = b.node("Split", [split, [heads, 2 * groups]], 2, {"axis": 1})
    kv_type = "float16" if a["kv_type"] == Codec.F16.ec_type else "float32"
    new = b.cast(b.Reshape(new, [0, 2, groups, head_dim]), kv_type)
    slot = b.cast("slot", "int64")
    table = b.Max(b.cast("page_table", "int64"), np.int64(0))  # -1: a page that nobody reads
    pages = b.Gather(table, slot, axis=0)  # [n_seq, max_pages]

    place = b.Concat(
        b.Unsqueeze(owner, [1]), b.Unsqueeze(b.Div(position, PAGE_TOKENS), [1]), axis=1
    )
    page = b.Unsqueeze(b.GatherND(pages, place), [1])
    offset = b.Unsqueeze(b.Mod(position, PAGE_TOKENS), [1])
    by_token = b.Transpose("kv", perm=[0, 3, 1, 2, 4])  # [pages, PAGE_TOKENS, 2, G, P]
    by_token = b.ScatterND(by_token, b.Concat(page, offset, axis=1), new)

    held = b.Reshape(b.Gather(by_token, pages, axis=0), [-1, 2, groups, head_dim])
    held = b.cast(b.Transpose(held, perm=[1, 2, 0, 3]), "float32")  # [2, G, n_seq L, P]
    k, v = (b.Squeeze(m, [0]) for m in b.node("Split", [held, [1, 1]], 2, {"axis": 0}))
    q = b.Reshape(q, [0, groups, heads // groups, head_dim])
    q = b.Transpose(q, perm=[1, 2, 0, 3])  # [G, H / G, T, P]
    k_t = b.Unsqueeze(b.Transpose(k, perm=[0, 2, 1]), [1])
    scores = b.Mul(b.MatMul(q, k_t), float(a["scale"]))

    every = b.Squeeze(b.dim(k, 1), [0])
    key = b.Range(np.int64(0), every, np.int64(1))
    length = b.Mul(b.dim("page_table", 1), PAGE_TOKENS)
    ours = b.Equal(b.Unsqueeze(owner, [1]), b.Unsqueeze(b.Div(key, length), [0]))
    known = b.LessOrEqual(b.Unsqueeze(b.Mod(key, length), [0]), b.Unsqueeze(position, [1]))
    scores = b.Where(b.And(ours, known), scores, np.float32(-np.inf))
    y = b.MatMul(b.Softmax(scores, axis=-1), b.Unsqueeze(v, [1]))
    y = b.Reshape(b.Transpose(y, perm=[2, 0, 1, 3]), [0, heads * head_dim])
    return [y, b.Transpose(by_token, perm=[0, 2, 3, 1, 4])]


def norm(b: Body, a: Attributes, x: str, columns: int) -> str:
    """gamma * x / sqrt(mean(x^2) + eps) over each group, or x where the node has no norm."""
    if not a["has_norm"]:
        return x
    groups = a["norm_groups"]
    parts = b.Reshape(x, [0, groups, columns // groups])
    mean = b.ReduceMean(b.Mul(parts, parts), [2])
    parts = b.Div(parts, b.Sqrt(b.Add(mean, float(a["norm_eps"]))))
    return b.Mul(b.Reshape(parts, [0, columns]), "norm")


def relu2(b: Body, x: str) -> str:
    """max(x, 0)^2."""
    positive = b.Relu(x)
    return b.Mul(positive, positive)


def silu(b: Body, x: str) -> str:
    """x * sigmoid(x)."""
    return b.Mul(x, b.Sigmoid(x))


def _transposed(b: Body, a: Attributes, port: str) -> str:
    """A weight for x @ w: float32 [k, n], or [experts, k, n] of several."""
    dense = b.Transpose(matrices(b, a, port), perm=[0, 2, 1])
    return dense if a[f"{port}_experts"] > 1 or port in ("up", "down") else b.Squeeze(dense, [0])


def matrices(b: Body, a: Attributes, port: str) -> str:
    """A weight port as float32 [experts, n, k]."""
    codec = CODECS[a[f"{port}_type"]]
    experts, n, k = (a[f"{port}_{part}"] for part in ("experts", "n", "k"))
    if not codec.is_block:
        values = b.Slice(port, [0], [n * k], [1])
        return b.cast(b.Reshape(values, [experts, n, k]), "float32")
    rows, columns = -(-n // BLOCK_ROWS), -(-k // GROUP_SIZE)
    words = b.Slice(port, [0], [rows * columns * WORDS[codec]], [1])
    words = b.cast(b.Reshape(words, [experts, rows, columns, WORDS[codec]]), "int64")
    words = b.Where(b.Less(words, np.int64(0)), b.Add(words, np.int64(1 << 32)), words)
    codes, scales = b.node(
        "Split", [words, [WORDS[codec] - SCALE_WORDS, SCALE_WORDS]], 2, {"axis": 3}
    )
    values = b.Reshape(_codes(b, codec, codes), [experts, rows * BLOCK_ROWS, columns, GROUP_SIZE])
    scale = b.Transpose(_halves(b, scales), perm=[0, 1, 3, 2])
    scale = b.Reshape(scale, [experts, rows * BLOCK_ROWS, columns, 1])
    padded = [experts, rows * BLOCK_ROWS, columns * GROUP_SIZE]
    dense = b.Reshape(b.Mul(b.cast(values, "float32"), scale), padded)
    return b.Slice(dense, [0, 0], [n, k], [1, 2])


def _codes(b: Body, codec: Codec, words: str) -> str:
    """Codes with their zero at 0, int64 [experts, row blocks, 32 rows, column blocks, j, column].

    Word (j, r) of a block holds row r; parts of a word are in the order of their columns.
    """
    if codec is Codec.U4_64:
        shifts = np.array([0, 8, 16, 24, 4, 12, 20, 28])  # low halves are columns 0..3
        bits = 4
    else:
        shifts, bits = np.array([0, 8, 16, 24]), 8
    parts = b.Mod(b.Div(b.Unsqueeze(words, [4]), 1 << shifts), np.int64(1 << bits))
    if codec is Codec.U4_64:
        codes = b.Sub(parts, np.int64(8))
    else:
        codes = b.Where(b.Less(parts, np.int64(128)), parts, b.Sub(parts, np.int64(256)))
    per_block = GROUP_SIZE // len(shifts)
    shape = [0, 0, 0, per_block, BLOCK_ROWS, len(shifts)]
    return b.Transpose(b.Reshape(codes, shape), perm=[0, 1, 4, 2, 3, 5])


def _halves(b: Body, words: str) -> str:
    """The float16 numbers in the halves of words: [..., 16] -> float32 [..., 32].

    Standard ONNX has no view of bits as a number; these are all finite.
    """
    bits = b.Mod(b.Div(b.Unsqueeze(words, [4]), np.array([1, 1 << 16])), np.int64(1 << 16))
    bits = b.Reshape(bits, [0, 0, 0, BLOCK_ROWS])
    exponent = b.Mod(b.Div(bits, np.int64(1 << 10)), np.int64(32))
    normal = b.cast(b.Less(np.int64(0), exponent), "int64")
    fraction = b.Add(b.Mod(bits, np.int64(1 << 10)), b.Mul(normal, np.int64(1 << 10)))
    unit = np.float32(2.0) ** (np.maximum(np.arange(32), 1) - 25).astype(np.float32)
    value = b.Mul(b.cast(fraction, "float32"), b.Gather(unit, exponent))
    return b.Where(b.Less(bits, np.int64(1 << 15)), value, b.Neg(value))


DECOMPOSITIONS: dict[str, Callable[[Body, Attributes], list[str]]] = {
    "embed": _embed,
    "linear": _linear,
    "mamba": _mamba,
    "attention": _attention,
    "moe": _moe,
    "head": _head,
}
