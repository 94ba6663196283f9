"""A file of Inception's weights in torch-fidelity's format, drawn at random."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as theirs


def write_random_weights(path: Path) -> Path:
    """Write weights that keep the variance of activations (He et al. 2015)."""
    net_class = theirs.FeatureExtractorInceptionV3
    with (
        mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(net_class, "load_state_dict", lambda *_: None),
    ):
        net = net_class("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    torch.save(net.state_dict(), path)
    return path
