"""Networks written for PyTorch from the papers and the public key layouts, independently of ours."""

import torch
from torch import nn


def randomised(net: nn.Module) -> nn.Module:
    """Weights that keep activations of order 1, and BatchNorm statistics that no initialisation has."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (1.7 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval()


class Vgg(nn.Module):
    """torchvision's names, or timm's: there the dense layers are convolutions."""

    def __init__(self, convs, width, hidden, classes, *, norm=False, timm=False):
        super().__init__()
        layers, channels = [], 3
        for stage, count in enumerate(convs):
            for _ in range(count):
                features = width * min(2**stage, 8)
                layers += [nn.Conv2d(channels, features, 3, padding=1), *([nn.BatchNorm2d(features)] if norm else [])]
                layers.append(nn.ReLU())
                channels = features
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.timm = timm
        if timm:
            self.pre_logits = nn.ModuleDict(
                {"fc1": nn.Conv2d(channels, hidden, 7), "fc2": nn.Conv2d(hidden, hidden, 1)}
            )
            self.head = nn.ModuleDict({"fc": nn.Linear(hidden, classes)})
        else:
            dense = [nn.Linear(channels * 49, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden)]
            self.classifier = nn.Sequential(*dense, nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 7)
        if not self.timm:
            return self.classifier(x.flatten(1))
        x = self.pre_logits["fc2"](self.pre_logits["fc1"](x).relu()).relu()
        return self.head["fc"](x.flatten(1))


class AlexNet(nn.Module):
    def __init__(self, width, hidden, classes):
        super().__init__()
        w = [3, width, 3 * width, 6 * width, 4 * width, 4 * width]
        pool = nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(
            nn.Conv2d(w[0], w[1], 11, 4, 2), nn.ReLU(), pool, nn.Conv2d(w[1], w[2], 5, padding=2), nn.ReLU(), pool,
            nn.Conv2d(w[2], w[3], 3, padding=1), nn.ReLU(), nn.Conv2d(w[3], w[4], 3, padding=1), nn.ReLU(),
            nn.Conv2d(w[4], w[5], 3, padding=1), nn.ReLU(), pool,
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(w[5] * 36, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x):
        return self.classifier(nn.functional.adaptive_avg_pool2d(self.features(x), 6).flatten(1))


def _projection(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs, features, stride, *, bottleneck, option="B"):
        super().__init__()
        outputs = 4 * features if bottleneck else features
        shapes = [(inputs, features, 1, 1), (features, features, 3, stride), (features, outputs, 1, 1)]
        shapes = shapes if bottleneck else [(inputs, features, 3, stride), (features, features, 3, 1)]
        self.depth, self.stride, self.option = len(shapes), stride, option
        for i, (a, b, k, s) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        if (inputs != outputs or stride > 1) and option == "B":
            self.downsample = _projection(inputs, outputs, stride)
        self.extra = outputs - inputs

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.depth else y
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif self.extra:
            half = self.extra // 2
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return (x + y).relu()


class ResNet(nn.Module):
    """torchvision's; with `cifar` the public CIFAR-10 ones: option A, 3x3 stem, the head called linear."""

    def __init__(self, blocks, width, classes, *, bottleneck=False, cifar=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if cifar else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs, self.cifar, self.stages = width, cifar, len(blocks)
        for i, count in enumerate(blocks):
            stage, features = [], width * 2**i
            for j in range(count):
                stride = 2 if i and not j else 1
                stage.append(Block(inputs, features, stride, bottleneck=bottleneck, option="A" if cifar else "B"))
                inputs = 4 * features if bottleneck else features
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        setattr(self, "linear" if cifar else "fc", nn.Linear(inputs, classes))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x if self.cifar else nn.functional.max_pool2d(x, 3, 2, 1)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return (self.linear if self.cifar else self.fc)(x.mean((2, 3)))


class BlockV2(nn.Module):
    def __init__(self, inputs, features, stride, *, bottleneck):
        super().__init__()
        outputs = 4 * features if bottleneck else features
        shapes = [(inputs, features, 1, 1), (features, features, 3, stride), (features, outputs, 1, 1)]
        shapes = shapes if bottleneck else [(inputs, features, 3, stride), (features, features, 3, 1)]
        self.depth = len(shapes)
        for i, (a, b, k, s) in enumerate(shapes, 1):
            setattr(self, f"norm{i}", nn.BatchNorm2d(a))
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
        if inputs != outputs or stride > 1:
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, 1, stride, bias=False)})

    def forward(self, x):
        first = self.norm1(x).relu()
        x = self.downsample["conv"](first) if hasattr(self, "downsample") else x
        y = self.conv1(first)
        for i in range(2, self.depth + 1):
            y = getattr(self, f"conv{i}")(getattr(self, f"norm{i}")(y).relu())
        return x + y


