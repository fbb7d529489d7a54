"""Measures a training step of the same network in PyTorch, eager, block by block; see rounds.py.

Its input is random tensors that are there already: unlike TensorFlow's steps these
have no input pipeline beside them. Everything else of a step is done: forward pass with
local response normalization, loss with weight decay, gradients, update, moving averages
of the parameters, and the loss as a Python number.
"""

import argparse
import time

import rounds

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--batch_size', type=int, default=128)
parser.add_argument('--images', type=int, default=2560, help='images in a block')
parser.add_argument('--channels_last', action='store_true', help='memory format of images')


def build_network():
    def normalize():
        # PyTorch divides alpha by the number of neighbours.
        return nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)

    def pool():
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)  # TensorFlow's SAME.

    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2),
        nn.ReLU(),
        pool(),
        normalize(),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(),
        normalize(),
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
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    network = build_network().to(memory_format=layout)
    images = torch.randn(args.batch_size, 3, 24, 24).to(memory_format=layout)
    labels = torch.randint(10, [args.batch_size])

    parameters = dict(network.named_parameters())
    decayed = [parameters.pop('9.weight'), parameters.pop('11.weight')]
    optimizer = torch.optim.SGD(
        [{'params': decayed, 'weight_decay': 0.004}, {'params': parameters.values()}], lr=0.1
    )
    averages = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    criterion = nn.CrossEntropyLoss()

    def run(times):
        start = time.time()
        for _ in range(times):
            optimizer.zero_grad()
            loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            averages.update_parameters(network)
            loss.item()
        return time.time() - start

    def block():
        steps = max(1, args.images // args.batch_size)
        run(steps // 3 + 1)
        return {'ms': 1e3 * run(steps) / steps}

    run(15)
    rounds.serve(block, version=torch.__version__)


if __name__ == '__main__':
    main()
