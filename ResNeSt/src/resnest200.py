"""ResNeSt-200 (arXiv 2004.08955): 70.2 million parameters with 1,000 classes."""

from src.resnest import ResNeSt

BLOCKS, STEM_WIDTH = (3, 24, 36, 3), 64
RESIZE, INPUT_SIZE = 320, 320  # pixels: images are resized to a square, whose centre is what the network sees


def resnest200(num_classes: int = 1000, fused: bool = False, dropout: float = 0.0) -> ResNeSt:
    """ResNeSt-200; the arguments are those of ResNeSt."""
    return ResNeSt(BLOCKS, STEM_WIDTH, num_classes, fused, dropout)
