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


class _Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, kind: str):
        super().__init__()
        self.pre = kind != "resnet"
        self.bn1 = nn.BatchNorm2d(c_in if self.pre else c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.widened = c_out - c_in
        self.shortcut_name = "convShortcut" if kind == "wrn" else "shortcut"
        if self.pre and self.widened:
            shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.add_module(self.shortcut_name, shortcut if kind == "wrn" else nn.Sequential(shortcut))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre:
            y = self.bn1(x).relu()
            z = self.conv2(self.bn2(self.conv1(y)).relu())
            return z + (self.get_submodule(self.shortcut_name)(y) if self.widened else x)
        z = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.widened:
            channels = torch.arange(x.shape[1], device=x.device) + self.widened // 2
            x = torch.zeros_like(z).index_copy(1, channels, x[:, :, ::2, ::2])
        return (z + x).relu()


class Residual(nn.Module):
    """ "resnet", "preact" or "wrn", by the names of akamaster, BackdoorBench and ABL."""

    def __init__(self, kind: str, features: tuple[int, ...], num_blocks: int, channels: int):
        super().__init__()
        self.kind, c_in = kind, 64 if kind == "preact" else 16
        self.conv1 = nn.Conv2d(channels, c_in, 3, 1, 1, bias=False)
        stem, self.stages = c_in, []
        for index, c_out in enumerate(features, 1):
            strides = [2 if index > 1 and b == 0 else 1 for b in range(num_blocks)]
            sizes = [c_in, *[c_out] * num_blocks]
            blocks = nn.Sequential(
                *(_Block(a, b, s, kind) for a, b, s in zip(sizes[:-1], sizes[1:], strides, strict=True))
            )
            self.stages.append(f"block{index}.layer" if kind == "wrn" else f"layer{index}")
            holder: Any = nn.Module()
            holder.layer = blocks
            self.add_module(self.stages[-1].partition(".")[0], holder if kind == "wrn" else blocks)
            c_in = c_out
        if kind != "preact":
            self.bn1 = nn.BatchNorm2d(stem if kind == "resnet" else c_in)
        self.head = "fc" if kind == "wrn" else "linear"
        self.add_module(self.head, nn.Linear(c_in, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.bn1(x).relu() if self.kind == "resnet" else x
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        x = self.bn1(x).relu() if self.kind == "wrn" else x
        return self.get_submodule(self.head)(x.mean((2, 3)))
