"""Our networks in torch, written from their description: for parity tests and paired benchmarks."""

from __future__ import annotations

from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


def badnets(channels: int, size: int) -> nn.Module:
    """`badnets_cnn`, by the names of the published checkpoints."""
    side = ((size - 4) // 2 - 4) // 2
    net: Any = nn.Sequential()
    net.conv1 = nn.Sequential(nn.Conv2d(channels, 16, 5), nn.ReLU(), nn.AvgPool2d(2))
    net.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    net.fc1 = nn.Sequential(nn.Linear(32 * side**2, 512), nn.ReLU())
    net.fc2 = nn.Sequential(nn.Linear(512, 10))
    return net


def digits(channels: int = 1, size: int = 8) -> nn.Module:
    """`digits_cnn`, whose hidden layer reads channels last."""
    net: Any = nn.Sequential()
    net.conv1, net.norm1, net.relu1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    net.conv2, net.norm2, net.relu2 = nn.Conv2d(16, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    net.pool, net.flat = nn.MaxPool2d(2), _ChannelsLast()
    net.hidden, net.relu3, net.output = nn.Linear(32 * (size // 2) ** 2, 96), nn.ReLU(), nn.Linear(96, 10)
    return net


class _ChannelsLast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def _block(c_in: int, c_out: int, stride: int, kind: str) -> nn.Module:
    pre = kind != "resnet"
    block: Any = nn.Module()
    block.bn1 = nn.BatchNorm2d(c_in if pre else c_out)
    block.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
    block.bn2 = nn.BatchNorm2d(c_out)
    block.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
    shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if pre and c_in != c_out else None
    if kind == "wrn" and shortcut:
        block.convShortcut = shortcut
    elif shortcut:
        block.shortcut = nn.Sequential(shortcut)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if pre:
            y = block.bn1(x).relu()
            z = block.conv2(block.bn2(block.conv1(y)).relu())
            return z + (shortcut(y) if shortcut else x)
        z = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        if c_in != c_out:
            x = torch.zeros_like(z).index_copy(1, torch.arange(c_in) + (c_out - c_in) // 2, x[:, :, ::2, ::2])
        return (z + x).relu()

    block.forward = forward
    return block


def residual(kind: str, features: tuple[int, ...], num_blocks: int, channels: int) -> nn.Module:
    """ "resnet", "preact" or "wrn", by the names of akamaster, BackdoorBench and ABL.

    Modules hold closures over each other, so a copy of one still runs the original.
    """
    net: Any = nn.Module()
    stem = 64 if kind == "preact" else 16
    net.conv1 = nn.Conv2d(channels, stem, 3, 1, 1, bias=False)
    stages, c_in = [], stem
    for index, c_out in enumerate(features, 1):
        blocks = []
        for b in range(num_blocks):
            blocks.append(_block(c_in, c_out, 2 if index > 1 and b == 0 else 1, kind))
            c_in = c_out
        stages.append(nn.Sequential(*blocks))
        holder: Any = stages[-1]
        if kind == "wrn":
            holder = nn.Module()
            holder.layer = stages[-1]
        net.add_module(f"{'block' if kind == 'wrn' else 'layer'}{index}", holder)
    if kind != "preact":
        net.bn1 = nn.BatchNorm2d(stem if kind == "resnet" else c_in)
    net.add_module("fc" if kind == "wrn" else "linear", nn.Linear(c_in, 10))

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = net.conv1(x)
        x = net.bn1(x).relu() if kind == "resnet" else x
        for stage in stages:
            x = stage(x)
        x = net.bn1(x).relu() if kind == "wrn" else x
        return (net.fc if kind == "wrn" else net.linear)(x.mean((2, 3)))

    net.forward = forward
    return net
