"""A small net that learns handwritten digits, kept early and late in its training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from refitkit.errors import RefitError

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 7
TEST_SAMPLES = 450
PASSES = 6
"""Passes over the training digits."""
EARLY = 15
"""Batches after which the early checkpoint is taken: within the first pass."""
_BATCH = 64
_WIDTH = 32
_RATE = 1e-3


@dataclass(frozen=True)
class Digits:
    """8 x 8 pictures, float32 of shape (n, 1, 8, 8) from 0 to 1, and what they show, int64."""

    pictures: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """scikit-learn's digits, split for training and testing: the same split every time.

    Raises:
        RefitError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as exc:
        raise RefitError(
            f"The demo reads its digits from scikit-learn, which cannot be imported: {exc}.",
            hint="Install it: pip install 'refitkit[demo]'",
        ) from exc
    bunch = datasets.load_digits()
    split = model_selection.train_test_split(
        bunch.images,
        bunch.target,
        test_size=TEST_SAMPLES,
        stratify=bunch.target,
        random_state=SEED,
    )
    train, test, train_labels, test_labels = map(torch.as_tensor, split)
    return _digits(train, train_labels), _digits(test, test_labels)


def _digits(images: Tensor, labels: Tensor) -> Digits:
    brightest = 16  # of a pixel, in this data set
    return Digits(images.to(torch.float32).unsqueeze(1) / brightest, labels.to(torch.int64))


def make_net() -> nn.Sequential:
    """Three convolutions with batch norm, and a linear layer."""
    return nn.Sequential(
        *_block(1, _WIDTH),
        *_block(_WIDTH, 2 * _WIDTH),
        nn.MaxPool2d(2),
        *_block(2 * _WIDTH, 4 * _WIDTH),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * _WIDTH * 2 * 2, 10),
    )


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def train(digits: Digits) -> tuple[nn.Module, nn.Module]:
    """Train one net; returns copies of it, early and late, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE)
        early = None
        for number, batch in enumerate(_batches(digits), start=1):
            loss = nn.functional.cross_entropy(net(batch.pictures), batch.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if number == EARLY:
                early = copy.deepcopy(net).eval()
    return early or net, net.eval()


def _batches(digits: Digits) -> Iterator[Digits]:
    for _ in range(PASSES):
        order = torch.randperm(len(digits.labels))
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            yield Digits(digits.pictures[some], digits.labels[some])
