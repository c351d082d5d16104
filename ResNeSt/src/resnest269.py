"""ResNeSt-269 (arXiv 2004.08955): 110.9 million parameters with 1,000 classes."""

from src.resnest import ResNeSt

BLOCKS, STEM_WIDTH = (3, 30, 48, 8), 64
RESIZE, INPUT_SIZE = 416, 416  # pixels: images are resized to a square, whose centre is what the network sees


def resnest269(num_classes: int = 1000, fused: bool = False, dropout: float = 0.0) -> ResNeSt:
    """ResNeSt-269; the arguments are those of ResNeSt."""
    return ResNeSt(BLOCKS, STEM_WIDTH, num_classes, fused, dropout)
