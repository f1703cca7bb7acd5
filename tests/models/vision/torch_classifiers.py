"""The image classifiers in plain torch, channels first, and their weights by our paths.

Submodules have the names of ours where a path needs them; what is computed is written anew.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

NAMES = {
    "weight": "kernel",
    "running_mean": "mean",
    "running_var": "variance",
    "in_proj_weight": "kernel",
    "in_proj_bias": "bias",
}


def by_our_paths(named):
    """`{path: array}` of torch's `(name, tensor)` pairs, kernels transposed to ours."""
    arrays = {}
    for name, tensor in named:
        if name.endswith("num_batches_tracked"):
            continue
        owner, _, leaf = name.rpartition(".")
        path = owner.replace(".", "/")
        for theirs, ours in TRANSFORMER_PATHS.items():
            path = path.replace(theirs, ours)
        if leaf.startswith("in_proj"):
            path = path.replace("mixed", "query_key_value")
        array = tensor.detach().numpy()
        ours = NAMES.get(leaf, leaf)
        if ours == "kernel" and array.ndim == 1:
            ours = "scale"
        elif array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif ours == "kernel":
            array = array.T
        arrays[f"{path}/{ours}"] = np.array(array)
    return arrays


TRANSFORMER_PATHS = {
    "self_attn/out_proj": "mixed",
    "self_attn": "mixed",
    "linear1": "expand",
    "linear2": "contract",
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
}


def randomise(model, seed=0):
    """Weights and statistics away from where training starts, of a scale that deep models bear.

    The shifts of batch norm are +-3.5 scales in turn, so that hardly any ReLU reads a number so close
    to zero that rounding decides on the gradient.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, mean, deviation):
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for parameter in model.parameters():
            deviation = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.2
            normal(parameter, 0, deviation)
        model.head.weight *= 0.1
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                normal(module.weight, 1, 0.2)
            elif isinstance(module, nn.BatchNorm2d):
                signs = 1 - 2 * (torch.arange(module.num_features) % 2)
                normal(module.weight, 0.5, 0.1)
                module.bias.copy_(3.5 * signs * module.weight)
                normal(module.running_mean, 0, 0.2)
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model


class Classifier(nn.Module):
    def __init__(self, body, width, classes, bias=True):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes, bias=bias)

    def forward(self, images):
        return self.head(self.body(images))


class Dense(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        sizes = (inputs, *hidden)
        self.layers = nn.ModuleList(nn.Linear(*sizes[i : i + 2]) for i in range(len(hidden)))

    def forward(self, images):
        features = images.movedim(1, 3).flatten(1) if images.ndim == 4 else images
        for layer in self.layers:
            features = functional.relu(layer(features))
        return features


class SmallCnn(nn.Module):
    def __init__(self, side, channels, hidden):
        super().__init__()
        sizes = (3, *channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*sizes[i : i + 2], 3, padding=1) for i in range(len(channels))
        )
        self.dense = Dense((side // 2 ** len(channels)) ** 2 * sizes[-1], hidden)

    def forward(self, images):
        for convolution in self.convolutions:
            images = functional.max_pool2d(functional.relu(convolution(images)), 2)
        return self.dense(images)


def plain(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class PaddedShortcut(nn.Module):
    def __init__(self, new):
        super().__init__()
        self.new = new

    def forward(self, images):
        return functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new))


class NormedShortcut(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.convolution, self.norm = plain(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, images):
        return self.norm(self.convolution(images))


class PlainShortcut(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.convolution = plain(inputs, outputs, 1, stride)

    def forward(self, images):
        return self.convolution(images)


class BasicV1(nn.Module):
    def __init__(self, inputs, width, stride, padded=False):
        super().__init__()
        self.convolutions = nn.ModuleList([plain(inputs, width, 3, stride), plain(width, width, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.shortcut = None
        if inputs != width or stride > 1:
            new = width - inputs
            self.shortcut = PaddedShortcut(new) if padded else NormedShortcut(inputs, width, stride)

    def forward(self, x):
        y = functional.relu(self.norms[0](self.convolutions[0](x)))
        y = self.norms[1](self.convolutions[1](y))
        return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class BottleneckV1(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.convolutions = nn.ModuleList(
            [plain(inputs, width, 1), plain(width, width, 3, stride), plain(width, 4 * width, 1)]
        )
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (width, width, 4 * width)))
        self.shortcut = None
        if inputs != 4 * width or stride > 1:
            self.shortcut = NormedShortcut(inputs, 4 * width, stride)

    def forward(self, x):
        y = functional.relu(self.norms[0](self.convolutions[0](x)))
        y = functional.relu(self.norms[1](self.convolutions[1](y)))
        y = self.norms[2](self.convolutions[2](y))
        return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class BasicV2(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(width)])
        self.convolutions = nn.ModuleList([plain(inputs, width, 3, stride), plain(width, width, 3)])
        self.shortcut = None
        if inputs != width or stride > 1:
            self.shortcut = PlainShortcut(inputs, width, stride)

    def forward(self, x):
        active = functional.relu(self.norms[0](x))
        y = self.convolutions[0](active)
        y = self.convolutions[1](functional.relu(self.norms[1](y)))
        return y + (x if self.shortcut is None else self.shortcut(active))


class BottleneckV2(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (inputs, width, width)))
        self.convolutions = nn.ModuleList(
            [plain(inputs, width, 1), plain(width, width, 3, stride), plain(width, 4 * width, 1)]
        )
        self.shortcut = None
        if inputs != 4 * width or stride > 1:
            self.shortcut = PlainShortcut(inputs, 4 * width, stride)

    def forward(self, x):
        active = functional.relu(self.norms[0](x))
        y = self.convolutions[0](active)
        y = self.convolutions[1](functional.relu(self.norms[1](y)))
        y = self.convolutions[2](functional.relu(self.norms[2](y)))
        return y + (x if self.shortcut is None else self.shortcut(active))


class ResNet(nn.Module):
    """`block(inputs, width, stride)` with `expansion * width` outputs."""

    def __init__(self, block, expansion, stem_width, counts, widths, *, preactivated, imagenet):
        super().__init__()
        self.stem = plain(3, stem_width, 7, 2) if imagenet else plain(3, stem_width, 3)
        blocks, before = [], stem_width
        for stage, (count, width) in enumerate(zip(counts, widths, strict=True)):
            for index in range(count):
                blocks.append(block(before, width, 2 if stage and not index else 1))
                before = expansion * width
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(before if preactivated else stem_width)
        self.preactivated, self.imagenet = preactivated, imagenet

    def forward(self, x):
        x = self.stem(x)
        if not self.preactivated:
            x = functional.relu(self.norm(x))
        if self.imagenet:
            x = functional.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        if self.preactivated:
            x = functional.relu(self.norm(x))
        return functional.adaptive_avg_pool2d(x, 1).flatten(1)


class Transformer(nn.Module):
    """Torch's own encoder layers."""

    def __init__(self, side, patch, width, depth, heads, ratio):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                heads,
                ratio * width,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(x), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)[:, 0]
