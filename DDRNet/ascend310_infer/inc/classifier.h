#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "include/api/model.h"
#include "options.h"

// A MINDIR classifier on a device, for batches of a fixed size.
class Classifier {
 public:
  // Throws Error if the file or the device cannot be used, or the input is not float32 (batch_size, 3, crop, crop).
  explicit Classifier(const Options& options);

  // Length of an image's logits.
  size_t classes() const { return classes_; }

  // Where the images of a batch go, float32 (3, crop, crop) one after the other. Holds until the next `Infer`.
  float* Input();

  // The logits of the batch, (batch_size, classes). Throws Error if the device fails.
  const std::vector<float>& Infer();

 private:
  mindspore::Model model_;
  std::vector<mindspore::MSTensor> inputs_;
  std::vector<float> logits_;
  size_t batch_size_;
  std::string log_;  // where Lite says more than its status
  size_t classes_ = 0;
};
