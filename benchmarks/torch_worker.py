"""Measures a training step of the same network in PyTorch, block by block; see rounds.py.

Written for speed on a CPU: images are channels last; local response normalization is the product
with a band matrix, as in cifar10.py, because nn.LocalResponseNorm is slow; optimizer and averages
update all parameters in one call (`foreach`). torch.compile was slower.

The images are random and in memory: unlike TensorFlow's steps, these have no input pipeline beside
them. Everything else is done: forward pass, loss with weight decay, gradients, update, moving
averages, and the loss as a Python number.
"""

import argparse
import contextlib
import time

import rounds

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--batch_size', type=int, default=128)
parser.add_argument('--images', type=int, default=2560, help='images in a block')
parser.add_argument('--bfloat16', action='store_true', help='autocast to bfloat16')


class Normalization(nn.Module):
    """[n, c, h, w], channels last: x / (1 + alpha * sum of squares over 9 channels) ** 0.75."""

    def __init__(self, channels, radius=4, alpha=0.001 / 9):
        super().__init__()
        band = torch.ones(channels, channels).tril(radius).triu(-radius)
        self.register_buffer('band', alpha * band)
        self.register_buffer('bias', torch.ones(channels))

    def forward(self, x):
        pixels = x.permute(0, 2, 3, 1)  # A view.
        root = torch.addmm(self.bias, pixels.square().flatten(0, 2), self.band).rsqrt()
        return x * (root * root.sqrt()).view(pixels.shape).permute(0, 3, 1, 2)


def build_network():
    def pool():
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)  # TensorFlow's SAME.

    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2),
        nn.ReLU(),
        pool(),
        Normalization(64),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(),
        Normalization(64),
        pool(),
        nn.Flatten(),
        nn.Linear(2304, 384),
        nn.ReLU(),
        nn.Linear(384, 192),
        nn.ReLU(),
        nn.Linear(192, 10),
    )


def main():
    args = parser.parse_args()
    network = build_network().to(memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, 3, 24, 24).to(memory_format=torch.channels_last)
    labels = torch.randint(10, [args.batch_size])

    parameters = dict(network.named_parameters())
    decayed = [parameters.pop('9.weight'), parameters.pop('11.weight')]
    optimizer = torch.optim.SGD(
        [{'params': decayed, 'weight_decay': 0.004}, {'params': parameters.values()}],
        lr=0.1,
        foreach=True,
    )
    averages = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))  # Uses foreach.
    criterion = nn.CrossEntropyLoss()
    precision = contextlib.nullcontext()
    if args.bfloat16:
        precision = torch.autocast('cpu', torch.bfloat16)

    def run(times):
        start = time.perf_counter()
        for _ in range(times):
            optimizer.zero_grad()
            with precision:
                loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            averages.update_parameters(network)
            loss.item()
        return time.perf_counter() - start

    def block():
        steps = max(1, args.images // args.batch_size)
        run(steps // 3 + 1)
        return {'ms': 1e3 * run(steps) / steps}

    run(15)
    rounds.serve(block, version=torch.__version__)


if __name__ == '__main__':
    main()
