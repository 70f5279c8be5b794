"""Models of segmentation_models_pytorch: each architecture, and each kind of encoder in a U-Net."""

from __future__ import annotations

from torch import nn

_ENCODERS = ("mobilenet_v2", "mobileone_s0", "mit_b0", "efficientnet-b0", "timm-efficientnet-b0")
_ENCODERS += ("densenet121", "dpn68", "vgg11_bn", "xception", "inceptionv4", "inceptionresnetv2")
_ENCODERS += ("se_resnet50", "timm-skresnet18", "tu-convnext_atto")
_VIT = "tu-vit_tiny_patch16_224"


def segmentation_models() -> list[str]:
    """Names such as ``"Unet/resnet18"``, an architecture and its encoder."""
    from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING

    names = [one.__name__ for one in MODEL_ARCHITECTURES_MAPPING.values()]
    chosen = [f"{name}/{_VIT if name == 'DPT' else 'resnet18'}" for name in names]
    return chosen + [f"Unet/{encoder}" for encoder in _ENCODERS]


def build_segmentation(name: str) -> nn.Module:
    """A model with random weights."""
    from segmentation_models_pytorch import create_model

    architecture, _, encoder = name.partition("/")
    model: nn.Module = create_model(architecture, encoder, encoder_weights=None, classes=3)
    return model.eval()
