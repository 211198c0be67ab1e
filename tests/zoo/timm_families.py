"""Which timm models stand for all: the smallest of every family, and some for a block that no smallest one has.

    python tests/zoo/zoo.py families     finds `FAMILIES` again (three minutes)

A family is a module of `timm.models`. Of each that has a model with a BatchNorm, `FAMILIES` names the one with the
fewest parameters (timm 1.0.31). timm's `test_*` models, toys for its own tests, stand in `BESIDES` where they have one.
"""

from __future__ import annotations

FAMILIES: dict[str, str] = {
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "convmixer": "convmixer_768_32",
    "cpubone": "cpubone_nano",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "maxxvit": "maxvit_pico_rw_256",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs",
    "nasnet": "nasnetalarge",
    "nextvit": "nextvit_small",
    "pnasnet": "pnasnet5large",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "tiny_vit": "tiny_vit_5m_224",
    "tresnet": "tresnet_m",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer_hybrid": "vit_small_resnet50d_s16_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}

BESIDES: dict[str, str] = {
    "test_byobnet": "byobnet",
    "test_efficientnet": "efficientnet",
    "test_coatnet": "maxxvit",
    "test_maxvit": "maxxvit",
    "test_resnet": "resnet",
    "mobileone_s0": "byobnet",  # four branches beside each other, a BatchNorm one of them
    "repvgg_a0": "byobnet",  # 3×3 beside 1×1 beside BatchNorm
    "gernet_s": "byobnet",
    "eca_botnext26ts_256": "byoanet",
    "lambda_resnet26t": "byoanet",
    "densenetblur121d": "densenet",
    "mixnet_s": "efficientnet",  # depthwise kernels of several sizes
    "tf_mobilenetv3_small_minimal_100": "mobilenetv3",  # padding that depends on the size
    "lcnet_035": "mobilenetv3",
    "mobilenetv4_conv_small_035": "mobilenetv3",
    "ghostnetv2_100": "ghostnet",
    "ghostnetv3_050": "ghostnet",  # branches, trained beside each other
    "levit_conv_128s": "levit",
    "coatnet_bn_0_rw_224": "maxxvit",  # BatchNorm where the others have LayerNorm
    "mobilevitv2_050": "mobilevit",
    "regnety_002": "regnet",
    "seresnet18": "resnet",
    "resnetv2_50": "resnetv2",
    "xception41": "xception_aligned",
}
"""Model → family."""


def family_of(model: str) -> str:
    """The family of one of the models named here."""
    return {name: family for family, name in FAMILIES.items()}.get(model) or BESIDES[model]


def smallest_of_each_family() -> dict[str, str]:
    """Family → its model with the fewest parameters that has a BatchNorm. No weights are made."""
    import timm
    import torch

    found: dict[str, str] = {}
    for family in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=family):
            if name.startswith("test_"):
                continue
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
                sizes.append((sum(parameter.numel() for parameter in model.parameters()), name))
        if sizes:
            found[family] = min(sizes)[1]
    return found
