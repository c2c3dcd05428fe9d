"""State, control flow, regions, dead code, and inputs and outputs of all shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._higher_order_ops.scan import scan

from scripts.zoo.entry import F32, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = ((3, 8),)


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, make, inputs in _modules():
        yield Entry(f"nn/{name}", make, inputs)
    yield from _with_state()
    yield from _with_other_inputs()


def _modules() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    yield "dead heads", DeadHeads, X
    yield "branches", lambda: Running(_branches), X
    yield "loop", lambda: Running(_loop), X
    yield "scan", lambda: Running(_scan), X
    yield "region without gradients", lambda: Running(_no_grad), X
    yield "nested regions", lambda: Running(_nested), X
    yield "lstm cell in a loop", LSTMLoop, X
    yield "mixture of experts, top 2", Experts, ((5, 8),)
    yield "selective state space", StateSpace, ((2, 6, 8),)
    yield "quantized weight", Quantized, X
    yield "weights as views", Views, X
    yield "head tied by transposition", TransposedHead, X
    yield "buffers that no state_dict holds", NotSaved, X
    yield "several outputs", Several, X
    yield "normalized weight in float64", Double, X


def _with_state() -> Iterator[Entry]:
    steps = {
        "values": lambda kind: (torch.randn(1, 8).to(kind), torch.tensor([0])),
        "others": lambda kind: [(torch.randn(1, 8).to(kind), torch.tensor([n])) for n in (1, 2)],
        "stateful": True,
    }
    yield Entry("nn/cache that no state_dict holds", lambda: Cache(kept=False), (), F32, **steps)
    yield Entry("nn/cache in the state_dict", lambda: Cache(kept=True), (), F32, **steps)
    rows = {"others": lambda kind: [(torch.randn(3, 8).to(kind),)], "stateful": True}
    yield Entry("nn/batch norm in training", Training, X, F32, **rows)
    yield Entry("nn/counter and average", Counter, X, F32, **rows)


def _with_other_inputs() -> Iterator[Entry]:
    batch = torch.export.Dim("batch", min=2, max=9)
    yield Entry(
        "nn/dict of inputs, dynamic batch",
        Tree,
        (),
        values=lambda kind: ({"a": torch.randn(3, 8).to(kind), "b": [torch.randn(3, 8).to(kind)]},),
        others=lambda kind: [
            ({"a": torch.randn(5, 8).to(kind), "b": [torch.randn(5, 8).to(kind)]},)
        ],
        dynamic={"tree": {"a": {0: batch}, "b": [{0: batch}]}},
    )
    length = torch.export.Dim("length", min=2, max=31)
    yield Entry(
        "nn/causal mask, dynamic length",
        Causal,
        ((2, 5, 8),),
        others=lambda kind: [(torch.randn(2, 9, 8).to(kind),)],
        dynamic=({1: length},),
    )
    yield Entry("nn/transformer with masks", Masked, ((2, 5, 8),))
    for mode in ("sum", "mean", "max"):
        yield Entry(
            f"nn/embedding bag with offsets, {mode}",
            lambda mode=mode: Bags(mode),
            (),
            values=lambda _: (torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]), torch.tensor([0, 3, 5])),
        )
    yield Entry("nn/gru of a packed batch", GRU, ((3, 4, 8),), F32)
    yield Entry("nn/multilayer perceptron, strict", lambda: Running(_no_grad), X, F32, strict=True)


class Running(nn.Module):
    """Two layers; how they are run is for a function to say."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def _branches(m: Any, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: m.a(x).relu(), lambda x: m.b(m.a(x)), (x,))


def _loop(m: Any, x: torch.Tensor) -> Any:
    return torch.while_loop(
        lambda i, _: i < 3, lambda i, y: (i + 1, m.b(m.a(y).tanh())), (torch.tensor(0), x.clone())
    )[1]


def _scan(m: Any, x: torch.Tensor) -> Any:
    return scan(lambda c, row: (torch.tanh(m.a(c) + row), m.b(c)), torch.zeros(8), x)