class ResNetV2(nn.Module):
    """timm's: the head is a 1x1 convolution."""

    def __init__(self, blocks, width, classes, *, bottleneck=True):
        super().__init__()
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, width, 7, 2, 3, bias=False)})
        inputs, stages = width, []
        for i, count in enumerate(blocks):
            stage = []
            for j in range(count):
                features = width * 2**i
                stage.append(BlockV2(inputs, features, 2 if i and not j else 1, bottleneck=bottleneck))
                inputs = 4 * features if bottleneck else features
            stages.append(nn.ModuleDict({"blocks": nn.Sequential(*stage)}))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.ModuleDict({"fc": nn.Conv2d(inputs, classes, 1)})

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem["conv"](x), 3, 2, 1)
        for stage in self.stages:
            x = stage["blocks"](x)
        return self.head["fc"](self.norm(x).relu().mean((2, 3), keepdim=True)).flatten(1)


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        return torch.cat([x, y], 1)


class DenseNet(nn.Module):
    def __init__(self, layers, growth, stem, classes):
        super().__init__()
        self.features, channels = nn.Module(), stem
        self.features.conv0 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.features.norm0 = nn.BatchNorm2d(stem)
        self.blocks = len(layers)
        for i, count in enumerate(layers, 1):
            block = nn.Sequential()
            for j in range(1, count + 1):
                block.add_module(f"denselayer{j}", DenseLayer(channels, growth))
                channels += growth
            setattr(self.features, f"denseblock{i}", block)
            if i < len(layers):
                transition = nn.Module()
                transition.norm = nn.BatchNorm2d(channels)
                transition.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
                setattr(self.features, f"transition{i}", transition)
                channels //= 2
        self.features.norm5 = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x):
        f = self.features
        x = nn.functional.max_pool2d(f.norm0(f.conv0(x)).relu(), 3, 2, 1)
        for i in range(1, self.blocks + 1):
            x = getattr(f, f"denseblock{i}")(x)
            if i < self.blocks:
                transition = getattr(f, f"transition{i}")
                x = nn.functional.avg_pool2d(transition.conv(transition.norm(x).relu()), 2)
        return self.classifier(f.norm5(x).relu().mean((2, 3)))


def _padded(x, conv, keras):
    """A 3x3 convolution; Keras puts the zeros of stride 2 behind the last row and column."""
    after = keras and conv.stride[0] == 2
    return conv(nn.functional.pad(x, (0, 1, 0, 1) if after else (1, 1, 1, 1)))


class Separable(nn.Module):
    def __init__(self, inputs, outputs, stride, keras):
        super().__init__()
        self.keras = keras
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, stride, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = nn.functional.relu6(self.bn1(_padded(x, self.conv_dw, self.keras)))
        return nn.functional.relu6(self.bn2(self.conv_pw(x)))


class MobileNet(nn.Module):
    """timm's blocks.STAGE.INDEX; with `keras` its padding."""

    def __init__(self, width, classes, *, keras=False):
        super().__init__()
        self.keras = keras
        c = [int(width * channels) for channels in (32, 64, 128, 256, 512, 1024)]
        self.conv_stem, self.bn1 = nn.Conv2d(3, c[0], 3, 2, bias=False), nn.BatchNorm2d(c[0])
        stages = []
        for i, (count, stride) in enumerate(((1, 1), (2, 2), (2, 2), (6, 2), (2, 2))):
            steps = [Separable(c[i], c[i + 1], stride, keras)]
            steps += [Separable(c[i + 1], c[i + 1], 1, keras) for _ in range(count - 1)]
            stages.append(nn.Sequential(*steps))
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(c[5], classes)

    def forward(self, x):
        x = nn.functional.relu6(self.bn1(_padded(x, self.conv_stem, self.keras)))
        return self.classifier(self.blocks(x).mean((2, 3)))


