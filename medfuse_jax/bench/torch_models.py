"""The released models in plain PyTorch, of our own making, with the released names of parameters.

Tests fill them with `torch_import.export` and compare their scores with ours.

Shapes: B rows (stays), P X-rays, T time, F EHR channel, H W pixels, D LSTM width, E X-ray features, K label.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import rnn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, num_inputs: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(num_inputs, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or num_inputs != features:
            projection = nn.Conv2d(num_inputs, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(features))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + shortcut)


class Backbone(nn.Module):
    """A ResNet of basic blocks without a classifier, which can run any range of stages."""

    def __init__(self, stage_sizes: tuple[int, ...], width: int):
        super().__init__()
        self.num_stages = len(stage_sizes)
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        num_inputs = width
        for i, num_blocks in enumerate(stage_sizes, start=1):
            features, blocks = width * 2 ** (i - 1), []
            for j in range(num_blocks):
                blocks.append(BasicBlock(num_inputs, features, 2 if i > 1 and j == 0 else 1))
                num_inputs = features
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.num_features = num_inputs

    def forward(self, x, after: int = 0, last: int | None = None):
        """Run stages after+1 to last, and the stem before them if `after` is 0."""
        if after == 0:
            x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(after + 1, (last or self.num_stages) + 1):
            x = getattr(self, f"layer{i}")(x)
        return x


class CxrModel(nn.Module):
    def __init__(self, stage_sizes, width: int, num_labels: int):
        super().__init__()
        self.vision_backbone = Backbone(stage_sizes, width)
        self.classifier = nn.Sequential(nn.Linear(self.vision_backbone.num_features, num_labels))


class EhrModel(nn.Module):
    def __init__(self, num_channels: int, hidden: int, num_labels: int, dropout: float, packed: bool):
        super().__init__()
        self.packed = packed
        self.dropout = dropout
        self.layer0 = nn.LSTM(num_channels, hidden, batch_first=True)
        self.layer1 = nn.LSTM(hidden, hidden, batch_first=True)
        self.dense_layer = nn.Linear(hidden, num_labels)

    def first_layer(self, ehr_BTF, length_B):
        return run_lstm(self.layer0, ehr_BTF, length_B, self.packed)[0]

    def last_state(self, hidden_BTD, length_B):
        last_BD = run_lstm(self.layer1, hidden_BTD, length_B, self.packed)[1]
        return functional.dropout(last_BD, self.dropout, self.training)

    def forward(self, ehr_BTF, length_B):
        return self.last_state(self.first_layer(ehr_BTF, length_B), length_B)


def run_lstm(layer: nn.LSTM, x_BTF, length_B, packed: bool):
    """Return (hidden states [B, T, D], the last valid one [B, D]). Lengths are at least 1, on the CPU if packed."""
    if packed:
        series = rnn.pack_padded_sequence(x_BTF, length_B.cpu(), batch_first=True, enforce_sorted=False)
        hidden, (last_1BD, _) = layer(series)
        return rnn.pad_packed_sequence(hidden, batch_first=True, total_length=x_BTF.shape[1])[0], last_1BD[0]
    hidden_BTD, _ = layer(x_BTF)
    index_B1D = (length_B - 1).view(-1, 1, 1).expand(-1, 1, hidden_BTD.shape[2])
    return hidden_BTD, hidden_BTD.gather(1, index_B1D.to(hidden_BTD.device))[:, 0]


def mean_over_steps(hidden_BTD, length_B):
    steps = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
    valid_BT1 = (steps < length_B.to(hidden_BTD.device)[:, None])[..., None]
    return (hidden_BTD * valid_BT1).sum(1) / valid_BT1.sum(1)


class Mmtm(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        squeezed = 2 * (channels + hidden) // 4
        self.fc_squeeze = nn.Linear(channels + hidden, squeezed)
        self.fc_visual = nn.Linear(squeezed, channels)
        self.fc_skeleton = nn.Linear(squeezed, hidden)


class Daft(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        bottleneck = int((16 + channels) / 7)
        layers = {
            "aux_base": nn.Linear(channels + hidden, bottleneck, bias=False),
            "aux_out": nn.Linear(bottleneck, 2 * hidden, bias=False),
        }
        self.aux = nn.ModuleDict(layers)


class Peer(nn.Module):
    """The model of one method. `forward` takes X-rays in any order, with their rows."""

    def __init__(
        self,
        method: str,
        num_labels: int,
        *,
        packed: bool,
        num_channels: int = 76,
        ehr_hidden: int = 256,
        fusion_hidden: int = 512,
        dropout: float = 0.3,
        resnet_stage_sizes: tuple[int, ...] = (3, 4, 6, 3),
        resnet_width: int = 64,
    ):
        super().__init__()
        self.method = method
        self.kind = method.rstrip("34")
        if self.kind != "uni_cxr":
            self.ehr_model = EhrModel(num_channels, ehr_hidden, num_labels, dropout, packed)
        if self.kind != "uni_ehr":
            # Differs from the released code, which also computes the unused stages after DAFT's.
            kept = resnet_stage_sizes[: int(method[-1])] if self.kind == "daft" else resnet_stage_sizes
            self.cxr_model = CxrModel(kept, resnet_width, num_labels)
            num_features = self.cxr_model.vision_backbone.num_features
        if self.kind in ("early", "joint", "joint_zeros", "joint_learnable", "medfuse"):
            self.projection = nn.Linear(num_features, ehr_hidden)
        if self.kind == "medfuse":
            self.lstm_fusion_layer = nn.LSTM(ehr_hidden, fusion_hidden, batch_first=True)
            self.lstm_fused_cls = nn.Sequential(nn.Linear(fusion_hidden, num_labels))
        elif self.kind == "mmtm":
            self.place = int(method[-1])
            self.projection = nn.Linear(ehr_hidden, num_features)
            self.joint_cls = nn.Sequential(nn.Linear(2 * num_features, num_labels))
            setattr(self, f"mmtm{self.place}", Mmtm(resnet_width * 2 ** (self.place - 1), ehr_hidden))
        elif self.kind == "daft":
            self.place = int(method[-1])
            setattr(self, f"daft_layer_{self.place}", Daft(num_features, ehr_hidden))
        elif hasattr(self, "projection"):
            self.fused_cls = nn.Sequential(nn.Linear(2 * ehr_hidden, num_labels))
            if self.kind == "joint_learnable":
                self.missing_token = nn.Parameter(torch.zeros(ehr_hidden))

    def forward(self, ehr_BTF, length_B, image_PCHW, row_P, has_cxr_B):
        """Return logits [B, K]. row_P: each X-ray's row, B for an empty slot; has_cxr_B: which rows have an X-ray."""
        if self.kind == "uni_ehr":
            return self.ehr_model.dense_layer(self.ehr_model(ehr_BTF, length_B))
        if self.kind == "uni_cxr":
            cxr_PE = self.cxr_model.vision_backbone(image_PCHW).mean((2, 3))
            return self.cxr_model.classifier(to_rows(cxr_PE, row_P, len(has_cxr_B)))
        if self.kind == "mmtm":
            return self._mmtm(ehr_BTF, length_B, image_PCHW, row_P, has_cxr_B)
        if self.kind == "daft":
            return self._daft(ehr_BTF, length_B, image_PCHW, row_P, has_cxr_B)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kind != "early"):
            ehr_BD = self.ehr_model(ehr_BTF, length_B)
            cxr_PE = self.cxr_model.vision_backbone(image_PCHW).mean((2, 3))
        cxr_BD = to_rows(self.projection(cxr_PE), row_P, len(has_cxr_B))
        if self.kind == "medfuse":
            token_B2D = torch.stack([ehr_BD, cxr_BD.to(ehr_BD.dtype)], 1)
            num_tokens_B = 1 + has_cxr_B.long()
            packed = self.ehr_model.packed
            return self.lstm_fused_cls(run_lstm(self.lstm_fusion_layer, token_B2D, num_tokens_B, packed)[1])
        missing = self.missing_token if self.kind == "joint_learnable" else torch.zeros_like(cxr_BD[0])
        cxr_BD = torch.where(has_cxr_B[:, None], cxr_BD, missing.to(cxr_BD.dtype))
        return self.fused_cls(torch.cat([ehr_BD, cxr_BD], 1))

    def train(self, mode: bool = True):
        super().train(mode)
        if self.kind == "early":  # as in ours, frozen encoders do not update their batch statistics
            self.cxr_model.eval()
        return self

    def _mmtm(self, ehr_BTF, length_B, image_PCHW, row_P, has_cxr_B):
        exchange = getattr(self, f"mmtm{self.place}")
        hidden_BTD = self.ehr_model.first_layer(ehr_BTF, length_B)
        x_PCHW = self.cxr_model.vision_backbone(image_PCHW, 0, self.place)
        stay_PD = from_rows(mean_over_steps(hidden_BTD, length_B), row_P)
        squeezed_PZ = functional.relu(exchange.fc_squeeze(torch.cat([x_PCHW.mean((2, 3)), stay_PD], 1)))
        x_PCHW = x_PCHW * torch.sigmoid(exchange.fc_visual(squeezed_PZ))[:, :, None, None]
        gate_BD = to_rows(torch.sigmoid(exchange.fc_skeleton(squeezed_PZ)), row_P, len(has_cxr_B))
        gate_BD = torch.where(has_cxr_B[:, None], gate_BD, torch.ones_like(gate_BD))
        ehr_BD = self.ehr_model.last_state(hidden_BTD * gate_BD[:, None], length_B)
        if self.place < self.cxr_model.vision_backbone.num_stages:
            x_PCHW = self.cxr_model.vision_backbone(x_PCHW, self.place)
        cxr_BE = to_rows(x_PCHW.mean((2, 3)), row_P, len(has_cxr_B))
        cxr_BE = torch.where(has_cxr_B[:, None], cxr_BE, torch.zeros_like(cxr_BE))
        return self.joint_cls(torch.cat([self.projection(ehr_BD), cxr_BE], 1))

    def _daft(self, ehr_BTF, length_B, image_PCHW, row_P, has_cxr_B):
        layer = getattr(self, f"daft_layer_{self.place}").aux
        hidden_BTD = self.ehr_model.first_layer(ehr_BTF, length_B)
        image_PC = self.cxr_model.vision_backbone(image_PCHW).mean((2, 3))
        stay_PD = from_rows(mean_over_steps(hidden_BTD, length_B), row_P)
        affine_PA = layer["aux_out"](functional.relu(layer["aux_base"](torch.cat([image_PC, stay_PD], 1))))
        scale_BD, shift_BD = to_rows(affine_PA, row_P, len(has_cxr_B)).chunk(2, 1)
        scale_BD = torch.where(has_cxr_B[:, None], scale_BD, torch.ones_like(scale_BD))
        shift_BD = torch.where(has_cxr_B[:, None], shift_BD, torch.zeros_like(shift_BD))
        hidden_BTD = hidden_BTD * scale_BD[:, None] + shift_BD[:, None]
        return self.ehr_model.dense_layer(self.ehr_model.last_state(hidden_BTD, length_B))


def to_rows(x_PE, row_P, num_rows: int):
    """Scatter X-ray values to their rows [B, E], zeros elsewhere. Empty slots go to an extra row, which is dropped."""
    rows = torch.zeros(num_rows + 1, x_PE.shape[1], dtype=x_PE.dtype, device=x_PE.device)
    return rows.index_copy(0, row_P, x_PE)[:num_rows]


def from_rows(x_BE, row_P):
    """Gather row values for the X-rays [P, E]. An empty slot gets the last row's values, which are never used."""
    return x_BE[row_P.clamp(max=len(x_BE) - 1)]
