"""Convolutions fed by a norm, or around one."""

import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, floats, matrix, zoo

PICTURE = (floats("B", 4, 4, D),)


class Over1d(Normed):
    """``nn.Conv1d`` made with ``words`` over the normed tokens."""

    words: dict[str, object] = {"kernel_size": 1}

    def __init__(self, norm):
        super().__init__(norm)
        self.conv = nn.Conv1d(D, self.words.get("out", 6), **{k: v for k, v in self.words.items() if k != "out"})

    def forward(self, x):
        return self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)


@zoo("Conv1d with a kernel of 1", EITHER)
class PointwiseConv1d(Over1d):
    pass


@zoo("Conv1d with a kernel of 3, not padded", EITHER)
class Conv1dUnpadded(Over1d):
    words = {"kernel_size": 3}


@zoo("Conv1d with a kernel of 3, padded with zeros", EITHER, REFUSED)
class Conv1dPadded(Over1d):
    words = {"kernel_size": 3, "padding": 1}


@zoo("Conv1d without a bias", EITHER)
class Conv1dWithoutBias(Over1d):
    words = {"kernel_size": 1, "bias": False}


@zoo("depthwise Conv1d", EITHER, REFUSED)
class Depthwise(Over1d):
    words = {"kernel_size": 3, "groups": D, "out": D}


@zoo("grouped Conv1d", EITHER, REFUSED)
class Grouped(Over1d):
    words = {"kernel_size": 1, "groups": 2}


@zoo("Conv1d over the tokens as channels, as many as features", REFUSED, inputs=(floats("B", D, D),))
class ConvOverTokens(Over1d):
    def forward(self, x):
        return self.conv(self.norm(x))


@zoo("ConvTranspose1d", EITHER)
class Transposed(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.conv = nn.ConvTranspose1d(D, 6, 2, 2)

    def forward(self, x):
        return self.conv(self.norm(x).mT).mT


@zoo("Conv2d with a kernel of 1, channels last to channels first", EITHER, inputs=PICTURE)
class PointwiseConv2d(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.conv = nn.Conv2d(D, 6, 1)

    def forward(self, x):
        return self.conv(self.norm(x).permute(0, 3, 1, 2))


@zoo("ConvNeXt's downsampling: norm, then Conv2d with a stride", EITHER, inputs=PICTURE)
class Downsampling(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.conv = nn.Conv2d(D, 6, 2, 2)

    def forward(self, x):
        return self.conv(self.norm(x).permute(0, 3, 1, 2))


@zoo("ConvNeXt's block", FOLDS, inputs=(floats("B", D, 4, 4),))
class ConvNeXt(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.depthwise = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.up, self.down, self.gamma = nn.Linear(D, 16), nn.Linear(16, D), matrix(D)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@zoo("a patch convolution of tokens put back into a picture", EITHER, inputs=(floats("B", 16, D),))
class PatchConv(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.conv = nn.Conv2d(D, 6, 2, 2)

    def forward(self, x):
        return self.conv(self.norm(x).transpose(1, 2).view(-1, D, 4, 4)).flatten(2).mT


@zoo("a norm after a patch convolution, before a linear map", FOLDS, inputs=(floats("B", 3, 4, 4),))
class NormAfterPatches(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.conv, self.linear = nn.Conv2d(3, D, 2, 2), nn.Linear(D, 6)

    def forward(self, image):
        return self.linear(self.norm(self.conv(image).flatten(2).mT))


@zoo("unfolded into windows, then one linear map", EITHER, inputs=PICTURE)
class Unfolded(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(4 * D, 6)

    def forward(self, x):
        return self.linear(F.unfold(self.norm(x).permute(0, 3, 1, 2), 2, stride=2).mT)


@zoo("a norm over the picture, (channels, height, width), and a convolution", REFUSED, inputs=(floats("B", 3, 4, 4),))
class NormOverPicture(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.conv = norm((3, 4, 4)), nn.Conv2d(3, 6, 2)

    def forward(self, image):
        return self.conv(self.norm(image))


@zoo("Conformer's convolution module: pointwise, GLU, depthwise", EITHER)
class ConformerConv(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.first, self.depthwise = nn.Conv1d(D, 2 * D, 1), nn.Conv1d(D, D, 3, padding=1, groups=D)
        self.last = nn.Conv1d(D, D, 1)

    def forward(self, x):
        y = F.glu(self.first(self.norm(x).mT), 1)
        return x + self.last(F.silu(self.depthwise(y))).mT


@zoo("a norm over the width of a picture whose columns are the features", REFUSED, inputs=(floats("B", 1, 5, D),))
class NormOverColumns(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(x))
