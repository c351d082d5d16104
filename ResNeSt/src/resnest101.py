"""ResNeSt-101 (arXiv 2004.08955): 48.3 million parameters with 1,000 classes."""

from src.resnest import ResNeSt

BLOCKS, STEM_WIDTH = (3, 4, 23, 3), 64
RESIZE, INPUT_SIZE = 256, 256  # pixels: images are resized to a square, whose centre is what the network sees


def resnest101(num_classes: int = 1000, fused: bool = False, dropout: float = 0.0) -> ResNeSt:
    """ResNeSt-101; the arguments are those of ResNeSt."""
    return ResNeSt(BLOCKS, STEM_WIDTH, num_classes, fused, dropout)
