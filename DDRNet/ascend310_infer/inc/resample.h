#pragma once

#include <opencv2/core.hpp>

enum class Filter { kBilinear, kBicubic };

// Resizes an image (H, W, 3) of bytes to the square of `side` pixels, aspect ratio not kept, and returns the square of
// `count` pixels that begins `first` pixels from its left and top. The result equals that of Pillow's Image.resize bit for
// bit: where it shrinks, the filter is stretched so that every pixel counts (antialiasing, which cv::resize lacks), rows
// and columns are filtered one after the other in fixed point, and the pixels in between are bytes.
cv::Mat Resample(const cv::Mat& image, int side, int first, int count, Filter filter);
