"""A detector as a network of fixed cost, for counting: what MMDetection 2.x counted for the published tables."""

from torch import Tensor, nn

PROPOSALS = 1000
"""Regions that reach the box heads; the first 100 reach the mask heads."""
MASK_PROPOSALS = 100


class FixedCost(nn.Module):
    """Every layer of a detector, run as often as in one picture.

    Backbone, neck and dense head run on the picture. Of a detector with regions, each stage's box head runs on 1000
    and each stage's mask head on 100 of them, the convention of the published tables; at test time MMDetection runs the
    mask heads on what the box heads have found, at most 100 too.

    Args:
        detector: FCOS, Cascade (Mask) R-CNN or another detector with such parts.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[1, 3, H, W]` to what the heads give, in no particular order."""
        detector = self.detector
        maps = detector.extract_feat(images)  # type: ignore[operator]
        dense = detector.rpn_head if getattr(detector, "with_rpn", False) else detector.bbox_head
        outputs = [tensor for level in dense(maps) for tensor in level]  # type: ignore[operator]
        head = getattr(detector, "roi_head", None)
        if head is None:
            return outputs
        for box_head, extractor in zip(head.bbox_head, head.bbox_roi_extractor, strict=True):
            outputs += box_head(_pooled(extractor, maps[0], PROPOSALS))
        if head.with_mask:
            for mask_head, extractor in zip(head.mask_head, head.mask_roi_extractor, strict=True):
                outputs.append(mask_head(_pooled(extractor, maps[0], MASK_PROPOSALS)))
        return outputs


def _pooled(extractor: nn.Module, like: Tensor, regions: int) -> Tensor:
    """What a region extractor gives, `[regions, C, h, w]`, without its data-dependent choice of the level."""
    size = extractor.roi_layers[0].output_size  # type: ignore[index]
    return like.new_zeros(regions, int(extractor.out_channels), *size)  # type: ignore[arg-type]
