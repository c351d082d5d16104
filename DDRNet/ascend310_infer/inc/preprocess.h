#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "resample.h"

// An image ready for the model: float32 (3, crop, crop), or why there is none.
struct Prepared {
  std::vector<float> tensor;
  std::string problem;
};

// The evaluation's preprocessing: decoded as RGB, resized to a square, its centre cut out, /255, less ImageNet's mean, by
// its standard deviation. Equal to the Python evaluation bit for bit, but for CMYK, which OpenCV converts to RGB otherwise
// than Pillow (by up to two grey levels).
class Preprocess {
 public:
  Preprocess(int resize, int crop, Filter filter) : resize_(resize), crop_(crop), filter_(filter) {}

  Prepared operator()(const std::filesystem::path& path) const;

 private:
  int resize_, crop_;
  Filter filter_;
};