def _no_grad(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        scale = m.a(x).sigmoid()
    return m.b(x) * scale


def _nested(m: Any, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
        with torch.no_grad():
            z = m.b(x)
    return y.float() + z.float()


class DeadHeads(nn.Module):
    """Heads that work in place and whose results nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.pooler = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8))
        self.other = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        self.pooler(hidden)
        with torch.no_grad():
            self.other(hidden).mul_(2.0)
        return hidden + torch.zeros_like(self.other.weight).sum()


class LSTMLoop(nn.Module):
    """A cell that is called for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        state = x.new_zeros(1, 4), x.new_zeros(1, 4)
        outs = []
        for row in x:
            state = self.cell(row[None], state)
            outs.append(state[0])
        return torch.cat(outs), state


class Experts(nn.Module):
    """Each token goes to two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 8, 16) / 3)
        self.down = nn.Parameter(torch.randn(4, 16, 8) / 4)

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.gate(x)
        weights, chosen = torch.topk(logits.softmax(-1), 2)
        up, down = self.up[chosen], self.down[chosen]
        made = torch.einsum("nd,nkdh->nkh", x, up).relu()
        made = torch.einsum("nkh,nkhd->nkd", made, down)
        return (made * weights[..., None]).sum(1), {"logits": logits}


class StateSpace(nn.Module):
    """A selective scan, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.randn(8, 4))
        self.skip = nn.Parameter(torch.randn(8))
        self.project = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta, b, c = self.project(x).split([8, 4, 4], dim=-1)
        delta = nn.functional.softplus(delta)
        state, outs = x.new_zeros(x.shape[0], 8, 4), []
        for t in range(x.shape[1]):
            decay = torch.exp(-delta[:, t, :, None] * self.log_a.exp())
            state = state * decay + delta[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
            outs.append((state * c[:, t, None]).sum(-1) + self.skip * x[:, t])
        return torch.stack(outs, 1)


class Quantized(nn.Module):
    """A weight of int8 with a scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 127, (8, 8)).to(torch.int8))
        self.register_buffer("scale", torch.rand(8, 1) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes.to(x.dtype) * self.scale).t()


class Views(nn.Module):
    """Parameters that are views of one flat tensor, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(8 * 8 + 8 + 8 * 4)
        self.weight = nn.Parameter(flat[:64].view(8, 8).t())
        self.bias = nn.Parameter(flat[64:72])
        self.out = nn.Parameter(flat[72:].view(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight + self.bias) @ self.out.t()


class TransposedHead(nn.Module):
    """A decoder that uses its encoder's weight the other way round, and one of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.decoder = nn.Linear(4, 8)
        self.decoder.weight = nn.Parameter(self.encoder.weight.t())
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x).tanh()) * self.scale


class NotSaved(nn.Module):
    """Buffers that no state_dict holds: a mask, positions, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mask", torch.arange(8) % 2 == 0, persistent=False)
        self.register_buffer("positions", torch.arange(8.0) / 8, persistent=False)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + self.positions).masked_fill(self.mask, 0.25) * self.scale


class Several(nn.Module):
    """Outputs in a tree, with a number, with nothing, and one that is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        best = y.argmax(-1)
        loss = nn.functional.cross_entropy(y, torch.tensor([0, 2, 1]))
        return {"loss": loss, "all": (y, [y, None, 3]), "best": best, "sure": y.softmax(-1) > 0.5}


class Double(nn.Module):
    """A weight that is normalized in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("shift", torch.randn(8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.double()
        return x.double() @ (weight / weight.norm(dim=0)) + self.shift


class Cache(nn.Module):
    """Attention to what earlier calls have written."""

    def __init__(self, *, kept: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("keys", torch.zeros(4, 8), persistent=kept)
        self.register_buffer("values", torch.zeros(4, 8), persistent=kept)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(0, at, self.k(x))
        self.values.index_copy_(0, at, self.v(x))
        return torch.softmax(self.q(x) @ self.keys.t(), -1) @ self.values


class Training(nn.Module):
    """Batch norm that counts and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def train(self, mode: bool = True) -> Training:  # noqa: ARG002, FBT001, FBT002 - the base's
        """It stays in training."""
        return super().train(True)  # noqa: FBT003

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class Counter(nn.Module):
    """A number of calls and a moving average, both in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        self.calls.add_(1)
        self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.average / self.calls


class Tree(nn.Module):
    """A tree of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, tree: dict[str, Any]) -> dict[str, Any]:
        return {"sum": self.a(tree["a"]) + self.b(tree["b"][0]), "rows": tree["a"].shape[0]}


class Causal(nn.Module):
    """Attention with a causal mask from a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("mask", torch.ones(32, 32).tril().bool(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        n = x.shape[1]
        scores = (q @ k.transpose(1, 2)).masked_fill(~self.mask[:n, :n], float("-inf"))
        return torch.softmax(scores, -1) @ v


class Masked(nn.Module):
    """A decoder layer with masks of padding and of the future."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.register_buffer("padding", torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        future = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).isinf()
        found: torch.Tensor = self.net(
            x, x.tanh(), tgt_mask=future, memory_key_padding_mask=self.padding
        )
        return found


class Bags(nn.Module):
    """Bags of words of several lengths."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 8, mode=mode)
        self.head = nn.Linear(8, 2)

    def forward(self, words: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.bag(words, offsets))
        return found


class GRU(nn.Module):
    """Two layers in both directions, from a learned first state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 4, 2, batch_first=True, bidirectional=True)
        self.start = nn.Parameter(torch.randn(4, 1, 4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.gru(x, self.start.expand(4, x.shape[0], 4).contiguous())
