"""Networks of timm with random weights: the largest subnet is the network, and smaller ones are their students."""

import pytest
import timm
import torch

from tests.conversion.test_lowering import check

NAMES = (
    *("mobilenetv4_conv_small", "efficientnetv2_rw_t", "resnetv2_50", "fastvit_t8", "convnext_atto", "resnet50_gn"),
    *("resnet26d", "repvgg_a0", "ghostnet_100", "nfnet_l0", "resnetv2_50x1_bit", "tf_efficientnet_lite0", "mixnet_s"),
    *("regnetz_b16", "regnety_002", "densenet121", "dla34", "vovnet39a", "hardcorenas_a", "starnet_s1", "rexnet_100"),
    *("poolformer_s12", "hgnetv2_b0", "res2net50_26w_4s", "repghostnet_050", "tinynet_e"),
    *("inception_v3", "hrnet_w18_small"),
)


def convert(name):
    torch.manual_seed(0)
    return check(
        timm.create_model(name, pretrained=False, num_classes=7).eval(),
        sizes=(96, 128) if name == "inception_v3" else (64, 96),
    )


def test_a_network_with_timm_s_own_batch_norms_is_converted_exactly():
    conversion = convert("mobilenetv3_small_100")
    assert all(row.elastic for row in conversion.report)
    assert conversion.smallest_shares()["macs"] < 0.07


@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_timm_s_networks_are_converted_exactly(name):
    convert(name)