class Fire(nn.Module):
    def __init__(self, inputs, squeeze):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, 4 * squeeze, 1)
        self.expand3x3 = nn.Conv2d(squeeze, 4 * squeeze, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


class SqueezeNet(nn.Module):
    def __init__(self, version, classes):
        super().__init__()
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        fires = [(16, 1), (16, 8), (32, 8), (32, 16), (48, 16), (48, 24), (64, 24), (64, 32)]
        modules = [Fire(16 * before if i else (96 if version == "1_0" else 64), squeeze)
                   for i, (squeeze, before) in enumerate(fires)]  # fmt: skip
        if version == "1_0":
            stem, cuts = nn.Conv2d(3, 96, 7, 2), (3, 7)
        else:
            stem, cuts = nn.Conv2d(3, 64, 3, 2), (2, 4)
        a, b = cuts
        layers = [stem, nn.ReLU(), pool, *modules[:a], pool, *modules[a:b], pool, *modules[b:]]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.classifier(self.features(x)).flatten(1)


class ConvNorm(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class Branches(nn.Module):
    """The third branch has a 3x3 convolution, not the paper's 5x5."""

    def __init__(self, inputs, one, reduce3, three, reduce5, five, pooled):
        super().__init__()
        self.branch1 = ConvNorm(inputs, one, 1)
        self.branch2 = nn.Sequential(ConvNorm(inputs, reduce3, 1), ConvNorm(reduce3, three, 3))
        self.branch3 = nn.Sequential(ConvNorm(inputs, reduce5, 1), ConvNorm(reduce5, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvNorm(inputs, pooled, 1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Auxiliary(nn.Module):
    def __init__(self, inputs, width, classes):
        super().__init__()
        self.conv = ConvNorm(inputs, 2 * width, 1)
        self.fc1, self.fc2 = nn.Linear(32 * width, 16 * width), nn.Linear(16 * width, classes)

    def forward(self, x):
        x = self.conv(nn.functional.adaptive_avg_pool2d(x, 4))
        return self.fc2(self.fc1(x.flatten(1)).relu())


class GoogLeNet(nn.Module):
    """torchvision's; `heads` gives the logits of both auxiliary classifiers too."""

    def __init__(self, width, classes):
        super().__init__()
        rows = {
            "3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64),
            "4a": (480, 192, 96, 208, 16, 48, 64), "4b": (512, 160, 112, 224, 24, 64, 64),
            "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
            "4e": (528, 256, 160, 320, 32, 128, 128), "5a": (832, 256, 160, 320, 32, 128, 128),
            "5b": (832, 384, 192, 384, 48, 128, 128),
        }  # fmt: skip
        self.conv1 = ConvNorm(3, width, 7, 2)
        self.conv2, self.conv3 = ConvNorm(width, width, 1), ConvNorm(width, 3 * width, 3)
        self.stages = tuple(rows)
        for stage, row in rows.items():
            setattr(self, f"inception{stage}", Branches(*(channels * width // 64 for channels in row)))
        self.aux1, self.aux2 = Auxiliary(8 * width, width, classes), Auxiliary(528 * width // 64, width, classes)
        self.fc = nn.Linear(16 * width, classes)

    def heads(self, x):
        x = nn.functional.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = nn.functional.max_pool2d(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        seen = {}
        for stage in self.stages:
            x = seen[stage] = getattr(self, f"inception{stage}")(x)
            if stage in ("3b", "4e"):
                x = nn.functional.max_pool2d(x, 3 if stage == "3b" else 2, 2, ceil_mode=True)
        return self.fc(x.mean((2, 3))), self.aux1(seen["4a"]), self.aux2(seen["4d"])

    def forward(self, x):
        return self.heads(x)[0]
